"""Steps of training, over a table in memory or over a source read in blocks.

A step projects the table, asks a pure function of the reward floor for the slope of
the objective in the projection, and back-projects that. In memory all of it is one
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

from lore_jax._backend import check_stopped, wait_for
from lore_jax._pairs.blocks import back_project_rows, project_rows
from lore_jax.model import project
from lore_jax.results import Metrics


class Recipe(NamedTuple):
    """Three pure functions; hashable, so it can be a static argument.

    Attributes:
      basis: (state, problem) → V, float[D, K].
      floor: (proj float[M, K], state, problem) → (slopes float[M, K], between), the
        slope of what V descends on in proj, and whatever `update` needs besides.
      update: (slope in V float[D, K], between, state, problem) → (state, metrics).
    """

    basis: Callable[..., jax.Array]
    floor: Callable[..., tuple[jax.Array, Any]]
    update: Callable[..., tuple[Any, Metrics]]


def step(recipe: Recipe, state, problem) -> tuple[Any, Metrics]:
    """One step in memory: two reads of `problem.features`."""
    basis = recipe.basis(state, problem)
    proj, pullback = jax.vjp(functools.partial(project, problem.features), basis)
    slopes, between = recipe.floor(proj, state, problem)
    # A transpose left of slopes would change the form of the product.
    slopes = lax.optimization_barrier(slopes)
    return recipe.update(pullback(slopes)[0], between, state, problem)


def scan(recipe: Recipe, state, problem, num_steps: int) -> tuple[Any, Metrics]:
    """`num_steps` steps; metrics float[num_steps]."""
    return lax.scan(
        lambda carry, _: step(recipe, carry, problem), state, length=num_steps
    )


_MOST_STEPS = 500  # of one program, where nothing else says how many

# Sums into rows in any order would make two runs of one key differ.
_SAME_BITS = {"xla_gpu_exclude_nondeterministic_ops": True}


@functools.partial(
    jax.jit,
    static_argnames=("recipe", "num_steps"),
    donate_argnames="state",
    compiler_options=_SAME_BITS,
)
def run(state, problem, *, recipe: Recipe, num_steps: int) -> tuple[Any, Metrics]:
    """`scan` as one compiled program; `state` is consumed (donated)."""
    return scan(recipe, state, problem, num_steps)


def run_blocks(
    state, problem, source, *, recipe: Recipe, num_steps: int
) -> tuple[Any, Metrics]:
    """`run` over a `FeatureSource`: each block is read twice a step, one at a time.

    Args:
      state: consumed (donated).
      problem: its `features` are None.
      source: the table.
      recipe: what a step is.
      num_steps: at least 1.
    """
    history = []
    for _ in range(num_steps):
        basis = _basis(state, problem, recipe=recipe)
        proj = project_rows(source, basis)
        slopes, between = _floor(proj, state, problem, recipe=recipe)
        slope = back_project_rows(source, slopes)
        state, metrics = _update(slope, between, state, problem, recipe=recipe)
        history.append(metrics)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *history)


@functools.partial(jax.jit, static_argnames="recipe")
def _basis(state, problem, *, recipe):
    return recipe.basis(state, problem)


@functools.partial(jax.jit, static_argnames="recipe", compiler_options=_SAME_BITS)
def _floor(proj, state, problem, *, recipe):
    return recipe.floor(proj, state, problem)


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def _update(slope, between, state, problem, *, recipe):
    return recipe.update(slope, between, state, problem)


def train(
    state,
    problem,
    *,
    recipe: Recipe,
    num_steps: int,
    source=None,
    metrics: Metrics | None = None,
    every: int | None = None,
    after: Callable[[Any, Metrics], None] | None = None,
) -> tuple[Any, Metrics]:
    """Goes on to step `num_steps`, in memory or from a source.

    Args:
      state: consumed (donated).
      problem: what a step reads.
      recipe: what a step is.
      num_steps: of the whole run.
      source: the table where it is no array; then `problem.features` is None.
      metrics: of the steps that `state` already took.
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
    while done < num_steps or not parts:
        check_stopped()
        length = min(every, num_steps - done)
        if source is None:
            state, part = wait_for(run(state, problem, recipe=recipe, num_steps=length))
        elif length:
            state, part = run_blocks(
                state, problem, source, recipe=recipe, num_steps=length
            )
        else:
            part = Metrics(*(jnp.zeros(0),) * 3)
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
