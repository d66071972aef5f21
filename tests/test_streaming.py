"""The additive state: any order, batch and shard, and close to exact adaptation."""

import json

import jax
import numpy as np
import planted_oracle as oracle
import pytest

import lore_jax as lore
from lore_jax import streaming
from lore_jax._posterior import sums
from lore_jax.io.records import check_users
from lore_jax.io.tree import from_record, to_record

RANK, TEMPERATURE = 3, 2.0
SUMS = ("table", "linear", "quadratic", "num_pairs")


@pytest.fixture(scope="module")
def prior(small_prior):
    return small_prior


@pytest.fixture(scope="module")
def basis(small_basis):
    return small_basis


@pytest.fixture(scope="module")
def model(basis, prior):
    return lore.RewardModel(basis, prior, TEMPERATURE)


@pytest.fixture(scope="module")
def prefs(make_preferences):
    return make_preferences(num_pairs=120, sample_weight=True, label=True)


@pytest.fixture(scope="module")
def state(model, prefs):
    return streaming.update(model, streaming.init(model, num_users=5), prefs)


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
    z = (x[prefs.chosen] - x[prefs.rejected]) @ basis / TEMPERATURE
    atoms = np.asarray(prior.atoms, np.float64)
    share = np.exp(np.asarray(prior.log_weights, np.float64))
    second = (atoms.T * share / share.sum()) @ atoms
    for u in range(5):
        mine = np.flatnonzero(prefs.user == u)
        y, w, m = prefs.label[mine], prefs.sample_weight[mine], z[mine] @ atoms.T
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
    atoms = np.asarray(prior.atoms)
    second = (atoms.T * share) @ atoms / share.sum()
    xi = np.sqrt(z[0, 0] @ second @ z[0, 0])
    _, b, h, _ = map(np.asarray, sums.pair_sums(z, one, None, prior))
    full = np.zeros((RANK, RANK))
    full[np.triu_indices(RANK)] = h[0]
    full = full + full.T - np.diag(np.diag(full))
    bend = np.tanh(xi / 2) / (4 * xi)
    constant = -np.log1p(np.exp(-xi)) - xi / 2 + bend * xi**2
    for p in rng.dirichlet(np.ones(RANK), 200):
        exact = -np.logaddexp(0, -z[0, 0] @ p)
        assert b[0] @ p - 0.5 * p @ full @ p + constant <= exact + 1e-5


@pytest.mark.parametrize("pieces", [2, 7])
def test_order_and_batching_are_irrelevant(state, model, prefs, pieces):
    shuffled = np.random.default_rng(pieces).permutation(prefs.num_pairs)
    other = streaming.init(model, num_users=5)
    for part in np.array_split(shuffled, pieces):
        other = streaming.update(model, other, lore.take_pairs(prefs, part))
    assert_same(state, other)
    np.testing.assert_allclose(
        streaming.weights(state), streaming.weights(other), atol=1e-4
    )


def test_shards_merge_in_any_order(state, model, prefs):
    empty = streaming.init(model, num_users=5)
    shards = [
        streaming.update(model, empty, lore.take_pairs(prefs, part))
        for part in np.array_split(np.random.default_rng(0).permutation(120), 3)
    ]
    a, b, c = shards
    assert_same(state, streaming.merge(streaming.merge(a, b), c))
    assert_same(state, streaming.merge(a, streaming.merge(c, b)))
    assert_same(state, streaming.merge(state, empty))


def test_updating_leaves_the_old_state_alone(state, model, prefs):
    before = state.table.copy()
    streaming.update(model, state, prefs)
    np.testing.assert_array_equal(state.table, before)


