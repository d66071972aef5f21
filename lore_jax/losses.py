"""Bradley–Terry losses and regularisers. Pure; jit-, vmap- and grad-safe."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks, _tables
from lore_jax._entry import public
from lore_jax.model import RewardParams, mixture_weights, project, stored_margins
from lore_jax.preferences import Preferences


@public()
def pair_loss(margin: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """−y log σ(m) − (1 − y) log σ(−m) = softplus(m) − y m, finite for every m.

    Args:
      margin: m, any shape.
      label: y = P(chosen is preferred) in [0, 1]; None means 1.

    Returns:
      float, in the shape of `margin`.
    """
    if label is None:
        return jax.nn.softplus(-margin)
    return label * jax.nn.softplus(-margin) + (1 - label) * jax.nn.softplus(margin)


@public()
def pair_coefficients(
    prefs: Preferences, weighting: Literal["pairs", "users"] = "pairs", dtype=None
) -> jax.Array:
    """What each pair counts in the loss: float[N], stored order.

    "pairs": weight_n / Σ weight, so that the loss is a mean over pairs. "users":
    weight_n / Σ of that user's weights, so that it is a sum of per-user means.
    """
    dtype = dtype or jnp.result_type(float)
    size = prefs.chosen.shape[0]
    if prefs.weight is None:
        weight = jnp.ones(size, dtype)
    else:
        weight = jnp.asarray(prefs.weight).astype(dtype)
    if weighting == "pairs":
        total = jnp.sum(weight)
        return weight / jnp.where(total > 0, total, 1)
    if weighting != "users":
        raise ValueError(f"weighting must be 'pairs' or 'users', got {weighting!r}")
    return user_shares(weight, prefs.user, prefs.num_users)[0]


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


@public()
def bradley_terry_loss(
    params: RewardParams,
    prefs: Preferences,
    temperature: float = 1.0,
    weighting: Literal["pairs", "users"] = "pairs",
) -> jax.Array:
    """Negative log-likelihood of the choices under the Bradley–Terry model.

    With margins m_n = z_n · softmax(w_user[n]) / T and ℓ(m, y) of `pair_loss`, it is
    the weighted mean of ℓ over pairs ("pairs"), or the sum over users of each user's
    weighted mean ("users"). Users without a pair add 0.

    Args:
      params: basis float[D, K] and logits float[U, K].
      prefs: N pairs of U users, labels and weights used where present.
      temperature: T > 0.
      weighting: "pairs" or "users".

    Returns:
      float[].

    Raises:
      ValueError: U, D or K disagree, a concrete number is not finite, or `weighting`
        is neither.

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), equation 3; Bradley and
      Terry, Rank Analysis of Incomplete Block Designs, 1952.
    """
    _checks.check_type(params, RewardParams, "params")
    _checks.check_type(prefs, Preferences, "prefs")
    _checks.check_basis(params.basis, prefs.num_features)
    shape = (prefs.num_users, params.basis.shape[1])
    _checks.check_weights(params.logits, *shape, "logits")
    _checks.check_finite(params.logits, "logits")
    _checks.check_positive(temperature, "temperature")
    weights = mixture_weights(params.logits)
    proj = project(prefs.features, params.basis)
    _tables.check_projected(proj, prefs.features, temperature)
    m = stored_margins(proj, weights, prefs) / temperature
    coefficients = pair_coefficients(prefs, weighting, m.dtype)
    return jnp.sum(coefficients * pair_loss(m, prefs.label))


@public()
def cosine_anchor(basis: jax.Array, anchor: jax.Array) -> jax.Array:
    """mean_k (1 − cos(V_k, v_ref)), float[]; a zero column counts as orthogonal.

    Raises:
      ValueError: `anchor` is not float[D].
    """
    _check_anchor(basis, anchor)
    norms = jnp.linalg.norm(basis, axis=0) * jnp.linalg.norm(anchor)
    return jnp.mean(
        1 - anchor @ basis / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)
    )


@public()
def l2_anchor(basis: jax.Array, anchor: jax.Array) -> jax.Array:
    """Σ_k ‖V_k − v_ref‖², float[].

    Raises:
      ValueError: `anchor` is not float[D].
    """
    _check_anchor(basis, anchor)
    return jnp.sum((basis - anchor[:, None]) ** 2)


@public()
def ridge(basis: jax.Array) -> jax.Array:
    """Σ_dk V_dk², float[]."""
    _checks.check_basis(basis)
    return jnp.sum(basis**2)


def _check_anchor(basis, anchor) -> None:
    _checks.check_basis(basis)
    if np.shape(anchor) != (np.shape(basis)[0],):
        raise ValueError(
            f"anchor must be float[D] with D={np.shape(basis)[0]}, got shape "
            f"{np.shape(anchor)}"
        )
    _checks.check_finite(anchor, "anchor")
