"""Interior-point Newton on the simplex, users in the minor-most axis.

The two loops behind `simplex`: `primal_dual` carries the weights p and their slacks,
`with_pair_duals` the pair duals too, which large margins need. Array letters: P pairs,
K directions, U users.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy

from lore_jax._backend import EXACT, cholesky, solve_lower, solve_upper, tuning

UNROLL = 8, 10  # largest system, of directions or of pairs, whose Cholesky is unrolled

WRITTEN = 24  # most terms of a sum that are written out as they are

FOLDED = 8  # to how many terms a longer one is folded

PRIMAL_DUAL_STEPS = 16  # most users need 2-8; the rest go to `with_pair_duals`

PAIR_DUAL_STEPS = 60  # the hardest problems known need 31

FAR = 1e-3  # a gap that far below the tolerance needs no second step below it

MODERATE = {4: 1e-5, 8: 1e-12}  # most eps · R, and gap / S, of moderate margins

RELATIVE, ABSOLUTE = 9e-4, 1e-6  # of the gap at large margins, see `largest_gap`

ROUNDING = 4  # float sums of K or P terms are off by less than so many eps


class Problem(NamedTuple):
    """Users minor-most, the objective divided by S so that gradients are O(1)."""

    z: jax.Array  # float[P, K, U]
    weight: jax.Array  # float[P, U]
    linear: jax.Array | None  # float[K, U], the gradient that soft labels add
    barrier: jax.Array | None  # float[K, U]
    least: jax.Array | None  # float[U], what soft labels cost at best


def fold(reduce, x, *, rank=0):
    """``reduce`` jnp.add, maximum or minimum over axis 0, written out.

    XLA vectorises what is written out over users, and its own reductions on a CPU
    hardly. Many terms are folded in half there until few are left; not at large K,
    ``rank``, where sums take little of the time and long ones most of compiling.
    """
    if len(x) > WRITTEN and (rank > WRITTEN or not tuning().written_sums):
        return reduce.reduce(x, 0)
    odd, most = [], WRITTEN if len(x) <= WRITTEN else FOLDED
    while len(x) > most:
        half = len(x) // 2
        odd += [x[-1]] * (len(x) % 2)
        x = reduce(x[:half], x[half : 2 * half])
    return functools.reduce(reduce, [*odd, *(x[k] for k in range(len(x)))])


def margins(z, p):
    """Σ_k z[n, k] p[k]: float[P, U]."""
    if z.shape[1] > WRITTEN:
        return jnp.sum(z * p[None], 1)
    return functools.reduce(jnp.add, [z[:, k] * p[k] for k in range(z.shape[1])])


def back_project(z, r):
    """Σ_n r[n] z[n]: float[K, U]."""
    return fold(jnp.add, z * r[:, None], rank=z.shape[1])


def hessian(z, c):
    """Rows k of Σ_n c[n] z[n] z[n]ᵀ from column k on, float[K−k, U].

    An accelerator takes many terms as a matrix product.
    """
    if len(z) > WRITTEN and not tuning().written_sums:
        whole = jnp.einsum("pu,pku,plu->klu", c, z, z, precision=EXACT)
        return [row[k:] for k, row in enumerate(whole)]
    return [back_project(z[:, k:], c * z[:, k]) for k in range(z.shape[1])]


def gradient(problem, q):
    """Gradient float[K, U] of the data term for pair duals q = sigmoid(−margin)."""
    g = -back_project(problem.z, problem.weight * q)
    return g if problem.linear is None else g + problem.linear


def duality_gap(problem, p, g):
    """Duality gap float[U] at p with gradient g; exact for any rounding of p."""
    total = functools.partial(fold, rank=len(p))
    if problem.barrier is None:
        return total(jnp.add, p * (g - total(jnp.minimum, g)))
    b = problem.barrier
    bound = jnp.minimum(total(jnp.add, p * g - b), total(jnp.minimum, g - b))
    x = p * (g - bound)
    ratio = x / jnp.where(b > 0, b, 1) - 1
    least = jnp.finfo(p.dtype).eps - 1
    return total(
        jnp.add, jnp.where(b > 0, b * (ratio - jnp.log1p(jnp.maximum(ratio, least))), x)
    )


def gap_bound(dtype, radius):
    """Tolerance of gap / S at moderate margins: float[U]."""
    return jnp.maximum(MODERATE[jnp.dtype(dtype).itemsize], _eps(dtype) * radius)


def is_large(dtype, radius):
    """Whether margins up to R are large: bool[U], R > 84 (4503 in float64)."""
    return _eps(dtype) * radius > MODERATE[jnp.dtype(dtype).itemsize]


def _eps(dtype):
    return jnp.finfo(dtype).eps


def largest_gap(value, barrier, weight):
    """Tolerance of the gap at large margins, from a user's sums: float[U]."""
    return jnp.maximum(RELATIVE * (value + barrier), ABSOLUTE * weight)


