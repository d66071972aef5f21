"""Every public function refuses what is not finite, or is traced."""

import re

import jax
import numpy as np
import pytest
from number_cases import CALLS, MODEL, PREFS, PRIOR, WEIGHTS, X, spoiled

import lore_jax as lore

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
