"""Width of the posterior, and predictions that integrate over it."""

import jax
import numpy as np
import planted_oracle as oracle
import pytest

import lore_jax as lore
from lore_jax._train.refinement import choose_refinement
from lore_jax._train.validation import Validation, make_holdouts
from lore_jax.prior import with_settings

RANK, TEMPERATURE = 3, 2.0


def make_prior(seed=0, rank=RANK, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "atoms": rng.dirichlet(np.ones(rank), 20).astype(np.float32),
        "log_weights": np.log(rng.dirichlet(np.ones(20))).astype(np.float32),
        "concentration": np.float32(5.0),
        "tempering": np.float32(0.2),
        "decay": np.float32(0.5),
    }
    return lore.Prior(**{**fields, **changes})


@pytest.fixture(scope="module")
def basis():
    return np.random.default_rng(1).normal(size=(6, RANK)).astype(np.float32)


@pytest.fixture(scope="module")
def model(basis):
    return lore.RewardModel(basis, make_prior(), TEMPERATURE)


@pytest.fixture(scope="module")
def seen(make_preferences):
    return make_preferences(sample_weight=True, label=True)


@pytest.fixture(scope="module")
def new(make_preferences):
    return make_preferences(num_pairs=90, seed=3)


def hold_out(prefs):
    """A third of the judgements, by the key of these tests."""
    kinds = "judgements", 1.0
    return make_holdouts(prefs, jax.random.key(0), 0.3, *kinds)["judgements"]


def refine(validation, basis, prior, **grids):
    """(the prior with the chosen settings, a row per candidate) on one hold-out."""
    results = [(validation.project(basis), prior)]
    search = lore.PriorSearch(concentrations=(10.0,), decays=(0.0,), **grids)
    settings, rows = choose_refinement([validation], results, np.ones(1), search)
    return with_settings(prior, settings), rows


def user_pairs(prefs, basis, u, temperature=TEMPERATURE):
    """(z, weight, label) of one user, in float64."""
    mine = np.flatnonzero(np.asarray(prefs.user) == u)
    x = np.asarray(prefs.features, np.float64)
    z = (x[prefs.chosen[mine]] - x[prefs.rejected[mine]]) @ basis / temperature
    weight = (
        np.ones(len(z)) if prefs.sample_weight is None else prefs.sample_weight[mine]
    )
    label = np.ones(len(z)) if prefs.label is None else prefs.label[mine]
    return z, weight, label


def atoms_moments(share, atoms):
    mean = share @ atoms
    return mean, (atoms - mean).T @ (share[:, None] * (atoms - mean))


def oracle_moments(z, weight, label, p, prior):
    """(p̄, Σ) from their definitions, by dense inverses on the plane Σ dp = 0."""
    atoms = np.asarray(prior.atoms, np.float64)
    start = np.asarray(prior.log_weights, np.float64)
    m = z @ atoms.T
    logs = weight @ (label[:, None] * m - np.logaddexp(0, m))
    power = max(weight.sum(), 1) ** -float(prior.tempering)
    shares = [np.exp(x * logs + start) for x in (power, 1.0, 0.0)]
    tempered, whole, none = (x / x.sum() for x in shares)
    mean = tempered @ atoms
    between, own = (atoms_moments(x, atoms)[1] for x in (whole, none))
    if np.isinf(prior.concentration):
        return mean, between
    if not weight.sum():
        return mean, own
    chance = 1 / (1 + np.exp(-(z @ p)))
    curve = (z.T * (weight * chance * (1 - chance))) @ z
    # A basis of the plane Σ dp = 0 turns the constrained inverse into a plain one.
    plane = np.linalg.svd(np.ones((1, len(p))))[2][1:].T
    precision = np.linalg.inv(plane.T @ own @ plane) + plane.T @ curve @ plane
    normal = plane @ np.linalg.inv(precision) @ plane.T
    part = min(1.0, 4 * (whole**2).sum() ** (2 / (len(p) - 1)))
    return mean, (1 - part) * between + part * normal


