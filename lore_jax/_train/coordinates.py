"""Coordinates of training: what the ridge shrinks, in the span of the differences.

Let X hold the rows that training pairs use, each minus the mean of the rows that pairs
connect it with, and XᵀX = Q diag(s²) Qᵀ. A difference of two rows of a pair lies in the
span of Q, and every direction of Q is a combination of such differences. With

    V = Q diag(g) θ,   g_i ∝ (s_i² + ε · mean s²)^(−1/2)

the ridge λ/2 ‖θ‖² is a Gaussian prior on V. At ε = ∞ all directions of the embedding
are shrunk alike. At ε = 0 the features are whitened: what stays of them is which item
a row is, where M ≤ D. Rows that no pair uses have no part in it.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lore_jax import _processes
from lore_jax._backend import EXACT, to_array
from lore_jax._pairs.blocks import take_rows
from lore_jax._pairs.distributed import DistributedTable
from lore_jax.data.splits import connected
from lore_jax.preferences import Preferences

_SAMPLE_PAIRS = 4096

_SAMPLE_CELLS = 1 << 27  # features of the rows that the spectrum is measured on

_BLOCK = 8192  # rows

_LEADING = 128

_ROUNDS = 4

_RUNS = 64

_LEAST = 1e-9  # of the mean variance; less is rounding

EXACT_UP_TO = 1024  # directions; of more only the leading ones are decomposed

_TINY = float(np.finfo(np.float32).tiny)


class Coordinates(struct.PyTreeNode):
    """V = tail · θ + Q diag(g) Qᵀθ, or V = Q diag(g) θ where there is no tail.

    Attributes:
      directions: Q, float[D, R], orthonormal columns.
      gains: g, float[R].
      tail: float[], gain of what is orthogonal to Q; None where Q spans everything.
    """

    directions: jax.Array
    gains: jax.Array
    tail: jax.Array | None = None

    @property
    def size(self) -> int:
        """Rows of θ."""
        return self.directions.shape[0 if self.tail is not None else 1]


class Spectrum(NamedTuple):
    """What coordinates are made from; arrays are NumPy.

    Attributes:
      directions: Q, float32[D, R].
      variances: float64[R], s² over their mean.
      tail: variance of every direction orthogonal to Q, in the same unit; None where
        the span of the differences is that of Q.
      moments: float64[R], mean squared difference of a pair along each direction.
      rest: mean squared norm of what is left of a pair's difference.
      span: float32[D, n], orthonormal columns that span the differences where there is
        a tail and they do not span everything; None elsewhere.
    """

    directions: np.ndarray
    variances: np.ndarray
    tail: float | None
    moments: np.ndarray
    rest: float
    span: np.ndarray | None


def measure(prefs: Preferences) -> Spectrum | None:
    """The spectrum of the rows that pairs use; None where they do not differ.

    Up to `EXACT_UP_TO` directions are decomposed. Of more, the leading 128 are found by
    subspace iteration on a sample of rows, and all others share one variance. The
    table is read twice. Of several processes the first decomposes, as rounding may
    differ between their processors.
    """
    rows, sides = _used(prefs)
    table, label = _sampled_rows(prefs.features, rows, sides)
    pairs = _sampled_differences(prefs, rows, sides)
    if not isinstance(prefs.features, DistributedTable):
        return _decompose(table, label, pairs, len(rows))
    found = None
    if _processes.here() == 0:
        found = _decompose(table, label, pairs, len(rows))
    given = {} if found is None else found._asdict()
    given = {name: np.asarray(x) for name, x in given.items() if x is not None}
    shared: dict[str, Any] = dict(_processes.of_first(given))
    for name in ("tail", "rest"):
        if name in shared:
            shared[name] = float(shared[name])
    optional: dict[str, Any] = dict.fromkeys(("tail", "span"))
    return Spectrum(**optional | shared) if shared else None


def _decompose(table, label, pairs, num_rows: int) -> Spectrum | None:
    """`measure` of sampled rows, their components and differences of pairs."""
    scale = max(float(table.max(initial=0)), -float(table.min(initial=0)), _TINY)
    table /= scale  # It is a copy, and in place there need be no other.
    centred, pairs = _centred(table, label), pairs / scale
    sampled = len(table) < num_rows
    exact = min(table.shape) <= EXACT_UP_TO and not sampled
    found = (_decomposed if exact else _leading)(centred)
    if found is None:
        return None
    variances, directions = found
    moments = np.square(pairs @ directions, dtype=np.float64).mean(0)
    if exact:
        mean, tail, rest, span = variances.mean(), None, 0.0, None
    else:
        total = sum(np.square(x, dtype=np.float64).sum() for x in _blocks(centred))
        most = min(table.shape)
        left = max(total - variances.sum(), 0.0) / max(most - len(variances), 1)
        mean = total / most
        tail = max(float(left / mean), _LEAST)
        norms = np.square(pairs, dtype=np.float64).sum(1)
        rest = max(float(norms.mean() - moments.sum()), 0.0)
        narrow = not sampled and num_rows <= table.shape[1]
        span = _orthonormal(centred, label) if narrow else None
    return Spectrum(
        directions.astype(np.float32),
        variances / mean,
        tail,
        moments * scale**2,
        rest * scale**2,
        span,
    )


def make_coordinates(
    spectrum: Spectrum | None,
    smoothing: float,
    dtype,
    num_features: int,
    temperature: float = 1.0,
) -> Coordinates:
    """The coordinates of one ε, in which the RMS norm of a pair's difference is T.

    The loss divides by T: θ of one size gives margins of one size at any T.
    """
    if spectrum is None:  # No pair's rows differ, so that nothing can be learned.
        eye = to_array(np.eye(num_features, 1), dtype)
        return Coordinates(eye, to_array(np.ones(1), dtype))
    gains = _gain(spectrum.variances, smoothing)
    total = (gains**2 * spectrum.moments).sum()
    tail = None
    if spectrum.tail is not None:
        tail = _gain(spectrum.tail, smoothing)
        total += tail**2 * spectrum.rest
    norm = (math.sqrt(total) if total > 0 else 1.0) / temperature
    return Coordinates(
        to_array(spectrum.directions, dtype),
        to_array(gains / norm, dtype),
        None if tail is None else to_array(tail / norm, dtype),
    )


@jax.jit
def basis_of(theta: jax.Array, coordinates: Coordinates) -> jax.Array:
    """V, float[D, K], on raw features."""
    directions, gains, tail = _parts(coordinates)
    if tail is None:
        return _dot(directions, gains * theta)
    along = _dot(directions.T, theta)
    return tail * theta + _dot(directions, (gains - tail) * along)


@jax.jit
def slope_of(slope: jax.Array, coordinates: Coordinates) -> jax.Array:
    """The slope in θ from the slope in V, float[D, K]: the transpose of `basis_of`."""
    directions, gains, tail = _parts(coordinates)
    along = _dot(directions.T, slope)
    if tail is None:
        return gains * along
    return tail * slope + _dot(directions, (gains - tail) * along)


def theta_of(basis: jax.Array, coordinates: Coordinates) -> jax.Array:
    """The θ of a V; what is orthogonal to the span of the differences is left out."""
    directions, gains, tail = _parts(coordinates)
    along = _dot(directions.T, basis)
    if tail is None:
        return along / jnp.where(gains > 0, gains, 1)
    return basis / tail + _dot(directions, (1 / gains - 1 / tail) * along)


def in_span(basis: jax.Array, spectrum: Spectrum | None) -> jax.Array:
    """V without what is orthogonal to the differences, which no reward depends on.

    Adam divides every coordinate by its own scale. With a tail that leaves the span.
    """
    if spectrum is None or spectrum.span is None:
        return basis
    span = to_array(spectrum.span, basis.dtype)
    return _dot(span, _dot(span.T, basis))


def padded(coordinates: Coordinates, size: int) -> Coordinates:
    """The same with columns of zeros up to R = `size`, where there is no tail."""
    more = size - coordinates.gains.shape[0]
    if more <= 0:
        return coordinates
    return Coordinates(
        jnp.pad(coordinates.directions, ((0, 0), (0, more))),
        jnp.pad(coordinates.gains, (0, more)),
    )


def gather_rows(features, rows: np.ndarray) -> np.ndarray:
    """Rows of a table or `FeatureSource`, ascending, in one pass: [n, D]."""
    if isinstance(features, DistributedTable):
        return features.gather_rows(rows)
    return take_rows(features, rows)


def _parts(coordinates: Coordinates):
    return coordinates.directions, coordinates.gains[:, None], coordinates.tail


def _dot(first, second):
    return jnp.matmul(first, second, precision=EXACT)


def _gain(variance, smoothing: float):
    if math.isinf(smoothing):
        return np.ones_like(variance, np.float64)
    return (np.maximum(variance, _LEAST) + smoothing) ** -0.5


def _used(prefs: Preferences) -> tuple[np.ndarray, list[np.ndarray]]:
    """(rows int[n] of pairs that count, ascending; each side as places among them)."""
    sides = [np.asarray(x) for x in (prefs.chosen, prefs.rejected) if x is not None]
    if prefs.sample_weight is not None and (np.asarray(prefs.sample_weight) > 0).any():
        counts = np.asarray(prefs.sample_weight) > 0
        sides = [x[counts] for x in sides]
    rows, place = np.unique(np.concatenate(sides), return_inverse=True)
    return rows, np.split(place, len(sides))


def _sampled_rows(features, rows, sides) -> tuple[np.ndarray, np.ndarray | None]:
    """(table float32[n, D], component int[n] or None for differences)."""
    label = connected(len(rows), *sides) if len(sides) == 2 else None
    most = max(_SAMPLE_CELLS // features.shape[1], 2 * _RUNS)
    if len(rows) > most:  # Runs of rows that stay with those they are compared with.
        order = np.arange(len(rows)) if label is None else label.argsort(kind="stable")
        run = most // _RUNS
        starts = np.linspace(0, len(rows) - run, _RUNS).astype(int)
        some = np.unique(order[(starts[:, None] + np.arange(run)).ravel()])
        rows = rows[some]
        label = (
            None if label is None else np.unique(label[some], return_inverse=True)[1]
        )
    table = np.asarray(gather_rows(features, rows), np.float32)
    return table if table.flags.writeable else table.copy(), label


def _sampled_differences(prefs: Preferences, rows, sides) -> np.ndarray:
    """Differences of evenly spaced pairs, float32[n, D]."""
    most = max(1, min(_SAMPLE_PAIRS, _SAMPLE_CELLS // (8 * prefs.num_features)))
    step = -(-len(sides[0]) // most)
    places = [x[::step] for x in sides]
    some, place = np.unique(np.concatenate(places), return_inverse=True)
    table = gather_rows(prefs.features, rows[some]).astype(np.float32)
    first, *second = np.split(place, len(sides))
    return table[first] - table[second[0]] if second else table[first]


def _centred(table: np.ndarray, label: np.ndarray | None) -> np.ndarray:
    """Rows minus the mean of their component, in place."""
    if label is None:
        return table
    mean = np.zeros((label.max() + 1, table.shape[1]))
    np.add.at(mean, label, table)
    mean /= np.bincount(label)[:, None]
    for block, of in zip(_blocks(table), _blocks(label), strict=True):
        block -= mean[of].astype(np.float32)
    return table


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of a few rows each: what is made of them is small."""
    for start in range(0, len(array), _BLOCK):
        yield array[start : start + _BLOCK]


