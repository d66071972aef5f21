"""The two published training forms as init/step pairs; parity is tested to float64.

Both read the feature table twice a step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lore_jax._backend import cpu_branch, tuning
from lore_jax._equations import cosine_anchor, l2_anchor, pair_coefficients, pair_loss
from lore_jax._mesh import AXIS, Exchange, MeshSource, Partition, first
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import pack
from lore_jax._pairs.row_sums import (
    PairIndex,
    RowIndex,
    count_sides,
    make_pair_index,
    make_row_index,
    sum_pairs,
    sum_rows,
)
from lore_jax._train import steps
from lore_jax.config import PublishedAlternating, PublishedJoint
from lore_jax.model import RewardParams
from lore_jax.preferences import Preferences
from lore_jax.results import Metrics

PRUNE_BELOW = 1e-2

_softmax = functools.partial(jax.nn.softmax, axis=-1)
_INSIDE = "promise_in_bounds"


class PublishedState(struct.PyTreeNode):
    """Everything that a restart needs.

    Attributes:
      params: basis and logits.
      opt_logits: Adam's moments for W.
      opt_basis: Adam's moments for V.
      count: int32[], steps taken.
    """

    params: RewardParams
    opt_logits: optax.OptState
    opt_basis: optax.OptState
    count: jax.Array


class PublishedProblem(NamedTuple):
    """What a step reads.

    Attributes:
      prefs: the training pairs; its features are None where a source is read.
      anchor: float[D], v_ref; zeros where the anchor has no strength.
      rows: which slopes each row of the table sums up; None where they are scattered.
      users: the same of each user.
      coefficients: float[N], what each pair counts, of the parts of a mesh; None where
        a step works it out.
      exchange: of rows that several devices of a mesh use, or None.
    """

    prefs: Preferences
    anchor: jax.Array
    rows: PairIndex | None = None
    users: RowIndex | None = None
    coefficients: jax.Array | None = None
    exchange: Exchange | None = None

    @property
    def features(self):
        """float[M, D], or None."""
        return self.prefs.features

    def specs(self) -> "PublishedProblem":
        """Everything but the anchor is in parts on a mesh."""
        return jax.tree.map(lambda _: P(AXIS), self)._replace(anchor=P())

    def local(self) -> "PublishedProblem":
        """One device's part, inside of `shard_map`."""
        return first(self._replace(anchor=None))._replace(anchor=self.anchor)

    def state_specs(self, state: PublishedState) -> Any:
        """The users' logits and their moments are in parts."""
        whole = jax.tree.map(lambda _: P(), state)
        return _of_logits(lambda x: P(AXIS) if jnp.ndim(x) else P(), state, whole)

    def own_state(self, state: PublishedState) -> PublishedState:
        """One device's users, inside of `shard_map`."""
        return _of_logits(lambda x: x[0] if jnp.ndim(x) else x, state, state)

    def part_of_state(self, state: PublishedState) -> PublishedState:
        """The state of one device's users as a part."""
        return _of_logits(lambda x: x[None] if jnp.ndim(x) else x, state, state)


def _of_logits(function, state: PublishedState, other: Any) -> Any:
    """`other` with `function` of what belongs to users; scalars are Adam's count."""
    logits, moments = jax.tree.map(function, (state.params.logits, state.opt_logits))
    params = RewardParams(basis=other.params.basis, logits=logits)
    return other.replace(params=params, opt_logits=moments)


class PublishedTrainer(NamedTuple):
    """Pure functions; hashable, so it can be a static argument.

    Attributes:
      init: params → state; copies, so that a donated state leaves the caller's own.
      step: (state, problem) → (state, metrics).
      steps: the parts of the step.
    """

    init: Callable[[RewardParams], PublishedState]
    step: Callable[[PublishedState, PublishedProblem], tuple[PublishedState, Metrics]]
    steps: steps.Steps


