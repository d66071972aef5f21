"""Sums of entries into rows: a scatter on a CPU, gathers on an accelerator.

An accelerator's scatter adds in any order, or in a fixed one at seventy times the cost.
Here every row knows its entries: rows with similar numbers of entries are padded to one
length, and a sum is a gather and a reduction, with the same bits every time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RowIndex(NamedTuple):
    """Which entries every row sums up.

    Attributes:
      entries: int32[R_b, L_b] of each bucket of rows, places of entries; the number of
        entries stands for none.
      place: int32[M], where each row stands among the rows of all buckets, one after
        another; the number of those rows stands for a row without entries.
    """

    entries: tuple[jax.Array, ...]
    place: jax.Array


def make_row_index(
    row: np.ndarray,
    entry: np.ndarray,
    num_entries: int,
    capacity: np.ndarray,
) -> RowIndex:
    """The index of n terms: entry `entry[i]` is added to row `row[i]`.

    Args:
      row: int[n], in 0 … M − 1.
      entry: int[n], in 0 … `num_entries` − 1.
      num_entries: how many entries there are.
      capacity: int[M], at least the number of terms of each row: indices with the same
        capacity have the same shapes.
    """
    num_rows = len(capacity)
    order = np.argsort(row, kind="stable")
    counts = np.bincount(row, minlength=num_rows)
    starts = np.concatenate([[0], np.cumsum(counts)])
    sorted_entries = np.concatenate([entry[order], [num_entries]])
    lengths = 1 << np.ceil(np.log2(np.maximum(capacity, 1))).astype(int)
    buckets, place = [], np.full(num_rows, -1, np.int64)
    done = 0
    for length in np.unique(lengths[capacity > 0]):
        rows = np.flatnonzero((lengths == length) & (capacity > 0))
        slots = np.arange(length)[None]
        real = slots < counts[rows][:, None]
        taken = np.where(real, starts[rows][:, None] + slots, len(order))
        buckets.append(jnp.asarray(sorted_entries[taken], jnp.int32))
        place[rows] = done + np.arange(len(rows))
        done += len(rows)
    place[place < 0] = done
    return RowIndex(tuple(buckets), jnp.asarray(place, jnp.int32))


def sum_rows(values: jax.Array, index: RowIndex) -> jax.Array:
    """float[K, M], the sums of columns of float[K, S]; no scatter and no sort."""
    zero = jnp.zeros((values.shape[0], 1), values.dtype)
    values = jnp.concatenate([values, zero], axis=1)
    sums = [
        jnp.sum(
            values.at[:, entries.reshape(-1)]
            .get(mode="promise_in_bounds")
            .reshape(values.shape[0], *entries.shape),
            axis=2,
        )
        for entries in index.entries
    ]
    sums = jnp.concatenate([*sums, zero], axis=1)
    return sums.at[:, index.place].get(mode="promise_in_bounds")


class PairIndex(NamedTuple):
    """The rows that pairs add to: one index for each side.

    Attributes:
      chosen: rows of the preferred responses.
      rejected: rows of the others, or None.
    """

    chosen: RowIndex
    rejected: RowIndex | None


class SideCounts(NamedTuple):
    """How many pairs have each row on a side, int[M]; None without a second side."""

    chosen: np.ndarray
    rejected: np.ndarray | None


def count_sides(chosen, rejected, num_rows: int) -> SideCounts:
    """The counts of a data set, which bound those of its splits."""
    count = [
        None if rows is None else np.bincount(np.asarray(rows), minlength=num_rows)
        for rows in (chosen, rejected)
    ]
    return SideCounts(*count)  # pyright: ignore[reportArgumentType]


def make_pair_index(
    chosen, rejected, entry: np.ndarray, num_entries: int, capacity: SideCounts
) -> PairIndex:
    """The index of pairs whose slopes stand at the places `entry`, int[N]."""
    one = make_row_index(np.asarray(chosen), entry, num_entries, capacity.chosen)
    if rejected is None or capacity.rejected is None:
        return PairIndex(one, None)
    two = make_row_index(np.asarray(rejected), entry, num_entries, capacity.rejected)
    return PairIndex(one, two)


def sum_pairs(slopes: jax.Array, index: PairIndex) -> jax.Array:
    """float[K, M], slopes float[K, S] added to chosen and taken from rejected rows."""
    total = sum_rows(slopes, index.chosen)
    if index.rejected is None:
        return total
    return total - sum_rows(slopes, index.rejected)
