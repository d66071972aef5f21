"""What every experiment shares: the four-way evaluation and the sweep over shots.

A *cell* is one (split, seed, method, rank), or one (…, shots) of a sweep. Finished
cells lie in the results folder under a name that covers everything they depend on, and
are not computed again. Tables (``experiments.result_tables``) are made from cells
alone.
"""

import collections
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lore_jax as lore
from experiments import baselines
from experiments.baselines import (
    ALONE,
    MAXIMUM,
    OTHER,
    PLUG_IN,
    POPULATION,
    PerUserBradleyTerry,
    Recipe,
)
from experiments.parts import PARTS, Split, SplitSource, count_shown, take_shots
from experiments.prepared import digest, replacing, write_json

HELDOUT = ("seen_heldout", "unseen_heldout")
LOSSES = tuple(f"{part}_{what}" for what in ("log_loss", "brier") for part in HELDOUT)
CONTENT = 2  # of a cell; raised when cells hold something else, so old ones are redone


@dataclasses.dataclass(frozen=True)
class Cell:
    """A finished cell.

    Attributes:
        values: {(row, quantity): float[U]} per-user results.
        facts: settings, seconds, what validation chose; ``expected_error`` is the
            calibration error over all pairs, {row: {part: number}}.
    """

    values: dict
    facts: dict


class Store:
    """Finished cells and fits in a results folder."""

    def __init__(self, folder) -> None:
        """Open or begin a folder."""
        self.folder = Path(folder)
        for name in ("cells", "fits"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def path(self, kind: str, key: dict, end: str = ".npz") -> Path:
        """Where a cell lies: a readable name and a hash of all it depends on."""
        full = {**key, "lore_jax": lore.__version__}
        full |= {"content": CONTENT} if kind == "cells" else {}
        words = [str(key[n]) for n in ("split", "seed", "method", "rank", "shots")
                 if n in key]  # fmt: skip
        name = re.sub(r"[^\w.-]+", "_", "_".join(words))
        mark = digest(json.dumps(full, sort_keys=True))[:12]
        return self.folder / kind / f"{name}_{mark}{end}"

    def get(self, key: dict) -> Cell | None:
        """A finished cell, or None."""
        path = self.path("cells", key)
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            found = {n: file[n] for n in file.files if n != "facts"}
        return Cell({tuple(n.split("|")): v for n, v in found.items()}, facts)

    def put(self, key: dict, cell: Cell) -> Cell:
        """Store a cell, all at once."""
        arrays = {"|".join(n): np.asarray(v) for n, v in cell.values.items()}
        facts = json.dumps({"key": key, **cell.facts})
        path = self.path("cells", key)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, facts=facts, **arrays)
        return cell


