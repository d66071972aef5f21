"""The reward r_u(x) = x · V · softmax(w_u) / T, and the two products that cost.

`project` and its transpose are the only operations that touch the feature table.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lore_jax import _checks, _ids, _tables
from lore_jax._backend import sized
from lore_jax._entry import public
from lore_jax.preferences import FeatureSource, Preferences

_EXACT = lax.Precision.HIGHEST

_COLUMNS = 8, 16  # a product with 5 to 7 or 9 to 15 takes up to half as long again


class RewardParams(struct.PyTreeNode):
    """Parameters of the reward r_u(x) = x · V · softmax(w_u) / T.

    Attributes:
      basis: V, float[D, K], shared by every user.
      logits: w, float[U, K], one unconstrained row per user.
    """

    basis: jax.Array
    logits: jax.Array

    @property
    def weights(self) -> jax.Array:
        """float[U, K], softmax(logits): what `adapt`, `score`, `accuracy` take."""
        return jax.nn.softmax(self.logits, axis=-1)


@public()
def init_params(
    key: jax.Array, *, num_users: int, num_features: int, rank: int, dtype=None
) -> RewardParams:
    """Standard normal basis and logits: the start of the published recipes.

    Args:
      key: consumed.
      num_users: U.
      num_features: D.
      rank: K ≥ 1.
      dtype: default JAX's float.

    Returns:
      `RewardParams` with basis float[D, K] and logits float[U, K].

    Raises:
      ValueError: a size is below 1.
    """
    sizes = {"num_users": num_users, "num_features": num_features, "rank": rank}
    for name, size in sizes.items():
        _checks.check_count(size, name)
    dtype = dtype or jnp.result_type(float)
    key_basis, key_logits = jax.random.split(key)
    return RewardParams(
        basis=jax.random.normal(key_basis, (num_features, rank), dtype),
        logits=jax.random.normal(key_logits, (num_users, rank), dtype),
    )


@public()
def mixture_weights(logits: jax.Array) -> jax.Array:
    """P = softmax(w) over the last axis: float[..., K] on the simplex."""
    return jax.nn.softmax(logits, axis=-1)


@public()
def project(features, basis: jax.Array) -> Any:
    """One read of the table: proj = features · V.

    Inputs of float32 are multiplied at full precision; bfloat16 and float16 tables
    keep V and the accumulation in float32.

    Args:
      features: float[..., D], or a `FeatureSource`.
      basis: V, float[D, K].

    Returns:
      float[..., K]; a NumPy array for a `FeatureSource`, which is read block by
      block.

    Raises:
      ValueError: D disagrees, or `basis`, `features` or their product is not finite;
        the message names the row.
      TypeError: `basis` or `features` holds no real numbers.
    """
    _checks.check_basis(basis, _tables.num_columns(features))
    if isinstance(features, FeatureSource):
        blocks = [
            np.asarray(_projected(block, basis)) for block in _tables.blocks(features)
        ]
        proj = np.concatenate(blocks)
    else:
        proj = _projected(features, basis)
    _tables.check_projected(proj, features)
    return proj


def _projected(features, basis):
    features, basis = jnp.asarray(features), jnp.asarray(basis)
    dtype = jnp.promote_types(features.dtype, basis.dtype)
    return _product(features.astype(dtype), basis.astype(dtype))


@jax.custom_jvp
def _product(features, basis):
    """Features · V; on a CPU with as many columns as its matrix product is made for."""
    rank = basis.shape[1]
    wide = next((n for n in sized(_COLUMNS, ()) if n // 2 < rank <= n), rank)
    return _plain(features, jnp.pad(basis, ((0, 0), (0, wide - rank))))[..., :rank]


def _plain(features, basis):
    # XLA would merge the transpose into its gradient featuresᵀ · G and, on CPU, run
    # that ten times slower; behind the barrier the gradient is (Gᵀ · features)ᵀ.
    transposed = lax.optimization_barrier(basis.T)
    return jnp.matmul(features, transposed.T, precision=_EXACT)


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


def mix(proj: jax.Array, weights: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Σ_k proj[..., k] · weights[..., k] / T, broadcasting leading axes."""
    return jnp.einsum("...k,...k->...", proj, weights, precision=_EXACT) / temperature


