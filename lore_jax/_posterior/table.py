"""Likelihoods of users under every atom of the prior, and their posterior mean.

With atoms a on the simplex and prior weights π, a user with pairs z_n has posterior
weights ∝ π_a · (Π_n σ(z_n · a / T))^η with η = (number of pairs)^−γ.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lore_jax._backend import EXACT, tuning
from lore_jax.prior import Prior, likelihood_power

_WRITTEN = 12  # directions up to which margins are written out, not multiplied

_PART = 160  # pairs of one user in a row; more are taken side by side, as users are

_GROUP = 10  # pairs under one logarithm: Σ log(1 + e) = log Π (1 + e) ≤ 10 log 2


def log_likelihoods(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    atoms: jax.Array,
    *,
    unit_weights: bool = False,
) -> jax.Array:
    """Log-likelihood of users under every atom, a chunk of users at a time.

    Args:
      z: float[U, P, K] at T = 1.
      weight: float[U, P], 0 for padding.
      label: float[U, P] or None.
      atoms: float[A, K].
      unit_weights: weights are 0 or 1, so that one logarithm serves a group of pairs:
        Σ log(1 + e) = log Π (1 + e).

    Returns:
      float[U, A].
    """
    users, length = weight.shape
    part = min(length, _PART)
    parts = -(-length // part)

    def side_by_side(x):
        pad = ((0, 0), (0, parts * part - length)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, pad).reshape(-1, part, *x.shape[2:])

    arrays = jax.tree.map(side_by_side, (z, weight, label))
    function = functools.partial(likelihood_table, atoms, unit_weights)
    table = _in_chunks(function, len(atoms), unit_weights, *arrays)
    return table.reshape(users, parts, -1).sum(1)


def atom_posterior(table, prior: Prior, power=None) -> jax.Array:
    """q_a ∝ π_a L_ua^η, float[U, A], from log-likelihoods float[U, A] and η float[U].

    `posterior_mean` and a training step have it with users minor-most, fused into what
    follows; their tests compare them with this.
    """
    if power is not None:
        table = power[:, None] * table
    return jax.nn.softmax(table + prior.log_weights[None])


def group_size(num_pairs: int, unit_weights: bool) -> int:
    """How many of P pairs `likelihood_table` takes at once."""
    if not unit_weights:
        return 1
    return num_pairs if num_pairs < 6 else min(_GROUP, max(5, -(-num_pairs // 2)))


def chunk_users(num_atoms: int) -> int:
    """Users whose tables fill a core's cache, or the cores of an accelerator."""
    return 1 << max(1, tuning().table_cells // num_atoms).bit_length() - 1


def users_last(group: int, x: jax.Array) -> jax.Array:
    """float[B, P, …] as groups of g pairs with users minor-most, float[G, g, …, B]."""
    pad = ((0, 0), (0, -x.shape[1] % group)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(len(x), -1, group, *x.shape[2:])
    return jnp.moveaxis(x, 0, -1)


def likelihood_table(atoms, unit_weights, z, weight, label):
    """Log-likelihood of a chunk of users under every atom: float[A, B].

    log P(y) = log σ(m) − (1 − y) m, for z float[G, g, K, B] and the others float[G, g,
    B] from `users_last`. The loop over groups also keeps XLA from working out the
    logarithms once for every reader of the table. Padding becomes pairs with margin 0,
    log 2 each, because it vectorises logarithms only without a weight to broadcast.
    """
    rank = atoms.shape[1]
    written = unit_weights and len(z) > 1 and rank <= _WRITTEN
    shared = functools.partial(jnp.matmul, atoms, precision=EXACT)

    def margins(z, i):
        if not written:
            return shared(z[i])
        # With z[i][k] for z[i, k] XLA's loop is five times slower.
        parts = (atoms[:, k, None] * z[i, k][None] for k in range(rank))
        return functools.reduce(jnp.add, parts)

    def add(total, pairs):
        z, weight = pairs
        low, product = 0, 1
        for i in range(len(z)):
            m = margins(z, i)
            e = jnp.exp(-jnp.abs(m))
            if unit_weights:
                low, product = low + jnp.minimum(m, 0), product * (1 + e)
            else:
                low = low + weight[i][None] * (jnp.minimum(m, 0) - jnp.log1p(e))
        return total + (low - jnp.log(product) if unit_weights else low), None

    # Varies over a mesh like z does, so that shard_map accepts the loop.
    start = jnp.where(False, z[0, 0, 0], 0)
    if unit_weights:
        padding = weight.shape[0] * weight.shape[1] - jnp.sum(weight, axis=(0, 1))
        start = start + math.log(2) * padding
    start = jnp.broadcast_to(start, (len(atoms), z.shape[-1]))
    if label is not None:
        start = start - shared(jnp.sum((weight * (1 - label))[:, :, None] * z, (0, 1)))
    if unit_weights:
        z = z * weight[:, :, None]
    return lax.scan(add, start, (z, weight))[0]


def _in_chunks(function, num_atoms, unit_weights, z, weight, label):
    """`function` of (z, weight, label) from `users_last`, float[…, B]: float[U, …]."""
    users, length = weight.shape
    lay_out = functools.partial(users_last, group_size(length, unit_weights))
    size = min(chunk_users(num_atoms), users)
    whole = users // size * size
    arrays = z, weight, label

    def run(arrays):
        return jnp.moveaxis(function(*arrays), -1, 0)

    head = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), arrays)
    out = lax.map(run, jax.tree.map(jax.vmap(lay_out), head))
    out = out.reshape(whole, *out.shape[2:])
    if whole == users:
        return out
    tail = jax.tree.map(lambda x: lay_out(x[whole:]), arrays)
    return jnp.concatenate([out, run(tail)])


def posterior_mean(
    z: jax.Array,
    weight: jax.Array,
    label: jax.Array | None,
    prior: Prior,
    *,
    unit_weights: bool = False,
) -> jax.Array:
    """p̄ = Σ_a posterior_a · atom_a, float[U, K]; the arguments as above."""

    def mean_of(table, total):
        power = likelihood_power(total, prior.tempering)
        joint = power[None] * table + prior.log_weights[:, None]
        share = jnp.exp(joint - lax.stop_gradient(jnp.max(joint, axis=0))[None])
        mean = jnp.matmul(prior.atoms.T, share, precision=EXACT)
        return mean / jnp.sum(share, axis=0)[None]

    def users(z, weight, label):
        table = likelihood_table(prior.atoms, unit_weights, z, weight, label)
        return mean_of(table, jnp.sum(weight, axis=(0, 1)))

    if weight.shape[1] <= _PART:
        return _in_chunks(users, len(prior.atoms), unit_weights, z, weight, label)
    arrays = z, weight, label, prior.atoms
    table = log_likelihoods(*arrays, unit_weights=unit_weights)
    return mean_of(table.T, jnp.sum(weight, axis=1)).T
