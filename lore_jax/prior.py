"""The prior over users and its posterior: a finite mixture on the simplex.

With atoms a on the simplex and prior weights π, a user with pairs z_n has posterior
weights ∝ π_a · (Π_n σ(z_n · a / T))^η with η = (number of pairs)^−γ.
`adapt` refines their mean with a pull κ_n = κ (n / 10)^−δ.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks
from lore_jax.backend import sized
from lore_jax.types import Prior

_EXACT = lax.Precision.HIGHEST
_CHUNK_CELLS = 1 << 15, 1 << 22  # users × atoms
_WRITTEN = 12  # directions up to which margins are written out, not multiplied
_PART = 160  # pairs of one user in a row; more are taken side by side, as users are
_GROUP = 10  # pairs under one logarithm: Σ log(1 + e) = log Π (1 + e) ≤ 10 log 2


def spread_atoms(key: jax.Array, rank: int, num_atoms: int, dtype=None) -> jax.Array:
    """Dirichlet(1) draws and their cyclic shifts: float[A, K], A ≥ `num_atoms`.

    The shifts put the mean of the atoms at the centre of the simplex.
    """
    draws = jax.random.exponential(key, (-(-num_atoms // rank), rank))
    draws = draws / jnp.sum(draws, axis=1, keepdims=True)
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
    _checks.check_finite(prior.log_weights, "prior.log_weights")
    for name in ("concentration", "tempering", "spread", "decay", "margin_scale"):
        value = getattr(prior, name)
        if np.shape(value) != ():
            raise ValueError(
                f"prior.{name} must be one number, got shape {np.shape(value)}"
            )
        if _checks.is_traced(value):
            continue
        if np.asarray(value).dtype.kind not in "fiu" and not _checks.is_floating(
            np.asarray(value).dtype
        ):
            raise TypeError(f"prior.{name} must be one number, got {value!r}")
        number = float(value)
        if name == "decay" and not math.isfinite(number):
            raise ValueError(f"prior.decay must be finite, got {number:g}")
        if name != "decay" and not number >= 0:
            raise ValueError(f"prior.{name} must be at least 0, got {number:g}")
        if name != "concentration" and number == math.inf:
            raise ValueError(f"prior.{name} must be finite, got inf")
        if name == "margin_scale" and number == 0:
            raise ValueError("prior.margin_scale must be above 0, got 0")
    _checks.check_positive(prior.temperature, "prior.temperature")


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


def group_size(num_pairs: int, unit_weights: bool) -> int:
    """How many of P pairs `likelihood_table` takes at once."""
    if not unit_weights:
        return 1
    return num_pairs if num_pairs < 6 else min(_GROUP, max(5, -(-num_pairs // 2)))


def chunk_users(num_atoms: int) -> int:
    """Users whose tables fill a core's cache, or the cores of an accelerator."""
    return 1 << max(1, sized(*_CHUNK_CELLS) // num_atoms).bit_length() - 1


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
    shared = functools.partial(jnp.matmul, atoms, precision=_EXACT)

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


def likelihood_power(num_pairs: jax.Array, tempering: jax.Array) -> jax.Array:
    """η = n^−γ, the power of the likelihood of a user with n (weighted) pairs."""
    return jnp.maximum(num_pairs, 1) ** -tempering


def pull_towards_mean(num_pairs: jax.Array, prior: Prior) -> jax.Array:
    """κ_n = κ (n / 10)^−δ of users with n (weighted) pairs; 1 where κ = ∞."""
    finite = jnp.isfinite(prior.concentration)
    pull = jnp.where(finite, prior.concentration, 1)
    return pull * (jnp.maximum(num_pairs, 1) / 10) ** -prior.decay


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
        mean = jnp.matmul(prior.atoms.T, share, precision=_EXACT)
        return mean / jnp.sum(share, axis=0)[None]

    def users(z, weight, label):
        table = likelihood_table(prior.atoms, unit_weights, z, weight, label)
        return mean_of(table, jnp.sum(weight, axis=(0, 1)))

    if weight.shape[1] <= _PART:
        return _in_chunks(users, len(prior.atoms), unit_weights, z, weight, label)
    arrays = z, weight, label, prior.atoms
    table = log_likelihoods(*arrays, unit_weights=unit_weights)
    return mean_of(table.T, jnp.sum(weight, axis=1)).T


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
