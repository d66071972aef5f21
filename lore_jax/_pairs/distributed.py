"""The pairs of all processes of a mesh; the table stays where it is, but for samples.

Every process knows all pairs (a few integers each), so that all of them draw the same
splits and come to the same decisions. Users are in the order of their names, and rows
are numbered without regard to who holds them: by name, by their number in a shared
table, or as users' pairs first meet them. So a fit does not depend on the partition.
"""

import hashlib
from typing import Any

import jax
import numpy as np

from lore_jax import _ids, _processes
from lore_jax._ids import Ids
from lore_jax._pairs.blocks import take_rows, visit_rows
from lore_jax.preferences import FeatureSource, Preferences, pairs_of

_EXCHANGED = 1 << 26  # bytes of a shared table that a process sends at a time


class DistributedTable:
    """The features of all processes; each holds the rows that its users' pairs use.

    Attributes:
      shape: (M, D), of all rows that pairs use.
      dtype: of the features.
      process: int[U], which process each user belongs to, in the order of all users.
      names: of all users, sorted.
      table: float[m, D] or a source, this process's rows, and others that no pair
        uses.
      rows: int[n], which of the M rows its users' pairs use, ascending.
      place: int[n], where those stand in `table`.
      owner: int[M], the first process that holds a row.
    """

    def __init__(self, table, rows, place, owner, process, names):
        """Keeps what is given."""
        self.table, self.rows, self.place = table, rows, place
        self.owner, self.process, self.names = owner, process, names
        self.shape = (len(owner), table.shape[1])
        self.dtype = table.dtype

    def replaced(self, table) -> "DistributedTable":
        """Another table with the same rows."""
        held = self.rows, self.place, self.owner, self.process, self.names
        return DistributedTable(table, *held)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows that this process holds, float[n, D]."""
        return take_rows(self.table, self.places(rows))

    def places(self, rows: np.ndarray) -> np.ndarray:
        """int[n], where rows that this process holds stand in `table`."""
        return self.place[np.searchsorted(self.rows, rows)]

    def gather_rows(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, float32[n, D], on every process."""
        mine = np.flatnonzero(self.owner[rows] == _processes.here())
        part = {"at": mine, "rows": np.asarray(self.take(rows[mine]), np.float32)}
        out = np.empty((len(rows), self.shape[1]), np.float32)
        for found in _processes.gather_arrays(part):
            out[found["at"]] = found["rows"]
        return out

    def own(self, prefs: Preferences) -> Preferences:
        """The users of `prefs` that belong here, over the table of this process."""
        some = pairs_of(prefs, np.flatnonzero(self.mine(prefs)))

        def placed(rows):
            return None if rows is None else self.places(rows).astype(np.int32)

        sides = dict(chosen=placed(some.chosen), rejected=placed(some.rejected))
        return some.replace(features=self.table, ids=Ids(some.user_ids, None), **sides)

    def gather_users(self, prefs: Preferences, values: np.ndarray) -> np.ndarray:
        """Values [..., u] of `own(prefs)`'s users → [..., U] of all, everywhere."""
        part = {"at": np.flatnonzero(self.mine(prefs)), "values": values}
        parts = _processes.gather_arrays(part)
        dtype = np.result_type(*(found["values"].dtype for found in parts))
        out = np.empty((*values.shape[:-1], prefs.num_users), dtype)
        for found in parts:
            out[..., found["at"]] = found["values"]
        return out

    def digest(self) -> int:
        """What `row_digests` gives for all rows together."""
        total = 0

        def add(numbers, rows):
            nonlocal total
            total += row_digests(numbers, rows)

        self.visit(self.owner[self.rows] == _processes.here(), add)
        parts = _processes.gather_bytes((total % _MODULUS).to_bytes(16, "little"))
        return sum(int.from_bytes(x, "little") for x in parts) % _MODULUS

    def visit(self, some: np.ndarray, function: Any) -> None:
        """`function` of (numbers, rows) of some of the rows held here, in pieces.

        Args:
          some: bool[n], which.
          function: takes int[k] and float[k, D].
        """
        mine = np.flatnonzero(some)
        mine = mine[np.argsort(self.place[mine], kind="stable")]
        place = self.place[mine]

        def pieces(first, block):
            low, high = np.searchsorted(place, [first, first + len(block)])
            for start in range(low, high, 1024):  # No copy of the table at once.
                one = slice(start, min(start + 1024, high))
                rows = np.asarray(block[place[one] - first])
                function(self.rows[mine[one]], rows)

        visit_rows(self.table, pieces)

    def mine(self, prefs: Preferences) -> np.ndarray:
        """bool[U], which users of `prefs` belong to this process."""
        ids: Any = prefs.ids
        if len(ids.users) == len(self.names):
            return self.process == _processes.here()
        place = np.searchsorted(self.names, np.asarray(ids.users))
        return self.process[place] == _processes.here()


