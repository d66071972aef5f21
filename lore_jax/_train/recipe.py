"""The default recipe: every setting on hold-outs, then a training on all pairs."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lore_jax import _checks, _processes
from lore_jax._backend import to_array
from lore_jax._pairs.blocks import project_rows
from lore_jax._pairs.distributed import DistributedTable
from lore_jax._pairs.pack import count_users, pack
from lore_jax._pairs.projected import project_pairs
from lore_jax._pairs.used_rows import aligned_rows, without_unused_rows
from lore_jax._train.refinement import choose_refinement
from lore_jax._train.resume import Run, stride
from lore_jax._train.search import Losses, select
from lore_jax._train.trainer import Candidate, CandidateTrainer, Training
from lore_jax._train.validation import candidate_rows, choose_stop, make_holdouts
from lore_jax.adaptation import adapt_projected
from lore_jax.config import Marginal
from lore_jax.diagnostics import compare_starts, compared_stride
from lore_jax.model import RewardModel, RewardParams
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import with_settings
from lore_jax.results import Fitted, History, Metrics


def fit_marginal(
    prefs: Preferences,
    ranks: tuple[int, ...],
    key: jax.Array,
    recipe: Marginal,
    init: RewardParams | None,
    run: Run,
    mesh: Mesh | None = None,
) -> Fitted:
    """`fit` by the default recipe; a rank, or the best of several."""
    key_atoms, key_start, key_split = jax.random.split(key, 3)
    ids, temperature = prefs.names, recipe.temperature
    table: Any = prefs.features
    distributed = isinstance(table, DistributedTable)
    if not distributed:
        prefs = without_unused_rows(prefs)
        # One copy for all candidates. With several devices none holds the whole table.
        alone = mesh is None or mesh.devices.size == 1
        if alone and not isinstance(prefs.features, FeatureSource):
            prefs = prefs.replace(features=aligned_rows(prefs.features))
    train = CandidateTrainer(prefs, (key_atoms, key_start), recipe, init, run, mesh)
    if not run.choice:
        search = recipe.search
        share, holdout = search.validation_share, search.holdout
        holdouts = make_holdouts(prefs, key_split, share, holdout, temperature)
        run.choice = _choose(train, holdouts, ranks, recipe, run)
    choice = run.choice
    best = Candidate(**choice["candidate"])
    thetas, log_weights, metrics = _train_on_all(train, prefs, best, choice, run)
    trained = zip(thetas, log_weights)
    results = [train.result("all", prefs, *x, best) for x in trained]
    bases = [v for v, _ in results]
    priors = [with_settings(prior, choice["settings"]) for _, prior in results]
    at = int(run.finished[0].argmin())
    own = table.own(prefs) if distributed else prefs
    pairs = pack(own)
    found = [project_pairs(own.features, v, pairs) for v in bases]
    adapted = [adapt_projected(x, p, temperature) for x, p in zip(found, priors)]
    stops = [row for row in choice["rows"] if "num_steps" in row]
    heldout = tuple(choice["heldout"])
    if best.rank > 1:
        _warn_unless_it_helps(heldout)
    weights = [x.weights for x in adapted]
    if distributed:
        ids = own.names
        projections, weights = _compared(prefs, bases, weights)
    else:
        projections = [x.proj for x in found]
    starts = compare_starts(bases, projections, weights, at)
    return Fitted(
        model=RewardModel(bases[at], priors[at], temperature),
        weights=to_array(adapted[at].weights),
        logits=to_array(adapted[at].logits),
        history=History(
            loss=metrics.loss[at],
            weights_norm=metrics.weights_norm[at],
            basis_norm=metrics.basis_norm[at],
            selection=(*_candidates(run.rows, best), *choice["rows"]),
            validation=np.array([row["log_loss"] for row in stops], np.float32),
            validation_steps=np.array([row["num_steps"] for row in stops], np.int32),
            heldout=heldout,
            starts=starts,
        ),
        recipe=recipe,
        ids=ids,
    )


def _compared(prefs: Preferences, bases: Sequence, weights: Sequence) -> tuple:
    """(projections, weights) of each start, of the rows and users that are compared.

    No process has those of all.
    """
    table: Any = prefs.features
    rows = np.arange(0, table.shape[0], compared_stride(table.shape[0]))
    features = table.gather_rows(rows)
    projections = [np.asarray(project_rows(features, v)) for v in bases]
    mine, stride = np.flatnonzero(table.mine(prefs)), compared_stride(prefs.num_users)
    some = mine % stride == 0
    part = {"at": mine[some] // stride, "weights": np.stack(weights)[:, some]}
    size = len(range(0, prefs.num_users, stride))
    out = np.empty((len(bases), size, bases[0].shape[1]))
    for found in _processes.gather_arrays(part):
        out[:, found["at"]] = found["weights"]
    return projections, out


def _choose(
    train: CandidateTrainer, holdouts, ranks, recipe: Marginal, run: Run
) -> dict:
    """Everything that hold-outs decide, in plain numbers that a record can hold."""
    grids = recipe.search
    if not holdouts:
        settings, rows = choose_refinement((), (), np.ones(0), grids)
        candidate = train.first(ranks[0])._asdict()
        found = {"candidate": candidate, "num_steps": recipe.num_steps}
        return {**found, "settings": settings, "rows": rows, "heldout": []}
    losses = Losses(train, holdouts, run)
    best = select(losses, ranks, grids)
    curves = losses.curves(best)
    counts = stride(recipe.num_steps) * np.arange(1, len(curves[0]) + 1)
    counts = counts.clip(max=recipe.num_steps)
    scales = losses.scales_of(best)
    at = choose_stop(curves, scales)
    steps = [{"num_steps": int(n)} for n in counts]
    stops = candidate_rows(steps, np.stack(curves, 1), scales)
    stops[at]["chosen"] = True
    splits = list(holdouts.values())
    settings, rows = choose_refinement(splits, losses.results(best, at), scales, grids)
    train.problems.clear()
    return {
        "candidate": best._asdict(),
        "num_steps": int(counts[at]),
        "settings": settings,
        "rows": [*stops, *rows],
        "heldout": losses.report([curve[at] for curve in curves]),
    }


def _candidates(rows: Sequence[dict], best: Candidate) -> list[dict]:
    """A row per candidate out of those per candidate and hold-out."""
    found: dict[Candidate, dict] = {}
    for row in rows:
        candidate = Candidate(*(row[name] for name in Candidate._fields))
        new = {**candidate._asdict(), "losses": []}
        one = found.setdefault(candidate, new)
        one["losses"].append(row["log_loss"])
        one[row["holdout"]] = row["log_loss"]
    for candidate, one in found.items():
        one["log_loss"] = float(np.mean(one.pop("losses")))
        one["chosen"] = candidate == best
    return list(found.values())


def _warn_unless_it_helps(heldout: Sequence[dict]) -> None:
    for row in heldout:
        if row["gain"] < -2 * row["standard_error"]:
            name = row["holdout"]
            _checks.warn(
                f"personalisation does not help on held-out {name}: log-loss is "
                f"{row['log_loss']:.3f}, that of one direction for all users "
                f"{row['global_log_loss']:.3f}. Search(holdout={name!r}) chooses the "
                "settings for them alone"
            )


def _train_on_all(
    train: CandidateTrainer, prefs: Preferences, best: Candidate, choice: dict, run: Run
) -> tuple[np.ndarray, np.ndarray, Metrics]:
    """(θ float[S, R, K], log π float[S, A], metrics float[S, steps]) of all starts.

    From some starts two true directions end in one column. The objective, which
    `run.finished` begins with, says so.
    """
    first = len(run.finished[0]) if run.finished else 0
    starts = range(first, 1 if train.init is not None else train.recipe.num_starts)

    trainings = [Training("all", prefs, best, start) for start in starts]
    users = count_users(pack(prefs))
    for state, metrics, _ in train(trainings, num_steps=choice["num_steps"]):
        penalty = best.ridge / 2 * float(np.square(state.theta).sum())
        value = users * float(np.sum(metrics.loss[-1:])) + penalty
        new = np.nan_to_num(value, nan=np.inf), state.theta, state.log_weights, *metrics
        new = [np.asarray(x)[None] for x in new]
        run.finished = tuple(
            np.concatenate(x)
            for x in (zip(run.finished, new) if run.finished else zip(new))
        )
    return run.finished[1], run.finished[2], Metrics._make(run.finished[3:])
