"""The default recipe: V on the tempered marginal likelihood over a finite prior.

    minimise_θ,π  −Σ_u log Σ_a π_a (Π_n σ(z_n · atom_a / T))^η_u + λ/2 ‖θ‖²

with V a linear map of θ (`coordinates`). A step is a W step, the posterior over atoms
(the users' weights are integrated out, so they cannot over-fit), an EM update of π, and
a V step, one Adam step given that posterior.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from lore_jax._backend import apart, sized
from lore_jax._pairs.pack import Bucket, count_users, make_buckets
from lore_jax._solve.interior_point import fold
from lore_jax._train import steps
from lore_jax._train.coordinates import Coordinates, basis_of, slope_of
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import likelihood_power
from lore_jax.results import Metrics

_WARM_UP = 0.05

_EXACT = lax.Precision.HIGHEST

_INSIDE: Any = "promise_in_bounds"


class Problem(struct.PyTreeNode):
    """What a step reads.

    Attributes:
      features: float[M, D], or None where a source is read in blocks.
      coordinates: how V follows from θ.
      buckets: all users with a pair.
      num_chunks: int32[] of each bucket, how many of its chunks hold users.
      num_users: float[], how many those are.
      atoms: float[A, K].
      base: float[A], π before any user; on the simplex.
      num_features: D.
      unit_weights: every real pair weighs 1.
    """

    features: jax.Array | None
    coordinates: Coordinates
    buckets: tuple[Bucket, ...]
    num_chunks: tuple[jax.Array, ...]
    num_users: jax.Array
    atoms: jax.Array
    base: jax.Array
    num_features: int = struct.field(pytree_node=False, default=0)
    unit_weights: bool = struct.field(pytree_node=False, default=False)


class Settings(NamedTuple):
    """Numbers that candidates differ in; they are data, so one program serves all.

    Attributes:
      ridge: λ, float[]; 1 / √λ is the prior's standard deviation of a pair's margin.
      tempering: γ, float[]; η_u = (pairs of u)^−γ.
      temperature: T, float[].
      pseudo_users: float[], users' worth of `Problem.base` in the EM update.
      ramp_steps: float[], steps over which γ rises from 0: a start tempered in full
        can collapse onto one direction for everybody.
    """

    ridge: jax.Array
    tempering: jax.Array
    temperature: jax.Array
    pseudo_users: jax.Array
    ramp_steps: jax.Array


class TrainState(struct.PyTreeNode):
    """Everything that a restart needs.

    Attributes:
      theta: float[R, K].
      log_weights: float[A], log π.
      opt_state: Adam's moments.
      count: int32[], steps taken.
    """

    theta: jax.Array
    log_weights: jax.Array
    opt_state: optax.OptState
    count: jax.Array


def make_problem(
    prefs: Preferences,
    atoms: jax.Array,
    base: jax.Array,
    coordinates: Coordinates,
    room: np.ndarray | None = None,
) -> Problem:
    """Lays the pairs out for `run`.

    Args:
      prefs: the pairs.
      atoms: float[A, K].
      base: float[A], π before any user.
      coordinates: how V follows from θ.
      room: int[U], at least `prefs.counts`: problems with the same room have the same
        shapes, so one compiled program serves every validation split of a data set.
    """
    counts = np.asarray(prefs.counts)
    source = isinstance(prefs.features, FeatureSource)
    room = counts if room is None else np.asarray(room)
    buckets, num_chunks = make_buckets(prefs, len(atoms), atoms.dtype, room)
    return Problem(
        features=None if source else jnp.asarray(prefs.features),
        coordinates=coordinates,
        buckets=buckets,
        num_chunks=num_chunks,
        num_users=jnp.asarray(count_users(prefs), atoms.dtype),
        atoms=atoms,
        base=jnp.asarray(base, atoms.dtype),
        num_features=prefs.num_features,
        unit_weights=prefs.weight is None,
    )


def init(key: jax.Array, problem: Problem, spread: float, optimiser) -> TrainState:
    """A random start: θ normal with standard deviation `spread`, π at its base."""
    shape = (problem.coordinates.size, problem.atoms.shape[1])
    theta = spread * jax.random.normal(key, shape, problem.atoms.dtype)
    return init_from(theta, problem, optimiser)


def init_from(theta: jax.Array, problem: Problem, optimiser) -> TrainState:
    """The state at θ, float[R, K], with π at its base."""
    count = jnp.zeros((), jnp.int32)
    return TrainState(theta, jnp.log(problem.base), optimiser.init(theta), count)


@functools.cache
def make_optimiser(learning_rate: float, num_steps: int):
    """Adam with a short warm-up and a cosine decay to 0."""
    warm = max(1, round(_WARM_UP * num_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warm, max(num_steps, warm + 1)
    )
    return optax.adam(schedule, b2=0.99)


class Data(NamedTuple):
    """What a step reads, for `descent`.

    Attributes:
      problem: the pairs, and the table unless it comes from a source.
      settings: the candidate's numbers.
    """

    problem: Problem
    settings: Settings

    @property
    def features(self):
        """float[M, D], or None."""
        return self.problem.features


@functools.cache
def make_recipe(optimiser) -> steps.Recipe:
    """Posterior over atoms, EM on π, an Adam step on θ; cached to reuse programs."""
    return steps.Recipe(_basis, _floor, functools.partial(_update, optimiser))


def _basis(state: TrainState, data: Data) -> jax.Array:
    return basis_of(state.theta, data.problem.coordinates)


def _floor(proj, state: TrainState, data: Data):
    """(slopes float[M, K], (log marginal, π's new logarithm))."""
    problem, settings = data
    by_rows = _by_rows(proj.shape[1])
    proj = (proj if by_rows else proj.T) / settings.temperature
    ramp = jnp.minimum(1, (state.count + 1) / settings.ramp_steps)
    chunk_of = functools.partial(
        _chunk,
        proj,
        problem.atoms,
        state.log_weights,
        settings.tempering * ramp.astype(proj.dtype),
        problem.unit_weights,
    )

    def add_chunk(bucket, i, sums):
        chunk = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), bucket)
        log_marginal, share, gradient = sums
        value, posterior, slopes = chunk_of(chunk)
        gradient = _add(gradient, chunk.chosen, slopes)
        if chunk.rejected is not None:
            gradient = _add(gradient, chunk.rejected, -slopes)
        return log_marginal + value, share + posterior, gradient

    sums = (
        jnp.zeros((), proj.dtype),
        jnp.zeros_like(state.log_weights),
        jnp.zeros_like(proj),
    )
    for bucket, count in zip(problem.buckets, problem.num_chunks, strict=True):
        sums = lax.fori_loop(0, count, functools.partial(add_chunk, bucket), sums)
    log_marginal, share, gradient = sums
    total = problem.num_users + settings.pseudo_users
    weights = (share + settings.pseudo_users * problem.base) / total
    log_weights = jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
    slopes = -(gradient if by_rows else gradient.T) / settings.temperature
    return slopes, (log_marginal, log_weights)


