"""The main job on real votes: five methods, two tables, JSON and figures.

Learns a basis from the seen people of the bowling_green votes, adapts the unseen people
from 0 … all of their pairs, and reports macro accuracy over people with 95 % intervals.
One table is about held-out votes on statements of the training pairs, the other about
new statements, which are held out with all their votes. Every setting is chosen on
training votes alone. The last row and global Bradley–Terry choose theirs on hold-outs
of the kind that the table tests, the default on both kinds.
"""

import json
import logging
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import lore_jax as lore
from lore_jax.cli import intervals
from lore_jax.cli.figures import shots_figure
from lore_jax.model import prior_of

SHOTS = (0, 1, 3, 5, 10, 20, None)
SETTINGS = {
    "judgements": "held-out votes on known statements",
    "items": "new statements",
}
FLAT = ("global", "population")  # the same whatever a new person has shown
METHODS = {
    "global": "global Bradley–Terry",
    "population": "population mean weights",
    "published": "published joint recipe",
    "likelihood": "maximum likelihood",
    "default": "lore_jax default",
    "chosen": "lore_jax, holdout as here",
}
_log = logging.getLogger(__name__)


def run(
    splits: int,
    rank: int,
    out: pathlib.Path,
    say: Callable[[str], Any],
    votes: lore.data.Votes | None = None,
) -> dict:
    """Runs all splits, says the tables, and writes JSON and the figures.

    Args:
      splits: how many splits.
      rank: K ≥ 2.
      out: folder to write to.
      say: called with each line of the report.
      votes: default bowling_green.

    Returns:
      What `results.json` holds.

    Raises:
      ValueError: `splits` is below 1 or `rank` below 2.
    """
    if splits < 1 or rank < 2:
        raise ValueError("--splits must be at least 1 and --rank at least 2")
    start = time.perf_counter()
    votes = lore.data.load_bowling_green() if votes is None else votes
    say(
        f"bowling_green: {len(votes.user_ids)} people, {len(votes.features)} "
        f"statements, {len(votes.vote)} votes; rank {rank}, {splits} split(s)"
    )
    # Without a terminal there is no bar, and a line a split instead.
    bar = tqdm(total=2 * splits * len(METHODS), desc="split 1", disable=None)
    results = {
        holdout: one_setting(votes, holdout, splits, rank, bar) for holdout in SETTINGS
    }
    bar.close()
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    for holdout, result in results.items():
        for line in table_lines(
            SETTINGS[holdout], result["accuracy"], result["distinct_votes"]
        ):
            say(line)
    whole = {
        "rank": rank,
        "splits": splits,
        "seconds": seconds,
        **results,
        "versions": {
            "lore_jax": lore.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
    }
    (out / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    say(f"\n{seconds:.0f} s; wrote {out / 'results.json'}")
    for holdout, result in results.items():
        path = out / f"accuracy_{holdout}.png"
        draw(path, result["accuracy"], SETTINGS[holdout], splits, rank)
        say(f"wrote {path}")
    return whole


def one_setting(votes, holdout: str, splits: int, rank: int, bar) -> dict:
    """All splits of one setting: intervals of every method, and paired differences."""
    cells: dict = {}
    judgements: dict = {}
    people: dict = {}
    for seed in range(splits):
        stage = f"{SETTINGS[holdout]}, split {seed + 1}/{splits}"
        bar.set_description(stage)
        if bar.disable:
            _log.info(stage)
        split = votes.split(seed=seed, holdout=holdout)
        sides = {"seen": split.seen_heldout, "unseen": split.unseen_heldout}
        for side, prefs in sides.items():
            people.setdefault(side, []).append(prefs.ids.users)
        one_split(split, rank, seed, holdout, cells, judgements, bar)
    table = {
        name: {
            column: intervals.bootstrap(values, people[column.split()[0]])._asdict()
            for column, values in columns.items()
        }
        for name, columns in cells.items()
    }
    differences = {
        f"default_minus_{name}": {
            column: intervals.paired(
                values, cells[name][column], people[column.split()[0]]
            )._asdict()
            for column, values in cells["default"].items()
        }
        for name in FLAT
    }
    counted = {k: float(np.mean(v)) for k, v in judgements.items()}
    return {"accuracy": table, **differences, "distinct_votes": counted}


def draw(path: pathlib.Path, table: dict, setting: str, splits: int, rank: int) -> None:
    """The figure of one setting."""
    curves = {
        METHODS[name]: [
            ("all" if shot is None else shot, *share(columns[f"unseen {label(shot)}"]))
            for shot in SHOTS
        ]
        for name, columns in table.items()
        if name not in FLAT
    }
    flat = {METHODS[name]: share(table[name]["unseen 0"]) for name in FLAT}
    title = f"{setting}\n"  # Longer lines would run into the legend.
    title += f"unseen people, K = {rank}, {splits} split(s), 95 % intervals"
    shots_figure(path, curves, flat=flat, title=title)


def share(interval: dict) -> tuple[float, ...]:
    """(mean, low, high) as shares of 1, for figures."""
    return tuple(interval[part] / 100 for part in ("mean", "low", "high"))


def one_split(split, rank: int, seed: int, holdout, cells, judgements, bar) -> None:
    """Adds one split's float[U] accuracies to `cells[method][column]`."""
    shots = {label(n): lore.take_shots(split.unseen, n, seed=seed) for n in SHOTS}
    for name, prefs in shots.items():
        counted = lore.data.count_judgements(prefs)
        judgements.setdefault(f"unseen {name}", []).append(counted.mean())
    counted = lore.data.count_judgements(split.seen)
    judgements.setdefault("seen", []).append(counted.mean())

    def add(name: str, model, seen_weights, adapt) -> None:
        accuracy = lore.accuracy(
            model, seen_weights, split.seen_heldout, user_ids=split.seen.user_ids
        )
        columns = cells.setdefault(name, {})
        columns.setdefault("seen", []).append(np.asarray(accuracy) * 100)
        for shot, prefs in shots.items():
            accuracy = lore.accuracy(
                model, adapt(prefs), split.unseen_heldout, user_ids=prefs.user_ids
            )
            columns.setdefault(f"unseen {shot}", []).append(np.asarray(accuracy) * 100)
        bar.update()

    def everyone(weights):
        return lambda prefs: np.tile(weights, (prefs.num_users, 1))

    key = jax.random.key(seed)
    chosen = lore.Marginal(search=lore.Search(holdout=holdout))
    line = lore.fit(split.seen, rank=1, key=key, recipe=chosen)
    add("global", line.model, line.weights, everyone(np.ones(1, np.float32)))

    fitted = lore.fit(split.seen, rank=rank, key=key)
    mean = np.asarray(prior_of(fitted.model).mean)
    seen = everyone(mean)(split.seen)
    add("population", fitted.model, seen, everyone(mean))

    scale = published_scale(split.seen)
    config = lore.PublishedJoint()
    joint = lore.fit(scale(split.seen), rank=rank, key=key, recipe=config)
    few = lore.PublishedAdam(learning_rate=0.1, key=jax.random.key(seed))
    add(
        "published",
        joint.model,
        joint.weights,
        lambda prefs: lore.adapt(joint.model, scale(prefs), method=few).weights,
    )

    likelihood = lore.MaximumLikelihood()

    def certified(prefs):
        return lore.adapt(fitted.model, prefs, method=likelihood).weights

    add("likelihood", fitted.model, certified(split.seen), certified)
    fits = {
        "default": fitted,
        "chosen": lore.fit(split.seen, rank=rank, key=key, recipe=chosen),
    }
    for name, fit in fits.items():
        add(
            name,
            fit.model,
            fit.weights,
            lambda prefs, fit=fit: lore.adapt(fit.model, prefs).weights,
        )


def published_scale(prefs: lore.Preferences):
    """The published preparation: centred features of mean norm 100, for T = 100."""
    features = np.asarray(prefs.features)
    centre = features.mean(0)
    norm = np.linalg.norm(features - centre, axis=1).mean()
    table = (features - centre) * np.float32(100 / norm)
    return lambda prefs: prefs.replace(features=table)


def label(shots: int | None) -> str:
    """How a number of pairs is written in tables."""
    return "all" if shots is None else str(shots)


def table_lines(setting: str, table: dict, judgements: dict) -> list[str]:
    """Lines of a table: a row per method, a column per number of pairs."""
    columns = list(next(iter(table.values())))
    wide = max(len(name) for name in METHODS.values())
    lines = [f"\nMacro accuracy over people on {setting}, %"]
    lines.append("[95 % interval over people and splits]\n")
    lines.append("  ".join([" " * wide, *(f"{c:>17}" for c in columns)]))
    for name, cells in table.items():
        row = (
            f"{c['mean']:5.1f} [{c['low']:4.1f}, {c['high']:4.1f}]"
            for c in cells.values()
        )
        lines.append(
            "  ".join([f"{METHODS[name]:<{wide}}", *(f"{x:>17}" for x in row)])
        )
    votes = (f"{judgements[c]:.1f}" for c in columns)
    title = f"{'distinct votes used':<{wide}}"
    lines.append("  ".join([title, *(f"{x:>17}" for x in votes)]))
    return lines