_MODULUS = 1 << 128


def row_digests(numbers: np.ndarray, rows: np.ndarray) -> int:
    """A number that stands for rows and their places; those of parts add up."""
    total, rows = 0, np.ascontiguousarray(rows)
    for number, row in zip(numbers.tolist(), rows):
        one = hashlib.blake2b(row.tobytes(), digest_size=16)
        one.update(number.to_bytes(8, "little"))
        total += int.from_bytes(one.digest(), "little")
    return total % _MODULUS


def gather_pairs(prefs: Preferences) -> Preferences:
    """The pairs of all processes; features are a `DistributedTable`.

    Raises:
      ValueError: on every process, where users have no names, two processes share
        one, or the processes' data are of different kinds.
    """
    _processes.agree(
        **{
            "the dtype of features": np.dtype(prefs.features.dtype).name,
            "the number of columns of features": int(prefs.features.shape[1]),
            "which of rejected, label, sample_weight, group, item_ids are given": [
                x is not None
                for x in (
                    *(prefs.rejected, prefs.label, prefs.sample_weight, prefs.group),
                    prefs.item_ids,
                )
            ],
            "whether features spans processes": _spans(prefs.features),
            "whether features is a FeatureSource": isinstance(
                prefs.features, FeatureSource
            ),
            "the kind of user names": _kind(prefs.user_ids),
            "the kind of item names": _kind(prefs.item_ids),
            "the kind of groups": _kind(prefs.ids and prefs.ids.groups),
        }
    )
    names: Any = prefs.user_ids
    if names is None:
        raise ValueError("users of a fit over several processes need names: user_ids")
    parts = _processes.gather_arrays(_columns(prefs))
    names, process = _sorted_users(parts)
    codes, rows, owner = _numbered(parts, names, prefs)
    table, mine = prefs.features, _processes.here()
    used = parts[mine]["used"]
    place = used
    if _spans(table):
        needed = [part["used"] for part in parts]
        table, place = _exchange(table, needed), np.arange(len(used))
    order = np.argsort(codes[mine])
    held = codes[mine][order], place[order]
    features = DistributedTable(table, *held, owner, process, names)
    if rows is not None:
        _check_shared_rows(features, codes, rows)
    return _joined(parts, codes, names, rows, features)


def _check_shared_rows(table: DistributedTable, codes, names: np.ndarray) -> None:
    """Raises on every process where an item has other features in another one."""
    held = [np.unique(code) for code in codes]
    shared = np.bincount(np.concatenate(held), minlength=len(names)) > 1
    numbers: list[np.ndarray] = [np.zeros(0, np.int64)]
    digests: list[bytes] = []

    def add(some, rows):
        numbers.append(some)
        rows = np.ascontiguousarray(rows)
        digests.extend(
            hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows
        )

    if shared.any():
        table.visit(shared[table.rows], add)
    part = {
        "row": np.concatenate(numbers).astype(np.int64),
        "digest": np.frombuffer(b"".join(digests), np.uint64),
    }
    parts = _processes.gather_arrays(part)
    row = np.concatenate([x["row"] for x in parts])
    digest = np.concatenate([x["digest"] for x in parts])
    process = np.repeat(np.arange(len(parts)), [len(x["row"]) for x in parts])
    order = np.argsort(row, kind="stable")
    row, digest, process = row[order], digest[order], process[order]
    other = np.flatnonzero((row[1:] == row[:-1]) & (digest[1:] != digest[:-1]))
    if other.size:
        at = other[0]
        raise ValueError(
            "an item must have the same features in every process; item "
            f"{names[row[at]].item()!r} has others in processes {process[at]} and "
            f"{process[at + 1]}"
        )


def _spans(features) -> bool:
    return isinstance(features, jax.Array) and not features.is_fully_addressable


def _kind(names: np.ndarray | None) -> str:
    return "none" if names is None else names.dtype.kind


def _columns(prefs: Preferences) -> dict[str, np.ndarray]:
    """This process's pairs; rows as places among those that are used."""
    sides = np.stack([x for x in (prefs.chosen, prefs.rejected) if x is not None])
    used, place = np.unique(sides, return_inverse=True)
    place = place.reshape(sides.shape)
    out = {
        "users": np.asarray(prefs.user_ids),
        "user": np.asarray(prefs.user),
        "sides": place.astype(np.int32),
        "used": used,
    }
    for name in ("label", "sample_weight"):
        if (values := getattr(prefs, name)) is not None:
            out[name] = np.asarray(values)
    if prefs.group is not None:
        ids: Any = prefs.ids
        out["group"] = ids.groups[np.asarray(prefs.group)]
    if prefs.item_ids is not None:
        out["items"] = prefs.item_ids[used]
    return out


