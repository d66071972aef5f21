"""What a fit says of items that training never saw, and what it says of itself."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import diagnostics
from lore_jax._train import coordinates, starts, trainer
from lore_jax._train.resume import Run
from lore_jax.preferences import Ids

KEY = jax.random.key(0)
# A search over everything, and few steps: properties that hold at every step.
SEARCH = lore.Search(
    smoothings=(1.0, 4.0),
    ridges=(0.1, 0.3),
    temperings=(0.4, 0.2),
    concentrations=(3.0, 10.0),
    decays=(0.0, 0.5),
    variance_scales=(0.1, 0.5),
    margin_scales=(1.0, 0.8),
)
QUICK = lore.Marginal(num_steps=20, search=SEARCH)
SIZES = {"M < D": (24, 40), "M > D": (60, 8)}


def make_pairs(num_rows, num_features, seed=0):
    """15 users with 20 pairs each over rows that have names and a constant part."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_rows, num_features))
    features *= np.arange(1, num_features + 1) ** -0.5
    user = np.repeat(np.arange(15), 20)
    first = rng.integers(num_rows, size=300)
    second = (first + rng.integers(1, num_rows, size=300)) % num_rows
    taste = rng.normal(size=(num_features, 2)) @ rng.dirichlet([0.3, 0.3], 15).T * 2
    margin = ((features[first] - features[second]) * taste.T[user]).sum(1)
    flip = margin < rng.logistic(size=300) / 2
    chosen, rejected = np.where(flip, (second, first), (first, second))
    names = np.array([f"item {row:03d}" for row in range(num_rows)])
    sides = names[chosen], names[rejected]
    return lore.Preferences.from_pairs(
        (features + 1).astype(np.float32), *sides, user, item_ids=names
    )


def settings_of(fitted):
    """What was chosen at every stage."""
    losses = {"log_loss", "relative", "judgements", "items", "chosen"}
    return [
        {name: x for name, x in row.items() if name not in losses}
        for row in fitted.history.selection
        if row["chosen"]
    ]


def rewards_of(fitted, table):
    return np.asarray(lore.score(fitted.model, fitted, table))


def placed(prefs, table, rows):
    """The same pairs, without names, where row i of the table stands at rows[i]."""
    return prefs.replace(
        features=table,
        chosen=rows[prefs.chosen].astype(np.int32),
        rejected=rows[prefs.rejected].astype(np.int32),
        ids=None,
    )


@pytest.mark.parametrize("size", SIZES)
def test_rows_that_no_pair_uses_change_nothing(size):
    """One or 10,000 of them, before, between and behind; in a source too."""
    prefs = make_pairs(*SIZES[size])
    table = np.asarray(prefs.features)
    used = np.arange(len(table))
    want = lore.fit(prefs.replace(ids=None), rank=2, key=KEY, recipe=QUICK)
    rewards = rewards_of(want, table)
    for more, place in ((1, "before"), (1, "behind"), (10_000, "between")):
        rng = np.random.default_rng(more)
        noise = rng.normal(size=(len(table) + more, table.shape[1])) * 30 + 5
        rows = used + more * (place == "before")
        if place == "between":
            rows = np.sort(rng.choice(len(noise), len(table), replace=False))
        noise[rows] = table
        other = placed(prefs, noise.astype(np.float32), rows)
        sources = (False, True) if place == "between" else (False,)
        for source in sources:
            if source:
                blocks = lore.ArraySource(noise.astype(np.float32), 999)
                other = other.replace(features=blocks)
            got = lore.fit(other, rank=2, key=KEY, recipe=QUICK)
            assert settings_of(got) == settings_of(want)
            np.testing.assert_allclose(
                rewards_of(got, table), rewards, atol=1e-4 * np.abs(rewards).max()
            )


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_rows_with_names_changes_nothing(size):
    prefs = make_pairs(*SIZES[size])
    table = np.asarray(prefs.features)
    want = lore.fit(prefs, rank=2, key=KEY, recipe=QUICK)
    order = np.random.default_rng(1).permutation(len(table))
    other = placed(prefs, table[order], np.argsort(order))
    ids = Ids(None, np.asarray(prefs.ids.items)[order])
    for features in (table[order], lore.ArraySource(table[order], 17)):
        moved = other.replace(ids=ids, features=features)
        got = lore.fit(moved, rank=2, key=KEY, recipe=QUICK)
        assert settings_of(got) == settings_of(want)
        rewards = rewards_of(want, table)
        np.testing.assert_allclose(
            rewards_of(got, table), rewards, atol=1e-4 * np.abs(rewards).max()
        )


