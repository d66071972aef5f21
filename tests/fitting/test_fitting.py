"""`fit`: determinism, invariances, recovery, starts."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from fitting_cases import KEY, QUICK, chosen_rows, margins

import lore_jax as lore
from lore_jax import _backend
from lore_jax._train import (
    coordinates,
    recipe,
    resume,
    steps,
    trainer,
    validation,
)


def test_deterministic_for_a_key_and_compiled_once(table, quick, compilations):
    before = compilations.count
    again = lore.fit(table, rank=2, key=KEY, recipe=QUICK)
    assert compilations.count == before
    np.testing.assert_array_equal(again.model.basis, quick.model.basis)
    np.testing.assert_array_equal(again.weights, quick.weights)
    other = lore.fit(table, rank=2, key=jax.random.key(1), recipe=QUICK)
    assert not np.allclose(other.model.basis, quick.model.basis)


def test_of_several_starts_the_least_objective_is_kept(table, monkeypatch):
    several, ends = dataclasses.replace(QUICK, num_starts=5, start="random"), {}
    original = trainer.CandidateTrainer.__call__

    def spy(self, trainings, **settings):
        for one, found in zip(trainings, original(self, trainings, **settings)):
            state, metrics, _ = found
            if one.name == "all":
                if one.start == 3:  # Neither the first nor the last is best.
                    metrics = metrics._replace(loss=metrics.loss - 1)
                    found = found._replace(metrics=metrics)
                penalty = one.candidate.ridge / 2 * float((state.theta**2).sum())
                value = 12 * float(metrics.loss[-1]) + penalty
                smoothing = one.candidate.smoothing
                made = self.coordinates_of(one.name, one.prefs, smoothing)
                basis = coordinates.basis_of(state.theta, made)
                ends[one.start] = value, np.array(basis)
            yield found

    monkeypatch.setattr(trainer.CandidateTrainer, "__call__", spy)
    fitted = lore.fit(table, rank=2, key=jax.random.key(1), recipe=several)
    best = min(ends, key=lambda start: ends[start][0])
    assert best == 3
    np.testing.assert_array_equal(fitted.model.basis, ends[best][1])
    ends.clear()
    given = lore.fit(table, rank=2, key=KEY, recipe=several, init=fitted.params)
    assert list(ends) == [0]
    assert given.history.loss.size


def test_the_fit_stops_where_held_out_pairs_say_so(monkeypatch):
    """200 people with pairs of their own: 60 free directions over-fit."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6, 60)).astype(np.float32)
    x *= np.where(rng.random((200, 6)) < 1 / (1 + np.exp(-x[..., 0])), 1, -1)[..., None]
    search = lore.Search(smoothings=(0.1,), ridges=(1e-3,), temperings=(0.0,))
    longer, refined = lore.Marginal(num_steps=40, search=search), []
    original = recipe.choose_refinement

    def spy(holdouts, results, scales, grids):
        losses = [x.loss(proj, [p])[0] for x, (proj, p) in zip(holdouts, results)]
        refined.append(np.mean([lore.evaluation.macro_mean(x) for x in losses]))
        return original(holdouts, results, scales, grids)

    monkeypatch.setattr(recipe, "choose_refinement", spy)
    prefs = lore.Preferences.from_ragged(list(x.astype(np.float32)))
    fitted = lore.fit(prefs, rank=2, key=KEY, recipe=longer)
    curve, steps = fitted.history.validation, fitted.history.validation_steps
    np.testing.assert_array_equal(steps, 4 * np.arange(1, 11))
    best = int(np.argmin(curve))
    assert best < 9
    assert len(fitted.history.loss) == steps[best]
    rows = [row for row in fitted.history.selection if "num_steps" in row]
    assert [row["num_steps"] for row in rows if row["chosen"]] == [steps[best]]
    # What follows is chosen for that stop, and not for the over-fitted end.
    assert refined == [pytest.approx(curve[best], rel=1e-5)]
    assert curve[best] < curve[-1] - 1e-3


