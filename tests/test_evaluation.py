"""Accuracy, log-loss, calibration and intervals against NumPy."""

import math

import jax
import numpy as np
import pytest

import lore_jax as lore

evaluate = lore.evaluation


def line(values, users, **fields):
    """Pairs whose margin under basis [[1]] and weight 1 is the given value."""
    table = np.asarray(values, np.float32)[:, None]
    return lore.Preferences.from_pairs(
        table, np.arange(len(table)), None, users, **fields
    )


ONE = np.ones((1, 1), np.float32)


def test_accuracy_counts_a_zero_margin_one_half():
    prefs = line([1.0, 0.0, -1.0, 2.0, 0.0], [0, 0, 1, 1, 1], num_users=3)
    got = lore.accuracy(lore.RewardModel(ONE), np.ones((3, 1), np.float32), prefs)
    np.testing.assert_allclose(got[:2], [0.75, 0.5], rtol=1e-6)
    assert np.isnan(got[2])


def test_accuracy_of_interleaved_users_goes_to_the_right_user():
    prefs = line([1.0, -1.0, 1.0, -1.0], [1, 0, 1, 0])
    got = lore.accuracy(lore.RewardModel(ONE), np.ones((2, 1), np.float32), prefs)
    np.testing.assert_array_equal(got, [0.0, 1.0])


def test_accuracy_with_soft_labels_and_weights():
    prefs = line([1.0, -1.0], [0, 0], label=[0.7, 0.2], sample_weight=[3.0, 1.0])
    got = lore.accuracy(lore.RewardModel(ONE), ONE, prefs)
    np.testing.assert_allclose(got, [(3 * 0.7 + 0.8) / 4], rtol=1e-6)


def test_accuracy_uses_each_users_weights():
    table = np.array([[1.0, -1.0]], np.float32)
    prefs = lore.Preferences.from_pairs(table, [0, 0], None, [0, 1])
    weights = np.array([[0.9, 0.1], [0.1, 0.9]])
    got = lore.accuracy(lore.RewardModel(np.eye(2)), weights, prefs)
    np.testing.assert_array_equal(got, [1.0, 0.0])


def test_log_loss_matches_the_equation():
    values, y = np.array([0.3, -2.0, 5.0]), np.array([1.0, 0.4, 0.0])
    prefs = line(values, [0, 0, 1], num_users=3, label=y)
    model = lore.RewardModel(ONE, temperature=2.0)
    got = lore.log_loss(model, np.ones((3, 1), np.float32), prefs)
    m = values / 2
    loss = y * np.logaddexp(0, -m) + (1 - y) * np.logaddexp(0, m)
    np.testing.assert_allclose(got[:2], [loss[:2].mean(), loss[2]], rtol=1e-6)
    assert np.isnan(got[2])


def test_log_loss_is_the_users_weighting_of_the_loss(make_preferences):
    prefs = make_preferences(sample_weight=True, label=True)
    params = lore.init_params(jax.random.key(0), num_users=5, num_features=6, rank=2)
    model = lore.RewardModel(params.basis, temperature=3.0)
    per_user = lore.log_loss(model, params.weights, prefs)
    want = lore.bradley_terry_loss(params, prefs, 3.0, "users")
    np.testing.assert_allclose(np.nansum(per_user), want, rtol=1e-5)


def test_a_source_gives_the_same_accuracy(make_preferences):
    prefs = make_preferences()
    basis = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    model, weights = lore.RewardModel(basis), np.full((5, 2), 0.5, np.float32)
    source = prefs.replace(features=lore.ArraySource(prefs.features, 7))
    np.testing.assert_array_equal(
        lore.accuracy(model, weights, source), lore.accuracy(model, weights, prefs)
    )


def test_macro_mean_leaves_out_users_without_a_value():
    assert evaluate.macro_mean([0.5, np.nan, 1.0]) == 0.75
    assert math.isnan(evaluate.macro_mean([np.nan]))


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0.6, 0.2, 400)
    values[::10] = np.nan
    got = evaluate.bootstrap_interval(values, seed=1)
    clean = values[~np.isnan(values)]
    error = 1.96 * clean.std() / math.sqrt(len(clean))
    assert got.mean == pytest.approx(clean.mean())
    assert got.num_users == 360
    assert got.low == pytest.approx(clean.mean() - error, abs=0.15 * error)
    assert got.high == pytest.approx(clean.mean() + error, abs=0.15 * error)
    assert got == evaluate.bootstrap_interval(values, seed=1)
    narrow = evaluate.bootstrap_interval(values, level=0.5, seed=1)
    assert got.low < narrow.low < narrow.high < got.high


def test_splits_count_equally_and_are_resampled():
    splits = [np.zeros(300), np.ones(100)]
    got = evaluate.bootstrap_interval(splits)
    assert got.mean == 0.5
    # Nothing varies within a split; only which splits are drawn does.
    assert (got.low, got.high) == (0.0, 1.0)


def test_bootstrap_of_constants_is_exact():
    got = evaluate.bootstrap_interval(np.full(30, 0.25))
    assert (got.mean, got.low, got.high) == (0.25, 0.25, 0.25)


def test_a_paired_difference_is_narrower_than_the_parts():
    rng = np.random.default_rng(0)
    users = rng.normal(0.6, 0.2, 300)
    better, worse = users + 0.02, users + rng.normal(0, 0.01, 300)
    worse[3] = np.nan
    got = evaluate.paired_difference(better, worse)
    assert got.num_users == 299
    assert 0 < got.low < 0.02 < got.high < 0.04
    split = evaluate.paired_difference([better, better], [worse, worse])
    assert split.mean == pytest.approx(got.mean)


def test_calibration_of_a_calibrated_forecast():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = (rng.random(20_000) < p).astype(float)
    got = evaluate.calibration(p, y)
    assert got.expected_error < 0.02
    assert got.count.sum() == 20_000
    assert got.brier == pytest.approx(((p - y) ** 2).mean())
    want = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert got.log_loss == pytest.approx(want)
    np.testing.assert_allclose(got.confidence, got.frequency, atol=0.05)


def test_calibration_of_an_overconfident_forecast():
    p, y = np.full(100, 0.99), np.repeat([1.0, 0.0], [60, 40])
    got = evaluate.calibration(p, y)
    assert got.expected_error == pytest.approx(0.39)
    assert got.frequency[-1] == pytest.approx(0.6)
    assert np.isnan(got.frequency[0])


def test_calibration_survives_certainty():
    got = evaluate.calibration([1.0, 0.0, 0.5], [1.0, 0.0, 1.0])
    assert got.log_loss == pytest.approx(math.log(2) / 3)
    assert evaluate.calibration([0.0]).log_loss > 100


def test_four_way_scores_each_part_with_its_own_users():
    right = lore.Preferences.from_ragged([np.ones((2, 1), np.float32)])
    wrong = lore.Preferences.from_ragged([-np.ones((3, 1), np.float32)] * 2)
    parts = lore.data.FourWay(right, right, wrong, wrong)
    model = lore.RewardModel(ONE)
    got = evaluate.four_way(model, ONE, np.ones((2, 1), np.float32), parts)
    assert {name: np.asarray(x).tolist() for name, x in got.items()} == {
        "seen_training": [1.0],
        "seen_heldout": [1.0],
        "unseen_training": [0.0, 0.0],
        "unseen_heldout": [0.0, 0.0],
    }


def test_an_undecided_model_is_calibrated():
    """Half of its choices would be right, whichever side is called first."""
    assert evaluate.calibration(np.full(8, 0.5)).expected_error == 0.0
