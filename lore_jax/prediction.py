"""What is known of a user beyond one weight vector: the posterior, and predictions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks, _equations, _ids
from lore_jax._backend import to_array
from lore_jax._entry import public
from lore_jax._pairs.pack import Pairs, batch_shapes, ladder, pack
from lore_jax._pairs.projected import Projected, checked_pairs, project_pairs
from lore_jax._pairs.rows import make_rows, padded_rows, stays_on_device
from lore_jax._posterior.moments import (
    PosteriorMoments,
    margin_moments,
    moments_of,
    standard_deviation,
)
from lore_jax.adaptation import adapt_projected
from lore_jax.model import RewardModel, check_model, prior_of
from lore_jax.preferences import Preferences
from lore_jax.prior import Prior
from lore_jax.results import Posterior

_BLOCKS = (8192, 512)  # pairs of one program


@public("adapt_users")
def posterior(
    model: RewardModel, prefs: Preferences, *, covariance: bool = False
) -> Posterior:
    """Posterior of every user's weights against a frozen basis.

    The density reported, of a user's weights w, is

        (1 − h²) Σ_a q_a δ(w − p − (a − p̃)) + h² N(w; p, (C⁺ + H)⁻¹),

    with mean p (`weights`) and covariance Σ = (1 − h²) B + h² (C⁺ + H)⁻¹. Here
    q_a ∝ π_a Π_n P(y_n | a) is the posterior over the prior's atoms, p̃ and B its mean
    and covariance, C the prior's covariance, H = Σ_n s_n(1 − s_n) z_n z_nᵀ the
    curvature of the pairs at p, and h² = min(1, 4 (Σ_a q_a²)^(2 / (K − 1))), or 0 at
    κ = ∞, where the density is the posterior over the atoms alone.

    A 90 % interval of a weight is p_k ± 1.645 `std`, of a margin
    z · p ± 1.645 √(zᵀ Σ z). Pairs count as independent and in full: the tempering γ of
    the prior moves p and does not widen Σ.

    `adapt(..., return_std=True)` returns the weights and their deviation in one pass.

    Args:
      model: the reward model.
      prefs: pairs of U users.
      covariance: also return float[U, K, K].

    Returns:
      `Posterior`; a user without pairs gets the prior's mean and covariance.

    Raises:
      ValueError: shapes disagree.
      TypeError: an argument is something else.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> found = lore.posterior(lore.RewardModel(np.eye(3, 2)), prefs)
      >>> found.std.shape
      (1, 2)
    """
    found = checked_pairs(model, prefs)
    rank, dtype = found.rank, jnp.result_type(found.proj.dtype, jnp.float32)
    shapes = ((rank,), (rank,), (rank,), (rank, rank))[: 3 + covariance]
    rows = make_rows(prefs.num_users, [(x, dtype) for x in shapes], found.proj)
    for chunk, moments in iterate_moments(found, prior_of(model), model.temperature):
        parts = moments.weights, moments.mean, standard_deviation(moments)
        rows.put(chunk, (*parts, moments.covariance)[: len(shapes)])
    out = rows.arrays()
    fields = dict(zip(Posterior._fields, _checks.where(prefs.features, out)))
    return Posterior(**fields, user_ids=prefs.user_ids)


@public("adapt_users and reward_from_weights")
def predict_proba(
    model: RewardModel,
    prefs: Preferences,
    new_pairs: Preferences,
    *,
    variance_scale: float | None = None,
) -> np.ndarray:
    """P(chosen is preferred) of new pairs, integrated over the posterior.

        P_n = σ(s z_n · p / √(1 + π/8 · ρ z_nᵀ Σ z_n))

    Args:
      model: the reward model.
      prefs: what the users have already said.
      new_pairs: N pairs of the same users, matched by name where they have names;
        `chosen` says which side the probability is of. A table that both share is read
        once.
      variance_scale: ρ ≥ 0; 0 takes the weights for certain. None is the prior's own,
        which `fit` learned, like the factor s.

    Returns:
      float[N], in the caller's order of `new_pairs`.

    Raises:
      ValueError: shapes disagree, ρ is negative, or a user of `new_pairs` is not in
        `prefs`.
      TypeError: an argument is something else.

    References:
      MacKay, The evidence framework applied to classification networks, 1992.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> lore.predict_proba(model, prefs, prefs).shape
      (2,)
    """
    found, new, place = checked_both(model, prefs, new_pairs)
    prior = prior_of(model)
    rho = float(prior.variance_scale) if variance_scale is None else variance_scale
    _checks.host_floats([rho], 1, "variance_scale", 0.0, np.inf)
    moments = map_pairs(margin_moments, found, new, place, prior, model.temperature)
    factors = rho, float(prior.margin_scale)
    if isinstance(moments, jax.Array):
        chance = _chances(moments, *factors)
    else:  # By NumPy: a compiled program would serve one number of pairs alone.
        scaled = scaled_margins(moments, *factors, np)
        chance = np.exp(-np.logaddexp(0, -scaled)).astype(moments.dtype)
    chance = in_callers_order(chance, new_pairs)
    return _checks.where(new_pairs.features, chance)


@public("adapt_users")
def warm_up(model: RewardModel, *, num_users: int = 1, num_pairs: int = 40) -> None:
    """Compiles what requests of at most this size need, before the first of them.

    `adapt`, with and without `return_std`, and `predict_proba` of float32 NumPy
    features, without labels and sample weights, compile nothing afterwards. JAX's
    compilation cache keeps programs for the next process.

    Args:
      model: the reward model.
      num_users: most users of a request.
      num_pairs: most pairs of a user.

    Raises:
      ValueError: a number is below 1.
      TypeError: `model` is something else.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2, dtype=np.float32))
      >>> lore.warm_up(model, num_users=10, num_pairs=5)
    """
    check_model(model)
    _checks.check_count(num_users, "num_users")
    _checks.check_count(num_pairs, "num_pairs")
    table = np.zeros((2, model.num_features), np.float32)
    prior, temperature = prior_of(model), model.temperature
    for users, length in batch_shapes(num_users, num_pairs):
        user = np.repeat(np.arange(users, dtype=np.int32), length)
        pairs = Pairs(
            chosen=np.zeros(len(user), np.int32),
            rejected=np.ones(len(user), np.int32),
            user=user,
            sample_weight=None,
            label=None,
            offsets=np.arange(users + 1, dtype=np.int32) * length,
        )
        found = project_pairs(table, model.basis, pairs)
        adapt_projected(found, prior, temperature, return_std=True)
        place = np.arange(users)
        for count in _BLOCKS:  # A block of each size.
            some = pairs._replace(
                chosen=np.zeros(count, np.int32),
                rejected=np.ones(count, np.int32),
                user=np.zeros(count, np.int32),
                offsets=np.where(np.arange(users + 1) > 0, count, 0).astype(np.int32),
            )
            new = dataclasses.replace(found, pairs=some)
            map_pairs(margin_moments, found, new, place, prior, temperature)


@jax.jit
def _chances(moments, variance_scale, margin_scale):
    return jax.nn.sigmoid(scaled_margins(moments, variance_scale, margin_scale))


def in_callers_order(values: Any, prefs: Preferences) -> Any:
    """[N, ...] in stored order, as the caller passed the pairs."""
    order = np.asarray(prefs.order)
    if isinstance(values, jax.Array):
        alike = np.array_equal(order, np.arange(len(order)))
        return values if alike else _ordered(values, order)
    out = np.empty_like(values)
    out[order] = values
    return out


@jax.jit
def _ordered(values, order):
    return jnp.zeros_like(values).at[order].set(values, unique_indices=True)


def checked_both(
    model: RewardModel, prefs: Preferences, new_pairs: Preferences
) -> tuple[Projected, Projected, np.ndarray]:
    """(pairs, new pairs, int[U'] the place of each new user); a shared table once."""
    found = checked_pairs(model, prefs)
    _checks.check_type(new_pairs, Preferences, "new_pairs")
    place = _ids.match_users(
        new_pairs.user_ids,
        prefs.user_ids,
        new_pairs.num_users,
        prefs.num_users,
        "new_pairs",
        "prefs",
    )
    if new_pairs.features is prefs.features:
        new = dataclasses.replace(found, pairs=pack(new_pairs))
        return found, new, place
    return found, checked_pairs(model, new_pairs), place


def variance_losses(
    training: Projected,
    heldout: Pairs,
    prior: Prior,
    temperature: float,
    candidates: Sequence[tuple[float, float]],
) -> np.ndarray:
    """Users' log-loss of `predict_proba` on held-out pairs for each candidate (ρ, s).

    Args:
      training: what users have said.
      heldout: pairs of the same users over the same table that share no judgement
        with it.
      prior: learned from others, or from `training`.
      temperature: T.
      candidates: of ρ and s.

    Returns:
      float[C, U]; NaN where nothing is held out.
    """
    new = dataclasses.replace(training, pairs=heldout)
    place = np.arange(heldout.num_users)
    moments = map_pairs(margin_moments, training, new, place, prior, temperature)
    return np.asarray(
        _variance_losses(
            moments,
            np.asarray(candidates, moments.dtype),
            heldout.label,
            heldout.sample_weight,
            heldout.user,
            heldout.num_users,
        )
    )


@functools.partial(jax.jit, static_argnames="num_users")
def _variance_losses(moments, candidates, label, weight, user, num_users):
    def one(candidate):
        loss = _equations.pair_loss(scaled_margins(moments, *candidate), label)
        return _equations.user_means(loss, weight, user, num_users)

    return lax.map(one, candidates)


def scaled_margins(moments, variance_scale, margin_scale, xp: Any = jnp) -> Any:
    """Margins whose sigmoid is the mean of the sigmoid of a normal: float[N].

    Args:
      moments: float[N, 2], mean and variance of each margin.
      variance_scale: ρ.
      margin_scale: s.
      xp: `jax.numpy` or `numpy`.
    """
    mean, variance = moments.T
    return margin_scale * mean / xp.sqrt(1 + np.pi / 8 * variance_scale * variance)


def map_pairs(
    function: Callable[[PosteriorMoments, Any, Any], Any],
    found: Projected,
    new: Projected,
    place: np.ndarray,
    prior: Prior,
    temperature: float,
) -> Any:
    """Something of every new pair, a chunk of users and a block of pairs at a time.

    Args:
      function: (moments, z float[B, K], row int[B]) → float[B, J]; compiled by the
        caller. `row` is the pair's user within the moments.
      found: what the users have already said.
      new: N pairs of the same users.
      place: int[U'], where each user of `new` stands in `found`.
      prior: of the model.
      temperature: T.

    Returns:
      float[N, J], in stored order of `new`; on an accelerator it stays there.
    """
    if stays_on_device(found.proj) and stays_on_device(new.proj):
        return _map_on_device(function, found, new, place, prior, temperature)
    pairs = new.pairs
    by_seen = np.argsort(place, kind="stable")  # new users, in the order of found
    starts, counts = pairs.offsets[:-1][by_seen], pairs.counts[by_seen]
    known = np.full(found.pairs.num_users, -1)
    known[place[by_seen]] = np.arange(len(place))
    columns: list[np.ndarray] = [np.empty(0, np.intp)]
    values, proj = [], np.asarray(new.proj)
    for chunk, moments in iterate_moments(found, prior, temperature):
        mine = known[chunk.users]
        rows = np.flatnonzero(mine >= 0)
        size = counts[mine[rows]]
        row = np.repeat(rows, size)
        first = np.repeat(starts[mine[rows]] - (np.cumsum(size) - size), size)
        slots = first + np.arange(len(row))
        for part, block in _blocks(len(slots)):
            count = len(slots[part])
            taken, whose = (
                np.pad(x[part], (0, block - count)).astype(np.int32)
                for x in (slots, row)
            )
            side = None if pairs.rejected is None else pairs.rejected[taken]
            z = _equations.pair_rewards(proj, pairs.chosen[taken], side)
            arrays = z / float(temperature), whose
            values.append(np.asarray(function(moments, *arrays))[:count])
            columns.append(slots[part])
    if not values:
        return np.zeros((0, 2), np.float32)
    stored = np.concatenate(values)
    out = np.empty_like(stored)
    out[np.concatenate(columns)] = stored
    return out


def _map_on_device(function, found, new, place, prior, temperature) -> jax.Array:
    """`map_pairs` without a copy: new pairs are padded by user like those known."""
    size = len(new.pairs.chosen)
    capacity = ladder([_BLOCKS[1]], 2, size)[-1]  # Few sizes, so few programs.
    by_known = np.full(found.pairs.num_users, -1, np.int64)
    by_known[place] = np.arange(len(place))
    at = np.zeros(found.pairs.num_users, np.int32)  # where a user is in its chunk
    out: Any = None
    for chunk, moments in iterate_moments(found, prior, temperature):
        at[chunk.users] = np.arange(len(chunk.users))
        users = by_known[chunk.users]
        for part in new.pairs.chunks(users[users >= 0]):
            row = np.zeros(len(part.count), np.int32)
            row[: len(part.users)] = at[place[part.users]]
            z = new.read(part)[0]
            arrays = z, row, part.first, part.count, temperature
            out = _put_pairs(out, moments, *arrays, size=capacity, function=function)
    if out is None:
        return jnp.zeros((0, 2), found.proj.dtype)
    return out[:size]


@functools.partial(jax.jit, static_argnames=("size", "function"), donate_argnums=0)
def _put_pairs(out, moments, z, row, first, count, temperature, *, size, function):
    """`function` of the pairs z float[B, P, K], at the places of `first`: [size, J]."""
    length, rank = z.shape[1:]
    flat = (z / temperature).reshape(-1, rank)
    values = function(moments, flat, jnp.repeat(row, length))
    slot = jnp.arange(length)[None]
    place = jnp.where(slot < count[:, None], first[:, None] + slot, size)
    out = jnp.zeros((size, values.shape[1]), values.dtype) if out is None else out
    return out.at[place.reshape(-1)].set(values, mode="drop")


def _blocks(total: int):
    """Yields (slice of the pairs, padded size): two sizes, so two programs."""
    start = 0
    while start < total:
        block = _BLOCKS[0] if total - start > _BLOCKS[0] // 2 else _BLOCKS[1]
        yield slice(start, min(start + block, total)), block
        start += block


def iterate_moments(found: Projected, prior: Prior, temperature: float):
    """Yields (chunk, PosteriorMoments); U × A stands for one chunk."""
    weights = adapt_projected(found, prior, temperature).weights
    prior = jax.tree.map(lambda x: to_array(x, weights.dtype), prior)
    kinds = dict(unit_weights=found.pairs.unit_weights)
    for chunk in found.pairs.chunks():
        z, weight, label = found.read(chunk)
        mine = padded_rows(weights, chunk, 1 / found.rank)
        z = z / float(temperature)
        yield chunk, moments_of(z, weight, label, mine, prior, **kinds)
