"""What `fit` selects, and on which pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fitting_cases import KEY, LOSSES, QUICK, chosen_rows

import lore_jax as lore
from lore_jax._pairs import pack
from lore_jax._train import (
    coordinates,
    marginal,
    steps,
    validation,
)
from lore_jax.prior import make_atoms


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