def within_tolerance(dtype, gap, radius, weight, barrier, value):
    """What `Solution.converged` says of results in `dtype`, from sums: bool[U]."""
    moderate = gap_bound(dtype, radius) * (radius * weight + barrier)
    large = is_large(dtype, radius)
    return gap <= jnp.where(large, largest_gap(value, barrier, weight), moderate)


def rounding(problem, radius, share, pull):
    """How far float sums may put the gap off: float[U].

    Margins are off by eps R, which counts as much as they have slope.

    Args:
        problem: the problem.
        radius: R, float[U].
        share: float[U], Σ weight · slope, or more.
        pull: float[U] or 0, the sum of the barrier.
    """
    weight = fold(jnp.add, problem.weight)
    if problem.least is not None:  # Soft labels add a slope of their own.
        share = share + weight
    eps = jnp.finfo(weight.dtype).eps
    return ROUNDING * eps * (radius * share + weight + pull)


def certificate(problem, radius, p, q, r):
    """Duality gap at large margins, and its tolerance: float[U] each.

    Rounding moves margins by eps R, and with them sigmoid(−margin) near a kink, but
    every q in [0, 1] gives a bound: the gap for its gradient plus the divergence of q
    from sigmoid(−margin). `least_gap` is another for maximum likelihood.

    Args:
        problem: the problem.
        radius: R, float[U].
        p: float[K, U].
        q: pair duals, float[P, U].
        r: 1 − q.
    """
    z, w = problem.z, problem.weight
    m = margins(z, p)
    slope = jax.nn.sigmoid(-m)
    near = duality_gap(problem, p, gradient(problem, slope))
    loss = jnp.log1p(jnp.exp(-jnp.abs(m)))
    entropy = -xlogy(q, q) - xlogy(r, r)
    divergence = jnp.where(m > 0, q, r) * jnp.abs(m) + loss - entropy
    far = duality_gap(problem, p, gradient(problem, q))
    far = far + fold(jnp.add, w * jnp.maximum(divergence, 0))
    value = fold(jnp.add, w * (loss + jnp.maximum(-m, 0)))
    if problem.linear is not None:
        value = value + fold(jnp.add, problem.linear * p, rank=len(p))
    pull = 0
    if problem.barrier is not None:
        pull = fold(jnp.add, problem.barrier, rank=len(p))
    share = fold(jnp.add, w * jnp.maximum(q, slope))
    gap = jnp.minimum(near, far) + rounding(problem, radius, share, pull)
    if problem.barrier is None:
        gap = jnp.minimum(gap, least_gap(problem, radius, value))
    return gap, largest_gap(value, pull, fold(jnp.add, w))


def certify_large(problem, radius, large, point, gap, tol):
    """Gap, what to stop at, and what is enough: where ``large`` as `certificate` says.

    Elsewhere they are gap, tol and −1. point is (p, q, 1 − q). The branch saves time
    where no margins are large, and keeps XLA from fusing it into what computes the gap,
    which would round otherwise.
    """

    def some():
        other, most = certificate(problem, radius, *point)
        most = most / 2  # for the rounding of p
        return (
            jnp.where(large, other, gap),
            jnp.where(large, jnp.minimum(tol, most), tol),
            jnp.where(large, most, -1),
        )

    return lax.cond(jnp.any(large), some, lambda: (gap, tol, 0 * gap - 1))


