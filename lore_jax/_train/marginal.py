"""The default recipe: V on the tempered marginal likelihood over a finite prior.

    minimise_θ,π  −Σ_u log Σ_a π_a (Π_n σ(z_n · atom_a / T))^η_u + λ/2 ‖θ‖²

with V a linear map of θ (`coordinates`). A step is a W step, the posterior over atoms
(the users' weights are integrated out, so they cannot over-fit), an EM update of π, and
a V step, one Adam step given that posterior.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec as P

from lore_jax._backend import EXACT, cpu_branch, to_array, tuning
from lore_jax._mesh import AXIS, Exchange, MeshSource, Partition, first
from lore_jax._pairs.pack import Bucket, Pairs, count_users, make_buckets
from lore_jax._pairs.row_sums import (
    PairIndex,
    SideCounts,
    count_sides,
    make_pair_index,
    sum_pairs,
)
from lore_jax._solve.interior_point import fold
from lore_jax._train import steps
from lore_jax._train.coordinates import Coordinates, basis_of, slope_of
from lore_jax.preferences import FeatureSource
from lore_jax.prior import likelihood_power
from lore_jax.results import Metrics

_WARM_UP = 0.05


_INSIDE: Any = "promise_in_bounds"
_OWN = "coordinates", "num_users"  # the same on every device, but of one training
_WHOLE = *_OWN, "atoms", "base"
_SHARED = "features", "num_chunks", "atoms", "base", "exchange"  # of all side by side


class MarginalProblem(struct.PyTreeNode):
    """What a step reads.

    Attributes:
      features: float[M, D], or None where a source is read in blocks.
      coordinates: how V follows from θ.
      buckets: all users with a pair.
      num_chunks: int32[] of each bucket, how many of its chunks hold users.
      num_users: float[], how many those are.
      atoms: float[A, K].
      base: float[A], π before any user; on the simplex.
      index: which slopes each row of the table sums up; None where they are scattered.
      num_features: D.
      unit_weights: every real pair weighs 1.
      exchange: of rows that several devices of a mesh use, or None.
    """

    features: jax.Array | None
    coordinates: Coordinates
    buckets: tuple[Bucket, ...]
    num_chunks: tuple[jax.Array, ...]
    num_users: jax.Array
    atoms: jax.Array
    base: jax.Array
    index: PairIndex | None = None
    exchange: Exchange | None = None
    num_features: int = struct.field(pytree_node=False, default=0)
    unit_weights: bool = struct.field(pytree_node=False, default=False)


class Settings(NamedTuple):
    """Numbers that candidates differ in; they are data, so one program serves all.

    Attributes:
      ridge: λ, float[]; 1 / √λ is the prior's standard deviation of a pair's margin.
      tempering: γ, float[]; η_u = (pairs of u)^−γ.
      temperature: T, float[].
      pseudo_users: float[], users' worth of `MarginalProblem.base` in the EM update.
      ramp_steps: float[], steps over which γ rises from 0: a start tempered in full
        can collapse onto one direction for everybody.
    """

    ridge: jax.Array
    tempering: jax.Array
    temperature: jax.Array
    pseudo_users: jax.Array
    ramp_steps: jax.Array


class MarginalState(struct.PyTreeNode):
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
    features: Any,
    pairs: Pairs,
    atoms: jax.Array,
    base: jax.Array | np.ndarray,
    coordinates: Coordinates,
    capacity: np.ndarray | None = None,
    side_counts: SideCounts | None = None,
) -> MarginalProblem:
    """Lays the pairs out for `run`.

    Args:
      features: float[M, D], or a source.
      pairs: the pairs over its rows.
      atoms: float[A, K].
      base: float[A], π before any user.
      coordinates: how V follows from θ.
      capacity: int[U], at least `pairs.counts`: problems with the same capacity have
        the same shapes, so one compiled program serves every split of a data set.
      side_counts: likewise, at least those of `pairs`.
    """
    source = isinstance(features, FeatureSource)
    capacity = pairs.counts if capacity is None else np.asarray(capacity)
    laid_out = make_buckets(pairs, len(atoms), atoms.dtype, capacity)
    buckets, num_chunks, position = laid_out
    index = None
    if not tuning(features).scatters:
        sides = pairs.chosen, pairs.rejected
        counts = side_counts or count_sides(*sides, features.shape[0])
        num_slots = sum(bucket.weight.size for bucket in buckets)
        index = make_pair_index(*sides, position, num_slots, counts)
    return MarginalProblem(
        features=None if source else to_array(features),
        coordinates=coordinates,
        buckets=buckets,
        num_chunks=num_chunks,
        num_users=to_array(count_users(pairs), atoms.dtype),
        atoms=atoms,
        base=to_array(base, atoms.dtype),
        index=index,
        num_features=features.shape[1],
        unit_weights=pairs.unit_weights,
    )


def make_mesh_problem(
    features: jax.Array | MeshSource,
    pairs: Pairs,
    atoms: jax.Array,
    base: jax.Array | np.ndarray,
    coordinates: Coordinates,
    partition: Partition,
) -> MarginalProblem:
    """`make_problem` in parts, one per device.

    Args:
      features: float[devices, m, D] or a source, of `Partition.table`.
      pairs: all pairs of a training, of all devices.
      atoms: float[A, K].
      base: float[A].
      coordinates: the same on every device.
      partition: of all pairs of the fit.
    """
    rows = np.zeros(features.shape[1:], features.dtype)  # Its shape is all that counts.
    whole = {
        "coordinates": coordinates,
        "num_users": to_array(count_users(pairs), atoms.dtype),
        "atoms": atoms,
        "base": to_array(base, atoms.dtype),
    }
    parts = [
        make_problem(rows, part, atoms, base, coordinates, capacity, sides).replace(
            features=None, exchange=exchange, **dict.fromkeys(whole)
        )
        for part, (capacity, sides), exchange in zip(
            *(partition.pairs(pairs), partition.shapes(), partition.exchanges()),
            strict=True,
        )
    ]
    held = None if isinstance(features, MeshSource) else features
    return partition.stack(parts).replace(features=held, **whole)


def init(
    key: jax.Array, problem: MarginalProblem, std: float, optimiser
) -> MarginalState:
    """A random start: θ normal with standard deviation `std`, π at its base."""
    shape = (problem.coordinates.size, problem.atoms.shape[1])
    theta = std * jax.random.normal(key, shape, problem.atoms.dtype)
    return init_from(theta, problem, optimiser)


def init_from(theta: jax.Array, problem: MarginalProblem, optimiser) -> MarginalState:
    """The state at θ, float[R, K], with π at its base."""
    log_weights = to_array(np.log(np.asarray(problem.base)))
    count = to_array(0, np.int32)
    return MarginalState(theta, log_weights, optimiser.init(theta), count)


@functools.cache
def make_optimiser(learning_rate: float, num_steps: int):
    """Adam with a short warm-up and a cosine decay to 0."""
    warm = max(1, round(_WARM_UP * num_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warm, max(num_steps, warm + 1)
    )
    return optax.adam(schedule, b2=0.99)


class MarginalInputs(NamedTuple):
    """What a step reads.

    Attributes:
      problem: the pairs, and the table unless it comes from a source.
      settings: the candidate's numbers.
    """

    problem: MarginalProblem
    settings: Settings

    @property
    def features(self):
        """float[M, D], or None."""
        return self.problem.features

    @property
    def exchange(self):
        """Of rows that several devices use, or None."""
        return self.problem.exchange

    def axes(self) -> Any:
        """`in_axes` of what `stack` made: 0 where trainings differ."""
        axes: Any = jax.tree.map(lambda _: 0, self)
        problem = axes.problem.replace(**dict.fromkeys(_SHARED))
        return axes._replace(problem=problem)

    def specs(self) -> "MarginalInputs":
        """Which arrays are in parts on a mesh: those of pairs and rows."""
        parts: Any = jax.tree.map(lambda _: P(AXIS), self.problem)
        whole = {name: getattr(self.problem, name) for name in _WHOLE}
        whole, settings = jax.tree.map(lambda _: P(), (whole, self.settings))
        return MarginalInputs(parts.replace(**whole), settings)

    def local(self) -> "MarginalInputs":
        """One device's part, inside of `shard_map`."""
        whole = {name: getattr(self.problem, name) for name in _WHOLE}
        parts: Any = self.problem.replace(**dict.fromkeys(_WHOLE))
        return MarginalInputs(first(parts).replace(**whole), self.settings)

    def state_specs(self, state: MarginalState) -> Any:
        """No part of the state is of a device alone."""
        return jax.tree.map(lambda _: P(), state)

    def own_state(self, state: MarginalState) -> MarginalState:
        """The state that a device sees."""
        return state

    def part_of_state(self, state: MarginalState) -> MarginalState:
        """What a device gives back."""
        return state