def test_a_fit_keeps_the_names_of_the_whole_table():
    rows = ["d", "b", "unused", "a", "c"]
    chosen, rejected = ["d", "b", "a", "c"], ["b", "a", "c", "d"]
    prefs = lore.Preferences.from_pairs(
        np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        chosen,
        rejected,
        ["u", "u", "v", "v"],
        item_ids=rows,
    )
    recipe = lore.Marginal(num_steps=2, search=lore.Search(validation_share=1e-6))
    with pytest.warns(UserWarning, match="too few pairs"):
        fitted = lore.fit(prefs, rank=2, key=KEY, recipe=recipe)
    assert fitted.ids.items.tolist() == rows
    assert fitted.ids.users.tolist() == ["u", "v"]


@pytest.mark.parametrize("kind", ["random", "svd"])
@pytest.mark.parametrize("size", SIZES)
def test_a_start_does_not_depend_on_the_order_of_rows(size, kind):
    """The sign of an eigenvector is chance."""
    prefs = make_pairs(*SIZES[size])
    table = np.asarray(prefs.features)
    order = np.random.default_rng(1).permutation(len(table))
    starts_of = []
    for part in (prefs, placed(prefs, table[order], np.argsort(order))):
        spectrum = coordinates.measure(part)
        made = coordinates.make_coordinates(spectrum, 1.0, "float32", table.shape[1])
        theta = starts.make_start(KEY, kind, part, made, 2)
        starts_of.append(np.asarray(coordinates.basis_of(theta, made)))
    np.testing.assert_allclose(*starts_of, atol=1e-5 * np.abs(starts_of[0]).max())


@pytest.mark.parametrize("number", [0, 1])
def test_a_start_is_in_the_span_of_the_differences(number, monkeypatch):
    monkeypatch.setattr(coordinates, "EXACT_UP_TO", 5)
    monkeypatch.setattr(coordinates, "_LEADING", 6)
    prefs = make_pairs(12, 40)
    train = trainer.CandidateTrainer(prefs, (KEY, KEY), QUICK, None, Run())
    candidate = trainer.Candidate(rank=2, smoothing=1.0, ridge=0.1, tempering=0.4)
    training = trainer.Training("all", prefs, candidate, number)
    ((state, _, _),) = train([training], num_steps=0)
    theta = np.asarray(state.theta, np.float64)
    outside = theta - projected(theta, prefs)
    assert np.abs(outside).max() < 1e-5 * np.abs(theta).max()


def projected(basis, prefs):
    """What of it lies in the span of the differences, all rows being connected."""
    x = np.asarray(prefs.features, np.float64)
    span = np.linalg.qr((x[1:] - x[0]).T)[0]
    return span @ (span.T @ basis)


@pytest.mark.parametrize("kind", ["exact", "tail"])
@pytest.mark.parametrize("start", ["svd", "random"])
def test_the_basis_stays_in_the_span_of_the_differences(kind, start, monkeypatch):
    """Where the gradient is 0, neither the start nor Adam may leave anything."""
    if kind == "tail":
        monkeypatch.setattr(coordinates, "EXACT_UP_TO", 5)
        monkeypatch.setattr(coordinates, "_LEADING", 6)
    search = dataclasses.replace(SEARCH, ridges=(0.1,))
    recipe = lore.Marginal(num_steps=20, start=start, search=search)
    prefs = make_pairs(12, 40)
    fitted = lore.fit(prefs, rank=2, key=KEY, recipe=recipe)
    basis = np.asarray(fitted.model.basis, np.float64)
    outside = basis - projected(basis, prefs)
    assert np.abs(outside).max() < 1e-4 * np.abs(basis).max()
    # It stays there whichever start is kept.
    assert fitted.history.starts is not None