def least_gap(problem, radius, value):
    """Gap of maximum likelihood from what pairs cost at any margins: float[U].

    That is 0, or the entropy of soft labels.
    """
    if problem.least is None:
        # A margin that is off by d multiplies softplus(−margin) by exp(d) at most.
        off = ROUNDING * jnp.finfo(value.dtype).eps * radius
        return value * jnp.exp(jnp.minimum(off, 10))
    off = rounding(problem, radius, fold(jnp.add, problem.weight), 0)
    return value - problem.least + off


def _cholesky(rows, least):
    """Factor the upper triangle ``rows[k]`` float[K−k, U], unrolled; returns a solve.

    The fastest form for small K, but compile time grows with K². ``least[k]`` float[U]
    bounds pivot k, whose sign rounding may spoil when directions are duplicated.
    """
    num = len(rows)
    rows, inverse, lower = list(rows), [], []
    for k in range(num):
        pivot = 1 / jnp.maximum(rows[k][0], least[k])
        column = rows[k][1:] * pivot
        for j in range(k + 1, num):
            rows[j] = rows[j] - rows[k][j - k] * column[j - k - 1 :]
        inverse.append(pivot)
        lower.append(column)

    def solve(rhs):
        scaled = []
        for k in range(num):
            scaled.append(rhs[0] * inverse[k])
            rhs = rhs[1:] - lower[k] * rhs[0]
        x = scaled[-1][None]
        for k in reversed(range(num - 1)):
            x = jnp.concatenate([(scaled[k] - jnp.sum(lower[k] * x, 0))[None], x])
        return x

    return solve


def dense_solver(matrix):
    """Factor matrix float[U, K, K] with LAPACK; returns a solve of float[K, U]."""
    root = jax.vmap(cholesky)(matrix)

    def solve(rhs):
        x = jax.vmap(solve_lower)(root, rhs.T[:, :, None])
        return jax.vmap(solve_upper)(root, x)[:, :, 0].T

    return solve


def _newton_system(z, curvature, diagonal, *, thin=False):
    """Solve (H + diag(diagonal)) dp = rhs + ν 1, Σ dp = 0, H = Σ_n curvature[n] zₙ zₙᵀ.

    Args:
        z: float[P, K, U].
        curvature: float[P, U].
        diagonal: float[K, U], positive.
        thin: allow the P×P form of the same system, (I + G D⁻¹ Gᵀ)⁻¹, when P < K;
            cheaper, but it loses digits where ``diagonal`` spans many orders.

    Returns:
        A function rhs float[K, U] → dp float[K, U].
    """
    pairs, num = z.shape[:2]
    if thin and pairs < num:
        root = jnp.sqrt(curvature)[:, None] * z
        inside = 1 / diagonal
        # Unrolling hardly pays at more directions, and compiles long.
        if pairs <= UNROLL[1] and num <= 32:
            together = None if tuning().written_sums else 0  # no rows, or all
            gram = lax.map(
                lambda g: margins(root, inside * g), root, batch_size=together
            )
            rows = [row[n:].at[0].add(1) for n, row in enumerate(gram)]
            core = _cholesky(rows, [jnp.ones_like(rows[0][0])] * pairs)
        else:
            gram = jnp.einsum("pku,ku,qku->upq", root, inside, root, precision=EXACT)
            core = dense_solver(gram + jnp.eye(pairs, dtype=z.dtype))

        def solve(rhs):
            x = inside * rhs
            # Without the barriers XLA solves once for every direction that reads it.
            duals = core(lax.optimization_barrier(margins(root, x)))
            return x - inside * back_project(root, lax.optimization_barrier(duals))

    else:
        # ρ·11ᵀ changes nothing where Σ dp = 0, but without it the projection below
        # cancels catastrophically in float32 when H is nearly singular.
        rho = jnp.max(back_project(z * z, curvature), 0)
        eps = jnp.finfo(z.dtype).eps
        if num <= UNROLL[0]:
            rows = enumerate(hessian(z, curvature))
            rows = [(r + rho).at[0].add(diagonal[k]) for k, r in rows]
            solve = _cholesky(rows, [eps * (rho + d) for d in diagonal])
        else:
            eye = jnp.eye(num, dtype=z.dtype)
            full = jnp.einsum("pu,pku,plu->ukl", curvature, z, z, precision=EXACT)
            matrix = full + rho[:, None, None] + eye * diagonal.T[:, None]
            # LAPACK stops at a pivot whose sign rounding has spoiled.
            solve = dense_solver(matrix * (1 + num * eps * eye))

    normal = solve(jnp.ones_like(diagonal))
    normal = normal / jnp.sum(normal, 0)

    def direction(rhs):
        dp = solve(rhs)
        return dp - normal * jnp.sum(dp, 0)

    return direction


