"""The rows of a table that pairs use."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax._backend import to_array, tuning
from lore_jax._ids import Ids
from lore_jax.preferences import FeatureSource, Preferences


def used_rows(chosen, rejected) -> np.ndarray:
    """int[n], the rows on either side of pairs, ascending."""
    sides = [np.asarray(x) for x in (chosen, rejected) if x is not None]
    return np.unique(np.concatenate(sides))


def take_rows(prefs: Preferences, rows: np.ndarray) -> Preferences:
    """The same pairs over the given rows of the table, which hold all that they use."""
    place = np.zeros(prefs.features.shape[0], np.int32)
    place[rows] = np.arange(len(rows), dtype=np.int32)
    features, ids = prefs.features, prefs.ids
    taken = (
        RowSource(features, rows)
        if isinstance(features, FeatureSource)
        else features[rows]
    )
    if ids is not None and ids.items is not None:
        ids = Ids(ids.users, np.asarray(ids.items)[rows], ids.groups)
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
    rows = used_rows(prefs.chosen, prefs.rejected)
    names = None if prefs.ids is None else prefs.ids.items
    if names is not None and isinstance(prefs.features, np.ndarray):
        rows = rows[np.argsort(np.asarray(names)[rows], kind="stable")]
    whole = prefs.features.shape[0]
    if len(rows) == whole and (rows == np.arange(whole)).all():
        return prefs
    return take_rows(prefs, rows)


def aligned_rows(features) -> jax.Array:
    """The table where it is trained on, with rows of zeros up to `row_multiple`.

    Slopesᵀ · features is a sum over rows. On a GPU, XLA's split of it pads the rows of
    1,000,000 × 4096 to a multiple of 4 × the number of parts: a copy, which makes that
    product cost three reads instead of one (16.8 against 5.8 ms on an H100).

    References:
      XLA, `splitk_rewriter.cc`.
    """
    features = to_array(features)
    more = -len(features) % tuning(features).row_multiple
    return jnp.pad(features, ((0, more), (0, 0))) if more else features


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
