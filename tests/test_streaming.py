"""The additive state: any order, batch and shard, and close to exact adaptation."""

import jax
import numpy as np
import planted_oracle as oracle
import pytest

import lore_jax as lore
from lore_jax import streaming
from lore_jax._posterior import sums

RANK = 3
SUMS = ("table", "linear", "quadratic", "num_pairs")


@pytest.fixture(scope="module")
def prior(small_prior):
    return small_prior


@pytest.fixture(scope="module")
def basis(small_basis):
    return small_basis


@pytest.fixture(scope="module")
def prefs(make_preferences):
    return make_preferences(num_pairs=120, weight=True, label=True)


@pytest.fixture(scope="module")
def state(prior, basis, prefs):
    return streaming.observe(streaming.start_users(prior, 5), basis, prefs)


def named(rng, names, per_user=6):
    rows = [rng.normal(size=(per_user, 6)).astype(np.float32) for _ in names]
    return lore.Preferences.from_ragged(rows, user_ids=names)


def assert_same(a, b):
    for name in SUMS:
        np.testing.assert_allclose(
            getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-4, err_msg=name
        )


def test_the_sums_are_what_they_say(state, basis, prefs, prior):
    x = np.asarray(prefs.features, np.float64)
    z = (x[prefs.chosen] - x[prefs.rejected]) @ basis / 2.0
    atoms = np.asarray(prior.atoms, np.float64)
    share = np.exp(np.asarray(prior.log_weights, np.float64))
    second = (atoms.T * share / share.sum()) @ atoms
    for u in range(5):
        mine = np.flatnonzero(prefs.user == u)
        y, w, m = prefs.label[mine], prefs.weight[mine], z[mine] @ atoms.T
        want = w @ (y[:, None] * m - np.logaddexp(0, m))
        np.testing.assert_allclose(state.table[u], want, rtol=1e-4, atol=1e-4)
        want = (w * (y - 0.5)) @ z[mine]
        np.testing.assert_allclose(state.linear[u], want, rtol=1e-4, atol=1e-4)
        matrix = np.zeros((RANK, RANK))
        for zn, wn in zip(z[mine], w):
            xi = np.sqrt(zn @ second @ zn)
            matrix += wn * 2 * np.tanh(xi / 2) / (4 * xi) * np.outer(zn, zn)
        want = matrix[np.triu_indices(RANK)]
        np.testing.assert_allclose(state.quadratic[u], want, rtol=1e-4, atol=1e-4)
    assert state.num_pairs[4] == 0


def test_the_quadratic_is_a_lower_bound(prior):
    """At every p, b·p − ½pᵀHp + Σ c(ξ) ≤ loglik: the bound, not an expansion."""
    rng = np.random.default_rng(5)
    z = 3 * rng.normal(size=(1, 1, RANK)).astype(np.float32)
    one = np.ones((1, 1), np.float32)
    share = np.exp(prior.log_weights)
    second = (prior.atoms.T * share) @ prior.atoms / share.sum()
    xi = np.sqrt(z[0, 0] @ second @ z[0, 0])
    _, b, h, _ = sums.pair_sums(z, one, None, prior.replace(temperature=1.0))
    full = np.zeros((RANK, RANK))
    full[np.triu_indices(RANK)] = h[0]
    full = full + full.T - np.diag(np.diag(full))
    bend = np.tanh(xi / 2) / (4 * xi)
    constant = -np.log1p(np.exp(-xi)) - xi / 2 + bend * xi**2
    for p in rng.dirichlet(np.ones(RANK), 200):
        exact = -np.logaddexp(0, -z[0, 0] @ p)
        assert b[0] @ p - 0.5 * p @ full @ p + constant <= exact + 1e-5


@pytest.mark.parametrize("pieces", [2, 7])
def test_order_and_batching_are_irrelevant(state, prior, basis, prefs, pieces):
    shuffled = np.random.default_rng(pieces).permutation(prefs.num_pairs)
    other = streaming.start_users(prior, 5)
    for part in np.array_split(shuffled, pieces):
        other = streaming.observe(other, basis, lore.take_pairs(prefs, part))
    assert_same(state, other)
    np.testing.assert_allclose(
        streaming.weights(state), streaming.weights(other), atol=1e-4
    )


