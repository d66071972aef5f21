"""Comparisons: two fits by direction, `align`; users with the population, `compare`."""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks, _ids
from lore_jax._backend import to_array
from lore_jax._entry import public
from lore_jax._pairs.projected import Projected, checked_pairs
from lore_jax._posterior.table import log_likelihoods
from lore_jax.diagnostics import column_cosines, match_columns
from lore_jax.model import RewardModel, check_model, prior_of
from lore_jax.preferences import Preferences, take_users
from lore_jax.prior import Prior, likelihood_power, mixture_mean
from lore_jax.results import Fitted

Record = TypeVar("Record", Fitted, RewardModel)


class Alignment(NamedTuple):
    """Two fits with their directions matched one to one.

    Attributes:
      permutation: int[K]; direction `permutation[k]` of the other fit is direction k
        of the first.
      cosines: float[K], of matched columns of V; 0 for a zero column.
      other: the other fit, its directions in the order of the first.
    """

    permutation: np.ndarray
    cosines: np.ndarray
    other: Any


class Comparison(NamedTuple):
    """Whether users differ from the population.

    Attributes:
      probability: float[U], posterior probability that the user's weights are their
        own, drawn from the prior, and not the population's.
      log_bayes_factor: float[U], natural logarithm of the evidence for it; 0 without
        pairs.
      user_ids: str[U] or int[U], or None.
    """

    probability: np.ndarray
    log_bayes_factor: np.ndarray
    user_ids: Any = None


@public("a permutation of the columns of V by hand")
def align(fitted: Record, other: Record) -> Alignment:
    """Matches the directions of two fits, whose order is arbitrary.

        permutation = argmax_σ Σ_k cos(V_k, V'_σ(k))

    exactly up to K = 6; above, the greatest cosine is matched first. Permuting the
    directions of a fit changes no reward. Interpret a direction only where fits of
    other keys, or of other halves of the data, have it too: where its cosine is close
    to 1.

    Args:
      fitted: what `fit` returned, or a `RewardModel`.
      other: the same of the same D and K.

    Returns:
      `Alignment`; its `other` is of the type of `other`.

    Raises:
      ValueError: D or K disagree, or a number is not finite.
      TypeError: an argument is something else, or is traced.

    Example:
      >>> basis = np.eye(3, 2, dtype=np.float32)
      >>> first, second = lore.RewardModel(basis), lore.RewardModel(2 * basis[:, ::-1])
      >>> found = lore.align(first, second)
      >>> found.permutation.tolist(), found.cosines.tolist()
      ([1, 0], [1.0, 1.0])
      >>> np.asarray(found.other.basis).tolist()
      [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    """
    bases = []
    for record, name in ((fitted, "fitted"), (other, "other")):
        if not isinstance(record, Fitted | RewardModel):
            raise TypeError(
                f"{name} must be a Fitted or a RewardModel, got {type(record)}"
            )
        model = record.model if isinstance(record, Fitted) else record
        check_model(model)
        bases.append(np.asarray(model.basis))
    first, second = (basis.shape for basis in bases)
    if first != second:
        raise ValueError(
            "other must have the D and K of fitted: its basis has shape "
            f"{list(second)}, that of fitted {list(first)}"
        )
    cosines = column_cosines(*bases)
    match = match_columns(cosines)
    return Alignment(match, cosines[np.arange(len(match)), match], _take(other, match))


def _take(record: Any, order: np.ndarray) -> Any:
    """A record with its directions in another order; rewards stay what they are."""
    if isinstance(record, Fitted):
        return record.replace(
            model=_take(record.model, order),
            weights=record.weights[:, order],
            logits=record.logits[:, order],
            kept=None if record.kept is None else np.asarray(record.kept)[order],
        )
    prior = record.prior
    if prior is not None:
        prior = prior.replace(atoms=prior.atoms[:, order])
    return record.replace(basis=record.basis[:, order], prior=prior)


