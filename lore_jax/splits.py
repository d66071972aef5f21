"""Parts of a `Preferences`: pairs, users, and what is held out.

Pairs of one user share responses, so a random split of pairs leaks. What is held out
here is held out by judgement, by item or by group.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from lore_jax import _checks
from lore_jax.types import FeatureSource, Ids, Preferences


class HeldOut(NamedTuple):
    """A split of pairs.

    Attributes:
      training: pairs to learn from.
      heldout: pairs to validate on.
      num_dropped: pairs with one row on either side, in neither.
    """

    training: Preferences
    heldout: Preferences
    num_dropped: int


def take_pairs(prefs: Preferences, keep: np.ndarray) -> Preferences:
    """The pairs at stored positions `keep` (bool[N] or int[n]), all users kept.

    Raises:
      ValueError: a mask is not bool[N], or a position is out of range.
    """
    keep = np.asarray(keep)
    if keep.dtype == bool:
        _checks.host_length(keep, prefs.num_pairs, "keep")
        keep = np.flatnonzero(keep)
    of = f"N is {prefs.num_pairs}"
    keep = np.sort(_checks.host_indices(keep, prefs.num_pairs, "keep", of))
    return _rebuilt(prefs, keep, np.asarray(prefs.user)[keep], prefs.num_users)


def take_users(prefs: Preferences, users: np.ndarray) -> Preferences:
    """The given users, renumbered 0 … in the order given, with all of their pairs.

    Raises:
      ValueError: a user is out of range or stands twice.
    """
    of = f"num_users is {prefs.num_users}"
    users = _checks.host_indices(users, prefs.num_users, "users", of)
    if len(np.unique(users)) < len(users):
        raise ValueError("users must be distinct; one of them stands twice")
    if not len(users):
        raise ValueError("users must name at least one user, got none")
    offsets = np.asarray(prefs.offsets)
    counts = (offsets[1:] - offsets[:-1])[users]
    ends = np.cumsum(counts)
    keep = np.arange(counts.sum()) + np.repeat(offsets[users] - (ends - counts), counts)
    return _rebuilt(prefs, keep, np.repeat(np.arange(len(users)), counts), users)


def _rebuilt(prefs: Preferences, keep, user, users) -> Preferences:
    """Pairs `keep` with users renumbered; `users` are old numbers, or U unchanged."""

    def take(values):
        return None if values is None else np.asarray(values)[keep]

    renumbered = not isinstance(users, int)
    num_users = len(users) if renumbered else users
    ids = prefs.ids
    if renumbered and ids is not None and ids.users is not None:
        ids = Ids(ids.users[users], ids.items)
    counts = np.bincount(user, minlength=num_users)
    return prefs.replace(
        chosen=take(prefs.chosen),
        rejected=take(prefs.rejected),
        user=user.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        order=np.argsort(np.argsort(np.asarray(prefs.order)[keep])).astype(np.int32),
        label=take(prefs.label),
        weight=take(prefs.weight),
        group=take(prefs.group),
        num_users=num_users,
        ids=ids,
    )


def split_users(
    num_users: int, *, share: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A random `share` of the users is unseen: (seen int[·], unseen int[·]), sorted.

    Raises:
      ValueError: `share` is not in [0, 1], or leaves no seen user.
    """
    _checks.host_floats([share], 1, "share", 0.0, 1.0)
    unseen = round(share * num_users)
    if unseen >= num_users:
        raise ValueError(f"share={share} of {num_users} users leaves no seen user")
    shuffled = np.random.default_rng(seed).permutation(num_users)
    return np.sort(shuffled[unseen:]), np.sort(shuffled[:unseen])


def hold_out(
    prefs: Preferences,
    *,
    share: float = 0.3,
    seed: int = 0,
    unit: Literal["judgements", "items"] = "judgements",
) -> HeldOut:
    """Splits pairs so that no judgement, or no item, stands on both sides.

    A judgement is what one user says of one row. An item is a row, for all users;
    where pairs join rows into many components (the responses of a prompt), an item is a
    component. Items are held out with all their pairs. Pairs with one judgement, or one
    item, on either side are dropped and counted.

    With `prefs.group`, "judgements" holds out whole groups. "items" joins the rows of a
    group, and drops held-out pairs whose group also stands among the training pairs.
    A pair whose rows its user has in no other pair is held out as one judgement, as
    often as the others of those that are kept: s² / (s² + (1 − s)²).

    Args:
      prefs: N pairs.
      share: s, probability that a judgement, an item or a group is held out.
      seed: of the draw. It depends neither on the order of pairs, nor on rows that no
        pair uses, nor on the order of rows that have names.
      unit: "judgements" or "items".

    Returns:
      `HeldOut`.

    Raises:
      ValueError: `share` is not in [0, 1] or `unit` is neither.
    """
    _checks.host_floats([share], 1, "share", 0.0, 1.0)
    if unit not in ("judgements", "items"):
        raise ValueError(f"unit must be 'judgements' or 'items', got {unit!r}")
    rng = np.random.default_rng(seed)
    rows = canonical_rows(prefs)
    group = None if prefs.group is None else np.asarray(prefs.group)
    if unit == "items":
        item = items_of(rows, group)
        sides = (rng.random(item.max(initial=-1) + 1) < share)[item]
    elif group is not None:
        sides = (rng.random(group.max(initial=-1) + 1) < share)[group][None]
    else:
        user = np.asarray(prefs.user, np.int64)
        judgement = rows + user * (rows.max(initial=0) + 1)
        place = np.unique(judgement, return_inverse=True)[1].reshape(rows.shape)
        times = np.bincount(place.ravel())
        draw = rng.random(len(times))[place]
        sides = draw < share
        if len(rows) == 2:
            alone = (times[place] == 1).all(0)
            kept = share**2 / (share**2 + (1 - share) ** 2)
            sides = np.where(alone, draw[0] < kept, sides)
    heldout = np.logical_and.reduce(sides)
    training = ~np.logical_or.reduce(sides)
    if unit == "items" and group is not None:
        heldout &= ~np.isin(group, group[training])
    return HeldOut(
        take_pairs(prefs, training),
        take_pairs(prefs, heldout),
        int(prefs.num_pairs - training.sum() - heldout.sum()),
    )