def test_trainings_run_at_the_same_time_unless_recorded(table, monkeypatch):
    """Both wait for each other, or nobody may be in when the next one comes."""
    monkeypatch.setattr(_backend.multiprocessing, "cpu_count", lambda: 2)
    both, inside = threading.Barrier(2), []

    def together(self, some, *settings):
        both.wait(timeout=30)
        return some

    def alone(self, some, *settings):
        assert not inside
        inside.append(some)
        time.sleep(0.05)
        return inside.pop()

    source = table.replace(features=lore.ArraySource(table.features))
    told = resume.Run(on_progress=lambda _: None)
    for prefs, run, function in (
        (table, resume.Run(), together),
        (table, told, alone),
        (source, resume.Run(), alone),
    ):
        train = trainer.CandidateTrainer(prefs, (KEY, KEY), QUICK, None, run)
        monkeypatch.setattr(trainer.CandidateTrainer, "_train", function)
        one = trainer.Training("all", prefs, train.first(2))
        both_starts = [one, one._replace(start=1)]
        assert list(train(both_starts)) == both_starts


def test_a_dip_within_the_noise_stops_nothing(table, monkeypatch):
    """The mean is least at the fifth stop, thanks to one user."""

    def curve(split, bases, priors):
        users = len(split.heldout.counts)
        losses = np.ones((len(bases), users)) + 1e-3 * np.arange(users)
        if len(bases) > 1:
            losses[4, 0] = 0.5
        return losses

    monkeypatch.setattr(validation.Validation, "curve", curve)
    search = lore.Search(smoothings=(0.1,), ridges=(0.2,), temperings=(0.4,))
    longer = lore.Marginal(num_steps=40, search=search)
    fitted = lore.fit(table, rank=2, key=KEY, recipe=longer)
    assert fitted.history.validation.argmin() == 4
    assert len(fitted.history.loss) == 40


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_features_changes_nothing(table, quick, scale):
    scaled = table.replace(features=table.features * np.float32(scale))
    fitted = lore.fit(scaled, rank=2, key=KEY, recipe=QUICK)
    assert chosen_rows(fitted) == chosen_rows(quick)
    want = margins(quick, table)
    np.testing.assert_allclose(
        margins(fitted, scaled), want, atol=0.02 * np.abs(want).max()
    )


def test_a_constant_row_changes_nothing(table, quick):
    shift = np.random.default_rng(3).normal(size=5).astype(np.float32) * 4
    moved = table.replace(features=table.features + shift)
    fitted = lore.fit(moved, rank=2, key=KEY, recipe=QUICK)
    assert chosen_rows(fitted) == chosen_rows(quick)
    want = margins(quick, table)
    np.testing.assert_allclose(
        margins(fitted, moved), want, atol=0.02 * np.abs(want).max()
    )


def test_the_basis_applies_to_raw_features(table, quick):
    x = np.asarray(table.features)
    stored = lore.reward_from_weights(
        x[table.chosen] - x[table.rejected],
        quick.model.basis,
        quick.weights[table.user],
        quick.model.temperature,
    )
    got = margins(quick, table)[table.order]
    np.testing.assert_allclose(stored, got, rtol=1e-3, atol=1e-4)


def test_weights_are_what_adapt_makes_of_the_training_pairs(table, quick):
    np.testing.assert_allclose(quick.weights.sum(1), 1, rtol=1e-5)
    assert (np.asarray(quick.weights) >= 0).all()
    adapted = lore.adapt(quick.model, table)
    np.testing.assert_allclose(quick.weights, adapted.weights, atol=1e-6)
    np.testing.assert_allclose(quick.params.weights, quick.weights, atol=1e-5)


