"""Solutions in float64, as narrower weights hold them."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _equations
from lore_jax._solve.interior_point import within_tolerance
from lore_jax._solve.simplex import Solution

WAYS = 32  # of rounding; with one, 11 % of collinear users at R = 1e7 fail, not 2 %


def store_as(dtype, solution, z, weight, label=None, barrier=None):
    """The solution with weights rounded to `dtype`; value, gap, converged are theirs.

    Every weight goes up or down, the same way for every user, and each user keeps the
    way with the least objective.

    Args:
        dtype: float32, say.
        solution: of the other arguments, in float64.
        z: float64[U, P, K].
        weight: float64[U, P].
        label: float64[U, P] or None.
        barrier: float64[U, K] or None.

    Returns:
        Solution, whose weights are still float64.
    """
    p, info = solution.weights, jnp.finfo(dtype)
    pull = jnp.zeros_like(p) if barrier is None else barrier

    def judge(p):
        """(objective, data term) at p on the simplex: float64[U] each."""
        p = p / jnp.sum(p, 1, keepdims=True)
        m = _equations.mix(z, p[:, None])
        value = jnp.sum(weight * _equations.pair_loss(m, label), 1)
        logs = jnp.where(pull > 0, pull * jnp.log(p), 0)
        return value - jnp.sum(logs, 1), value

    def rounded(way):
        near = (p * (1 + info.eps / 2 * way)[None]).astype(dtype).astype(p.dtype)
        return jnp.where(p > 0, jnp.maximum(near, info.tiny), 0)

    def attempt(best, way):
        weights = rounded(way)
        new = (*judge(weights), weights)
        less = new[0] < best[0]
        least = (jnp.where(less, a, b) for a, b in zip(new[:2], best))
        return (*least, jnp.where(less[:, None], weights, best[2])), None

    nearest = rounded(jnp.zeros_like(p[0]))
    ways = np.random.default_rng(0).uniform(-1, 1, (WAYS, p.shape[1]))
    start = (*judge(nearest), nearest)
    objective, value, weights = lax.scan(attempt, start, jnp.asarray(ways, p.dtype))[0]
    gap = jnp.maximum(objective - judge(p)[0] + solution.gap, 0)
    total = jnp.sum(weight, 1)
    radius = jnp.max(jnp.where(weight[..., None] > 0, jnp.abs(z), 0), (1, 2))
    sums = total, jnp.sum(pull, 1), value
    converged = within_tolerance(dtype, gap, radius, *sums)
    some = total > 0
    return Solution(
        weights=jnp.where(some[:, None], weights, p),
        value=value,
        gap=jnp.where(some, gap, 0),
        converged=converged | ~some,
        num_steps=solution.num_steps,
    )
