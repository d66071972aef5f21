"""Which pair to ask next: information about the posterior, and two baselines.

The answer y to pair z says about the atom a of a user's posterior q, in nats,

    I(y; a) = h(Σ_a q_a σ(m_a)) − Σ_a q_a h(σ(m_a)),   m_a = z · (p + a − p̄),

h the entropy of a coin. The atoms are shifted so that their mean is the refined p.

References:
  Houlsby et al., Bayesian active learning for classification and preference
  learning, 2011 (https://arxiv.org/abs/1112.5745).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks
from lore_jax._backend import EXACT
from lore_jax._entry import public
from lore_jax._posterior.moments import PosteriorMoments, margin_moments
from lore_jax.model import RewardModel, check_model, prior_of
from lore_jax.prediction import checked_both, in_callers_order, map_pairs
from lore_jax.preferences import Preferences

_METHODS = ("information", "margin", "random")


@public()
def expected_information(probability: jax.Array, margins: jax.Array) -> jax.Array:
    """Mutual information of an answer and the atom, in nats.

    Args:
      probability: q, float[..., A].
      margins: m_a, float[..., A].

    Returns:
      float[...], in [0, log 2].

    Example:
      >>> chance = lore.acquisition.expected_information(
      ...     np.array([0.5, 0.5]), np.array([-9.0, 9.0])
      ... )
      >>> round(float(chance), 2)  # Nearly all of log 2: the answer tells the atom.
      0.69
    """
    if np.shape(probability)[-1:] != np.shape(margins)[-1:] or not np.ndim(margins):
        raise ValueError(
            "probability and margins must end in the same A, got shapes "
            f"{np.shape(probability)} and {np.shape(margins)}"
        )
    _checks.check_within(probability, "probability", 0, 1)
    _checks.check_finite(margins, "margins")
    return _information(probability, margins)


def _information(probability, margins):
    chance = jax.nn.sigmoid(margins)
    # The entropy of σ(m) from m keeps its digits where σ(m) rounds to 1.
    each = jax.nn.softplus(margins) - margins * chance
    yes = jnp.sum(probability * chance, axis=-1)
    no = jnp.sum(probability * jax.nn.sigmoid(-margins), axis=-1)
    both = -jax.scipy.special.xlogy(yes, yes) - jax.scipy.special.xlogy(no, no)
    return jnp.maximum(both - jnp.sum(probability * each, axis=-1), 0)


@jax.jit
def pair_information(
    moments: PosteriorMoments, z: jax.Array, row: jax.Array
) -> jax.Array:
    """`expected_information` of pairs z float[B, K] of users row int[B]: [B, 1]."""
    shift = (moments.weights - moments.mean)[row]
    at_atoms = jnp.einsum("bk,ak->ba", z, moments.atoms, precision=EXACT)
    shared = jnp.einsum("bk,bk->b", z, shift, precision=EXACT)
    margins = at_atoms + shared[:, None]
    return _information(moments.probability[row], margins)[:, None]


@public("acquisition.expected_information")
def score_pairs(
    model: RewardModel,
    prefs: Preferences,
    candidates: Preferences,
    *,
    method: Literal["information", "margin", "random"] = "information",
    key: jax.Array | None = None,
) -> np.ndarray:
    """How much each candidate pair is worth asking; larger is sooner.

    Which side of a candidate is called chosen does not matter.

    Args:
      model: the reward model.
      prefs: what the users have already said; nothing is legal.
      candidates: N pairs that their users could be asked, the same users by name
        where they have names.
      method: "information" (expected information gain), "margin" (−|margin|, the
        least certain answer first) or "random".
      key: for "random", consumed.

    Returns:
      float[N], in the caller's order of `candidates`.

    Raises:
      ValueError: an unknown method, a missing key, or shapes or users disagree.
      TypeError: an argument is something else.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> lore.score_pairs(model, prefs, prefs).shape
      (2,)
    """
    _checks.check_type(prefs, Preferences, "prefs")
    check_model(model, prefs.num_features)
    _checks.check_type(candidates, Preferences, "candidates")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if (key is None) == (method == "random"):
        raise ValueError(f"key belongs to method='random', got {method!r} and {key!r}")
    if key is not None:
        _checks.check_key(key)
        drawn = jax.random.uniform(key, (candidates.num_pairs,))
        return _checks.where(candidates.features, drawn)
    both = checked_both(model, prefs, candidates)
    function = margin_moments if method == "margin" else pair_information
    found = map_pairs(function, *both, prior_of(model), model.temperature)[:, 0]
    found = -abs(found) if method == "margin" else found
    found = in_callers_order(found, candidates)
    return _checks.where(candidates.features, found)


@public("jax.lax.top_k")
def best_pairs(scores: np.ndarray, candidates: Preferences, num: int = 1) -> np.ndarray:
    """Each user's candidates with the highest scores, best first.

    Args:
      scores: float[N], from `score_pairs`.
      candidates: the N pairs.
      num: how many per user.

    Returns:
      int[U, num], positions in the caller's order of `candidates`; −1 where a user
      has fewer. Ties go to the earlier candidate.

    Raises:
      ValueError: lengths disagree or `num` is below 1.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> lore.best_pairs(np.array([0.1, 0.4]), prefs).tolist()
      [[1]]
    """
    _checks.check_type(candidates, Preferences, "candidates")
    _checks.check_count(num, "num")
    if np.shape(scores) != (candidates.num_pairs,):
        raise ValueError(
            f"scores must be float[{candidates.num_pairs}], got {np.shape(scores)}"
        )
    scores = _checks.host_array(scores, "scores")
    if scores.dtype.kind not in "iu" and not _checks.is_floating(scores.dtype):
        raise TypeError(f"scores must hold real numbers, got dtype {scores.dtype}")
    if np.isnan(scores).any():
        raise ValueError(f"scores[{np.flatnonzero(np.isnan(scores))[0]}] is nan")
    order, user = np.asarray(candidates.order), np.asarray(candidates.user)
    ranked = np.lexsort((order, -np.asarray(scores)[order], user))
    place = np.arange(len(user)) - np.asarray(candidates.offsets)[:-1][user]
    out = np.full((candidates.num_users, num), -1)
    top = place < num
    out[user[top], place[top]] = order[ranked[top]]
    return out
