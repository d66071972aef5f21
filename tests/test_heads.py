"""The NNX reward head: the pure functions' rewards and gradients, transforms, files."""

import doctest
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import lore_jax as lore
from lore_jax import heads

D, K, U, B = 6, 3, 5, 8
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, D)).astype(np.float32)
OTHER = RNG.normal(size=(B, D)).astype(np.float32)
USER = np.array([0, 1, 4, 4, 2, 3, 0, 1])
ANCHOR = RNG.normal(size=D).astype(np.float32)


def make_head(num_users=U, **options):
    options = {"temperature": 2.0, "rngs": nnx.Rngs(3), **options}
    return heads.RewardHead(D, K, num_users, **options)


def arrays(head):
    return np.asarray(head.basis[...]), np.asarray(head.logits[...])


def oracle(basis, weights, hidden):
    """x · V · p / T in float64, row by row."""
    return np.array([x @ basis @ p for x, p in zip(hidden, weights)]) / 2.0


def softmax(logits):
    e = np.exp(np.asarray(logits, np.float64))
    return e / e.sum(-1, keepdims=True)


def loss_of(head, user=USER):
    return head.pair_loss(HIDDEN, OTHER, user)


def test_rewards_are_those_of_the_equation():
    head = make_head()
    basis, logits = arrays(head)
    want = oracle(basis.astype(float), softmax(logits)[USER], HIDDEN.astype(float))
    np.testing.assert_allclose(head(HIDDEN, USER), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head(HIDDEN, logits=logits[USER]), want, rtol=1e-5)
    weights = softmax(logits).astype(np.float32)[USER]
    np.testing.assert_allclose(head(HIDDEN, weights=weights), want, rtol=1e-5)
    np.testing.assert_allclose(head.weights, softmax(logits), rtol=1e-5)


def test_users_broadcast_against_hidden_states():
    head = make_head()
    twice = np.stack([HIDDEN, OTHER], 1)  # [B, 2, D]
    got = head(twice, USER[:, None])
    assert got.shape == (B, 2)
    np.testing.assert_allclose(got[:, 0], head(HIDDEN, USER), rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], head(OTHER, USER), rtol=1e-6)
    assert head(HIDDEN, 2).shape == (B,)
    with pytest.raises(ValueError, match="users must broadcast"):
        head(twice, USER)


