"""Bradley–Terry losses and regularisers. Pure; jit-, vmap- and grad-safe."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks, _equations, _tables
from lore_jax._entry import public
from lore_jax._posterior.table import log_likelihoods
from lore_jax.model import RewardParams, checked_projection
from lore_jax.preferences import Preferences
from lore_jax.prior import Prior, check_prior, likelihood_power


@public()
def pair_loss(margin: jax.Array, label: jax.Array | None = None) -> jax.Array:
    """−y log σ(m) − (1 − y) log σ(−m) = softplus(m) − y m, finite for every m.

    Args:
      margin: m, any shape.
      label: y = P(chosen is preferred) in [0, 1]; None means 1.

    Returns:
      float, in the shape of `margin`.

    Example:
      >>> round(float(lore.losses.pair_loss(np.float32(0.0))), 4)
      0.6931
    """
    return _equations.pair_loss(margin, label)


@public()
def pair_coefficients(
    prefs: Preferences, weighting: Literal["pairs", "users"] = "pairs", dtype=None
) -> jax.Array:
    """What each pair counts in the loss: float[N], stored order.

    "pairs": weight_n / Σ weight, so that the loss is a mean over pairs. "users":
    weight_n / Σ of that user's weights, so that it is a sum of per-user means. The
    weight is `prefs.sample_weight`.

    Raises:
      ValueError: `weighting` is neither.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 1], [1, 2], [0, 0])
      >>> np.asarray(lore.losses.pair_coefficients(prefs)).tolist()
      [0.5, 0.5]
    """
    if weighting not in ("pairs", "users"):
        raise ValueError(f"weighting must be 'pairs' or 'users', got {weighting!r}")
    dtype = dtype or jnp.result_type(float)
    return _equations.pair_coefficients(prefs, weighting, dtype)


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
      prefs: N pairs of U users, labels and sample weights used where present.
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

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0], [2], [0])
      >>> params = lore.RewardParams(basis=np.zeros((3, 2)), logits=np.zeros((1, 2)))
      >>> round(float(lore.bradley_terry_loss(params, prefs)), 4)
      0.6931
    """
    _checks.check_type(params, RewardParams, "params")
    _checks.check_type(prefs, Preferences, "prefs")
    _checks.check_basis(params.basis, prefs.num_features)
    shape = (prefs.num_users, params.basis.shape[1])
    _checks.check_weights(params.logits, *shape, "logits")
    _checks.check_finite(params.logits, "logits")
    _checks.check_positive(temperature, "temperature")
    if weighting not in ("pairs", "users"):
        raise ValueError(f"weighting must be 'pairs' or 'users', got {weighting!r}")
    weights = jax.nn.softmax(params.logits, axis=-1)
    proj = checked_projection(prefs.features, params.basis, temperature)
    z = _equations.pair_rewards(proj, prefs.chosen, prefs.rejected)
    m = _equations.pair_margins(z, weights, prefs.user) / temperature
    coefficients = _equations.pair_coefficients(prefs, weighting, m.dtype)
    return jnp.sum(coefficients * _equations.pair_loss(m, prefs.label))


@public()
def marginal_loss(
    z: jax.Array,
    sample_weight: jax.Array,
    prior: Prior,
    *,
    label: jax.Array | None = None,
) -> jax.Array:
    """Mean over users of −log likelihood, their weights integrated out under a prior.

        −(1/U) Σ_u log Σ_a π_a (Π_n σ(z_un · a))^η_u,   η_u = n_u^−γ

    What `fit` trains V on, as a function of arrays: no user has parameters. It is
    differentiable in z, and through z = (x_chosen − x_rejected) · V / T in V and in a
    backbone, and in the prior. All pairs of a user that one call sees count as all that
    the user has said; U counts the users that have a pair.

    Args:
      z: float[U, P, K], reward differences of each pair, divided by T.
      sample_weight: float[U, P], weight of each pair; 0 is padding.
      prior: over users, for example `lore.uniform_prior(K)`.
      label: float[U, P], P(first is preferred); None means 1.

    Returns:
      float[].

    Raises:
      ValueError: shapes disagree, or a concrete number is not finite.
      TypeError: `prior` is something else.

    Example:
      >>> prior = lore.uniform_prior(2)
      >>> loss = lore.losses.marginal_loss(np.zeros((4, 3, 2)), np.ones((4, 3)), prior)
      >>> round(float(loss), 3)  # 3 log 2
      2.079
    """
    _tables.check_pairs(z, sample_weight, label)
    check_prior(prior, np.shape(z)[2])
    dtype = jnp.result_type(z, jnp.float32)
    z, weight = jnp.asarray(z, dtype), jnp.asarray(sample_weight, dtype)
    label = None if label is None else jnp.asarray(label, dtype)
    table = log_likelihoods(z, weight, label, prior.atoms)
    total = jnp.sum(weight, axis=1)
    table = likelihood_power(total, prior.tempering)[:, None] * table
    log_prior = jax.nn.log_softmax(prior.log_weights)
    evidence = jax.nn.logsumexp(table + log_prior[None], axis=1)
    said = total > 0
    total_evidence = jnp.sum(jnp.where(said, evidence, 0))
    return -total_evidence / jnp.maximum(jnp.sum(said), 1)


@public()
def cosine_anchor(basis: jax.Array, anchor: jax.Array) -> jax.Array:
    """mean_k (1 − cos(V_k, v_ref)), float[]; a zero column counts as orthogonal.

    Raises:
      ValueError: `anchor` is not float[D].

    Example:
      >>> float(lore.losses.cosine_anchor(np.eye(3, 2), np.eye(3)[0]))
      0.5
    """
    _check_anchor(basis, anchor)
    return _equations.cosine_anchor(basis, anchor)


@public()
def l2_anchor(basis: jax.Array, anchor: jax.Array) -> jax.Array:
    """Σ_k ‖V_k − v_ref‖², float[].

    Raises:
      ValueError: `anchor` is not float[D].

    Example:
      >>> float(lore.losses.l2_anchor(np.eye(3, 2), np.eye(3)[0]))
      2.0
    """
    _check_anchor(basis, anchor)
    return _equations.l2_anchor(basis, anchor)


@public()
def ridge(basis: jax.Array) -> jax.Array:
    """Σ_dk V_dk², float[].

    Example:
      >>> float(lore.losses.ridge(np.eye(3, 2)))
      2.0
    """
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
