"""The layout of pairs: users padded to a few lengths, in chunks of a few shapes.

Index work happens here, once per data set, on the host. `pack` serves whatever asks
about users (adaptation, posterior, losses); `make_buckets` lays the same pairs out for
the steps of a training. Batches of any size reuse the same compiled programs; padding
costs K floats a pair.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lore_jax import _equations
from lore_jax._backend import to_array, tuning
from lore_jax._posterior.table import group_size
from lore_jax.preferences import Preferences

_FOR_LONG = ((64, 48), (4, 0))  # where a chunk of padding costs more than a call
_LONG = 160
_FEW_PAIRS = 1 << 16
_LANES = 16  # users of a chunk of a bucket at least, unless one alone is more than that


class Chunk(NamedTuple):
    """Users with similar numbers of pairs, padded to one of a few shapes.

    Attributes:
      users: int[n], whose rows these are; the first n of U rows.
      first: int32[U], stored position of each user's first pair.
      count: int32[U], how many they have; 0 where padded.
      length: P, what they are padded to.
    """

    users: np.ndarray
    first: np.ndarray
    count: np.ndarray
    length: int

    @property
    def place(self) -> np.ndarray | slice:
        """`users` as an index; those next to one another are a slice, which is fast."""
        first, last = self.users[0], self.users[-1]
        alike = last - first == len(self.users) - 1
        return slice(first, last + 1) if alike else self.users


class Pairs(NamedTuple):
    """The pairs of a data set, laid out; everything is on the host.

    Attributes:
      chosen: int32[N], row of the preferred response, users ascending.
      rejected: int32[N] or None.
      user: int32[N].
      sample_weight: float[N] or None.
      label: float[N] or None.
      offsets: int32[U + 1]; pairs offsets[u] … offsets[u + 1] − 1 are user u's.
    """

    chosen: np.ndarray
    rejected: np.ndarray | None
    user: np.ndarray
    sample_weight: np.ndarray | None
    label: np.ndarray | None
    offsets: np.ndarray

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """int32[U], pairs of each user."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def unit_weights(self) -> bool:
        """Whether every pair weighs 1."""
        return self.sample_weight is None

    def coefficients(self, weighting: str) -> np.ndarray:
        """`losses.pair_coefficients` on the host, float64[N]."""
        weight = np.ones(len(self.user))
        if self.sample_weight is not None:
            weight = np.asarray(self.sample_weight, np.float64)
        if weighting == "pairs":
            return weight / (weight.sum() or 1)
        total = np.bincount(self.user, weight, minlength=self.num_users)
        return weight / np.where(total > 0, total, 1)[self.user]

    def chunks(self, users: np.ndarray | None = None) -> Iterator[Chunk]:
        """Chunks of all users, or of some."""
        if users is None:
            yield from make_chunks(self.counts, self.offsets[:-1])
            return
        for chunk in make_chunks(self.counts[users], self.offsets[users]):
            yield chunk._replace(users=users[chunk.users])

    def reader(self, proj) -> Callable[[Chunk], tuple[Any, Any, Any]]:
        """A function Chunk → (z float[U, P, K], weight float[U, P], label or None).

        The pairs of large batches over a table on an accelerator are read there.

        Args:
          proj: float[M, K].
        """
        columns = self.chosen, self.rejected, self.sample_weight, self.label
        size = len(self.chosen)
        if not size:  # `count` says so: nothing of these is used.
            columns = np.zeros(1, np.int32), None, None, None
            proj = np.zeros((1, proj.shape[1]), proj.dtype)
        read, least = _read, tuning(proj).gather_pairs
        if isinstance(proj, jax.Array) and least is not None and size > least:
            # Few sizes, so few programs; once, not once a chunk.
            capacity = ladder([least], 4, size)[-1] - size
            columns = jax.tree.map(
                lambda x: to_array(np.pad(x, (0, capacity))), columns
            )
            read = _read_on_device
        return lambda c: read(proj, columns, c.first, c.count, length=c.length)


def pack(prefs: Preferences) -> Pairs:
    """Lays the pairs out, on the host."""
    fields = prefs.chosen, prefs.rejected, prefs.user, prefs.sample_weight
    columns = jax.tree.map(np.asarray, (*fields, prefs.label, prefs.offsets))
    return Pairs(*columns)


def make_chunks(counts: np.ndarray, first: np.ndarray) -> Iterator[Chunk]:
    """Splits users by number of pairs into chunks of a few fixed shapes.

    Lengths are padded to 3, 5, 10, 20, 40, …, and in small batches all alike to 40,
    160, … (a compilation costs more than the padding); how many users a chunk holds
    depends on `Tuning.chunk_shapes` and `chunk_pairs`, or is 4 with many pairs.

    Args:
      counts: int[U], pairs of each user.
      first: int[U], stored position of each user's first pair.
    """
    longest = counts.max(initial=0)
    lengths = ladder([3, 5], 2, longest)
    if len(counts) * max(lengths[-1], 40) <= _FEW_PAIRS:
        lengths = ladder([40], 4, longest)[-1:]
    bucket = np.searchsorted(lengths, np.arange(longest + 1)).astype(np.int8)[counts]
    for b, length in enumerate(lengths):
        users = np.flatnonzero(bucket == b)
        shapes = tuning().chunk_shapes
        shapes = shapes if length <= _LONG else (*shapes[:-1], *_FOR_LONG)
        sizes = [c for c in shapes if c[0] * length <= tuning().chunk_pairs]
        sizes = sizes or [(4, 0)]
        while len(users):
            size = next((c for c, least in sizes if len(users) > least), sizes[-1][0])
            taken, users = users[:size], users[size:]
            starts, count = np.zeros((2, size), np.int32)
            chunk = Chunk(taken, starts, count, int(length))
            place = chunk.place
            starts[: len(taken)], count[: len(taken)] = first[place], counts[place]
            yield chunk


