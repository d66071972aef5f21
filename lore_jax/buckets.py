"""The pairs of a fit in a few fixed shapes, users minor-most, in chunks for a cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax.backend import sized
from lore_jax.prior import group_size
from lore_jax.types import Preferences

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
