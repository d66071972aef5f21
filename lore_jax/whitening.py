"""Coordinates in which a typical pair's margin is O(1), whatever the features' scale.

    V = whitening · θ

They come from second moments that are accumulated in float64 over blocks of rows, so
that a table in memory and a `FeatureSource` get the same ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lore_jax.floor import visit_rows
from lore_jax.types import FeatureSource, Preferences

_EXACT = lax.Precision.HIGHEST
_SCALE_PAIRS = 8192
_SCALE_CELLS = 1 << 23  # features of the pairs that the scale is measured on
_PIECE = 1024
_TINY = np.finfo(np.float32).tiny
WHITEN_UP_TO = 1024


def whiten(prefs: Preferences, dtype) -> jax.Array:
    """The coordinates of θ: V = whitening · θ makes a typical pair's margin O(1).

    Where min(M, D) ≤ 1024 the table is whitened: float[D, R] spans its R ≥ 1
    directions with equal variance. Elsewhere float[], one scale. Either way the RMS
    norm of a pair's difference becomes 1, so the scale of the features cancels.
    A source is read two or three times.
    """
    if min(prefs.features.shape) > WHITEN_UP_TO:
        return jnp.asarray(1 / _difference_norm(prefs, None), dtype)
    table = prefs.features
    if not isinstance(table, FeatureSource):
        table = np.asarray(table)
    centred = prefs.rejected is not None
    wide = table.shape[0] < table.shape[1]
    matrix = (_whiten_wide if wide else _whiten_tall)(table, centred)
    if matrix is None:
        return jnp.asarray(1.0, dtype)
    return jnp.asarray(matrix / _difference_norm(prefs, matrix), dtype)


def _whiten_tall(table, centred: bool) -> np.ndarray | None:
    """From the Gram matrix of the columns; None for a table of zeros."""
    peak, mean, gram = 0.0, 0.0, 0.0

    def look(_, block):
        nonlocal peak, mean
        for rows in _pieces(block):
            peak = max(peak, np.abs(rows).max())
            mean = mean + rows.sum(0) / table.shape[0]

    def multiply(_, block):
        nonlocal gram
        for rows in _pieces(block):
            rows = rows / max(peak, _TINY)
            rows = rows - mean / max(peak, _TINY) if centred else rows
            gram = gram + rows.T @ rows

    visit_rows(table, look)
    visit_rows(table, multiply)
    kept = _leading(gram)
    return None if kept is None else kept[1] / np.sqrt(kept[0])


def _whiten_wide(table, centred: bool) -> np.ndarray | None:
    """From the Gram matrix of the rows. The result is as large as the table."""
    rows = np.empty(table.shape, np.float32)

    def visit(first, block):
        rows[first : first + len(block)] = block

    visit_rows(table, visit)
    rows /= max(np.abs(rows).max(), _TINY)
    if centred:
        rows -= rows.mean(0, dtype=np.float64).astype(np.float32)
    gram = sum(x.T @ x for x in _pieces(rows.T))
    kept = _leading(gram)
    if kept is None:
        return None
    values, vectors = kept
    return rows.T @ (vectors / values)


def _pieces(block):
    """Rows of a block as float64, 1024 at a time."""
    for start in range(0, len(block), _PIECE):
        yield np.asarray(block[start : start + _PIECE], np.float64)


def _leading(gram) -> tuple[np.ndarray, np.ndarray] | None:
    """Eigenvalues and vectors of what is more than rounding."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-9 * max(values[-1], 0)
    return (values[kept], vectors[:, kept]) if kept.any() else None


def _difference_norm(prefs: Preferences, matrix) -> float:
    """RMS norm of (x_chosen − x_rejected) · matrix over evenly spaced pairs."""
    most = max(1, min(_SCALE_PAIRS, _SCALE_CELLS // prefs.num_features))
    step = -(-prefs.num_pairs // most)
    sides = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    rows = np.concatenate([np.asarray(x)[::step] for x in sides])
    distinct, place = np.unique(rows, return_inverse=True)
    table = gather_rows(prefs.features, distinct)
    total, places = 0.0, np.split(place, len(sides))
    for start in range(0, len(places[0]), _PIECE):
        x = [table[p[start : start + _PIECE]].astype(np.float64) for p in places]
        z = x[0] if len(x) == 1 else x[0] - x[1]
        total += ((z if matrix is None else z @ matrix) ** 2).sum()
    norm = np.sqrt(total / len(places[0]))
    return float(norm) if norm > 0 else 1.0


def gather_rows(features, rows: np.ndarray) -> np.ndarray:
    """Rows of a table or `FeatureSource`, ascending, in one pass: [n, D]."""
    if not isinstance(features, FeatureSource):
        return np.asarray(features[rows])
    out = np.empty((len(rows), features.shape[1]), features.dtype)

    def visit(first, block):
        low, high = np.searchsorted(rows, [first, first + len(block)])
        out[low:high] = block[rows[low:high] - first]

    visit_rows(features, visit)
    return out


def basis_of(theta: jax.Array, whitening: jax.Array) -> jax.Array:
    """V = whitening · θ, float[D, K], on raw features."""
    if whitening.ndim == 0:
        return whitening * theta
    return jnp.matmul(whitening, theta, precision=_EXACT)


def slope_of(slope: jax.Array, whitening: jax.Array) -> jax.Array:
    """The slope in θ from the slope in V, float[D, K]: whiteningᵀ · slope."""
    if whitening.ndim == 0:
        return whitening * slope
    return jnp.matmul(whitening.T, slope, precision=_EXACT)


def theta_of(basis: jax.Array, whitening: jax.Array) -> jax.Array:
    """The θ whose rewards are closest to those of V: least squares."""
    if whitening.ndim == 0:
        return basis / whitening
    return jnp.linalg.lstsq(whitening, basis)[0]
