"""The certified simplex solver against float64 NumPy certificates and gradients."""

import jax
import jax.numpy as jnp
import large_margins_oracle as oracle
import numpy as np
import pytest
from jax.extend import core as extend
from jax.test_util import check_grads

from lore_jax import _backend
from lore_jax._solve import interior_point, simplex

KINDS = ("gauss", "separable", "duplicated", "collinear", "integer")
ml = jax.jit(simplex.maximum_likelihood)
mapfit = jax.jit(simplex.maximum_a_posteriori)


def problems(kind, users, pairs, rank, radius, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((users, pairs, rank))
    if kind == "separable":
        z[:, :, 0] = np.abs(z[:, :, 0]) + 5
    if kind == "duplicated":
        same = rng.random((users, 1, rank - 1)) < 0.5
        z[:, :, 1:] = np.where(same, z[:, :, :1], z[:, :, 1:])
    if kind == "collinear":
        z = z[:, :, :1] * rng.standard_normal((users, 1, rank))
    if kind == "integer":
        z = np.round(z)
        z[:, 0, 0] = 1  # no user with nothing but zeros
    return radius * z / np.abs(z).max((1, 2), keepdims=True)


def gradient(z, weight, p, label=1.0):
    """Exact gradient of the data term in float64."""
    z, p = z.astype(np.float64), p.astype(np.float64)
    p = p / p.sum(-1, keepdims=True)
    m = np.einsum("upk,uk->up", z, p)
    return np.einsum("up,upk->uk", weight * ((1 + np.tanh(m / 2)) / 2 - label), z)


def frank_wolfe_gap(z, weight, p):
    g = gradient(z, weight, p)
    p = p.astype(np.float64) / p.astype(np.float64).sum(-1, keepdims=True)
    return (p * g).sum(-1) - g.min(-1)


@pytest.mark.parametrize(("pairs", "rank"), [(1, 5), (10, 5), (10, 20)])
def test_maximum_likelihood_is_certified_at_every_scale(pairs, rank):
    radii = (1e-6, 1.0, 10.0, 100.0, 1e3, 1e4, 1e6)
    z = np.concatenate(
        [problems(k, 25, pairs, rank, r, seed=3) for k in KINDS for r in radii]
    ).astype(np.float32)
    weight = np.full(z.shape[:2], 1 / pairs, np.float32)
    out = jax.tree.map(np.asarray, ml(z, weight))
    radius = np.abs(z).max((1, 2))
    moderate = radius <= 84
    gap = frank_wolfe_gap(z, weight, out.weights)
    assert (gap <= 1e-5 * radius)[moderate].all()
    assert out.converged[moderate].all()
    # Float32 cannot certify users near separation: tests/test_large_margins.py.
    assert out.converged.mean() > 0.9
    assert np.isfinite(out.value).all()
    assert (out.weights >= 0).all()
    np.testing.assert_allclose(out.weights.sum(-1), 1, rtol=1e-6)


def test_maximum_likelihood_in_float64():
    with jax.enable_x64(True):
        z = np.concatenate([problems(k, 20, 10, 5, r) for k in KINDS for r in (1, 100)])
        weight = np.full(z.shape[:2], 0.1)
        out = ml(z, weight)
        assert out.weights.dtype == jnp.float64
        assert frank_wolfe_gap(z, weight, np.asarray(out.weights)).max() <= 1e-10


@pytest.mark.parametrize("rank", [5, 20])
def test_map_satisfies_its_optimality_conditions(rank):
    z = problems("gauss", 60, 10, rank, 6.0).astype(np.float32)
    rng = np.random.default_rng(1)
    label = rng.random((60, 10)).astype(np.float32)
    weight = np.full((60, 10), 0.25, np.float32)
    for total in (0.01, 1.0, 20.0, 1e4):
        barrier = total * rng.dirichlet(np.full(rank, 2.0), 60) + 1e-3
        barrier = barrier.astype(np.float32)
        out = jax.tree.map(np.asarray, mapfit(z, weight, barrier, label=label))
        assert out.converged.all()
        p = out.weights.astype(np.float64)
        g = gradient(z, weight, p, label)
        slack = g - (p * g).sum(-1, keepdims=True) + barrier.sum(-1, keepdims=True)
        scale = barrier.sum(-1, keepdims=True) + 2.5 * 6
        assert np.abs(p * slack - barrier).max() <= 2e-4 * scale.max()
        if total >= 20:
            assert out.num_steps.max() <= 5


@pytest.mark.parametrize("rank", [5, 10])
def test_small_parts_of_a_barrier_do_not_jam_the_primal_dual_solver(rank):
    """A corrector that may aim beyond the boundary fails a quarter of these users."""
    rng = np.random.default_rng(0)
    true = rng.dirichlet(np.full(rank, 0.2), 128)
    z = rng.standard_normal((128, 40, rank))
    m = np.einsum("upk,uk->up", z, true)
    z *= np.where(rng.random(m.shape) < 1 / (1 + np.exp(-m)), 1, -1)[..., None]
    start = np.stack([rng.dirichlet(50 * p + 0.02) for p in true]) + 1e-5
    start /= start.sum(1, keepdims=True)
    z, start = z.astype(np.float32), start.astype(np.float32)
    weight = np.full(z.shape[:2], 0.35, np.float32)
    solve = jax.jit(simplex.maximum_a_posteriori, static_argnames="solvers")
    out = solve(z, weight, 0.4 * start, start=start, solvers=(simplex.PRIMAL_DUAL,))
    assert out.converged.all()
    whole = solve(z, weight, 0.4 * start, start=start)
    np.testing.assert_allclose(out.weights, whole.weights, atol=1e-4)


def test_large_margins_need_pair_duals():
    z = problems("gauss", 64, 10, 5, 1e3).astype(np.float32)
    weight = np.ones(z.shape[:2], np.float32)
    solve = jax.jit(simplex.maximum_likelihood, static_argnames="solvers")
    without, with_duals = (
        jax.tree.map(np.asarray, solve(z, weight, solvers=(name,)))
        for name in simplex.BOTH
    )
    assert not without.converged.all()  # and it says so
    gaps = frank_wolfe_gap(z, weight, without.weights)
    assert (gaps > 1e-2)[~without.converged].all()
    assert with_duals.converged.all()
    lower, _ = oracle.bounds(z, weight)
    loss = oracle.objective(z, weight, 1.0, np.zeros((64, 5)), with_duals.weights)
    assert (loss <= 1.001 * lower + 1e-4).all()


@pytest.mark.parametrize("solvers", [(), ("primal",), "primal_dual"])
def test_another_solver_is_an_error(solvers):
    z = np.ones((2, 3, 4), np.float32)
    names = "'primal_dual', 'with_pair_duals'"
    with pytest.raises(ValueError, match=rf"solvers must be .*{names}.*got"):
        simplex.maximum_likelihood(z, z[..., 0], solvers=solvers)


def test_users_without_pairs():
    z = np.full((3, 4, 5), 7.0, np.float32)
    weight = np.zeros((3, 4), np.float32)
    out = ml(z, weight)
    np.testing.assert_array_equal(out.weights, np.float32(1 / 5))
    assert out.converged.all()
    assert not out.gap.any()
    assert not out.num_steps.any()
    barrier = np.arange(1, 16, dtype=np.float32).reshape(3, 5)
    out = mapfit(z, weight, barrier)
    expected = barrier / barrier.sum(-1, keepdims=True)
    np.testing.assert_allclose(out.weights, expected, rtol=2e-7)


def test_one_direction_has_weight_one():
    out = ml(np.ones((2, 3, 1), np.float32), np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(out.weights, 1)


def test_users_are_independent_and_pair_order_is_irrelevant():
    z = problems("gauss", 300, 10, 5, 8.0).astype(np.float32)
    weight = np.full((300, 10), 0.1, np.float32)
    all_users = ml(z, weight).weights
    order = np.random.default_rng(2).permutation(300)
    np.testing.assert_allclose(
        ml(z[order], weight).weights, all_users[order], atol=1e-6
    )
    np.testing.assert_allclose(ml(z[:7], weight[:7]).weights, all_users[:7], atol=1e-6)
    flipped = ml(z[:, ::-1], weight).value
    np.testing.assert_allclose(flipped, ml(z, weight).value, atol=1e-4)


def test_vmap_of_one_user_equals_the_batch():
    z = problems("gauss", 9, 6, 4, 5.0).astype(np.float32)
    weight = np.full((9, 6), 1 / 6, np.float32)
    one = jax.jit(jax.vmap(simplex.solve_user))(z, weight)
    np.testing.assert_allclose(one.weights, ml(z, weight).weights, atol=1e-6)


def test_gradients_follow_the_implicit_function_theorem():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        z, weight = rng.standard_normal((3, 12, 3)), rng.random((3, 12)) + 0.1
        barrier, c = rng.random((3, 3)) + 0.3, rng.standard_normal((3, 3))

        def prior(z, weight, barrier):
            out = simplex.maximum_a_posteriori(z, weight, barrier)
            return jnp.sum(out.weights * c) + jnp.sum(out.value)

        def plain(z, weight):
            return jnp.sum(simplex.maximum_likelihood(z, weight).weights * c)

        check_grads(
            jax.jit(prior), (z, weight, barrier), order=1, modes=["rev"], rtol=1e-5
        )
        check_grads(
            jax.jit(plain), (z, weight), order=1, modes=["rev"], rtol=1e-4, atol=1e-5
        )
        vertex = z.copy()
        vertex[:, :, 0] += 9
        grads = jax.jit(jax.grad(plain, argnums=(0, 1)))(vertex, weight)
        assert all(np.abs(x).max() < 1e-6 for x in grads)


def test_an_accelerator_holds_few_systems_at_once(monkeypatch):
    """No U × K × K: a chunk's systems, or the problem itself, is the largest."""
    monkeypatch.setattr(simplex, "tuning", lambda: _backend.ACCELERATOR)
    z = jax.ShapeDtypeStruct((1 << 17, 10, 50), np.float32)
    weight = jax.ShapeDtypeStruct(z.shape[:2], np.float32)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.size for var in equation.outvars)
            for inner in extend.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    program = jax.make_jaxpr(simplex.maximum_likelihood)(z, weight)
    assert max(sizes(program.jaxpr)) <= max(z.size, 1 << 25)


@pytest.mark.parametrize("length", [1, 24, 25, 40, 99])
@pytest.mark.parametrize("name", ["add", "minimum", "maximum"])
def test_folding_in_half_loses_no_term(name, length):
    x = np.arange(1, length + 1, dtype=np.float32)[:, None] * np.float32([1, -1])
    got = interior_point.fold(getattr(jnp, name), x)
    np.testing.assert_array_equal(got, getattr(np, name).reduce(x, 0))