@pytest.mark.parametrize("kappa", [0.5, 5.0, np.inf])
def test_mean_and_covariance_are_what_they_say(basis, seen, kappa):
    prior = make_prior(concentration=np.float32(kappa))
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    got = lore.posterior(model, seen, covariance=True)
    np.testing.assert_array_equal(got.weights, lore.adapt(model, seen).weights)
    for u in range(seen.num_users):
        p = np.asarray(got.weights[u], np.float64)
        mean, covariance = oracle_moments(*user_pairs(seen, basis, u), p, prior)
        np.testing.assert_allclose(got.mean[u], mean, atol=1e-5)
        np.testing.assert_allclose(got.covariance[u], covariance, atol=2e-5)
        np.testing.assert_allclose(got.std[u], np.sqrt(np.diag(covariance)), atol=1e-4)


def test_adapt_returns_the_deviation_with_the_weights(model, seen):
    both = lore.adapt(model, seen, return_std=True)
    whole = lore.posterior(model, seen)
    np.testing.assert_allclose(both.weights, whole.weights, atol=1e-6)
    np.testing.assert_allclose(both.std, whole.std, atol=1e-5)
    assert lore.adapt(model, seen).std is None
    for method in (lore.MaximumLikelihood(), lore.MAP(1.0), lore.PublishedAdam()):
        with pytest.raises(ValueError, match=r"which .* does not have"):
            lore.adapt(model, seen, method=method, return_std=True)


def test_the_deviation_of_many_chunks_at_a_rank_that_calls_lapack():
    """Batched Cholesky on two threads at once never came back (jaxlib 0.10.2)."""
    rng = np.random.default_rng(0)
    rank, users = 20, 2500
    x = rng.normal(size=(users * 12, rank)).astype(np.float32)
    rows, user = np.arange(len(x)), np.repeat(np.arange(users), 12)
    prefs = lore.Preferences.from_pairs(x, rows, None, user)
    model = lore.RewardModel(np.eye(rank), make_prior(rank=rank))
    out = lore.adapt(model, prefs, return_std=True)
    few = lore.take_users(prefs, np.arange(2400, 2410))
    alone = lore.adapt(model, few, return_std=True)
    np.testing.assert_allclose(out.weights[2400:2410], alone.weights, atol=1e-5)
    np.testing.assert_allclose(out.std[2400:2410], alone.std, atol=1e-5)


def test_covariance_only_on_request_and_names_travel(model):
    rows = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    prefs = lore.Preferences.from_ragged(list(rows), user_ids=["a", "b"])
    got = lore.posterior(model, prefs)
    assert got.covariance is None
    assert list(got.user_ids) == ["a", "b"]


@pytest.mark.parametrize(("rho", "scale"), [(0.0, 1.0), (0.3, 1.2), (1.0, 0.7)])
def test_probabilities_are_what_they_say(basis, seen, new, rho, scale):
    prior = make_prior().replace(margin_scale=np.float32(scale))
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    got = lore.predict_proba(model, seen, new, variance_scale=rho)
    weights = np.asarray(lore.adapt(model, seen).weights, np.float64)
    want = np.empty(new.num_pairs)
    for u in range(seen.num_users):
        z, _, _ = user_pairs(new, basis, u)
        moments = oracle_moments(*user_pairs(seen, basis, u), weights[u], prior)
        variance = np.einsum("qk,kl,ql->q", z, moments[1], z)
        m = scale * z @ weights[u] / np.sqrt(1 + np.pi / 8 * rho * variance)
        stored = np.flatnonzero(np.asarray(new.user) == u)
        want[new.order[stored]] = 1 / (1 + np.exp(-m))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_both_sides_of_a_pair_add_to_one(model, seen, new):
    swapped = new.replace(chosen=new.rejected, rejected=new.chosen)
    p, q = (lore.predict_proba(model, seen, x) for x in (new, swapped))
    np.testing.assert_allclose(p + q, 1, atol=1e-6)


def test_the_order_and_company_of_users_is_irrelevant(model, seen, new):
    whole = lore.predict_proba(model, seen, new)
    for u in (0, 2):
        one = [lore.take_users(x, np.array([u])) for x in (seen, new)]
        mine = np.sort(np.asarray(new.order)[np.asarray(new.user) == u])
        alone = lore.predict_proba(model, *one)
        np.testing.assert_allclose(alone, whole[mine], atol=1e-6)