class Run:
    """Cells of one experiment: computed where they are missing."""

    def __init__(self, store: Store, sources: Sequence) -> None:
        """Keep the sources; a split is read when a missing cell needs it.

        Args:
            store: the results folder.
            sources: a ``SplitSource``, or what has its ``name``, ``fingerprint``,
                ``people`` and ``load``, for every split.
        """
        self.store, self.sources = store, list(sources)
        known: dict = {}
        self.marks = {s.name: s.fingerprint(known) for s in self.sources}
        self.people = {s.name: s.people() for s in self.sources}
        self._split: Split | None = None

    def split(self, source: SplitSource) -> Split:
        """The split in memory, one at a time."""
        if self._split is None or self._split.name != source.name:
            self._split = None
            self._split = source.load()
        return self._split

    def key(self, source: SplitSource, seed: int, recipe: Recipe, **more) -> dict:
        """What a cell depends on."""
        return {
            **{"split": source.name, "data": self.marks[source.name], "seed": seed},
            **{"method": recipe.method, "rank": recipe.rank},
            **{"train": recipe.train, "fewshot": recipe.fewshot, **more},
        }

    def fit(self, source: SplitSource, seed: int, recipe: Recipe) -> lore.Fitted:
        """The fit of a cell, from disk or made now."""
        key = self.key(source, seed, dataclasses.replace(recipe, fewshot={}))
        path = self.store.path("fits", key, ".safetensors")
        if path.exists():
            return lore.load(path)
        fitted = recipe.fit(self.split(source), seed)
        lore.save(path, fitted)
        return fitted

    def alone(
        self, source: SplitSource, seed: int, recipe: Recipe
    ) -> PerUserBradleyTerry:
        """The selected ridge of "each user alone"."""
        path = self.store.path("fits", self.key(source, seed, recipe), ".json")
        if not path.exists():
            chosen = PerUserBradleyTerry.select(self.split(source).data.seen, seed)
            write_json(path, vars(chosen))
        return PerUserBradleyTerry(**json.loads(path.read_text()))

    def four_way(self, source: SplitSource, seed: int, recipe: Recipe) -> Cell:
        """Accuracy of seen and unseen users on training and held-out pairs."""
        key = self.key(source, seed, recipe)
        if (found := self.store.get(key)) is not None:
            return found
        start, split = time.monotonic(), self.split(source)
        if recipe.method == "alone":
            own = self.alone(source, seed, recipe)
            values, facts = four_way_alone(own, split)
        else:
            fitted = self.fit(source, seed, recipe)
            values, facts = four_way(recipe, fitted, split, seed)
        facts = {**facts, "counts": split.counts, "seconds": time.monotonic() - start}
        return self.store.put(key, Cell(values, facts))

    def sweep(
        self, source: SplitSource, seed: int, recipe: Recipe, shots, trials: int
    ) -> Cell:
        """How well unseen users are known after so many shots (None: all), averaged."""
        trials = 1 if shots in (None, 0) else trials
        name = "all" if shots is None else shots
        key = self.key(source, seed, recipe, shots=name, trials=trials)
        if (found := self.store.get(key)) is not None:
            return found
        start, split = time.monotonic(), self.split(source)
        if recipe.method == "alone":
            learned, test = self.alone(source, seed, recipe), split.data.unseen_heldout
        else:
            learned = self.fit(source, seed, recipe)
            test = baselines.projected_table(
                split.data.unseen_heldout, learned.model.basis
            )
        totals: dict = collections.defaultdict(float)
        errors: collections.Counter = collections.Counter()
        counted: collections.Counter = collections.Counter()
        for trial in range(trials):
            shown = take_shots(split, shots, seed=1000 * seed + trial)
            counted.update(count_shown(split, shots, 1000 * seed + trial))
            values, error = shot(recipe, learned, shown, test, trial)
            for name, found in values.items():
                totals[name] += np.asarray(found, np.float64) / trials
            errors.update({row: number / trials for row, number in error.items()})
        values = {name: found.astype(np.float32) for name, found in totals.items()}
        facts = {name: number / trials for name, number in counted.items()}
        facts["expected_error"] = {r: {"unseen_heldout": e} for r, e in errors.items()}
        facts |= {"counts": split.counts, "seconds": time.monotonic() - start}
        return self.store.put(key, Cell(values, facts))


def judge(margins, prefs: lore.Preferences) -> tuple[dict, float]:
    """Accuracy, log-loss and Brier score of each user, and the calibration error.

    Args:
        margins: float[N] in stored order, in units of log-odds.
        prefs: N pairs of U users.

    Returns:
        {"": float[U], "_log_loss": float[U], "_brier": float[U]}, NaN for users
        without a pair, and the expected calibration error over all pairs.
    """
    margins = np.asarray(margins, np.float32)
    label = None if prefs.label is None else np.asarray(prefs.label, np.float32)
    loss = lore.losses.pair_loss(margins, label)
    label = np.float32(1) if label is None else label
    right = (1 + np.sign(margins)) / 2
    chance = 0.5 * (1 + np.tanh(margins / 2))
    found = {
        "": label * right + (1 - label) * (1 - right),
        "_log_loss": loss,
        "_brier": (chance - label) ** 2,
    }
    users = {n: lore.evaluation.per_user_mean(v, prefs) for n, v in found.items()}
    if not len(margins):
        return users, float("nan")
    sure = np.where(chance == 0.5, np.float32(0.5), label)  # neither side is predicted
    return users, lore.evaluation.calibration(chance, sure).expected_error


def stored_margins(weights, prefs: lore.Preferences, temperature: float):
    """float[N] in stored order, of pairs whose features are projected already."""
    eye = np.eye(np.shape(weights)[1], dtype=np.float32)
    return np.asarray(
        lore.margins(lore.RewardModel(eye, temperature=temperature), weights, prefs)
    )[prefs.order]


def predicted_margins(fitted: lore.Fitted, shown, prefs: lore.Preferences):
    """float[N]: log-odds of the predictions that integrate over the posterior."""
    model = baselines.projected_model(fitted)
    chance = lore.predict_proba(model, shown, prefs).astype(np.float64)
    chance = np.clip(chance, 1e-30, 1 - 1e-16)
    return (np.log(chance) - np.log1p(-chance))[prefs.order].astype(np.float32)


