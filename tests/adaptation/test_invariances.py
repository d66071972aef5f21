"""Adapted weights: orders, batches, units and equal ways to say the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaptation_cases import (
    COUNTS,
    EMPTY,
    FEATURES,
    ML,
    RANK,
    TEMPERATURE,
    random_differences,
    user_margins,
)

import lore_jax as lore
from lore_jax._solve import simplex


def test_users_in_a_batch_equal_a_loop_over_users(basis, max_likelihood):
    """The batch against `simplex.solve_user`, one padded user at a time."""
    solve = jax.jit(simplex.solve_user)
    for u, z in enumerate(user_margins(basis, random_differences())):
        padded = np.zeros((10, RANK), np.float32)
        padded[: len(z)] = z
        weight = (np.arange(10) < len(z)) / max(1, len(z))
        alone = solve(padded, weight.astype(np.float32))
        np.testing.assert_allclose(alone.weights, max_likelihood.weights[u], atol=2e-3)


@pytest.mark.parametrize("method", [lore.PosteriorMean(), ML], ids=["default", "ml"])
def test_a_result_does_not_depend_on_batch_mates(
    basis, prefs, prior, default, max_likelihood, method
):
    together = max_likelihood if method == ML else default
    for mates in ([1], [6, EMPTY, 0], [5]):
        some = lore.take_users(prefs, mates)
        model = lore.RewardModel(basis, prior, TEMPERATURE)
        alone = lore.adapt(model, some, method=method)
        np.testing.assert_allclose(alone.weights, together.weights[mates], atol=1e-6)
        np.testing.assert_allclose(alone.loss, together.loss[mates], rtol=1e-6)


def test_the_order_of_users_is_irrelevant(basis, prefs, prior, default):
    order = np.array([4, 0, 7, 3, 1, 6, 2, 5])
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    out = lore.adapt(model, lore.take_users(prefs, order))
    np.testing.assert_allclose(out.weights, default.weights[order], atol=1e-6)


def test_the_order_of_pairs_is_irrelevant(basis, prefs, prior, default):
    mix = np.random.default_rng(0).permutation(prefs.num_pairs)
    other = lore.Preferences.from_pairs(
        prefs.features, mix, None, prefs.user[mix], prefs.num_users
    )
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), other)
    np.testing.assert_allclose(out.weights, default.weights, atol=1e-4)


def test_directions_may_be_permuted(basis, prefs, max_likelihood):
    order = np.array([2, 0, 1])
    model = lore.RewardModel(basis[:, order], temperature=TEMPERATURE)
    out = lore.adapt(model, prefs, method=ML)
    np.testing.assert_allclose(out.weights, max_likelihood.weights[:, order], atol=5e-3)
    np.testing.assert_allclose(out.loss, max_likelihood.loss, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        jnp.asarray,
        lore.ArraySource,
        functools.partial(lore.ArraySource, block_rows=7),
    ],
    ids=["jax", "source", "small_blocks"],
)
def test_features_may_live_anywhere(basis, prefs, prior, default, make):
    moved = prefs.replace(features=make(prefs.features))
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), moved)
    np.testing.assert_allclose(out.weights, default.weights, atol=1e-5)


def test_responses_and_their_differences_agree(basis, prior, default):
    parts = random_differences()
    rng = np.random.default_rng(3)
    second = rng.normal(size=(sum(COUNTS), FEATURES)).astype(np.float32)
    first = second + np.concatenate(parts)
    number = np.arange(len(first))
    prefs = lore.Preferences.from_pairs(
        np.concatenate([first, second]) + np.float32(1),
        number,
        number + len(first),
        np.repeat(np.arange(len(COUNTS)), COUNTS),
        len(COUNTS),
    )
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs)
    np.testing.assert_allclose(out.weights, default.weights, atol=1e-3)


def differences_of(user, **fields):
    """User `user`'s six rows for user 0, and the same rows as user 1's plain pairs."""
    (x,) = random_differences((6,), seed=user)
    rows = np.asarray(fields.pop("rows", np.arange(6)))
    fields = {name: np.concatenate([v, np.ones(6)]) for name, v in fields.items()}
    return lore.Preferences.from_pairs(
        np.concatenate([x, -x]),
        np.concatenate([rows, np.arange(6)]),
        None,
        np.repeat([0, 1], [len(rows), 6]),
        **fields,
    )


def test_a_pair_of_weight_two_is_two_pairs_and_of_weight_zero_is_none(basis, prior):
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    once = lore.adapt(model, differences_of(5, sample_weight=[2, 1, 0, 2, 1, 1]))
    rows = [0, 0, 1, 3, 3, 4, 5]
    twice = lore.adapt(model, differences_of(5, rows=rows))
    np.testing.assert_allclose(once.weights, twice.weights, atol=1e-4)
    np.testing.assert_allclose(once.loss, twice.loss, rtol=1e-4)
    none = lore.adapt(model, differences_of(5, sample_weight=np.zeros(6)))
    np.testing.assert_array_equal(none.weights[0], np.asarray(prior.mean))
    assert np.isnan(none.loss[0])
    np.testing.assert_allclose(none.weights[1], once.weights[1], atol=1e-6)


def test_a_soft_label_is_a_split_pair(basis, prior):
    y = np.array([1.0, 0.25, 0.6, 0.0, 1.0, 1.0])
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    soft = lore.adapt(model, differences_of(6, label=y))
    rows = [0, 1, 7, 2, 8, 9, 4, 5]
    weight = [1.0, 0.25, 0.75, 0.6, 0.4, 1.0, 1.0, 1.0]
    split = lore.adapt(model, differences_of(6, rows=rows, sample_weight=weight))
    np.testing.assert_allclose(soft.weights, split.weights, atol=1e-4)
    np.testing.assert_allclose(soft.loss, split.loss, rtol=1e-4)


def test_temperature_divides_the_margins(basis, prefs, max_likelihood):
    model = lore.RewardModel(8 * basis, temperature=8 * TEMPERATURE)
    out = lore.adapt(model, prefs, method=ML)
    np.testing.assert_allclose(out.weights, max_likelihood.weights, atol=1e-4)
    np.testing.assert_allclose(out.loss, max_likelihood.loss, rtol=1e-4)
