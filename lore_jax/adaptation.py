"""New users against a frozen basis: thousands to millions in one call.

The table is read once. Everything after that works on projected rewards, in chunks of a
few fixed shapes, so that batches of any size reuse the same compiled programs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lore_jax import _checks, _equations, _tables
from lore_jax._backend import host_device, to_array
from lore_jax._entry import public
from lore_jax._pairs.projected import Projected, checked_pairs
from lore_jax._pairs.rows import make_rows, padded_rows
from lore_jax._posterior.moments import moments_of, standard_deviation
from lore_jax._posterior.table import posterior_mean
from lore_jax._solve.interior_point import ROUNDING, is_large, within_tolerance
from lore_jax._solve.simplex import (
    BOTH,
    PAIR_DUALS,
    PRIMAL_DUAL,
    Solution,
    certified_map,
    certified_maximum_likelihood,
)
from lore_jax._solve.stored import store_as
from lore_jax.config import (
    MAP,
    MaximumLikelihood,
    Method,
    PosteriorMean,
    PublishedAdam,
)
from lore_jax.model import RewardModel, prior_of
from lore_jax.preferences import Preferences
from lore_jax.prior import Prior, check_prior, likelihood_power, pull_towards_mean
from lore_jax.results import Adapted

_METHODS = PosteriorMean, MaximumLikelihood, MAP, PublishedAdam
_CONVERGED, _NUM_STEPS = 3, 4  # places in a solution


@public("adapt_users, a function of arrays")
def adapt(
    model: RewardModel,
    prefs: Preferences,
    *,
    method: Method | None = None,
    return_std: bool = False,
) -> Adapted:
    """Weights of every user of `prefs`, against a frozen basis.

    Args:
      model: the reward model.
      prefs: pairs of U users. NumPy features are read in blocks of fixed shape: use
        them for serving; JAX arrays are read in one product.
      method: `PosteriorMean()` (default), `MaximumLikelihood()`, `MAP(alpha)` or
        `PublishedAdam()`; each says what it minimises.
      return_std: also return the posterior's standard deviation of every weight, see
        `posterior` for its density and covariances; `PosteriorMean` only.

    Returns:
      `Adapted`. A user's result does not depend on the others', except that the random
      start of `PublishedAdam` goes by the user's place. A user without pairs gets the
      prior's mean, or uniform weights from `MaximumLikelihood`.

    Raises:
      ValueError: shapes disagree, or a number is not finite.
      TypeError: an argument is something else.

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), section 3.3.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> lore.adapt(lore.RewardModel(np.eye(3, 2)), prefs)
      Adapted(1 users, K=2, 1 converged)
    """
    _checks.check_type(prefs, Preferences, "prefs")
    method = PosteriorMean() if method is None else method
    if not isinstance(method, _METHODS):
        names = ", ".join(kind.__name__ for kind in _METHODS)
        raise TypeError(f"method must be one of {names}, got {method!r}")
    if return_std and not isinstance(method, PosteriorMean):
        raise ValueError(
            "return_std is the posterior's deviation, which "
            f"{type(method).__name__} does not have"
        )
    found = checked_pairs(model, prefs)
    prior = prior_of(model) if isinstance(method, PosteriorMean) else None
    adapted = adapt_projected(found, prior, model.temperature, method, return_std)
    adapted = Adapted._make(_checks.where(prefs.features, tuple(adapted)))
    return adapted._replace(user_ids=prefs.user_ids)


def adapt_projected(
    found: Projected,
    prior: Prior | None,
    temperature: float,
    method: Method = PosteriorMean(),  # noqa: B008 (frozen)
    return_std: bool = False,
) -> Adapted:
    """`adapt` from projected rewards, without names; `prior` is that of the model."""
    pairs, rank = found.pairs, found.rank
    dtype = jnp.result_type(found.proj.dtype, jnp.float32)
    start = None
    if isinstance(method, PublishedAdam):
        start = _logits(method, pairs.num_users, rank, dtype)
    solve = _solver(
        method, prior, rank, temperature, dtype, pairs.unit_weights, return_std
    )
    shapes = ((rank,), dtype), ((), dtype), ((), dtype), ((), bool), ((), np.int32)
    shapes = (*shapes, ((rank,), dtype))[: 5 + return_std]
    rows = make_rows(pairs.num_users, shapes, found.proj)

    def solve_users(users, solve=solve, read=found.read, add=(), **kinds):
        def solve_chunk(chunk):
            begin = None if start is None else padded_rows(start, chunk)
            rows.put(chunk, solve(*read(chunk), begin, **kinds), add)

        rows.each(solve_chunk, pairs.chunks(users))

    def left():
        return np.flatnonzero(~np.asarray(rows.array(_CONVERGED)))

    again: Any = dict(solvers=(PAIR_DUALS,), add=(_NUM_STEPS,))
    solve_users(None)
    hard = left() if start is None else ()
    if len(hard):  # Few, if any: most calls compile no more for it.
        solve_users(hard, **again)
        hard, host = left(), host_device()
        if len(hard) and dtype == np.float32 and host is not None:
            with jax.enable_x64(True), jax.default_device(host):
                wide = np.dtype(np.float64)
                solve_users(
                    hard,
                    **again,
                    solve=_solver(
                        method,
                        jax.device_get(prior),
                        rank,
                        temperature,
                        wide,
                        pairs.unit_weights,
                        return_std,
                    ),
                    read=lambda chunk: _widened(found.read(chunk), wide),
                    stored=np.dtype(dtype),
                )
    weights, loss, gap, converged, num_steps, *deviations = rows.arrays()
    return Adapted(
        weights=weights,
        logits=_log(weights),
        loss=loss,
        gap=gap,
        converged=converged,
        num_steps=num_steps,
        std=deviations[0] if return_std else None,
    )


def _logits(method: PublishedAdam, num_users: int, rank: int, dtype) -> np.ndarray:
    """The start of `PublishedAdam`, float[U, K]."""
    if method.init is not None:
        _checks.check_weights(method.init, num_users, rank, "method.init")
        _checks.check_finite(method.init, "method.init")
        return np.asarray(method.init)
    key = jax.random.key(0) if method.key is None else method.key
    _checks.check_key(key, "method.key")
    return np.asarray(jax.random.normal(key, (num_users, rank), dtype))


def _widened(arrays, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), jax.device_get(arrays))


def _log(weights):
    """Log-weights where the weights are; a weight of 0 counts as the least number."""
    if isinstance(weights, jax.Array):
        return _log_on_device(weights)
    return np.log(np.maximum(weights, np.finfo(weights.dtype).tiny))


@jax.jit
def _log_on_device(weights):
    return jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))


def _solver(method, prior, rank, temperature, dtype, unit_weights, return_std) -> Any:
    """A function (z, weight, label, start) → the arrays of `Adapted` for one chunk.

    By the primal-dual solver, unless `solvers` says otherwise.
    """
    # One program serves all temperatures.
    scale = np.asarray(1 / temperature, dtype)
    if isinstance(method, MaximumLikelihood):
        return lambda z, w, y, _, **kinds: _maximum_likelihood(z, w, y, scale, **kinds)
    if isinstance(method, MAP):
        alpha = to_array(method.alpha, dtype)
        if alpha.shape not in ((), (rank,)):
            raise ValueError(
                f"method.alpha must be one number or K={rank} of them, got "
                f"{alpha.shape[0]}"
            )
        alpha = jnp.broadcast_to(alpha, (rank,))
        return lambda z, w, y, _, **kinds: _maximum_a_posteriori(
            z, w, y, scale, alpha, **kinds
        )
    if isinstance(method, PublishedAdam):
        rate, steps = to_array(method.learning_rate, dtype), int(method.num_steps)
        return lambda z, w, y, start: _published_adam(
            z, w, y, scale, start, rate, num_steps=steps
        )
    prior = jax.tree.map(lambda x: to_array(x, dtype), prior)
    return lambda z, w, y, _, **kinds: _posterior(
        z, w, y, scale, prior, unit_weights=unit_weights, std=return_std, **kinds
    )


@functools.partial(jax.jit, static_argnames=("solvers", "stored"))
def _maximum_likelihood(
    z, weight, label, scale, *, solvers=(PRIMAL_DUAL,), stored=None
):
    weights = _normalised(weight)
    solution = certified_maximum_likelihood(
        z * scale, weights, label=label, solvers=solvers
    )
    if stored is not None:
        solution = store_as(stored, solution, z * scale, weights, label)
    return solution._replace(value=_mean_loss(z * scale, weight, label, solution))


@functools.partial(jax.jit, static_argnames=("solvers", "stored"))
def _maximum_a_posteriori(
    z, weight, label, scale, alpha, *, solvers=(PRIMAL_DUAL,), stored=None
):
    barrier = jnp.broadcast_to(alpha[None], (len(z), len(alpha)))
    solution = certified_map(z * scale, weight, barrier, label=label, solvers=solvers)
    if stored is not None:
        solution = store_as(stored, solution, z * scale, weight, label, barrier)
    return solution._replace(value=_mean_loss(z * scale, weight, label, solution))


@functools.partial(
    jax.jit, static_argnames=("unit_weights", "std", "solvers", "stored")
)
def _posterior(
    z,
    weight,
    label,
    scale,
    prior,
    *,
    unit_weights,
    std,
    solvers=(PRIMAL_DUAL,),
    stored=None,
):
    z = z * scale
    kinds = dict(unit_weights=unit_weights, solvers=solvers, stored=stored)
    solution = solve_posterior(z, weight, prior, label, **kinds)
    solution = solution._replace(value=_mean_loss(z, weight, label, solution))
    if not std:
        return solution
    arrays = z, weight, label, solution.weights, prior
    if stored is not None:  # As `posterior` computes it.
        arrays = jax.tree.map(lambda x: x.astype(stored), arrays)
    moments = moments_of(*arrays, unit_weights=unit_weights)
    return *solution, standard_deviation(moments)


@public()
def adapt_users(
    z: jax.Array,
    sample_weight: jax.Array,
    prior: Prior,
    *,
    label: jax.Array | None = None,
    unit_weights: bool = False,
    solvers: tuple[str, ...] = BOTH,
) -> Solution:
    """What `adapt` solves by default, as a pure function of arrays.

    For use under jit, vmap, shard_map and grad: derivatives with respect to `z` (and
    through z = x · V / T to V) and to the prior are implicit, at the optimum.

    Args:
      z: float[U, P, K], reward differences of each pair, divided by T.
      sample_weight: float[U, P], weight of each pair; 0 is padding.
      prior: of the model.
      label: float[U, P], P(first is preferred); None means 1.
      unit_weights: every weight is 0 or 1, which is faster.
      solvers: "primal_dual", then "with_pair_duals" for the users that the first leaves
        unsolved. One alone compiles in half the time; `converged` says whom it solved.

    Returns:
      `Solution`, weights float[U, K].

    Raises:
      ValueError: shapes disagree, a concrete number is not finite, or `solvers` names
        another.
      TypeError: `prior` is something else.

    Example:
      >>> prior = lore.uniform_prior(2)
      >>> found = lore.adapt_users(np.ones((1, 3, 2)), np.zeros((1, 3)), prior)
      >>> np.asarray(found.weights).round(2).tolist()
      [[0.5, 0.5]]
    """
    _tables.check_pairs(z, sample_weight, label)
    check_prior(prior, np.shape(z)[2])
    kinds = dict(unit_weights=unit_weights, solvers=solvers)
    return solve_posterior(z, sample_weight, prior, label, **kinds)


def solve_posterior(
    z, weight, prior: Prior, label, *, unit_weights, solvers=BOTH, stored=None
):
    """`adapt_users` without checks, or judged with weights that are `stored` so."""
    mean = posterior_mean(z, weight, label, prior, unit_weights=unit_weights)
    finite = jnp.isfinite(prior.concentration)
    total = jnp.sum(weight, axis=1)
    barrier = pull_towards_mean(total, prior)[:, None] * mean
    power = likelihood_power(total, prior.tempering)
    solution = certified_map(
        z, power[:, None] * weight, barrier, label=label, start=mean, solvers=solvers
    )
    if stored is not None:
        weighted = power[:, None] * weight
        solution = store_as(stored, solution, z, weighted, label, barrier)
    empty = total == 0
    weights = jnp.where(finite, solution.weights, mean)
    weights = jnp.where(empty[:, None], prior.mean[None], weights)
    solved = finite & ~empty
    return Solution(
        weights,
        solution.value,
        jnp.where(solved, solution.gap, 0),
        solution.converged | ~solved,
        jnp.where(solved, solution.num_steps, 0),
    )


@functools.partial(jax.jit, static_argnames="num_steps")
def _published_adam(z, weight, label, scale, start, learning_rate, *, num_steps):
    z = z * scale
    normalised = _normalised(weight)
    optimiser = optax.adam(learning_rate)

    def total(logits):
        return jnp.sum(_weighted_loss(z, normalised, label, _softmax(logits)))

    def step(carry, _):
        logits, state = carry
        updates, state = optimiser.update(jax.grad(total)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = lax.scan(step, (start, optimiser.init(start)), length=num_steps)
    weights = _softmax(jnp.asarray(logits))
    gradient = jax.grad(lambda p: jnp.sum(_weighted_loss(z, normalised, label, p)))(
        weights
    )
    gap = jnp.sum(weights * gradient, axis=1) - jnp.min(gradient, axis=1)
    size = jnp.max(jnp.abs(z) * (weight > 0)[..., None], axis=(1, 2))
    off = ROUNDING * jnp.finfo(z.dtype).eps * size
    gap = jnp.where(is_large(z.dtype, size), gap + off, gap)
    loss = _weighted_loss(z, normalised, label, weights)
    converged = within_tolerance(z.dtype, gap, size, 1, 0, loss)
    steps = jnp.full(len(z), num_steps, jnp.int32)
    solution = Solution(weights, gap, gap, converged, steps)
    return solution._replace(value=_mean_loss(z, weight, label, solution))


_softmax = functools.partial(jax.nn.softmax, axis=-1)


def _normalised(weight):
    total = jnp.sum(weight, axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def _weighted_loss(z, weight, label, weights):
    """Σ_n weight_n ℓ(z_n · p), float[U]."""
    m = _equations.mix(z, weights[:, None])
    return jnp.sum(weight * _equations.pair_loss(m, label), axis=1)


def _mean_loss(z, weight, label, solution):
    """What `Adapted.loss` holds: NaN for users without a pair."""
    loss = _weighted_loss(z, _normalised(weight), label, solution.weights)
    return jnp.where(jnp.sum(weight, axis=1) > 0, loss, jnp.nan)