def _by_rows(rank: int) -> bool:
    """Whether pairs read and add to [M, K]; if not, [K, M].

    Columns need no transpose of what has users minor-most, rows fewer cache lines.
    """
    return sized(rank > 10, False)


def _take(table, places, rank: int):
    """Columns float[K, n] of [K, M], or of [M, K]."""
    if _by_rows(rank):
        return table.at[places.reshape(-1)].get(mode=_INSIDE).T
    return table.at[:, places.reshape(-1)].get(mode=_INSIDE)


def _add(table, places, values):
    """Adds columns float[K, n] to [K, M], or to [M, K]."""
    if _by_rows(len(values)):
        return table.at[places.reshape(-1)].add(values.T, mode=_INSIDE)
    return table.at[:, places.reshape(-1)].add(values, mode=_INSIDE)


def _update(optimiser, slope, between, state: TrainState, data: Data):
    problem, settings = data
    log_marginal, log_weights = between
    g_theta = slope_of(slope, problem.coordinates) + settings.ridge * state.theta
    updates, opt_state = optimiser.update(g_theta, state.opt_state, state.theta)
    change = jnp.exp(log_weights) - jnp.exp(state.log_weights)
    metrics = Metrics(
        -log_marginal / problem.num_users,
        jnp.linalg.norm(change),
        jnp.linalg.norm(g_theta),
    )
    theta: Any = optax.apply_updates(state.theta, updates)
    return TrainState(theta, log_weights, opt_state, state.count + 1), metrics


def _chunk(proj, atoms, log_weights, tempering, unit_weights, bucket):
    """(log marginal float[], posteriors' sum float[A], d/dz float[K, g · G · B]).

    With t = tanh(m / 2) of a margin m, P(y) and its slope come from one function:
    log σ(m) = min(m, 0) + log (1 + |t|) / 2 and 1 − σ(m) = (1 − t) / 2. One logarithm
    serves the g pairs of a group, as the product is at least 2⁻ᵍ.

    Args:
      proj: float[K, M] or, `_by_rows`, float[M, K]; divided by T.
      atoms: float[A, K].
      log_weights: float[A], log π.
      tempering: γ, float[].
      unit_weights: every pair that is not padding weighs 1; if not, g is 1.
      bucket: one chunk, without C.
    """
    weight, label = bucket.weight, bucket.label
    rank = atoms.shape[1]
    z = _take(proj, bucket.chosen, rank)
    if bucket.rejected is not None:
        z = z - _take(proj, bucket.rejected, rank)
    each = weight.reshape(1, -1)
    if unit_weights:  # What pads has margin 0.
        z = z * each
    group, groups, users = weight.shape
    shared = functools.partial(jnp.matmul, precision=_EXACT)
    m = shared(atoms, z).reshape(-1, group, groups * users)
    # Without the barrier XLA works both out for every reader.
    m, tanh = lax.optimization_barrier((m, jnp.tanh(m / 2)))
    logs, product = 0, 1
    for i in range(group):
        logs = logs + jnp.minimum(m[:, i], 0)
        product = product * (0.5 + 0.5 * jnp.abs(tanh[:, i]))
    logs = logs + jnp.log(product)
    if not unit_weights:
        logs = logs * each
    table = fold(jnp.add, jnp.swapaxes(logs.reshape(-1, groups, users), 0, 1))
    total = jnp.sum(weight, axis=(0, 1))
    if unit_weights:
        table = table + math.log(2) * (group * groups - total)[None]
    if label is not None:
        lost = (weight * (1 - label))[None] * z.reshape(-1, *weight.shape)
        table = table - shared(atoms, jnp.sum(lost, axis=(1, 2)))
    power = likelihood_power(total, tempering)[None]
    joint = power * table + log_weights[:, None]
    top = jnp.max(joint, axis=0)
    posterior = jnp.exp(joint - top[None])
    mass = jnp.sum(posterior, axis=0)
    real = total > 0
    posterior = posterior * jnp.where(real, 1 / mass, 0)[None]
    half = jnp.tile(power * posterior / 2, (1, groups))[:, None]
    won = 1 if label is None else 2 * label.reshape(1, group, -1) - 1

    def weigh(tanh):
        return half * (won - tanh)

    slopes = apart(weigh, jnp.any(real), tanh).reshape(len(atoms), -1)
    slopes = shared(atoms.T, slopes)
    value = jnp.sum((top + jnp.log(mass)) * real)
    return value, jnp.sum(posterior, axis=1), slopes * each
