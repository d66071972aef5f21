"""Which pair to ask next: the information against a brute-force sum, and curves."""

import jax
import numpy as np
import planted_oracle as oracle
import pytest

import lore_jax as lore
from lore_jax import acquisition

RANK = 3


@pytest.fixture(scope="module")
def prior(small_prior):
    return small_prior


@pytest.fixture(scope="module")
def basis(small_basis):
    return small_basis


@pytest.fixture(scope="module")
def model(basis, prior):
    return lore.RewardModel(basis, prior, temperature=2.0)


@pytest.fixture(scope="module")
def seen(make_preferences):
    return make_preferences()


@pytest.fixture(scope="module")
def candidates(make_preferences):
    return make_preferences(num_pairs=60, seed=3)


def brute_force(q, m):
    """Σ over atoms and answers of joint · log(joint / product), in float64."""
    total = 0.0
    for answer in (1, -1):
        likelihood = 1 / (1 + np.exp(-answer * np.asarray(m, np.float64)))
        evidence = np.sum(q * likelihood)
        for qa, la in zip(q, likelihood):
            if qa * la > 0:
                total += qa * la * np.log(la / evidence)
    return total


def test_information_is_the_mutual_information():
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(7), 50)
    m = rng.normal(size=(50, 7)) * rng.choice([0.1, 3, 30], size=(50, 1))
    got = acquisition.expected_information(q.astype(np.float32), m.astype(np.float32))
    want = [brute_force(*pair) for pair in zip(q, m)]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_information_is_bounded_and_never_nan():
    q = np.array([0.5, 0.5], np.float32)
    sure = acquisition.expected_information(q, np.array([1e6, -1e6], np.float32))
    np.testing.assert_allclose(sure, np.log(2), rtol=1e-6)
    for m in ([0, 0], [1e6, 1e6], [-200, -200]):
        got = acquisition.expected_information(q, np.array(m, np.float32))
        np.testing.assert_allclose(got, 0, atol=1e-6)


def test_scores_come_from_each_users_posterior(model, seen, candidates):
    """In the caller's order, from the atoms shifted onto the refined weights."""
    got = lore.score_pairs(model, seen, candidates)
    weights = np.asarray(lore.adapt(model, seen).weights, np.float64)
    basis, prior = model.basis, model.prior
    x = np.asarray(seen.features, np.float64)
    y = np.asarray(candidates.features, np.float64)
    atoms = np.asarray(prior.atoms, np.float64)
    for n in range(candidates.num_pairs):
        u = candidates.user[n]
        mine = np.asarray(seen.user) == u
        z = (x[seen.chosen[mine]] - x[seen.rejected[mine]]) @ basis / 2.0
        logs = -np.logaddexp(0, -z @ atoms.T).sum(0) * max(mine.sum(), 1) ** -0.2
        q = np.exp(logs + prior.log_weights)
        q /= q.sum()
        zn = (y[candidates.chosen[n]] - y[candidates.rejected[n]]) @ basis / 2.0
        m = (atoms + weights[u] - q @ atoms) @ zn
        want = brute_force(q, m)
        assert got[candidates.order[n]] == pytest.approx(want, abs=1e-5)


def test_the_side_called_chosen_does_not_matter(model, seen, candidates):
    swapped = candidates.replace(chosen=candidates.rejected, rejected=candidates.chosen)
    for method in ("information", "margin"):
        a, b = (
            lore.score_pairs(model, seen, c, method=method)
            for c in (candidates, swapped)
        )
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_baselines(model, seen, candidates):
    score = lore.score_pairs
    m = lore.margins(model, lore.adapt(model, seen), candidates)
    got = score(model, seen, candidates, method="margin")
    np.testing.assert_allclose(got, -np.abs(m), atol=1e-5)
    key = jax.random.key(0)
    a = score(model, seen, candidates, method="random", key=key)
    b = score(model, seen, candidates, method="random", key=jax.random.key(1))
    assert a.shape == (60,)
    assert not np.allclose(a, b)
    with pytest.raises(ValueError, match="key"):
        score(model, seen, candidates, method="random")
    with pytest.raises(ValueError, match="key"):
        score(model, seen, candidates, key=key)
    with pytest.raises(ValueError, match="method"):
        score(model, seen, candidates, method="best")


def test_best_pairs_are_each_users_own(candidates):
    scores = np.random.default_rng(0).normal(size=60)
    got = lore.best_pairs(scores, candidates, 4)
    user = np.empty(60, int)
    user[candidates.order] = candidates.user
    for u in range(5):
        mine = np.flatnonzero(user == u)
        want = mine[np.argsort(-scores[mine])][:4]
        np.testing.assert_array_equal(
            got[u], np.pad(want, (0, 4 - len(want)), constant_values=-1)
        )
    assert (
        lore.best_pairs(np.zeros(60), candidates)[:4, 0]
        == [np.flatnonzero(user == u)[0] for u in range(4)]
    ).all()
    with pytest.raises(ValueError, match="scores"):
        lore.best_pairs(scores[:-1], candidates)


def curve(method, *, users=200, rounds=8, offered=20, seed=0):
    """Expected accuracy after each answer, K=5, Dirichlet(0.3)."""
    rng = np.random.default_rng(seed)
    prior = oracle.drawn_prior(rng, 0.3, 5)
    model = lore.RewardModel(np.eye(5, dtype=np.float32), prior)
    truth, z, new = oracle.population(rng, 0.3, 5, offered, users, new_pairs=200)
    pool = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    asked = np.zeros(users * offered, bool)
    accuracies = []
    for step in range(rounds):
        seen = lore.take_pairs(pool, asked)
        left = lore.take_pairs(pool, ~asked)
        key = jax.random.key(step) if method == "random" else None
        scores = lore.score_pairs(model, seen, left, method=method, key=key)
        best = lore.best_pairs(scores, left)[:, 0]
        asked[np.flatnonzero(~asked)[best]] = True
        weights = lore.adapt(model, lore.take_pairs(pool, asked)).weights
        accuracies.append(oracle.expected_accuracy(truth, weights, new).mean())
    return np.array(accuracies)


def test_asking_what_informs_learns_faster():
    information, random = curve("information"), curve("random")
    assert information[-1] > information[0]
    assert information[2:].mean() > random[2:].mean() + 0.5
