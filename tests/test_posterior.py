"""Posterior deviations: bounds, the prior's at 0 pairs, calibration and coverage."""

import itertools

import numpy as np
import planted_oracle as oracle
import pytest
from scipy import stats

import lore_jax as lore
from lore_jax._pairs.projected import checked_pairs
from lore_jax.prediction import iterate_moments

KAPPAS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, np.inf)
DECAYS = (-1.0, 0.0, 1.0)
TEMPERINGS = (0.0, 0.2, 0.5)


def float32_prior(atoms, probability, kappa=np.inf, gamma=0.0, decay=0.0):
    with np.errstate(divide="ignore"):
        log_weights = np.log(probability)
    return lore.Prior(
        atoms=np.asarray(atoms, np.float32),
        log_weights=np.asarray(log_weights, np.float32),
        concentration=np.float32(kappa),
        tempering=np.float32(gamma),
        decay=np.float32(decay),
    )


def ragged(z):
    return lore.Preferences.from_ragged([x.astype(np.float32) for x in z])


def eye(rank):
    return np.eye(rank, dtype=np.float32)


def prior_moments(prior):
    """(mean, covariance) of the atoms, in float64."""
    share = np.exp(np.asarray(prior.log_weights, np.float64))
    share /= share.sum()
    atoms = np.asarray(prior.atoms, np.float64)
    mean = share @ atoms
    return mean, (atoms - mean).T @ (share[:, None] * (atoms - mean))


def random_pairs(rng, rank, **fields):
    """6 users with 0 to 24 pairs, of margins from 1e-3 to 1e6."""
    counts = [0, 1, 2, 5, 24, 24]
    sizes = 10.0 ** np.array([0, 0, -3, 1, 3, 6])
    user = np.repeat(np.arange(6), counts)
    rows = rng.normal(size=(len(user), rank)) * sizes[user][:, None]
    if fields.get("label"):
        fields["label"] = rng.random(len(user))
    if fields.get("sample_weight"):
        fields["sample_weight"] = rng.exponential(3.0, len(user))
    chosen = np.arange(len(user))
    rows = rows.astype(np.float32)
    return lore.Preferences.from_pairs(rows, chosen, None, user, 6, **fields)


@pytest.mark.parametrize(
    "rank", [1, 2, 5, *(pytest.param(k, marks=pytest.mark.slow) for k in (20, 50))]
)
def test_deviations_are_at_most_a_half_and_the_priors_without_pairs(rank):
    """Over all κ, δ and γ, weights, labels, extreme margins and degenerate priors."""
    rng = np.random.default_rng(rank)
    vertices = np.eye(rank)
    size = 30
    drawn = rng.dirichlet(np.full(rank, 0.3), size)
    twins = np.concatenate([vertices[:1], np.tile(vertices[-1:], (size - 1, 1))])
    weights = np.full(size, 0.5 / (size - 1))
    weights[0] = 0.5  # two opposite vertices share the prior: a deviation of 1/2
    priors = [
        float32_prior(drawn, rng.dirichlet(np.ones(size))),
        float32_prior(twins, weights),
        float32_prior(drawn, np.eye(size)[3] + 1e-30),
    ]
    kinds = [random_pairs(rng, rank, label=True, sample_weight=True)]
    if rank < 20:  # Another program for each, which takes long to compile.
        kinds.append(random_pairs(rng, rank))
    settings = list(itertools.product(KAPPAS, DECAYS, TEMPERINGS))
    some = rng.permutation(len(settings))[:8]
    cases = itertools.cycle(itertools.product(priors, kinds))
    for i, (prior, prefs) in zip(some, cases):
        kappa, decay, gamma = (np.float32(x) for x in settings[i])
        prior = prior.replace(concentration=kappa, decay=decay, tempering=gamma)
        model = lore.RewardModel(eye(rank), prior)
        got = lore.posterior(model, prefs, covariance=True)
        assert np.isfinite(got.covariance).all()
        assert (got.std <= 0.5).all()
        assert (np.linalg.eigvalsh(got.covariance.astype(float)) > -1e-6).all()
        np.testing.assert_allclose(got.covariance.sum(2), 0, atol=1e-5)
        own = prior_moments(prior)[1]
        np.testing.assert_allclose(got.covariance[0], own, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            got.std[0], np.sqrt(np.diag(own)), rtol=1e-5, atol=1e-5
        )
        adapted = lore.adapt(model, prefs, return_std=True)
        # Rounding of the weights tells at margins of 1e3: no more than this.
        np.testing.assert_allclose(adapted.std, got.std, atol=2e-3)


def test_a_user_without_pairs_has_the_priors_deviation():
    atoms = [[1, 0], [0, 1], [0.5, 0.5]]
    prior = float32_prior(atoms, [0.25, 0.25, 0.5], kappa=0.3)
    none = lore.Preferences.from_pairs(eye(2), [], [], np.zeros(0, int), 1)
    got = lore.posterior(lore.RewardModel(eye(2), prior), none).std
    np.testing.assert_allclose(got, [[0.125**0.5] * 2], rtol=1e-6)


def test_few_pairs_change_the_deviation_little():
    """Σ is continuous at 0: a pair that says nothing leaves the prior's."""
    rng = np.random.default_rng(0)
    prior = oracle.drawn_prior(rng, 0.3, 5, concentration=0.3)
    quiet = ragged(np.full((1, 1, 5), 1e-3) * np.arange(5))
    model = lore.RewardModel(eye(5), prior)
    got = lore.posterior(model, quiet, covariance=True).covariance
    np.testing.assert_allclose(got[0], prior_moments(prior)[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 5, 20])