@pytest.mark.parametrize(
    "wrap", [lambda f: f, nnx.jit, nnx.remat], ids=["", "jit", "r"]
)
def test_gradients_are_those_of_the_pure_functions(wrap):
    head = make_head()
    params = lore.RewardParams(head.basis[...], head.logits[...])

    def pure(params, hidden):
        first, second = (
            lore.reward(x, params.basis, params.logits[USER], 2.0)
            for x in (hidden, OTHER)
        )
        fit = jnp.mean(lore.losses.pair_loss(first - second))
        return fit + 0.1 * lore.losses.l2_anchor(params.basis, ANCHOR)

    def layered(head, hidden):
        fit = wrap(lambda h, x: h.pair_loss(x, OTHER, USER))(head, hidden)
        return fit + 0.1 * lore.losses.l2_anchor(head.basis[...], ANCHOR)

    value, (want, into) = jax.value_and_grad(pure, argnums=(0, 1))(params, HIDDEN)
    grad = nnx.value_and_grad(layered, argnums=(0, 1))
    got, (grads, into_hidden) = grad(head, jnp.asarray(HIDDEN))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(grads["basis"][...], want.basis, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads["logits"][...], want.logits, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(into_hidden, into, rtol=1e-5, atol=1e-7)
    assert np.abs(into).max() > 1e-3


def test_the_loss_of_pairs_is_the_bradley_terry_loss(make_preferences):
    prefs = make_preferences(U, 30, D, label=True, sample_weight=True)
    head = make_head()
    params = lore.RewardParams(head.basis[...], head.logits[...])
    want = lore.bradley_terry_loss(params, prefs, temperature=2.0)
    got = head.pair_loss(
        prefs.features[prefs.chosen],
        prefs.features[prefs.rejected],
        prefs.user,
        label=prefs.label,
        sample_weight=prefs.sample_weight,
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    nothing = head.pair_loss(HIDDEN, OTHER, USER, sample_weight=np.zeros(B))
    assert float(nothing) == 0


@pytest.mark.parametrize("name", ["l2_anchor", "cosine_anchor", "ridge"])
def test_regularisers_take_part_in_a_training_step(name):
    function = getattr(lore.losses, name)
    extra = () if name == "ridge" else (ANCHOR,)
    head = make_head()
    basis = jnp.asarray(np.array(head.basis[...]))

    @nnx.jit
    def step(head, optimizer):
        grads = nnx.grad(lambda h: function(h.basis[...], *extra))(head)
        optimizer.update(head, grads)

    step(head, nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param))
    want = basis - 0.1 * jax.grad(lambda v: function(v, *extra))(basis)
    np.testing.assert_allclose(head.basis[...], want, rtol=1e-5, atol=1e-6)


def test_a_prior_takes_part_in_a_training_step(small_prior):
    """V on the marginal likelihood: the gradient against differences in float64."""
    pairs, weight = RNG.normal(size=(4, 3, D)), RNG.integers(0, 2, (4, 3)) * 1.0
    weight[0] = 0  # Has said nothing.
    label = RNG.random((4, 3))
    prior = jax.tree.map(lambda x: np.asarray(x, np.float64), small_prior)

    def by_hand(basis):
        total, users = 0.0, 0
        for z, w, y in zip(pairs @ basis / 2.0, weight, label):
            if not w.sum():
                continue
            m = z @ prior.atoms.T
            each = y[:, None] * -np.logaddexp(0, -m)
            each += (1 - y)[:, None] * -np.logaddexp(0, m)
            logs = w.sum() ** -float(prior.tempering) * (w @ each)
            share = np.exp(prior.log_weights) / np.exp(prior.log_weights).sum()
            total, users = total - np.log(share @ np.exp(logs)), users + 1
        return total / users

    def loss(head):
        z = head.project(jnp.asarray(pairs, jnp.float32))
        return lore.losses.marginal_loss(z, weight, small_prior, label=label)

    head = make_head(num_users=None)
    basis = np.asarray(head.basis[...], np.float64)
    value, grads = nnx.jit(nnx.value_and_grad(loss))(head)
    np.testing.assert_allclose(value, by_hand(basis), rtol=1e-5)
    want, eps = np.zeros_like(basis), 1e-6
    for place in np.ndindex(basis.shape):
        move = np.zeros_like(basis)
        move[place] = eps
        want[place] = (by_hand(basis + move) - by_hand(basis - move)) / (2 * eps)
    np.testing.assert_allclose(grads["basis"][...], want, rtol=1e-3, atol=1e-5)
    nobody = lore.losses.marginal_loss(
        np.ones((2, 3, K)), np.zeros((2, 3)), small_prior
    )
    assert float(nobody) == 0


def test_vmap_over_pairs_and_over_heads():
    head = make_head()
    got = jax.vmap(lambda x, u: head(x, u))(HIDDEN, USER)
    np.testing.assert_allclose(got, head(HIDDEN, USER), rtol=1e-6)

    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(key):
        return heads.RewardHead(D, K, U, temperature=2.0, rngs=nnx.Rngs(key))

    several = make(jax.random.split(jax.random.key(0), 3))
    rewards = jax.vmap(lambda h: h(HIDDEN, USER))(several)
    assert rewards.shape == (3, B)
    assert np.abs(rewards[0] - rewards[1]).max() > 1e-3


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(axis):
    """The batch and the users' logits lie on four devices: the same loss and slopes."""
    head = make_head(num_users=8)
    want, slopes = nnx.value_and_grad(loss_of)(head)
    mesh = jax.make_mesh((4,), ("users",), axis_types=(axis,))
    rows = NamedSharding(mesh, Spec("users"))
    whole = NamedSharding(mesh, Spec())
    state = nnx.state(head)
    state["basis"].set_value(jax.device_put(head.basis[...], whole))
    state["logits"].set_value(jax.device_put(head.logits[...], rows))
    nnx.update(head, state)
    arrays = [jax.device_put(x, rows) for x in (HIDDEN, OTHER, USER)]

    @nnx.jit
    def step(head, chosen, rejected, user):
        return nnx.value_and_grad(lambda h: h.pair_loss(chosen, rejected, user))(head)

    with jax.set_mesh(mesh):
        got, grads = step(head, *arrays)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name in ("basis", "logits"):
        np.testing.assert_allclose(
            grads[name][...], slopes[name][...], rtol=1e-5, atol=1e-7
        )
    assert head.logits[...].sharding.spec[0] == "users"


def test_partitioned_parameters():
    init = nnx.with_partitioning(nnx.initializers.normal(1.0), ("users", None))
    mesh = jax.make_mesh((4,), ("users",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        head = make_head(num_users=8, logits_init=init)
    assert head.logits.sharding.spec == Spec("users", None)
    assert head(HIDDEN, USER).shape == (B,)


def test_orbax_keeps_all(tmp_path):
    head = make_head()
    _, state = nnx.split(head)
    with ocp.StandardCheckpointer() as keeper:
        keeper.save(tmp_path / "head", nnx.to_pure_dict(state))
    fresh = make_head(rngs=nnx.Rngs(9))
    assert not np.allclose(fresh(HIDDEN, USER), head(HIDDEN, USER))
    graph, empty = nnx.split(fresh)
    with ocp.StandardCheckpointer() as keeper:
        kept = keeper.restore(tmp_path / "head", nnx.to_pure_dict(empty))
    nnx.replace_by_pure_dict(empty, kept)
    again = nnx.merge(graph, empty)
    np.testing.assert_array_equal(again(HIDDEN, USER), head(HIDDEN, USER))


def test_a_model_and_back(fitted, planted):
    """The head of a fit ranks as the fit; the verbs take the head's model."""
    head = heads.RewardHead.from_model(fitted.model, fitted)
    x = np.asarray(planted.prefs.features)[:7]
    want = lore.score(fitted.model, fitted, x)
    got = jax.vmap(lambda u: head(x, u))(jnp.arange(len(fitted.weights)))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    model = head.to_model(fitted.model.prior)
    assert model.temperature == fitted.model.temperature
    few = planted.prefs
    np.testing.assert_allclose(
        lore.adapt(model, few).weights, lore.adapt(fitted.model, few).weights, atol=1e-6
    )
    np.testing.assert_array_equal(head.to_model().basis, fitted.model.basis)
    assert head.to_model().prior is None


def test_a_head_from_a_model_without_weights(small_basis, small_prior):
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    bare = heads.RewardHead.from_model(model)
    assert bare.logits is None
    with pytest.raises(ValueError, match="this head has no users"):
        bare(HIDDEN, USER)
    head = heads.RewardHead.from_model(model, num_users=4)
    want = np.tile(np.asarray(small_prior.mean), (4, 1))
    np.testing.assert_allclose(head.weights, want, rtol=1e-5)
    with pytest.raises(ValueError, match="exclude one another"):
        heads.RewardHead.from_model(model, want, num_users=4)
    with pytest.raises(ValueError, match="must lie on the simplex"):
        heads.RewardHead.from_model(model, want - 1)


def test_half_precision_states_meet_a_float32_basis():
    head = make_head()
    half = jnp.asarray(HIDDEN, jnp.bfloat16)
    got = head(half, USER)
    assert got.dtype == jnp.float32
    want = head(np.asarray(half, np.float32), USER)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_rank_one_is_one_direction_for_all():
    head = heads.RewardHead(D, 1, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(head.weights, np.ones((4, 1)))
    want = HIDDEN @ np.asarray(head.basis)[:, 0]
    np.testing.assert_allclose(head(HIDDEN, 0), want, rtol=1e-5)


def test_a_traced_user_out_of_range_has_no_reward():
    user = np.array([0, U, -1, 4, 0, 0, 0, 0])
    got = np.asarray(nnx.jit(lambda h, u: h(HIDDEN, u))(make_head(), user))
    np.testing.assert_array_equal(np.isnan(got), (user < 0) | (user >= U))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "exactly one of user", lambda h: h(HIDDEN)),
        (ValueError, "got 2 of them", lambda h: h(HIDDEN, USER, logits=np.zeros(K))),
        (ValueError, r"user must be in 0 … 4", lambda h: h(HIDDEN, USER + 1)),
        (TypeError, "user must hold integers", lambda h: h(HIDDEN, USER + 0.5)),
        (ValueError, "D=6", lambda h: h(HIDDEN[:, :5], USER)),
        (TypeError, "floating", lambda h: h(HIDDEN.astype(int), USER)),
        (ValueError, "end in K=3", lambda h: h(HIDDEN, logits=np.zeros(2))),
        (ValueError, "simplex", lambda h: h(HIDDEN, weights=np.zeros(K))),
        (ValueError, "rejected must", lambda h: h.pair_loss(HIDDEN, OTHER[:, 1:], 0)),
        (
            ValueError,
            "label must have one entry per pair",
            lambda h: h.pair_loss(HIDDEN, OTHER, USER, label=np.ones(3)),
        ),
        (
            ValueError,
            r"sample_weight must be in",
            lambda h: h.pair_loss(HIDDEN, OTHER, USER, sample_weight=-np.ones(B)),
        ),
        (TypeError, "prior must be a Prior", lambda h: h.to_model(3)),
        (ValueError, "K=3", lambda h: h.to_model(lore.uniform_prior(2))),
    ],
)
def test_refusals_name_the_argument(error, words, call):
    with pytest.raises(error, match=words):
        call(make_head())


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("num_features", dict(num_features=0)),
        ("rank", dict(rank=0)),
        ("num_users", dict(num_users=0)),
        ("temperature", dict(temperature=0.0)),
    ],
)
def test_sizes_are_checked(words, options):
    options = {"num_features": D, "rank": K, "rngs": nnx.Rngs(0), **options}
    with pytest.raises(ValueError, match=words):
        heads.RewardHead(**options)


def test_the_attribute_is_there_and_costs_nothing_before():
    """`lore.heads` works after `import lore_jax` alone, which imports no `flax.nnx`."""
    code = (
        "import sys, lore_jax as lore\n"
        "before = 'flax.nnx' in sys.modules\n"
        "print(before, lore.heads.RewardHead.__name__, hasattr(lore, 'nothing'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.stdout == "False RewardHead False\n", done.stderr


def test_the_examples_run():
    scope = dict(lore=lore, np=np, jax=jax)
    done = doctest.testmod(heads, extraglobs=scope)
    assert done.attempted > 5
    assert done.failed == 0


def test_no_pair_has_no_loss_and_whole_numbers_are_weights(small_basis):
    model = lore.RewardModel(small_basis)
    head = heads.RewardHead.from_model(model, np.array([[1, 0, 0]]))
    np.testing.assert_allclose(head.weights, [[1, 0, 0]], atol=1e-6)
    nothing = np.zeros((0, small_basis.shape[0]), np.float32)
    assert head.pair_loss(nothing, nothing, np.zeros(0, int)) == 0
