"""Derivatives, sharded arrays and strict settings of JAX change no result."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from number_cases import (
    BASIS,
    CALLS,
    LOGITS,
    MODEL,
    PREFS,
    PRIOR,
    STATE,
    WEIGHTS,
    X,
    loss,
)

import lore_jax as lore


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
    message = r"{} spans processes: .*pass arrays of this process"
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
