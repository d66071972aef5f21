"""The one intermediate format that every ``prepare`` writes and every script reads.

A prepared folder holds

    config.json           what was asked for: data set, arguments, seed, versions
    report.json           what was dropped and why, counts, the leak checks' results
    texts.jsonl           {"row", "hash", "messages"}: the distinct texts, by row
    features.npy          [M, D] float32, or the bits of bfloat16 as uint16
    features.json         dtype, shape, how many rows are done, and of which model
    center.npy            float32[D] subtracted before rounding (only if it was)
    head.npy              float32[D] the model's own head: the reference direction
    pairs.npz             the pair table; ``pairs_VARIANT.npz`` where there are several

The pair table is NumPy only, so reading it needs no extra. For N pairs, U users:

    users str[U], seen bool[U]           ids; does the user train the basis?
    units str[..], groups str[..]        ids of units and groups (see below)
    user, unit, group int32[N]           codes into the three id arrays
    chosen, rejected int32[N]            rows of the feature table
    heldout bool[N]                      evaluated on, never fitted or adapted on
    label, weight float32[N]             optional: P(first is preferred), pair weight

A *unit* is what no split may cut: a dialogue, a post, a prompt. A *group* is one
judgement: a turn whose several rejected responses come from a single choice. A unit
contains its groups. Validation inside the training side splits by unit; judgements
are counted by user and group. ``unit`` is also what a "shot" counts where the config
says ``"shots": "units"``; it is a pair where it says ``"pairs"``.

The four parts of the protocol: seen and not heldout fits the basis, seen and heldout
tests it; an unseen user adapts on pairs not heldout and is tested on those heldout.
"""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.stored import array_digest, load_array, load_arrays, read_json
from experiments.stored import load_features as load_features
from experiments.stored import replacing as replacing
from experiments.stored import view_table as view_table
from experiments.stored import write_features as write_features
from experiments.stored import write_json as write_json

VERSIONS_OF = (
    *("lore-jax", "jax", "flax", "optax", "numpy"),
    *("torch", "transformers", "tokenizers", "datasets", "safetensors"),
)


