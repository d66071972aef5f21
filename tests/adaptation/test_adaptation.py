"""New users against a frozen basis: meanings and oracles."""

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
    random_basis,
    random_differences,
    random_prior,
    user_margins,
)

import lore_jax as lore


def oracle_posterior_mean(z, prior):
    """Atom by atom and pair by pair."""
    scores = []
    for atom, log_weight in zip(
        np.asarray(prior.atoms, float), np.asarray(prior.log_weights, float)
    ):
        log_likelihood = -sum(np.logaddexp(0, -float(pair @ atom)) for pair in z)
        power = max(len(z), 1) ** -float(prior.tempering)
        scores.append(power * log_likelihood + log_weight)
    posterior = np.exp(np.array(scores) - max(scores))
    return posterior / posterior.sum() @ np.asarray(prior.atoms, float)


def gradient(z, p, scale=1.0):
    """∇_p Σ_n softplus(−z_n · p), float64."""
    return -scale * z.T @ (1 / (1 + np.exp(z @ np.asarray(p, float))))


def test_a_user_without_pairs_gets_the_mean_of_the_prior(default, prior):
    np.testing.assert_array_equal(default.weights[EMPTY], np.asarray(prior.mean))
    assert np.isnan(default.loss[EMPTY])
    assert default.gap[EMPTY] == 0
    assert default.converged[EMPTY]


def test_a_user_without_pairs_gets_uniform_weights_from_likelihood(max_likelihood):
    np.testing.assert_allclose(
        max_likelihood.weights[EMPTY], np.full(3, 1 / 3), rtol=1e-6
    )
    assert max_likelihood.gap[EMPTY] == 0
    assert np.isnan(max_likelihood.loss[EMPTY])
    assert max_likelihood.converged[EMPTY]


def test_no_prior_is_uniform_dirichlet(basis, prefs):
    out = lore.adapt(lore.RewardModel(basis), prefs)
    np.testing.assert_allclose(out.weights[EMPTY], np.full(3, 1 / 3), rtol=1e-5)
    rng = np.random.default_rng(0)
    points = rng.dirichlet(np.ones(RANK), 200_000)
    z = user_margins(basis, random_differences(), temperature=1.0)
    for u in (0, 5):
        power = np.exp(-np.logaddexp(0, -points @ z[u].T).sum(1))
        mean = power / power.sum() @ points
        # The refinement moves towards the likelihood, from there.
        assert np.abs(np.asarray(out.weights[u]) - mean).max() < 0.2
        assert out.weights[u].min() > 0


@pytest.mark.parametrize("alpha", [0.5, (0.5, 1.0, 2.5)], ids=["one", "per_direction"])
def test_maximum_a_posteriori_is_stationary(basis, prefs, alpha):
    model = lore.RewardModel(basis, temperature=TEMPERATURE)
    out = lore.adapt(model, prefs, method=lore.MAP(alpha))
    assert out.converged.all()
    a = np.broadcast_to(alpha, RANK)
    np.testing.assert_allclose(out.weights[EMPTY], a / a.sum(), rtol=1e-6)
    for u, z in enumerate(user_margins(basis, random_differences())):
        p = np.asarray(out.weights[u], float)
        slope = p * gradient(z, p) - a  # = λ p at the optimum
        np.testing.assert_allclose(slope, slope.sum() * p, atol=5e-3)


@pytest.mark.parametrize("tempering", [0.0, 0.4])
def test_infinite_concentration_is_the_posterior_mean(basis, prefs, tempering):
    prior = random_prior(
        concentration=jnp.asarray(np.inf, jnp.float32),
        tempering=jnp.asarray(tempering, jnp.float32),
    )
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs)
    for u, z in enumerate(user_margins(basis, random_differences())):
        want = oracle_posterior_mean(z, prior)
        np.testing.assert_allclose(out.weights[u], want, rtol=1e-4, atol=1e-5)
    assert out.converged.all()
    assert not out.gap.any()


