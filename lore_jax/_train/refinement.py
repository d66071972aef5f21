"""Learns the prior over users, and chooses its settings on hold-outs.

Pairs of one user share responses: whatever is chosen here is chosen on judgements or
items that were held out whole (`validation`), never on random pairs.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _processes
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import Pairs, pack
from lore_jax._pairs.projected import Projected
from lore_jax._posterior.table import log_likelihoods
from lore_jax._train.validation import (
    SHOTS,
    Validation,
    better,
    candidate_rows,
    choose,
    losses_of,
    make_holdouts,
)
from lore_jax.config import PriorSearch
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
    results: Sequence[tuple[Any, Prior]],
    scales: np.ndarray,
    grids: PriorSearch,
) -> tuple[dict, list[dict]]:
    """κ, then δ, then ρ with s, on the hold-outs: (settings, a row per candidate).

    Few and many pairs count alike (`SHOTS`): what is right for users with many pairs
    may be wrong for new ones. Of ρ and s the first are kept unless others are better by
    two standard errors. Without hold-outs, and at rank 1, the first of each grid is
    taken.

    Args:
      holdouts: H splits.
      results: (features · V, prior) of a training on each split.
      scales: float[H], see `validation.relative`.
      grids: the candidates.
    """
    first = {
        "concentration": grids.concentrations[0],
        "decay": grids.decays[0],
        "variance_scale": grids.variance_scales[0],
        "margin_scale": grids.margin_scales[0],
    }
    rows: list[dict] = []
    if not holdouts or results[0][1].atoms.shape[1] == 1:
        return first, rows
    chosen = dict(first)
    for name, grid in (
        ("concentration", grids.concentrations),
        ("decay", grids.decays),
    ):
        if len(grid) == 1 or (name == "decay" and math.isinf(chosen["concentration"])):
            continue  # κ = ∞ has no δ.
        settings = [{**chosen, name: value} for value in grid]
        losses = [
            split.loss(proj, [with_settings(prior, x) for x in settings], SHOTS)
            for split, (proj, prior) in zip(holdouts, results, strict=True)
        ]
        tried = [{k: x[k] for k in ("concentration", "decay")} for x in settings]
        losses = np.stack(losses, axis=1)
        tried = candidate_rows(tried, losses, scales)
        chosen = settings[choose(tried, losses)]
        rows += tried
    pairs = [
        (rho, scale) for scale in grids.margin_scales for rho in grids.variance_scales
    ]
    if len(pairs) > 1:
        losses = [
            split.variance_losses(proj, with_settings(prior, chosen), pairs)
            for split, (proj, prior) in zip(holdouts, results, strict=True)
        ]
        losses = np.stack(losses, axis=1)
        tried = [{"variance_scale": rho, "margin_scale": s} for rho, s in pairs]
        tried = candidate_rows(tried, losses, scales)
        best = int(losses_of(tried).argmin())
        ratios = losses / scales[:, None]
        best = best if better(ratios[best], ratios[0]) else 0
        tried[best]["chosen"] = True
        chosen["variance_scale"], chosen["margin_scale"] = pairs[best]
        rows += tried
    return chosen, rows


def learn_prior(
    found: Projected,
    prefs: Preferences,
    *,
    key: jax.Array,
    temperature: float,
    grids: PriorSearch,
) -> tuple[Prior, tuple[dict, ...]]:
    """Atoms' weights by EM, γ, κ, δ, ρ and s by grouped validation, V frozen.

    Args:
      found: the pairs of `prefs`, or those of this process, projected.
      prefs: pairs of the users that V was trained on.
      key: consumed; draws the atoms and the validation split.
      temperature: T.
      grids: the candidates.

    Returns:
      (prior, a dict per candidate). V has seen the validation pairs, so γ errs on
      the confident side; the default recipe holds them out of V too.
    """
    key_atoms, key_split = jax.random.split(key)
    rank, proj = found.rank, found.proj
    atoms = make_atoms(key_atoms, rank, grids.num_atoms, proj.dtype)
    uniform = np.full(len(atoms), -np.log(len(atoms)))
    if rank == 1:
        return make_prior(atoms, uniform, 0, np.inf), ()
    share = min(grids.validation_share, 0.5)
    table: Any = prefs.features
    if isinstance(table, DistributedTable):
        proj = table.replaced(proj)
    holdouts = make_holdouts(
        prefs.replace(features=proj), key_split, share, grids.holdout, temperature
    )
    proj = found.proj

    def learn(pairs, tempering):
        likely = _tempered_table(proj, pairs, atoms, temperature, tempering)
        if isinstance(table, DistributedTable):
            parts = _processes.gather_arrays({"likely": np.asarray(likely)})
            likely = jnp.concatenate([part["likely"] for part in parts])
        return make_prior(atoms, learn_log_weights(likely), tempering, np.inf)

    if not holdouts:
        settings, _ = choose_refinement((), (), np.ones(0), grids)
        return with_settings(learn(found.pairs, min(grids.temperings)), settings), ()
    (validation,) = holdouts.values()
    training = pack(validation.own(validation.training))
    priors = [learn(training, g) for g in grids.temperings]
    losses = validation.loss(proj, priors)[:, None]
    tried = [{"tempering": g} for g in grids.temperings]
    rows = candidate_rows(tried, losses, np.ones(1))
    # A tempered likelihood learns too narrow a prior: the least γ stays unless another
    # is better by two standard errors.
    best, least = int(np.argmin(grids.temperings)), int(losses_of(rows).argmin())
    best = least if better(losses[least], losses[best]) else best
    rows[best]["chosen"] = True
    results = [(proj, priors[best])]
    settings, more = choose_refinement([validation], results, np.ones(1), grids)
    final = learn(found.pairs, grids.temperings[best])
    return with_settings(final, settings), (*rows, *more)


def _tempered_table(
    proj, pairs: Pairs, atoms, temperature: float, tempering: float
) -> jax.Array:
    """η_u · log-likelihood of every user with a pair under every atom, float[U', A]."""
    parts = []
    read = pairs.reader(proj)
    kinds = dict(unit_weights=pairs.unit_weights)
    for chunk in pairs.chunks():
        z, weight, label = read(chunk)
        part = _tempered(z / temperature, weight, label, atoms, tempering, **kinds)
        parts.append(part[: len(chunk.users)][pairs.counts[chunk.users] > 0])
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames="unit_weights")
def _tempered(z, weight, label, atoms, tempering, *, unit_weights):
    power = likelihood_power(jnp.sum(weight, axis=1), tempering)
    table = log_likelihoods(z, weight, label, atoms, unit_weights=unit_weights)
    return power[:, None] * table