def test_what_comes_back_fits_together(table, quick):
    assert quick.model.basis.shape == (5, 2)
    assert quick.weights.shape == quick.params.logits.shape == (12, 2)
    assert quick.model.prior.atoms.shape[1] == 2
    np.testing.assert_allclose(quick.model.prior.atoms.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(quick.model.prior.log_weights).sum(), 1, rtol=1e-4
    )
    assert quick.model.temperature == 1.0
    assert quick.recipe == QUICK
    stop = [row for row in chosen_rows(quick) if "num_steps" in row]
    assert [{"num_steps": len(quick.history.loss)}] == stop


def test_the_history_decreases(fitted):
    loss = np.asarray(fitted.history.loss)
    assert np.isfinite(loss).all()
    assert loss[-1] < 0.8 * loss[0]
    # The ridge falls on, so that the data term alone may rise a little.
    assert loss[-1] <= 1.05 * loss[len(loss) // 2]


def angles(first, second):
    """Cosines of the principal angles between two column spaces."""
    first, second = (np.linalg.qr(np.asarray(x, float))[0] for x in (first, second))
    return np.linalg.svd(first.T @ second)[1]


def test_planted_truth_is_recovered(planted, fitted):
    assert angles(fitted.model.basis, planted.basis).min() > 0.93
    oracle = lore.accuracy(
        lore.RewardModel(planted.basis), planted.weights, planted.heldout
    )
    got = lore.accuracy(fitted.model, fitted.weights, planted.heldout)
    everyone = fitted.model.basis @ fitted.model.prior.mean[:, None]
    alone = np.ones((24, 1), np.float32)
    shared = lore.accuracy(lore.RewardModel(everyone), alone, planted.heldout)
    assert float(got.mean()) > float(oracle.mean()) - 0.05
    assert float(got.mean()) > float(shared.mean()) + 0.02


def test_names_travel_with_a_fit(fitted):
    assert fitted.user_ids.tolist() == [f"user-{u}" for u in range(24)]


def test_users_without_pairs_may_be_trained_with(table, quick):
    wider = lore.Preferences.from_pairs(
        table.features, table.chosen, table.rejected, table.user, 14
    )
    fitted = lore.fit(wider, rank=2, key=KEY, recipe=QUICK)
    np.testing.assert_array_equal(
        fitted.weights[12:], np.tile(fitted.model.prior.mean, (2, 1))
    )
    np.testing.assert_allclose(fitted.weights[:12], quick.weights, atol=1e-3)


def test_more_directions_than_the_truth_do_no_harm(planted, fitted):
    some = lore.Marginal(num_steps=50)
    wide = lore.fit(planted.prefs, rank=4, key=KEY, recipe=some)
    accuracy = [
        float(lore.accuracy(f.model, f.weights, planted.heldout).mean())
        for f in (fitted, wide)
    ]
    assert accuracy[1] > accuracy[0] - 0.03


def test_another_key_reuses_the_compiled_steps(table, compilations):
    """Validation splits differ between keys, the shapes they are laid out in do not."""
    grids = dict(smoothings=(1.0,), ridges=(0.2,), temperings=(0.4,))
    grids.update(concentrations=(3.0,), decays=(0.0,), variance_scales=(0.1,))
    single = dataclasses.replace(QUICK, search=lore.Search(**grids))
    lore.fit(table, rank=2, key=KEY, recipe=single)
    before = steps.run._cache_size()
    for seed in (1, 2, 3):
        lore.fit(table, rank=2, key=jax.random.key(seed), recipe=single)
    assert steps.run._cache_size() == before


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_the_temperature_scales_the_basis_alone(planted, temperature):
    """Margins are x · V · p / T: λ, the start and the steps are in units of margins."""
    fits = []
    for t in (1.0, temperature):
        recipe = lore.Marginal(temperature=t, num_steps=30)
        fits.append(lore.fit(planted.prefs, rank=2, key=KEY, recipe=recipe))
    one, other = fits
    want = np.asarray(one.model.basis)
    got = np.asarray(other.model.basis) / temperature
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(other.weights, one.weights, atol=1e-4)
