"""The staircase to the reward floor: one read of the table, then padded chunks.

Chunks come in a few fixed shapes, so that batches of any size reuse the same compiled
programs; padding costs K floats a pair.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks, _tables
from lore_jax.backend import sized
from lore_jax.reward import project
from lore_jax.types import FeatureSource, Preferences

_EXACT = lax.Precision.HIGHEST
# Users of a chunk, and more than how many ask for it; on an accelerator padding is
# cheap and a call is not.
_SIZES = (
    ((4096, 2048), (1024, 64), (64, 0)),
    ((131072, 16384), (16384, 2048), (2048, 64), (64, 0)),
)
_FOR_LONG = ((64, 48), (4, 0))  # where a chunk of padding costs more than a call
_LONG = 160
_FEW_PAIRS = 1 << 16
_ROWS = (8192, 256)
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


def visit_rows(features, visit: Callable[[int, np.ndarray], None]) -> None:
    """Calls `visit(first row, block)` for every block of a table, in order.

    A block is dropped before the next one is asked for: one is in memory at a time,
    as long as `visit` keeps none.

    Raises:
      ValueError: a `FeatureSource` yields other rows than its shape says.
    """
    is_source = isinstance(features, FeatureSource)
    source = _tables.blocks(features) if is_source else [features]
    first = 0
    for block in source:
        visit(first, block)
        first += len(block)
        del block


def _visit_pieces(features, visit) -> None:
    """`visit(slice of rows, float[R, D])` with R one of two sizes, padded with 0."""
    large, small = _ROWS

    def block_of(first, block):
        start = 0
        while start < len(block):
            size = large if len(block) - start > large // 4 else small
            rows = np.asarray(block[start : start + size])
            place = slice(first + start, first + start + len(rows))
            if len(rows) < size:
                filler = np.zeros((size - len(rows), rows.shape[1]), rows.dtype)
                rows = np.concatenate([rows, filler])
            visit(place, rows)
            start += size

    visit_rows(features, block_of)


def project_rows(features, basis):
    """Features · V: on the device for JAX arrays, else block by block into NumPy."""
    if isinstance(features, jax.Array):
        return _project(features, basis)
    basis = jnp.asarray(basis)
    dtype = jnp.promote_types(jnp.promote_types(features.dtype, basis.dtype), "f4")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    out = np.empty((features.shape[0], basis.shape[1]), dtype)

    def visit(place, rows):
        out[place] = np.asarray(_project(rows, basis))[: place.stop - place.start]

    _visit_pieces(features, visit)
    return out


def back_project_rows(features, slopes) -> jax.Array:
    """Featuresᵀ · G, float[D, K], accumulated in float32 or wider.

    Args:
      features: float[M, D]: on the device for JAX arrays, else block by block.
      slopes: G, float[M, K].
    """
    if isinstance(features, jax.Array):
        return _back_project(features, slopes)
    slopes = np.asarray(slopes)
    dtype = jnp.promote_types(slopes.dtype, jnp.float32)
    total = jnp.zeros((slopes.shape[1], features.shape[1]), dtype)

    def visit(place, rows):
        nonlocal total
        part = np.zeros((len(rows), slopes.shape[1]), slopes.dtype)
        part[: place.stop - place.start] = slopes[place]
        total = _add_back_projection(total, rows, part)
        total.block_until_ready()  # Or several blocks would wait in memory.

    _visit_pieces(features, visit)
    return total.T


_project = jax.jit(project)


@jax.jit
def _back_project(rows, slopes):
    # The gradient of `project`, in the form that XLA runs fast (see there).
    dtype = jnp.promote_types(slopes.dtype, jnp.float32)
    start = jnp.zeros((rows.shape[1], slopes.shape[1]), dtype)
    return jax.vjp(functools.partial(project, rows), start)[1](slopes)[0]


@functools.partial(jax.jit, donate_argnames="total")
def _add_back_projection(total, rows, slopes):
    return total + _back_project(rows, slopes).T


def on_floor(prefs: Preferences, basis) -> tuple[Preferences, jax.Array]:
    """The same choices with projected features [M, K], and the basis eye(K).

    Whatever asks several questions about one basis asks them here: the table is read
    once.
    """
    proj = project_rows(prefs.features, basis)
    return prefs.replace(features=proj), jnp.eye(proj.shape[1], dtype=proj.dtype)


def checked_floor(
    prefs: Preferences, basis, temperature: float = 1.0
) -> tuple[Preferences, jax.Array]:
    """`on_floor` with the checks of a public function.

    Raises:
      ValueError: the basis or the table is not finite, or their product overflows.
      TypeError: `prefs` is something else.
    """
    _checks.check_type(prefs, Preferences, "prefs")
    _checks.check_basis(basis, prefs.num_features)
    floor, eye = on_floor(prefs, basis)
    _tables.check_projected(floor.features, prefs.features, temperature)
    return floor, eye
