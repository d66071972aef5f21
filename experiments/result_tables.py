"""Tables from cells: means, 95 % intervals, paired differences, probabilities.

Seeds of one split are averaged user by user; intervals are bootstraps over distinct
users (``lore_jax.cli.intervals``); differences are paired, user by user, against global
Bradley-Terry.
"""

import collections
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from experiments.baselines import GLOBAL, OWN
from experiments.parts import PARTS
from experiments.prepared import replacing, versions, write_json
from experiments.protocol import HELDOUT, LOSSES, Cell
from lore_jax.cli import intervals

ERRORS = tuple(f"{part}_expected_error" for part in HELDOUT)
QUANTITIES = (*PARTS, *LOSSES, *ERRORS)
QUALITY = {"log_loss": "log-loss", "brier": "Brier", "expected_error": "ECE"}
COUNTED = ("num_splits", "pairs", "judgements")
_NOTHING: Mapping = MappingProxyType({})


class Rows:
    """Per-user results by row, split and quantity, seeds averaged."""

    def __init__(self, people: Mapping[str, Mapping]) -> None:
        """Start empty.

        Args:
            people: {split: {"seen": [U], "unseen": [U]}} ids of the users.
        """
        self._found: dict = collections.defaultdict(list)
        self._errors: dict = collections.defaultdict(list)
        self._counts: dict = {}
        self._people = people

    def add(self, split: str, rank: int, cell: Cell) -> None:
        """Take in a cell; call once for every seed."""
        if "counts" in cell.facts:
            self._counts[split] = cell.facts["counts"]
        for (row, quantity), values in cell.values.items():
            self._found[row, rank, quantity, split].append(values)
        for row, parts in cell.facts.get("expected_error", {}).items():
            for part, error in parts.items():
                self._errors[row, rank, f"{part}_expected_error"].append(error)

    def keys(self) -> list[tuple[str, int]]:
        """The (row, rank) that are there, in order of arrival."""
        return list(dict.fromkeys(key[:2] for key in self._found))

    def splits(self, row: str, rank: int, quantity: str) -> dict[str, np.ndarray]:
        """{split: float[U]} of the splits that have users in this part."""
        out = {}
        for (*key, split), values in self._found.items():
            if tuple(key) == (row, rank, quantity):
                mean = np.mean(np.asarray(values, np.float64), axis=0)
                if not np.isnan(mean).all():
                    out[split] = mean
        return out

    def interval(self, row: str, rank: int, quantity: str) -> dict | None:
        """Mean, 95 % interval, and the paired difference to global Bradley-Terry.

        Users are counted once; pairs and judgements are summed over the splits. The
        calibration error is one number for all pairs of a part, its mean over splits
        and seeds, without an interval.
        """
        if quantity in ERRORS:
            errors = self._errors.get((row, rank, quantity), [])
            errors = [error for error in errors if np.isfinite(error)]
            return {"mean": float(np.mean(errors))} if errors else None
        mine = self.splits(row, rank, quantity)
        if not mine:
            return None
        side = quantity.split("_")[0]
        people = [self._people[split][side] for split in mine]
        found = _json(intervals.bootstrap(list(mine.values()), people))
        found["num_splits"] = len(mine)
        part = next(part for part in PARTS if quantity.startswith(part))
        counts = [self._counts[s][part] for s in mine if s in self._counts]
        for what in ("pairs", "judgements") if counts else ():
            found[what] = sum(count[what] for count in counts)
        base = self.splits(GLOBAL, 1, quantity)
        if row != GLOBAL and set(mine) <= set(base):
            pair = [list(mine.values()), [base[split] for split in mine]]
            found["difference"] = _json(intervals.paired(*pair, people))
        return found

    def table(self, quantities: Sequence[str] = QUANTITIES) -> list[dict]:
        """One dictionary per (row, rank)."""
        return [
            {
                **{"method": row, "rank": None if rank == OWN else rank},
                **{q: self.interval(row, rank, q) for q in quantities},
            }
            for row, rank in self.keys()
        ]


def markdown(table: Sequence[dict], quantities: Sequence[str] = PARTS) -> str:
    """Accuracies in % with intervals, and the held-out differences, as a table."""
    heads = ["method", "K", *(q.replace("_", " ") for q in quantities)]
    heads += [f"{q.split('_')[0]}: vs global" for q in quantities if "heldout" in q]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for row in table:
        if not any(row[q] for q in quantities):
            continue  # it differs from another row in its probabilities alone
        rank = "" if row["rank"] is None else row["rank"]
        cells = [row["method"], str(rank)]
        cells += [_percent(row[q]) for q in quantities]
        for q in quantities:
            if "heldout" in q:
                cells.append(_percent((row[q] or {}).get("difference"), sign="+"))
        lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def quality_markdown(table: Sequence[dict]) -> str:
    """How good the probabilities are: log-loss, Brier score, calibration error."""
    columns = [(part, name) for part in HELDOUT for name in QUALITY]
    heads = [f"{part.split('_')[0]}: {QUALITY[name]}" for part, name in columns]
    lines = [" | ".join(["method", "K", *heads])]
    lines.append(" | ".join("---" for _ in range(len(heads) + 2)))
    for row in table:
        rank = "" if row["rank"] is None else str(row["rank"])
        cells = [_plain(row[f"{part}_{name}"]) for part, name in columns]
        lines.append(" | ".join([row["method"], rank, *cells]))
    return "".join(f"| {line} |\n" for line in lines)