def all_weights(recipe: Recipe, fitted: lore.Fitted, shown, weights, seed: int) -> dict:
    """{row: float[U, K]}: everything that a fit can say of users who have shown this.

    Args:
        recipe: what was fitted.
        fitted: the fit.
        shown: what the users have said, projected.
        weights: float[U, K] of the recipe.
        seed: who gets whose weights.
    """
    rows = {recipe.label: weights}
    if recipe.method == "lore" and recipe.rank > 1:
        rows[MAXIMUM] = baselines.ml_weights(fitted, shown)
        rows[POPULATION] = baselines.mean_weights(fitted, shown)
        rows[OTHER] = baselines.shuffled_weights(weights, seed)
    return rows


def judge_heldout(recipe: Recipe, fitted: lore.Fitted, shown, prefs, rows) -> dict:
    """{row: (quantities, error)} on held-out pairs, the default's integrated too."""
    scale = fitted.model.temperature
    out = {n: judge(stored_margins(p, prefs, scale), prefs) for n, p in rows.items()}
    if recipe.method in ("lore", "auto") and rows[recipe.label].shape[1] > 1:
        users, error = out[recipe.label]
        if recipe.method == "lore":
            out[PLUG_IN] = {name: v for name, v in users.items() if name}, error
        users_, error = judge(predicted_margins(fitted, shown, prefs), prefs)
        # Integrating moves no margin across 0, but may round one to it.
        out[recipe.label] = {**users_, "": users[""]}, error
    return out


def four_way(recipe: Recipe, fitted: lore.Fitted, split: Split, seed: int):
    """Per-user results of a fit, and of what else its basis can show.

    Returns:
        {(row, quantity): float[U]}, and facts.
    """
    parts = [baselines.projected_table(part, fitted.model.basis) for part in split.data]
    mine = np.asarray(fitted.weights)
    sides = (mine, np.asarray(recipe.adapt(fitted, parts[2], seed)))
    values: dict = {}
    errors: dict = {}
    eye = np.eye(mine.shape[1], dtype=np.float32)
    for weights, place in zip(sides, (0, 2)):
        shown, heldout = parts[place : place + 2]
        rows = all_weights(recipe, fitted, shown, weights, seed)
        for row, p in rows.items():
            values[row, PARTS[place]] = np.asarray(
                lore.accuracy(lore.RewardModel(eye), p, shown)
            )
        judged = judge_heldout(recipe, fitted, shown, heldout, rows)
        collect(values, errors, PARTS[place + 1], judged)
    facts = {
        "selection": json.loads(json.dumps(fitted.history.selection, default=float)),
        "rank": mine.shape[1],
        "mean_weights": np.asarray(fitted.model.prior.mean).tolist(),
        "expected_error": errors,
    }
    return values, facts


def collect(values: dict, errors: dict, part: str, rows: dict) -> None:
    """Add judged rows of one held-out part to the values and errors of a cell."""
    for row, (users, error) in rows.items():
        for suffix, found in users.items():
            values[row, part + suffix] = np.asarray(found)
        errors.setdefault(row, {})[part] = error


def four_way_alone(own: PerUserBradleyTerry, split: Split) -> tuple[dict, dict]:
    """Per-user results where every user has an own direction, and facts."""
    values: dict = {}
    errors: dict = {}
    for place in (0, 2):
        shown, heldout = split.data[place : place + 2]
        directions = own.directions(shown)
        users, _ = judge(baselines.own_margins(directions, shown), shown)
        values[ALONE, PARTS[place]] = users[""]
        judged = judge(baselines.own_margins(directions, heldout), heldout)
        collect(values, errors, PARTS[place + 1], {ALONE: judged})
    return values, {"selection": own.selection, "expected_error": errors}


def shot(recipe: Recipe, learned, shown, test, seed: int) -> tuple[dict, dict]:
    """Results of unseen users who have shown these pairs.

    Returns:
        {(row, quantity): float[U]}, and the calibration error of each row.
    """
    if recipe.method == "alone":
        margins = baselines.own_margins(learned.directions(shown), test)
        rows = {ALONE: judge(margins, test)}
    else:
        shown = baselines.projected_table(shown, learned.model.basis)
        weights = np.asarray(recipe.adapt(learned, shown, seed))
        rows = all_weights(recipe, learned, shown, weights, seed)
        rows = judge_heldout(recipe, learned, shown, test, rows)
    values: dict = {}
    errors: dict = {}
    collect(values, errors, "unseen_heldout", rows)
    return values, {row: parts["unseen_heldout"] for row, parts in errors.items()}
