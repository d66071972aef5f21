"""What is not finite, overflows, is traced or lies elsewhere never gets in."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import lore_jax as lore
from lore_jax._solve import simplex

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
BASIS = np.eye(4, 2, dtype=np.float32)
WEIGHTS = np.full((2, 2), 0.5, np.float32)
LOGITS = np.zeros((2, 2), np.float32)
PREFS = lore.Preferences.from_pairs(X, [0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 1, 1])
PRIOR = lore.Prior(
    atoms=np.float32([[1, 0], [0, 1], [0.5, 0.5]]),
    log_weights=np.log(np.float32([0.25, 0.25, 0.5])),
    concentration=np.float32(2),
    tempering=np.float32(0),
)
MODEL = lore.RewardModel(BASIS, PRIOR)
STATE = lore.streaming.init(MODEL, num_users=2)
Z = np.ones((2, 3, 2), np.float32)
ONES = np.ones((2, 3), np.float32)


def spoiled(array, value):
    """A copy whose entry [1, 0] (or the last one of a vector) is `value`."""
    array = np.array(array)
    array[(1, 0) if array.ndim > 1 else -1] = value
    return array


def loss(basis, logits, prefs, temperature=1.0):
    params = lore.RewardParams(basis, logits)
    return lore.bradley_terry_loss(params, prefs, temperature)


def fit(prefs, init_basis=BASIS, init_logits=LOGITS, anchor=X[0]):
    recipe = lore.PublishedJoint(num_steps=1, alpha=0.1, prior=None)
    init = lore.RewardParams(init_basis, init_logits)
    return lore.fit(prefs, rank=2, key=KEY, recipe=recipe, init=init, anchor=anchor)


def adapt_published(basis, prefs, init):
    method = lore.PublishedAdam(num_steps=1, init=init)
    return lore.adapt(lore.RewardModel(basis), prefs, method=method)


def of_model(function, **settings):
    """A function of a model as one of its basis and prior."""

    def call(basis, prior=None, **arguments):
        model = lore.RewardModel(basis, prior)
        return function(model=model, **arguments, **settings)

    return call


# Every public function of numbers: what it is called with, by name.
CALLS = {
    "project": (lore.project, dict(features=X, basis=BASIS)),
    "reward": (lore.reward, dict(x=X, basis=BASIS, logits=LOGITS[0])),
    "reward_from_weights": (
        lore.reward_from_weights,
        dict(x=X, basis=BASIS, weights=WEIGHTS[0]),
    ),
    **{
        function.__name__: (
            of_model(function),
            dict(basis=BASIS, weights=WEIGHTS, prefs=PREFS),
        )
        for function in (lore.margins, lore.accuracy, lore.log_loss)
    },
    **{
        function.__name__: (
            of_model(function, **settings),
            dict(basis=BASIS, weights=WEIGHTS, features=X),
        )
        for function, settings in (
            (lore.score, {}),
            (lore.score_rows, dict(user=[0], rows=[1])),
            (lore.top_k, dict(user=[0], k=1)),
            (lore.best_of_n, dict(user=[0], candidates=[[1, 2]])),
            (lore.jury, dict(candidates=[[1, 2]])),
        )
    },
    "bradley_terry_loss": (loss, dict(basis=BASIS, logits=LOGITS, prefs=PREFS)),
    "cosine_anchor": (lore.losses.cosine_anchor, dict(basis=BASIS, anchor=X[0])),
    "l2_anchor": (lore.losses.l2_anchor, dict(basis=BASIS, anchor=X[0])),
    "ridge": (lore.losses.ridge, dict(basis=BASIS)),
    "adapt": (of_model(lore.adapt), dict(basis=BASIS, prior=PRIOR, prefs=PREFS)),
    "adapt_published": (adapt_published, dict(basis=BASIS, prefs=PREFS, init=LOGITS)),
    "adapt_users": (
        lore.adapt_users,
        dict(z=Z, sample_weight=ONES, prior=PRIOR, label=ONES),
    ),
    "marginal_loss": (
        lore.losses.marginal_loss,
        dict(z=Z, sample_weight=ONES, prior=PRIOR, label=ONES),
    ),
    "maximum_likelihood": (
        simplex.maximum_likelihood,
        dict(z=Z, weight=ONES, label=ONES),
    ),
    "maximum_a_posteriori": (
        simplex.maximum_a_posteriori,
        dict(z=Z, weight=ONES, barrier=WEIGHTS, label=ONES, start=WEIGHTS),
    ),
    "posterior": (
        of_model(lore.posterior),
        dict(basis=BASIS, prior=PRIOR, prefs=PREFS),
    ),
    "compare": (of_model(lore.compare), dict(basis=BASIS, prior=PRIOR, prefs=PREFS)),
    "predict_proba": (
        of_model(lore.predict_proba),
        dict(basis=BASIS, prior=PRIOR, prefs=PREFS, new_pairs=PREFS),
    ),
    "score_pairs": (
        of_model(lore.score_pairs),
        dict(basis=BASIS, prior=PRIOR, prefs=PREFS, candidates=PREFS),
    ),
    "init": (
        of_model(lore.streaming.init, num_users=2),
        dict(basis=BASIS, prior=PRIOR),
    ),
    "update": (
        of_model(lore.streaming.update),
        dict(basis=BASIS, prior=PRIOR, state=STATE, prefs=PREFS),
    ),
    "merge": (lore.streaming.merge, dict(a=STATE, b=STATE)),
    "weights": (lore.streaming.weights, dict(state=STATE)),
    "fit": (
        fit,
        dict(prefs=PREFS, init_basis=BASIS, init_logits=LOGITS, anchor=X[0]),
    ),
    "fit_prior": (
        lambda **a: lore.fit_prior(**a, key=KEY),
        dict(basis=BASIS, prefs=PREFS),
    ),
    "simulate_choices": (
        lore.data.simulate_choices,
        dict(rewards=np.ones((3, 4, 2), np.float32), weights=WEIGHTS),
    ),
    "expected_information": (
        lore.acquisition.expected_information,
        dict(probability=WEIGHTS, margins=LOGITS),
    ),
}
HOST = {
    *("adapt", "adapt_published", "posterior", "predict_proba", "score_pairs"),
    "compare",
    *("init", "update", "merge", "weights", "fit", "fit_prior"),
}
# What a message says of an argument that it calls by another name.
SAID = {"init_basis": "init.basis", "init_logits": "init.logits", "x": "features"}
SAID["sample_weight"] = "weight"
FIELDS = ("concentration", "tempering", "variance_scale", "decay", "margin_scale")


def complaint(function, arguments):
    """What a `ValueError` or `TypeError` says, or that there is none."""
    try:
        function(**arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing is refused"


def refusals(bad):
    """(function, arguments, what the message must say) with one argument spoiled."""
    for name, (function, arguments) in CALLS.items():
        for key, value in arguments.items():
            said = SAID.get(key, key)
            if isinstance(value, lore.Preferences):
                # Each row of this table that is bad belongs to a pair.
                changed = value.replace(features=spoiled(value.features, bad))
                said = r"features must be finite; row 1, column 0"
            elif isinstance(value, lore.Prior):
                changed = value.replace(log_weights=spoiled(value.log_weights, bad))
                said = r"prior\.log_weights must be finite; prior\.log_weights\[2\]"
            elif isinstance(value, lore.UserStates):
                changed = value.replace(table=spoiled(value.table, bad))
                said = rf"{key}.table must be finite"
                if name == "update":
                    continue  # Sums are only added to; `weights` looks at them.
            else:
                changed = spoiled(value, bad)
                if key in ("features", "x"):
                    said = "features must be finite; row 1, column 0"
            yield name, key, function, {**arguments, key: changed}, said


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_every_function_refuses_what_is_not_finite(bad):
    count = 0
    for name, key, function, arguments, said in refusals(bad):
        assert re.search(said, complaint(function, arguments)), (name, key)
        count += 1
    assert count > 60


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_every_field_of_a_prior_is_checked(field, bad):
    if (field, bad) == ("concentration", np.inf):
        return  # The posterior mean itself.
    prior = PRIOR.replace(**{field: np.float32(bad)})
    with pytest.raises(ValueError, match=rf"prior\.{field} must be"):
        lore.adapt(MODEL.replace(prior=prior), PREFS)
    prior = PRIOR.replace(**{field: np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=rf"prior\.{field} must be one number"):
        lore.streaming.init(MODEL.replace(prior=prior), num_users=2)


@pytest.mark.parametrize("bad", ["complex", "text", "objects", "flat"])
def test_every_function_refuses_another_type_or_shape(bad):
    count = 0
    for name, (function, arguments) in CALLS.items():
        for key, value in arguments.items():
            if not isinstance(value, np.ndarray):
                continue
            changed = {
                "complex": lambda x: x.astype(complex),
                "text": lambda x: np.full(x.shape, "1.5"),
                "objects": lambda x: np.full(x.shape, None),
                "flat": lambda x: np.float32(0.5),
            }[bad](value)
            said = complaint(function, {**arguments, key: changed})
            assert SAID.get(key, key) in said, (name, key)
            count += 1
    assert count > 50


def test_what_works_on_the_host_says_what_to_use_while_tracing():
    for name, (function, arguments) in CALLS.items():
        key = next(k for k, v in arguments.items() if not isinstance(v, float))

        def traced(value, function=function, arguments=arguments, key=key):
            return function(**{**arguments, key: value})

        if name in HOST:
            with pytest.raises(TypeError, match=r"is traced by jit.*use \w+"):
                jax.eval_shape(traced, arguments[key])
        else:
            jax.eval_shape(traced, arguments[key])


def test_building_under_a_trace_says_what_to_use():
    with pytest.raises(TypeError, match=r"features is traced .*prefs\.replace"):
        jax.jit(lambda x: lore.Preferences.from_pairs(x, [0], [1], [0]))(X)
    with pytest.raises(TypeError, match=r"chosen is traced .*prefs\.replace"):
        jax.jit(lambda c: lore.Preferences.from_pairs(X, c, [1], [0]))(np.array([0]))
    found = jax.jit(lambda x: lore.accuracy(MODEL, WEIGHTS, PREFS.replace(features=x)))
    np.testing.assert_array_equal(found(X), lore.accuracy(MODEL, WEIGHTS, PREFS))


def test_top_k_is_compiled_with_users_and_rows_as_arguments():
    user, rows = np.array([1, 0]), np.array([[0, 1, 2], [5, 6, 7]])

    def best(model, weights, table, user, rows):
        whole = lore.top_k(model, weights, table, user=user, k=2)
        return whole, lore.top_k(model, weights, table, user=user, k=1, rows=rows)

    want = best(MODEL, WEIGHTS, X, user, rows)
    got = jax.jit(best)(MODEL, WEIGHTS, X, user, rows)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("block", [np.nan, "wide", "short"])
def test_blocks_of_a_source_are_checked_by_every_reader(block):
    class Source(lore.ArraySource):
        def blocks(self):
            first, second = np.array(X[:5]), np.array(X[5:])
            if block == "wide":
                second = np.ones((3, 5), np.float32)
            elif block == "short":
                second = second[:2]
            else:
                second[1, 2] = block
            yield from (first, second)

    source = Source(X)
    prefs = PREFS.replace(features=source)
    what = {"wide": "float.rows, D. with D=4", "short": "M=8 rows"}
    message = what.get(block, "features must be finite; row 6, column 2 is nan")
    for call in (
        lambda: lore.project(source, BASIS),
        lambda: lore.score(MODEL, WEIGHTS, source),
        lambda: lore.top_k(MODEL, WEIGHTS, source, user=[0], k=1),
        lambda: lore.accuracy(MODEL, WEIGHTS, prefs),
        lambda: lore.adapt(MODEL, prefs),
        lambda: lore.predict_proba(MODEL, PREFS, prefs),
        lambda: lore.streaming.update(MODEL, STATE, prefs),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_source_promises_a_table_of_floats():
    source = lore.ArraySource(X.astype(int))
    with pytest.raises(TypeError, match="features must be floating point"):
        lore.Preferences.from_pairs(source, [0], [1], [0])


def pairs(**changes):
    arguments = dict(features=X, chosen=[0, 1], rejected=[2, 3], user=[0, 1])
    return lore.Preferences.from_pairs(**{**arguments, **changes})


class Unreadable:
    """Like a tensor of bfloat16, which NumPy cannot read."""

    def __array__(self, *args, **kwargs):
        raise TypeError("Got unsupported ScalarType BFloat16")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pairs(features=spoiled(X.astype(np.float64), 1e300)),
            ValueError,
            "features must be finite; row 1, column 0 is 1e.300, which overflows",
        ),
        (
            lambda: pairs(features=spoiled(X.astype(np.longdouble), 1e300)),
            ValueError,
            "row 1, column 0 .*overflows",
        ),
        (
            lambda: pairs(features=np.ma.masked_less(X, 0)),
            ValueError,
            "features must have no masked entry",
        ),
        (
            lambda: pairs(features=Unreadable()),
            TypeError,
            "features must be an array that NumPy can read.*BFloat16",
        ),
        (
            lambda: pairs(sample_weight=[1.0, 1e300]),
            ValueError,
            r"sample_weight must sum to at most 3\.4e\+38.*weight\[1\] is 1e\+300",
        ),
        (
            lambda: pairs(sample_weight=[3e38, 3e38]),
            ValueError,
            "sample_weight must sum to at most .*their sum is 6e",
        ),
        (
            lambda: pairs(sample_weight=np.ma.array([1.0, 2.0], mask=[False, True])),
            ValueError,
            r"sample_weight must have no masked entry; sample_weight\[1\]",
        ),
        (
            lambda: pairs(sample_weight=[1.0, None]),
            ValueError,
            r"sample_weight\[1\] is missing",
        ),
        (lambda: pairs(label=[None, 0.5]), ValueError, r"label\[0\] is missing"),
        (
            lambda: lore.project(X * np.float32(1e20), BASIS * np.float32(1e20)),
            ValueError,
            r"features · basis must stay below 8\.51e\+37 in float32 .*row 0 gives inf",
        ),
        (
            lambda: lore.log_loss(MODEL.replace(temperature=1e-38), WEIGHTS, PREFS),
            ValueError,
            "features · basis must stay below .*times T",
        ),
        (
            lambda: lore.adapt(
                lore.RewardModel(spoiled(BASIS.astype(np.float64), 1e300)), PREFS
            ),
            ValueError,
            r"model\.basis must be finite; model\.basis\[1, 0\] is not: 1e\+300, which",
        ),
        (
            lambda: lore.data.store_as(pairs(features=X * 1e5), np.float16),
            ValueError,
            r"finite in float16; row \d, column \d .*overflows float16",
        ),
        (
            lambda: fit(PREFS.replace(sample_weight=np.zeros(4, np.float32))),
            ValueError,
            r"prefs\.sample_weight is 0 for every pair",
        ),
        (
            lambda: lore.adapt_users(jnp.ones((3, 2)), jnp.ones(3), PRIOR),
            ValueError,
            r"z must be float\[U, P, K\], got shape \(3, 2\)",
        ),
        (
            lambda: lore.adapt_users(Z, ONES[:, :2], PRIOR),
            ValueError,
            r"sample_weight must be float\[U, P\] with U=2, P=3 like z, got shape "
            r"\(2, 2\)",
        ),
        (
            lambda: lore.adapt_users(Z, ONES, PRIOR, label=ONES[0]),
            ValueError,
            r"label must be float\[U, P\] .*got shape \(3,\)",
        ),
        (
            lambda: lore.adapt_users(np.ones((2, 3, 5)), ONES, PRIOR),
            ValueError,
            r"prior\.atoms must be float\[A, K\] with K=5",
        ),
        (
            lambda: lore.adapt_users(Z, -ONES, PRIOR),
            ValueError,
            r"sample_weight must be in \[0, inf\]; sample_weight\[0, 0\] is -1",
        ),
        (
            lambda: lore.best_pairs(np.array([1, np.nan, 2, 3]), PREFS),
            ValueError,
            r"scores\[1\] is nan",
        ),
        (
            lambda: lore.evaluation.macro_mean([0.5, np.inf]),
            ValueError,
            r"values\[1\] is inf",
        ),
        (
            lambda: lore.top_k(MODEL, WEIGHTS, X, user=[0], k=1.0),
            TypeError,
            "k must be an integer",
        ),
    ],
)
def test_wrong_numbers_are_refused_with_the_place(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_layouts_of_the_same_numbers_are_read_rightly():
    want = pairs(sample_weight=[1.0, 2.0], label=[0.25, 0.5])
    for dtype in (">f4", ">f8", np.longdouble):
        got = pairs(
            features=X.astype(dtype),
            chosen=np.array([0, 1], ">i8"),
            sample_weight=np.array([1, 2], dtype),
            label=np.array([0.25, 0.5], dtype),
        )
        assert got.features.dtype == np.float32
        assert got.sample_weight.dtype.isnative
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(pairs(features=np.ma.array(X)).features, X)


def test_only_the_table_is_shared_with_the_caller():
    chosen, weight = np.array([0, 1], np.int32), np.array([1, 2], np.float32)
    prefs = pairs(chosen=chosen, sample_weight=weight)
    chosen[:], weight[:] = 7, 9
    np.testing.assert_array_equal(prefs.chosen, [0, 1])
    np.testing.assert_array_equal(prefs.sample_weight, [1, 2])
    assert np.shares_memory(prefs.features, X)


def test_second_derivatives_of_adapted_weights():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        prior = jax.tree.map(lambda x: np.asarray(x, np.float64), PRIOR)
        z, move = rng.normal(size=(2, 1, 3, 2))

        def first(z):
            return lore.adapt_users(z, np.ones((1, 3)), prior).weights[0, 0]

        slope = jax.jit(jax.grad(first))
        want = (slope(z + 1e-5 * move) - slope(z - 1e-5 * move)) / 2e-5
        got = np.tensordot(jax.jit(jax.hessian(first))(z), move, 3)
        np.testing.assert_allclose(got, want, atol=1e-7)
        assert np.abs(want).max() > 1e-3


def test_an_array_that_spans_processes_is_refused(monkeypatch):
    table = jnp.asarray(X)
    kind = type(table)
    monkeypatch.setattr(kind, "is_fully_addressable", property(lambda self: False))
    message = r"{} spans processes: .*every process must pass"
    for name, (function, arguments) in CALLS.items():
        for key, value in arguments.items():
            if name.startswith("fit") and key != "prefs":
                continue  # The key of the fit is an array too, and comes first.
            if isinstance(value, np.ndarray):
                moved, said = jnp.asarray(value), key
            elif isinstance(value, lore.Preferences):
                moved, said = value.replace(features=table), rf"{key}\.features"
            else:
                continue
            if name == "bradley_terry_loss" and key in ("basis", "logits"):
                said = rf"params\.{key}"
            if key == "basis" and function.__name__ == "call":
                said = r"model\.basis"
            with pytest.raises(ValueError, match=message.format(said)):
                function(**{**arguments, key: moved})
    with pytest.raises(ValueError, match=message.format("features")):
        lore.Preferences.from_pairs(table, [0], [1], [0])
    with pytest.raises(ValueError, match=message.format(r"differences\[0\]")):
        lore.Preferences.from_ragged([table])


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_of_one_process_give_the_same(axes):
    mesh = Mesh(np.array(jax.devices()[:4]), ("users",), axis_types=(axes,))
    table = jax.device_put(X, NamedSharding(mesh, Spec("users")))
    sharded = lore.Preferences.from_pairs(
        table, *(PREFS.chosen, PREFS.rejected, PREFS.user)
    )
    basis = jax.device_put(BASIS, NamedSharding(mesh, Spec()))
    model = MODEL.replace(basis=basis)

    def everything(model, prefs, table):
        return (
            lore.adapt(model, prefs).weights,
            lore.posterior(model, prefs).mean,
            lore.predict_proba(model, prefs, prefs),
            lore.accuracy(model, WEIGHTS, prefs),
            lore.margins(model, WEIGHTS, prefs),
            lore.top_k(model, WEIGHTS, table, user=[0, 1], k=2),
            lore.score_rows(model, WEIGHTS, table, [0, 1], [3, 4]),
            lore.streaming.update(model, STATE, prefs).table,
            loss(model.basis, LOGITS, prefs),
        )

    got, want = everything(model, sharded, table), everything(MODEL, PREFS, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with jax.set_mesh(mesh):
        inside = lore.accuracy(model, WEIGHTS, sharded)
    np.testing.assert_array_equal(inside, want[3])


SCRIPT = """
import numpy as np, jax, jax.numpy as jnp
import lore_jax as lore
X = np.random.default_rng(0).normal(size=(8, 4)).astype("f")
B, W = np.eye(4, 2, dtype="f"), np.full((3, 2), 0.5, "f")
P = lore.Preferences.from_pairs(
    X, [0, 1, 2], [4, 5, 6], [0, 0, 1], 3, label=[0.2, 1, 1], sample_weight=[1, 2.5, 1]
)
prior = lore.Prior(
    np.eye(2, dtype="f"), np.log(np.float32([0.5, 0.5])), np.float32(2), np.float32(0)
)
model = lore.RewardModel(B, prior)
new = lore.adapt(model, P, return_std=True)
assert np.isnan(new.loss).tolist() == [False, False, True]
lore.adapt(model, P, method=lore.MaximumLikelihood())
lore.posterior(model, P)
lore.predict_proba(model, P, P)
lore.score_pairs(model, P, P)
state = lore.streaming.init(model, num_users=3)
lore.streaming.weights(lore.streaming.update(model, state, P))
assert np.isnan(lore.accuracy(model, new, P)).tolist() == [False, False, True]
lore.log_loss(model, W, P)
lore.top_k(model, W, X, user=[0, 1], k=2)
lore.score_rows(model, W, X, [0], [1])
params = lore.RewardParams(jnp.asarray(B), jnp.zeros((3, 2)))
jax.grad(lore.bradley_terry_loss)(params, P)
lore.fit(P, rank=2, key=jax.random.key(0), recipe=lore.PublishedJoint(num_steps=2))
"""


@pytest.mark.parametrize(
    "setting",
    [{"JAX_DEBUG_NANS": "1"}, {"JAX_NUMPY_DTYPE_PROMOTION": "strict"}],
    ids=str,
)
def test_strict_settings_of_jax_change_nothing(setting):
    root = str(pathlib.Path(lore.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": root, **setting},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
