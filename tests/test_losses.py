"""Bradley–Terry losses and anchors against a slow float64 oracle."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import lore_jax as lore
from lore_jax import _backend
from lore_jax._train import published

WEIGHTINGS = ("pairs", "users")


def oracle(basis, logits, prefs, temperature, weighting):
    """Pair by pair, in Python floats; shares no code with the library."""
    features = np.asarray(prefs.features, np.float64)
    basis, logits = (np.asarray(a, np.float64) for a in (basis, logits))
    by_user = [[] for _ in range(prefs.num_users)]
    for n in range(len(prefs.chosen)):
        u = int(prefs.user[n])
        difference = features[prefs.chosen[n]]
        if prefs.rejected is not None:
            difference = difference - features[prefs.rejected[n]]
        powers = [math.exp(w - max(logits[u])) for w in logits[u]]
        mixed = sum(
            p / sum(powers) * float(difference @ basis[:, k])
            for k, p in enumerate(powers)
        )
        m = mixed / temperature
        y = 1.0 if prefs.label is None else float(prefs.label[n])
        c = 1.0 if prefs.sample_weight is None else float(prefs.sample_weight[n])
        loss = y * np.logaddexp(0, -m) + (1 - y) * np.logaddexp(0, m)
        by_user[u].append((c, loss))
    if weighting == "pairs":
        every = [pair for pairs in by_user for pair in pairs]
        return sum(c * x for c, x in every) / sum(c for c, _ in every)
    return sum(
        sum(c * x for c, x in pairs) / sum(c for c, _ in pairs)
        for pairs in by_user
        if pairs
    )


def params_for(prefs, rank=3, seed=1, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    basis = scale * rng.normal(size=(prefs.num_features, rank))
    logits = rng.normal(size=(prefs.num_users, rank))
    return lore.RewardParams(basis.astype(dtype), logits.astype(dtype))


FIELDS = {
    "plain": {},
    "labels": {"label": True},
    "weights": {"sample_weight": True},
    "labels_and_weights": {"label": True, "sample_weight": True},
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_matches_the_oracle(make_preferences, fields, weighting):
    prefs = make_preferences(**fields)
    params = params_for(prefs)
    got = lore.bradley_terry_loss(params, prefs, 2.5, weighting)
    want = oracle(params.basis, params.logits, prefs, 2.5, weighting)
    np.testing.assert_allclose(got, want, rtol=5e-6)
    jitted = jax.jit(lore.bradley_terry_loss, static_argnums=(2, 3))
    np.testing.assert_allclose(jitted(params, prefs, 2.5, weighting), got, rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_differences_match_the_oracle(weighting):
    rng = np.random.default_rng(3)
    parts = [rng.normal(size=(n, 4)).astype(np.float32) for n in (3, 0, 1, 6)]
    prefs = lore.Preferences.from_ragged(parts)
    params = params_for(prefs)
    got = lore.bradley_terry_loss(params, prefs, weighting=weighting)
    want = oracle(params.basis, params.logits, prefs, 1.0, weighting)
    np.testing.assert_allclose(got, want, rtol=5e-6)


def test_temperature_is_one_unless_given(make_preferences):
    prefs = make_preferences()
    params = params_for(prefs)
    want = oracle(params.basis, params.logits, prefs, 1.0, "pairs")
    np.testing.assert_allclose(lore.bradley_terry_loss(params, prefs), want, rtol=5e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_gradients_to_second_order(make_preferences, weighting, mode):
    with jax.enable_x64(True):
        prefs = make_preferences(
            num_users=3,
            num_pairs=7,
            num_features=4,
            num_rows=6,
            label=True,
            sample_weight=True,
        )
        prefs = prefs.replace(features=np.asarray(prefs.features, np.float64))
        params = params_for(prefs, rank=2, dtype=np.float64)

        def loss(basis, logits):
            params = lore.RewardParams(basis, logits)
            return lore.bradley_terry_loss(params, prefs, 1.5, weighting)

        check_grads(
            jax.jit(loss),
            (params.basis, params.logits),
            order=2,
            modes=(mode,),
            atol=1e-6,
            rtol=1e-6,
        )


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("fields", FIELDS)
def test_the_published_forms_descend_along_its_gradient(
    make_preferences, monkeypatch, fields, weighting, differences, place
):
    """Their slopes are written out; autodiff of the loss says what they must be."""
    prefs = make_preferences(num_users=6, num_features=3, seed=5, **FIELDS[fields])
    if differences:
        prefs = prefs.replace(rejected=None)
    proj, logits = jnp.asarray(prefs.features), params_for(prefs).logits
    if place == "accelerator":
        monkeypatch.setattr(published, "tuning", lambda *_: _backend.ACCELERATOR)
    problem = published.make_problem(prefs, proj, np.zeros(3))
    assert (problem.rows is None) == (place == "cpu")
    pairs = published.PairSlopes(proj, problem, 2.0, weighting)
    loss, weights, slope = pairs.slopes(logits)

    def loss_of(proj, logits):
        params = lore.RewardParams(jnp.eye(3), logits)
        placed = prefs.replace(features=proj)
        return lore.bradley_terry_loss(params, placed, 2.0, weighting)

    want, slopes = jax.value_and_grad(loss_of, argnums=(0, 1))(proj, logits)
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    got = pairs.proj_slope(weights, slope), pairs.logits_slope(logits, slope)
    for one, other in zip(got, slopes, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_huge_margins_stay_finite_and_exact(make_preferences, weighting):
    prefs = make_preferences(label=True)
    params = params_for(prefs, scale=1e6)
    value, slope = jax.value_and_grad(lore.bradley_terry_loss)(
        params, prefs, 1.0, weighting
    )
    want = oracle(params.basis, params.logits, prefs, 1.0, weighting)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_pair_loss_at_the_extremes():
    margins = jnp.array([-1e30, -100.0, 0.0, 100.0, 1e30], jnp.float32)
    got = np.asarray(lore.losses.pair_loss(margins))
    np.testing.assert_allclose(got[:3], [1e30, 100.0, math.log(2)], rtol=1e-6)
    assert 0 <= got[3] < 1e-40
    assert got[4] == 0.0
    slopes = jax.vmap(jax.grad(lore.losses.pair_loss))(margins)
    np.testing.assert_allclose(slopes, [-1, -1, -0.5, 0, 0], atol=1e-30)


def test_a_soft_label_mixes_both_outcomes():
    m, y = 0.7, 0.3
    want = y * lore.losses.pair_loss(m) + (1 - y) * lore.losses.pair_loss(-m)
    np.testing.assert_allclose(lore.losses.pair_loss(m, y), want, rtol=1e-6)


def shuffled_users(prefs, order):
    """The same pairs, user order[i] renamed to i."""
    place = np.argsort(order)
    return lore.Preferences.from_pairs(
        prefs.features, prefs.chosen, prefs.rejected, place[prefs.user], len(order)
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_order_of_users_and_pairs_is_irrelevant(make_preferences, weighting):
    prefs = make_preferences()
    params = params_for(prefs)
    want = lore.bradley_terry_loss(params, prefs, weighting=weighting)
    order = np.random.default_rng(4).permutation(prefs.num_users)
    other = shuffled_users(prefs, order)
    moved = params.replace(logits=params.logits[order])
    got = lore.bradley_terry_loss(moved, other, weighting=weighting)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    mix = np.random.default_rng(5).permutation(prefs.num_pairs)
    other = lore.Preferences.from_pairs(
        prefs.features,
        prefs.chosen[mix],
        prefs.rejected[mix],
        prefs.user[mix],
        prefs.num_users,
    )
    got = lore.bradley_terry_loss(params, other, weighting=weighting)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_directions_may_be_permuted_jointly_and_only_jointly(make_preferences):
    prefs = make_preferences()
    params = params_for(prefs)
    order = np.array([2, 0, 1])
    want = lore.bradley_terry_loss(params, prefs)
    moved = lore.RewardParams(params.basis[:, order], params.logits[:, order])
    np.testing.assert_allclose(lore.bradley_terry_loss(moved, prefs), want, rtol=1e-6)
    half = params.replace(basis=params.basis[:, order])
    assert abs(float(lore.bradley_terry_loss(half, prefs) - want)) > 1e-3


def test_a_shift_of_a_users_logits_is_irrelevant(make_preferences):
    prefs = make_preferences()
    params = params_for(prefs)
    shift = np.arange(prefs.num_users, dtype=np.float32)[:, None]
    moved = params.replace(logits=params.logits + shift)
    np.testing.assert_allclose(
        lore.bradley_terry_loss(moved, prefs),
        lore.bradley_terry_loss(params, prefs),
        rtol=1e-6,
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_users_and_rows_without_a_pair_are_inert(make_preferences, weighting):
    prefs = make_preferences()
    params = params_for(prefs)
    want, slope = jax.value_and_grad(lore.bradley_terry_loss)(
        params, prefs, 1.0, weighting
    )
    wider = lore.Preferences.from_pairs(
        np.concatenate([prefs.features, np.full((3, 6), 1e4, np.float32)]),
        prefs.chosen,
        prefs.rejected,
        prefs.user,
        prefs.num_users + 2,
    )
    more = params.replace(
        logits=np.concatenate([params.logits, np.full((2, 3), 9, np.float32)])
    )
    got, more_slope = jax.value_and_grad(lore.bradley_terry_loss)(
        more, wider, 1.0, weighting
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(more_slope.basis, slope.basis, rtol=1e-4, atol=1e-7)
    assert not np.any(more_slope.logits[prefs.num_users - 1 :])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_pairs_of_weight_zero_are_inert(make_preferences, weighting):
    prefs = make_preferences()
    params = params_for(prefs)
    keep = np.arange(prefs.num_pairs) % 3 > 0
    weighted = prefs.replace(sample_weight=keep.astype(np.float32))
    np.testing.assert_allclose(
        lore.bradley_terry_loss(params, weighted, weighting=weighting),
        lore.bradley_terry_loss(
            params, lore.take_pairs(prefs, keep), weighting=weighting
        ),
        rtol=1e-6,
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_pair_at_all_costs_nothing(make_preferences, weighting):
    prefs = make_preferences(num_pairs=0)
    params = params_for(prefs)
    value, slope = jax.value_and_grad(lore.bradley_terry_loss)(
        params, prefs, 1.0, weighting
    )
    assert float(value) == 0.0
    assert not any(np.any(x) for x in jax.tree.leaves(slope))


@pytest.mark.parametrize("table_dtype", [np.float32, jnp.bfloat16])
def test_the_loss_keeps_float32(make_preferences, table_dtype):
    prefs = make_preferences()
    prefs = prefs.replace(features=prefs.features.astype(table_dtype))
    params = params_for(prefs)
    value, slope = jax.value_and_grad(lore.bradley_terry_loss)(params, prefs)
    assert value.dtype == jnp.float32
    assert slope.basis.dtype == slope.logits.dtype == jnp.float32


def test_the_loss_keeps_float64(make_preferences):
    with jax.enable_x64(True):
        prefs = make_preferences(sample_weight=True, label=True)
        prefs = prefs.replace(features=prefs.features.astype(np.float64))
        params = params_for(prefs, dtype=np.float64)
        got = lore.bradley_terry_loss(params, prefs)
        assert got.dtype == jnp.float64
        want = oracle(params.basis, params.logits, prefs, 1.0, "pairs")
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_a_feature_source_gives_the_same_loss(make_preferences):
    prefs = make_preferences()
    params = params_for(prefs)
    source = lore.ArraySource(np.asarray(prefs.features), block_rows=7)
    np.testing.assert_allclose(
        lore.bradley_terry_loss(params, prefs.replace(features=source)),
        lore.bradley_terry_loss(params, prefs),
        rtol=1e-6,
    )


def test_cosine_anchor():
    anchor = np.array([2.0, 0.0], np.float32)
    basis = np.array([[3.0, 0.0, -1.0], [0.0, 5.0, 0.0]], np.float32)
    np.testing.assert_allclose(
        lore.losses.cosine_anchor(basis, anchor), (0 + 1 + 2) / 3, rtol=1e-6
    )
    got = lore.losses.cosine_anchor(np.zeros((2, 1), np.float32), anchor)
    assert float(got) == 1.0


def test_l2_anchor_and_ridge():
    anchor = np.array([1.0, 2.0], np.float32)
    basis = np.array([[1.0, 0.0], [2.0, 0.0]], np.float32)
    assert float(lore.losses.l2_anchor(basis, anchor)) == 5.0
    assert float(lore.losses.ridge(basis)) == 5.0


def test_anchors_have_the_gradients_they_say():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        basis, anchor = rng.normal(size=(4, 3)), rng.normal(size=4)
        for function in (lore.losses.cosine_anchor, lore.losses.l2_anchor):
            check_grads(
                function, (basis, anchor), order=2, modes=("rev",), atol=1e-6, rtol=1e-6
            )
