"""The published recipes, the anchor alone, and one direction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fitting_cases import KEY, QUICK, margins

import lore_jax as lore
from lore_jax._train import (
    published,
)


@pytest.mark.parametrize("dtypes", [("f4", "f8"), ("f8", "f4"), ("f4", "f4")])
@pytest.mark.parametrize("make", [lore.PublishedJoint, lore.PublishedAlternating])
def test_published_forms_keep_the_dtype_of_each_parameter(table, make, dtypes):
    with jax.enable_x64(True):
        settings = make(num_steps=2, prior=None)
        rng = np.random.default_rng(0)
        sizes = zip(((5, 2), (12, 2)), dtypes, strict=True)
        init = lore.RewardParams(*(rng.normal(size=x).astype(t) for x, t in sizes))
        fitted = lore.fit(table, rank=2, key=KEY, recipe=settings, init=init)
        got = fitted.model.basis.dtype, fitted.params.logits.dtype
        assert got == tuple(map(np.dtype, dtypes))


def test_rank_zero_is_the_anchor_alone(table):
    anchor = np.arange(5, dtype=np.float32)
    for settings in (QUICK, lore.PublishedJoint(num_steps=3)):
        fitted = lore.fit(table, rank=0, key=KEY, recipe=settings, anchor=anchor)
        np.testing.assert_array_equal(fitted.model.basis, anchor[:, None])
        np.testing.assert_array_equal(fitted.weights, np.ones((12, 1)))
        assert fitted.model.temperature == settings.temperature
        assert len(fitted.history.loss) == 0
    new = lore.adapt(fitted.model, table)
    np.testing.assert_array_equal(new.weights, np.ones((12, 1)))
    whole = lore.fit(table, rank=0, key=KEY, anchor=np.arange(5))
    np.testing.assert_array_equal(whole.model.basis, anchor[:, None])
    assert whole.model.basis.dtype == np.float32


def test_rank_one_is_one_direction_for_everybody(table):
    search = lore.Search(ridges=(0.02,))  # Hardly shrunk: 120 pairs ask for more.
    fitted = lore.fit(table, rank=1, key=KEY, recipe=lore.Marginal(search=search))
    np.testing.assert_array_equal(fitted.weights, np.ones((12, 1)))
    np.testing.assert_array_equal(fitted.model.prior.mean, [1.0])
    # Near the best single direction: 3000 steps of gradient descent in NumPy.
    x = np.asarray(table.features, float)
    z = x[table.chosen] - x[table.rejected]
    v = np.zeros(5)
    for _ in range(3000):
        v += 0.3 * (z / (1 + np.exp(z @ v))[:, None]).mean(0)
    best = np.logaddexp(0, -z @ v).mean()
    got = np.logaddexp(0, -margins(fitted, table)).mean()
    assert best - 1e-6 < got < best + 0.01
    assert got < np.log(2) - 0.1


def test_a_fit_has_training_and_validation_curves(quick):
    report = lore.diagnostics.report(quick)
    np.testing.assert_array_equal(report["validation_steps"], range(2, 21, 2))
    (best,) = (r for r in quick.history.selection if r["chosen"] and "ridge" in r)
    np.testing.assert_allclose(report["validation"][-1], best["log_loss"], rtol=1e-5)
    both = np.mean([best["judgements"], best["items"]])
    np.testing.assert_allclose(best["log_loss"], both, rtol=1e-6)
    assert report["best_step"] in range(2, 21, 2)
    stops = [r for r in quick.history.selection if r["chosen"] and "num_steps" in r]
    assert report["loss"].shape == (stops[0]["num_steps"],)
    assert 0 < report["last_slope"] <= 1


def test_init_is_used(table, quick):
    start = lore.RewardParams(
        basis=np.asarray(quick.model.basis)[:, ::-1].copy(),
        logits=np.zeros((12, 2), np.float32),
    )
    fitted = lore.fit(table, rank=2, key=KEY, recipe=QUICK, init=start)
    assert float(fitted.history.loss[0]) < float(quick.history.loss[0]) - 1e-3
    assert not np.allclose(fitted.model.basis, quick.model.basis, atol=1e-3)
    np.testing.assert_array_equal(start.basis, np.asarray(quick.model.basis)[:, ::-1])


@pytest.mark.parametrize("make", [lore.PublishedJoint, lore.PublishedAlternating])
def test_a_published_fit_of_no_steps_is_its_init(table, make):
    start = lore.init_params(KEY, num_users=12, num_features=5, rank=2)
    none = make(num_steps=0, prior=None)
    fitted = lore.fit(table, rank=2, key=KEY, recipe=none, init=start)
    np.testing.assert_array_equal(fitted.model.basis, start.basis)
    np.testing.assert_array_equal(fitted.params.logits, start.logits)
    assert not start.basis.is_deleted()
    assert fitted.model.temperature == 100.0
    assert fitted.model.prior is None


def test_a_published_fit_descends_and_gets_a_prior(table):
    settings = lore.PublishedJoint(num_steps=60, learning_rate=0.5)
    fitted = lore.fit(table, rank=2, key=KEY, recipe=settings)
    loss = np.asarray(fitted.history.loss)
    assert loss[-1] < loss[0]
    np.testing.assert_allclose(fitted.weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(fitted.model.prior.log_weights).sum(), 1, rtol=1e-4
    )
    new = lore.adapt(fitted.model, table)
    assert new.converged.all()


def adam(value, slope, moments, rate, step):
    """One step as published (b1=.9, b2=.999, eps=1e-8), in NumPy."""
    first = 0.9 * moments[0] + 0.1 * slope
    second = 0.999 * moments[1] + 0.001 * slope**2
    scaled = first / (1 - 0.9**step), second / (1 - 0.999**step)
    return value - rate * scaled[0] / (np.sqrt(scaled[1]) + 1e-8), (first, second)


@pytest.mark.parametrize("order", ["gauss_seidel", "jacobi"])
def test_the_basis_step_sees_the_new_weights(table, order):
    """V must be stepped at the W of this step; Jacobi order must not match."""
    short = lore.PublishedAlternating(num_steps=3, temperature=2.0)
    start = lore.init_params(KEY, num_users=12, num_features=5, rank=2)
    trainer = published.make_trainer(short)
    state = trainer.init(start)
    problem = published.PublishedProblem(table, jnp.zeros(5))
    grad = jax.grad(lore.bradley_terry_loss)
    logits, basis = np.asarray(start.logits), np.asarray(start.basis)
    moments = [(0.0, 0.0), (0.0, 0.0)]
    step = jax.jit(trainer.step)
    for n in (1, 2, 3):
        state, _ = step(state, problem)
        old = lore.RewardParams(basis, logits)
        slope = np.asarray(grad(old, table, 2.0).logits)
        logits, moments[0] = adam(logits, slope, moments[0], 0.5, n)
        seen = old if order == "jacobi" else old.replace(logits=logits)
        slope = np.asarray(grad(seen, table, 2.0).basis)
        basis, moments[1] = adam(basis, slope, moments[1], 0.5, n)
    difference = np.abs(np.asarray(state.params.basis) - basis).max()
    assert difference < 1e-3 if order == "gauss_seidel" else difference > 1e-2


def test_pruning_keeps_what_anybody_weighs_above_a_hundredth():
    weights = np.array([[0.975, 0.009, 0.016], [0.984, 0.008, 0.008]], np.float32)
    params = lore.RewardParams(jnp.eye(4, 3), jnp.log(weights))
    kept, pruned = published.prune(params)
    np.testing.assert_array_equal(kept, [0, 2])
    np.testing.assert_array_equal(pruned.basis, np.eye(4, 3)[:, [0, 2]])
    want = weights[:, [0, 2]] / weights[:, [0, 2]].sum(1, keepdims=True)
    np.testing.assert_allclose(pruned.weights, want, rtol=1e-5)


def test_a_second_published_fit_compiles_nothing(table, compilations):
    short = lore.PublishedJoint(num_steps=5)
    first = lore.fit(table, rank=2, key=KEY, recipe=short)
    before = compilations.count
    again = lore.fit(table, rank=2, key=KEY, recipe=dataclasses.replace(short))
    assert compilations.count == before
    np.testing.assert_array_equal(first.model.basis, again.model.basis)
