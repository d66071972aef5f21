"""The layout of pairs: users padded to a few lengths, in chunks of a few shapes.

Batches of any size reuse the same compiled programs; padding costs K floats a pair.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax._backend import sized
from lore_jax._posterior.table import group_size
from lore_jax.preferences import Preferences

_CELLS = 1 << 16, 1 << 24  # atoms × pairs of a chunk: what stays in a cache

_LANES = 16  # users of a chunk at least, unless one alone is more than that


class Bucket(NamedTuple):
    """Users of similar length: C chunks of B users with g · G padded pairs.

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


def count_users(prefs: Preferences) -> int:
    """How many users have a pair that weighs anything."""
    user = np.asarray(prefs.user)
    if prefs.weight is not None:
        user = user[np.asarray(prefs.weight) > 0]
    return len(np.unique(user))


def bucket_lengths(room: np.ndarray) -> list[int]:
    """Of 3, 5, 10, 20, 40, … those that save a tenth of the pairs, and the longest.

    Every one costs compiling, so that few users with few pairs are padded to more.

    Args:
      room: int[U], the most pairs that every user may have.
    """
    longest, ladder = int(room.max(initial=0)), [3, 5]
    while ladder[-1] < longest:
        ladder.append(ladder[-1] * 2)
    lengths = [longest] * (longest > 0)
    for length in reversed([x for x in ladder if x < longest]):
        between = ((room > length) & (room <= lengths[-1])).any()
        saved = ((room > 0) & (room <= length)).sum() * (lengths[-1] - length)
        if not between:
            lengths[-1] = length
        elif saved > room.sum() / 10:
            lengths.append(length)
    return lengths[::-1]


