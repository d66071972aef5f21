"""Steps of training, over a table in memory or over a source read in blocks.

A step projects the table, asks a pure function of the projection for the slope of the
objective in it, and back-projects that. In memory all of it is one
compiled program; from a source the two products run block by block on the host and the
rest is the same code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lore_jax import _equations
from lore_jax._backend import check_stopped, wait_for
from lore_jax._mesh import AXIS, first, on_devices, replicated, sum_over_devices
from lore_jax._pairs.blocks import back_project_rows, project_rows
from lore_jax.results import Metrics


class Steps(NamedTuple):
    """Three pure functions; hashable, so it can be a static argument.

    Attributes:
      basis: (state, problem) → V, float[D, K].
      slopes: (proj float[M, K], state, problem) → (slopes float[M, K], sums, own), the
        slope of what V descends on in proj, sums over pairs or users that `update`
        needs besides, and what it needs of the users themselves.
      update: (slope in V float[D, K], sums, own, state, problem) → (state, metrics).
    """

    basis: Callable[..., jax.Array]
    slopes: Callable[..., tuple[jax.Array, Any, Any]]
    update: Callable[..., tuple[Any, Metrics]]


def step(
    steps: Steps, state, problem, reduce: Callable[[Any], Any] | None = None
) -> tuple[Any, Metrics]:
    """One step in memory: two reads of `problem.features`.

    Args:
      steps: what a step is.
      state: before it.
      problem: what it reads.
      reduce: sums (slope in V, sums) over the devices of a mesh.
    """
    basis = steps.basis(state, problem)
    proj, pullback = jax.vjp(
        functools.partial(_equations.product, problem.features), basis
    )
    slopes, sums, own = _exchanged(steps, proj, state, problem)
    # A transpose left of slopes would change the form of the product.
    slopes = lax.optimization_barrier(slopes)
    slope = pullback(slopes)[0]
    if reduce is not None:
        slope, sums = reduce((slope, sums))
    return steps.update(slope, sums, own, state, problem)


def _exchanged(steps: Steps, proj, state, problem):
    """`Steps.slopes`, with rows that several devices of a mesh use."""
    if problem.exchange is not None:
        proj = problem.exchange.gather(proj)
    slopes, sums, own = steps.slopes(proj, state, problem)
    if problem.exchange is not None:
        slopes = problem.exchange.sum(slopes)
    return slopes, sums, own


@functools.cache
def side_by_side(steps: Steps, count: int) -> Steps:
    """Steps of several trainings of one rank: each product is one read for all.

    Args:
      steps: of one training.
      count: C, how many there are. States have a leading axis C, and so have arrays of
        the problem where `problem.axes()` says 0.
    """

    def basis(states, problem):
        each = jax.vmap(steps.basis, in_axes=(0, problem.axes()))(states, problem)
        return jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1)

    def slopes(proj, states, problem):
        each = proj.reshape(len(proj), count, -1)
        axes = 1, 0, problem.axes()
        call = jax.vmap(steps.slopes, in_axes=axes, out_axes=(1, 0, 0))
        slopes, sums, own = call(each, states, problem)
        return slopes.reshape(proj.shape), sums, own

    def update(slope, sums, own, states, problem):
        each = slope.reshape(len(slope), count, -1)
        call = jax.vmap(steps.update, in_axes=(1, 0, 0, 0, problem.axes()))
        return call(each, sums, own, states, problem)

    return Steps(basis, slopes, update)


def scan(
    steps: Steps, state, problem, num_steps: int, reduce=None
) -> tuple[Any, Metrics]:
    """`num_steps` steps; metrics float[num_steps]."""
    return lax.scan(
        lambda carry, _: step(steps, carry, problem, reduce), state, length=num_steps
    )


_MOST_STEPS = 500  # of one program, where nothing else says how many


@functools.partial(
    jax.jit,
    static_argnames=("steps", "num_steps"),
    donate_argnames="state",
)
def run(state, problem, *, steps: Steps, num_steps: int) -> tuple[Any, Metrics]:
    """`scan` as one compiled program; `state` is consumed (donated)."""
    return scan(steps, state, problem, num_steps)


@functools.partial(
    jax.jit, static_argnames=("steps", "num_steps", "mesh"), donate_argnames="state"
)
def run_on_mesh(
    state, problem, *, steps: Steps, num_steps: int, mesh: Mesh
) -> tuple[Any, Metrics]:
    """`run` on the devices of a mesh: one all-reduce a step.

    Args:
      state: consumed (donated).
      problem: says which of its arrays, and of the state's, are in parts, and gives one
        device's view of them.
      steps: what a step is.
      num_steps: at least 1.
      mesh: of `_mesh.check_mesh`.
    """

    def local(state, problem):
        own = problem.own_state(state)
        own, metrics = scan(steps, own, problem.local(), num_steps, sum_over_devices)
        return problem.part_of_state(own), metrics

    states = problem.state_specs(state)
    specs = states, problem.specs()
    return on_devices(local, mesh, specs, (states, P()))(state, problem)


def run_blocks(
    state, problem, source, *, steps: Steps, num_steps: int, mesh: Mesh | None = None
) -> tuple[Any, Metrics]:
    """`run` over a `FeatureSource`: each block is read twice a step, one at a time.

    Args:
      state: consumed (donated).
      problem: its `features` are None.
      source: the table; on a mesh a `MeshSource`, of which each process reads its own.
      steps: what a step is.
      num_steps: at least 1.
      mesh: as in `run_on_mesh`, or None.
    """
    kinds: dict[str, Any] = dict(steps=steps)
    programs = _basis, _slopes, _update
    project = functools.partial(project_rows, source)
    back_project = functools.partial(back_project_rows, source)
    if mesh is not None:
        kinds["mesh"] = mesh
        programs = _basis_on_mesh, _slopes_on_mesh, _update_on_mesh
        project = source.project
        back_project = lambda g: replicated(source.back_project(g), mesh)  # noqa: E731
    basis_of, slopes_of, update = programs
    history = []
    for _ in range(num_steps):
        proj = project(basis_of(state, problem, **kinds))
        slopes, *between = slopes_of(proj, state, problem, **kinds)
        slope = back_project(slopes)
        state, metrics = update(slope, *between, state, problem, **kinds)
        history.append(metrics)
    return state, jax.tree.map(lambda *x: np.stack([*map(np.asarray, x)]), *history)


@functools.partial(jax.jit, static_argnames="steps")
def _basis(state, problem, *, steps):
    return steps.basis(state, problem)


@functools.partial(jax.jit, static_argnames="steps")
def _slopes(proj, state, problem, *, steps):
    return steps.slopes(proj, state, problem)


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def _update(slope, sums, own, state, problem, *, steps):
    return steps.update(slope, sums, own, state, problem)


@functools.partial(jax.jit, static_argnames=("steps", "mesh"))
def _basis_on_mesh(state, problem, *, steps, mesh):
    def local(state, problem):
        return steps.basis(problem.own_state(state), problem.local())

    specs = problem.state_specs(state), problem.specs()
    return on_devices(local, mesh, specs, P())(state, problem)


@functools.partial(jax.jit, static_argnames=("steps", "mesh"))
def _slopes_on_mesh(proj, state, problem, *, steps, mesh):
    def local(proj, state, problem):
        given = problem.own_state(state), problem.local()
        slopes, sums, own = _exchanged(steps, proj[0], *given)
        parts = jax.tree.map(lambda x: x[None], (slopes, own))
        return parts[0], sum_over_devices(sums), parts[1]

    specs = P(AXIS), problem.state_specs(state), problem.specs()
    out = P(AXIS), P(), P(AXIS)
    return on_devices(local, mesh, specs, out)(proj, state, problem)


@functools.partial(jax.jit, static_argnames=("steps", "mesh"), donate_argnames="state")
def _update_on_mesh(slope, sums, own, state, problem, *, steps, mesh):
    def local(slope, sums, own, state, problem):
        given = problem.own_state(state), problem.local()
        state, metrics = steps.update(slope, sums, first(own), *given)
        return given[1].part_of_state(state), metrics

    states = problem.state_specs(state)
    specs = P(), P(), P(AXIS), states, problem.specs()
    call = on_devices(local, mesh, specs, (states, P()))
    return call(slope, sums, own, state, problem)


def train(
    state,
    problem,
    *,
    steps: Steps,
    num_steps: int,
    source=None,
    mesh: Mesh | None = None,
    metrics: Metrics | None = None,
    every: int | None = None,
    after: Callable[[Any, Metrics], None] | None = None,
) -> tuple[Any, Metrics]:
    """Goes on to step `num_steps`, in memory or from a source.

    Args:
      state: consumed (donated).
      problem: what a step reads.
      steps: what a step is.
      num_steps: of the whole run.
      source: the table where it is no array; then `problem.features` is None.
      mesh: where `problem` is in parts, one per device.
      metrics: of the steps that `state` already took, arrays [steps, …].
      every: steps of one compiled program; None makes it as many as there are, at
        most about 500, so that Ctrl-C need not wait for all of them.
      after: called with (state, metrics so far) each time; it must keep no array
        of the state, whose buffers the next steps reuse.

    Returns:
      (state, metrics float[num_steps]).
    """
    parts = [] if metrics is None else [jax.tree.map(np.asarray, metrics)]
    done = 0 if metrics is None else len(metrics.loss)
    every = _stride(num_steps) if every is None else every
    if mesh is not None:
        state, problem = replicated((state, problem), mesh)
    while done < num_steps or not parts:
        check_stopped()
        length = min(every, num_steps - done)
        kinds: dict = dict(steps=steps, num_steps=length)
        if source is not None and not length:
            part = Metrics(*(jnp.zeros(0),) * 3)
        elif source is not None:
            state, part = run_blocks(state, problem, source, mesh=mesh, **kinds)
        elif mesh is not None:
            state, part = wait_for(run_on_mesh(state, problem, mesh=mesh, **kinds))
        else:
            state, part = wait_for(run(state, problem, **kinds))
        parts.append(part)
        done += length
        if after is not None:
            after(state, _joined(parts))
    return state, _joined(parts)


def _stride(num_steps: int) -> int:
    """Steps of one program: a divisor, so that there is one program, or the bound."""
    divisors = (
        n for n in range(_MOST_STEPS, _MOST_STEPS // 2, -1) if num_steps % n == 0
    )
    return num_steps if num_steps <= _MOST_STEPS else next(divisors, _MOST_STEPS)


def _joined(parts: list[Metrics]) -> Metrics:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: np.concatenate([*map(np.asarray, x)]), *parts)
