"""Hold-outs to choose on, and when one loss is better than another."""

import types

import jax
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._train import recipe, search, validation
from lore_jax._train.resume import Run
from lore_jax._train.trainer import Candidate, Trained
from lore_jax._train.validation import better, choose_stop, make_holdouts, relative

KEY = jax.random.key(0)


def rows_of(prefs):
    columns = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    return set(np.concatenate([np.asarray(x) for x in columns]).tolist())


def judgements_of(prefs):
    columns = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    return {
        (int(u), int(row))
        for rows in columns
        for u, row in zip(prefs.user, rows, strict=True)
    }


@pytest.mark.parametrize("holdout", ["judgements", "items", "both"])
def test_the_hold_outs_that_were_asked_for(make_preferences, holdout):
    prefs = make_preferences(num_users=30, num_pairs=3000, num_rows=80)
    found = make_holdouts(prefs, KEY, 0.15, holdout, 1.0)
    want = ["judgements", "items"] if holdout == "both" else [holdout]
    assert list(found) == want
    for name, split in found.items():
        sides = rows_of if name == "items" else judgements_of
        assert not sides(split.training) & sides(split.heldout)
    again = make_holdouts(prefs, KEY, 0.15, holdout, 1.0)
    other = make_holdouts(prefs, jax.random.key(1), 0.15, holdout, 1.0)
    for name in want:
        first, same, new = (x[name].heldout.chosen for x in (found, again, other))
        np.testing.assert_array_equal(first, same)
        assert first.shape != new.shape or (first != new).any()


