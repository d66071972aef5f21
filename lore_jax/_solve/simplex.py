"""Convex mixture weights on the simplex, certified, for any number of users.

With the basis frozen, one user's weights solve

    minimise over p in the simplex
    F(p) = Σ_n weight[n] (softplus(z[n]·p) − label[n] z[n]·p) − Σ_k barrier[k] log p[k]

where ``z[n]`` are the pair's margins under each shared direction, divided by the
temperature. ``barrier = 0`` is maximum likelihood; ``barrier = α`` is the MAP under
Dirichlet(α) in softmax coordinates.

Every user is solved by a primal-dual interior-point Newton method, users in the
minor-most axis, in cache-sized chunks. The optimum comes with a certificate: for any
λ < min_k (∇f)_k the duality gap of F at p is

    gap = Σ_k b_k ψ(p_k t_k / b_k),   t = ∇f(p) − λ,   ψ(x) = x − 1 − log x,

whose term is p_k t_k where b_k = 0; with λ = min(⟨p, ∇f⟩ − Σ b, min_k (∇f − b)_k) it
is the Frank-Wolfe gap ⟨p, ∇f⟩ − min_k (∇f)_k of maximum likelihood, and vanishes to
second order at the MAP.

References:
    Mehrotra, "On the implementation of a primal-dual interior point method", 1992.
    Jaggi, "Revisiting Frank-Wolfe", 2013 (the gap as a certificate).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import xlogy

from lore_jax import _tables
from lore_jax._backend import tuning
from lore_jax._entry import public
from lore_jax._solve import interior_point

STRAGGLERS = 16  # a chunk goes on until all but one in so many users are solved

# The two solvers of `interior_point`.
PRIMAL_DUAL, PAIR_DUALS = BOTH = "primal_dual", "with_pair_duals"


def _broadcasting(fun):
    """Per-user arrays broadcast against the trailing user axis on purpose."""

    @functools.wraps(fun)
    def wrapped(*args):
        with jax.numpy_rank_promotion("allow"):
            return fun(*args)

    return wrapped


class Solution(NamedTuple):
    """Certified optimum of each user.

    Attributes:
        weights: float[U, K], on the simplex.
        value: float[U], the data term Σ weight · loss at ``weights``.
        gap: float[U], upper bound of F(weights) − min F.
        converged: bool[U]. With R = max |z| over the user's pairs, it says that
            gap ≤ 1e-5 (R Σ weight + Σ barrier) where R ≤ 84, and above that
            gap ≤ max(9e-4 (value + Σ barrier), 1e-6 Σ weight). In float64 1e-12 and
            4503 take the places of 1e-5 and 84. Where float32 cannot tell, because it
            moves margins by eps·R, it is False.
        num_steps: int32[U], Newton steps taken.
    """

    weights: jax.Array
    value: jax.Array
    gap: jax.Array
    converged: jax.Array
    num_steps: jax.Array


def _solve(solvers, z, weight, label, barrier, start, patience):
    """Solve users in the minor-most axis: z[P, K, U] → Solution of weights[K, U].

    Also returns bool[U], users left unsolved, of whom there may be ``patience`` int[].
    """
    num, dtype = z.shape[1], z.dtype
    total = jnp.sum(weight, 0)
    has_pairs = total > 0
    radius = jnp.max(jnp.where(weight[:, None] > 0, jnp.abs(z), 0), (0, 1))
    radius = jnp.where(radius > 0, radius, 1)
    scale = jnp.where(has_pairs, total, 1) * radius
    prior = jnp.full_like(z[0], 1 / num)
    if barrier is not None:
        prior = barrier / jnp.sum(barrier, 0)
        scale = scale + jnp.sum(barrier, 0)
    linear = None
    if label is not None:
        linear = interior_point.back_project(z, weight * (1 - label)) / scale
    scaled_barrier = None if barrier is None else barrier / scale
    least = None
    if label is not None:
        least = (
            -jnp.sum(weight * (xlogy(label, label) + xlogy(1 - label, 1 - label)), 0)
            / scale
        )
    problem = interior_point.Problem(z, weight / scale, linear, scaled_barrier, least)
    p = prior if start is None else start
    bound = interior_point.gap_bound(dtype, radius)
    tol = bound / 2  # for the rounding of p
    twice = jnp.full_like(has_pairs, barrier is not None)
    steps = jnp.zeros_like(total, jnp.int32)
    s, gap, left = prior, jnp.full_like(tol, jnp.inf), twice & False
    large = interior_point.is_large(dtype, radius)
    pair_duals = None
    if PRIMAL_DUAL in solvers:
        p, s, gap, steps, left = interior_point.primal_dual(
            problem, p, tol, twice, has_pairs, steps, patience
        )
        left = left & (patience > 0)
    if PAIR_DUALS in solvers:
        if PRIMAL_DUAL in solvers:
            q = jax.nn.sigmoid(-interior_point.margins(z, p))
            gap, most, _ = interior_point.certify_large(
                problem, radius, large, (p, q, 1 - q), gap, tol
            )
            hard = has_pairs & ~(gap <= most) & ~left
        else:
            hard = has_pairs
        p2, s2, *pair_duals, gap2, steps = interior_point.with_pair_duals(
            problem, radius, p, tol, twice, hard, steps, large
        )
        better = hard & (gap2 < gap)
        p, s, gap = (
            jnp.where(better, new, old) for new, old in ((p2, p), (s2, s), (gap2, gap))
        )
    if barrier is None:
        # The face the path is heading for is often exactly optimal: try it.
        face = jnp.where(p < s, 0, p)
        face = face / jnp.sum(face, 0)
        q = jax.nn.sigmoid(-interior_point.margins(z, face))
        face_gap = interior_point.duality_gap(
            problem, face, interior_point.gradient(problem, q)
        )
        if pair_duals is not None:
            face_gap, _, _ = interior_point.certify_large(
                problem, radius, large, (face, *pair_duals), face_gap, tol
            )
        p = jnp.where(face_gap <= gap, face, p)
        gap = jnp.where(face_gap <= gap, face_gap, gap)
    p = jnp.where(has_pairs, p, prior)
    gap = jnp.where(has_pairs, gap, 0)
    m = interior_point.margins(z, p)
    loss = jax.nn.softplus(-m) if label is None else jax.nn.softplus(m) - label * m
    value = interior_point.fold(jnp.add, weight * loss)
    pull = jnp.zeros_like(total) if barrier is None else jnp.sum(barrier, 0)

    def judge_large():
        above = gap
        if pair_duals is None:  # Otherwise `certificate` has seen to this.
            # The slope of softplus is at most softplus itself.
            share = jnp.minimum(value, total) if label is None else total
            parts = share / scale, pull / scale
            above = gap + interior_point.rounding(problem, radius, *parts)
            if barrier is None:
                far = interior_point.least_gap(problem, radius, value / scale)
                above = jnp.minimum(above, far)
        above = jnp.where(large, above, gap)
        most = interior_point.largest_gap(value, pull, total)
        return above, jnp.where(large, above * scale <= most, above <= bound)

    # In a branch, because XLA would compute the value once for each of its readers.
    gap, converged = lax.cond(jnp.any(large), judge_large, lambda: (gap, gap <= bound))
    return Solution(p, value, gap * scale, converged, steps), left


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@_broadcasting
def _in_chunks(solvers, z, weight, label, barrier, start):
    """Solve z[U, P, K] chunk by chunk, then the stragglers of all chunks together.

    Few users need many steps, and a chunk takes as many as its slowest user. Whoever is
    left behind starts afresh, so that no result depends on who else is there.
    """
    users, _, rank = z.shape
    # An accelerator's chunk also holds a system of K² numbers a user.
    chunk = min(users, tuning().solver_users, max(128, (1 << 25) // rank**2))
    arrays = (z, weight, label, barrier, start)

    def piece(index, patience):
        take = lambda x: jnp.moveaxis(x[index], 0, -1)  # noqa: E731
        z, weight, label, barrier, start = jax.tree.map(take, arrays)
        out, left = _solve(solvers, z, weight, label, barrier, start, patience)
        return out._replace(weights=out.weights.T), left

    every = jnp.arange(users)
    if chunk == users:
        return piece(every, 0)[0]

    # Varies over the mesh like z does, so that shard_map accepts the loops.
    zero = jnp.where(False, jnp.ravel(z)[0], 0)
    empty = jax.tree.map(
        lambda x: jnp.zeros((users, *x.shape[1:]), x.dtype) + zero.astype(x.dtype),
        jax.eval_shape(piece, every[:chunk], 0),
    )

    def turn(state, patience):
        """Solves those who are left, a chunk at a time; the last one overlaps."""
        left = state[1]
        many, every = jnp.cumsum(left), jnp.arange(users)
        place = jnp.where(left, many - 1, many[-1] + every - many)
        # Those who are left, then the others: what sorting would give, sooner.
        order = jnp.zeros(users, every.dtype).at[place].set(every, unique_indices=True)

        def body(i, found):
            first = jnp.minimum(i * chunk, users - chunk)
            new = piece(lax.dynamic_slice_in_dim(order, first, chunk), patience)
            write = functools.partial(lax.dynamic_update_slice_in_dim, axis=0)
            return jax.tree.map(lambda x, new: write(x, new, first), found, new)

        found = lax.fori_loop(0, -(-many[-1] // chunk), body, empty)

        def merge(found, old):
            mine = left.reshape(-1, *(1,) * (old.ndim - 1))
            return jnp.where(mine, found[place], old)

        return jax.tree.map(merge, found, state), None

    start = empty[0], empty[1] | True
    return lax.scan(turn, start, jnp.array([chunk // STRAGGLERS, 0]))[0][0]


def _data_term(p, z, weight, label):
    m = jnp.einsum("upk,uk->up", z, p, precision="highest")
    first = 1 if label is None else label
    return jnp.sum(weight * (jax.nn.softplus(m) - first * m), -1)


@_in_chunks.defjvp
@_broadcasting
def _implicit(solvers, primals, tangents):
    """Implicit function theorem on the stationarity ∇f − b/p + ν 1 = 0, Σ p = 1.

    In the scaled step x = dp/√p the system is √p H √p + diag(slack), so that a zero
    weight cannot move: at a vertex or face the derivative lives on the face.
    """
    out = _in_chunks(solvers, *primals)
    (z, weight, label, barrier, _), p = primals, out.weights
    # ∇f is summed over users because they do not interact.
    gradient = jax.grad(lambda p, *args: jnp.sum(_data_term(p, *args)))
    arguments, moves = (z, weight, label), tangents[:3]
    if label is None:
        arguments, moves = (z, weight), tangents[:2]
    complete = lambda args: (*args, None)[:3]  # noqa: E731
    g, dg = jax.jvp(lambda *a: gradient(p, *complete(a)), arguments, moves)
    if barrier is None:
        slack = g - jnp.min(g, -1, keepdims=True)
        dg = jnp.where(jnp.any(weight > 0, -1, keepdims=True), dg, 0)
    else:
        slack = barrier / p
        dg = dg - tangents[3] / p
    root = jnp.sqrt(p)
    m = jnp.einsum("upk,uk->up", z, p, precision="highest")
    scaled = z * root[:, None]
    curvature = weight * jax.nn.sigmoid(m) * jax.nn.sigmoid(-m)
    system = jnp.einsum(
        "up,upk,upl->ukl", curvature, scaled, scaled, precision="highest"
    )
    size = jnp.max(jnp.abs(system), (1, 2)) + jnp.max(slack, -1)
    size = jnp.where(size > 0, size, 1)[:, None, None]
    ridge = 10 * jnp.finfo(p.dtype).eps * jnp.eye(p.shape[1], dtype=p.dtype)
    system = system / size + ridge + root[:, :, None] * root[:, None]
    system = system + jnp.eye(p.shape[1], dtype=p.dtype) * (slack / size[:, 0])[:, None]
    # `custom_linear_solve` differentiates through the product alone.
    direct = interior_point.dense_solver(lax.stop_gradient(system))

    def solve(rhs):  # can be transposed, unlike `backend.solve_lower`
        product = functools.partial(jnp.einsum, "ukl,lu->ku", system)
        return lax.custom_linear_solve(
            product, rhs, lambda _, rhs: direct(rhs), symmetric=True
        )

    normal = solve(root.T).T
    x = solve((root * dg / size[:, 0]).T).T
    share = jnp.sum(root * x, -1, keepdims=True)
    x = x - normal * share / jnp.sum(root * normal, -1, keepdims=True)
    dp = -root * x
    _, dvalue = jax.jvp(
        lambda p, *a: _data_term(p, *complete(a)), (p, *arguments), (dp, *moves)
    )
    zero = jnp.zeros_like(out.gap)
    still: Any = np.zeros(zero.shape, jax.dtypes.float0)
    return out, Solution(dp, dvalue, zero, still, still)


def _prepare(solvers, z, weight, label, barrier, start):
    if solvers not in (BOTH, (PRIMAL_DUAL,), (PAIR_DUALS,)):
        raise ValueError(
            f"solvers must be {BOTH}, ({PRIMAL_DUAL!r},) or ({PAIR_DUALS!r},), got "
            f"{solvers!r}"
        )
    dtype = jnp.promote_types(jnp.result_type(z), jnp.float32)
    arrays = (z, weight, label, barrier, start)
    return solvers, *jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)


@public()
def maximum_likelihood(z, weight, *, label=None, solvers=BOTH):
    """Maximum-likelihood weights of many users.

    Args:
        z: float[U, P, K], reward differences of each pair under each direction,
            divided by the temperature.
        weight: float[U, P], pair weights; 0 marks padding.
        label: float[U, P], P(first is preferred); None means 1.
        solvers: "primal_dual", then "with_pair_duals" for the users that the first
            leaves unsolved, whose margins are large as a rule. One alone compiles in
            half the time.

    Returns:
        Solution; a user without pairs gets uniform weights, gap 0 and value 0.

    Raises:
        ValueError: shapes disagree, a concrete number is not finite, or ``solvers``
            names another.
    """
    _tables.check_pairs(z, weight, label)
    return certified_maximum_likelihood(z, weight, label=label, solvers=solvers)


def certified_maximum_likelihood(z, weight, *, label=None, solvers=BOTH):
    """`maximum_likelihood` without checks."""
    return _in_chunks(*_prepare(solvers, z, weight, label, None, None))


@public()
def maximum_a_posteriori(z, weight, barrier, *, label=None, start=None, solvers=BOTH):
    """MAP weights of many users under Dirichlet(barrier) in softmax coordinates.

    Args:
        z: float[U, P, K], as in `maximum_likelihood`.
        weight: float[U, P], pair weights (times the likelihood power); 0 is padding.
        barrier: float[U, K], ≥ 0, the Dirichlet's parameters.
        label: float[U, P], P(first is preferred); None means 1.
        start: float[U, K], positive weights to start from; None means the prior
            ``barrier / Σ barrier``.
        solvers: as in `maximum_likelihood`.

    Returns:
        Solution; a user without pairs gets ``barrier / Σ barrier`` exactly.

    Raises:
        ValueError: shapes disagree, a concrete number is not finite, or ``solvers``
            names another.
    """
    _tables.check_pairs(z, weight, label)
    _tables.check_users(barrier, "barrier", z)
    if start is not None:
        _tables.check_users(start, "start", z)
    kinds = dict(label=label, start=start, solvers=solvers)
    return certified_map(z, weight, barrier, **kinds)


def certified_map(z, weight, barrier, *, label=None, start=None, solvers=BOTH):
    """`maximum_a_posteriori` without checks."""
    return _in_chunks(*_prepare(solvers, z, weight, label, barrier, start))


def _single(solution):
    return jax.tree.map(lambda x: x[0], solution)


@public()
def solve_user(z, weight, *, label=None):
    """Maximum-likelihood weights of one user: z[P, K], weight[P] → Solution."""
    lift = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None])
    return _single(maximum_likelihood(lift(z), lift(weight), label=lift(label)))


@public()
def solve_map_user(z, weight, barrier, *, label=None, start=None):
    """MAP weights of one user: z[P, K], weight[P], barrier[K] → Solution."""
    lift = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None])
    return _single(
        maximum_a_posteriori(
            lift(z), lift(weight), lift(barrier), label=lift(label), start=lift(start)
        )
    )
