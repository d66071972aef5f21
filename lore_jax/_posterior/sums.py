"""Sums over pairs that stand for them, and the weights that follow: pure kernels.

    table[a] = Σ_n w_n · log-likelihood of pair n under atom a
    b = Σ_n w_n (y_n − 1/2) z_n
    H = Σ_n w_n 2λ(ξ_n) z_n z_nᵀ,   λ(ξ) = tanh(ξ/2) / (4ξ),   ξ_n² = z_nᵀ E[p pᵀ] z_n

The table is exact. loglik(p) ≥ b·p − ½ pᵀ H p + constant, tight where a margin is
±ξ_n, the size that the prior expects of it.

References:
  Jaakkola and Jordan, Bayesian parameter estimation via variational methods, 2000.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax._backend import EXACT, cholesky, solve_lower, solve_upper
from lore_jax._posterior.table import atom_posterior, log_likelihoods
from lore_jax.prior import Prior, likelihood_power, mixture_mean, pull_towards_mean

_dot = functools.partial(jnp.matmul, precision=EXACT)

_STEPS = 40  # the barrier falls to 1e-21 of its start, below any float's rounding


@functools.partial(jax.jit, static_argnames="unit_weights")
def pair_sums(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    prior: Prior,
    *,
    unit_weights: bool = False,
) -> tuple[jax.Array, ...]:
    """The four sums over pairs z float[B, P, K] at T = 1, weights float[B, P]."""
    table = log_likelihoods(z, weight, label, prior.atoms, unit_weights=unit_weights)
    share = jax.nn.softmax(prior.log_weights)
    second = mixture_mean(share[None] * prior.atoms.T, prior.atoms)
    xi = jnp.sqrt(jnp.einsum("bpk,kl,bpl->bp", z, second, z, precision=EXACT))
    small = xi < 1e-2
    safe = jnp.where(small, 1, xi)
    bend = jnp.where(small, 0.25 - xi**2 / 48, jnp.tanh(safe / 2) / (2 * safe))
    first = jnp.ones_like(weight) if label is None else label
    linear = jnp.einsum("bp,bpk->bk", weight * (first - 0.5), z, precision=EXACT)
    square = jnp.einsum("bp,bpk,bpl->bkl", weight * bend, z, z, precision=EXACT)
    rows, columns = np.triu_indices(z.shape[2])
    total = jnp.sum(weight, axis=1)
    # Padding leaves rounding in it where a user has no pair.
    table = jnp.where((total > 0)[:, None], table, 0)
    return table, linear, square[:, rows, columns], total


@jax.jit
def refine(table, linear, quadratic, num_pairs, prior: Prior):
    """Weights float[B, K] and bool[B], whether they are optimal, from the sums."""
    power = likelihood_power(num_pairs, prior.tempering)
    share = atom_posterior(table, prior, power)
    mean = mixture_mean(share, prior.atoms)
    rank = linear.shape[1]
    rows, columns = np.triu_indices(rank)
    square = jnp.zeros((len(linear), rank, rank), linear.dtype)
    square = square.at[:, rows, columns].set(power[:, None] * quadratic)
    square = square.at[:, columns, rows].set(power[:, None] * quadratic)
    finite = jnp.isfinite(prior.concentration)
    pull = pull_towards_mean(num_pairs, prior)[:, None] * mean
    solved, good = _newton(square, power[:, None] * linear, pull, mean)
    empty = num_pairs == 0
    found = jnp.where(finite, solved, mean)
    found = jnp.where(empty[:, None], prior.mean[None], found)
    return found, good | empty | ~finite


@jax.vmap
def _newton(square, linear, pull, start):
    """Minimises ½ pᵀ H p − b·p − Σ_k c_k log p_k on the simplex, primal-dual.

    With slacks s the conditions are H p − b − s = ν 1, p s = c, Σ p = 1. The barrier
    comes down to c geometrically, so that c_k = 0 is legal; in the coordinates
    √(p / s) the system is I plus a positive semi-definite matrix.
    """
    eps = jnp.finfo(linear.dtype).eps
    size = jnp.max(jnp.abs(square)) + jnp.max(jnp.abs(linear)) + jnp.sum(pull)
    size = jnp.where(size > 0, size, 1)
    square, linear, pull = square / size, linear / size, pull / size
    eye = jnp.eye(len(linear), dtype=linear.dtype)
    p = jnp.maximum(start, 1e-3 / len(linear))
    p = p / jnp.sum(p)
    goal = jnp.maximum(pull, eps / 10)

    def rounds(carry, barrier):
        p, s = carry
        target = jnp.maximum(goal, barrier)
        g = _dot(square, p) - linear
        root = jnp.sqrt(p / s)
        system = root[:, None] * square * root[None] + eye
        rhs = jnp.stack([root * (target / p - g), root], axis=1)
        factor = cholesky(system)
        solution = solve_upper(factor, solve_lower(factor, rhs))
        move, normal = root * solution[:, 0], root * solution[:, 1]
        dp = move - normal * jnp.sum(move) / jnp.sum(normal)
        ds = target / p - s - s / p * dp
        length = jnp.minimum(1, 0.95 * jnp.minimum(_reach(p, dp), _reach(s, ds)))
        p = p + length * dp
        return (p / jnp.sum(p), s + length * ds), None

    barriers = 0.1 * 0.3 ** jnp.arange(_STEPS, dtype=linear.dtype)
    s = jnp.maximum(goal, 0.1) / p
    (p, s), _ = lax.scan(rounds, (p, s), barriers)
    g = _dot(square, p) - linear
    slack = goal / p
    left = g - slack
    left = left - jnp.sum(p * left)
    return p, jnp.sum(p * jnp.abs(left)) < 1e-4


def _reach(x, dx):
    """How far along dx until an entry of x > 0 vanishes."""
    return jnp.min(jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, -1), jnp.inf))
