"""Pure kernels of the posterior around the refined weights, and its covariance.

Around the weights p that `adapt` returns, a user's posterior is the density

    (1 − h²) Σ_a q_a δ(w − p − a + p̃) + h² N(w; p, W),   W = (C⁺ + H)⁻¹

with mean p and covariance

    Σ = (1 − h²) B + h² W,   B = Σ_a q_a (a − p̃)(a − p̃)ᵀ.

q is the posterior over the prior's atoms and p̃ their mean, C the prior's covariance
and H = Σ_n s_n(1 − s_n) z_n z_nᵀ the curvature of −loglik at p. Both count every pair
in full: γ, κ and δ say how p is found, not how much is known. h is the distance of
neighbouring atoms relative to the deviation of q,

    h² = min(1, 4 (Σ_a q_a²)^(2 / (K − 1))),

and 0 at κ = ∞, where the atoms are the whole posterior. Atoms that are dense under q
give its shape; where one or few are left, a normal density with the prior's moments
replaces them. Without pairs B = W = C, so that Σ is the prior's covariance. B and C are
covariances of points in [0, 1] and W ≼ C, so that no deviation is above 1/2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lore_jax._backend import EXACT, cholesky, solve_lower
from lore_jax._posterior.table import atom_posterior, log_likelihoods
from lore_jax.prior import Prior, likelihood_power, mixture_mean

_LARGEST = 1e15  # the square of a larger margin overflows in float32

_MOST = 1e4  # most information of a pair: its margin's deviation is 1 % of the prior's


class PosteriorMoments(NamedTuple):
    """The posterior of a chunk of users, at T = 1.

    Attributes:
      weights: p, float[B, K].
      probability: the tempered posterior over the atoms, float[B, A].
      mean: p̄, its mean, float[B, K].
      covariance: Σ, float[B, K, K], of the density above.
      atoms: float[A, K].
    """

    weights: jax.Array
    probability: jax.Array
    mean: jax.Array
    covariance: jax.Array
    atoms: jax.Array


@functools.partial(jax.jit, static_argnames="unit_weights")
def moments_of(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    weights: jax.Array,
    prior: Prior,
    *,
    unit_weights: bool = False,
) -> PosteriorMoments:
    """The moments of users with pairs z float[B, P, K] (T = 1) and weights [B, K]."""
    table = log_likelihoods(z, weight, label, prior.atoms, unit_weights=unit_weights)
    total = jnp.sum(weight, axis=1)
    power = likelihood_power(total, prior.tempering)
    probability = atom_posterior(table, prior, power)
    mean = mixture_mean(probability, prior.atoms)
    share = atom_posterior(table, prior)
    centre = mixture_mean(share, prior.atoms)
    between = lax.map(_between(prior.atoms), (share, centre), batch_size=128)
    own = _between(prior.atoms)((jax.nn.softmax(prior.log_weights), prior.mean))
    normal = normal_covariance(z, weight, weights, own)
    part = jnp.where(jnp.isfinite(prior.concentration), _normal_share(share, own), 0)
    covariance = between + part[:, None, None] * (normal - between)
    covariance = jnp.where((total == 0)[:, None, None], own[None], covariance)
    return PosteriorMoments(weights, probability, mean, covariance, prior.atoms)


def _between(atoms):
    """(q float[A], p̃ float[K]) → Σ_a q_a (a − p̃)(a − p̃)ᵀ, without cancellation."""

    def user(arrays):
        probability, mean = arrays
        centred = atoms - mean[None]
        return jnp.matmul(centred.T * probability[None], centred, precision=EXACT)

    return user


def _normal_share(share, own):
    """h² of users with q float[B, A]: float[B]."""
    alike = jnp.sum(share**2, axis=1)  # 1 / the number of atoms that share q
    return jnp.minimum(1, 4 * alike ** (2 / max(len(own) - 1, 1)))


def normal_covariance(
    z: jax.Array, weight: jax.Array, weights: jax.Array, own: jax.Array
) -> jax.Array:
    """W = (C⁺ + H)⁻¹ on the range of C: float[B, K, K].

    With C = R Rᵀ it is R (I + Rᵀ H R)⁻¹ Rᵀ, which needs no inverse of C.

    Args:
      z: float[B, P, K].
      weight: float[B, P].
      weights: p, float[B, K].
      own: C, float[K, K].
    """
    values, vectors = jnp.linalg.eigh(own)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
    z = jnp.clip(z, -_LARGEST, _LARGEST)
    m = jnp.einsum("bpk,bk->bp", z, weights, precision=EXACT)
    side = jnp.einsum("bpk,kl->bpl", z, root, precision=EXACT)
    length = jnp.sum(side**2, axis=2)
    curvature = jax.nn.sigmoid(m) * jax.nn.sigmoid(-m)
    curvature = jnp.minimum(curvature, _MOST / jnp.maximum(length, _MOST))
    curvature = weight * curvature
    data = jnp.einsum("bp,bpk,bpl->bkl", curvature, side, side, precision=EXACT)
    # Rounding leaves `data` indefinite by a few eps times its trace.
    ridge = 1 + 8 * jnp.finfo(z.dtype).eps * jnp.sum(curvature * length, axis=1)
    system = data + ridge[:, None, None] * jnp.eye(len(own), dtype=z.dtype)[None]
    lower = jax.vmap(cholesky)(system)
    columns = jnp.broadcast_to(root.T[None], system.shape)
    half = jax.vmap(solve_lower)(lower, columns)
    return jnp.einsum("bik,bil->bkl", half, half, precision=EXACT)


def standard_deviation(moments: PosteriorMoments) -> jax.Array:
    """Posterior standard deviation of every weight, float[B, K], at most 1/2."""
    variance = jnp.diagonal(moments.covariance, axis1=1, axis2=2)
    return jnp.sqrt(jnp.clip(variance, 0, 0.25))


@jax.jit
def margin_moments(
    moments: PosteriorMoments, z: jax.Array, row: jax.Array
) -> jax.Array:
    """Mean and variance of the margins of z float[B, K], users row int[B]: [B, 2]."""
    mean = jnp.einsum("bk,bk->b", z, moments.weights[row], precision=EXACT)
    covariance = moments.covariance[row]
    variance = jnp.einsum("bk,bkl,bl->b", z, covariance, z, precision=EXACT)
    return jnp.stack([mean, jnp.maximum(variance, 0)], axis=1)
