"""Adaptation at every scale of the margins against certified float64 bounds.

A user counts as wrong who is reported as converged and whose objective is above the
bound by more than 1e-3 of it. At moderate margins, R ≤ 84, the documented tolerance is
absolute, 1e-5 (R Σ weight + Σ barrier).
"""

import functools
import os

import jax
import large_margins_oracle as oracle
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._solve import interior_point, simplex
from lore_jax._solve.stored import store_as

PAIRS = 10
USERS = int(os.environ.get("LARGE_MARGIN_USERS", "6"))  # of every kind
SCALES = tuple(10.0**n for n in range(-6, 8))
KINDS = "gauss", "choices", "separable", "duplicated", "collinear", "integer"
ML = lore.MaximumLikelihood()


def margins(kind, rank, size, users=USERS, seed=3):
    """z float32[U, P, K] with max |z| = size for every user."""
    rng = np.random.default_rng([seed, rank, round(np.log10(size)) + 9])
    z = rng.standard_normal((users, PAIRS, rank))
    if kind == "choices":
        truth = rng.dirichlet(np.full(rank, 0.5), users)
        m = np.einsum("upk,uk->up", z, truth)
        first = rng.random(m.shape) < 1 / (1 + np.exp(-4 * m))
        z *= np.where(first, 1, -1)[..., None]
    elif kind == "separable":
        z[:, :, 0] = np.abs(z[:, :, 0]) + 5
    elif kind == "duplicated":
        same = rng.random((users, 1, rank - 1)) < 0.5
        z[:, :, 1:] = np.where(same, z[:, :, :1], z[:, :, 1:])
    elif kind == "collinear":
        z = z[:, :, :1] * rng.standard_normal((users, 1, rank))
    elif kind == "integer":
        z = np.round(z)
        z[:, 0, 0] = 1  # No user with nothing but zeros.
    return (size * z / np.abs(z).max((1, 2), keepdims=True)).astype(np.float32)


def adapted(z, method=ML, label=None, **fields):
    users, pairs, rank = z.shape
    prefs = lore.Preferences.from_pairs(
        z.reshape(-1, rank),
        np.arange(users * pairs),
        None,
        np.repeat(np.arange(users), pairs),
        users,
        label=None if label is None else label.ravel(),
        **fields,
    )
    return lore.adapt(
        lore.RewardModel(np.eye(rank, dtype=np.float32)), prefs, method=method
    )


def wrong(out, z, weight, label=None, barrier=None):
    """bool[U], users who are said to have converged and have not."""
    label = np.ones(weight.shape) if label is None else label
    barrier = np.zeros((len(z), z.shape[2])) if barrier is None else barrier
    _, upper = oracle.bounds(z, weight, label, barrier)
    total = weight.sum(1)
    found = oracle.objective(z.astype(float), weight, label, barrier, out.weights)
    size = np.abs(z).max((1, 2))
    moderate = 1e-5 * (size * total + barrier.sum(1))
    allowed = 1e-3 * np.abs(upper) + 1e-6 * total + np.where(size <= 84, moderate, 0)
    return np.asarray(out.converged) & (found > upper + allowed)


@pytest.mark.parametrize(
    ("name", "rank"), [("ml", 2), ("ml", 5), ("map", 3), ("labels", 3)]
)
def test_adapt_is_right_at_every_scale(name, rank):
    """No user is wrong, and one in 100 at most is left unsolved, of usual kinds."""
    label = barrier = None
    method, weight = ML, np.full((USERS * len(KINDS), PAIRS), 1 / PAIRS)
    if name == "labels":
        label = np.random.default_rng(0).random(weight.shape).astype(np.float32)
    if name == "map":
        method, weight = lore.MAP(0.3), np.ones_like(weight)
        barrier = np.full((len(weight), rank), 0.3)
    unsolved = 0
    for size in SCALES:
        z = np.concatenate([margins(kind, rank, size) for kind in KINDS])
        out = adapted(z, method, label)
        assert not wrong(out, z, weight, label, barrier).any(), size
        assert out.converged[: 4 * USERS].mean() >= 0.99, size
        unsolved += (~out.converged).sum()
        # The reported loss is that of the reported weights.
        y = np.ones(weight.shape) if label is None else label
        none = np.zeros((len(z), rank))
        loss = oracle.objective(
            z.astype(float), np.full_like(weight, 0.1), y, none, out.weights
        )
        np.testing.assert_allclose(
            out.loss, loss, rtol=1e-3, atol=1e-6 + 2e-7 * size * (size < 84)
        )
    assert unsolved <= 0.01 * len(z) * len(SCALES)


@pytest.mark.parametrize("size", [1e5, 1e7])
def test_the_hinge_limit_is_a_linear_program(size):
    """Margins R/2 · (p, p − 1, 1 − 3 p) of p = p₁ at rank 2.

    The hinge losses are R/2 · (0, 1 − p, max(0, 3 p − 1)); their mean is least at
    p = 1/3, where it is R / 9.
    """
    z = size / 2 * np.array([[[1, 0], [0, -1], [-2, 1]]], np.float32)
    out = adapted(np.repeat(z, 3, 0))
    assert out.converged.all()
    np.testing.assert_allclose(out.loss, size / 9, rtol=1e-3)
    np.testing.assert_allclose(out.weights[:, 0], 1 / 3, atol=1e-3)


def test_60_users_with_margins_of_millions():
    """At max|z| = 4e6 the worst of 60 users was 21 times above the optimum."""
    z = np.random.default_rng(0).standard_normal((60, PAIRS, 5)).astype(np.float32)
    z *= np.float32(4e6 / np.abs(z).max())
    out = adapted(z)
    assert out.converged.all()
    lower, upper = oracle.bounds(z, np.full(z.shape[:2], 0.1))
    assert (upper - lower <= 1e-4 * upper + 1e-6).all()
    assert (out.loss <= 1.001 * upper + 1e-5).all()


