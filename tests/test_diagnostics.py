"""The report tells collapse from use, on fits whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax.results import History


def fitted(basis, weights, loss=(2.0, 1.0), **curve):
    weights = jnp.asarray(weights, jnp.float32)
    basis = jnp.asarray(basis, jnp.float32)
    atoms = jnp.eye(basis.shape[1])
    prior = lore.Prior(
        atoms=atoms,
        log_weights=jnp.zeros(len(atoms)),
        concentration=jnp.ones(()),
        tempering=jnp.zeros(()),
    )
    loss = jnp.asarray(loss)
    return lore.Fitted(
        model=lore.RewardModel(basis, prior),
        weights=weights,
        logits=jnp.log(weights + 1e-9),
        history=History(loss, loss, loss, **curve),
        recipe=lore.Marginal(),
    )


def test_two_orthogonal_camps_use_two_directions():
    half = np.repeat(np.eye(3)[:2], 5, axis=0)
    report = lore.diagnostics.report(fitted(np.eye(4, 3), half))
    assert report["effective_rank"] == pytest.approx(2.0, abs=1e-3)
    np.testing.assert_allclose(report["leading"], [0.5, 0.5, 0])
    np.testing.assert_allclose(report["directions"], [0.5, 0.5, 0])
    np.testing.assert_allclose(report["cosines"], np.eye(3), atol=1e-6)
    assert report["variation"] == pytest.approx(0.5)
    assert not report["collapsed"]


def test_the_same_weights_for_everybody_is_collapse():
    report = lore.diagnostics.report(fitted(np.eye(4, 3), np.full((7, 3), 1 / 3)))
    assert report["collapsed"]
    assert report["effective_rank"] == pytest.approx(1.0, abs=1e-3)


def test_equal_directions_are_one_direction():
    basis = np.ones((4, 2))
    report = lore.diagnostics.report(fitted(basis, np.eye(2)[[0, 1, 0]]))
    assert report["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(report["cosines"], np.ones((2, 2)), atol=1e-6)


def test_convergence_and_rank_one():
    loss = np.concatenate([np.linspace(2, 1, 50), np.ones(50)])
    report = lore.diagnostics.report(fitted(np.ones((4, 1)), np.ones((3, 1)), loss))
    assert report["last_change"] == 0.0
    assert not report["collapsed"]
    assert np.isnan(
        lore.diagnostics.report(fitted(np.ones((4, 1)), np.ones((3, 1)), ()))[
            "last_change"
        ]
    )


def test_the_validation_curve_shows_over_fitting():
    basis, weights = np.ones((4, 1)), np.ones((3, 1))
    report = lore.diagnostics.report(fitted(basis, weights))
    assert report["best_step"] is None
    assert np.isnan(report["over_fitted"])
    curve = dict(validation=np.array([0.6, 0.5, 0.53]))
    curve["validation_steps"] = np.array([4, 8, 10])
    report = lore.diagnostics.report(fitted(basis, weights, (4.0, 2.0, 1.0), **curve))
    assert report["best_step"] == 8
    assert report["over_fitted"] == pytest.approx(0.03)
    assert report["last_slope"] == pytest.approx(0.25)
    assert report["num_steps"] == 3


def test_the_plot_shows_what_the_report_says():
    pytest.importorskip("matplotlib", reason="needs the extra quickstart")
    weights = np.repeat(np.eye(3)[:2], [6, 2], axis=0)
    fit = fitted(np.eye(4, 3), weights, (3.0, 2.0, 1.5))
    fit = fit.replace(
        history=fit.history._replace(
            validation=np.array([0.6, 0.5]), validation_steps=np.array([1, 3])
        )
    )
    curves, shares, angles, right, *_ = lore.diagnostics.plot(fit).axes
    np.testing.assert_allclose(curves.lines[0].get_ydata(), [3.0, 2.0, 1.5])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[1, 0.6], [3, 0.5]])
    heights = [bar.get_height() for bar in shares.patches]
    np.testing.assert_allclose(heights, [0.75, 0.25, 0.0] * 2)
    np.testing.assert_allclose(angles.images[0].get_array(), np.eye(3), atol=1e-6)