def test_more_new_pairs_than_a_block(model, seen, make_preferences):
    many = make_preferences(num_pairs=13000, seed=5)
    got = lore.predict_proba(model, seen, many)
    some = np.arange(0, 13000, 997)
    part = lore.take_pairs(many, np.isin(np.asarray(many.order), some))
    alone = lore.predict_proba(model, seen, part)
    np.testing.assert_allclose(got[some], alone, atol=1e-6)


def test_users_are_matched_by_name(model):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3)]
    make = lore.Preferences.from_ragged
    seen = make(rows, user_ids=["a", "b", "c"])
    want = lore.predict_proba(model, seen, seen)
    back = make(rows[::-1], user_ids=["c", "b", "a"])
    got = lore.predict_proba(model, seen, back)
    np.testing.assert_allclose(got.reshape(3, 4)[::-1], want.reshape(3, 4), atol=1e-6)
    with pytest.raises(ValueError, match="'z'"):
        lore.predict_proba(model, seen, make(rows, user_ids=["a", "z", "c"]))
    with pytest.raises(ValueError, match="never matched"):
        lore.predict_proba(model, seen, make(rows))
    with pytest.raises(ValueError, match="3 users"):
        lore.predict_proba(model, make(rows), make(rows[:2]))


def test_nothing_to_predict_and_a_bad_variance_scale(model, seen, new):
    none = lore.take_pairs(new, np.zeros(new.num_pairs, bool))
    assert lore.predict_proba(model, seen, none).shape == (0,)
    with pytest.raises(ValueError, match="variance_scale"):
        lore.predict_proba(model, seen, new, variance_scale=-1.0)


@pytest.fixture(scope="module")
def few_pairs():
    """K=5, 5 pairs, Dirichlet(0.3): (prior, truth, seen, new z, new, others)."""
    rng = np.random.default_rng(0)
    prior = oracle.drawn_prior(rng, 0.3, 5)
    others = oracle.population(rng, 0.3, 5, 5, 300, new_pairs=1)[1]
    truth, z, new = oracle.population(rng, 0.3, 5, 5, 300, new_pairs=100)
    make = lambda x: lore.Preferences.from_ragged(list(x.astype(np.float32)))  # noqa: E731
    return prior, truth, make(z), new, make(new), make(others)


def test_integrating_beats_plugging_in(few_pairs):
    prior, truth, seen, new, pairs, others = few_pairs
    eye = np.eye(5, dtype=np.float32)
    learned, rows = refine(hold_out(others), eye, prior)
    assert learned.variance_scale > 0
    assert sum(row["chosen"] for row in rows) == 1
    model = lore.RewardModel(eye, prior)

    def loss(rho):
        p = lore.predict_proba(model, seen, pairs, variance_scale=rho)
        p = np.clip(p.reshape(300, 100).astype(float), 1e-9, 1 - 1e-9)
        return oracle.expected_log_loss(truth, new, p)

    plugged, default = loss(0.0), loss(None)
    learned = loss(float(learned.variance_scale))
    plain = lore.adapt(model, seen, method=lore.MaximumLikelihood())
    m = np.einsum("uqk,uk->uq", new, plain.weights)
    plain = oracle.expected_log_loss(truth, new, 1 / (1 + np.exp(-m)))
    for better, worse in ((default, plugged), (learned, plugged), (learned, plain)):
        assert lore.evaluation.paired_difference(better, worse).high < 0


def test_a_shrunk_basis_is_made_as_sure_as_it_should_be(few_pairs):
    prior, truth, seen, new, pairs, others = few_pairs
    shrunk = 0.5 * np.eye(5, dtype=np.float32)
    validation = hold_out(others)
    losses = {}
    for scales in ((1.0,), (1.0, 1.2, 1.5)):
        grids = dict(variance_scales=(0.0, 1.0), margin_scales=scales)
        learned, _ = refine(validation, shrunk, prior, **grids)
        p = lore.predict_proba(lore.RewardModel(shrunk, learned), seen, pairs)
        p = np.clip(p.reshape(300, 100).astype(float), 1e-9, 1 - 1e-9)
        losses[scales] = oracle.expected_log_loss(truth, new, p)
    assert learned.margin_scale > 1
    assert lore.evaluation.paired_difference(*list(losses.values())[::-1]).high < 0


