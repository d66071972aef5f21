"""The default recipe: every setting on hold-outs, then a training on all pairs."""

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax._pairs.pack import count_users
from lore_jax._pairs.used_rows import without_unused_rows
from lore_jax._train.refinement import choose_refinement
from lore_jax._train.resume import Run, stride
from lore_jax._train.search import SETTINGS, Search, select
from lore_jax._train.trainer import Trainer
from lore_jax._train.validation import choose_stop, make_holdouts, rows_of
from lore_jax.adaptation import adapt
from lore_jax.config import TrainConfig
from lore_jax.diagnostics import compare_starts
from lore_jax.model import RewardParams
from lore_jax.preferences import FeatureSource, Preferences
from lore_jax.prior import with_settings
from lore_jax.results import Fitted, History, Metrics


def fit_marginal(
    prefs: Preferences,
    ranks: tuple[int, ...],
    key: jax.Array,
    config: TrainConfig,
    init: RewardParams | None,
    run: Run,
) -> Fitted:
    """`fit` by the default recipe; a rank, or the best of several."""
    key_atoms, key_start, key_split = jax.random.split(key, 3)
    ids = prefs.ids
    prefs = without_unused_rows(prefs)
    if not isinstance(prefs.features, FeatureSource):  # One copy for all candidates.
        prefs = prefs.replace(features=jnp.asarray(prefs.features))
    train = Trainer(prefs, (key_atoms, key_start), config, init, run)
    if not run.choice:
        share = config.validation_share
        holdouts = make_holdouts(prefs, key_split, share, config.holdout)
        run.choice = _choose(train, holdouts, ranks, config, run)
    choice = run.choice
    best = choice["candidate"]
    thetas, log_weights, metrics = _train_on_all(train, prefs, best, choice, run)
    trained = zip(thetas, log_weights)
    results = [train.result("all", prefs, *x, best) for x in trained]
    results = [(v, with_settings(prior, choice["settings"])) for v, prior in results]
    at = int(run.finished[0].argmin())
    adapted = [adapt(v, prefs, prior=prior) for v, prior in results]
    weights = [np.asarray(x.weights) for x in adapted]
    stops = [row for row in choice["rows"] if "num_steps" in row]
    heldout = tuple(choice["heldout"])
    if best["rank"] > 1:
        _warn_unless_it_helps(heldout)
    return Fitted(
        params=RewardParams(
            basis=results[at][0], logits=jnp.asarray(adapted[at].logits)
        ),
        weights=jnp.asarray(adapted[at].weights),
        prior=results[at][1],
        history=History(
            loss=metrics.loss[at],
            weights_norm=metrics.weights_norm[at],
            basis_norm=metrics.basis_norm[at],
            selection=(*_candidates(run.rows, best), *choice["rows"]),
            validation=np.array([row["log_loss"] for row in stops], np.float32),
            validation_steps=np.array([row["num_steps"] for row in stops], np.int32),
            heldout=heldout,
            starts=compare_starts(prefs, [v for v, _ in results], weights, at),
        ),
        temperature=config.temperature,
        config=config,
        ids=ids,
    )


def _choose(train: Trainer, holdouts, ranks, config: TrainConfig, run: Run) -> dict:
    """Everything that hold-outs decide, in plain numbers that a record can hold."""
    if not holdouts:
        settings, rows = choose_refinement((), (), np.ones(0), config)
        found = {
            "candidate": {"rank": ranks[0], **train.first},
            "num_steps": config.num_steps,
        }
        return {**found, "settings": settings, "rows": rows, "heldout": []}
    search = Search(train, holdouts, run)
    best = select(search, ranks, config)
    curves = search.curves(best)
    counts = stride(config.num_steps) * np.arange(1, len(curves[0]) + 1)
    counts = counts.clip(max=config.num_steps)
    scales = search.scales_of(best)
    at = choose_stop(curves, scales)
    steps = [{"num_steps": int(n)} for n in counts]
    stops = rows_of(steps, np.stack(curves, 1), scales)
    stops[at]["chosen"] = True
    splits = list(holdouts.values())
    settings, rows = choose_refinement(splits, search.results(best, at), scales, config)
    train.problems.clear()
    return {
        "candidate": best,
        "num_steps": int(counts[at]),
        "settings": settings,
        "rows": [*stops, *rows],
        "heldout": search.report([curve[at] for curve in curves]),
    }


def _candidates(rows: Sequence[dict], best: dict) -> list[dict]:
    """A row per candidate out of those per candidate and hold-out."""
    found: dict[tuple, dict] = {}
    for row in rows:
        candidate = {name: row[name] for name in SETTINGS}
        one = found.setdefault(tuple(candidate.values()), {**candidate, "losses": []})
        one["losses"].append(row["log_loss"])
        one[row["holdout"]] = row["log_loss"]
    for one in found.values():
        one["log_loss"] = float(np.mean(one.pop("losses")))
        one["chosen"] = best.items() <= one.items()
    return list(found.values())


def _warn_unless_it_helps(heldout: Sequence[dict]) -> None:
    for row in heldout:
        if row["gain"] < -2 * row["standard_error"]:
            name = row["holdout"]
            warnings.warn(
                f"personalisation does not help on held-out {name}: log-loss is "
                f"{row['log_loss']:.3f}, that of one direction for all users "
                f"{row['global_log_loss']:.3f}. TrainConfig(holdout={name!r}) chooses "
                "the settings for them alone",
                stacklevel=5,  # The caller of `fit`.
            )


def _train_on_all(
    train: Trainer, prefs: Preferences, best: dict, choice: dict, run: Run
) -> tuple[np.ndarray, np.ndarray, Metrics]:
    """(θ float[S, R, K], log π float[S, A], metrics float[S, steps]) of all starts.

    From some starts two true directions end in one column. The objective, which
    `run.finished` begins with, says so.
    """
    first = len(run.finished[0]) if run.finished else 0
    starts = range(first, 1 if train.init is not None else train.config.num_starts)

    def from_start(number):
        steps = choice["num_steps"]
        return train("all", prefs, best, start=number, num_steps=steps)

    for state, metrics, _ in train.each(from_start, starts):
        users = count_users(prefs)
        penalty = best["ridge"] / 2 * float(jnp.sum(state.theta**2))
        value = users * float(np.sum(metrics.loss[-1:])) + penalty
        new = np.nan_to_num(value, nan=np.inf), state.theta, state.log_weights, *metrics
        new = [np.asarray(x)[None] for x in new]
        run.finished = tuple(
            np.concatenate(x)
            for x in (zip(run.finished, new) if run.finished else zip(new))
        )
    return run.finished[1], run.finished[2], Metrics._make(run.finished[3:])