def make_buckets(
    prefs: Preferences, num_atoms: int, dtype, room: np.ndarray
) -> tuple[tuple[Bucket, ...], tuple[jax.Array, ...]]:
    """Pads users to the lengths of `bucket_lengths`; chunks fit a cache.

    Whoever has room for more than a bucket's pairs has a place in it, so that every
    split of a data set has the same shapes: twice the places of the pairs.
    """
    counts, offsets = np.asarray(prefs.counts), np.asarray(prefs.offsets)
    buckets, num_chunks, low = [], [], 0
    # Of a user's pairs a validation split may leave half.
    for length in bucket_lengths(np.concatenate([room, room // 2])):
        users = np.flatnonzero((counts > low) & (counts <= length))
        most = int((room > low).sum())  # As many as a split may leave here.
        group = group_size(length, prefs.weight is None)
        size = sized(*_CELLS) // (num_atoms * length)
        size = max(size, _LANES if size else 1)
        size = min(1 << size.bit_length() - 1, most)
        place = np.arange(-(-length // group) * group)
        real = np.zeros((-(-most // size) * size, len(place)), bool)
        real[: users.size] = place < counts[users][:, None]
        pairs = np.zeros(real.shape, np.int64)
        pairs[: users.size] = offsets[users][:, None] + place
        pairs = np.where(real, pairs, 0)
        real, pairs = (
            x.reshape(-1, size, len(place) // group, group).transpose(0, 3, 2, 1)
            for x in (real, pairs)
        )
        take = functools.partial(_take, pairs)
        weight = take(prefs.weight)
        weight = real if weight is None else real * weight
        buckets.append(
            Bucket(
                jnp.asarray(take(prefs.chosen)),
                _device(take(prefs.rejected)),
                jnp.asarray(weight, dtype),
                _device(take(prefs.label), dtype),
            )
        )
        num_chunks.append(jnp.asarray(-(-users.size // size), jnp.int32))
        low = length
    return tuple(buckets), tuple(num_chunks)


def _take(pairs, values):
    return None if values is None else np.asarray(values)[pairs]


def _device(values, dtype=None):
    return None if values is None else jnp.asarray(values, dtype)


# Users of a chunk, and more than how many ask for it; on an accelerator padding is
# cheap and a call is not.
_SIZES = (
    ((4096, 2048), (1024, 64), (64, 0)),
    ((131072, 16384), (16384, 2048), (2048, 64), (64, 0)),
)

_FOR_LONG = ((64, 48), (4, 0))  # where a chunk of padding costs more than a call

_LONG = 160

_FEW_PAIRS = 1 << 16

_ROOM = 1 << 19  # more pairs are read on an accelerator, padded to 4, 16, … times it

_MANY_PAIRS = 1 << 20, 1 << 21


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


def chunks(counts: np.ndarray, offsets: np.ndarray) -> Iterator[Chunk]:
    """Splits users by number of pairs into chunks of a few fixed shapes.

    Lengths are padded to 3, 5, 10, 20, 40, …, and in small batches all alike to 40,
    160, … (a compilation costs more than the padding); a chunk holds 4096, 1024 or 64
    users, or 4 with many pairs, and never a million pairs unless 4 users have more. On
    an accelerator it is 131072, 16384, 2048 or 64, and two million.
    """
    longest = counts.max(initial=0)
    lengths = _ladder([3, 5], 2, longest)
    if len(counts) * max(lengths[-1], 40) <= _FEW_PAIRS:
        lengths = _ladder([40], 4, longest)[-1:]
    bucket = np.searchsorted(lengths, counts)
    for b, length in enumerate(lengths):
        users = np.flatnonzero(bucket == b)
        shapes = sized(*_SIZES)
        shapes = shapes if length <= _LONG else (*shapes[:-1], *_FOR_LONG)
        sizes = [c for c in shapes if c[0] * length <= sized(*_MANY_PAIRS)] or [(4, 0)]
        while len(users):
            size = next((c for c, least in sizes if len(users) > least), sizes[-1][0])
            taken, users = users[:size], users[size:]
            first, count = np.zeros((2, size), np.int32)
            first[: len(taken)], count[: len(taken)] = offsets[taken], counts[taken]
            yield Chunk(taken, first, count, int(length))


def _ladder(lengths: list[int], factor: int, longest: int) -> list[int]:
    while lengths[-1] < longest:
        lengths = [*lengths, lengths[-1] * factor]
    return lengths


def chunk_reader(proj, prefs: Preferences) -> Callable[[Chunk], tuple[Any, Any, Any]]:
    """A function Chunk → (z float[U, P, K], weight float[U, P], label or None).

    The pairs of large batches over a table on an accelerator are read there.

    Args:
      proj: float[M, K].
      prefs: the pairs.
    """
    columns = prefs.chosen, prefs.rejected, prefs.weight, prefs.label
    if not prefs.num_pairs:  # `count` says so: nothing of these is used.
        columns = np.zeros(1, np.int32), None, None, None
        proj = np.zeros((1, proj.shape[1]), proj.dtype)
    columns = jax.tree.map(np.asarray, columns)
    read = _read
    if isinstance(proj, jax.Array) and sized(0, prefs.num_pairs) > _ROOM:
        # Few sizes, so few programs; once, not once a chunk.
        room = _ladder([_ROOM], 4, prefs.num_pairs)[-1] - prefs.num_pairs
        columns = jax.tree.map(lambda x: jnp.asarray(np.pad(x, (0, room))), columns)
        read = _read_on_device
    return lambda c: read(proj, columns, c.first, c.count, length=c.length)


def _read(proj, columns, first, count, *, length):
    chosen, rejected, weight, label = columns
    place = np.arange(length, dtype=np.int32)[None]
    real = place < count[:, None]
    pairs = (first[:, None] + place) * real
    gather = _gather_on_device if isinstance(proj, jax.Array) else _gather
    z = gather(proj, chosen[pairs], None if rejected is None else rejected[pairs])
    unit = real.astype(z.dtype)
    weight = unit if weight is None else unit * weight[pairs].astype(z.dtype)
    return z, weight, None if label is None else label[pairs].astype(z.dtype)


def _gather(proj, chosen, rejected):
    z = proj[chosen]
    return z if rejected is None else z - proj[rejected]


_read_on_device = jax.jit(_read, static_argnames="length")

_gather_on_device = jax.jit(_gather)
