"""The two published training forms as init/step pairs; parity is tested to float64.

Both read the feature table twice a step. Neither is the default: FIELD numbers in the
README say why.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lore_jax import descent
from lore_jax.config import TrainConfig
from lore_jax.losses import cosine_anchor, floor_loss, l2_anchor
from lore_jax.results import Metrics
from lore_jax.reward import mixture_weights
from lore_jax.types import Preferences, RewardParams

PRUNE_BELOW = 1e-2


class TrainState(struct.PyTreeNode):
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


class Problem(NamedTuple):
    """What a step reads.

    Attributes:
      prefs: the training pairs; its features are None where a source is read.
      anchor: float[D], v_ref; zeros where the anchor has no strength.
    """

    prefs: Preferences
    anchor: jax.Array

    @property
    def features(self):
        """float[M, D], or None."""
        return self.prefs.features


class Trainer(NamedTuple):
    """Pure functions; hashable, so it can be a static argument.

    Attributes:
      init: params → state; copies, so that a donated state leaves the caller's own.
      step: (state, problem) → (state, metrics).
      recipe: the parts of the step, for `descent`.
    """

    init: Callable[[RewardParams], TrainState]
    step: Callable[[TrainState, Problem], tuple[TrainState, Metrics]]
    recipe: descent.Recipe


@functools.cache
def make_trainer(config: TrainConfig) -> Trainer:
    """The trainer of a reference config; one per config, so programs are reused.

    Raises:
      ValueError: the config is no reference config.
    """
    floors = {"joint": _joint_floor, "alternating": _alternating_floor}
    if config.method not in floors:
        raise ValueError(
            f"method must be one of {tuple(floors)}, got {config.method!r}"
        )
    optimiser = optax.adam(config.learning_rate)

    def init(params: RewardParams) -> TrainState:
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        return TrainState(
            params=params,
            opt_logits=optimiser.init(params.logits),
            opt_basis=optimiser.init(params.basis),
            count=jnp.zeros((), jnp.int32),
        )

    recipe = descent.Recipe(
        _basis,
        functools.partial(floors[config.method], config, optimiser),
        functools.partial(_update, config, optimiser),
    )
    return Trainer(init, functools.partial(descent.step, recipe), recipe)


class _Between(NamedTuple):
    """W's half of a step."""

    loss: jax.Array
    logits: jax.Array
    opt_logits: optax.OptState
    slope_norm: jax.Array


def _basis(state: TrainState, problem: Problem) -> jax.Array:
    del problem
    return state.params.basis


def _joint_floor(config, optimiser, proj, state, problem):
    """One Adam over (W, V) on Σ_u mean_n ℓ + α Σ_k ‖V_k − v_ref‖²."""
    logits = state.params.logits
    loss, (g_proj, g_logits) = jax.value_and_grad(floor_loss, argnums=(0, 1))(
        proj, logits, problem.prefs, config.temperature, "users"
    )
    return g_proj, _step_logits(optimiser, loss, g_logits, state)


def _alternating_floor(config, optimiser, proj, state, problem):
    """Adam on W; V descends given the new W."""
    loss_of = functools.partial(
        floor_loss,
        prefs=problem.prefs,
        temperature=config.temperature,
        weighting="pairs",
    )
    loss, g_logits = jax.value_and_grad(loss_of, argnums=1)(proj, state.params.logits)
    between = _step_logits(optimiser, loss, g_logits, state)
    return jax.grad(loss_of)(proj, between.logits), between


def _step_logits(optimiser, loss, slope, state) -> _Between:
    stepped = _descend(optimiser, slope, state.opt_logits, state.params.logits)
    return _Between(loss, *stepped, optax.tree.norm(slope))


def _update(config, optimiser, slope, between, state, problem):
    """Adam on V; the anchor acts here alone."""
    basis = state.params.basis
    if config.alpha and config.method == "joint":
        slope = slope + config.alpha * jax.grad(l2_anchor)(basis, problem.anchor)
    elif config.alpha:
        alpha = _warm_up(config, state.count, slope.dtype)
        slope = slope + alpha * jax.grad(cosine_anchor)(basis, problem.anchor)
    basis, opt_basis = _descend(optimiser, slope, state.opt_basis, basis)
    metrics = Metrics(between.loss, between.slope_norm, optax.tree.norm(slope))
    params = RewardParams(basis=basis, logits=between.logits)
    count = state.count + 1
    return TrainState(params, between.opt_logits, opt_basis, count), metrics


def _warm_up(config, count, dtype):
    """α_t: 0 for the first 20 % of the steps, linear up to 80 %, then α."""
    first, last = int(0.2 * config.num_steps), int(0.8 * config.num_steps)
    if first == last:
        return jnp.asarray(config.alpha, dtype)
    share = (count - first).astype(dtype) / (last - first)
    return config.alpha * jnp.clip(share, 0, 1)


def _descend(optimiser, grad, opt_state, value) -> tuple[Any, Any]:
    updates, opt_state = optimiser.update(grad, opt_state, value)
    return optax.apply_updates(value, updates), opt_state


def prune(params: RewardParams) -> tuple[Any, RewardParams]:
    """Drops directions whose largest mixture weight over users is below 1e-2.

    Returns:
      (kept int[K'], params of the kept directions; their logits are those of the
      kept mixture weights renormalised onto the simplex).
    """
    weights = np.asarray(mixture_weights(params.logits))
    kept = np.flatnonzero(weights.max(axis=0) >= PRUNE_BELOW)
    return kept, RewardParams(
        basis=params.basis[:, kept], logits=params.logits[:, kept]
    )