@public("adapt_users")
def compare(
    model: RewardModel,
    prefs: Preferences,
    users: Any = None,
    *,
    prior_probability: float = 0.5,
) -> Comparison:
    """Does a user differ from the population? A Bayes factor, and a probability.

    The population's weights are the prior's mean, p̄ = Σ_a π_a a: what `adapt` gives
    to a user without pairs. Two models of a user's n pairs are compared,

        H0: w = p̄          L0 = (Π_n σ(z_n · p̄ / T))^η
        H1: w ~ the prior   L1 = Σ_a π_a (Π_n σ(z_n · a / T))^η

    with η = n^−γ, the prior's tempering, 1 where pairs are independent (γ = 0). With
    prior probability q of H1,

        P(H1 | pairs) = q B / (1 − q + q B),   B = L1 / L0.

    The probability is q without pairs. It tends to 1 with the pairs of a user whose
    weights differ from p̄, and to 0 with those of a user whose weights are p̄. log B is
    also the log-loss that the population's weights would have added over this user's
    pairs, had each pair been predicted from the ones before (at γ = 0).

    A probability says how sure it is that a user differs, not by how much:
    `posterior` has the weights and their deviation. Where all K weights of the
    prior's atoms are equal to p̄, as at K = 1, nobody differs and B = 1.

    Args:
      model: the reward model; its prior is the population.
      prefs: pairs of U users. Best are users that the prior was not learned from.
      users: int[n] users of `prefs`, or names where it names its users; None is all.
      prior_probability: q in (0, 1), the share of users that are expected to differ.

    Returns:
      `Comparison`, in the order of `users`.

    Raises:
      ValueError: shapes disagree, a user is unknown or stands twice, or q is not in
        (0, 1).
      TypeError: an argument is something else, or is traced.

    References:
      Kass and Raftery, Bayes Factors, 1995.

    Example:
      >>> prefs = lore.Preferences.from_pairs(
      ...     4 * np.eye(3), [0] * 8, [1] * 8, ["ann"] * 8, user_ids=["ann", "bob"]
      ... )
      >>> found = lore.compare(lore.RewardModel(np.eye(3, 2)), prefs)
      >>> found.probability.round(2).tolist()  # bob has said nothing
      [0.98, 0.5]
    """
    _checks.check_type(prefs, Preferences, "prefs")
    share = _checks.host_floats([prior_probability], 1, "prior_probability", 0.0, 1.0)
    if share is None or not 0 < share[0] < 1:
        raise ValueError(
            f"prior_probability must be in (0, 1), got {prior_probability!r}"
        )
    if users is not None:
        names, size = prefs.user_ids, prefs.num_users
        users = _ids.queried(users, names, size, "users", "prefs")
        prefs = take_users(prefs, users)
    found = checked_pairs(model, prefs)
    evidence = _log_bayes_factors(found, prior_of(model), model.temperature)
    odds = np.log(prior_probability) - np.log1p(-prior_probability)
    return Comparison(
        probability=1 / (1 + np.exp(-np.clip(evidence + odds, -700, 700))),
        log_bayes_factor=evidence,
        user_ids=prefs.user_ids,
    )


def _log_bayes_factors(
    found: Projected, prior: Prior, temperature: float
) -> np.ndarray:
    """Log L1 − log L0 of every user, float[U]; a chunk of users at a time."""
    pairs, read = found.pairs, found.read
    dtype = jnp.result_type(found.proj.dtype, jnp.float32)
    prior = jax.tree.map(lambda x: to_array(x, dtype), prior)
    out = np.zeros(pairs.num_users, dtype)
    for chunk in pairs.chunks():
        z, weight, label = read(chunk)
        kinds = dict(unit_weights=pairs.unit_weights)
        z = z / float(temperature)
        evidence = _log_bayes_factor(z, weight, label, prior, **kinds)
        out[chunk.place] = np.asarray(evidence)[: len(chunk.users)]
    return out


@functools.partial(jax.jit, static_argnames="unit_weights")
def _log_bayes_factor(z, weight, label, prior: Prior, *, unit_weights):
    """Log L1 − log L0 of users with pairs z float[B, P, K], at T = 1: float[B]."""
    log_prior = jax.nn.log_softmax(prior.log_weights)
    mean = mixture_mean(jnp.exp(log_prior), prior.atoms)
    atoms = jnp.concatenate([prior.atoms, mean[None]])
    table = log_likelihoods(z, weight, label, atoms, unit_weights=unit_weights)
    total = jnp.sum(weight, axis=1)
    table = likelihood_power(total, prior.tempering)[:, None] * table
    # Differences first: they stay small where both likelihoods are tiny.
    gain = table[:, :-1] - table[:, -1:]
    evidence = jax.nn.logsumexp(gain + log_prior[None], axis=1)
    return jnp.where(total > 0, evidence, 0)
