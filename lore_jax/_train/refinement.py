"""Learns the prior over users, and chooses its settings on hold-outs.

Pairs of one user share responses: whatever is chosen here is chosen on judgements or
items that were held out whole (`validation`), never on random pairs.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax._pairs.blocks import on_floor
from lore_jax._pairs.pack import chunk_reader, chunks
from lore_jax._posterior.table import log_likelihoods
from lore_jax._train.validation import (
    Validation,
    better,
    choose,
    losses_of,
    make_holdouts,
    rows_of,
)
from lore_jax.config import TrainConfig
from lore_jax.prediction import SHOTS, spread_losses
from lore_jax.preferences import Preferences
from lore_jax.prior import (
    Prior,
    learn_log_weights,
    likelihood_power,
    make_atoms,
    make_prior,
    with_settings,
)


def choose_refinement(
    holdouts: Sequence[Validation],
    results: Sequence[tuple[jax.Array, Prior]],
    scales: np.ndarray,
    config: TrainConfig,
) -> tuple[dict, list[dict]]:
    """κ, then δ, then ρ with s, on the hold-outs: (settings, a row per candidate).

    Few and many pairs count alike (`SHOTS`): what is right for users with many pairs
    may be wrong for new ones. Of ρ and s the first are kept unless others are better by
    two standard errors. Without hold-outs, and at rank 1, the first of each grid is
    taken.

    Args:
      holdouts: H splits.
      results: (V, prior) of a training on each split.
      scales: float[H], see `validation.relative`.
      config: its grids are used.
    """
    first = {
        "concentration": config.concentrations[0],
        "decay": config.decays[0],
        "spread": config.spreads[0],
        "margin_scale": config.margin_scales[0],
    }
    rows: list[dict] = []
    if not holdouts or results[0][1].atoms.shape[1] == 1:
        return first, rows
    chosen = dict(first)
    for name, grid in (
        ("concentration", config.concentrations),
        ("decay", config.decays),
    ):
        if len(grid) == 1 or (name == "decay" and math.isinf(chosen["concentration"])):
            continue  # κ = ∞ has no δ.
        settings = [{**chosen, name: value} for value in grid]
        losses = [
            split.loss(basis, [with_settings(prior, x) for x in settings], SHOTS)
            for split, (basis, prior) in zip(holdouts, results, strict=True)
        ]
        tried = [{k: x[k] for k in ("concentration", "decay")} for x in settings]
        losses = np.stack(losses, axis=1)
        tried = rows_of(tried, losses, scales)
        chosen = settings[choose(tried, losses)]
        rows += tried
    pairs = [(rho, scale) for scale in config.margin_scales for rho in config.spreads]
    if len(pairs) > 1:
        losses = [
            spread_losses(basis, *split, with_settings(prior, chosen), pairs)
            for split, (basis, prior) in zip(holdouts, results, strict=True)
        ]
        losses = np.stack(losses, axis=1)
        tried = [{"spread": rho, "margin_scale": s} for rho, s in pairs]
        tried = rows_of(tried, losses, scales)
        best = int(losses_of(tried).argmin())
        ratios = losses / scales[:, None]
        best = best if better(ratios[best], ratios[0]) else 0
        tried[best]["chosen"] = True
        chosen["spread"], chosen["margin_scale"] = pairs[best]
        rows += tried
    return chosen, rows


def learn_prior(
    basis: jax.Array,
    prefs: Preferences,
    *,
    key: jax.Array,
    temperature: float,
    config: TrainConfig,
) -> tuple[Prior, tuple[dict, ...]]:
    """Atoms' weights by EM, γ, κ and ρ by grouped validation, V frozen.

    Args:
      basis: V, float[D, K].
      prefs: pairs of the users that V was trained on.
      key: consumed; draws the atoms and the validation split.
      temperature: T.
      config: its grids are used, and twice its `validation_share`.

    Returns:
      (prior, a dict per candidate). V has seen the validation pairs, so γ errs on
      the confident side; the default recipe holds them out of V too.
    """
    key_atoms, key_split = jax.random.split(key)
    rank = np.shape(basis)[1]
    prefs, eye = on_floor(prefs, basis)
    atoms = make_atoms(key_atoms, rank, config.num_atoms, prefs.features.dtype)
    uniform = np.full(len(atoms), -np.log(len(atoms)))
    if rank == 1:
        return make_prior(atoms, uniform, 0, np.inf, temperature), ()
    # Little is learned from the rest, so that more can be held out. V has seen every
    # item, so that none can be held out from it.
    share = min(2 * config.validation_share, 0.5)
    unit = "judgements" if config.holdout == "both" else config.holdout
    found = make_holdouts(prefs, key_split, share, unit)

    def learn(part, tempering):
        table = _tempered_table(part, atoms, temperature, tempering)
        log_weights = learn_log_weights(table)
        return make_prior(atoms, log_weights, tempering, np.inf, temperature)

    if not found:
        settings, _ = choose_refinement((), (), np.ones(0), config)
        return with_settings(learn(prefs, min(config.temperings)), settings), ()
    (validation,) = found.values()
    priors = [learn(validation.training, g) for g in config.temperings]
    losses = validation.loss(eye, priors)[:, None]
    rows = rows_of([{"tempering": g} for g in config.temperings], losses, np.ones(1))
    # A tempered likelihood learns too narrow a prior: γ = 0 stays unless another is
    # better by two standard errors.
    best, least = int(np.argmin(config.temperings)), int(losses_of(rows).argmin())
    best = least if better(losses[least], losses[best]) else best
    rows[best]["chosen"] = True
    results = [(eye, priors[best])]
    settings, more = choose_refinement([validation], results, np.ones(1), config)
    final = learn(prefs, config.temperings[best])
    return with_settings(final, settings), (*rows, *more)


def _tempered_table(prefs, atoms, temperature, tempering) -> jax.Array:
    """η_u · log-likelihood of every user with a pair under every atom, float[U', A]."""
    parts = []
    counts = np.asarray(prefs.counts)
    read = chunk_reader(prefs.features, prefs)
    for chunk in chunks(counts, np.asarray(prefs.offsets)):
        z, weight, label = read(chunk)
        part = _tempered(
            z / temperature,
            weight,
            label,
            atoms,
            tempering,
            unit_weights=prefs.weight is None,
        )
        parts.append(part[: len(chunk.users)][counts[chunk.users] > 0])
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames="unit_weights")
def _tempered(z, weight, label, atoms, tempering, *, unit_weights):
    power = likelihood_power(jnp.sum(weight, axis=1), tempering)
    table = log_likelihoods(z, weight, label, atoms, unit_weights=unit_weights)
    return power[:, None] * table
