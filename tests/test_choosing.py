"""One of n responses for a user or a group, against rules written out user by user."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import choosing

RNG = np.random.default_rng(4)
X = RNG.normal(size=(12, 6)).astype(np.float32)
BASIS = RNG.normal(size=(6, 3)).astype(np.float32)
WEIGHTS = RNG.dirichlet(np.full(3, 0.5), 7).astype(np.float32)
MODEL = lore.RewardModel(BASIS, temperature=7.0)
CANDIDATES = np.array([[7, 2, 5, 1], [0, 8, 1, 11], [3, 4, 6, 9]])
REWARDS = WEIGHTS.astype(float) @ (X.astype(float) @ BASIS).T / 7.0  # [U, M]
RULES = ("mean", "median", "worst_off", "borda")


def by_hand(rewards, rule):
    """What a rule gives every candidate, from rewards [U, n]; one at a time."""
    users, count = rewards.shape
    if rule == "borda":
        points = np.zeros(count)
        for mine in rewards:
            for i in range(count):
                for j in range(count):
                    if i != j:
                        points[i] += (mine[i] > mine[j]) + 0.5 * (mine[i] == mine[j])
        return points / users / max(count - 1, 1)
    gains = np.array([mine - mine.mean() for mine in rewards])
    functions = {"mean": np.mean, "median": np.median, "worst_off": np.min}
    return np.array([functions[rule](gains[:, i]) for i in range(count)])


def test_best_of_n_is_the_best_candidate_of_each_query():
    user = np.array([3, 1, 6])
    mine = REWARDS[user[:, None], CANDIDATES]
    by_row = lore.best_of_n(MODEL, WEIGHTS, CANDIDATES, user, features=X)
    by_value = lore.best_of_n(MODEL, WEIGHTS, X[CANDIDATES], user)
    for place, score in (by_row, by_value):
        np.testing.assert_array_equal(place, mine.argmax(1))
        np.testing.assert_allclose(score, mine.max(1), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_a_jury_follows_its_rule(rule):
    want = np.array([by_hand(REWARDS[:, rows], rule) for rows in CANDIDATES])
    by_row = lore.jury(MODEL, WEIGHTS, CANDIDATES, rule=rule, features=X)
    by_value = lore.jury(MODEL, WEIGHTS, X[CANDIDATES], rule=rule)
    for place, score in (by_row, by_value):
        assert place.dtype == jnp.int32
        np.testing.assert_array_equal(place, want.argmax(1))
        np.testing.assert_allclose(score, want.max(1), rtol=1e-4, atol=1e-6)


def test_rules_disagree_where_they_should():
    """Four of seven lose a little where three lose much: the majority is overruled.

    Candidate 0 is the median's and Borda's, 1 the mean's, 2 nobody's dislike.
    """
    basis = np.eye(3, dtype=np.float32)
    most = [[1.0, 0.0, 0.0]] * 4
    few = [[0.0, 1.0, 0.0]] * 3
    weights = np.float32(most + few)
    candidates = np.float32([[[2, -9, 0], [1, 9, 0], [1.9, 7, 0]]])
    model = lore.RewardModel(basis)
    got = {
        rule: lore.jury(model, weights, candidates, rule=rule)[0].tolist()
        for rule in RULES
    }
    # Gains of the four: 0.37, −0.63, 0.27. Gains of the three: −11.3, 6.7, 4.7.
    assert got == {"mean": [1], "median": [0], "worst_off": [2], "borda": [0]}


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_per_user_and_query_changes_nothing(rule):
    """Choices do not identify it: one feature that all candidates share, by user."""
    shift = RNG.normal(size=(3, 1, 1)).astype(np.float32) * 20
    wide = np.concatenate(
        [X[CANDIDATES], np.broadcast_to(shift, (3, 4, 1)).astype(np.float32)], 2
    )
    basis = np.concatenate([BASIS, np.float32([[3, -2, 9]])])
    got = lore.jury(MODEL.replace(basis=basis), WEIGHTS, wide, rule=rule)
    want = lore.jury(MODEL, WEIGHTS, X[CANDIDATES], rule=rule)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_group_of_one_agrees_with_best_of_n(rule):
    want = lore.best_of_n(MODEL, WEIGHTS, X[CANDIDATES], [2, 2, 2])[0]
    got, _ = lore.jury(MODEL, WEIGHTS, X[CANDIDATES], user=[2], rule=rule)
    np.testing.assert_array_equal(got, want)


def test_a_group_by_name():
    names = np.array(["a", "b", "c", "d", "e", "f", "g"])
    zeros = np.zeros(7, np.float32)
    named = lore.Adapted(WEIGHTS, WEIGHTS, zeros, zeros, zeros, zeros, names)
    some = ["f", "b", "b"]
    want = np.array([by_hand(REWARDS[[5, 1, 1]][:, r], "mean") for r in CANDIDATES])
    place, score = lore.jury(MODEL, named, X[CANDIDATES], user=some)
    np.testing.assert_array_equal(place, want.argmax(1))
    np.testing.assert_allclose(score, want.max(1), rtol=1e-4)
    by_row = lore.jury(MODEL, WEIGHTS, X[CANDIDATES], user=[5, 1, 1])
    np.testing.assert_array_equal(by_row[0], place)
    with pytest.raises(ValueError, match="'z'"):
        lore.jury(MODEL, named, X[CANDIDATES], user=["z"])


@pytest.mark.parametrize("rule", RULES)
def test_under_jit_and_in_small_batches(rule, monkeypatch):
    want = lore.jury(MODEL, WEIGHTS, X[CANDIDATES], rule=rule)

    @jax.jit
    def choose(model, weights, rows, user):
        return lore.jury(model, weights, rows, user=user, rule=rule, features=X)

    got = choose(MODEL, WEIGHTS, CANDIDATES, np.arange(7))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    monkeypatch.setattr(choosing, "_CELLS", 7 * 4 * 2)  # Two queries at once.
    again = lore.jury(MODEL, WEIGHTS, X[CANDIDATES], rule=rule)
    np.testing.assert_allclose(again[1], want[1], rtol=1e-6)


def test_best_of_n_under_jit():
    want = lore.best_of_n(MODEL, WEIGHTS, X[CANDIDATES], [3, 1, 6])
    choose = jax.jit(lambda m, w, c, u: lore.best_of_n(m, w, c, u, features=X))
    got = choose(MODEL, WEIGHTS, CANDIDATES, np.array([3, 1, 6]))
    np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("rule", RULES)
def test_one_candidate_scores_nothing(rule):
    place, score = lore.jury(MODEL, WEIGHTS, X[:5, None], rule=rule)
    np.testing.assert_array_equal(place, np.zeros(5))
    np.testing.assert_allclose(score, np.zeros(5), atol=1e-6)
    place, _ = lore.jury(MODEL, WEIGHTS, X[:0, None], rule=rule)
    assert place.shape == (0,)


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_candidates_the_first(rule):
    place, score = lore.jury(MODEL, WEIGHTS, X[[[4, 4, 4]]], rule=rule)
    assert place.tolist() == [0]
    np.testing.assert_allclose(score, [0.5 if rule == "borda" else 0], atol=1e-6)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "rule must be one of mean", dict(rule="veto")),
        (ValueError, "got none", dict(user=[])),
        (ValueError, "user must be in 0 … 6", dict(user=[7])),
        (ValueError, r"candidates must be float\[Q, n, D\]", dict(candidates=X)),
        (
            ValueError,
            r"candidates must be in 0 … 11",
            dict(candidates=CANDIDATES + 1, features=X),
        ),
        (ValueError, r"candidates must be int\[Q, n\]", dict(features=X)),
        (ValueError, "features must be finite", dict(candidates=X[None] * np.nan)),
        (ValueError, "simplex", dict(weights=WEIGHTS - 1)),
        (TypeError, "model must be a RewardModel", dict(model=BASIS)),
    ],
)
def test_refusals_name_the_argument(error, words, call):
    arguments = {"model": MODEL, "weights": WEIGHTS, "candidates": X[CANDIDATES]}
    arguments.update(call)
    with pytest.raises(error, match=words):
        lore.jury(**arguments)


def test_best_of_n_wants_one_user_per_query():
    with pytest.raises(ValueError, match=r"user must be \[Q\] with Q=3"):
        lore.best_of_n(MODEL, WEIGHTS, CANDIDATES, [0, 1], features=X)


def test_the_examples_run():
    done = doctest.testmod(choosing, extraglobs=dict(lore=lore, np=np, jax=jax))
    assert done.attempted > 5
    assert done.failed == 0