def make_problem(prefs: Preferences, features, anchor) -> PublishedProblem:
    """What the steps read; the indices are made where `features` is on an accelerator.

    Args:
      prefs: the pairs; its features are None where a source is read.
      features: the table, an array or a source.
      anchor: float[D].
    """
    if tuning(features).scatters:
        return PublishedProblem(prefs, anchor)
    sides, every = (prefs.chosen, prefs.rejected), np.arange(len(prefs.chosen))
    counts = count_sides(*sides, features.shape[0])
    user = np.asarray(prefs.user)
    return PublishedProblem(
        prefs,
        anchor,
        make_pair_index(*sides, every, len(every), counts),
        make_row_index(
            user, every, len(every), np.bincount(user, minlength=prefs.num_users)
        ),
    )


def make_mesh_problem(
    prefs: Preferences, anchor, mesh: Mesh, joint: bool
) -> tuple[PublishedProblem, "OnMesh"]:
    """`make_problem` in parts, one per device, padded with pairs that count nothing.

    Args:
      prefs: the pairs of all devices.
      anchor: float[D].
      mesh: of `check_mesh`.
      joint: whether every user counts alike, as in `PublishedJoint`.
    """
    pairs, features = pack(prefs), prefs.features
    process = features.process if isinstance(features, DistributedTable) else None
    partition = Partition(mesh, pairs, features.shape[0], process)
    table = partition.table(features)
    dtype = jnp.promote_types(table.dtype, jnp.float32)
    coefficients = pairs.coefficients("users" if joint else "pairs")
    size = max(int(capacity.sum()) for capacity in partition.capacities)
    users = partition.num_users
    parts = []
    each = partition.pairs(pairs), partition.places(pairs), partition.shapes()
    for mine, keep, (capacity, counts), exchange in zip(
        *each, partition.exchanges(), strict=True
    ):
        more, real = size - len(mine.chosen), np.arange(len(mine.chosen))

        def padded(values, filler=0, more=more) -> Any:
            if values is None:
                return None
            return np.pad(values, (0, more), constant_values=filler)

        rows = by_user = None
        if not tuning(table).scatters:
            sides = mine.chosen, mine.rejected
            rows = make_pair_index(*sides, real, size, counts)
            by_user = make_row_index(mine.user, real, size, capacity)
        own = Preferences(
            features=None,
            chosen=padded(mine.chosen),
            rejected=padded(mine.rejected),
            user=padded(mine.user, users - 1).astype(np.int32),
            offsets=None,
            order=None,
            label=padded(mine.label),
            num_users=users,
        )
        share = padded(coefficients[keep]).astype(dtype)
        parts.append(PublishedProblem(own, None, rows, by_user, share, exchange))  # pyright: ignore[reportArgumentType]
    whole = partition.stack(parts)
    source = table if isinstance(table, MeshSource) else None
    held = None if source is not None else table
    problem = whole._replace(prefs=whole.prefs.replace(features=held), anchor=anchor)
    return problem, OnMesh(partition, source)


class OnMesh(NamedTuple):
    """How the state of a published form lies on a mesh.

    Attributes:
      partition: of the users.
      source: where the table is read in blocks, or None.
    """

    partition: Partition
    source: MeshSource | None

    def part(self, state: PublishedState) -> PublishedState:
        """Users' arrays [U, K] in parts."""
        place = lambda x: self.partition.user_parts(np.asarray(x))  # noqa: E731
        return _of_logits(lambda x: place(x) if jnp.ndim(x) else x, state, state)

    def whole(self, state: PublishedState) -> PublishedState:
        """Users' parts as NumPy arrays [U, K], on every process."""
        join = self.partition.join_users
        state = _of_logits(lambda x: join(x) if jnp.ndim(x) else x, state, state)
        return jax.tree.map(np.asarray, state)