@pytest.mark.parametrize("kind", ["own rows", "differences"])
def test_where_nobody_shares_an_item_only_items_are_held_out(kind):
    """A judgement held out is an item held out."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(20), 30)
    features = rng.normal(size=(20 * 40, 3)).astype(np.float32)
    chosen = user * 40 + rng.integers(40, size=600)
    rejected = user * 40 + (chosen + rng.integers(1, 40, size=600)) % 40
    if kind == "differences":
        features, chosen, rejected = features[:600], np.arange(600), None
    prefs = lore.Preferences.from_pairs(features, chosen, rejected, user)
    assert list(make_holdouts(prefs, KEY, 0.15, "both", 1.0)) == ["items"]
    assert list(make_holdouts(prefs, KEY, 0.15, "judgements", 1.0)) == ["judgements"]


@pytest.mark.parametrize("kind", ["rows", "prompts", "differences", "groups"])
def test_of_the_pairs_in_use_the_share_of_items_is_held_out(make_preferences, kind):
    prefs = make_preferences(num_users=50, num_pairs=6000, num_rows=2000)
    if kind == "prompts":
        chosen = np.asarray(prefs.chosen)
        prefs = prefs.replace(rejected=chosen // 2 * 2 + 1 - chosen % 2)
    if kind == "differences":
        prefs = prefs.replace(chosen=np.arange(6000) % 2000, rejected=None)
    if kind == "groups":
        group = np.asarray(prefs.chosen) // 4
        rejected = group * 4 + (np.asarray(prefs.chosen) + 1) % 4
        prefs = prefs.replace(group=group, rejected=rejected)
    held = make_holdouts(prefs, KEY, 0.15, "items", 1.0)["items"]
    sizes = held.heldout.num_pairs, held.training.num_pairs
    assert sizes[0] / sum(sizes) == pytest.approx(0.15, abs=0.03)
    assert (sum(sizes) == 6000) == (kind != "rows")


def test_too_few_pairs_are_named():
    prefs = lore.Preferences.from_ragged(np.ones((1, 1, 3), np.float32))
    with pytest.warns(UserWarning, match=r"too few pairs to validate on: \d to learn"):
        assert make_holdouts(prefs, KEY, 0.15, "both", 1.0) == {}


def test_one_hold_out_that_is_left_is_used_without_a_warning():
    """Two users, one pair of rows: nothing can be held out by item."""
    prefs = lore.Preferences.from_pairs(
        np.eye(2, dtype=np.float32), np.zeros(40, int), np.ones(40, int), np.arange(40)
    )
    assert list(make_holdouts(prefs, KEY, 0.3, "both", 1.0)) == ["judgements"]


ONES = np.ones(8)
NOISE = np.array([1.0, -1.0] * 4)


@pytest.mark.parametrize(
    ("gains", "is_better"),
    [
        ([0.1 * ONES], True),
        ([-0.1 * ONES], False),
        ([0.1 * ONES + NOISE], False),  # 0.1, and a standard error of 0.38.
        ([0.1 * ONES + 0.1 * NOISE], True),  # 0.1, and 0.038.
        ([0.1 * ONES, 0 * ONES], True),
        ([0 * ONES, 0.1 * ONES], True),
        ([0 * ONES, 0.1 * ONES + 0.2 * NOISE], False),
        # Both weigh alike.
        ([-0.1 * ONES, 0.2 * ONES], True),
        ([0.2 * ONES, -0.1 * ONES], True),
        ([-0.2 * ONES, 0.1 * ONES], False),
        ([0 * ONES], False),
        ([np.array([5.0])], False),  # One user is no evidence.
    ],
)
def test_better_is_by_two_standard_errors(gains, is_better):
    than = np.ones((len(gains), len(gains[0])))
    assert better(than - np.stack(gains), than) is is_better


def test_users_without_a_held_out_pair_have_no_say():
    than = np.ones((1, 8))
    losses = than - 0.1
    losses[0, 3], than[0, 4] = np.nan, np.nan
    assert better(losses, than)
    assert not better(than, losses)
    # Only two users are left, who disagree.
    losses[0, 2:] = np.nan
    losses[0, :2] = 0.5, 1.4
    assert not better(losses, than)


def test_a_training_that_diverges_is_the_worst():
    """For one user or for all; nothing is raised."""
    fine = np.ones((2, 8))
    wild = fine.copy()
    wild[1, 3] = np.inf
    assert relative(wild, np.ones(2)) == relative(wild * np.inf, np.ones(2)) == np.inf
    tried = np.stack([wild, fine, wild])
    rows = validation.candidate_rows([{}, {}, {}], tried, np.ones(2))
    assert validation.choose(rows, tried) == 1
    curve = np.stack([fine[0] - 0.5, fine[0], wild[1]])
    assert choose_stop([curve], np.ones(1)) == 0


def test_anything_is_better_than_a_loss_that_is_not_finite():
    nothing = np.full((2, 8), np.nan)
    assert better(np.ones((2, 8)), nothing)
    assert not better(nothing, np.ones((2, 8)))
    assert not better(nothing, nothing)


@pytest.mark.parametrize(
    ("gains", "row"),
    [
        ([1.0, 1.0, 1.1, 0.9], 1),
        ([3.0, -2.0, 1.0, -1.0], 2),  # Better on average, and it may be chance.
        ([1.0, np.nan, 1.1, np.nan], 1),  # Who has nothing held out has no say.
        ([5.0], 2),
        ([0.0, 0.0, 0.0], 2),
    ],
)
def test_a_sooner_stop_must_be_better_by_two_standard_errors(gains, row):
    end = np.full(len(gains), 2.0)
    losses, one = np.stack([end + 1, end - gains, end]), np.ones(1)
    assert choose_stop([losses], one) == row
    # A training that ends in NaN is judged by what was finite before.
    assert choose_stop([np.stack([*losses, end * np.nan])], one) == row
    # Two hold-outs that say the same.
    assert choose_stop([losses, losses], np.ones(2)) == row


def test_a_stop_is_chosen_on_both_hold_outs():
    falls = np.linspace(1.0, 0.5, 4)[:, None] * np.ones(8)
    rises = falls[::-1].copy()
    assert choose_stop([falls, falls], np.ones(2)) == 3
    # What judgements gain by going on, items lose many times; up to a limit.
    limit = validation._GIVES
    assert choose_stop([limit * falls + 1, rises], np.ones(2)) == 0
    assert choose_stop([4 * limit * falls + 1, rises], np.ones(2)) == 3
    # A scale of 100 makes that loss on items small.
    assert choose_stop([falls, rises / 2], np.array([0.5, 50.0])) == 3
    assert choose_stop([falls * np.nan], np.ones(1)) == 3


def test_losses_are_divided_before_they_are_averaged():
    losses = np.array([[0.2, 0.4, np.nan], [1.0, 1.0, 3.0]])
    assert relative(losses, np.array([0.3, 2.5])) == pytest.approx((1 + 2 / 3) / 2)
    assert relative(losses * np.nan, np.ones(2)) == np.inf
    tried = np.stack([losses * np.nan, losses, losses])
    rows = [{"ridge": 1.0}, {"ridge": 2.0}, {"ridge": 3.0}]
    rows = validation.candidate_rows(rows, tried, np.array([0.3, 2.5]))
    assert validation.choose(rows, tried) == 1
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert rows[1]["log_loss"] == pytest.approx((0.3 + 5 / 3) / 2)


GRIDS = lore.Search(
    smoothings=(np.inf, 4.0, 1.0, 0.1, 0.01),
    ridges=(0.3, 1.0, 3.0, 10.0, 0.1, 0.03),
)
FIRST = Candidate(rank=2, smoothing=np.inf, ridge=0.3, tempering=0.4)


class Plain:
    """A trainer that trains nothing; the loss of a candidate is a function of it."""

    def __init__(self, loss, num_users=20, at_once=1):
        self.loss, self.num_users, self.tried = loss, num_users, []
        self.most, self.trained = at_once, []

    def __call__(self, trainings, **settings):
        """Snapshots of one step."""
        self.trained.append(trainings)
        trail = np.zeros((1, 1)), np.zeros((1, 1))
        yield from (Trained(None, None, trail) for _ in trainings)

    def most_at_once(self, rank):
        return self.most

    def first(self, rank):
        return FIRST._replace(rank=rank)

    def curve(self, name, candidate, _):
        self.tried.append((name, *candidate))
        return np.full((1, self.num_users), self.loss(name, candidate))


def make_search(monkeypatch, loss, at_once=1):
    """`Losses` on both hold-outs, which are `loss(name, candidate)`."""
    train = Plain(loss, at_once=at_once)
    monkeypatch.setattr(search.Losses, "_curve", lambda self, *x: train.curve(*x))
    split = types.SimpleNamespace(training=None)
    holdouts = dict.fromkeys(("judgements", "items"), split)
    return search.Losses(train, holdouts, Run()), train.tried


@pytest.mark.parametrize(
    "best", [(np.inf, 0.3, 0.4), (0.1, 0.1, 0.2), (1.0, 3.0, 0.0), (4.0, 0.03, 0.5)]
)
def test_the_search_finds_the_best_of_a_smooth_loss(monkeypatch, best):
    """A loss that is convex in every setting is minimised without trying all."""

    def distance(candidate):
        place = [candidate.smoothing, candidate.ridge]
        place, goal = (np.log(np.clip(x, 0.01, 20)) for x in (place, best[:2]))
        tempering = 0.0 if candidate.rank == 1 else candidate.tempering - best[2]
        return np.abs(place - goal).sum() + abs(tempering)

    def loss(name, candidate):
        return 0.5 + 0.1 * distance(candidate) + 0.05 * (candidate.rank == 1)

    made, tried = make_search(monkeypatch, loss)
    found = search.select(made, (1, 2, 5), GRIDS)
    assert found.rank in (2, 5)
    assert found[1:] == best
    assert len(set(tried)) == len(tried)  # Each candidate once.
    every = 3 * len(GRIDS.smoothings) * len(GRIDS.ridges) * len(GRIDS.temperings)
    assert len(tried) / 2 < every / 6
    ahead, _ = make_search(monkeypatch, loss, at_once=8)
    assert search.select(ahead, (1, 2, 5), GRIDS) == found
    assert ahead.run.rows == made.run.rows  # What nothing asked for counts nowhere.
    assert sum(map(bool, ahead.train.trained)) < len(tried) / 2


@pytest.mark.parametrize("ranks", [(1,), (2, 5), (5, 2, 1)])
def test_of_ranks_the_least_loss_is_taken(monkeypatch, ranks):
    for best in ranks:
        made, _ = make_search(
            monkeypatch, lambda name, x, best=best: 0.5 + 0.1 * (x.rank != best)
        )
        assert search.select(made, ranks, GRIDS).rank == best


def test_the_first_value_stays_where_nothing_is_better(monkeypatch):
    """Differences between users are noise that no candidate rises above."""
    made, _ = make_search(monkeypatch, lambda name, x: 0.5)
    found = search.select(made, (2,), GRIDS)
    assert found == FIRST


@pytest.mark.parametrize(("lost", "ridge"), [(0.5, 1.0), (2.0, 0.3)])
def test_judgements_lose_little_for_the_sake_of_items(monkeypatch, lost, ridge):
    """λ = 1 is much better on items, and costs a part of the loss on judgements."""

    def loss(name, candidate):
        if candidate.rank == 1:
            return 1.0
        other = candidate.ridge == 1.0
        cost = lost * validation.BASIS_GIVES * other
        return 1 + cost if name == "judgements" else 1 - 0.1 * other

    made, _ = make_search(monkeypatch, loss)
    assert search.select(made, (2,), GRIDS).ridge == ridge


@pytest.mark.parametrize(("lost", "place"), [(0.5, 1), (2.0, 0)])
def test_of_settings_of_the_prior_too(lost, place):
    cost = 1 + lost * validation._GIVES
    losses = np.stack([np.ones((2, 8)), [np.full(8, cost), np.full(8, 0.5)]])
    rows = validation.candidate_rows([{}, {}], losses, np.ones(2))
    assert validation.choose(rows, losses) == place
    # Of one hold-out the least loss is taken.
    rows = validation.candidate_rows([{}, {}], losses[:, 1:], np.ones(1))
    assert validation.choose(rows, losses[:, 1:]) == 1


def test_losses_are_over_those_of_the_tuned_global_model(monkeypatch):
    """On judgements at the ε and λ of the candidate, on items at the best."""

    def loss(name, candidate):
        scale = 1.0 if name == "judgements" else 2.0
        return scale * (0.5 + 0.1 * abs(np.log10(candidate.ridge)))

    made, _ = make_search(monkeypatch, loss)
    search.select(made, (2,), GRIDS)
    assert made.line == FIRST._replace(rank=1, ridge=1.0)
    np.testing.assert_allclose(made.scales, [0.5, 1.0])
    candidate = FIRST._replace(ridge=0.1)
    np.testing.assert_allclose(made.scales_of(candidate), [0.6, 1.0])
    np.testing.assert_allclose(made.scales_of(made.line), made.scales)
    assert made.score(candidate) == pytest.approx((0.6 / 0.6 + 1.2 / 1.0) / 2)


def test_a_report_names_the_gain_on_each_hold_out(monkeypatch):
    """Beside the best global model for that hold-out, whatever is best for both."""

    def loss(name, candidate):
        best = 1.0 if name == "judgements" else 0.3
        least = {"judgements": 0.6, "items": 0.7}[name]
        return least + 0.01 * (candidate.ridge != best)

    made, _ = make_search(monkeypatch, loss)
    search.select(made, (2,), GRIDS)
    losses = [np.array([0.5, 0.4, np.nan, *[0.5] * 17]), np.full(20, 0.8)]
    first, second = made.report(losses)
    assert (first["holdout"], second["holdout"]) == ("judgements", "items")
    assert first["gain"] == pytest.approx((18 * 0.1 + 0.2) / 19)
    assert first["global_log_loss"] == pytest.approx(0.6)
    want = np.std([0.1] * 18 + [0.2], ddof=1) / 19**0.5
    assert first["standard_error"] == pytest.approx(want)
    assert second["gain"] == pytest.approx(-0.1)
    with pytest.warns(UserWarning, match="does not help on held-out items: log-loss"):
        recipe._warn_unless_it_helps([first, second])


def test_snapshots_of_others_are_forgotten(monkeypatch):
    made, _ = make_search(monkeypatch, lambda name, x: 0.5)
    first, second = FIRST, FIRST._replace(rank=3)
    made.of([first, second])
    made.keep(second)
    kept = [row["rank"] for row in made.run.rows if row["kept"]]
    assert kept == [3, 3]
    assert len(made.run.best) == 2 * 2


def test_a_training_whose_snapshots_were_forgotten_is_done_once_more(monkeypatch):
    """For the curve and the settings of the prior together, on each hold-out."""
    trained = []

    class Trains(Plain):
        def __call__(self, trainings, **settings):
            for training in trainings:
                trained.append(training.name)
                trail = np.zeros((10, 1)), np.zeros((10, 1))
                yield Trained(None, None, trail)

        def result(self, name, prefs, *snapshot):
            return name, prefs

    train = Trains(lambda name, x: 0.5)
    monkeypatch.setattr(search.Losses, "_curve", lambda self, *x: train.curve(*x))
    split = types.SimpleNamespace(training=1, project=lambda basis: f"{basis} · V")
    made = search.Losses(train, {"judgements": split, "items": split}, Run())
    first, second = FIRST, FIRST._replace(rank=3)
    made.of([first, second])
    made.keep(second)
    trained.clear()
    made.curves(first)
    assert made.results(first, 4) == [("judgements · V", 1), ("items · V", 1)]
    assert trained == ["judgements", "items"]
    kept = [row["rank"] for row in made.run.rows if row["kept"]]
    assert kept == [2, 2, 3, 3]