@pytest.mark.parametrize("sure", [True, False])
def test_the_first_variance_scale_is_kept_unless_another_is_better_by_two_errors(
    few_pairs, monkeypatch, sure
):
    prior, *_, others = few_pairs
    validation = hold_out(others)
    users = len(validation.heldout.counts)
    gain = np.full(users, 0.1) if sure else np.eye(users)[0]

    def losses(self, proj, prior, candidates):
        places = np.arange(len(candidates))
        return 1 - gain[None] * (places == 2)[:, None] + places[:, None] / 1e6

    monkeypatch.setattr(Validation, "variance_losses", losses)
    learned, rows = refine(validation, np.eye(5, dtype=np.float32), prior)
    assert float(learned.variance_scale) == pytest.approx(0.05 if sure else 0.1)
    assert [i for i, row in enumerate(rows) if row["chosen"]] == [2 if sure else 0]


def test_integrating_is_better_calibrated(few_pairs):
    prior, truth, seen, new, pairs, _ = few_pairs
    model = lore.RewardModel(np.eye(5, dtype=np.float32), prior)
    chance = 1 / (1 + np.exp(-np.einsum("uqk,uk->uq", new, truth)))
    errors = [
        lore.evaluation.calibration(
            lore.predict_proba(model, seen, pairs, variance_scale=rho),
            chance.ravel(),
        ).expected_error
        for rho in (0.0, 1.0)
    ]
    assert errors[1] < 0.03 < errors[0]


def test_many_pairs_leave_the_curvature_of_the_likelihood():
    """Where one atom is left, Σ is the inverse of the data's curvature at p."""
    rng = np.random.default_rng(3)
    z = oracle.population(rng, 3.0, RANK, 4000, 2)[1]
    prior = make_prior(tempering=np.float32(0), concentration=np.float32(3))
    prefs = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    model = lore.RewardModel(np.eye(RANK, dtype=np.float32), prior)
    got = lore.posterior(model, prefs, covariance=True)
    plane = np.linalg.svd(np.ones((1, RANK)))[2][1:].T
    for u in range(2):
        chance = 1 / (1 + np.exp(-(z[u] @ got.weights[u])))
        curve = (z[u].T * (chance * (1 - chance))) @ z[u]
        want = plane @ np.linalg.inv(plane.T @ curve @ plane) @ plane.T
        np.testing.assert_allclose(got.covariance[u], want, atol=0.02 * want.max())


def test_the_deviation_shrinks_with_pairs():
    rng = np.random.default_rng(4)
    _, z, _ = oracle.population(rng, 1.0, RANK, 40, 64)
    prior = oracle.drawn_prior(rng, 1.0, RANK, num_atoms=20)
    counts = np.tile([0, 3, 12, 40], 16)
    rows = [x[:n].astype(np.float32) for x, n in zip(z, counts)]
    prefs = lore.Preferences.from_ragged(rows)
    model = lore.RewardModel(np.eye(RANK, dtype=np.float32), prior)
    std = lore.posterior(model, prefs).std.mean(1)
    means = [std[counts == n].mean() for n in (0, 3, 12, 40)]
    assert (np.diff(means) < 0).all()


def test_rank_one_knows_everything(basis, seen, new):
    model = lore.RewardModel(basis[:, :1], make_prior(rank=1), TEMPERATURE)
    np.testing.assert_allclose(lore.posterior(model, seen).std, 0, atol=1e-6)
    p = lore.predict_proba(model, seen, new)
    m = lore.margins(model, np.ones((5, 1), np.float32), new)
    np.testing.assert_allclose(p, jax.nn.sigmoid(m), atol=1e-5)


def test_after_a_warm_up_requests_compile_nothing(
    make_preferences, small_basis, small_prior, compilations
):
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    lore.warm_up(model, num_users=70, num_pairs=12)
    rng = np.random.default_rng(0)
    before = compilations.count
    for num_users in (1, 5, 64, 70):
        counts = rng.integers(0, 13, num_users)
        user = np.repeat(np.arange(num_users), counts)
        chosen = rng.integers(30, size=len(user))
        pairs = lore.Preferences.from_pairs(
            make_preferences().features, chosen, (chosen + 1) % 30, user, num_users
        )
        lore.adapt(model, pairs, return_std=True)
        lore.predict_proba(model, pairs, pairs)
    assert compilations.count == before
