"""Checks that the answer is not given away. They run every time, and fail loudly.

* the same text, unit (dialogue, post, prompt) or user on both sides of a split;
* chosen and rejected told apart by formatting alone: a small logistic classifier sees
  only lengths and surface features, never what the text says;
* constant, duplicated or non-finite feature rows: texts that were never embedded, or
  cut until nothing distinguished them.

The published PRISM preparation printed every rejected response as the repr of a list,
``['…']``: such a classifier gets that right every time.
"""

import dataclasses
import hashlib
import re
import string
import warnings
from collections.abc import Sequence

import numpy as np

from experiments.prepared import PairTable, rng

MARKERS = {
    "starts with a bracket": r"\A[\[({]",
    "starts with a quote": r"\A[\"'`“]",
    "starts with a space": r"\A\s",
    "ends with a bracket": r"[\])}]\Z",
    "ends with a quote": r"[\"'`”]\Z",
    "ends with a space": r"\s\Z",
    "contains a bracketed quote": r"\[['\"]|['\"]\]",
    "contains an escaped newline": r"\\n",
    "contains None or nan": r"\b(None|nan|NaN|null)\b",
    "contains a special token": r"<\|[^|>]*\|>|</?s>|\[/?INST\]",
}
STYLES = {
    "starts upper-case": r"\A[A-Z]",
    "ends a sentence": r"[.!?…]\Z",
    "lists": r"(?m)^\s*([-*•]|\d+[.)])\s",
    "bold": r"\*\*",
    "code": r"```",
    "paragraphs": r"\n\s*\n",
    "questions": r"\?",
    "exclamations": r"!",
    "quotes": r"[\"“”]",
}
COUNTS = ("log characters", "log words", "log lines", "mean word length")
SHARES = {
    "upper-case": string.ascii_uppercase,
    "digits": string.digits,
    "punctuation": string.punctuation,
    "white space": string.whitespace,
    "non-ASCII": "\x80",
}
SURFACE_NAMES = (
    *COUNTS,
    *(f"share of {name}" for name in SHARES),
    *(f"log count: {name}" for name in STYLES),
    *MARKERS,
)
_MARKERS = [re.compile(pattern) for pattern in MARKERS.values()]
_STYLES = [re.compile(pattern) for pattern in STYLES.values()]
_CODE = ("utf-32-le", "surrogatepass")
_KIND = np.zeros(129, np.int64)  # of a character: 0, or 1 + its place in SHARES
for _place, _characters in enumerate(SHARES.values()):
    _KIND[[ord(c) for c in _characters]] = _place + 1


class LeakError(ValueError):
    """The data give the answer away; results on them would mean nothing."""


class LeakWarning(UserWarning):
    """Something to look at before believing the results."""


@dataclasses.dataclass(frozen=True)
class FormattingReport:
    """How far surface features alone tell chosen from rejected.

    Attributes:
        accuracy: of the classifier on groups it was not fitted on; chance is 0.5.
        num_pairs: pairs judged.
        strongest: [name, accuracy of that feature's better direction] of the best few.
        one_sided: [marker, share of pairs with it on one side only, purity] of every
            marker that stands almost always on the same side.
    """

    accuracy: float
    num_pairs: int
    strongest: list[list]
    one_sided: list[list]


def check_two_sides(what: str, ids, side, names=None) -> None:
    """Refuse an id (text row, unit, user) that occurs on both sides of a split.

    Args:
        what: what the ids are, for the message.
        ids: [N] ids, any kind that NumPy can sort.
        side: bool[N] the side of each.
        names: optional names: id → ``names[id]``.

    Raises:
        LeakError: naming the first offender and how many there are.
    """
    ids, side = np.asarray(ids), np.asarray(side, bool)
    both = np.intersect1d(ids[side], ids[~side])
    if both.size:
        first = both[0] if names is None else names[both[0]]
        raise LeakError(
            f"{both.size} {what}s stand on both sides of a split, first: {first}"
        )