def population(num_rows, num_features, rank, seed, *, num_users=100, alike=False):
    """(training pairs, pairs of new items) of the same users.

    Features have a power-law spectrum, margins a standard deviation of 2, users
    Dirichlet(0.3) weights; a tenth of the labels is flipped.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * num_rows, num_features))
    features *= np.arange(1, num_features + 1) ** -0.5
    basis = rng.normal(size=(num_features, rank))
    weights = rng.dirichlet(np.full(rank, 0.3), num_users)
    if alike:
        basis = basis[:, :1] * np.ones(rank)
    taste = basis @ weights.T
    taste *= 2 / np.std((features - np.roll(features, 1, 0)) @ taste)
    parts = []
    for rows in (np.arange(num_rows), np.arange(num_rows, 2 * num_rows)):
        user = np.repeat(np.arange(num_users), 30)
        first = rng.choice(rows, len(user))
        second = rows[0] + (first + rng.integers(1, num_rows, len(user))) % num_rows
        margin = ((features[first] - features[second]) * taste.T[user]).sum(1)
        right = (margin > 0) ^ (rng.random(len(user)) < 0.1)
        chosen, rejected = np.where(right, (first, second), (second, first))
        keep = chosen != rejected
        parts.append(
            lore.Preferences.from_pairs(
                features.astype(np.float32),
                *(side[keep] for side in (chosen, rejected, user)),
                num_users,
            )
        )
    return parts


SHORT = lore.Marginal(
    num_steps=60,
    search=lore.Search(
        smoothings=(1.0,),
        ridges=(0.1, 1.0),
        temperings=(0.4,),
        concentrations=(3.0,),
        decays=(0.0,),
        variance_scales=(0.1,),
        margin_scales=(1.0,),
    ),
)


@pytest.fixture(scope="module")
def planted_fits():
    """100 items with 384 features: (new pairs, the fit of rank 3, that of rank 1)."""
    pairs, new = population(100, 384, 3, seed=0)
    fits = [lore.fit(pairs, rank=k, key=KEY, recipe=SHORT) for k in (3, 1)]
    return new, *fits


def test_new_items_are_ranked_where_there_are_fewer_items_than_features(planted_fits):
    """0.1.0 was below chance: whitened rows are mere ids."""
    new, personal, alone = planted_fits
    scores = [
        float(np.nanmean(lore.accuracy(f.model, f.weights, new)))
        for f in (personal, alone)
    ]
    assert scores[0] > 0.62
    assert scores[0] > scores[1] - 0.02


def test_a_fit_says_what_it_found_on_both_hold_outs(planted_fits):
    _, fitted, alone = planted_fits
    rows = fitted.history.heldout
    assert [row["holdout"] for row in rows] == ["judgements", "items"]
    for row in rows:
        assert 0 < row["log_loss"] < 1.5
        assert 0 < row["global_log_loss"] < 1.5
        gain = row["global_log_loss"] - row["log_loss"]
        assert row["gain"] == pytest.approx(gain, abs=1e-5)
        assert row["standard_error"] > 0
    assert rows[0]["gain"] > 2 * rows[0]["standard_error"]
    assert diagnostics.report(fitted)["heldout"] == rows
    # One direction for all is not better than the best of them.
    assert all(row["gain"] <= 0 for row in alone.history.heldout)


def test_starts_agree_at_most_fully(planted_fits):
    _, fitted, alone = planted_fits
    agreement = diagnostics.report(fitted)["agreement"]
    assert set(agreement) == {"rewards", "weights", "basis"}
    assert all(-1 <= x <= 1 + 1e-6 for x in agreement.values())
    assert agreement["rewards"] > 0.5
    assert np.isnan(diagnostics.report(alone)["agreement"]["weights"])
    one = dataclasses.replace(SHORT, num_starts=1, num_steps=2)
    single = lore.fit(make_pairs(24, 40), rank=2, key=KEY, recipe=one)
    assert all(np.isnan(list(diagnostics.report(single)["agreement"].values())))


def test_a_fit_without_anything_personal_claims_none():
    """Everybody has one taste: a warning, or no gain that is more than chance."""
    pairs, _ = population(100, 384, 3, seed=1, alike=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = lore.fit(pairs, rank=3, key=KEY, recipe=SHORT)
    told = [x for x in caught if "does not help" in str(x.message)]
    rows = fitted.history.heldout
    worse = [row for row in rows if row["gain"] < -2 * row["standard_error"]]
    assert bool(told) == bool(worse)
    assert all(row["gain"] < 3 * row["standard_error"] for row in rows)


def test_agreement_of_starts_is_that_of_matched_columns():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(80, 6)).astype(np.float32)
    basis = rng.normal(size=(6, 3)).astype(np.float32)
    weights = rng.dirichlet(np.ones(3), 9).astype(np.float32)
    other = rng.normal(size=(6, 3)).astype(np.float32)
    order = [2, 0, 1]
    turned = [[x, x[:, order]] for x in (basis, table @ basis, weights)]
    same = diagnostics.compare_starts(*turned, 0)
    assert same == pytest.approx(dict(rewards=1, weights=1, basis=1), abs=1e-5)
    projections = [table @ basis, table @ other]
    two = [basis, other], projections, [weights, weights]
    new = diagnostics.compare_starts(*two, 1)
    assert all(abs(x) < 0.99 for x in (new["rewards"], new["basis"]))
    want = [np.corrcoef(table @ basis @ w, table @ other @ w)[0, 1] for w in weights]
    assert new["rewards"] == pytest.approx(np.mean(want), abs=1e-4)
    assert diagnostics.compare_starts(*(x[:1] for x in two), 0) is None


@pytest.mark.parametrize("rank", [1, 4, 6, 9])
def test_columns_are_matched_one_to_one(rank):
    rng = np.random.default_rng(rank)
    order = rng.permutation(rank)
    similarity = rng.uniform(0, 0.4, size=(rank, rank))
    similarity[np.arange(rank), order] += 0.6
    np.testing.assert_array_equal(diagnostics.match_columns(similarity), order)
    if rank == 4:  # The best sum is not the greatest entry first.
        similarity = np.zeros((4, 4))
        similarity[:2, :2] = [[1.0, 0.9], [0.9, 0.0]]
        np.testing.assert_array_equal(diagnostics.match_columns(similarity)[:2], [1, 0])