def test_names_not_positions(model):
    rng = np.random.default_rng(2)
    batch = named(rng, ["c", "a"])
    start = streaming.init(model, user_ids=["a", "b", "c"])
    state = streaming.update(model, start, batch)
    assert list(state.num_pairs) == [6, 0, 6]
    alone = streaming.update(model, streaming.init(model, user_ids=["c", "a"]), batch)
    np.testing.assert_array_equal(state.table[[2, 0]], alone.table)
    merged = streaming.merge(state, alone)
    np.testing.assert_allclose(merged.table[[2, 0]], 2 * alone.table, rtol=1e-6)
    with pytest.raises(ValueError, match="'d'"):
        streaming.update(model, start, named(rng, ["a", "d"]))
    with pytest.raises(ValueError, match="prefs names its users and state does not"):
        streaming.update(model, streaming.init(model, num_users=2), batch)
    with pytest.raises(ValueError, match="both name"):
        streaming.merge(start, streaming.init(model, num_users=3))
    with pytest.raises(ValueError, match="distinct"):
        streaming.init(model, user_ids=["a", "a"])
    with pytest.raises(ValueError, match="how many users"):
        streaming.init(model)


def test_merging_with_fresh_names_adds_users(model, prior):
    batch = named(np.random.default_rng(2), ["a", "b"])
    old = streaming.update(model, streaming.init(model, user_ids=["a", "b"]), batch)
    grown = streaming.merge(old, streaming.init(model, user_ids=["b", "z"]))
    assert list(grown.user_ids) == ["a", "b", "z"]
    np.testing.assert_array_equal(grown.table[:2], old.table)
    np.testing.assert_allclose(streaming.weights(grown)[2], prior.mean, atol=1e-6)


def test_another_basis_is_refused(state, model, prefs):
    changed = model.basis.copy()
    changed[0, 0] += 1e-3
    other = model.replace(basis=changed)
    with pytest.raises(ValueError, match="fingerprint"):
        streaming.update(other, state, prefs)
    fresh = streaming.init(other, num_users=5)
    for unlike in (fresh, streaming.update(other, fresh, prefs)):
        with pytest.raises(ValueError, match="fingerprint"):
            streaming.merge(state, unlike)
    on_device = model.replace(basis=jax.numpy.asarray(model.basis))
    streaming.update(on_device, state, prefs)