def check_split(pairs: PairTable) -> None:
    """Refuse a user who is seen and unseen, a text or unit trained and tested on."""
    check_two_sides("user", pairs.users[pairs.user], pairs.seen[pairs.user])
    check_two_sides("unit", pairs.units[pairs.unit], pairs.heldout)
    rows = np.concatenate([pairs.chosen, pairs.rejected])
    check_two_sides("identical text", rows, np.tile(pairs.heldout, 2))


def surface_features(text: str) -> np.ndarray:
    """float[F]: lengths and formatting of one text, named by ``SURFACE_NAMES``."""
    words = text.split()
    counts = [
        np.log1p(len(text)),
        np.log1p(len(words)),
        np.log1p(text.count("\n")),
        sum(map(len, words)) / max(len(words), 1),
    ]
    kinds = _KIND[np.minimum(np.frombuffer(text.encode(*_CODE), np.uint32), 128)]
    shares = np.bincount(kinds, minlength=len(SHARES) + 1)[1:]
    styles = [np.log1p(sum(1 for _ in p.finditer(text))) for p in _STYLES]
    markers = [float(bool(p.search(text))) for p in _MARKERS]
    return np.array([*counts, *(shares / max(len(text), 1)), *styles, *markers])


def formatting_report(
    chosen: Sequence[str], rejected: Sequence[str], groups, *, folds: int = 5,
    ridge: float = 1e-2, seed: int = 0,
) -> FormattingReport:  # fmt: skip
    """Fit the surface classifier, cross-validated by group.

    The classifier is a logistic regression on the difference of surface features,
    without intercept, so which text is called first cannot matter.

    Args:
        chosen: preferred responses, as the model reads them.
        rejected: the others.
        groups: [N] what must lie in one fold (a prompt, a dialogue).
        folds: number of folds.
        ridge: penalty on the weights of the scaled features.
        seed: which groups share a fold.
    """
    cache: dict[str, np.ndarray] = {}
    for text in (*chosen, *rejected):
        if text not in cache:
            cache[text] = surface_features(text)
    x = np.stack([cache[c] - cache[r] for c, r in zip(chosen, rejected)])
    x /= np.maximum(np.sqrt(np.mean(x**2, axis=0)), 1e-12)
    ids, group = np.unique(np.asarray(groups), return_inverse=True)
    folds = min(folds, len(ids))
    fold = rng("formatting", seed).permutation(len(ids))[group] % max(folds, 1)
    right = np.full(len(x), 0.5)
    for held in range(folds if folds > 1 else 0):
        weights = _fit_logistic(x[fold != held], ridge)
        right[fold == held] = _right(x[fold == held] @ weights)
    alone = np.maximum(single := _right(x).mean(0), 1 - single)
    best = np.argsort(-alone, kind="stable")[:3]
    strongest = [[SURFACE_NAMES[i], round(float(alone[i]), 4)] for i in best]
    one_sided = []
    for i in range(len(SURFACE_NAMES) - len(MARKERS), len(SURFACE_NAMES)):
        differs = x[:, i] != 0
        if differs.sum() >= 30:
            side = np.mean(x[differs, i] > 0)
            found = [
                SURFACE_NAMES[i],
                float(differs.mean()),
                float(max(side, 1 - side)),
            ]
            if found[2] >= 0.98:
                one_sided.append(found)
    return FormattingReport(float(right.mean()), len(x), strongest, one_sided)