@pytest.mark.slow
def test_the_default_converges_at_every_scale():
    for size in SCALES:
        z = np.concatenate([margins(kind, 3, size) for kind in KINDS[:4]])
        out = adapted(z, lore.PosteriorMean())
        assert (~out.converged).sum() <= 0.01 * len(z)
        np.testing.assert_allclose(out.weights.sum(1), 1, rtol=1e-5)


def test_only_what_float32_leaves_goes_to_float64(compilations):
    """Moderate margins compile no float64 program, and nothing changes for them."""
    calm = margins("gauss", 4, 30.0)
    alone = adapted(calm)
    before = compilations.count
    adapted(calm)
    assert compilations.count == before
    hard = margins("collinear", 4, 1e6)
    mixed = adapted(np.concatenate([calm, hard]))
    assert compilations.count > before
    for name in ("weights", "loss"):
        got = getattr(mixed, name)[: len(calm)]
        # To rounding: more users may be solved by a program for more at once.
        np.testing.assert_allclose(
            got, getattr(alone, name), rtol=1e-5, atol=1e-6, err_msg=name
        )
    assert mixed.converged.all()
    assert mixed.weights.dtype == np.float32
    assert jax.numpy.ones(()).dtype == np.float32  # The setting is back.


@pytest.mark.parametrize("rank", [2, 5, 20])
@pytest.mark.slow
def test_a_pure_solver_says_where_float32_cannot_tell(rank):
    solve = jax.jit(simplex.maximum_likelihood)
    for size in (1e2, 1e4, 1e6, 1e7):
        z = np.concatenate([margins(kind, rank, size) for kind in KINDS])
        weight = np.full(z.shape[:2], 1 / PAIRS, np.float32)
        out = jax.tree.map(np.asarray, solve(z, weight))
        assert not wrong(out, z, np.full(z.shape[:2], 1 / PAIRS)).any()
        usual = np.arange(len(z)) < 4 * USERS
        assert out.converged[usual].mean() > 0.9
        assert np.isfinite(out.value).all()


@pytest.mark.slow
def test_a_gap_bounds_the_distance_to_the_optimum():
    """Also of users who have not converged."""
    for size in (1e3, 1e5, 1e7):
        z = np.concatenate([margins(kind, 5, size) for kind in KINDS])
        weight = np.full(z.shape[:2], 1 / PAIRS, np.float32)
        lower, _ = oracle.bounds(z, weight)
        none = np.zeros((len(z), 5))
        for solvers in (("primal_dual",), simplex.BOTH):
            solve = functools.partial(simplex.maximum_likelihood, solvers=solvers)
            out = jax.jit(solve)(z, weight)
            value = oracle.objective(
                z.astype(float), weight, np.ones(weight.shape), none, out.weights
            )
            assert (
                value - lower <= 1.001 * np.asarray(out.gap) + 1e-4 * value + 1e-9
            ).all()


def test_pair_duals_bound_what_sigmoids_cannot():
    """Two opposite votes at R = 1e6 cost log 2 at p = (1/2, 1/2); q = 1/2 proves it."""
    z = 1e6 * np.array([[1, -1], [-1, 1]], np.float32)[:, :, None]
    w, p = np.full((2, 1), 0.5, np.float32), np.float32([[0.5], [0.5]])
    with jax.numpy_rank_promotion("allow"):
        problem = interior_point.Problem(z, w / 1e6, None, None, None)
        half = np.full((2, 1), 0.5, np.float32)
        good, _ = interior_point.certificate(problem, np.float32([1e6]), p, half, half)
        off = p + np.float32([[1e-5], [-1e-5]])  # m = ±20: sigmoids are 0 and 1.
        far, _ = interior_point.certificate(problem, np.float32([1e6]), off, half, half)
        q = jax.nn.sigmoid(-interior_point.margins(z, off))
        old = interior_point.duality_gap(
            problem, off, interior_point.gradient(problem, q)
        )
    slack = 4 * np.finfo(np.float32).eps * 1e6
    assert 0 <= good[0] * 1e6 <= slack
    # f = 10 there, and the optimum log 2; the gap of sigmoids is R / 2.
    np.testing.assert_allclose(far[0] * 1e6, 10 - np.log(2), atol=2 * slack)
    assert old[0] * 1e6 > 1e5


def test_rounding_up_or_down_is_chosen_by_the_objective():
    """Collinear margins of 1e7: the nearest float32 weights are off by far more."""
    with jax.enable_x64(True):
        z = margins("collinear", 3, 1e7, users=64).astype(np.float64)
        weight = np.full(z.shape[:2], 0.1)
        exact = jax.jit(simplex.maximum_likelihood)(z, weight)
        stored = jax.jit(functools.partial(store_as, np.float32))(exact, z, weight)
        exact, stored = jax.tree.map(np.asarray, (exact, stored))
    one, none = np.ones(weight.shape), np.zeros((64, 3))
    nearest = exact.weights.astype(np.float32)
    plain = oracle.objective(z, weight, one, none, nearest)
    best = oracle.objective(z, weight, one, none, stored.weights)
    assert (best <= plain + 1e-9).all()
    assert (best - exact.value).sum() < 0.5 * (plain - exact.value).sum()
    np.testing.assert_allclose(stored.value, best, rtol=1e-6)
    np.testing.assert_array_equal(stored.weights, stored.weights.astype(np.float32))
    assert (best - exact.value <= stored.gap + 1e-9).all()
