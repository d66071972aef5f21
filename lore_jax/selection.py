"""Chooses settings and learns the prior over users, by grouped validation.

Pairs of one user share responses: whatever is chosen here is chosen on judgements
that were held out whole (`data.hold_out`), never on random pairs.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax.adapt import adapt
from lore_jax.backend import on_threads
from lore_jax.config import TrainConfig
from lore_jax.data import hold_out, take_shots
from lore_jax.evaluate import log_loss, macro_mean
from lore_jax.floor import chunk_reader, chunks, on_floor, project_rows
from lore_jax.predict import SHOTS, spread_losses
from lore_jax.prior import (
    learn_log_weights,
    likelihood_power,
    log_likelihoods,
    spread_atoms,
)
from lore_jax.types import Preferences, Prior


class Validation(NamedTuple):
    """A grouped split of training pairs.

    Attributes:
      training: what candidates learn from.
      heldout: what they are compared on.
    """

    training: Preferences
    heldout: Preferences

    def loss(
        self,
        basis: jax.Array,
        priors: Iterable[Prior],
        shots: tuple[int | None, ...] = (None,),
    ) -> list[float]:
        """Macro log-loss on held-out pairs, one per prior; the table is read once.

        Users show `shots` of their pairs, None for all; several numbers count alike.
        """
        proj = project_rows(self.training.features, basis)
        shown = [self._replace(training=take_shots(self.training, n)) for n in shots]

        def mean_loss(prior):
            return float(np.mean([macro_mean(x._losses(proj, prior)) for x in shown]))

        return on_threads(mean_loss, priors)

    def curve(self, bases: Sequence[jax.Array], priors: Sequence[Prior]) -> np.ndarray:
        """Log-loss of every user, float[S, U], of S bases with a prior each.

        The table is read once.
        """
        joined = project_rows(self.training.features, jnp.concatenate(bases, axis=1))
        ends = np.cumsum([basis.shape[1] for basis in bases])[:-1]
        parts = zip(np.split(np.asarray(joined), ends, axis=1), priors, strict=True)
        return np.stack(on_threads(lambda part: self._losses(*part), parts))

    def _losses(self, proj, prior: Prior) -> np.ndarray:
        eye = jnp.eye(proj.shape[1], dtype=proj.dtype)
        weights = adapt(eye, self.training.replace(features=proj), prior=prior).weights
        heldout = self.heldout.replace(features=proj)
        return np.asarray(log_loss(eye, weights, heldout, prior.temperature))


def make_validation(prefs: Preferences, key: jax.Array, share: float) -> Validation:
    """`data.hold_out` from a key; warns where too few pairs remain to compare on.

    Where both rows of a pair must fall on one side, of the rows such a share s is held
    out that s² / (s² + (1 − s)²) = `share`.
    """
    if prefs.group is None and prefs.rejected is not None:
        share = share**0.5 / (share**0.5 + (1 - share) ** 0.5)
    seed = int(jax.random.randint(key, (), 0, np.iinfo(np.int32).max))
    held = hold_out(prefs, share=share, seed=seed)
    if not held.training.num_pairs or not held.heldout.num_pairs:
        warnings.warn(
            f"too few pairs to validate on: {held.training.num_pairs} to learn from "
            f"and {held.heldout.num_pairs} held out of {prefs.num_pairs}; the first "
            "candidate is used unselected",
            stacklevel=3,
        )
    return Validation(held.training, held.heldout)


def choose(rows: list[dict]) -> dict:
    """Marks and returns the row with the least loss; the first where none has one."""
    best = min(rows, key=lambda row: np.nan_to_num(row["log_loss"], nan=np.inf))
    best["chosen"] = True
    return best


def surely_better(losses: np.ndarray, than: np.ndarray) -> bool:
    """Whether users' losses float[U] are less by two standard errors of the difference.

    What is merely less on few held-out judgements is as often the worse choice on
    judgements held out once more. Users are paired, NaN is no judgement; where `than`
    has none at all, any loss is better.
    """
    if not np.isfinite(than).any():
        return bool(np.isfinite(losses).any())
    gain = than - losses
    gain = gain[np.isfinite(gain)]
    if gain.size < 2:
        return False
    return bool(gain.mean() > 2 * gain.std(ddof=1) / gain.size**0.5)


def choose_stop(losses: np.ndarray) -> int:
    """The row of losses float[S, U] to stop at: the last finite, or one surely better.

    That is the best on average, if it is; else the dips of a noisy curve would end
    training.
    """
    rows = np.flatnonzero(np.isfinite(losses).any(1))
    if not rows.size:
        return len(losses) - 1
    known = losses[rows]
    known = known[:, np.isfinite(known).all(0)]
    if known.shape[1] < 2:
        return int(rows[-1])
    best = int(known.mean(1).argmin())
    return int(rows[best if surely_better(known[best], known[-1]) else -1])


def make_atoms(key: jax.Array, rank: int, num_atoms: int, dtype=None) -> jax.Array:
    """The K vertices and at least `num_atoms` points spread over the simplex.

    At rank 2 the points are evenly spaced.
    """
    vertices = jnp.eye(rank, dtype=dtype or jnp.result_type(float))
    if rank == 1 or num_atoms == 0:
        return vertices
    if rank == 2:
        first = jnp.arange(1, num_atoms + 1, dtype=vertices.dtype) / (num_atoms + 1)
        return jnp.concatenate([vertices, jnp.stack([first, 1 - first], 1)])
    spread = spread_atoms(key, rank, num_atoms, vertices.dtype)
    return jnp.concatenate([vertices, spread])


def make_prior(
    atoms, log_weights, tempering, concentration, temperature, decay=0.0
) -> Prior:
    """A `Prior` from plain numbers, in the dtype of `atoms`."""
    return Prior(
        atoms=atoms,
        log_weights=jnp.asarray(log_weights, atoms.dtype),
        concentration=jnp.asarray(concentration, atoms.dtype),
        tempering=jnp.asarray(tempering, atoms.dtype),
        decay=jnp.asarray(decay, atoms.dtype),
        temperature=temperature,
    )


def choose_refinement(
    validation: Validation | None, basis: jax.Array, prior: Prior, config: TrainConfig
) -> tuple[Prior, list[dict]]:
    """κ with δ, then ρ with s, by grouped validation: (prior, a row per candidate).

    Few and many pairs count alike (`SHOTS`): what is right for users with many pairs
    may be wrong for new ones. Of ρ and s the first are kept unless others are surely
    better. Without a validation the first of each grid is taken.
    """
    kappas, decays = config.concentrations, config.decays
    pulls = [
        {"concentration": kappa, "decay": decay}
        for decay in decays
        for kappa in kappas
        if math.isfinite(kappa) or decay == decays[0]  # κ = ∞ has no δ.
    ]
    spreads = [
        {"spread": rho, "margin_scale": scale}
        for scale in config.margin_scales
        for rho in config.spreads
    ]
    prior = _with(prior, pulls[0] | spreads[0])
    rows: list[dict] = []
    if validation is None or prior.atoms.shape[1] == 1:
        return prior, rows
    if len(pulls) > 1:
        losses = validation.loss(basis, [_with(prior, x) for x in pulls], SHOTS)
        rows += rows_of(pulls, losses)
        prior = _with(prior, pulls[rows.index(choose(rows))])
    if len(spreads) > 1:
        pairs = [(x["spread"], x["margin_scale"]) for x in spreads]
        losses = spread_losses(basis, *validation, prior, pairs)
        tried = rows_of(spreads, [macro_mean(x) for x in losses])
        best = int(np.argmin(np.nan_to_num([x["log_loss"] for x in tried], nan=np.inf)))
        best = best if surely_better(losses[best], losses[0]) else 0
        tried[best]["chosen"] = True
        prior = _with(prior, spreads[best])
        rows += tried
    return prior, rows


def rows_of(candidates: Sequence[dict], losses: Sequence[float]) -> list[dict]:
    """What `choose` marks one of, and `History.selection` holds."""
    return [
        {**candidate, "log_loss": loss, "chosen": False}
        for candidate, loss in zip(candidates, losses, strict=True)
    ]


def _with(prior: Prior, settings: dict) -> Prior:
    dtype = prior.atoms.dtype
    return prior.replace(
        **{name: jnp.asarray(x, dtype) for name, x in settings.items()}
    )


def refined_like(prior: Prior, chosen: Prior) -> Prior:
    """`prior` with the κ, δ, ρ and s of `chosen`."""
    names = "concentration", "decay", "spread", "margin_scale"
    return prior.replace(**{name: getattr(chosen, name) for name in names})


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
    # Little is learned from the rest, so that more can be held out.
    share = min(2 * config.validation_share, 0.5)
    validation = make_validation(prefs, key_split, share)

    def learn(part, tempering):
        table = _tempered_table(part, atoms, temperature, tempering)
        log_weights = learn_log_weights(table)
        return make_prior(atoms, log_weights, tempering, np.inf, temperature)

    if not (validation.training.num_pairs and validation.heldout.num_pairs):
        prior = learn(prefs, config.temperings[0])
        return choose_refinement(None, eye, prior, config)[0], ()
    priors = [learn(validation.training, g) for g in config.temperings]
    losses = validation.loss(eye, priors)
    rows = rows_of([{"tempering": g} for g in config.temperings], losses)
    best = rows.index(choose(rows))
    chosen, more = choose_refinement(validation, eye, priors[best], config)
    final = learn(prefs, config.temperings[best])
    return refined_like(final, chosen), (*rows, *more)


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
