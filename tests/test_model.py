"""Rewards, projection and ranking against float64 NumPy."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore


def problem(num_users=4, num_features=7, rank=3, num_rows=9, seed=0):
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(num_features, rank)).astype(np.float32)
    logits = rng.normal(size=(num_users, rank)).astype(np.float32)
    return basis, logits, rng.normal(size=(num_rows, num_features)).astype(np.float32)


def oracle_weights(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(-1, keepdims=True)


def test_reward_is_the_equation():
    basis, logits, x = problem()
    want = [x[0].astype(float) @ basis @ p / 7.0 for p in oracle_weights(logits)]
    got = lore.reward(x[0], basis, logits, temperature=7.0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_leading_axes_broadcast():
    basis, logits, x = problem()
    got = lore.reward(x[None], basis, logits[:, None])
    assert got.shape == (4, 9)
    want = oracle_weights(logits) @ (x.astype(float) @ basis).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_reward_from_weights_is_reward():
    basis, logits, x = problem()
    weights = lore.mixture_weights(logits)
    got = lore.reward_from_weights(x[1], basis, weights, temperature=3.0)
    np.testing.assert_allclose(got, lore.reward(x[1], basis, logits, 3.0), rtol=1e-6)


def test_a_constant_added_to_logits_changes_nothing():
    basis, logits, x = problem()
    np.testing.assert_allclose(
        lore.reward(x[0], basis, logits + 50.0),
        lore.reward(x[0], basis, logits),
        rtol=1e-4,
    )


def test_mixture_weights_survive_huge_logits():
    weights = lore.mixture_weights(jnp.array([[1e6, -1e6, 0.0]]))
    np.testing.assert_array_equal(weights, [[1, 0, 0]])


def test_init_params_shapes_and_key():
    sizes = dict(num_users=5, num_features=6, rank=2)
    first = lore.init_params(jax.random.key(0), **sizes)
    again = lore.init_params(jax.random.key(0), **sizes)
    other = lore.init_params(jax.random.key(1), **sizes)
    assert first.basis.shape == (6, 2)
    assert first.logits.shape == (5, 2)
    np.testing.assert_array_equal(first.basis, again.basis)
    assert not np.allclose(first.basis, other.basis)
    assert not np.allclose(first.basis[:5], first.logits)


def test_products_name_their_precision():
    """TF32 inputs err by 3e-3 on embeddings with a large mean; a CPU cannot show it."""
    basis, logits, x = problem()
    weights = lore.mixture_weights(logits)

    def everything(x, basis, weights):
        slope = jax.grad(lambda v: jnp.sum(lore.project(x, v) ** 2))(basis)
        return (
            slope,
            lore.score(lore.RewardModel(basis), weights, x),
            lore.reward(x[0], basis, weights),
        )

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(inner)

    found = list(products(jax.make_jaxpr(everything)(x, basis, weights).jaxpr))
    highest = jax.lax.Precision.HIGHEST
    assert len(found) >= 5
    assert set(found) == {(highest, highest)}


def test_project_is_exact_under_a_large_mean():
    basis, _, x = problem(num_features=512)
    x = x + 30.0
    want = x.astype(np.float64) @ basis
    error = np.abs(np.asarray(lore.project(x, basis)) - want).max()
    assert error < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_tables_accumulate_in_float32(dtype):
    basis, _, x = problem(num_features=512)
    stored = x.astype(dtype)
    got = lore.project(stored, basis)
    assert got.dtype == jnp.float32
    want = stored.astype(np.float64) @ basis
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_project_reads_a_source_block_by_block():
    basis, _, x = problem(num_rows=10)
    seen = []

    class Source(lore.ArraySource):
        def blocks(self):
            for block in super().blocks():
                seen.append(len(block))
                yield block

    got = lore.project(Source(x, block_rows=4), basis)
    assert seen == [4, 4, 2]
    np.testing.assert_allclose(got, lore.project(x, basis), rtol=1e-6)


@pytest.mark.parametrize("rank", [3, 5, 8, 10, 17])
def test_project_and_its_derivatives_at_every_width(rank):
    """At 5 and 10 columns are added, which neither values nor slopes may show."""
    rng = np.random.default_rng(1)
    x, g, dx = (rng.normal(size=(9, n)).astype("f") for n in (6, rank, 6))
    basis, dv = rng.normal(size=(2, 6, rank)).astype("f")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    out, pullback = jax.vjp(lore.project, x, basis)
    close(out, x @ basis)
    for got, want in zip(pullback(g), (g @ basis.T, x.T @ g), strict=True):
        close(got, want)
    moved = jax.jvp(lore.project, (x, basis), (dx, dv))[1]
    close(moved, dx @ basis + x @ dv)
    close(jax.grad(lambda v: jnp.sum(lore.project(x, v) * g))(basis), x.T @ g)


def test_score_is_every_user_times_every_response():
    basis, logits, x = problem()
    weights = lore.mixture_weights(logits)
    want = oracle_weights(logits) @ (x.astype(float) @ basis).T / 7.0
    model = lore.RewardModel(basis, temperature=7.0)
    got = lore.score(model, weights, x)
    assert got.shape == (4, 9)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    source = lore.ArraySource(x, block_rows=2)
    np.testing.assert_allclose(lore.score(model, weights, source), got, rtol=1e-6)


def test_score_rows_picks_out_of_score():
    basis, logits, x = problem()
    weights = lore.mixture_weights(logits)
    model = lore.RewardModel(basis, temperature=7.0)
    table = np.asarray(lore.score(model, weights, x))
    user, rows = np.array([2, 0, 3, 2]), np.array([8, 1, 1, 0])
    got = lore.score_rows(model, weights, x, user, rows)
    np.testing.assert_allclose(got, table[user, rows], rtol=1e-5)
    many = np.stack([rows, rows[::-1]], 1)
    got = lore.score_rows(model, weights, x, user, many)
    np.testing.assert_allclose(got, table[user[:, None], many], rtol=1e-5)


def test_top_k_ranks_all_responses():
    basis, logits, x = problem()
    weights = lore.mixture_weights(logits)
    model = lore.RewardModel(basis, temperature=7.0)
    table = np.asarray(lore.score(model, weights, x))
    scores, rows = lore.top_k(model, weights, x, user=[3, 1], k=4)
    want = np.argsort(-table[[3, 1]], axis=1)[:, :4]
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_allclose(
        scores, np.take_along_axis(table[[3, 1]], want, 1), rtol=1e-5
    )


def test_top_k_ranks_candidates_of_each_query():
    basis, logits, x = problem()
    weights = lore.mixture_weights(logits)
    model = lore.RewardModel(basis, temperature=7.0)
    table = np.asarray(lore.score(model, weights, x))
    candidates = np.array([[7, 2, 5], [0, 8, 1]])
    scores, rows = lore.top_k(model, weights, x, user=[3, 1], k=2, rows=candidates)
    for q, user in enumerate([3, 1]):
        best = sorted(candidates[q], key=lambda row: -table[user, row])[:2]
        assert rows[q].tolist() == best
        np.testing.assert_allclose(scores[q], table[user, best], rtol=1e-5)


def test_margins_are_reward_differences(make_preferences):
    prefs = make_preferences()
    params = lore.init_params(jax.random.key(0), num_users=5, num_features=6, rank=3)
    weights, model = params.weights, lore.RewardModel(params.basis, temperature=2.0)
    got = np.asarray(lore.margins(model, weights, prefs))
    table = np.asarray(lore.score(model, weights, prefs.features))
    stored = table[prefs.user, prefs.chosen] - table[prefs.user, prefs.rejected]
    np.testing.assert_allclose(got[prefs.order], stored, rtol=1e-4, atol=1e-5)


def test_margins_ignore_a_constant_row(make_preferences):
    prefs = make_preferences()
    basis = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
    model, weights = lore.RewardModel(basis), np.full((5, 3), 1 / 3, np.float32)
    moved = prefs.replace(features=prefs.features + np.float32(3))
    np.testing.assert_allclose(
        lore.margins(model, weights, moved),
        lore.margins(model, weights, prefs),
        atol=1e-4,
    )
