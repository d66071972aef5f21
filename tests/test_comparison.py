"""Two fits direction by direction; users and the population, by exact Bayes factors."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

import lore_jax as lore
from lore_jax import comparison

EYE = np.eye(3, dtype=np.float32)


def stacked(z, **fields):
    """Pairs of users from differences z [U, P, K]."""
    return lore.Preferences.from_ragged(list(z.astype(np.float32)), **fields)


def exact(prior, z, weight=None, label=None):
    """Log Bayes factor of one user's pairs z [P, K] in float64, term by term."""
    atoms = np.asarray(prior.atoms, float)
    share = special.softmax(np.asarray(prior.log_weights, float))
    weight = np.ones(len(z)) if weight is None else weight
    label = np.ones(len(z)) if label is None else label
    if not weight.sum():
        return 0.0
    eta = max(weight.sum(), 1) ** -float(prior.tempering)

    def loglik(p):
        m = z @ p
        return (
            eta
            * weight
            @ (
                label * np.log(special.expit(m))
                + (1 - label) * np.log(special.expit(-m))
            )
        )

    logs = np.array([loglik(a) for a in atoms])
    return special.logsumexp(logs, b=share) - loglik(share @ atoms)


@pytest.fixture(scope="module")
def people():
    """4,000 users, half of them exactly the mean of 200 atoms, and the prior."""
    rng = np.random.default_rng(5)
    atoms = rng.dirichlet(np.full(3, 0.3), 200)
    prior = lore.Prior(
        atoms=atoms.astype(np.float32),
        log_weights=np.full(200, -np.log(200), np.float32),
        concentration=np.float32(10),
        tempering=np.float32(0),
    )
    truth = atoms[rng.integers(200, size=4000)]
    differs = rng.random(4000) < 0.5
    truth[~differs] = atoms.mean(0)
    z = rng.normal(size=(4000, 40, 3)) * 3
    m = np.einsum("upk,uk->up", z, truth)
    z *= np.where(rng.random(m.shape) < special.expit(m), 1, -1)[..., None]
    return prior, z, differs


def test_the_bayes_factor_is_exact(make_preferences, small_basis, small_prior):
    """Soft labels, weights, tempering and T; the last user has said nothing."""
    prefs = make_preferences(label=True, sample_weight=True)
    got = lore.compare(lore.RewardModel(small_basis, small_prior, 2.0), prefs)
    proj = np.asarray(prefs.features, float) @ small_basis / 2.0
    z = proj[prefs.chosen] - proj[prefs.rejected]
    for u in range(prefs.num_users):
        mine = np.asarray(prefs.user) == u
        want = exact(small_prior, z[mine], prefs.sample_weight[mine], prefs.label[mine])
        assert got.log_bayes_factor[u] == pytest.approx(want, abs=2e-4)
    assert got.log_bayes_factor[-1] == 0
    assert got.probability[-1] == 0.5


def test_against_the_integral_over_dirichlet_1():
    """K = 2: the default prior's atoms stand for the uniform density."""
    z = np.array([[2.0, -1.0], [0.5, 0.2], [3.0, 1.0], [1.0, -2.0]])
    found = lore.compare(lore.RewardModel(EYE[:2, :2]), stacked(z[None]))

    def likelihood(p):
        return np.prod(special.expit(z @ np.array([p, 1 - p])))

    want = np.log(integrate.quad(likelihood, 0, 1)[0] / likelihood(0.5))
    assert found.log_bayes_factor[0] == pytest.approx(want, abs=0.02)


@pytest.mark.parametrize("shots", [2, 10, 40])
def test_the_probability_is_calibrated(people, shots):
    """Of users with probability near P, a share P differs; by four standard errors."""
    prior, z, differs = people
    found = lore.compare(lore.RewardModel(EYE, prior), stacked(z[:, :shots]))
    p = np.asarray(found.probability, float)
    bins = np.minimum((p * 5).astype(int), 4)
    for b in np.unique(bins):
        mine = bins == b
        error = np.sqrt((p[mine] * (1 - p[mine])).sum()) / mine.sum()
        assert abs(differs[mine].mean() - p[mine].mean()) < 4 * error + 1e-3
    # It says more than nothing: a better forecast of who differs than one half.
    loss = -np.mean(np.where(differs, np.log(p), np.log1p(-np.minimum(p, 1 - 1e-12))))
    assert loss < np.log(2) - 0.01 * shots / 2


