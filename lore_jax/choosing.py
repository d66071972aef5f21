"""One response out of a few: for one user, `best_of_n`, or for a group, `jury`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks, _equations, _ids, _tables
from lore_jax._backend import EXACT
from lore_jax._entry import public
from lore_jax.model import RewardModel, checked_matrix, direction_rewards

_CELLS = 1 << 22  # users × candidates of the queries that `jury` takes at once


@public()
def best_of_n(
    model: RewardModel, weights: Any, candidates, user, *, features=None
) -> tuple[jax.Array, jax.Array]:
    """The best of n candidate responses of each query, for its user.

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, or float[U, K] on the simplex.
      candidates: float[Q, n, D], features of the candidates; or, with `features`,
        int[Q, n], their rows.
      user: int[Q] rows of `weights`, or names where `weights` has names.
      features: float[M, D] or a `FeatureSource`.

    Returns:
      (place int32[Q] in 0 … n − 1, score float[Q]); of equal scores the first.

    Raises:
      ValueError: shapes disagree, an index is out of range, or a name is unknown.
        Traced indices are not checked: they are clipped.
      TypeError: `model`, `user` or `candidates` is something else.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> candidates = np.eye(3)[None]
      >>> place, score = lore.best_of_n(model, np.array([[0.1, 0.9]]), candidates, [0])
      >>> np.asarray(place).tolist()
      [1]
    """
    weights, names = checked_matrix(model, weights)
    proj = _project_candidates(model, candidates, features)
    user = _ids.queried(user, names, np.shape(weights)[0])
    if len(user) != len(proj):
        raise ValueError(
            f"user must be [Q] with Q={len(proj)} like candidates, got {len(user)}"
        )
    mine = jnp.take(jnp.asarray(weights), user, axis=0, mode="clip")
    found = _first_best(_equations.mix(proj, mine[:, None]))
    return _checks.where(candidates if features is None else features, found)


@public()
def jury(
    model: RewardModel,
    weights: Any,
    candidates,
    *,
    user=None,
    rule: Literal["mean", "median", "worst_off", "borda"] = "mean",
    features=None,
) -> tuple[jax.Array, jax.Array]:
    """One of n candidate responses of each query, for a group of users.

    Choices identify the rewards of a user up to a constant per query. The rules
    compare users by the gain over an average candidate,

        g_u(i) = r_u(i) − (1/n) Σ_j r_u(j),

    which does not depend on that constant. Each rule picks the candidate with the
    greatest

        "mean"       (1/U) Σ_u g_u(i), the group's mean gain
        "median"     median_u g_u(i): half of the group gains at least as much
        "worst_off"  min_u g_u(i), the gain of the user who gains least
        "borda"      (1/U) Σ_u Σ_{j≠i} [r_u(i) > r_u(j)] / (n − 1), the share of
                     duels with the other candidates that i wins; a tie counts one half

    Args:
      model: the reward model.
      weights: what `adapt` or `fit` returned, or float[U, K] on the simplex.
      candidates: float[Q, n, D], features of the candidates; or, with `features`,
        int[Q, n], their rows.
      user: int[G] rows of `weights`, or names where `weights` has names: the group.
        None is all users. A user that stands twice counts twice.
      rule: "mean", "median", "worst_off" or "borda".
      features: float[M, D] or a `FeatureSource`.

    Returns:
      (place int32[Q] in 0 … n − 1, score float[Q]), the score as above; of equal
      scores the first. A single candidate scores 0.

    Raises:
      ValueError: shapes disagree, the group is empty, an index is out of range, a name
        is unknown, or `rule` is none of the four. Traced indices are not checked: they
        are clipped.
      TypeError: `model`, `user` or `candidates` is something else.

    References:
      Moulin, Axioms of Cooperative Decision Making, 1988 (utilitarian, egalitarian and
      Borda rules).

    Example:
      >>> model = lore.RewardModel(np.eye(3))
      >>> weights = np.array([[0.8, 0.2, 0.0], [0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
      >>> candidates = np.eye(3)[None]  # candidate k is all that direction k asks for
      >>> for rule in ("mean", "median", "worst_off", "borda"):
      ...     place, score = lore.jury(model, weights, candidates, rule=rule)
      ...     print(rule, int(place[0]), round(float(score[0]), 2))
      mean 0 0.17
      median 0 0.37
      worst_off 1 -0.23
      borda 0 0.67
    """
    if not isinstance(rule, str) or rule not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(_RULES)}, got {rule!r}")
    weights, names = checked_matrix(model, weights)
    weights = jnp.asarray(weights)
    if user is not None:
        user = _ids.queried(user, names, weights.shape[0])
        weights = jnp.take(weights, user, axis=0, mode="clip")
    if not len(weights):
        raise ValueError("user must name at least one user of the group, got none")
    proj = _project_candidates(model, candidates, features)

    def value(proj):
        return _RULES[rule](jnp.matmul(weights, proj.T, precision=EXACT))

    size = max(1, _CELLS // (len(weights) * proj.shape[1]))
    scores = lax.map(value, proj, batch_size=min(size, max(1, len(proj))))
    reference = candidates if features is None else features
    return _checks.where(reference, _first_best(scores))


def _first_best(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(place int32[Q], score float[Q]) of the greatest of scores float[Q, n]."""
    place = jnp.argmax(scores, axis=1).astype(jnp.int32)
    return place, jnp.take_along_axis(scores, place[:, None], axis=1)[:, 0]


def _gains(rewards):
    """Rewards float[U, n] over those of an average candidate."""
    return rewards - jnp.mean(rewards, axis=1, keepdims=True)


def _borda(rewards):
    """Share of duels that each candidate wins, float[n], from rewards float[U, n]."""
    count = rewards.shape[1]

    def against(j, won):
        other = lax.dynamic_index_in_dim(rewards, j, axis=1)
        return won + (1 + jnp.sign(rewards - other)) / 2

    won = lax.fori_loop(0, count, against, jnp.zeros_like(rewards))
    # One half of `won` is the duel of a candidate with itself.
    return jnp.mean(won - 0.5, axis=0) / max(count - 1, 1)


_RULES = {
    "mean": lambda rewards: jnp.mean(_gains(rewards), axis=0),
    "median": lambda rewards: jnp.median(_gains(rewards), axis=0),
    "worst_off": lambda rewards: jnp.min(_gains(rewards), axis=0),
    "borda": _borda,
}


def _project_candidates(model: RewardModel, candidates, features) -> jax.Array:
    """Candidates · V / T, float[Q, n, K], of features or of rows of a table."""
    shape = np.shape(candidates)
    if features is None:
        if len(shape) != 3 or shape[2] != model.num_features or not shape[1]:
            raise ValueError(
                "candidates must be float[Q, n, D] with n of at least 1 and "
                f"D={model.num_features}, got shape {shape}"
            )
        return direction_rewards(model, candidates)
    if len(shape) != 2 or not shape[1]:
        raise ValueError(
            "candidates must be int[Q, n] rows of features with n of at least 1, "
            f"got shape {shape}"
        )
    if _checks.is_traced(candidates):
        rows = candidates.ravel()
    else:
        rows = _checks.host_array(candidates, "candidates").ravel()
    rows = _ids.row_numbers(rows, _tables.num_rows(features), "candidates")
    proj = direction_rewards(model, features)
    return jnp.take(proj, rows.reshape(shape), axis=0, mode="clip")
