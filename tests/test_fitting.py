"""`fit`: determinism, invariances, ranks, recovery, selection, order of updates."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend
from lore_jax._pairs import pack
from lore_jax._train import (
    coordinates,
    marginal,
    published,
    recipe,
    resume,
    steps,
    trainer,
    validation,
)
from lore_jax.prior import make_atoms

KEY = jax.random.key(0)
# Few steps are enough for properties that hold at every step.
QUICK = lore.Marginal(num_steps=20)


def margins(fitted, prefs):
    return np.asarray(lore.margins(fitted.model, fitted, prefs))


@pytest.fixture(scope="module")
def table():
    """12 users who compare 40 shared responses; truth of rank 2 behind it."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5)).astype(np.float32)
    basis, weights = rng.normal(size=(5, 2)), rng.dirichlet([0.3, 0.3], 12)
    user = np.repeat(np.arange(12), 10)
    first = rng.integers(40, size=120)
    second = (first + rng.integers(1, 40, size=120)) % 40
    gap = ((features[first] - features[second]) @ basis * weights[user]).sum(1)
    flip = gap < rng.logistic(size=120) / 2
    chosen, rejected = np.where(flip, second, first), np.where(flip, first, second)
    return lore.Preferences.from_pairs(features, chosen, rejected, user)


@pytest.fixture(scope="module")
def quick(table):
    return lore.fit(table, rank=2, key=KEY, recipe=QUICK)


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

    def spy(self, name, prefs, candidate, **settings):
        found = original(self, name, prefs, candidate, **settings)
        if name == "all":
            state, metrics, _ = found
            if settings["start"] == 3:  # Neither the first nor the last is best.
                metrics = metrics._replace(loss=metrics.loss - 1)
                found = state, metrics, ()
            penalty = candidate.ridge / 2 * float((state.theta**2).sum())
            value = 12 * float(metrics.loss[-1]) + penalty
            made = self.coordinates_of(name, prefs, candidate.smoothing)
            basis = coordinates.basis_of(state.theta, made)
            ends[settings["start"]] = value, np.array(basis)
        return found

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

    def together(item):
        both.wait(timeout=30)
        return item

    def alone(item):
        assert not inside
        inside.append(item)
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
        assert list(train.each(function, range(2))) == [0, 1]


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


LOSSES = {"log_loss", "relative", "judgements", "items", "chosen"}


def chosen_rows(fitted):
    """The chosen row of each stage of the selection, without its loss."""
    return [
        {name: x for name, x in row.items() if name not in LOSSES}
        for row in fitted.history.selection
        if row["chosen"]
    ]


def test_each_stage_of_the_selection_has_one_winner(fitted):
    stages = {}
    for row in fitted.history.selection:
        names = frozenset(row) - LOSSES
        stages.setdefault(names, []).append(row)
    assert len(stages) == 4
    for names, rows in stages.items():
        assert len(rows) > 1
        # κ is chosen, then δ at that κ.
        times = 2 if "concentration" in names else 1
        assert sum(row["chosen"] for row in rows) == times
        *_, chosen = (row for row in rows if row["chosen"])
        if "rank" in names:  # The first of this rank, or a better one.
            mine = [row for row in rows if row["rank"] == chosen["rank"]]
            assert chosen["log_loss"] <= mine[0]["log_loss"]
            assert {row["rank"] for row in rows} == {1, 2}
        elif "variance_scale" in names:
            assert chosen["relative"] <= rows[0]["relative"]
        elif "num_steps" in names:  # The last, unless another is better.
            assert chosen["relative"] <= rows[-1]["relative"]
        else:
            assert chosen["relative"] == min(row["relative"] for row in rows)
        assert all(0 < row["log_loss"] < 2 for row in rows)


def test_what_was_chosen_is_what_the_prior_holds(fitted):
    merged = {name: x for row in chosen_rows(fitted) for name, x in row.items()}
    names = "concentration", "decay", "tempering", "variance_scale", "margin_scale"
    for name in names:
        np.testing.assert_allclose(
            getattr(fitted.model.prior, name), merged[name], rtol=1e-6
        )


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