def batch_shapes(num_users: int, num_pairs: int) -> list[tuple[int, int]]:
    """(users, pairs of each) of batches that meet every shape of smaller batches."""
    shapes = tuning().chunk_shapes
    sizes = [min(size, num_users) for size, least in shapes if num_users > least]
    lengths = [min(x, num_pairs) for x in ladder([3, 5], 2, num_pairs)]
    return [(size, length) for size in sizes for length in dict.fromkeys(lengths)]


def ladder(lengths: list[int], factor: int, longest: int) -> list[int]:
    """`lengths`, continued by a factor until they reach the longest."""
    while lengths[-1] < longest:
        lengths = [*lengths, lengths[-1] * factor]
    return lengths


def _read(proj, columns, first, count, *, length):
    chosen, rejected, weight, label = columns
    place = np.arange(length, dtype=np.int32)[None]
    real = place < count[:, None]
    pairs = (first[:, None] + place) * real
    on_device = isinstance(proj, jax.Array)
    gather = _gather_on_device if on_device else _equations.pair_rewards
    z = gather(proj, chosen[pairs], None if rejected is None else rejected[pairs])
    unit = real.astype(z.dtype)
    weight = unit if weight is None else unit * weight[pairs].astype(z.dtype)
    return z, weight, None if label is None else label[pairs].astype(z.dtype)


_read_on_device = jax.jit(_read, static_argnames="length")
_gather_on_device = jax.jit(_equations.pair_rewards)


class Bucket(NamedTuple):
    """Users of similar length for training: C chunks of B users with g · G pairs.

    Attributes:
      chosen: int32[C, g, G, B], rows of the table.
      rejected: int32[C, g, G, B] or None.
      weight: float[C, g, G, B], 0 where padded.
      label: float[C, g, G, B] or None.
    """

    chosen: jax.Array
    rejected: jax.Array | None
    weight: jax.Array
    label: jax.Array | None


def count_users(pairs: Pairs) -> int:
    """How many users have a pair that weighs anything."""
    user = pairs.user
    if pairs.sample_weight is not None:
        user = user[pairs.sample_weight > 0]
    return len(np.unique(user))


def bucket_lengths(capacity: np.ndarray) -> list[int]:
    """Of 3, 5, 10, 20, 40, … those that save a tenth of the pairs, and the longest.

    Every one costs compiling, so that few users with few pairs are padded to more.

    Args:
      capacity: int[U], the most pairs that every user may have.
    """
    longest = int(capacity.max(initial=0))
    lengths = [longest] * (longest > 0)
    for length in reversed([x for x in ladder([3, 5], 2, longest) if x < longest]):
        between = ((capacity > length) & (capacity <= lengths[-1])).any()
        saved = ((capacity > 0) & (capacity <= length)).sum() * (lengths[-1] - length)
        if not between:
            lengths[-1] = length
        elif saved > capacity.sum() / 10:
            lengths.append(length)
    return lengths[::-1]


def make_buckets(
    pairs: Pairs, num_atoms: int, dtype, capacity: np.ndarray
) -> tuple[tuple[Bucket, ...], tuple[jax.Array, ...], np.ndarray]:
    """Pads users to the lengths of `bucket_lengths`; chunks fit a cache.

    Buckets are padded to shapes that fit every split of the data, so all splits share
    one program: twice the places of the pairs.

    Returns:
      (buckets, int32[] of each bucket, how many of its chunks hold users, int[N], the
      place of each pair among the slots of all buckets, one after another).
    """
    position = np.zeros(len(pairs.chosen), np.int64)
    first = 0
    counts, offsets = pairs.counts, pairs.offsets
    buckets, num_chunks, low = [], [], 0
    # Of a user's pairs a validation split may leave half.
    for length in bucket_lengths(np.concatenate([capacity, capacity // 2])):
        users = np.flatnonzero((counts > low) & (counts <= length))
        most = int((capacity > low).sum())  # As many as a split may leave here.
        group = group_size(length, pairs.unit_weights)
        size = tuning().bucket_cells // (num_atoms * length)
        size = max(size, _LANES if size else 1)
        size = min(1 << size.bit_length() - 1, most)
        place = np.arange(-(-length // group) * group)
        real = np.zeros((-(-most // size) * size, len(place)), bool)
        real[: users.size] = place < counts[users][:, None]
        slots = np.zeros(real.shape, np.int64)
        slots[: users.size] = offsets[users][:, None] + place
        slots = np.where(real, slots, 0)
        real, slots = (
            x.reshape(-1, size, len(place) // group, group).transpose(0, 3, 2, 1)
            for x in (real, slots)
        )
        take = functools.partial(_take, slots)
        weight = take(pairs.sample_weight)
        weight = real if weight is None else real * weight
        buckets.append(
            Bucket(
                to_array(take(pairs.chosen)),
                _device(take(pairs.rejected)),
                to_array(weight, dtype),
                _device(take(pairs.label), dtype),
            )
        )
        num_chunks.append(to_array(-(-users.size // size), np.int32))
        position[slots[real]] = first + np.flatnonzero(real)
        first += real.size
        low = length
    return tuple(buckets), tuple(num_chunks), position


def _take(slots, values):
    if values is None:
        return None
    if not len(values):  # A device of a mesh without pairs: all is padding.
        return np.zeros(slots.shape, values.dtype)
    return values[slots]


def _device(values, dtype=None):
    return None if values is None else to_array(values, dtype)
