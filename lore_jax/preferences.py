"""Pairwise choices of many users over one table, and parts of them.

D features of one response, U users, M distinct feature rows, N pairs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import struct

from lore_jax import _checks, _ids, _tables
from lore_jax._entry import public
from lore_jax._ids import Ids


@runtime_checkable
class FeatureSource(Protocol):
    """A feature table read in blocks of rows: for tables larger than memory.

    Attributes:
      shape: (M, D).
      dtype: storage type of the features.
    """

    shape: tuple[int, int]
    dtype: Any

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields consecutive blocks float[rows, D], M rows in all."""
        ...


class Preferences(struct.PyTreeNode):
    """Pairwise choices over a shared table of responses; build with `from_pairs`.

    Pairs are stored stably sorted by user. Pair n says that `user[n]` preferred row
    `chosen[n]` of `features` to row `rejected[n]`.

    Attributes:
      features: float[M, D], one row per distinct response, or ready-made differences
        where `rejected` is None. NumPy arrays stay on the host, JAX arrays where
        they are; a `FeatureSource` is read in blocks.
      chosen: int32[N], row of the preferred response.
      rejected: int32[N], row of the other, or None.
      user: int32[N], 0 … U−1, ascending.
      offsets: int32[U + 1]; pairs offsets[u] … offsets[u + 1] − 1 are user u's.
      order: int32[N], place of each stored pair in the caller's order.
      label: float[N], P(chosen is preferred), or None for 1.
      sample_weight: float[N], non-negative weight of each pair, or None for 1.
      group: int32[N], what must not be split between training and validation, or
        None for the default (user and row).
      num_users: U; users without a pair are legal.
      ids: names of users and items, or None.

    Example:
      >>> user = [0, 0, 1]
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0, 1], [1, 2, 2], user)
      >>> prefs
      Preferences(3 pairs of 2 users over 3 rows of 3 features,
        ndarray of float32)
    """

    features: Any
    chosen: Any
    rejected: Any
    user: Any
    offsets: Any
    order: Any
    label: Any = None
    sample_weight: Any = None
    group: Any = None
    num_users: int = struct.field(pytree_node=False, default=0)
    ids: Ids | None = struct.field(pytree_node=False, default=None)

    @classmethod
    @public("prefs.replace(features=...) of a Preferences that was built outside")
    def from_pairs(
        cls,
        features: Any,
        chosen: Any,
        rejected: Any,
        user: Any,
        num_users: int | None = None,
        label: Any = None,
        sample_weight: Any = None,
        group: Any = None,
        *,
        user_ids: Any = None,
        item_ids: Any = None,
    ) -> "Preferences":
        """Builds and validates the choices of many users over one table.

        The table is not copied, unless its dtype changes: do not write to it
        afterwards. Everything else is copied.

        A name is a string of at most 256 characters or an integer of 64 bits; the
        integer 1 and the string "1" are two names. Integers in `user` are indices
        where `num_users` is given or every number from 0 to the largest occurs.
        Other integers (database keys, hashes) are names.

        Args:
          features: float[M, D], one row per response (or per difference, with
            `rejected=None`), or a `FeatureSource`.
          chosen: int[N] rows; with `item_ids`, int[N] or str[N] names out of it.
          rejected: like `chosen`, or None when features already are differences.
          user: int[N] indices in 0 … U−1, or int[N] or str[N] names. Names are
            numbered in `user_ids` order, or sorted order where that is not given.
          num_users: U; default: as many as there are names, or one more than the
            largest index.
          label: float[N] in [0, 1], P(chosen is preferred).
          sample_weight: float[N] ≥ 0, what each pair counts.
          group: int[N] or str[N].
          user_ids: U distinct names of the users; then `user` holds names. With
            `num_users`, integers in `user` are indices into strings.
          item_ids: M distinct names of the rows; then `chosen` and `rejected` hold
            names.

        Raises:
          ValueError: an argument has the wrong shape, is out of range, missing or not
            finite, or a pair compares a row with itself. The message names the place.
          TypeError: an argument has the wrong dtype, or is traced.

        Example:
          >>> table = np.eye(3, dtype=np.float32)
          >>> names = dict(item_ids=["a", "b", "c"])
          >>> prefs = lore.Preferences.from_pairs(table, ["a"], ["c"], ["ann"], **names)
          >>> prefs.chosen.tolist(), prefs.user_ids.tolist()
          ([0], ['ann'])
        """
        if not isinstance(features, FeatureSource):
            features = _checks.host_table(features)
        _tables.check_source(features)
        num_rows = int(features.shape[0])
        items = None if item_ids is None else _ids.unique(item_ids, "item_ids")
        if items is not None and len(items) != num_rows:
            raise ValueError(
                f"item_ids must name every row of features: {len(items)} names for "
                f"M={num_rows} rows"
            )
        chosen = _ids.rows(chosen, items, num_rows, "chosen")
        length = len(chosen)
        if rejected is not None:
            rejected = _ids.rows(rejected, items, num_rows, "rejected")
            _checks.host_length(rejected, length, "rejected")
            same = np.flatnonzero(chosen == rejected)
            if same.size:
                raise ValueError(
                    f"chosen and rejected must differ; pair {same[0]} compares row "
                    f"{chosen[same[0]]} with itself"
                )
        users, user, num_users = _ids.users(user, num_users, user_ids)
        _checks.host_length(user, length, "user")
        label = _checks.host_floats(label, length, "label", 0.0, 1.0)
        weights = _checks.host_floats(
            sample_weight, length, "sample_weight", 0.0, np.inf
        )
        groups = None
        if group is not None:
            group = _ids.column(group, "group")
            _checks.host_length(group, length, "group")
            groups, group = np.unique(group, return_inverse=True)
            group = group.astype(np.int32)
        order = np.argsort(user, kind="stable").astype(np.int32)
        counts = np.bincount(user, minlength=num_users)

        def sort(values):
            return None if values is None else values[order]

        return cls(
            features=features,
            chosen=chosen[order],
            rejected=sort(rejected),
            user=user[order],
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            order=order,
            label=sort(label),
            sample_weight=sort(weights),
            group=sort(group),
            num_users=num_users,
            ids=None if users is None and items is None else Ids(users, items, groups),
        )

    @classmethod
    @public("prefs.replace(features=...) of a Preferences that was built outside")
    def from_ragged(
        cls, differences: Sequence[Any], *, user_ids: Any = None
    ) -> "Preferences":
        """Builds from one array of differences x_chosen − x_rejected per user.

        Args:
          differences: U arrays float[n_u, D]; n_u = 0 is legal.
          user_ids: U distinct names, strings or integers.

        Raises:
          ValueError: no user, or an array is not [n_u, D] with the common D, or not
            finite; the message names the user.
          TypeError: an array is not floating point.

        Example:
          >>> differences = [np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32)]
          >>> lore.Preferences.from_ragged(differences).counts.tolist()
          [2, 0]
        """
        if len(differences) == 0:
            raise ValueError("differences must hold at least one user, got none")
        arrays = [
            _checks.host_array(x, f"differences[{u}]")
            for u, x in enumerate(differences)
        ]
        width = arrays[0].shape[-1] if arrays[0].ndim == 2 else None
        for u, x in enumerate(arrays):
            if x.ndim != 2 or x.shape[1] != width:
                raise ValueError(
                    f"differences[{u}] must be float[n, D] with D={width} like "
                    f"differences[0], got shape {x.shape}"
                )
            _checks.host_float_table(x, f"differences[{u}]")
        features = np.concatenate(arrays)
        user = np.repeat(np.arange(len(arrays)), [len(x) for x in arrays])
        names = None if user_ids is None else _ids.unique(user_ids, "user_ids")
        if names is not None and len(names) != len(arrays):
            raise ValueError(
                f"user_ids must name every user: {len(names)} names for "
                f"num_users={len(arrays)}"
            )
        return cls.from_pairs(
            features,
            np.arange(len(features)),
            None,
            user if names is None else names[user],
            len(arrays),
            user_ids=names,
        )

    def __repr__(self) -> str:
        """Sizes, and which optional fields are there."""
        rows, width = self.features.shape
        what = "differences" if self.rejected is None else "rows"
        fields = ("label", "sample_weight", "group")
        found = [name for name in fields if getattr(self, name) is not None]
        found += [
            f"{name[:-1]} names"
            for name in ("users", "items")
            if self.ids is not None and getattr(self.ids, name) is not None
        ]
        return (
            f"Preferences({self.num_pairs} pairs of {self.num_users} users over "
            f"{rows} {what} of {width} features,\n"
            f"  {type(self.features).__name__} of {np.dtype(self.features.dtype)}"
            f"{''.join(', ' + name for name in found)})"
        )

    @property
    def user_ids(self) -> np.ndarray | None:
        """str[U] or int[U], or None where users are numbers."""
        return None if self.ids is None else self.ids.users

    @property
    def item_ids(self) -> np.ndarray | None:
        """str[M] or int[M], or None where items are rows."""
        return None if self.ids is None else self.ids.items

    @property
    def names(self) -> Ids | None:
        """Names of users and items, without those of groups."""
        return self.ids and Ids(self.ids.users, self.ids.items)

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.chosen.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self.features.shape[1]

    @property
    def counts(self):
        """int32[U], pairs of each user."""
        return self.offsets[1:] - self.offsets[:-1]