def counts_markdown(counts: Mapping[str, dict]) -> str:
    """Users, pairs and distinct judgements of each part: a line per split and part."""
    what = ("users", "pairs", "judgements")
    lines = [" | ".join(["split", "part", *what]), " | ".join(["---"] * 5)]
    for split, parts in counts.items():
        for part, found in parts.items():
            cells = [split, part.replace("_", " "), *(str(found[n]) for n in what)]
            lines.append(" | ".join(cells))
    return "".join(f"| {line} |\n" for line in lines)


def mean_counts(found: Iterable[dict]) -> dict:
    """Mean of counts over splits and seeds."""
    found = list(found)
    return {name: sum(f[name] for f in found) / len(found) for name in found[0]}


def shots_markdown(
    table: Sequence[dict],
    shown: Mapping[str, dict] = _NOTHING,
    *,
    quantity: str = "unseen_heldout",
    what: str = "shots",
) -> str:
    """Held-out accuracy in %: a line per method, a column per shot.

    The same lines follow with paired differences against global Bradley-Terry, where
    it was run; the last two say how many pairs and distinct judgements all unseen
    users showed together (means over splits and draws).

    Args:
        table: rows with "shots", "method", "rank" and the quantity.
        shown: {shots: {"pairs": number, "judgements": number}}.
        quantity: "unseen_heldout" or "seen_heldout".
        what: the columns count.
    """
    shots = list(dict.fromkeys(row["shots"] for row in table))
    found = {(r["method"], r["rank"], r["shots"]): r[quantity] for r in table}
    title = f"method: {quantity.replace('_', ' ')}"
    lines = [" | ".join([title, "K", *(f"{s} {what}" for s in shots)])]
    lines.append(" | ".join("---" for _ in range(len(shots) + 2)))
    for method, rank in dict.fromkeys(key[:2] for key in found):
        cells = [_percent(found.get((method, rank, s))) for s in shots]
        if not any(cells):
            continue  # it differs from another row in its probabilities alone
        lines.append(" | ".join([method, "" if rank is None else str(rank), *cells]))
    for method, rank in dict.fromkeys(key[:2] for key in found):
        mine = [found.get((method, rank, s)) or {} for s in shots]
        if any("difference" in m for m in mine):
            cells = [_percent(m.get("difference"), sign="+") for m in mine]
            rank = "" if rank is None else str(rank)
            lines.append(" | ".join([f"{method}: vs global", rank, *cells]))
    for counted in ("pairs", "judgements") if shown else ():
        cells = [f"{shown[str(s)][counted]:g}" for s in shots]
        lines.append(" | ".join([f"{counted} shown", "", *cells]))
    return "".join(f"| {line} |\n" for line in lines)


def shots_quality_markdown(table: Sequence[dict]) -> str:
    """The same lines in log-loss, Brier score and calibration error."""
    shots = list(dict.fromkeys(row["shots"] for row in table))
    found = {(r["method"], r["rank"], r["shots"]): r for r in table}
    lines = [" | ".join(["method", "K", "", *(f"{s} shots" for s in shots)])]
    lines.append(" | ".join("---" for _ in range(len(shots) + 3)))
    for method, rank in dict.fromkeys(key[:2] for key in found):
        for name, title in QUALITY.items():
            rows = [found.get((method, rank, s), {}) for s in shots]
            cells = [_plain(row.get(f"unseen_heldout_{name}")) for row in rows]
            head = [method, "" if rank is None else str(rank), title]
            lines.append(" | ".join([*head, *cells]))
    return "".join(f"| {line} |\n" for line in lines)


def write_results(folder, name: str, results: dict, text: str) -> None:
    """Write results as ``NAME.json`` and ``NAME.csv``, and ``text`` as ``NAME.md``."""
    folder, table = Path(folder), results["table"]
    write_json(folder / f"{name}.json", {**results, "versions": versions()})
    with replacing(folder / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    with replacing(folder / f"{name}.csv") as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["method", "rank", "shots", "quantity", "mean", "low", "high",
                          "users", "splits", "pairs", "judgements", "difference",
                          "difference low", "difference high"])  # fmt: skip
            for row in table:
                for quantity in QUANTITIES:
                    if found := row.get(quantity):
                        more = found.get("difference") or {}
                        out.writerow(
                            [row["method"], row["rank"], row.get("shots"), quantity]
                            + [
                                found.get(n)
                                for n in ("mean", "low", "high", "num_users")
                            ]
                            + [found.get(n) for n in COUNTED]
                            + [more.get(n) for n in ("mean", "low", "high")]
                        )


def _json(interval) -> dict:
    return {name: float(value) for name, value in interval._asdict().items()}


def _percent(found: dict | None, sign: str = "") -> str:
    if not found:
        return ""
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _plain(found: dict | None) -> str:
    return f"{found['mean']:.3f}" if found else ""