def test_the_default_minimises_what_it_says(basis, default, prior):
    """η f(p) − κ_n Σ p̄ log p is stationary on the simplex."""
    assert default.converged.all()
    for u, z in enumerate(user_margins(basis, random_differences())):
        p = np.asarray(default.weights[u], float)
        power = max(len(z), 1) ** -float(prior.tempering)
        pull = float(prior.concentration) * (max(len(z), 1) / 10) ** -0.5
        pull = pull * oracle_posterior_mean(z, prior)
        slope = p * gradient(z, p, power) - pull
        np.testing.assert_allclose(slope, slope.sum() * p, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"atoms": random_prior(seed=9).atoms},
        {"log_weights": random_prior(seed=9).log_weights},
        {"concentration": jnp.asarray(0.5, jnp.float32)},
        {"tempering": jnp.asarray(0.0, jnp.float32)},
        {"decay": jnp.asarray(-0.5, jnp.float32)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_part_of_the_prior_matters(basis, prefs, prior, default, changes):
    out = lore.adapt(
        lore.RewardModel(basis, prior.replace(**changes), TEMPERATURE), prefs
    )
    change = np.abs(out.weights - default.weights).max(1)
    assert change.max() > 1e-2
    if set(changes) <= {"concentration", "tempering", "decay"}:
        assert change[EMPTY] == 0


def test_the_numbers_of_a_prior_may_be_plain(basis, prefs, prior, default):
    names = "concentration", "tempering", "decay"
    plain = prior.replace(**{name: float(getattr(prior, name)) for name in names})
    out = lore.adapt(lore.RewardModel(basis, plain, TEMPERATURE), prefs)
    np.testing.assert_array_equal(out.weights, default.weights)


def test_maximum_likelihood_ignores_the_prior(basis, prefs, prior, max_likelihood):
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs, method=ML)
    np.testing.assert_array_equal(out.weights, max_likelihood.weights)


def test_maximum_likelihood_is_optimal(basis, max_likelihood):
    """The certificate, recomputed: ⟨p, ∇f⟩ − min ∇f for the mean loss."""
    assert max_likelihood.converged.all()
    for u, z in enumerate(user_margins(basis, random_differences())):
        if len(z):
            p = np.asarray(max_likelihood.weights[u], float)
            slope = gradient(z, p, 1 / len(z))
            gap = p @ slope - slope.min()
            assert gap < 2e-4
            assert gap <= max_likelihood.gap[u] + 1e-5


def test_maximum_likelihood_is_no_worse_than_500_steps_of_adam(basis, prefs):
    model = lore.RewardModel(basis * 100, temperature=100.0)
    published = lore.PublishedAdam(num_steps=500, learning_rate=0.1)
    adam = lore.adapt(model, prefs, method=published)
    certified = lore.adapt(model, prefs, method=ML)
    some = np.arange(len(COUNTS)) != EMPTY
    assert (certified.loss[some] <= adam.loss[some] + 1e-6).all()


@pytest.mark.parametrize("name", ["default", "max_likelihood"])
def test_what_comes_back_fits_together(name, basis, prefs, request):
    out = request.getfixturevalue(name)
    np.testing.assert_allclose(out.weights.sum(1), 1, rtol=1e-5)
    assert (out.weights >= 0).all()
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_allclose(
        out.logits, np.log(np.maximum(out.weights, tiny)), rtol=1e-6
    )
    for u, z in enumerate(user_margins(basis, random_differences())):
        if len(z):
            want = np.logaddexp(0, -z @ np.asarray(out.weights[u], float)).mean()
            np.testing.assert_allclose(out.loss[u], want, rtol=1e-5)
    assert out.weights.dtype == np.float32
    assert out.weights.shape == (len(COUNTS), RANK)
    for field in (out.loss, out.gap, out.converged, out.num_steps):
        assert field.shape == (len(COUNTS),)


def test_no_pair_at_all(basis, prior):
    prefs = lore.Preferences.from_ragged([np.empty((0, FEATURES), np.float32)] * 2)
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs)
    np.testing.assert_array_equal(out.weights, np.tile(prior.mean, (2, 1)))


RANK_ONE = {
    "default": lore.PosteriorMean(),
    "maximum_likelihood": ML,
    "maximum_a_posteriori": lore.MAP(2.0),
    "published": lore.PublishedAdam(num_steps=3),
}


@pytest.mark.parametrize("method", RANK_ONE.values(), ids=RANK_ONE)
def test_rank_one_is_the_identity(method):
    prefs = lore.Preferences.from_ragged(random_differences((3, 0, 2)))
    out = lore.adapt(lore.RewardModel(random_basis(rank=1)), prefs, method=method)
    np.testing.assert_allclose(out.weights, np.ones((3, 1)), rtol=1e-6)
    assert out.converged[[0, 2]].all()


def test_the_published_method_starts_where_it_is_told(basis, prefs):
    init = np.random.default_rng(0).normal(size=(len(COUNTS), RANK)).astype(np.float32)
    method = lore.PublishedAdam(num_steps=0, init=init)
    out = lore.adapt(lore.RewardModel(basis), prefs, method=method)
    np.testing.assert_allclose(out.weights, lore.mixture_weights(init), rtol=1e-5)


def test_the_published_start_is_seeded_and_random(basis, prefs):
    def run(seed):
        method = lore.PublishedAdam(num_steps=0, key=jax.random.key(seed))
        return lore.adapt(lore.RewardModel(basis), prefs, method=method).weights

    np.testing.assert_array_equal(run(1), run(1))
    assert np.abs(run(1) - run(2)).max() > 0.1
    assert len(np.unique(run(1)[:, 0])) == len(COUNTS)