def stack(inputs: Sequence[MarginalInputs], on_mesh: bool = False) -> MarginalInputs:
    """What several trainings of one rank read, for `steps.side_by_side`.

    Their problems have the same shapes. Chunks that only some of them fill hold nobody
    elsewhere.

    Args:
      inputs: of each training.
      on_mesh: the problems are of `make_mesh_problem`.
    """
    problems = [x.problem for x in inputs]
    own = {name: _stacked([getattr(x, name) for x in problems]) for name in _OWN}
    bare = [x.replace(**dict.fromkeys((*_SHARED, *_OWN))) for x in problems]
    shared = {name: getattr(problems[0], name) for name in _SHARED}
    counts = [x.num_chunks for x in problems]
    shared["num_chunks"] = jax.tree.map(lambda *x: jnp.stack(x).max(0), *counts)
    problem = _stacked(bare, int(on_mesh)).replace(**shared, **own)
    return MarginalInputs(problem, _stacked([x.settings for x in inputs]))


def _stacked(trees: list, axis: int = 0) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x, axis), *trees)


@functools.cache
def make_steps(optimiser) -> steps.Steps:
    """Posterior over atoms, EM on π, an Adam step on θ; cached to reuse programs."""
    return steps.Steps(_basis, _slopes, functools.partial(_update, optimiser))


