"""Pure kernels of the posterior's spread around the refined weights.

Around the weights p that `adapt` returns, the posterior has covariance

    Σ = (tr B · B + tr L · L) / (tr B + tr L),   B = Σ_a q_a (a − p̄)(a − p̄)ᵀ

with q the posterior over the prior's atoms, p̄ their mean and L Laplace's at p, which
vanishes at κ = ∞. B is right while several atoms share the posterior and goes to 0
where many pairs leave one atom alone; there L takes over. Where both say the same, so
does Σ: their sum would count it twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lore_jax.backend import cholesky, solve_lower
from lore_jax.prior import likelihood_power, log_likelihoods, pull_towards_mean
from lore_jax.types import Prior, mixture_mean

_EXACT = lax.Precision.HIGHEST


class Mixture(NamedTuple):
    """The posterior of a chunk of users, at T = 1.

    Attributes:
      weights: p, float[B, K].
      probability: q, float[B, A].
      mean: p̄, float[B, K].
      covariance: Σ, float[B, K, K].
      atoms: float[A, K].
    """

    weights: jax.Array
    probability: jax.Array
    mean: jax.Array
    covariance: jax.Array
    atoms: jax.Array


@functools.partial(jax.jit, static_argnames="unit_weights")
def mixture_of(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    weights: jax.Array,
    prior: Prior,
    *,
    unit_weights: bool = False,
) -> Mixture:
    """The mixture of users with pairs z float[B, P, K] (T = 1) and weights [B, K].

    With D = diag(p / √p̄), Laplace's precision in D's coordinates is
    η Σ_n s_n(1 − s_n) (Dz_n)(Dz_n)ᵀ + κ_n I, restricted to Σ_k dp_k = 0.
    """
    table = log_likelihoods(z, weight, label, prior.atoms, unit_weights=unit_weights)
    total = jnp.sum(weight, axis=1)
    power = likelihood_power(total, prior.tempering)
    probability = jax.nn.softmax(power[:, None] * table + prior.log_weights[None])
    mean = mixture_mean(probability, prior.atoms)
    m = jnp.einsum("bpk,bk->bp", z, weights, precision=_EXACT)
    curvature = power[:, None] * weight * jax.nn.sigmoid(m) * jax.nn.sigmoid(-m)
    data = jnp.einsum("bp,bpk,bpl->bkl", curvature, z, z, precision=_EXACT)
    between = lax.map(_between(prior.atoms), (probability, mean), batch_size=128)
    within = laplace(data, weights, mean, pull_towards_mean(total, prior))
    within = jnp.where(jnp.isfinite(prior.concentration), within, 0)
    covariance = _larger(between, within)
    return Mixture(weights, probability, mean, covariance, prior.atoms)


def _larger(first, second):
    """Mean of covariances float[B, K, K], each counting as much as it is large."""
    sizes = [jnp.trace(x, axis1=1, axis2=2)[:, None, None] for x in (first, second)]
    total = sizes[0] + sizes[1]
    both = sizes[0] * first + sizes[1] * second
    return both / jnp.where(total > 0, total, 1)


def _between(atoms):
    """(q float[A], p̄ float[K]) → Σ_a q_a (a − p̄)(a − p̄)ᵀ, without cancellation."""

    def user(arrays):
        probability, mean = arrays
        centred = atoms - mean[None]
        return jnp.matmul(centred.T * probability[None], centred, precision=_EXACT)

    return user


def laplace(
    data: jax.Array, weights: jax.Array, mean: jax.Array, pull: jax.Array
) -> jax.Array:
    """Inverse of data + κ diag(p̄ / p²) on the plane Σ_k dp_k = 0: float[B, K, K].

    Args:
      data: curvature of −η · loglik, float[B, K, K].
      weights: p, float[B, K].
      mean: p̄, float[B, K].
      pull: κ, float[B].
    """
    tiny = jnp.finfo(weights.dtype).tiny
    scale = weights / jnp.sqrt(jnp.maximum(mean, tiny))
    pull = jnp.clip(pull, 1e-3, 1e6)[:, None, None]
    eye = jnp.eye(weights.shape[1], dtype=weights.dtype)
    system = scale[:, :, None] * data * scale[:, None] / pull + eye[None]
    root = jax.vmap(cholesky)(system)
    columns = jnp.concatenate(
        [scale[:, :, None] * eye[None], scale[:, :, None]], axis=2
    )
    half = jax.vmap(solve_lower)(root, columns)
    half, normal = half[..., :-1], half[..., -1:]
    length = jnp.sum(normal**2, axis=1, keepdims=True)
    along = jnp.sum(normal * half, axis=1, keepdims=True)
    half = half - normal * along / jnp.where(length > 0, length, 1)
    return jnp.einsum("bik,bil->bkl", half, half, precision=_EXACT) / pull


def deviation(mixture: Mixture) -> jax.Array:
    """Posterior standard deviation of every weight, float[B, K]."""
    variance = jnp.diagonal(mixture.covariance, axis1=1, axis2=2)
    return jnp.sqrt(jnp.maximum(variance, 0))


@jax.jit
def margin_moments(mixture: Mixture, z: jax.Array, row: jax.Array) -> jax.Array:
    """Mean and variance of the margins of z float[B, K], users row int[B]: [B, 2]."""
    mean = jnp.einsum("bk,bk->b", z, mixture.weights[row], precision=_EXACT)
    spread = mixture.covariance[row]
    variance = jnp.einsum("bk,bkl,bl->b", z, spread, z, precision=_EXACT)
    return jnp.stack([mean, jnp.maximum(variance, 0)], axis=1)