def test_shards_merge_in_any_order(state, prior, basis, prefs):
    shards = [
        streaming.observe(
            streaming.start_users(prior, 5), basis, lore.take_pairs(prefs, part)
        )
        for part in np.array_split(np.random.default_rng(0).permutation(120), 3)
    ]
    a, b, c = shards
    assert_same(state, streaming.merge(streaming.merge(a, b), c))
    assert_same(state, streaming.merge(a, streaming.merge(c, b)))
    assert_same(state, streaming.merge(state, streaming.start_users(prior, 5)))


def test_observing_leaves_the_old_state_alone(state, basis, prefs):
    before = state.table.copy()
    streaming.observe(state, basis, prefs)
    np.testing.assert_array_equal(state.table, before)


def test_names_not_positions(prior, basis):
    rng = np.random.default_rng(2)
    batch = named(rng, ["c", "a"])
    start = streaming.start_users(prior, 3, ["a", "b", "c"])
    state = streaming.observe(start, basis, batch)
    assert list(state.num_pairs) == [6, 0, 6]
    alone = streaming.observe(streaming.start_users(prior, 2, ["c", "a"]), basis, batch)
    np.testing.assert_array_equal(state.table[[2, 0]], alone.table)
    merged = streaming.merge(state, alone)
    np.testing.assert_allclose(merged.table[[2, 0]], 2 * alone.table, rtol=1e-6)
    with pytest.raises(ValueError, match="'d'"):
        streaming.observe(start, basis, named(rng, ["a", "d"]))
    with pytest.raises(ValueError, match="both name"):
        streaming.observe(streaming.start_users(prior, 2), basis, batch)
    with pytest.raises(ValueError, match="both name"):
        streaming.merge(start, streaming.start_users(prior, 3))
    with pytest.raises(ValueError, match="distinct"):
        streaming.start_users(prior, 2, ["a", "a"])


def test_merging_with_fresh_names_adds_users(prior, basis):
    batch = named(np.random.default_rng(2), ["a", "b"])
    old = streaming.observe(streaming.start_users(prior, 2, ["a", "b"]), basis, batch)
    grown = streaming.merge(old, streaming.start_users(prior, 2, ["b", "z"]))
    assert list(grown.user_ids) == ["a", "b", "z"]
    np.testing.assert_array_equal(grown.table[:2], old.table)
    np.testing.assert_allclose(streaming.weights(grown)[2], prior.mean, atol=1e-6)


def test_another_basis_is_refused(state, prior, basis, prefs):
    other = basis.copy()
    other[0, 0] += 1e-3
    with pytest.raises(ValueError, match="fingerprint"):
        streaming.observe(state, other, prefs)
    fresh = streaming.observe(streaming.start_users(prior, 5), other, prefs)
    with pytest.raises(ValueError, match="fingerprint"):
        streaming.merge(state, fresh)
    streaming.observe(state, np.asarray(jax.numpy.asarray(basis)), prefs)


def test_another_prior_or_population_is_refused(state, prior, basis, prefs):
    for other in (
        prior.replace(temperature=1.0),
        prior.replace(log_weights=prior.log_weights[::-1]),
    ):
        with pytest.raises(ValueError, match="different priors"):
            streaming.merge(state, streaming.start_users(other, 5))
    with pytest.raises(ValueError, match="same users"):
        streaming.merge(state, streaming.start_users(prior, 6))
    with pytest.raises(ValueError, match="num_users"):
        streaming.observe(streaming.start_users(prior, 6), basis, prefs)
    with pytest.raises(ValueError, match="basis"):
        streaming.observe(state, basis[:-1], prefs)
    with pytest.raises(ValueError, match="K=2"):
        streaming.observe(state, basis[:, :2], prefs)
    with pytest.raises(TypeError, match="prior"):
        streaming.start_users(None, 5)


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 1.0, 30.0, np.inf])
def test_weights_are_optimal(state, prior, kappa):
    """Against the conditions of optimality, in float64."""
    changed = state.replace(prior=prior.replace(concentration=np.float32(kappa)))
    got = streaming.weights(changed).astype(np.float64)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)
    assert (got >= 0).all()
    np.testing.assert_allclose(got[4], prior.mean, atol=1e-6)
    for u in range(4):
        power = max(state.num_pairs[u], 1) ** -0.2
        pull = kappa * (max(state.num_pairs[u], 1) / 10) ** 0.5
        joint = power * state.table[u].astype(np.float64) + prior.log_weights
        q = np.exp(joint - joint.max())
        mean = q @ prior.atoms / q.sum()
        if np.isinf(kappa):
            np.testing.assert_allclose(got[u], mean, atol=1e-5)
            continue
        full = np.zeros((RANK, RANK))
        full[np.triu_indices(RANK)] = state.quadratic[u]
        full = full + full.T - np.diag(np.diag(full))

        def value(p, u=u, full=full, power=power, mean=mean, pull=pull):
            cost = power * (0.5 * p @ full @ p - state.linear[u] @ p)
            return cost - pull * mean @ np.log(np.maximum(p, 1e-30))

        best = value(got[u])
        rng = np.random.default_rng(u)
        for size in (1e-3, 1e-2, 0.1, 1.0):
            for other in rng.dirichlet(np.ones(RANK), 100):
                assert best <= value((1 - size) * got[u] + size * other) + 1e-4