@dataclasses.dataclass(frozen=True)
class PairTable:
    """Preference pairs with their splits; see the module docstring for the fields."""

    users: np.ndarray
    seen: np.ndarray
    units: np.ndarray
    groups: np.ndarray
    user: np.ndarray
    unit: np.ndarray
    group: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    heldout: np.ndarray
    label: np.ndarray | None = None
    weight: np.ndarray | None = None

    @classmethod
    def from_columns(
        cls, *, user, unit, group, chosen, rejected, seen, heldout, label=None,
        weight=None,
    ) -> "PairTable":  # fmt: skip
        """Build the table from one value per pair.

        Args:
            user: str[N] user ids.
            unit: str[N] ids of what no split may cut.
            group: str[N] ids of the judgements.
            chosen: int[N] row of the preferred response.
            rejected: int[N] row of the other.
            seen: bool[N] whether the pair's user trains the basis.
            heldout: bool[N] whether the pair is for evaluation.
            label: float[N] P(first is preferred), or None.
            weight: float[N] pair weights, or None.

        Raises:
            ValueError: if lengths differ, a user is both seen and unseen, or a pair
                compares a row with itself.
        """
        columns = {
            **{"user": user, "unit": unit, "group": group, "chosen": chosen},
            **{"rejected": rejected, "seen": seen, "heldout": heldout},
        }
        lengths = {name: len(value) for name, value in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns have different lengths: {lengths}")
        users, user = _encode(user)
        units, unit = _encode(unit)
        groups, group = _encode(group)
        chosen = np.asarray(chosen, np.int32)
        rejected = np.asarray(rejected, np.int32)
        if (same := np.flatnonzero(chosen == rejected)).size:
            raise ValueError(
                f"pair {same[0]} (user '{users[user[same[0]]]}') compares row "
                f"{chosen[same[0]]} with itself; {same.size} such pairs"
            )
        seen = np.asarray(seen, bool)
        some, all_ = np.zeros(len(users), bool), np.ones(len(users), bool)
        np.logical_or.at(some, user, seen)
        np.logical_and.at(all_, user, seen)
        if (both := np.flatnonzero(some != all_)).size:
            raise ValueError(
                f"user '{users[both[0]]}' is both seen and unseen; {both.size} such"
            )
        return cls(
            *(users, all_, units, groups, user, unit, group, chosen, rejected),
            heldout=np.asarray(heldout, bool),
            label=None if label is None else np.asarray(label, np.float32),
            weight=None if weight is None else np.asarray(weight, np.float32),
        )

    def __len__(self) -> int:
        """Number of pairs, N."""
        return len(self.user)

    def mask(self, *, seen: bool | None = None, heldout: bool | None = None):
        """bool[N]: the pairs of one part of the protocol; None means either."""
        keep = np.ones(len(self), bool)
        if seen is not None:
            keep &= self.seen[self.user] == seen
        if heldout is not None:
            keep &= self.heldout == heldout
        return keep

    def select(self, mask: np.ndarray) -> "PairTable":
        """The pairs where ``mask`` (bool[N] or indices); ids and codes unchanged."""
        columns = ("user", "unit", "group", "chosen", "rejected", "heldout")
        picked = {name: getattr(self, name)[mask] for name in columns}
        for name in ("label", "weight"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[mask]
        return dataclasses.replace(self, **picked)

    def num_judgements(self) -> int:
        """Number of distinct (user, group): choices people actually made."""
        key = self.user.astype(np.int64) * max(len(self.groups), 1) + self.group
        return int(np.unique(key).size)

    def counts(self) -> dict:
        """Users, pairs, units and judgements of each of the four parts."""
        out = {}
        for name, seen in (("seen", True), ("unseen", False)):
            for side, heldout in (("train", False), ("heldout", True)):
                part = self.select(self.mask(seen=seen, heldout=heldout))
                out[f"{name}_{side}"] = {
                    "users": int(np.unique(part.user).size),
                    "pairs": len(part),
                    "units": int(np.unique(part.unit).size),
                    "judgements": part.num_judgements(),
                }
        return out

    def save(self, path) -> None:
        """Write the table as ``.npz``, all at once."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields = {name: value for name, value in fields.items() if value is not None}
        with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **fields)

    @classmethod
    def load(cls, path) -> "PairTable":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: naming the file, if it is damaged or no pair table.
        """
        arrays = load_arrays(path)
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = fields - set(arrays) - {"label", "weight"}
        if missing or set(arrays) - fields:
            raise ValueError(
                f"{path} is no pair table: missing {sorted(missing)}, unexpected "
                f"{sorted(set(arrays) - fields)}"
            )
        try:
            return _checked(cls(**arrays))
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def drop_shared(table: PairTable) -> tuple[PairTable, int]:
    """Remove training pairs that share a text or a unit with a held-out pair.

    Different people write the same "Hello" and get the same answer. The test side is
    left as it is; the training side gives way, whosever the pairs are.

    Returns:
        The table without those pairs, and how many there were.
    """
    held = table.select(table.heldout)
    rows = np.union1d(held.chosen, held.rejected)
    shared = np.isin(table.chosen, rows) | np.isin(table.rejected, rows)
    shared = ~table.heldout & (shared | np.isin(table.unit, held.unit))
    return table.select(~shared), int(shared.sum())


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared folder, read: ``features`` stays on disk until it is sliced."""

    folder: Path
    pairs: PairTable
    features: np.ndarray
    head: np.ndarray | None
    config: dict

    def preferences(self, pairs: PairTable, *, by_unit: bool = True):
        """The pairs as ``lore_jax.Preferences``, on the rows that they use.

        Args:
            pairs: a part of the table, for example
                ``self.pairs.select(self.pairs.mask(seen=True, heldout=False))``.
            by_unit: group by unit (dialogue, post, prompt), else by judgement.

        Returns:
            The preferences of the users that occur in ``pairs``, with their ids.
        """
        import lore_jax as lore

        present, user = np.unique(pairs.user, return_inverse=True)
        rows = np.union1d(pairs.chosen, pairs.rejected)
        return lore.Preferences.from_pairs(
            np.asarray(self.features[rows]),
            np.searchsorted(rows, pairs.chosen).astype(np.int32),
            np.searchsorted(rows, pairs.rejected).astype(np.int32),
            user.astype(np.int32),
            num_users=len(present),
            label=pairs.label,
            sample_weight=pairs.weight,
            group=pairs.unit if by_unit else pairs.group,
            user_ids=pairs.users[present].tolist(),
        )


def load(folder, variant: str | None = None) -> Prepared:
    """Read a prepared folder.

    Args:
        folder: what ``prepare`` wrote.
        variant: which pair table, where there are several (``"alpha_0.1"``).

    Raises:
        ValueError: if the feature table is not complete, or a file is damaged.
    """
    folder = Path(folder)
    pairs, features = PairTable.load(pairs_path(folder, variant)), load_features(folder)
    rows = np.concatenate([pairs.chosen, pairs.rejected])
    if rows.size and rows.max() >= len(features):
        raise ValueError(
            f"{folder}: a pair asks for row {rows.max()}, but there are "
            f"{len(features)} feature rows; run prepare again"
        )
    return Prepared(
        folder=folder,
        pairs=pairs,
        features=features,
        head=_load_head(folder, features.shape[1]),
        config=read_json(folder / "config.json"),
    )


def _load_head(folder: Path, size: int) -> np.ndarray | None:
    """float[D], or None; refused where it belongs to another feature table."""
    mark = read_json(folder / "features.json").get("head", "unknown")
    path = folder / "head.npy"
    if mark is None or (mark == "unknown" and not path.exists()):
        return None
    head = load_array(path)
    if head.shape != (size,) or mark not in ("unknown", array_digest(head)):
        raise ValueError(f"{path} belongs to another feature table; run prepare again")
    return head


def pairs_path(folder, variant: str | None = None) -> Path:
    """Where the pair table of a variant lies."""
    return Path(folder) / (f"pairs_{variant}.npz" if variant else "pairs.npz")


def stable_order(ids: Iterable[str], seed: int) -> list[str]:
    """The distinct ids in a random order that only ids and seed decide.

    Every id is ranked by its own hash, so neither the order of the source nor other
    ids coming or going changes how two of them compare.
    """
    return sorted(set(ids), key=lambda i: (digest(f"{seed}\0{i}"), i))


def rng(*names) -> np.random.Generator:
    """A generator for this purpose alone: ``rng(seed, "population", alpha)``."""
    return np.random.default_rng(int(digest("\0".join(map(str, names))), 16))


def versions() -> dict:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _checked(table: PairTable) -> PairTable:
    """The table, or a `ValueError` naming the field that cannot be."""
    columns = ("user", "unit", "group", "chosen", "rejected", "heldout")
    extra = [n for n in ("label", "weight") if getattr(table, n) is not None]
    for name in (*columns, *extra):
        shape = getattr(table, name).shape
        if shape != (len(table.user),):
            raise ValueError(f"{name} has shape {shape}, user {table.user.shape}")
    if table.seen.shape != table.users.shape:
        raise ValueError(f"seen has shape {table.seen.shape}")
    for name in ("users", "units", "groups"):
        if (ids := getattr(table, name)).dtype.kind != "U" or ids.ndim != 1:
            raise ValueError(f"{name} must be texts, got {ids.dtype}")
    for name in ("seen", "heldout"):
        if getattr(table, name).dtype != bool:
            raise ValueError(f"{name} must be bool")
    sizes = {"user": table.users, "unit": table.units, "group": table.groups}
    for name in columns[:-1]:
        codes, most = getattr(table, name), len(sizes.get(name, ())) or np.inf
        if codes.dtype.kind != "i" or (codes < 0).any() or (codes >= most).any():
            raise ValueError(f"{name} must hold integers from 0 to {most - 1}")
    if (table.chosen == table.rejected).any():
        raise ValueError("chosen and rejected are the same in a pair")
    for name, most in (("label", 1.0), ("weight", np.inf)):
        if (values := getattr(table, name)) is not None:
            if not ((values >= 0) & (values <= most) & np.isfinite(values)).all():
                raise ValueError(f"{name} must be from 0 to {most}")
    return table


def _encode(values) -> tuple[np.ndarray, np.ndarray]:
    ids, codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    return ids, codes.astype(np.int32)


def digest(text: str) -> str:
    """SHA-256 of a text, lone surrogates and all, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
