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

from lore_jax._backend import apart, sized
from lore_jax._train import steps
from lore_jax.config import TrainConfig
from lore_jax.losses import cosine_anchor, l2_anchor, pair_coefficients, pair_loss
from lore_jax.model import RewardParams, mixture_weights
from lore_jax.preferences import Preferences
from lore_jax.results import Metrics

PRUNE_BELOW = 1e-2

_INSIDE = "promise_in_bounds"


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
    recipe: steps.Recipe


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

    recipe = steps.Recipe(
        _basis,
        functools.partial(floors[config.method], config, optimiser),
        functools.partial(_update, config, optimiser),
    )
    return Trainer(init, functools.partial(steps.step, recipe), recipe)


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
    pairs = Pairs(proj, problem.prefs, config.temperature, "users")
    loss, weights, slope = pairs.slopes(state.params.logits)
    g_logits = pairs.logits_slope(state.params.logits, slope)
    between = _step_logits(optimiser, loss, g_logits, state)
    return pairs.proj_slope(weights, slope), between


def _alternating_floor(config, optimiser, proj, state, problem):
    """Adam on W; V descends given the new W."""
    pairs = Pairs(proj, problem.prefs, config.temperature, "pairs")
    loss, _, slope = pairs.slopes(state.params.logits)
    g_logits = pairs.logits_slope(state.params.logits, slope)
    between = _step_logits(optimiser, loss, g_logits, state)
    _, weights, slope = pairs.slopes(between.logits)
    return pairs.proj_slope(weights, slope), between


class Pairs:
    """`losses.bradley_terry_loss` of a projection and its derivatives, written out.

    Differentiating it takes half as long again where pairs outnumber rows. On a CPU
    what belongs to a pair has columns of zeros behind its K, float[N, K']: rows of 5
    are added up one number at a time.

    Args:
      proj: float[M, K].
      prefs: N pairs of U users; its features are not read.
      temperature: T.
      weighting: "pairs" or "users".
    """

    def __init__(self, proj, prefs: Preferences, temperature, weighting):
        """Gathers both sides of every pair."""
        self.proj, self.prefs, self.temperature = proj, prefs, temperature
        self.coefficients = pair_coefficients(prefs, weighting, proj.dtype)
        proj = _widen(proj)
        self.z = proj.at[prefs.chosen].get(mode=_INSIDE)
        if prefs.rejected is not None:
            self.z -= proj.at[prefs.rejected].get(mode=_INSIDE)

    def slopes(self, logits):
        """(loss, weights of every pair float[N, K'], d loss / d (z · p) float[N])."""
        prefs = self.prefs
        weights = _widen(mixture_weights(logits)).at[prefs.user].get(mode=_INSIDE)

        def margins(z, weights):
            parts = (z[:, k] * weights[:, k] for k in range(weights.shape[1]))
            return functools.reduce(jnp.add, parts) / self.temperature

        # Loss and slope would each work it out.
        m = apart(margins, jnp.any(prefs.user[:1] >= 0), self.z, weights)
        label = prefs.label
        loss = jnp.sum(self.coefficients * pair_loss(m, label))
        slope = -jax.nn.sigmoid(-m) if label is None else jax.nn.sigmoid(m) - label
        return loss, weights, self.coefficients * slope / self.temperature

    def logits_slope(self, logits, slope):
        """The loss's slope in the logits, float[U, K]."""
        weights, pullback = jax.vjp(mixture_weights, logits)
        pushed = (self.z * slope[:, None]).astype(weights.dtype)
        total = jax.ops.segment_sum(
            pushed, self.prefs.user, len(weights), indices_are_sorted=True
        )
        return pullback(total[:, : weights.shape[1]])[0]

    def proj_slope(self, weights, slope):
        """The loss's slope in the projection, float[M, K]."""
        pushed = (weights * slope[:, None]).astype(self.proj.dtype)
        out = _widen(jnp.zeros_like(self.proj))
        if self.prefs.rejected is not None:
            out = -out.at[self.prefs.rejected].add(pushed, mode=_INSIDE)
        out = out.at[self.prefs.chosen].add(pushed, mode=_INSIDE)
        return out[:, : self.proj.shape[1]]


def _widen(x):
    """float[..., K] with the columns of zeros of `Pairs`."""
    rank = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, sized(-rank % 4, 0) if rank > 2 else 0)))


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
