"""Dirichlet users, simulated choices and planted problems."""

import jax
import jax.extend.core
import numpy as np
import pytest

import lore_jax as lore

population = lore.data


@pytest.mark.parametrize("alpha", [0.3, 4.0])
def test_dirichlet_users_have_the_right_moments(alpha):
    p = np.asarray(population.dirichlet_users(jax.random.key(0), 20_000, alpha, 3))
    assert p.shape == (20_000, 3)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.mean(0), 1 / 3, atol=0.01)
    variance = (1 / 3) * (2 / 3) / (3 * alpha + 1)
    np.testing.assert_allclose(p.var(0), variance, rtol=0.05)


def test_choices_are_the_best_and_the_worst():
    rng = np.random.default_rng(0)
    rewards, weights = rng.normal(size=(6, 5, 3)), rng.dirichlet(np.ones(3), 4)
    best, worst = population.simulate_choices(rewards, weights)
    for u in range(4):
        scores = rewards @ weights[u]
        np.testing.assert_array_equal(best[u], scores.argmax(1))
        np.testing.assert_array_equal(worst[u], scores.argmin(1))


def test_ties_go_to_the_first():
    best, worst = population.simulate_choices(np.ones((1, 4, 2)), np.full((1, 2), 0.5))
    assert (int(best[0, 0]), int(worst[0, 0])) == (0, 0)


def test_simulated_preferences_point_into_the_table():
    rng = np.random.default_rng(1)
    rewards, weights = rng.normal(size=(6, 4, 3)), rng.dirichlet(np.ones(3), 2)
    table = rng.normal(size=(24, 5)).astype(np.float32)
    prompts = np.array([[5, 0, 2], [1, 3, 2]])
    prefs = population.simulated_preferences(table, rewards, weights, prompts)
    assert prefs.num_pairs == 6
    for n in range(6):
        prompt = prompts[prefs.user[n]][n % 3]
        scores = rewards[prompt] @ weights[prefs.user[n]]
        assert prefs.chosen[n] == prompt * 4 + scores.argmax()
        assert prefs.rejected[n] == prompt * 4 + scores.argmin()
    # User and prompt make a group: no two pairs here share one.
    assert len(np.unique(prefs.group)) == 6


def test_all_prompts_are_asked_unless_told():
    rng = np.random.default_rng(1)
    rewards, weights = rng.normal(size=(6, 4, 3)), rng.dirichlet(np.ones(3), 2)
    table = np.ones((24, 5), np.float32)
    prefs = population.simulated_preferences(table, rewards, weights)
    np.testing.assert_array_equal(prefs.counts, [6, 6])


def test_prompts_whose_responses_all_tie_are_left_out():
    rewards = np.zeros((3, 4, 2))
    rewards[1, 2] = 1.0
    table = np.ones((12, 5), np.float32)
    prefs = population.simulated_preferences(table, rewards, np.full((2, 2), 0.5))
    np.testing.assert_array_equal(prefs.chosen, [6, 6])
    np.testing.assert_array_equal(prefs.counts, [1, 1])


def test_simulated_choices_build_nothing_large():
    """No intermediate of size users × prompts × responses."""
    users, prompts, responses = 64, 32, 16

    def largest(jaxpr):
        sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        inner = [
            largest(part)
            for e in jaxpr.eqns
            for part in jax.extend.core.jaxprs_in_params(e.params)
        ]
        return max([*sizes, *inner, 0])

    traced = jax.make_jaxpr(population.simulate_choices)(
        np.zeros((prompts, responses, 3)), np.zeros((users, 3))
    )
    assert users * prompts <= largest(traced.jaxpr) < users * prompts * responses


def make_planted(seed=0, **settings):
    sizes = dict(num_users=200, pairs_per_user=20, num_features=6, rank=3)
    return population.planted(jax.random.key(seed), **{**sizes, **settings})


def test_planted_choices_follow_the_model():
    problem = make_planted(margin_scale=2.0, heldout_pairs=30)
    assert problem.prefs.num_pairs == 4000
    assert problem.heldout.num_pairs == 6000
    basis = np.asarray(problem.basis)
    np.testing.assert_allclose(basis.T @ basis, 4 * np.eye(3), atol=1e-4)
    # Orient each difference at random: how often is it chosen at a given margin?
    model = lore.RewardModel(problem.basis)
    margins = np.asarray(lore.margins(model, problem.weights, problem.heldout))
    size = np.abs(margins)
    for low, high in ((0.0, 0.3), (0.3, 1.0), (1.0, 2.0)):
        inside = (size >= low) & (size < high)
        expected = (1 / (1 + np.exp(-size[inside]))).mean()
        assert abs((margins[inside] > 0).mean() - expected) < 0.04


def test_label_noise_flips_training_choices_only():
    clean, noisy = (
        make_planted(margin_scale=30.0, label_noise=noise) for noise in (0.0, 0.25)
    )

    def right(problem, prefs):
        model = lore.RewardModel(problem.basis)
        return float(lore.accuracy(model, problem.weights, prefs).mean())

    assert right(clean, clean.prefs) > 0.93
    share = right(noisy, noisy.prefs)
    assert abs(share - (0.75 * right(clean, clean.prefs) + 0.25 * 0.05)) < 0.04
    assert right(noisy, noisy.heldout) > 0.93


def test_planted_problems_follow_their_key():
    first, again, other = (make_planted(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.prefs.features, again.prefs.features)
    assert not np.allclose(first.basis, other.basis)
    # Training and held-out pairs are different draws.
    assert not np.allclose(first.prefs.features[:20], first.heldout.features[:20])