def _basis(state: MarginalState, data: MarginalInputs) -> jax.Array:
    return basis_of(state.theta, data.problem.coordinates)


def _slopes(proj, state: MarginalState, data: MarginalInputs):
    """(slopes float[M, K], (log marginal, posteriors' sum float[A]), None)."""
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

    def add_chunk(bucket, first, i, sums):
        chunk = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), bucket)
        log_marginal, share, gradient = sums
        value, posterior, slopes = chunk_of(chunk)
        if problem.index is not None:  # Kept as they are, and summed up at the end.
            place = first + i * slopes.shape[1]
            gradient = lax.dynamic_update_slice_in_dim(gradient, slopes, place, axis=1)
        else:
            gradient = _add(gradient, chunk.chosen, slopes)
            if chunk.rejected is not None:
                gradient = _add(gradient, chunk.rejected, -slopes)
        return log_marginal + value, share + posterior, gradient

    num_slots = sum(bucket.weight.size for bucket in problem.buckets)
    shape = proj.shape if problem.index is None else (len(proj), num_slots)
    sums = (
        jnp.zeros((), proj.dtype),
        jnp.zeros_like(state.log_weights),
        jnp.zeros(shape, proj.dtype),
    )
    first = 0
    for bucket, count in zip(problem.buckets, problem.num_chunks, strict=True):
        add = functools.partial(add_chunk, bucket, first)
        sums = lax.fori_loop(0, count, add, sums)
        first += bucket.weight.size
    log_marginal, share, gradient = sums
    if problem.index is not None:
        gradient = sum_pairs(gradient, problem.index)
    slopes = -(gradient if by_rows else gradient.T) / settings.temperature
    return slopes, (log_marginal, share), None


def _by_rows(rank: int) -> bool:
    """Whether pairs read and add to [M, K]; if not, [K, M].

    Columns need no transpose of what has users minor-most, rows fewer cache lines.
    """
    above = tuning().rows_above
    return above is not None and rank > above


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


def _update(optimiser, slope, sums, own, state: MarginalState, data: MarginalInputs):
    del own
    problem, settings = data
    log_marginal, share = sums
    total = problem.num_users + settings.pseudo_users
    weights = (share + settings.pseudo_users * problem.base) / total
    log_weights = jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny))
    g_theta = slope_of(slope, problem.coordinates) + settings.ridge * state.theta
    updates, opt_state = optimiser.update(g_theta, state.opt_state, state.theta)
    change = jnp.exp(log_weights) - jnp.exp(state.log_weights)
    metrics = Metrics(
        -log_marginal / problem.num_users,
        jnp.linalg.norm(change),
        jnp.linalg.norm(g_theta),
    )
    theta: Any = optax.apply_updates(state.theta, updates)
    return MarginalState(theta, log_weights, opt_state, state.count + 1), metrics


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
    shared = functools.partial(jnp.matmul, precision=EXACT)
    m = shared(atoms, z).reshape(-1, group, groups * users)
    # Without the barrier XLA recomputes both for every consumer.
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

    slopes = cpu_branch(weigh, jnp.any(real), tanh).reshape(len(atoms), -1)
    slopes = shared(atoms.T, slopes)
    value = jnp.sum((top + jnp.log(mass)) * real)
    return value, jnp.sum(posterior, axis=1), slopes * each