@functools.cache
def make_trainer(recipe: PublishedJoint | PublishedAlternating) -> PublishedTrainer:
    """The trainer of a recipe; one per recipe, so programs are reused."""
    joint = isinstance(recipe, PublishedJoint)
    slopes = _joint_slopes if joint else _alternating_slopes
    optimiser = optax.adam(recipe.learning_rate)

    def init(params: RewardParams) -> PublishedState:
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        return PublishedState(
            params=params,
            opt_logits=optimiser.init(params.logits),
            opt_basis=optimiser.init(params.basis),
            count=jnp.zeros((), jnp.int32),
        )

    parts = steps.Steps(
        _basis,
        functools.partial(slopes, recipe, optimiser),
        functools.partial(_update, recipe, optimiser),
    )
    return PublishedTrainer(init, functools.partial(steps.step, parts), parts)


class _Own(NamedTuple):
    """W's half of a step: what belongs to the users."""

    logits: jax.Array
    opt_logits: optax.OptState


def _basis(state: PublishedState, problem: PublishedProblem) -> jax.Array:
    del problem
    return state.params.basis


def _joint_slopes(recipe, optimiser, proj, state, problem):
    """One Adam over (W, V) on Σ_u mean_n ℓ + α Σ_k ‖V_k − v_ref‖²."""
    pairs = PairSlopes(proj, problem, recipe.temperature, "users")
    loss, weights, slope = pairs.slopes(state.params.logits)
    g_logits = pairs.logits_slope(state.params.logits, slope)
    sums, own = _step_logits(optimiser, loss, g_logits, state)
    return pairs.proj_slope(weights, slope), sums, own


def _alternating_slopes(recipe, optimiser, proj, state, problem):
    """Adam on W; V descends given the new W."""
    pairs = PairSlopes(proj, problem, recipe.temperature, "pairs")
    loss, _, slope = pairs.slopes(state.params.logits)
    g_logits = pairs.logits_slope(state.params.logits, slope)
    sums, own = _step_logits(optimiser, loss, g_logits, state)
    _, weights, slope = pairs.slopes(own.logits)
    return pairs.proj_slope(weights, slope), sums, own


class PairSlopes:
    """`losses.bradley_terry_loss` of a projection and its derivatives, written out.

    Differentiating it takes half as long again where pairs outnumber rows. On a CPU
    what belongs to a pair has columns of zeros behind its K, float[N, K']: rows of 5
    are added up one number at a time.

    Args:
      proj: float[M, K].
      problem: N pairs of U users; its features are not read.
      temperature: T.
      weighting: "pairs" or "users".
    """

    def __init__(self, proj, problem: PublishedProblem, temperature, weighting):
        """Gathers both sides of every pair."""
        prefs = problem.prefs
        self.proj, self.prefs, self.temperature = proj, prefs, temperature
        self.problem = problem
        self.coefficients = self._coefficients(weighting)
        proj = _widen(proj)
        self.z = proj.at[prefs.chosen].get(mode=_INSIDE)
        if prefs.rejected is not None:
            self.z -= proj.at[prefs.rejected].get(mode=_INSIDE)

    def _coefficients(self, weighting):
        """What each pair counts in the loss, float[N]."""
        prefs, users = self.prefs, self.problem.users
        if self.problem.coefficients is not None:
            return self.problem.coefficients
        if users is None or weighting == "pairs":
            return pair_coefficients(prefs, weighting, self.proj.dtype)
        weight = jnp.ones(len(prefs.user), self.proj.dtype)
        if prefs.sample_weight is not None:
            weight = jnp.asarray(prefs.sample_weight).astype(weight.dtype)
        total = sum_rows(weight[None], users)[0]
        return weight / jnp.where(total > 0, total, 1)[prefs.user]

    def slopes(self, logits):
        """(loss, weights of every pair float[N, K'], d loss / d (z · p) float[N])."""
        prefs = self.prefs
        weights = _widen(_softmax(logits)).at[prefs.user].get(mode=_INSIDE)

        def margins(z, weights):
            parts = (z[:, k] * weights[:, k] for k in range(weights.shape[1]))
            return functools.reduce(jnp.add, parts) / self.temperature

        # Loss and slope would each compute it.
        m = cpu_branch(margins, jnp.any(prefs.user[:1] >= 0), self.z, weights)
        label = prefs.label
        loss = jnp.sum(self.coefficients * pair_loss(m, label))
        slope = -jax.nn.sigmoid(-m) if label is None else jax.nn.sigmoid(m) - label
        return loss, weights, self.coefficients * slope / self.temperature

    def logits_slope(self, logits, slope):
        """The loss's slope in the logits, float[U, K]."""
        weights, pullback = jax.vjp(_softmax, logits)
        pushed = (self.z * slope[:, None]).astype(weights.dtype)
        if self.problem.users is not None:
            total = sum_rows(pushed.T, self.problem.users).T
        else:
            total = jax.ops.segment_sum(
                pushed, self.prefs.user, len(weights), indices_are_sorted=True
            )
        return pullback(total[:, : weights.shape[1]])[0]

    def proj_slope(self, weights, slope):
        """The loss's slope in the projection, float[M, K]."""
        pushed = (weights * slope[:, None]).astype(self.proj.dtype)
        if self.problem.rows is not None:
            return sum_pairs(pushed.T, self.problem.rows).T[:, : self.proj.shape[1]]
        out = _widen(jnp.zeros_like(self.proj))
        if self.prefs.rejected is not None:
            out = -out.at[self.prefs.rejected].add(pushed, mode=_INSIDE)
        out = out.at[self.prefs.chosen].add(pushed, mode=_INSIDE)
        return out[:, : self.proj.shape[1]]


