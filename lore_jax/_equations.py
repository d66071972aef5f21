"""The equations that everything shares: pure functions of arrays, without checks."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lore_jax._backend import EXACT, tuning


def product(features, basis):
    """Features · V in the wider of the two dtypes: one read of the table.

    On an accelerator a bfloat16 table is multiplied as it is, with V in three bfloat16
    parts that are exact together, and sums in float32: half the bytes of a float32
    table.
    """
    features, basis = jnp.asarray(features), jnp.asarray(basis)
    dtype = jnp.promote_types(features.dtype, basis.dtype)
    halves = features.dtype == jnp.bfloat16 and dtype == jnp.float32
    if halves and tuning(features).splits_bfloat16:
        return _split_product(features, basis)
    return _product(features.astype(dtype), basis.astype(dtype))


def bfloat16_parts(values: jax.Array) -> jax.Array:
    """float32[n, K] as bfloat16[n, 3 K], three parts whose sum is exact."""
    parts, rest = [], values
    for _ in range(3):
        # XLA may leave out a conversion there and back; it keeps `reduce_precision`.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.concatenate(parts, axis=1)


def _sum_of_parts(joined):
    return sum(jnp.split(joined, 3, axis=-1))


def _by_parts(features, basis):
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return _sum_of_parts(dot(features, bfloat16_parts(basis)))


def _back_by_parts(features, slopes):
    """Featuresᵀ · G, float[D, K]."""
    flat = features.reshape(-1, features.shape[-1])
    parts = bfloat16_parts(slopes.reshape(-1, slopes.shape[-1]))
    back = jnp.matmul(parts.T, flat, preferred_element_type=jnp.float32)
    return _sum_of_parts(back.T)


@jax.custom_jvp
def _split_product(features, basis):
    return _by_parts(features, basis)


def _split_rule(primals, tangents):
    (features, basis), (dfeatures, dbasis) = primals, tangents
    moves = []
    if not isinstance(dfeatures, SymbolicZero):
        moves.append(_plain(dfeatures.astype(basis.dtype), basis))
    if not isinstance(dbasis, SymbolicZero):
        # Transposed by hand: the parts of V are no linear function of V to JAX.
        call = jax.custom_derivatives.linear_call
        moves.append(call(_by_parts, _back_by_parts, features, dbasis))
    return _split_product(*primals), functools.reduce(jnp.add, moves)


_split_product.defjvp(_split_rule, symbolic_zeros=True)


@jax.custom_jvp
def _product(features, basis):
    rank = basis.shape[1]
    widths = tuning().product_columns
    width = next((n for n in widths if n // 2 < rank <= n), rank)
    return _plain(features, jnp.pad(basis, ((0, 0), (0, width - rank))))[..., :rank]


def _plain(features, basis):
    # XLA would merge the transpose into its gradient featuresᵀ · G and, on a CPU, run
    # that ten times slower; behind the barrier the gradient is (Gᵀ · features)ᵀ.
    transposed = lax.optimization_barrier(basis.T)
    return jnp.matmul(features, transposed.T, precision=EXACT)


def _product_rule(primals, tangents):
    # By `_plain`: more columns would only slow the transpose down.
    (features, basis), (dfeatures, dbasis) = primals, tangents
    moves = [
        _plain(*factors)
        for factors in ((dfeatures, basis), (features, dbasis))
        if not any(isinstance(x, SymbolicZero) for x in factors)
    ]
    return _product(*primals), functools.reduce(jnp.add, moves)


_product.defjvp(_product_rule, symbolic_zeros=True)


def mix(proj: jax.Array, weights: jax.Array, temperature=1.0) -> jax.Array:
    """Σ_k proj[..., k] · weights[..., k] / T, broadcasting leading axes."""
    return jnp.einsum("...k,...k->...", proj, weights, precision=EXACT) / temperature


def pair_rewards(proj, chosen, rejected):
    """z[n] = proj[chosen[n]] − proj[rejected[n]]; proj[chosen[n]] without a second."""
    z = proj[chosen]
    return z if rejected is None else z - proj[rejected]


@jax.jit
def pair_margins(z, weights, user):
    """z_n · p_user[n], float[N]."""
    return mix(z, weights[user])


def pair_loss(margin: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """−y log σ(m) − (1 − y) log σ(−m), finite for every m; y = 1 without labels."""
    if label is None:
        return jax.nn.softplus(-margin)
    return label * jax.nn.softplus(-margin) + (1 - label) * jax.nn.softplus(margin)


@functools.partial(jax.jit, static_argnames="num_users")
def user_shares(
    weight: jax.Array, user: jax.Array, num_users: int
) -> tuple[jax.Array, jax.Array]:
    """Each pair's share of its user's weight, float[N], and that weight, float[U]."""
    total = user_sums(weight, user, num_users)
    return weight / jnp.where(total > 0, total, 1)[user], total


def user_sums(values: jax.Array, user: jax.Array, num_users: int) -> jax.Array:
    """Sum over each user's pairs of values float[N] in stored order: float[U]."""
    return jax.ops.segment_sum(values, user, num_users, indices_are_sorted=True)


@functools.partial(jax.jit, static_argnames="num_users")
def user_means(values, weight, user, num_users: int) -> jax.Array:
    """Weighted mean over each user's pairs, float[U]; NaN where the weights are 0."""
    weight = jnp.ones_like(values) if weight is None else weight.astype(values.dtype)
    share, total = user_shares(weight, user, num_users)
    mean = user_sums(share * values, user, num_users)
    return jnp.where(total > 0, mean, jnp.nan)


def pair_coefficients(prefs, weighting: str, dtype) -> jax.Array:
    """What each pair counts in the loss, float[N]: see `losses.pair_coefficients`."""
    size = prefs.chosen.shape[0]
    if prefs.sample_weight is None:
        weight = jnp.ones(size, dtype)
    else:
        weight = jnp.asarray(prefs.sample_weight).astype(dtype)
    if weighting == "users":
        return user_shares(weight, prefs.user, prefs.num_users)[0]
    total = jnp.sum(weight)
    return weight / jnp.where(total > 0, total, 1)


def l2_anchor(basis, anchor):
    """Σ_k ‖V_k − v_ref‖²."""
    return jnp.sum((basis - anchor[:, None]) ** 2)


def cosine_anchor(basis, anchor):
    """mean_k (1 − cos(V_k, v_ref)); a zero column counts as orthogonal."""
    norms = jnp.linalg.norm(basis, axis=0) * jnp.linalg.norm(anchor)
    tiny = jnp.finfo(norms.dtype).tiny
    along = jnp.matmul(anchor, basis, precision=EXACT)
    return jnp.mean(1 - along / jnp.maximum(norms, tiny))