class ArraySource:
    """A `FeatureSource` over an array or memory map, `block_rows` rows at a time.

    Example:
      >>> source = lore.ArraySource(np.zeros((5, 2), np.float32), block_rows=2)
      >>> [len(block) for block in source.blocks()]
      [2, 2, 1]
    """

    def __init__(self, array: np.ndarray, block_rows: int = 8192):
        """Keeps the array; nothing is read yet.

        Raises:
          ValueError: the array is not [M, D] or `block_rows` is below 1.
          TypeError: `array` is no array.
        """
        if not hasattr(array, "dtype"):
            raise TypeError(f"array must be an array, got {type(array)}")
        if np.ndim(array) != 2:
            raise ValueError(f"array must be float[M, D], got {np.shape(array)}")
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        self.array = array
        self.block_rows = block_rows
        self.shape = array.shape
        self.dtype = array.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields float[rows, D] in order."""
        for start in range(0, self.shape[0], self.block_rows):
            yield np.asarray(self.array[start : start + self.block_rows])


def take_shots(prefs: Preferences, shots: int | None, *, seed: int = 0) -> Preferences:
    """At most `shots` random pairs of each user; None keeps all.

    For one seed the pairs are nested: 3 shots contain the pair of 1 shot.

    Raises:
      ValueError: `shots` is negative.
      TypeError: `shots` is no integer.

    Example:
      >>> user = [0, 0, 1]
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0, 1], [1, 2, 2], user)
      >>> lore.take_shots(prefs, 1).counts.tolist()
      [1, 1]
    """
    if shots is None:
        return prefs
    if isinstance(shots, bool) or not isinstance(shots, int | np.integer):
        raise TypeError(f"shots must be an integer or None, got {shots!r}")
    if shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    draw = np.random.default_rng(seed).random(prefs.num_pairs)
    user = np.asarray(prefs.user)
    ranked = np.lexsort((draw, user))
    place = np.arange(prefs.num_pairs) - np.asarray(prefs.offsets)[:-1][user]
    return take_pairs(prefs, ranked[place < shots])


@public("prefs.replace(features=...)")
def store_as(prefs: Preferences, dtype) -> Preferences:
    """Stores the features as bfloat16 or float16, centred before they are rounded.

    A constant row cancels in every pair, and rounding a centred table loses a tenth
    of what rounding the raw one does. Differences are never centred: their mean is
    the signal.

    Raises:
      ValueError: a number is not finite, or overflows `dtype`.
      TypeError: `dtype` is no floating type, or the features are a `FeatureSource`.

    Example:
      >>> user = [0, 0, 1]
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0, 1], [1, 2, 2], user)
      >>> lore.store_as(prefs, "bfloat16").features.dtype
      dtype(bfloat16)
    """
    if isinstance(prefs.features, FeatureSource):
        raise TypeError("features is a FeatureSource; store its blocks as you need")
    if dtype in ("bfloat16", jnp.bfloat16):
        dtype = jnp.bfloat16
    if not _checks.is_floating(dtype):
        raise TypeError(f"dtype must be floating point, got {dtype!r}")
    table = np.asarray(prefs.features)
    if prefs.rejected is not None:
        table = table - table.mean(0, dtype=np.float64).astype(np.float32)
    return prefs.replace(features=_tables.rounded(table, dtype))


def take_pairs(prefs: Preferences, keep: np.ndarray) -> Preferences:
    """The pairs at stored positions `keep` (bool[N] or int[n]), all users kept.

    Raises:
      ValueError: a mask is not bool[N], or a position is out of range.

    Example:
      >>> user = [0, 0, 1]
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0, 1], [1, 2, 2], user)
      >>> lore.take_pairs(prefs, [0, 2]).num_pairs
      2
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

    Example:
      >>> user = [0, 0, 1]
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0, 1], [1, 2, 2], user)
      >>> lore.take_users(prefs, [1]).num_pairs
      1
    """
    of = f"num_users is {prefs.num_users}"
    users = _checks.host_indices(users, prefs.num_users, "users", of)
    if len(np.unique(users)) < len(users):
        raise ValueError("users must be distinct; one of them stands twice")
    if not len(users):
        raise ValueError("users must name at least one user, got none")
    return pairs_of(prefs, users)


def pairs_of(prefs: Preferences, users: np.ndarray) -> Preferences:
    """`take_users` without checks, of any number of users."""
    keep = positions_of(np.asarray(prefs.offsets), users)
    counts = np.asarray(prefs.counts)[users]
    return _rebuilt(prefs, keep, np.repeat(np.arange(len(users)), counts), users)


def positions_of(offsets: np.ndarray, users: np.ndarray) -> np.ndarray:
    """int[n], stored positions of the pairs of some users, in the order given."""
    counts = (offsets[1:] - offsets[:-1])[users]
    starts = offsets[users] - (np.cumsum(counts) - counts)
    return np.arange(counts.sum()) + np.repeat(starts, counts)


def _rebuilt(prefs: Preferences, keep, user, users) -> Preferences:
    """Pairs `keep` with users renumbered; `users` are old numbers, or U unchanged."""

    def take(values):
        return None if values is None else np.asarray(values)[keep]

    renumbered = not isinstance(users, int)
    num_users = len(users) if renumbered else users
    ids = prefs.ids
    if renumbered and ids is not None and ids.users is not None:
        ids = Ids(ids.users[users], ids.items, ids.groups)
    counts = np.bincount(user, minlength=num_users)
    return prefs.replace(
        chosen=take(prefs.chosen),
        rejected=take(prefs.rejected),
        user=user.astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        order=np.argsort(np.argsort(np.asarray(prefs.order)[keep])).astype(np.int32),
        label=take(prefs.label),
        sample_weight=take(prefs.sample_weight),
        group=take(prefs.group),
        num_users=num_users,
        ids=ids,
    )