def _widen(x):
    """float[..., K] with the columns of zeros of `PairSlopes`."""
    rank = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, -rank % tuning().lanes if rank > 2 else 0)))


def _step_logits(optimiser, loss, slope, state) -> tuple[tuple, _Own]:
    stepped = _descend(optimiser, slope, state.opt_logits, state.params.logits)
    return (loss, jnp.sum(slope**2)), _Own(*stepped)


def _update(recipe, optimiser, slope, sums, own, state, problem):
    """Adam on V; the anchor acts here alone."""
    basis = state.params.basis
    if recipe.alpha and isinstance(recipe, PublishedJoint):
        slope = slope + recipe.alpha * jax.grad(l2_anchor)(basis, problem.anchor)
    elif recipe.alpha:
        alpha = _warm_up(recipe, state.count, slope.dtype)
        slope = slope + alpha * jax.grad(cosine_anchor)(basis, problem.anchor)
    basis, opt_basis = _descend(optimiser, slope, state.opt_basis, basis)
    loss, square = sums
    metrics = Metrics(loss, jnp.sqrt(square), optax.tree.norm(slope))
    params = RewardParams(basis=basis, logits=own.logits)
    count = state.count + 1
    return PublishedState(params, own.opt_logits, opt_basis, count), metrics


def _warm_up(recipe, count, dtype):
    """α_t: 0 for the first 20 % of the steps, linear up to 80 %, then α."""
    first, last = int(0.2 * recipe.num_steps), int(0.8 * recipe.num_steps)
    if first == last:
        return jnp.asarray(recipe.alpha, dtype)
    share = (count - first).astype(dtype) / (last - first)
    return recipe.alpha * jnp.clip(share, 0, 1)


def _descend(optimiser, grad, opt_state, value) -> tuple[Any, Any]:
    updates, opt_state = optimiser.update(grad, opt_state, value)
    return optax.apply_updates(value, updates), opt_state


def prune(params: RewardParams) -> tuple[Any, RewardParams]:
    """Drops directions whose largest mixture weight over users is below 1e-2.

    Returns:
      (kept int[K'], params of the kept directions; their logits are those of the
      kept mixture weights renormalised onto the simplex).
    """
    weights = np.asarray(_softmax(params.logits))
    kept = np.flatnonzero(weights.max(axis=0) >= PRUNE_BELOW)
    return kept, RewardParams(
        basis=params.basis[:, kept], logits=params.logits[:, kept]
    )
