"""New users against a frozen basis: meanings, oracles, invariances, programs built.

Every problem here has rank 3 and users of at most 10 pairs, so that the tests share
the few programs that `adapt` compiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._posterior.table import log_likelihoods, posterior_mean
from lore_jax._solve import simplex

RANK, FEATURES, TEMPERATURE = 3, 5, 2.0
COUNTS = (10, 7, 6, 0, 9, 2, 8, 10)
EMPTY = 3
ML = lore.MaximumLikelihood()


def random_basis(seed=0, rank=RANK):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(FEATURES, rank)).astype(np.float32)


def random_differences(counts=COUNTS, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, FEATURES)).astype(np.float32) for n in counts]


def random_prior(rank=RANK, seed=2, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "atoms": jnp.asarray(rng.dirichlet(np.ones(rank), 6), jnp.float32),
        "log_weights": jnp.asarray(np.log(rng.dirichlet(np.ones(6))), jnp.float32),
        "concentration": jnp.asarray(4.0, jnp.float32),
        "tempering": jnp.asarray(0.25, jnp.float32),
        "decay": jnp.asarray(0.5, jnp.float32),
        **changes,
    }
    return lore.Prior(**fields)


@pytest.fixture(scope="module")
def basis():
    return random_basis()


@pytest.fixture(scope="module")
def prefs():
    return lore.Preferences.from_ragged(random_differences())


@pytest.fixture(scope="module")
def prior():
    return random_prior()


@pytest.fixture(scope="module")
def default(basis, prefs, prior):
    return lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs)


@pytest.fixture(scope="module")
def max_likelihood(basis, prefs):
    return lore.adapt(
        lore.RewardModel(basis, temperature=TEMPERATURE), prefs, method=ML
    )


def user_margins(basis, differences, temperature=TEMPERATURE):
    """z of every user, float64, divided by the temperature."""
    basis = np.asarray(basis, float) / temperature
    return [np.asarray(x, np.float64) @ basis for x in differences]


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


def test_users_in_a_batch_equal_a_loop_over_users(basis, max_likelihood):
    """The batch against `simplex.solve_user`, one padded user at a time."""
    solve = jax.jit(simplex.solve_user)
    for u, z in enumerate(user_margins(basis, random_differences())):
        padded = np.zeros((10, RANK), np.float32)
        padded[: len(z)] = z
        weight = (np.arange(10) < len(z)) / max(1, len(z))
        alone = solve(padded, weight.astype(np.float32))
        np.testing.assert_allclose(alone.weights, max_likelihood.weights[u], atol=2e-3)


@pytest.mark.parametrize("method", [lore.PosteriorMean(), ML], ids=["default", "ml"])
def test_a_result_does_not_depend_on_batch_mates(
    basis, prefs, prior, default, max_likelihood, method
):
    together = max_likelihood if method == ML else default
    for mates in ([1], [6, EMPTY, 0], [5]):
        some = lore.take_users(prefs, mates)
        model = lore.RewardModel(basis, prior, TEMPERATURE)
        alone = lore.adapt(model, some, method=method)
        np.testing.assert_allclose(alone.weights, together.weights[mates], atol=1e-6)
        np.testing.assert_allclose(alone.loss, together.loss[mates], rtol=1e-6)


def test_the_order_of_users_is_irrelevant(basis, prefs, prior, default):
    order = np.array([4, 0, 7, 3, 1, 6, 2, 5])
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    out = lore.adapt(model, lore.take_users(prefs, order))
    np.testing.assert_allclose(out.weights, default.weights[order], atol=1e-6)


def test_the_order_of_pairs_is_irrelevant(basis, prefs, prior, default):
    mix = np.random.default_rng(0).permutation(prefs.num_pairs)
    other = lore.Preferences.from_pairs(
        prefs.features, mix, None, prefs.user[mix], prefs.num_users
    )
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), other)
    np.testing.assert_allclose(out.weights, default.weights, atol=1e-4)


def test_directions_may_be_permuted(basis, prefs, max_likelihood):
    order = np.array([2, 0, 1])
    model = lore.RewardModel(basis[:, order], temperature=TEMPERATURE)
    out = lore.adapt(model, prefs, method=ML)
    np.testing.assert_allclose(out.weights, max_likelihood.weights[:, order], atol=5e-3)
    np.testing.assert_allclose(out.loss, max_likelihood.loss, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        jnp.asarray,
        lore.ArraySource,
        functools.partial(lore.ArraySource, block_rows=7),
    ],
    ids=["jax", "source", "small_blocks"],
)
def test_features_may_live_anywhere(basis, prefs, prior, default, make):
    moved = prefs.replace(features=make(prefs.features))
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), moved)
    np.testing.assert_allclose(out.weights, default.weights, atol=1e-5)


def test_responses_and_their_differences_agree(basis, prior, default):
    parts = random_differences()
    rng = np.random.default_rng(3)
    second = rng.normal(size=(sum(COUNTS), FEATURES)).astype(np.float32)
    first = second + np.concatenate(parts)
    number = np.arange(len(first))
    prefs = lore.Preferences.from_pairs(
        np.concatenate([first, second]) + np.float32(1),
        number,
        number + len(first),
        np.repeat(np.arange(len(COUNTS)), COUNTS),
        len(COUNTS),
    )
    out = lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs)
    np.testing.assert_allclose(out.weights, default.weights, atol=1e-3)


def differences_of(user, **fields):
    """User `user`'s six rows for user 0, and the same rows as user 1's plain pairs."""
    (x,) = random_differences((6,), seed=user)
    rows = np.asarray(fields.pop("rows", np.arange(6)))
    fields = {name: np.concatenate([v, np.ones(6)]) for name, v in fields.items()}
    return lore.Preferences.from_pairs(
        np.concatenate([x, -x]),
        np.concatenate([rows, np.arange(6)]),
        None,
        np.repeat([0, 1], [len(rows), 6]),
        **fields,
    )


def test_a_pair_of_weight_two_is_two_pairs_and_of_weight_zero_is_none(basis, prior):
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    once = lore.adapt(model, differences_of(5, sample_weight=[2, 1, 0, 2, 1, 1]))
    rows = [0, 0, 1, 3, 3, 4, 5]
    twice = lore.adapt(model, differences_of(5, rows=rows))
    np.testing.assert_allclose(once.weights, twice.weights, atol=1e-4)
    np.testing.assert_allclose(once.loss, twice.loss, rtol=1e-4)
    none = lore.adapt(model, differences_of(5, sample_weight=np.zeros(6)))
    np.testing.assert_array_equal(none.weights[0], np.asarray(prior.mean))
    assert np.isnan(none.loss[0])
    np.testing.assert_allclose(none.weights[1], once.weights[1], atol=1e-6)


def test_a_soft_label_is_a_split_pair(basis, prior):
    y = np.array([1.0, 0.25, 0.6, 0.0, 1.0, 1.0])
    model = lore.RewardModel(basis, prior, TEMPERATURE)
    soft = lore.adapt(model, differences_of(6, label=y))
    rows = [0, 1, 7, 2, 8, 9, 4, 5]
    weight = [1.0, 0.25, 0.75, 0.6, 0.4, 1.0, 1.0, 1.0]
    split = lore.adapt(model, differences_of(6, rows=rows, sample_weight=weight))
    np.testing.assert_allclose(soft.weights, split.weights, atol=1e-4)
    np.testing.assert_allclose(soft.loss, split.loss, rtol=1e-4)


def test_temperature_divides_the_margins(basis, prefs, max_likelihood):
    model = lore.RewardModel(8 * basis, temperature=8 * TEMPERATURE)
    out = lore.adapt(model, prefs, method=ML)
    np.testing.assert_allclose(out.weights, max_likelihood.weights, atol=1e-4)
    np.testing.assert_allclose(out.loss, max_likelihood.loss, rtol=1e-4)


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


def test_batches_of_any_size_share_a_few_programs(compilations):
    """At most 20 programs from 1 to 10,000 users, wherever the features live."""
    model = lore.RewardModel(random_basis(rank=4), random_prior(rank=4))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(700, FEATURES)).astype(np.float32)
    before = compilations.count
    first = None
    for users in (1, 2, 3, 7, 40, 199, 1000, 1777, 4096, 10_000):
        chosen = np.arange(users * 10) % 699
        for place in (np.asarray, jnp.asarray, lore.ArraySource):
            prefs = lore.Preferences.from_pairs(
                place(rows), chosen, chosen + 1, np.repeat(np.arange(users), 10)
            )
            out = jax.device_get(lore.adapt(model, prefs))
            assert out.converged.all()
            first = out.weights[0] if first is None else first
            np.testing.assert_allclose(out.weights[0], first, atol=1e-4)
    # The 10,000 users hold 699 kinds of pairs: their weights differ.
    assert len(np.unique(out.weights.round(4), axis=0)) > 60
    # Servers see a new NumPy table with every request.
    for users in (4, 13, 480, 1300, 9_000, 10_000):
        parts = rng.normal(size=(users, 10, FEATURES)).astype(np.float32)
        lore.adapt(model, lore.Preferences.from_ragged(parts))
    assert compilations.count - before <= 20


@pytest.mark.parametrize("method", [ML, lore.MAP(0.1)], ids=["ml", "map"])
def test_a_few_large_margins_are_solved_among_many_small(method, compilations):
    """By a program of their own, which other calls do not compile."""
    model = lore.RewardModel(np.eye(3, dtype=np.float32), temperature=TEMPERATURE)
    rng = np.random.default_rng(5)
    z = rng.standard_normal((70, 10, 3)).astype(np.float32)
    hard = [3, 64]
    easy = lore.Preferences.from_ragged([*np.delete(z, hard, axis=0)])
    z[hard] *= 1e4
    mixed = lore.Preferences.from_ragged([*z])
    few = lore.adapt(model, easy, method=method)
    before = compilations.count
    out = lore.adapt(model, mixed, method=method)
    assert compilations.count > before
    assert out.converged.all()
    assert (out.num_steps[hard] > 16).all()
    same = np.delete(np.arange(70), hard)
    np.testing.assert_array_equal(out.weights[same], few.weights)
    tiny = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(out.weights, tiny))
    np.testing.assert_array_equal(out.logits, logits)


def test_pure_kernels_shard_over_users(prior):
    """z, mask and prior → weights under shard_map on four devices equals one."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 4, RANK)).astype(np.float32)
    mask = (rng.random((8, 4)) < 0.7).astype(np.float32)

    def kernel(z, mask, prior):
        mean = posterior_mean(z, mask, None, prior)
        return simplex.maximum_a_posteriori(z, mask, prior.concentration * mean).weights

    mesh = jax.make_mesh((4,), ("users",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("users")
    sharded = jax.jit(
        jax.shard_map(kernel, mesh=mesh, in_specs=(spec, spec, jax.P()), out_specs=spec)
    )
    got = sharded(z, mask, prior)
    assert len(got.sharding.device_set) == 4
    np.testing.assert_allclose(got, jax.jit(kernel)(z, mask, prior), atol=1e-5)


def test_pure_kernels_are_differentiable_through_the_posterior(prior):
    """How the posterior mean answers to a margin, against a difference quotient."""
    z = np.random.default_rng(0).normal(size=(2, 3, RANK)).astype(np.float32)
    ones = np.ones((2, 3), np.float32)

    @jax.jit
    def first(z):
        return posterior_mean(z, ones, None, prior)[0, 0]

    got = jax.grad(first)(z)
    step = np.zeros_like(z)
    step[0, 1, 2] = 1e-2
    want = (first(z + step) - first(z - step)) / 2e-2
    np.testing.assert_allclose(got[0, 1, 2], want, rtol=2e-2, atol=1e-5)
    assert not np.any(got[1])


@pytest.mark.parametrize("kind", ["plain", "weighted", "labelled"])
def test_many_pairs_side_by_side_are_the_same_posterior(kind, prior):
    """401 pairs of one user become three users' worth of work, and one table."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 401, RANK)).astype(np.float32)
    weight, label = np.ones((3, 401), np.float32), None
    weight[0, 170:] = 0  # whole parts of padding
    if kind == "weighted":
        weight = weight * rng.random((3, 401), np.float32)
    if kind == "labelled":
        label = rng.random((3, 401), np.float32)
    atoms, unit = np.asarray(prior.atoms), kind != "weighted"
    got = log_likelihoods(z, weight, label, atoms, unit_weights=unit)
    m = np.float64(z) @ np.float64(atoms).T
    y = 1 if label is None else label[..., None]
    table = -(weight[..., None] * (np.logaddexp(0, m) - y * m)).sum(1)
    np.testing.assert_allclose(got, table, rtol=1e-5, atol=1e-3)
    joint = weight.sum(1, keepdims=True) ** -float(prior.tempering) * table
    share = np.exp(joint + np.asarray(prior.log_weights) - joint.max(1, keepdims=True))
    mean = posterior_mean(z, weight, label, prior, unit_weights=unit)
    want = share @ atoms / share.sum(1, keepdims=True)
    np.testing.assert_allclose(mean, want, atol=1e-4)
