"""Tables of features: checked where they are, or through what a read of them gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lore_jax import _checks
from lore_jax.backend import sized

_BLOCK_BYTES = 1 << 26


def host_table(features: Any) -> Any:
    """A checked float[M, D] in the dtype that JAX makes of it; copied only for that."""
    if _checks.is_traced(features):
        raise TypeError(
            "features is traced: build a Preferences outside of jit, grad and vmap, "
            "and use prefs.replace(features=...) inside"
        )
    if not isinstance(features, jax.Array):
        features = _checks.host_array(features, "features")
    host_float_table(features)
    if isinstance(features, jax.Array):
        return features
    return features.astype(_checks.jax_dtype(features.dtype), copy=False)


def host_float_table(features, name: str = "features") -> None:
    """Raises unless `features` is a finite floating [M, D]; names the row."""
    if np.ndim(features) != 2:
        raise ValueError(f"{name} must be float[M, D], got shape {np.shape(features)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{name} must have at least one column, got {features.shape}")
    if not _checks.is_floating(features.dtype):
        raise TypeError(f"{name} must be floating point, got dtype {features.dtype}")
    if isinstance(features, jax.Array) and sized(False, True):
        # One read where the table is; a sum that is not finite is looked into below.
        if np.isfinite(jnp.sum(features, dtype=jnp.float32)):
            return
    kept = _checks.jax_dtype(features.dtype)
    step = max(1, _BLOCK_BYTES // (4 * max(1, features.shape[1])))
    for start in range(0, features.shape[0], step):
        raw = np.asarray(features[start : start + step])
        # A row's sum is finite unless an entry is not (or the sum itself overflows):
        # the exact test runs only on blocks that the cheap one suspects.
        with np.errstate(over="ignore", invalid="ignore"):
            block = raw.astype(kept, copy=False)
            if block.dtype.kind != "f":  # bfloat16 and friends
                block = block.astype(np.float32)
            suspect = not np.isfinite(block.sum(dtype=np.float64))
        if suspect and not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise ValueError(
                f"{name} must be finite; row {start + row}, column {column} is "
                f"{_checks.say(raw[row, column])}"
            )


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
    limit = float(jnp.finfo(proj.dtype).max) / 4 * min(1.0, float(temperature))
    largest = jnp.max(jnp.abs(proj)) if isinstance(proj, jax.Array) else _largest(proj)
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
