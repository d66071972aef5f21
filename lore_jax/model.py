"""The reward model r_u(x) = x · V · p_u / T, and the scores that follow from it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from lore_jax import _checks, _equations, _ids, _tables
from lore_jax._backend import EXACT
from lore_jax._entry import public
from lore_jax._pairs.blocks import project_rows
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import Prior, check_prior, say, uniform_prior


class RewardModel(struct.PyTreeNode):
    """What all users share: the basis, the prior over users, and the temperature.

    User u with mixture weights p_u on the simplex has the reward

        r_u(x) = x · V · p_u / T.

    Attributes:
      basis: V, float[D, K], on raw features.
      prior: what is believed of a new user; None is Dirichlet(1).
      temperature: T > 0.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2, dtype=np.float32), temperature=2.0)
      >>> model.num_features, model.rank
      (3, 2)
    """

    basis: Any
    prior: Prior | None = None
    temperature: float = struct.field(pytree_node=False, default=1.0)

    @property
    def num_features(self) -> int:
        """D."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """K."""
        return self.basis.shape[1]

    def __repr__(self) -> str:
        """Sizes, T and the prior."""
        prior = "Dirichlet(1)" if self.prior is None else repr(self.prior)
        return (
            f"RewardModel(D={np.shape(self.basis)[0]}, K={np.shape(self.basis)[-1]}, "
            f"temperature={say(self.temperature)},\n  prior="
            + prior.replace("\n", "\n  ")
            + ")"
        )


def check_model(model: Any, num_features: int | None = None) -> None:
    """Raises unless `model` is a `RewardModel` whose parts fit together.

    Raises:
      TypeError: it is something else.
      ValueError: a shape or a number is wrong, or D disagrees with the features.
    """
    if not isinstance(model, RewardModel):
        hint = "fitted.model" if hasattr(model, "model") else "RewardModel(basis)"
        raise TypeError(f"model must be a RewardModel, got {type(model)}: pass {hint}")
    if not hasattr(model.basis, "dtype"):
        raise TypeError(f"model.basis must be an array, got {type(model.basis)}")
    _checks.check_basis(model.basis, num_features, "model.basis")
    _checks.check_positive(model.temperature, "model.temperature")
    if model.prior is not None:
        check_prior(model.prior, np.shape(model.basis)[1])


def prior_of(model: RewardModel) -> Prior:
    """The model's prior; Dirichlet(1) where it has none."""
    if model.prior is not None:
        return model.prior
    return uniform_prior(np.shape(model.basis)[1])


class RewardParams(struct.PyTreeNode):
    """Parameters of the reward r_u(x) = x · V · softmax(w_u) / T.

    Attributes:
      basis: V, float[D, K], shared by every user.
      logits: w, float[U, K], one unconstrained row per user.

    Example:
      >>> params = lore.RewardParams(basis=np.zeros((3, 2)), logits=np.zeros((1, 2)))
      >>> params.weights.tolist()
      [[0.5, 0.5]]
    """

    basis: jax.Array
    logits: jax.Array

    @property
    def weights(self) -> jax.Array:
        """float[U, K], softmax(logits): what `score` and `accuracy` take."""
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

    Example:
      >>> params = lore.init_params(
      ...     jax.random.key(0), num_users=4, num_features=3, rank=2
      ... )
      >>> params.basis.shape, params.logits.shape
      ((3, 2), (4, 2))
    """
    sizes = {"num_users": num_users, "num_features": num_features, "rank": rank}
    for name, size in sizes.items():
        _checks.check_count(size, name)
    _checks.check_key(key)
    dtype = dtype or jnp.result_type(float)
    key_basis, key_logits = jax.random.split(key)
    return RewardParams(
        basis=jax.random.normal(key_basis, (num_features, rank), dtype),
        logits=jax.random.normal(key_logits, (num_users, rank), dtype),
    )


@public()
def mixture_weights(logits: jax.Array) -> jax.Array:
    """Mixture weights p = softmax(w) over the last axis: float[..., K] on the simplex.

    Example:
      >>> np.asarray(lore.mixture_weights(np.zeros(4))).tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
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

    Example:
      >>> np.asarray(lore.project(np.ones((1, 3)), np.eye(3, 2))).tolist()
      [[1.0, 1.0]]
    """
    _checks.check_basis(basis, _tables.num_columns(features))
    proj = checked_projection(features, basis)
    return proj if isinstance(features, FeatureSource) else jnp.asarray(proj)


def checked_projection(features, basis, temperature: float = 1.0) -> Any:
    """`project` for a basis that was checked; the product is checked at T.

    Returns:
      float[..., K], NumPy's for a table on the host: it is read where it is.
    """
    _tables.num_columns(features)  # Raises for another dtype.
    on_host = isinstance(features, FeatureSource) or (
        isinstance(features, np.ndarray) and features.ndim == 2
    )
    read = project_rows if on_host and not _checks.is_traced(basis) else None
    proj = (read or _equations.product)(features, basis)
    _tables.check_projected(proj, features, temperature)
    return proj


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

    Example:
      >>> float(lore.reward(np.ones(3), np.eye(3, 2), np.zeros(2)))
      1.0
    """
    _checks.check_same_trailing(basis, logits, x)
    _checks.check_positive(temperature, "temperature")
    weights = jax.nn.softmax(jnp.asarray(logits), axis=-1)
    return _equations.mix(checked_projection(x, basis), weights, temperature)


