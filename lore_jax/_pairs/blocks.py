"""Reads of a feature table: projection, back-projection, and a visit of all blocks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax import _checks, _tables
from lore_jax.model import project
from lore_jax.preferences import FeatureSource, Preferences

_EXACT = lax.Precision.HIGHEST

_ROWS = (8192, 256)


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