def _max_step(x, dx, rank):
    """Largest step float[U] that keeps x + step·dx ≥ 0."""
    return 1 / jnp.maximum(fold(jnp.maximum, -dx / x, rank=rank), 1e-20)


def predictor_corrector(aim, start):
    """Predictor, then corrector: compiled once on a CPU, fused on an accelerator."""
    return lax.fori_loop(0, 2, aim, start, unroll=1 if tuning().written_sums else 2)


def primal_dual(problem, p, tol, twice, active, num_steps, patience):
    """Primal-dual predictor-corrector Newton in p and its slacks s = ∇f + ν ≥ 0.

    Stops when no more than ``patience`` int32[] users are still active.
    """
    z, w = problem.z, problem.weight
    b = jnp.zeros_like(p) if problem.barrier is None else problem.barrier
    num = z.shape[1]

    def certify(p):
        q = jax.nn.sigmoid(-margins(z, p))
        g = gradient(problem, q)
        return q, g, duality_gap(problem, p, g)

    q, g, gap = certify(p)
    s = (b + 0.1 * gap) / p  # enough centring for the gradient

    def step(state):
        i, p, s, q, g, gap, active, count = state
        direction = _newton_system(
            z, w * q * (1 - q), s / p, thin=problem.barrier is not None
        )
        mu = jnp.mean(p * s - b, 0)

        def aim(_, move):
            target = move[0]
            dp = direction(target / p - g)
            ds = target / p - s - s / p * dp
            step_size = jnp.minimum(_max_step(p, dp, num), _max_step(s, ds, num))
            short = jnp.minimum(1, step_size)
            reached = jnp.mean((p + short * dp) * (s + short * ds) - b, 0)
            ratio = jnp.clip(reached / jnp.where(mu > 0, mu, 1), 0, 1)
            target = b + jnp.where(mu > 0, ratio**3 * mu, 0) - dp * ds
            if problem.barrier is not None:
                # Mehrotra's correction must not aim beyond the boundary: small parts
                # of a barrier would jam there, for every tenth user of real votes.
                target = jnp.maximum(target, b / 2)
            return target, dp, ds, step_size

        _, dp, ds, step_size = predictor_corrector(aim, (b, p, s, mu))
        size = jnp.minimum(1, 0.999 * step_size)
        new_p, new_s = p + size * dp, s + size * ds
        new_p = new_p / jnp.sum(new_p, 0)
        new_q, new_g, new_gap = certify(new_p)
        ok = active & jnp.isfinite(new_gap)
        passed = (new_gap <= tol) & (~twice | (gap <= tol) | (new_gap <= FAR * tol))
        p, s, q, g = (
            jnp.where(ok, new, old)
            for new, old in ((new_p, p), (new_s, s), (new_q, q), (new_g, g))
        )
        gap = jnp.where(ok, new_gap, gap)
        return i + 1, p, s, q, g, gap, ok & ~passed, count + ok

    passed = (gap <= tol) & ~twice
    state = (0, p, s, q, g, gap, active & ~passed, num_steps)
    state = lax.while_loop(
        lambda c: (c[0] < PRIMAL_DUAL_STEPS) & (jnp.sum(c[6]) > patience), step, state
    )
    return state[1], state[2], state[5], state[7], state[6]


