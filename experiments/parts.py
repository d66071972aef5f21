"""From prepared folders to the four parts of the protocol, checked for leaks.

A *split* is one division of the people into seen and unseen, with everybody's pairs
divided into training and held-out ones. A prepared folder gives one; further ones come
from redrawing who is seen, from the folder's variants, or from more folders.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import lore_jax as lore
from experiments import leaks
from experiments.prepared import (
    PairTable,
    Prepared,
    load,
    rng,
    stable_order,
)
from experiments.stored import read_json
from experiments.texts import load_responses

PARTS = ("seen_training", "seen_heldout", "unseen_training", "unseen_heldout")


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, in memory.

    Attributes:
        name: what files and tables call it.
        data: the four parts; users are numbered alike in both parts of a side.
        head: float[D] the reference direction, or None.
        shots: "pairs" or "units", what a shot counts.
        unit: int[N] unit of each pair of ``data.unseen``, in stored order.
        judgement: int[N] judgement of each likewise; None where rows are judged.
        counts: users, pairs, units, judgements and rows of each part.
    """

    name: str
    data: lore.data.FourWay
    head: np.ndarray | None
    shots: str
    unit: np.ndarray
    judgement: np.ndarray | None
    counts: dict


@dataclasses.dataclass(frozen=True)
class SplitSource:
    """Where a split comes from; nothing large is read before ``load``.

    Attributes:
        folder: a prepared folder.
        variant: which of its pair tables, or None.
        redraw: 0 for the prepared people, else the number of the redraw.
        name: what files and tables call it.
    """

    folder: Path
    variant: str | None
    redraw: int
    name: str

    def read(self) -> Prepared:
        """The prepared folder with this split's pairs; features stay on disk."""
        found = load(self.folder, self.variant)
        limit = found.config.get("shots") != "units"
        pairs = redraw(found.pairs, self.redraw, limit=limit)
        return dataclasses.replace(found, pairs=pairs)

    def people(self) -> dict[str, np.ndarray]:
        """{"seen": str[U], "unseen": str[U]}: ids, in the order of ``load``."""
        table = self.read().pairs
        present = np.zeros(len(table.users), bool)
        present[table.user] = True
        sides = {"seen": True, "unseen": False}
        return {n: table.users[present & (table.seen == s)] for n, s in sides.items()}

    def fingerprint(self, known: dict | None = None) -> str:
        """Identifies pairs, features and head, so that results are never mixed up.

        Args:
            known: {folder: hash of its features}, filled here, so that a run over many
                splits of one folder reads the table once.
        """
        found, name = self.read(), hashlib.blake2b(digest_size=8)
        for field in dataclasses.fields(found.pairs):
            value = getattr(found.pairs, field.name)
            name.update(b"-" if value is None else np.ascontiguousarray(value))
        known = {} if known is None else known
        if self.folder not in known:
            known[self.folder] = hash_array(found.features)
        name.update(known[self.folder].encode())
        name.update(b"-" if found.head is None else hash_array(found.head).encode())
        facts = [found.config.get(key) for key in ("shots", "judgements")]
        name.update(repr(facts).encode())
        return name.hexdigest()

    def load(self) -> Split:
        """Read everything and build the four parts."""
        return make_split(self.read(), self.name)