def _sorted_users(parts) -> tuple[np.ndarray, np.ndarray]:
    """(names of all users, sorted; the process of each)."""
    names = _ids.joined([part["users"] for part in parts], "user_ids")
    sizes = [len(part["users"]) for part in parts]
    process = np.repeat(np.arange(len(parts)), sizes)
    order = np.argsort(names, kind="stable")
    names, process = names[order], process[order]
    if (same := np.flatnonzero(names[1:] == names[:-1])).size:
        at = same[0]
        raise ValueError(
            f"a user must belong to one process; user {names[at].item()!r} is one of "
            f"processes {process[at]} and {process[at + 1]}"
        )
    return names, process


def _numbered(parts, names, prefs):
    """(numbers of each process's used rows, names of rows or None, owner int[M])."""
    sizes = [len(part["used"]) for part in parts]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    holder = np.repeat(np.arange(len(parts)), sizes)
    if "items" in parts[0]:
        keys = _ids.joined([part["items"] for part in parts], "item_ids")
    elif _spans(prefs.features):
        keys = np.concatenate([part["used"] for part in parts])
    else:
        keys = _by_appearance(parts, starts, names)
    found, code = np.unique(keys, return_inverse=True)
    owner = np.full(len(found), len(parts))
    np.minimum.at(owner, code, holder)
    rows = found if "items" in parts[0] else None
    return [code[a:b] for a, b in zip(starts, ends)], rows, owner


def _users(parts, names) -> np.ndarray:
    """The user of every pair, as a place among all users."""
    return np.concatenate(
        [np.searchsorted(names, part["users"])[part["user"]] for part in parts]
    )


def _by_appearance(parts, starts, names) -> np.ndarray:
    """Ranks of all used rows, in the order in which users' pairs first meet them."""
    user = _users(parts, names)
    sides = np.concatenate([p["sides"] + s for p, s in zip(parts, starts)], axis=1)
    met = sides[:, np.argsort(user, kind="stable")].T.ravel()
    first = np.unique(met, return_index=True)[1]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank


def _joined(parts, codes, names, rows, features) -> Preferences:
    user = _users(parts, names)
    order = np.argsort(user, kind="stable")
    sides = np.concatenate([code[p["sides"]] for p, code in zip(parts, codes)], axis=1)
    sides = sides[:, order].astype(np.int32)
    counts = np.bincount(user, minlength=len(names))

    def column(name):
        if name not in parts[0]:
            return None
        return np.concatenate([part[name] for part in parts])[order]

    group = groups = column("group")
    if group is not None:
        groups, group = np.unique(group, return_inverse=True)
        group = group.astype(np.int32)
    return Preferences(
        features=features,
        chosen=sides[0],
        rejected=sides[1] if len(sides) > 1 else None,
        user=user[order].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        order=np.arange(len(user), dtype=np.int32),
        label=column("label"),
        sample_weight=column("sample_weight"),
        group=group,
        num_users=len(names),
        ids=Ids(names, rows, groups),
    )


def _exchange(table: jax.Array, needed: list[np.ndarray]) -> np.ndarray:
    """The rows of a table that spans processes which this one needs, in their order.

    Each process sends what others need of its rows, some at a time.
    """
    mine = _processes.here()
    wanted = np.unique(np.concatenate(needed))
    shards = {}
    for shard in table.addressable_shards:
        shards.setdefault(shard.index[0].start or 0, shard.data)
    held = [np.arange(start, start + len(x)) for start, x in sorted(shards.items())]
    held = np.intersect1d(np.concatenate(held), wanted)
    all_held = [part["held"] for part in _processes.gather_arrays({"held": held})]
    sender = np.full(len(wanted), len(all_held))
    for process, rows in enumerate(all_held):
        at = np.searchsorted(wanted, rows)
        sender[at] = np.minimum(sender[at], process)
    sends = [wanted[sender == process] for process in range(len(all_held))]
    width = np.dtype(table.dtype).itemsize * table.shape[1]
    size = max(1, _EXCHANGED // width)
    out = np.empty((len(needed[mine]), table.shape[1]), table.dtype)
    for start in range(0, max(map(len, sends)), size):
        rows = sends[mine][start : start + size]
        values = _from_shards(shards, rows, out)
        part = {"rows": rows, "bytes": values.view(np.uint8).reshape(len(rows), width)}
        for found in _processes.gather_arrays(part):
            at = np.searchsorted(needed[mine], found["rows"])
            at = np.minimum(at, len(out) - 1)
            right = needed[mine][at] == found["rows"]
            taken = np.ascontiguousarray(found["bytes"][right])
            out[at[right]] = taken.view(out.dtype).reshape(-1, out.shape[1])
    return out


def _from_shards(shards: dict[int, Any], rows: np.ndarray, like: np.ndarray):
    values = np.empty((len(rows), like.shape[1]), like.dtype)
    for start, data in shards.items():
        here = (rows >= start) & (rows < start + len(data))
        values[here] = np.asarray(data)[rows[here] - start]
    return values
