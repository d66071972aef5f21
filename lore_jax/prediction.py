"""What is known of a user beyond one weight vector: spread, and predictions with it.

How much of the posterior's covariance (`mixture`) predictions should integrate over is
learned on grouped validation (`selection`): where the basis was shrunk to suit
plugged-in weights, averaging on top of that would be under-confident.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks, _ids
from lore_jax._entry import public
from lore_jax._pairs.blocks import checked_floor
from lore_jax._pairs.pack import chunk_reader, chunks
from lore_jax._posterior.moments import Mixture, deviation, margin_moments, mixture_of
from lore_jax.adaptation import adapt
from lore_jax.evaluation import user_means
from lore_jax.losses import pair_loss
from lore_jax.model import pair_rewards
from lore_jax.preferences import Preferences, take_shots, take_users
from lore_jax.prior import Prior, check_prior, uniform_prior

SHOTS = (1, 3, 10, None)  # pairs that users of a validation show, None for all

_BLOCKS = (8192, 512)  # pairs of one program


class Posterior(NamedTuple):
    """Weights of users and how sure of them their pairs make us.

    Attributes:
      weights: p, float[U, K] on the simplex, what `adapt` returns: the mean of the
        density in `posterior`.
      mean: p̄, float[U, K], tempered posterior mean over the prior's atoms, from which
        `weights` are refined.
      deviation: float[U, K], posterior standard deviation of each weight, at most 1/2.
      covariance: Σ, float[U, K, K], or None where it was not asked for.
      user_ids: str[U] or None.
    """

    weights: Any
    mean: Any
    deviation: Any
    covariance: Any = None
    user_ids: Any = None


@public("adapt_users")
def posterior(
    basis: jax.Array,
    prefs: Preferences,
    prior: Prior | None = None,
    *,
    covariance: bool = False,
) -> Posterior:
    """Posterior of every user's weights against a frozen basis.

    The density reported, of a user's weights w, is

        (1 − h²) Σ_a q_a δ(w − p − (a − p̃)) + h² N(w; p, (C⁺ + H)⁻¹),

    with mean p (`weights`) and covariance Σ = (1 − h²) B + h² (C⁺ + H)⁻¹. Here
    q_a ∝ π_a Π_n P(y_n | a) is the posterior over the prior's atoms, p̃ and B its mean
    and covariance, C the prior's covariance, H = Σ_n s_n(1 − s_n) z_n z_nᵀ the
    curvature of the pairs at p, and h² = min(1, 4 (Σ_a q_a²)^(2 / (K − 1))), or 0 at
    κ = ∞, where the density is the posterior over the atoms alone.

    A 90 % interval of a weight is p_k ± 1.645 `deviation`, of a margin
    z · p ± 1.645 √(zᵀ Σ z). Pairs count as independent and in full: the tempering γ of
    the prior moves p and does not widen Σ.

    `adapt(..., spread=True)` returns the weights and their deviation in one pass.

    Args:
      basis: V, float[D, K].
      prefs: pairs of U users.
      prior: what `fit` learned; None is Dirichlet(1).
      covariance: also return float[U, K, K].

    Returns:
      `Posterior`; a user without pairs gets the prior's mean and covariance.

    Raises:
      ValueError: shapes disagree.
      TypeError: `prior` is something else.
    """
    _checks.check_basis(basis, prefs.num_features)
    rank = np.shape(basis)[1]
    out: Any = None
    for users, mixture, _ in _mixtures(basis, prefs, prior):
        total = np.asarray(mixture.covariance)
        if out is None:
            shapes = ((rank,), (rank,), (rank,), (rank, rank))[: 3 + covariance]
            out = [np.empty((prefs.num_users, *s), total.dtype) for s in shapes]
        parts = (mixture.weights, mixture.mean, deviation(mixture), total)
        for target, part in zip(out, parts):
            target[users] = np.asarray(part)[: len(users)]
    fields = dict(zip(Posterior._fields, out))
    return Posterior(**fields, user_ids=_names(prefs))


@public("adapt_users and reward_from_weights")
def predict_proba(
    basis: jax.Array,
    prefs: Preferences,
    prior: Prior | None,
    new_pairs: Preferences,
    *,
    spread: float | None = None,
) -> np.ndarray:
    """P(chosen is preferred) of new pairs, integrated over the posterior.

        P_n = σ(s z_n · p / √(1 + π/8 · ρ z_nᵀ Σ z_n))

    Args:
      basis: V, float[D, K].
      prefs: what the users have already said.
      prior: what `fit` learned; None is Dirichlet(1).
      new_pairs: N pairs of the same users, matched by name where they have names;
        `chosen` says which side the probability is of.
      spread: ρ ≥ 0; 0 takes the weights for certain. None is the prior's own, which
        `fit` learned, like the factor s.

    Returns:
      float[N], in the caller's order of `new_pairs`.

    Raises:
      ValueError: shapes disagree, ρ is negative, or a user of `new_pairs` is not in
        `prefs`.
      TypeError: `prior` is something else.

    References:
      MacKay, The evidence framework applied to classification networks, 1992.
    """
    known = _known(prior, basis)
    spread = float(known.spread) if spread is None else spread
    _checks.host_floats([spread], 1, "spread", 0.0, np.inf)
    moments = map_pairs(margin_moments, basis, prefs, prior, new_pairs)
    scale = float(known.margin_scale)
    return np.asarray(jax.nn.sigmoid(_squeezed(moments, spread, scale)))


@public("adapt_users")
def spread_losses(
    basis: jax.Array,
    training: Preferences,
    heldout: Preferences,
    prior: Prior,
    candidates: Sequence[tuple[float, float]],
    *,
    shots: tuple[int | None, ...] = SHOTS,
    num_users: int = 1000,
) -> np.ndarray:
    """Users' log-loss of `predict_proba` on held-out pairs for each candidate (ρ, s).

    Args:
      basis: V, float[D, K].
      training: what users have said.
      heldout: pairs of the same users over the same table, which is read once, that
        share no judgement with it.
      prior: what `fit` learned from others, or from `training`.
      candidates: of ρ and s.
      shots: numbers of pairs that count alike, None for all: what is right for users
        with many pairs may be wrong for new ones.
      num_users: how many users to use at most, at random.

    Returns:
      float[C, U], U at most `num_users`; NaN where nothing is held out.

    Raises:
      ValueError: shapes disagree or a candidate is negative.
    """
    for rho, scale in candidates:
        _checks.host_floats([rho, scale], 2, "candidates", 0.0, np.inf)
    training, eye = checked_floor(training, basis)
    heldout = heldout.replace(features=training.features)
    if training.num_users > num_users:
        rng = np.random.default_rng(0)
        some = np.sort(rng.choice(training.num_users, num_users, replace=False))
        training, heldout = (take_users(x, some) for x in (training, heldout))
    losses = []
    for few in shots:
        shown = take_shots(training, few)
        moments = map_pairs(margin_moments, eye, shown, prior, heldout)
        by_user = _squeezed_losses(
            moments[heldout.order],
            np.asarray(candidates, moments.dtype),
            heldout.label,
            heldout.weight,
            heldout.user,
            heldout.num_users,
        )
        losses.append(np.asarray(by_user))
    return np.mean(losses, axis=0)


@functools.partial(jax.jit, static_argnames="num_users")
def _squeezed_losses(moments, candidates, label, weight, user, num_users):
    def one(candidate):
        loss = pair_loss(_squeezed(moments, *candidate), label)
        return user_means(loss, weight, user, num_users)

    return lax.map(one, candidates)


def _squeezed(moments, spread, scale) -> jax.Array:
    """Margins whose sigmoid is the mean of the sigmoid of a normal: float[N]."""
    mean, variance = moments.T
    return scale * mean / jnp.sqrt(1 + np.pi / 8 * spread * variance)


def map_pairs(
    function: Callable[[Mixture, jax.Array, jax.Array], jax.Array],
    basis: jax.Array,
    prefs: Preferences,
    prior: Prior | None,
    new_pairs: Preferences,
) -> np.ndarray:
    """Something of every new pair, a chunk of users and a block of pairs at a time.

    Args:
      function: (mixture, z float[B, K], row int[B]) → float[B, J]; compiled by the
        caller. `row` is the pair's user within the mixture.
      basis: V, float[D, K].
      prefs: what the users have already said.
      prior: what `fit` learned; None is Dirichlet(1).
      new_pairs: N pairs of the same users.

    Returns:
      float[N, J], in the caller's order of `new_pairs`.

    Raises:
      ValueError: shapes disagree, or a user of `new_pairs` is not in `prefs`.
    """
    place = _match(prefs, new_pairs)
    new, _ = checked_floor(new_pairs, basis, _known(prior, basis).temperature)
    by_seen = np.argsort(place, kind="stable")  # new users, in the order of prefs
    starts = np.asarray(new.offsets)[:-1][by_seen]
    counts = np.asarray(new.counts)[by_seen]
    known = np.full(prefs.num_users, -1)
    known[place[by_seen]] = np.arange(len(place))
    columns: list[np.ndarray] = [np.empty(0, np.intp)]
    values = []
    for users, mixture, temperature in _mixtures(basis, prefs, prior):
        mine = known[users]
        rows = np.flatnonzero(mine >= 0)
        size = counts[mine[rows]]
        row = np.repeat(rows, size)
        first = np.repeat(starts[mine[rows]] - (np.cumsum(size) - size), size)
        pairs = first + np.arange(len(row))
        for part, block in _blocks(len(pairs)):
            count = len(pairs[part])
            taken, whose = (
                np.pad(x[part], (0, block - count)).astype(np.int32)
                for x in (pairs, row)
            )
            side = None if new.rejected is None else np.asarray(new.rejected)[taken]
            picked = new.replace(chosen=np.asarray(new.chosen)[taken], rejected=side)
            z = pair_rewards(new.features, picked) / temperature
            found = function(mixture, jnp.asarray(z), jnp.asarray(whose))
            values.append(np.asarray(found)[:count])
            columns.append(pairs[part])
    if not values:
        return np.zeros((0, 2), np.float32)
    found = np.concatenate(values)
    out = np.empty_like(found)
    out[np.asarray(new.order)[np.concatenate(columns)]] = found
    return out


def _blocks(total: int):
    """Yields (slice of the pairs, padded size): two sizes, so two programs."""
    start = 0
    while start < total:
        block = _BLOCKS[0] if total - start > _BLOCKS[0] // 2 else _BLOCKS[1]
        yield slice(start, min(start + block, total)), block
        start += block


def _known(prior: Prior | None, basis) -> Prior:
    """The prior, checked; Dirichlet(1) for None."""
    _checks.check_basis(basis)
    rank = np.shape(basis)[1]
    if prior is None:
        return uniform_prior(rank)
    check_prior(prior, rank)
    return prior


def _names(prefs: Preferences) -> Any:
    return None if prefs.ids is None else prefs.ids.users


def _match(prefs: Preferences, new_pairs: Preferences) -> np.ndarray:
    """int[U'], where each user of `new_pairs` stands in `prefs`."""
    old, new = _names(prefs), _names(new_pairs)
    if (old is None) != (new is None):
        named, plain = ("prefs", "new_pairs")[:: 1 if new is None else -1]
        raise ValueError(
            f"{named} names its users and {plain} does not: users are never matched "
            "by position"
        )
    if old is not None:
        return _ids.look_up(new, old, "new_pairs", "prefs")
    if prefs.num_users != new_pairs.num_users:
        raise ValueError(
            f"new_pairs must hold the users of prefs: {new_pairs.num_users} and "
            f"{prefs.num_users} users, and neither has names"
        )
    return np.arange(prefs.num_users)


def _mixtures(basis, prefs: Preferences, prior: Prior | None):
    """Yields (users, Mixture, T) chunk by chunk; U × A stands for one chunk only."""
    prior = _known(prior, basis)
    seen, eye = checked_floor(prefs, basis, prior.temperature)
    weights = np.asarray(adapt(eye, seen, prior=prior).weights)
    temperature = prior.temperature
    one = jax.tree.map(lambda x: jnp.asarray(x, weights.dtype), prior)
    read = chunk_reader(seen.features, seen)
    for chunk in chunks(np.asarray(seen.counts), np.asarray(seen.offsets)):
        z, weight, label = read(chunk)
        mine = np.full((len(chunk.count), len(eye)), 1 / len(eye), weights.dtype)
        mine[: len(chunk.users)] = weights[chunk.users]
        mixture = mixture_of(
            jnp.asarray(z) / temperature,
            weight,
            label,
            mine,
            one.replace(temperature=1.0),
            unit_weights=prefs.weight is None,
        )
        yield chunk.users, mixture, temperature