def _decomposed(table: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(s² float64[R], Q float64[D, R]) from the smaller Gram matrix."""
    wide = table.shape[0] < table.shape[1]
    if wide:
        table = table.astype(np.float64)
        gram = table @ table.T
    else:
        gram = np.zeros((table.shape[1], table.shape[1]))
        for block in _blocks(table):
            block = block.astype(np.float64)
            gram += block.T @ block
    values, vectors = np.linalg.eigh(gram)
    kept = values > _LEAST * max(values[-1], 0)
    if not kept.any():
        return None
    values, vectors = values[kept], vectors[:, kept]
    return values, table.T @ (vectors / np.sqrt(values)) if wide else vectors


def _leading(table: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The same of the leading directions, from a sample of the rows."""
    some = table[:: -(-len(table) // _SAMPLE_PAIRS)]
    if not some.any():
        return None
    start = np.random.default_rng(0).normal(size=(table.shape[1], _LEADING + 16))
    found = np.linalg.qr(start)[0].astype(np.float32)
    for _ in range(_ROUNDS):
        found = np.linalg.qr(some.T @ (some @ found))[0]
    _, values, turn = np.linalg.svd((some @ found).astype(np.float64), False)
    values = values[:_LEADING] ** 2 * (len(table) / len(some))
    return values, (found @ turn.T)[:, :_LEADING]


def _orthonormal(table: np.ndarray, label: np.ndarray | None) -> np.ndarray:
    """Orthonormal columns that span the differences of components: float32[D, n]."""
    if label is not None:
        first = np.unique(label, return_index=True)[1]
        table = np.delete(table - table[first][label], first, axis=0)
    span, triangle = np.linalg.qr(table.T)
    size = np.abs(np.diag(triangle))
    return span[:, size > 1e-6 * size.max(initial=0)]
