"""Reads of a feature table: projection, back-projection, and a visit of all blocks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _equations, _tables
from lore_jax._backend import tuning
from lore_jax.preferences import FeatureSource

_ROWS = (8192, 256)  # of a block that is projected, padded with zeros


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


def take_rows(features, rows: np.ndarray) -> np.ndarray:
    """Rows of a table or `FeatureSource`, in any order, in one pass: [n, D]."""
    if not isinstance(features, FeatureSource):
        if tuning(features).branches:  # On a CPU no program for every shape.
            features = np.asarray(features)
        return np.asarray(features[rows])
    out = np.empty((len(rows), features.shape[1]), features.dtype)
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]

    def visit(first, block):
        low, high = np.searchsorted(ascending, [first, first + len(block)])
        out[order[low:high]] = block[ascending[low:high] - first]

    visit_rows(features, visit)
    return out


def _visit_pieces(features, visit) -> None:
    """`visit(slice of rows, float[R, D])` with R one of two sizes, padded with 0.

    What NumPy multiplies needs no fixed size, and no copy for the padding.
    """
    large, small = _ROWS
    padded = not _by_numpy(features)

    def block_of(first, block):
        start = 0
        while start < len(block):
            size = large if len(block) - start > large // 4 else small
            rows = np.asarray(block[start : start + size])
            place = slice(first + start, first + start + len(rows))
            if padded and len(rows) < size:
                filler = np.zeros((size - len(rows), rows.shape[1]), rows.dtype)
                rows = np.concatenate([rows, filler])
            visit(place, rows)
            start += size

    visit_rows(features, block_of)


def project_rows(features, basis):
    """Features · V: on the device for JAX arrays, else block by block into NumPy."""
    if isinstance(features, jax.Array):
        return _project(features, basis)
    dtype = jnp.promote_types(jnp.promote_types(features.dtype, basis.dtype), "f4")
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    out = np.empty((features.shape[0], basis.shape[1]), dtype)
    product = _host_product(features, basis, dtype)

    def visit(place, rows):
        out[place] = product(rows)[: place.stop - place.start]

    _visit_pieces(features, visit)
    return out


def _host_product(features, basis, dtype: np.dtype):
    """A function rows float[R, D] → rows · V as NumPy."""
    if not _by_numpy(features):
        basis = jnp.asarray(basis)
        return lambda rows: np.asarray(_project(rows, basis))
    rank = basis.shape[1]
    wide = np.zeros((basis.shape[0], _width(rank)), dtype)
    wide[:, :rank] = np.asarray(basis)

    def product(rows):
        # What is not finite is refused with its place, once all of it is known.
        with np.errstate(over="ignore", invalid="ignore"):
            return (rows.astype(dtype, copy=False) @ wide)[:, :rank]

    return product


def _by_numpy(features) -> bool:
    """Whether NumPy multiplies a table on the host.

    On a CPU it reads rows where they are. A compiled program gets a copy, which takes
    39 times as long as the product (20,000 × 4,096, K = 5).
    """
    return tuning().branches and np.dtype(features.dtype) in (np.float32, np.float64)


def _width(rank: int) -> int:
    """Columns that a CPU's matrix product is made for."""
    return -(-rank // 8) * 8


def back_project_rows(features, slopes) -> jax.Array:
    """Featuresᵀ · G, float[D, K], accumulated in float32 or wider.

    Args:
      features: float[M, D]: on the device for JAX arrays, else block by block.
      slopes: G, float[M, K].
    """
    if isinstance(features, jax.Array):
        return _back_project(features, slopes)
    slopes = np.asarray(slopes)
    dtype = np.dtype(jnp.promote_types(slopes.dtype, jnp.float32))
    if _by_numpy(features):
        return _host_back_project(features, slopes, dtype)
    total = jnp.zeros((slopes.shape[1], features.shape[1]), dtype)

    def visit(place, rows):
        nonlocal total
        part = np.zeros((len(rows), slopes.shape[1]), slopes.dtype)
        part[: place.stop - place.start] = slopes[place]
        total = _add_back_projection(total, rows, part)
        total.block_until_ready()  # Or several blocks would wait in memory.

    _visit_pieces(features, visit)
    return total.T


def _host_back_project(features, slopes: np.ndarray, dtype: np.dtype) -> jax.Array:
    rank = slopes.shape[1]
    total = np.zeros((_width(rank), features.shape[1]), dtype)

    def visit(place, rows):
        part = np.zeros((len(rows), len(total)), dtype)
        part[: place.stop - place.start, :rank] = slopes[place]
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(total, part.T @ rows.astype(dtype, copy=False), out=total)

    _visit_pieces(features, visit)
    return jnp.asarray(total[:rank].T)


_project = jax.jit(_equations.product)


@jax.jit
def _back_project(rows, slopes):
    # The gradient of `product`, in the form that XLA runs fast (see there).
    dtype = jnp.promote_types(slopes.dtype, jnp.float32)
    start = jnp.zeros((rows.shape[1], slopes.shape[1]), dtype)
    return jax.vjp(functools.partial(_equations.product, rows), start)[1](slopes)[0]


@functools.partial(jax.jit, donate_argnames="total")
def _add_back_projection(total, rows, slopes):
    return total + _back_project(rows, slopes).T