def test_validation_never_splits_random_pairs(table, monkeypatch):
    """What is selected on holds no judgement, or no item, that was learned from."""
    seen = {}
    original = validation.hold_out

    def spy(prefs, **settings):
        held = original(prefs, **settings)
        seen[settings["unit"]] = held
        return held

    monkeypatch.setattr(validation, "hold_out", spy)
    lore.fit(table, rank=2, key=KEY, recipe=QUICK)
    assert list(seen) == ["judgements", "items"]
    for unit, held in seen.items():
        assert held.training.num_pairs
        assert held.heldout.num_pairs
        sides = [
            {
                (int(u) if unit == "judgements" else 0, int(row))
                for rows in (part.chosen, part.rejected)
                for u, row in zip(part.user, rows, strict=True)
            }
            for part in held[:2]
        ]
        assert not sides[0] & sides[1]


@pytest.mark.parametrize("kind", ["table", "own rows", "differences", "groups"])
def test_of_the_pairs_in_use_the_share_is_held_out(make_preferences, kind):
    num_rows = 200 if kind == "table" else 6000  # a user has 240 at most
    many = make_preferences(num_users=50, num_pairs=6000, num_rows=num_rows)
    if kind == "differences":
        many = many.replace(chosen=np.arange(6000), rejected=None)
    if kind == "groups":
        many = many.replace(group=np.arange(6000) // 3)
    held = validation.make_holdouts(many, KEY, 0.15, "judgements", 1.0)
    held = held["judgements"]
    sizes = held.heldout.num_pairs, held.training.num_pairs
    assert sizes[0] / sum(sizes) == pytest.approx(0.15, abs=0.02)
    used = {"table": (3000, 4000), "own rows": (5700, 5999)}
    least, most = used.get(kind, (6000, 6000))
    assert least <= sum(sizes) <= most


def test_selection_ignores_what_only_a_leak_could_use(monkeypatch):
    """Each candidate is trained without the held-out judgements."""
    trained, compared = [], []
    original = validation.Validation.loss

    def spy(self, proj, priors, *shots):
        priors = list(priors)
        trained.append(self.training)
        compared.append(self.heldout)
        return original(self, proj, priors, *shots)

    monkeypatch.setattr(validation.Validation, "loss", spy)
    parts = np.random.default_rng(0).normal(size=(8, 12, 4)).astype(np.float32)
    group = np.tile(np.repeat(np.arange(4), 3), 8) + 4 * np.repeat(np.arange(8), 12)
    prefs = lore.Preferences.from_pairs(
        parts.reshape(-1, 4),
        np.arange(96),
        None,
        np.repeat(np.arange(8), 12),
        group=group,
    )
    lore.fit(prefs, rank=2, key=KEY, recipe=QUICK)
    assert trained
    for first, second in zip(trained, compared, strict=True):
        assert not set(np.asarray(first.group)) & set(np.asarray(second.group))
        # No pair was dropped: groups were split, nothing finer.
        assert first.num_pairs + second.num_pairs == 96


def test_too_few_pairs_to_validate_warn_and_still_fit():
    prefs = lore.Preferences.from_ragged(np.ones((1, 1, 3), np.float32))
    with pytest.warns(UserWarning, match="too few pairs to validate on"):
        fitted = lore.fit(prefs, rank=2, key=KEY, recipe=QUICK)
    assert np.isfinite(fitted.model.basis).all()
    assert float(lore.accuracy(fitted.model, fitted.weights, prefs)[0]) == 1.0
    assert not fitted.history.selection


@pytest.mark.parametrize("seed", range(4))  # Either side may be the empty one.
def test_too_few_pairs_to_validate_a_given_basis(seed):
    prefs = lore.Preferences.from_ragged(np.ones((1, 1, 3), np.float32))
    key = jax.random.key(seed)
    with pytest.warns(UserWarning, match="too few pairs to validate on"):
        kept = lore.fit_prior(np.eye(3, 2), prefs, key=key)
    assert not kept.history.selection


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


def test_a_rank_is_chosen_like_everything_else(planted):
    """Hold-outs choose among ranks; then it is the fit of that rank."""
    search = lore.Search(ranks=(1, 2), smoothings=(1.0,), ridges=(0.2, 0.05))
    both = dataclasses.replace(QUICK, search=search)
    prefs = planted.prefs
    fitted = lore.fit(prefs, rank="auto", key=KEY, recipe=both)
    rows = [row for row in fitted.history.selection if "rank" in row]
    assert {row["rank"] for row in rows} == {1, 2}
    (best,) = (row for row in rows if row["chosen"])
    assert best["log_loss"] < rows[0]["log_loss"] - 0.01
    assert fitted.model.basis.shape[1] == best["rank"] == 2
    fixed = lore.fit(prefs, rank=2, key=KEY, recipe=both)
    np.testing.assert_array_equal(fitted.model.basis, fixed.model.basis)
    np.testing.assert_array_equal(fitted.weights, fixed.weights)
    # Each candidate once, and not every combination.
    names = "rank", "smoothing", "ridge", "tempering"
    settings = [tuple(row[name] for name in names) for row in rows]
    assert len(set(settings)) == len(settings) <= 2 + 2 + 4


@pytest.mark.parametrize("sure", [True, False])
def test_another_value_is_taken_where_it_is_better(table, monkeypatch, sure):
    """γ = 0.3 is better by far than the first, for every user or for one alone."""
    grids = dict(smoothings=(1.0,), ridges=(0.2,), temperings=(0.4, 0.2, 0.3))
    three = dataclasses.replace(QUICK, search=lore.Search(**grids))

    def curve(split, bases, priors):
        users = len(split.heldout.counts)
        gain = np.full(users, 0.1) if sure else np.eye(users)[0]
        place = round(float(priors[0].tempering), 3) == 0.3
        losses = 1 - gain * place + 1e-3 * np.arange(users)
        return np.stack([losses] * len(bases))

    monkeypatch.setattr(validation.Validation, "curve", curve)
    rows = lore.fit(table, rank=2, key=KEY, recipe=three).history.selection
    rows = [row for row in rows if row.get("rank") == 2]
    chosen = {row["tempering"]: row["chosen"] for row in rows}
    assert min(rows, key=lambda row: row["log_loss"])["tempering"] == 0.3
    assert chosen[0.3] is sure
    assert chosen[0.4] is not sure


def test_capacity_changes_no_number(table):
    """Chunks kept free for other splits are neither counted nor visited."""
    half = lore.take_pairs(table, np.arange(120) % 3 > 0)
    atoms = make_atoms(KEY, 2, 8)
    base = jnp.full(len(atoms), 1 / len(atoms))
    made = coordinates.make_coordinates(coordinates.measure(table), 1.0, jnp.float32, 5)
    settings = marginal.Settings(*map(jnp.float32, (0.2, 0.4, 1.0, 1.0, 4.0)))
    optimiser = marginal.make_optimiser(0.3, 8)
    arrays, out = (half.features, pack.pack(half), atoms, base, made), []
    for capacity in (None, np.asarray(table.counts) + 9):
        problem = marginal.make_problem(*arrays, capacity)
        state = marginal.init(KEY, problem, 0.3, optimiser)
        inputs = marginal.MarginalInputs(problem, settings)
        made_steps = marginal.make_steps(optimiser)
        out.append(steps.run(state, inputs, steps=made_steps, num_steps=8))
    for a, b in zip(*map(jax.tree.leaves, out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_who_weighs_nothing_is_no_user(table):
    """π is normalised, and the objective is a mean over users who chose something."""
    weight = np.where(table.user < 6, 0.0, 1.0)
    half = lore.take_users(table, np.arange(6, 12))
    fitted = lore.fit(
        table.replace(sample_weight=weight), rank=2, key=KEY, recipe=QUICK
    )
    np.testing.assert_allclose(
        np.exp(fitted.model.prior.log_weights).sum(), 1, rtol=1e-4
    )
    weighted = pack.pack(table.replace(sample_weight=weight))
    assert pack.count_users(weighted) == 6
    assert pack.count_users(pack.pack(half)) == half.num_users == 6
