"""New users against a frozen basis: thousands to millions in one call.

The table is read once; everything after that happens on the reward floor, in chunks
of a few fixed shapes, so that batches of any size reuse the same compiled programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lore_jax import _checks, _tables
from lore_jax._backend import for_each
from lore_jax._entry import public
from lore_jax._pairs.blocks import project_rows
from lore_jax._pairs.pack import Chunk, chunk_reader, chunks
from lore_jax._posterior.moments import deviation, mixture_of
from lore_jax._posterior.table import posterior_mean
from lore_jax._solve.simplex import (
    BOTH,
    CAREFUL,
    FAST,
    Solution,
    maximum_a_posteriori,
    maximum_likelihood,
)
from lore_jax.config import AdaptConfig
from lore_jax.losses import pair_loss
from lore_jax.model import mix, mixture_weights
from lore_jax.preferences import Preferences
from lore_jax.prior import (
    Prior,
    check_prior,
    likelihood_power,
    pull_towards_mean,
    uniform_prior,
)
from lore_jax.results import Adapted


@public("adapt_users, a function of arrays")
def adapt(
    basis: jax.Array,
    prefs: Preferences,
    *,
    prior: Prior | None = None,
    config: AdaptConfig | None = None,
    init: jax.Array | None = None,
    spread: bool = False,
) -> Adapted:
    """Weights of every user of `prefs`, against a frozen basis.

    With f_u(p) = Σ_n ℓ(z_n · p / T, y_n) over a user's pairs, the default returns

        argmin_p  η_u f_u(p) − κ_u Σ_k p̄_k log p_k   on the simplex,

    p̄ the posterior mean over the prior's atoms, η_u = n_u^−γ and κ_u = κ (n_u / 10)^−δ;
    a user without pairs gets the prior's mean. "maximum_likelihood" minimises f_u,
    "maximum_a_posteriori" f_u(p) − Σ_k α_k log p_k, "reference" runs Adam on logits as
    published.

    Args:
      basis: V, float[D, K].
      prefs: pairs of U users. NumPy features are read in blocks of fixed shape: use
        them for serving; JAX arrays are read in one product.
      prior: what `fit` learned; None is Dirichlet(1).
      config: default `AdaptConfig()`.
      init: float[U, K], starting logits of "reference".
      spread: also return the posterior's standard deviation of every weight (see
        `posterior` for its density and covariances); the default method only.

    Returns:
      `Adapted`; a user's result does not depend on the others' (except that the
      random start of "reference" goes by the user's place: give `init` to fix it).

    Raises:
      ValueError: shapes or temperatures disagree.
      TypeError: `config` or `prior` is something else.

    References:
      Bose et al., 2025 (https://arxiv.org/abs/2504.14439), section 3.3.
    """
    _checks.check_type(prefs, Preferences, "prefs")
    config = AdaptConfig() if config is None else config
    if not isinstance(config, AdaptConfig):
        raise TypeError(f"config must be an AdaptConfig, got {type(config)}")
    _checks.check_basis(basis, prefs.num_features)
    rank = np.shape(basis)[1]
    if init is not None:
        if config.method != "reference":
            raise ValueError(
                f"init belongs to AdaptConfig.reference(); method {config.method!r} "
                "has a unique optimum"
            )
        _checks.check_weights(init, prefs.num_users, rank, "init")
        _checks.check_finite(init, "init")
    if spread and config.method != "posterior":
        raise ValueError(f"spread is a posterior's; method {config.method!r} has none")
    if prior is not None:
        check_prior(prior, rank)
    temperature = _temperature(config, prior)
    dtype = jnp.result_type(basis, jnp.float32)
    proj = project_rows(prefs.features, basis)  # goes on while the next lines run
    solve = _solver(
        config, prior, rank, temperature, dtype, prefs.weight is None, spread
    )
    if config.method == "reference" and init is None:
        key = jax.random.key(config.seed)
        init = jax.random.normal(key, (prefs.num_users, rank), dtype)
    shapes = ((rank,), dtype), ((), dtype), ((), dtype), ((), bool), ((), np.int32)
    shapes = (*shapes, ((rank,), dtype))[: 5 + spread]
    out = [np.empty((prefs.num_users, *shape), kind) for shape, kind in shapes]
    logits = np.empty_like(out[0])
    _tables.check_projected(proj, prefs.features, temperature)
    read = chunk_reader(proj, prefs)
    counts, offsets = np.asarray(prefs.counts), np.asarray(prefs.offsets)

    def solve_users(users, **kinds):
        def solve_chunk(chunk):
            chunk = chunk._replace(users=users[chunk.users])
            start = None if init is None else _padded(np.asarray(init), chunk)
            solution, place = solve(*read(chunk), start, **kinds), chunk.place
            for target, values in zip(out, jax.device_get(solution), strict=True):
                target[place] = values[: len(chunk.users)]
            logits[place] = np.log(np.maximum(out[0][place], np.finfo(dtype).tiny))

        for_each(solve_chunk, chunks(counts[users], offsets[users]))

    solve_users(np.arange(prefs.num_users))
    if config.method != "reference":  # Few, if any: most calls compile no more for it.
        hard = np.flatnonzero(~out[3])
        steps = out[4][hard]
        solve_users(hard, solvers=(CAREFUL,))
        out[4][hard] += steps
    weights, loss, gap, converged, num_steps, *deviations = out
    return Adapted(
        weights=weights,
        logits=logits,
        loss=loss,
        gap=gap,
        converged=converged,
        num_steps=num_steps,
        user_ids=None if prefs.ids is None else prefs.ids.users,
        deviation=deviations[0] if spread else None,
    )


def _padded(rows: np.ndarray, chunk: Chunk) -> np.ndarray:
    out = np.zeros((len(chunk.count), rows.shape[1]), rows.dtype)
    out[: len(chunk.users)] = rows[chunk.users]
    return out


def _temperature(config: AdaptConfig, prior: Prior | None) -> float:
    if prior is None:
        return 1.0 if config.temperature is None else config.temperature
    if config.temperature is None:
        return prior.temperature
    names = "config.temperature and prior.temperature"
    _checks.check_same_temperature(config.temperature, prior.temperature, names)
    return config.temperature


def _solver(config, prior, rank, temperature, dtype, unit_weights, spread):
    """A function (z, weight, label, start) → the arrays of `Adapted` for one chunk.

    By the fast solver, unless `solvers` says otherwise.
    """
    scale = np.asarray(1 / temperature, dtype)
    if config.method == "maximum_likelihood":
        return lambda z, w, y, _, **kinds: _maximum_likelihood(z, w, y, scale, **kinds)
    if config.method == "maximum_a_posteriori":
        alpha = jnp.asarray(config.alpha, dtype)
        if alpha.shape not in ((), (rank,)):
            raise ValueError(
                f"config.alpha must be one number or K={rank} of them, got "
                f"{alpha.shape[0]}"
            )
        alpha = jnp.broadcast_to(alpha, (rank,))
        return lambda z, w, y, _, **kinds: _maximum_a_posteriori(
            z, w, y, scale, alpha, **kinds
        )
    if config.method == "reference":
        rate = jnp.asarray(config.learning_rate, dtype)
        steps = config.num_steps
        return lambda z, w, y, start: _reference(
            z, w, y, scale, start, rate, num_steps=steps
        )
    prior = uniform_prior(rank, temperature) if prior is None else prior
    # The scale is passed apart: one program serves all temperatures.
    prior = jax.tree.map(
        lambda x: x if getattr(x, "dtype", 0) == dtype else jnp.asarray(x, dtype), prior
    ).replace(temperature=1.0)
    return lambda z, w, y, _, **kinds: _posterior(
        z, w, y, scale, prior, unit_weights=unit_weights, spread=spread, **kinds
    )


@functools.partial(jax.jit, static_argnames="solvers")
def _maximum_likelihood(z, weight, label, scale, *, solvers=(FAST,)):
    weights = _normalised(weight)
    solution = maximum_likelihood(z * scale, weights, label=label, solvers=solvers)
    return solution._replace(value=_mean_loss(z * scale, weight, label, solution))


@functools.partial(jax.jit, static_argnames="solvers")
def _maximum_a_posteriori(z, weight, label, scale, alpha, *, solvers=(FAST,)):
    barrier = jnp.broadcast_to(alpha[None], (len(z), len(alpha)))
    solution = maximum_a_posteriori(
        z * scale, weight, barrier, label=label, solvers=solvers
    )
    return solution._replace(value=_mean_loss(z * scale, weight, label, solution))


@functools.partial(jax.jit, static_argnames=("unit_weights", "spread", "solvers"))
def _posterior(
    z, weight, label, scale, prior, *, unit_weights, spread, solvers=(FAST,)
):
    z = z * scale
    kinds = dict(unit_weights=unit_weights, solvers=solvers)
    solution = adapt_users(z, weight, prior, label=label, **kinds)
    solution = solution._replace(value=_mean_loss(z, weight, label, solution))
    if not spread:
        return solution
    arrays = z, weight, label, solution.weights, prior
    return *solution, deviation(mixture_of(*arrays, unit_weights=unit_weights))


@public()
def adapt_users(
    z: jax.Array,
    weight: jax.Array,
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
      weight: float[U, P], pair weights; 0 is padding.
      prior: its temperature is not used.
      label: float[U, P], P(first is preferred); None means 1.
      unit_weights: every weight is 0 or 1, which is faster.
      solvers: "fast", then "careful" for the users whom it leaves; one alone compiles
        in half the time, and `converged` says whom it solved.

    Returns:
      `Solution`, weights float[U, K].

    Raises:
      ValueError: shapes disagree, a concrete number is not finite, or `solvers` names
        another.
      TypeError: `prior` is something else.
    """
    _tables.check_pairs(z, weight, label)
    check_prior(prior, np.shape(z)[2])
    mean = posterior_mean(z, weight, label, prior, unit_weights=unit_weights)
    finite = jnp.isfinite(prior.concentration)
    total = jnp.sum(weight, axis=1)
    barrier = pull_towards_mean(total, prior)[:, None] * mean
    power = likelihood_power(total, prior.tempering)
    solution = maximum_a_posteriori(
        z, power[:, None] * weight, barrier, label=label, start=mean, solvers=solvers
    )
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
def _reference(z, weight, label, scale, start, learning_rate, *, num_steps):
    z = z * scale
    normalised = _normalised(weight)
    optimiser = optax.adam(learning_rate)

    def total(logits):
        return jnp.sum(_weighted_loss(z, normalised, label, mixture_weights(logits)))

    def step(carry, _):
        logits, state = carry
        updates, state = optimiser.update(jax.grad(total)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = lax.scan(step, (start, optimiser.init(start)), length=num_steps)
    weights = mixture_weights(jnp.asarray(logits))
    gradient = jax.grad(lambda p: jnp.sum(_weighted_loss(z, normalised, label, p)))(
        weights
    )
    gap = jnp.sum(weights * gradient, axis=1) - jnp.min(gradient, axis=1)
    size = jnp.max(jnp.abs(z) * (weight > 0)[..., None], axis=(1, 2))
    tolerance = size * jnp.maximum(1e-5, jnp.finfo(z.dtype).eps * size)
    steps = jnp.full(len(z), num_steps, jnp.int32)
    solution = Solution(weights, gap, gap, gap <= tolerance, steps)
    return solution._replace(value=_mean_loss(z, weight, label, solution))


def _normalised(weight):
    total = jnp.sum(weight, axis=1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def _weighted_loss(z, weight, label, weights):
    """Σ_n weight_n ℓ(z_n · p), float[U]."""
    m = mix(z, weights[:, None])
    return jnp.sum(weight * pair_loss(m, label), axis=1)


def _mean_loss(z, weight, label, solution):
    """What `Adapted.loss` holds: NaN for users without a pair."""
    loss = _weighted_loss(z, _normalised(weight), label, solution.weights)
    return jnp.where(jnp.sum(weight, axis=1) > 0, loss, jnp.nan)