def with_pair_duals(problem, radius, p, tol, twice, active, num_steps, large):
    """The same with the pair duals q in [0, 1] as variables of their own.

    Also returns them, and 1 − q. Where ``large``, bool[U], `certificate` says when to
    stop.

    At large radius the logistic loss is nearly a hinge and Newton's quadratic model
    holds only within 1/R of each kink. Writing it as max_q −q m + entropy(q), with
    log-barriers on q ≥ 0 (multiplier ``lo``) and q ≤ 1 (``hi``), gives an
    interior-point method whose path widens the kinks and closes them gradually.
    """
    z, w = problem.z, problem.weight
    b = jnp.zeros_like(p) if problem.barrier is None else problem.barrier
    num = z.shape[1]

    def certify(p, q, r):
        gap = duality_gap(problem, p, gradient(problem, jax.nn.sigmoid(-margins(z, p))))
        return certify_large(problem, radius, large, (p, q, r), gap, tol)

    p = jnp.full_like(p, 1 / num)
    q = jnp.full_like(w, 0.5)
    mass = num + 2 * radius * jnp.sum(w, 0)
    lo = jnp.full_like(w, 0.6) * radius
    gap = jnp.full_like(tol, jnp.inf)
    start = (0, p, 0.3 / p + b / p, q, q, lo, lo, gap, active, num_steps)

    def step(state):
        i, p, s, q, r, lo, hi, gap, active, count = state  # r = 1 − q, kept exactly
        excess = jnp.sum(p * s - b, 0) + jnp.sum(w * (lo * q + hi * r), 0)
        mu = excess / mass
        residual = -margins(z, p) - jnp.log(q) + jnp.log(r)
        stiff = 1 / (q * r) + lo / q + hi / r
        direction = _newton_system(z, w / stiff, s / p)

        def aim(_, move):
            t, t_lo, t_hi = move[0]
            shift = residual + t_lo / q - t_hi / r
            dp = direction(t / p - gradient(problem, q + shift / stiff))
            dq = (shift - margins(z, dp)) / stiff
            ds = t / p - s - s / p * dp
            d_lo = t_lo / q - lo - lo / q * dq
            d_hi = t_hi / r - hi + hi / r * dq
            pairs = ((p, dp), (q, dq), (r, -dq), (s, ds), (lo, d_lo), (hi, d_hi))
            step_size = functools.reduce(
                jnp.minimum, [_max_step(x, dx, num) for x, dx in pairs]
            )
            short = jnp.minimum(1, step_size)
            goal = jnp.clip((1 - short) ** 2, 1e-3, 1) * mu
            second = short**2  # Mehrotra's correction, as far as the predictor could go
            targets = (
                b + goal - second * dp * ds,
                radius * goal - second * dq * d_lo,
                radius * goal + second * dq * d_hi,
            )
            return targets, (dp, dq, ds, d_lo, d_hi), step_size

        start = (b, 0 * q, 0 * q), (p, q, s, lo, hi), mu
        _, moves, step_size = predictor_corrector(aim, start)
        dp, dq, ds, d_lo, d_hi = moves
        size = jnp.minimum(1, 0.9 * step_size)
        new_p = p + size * dp
        new_p = new_p / jnp.sum(new_p, 0)
        step_moves = ((s, ds), (q, dq), (r, -dq), (lo, d_lo), (hi, d_hi))
        moved = [x + size * dx for x, dx in step_moves]
        new_gap, most, enough = certify(new_p, moved[1], moved[2])
        # Near the rounding of z the path may lead away again.
        ok = active & jnp.isfinite(new_gap) & ((new_gap < gap) | (gap > enough))
        passed = (new_gap <= most) & (~twice | (gap <= most) | (new_gap <= FAR * most))
        old = p, s, q, r, lo, hi, gap
        new = new_p, *moved, new_gap
        state = [jnp.where(ok, x, y) for x, y in zip(new, old)]
        return i + 1, *state, ok & ~passed, count + ok

    state = lax.while_loop(
        lambda c: (c[0] < PAIR_DUAL_STEPS) & jnp.any(c[8]), step, start
    )
    return *state[1:5], state[7], state[9]