@public()
def reward_from_weights(
    x: jax.Array, basis: jax.Array, weights: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """`reward` for weights that already are on the simplex, float[..., K].

    Raises:
      ValueError: shapes disagree, T is not positive, or a row of `weights` is not on
        the simplex (logits passed by mistake).

    Example:
      >>> weights = np.array([0.5, 0.5])
      >>> float(lore.reward_from_weights(np.ones(3), np.eye(3, 2), weights))
      1.0
    """
    _checks.check_same_trailing(basis, weights, x, "weights")
    _checks.check_positive(temperature, "temperature")
    _checks.check_simplex(weights)
    return _equations.mix(checked_projection(x, basis), weights, temperature)


@public()
def margins(
    model: RewardModel, weights: Any, prefs: Preferences, *, user_ids: Any = None
) -> jax.Array:
    """Margins m_n = z_n · p_user[n] / T of every pair, in the caller's order.

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, whose users are matched by name where
        they have names; or float[U, K] on the simplex, row u for user u of `prefs`.
      prefs: N pairs of U users.
      user_ids: names of the rows of `weights` where those are a plain array and
        `prefs` names its users.

    Returns:
      float[N]; positive where the chosen response gets the higher reward.

    Raises:
      ValueError: shapes disagree, weights are not on the simplex, or only one of
        `weights` and `prefs` names its users.
      TypeError: `model` or `prefs` is something else.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0], [1], [0])
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> np.asarray(lore.margins(model, np.array([[0.9, 0.1]]), prefs)).round(2)
      array([0.8], dtype=float32)
    """
    stored = stored_margins(model, weights, prefs, user_ids)
    found = jnp.zeros_like(stored).at[prefs.order].set(stored)
    return _checks.where(prefs.features, found)


def stored_margins(model, weights, prefs: Preferences, user_ids=None) -> jax.Array:
    """`margins` in stored order; it raises what they raise."""
    _checks.check_type(prefs, Preferences, "prefs")
    check_model(model, prefs.num_features)
    names = None if prefs.ids is None else prefs.ids.users
    weights = _ids.match_weights(weights, names, user_ids)
    _checks.check_weights(weights, prefs.num_users, model.rank)
    _checks.check_simplex(weights)
    temperature = model.temperature
    proj = checked_projection(prefs.features, model.basis, temperature)
    z = _equations.pair_rewards(proj, prefs.chosen, prefs.rejected)
    return _equations.pair_margins(z, weights, prefs.user) / temperature


@public()
def score(model: RewardModel, weights: Any, features) -> jax.Array:
    """Rewards of every response for every user.

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, or float[U, K] on the simplex.
      features: float[M, D] or a `FeatureSource`.

    Returns:
      float[U, M], users in the order of `weights`. For many users prefer `score_rows`
      or `top_k`.

    Raises:
      ValueError: shapes disagree or weights are not on the simplex.
      TypeError: `model` is something else.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> lore.score(model, np.array([[0.9, 0.1]]), np.eye(3)).shape
      (1, 3)
    """
    weights, _ = checked_matrix(model, weights)
    _tables.num_rows(features)
    proj = direction_rewards(model, features)
    scores = jnp.matmul(jnp.asarray(weights), proj.T, precision=EXACT)
    return _checks.where(features, scores)


@public()
def score_rows(model: RewardModel, weights: Any, features, user, rows) -> jax.Array:
    """Rewards of chosen (user, response rows) combinations, without U×M.

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, or float[U, K] on the simplex.
      features: float[M, D] or a `FeatureSource`.
      user: int[Q] rows of `weights`, or names where `weights` has names.
      rows: int[Q] or int[Q, C], rows of `features`.

    Returns:
      float in the shape of `rows`.

    Raises:
      ValueError: shapes disagree, an index is out of range, or a name is unknown.
        Traced indices are not checked: they are clipped.
      TypeError: `model`, `user` or `rows` is something else.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> weights = np.array([[0.9, 0.1]])
      >>> lore.score_rows(model, weights, np.eye(3), [0, 0], [2, 0]).shape
      (2,)
    """
    weights, names = checked_matrix(model, weights)
    scores = _score_rows(model, weights, names, features, user, rows)
    return _checks.where(features, scores)


def _score_rows(model, weights, names, features, user, rows):
    user = _ids.queried(user, names, np.shape(weights)[0])
    rows = rows if _checks.is_traced(rows) else _checks.host_array(rows, "rows")
    if rows.ndim not in (1, 2) or rows.shape[0] != len(user):
        raise ValueError(
            f"rows must be int[Q] or int[Q, C] with Q={len(user)} like user, got "
            f"shape {rows.shape}"
        )
    flat = _ids.row_numbers(rows.ravel(), _tables.num_rows(features))
    proj = direction_rewards(model, features)
    proj = jnp.take(proj, flat.reshape(rows.shape), axis=0, mode="clip")
    mine = jnp.take(jnp.asarray(weights), user, axis=0, mode="clip")
    return _equations.mix(proj, mine if rows.ndim == 1 else mine[:, None])


@public()
def top_k(
    model: RewardModel, weights: Any, features, *, user, k: int, rows=None
) -> tuple[jax.Array, jax.Array]:
    """The k best responses for each query, best first.

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, or float[U, K] on the simplex.
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
      TypeError: k is no integer, or `model`, `user` or `rows` is something else.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> weights = np.array([[0.9, 0.1]])
      >>> scores, rows = lore.top_k(model, weights, np.eye(3), user=[0], k=2)
      >>> np.asarray(rows).tolist()
      [[0, 1]]
    """
    if rows is not None and not _checks.is_traced(rows):
        rows = _checks.host_array(rows, "rows")
    if rows is not None and np.ndim(rows) != 2:
        raise ValueError(f"rows must be int[Q, C], got shape {np.shape(rows)}")
    candidates = _tables.num_rows(features) if rows is None else np.shape(rows)[-1]
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= candidates:
        raise ValueError(f"k must be in 1 … {candidates} candidates, got {k}")
    weights, names = checked_matrix(model, weights)
    if rows is not None:
        scores = _score_rows(model, weights, names, features, user, rows)
        best, place = lax.top_k(scores, k)
        taken = jnp.take_along_axis(jnp.asarray(rows), place, axis=1)
        return _checks.where(features, (best, taken))
    user = _ids.queried(user, names, np.shape(weights)[0])
    proj = direction_rewards(model, features)

    def one(p):
        return lax.top_k(jnp.matmul(proj, p, precision=EXACT), k)

    mine = jnp.take(jnp.asarray(weights), user, axis=0, mode="clip")
    return _checks.where(features, tuple(lax.map(one, mine, batch_size=256)))


def direction_rewards(model: RewardModel, features) -> jax.Array:
    """Features · V / T, float[..., K]."""
    _checks.check_basis(model.basis, _tables.num_columns(features), "model.basis")
    proj = checked_projection(features, model.basis, model.temperature)
    return jnp.asarray(proj) / model.temperature


def checked_matrix(model, weights):
    """(weights float[U, K], names of the users or None)."""
    check_model(model)
    weights, names, _ = _ids.of_weights(weights)
    num_users = np.shape(weights)[0] if np.ndim(weights) else 0
    _checks.check_weights(weights, num_users, model.rank)
    _checks.check_simplex(weights)
    return weights, names