def check_formatting(
    chosen: Sequence[str], rejected: Sequence[str], groups, *, warn_above: float = 0.75,
    fail_above: float = 0.95, fail_share: float = 0.1, min_pairs: int = 50,
) -> FormattingReport:  # fmt: skip
    """Refuse pairs that formatting alone tells apart; see :func:`formatting_report`.

    Longer answers are liked, so an accuracy of 0.6 or 0.7 is a finding, not a leak.

    Args:
        chosen: preferred responses, as the model reads them.
        rejected: the others.
        groups: [N] what must lie in one fold.
        warn_above: accuracy above which to warn.
        fail_above: accuracy above which to raise.
        fail_share: a marker (a leading bracket, …) that stands on one side in this
            share of the pairs, and almost always on the same side, raises; a rarer
            one warns.
        min_pairs: fewer pairs than this cannot be judged and are only reported.

    Raises:
        LeakError: with the accuracy and the features that give the answer away.
    """
    report = formatting_report(chosen, rejected, groups)
    if report.num_pairs < min_pairs:
        return report
    message = (
        f"formatting alone tells chosen from rejected in {report.accuracy:.1%} of "
        f"{report.num_pairs} pairs (strongest: {report.strongest}; markers on one "
        f"side: {report.one_sided})"
    )
    marked = [share for _, share, _ in report.one_sided]
    if report.accuracy > fail_above or max(marked, default=0.0) >= fail_share:
        raise LeakError(message)
    if report.accuracy > warn_above or marked:
        warnings.warn(message, LeakWarning, stacklevel=2)
    return report


def check_features(features, rows=None, *, block: int = 4096) -> None:
    """Refuse feature rows that are constant, duplicated or not finite.

    Args:
        features: [M, D] the table, read in blocks.
        rows: the rows in use; None means all.
        block: rows read at a time.

    Raises:
        LeakError: naming the rows.
    """
    rows = np.arange(len(features)) if rows is None else np.unique(rows)
    first: dict[bytes, int] = {}
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        stored = np.ascontiguousarray(features[part])
        values = stored.astype(np.float32)
        if (bad := np.flatnonzero(~np.isfinite(values).all(1))).size:
            raise LeakError(f"feature row {part[bad[0]]} is not finite")
        if (bad := np.flatnonzero(np.ptp(values, axis=1) == 0)).size:
            raise LeakError(
                f"feature row {part[bad[0]]} is constant ({values[bad[0], 0]}); "
                f"{bad.size} such rows in this block: was it ever written?"
            )
        for row, line in zip(part, stored):
            key = hashlib.blake2b(line.tobytes(), digest_size=16).digest()
            if (other := first.setdefault(key, int(row))) != row:
                raise LeakError(
                    f"feature rows {other} and {row} are equal though their texts "
                    "differ: was the difference cut off?"
                )


def check_pairs(
    pairs: PairTable,
    responses: Sequence[str],
    *,
    max_pairs: int = 20_000,
    **thresholds,
) -> dict:
    """Run every check that needs no features on a pair table.

    Args:
        pairs: the pairs with their splits.
        responses: the response of every row, as the model reads it.
        max_pairs: how many pairs (drawn once, seeded) the formatting check looks at.
        **thresholds: of :func:`check_formatting`.

    Returns:
        What was found, as JSON.

    Raises:
        LeakError: if any check fails.
    """
    check_split(pairs)
    if len(pairs) > max_pairs:
        take = rng("leaks").choice(len(pairs), max_pairs, replace=False)
        pairs = pairs.select(np.sort(take))
    swap = np.zeros(len(pairs), bool) if pairs.label is None else pairs.label < 0.5
    report = check_formatting(
        [responses[row] for row in np.where(swap, pairs.rejected, pairs.chosen)],
        [responses[row] for row in np.where(swap, pairs.chosen, pairs.rejected)],
        pairs.unit,
        **thresholds,
    )
    return {"split": "ok", "formatting": dataclasses.asdict(report)}


def _right(margin: np.ndarray) -> np.ndarray:
    return (margin > 0) + 0.5 * (margin == 0)


def _fit_logistic(x: np.ndarray, ridge: float, steps: int = 25) -> np.ndarray:
    """Newton's method for mean softplus(−x·w) + ridge/2 ‖w‖²."""
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(np.clip(x @ weights, -500, 500)))
        gradient = ridge * weights - x.T @ p / len(x)
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x)
        hessian += ridge * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        weights -= step / max(1.0, np.abs(step).max() / 4)
        if np.abs(step).max() < 1e-6:
            break
    return weights