def hash_array(values: np.ndarray, block: int = 1 << 26) -> str:
    """Hash of an array's shape, type and every byte, read in blocks of that size."""
    found = hashlib.blake2b(repr((values.shape, str(values.dtype))).encode())
    lines = np.atleast_1d(values)
    width = max(1, lines.itemsize * int(np.prod(lines.shape[1:])))
    step = max(1, block // width)
    for start in range(0, len(lines), step):
        part = np.ascontiguousarray(lines[start : start + step])
        found.update(part.reshape(-1).view(np.uint8))
    return found.hexdigest()[:32]


def list_splits(
    folders: Sequence, *, variant: str | None = None, splits: int = 1
) -> list[SplitSource]:
    """The splits that prepared folders hold.

    Args:
        folders: prepared folders; each is a split of its own.
        variant: which pair table of each folder; None takes the only one, or all
            where the folder says that its variants are splits.
        splits: splits to draw from each pair table: the prepared one, then redraws of
            who is seen.

    Raises:
        ValueError: if a folder has several populations and none was named, or its
            people cannot be redrawn.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    sources = []
    for folder in map(Path, folders):
        config = read_config(folder)
        variants = [variant] if variant else config["variants"]
        if splits > 1 and config.get("dataset") == "personal_llm":
            raise ValueError(
                f"{folder}: unseen users were asked fewer prompts than seen ones, so "
                "nobody can change sides; prepare another folder with another --seed"
            )
        if len(variants) > 1 and config.get("variants_are") != "splits":
            raise ValueError(
                f"{folder} holds several populations, name one: {variants}"
            )
        for chosen in variants:
            for number in range(splits):
                names = [folder.name if len(folders) > 1 else "", chosen or ""]
                names.append(f"people_{number}" if splits > 1 else "")
                name = "-".join(filter(None, names)) or "prepared"
                sources.append(SplitSource(folder, chosen, number, name))
    if len({source.name for source in sources}) < len(sources):
        raise ValueError("prepared folders need different names")
    return sources


def read_config(folder: Path) -> dict:
    """The ``config.json`` of a prepared folder.

    Raises:
        FileNotFoundError: saying which script writes one.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a prepared folder; run prepare first")
    return read_json(path)


def redraw(table: PairTable, number: int, *, limit: bool = True) -> PairTable:
    """Draw anew who is seen, as many people as before; 0 changes nothing.

    Held-out pairs stay held out, so no text, unit or vote changes its side.

    Args:
        table: the prepared pairs.
        number: which redraw.
        limit: leave nobody among the unseen more training pairs than the prepared
            unseen people have (some sources limit seen and unseen differently).
    """
    if number == 0:
        return table
    order = stable_order(table.users.tolist(), f"people {number}")
    seen = np.isin(table.users, order[: int(table.seen.sum())])
    training = np.flatnonzero(table.mask(seen=False, heldout=False))
    most = np.bincount(table.user[training], minlength=1).max() if limit else len(table)
    redrawn = dataclasses.replace(table, seen=seen)
    place = rng("people", number).permutation(len(table))
    order = np.lexsort((place, table.user))
    rank = np.empty(len(table), int)
    for side in (False, True):  # the place of each pair among its user's, by side
        mine = order[table.heldout[order] == side]
        starts = np.flatnonzero(np.diff(table.user[mine], prepend=-1))
        lengths = np.diff(np.append(starts, len(mine)))
        rank[mine] = np.arange(len(mine)) - np.repeat(starts, lengths)
    keep = redrawn.mask(seen=True) | table.heldout | (rank < most)
    return redrawn.select(keep)


def make_split(found: Prepared, name: str) -> Split:
    """The four parts of a prepared folder.

    Raises:
        ValueError: if a side has nobody.
    """
    table = found.pairs
    present = np.zeros(len(table.users), bool)
    present[table.user] = True
    votes = found.config.get("judgements") == "votes"
    parts, counts = [], {}
    unit = judgement = np.zeros(0, np.int32)
    for side, seen in (("seen", True), ("unseen", False)):
        users = np.flatnonzero(present & (table.seen == seen))
        if not users.size:
            raise ValueError(f"{found.folder}: nobody is {side}; both sides are needed")
        for heldout in (False, True):
            part = table.select(table.mask(seen=seen, heldout=heldout))
            prefs = preferences(found.features, part, users, votes=votes)
            rows = int(lore.data.count_judgements(prefs).sum())
            counts[PARTS[len(parts)]] = {
                "users": int(np.unique(part.user).size),
                "pairs": len(part),
                "units": int(np.unique(part.unit).size),
                "judgements": rows if votes else part.num_judgements(),
                "user_rows": rows,
            }
            if not seen and not heldout:
                unit = part.unit[prefs.order]
                judgement = None if votes else part.group[prefs.order]
            parts.append(prefs)
    shots = found.config.get("shots", "pairs")
    data = lore.data.FourWay(*parts)
    return Split(name, data, found.head, shots, unit, judgement, counts)


def preferences(features, part: PairTable, users, *, votes: bool = False):
    """Pairs of some users on the rows that they use.

    Args:
        features: [M, D], may be memory-mapped.
        part: the pairs.
        users: int[U] codes of the users, who are numbered in this order.
        votes: group by (user, row), the library's default, instead of by unit.
    """
    rows = np.union1d(part.chosen, part.rejected)
    rows = rows if rows.size else np.arange(1)
    return lore.Preferences.from_pairs(
        np.asarray(features[rows]),
        np.searchsorted(rows, part.chosen).astype(np.int32),
        np.searchsorted(rows, part.rejected).astype(np.int32),
        np.searchsorted(users, part.user).astype(np.int32),
        num_users=len(users),
        label=part.label,
        sample_weight=part.weight,
        group=None if votes else part.unit,
        user_ids=part.users[users].tolist(),
    )


def take_shots(split: Split, shots: int | None, seed: int) -> lore.Preferences:
    """What an unseen user has shown: some pairs, or all pairs of some units.

    For one seed they are nested: 3 shots contain the 1 shot.
    """
    prefs = split.data.unseen
    if shots is None or split.shots == "pairs":
        return lore.take_shots(prefs, shots, seed=seed)
    key = np.asarray(prefs.user, np.int64) << 32 | split.unit.astype(np.int64)
    distinct, place = np.unique(key, return_inverse=True)
    owner = distinct >> 32
    order = np.lexsort((np.random.default_rng(seed).random(len(distinct)), owner))
    rank = np.empty(len(distinct), int)
    rank[order] = np.arange(len(distinct)) - np.searchsorted(owner, owner[order])
    return lore.take_pairs(prefs, rank[place] < shots)


def count_shown(split: Split, shots: int | None, seed: int) -> dict:
    """Pairs, judgements and distinct rows of all users in ``take_shots``."""
    if split.judgement is not None:
        marked = split.data.unseen.replace(group=split.judgement)
        data = split.data._replace(unseen=marked)
        split = dataclasses.replace(split, data=data)
    shown = take_shots(split, shots, seed)
    found = {"pairs": int(shown.num_pairs)}
    rows = int(lore.data.count_judgements(shown).sum())
    found["judgements"] = found["user_rows"] = rows
    if split.judgement is not None:
        key = np.stack([np.asarray(shown.user), np.asarray(shown.group)])
        found["judgements"] = int(np.unique(key, axis=1).shape[1])
    return found


def check_leaks(found: Prepared, *, threshold: float = 0.95) -> dict:
    """Every leak check on what a run is about to use.

    Args:
        found: a prepared folder, as ``SplitSource.read`` gives it.
        threshold: stop if formatting alone is right more often than this.

    Returns:
        What was found, as JSON.

    Raises:
        LeakError: if a check fails.
    """
    table, path = found.pairs, found.folder / "texts.jsonl"
    limits = {"fail_above": threshold, "warn_above": min(0.75, threshold)}
    report = {}
    if found.config.get("judgements") == "votes":
        leaks.check_two_sides("user", table.users[table.user], table.seen[table.user])
        base = int(max(table.chosen.max(), table.rejected.max())) + 1
        votes = [table.user.astype(np.int64) * base + table.chosen]
        votes.append(table.user.astype(np.int64) * base + table.rejected)
        leaks.check_two_sides("vote", np.concatenate(votes), np.tile(table.heldout, 2))
        if path.exists():
            texts = np.array(load_responses(found.folder), object)
            some = rng("leaks").permutation(len(table))[:20_000]
            swap = 0 if table.label is None else table.label[some] < 0.5
            sides = np.stack([table.chosen[some], table.rejected[some]])
            first, second = np.where(swap, sides[::-1], sides)
            formatting = leaks.check_formatting(
                texts[first], texts[second], table.user[some], **limits
            )
            report["formatting"] = dataclasses.asdict(formatting)
    elif path.exists():
        report = leaks.check_pairs(table, load_responses(found.folder), **limits)
    else:
        leaks.check_split(table)
    if "formatting" not in report:
        report["formatting"] = "not checked: there are no texts"
    rows = np.union1d(table.chosen, table.rejected)
    leaks.check_features(found.features, rows)
    return {**report, "split": "ok", "features": "ok"}