def test_another_prior_or_population_is_refused(state, model, prior, prefs):
    backwards = prior.replace(log_weights=prior.log_weights[::-1])
    for other, message in (
        (model.replace(temperature=1.0), "temperatures disagree"),
        (model.replace(prior=backwards), "different priors: log_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            streaming.merge(state, streaming.init(other, num_users=5))
        with pytest.raises(ValueError, match=message):
            streaming.update(other, state, prefs)
    with pytest.raises(ValueError, match="same users"):
        streaming.merge(state, streaming.init(model, num_users=6))
    with pytest.raises(ValueError, match="users of state: 5 and 6 users"):
        streaming.update(model, streaming.init(model, num_users=6), prefs)
    with pytest.raises(ValueError, match=r"model\.basis"):
        streaming.update(model.replace(basis=model.basis[:-1]), state, prefs)
    with pytest.raises(ValueError, match="K=2"):
        streaming.update(model.replace(basis=model.basis[:, :2]), state, prefs)
    with pytest.raises(TypeError, match="prior"):
        streaming.init(model.replace(prior=prior.atoms), num_users=5)
    with pytest.raises(TypeError, match="model must be a RewardModel"):
        streaming.init(model.basis, num_users=5)


def test_no_prior_is_uniform_dirichlet(model, prefs):
    bare = model.replace(prior=None)
    state = streaming.update(bare, streaming.init(bare, num_users=5), prefs)
    uniform = model.replace(prior=lore.uniform_prior(RANK))
    same = streaming.update(uniform, streaming.init(uniform, num_users=5), prefs)
    assert_same(state, same)
    np.testing.assert_allclose(streaming.weights(state)[4], 1 / 3, atol=1e-5)


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


def test_a_hard_user_is_solved_or_reported(model):
    rng = np.random.default_rng(0)
    rows = [s * rng.normal(size=(50, 6)).astype(np.float32) for s in (1e-4, 1, 1e3)]
    prefs = lore.Preferences.from_ragged(rows)
    state = streaming.update(model, streaming.init(model, num_users=3), prefs)
    got = streaming.weights(state)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_the_state_costs_little_on_planted_data():
    rank, pairs = 5, 20
    rng = np.random.default_rng(rank + pairs)
    prior = oracle.drawn_prior(rng, 0.3, rank)
    truth, z, new = oracle.population(rng, 0.3, rank, pairs, 200, new_pairs=150)
    prefs = lore.Preferences.from_ragged(list(z.astype(np.float32)))
    model = lore.RewardModel(np.eye(rank, dtype=np.float32), prior)
    exact = lore.adapt(model, prefs).weights
    state = streaming.update(model, streaming.init(model, num_users=200), prefs)
    lost = [
        oracle.expected_accuracy(truth, w, new).mean()
        for w in (exact, streaming.weights(state))
    ]
    assert lost[0] - lost[1] < 0.7
    assert np.abs(exact - streaming.weights(state)).max() > 1e-4


def test_arrays_round_trip(model):
    batch = named(np.random.default_rng(2), ["a", "ü"])
    start = streaming.init(model, user_ids=["a", "ü"])
    state = streaming.update(model, start, batch)
    arrays, text = to_record(state)
    assert all(isinstance(x, np.ndarray) for x in arrays.values())
    back = from_record(arrays, text)
    check_users(back)
    for name in SUMS:
        np.testing.assert_array_equal(getattr(back, name), getattr(state, name))
    assert list(back.user_ids) == ["a", "ü"]
    assert back.fingerprint == state.fingerprint
    assert back.temperature == TEMPERATURE
    np.testing.assert_array_equal(streaming.weights(back), streaming.weights(state))
    with pytest.raises(ValueError, match="fingerprint"):
        streaming.update(model.replace(basis=model.basis + 1), back, batch)
    streaming.update(model, back, batch)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (lambda a, r: r.update(kind="Other"), "unknown kind 'Other'"),
        (lambda a, r: r.update(kind="Prior"), "Prior has the fields"),
        (lambda a, r: r["fields"].pop("fingerprint"), "UserStates has the fields"),
        (lambda a, r: r["fields"].update(fingerprint="0"), "fingerprint must be"),
        (lambda a, r: r["fields"].update(temperature=-1.0), "temperature"),
        (lambda a, r: a.pop("linear"), "the array linear is missing"),
        (lambda a, r: a.update(more=np.zeros(1)), "unexpected arrays"),
        (lambda a, r: a.update(linear=a["linear"][:1]), "linear"),
        (lambda a, r: a.update(table=a["table"] * np.nan), "table"),
        (lambda a, r: a.update(table=a["table"].astype(np.float64)), "table"),
    ],
)
def test_damaged_arrays_are_refused(state, break_it, match):
    arrays, text = to_record(state)
    record = json.loads(text)
    check_users(from_record(arrays, text))
    break_it(arrays, record)
    with pytest.raises(ValueError, match=match):
        check_users(from_record(arrays, json.dumps(record)))


@pytest.mark.parametrize("length", [1, 3, 7, 40])
def test_users_without_pairs_are_saved(model, length, tmp_path):
    """Padding left 1e-6 in the table of whoever had said nothing."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(9, 6)).astype(np.float32)
    chosen = rng.integers(9, size=length)
    user = np.array([1] * length)
    prefs = lore.Preferences.from_pairs(table, chosen, (chosen + 1) % 9, user, 4)
    state = streaming.update(model, streaming.init(model, num_users=4), prefs)
    assert np.abs(state.table[[0, 2, 3]]).max() == 0 < np.abs(state.table[1]).min()
    lore.save_users(tmp_path / "users", state)
    assert_same(lore.load_users(tmp_path / "users"), state)


def test_integers_with_and_without_a_sign_merge_exactly(model):
    """As floats, 2⁶² + 1 and 2⁶² + 2 are one number."""
    names = [2**62 + 1, 2**62 + 2], [2**63], [-1]
    large, unsigned, negative = (streaming.init(model, user_ids=x) for x in names)
    for one, other in ((large, unsigned), (unsigned, large)):
        both = streaming.merge(one, other).user_ids
        assert both.tolist() == [*one.user_ids.tolist(), *other.user_ids.tolist()]
    assert streaming.merge(large, negative).user_ids.tolist() == [*names[0], -1]
    with pytest.raises(ValueError, match="all signed or all unsigned"):
        streaming.merge(negative, unsigned)