@public()
def reward(
    x: jax.Array, basis: jax.Array, logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Rewards r(x) = x · V · softmax(w) / T.

    Args:
      x: float[..., D].
      basis: V, float[D, K].
      logits: w, float[..., K]; leading axes broadcast against those of `x`.
      temperature: T > 0.

    Returns:
      float[...].

    Raises:
      ValueError: D or K disagree, or T is not positive.

    References:
      Bose et al., LoRe: Personalizing LLMs via Low-Rank Reward Modeling, 2025
      (https://arxiv.org/abs/2504.14439), section 3.
    """
    _checks.check_same_trailing(basis, logits, x)
    _checks.check_positive(temperature, "temperature")
    return mix(project(x, basis), mixture_weights(logits), temperature)


@public()
def reward_from_weights(
    x: jax.Array, basis: jax.Array, weights: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """`reward` for weights that already are on the simplex, float[..., K].

    Raises:
      ValueError: shapes disagree, T is not positive, or a row of `weights` is not on
        the simplex (logits passed by mistake).
    """
    _checks.check_same_trailing(basis, weights, x, "weights")
    _checks.check_positive(temperature, "temperature")
    _checks.check_simplex(weights)
    return mix(project(x, basis), weights, temperature)


def pair_rewards(proj, prefs: Preferences):
    """z[n] = proj[chosen[n]] − proj[rejected[n]], float[N, K], in stored order."""
    z = proj[prefs.chosen]
    return z if prefs.rejected is None else z - proj[prefs.rejected]


@public()
def margins(
    basis: jax.Array,
    weights: jax.Array,
    prefs: Preferences,
    temperature: float = 1.0,
) -> jax.Array:
    """Margins m_n = z_n · p_user[n] / T of every pair, in the caller's order.

    Args:
      basis: V, float[D, K].
      weights: p, float[U, K] on the simplex, row u for user u of `prefs`; or what
        `adapt` or `fit` returned, whose users are matched by name where they have
        names.
      prefs: N pairs of U users.
      temperature: T > 0.

    Returns:
      float[N]; positive where the chosen response gets the higher reward.

    Raises:
      ValueError: shapes disagree or weights are not on the simplex.
    """
    stored = checked_margins(basis, weights, prefs, temperature)
    return jnp.zeros_like(stored).at[prefs.order].set(stored)


def checked_margins(
    basis: jax.Array,
    weights: jax.Array,
    prefs: Preferences,
    temperature: float = 1.0,
) -> jax.Array:
    """`margins` in stored order; it raises what they raise."""
    _checks.check_type(prefs, Preferences, "prefs")
    weights = _ids.match_weights(weights, prefs.ids and prefs.ids.users)
    _check_users(basis, weights, prefs)
    _checks.check_positive(temperature, "temperature")
    proj = project(prefs.features, basis)
    _tables.check_projected(proj, prefs.features, temperature)
    return stored_margins(proj, weights, prefs) / temperature


def stored_margins(proj, weights: jax.Array, prefs: Preferences) -> jax.Array:
    """Margins at T = 1 from projected features, in stored order: float[N]."""
    z = pair_rewards(proj, prefs)
    return _mix_of(z, weights, prefs.user)


@jax.jit
def _mix_of(z, weights, user):
    return mix(z, weights[user])


@public()
def score(basis: jax.Array, weights: jax.Array, features) -> jax.Array:
    """Rewards of every response for every user, at T = 1.

    Args:
      basis: V, float[D, K].
      weights: float[U, K] on the simplex, or what `adapt` or `fit` returned.
      features: float[M, D] or a `FeatureSource`.

    Returns:
      float[U, M], users in the order of `weights`. For many users prefer `score_rows`
      or `top_k`.

    Raises:
      ValueError: shapes disagree or weights are not on the simplex.
    """
    weights, _ = _check_matrix(basis, weights)
    _tables.num_rows(features)
    proj = jnp.asarray(project(features, basis))
    return jnp.matmul(jnp.asarray(weights), proj.T, precision=_EXACT)


@public()
def score_rows(basis: jax.Array, weights: jax.Array, features, user, rows) -> jax.Array:
    """Rewards of chosen (user, response rows) combinations, without U×M.

    Args:
      basis: V, float[D, K].
      weights: float[U, K] on the simplex, or what `adapt` or `fit` returned.
      features: float[M, D] or a `FeatureSource`.
      user: int[Q] rows of `weights`, or names where `weights` has names.
      rows: int[Q] or int[Q, C], rows of `features`.

    Returns:
      float in the shape of `rows`.

    Raises:
      ValueError: shapes disagree, an index is out of range, or a name is unknown.
        Traced indices are not checked: they are clipped.
      TypeError: `user` or `rows` holds something else.
    """
    weights, names = _check_matrix(basis, weights)
    user = _ids.queried(user, names, np.shape(weights)[0])
    rows = rows if _checks.is_traced(rows) else _checks.host_array(rows, "rows")
    if rows.ndim not in (1, 2) or rows.shape[0] != len(user):
        raise ValueError(
            f"rows must be int[Q] or int[Q, C] with Q={len(user)} like user, got "
            f"shape {rows.shape}"
        )
    flat = _ids.row_numbers(rows.ravel(), _tables.num_rows(features))
    proj = jnp.asarray(project(features, basis))
    proj = jnp.take(proj, flat.reshape(rows.shape), axis=0, mode="clip")
    mine = jnp.take(jnp.asarray(weights), user, axis=0, mode="clip")
    return mix(proj, mine if rows.ndim == 1 else mine[:, None])


@public()
def top_k(
    basis: jax.Array, weights: jax.Array, features, user, k: int, rows=None
) -> tuple[jax.Array, jax.Array]:
    """The k best responses for each query, best first.

    Args:
      basis: V, float[D, K].
      weights: float[U, K] on the simplex, or what `adapt` or `fit` returned.
      features: float[M, D] or a `FeatureSource`.
      user: int[Q] rows of `weights`, whose ranking each query asks for, or names
        where `weights` has names.
      k: how many, at most the number of candidates.
      rows: int[Q, C] candidates of each query; None ranks all M responses, a chunk
        of queries at a time.

    Returns:
      (scores float[Q, k], rows int32[Q, k]).

    Raises:
      ValueError: shapes disagree, an index or k is out of range, or a name is unknown.
      TypeError: k is no integer, or `user` or `rows` holds something else.
    """
    if rows is not None and np.ndim(rows) != 2:
        raise ValueError(f"rows must be int[Q, C], got shape {np.shape(rows)}")
    candidates = _tables.num_rows(features) if rows is None else np.shape(rows)[-1]
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= candidates:
        raise ValueError(f"k must be in 1 … {candidates} candidates, got {k}")
    if rows is not None:
        scores = score_rows(basis, weights, features, user, rows)
        best, place = lax.top_k(scores, k)
        return best, jnp.take_along_axis(jnp.asarray(rows), place, axis=1)
    weights, names = _check_matrix(basis, weights)
    user = _ids.queried(user, names, np.shape(weights)[0])
    proj = jnp.asarray(project(features, basis))

    def one(p):
        return lax.top_k(jnp.matmul(proj, p, precision=_EXACT), k)

    mine = jnp.take(jnp.asarray(weights), user, axis=0, mode="clip")
    return lax.map(one, mine, batch_size=256)


def _check_matrix(basis, weights):
    """(weights float[U, K], names of the users or None)."""
    _checks.check_basis(basis)
    weights, names, _ = _ids.of_weights(weights)
    num_users = np.shape(weights)[0] if np.ndim(weights) else 0
    _checks.check_weights(weights, num_users, np.shape(basis)[1])
    _checks.check_simplex(weights)
    return weights, names


def _check_users(basis, weights, prefs: Preferences) -> None:
    _checks.check_basis(basis, prefs.num_features)
    _checks.check_weights(weights, prefs.num_users, np.shape(basis)[1])
    _checks.check_simplex(weights)
