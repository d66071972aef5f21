"""Checks of tables of features, of what a read of them gives, and of padded pairs."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks
from lore_jax._backend import tuning


def rounded(table: np.ndarray, dtype: Any) -> np.ndarray:
    """A finite float[M, D] in another dtype; raises `ValueError` where it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = table.astype(dtype)
    finite = np.isfinite(out)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        value = table[row, column]
        why = f", which overflows {np.dtype(dtype)}" if np.isfinite(value) else ""
        raise ValueError(
            f"features must be finite in {np.dtype(dtype)}; row {row}, column {column} "
            f"is {value}{why}"
        )
    return out


def check_source(features: Any) -> None:
    """Raises unless a `FeatureSource` promises a float[M, D]; arrays pass."""
    if not hasattr(features, "blocks"):
        return
    shape = tuple(features.shape)
    if len(shape) != 2 or not all(isinstance(n, int | np.integer) for n in shape):
        raise ValueError(f"features.shape must be (M, D), got {shape}")
    if not shape[1]:
        raise ValueError(f"features must have at least one column, got {shape}")
    if not _checks.is_floating(features.dtype):
        raise TypeError(f"features must be floating point, got dtype {features.dtype}")


def num_columns(features: Any) -> int:
    """D of a float[..., D] or a `FeatureSource`; raises for another dtype."""
    shape = np.shape(features)
    if not shape:
        raise ValueError(f"features must be float[..., D], got shape {shape}")
    dtype = getattr(features, "dtype", None)
    if dtype is None or not isinstance(features, jax.Array | np.ndarray):
        check_source(features)
        dtype = np.dtype(dtype) if dtype is not None else np.asarray(features).dtype
    if dtype.kind not in "iu" and not _checks.is_floating(dtype):
        raise TypeError(f"features must hold real numbers, got dtype {dtype}")
    return shape[-1]


def num_rows(features: Any) -> int:
    """M of a float[M, D] or a `FeatureSource`."""
    shape = np.shape(features)
    if len(shape) != 2:
        raise ValueError(f"features must be float[M, D], got shape {shape}")
    return shape[0]


def blocks(features: Any) -> Iterator[Any]:
    """The blocks of a `FeatureSource`, checked: M rows of D columns in all.

    Raises:
      ValueError: it yields other rows than its shape says.
      TypeError: a block is no array of floats.
    """
    promised = f"features.blocks() must yield M={features.shape[0]} rows of one table"
    first = 0
    for block in features.blocks():
        _checks.check_local(block, "features")
        kind = getattr(block, "dtype", type(block))
        if not isinstance(kind, np.dtype) or not _checks.is_floating(kind):
            raise TypeError(
                "features.blocks() must yield arrays float[rows, D]; the block at row "
                f"{first} holds {kind}"
            )
        if np.ndim(block) != 2 or block.shape[1] != features.shape[1]:
            raise ValueError(
                f"features.blocks() must yield float[rows, D] with "
                f"D={features.shape[1]}; the block at row {first} has shape "
                f"{np.shape(block)}"
            )
        if first + len(block) > features.shape[0]:
            raise ValueError(f"{promised}, got at least {first + len(block)}")
        first += len(block)
        yield block
        del block
    if first != features.shape[0]:
        raise ValueError(f"{promised}, got {first}")


def check_projected(proj, features, temperature: float = 1.0) -> None:
    """Raises `ValueError` where concrete rewards features · V are not finite.

    A row that is not finite comes from a row of the table that is not, or from an
    overflow. The table is looked at in that row only. Rewards whose differences,
    divided by T, overflow are refused too.

    Args:
      proj: float[..., K].
      features: float[..., D] or a `FeatureSource`; V is finite.
      temperature: T.
    """
    if _checks.is_traced(proj) or not np.size(proj):
        return
    limit = float(jnp.finfo(proj.dtype).max) / 4
    if not _checks.is_traced(temperature):
        limit *= min(1.0, float(temperature))
    on_device = isinstance(proj, jax.Array) and tuning(proj).reduces_on_device
    largest = jnp.max(jnp.abs(proj)) if on_device else _largest(np.asarray(proj))
    if float(largest) <= limit:
        return
    if _checks.is_traced(features):
        return
    found = np.asarray(proj, np.float64)
    wrong = ~(np.abs(found) <= limit).all(-1)
    place = tuple(np.argwhere(wrong)[0].tolist())
    row = np.asarray(_row(features, place))
    entry = np.flatnonzero(~np.isfinite(row.astype(np.float64)))
    at = f"row {place[0]}" if len(place) == 1 else f"row {list(place)}"
    if entry.size:
        raise ValueError(
            f"features must be finite; {at}, column {entry[0]} is "
            f"{_checks.say(row[entry[0]])}"
        )
    raise ValueError(
        f"features · basis must stay below {limit:.3g} in {proj.dtype} (a quarter of "
        f"what overflows, times T where T is below 1); {at} gives "
        f"{np.abs(found[place]).max():.3g}. Scale the features or the basis down"
    )


def _largest(proj: np.ndarray):
    with np.errstate(invalid="ignore"):
        return max(proj.max(), -proj.min())


def _row(features, place: tuple[int, ...]):
    """One row of a table, float[D]."""
    if not hasattr(features, "blocks"):
        return features[place]
    row = place[0]
    for block in features.blocks():
        if row < len(block):
            return block[row]
        row -= len(block)
    raise ValueError(f"features.blocks() yields no row {place[0]} a second time")


def check_pairs(z, weight, label=None) -> None:
    """Raises unless finite z[U, P, K], sample_weight[U, P] ≥ 0 and label[U, P] agree.

    Raises:
      ValueError: a shape is wrong, or a concrete number is not finite or negative.
      TypeError: an argument holds no real numbers.
    """
    shape = np.shape(z)
    if len(shape) != 3 or not shape[2]:
        raise ValueError(f"z must be float[U, P, K], got shape {shape}")
    if not shape[0] or not shape[1]:
        raise ValueError(
            f"z must hold at least one user and one pair, got shape {shape}"
        )
    for name, values in (("sample_weight", weight), ("label", label)):
        if values is not None and np.shape(values) != shape[:2]:
            raise ValueError(
                f"{name} must be float[U, P] with U={shape[0]}, P={shape[1]} like z, "
                f"got shape {np.shape(values)}"
            )
    _checks.check_finite(z, "z")
    _checks.check_within(weight, "sample_weight", 0, np.inf)
    if label is not None:
        _checks.check_within(label, "label", 0, 1)


def check_users(values, name: str, z) -> None:
    """Raises unless `values` is a finite float[U, K] ≥ 0 like z[U, P, K]."""
    shape = (np.shape(z)[0], np.shape(z)[2])
    if np.shape(values) != shape:
        raise ValueError(
            f"{name} must be float[U, K] with U={shape[0]}, K={shape[1]} like z, got "
            f"shape {np.shape(values)}"
        )
    _checks.check_within(values, name, 0, np.inf)