def test_a_hard_user_is_solved_or_reported(prior, basis):
    rng = np.random.default_rng(0)
    rows = [s * rng.normal(size=(50, 6)).astype(np.float32) for s in (1e-4, 1, 1e3)]
    prefs = lore.Preferences.from_ragged(rows)
    state = streaming.observe(streaming.start_users(prior, 3), basis, prefs)
    got = streaming.weights(state)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_the_state_costs_little_on_planted_data():
    rank, pairs = 5, 20
    rng = np.random.default_rng(rank + pairs)
    prior = oracle.drawn_prior(rng, 0.3, rank)
    truth, z, new = oracle.population(rng, 0.3, rank, pairs, 200, new_pairs=150)
    prefs = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    eye = np.eye(rank, dtype=np.float32)
    exact = lore.adapt(eye, prefs, prior=prior).weights
    state = streaming.observe(streaming.start_users(prior, 200), eye, prefs)
    lost = [
        oracle.expected_accuracy(truth, w, new).mean()
        for w in (exact, streaming.weights(state))
    ]
    assert lost[0] - lost[1] < 0.7
    assert np.abs(exact - streaming.weights(state)).max() > 1e-4


def test_arrays_round_trip(prior, basis):
    batch = named(np.random.default_rng(2), ["a", "ü"])
    state = streaming.observe(streaming.start_users(prior, 2, ["a", "ü"]), basis, batch)
    arrays, metadata = streaming.to_arrays(state)
    assert all(isinstance(x, np.ndarray) for x in arrays.values())
    assert all(isinstance(x, str) for x in metadata.values())
    back = streaming.from_arrays(arrays, metadata)
    for name in SUMS:
        np.testing.assert_array_equal(getattr(back, name), getattr(state, name))
    assert list(back.user_ids) == ["a", "ü"]
    assert back.fingerprint == state.fingerprint
    np.testing.assert_array_equal(streaming.weights(back), streaming.weights(state))
    with pytest.raises(ValueError, match="fingerprint"):
        streaming.observe(back, basis + 1, batch)
    streaming.observe(back, basis, batch)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda a, m: m.update(version="9"), "version"),
        (lambda a, m: m.update(format="other"), "format"),
        (lambda a, m: m.pop("fingerprint"), "metadata"),
        (lambda a, m: m.update(temperature="-1"), "temperature"),
        (lambda a, m: a.pop("linear"), "arrays"),
        (lambda a, m: a.update(more=np.zeros(1)), "arrays"),
        (lambda a, m: a.update(linear=a["linear"][:1]), "linear"),
        (lambda a, m: a.update(table=a["table"] * np.nan), "table"),
        (lambda a, m: a.update(table=a["table"].astype(np.float64)), "table"),
    ],
)
def test_damaged_arrays_are_refused(state, break_it, match):
    arrays, metadata = streaming.to_arrays(state)
    break_it(arrays, metadata)
    with pytest.raises(ValueError, match=match):
        streaming.from_arrays(arrays, metadata)
