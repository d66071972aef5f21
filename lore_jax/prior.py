"""The prior over users and its posterior: a finite mixture on the simplex.

With atoms a on the simplex and prior weights π, a user with pairs z_n has posterior
weights ∝ π_a · (Π_n σ(z_n · a / T))^η with η = (number of pairs)^−γ.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks, population
from lore_jax.backend import sized
from lore_jax.types import Prior, mixture_mean

_EXACT = lax.Precision.HIGHEST
_CHUNK_CELLS = 1 << 18, 1 << 25  # users × pairs × atoms: what a core's cache holds
_GROUP = 10  # pairs under one logarithm: Σ log(1 + e) = log Π (1 + e) ≤ 10 log 2


def spread_atoms(key: jax.Array, rank: int, num_atoms: int, dtype=None) -> jax.Array:
    """Dirichlet(1) draws and their cyclic shifts: float[A, K], A ≥ `num_atoms`.

    The shifts put the mean of the atoms at the centre of the simplex.
    """
    draws = population.dirichlet_users(key, -(-num_atoms // rank), 1.0, rank)
    shifts = [jnp.roll(draws, k, axis=1) for k in range(rank)]
    spread = jnp.stack(shifts, 1).reshape(-1, rank)
    return spread.astype(dtype or jnp.result_type(float))


def uniform_prior(rank: int, temperature: float = 1.0, num_atoms: int = 512) -> Prior:
    """Dirichlet(1) as atoms: what `adapt` believes when it gets no prior."""
    atoms = spread_atoms(jax.random.key(0), rank, num_atoms)
    return Prior(
        atoms=atoms,
        log_weights=jnp.full(len(atoms), -math.log(len(atoms)), atoms.dtype),
        concentration=jnp.asarray(float(rank), atoms.dtype),
        tempering=jnp.zeros((), atoms.dtype),
        temperature=temperature,
    )


def check_prior(prior: Prior, rank: int) -> None:
    """Raises unless the prior's arrays fit together and to rank K.

    Raises:
      TypeError: `prior` is no `Prior`.
      ValueError: a shape, or a number, is wrong; the message names it.
    """
    if not isinstance(prior, Prior):
        raise TypeError(f"prior must be a Prior, got {type(prior)}")
    shape = np.shape(prior.atoms)
    if len(shape) != 2 or shape[1] != rank or not shape[0]:
        raise ValueError(f"prior.atoms must be float[A, K] with K={rank}, got {shape}")
    if np.shape(prior.log_weights) != shape[:1]:
        raise ValueError(
            f"prior.log_weights must be float[A] with A={shape[0]}, got shape "
            f"{np.shape(prior.log_weights)}"
        )
    _checks.check_simplex(prior.atoms, "prior.atoms")
    for name in ("tempering", "concentration"):
        value = getattr(prior, name)
        if not _checks.is_traced(value) and not value >= 0:
            raise ValueError(f"prior.{name} must be at least 0, got {float(value):g}")
    _checks.check_positive(prior.temperature, "prior.temperature")


def atom_likelihood(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    atoms: jax.Array,
    *,
    unit_weights: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihood of users under every atom, and its slope in the margins.

    Args:
      z: float[B, P, K] at T = 1.
      weight: float[B, P], 0 for padding.
      label: float[B, P] or None.
      atoms: float[A, K].
      unit_weights: weights are 0 or 1, so that one logarithm serves all pairs of a
        group of pairs: Σ log(1 + e) = log Π (1 + e), which overflows only beyond 120.

    Returns:
      (float[B, A], float[B, P, A]); the slope is not yet weighted.
    """
    m = jnp.einsum("bpk,ak->bpa", z, atoms, precision=_EXACT)
    weight = weight[..., None]
    e = jnp.exp(-jnp.abs(m))
    if label is None:
        linear = jnp.minimum(m, 0)
        slope = jnp.where(m > 0, e, 1) / (1 + e)
    else:
        linear = label[..., None] * m - jnp.maximum(m, 0)
        slope = label[..., None] - jnp.where(m > 0, 1, e) / (1 + e)
    linear = jnp.sum(weight * linear, axis=1)
    length = z.shape[1]
    group = length if length <= 100 else 80
    if unit_weights and length % group == 0:
        e = (1 + weight * e).reshape(len(z), -1, group, len(atoms))
        return linear - jnp.sum(jnp.log(jnp.prod(e, axis=2)), axis=1), slope
    return linear - jnp.sum(weight * jnp.log1p(e), axis=1), slope