def canonical_rows(prefs: Preferences) -> np.ndarray:
    """int[2 or 1, N], rows of pairs as ranks among those used: by name, else by row."""
    columns = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    rows = np.stack([np.asarray(x, np.int64) for x in columns])
    used, place = np.unique(rows, return_inverse=True)
    place = place.reshape(rows.shape)
    if prefs.ids is None or prefs.ids.items is None:
        return place
    rank = np.empty(len(used), np.int64)
    rank[np.argsort(np.asarray(prefs.ids.items)[used], kind="stable")] = range(
        len(used)
    )
    return rank[place]


def items_of(rows: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """int[2 or 1, N], the item of each side of each pair; rows are `canonical_rows`.

    Components of the graph of pairs (and groups), unless one has half of the pairs.
    """
    count = rows.max(initial=-1) + 1
    first, second = rows[0], rows[-1]
    if group is not None:  # A node for every group joins its rows.
        first, second = rows.ravel(), np.tile(count + group, len(rows))
        count += int(group.max(initial=-1)) + 1
    component = connected(count, first, second)[rows]
    largest = np.bincount(component[0]).max(initial=0)
    return component if 2 * largest <= rows.shape[1] else rows


def connected(num_nodes: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int[num_nodes], the component of each node of a graph, 0 … C − 1."""
    label = np.arange(num_nodes)
    while True:
        least = label.copy()
        np.minimum.at(least, first, label[second])
        np.minimum.at(least, second, label[first])
        least = least[least]
        if (least == label).all():
            return np.unique(label, return_inverse=True)[1]
        label = least


def shares_items(prefs: Preferences) -> bool:
    """Whether two users judge the same row; if not, judgements and items are one."""
    rows = canonical_rows(prefs)
    user = np.broadcast_to(np.asarray(prefs.user, np.int64), rows.shape)
    pairs = np.unique(rows.ravel() * (user.max(initial=0) + 1) + user.ravel())
    return bool(len(pairs) > rows.max(initial=-1) + 1)


def take_rows(prefs: Preferences, rows: np.ndarray) -> Preferences:
    """The same pairs over the given rows of the table, which hold all that they use."""
    place = np.zeros(prefs.features.shape[0], np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    features, ids = prefs.features, prefs.ids
    taken = RowSource(features, rows) if _is_source(features) else features[rows]
    if ids is not None and ids.items is not None:
        ids = Ids(ids.users, np.asarray(ids.items)[rows])
    return prefs.replace(
        features=taken,
        chosen=place[np.asarray(prefs.chosen)],
        rejected=None if prefs.rejected is None else place[np.asarray(prefs.rejected)],
        ids=ids,
    )


def without_unused_rows(prefs: Preferences) -> Preferences:
    """The same pairs over the rows that they use, in the order of their names.

    Where rows have no names, and in a `FeatureSource` or on a device, they stay in
    order. A table whose rows are all used and in order is not copied.
    """
    columns = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    rows = np.unique(np.concatenate([np.asarray(x) for x in columns]))
    names = None if prefs.ids is None else prefs.ids.items
    if names is not None and isinstance(prefs.features, np.ndarray):
        rows = rows[np.argsort(np.asarray(names)[rows], kind="stable")]
    whole = prefs.features.shape[0]
    if len(rows) == whole and (rows == np.arange(whole)).all():
        return prefs
    return take_rows(prefs, rows)


class RowSource:
    """Some rows of a `FeatureSource`, ascending; blocks without any are left out."""

    def __init__(self, source: FeatureSource, rows: np.ndarray):
        """Keeps the source; nothing is read yet."""
        self.source, self.rows = source, rows
        self.shape = (len(rows), source.shape[1])
        self.dtype = source.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields float[rows, D] in order."""
        first = 0
        for block in self.source.blocks():
            low, high = np.searchsorted(self.rows, [first, first + len(block)])
            part = block[self.rows[low:high] - first]
            first += len(block)
            del block  # Two of them would be in memory.
            if len(part):
                yield part
            del part


def _is_source(features) -> bool:
    return isinstance(features, FeatureSource)