def test_evidence_grows_with_pairs(people):
    """Users who differ are told apart with many pairs, and so are those who do not."""
    prior, z, differs = people
    model = lore.RewardModel(EYE, prior)
    right = []
    for shots in (2, 10, 40):
        p = lore.compare(model, stacked(z[:, :shots])).probability
        right.append([p[differs].mean(), 1 - p[~differs].mean()])
    assert (np.diff(right, axis=0) > 0.02).all()


def test_more_of_the_same_choice_is_more_evidence():
    """All pairs ask direction 0 or 1, and the user always says 0."""
    pairs = [np.tile([[4.0, -4.0, 0.0]], (n, 1)) for n in (0, 1, 2, 4, 8, 16)]
    prefs = lore.Preferences.from_ragged([p.astype(np.float32) for p in pairs])
    p = lore.compare(lore.RewardModel(EYE), prefs).probability
    assert p[0] == 0.5
    assert (np.diff(p[1:]) > 0).all()
    assert p[-1] > 0.99


def test_without_pairs_it_is_the_prior_probability():
    prefs = lore.Preferences.from_ragged([np.zeros((0, 3), np.float32)] * 2)
    for q in (0.1, 0.7):
        found = lore.compare(lore.RewardModel(EYE), prefs, prior_probability=q)
        np.testing.assert_allclose(found.probability, [q, q], rtol=1e-6)


def test_prior_odds_multiply(people):
    prior, z, _ = people
    model, prefs = lore.RewardModel(EYE, prior), stacked(z[:50, :10])
    even = lore.compare(model, prefs).probability
    rare = lore.compare(model, prefs, prior_probability=0.1).probability
    np.testing.assert_allclose(
        rare / (1 - rare), even / (1 - even) / 9, rtol=1e-4, atol=1e-9
    )


def test_repeated_pairs_are_worth_less_where_the_prior_says_so(people):
    """Each pair six times: untempered, users who are the mean look different."""
    prior, z, _ = people
    copied = stacked(np.repeat(z[:1000, :5], 6, axis=1))
    truth = lore.compare(lore.RewardModel(EYE, prior), stacked(z[:1000, :5]))
    errors = []
    for gamma in (0.0, np.log(6) / np.log(30)):  # η = 30^−γ = 1/6
        tempered = prior.replace(tempering=np.float32(gamma))
        found = lore.compare(lore.RewardModel(EYE, tempered), copied)
        errors.append(np.abs(found.probability - truth.probability).max())
    assert errors[0] > 0.3
    assert errors[1] < 1e-3


def test_nobody_differs_at_rank_one():
    prefs = stacked(np.random.default_rng(0).normal(size=(3, 4, 2)))
    model = lore.RewardModel(np.ones((2, 1), np.float32))
    np.testing.assert_allclose(lore.compare(model, prefs).probability, 0.5, atol=1e-5)