def log_likelihoods(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    atoms: jax.Array,
    *,
    unit_weights: bool = False,
) -> jax.Array:
    """`atom_likelihood` without the slope, a chunk of users at a time: float[U, A]."""
    table = functools.partial(_table, atoms, unit_weights)
    return _in_chunks(table, len(atoms), z, weight, label)


def _table(atoms, unit_weights, z, weight, label):
    """Log-likelihood of a few users under every atom: float[B, A].

    log P(y) = log σ(m) − (1 − y) m. Padding becomes pairs with margin 0, log 2 each,
    because XLA vectorises the logarithms only without a weight to broadcast.
    """
    users, length, rank = z.shape
    shared = functools.partial(jnp.matmul, precision=_EXACT)
    linear = 0
    if label is not None:
        linear = shared(jnp.einsum("bp,bpk->bk", weight * (1 - label), z), atoms.T)
    if not unit_weights:
        m = shared(z.reshape(-1, rank), atoms.T).reshape(users, length, -1)
        each = jnp.minimum(m, 0) - jnp.log1p(jnp.exp(-jnp.abs(m)))
        return jnp.einsum("bp,bpa->ba", weight, each, precision=_EXACT) - linear
    group = min(length, _GROUP)
    extra = -length % group
    z = jnp.pad(z * weight[..., None], ((0, 0), (0, extra), (0, 0)))
    z = z.reshape(-1, group, rank)
    low, product = 0, 1
    for i in range(group):
        m = shared(z[:, i], atoms.T)
        low = low + jnp.minimum(m, 0)
        product = product * (1 + jnp.exp(-jnp.abs(m)))
    total = (low - jnp.log(product)).reshape(users, -1, len(atoms)).sum(1)
    padding = length + extra - jnp.sum(weight, axis=1, keepdims=True)
    return total + math.log(2) * padding - linear


def _in_chunks(function, num_atoms, z, weight, label):
    """`function` of (z, weight, label), applied to chunks of users: float[U, …]."""
    cells = max(1, sized(*_CHUNK_CELLS) // (z.shape[1] * num_atoms))
    size = min(1 << (cells.bit_length() - 1), len(z))
    whole = len(z) // size * size
    head, tail = (
        jax.tree.map(lambda x, cut=cut: x[cut], (z, weight, label))
        for cut in (slice(whole), slice(whole, None))
    )
    head = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), head)
    out = lax.map(lambda arrays: function(*arrays), head)
    out = out.reshape(whole, *out.shape[2:])
    return out if whole == len(z) else jnp.concatenate([out, function(*tail)])


def likelihood_power(num_pairs: jax.Array, tempering: jax.Array) -> jax.Array:
    """η = n^−γ, the power of the likelihood of a user with n (weighted) pairs."""
    return jnp.maximum(num_pairs, 1) ** -tempering


def posterior_mean(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    prior: Prior,
    *,
    unit_weights: bool = False,
) -> jax.Array:
    """p̄ = Σ_a posterior_a · atom_a, float[U, K]; the arguments as above."""

    def users(z, weight, label):
        table = _table(prior.atoms, unit_weights, z, weight, label)
        power = likelihood_power(jnp.sum(weight, axis=1), prior.tempering)
        joint = power[:, None] * table + prior.log_weights[None]
        return mixture_mean(jax.nn.softmax(joint, axis=-1), prior.atoms)

    return _in_chunks(users, len(prior.atoms), z, weight, label)


@functools.partial(jax.jit, static_argnames="num_steps")
def learn_log_weights(
    log_likelihood: jax.Array,
    *,
    pseudo_count: float = 1.0,
    num_steps: int = 100,
) -> jax.Array:
    """EM for log π on fixed atoms: maximises Σ_u log Σ_a π_a L_ua.

    Args:
      log_likelihood: log L, float[U, A], already tempered.
      pseudo_count: users that are spread evenly over the atoms beforehand.
      num_steps: EM steps.

    Returns:
      float[A], normalised.
    """
    size = log_likelihood.shape[1]
    start = jnp.full(size, -math.log(size), log_likelihood.dtype)

    def step(log_weights, _):
        joint = log_likelihood + log_weights[None]
        share = jax.nn.softmax(joint, axis=-1).sum(0) + pseudo_count / size
        return jnp.log(share / share.sum()), None

    return lax.scan(step, start, length=num_steps)[0]
