"""Populations with known truth: Dirichlet users, simulated choices, planted."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks
from lore_jax._backend import EXACT
from lore_jax._entry import public
from lore_jax.preferences import Preferences


class Planted(NamedTuple):
    """A problem whose answer is known.

    Attributes:
      prefs: the choices.
      heldout: further choices of the same users, without label noise.
      basis: the true V, float[D, K].
      weights: the true p, float[U, K].
    """

    prefs: Preferences
    heldout: Preferences
    basis: jax.Array
    weights: jax.Array


@public()
def dirichlet_users(
    key: jax.Array, num_users: int, alpha: float, rank: int
) -> jax.Array:
    """Weights p_u ~ Dirichlet(α, …, α): float[U, K].

    Raises:
      ValueError: α is not positive, or a size is below 1.
    """
    _checks.check_positive(alpha, "alpha")
    _checks.check_count(num_users, "num_users")
    _checks.check_count(rank, "rank")
    _checks.check_key(key)
    return jax.random.dirichlet(key, jnp.full(rank, alpha), (num_users,))


@public()
def simulate_choices(
    rewards: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Best and worst response of every prompt for every user.

    User u scores response r of prompt q by Σ_j rewards[q, r, j] · weights[u, j].

    Args:
      rewards: float[Q, R, J]: Q prompts, R responses each, J reward models.
      weights: float[U, J].

    Returns:
      (best int32[U, Q], worst int32[U, Q]), positions 0 … R−1; ties go to the first.
      Nothing of size U × Q × R is built.

    Raises:
      ValueError: shapes disagree, or R is below 2.
    """
    if np.ndim(rewards) != 3 or np.shape(rewards)[1] < 2:
        raise ValueError(
            f"rewards must be float[Q, R, J] with R of at least 2, got shape "
            f"{np.shape(rewards)}"
        )
    if np.ndim(weights) != 2 or np.shape(weights)[1] != np.shape(rewards)[2]:
        raise ValueError(
            f"weights must be float[U, J] with J={np.shape(rewards)[2]}, got shape "
            f"{np.shape(weights)}"
        )
    _checks.check_finite(rewards, "rewards")
    _checks.check_finite(weights, "weights")
    rewards = jnp.asarray(rewards)

    def one(p):
        scores = jnp.matmul(rewards, p, precision=EXACT)
        return (
            jnp.argmax(scores, axis=1).astype(jnp.int32),
            jnp.argmin(scores, axis=1).astype(jnp.int32),
        )

    return lax.map(one, jnp.asarray(weights))


@public("simulate_choices")
def simulated_preferences(
    features, rewards: jax.Array, weights: jax.Array, prompts: np.ndarray | None = None
) -> Preferences:
    """Each user's best against worst response, over one shared feature table.

    Args:
      features: float[Q · R, D], response r of prompt q in row q · R + r.
      rewards: float[Q, R, J].
      weights: float[U, J].
      prompts: int[U, n] prompts that each user is asked; None asks all of them.

    Returns:
      `Preferences` grouped by user and prompt. Pairs whose responses all tie (best is
      worst) are left out.

    Raises:
      ValueError: shapes disagree or a prompt is out of range.
    """
    best, worst = (np.asarray(x) for x in simulate_choices(rewards, weights))
    num_users, num_prompts = best.shape
    num_responses = np.shape(rewards)[1]
    if prompts is None:
        prompts = np.broadcast_to(np.arange(num_prompts), best.shape)
    prompts = np.asarray(prompts)
    if prompts.ndim != 2 or len(prompts) != num_users:
        raise ValueError(
            f"prompts must be int[U, n] with U={num_users}, got {prompts.shape}"
        )
    of = f"rewards has Q={num_prompts} prompts"
    flat = _checks.host_indices(prompts.ravel(), num_prompts, "prompts", of)
    user = np.repeat(np.arange(num_users), prompts.shape[1])
    first, second = (flat * num_responses + x[user, flat] for x in (best, worst))
    keep = first != second
    return Preferences.from_pairs(
        features,
        first[keep],
        second[keep],
        user[keep],
        num_users,
        group=(user.astype(np.int64) * num_prompts + flat)[keep],
    )


@public("dirichlet_users and jax.random")
def planted(
    key: jax.Array,
    *,
    num_users: int,
    pairs_per_user: int,
    num_features: int,
    rank: int,
    alpha: float = 0.3,
    margin_scale: float = 3.0,
    label_noise: float = 0.0,
    heldout_pairs: int = 50,
) -> Planted:
    """Choices drawn from the model itself, for tests of recovery.

    Differences are standard normal over D, V has orthogonal columns scaled so that a
    user's margins have standard deviation `margin_scale` for weights at a vertex,
    choices follow Bradley–Terry, and `label_noise` of them are flipped.

    Args:
      key: consumed.
      num_users: U.
      pairs_per_user: training pairs of each.
      num_features: D ≥ K.
      rank: K.
      alpha: of the Dirichlet population.
      margin_scale: standard deviation of a vertex's margins.
      label_noise: share of training choices that are flipped, in [0, 1].
      heldout_pairs: held-out pairs of each.

    Returns:
      `Planted`.

    Raises:
      ValueError: D < K or a number is out of range.
    """
    if num_features < rank:
        raise ValueError(
            f"num_features must be at least rank={rank}, got {num_features}"
        )
    _checks.host_floats([label_noise], 1, "label_noise", 0.0, 1.0)
    _checks.check_positive(margin_scale, "margin_scale")
    sizes = {"pairs_per_user": pairs_per_user, "heldout_pairs": heldout_pairs}
    for name, size in sizes.items():
        _checks.check_count(size, name, 0)
    _checks.check_key(key)
    keys = jax.random.split(key, 4)
    weights = dirichlet_users(keys[0], num_users, alpha, rank)
    normal = jax.random.normal(keys[1], (num_features, rank))
    basis = jnp.linalg.qr(normal)[0] * margin_scale

    def draw(key, per_user, noise):
        key_x, key_choice, key_flip = jax.random.split(key, 3)
        shape = (num_users, per_user)
        x = jax.random.normal(key_x, (*shape, num_features))
        m = jnp.einsum("upd,dk,uk->up", x, basis, weights, precision=EXACT)
        sign = jnp.where(
            jax.random.uniform(key_choice, shape) < jax.nn.sigmoid(m), 1, -1
        )
        sign = jnp.where(jax.random.uniform(key_flip, shape) < noise, -sign, sign)
        flat = np.asarray(x * sign[..., None]).reshape(-1, num_features)
        user = np.repeat(np.arange(num_users), per_user)
        return Preferences.from_pairs(flat, np.arange(len(flat)), None, user, num_users)

    return Planted(
        draw(keys[2], pairs_per_user, label_noise),
        draw(keys[3], heldout_pairs, 0.0),
        basis,
        weights,
    )