def test_users_by_name_and_by_number(people):
    prior, z, _ = people
    model, names = lore.RewardModel(EYE, prior), ["a", "b", "c", "d"]
    named = stacked(z[:4, :6], user_ids=names)
    every = lore.compare(model, named)
    assert list(every.user_ids) == names
    some = lore.compare(model, named, ["d", "b"])
    assert list(some.user_ids) == ["d", "b"]
    np.testing.assert_allclose(some.probability, every.probability[[3, 1]], rtol=1e-5)
    bare = lore.compare(model, stacked(z[:4, :6]), [3, 1])
    assert bare.user_ids is None
    np.testing.assert_allclose(bare.probability, some.probability, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "'z', which is not in the users of prefs", dict(users=["z"])),
        (ValueError, "distinct", dict(users=["a", "a"])),
        (ValueError, "at least one user", dict(users=[])),
        (TypeError, "users holds integers", dict(users=[0])),
        (ValueError, r"in \(0, 1\)", dict(prior_probability=1.0)),
        (ValueError, r"prior_probability", dict(prior_probability=np.nan)),
        (TypeError, "prefs must be Preferences", dict(prefs=EYE)),
    ],
)
def test_refusals_name_the_argument(error, words, call):
    prefs = stacked(np.ones((2, 2, 3)), user_ids=["a", "b"])
    arguments = {"model": lore.RewardModel(EYE), "prefs": prefs, **call}
    with pytest.raises(error, match=words):
        lore.compare(**arguments)
    with pytest.raises(TypeError, match="users holds names"):
        lore.compare(lore.RewardModel(EYE), stacked(np.ones((2, 2, 3))), ["a"])


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_permuted_directions_are_found(rank, small_prior):
    """A noisy copy in another order: the order comes back, the rewards stay."""
    rng = np.random.default_rng(rank)
    basis = rng.normal(size=(20, rank)).astype(np.float32)
    prior = lore.uniform_prior(rank, 32)
    first = lore.RewardModel(basis, prior, 2.0)
    order = rng.permutation(rank)
    noisy = basis + rng.normal(size=basis.shape) * 0.2
    other = lore.RewardModel(
        jnp.asarray(noisy[:, order], jnp.float32),
        prior.replace(atoms=prior.atoms[:, order]),
        2.0,
    )
    found = lore.align(first, other)
    np.testing.assert_array_equal(order[found.permutation], np.arange(rank))
    want = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(basis.T.astype(float), noisy.T)
    ]
    np.testing.assert_allclose(found.cosines, want, rtol=1e-5)
    np.testing.assert_allclose(found.other.basis, noisy, rtol=1e-5)
    np.testing.assert_allclose(found.other.prior.atoms, prior.atoms)
    assert isinstance(found.other.basis, jax.Array)


def test_aligning_a_fit_changes_no_reward(fitted, planted):
    """Weights, logits, prior and basis move together."""
    order = np.array([1, 0])
    swapped = lore.align(
        fitted, fitted.replace(model=fitted.model.replace(basis=fitted.model.basis))
    )
    np.testing.assert_array_equal(swapped.permutation, [0, 1])
    np.testing.assert_allclose(swapped.cosines, 1, rtol=1e-5)
    turned = fitted.replace(
        model=fitted.model.replace(basis=np.asarray(fitted.model.basis)[:, order])
    )
    found = lore.align(turned, fitted)
    np.testing.assert_array_equal(found.permutation, order)
    x = np.asarray(planted.prefs.features)[:9]
    np.testing.assert_allclose(
        lore.score(found.other.model, found.other, x),
        lore.score(fitted.model, fitted, x),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        lore.adapt(found.other.model, planted.prefs).weights,
        np.asarray(lore.adapt(fitted.model, planted.prefs).weights)[:, order],
        atol=1e-4,
    )
    np.testing.assert_array_equal(
        found.other.logits, np.asarray(fitted.logits)[:, order]
    )
    assert list(found.other.user_ids) == list(fitted.user_ids)


def test_a_pruned_fit_keeps_saying_which_columns_were_kept(planted):
    recipe = lore.PublishedAlternating(num_steps=20, prune=True, prior=None)
    fit = lore.fit(planted.prefs, rank=2, key=jax.random.key(0), recipe=recipe)
    turned = fit.replace(
        model=fit.model.replace(basis=np.asarray(fit.model.basis)[:, ::-1])
    )
    found = lore.align(turned, fit).other
    np.testing.assert_array_equal(
        np.asarray(fit.unpruned.basis)[:, found.kept], found.model.basis
    )


def test_align_refuses_what_cannot_be_matched(fitted):
    narrow = lore.RewardModel(np.ones((6, 3), np.float32))
    with pytest.raises(ValueError, match=r"shape \[6, 3\], that of fitted \[6, 2\]"):
        lore.align(fitted, narrow)
    with pytest.raises(TypeError, match="other must be a Fitted or a RewardModel"):
        lore.align(fitted, EYE)
    with pytest.raises(ValueError, match="finite"):
        lore.align(fitted, lore.RewardModel(np.full((6, 2), np.nan, np.float32)))


def test_the_examples_run():
    done = doctest.testmod(comparison, extraglobs=dict(lore=lore, np=np, jax=jax))
    assert done.attempted > 5
    assert done.failed == 0