def test_the_posterior_over_atoms_is_calibrated(rank):
    """Simulation-based calibration: γ = 0 and κ = ∞, users drawn from the atoms.

    The randomised rank of the true margin of a random pair is uniform, and Σ is the
    mean square of the error of the mean.
    """
    rng = np.random.default_rng([rank, 1])
    atoms = rng.dirichlet(np.full(rank, 0.7), 60).astype(np.float32)
    probability = rng.dirichlet(np.full(60, 2.0))
    prior = float32_prior(atoms, probability)
    model = lore.RewardModel(eye(rank), prior)
    num = 600
    for pairs in (0, 1, 3, 10, 40):
        true = rng.choice(60, num, p=probability)
        z = rng.normal(size=(num, pairs, rank)) * 3
        m = np.einsum("upk,uk->up", z, atoms[true])
        z *= np.where(rng.random(m.shape) < 1 / (1 + np.exp(-m)), 1, -1)[..., None]
        prefs = ragged(z)
        share = np.empty((num, 60))
        for chunk, moments in iterate_moments(checked_pairs(model, prefs), prior, 1.0):
            found = np.asarray(moments.probability)
            share[chunk.users] = found[: len(chunk.users)]
        new = rng.normal(size=(num, rank))
        margins = new @ atoms.T
        own = margins[np.arange(num), true][:, None]
        below, tied = (np.sum(share * x, 1) for x in (margins < own, margins == own))
        ranks = below + rng.random(num) * tied
        assert stats.kstest(ranks, "uniform").pvalue > 1e-3
        got = lore.posterior(model, prefs, covariance=True)
        np.testing.assert_allclose(got.weights, got.mean, atol=1e-6)
        np.testing.assert_allclose(got.mean, share @ atoms, atol=1e-5)
        error = np.einsum("uk,uk->u", new, atoms[true] - got.mean) ** 2
        error = error - np.einsum("uk,ukl,ul->u", new, got.covariance, new)
        assert abs(error.mean()) < 4 * error.std() / num**0.5 + 1e-6


@pytest.fixture(scope="module", params=[2, 5])
def fitted_prior(request):
    """What `fit` chooses for Dirichlet(0.3) users, V known."""
    few = dict(temperings=(0.0,), decays=(0.0, 1.0), variance_scales=(0.1,))
    few |= dict(concentrations=(3.0, 30.0), margin_scales=(1.0,))
    return request.param, oracle.fit_known(0.3, request.param, 40, 400, **few)


@pytest.mark.parametrize("pairs", [1, 3, 10, 40])
def test_intervals_cover_as_often_as_they_say(fitted_prior, pairs):
    rank, prior = fitted_prior
    row = oracle.coverage_row(prior, 0.3, rank, pairs, steps=150, burn=100)
    for exact, ours in zip(row["exact"], row["weights"]):
        assert 85 < ours < 96.5, row  # 400 users: a standard error is about 1 point
        assert abs(ours - exact) < 5, row
    ratio = row["deviation"] / row["exact_deviation"]
    assert 0.85 < ratio < 1.45, row


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5])
def test_no_setting_covers_nearly_always(gamma):
    """γ tempers the weights, not Σ: else intervals at γ = 0.5 cover everything."""
    rank, users = 2, 400
    rng = np.random.default_rng(5)
    prior = oracle.drawn_prior(rng, 0.3, rank)
    truth, z, new = oracle.population(rng, 0.3, rank, 40, users, new_pairs=20)
    for kappa, decay in ((0.3, -1.0), (3.0, 1.0), (30.0, 0.0)):
        setting = dict(concentration=kappa, decay=decay, tempering=gamma)
        setting = {name: np.float32(x) for name, x in setting.items()}
        model = lore.RewardModel(eye(rank), prior.replace(**setting))
        got = lore.posterior(model, ragged(z), covariance=True)
        for centre in (got.weights, got.mean):
            for each in oracle.coverage(truth, centre, got.covariance, new):
                assert each.mean() < 99


def test_the_two_exact_samplers_agree_on_covariances():
    _, z, _ = oracle.population(np.random.default_rng(0), 0.3, 5, 5, 20)
    chain = oracle.elliptical_moments(z, 0.3, steps=1500)[1]
    drawn = oracle.importance_moments(z, 0.3)[1]
    assert np.abs(chain - drawn).max() < 0.02


def test_the_order_of_directions_is_irrelevant():
    rng = np.random.default_rng(2)
    prior = oracle.drawn_prior(rng, 0.5, 4, concentration=3.0)
    _, z, _ = oracle.population(rng, 0.5, 4, 7, 10)
    order = np.array([2, 0, 3, 1])
    model = lore.RewardModel(eye(4), prior)
    got = lore.posterior(model, ragged(z), covariance=True).covariance
    turned = prior.replace(atoms=np.asarray(prior.atoms)[:, order])
    model = lore.RewardModel(eye(4), turned)
    same = lore.posterior(model, ragged(z[..., order]), covariance=True)
    want = got[:, order][:, :, order]
    np.testing.assert_allclose(same.covariance, want, atol=2e-5)
