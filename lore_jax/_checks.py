"""Validation of public inputs: every refusal names the argument and the place.

Host checks (`host_*`) run once when data are built; trace checks (`check_*`) run
while tracing and cost nothing once compiled.
"""

import contextlib
import math
import sys
import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lore_jax._backend import tuning

_BLOCK_BYTES = 1 << 26


def warn(message: str) -> None:
    """Warns where the library was called from."""
    own, level, frame = __name__.split(".")[0], 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        *(own, "contextlib", "concurrent", "threading"),
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_type(value, expected: type, name: str) -> None:
    """Raises `TypeError` unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be {expected.__name__}, got {type(value)}")


def check_finite(values, name: str) -> None:
    """Raises where concrete numbers are not finite as JAX holds them; names the place.

    Raises:
      ValueError: a number is NaN, infinite, or overflows JAX's float.
      TypeError: `values` are no real numbers.
    """
    if is_traced(values):
        return
    array = host_array(values, name)
    if array.dtype.kind not in "iu" and not is_floating(array.dtype):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(jax_dtype(array.dtype), copy=False))
    if not finite.all():
        place = tuple(np.argwhere(~finite)[0].tolist())
        where = f"{name}{list(place)}" if place else name
        raise ValueError(f"{name} must be finite; {where} is not: {say(array[place])}")


def check_within(values, name: str, low: float, high: float) -> None:
    """`check_finite`, and `ValueError` for a concrete number outside [low, high]."""
    check_finite(values, name)
    if not is_traced(values):
        array = np.asarray(values)
        wrong = (array < low) | (array > high)
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0].tolist())
            raise ValueError(
                f"{name} must be in [{low:g}, {high:g}]; {name}{list(place)} is "
                f"{array[place]}"
            )


def check_local(values, name: str) -> None:
    """Raises `ValueError` for an array of which other processes hold a part."""
    if isinstance(values, jax.Array) and not is_traced(values):
        if not values.is_fully_addressable:
            raise ValueError(
                f"{name} spans processes: shape {values.shape} lies on "
                f"{len(values.sharding.device_set)} devices, and this process holds "
                f"{len(values.sharding.addressable_devices)} of them. No function "
                "but fit(mesh=…) communicates: pass arrays of this process's devices"
            )


def say(value) -> str:
    """A number, and why it is refused where it is finite itself."""
    overflows = "" if not np.isfinite(value) else ", which overflows JAX's float"
    return f"{value}{overflows}"


def jax_dtype(dtype) -> np.dtype:
    """What JAX makes of a dtype of real numbers: native, 32 bits without x64."""
    dtype = np.dtype(dtype).newbyteorder("=")
    if dtype.kind == "f" and dtype.itemsize > 8:  # longdouble
        dtype = np.dtype(np.float64)
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def check_basis(basis, num_features: int | None = None, name: str = "basis") -> None:
    """Raises unless `basis` is a finite float[D, K] with the right D."""
    shape = np.shape(basis)
    if len(shape) != 2:
        raise ValueError(f"{name} must be float[D, K], got shape {shape}")
    if num_features is not None and shape[0] != num_features:
        raise ValueError(
            f"{name} must have one row per feature: features have D={num_features}, "
            f"{name} has shape {shape}"
        )
    check_finite(basis, name)


def check_weights(weights, num_users: int, rank: int, name: str = "weights") -> None:
    """Raises `ValueError` unless `weights` is float[U, K]."""
    if np.shape(weights) != (num_users, rank):
        raise ValueError(
            f"{name} must be float[U, K] with U={num_users}, K={rank}, got shape "
            f"{np.shape(weights)}"
        )


def check_simplex(weights, name: str = "weights") -> None:
    """Raises `ValueError` for concrete rows off the simplex (logits, say)."""
    if not is_traced(weights):
        rows = host_array(weights, name)
        if rows.dtype.kind not in "iu" and not is_floating(rows.dtype):
            raise TypeError(f"{name} must hold real numbers, got dtype {rows.dtype}")
        rows = rows.astype(np.float64)
        wrong = ~((rows >= 0).all(-1) & (np.abs(rows.sum(-1) - 1.0) < 1e-3))
        if wrong.any():
            where = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"{name} must lie on the simplex (non-negative rows that sum to 1); "
                f"row {where} is {rows[tuple(where)]}. Pass softmax(logits), not "
                "logits"
            )


def check_same_trailing(basis, logits, x, name: str = "logits") -> None:
    """Raises unless finite basis[D, K] and logits[..., K] and x[..., D] agree."""
    check_basis(basis, np.shape(x)[-1] if np.ndim(x) else 0)
    if np.ndim(logits) < 1 or np.shape(logits)[-1] != np.shape(basis)[1]:
        raise ValueError(
            f"{name} must end in K={np.shape(basis)[1]} like basis"
            f"{list(np.shape(basis))}, got shape {np.shape(logits)}"
        )
    check_finite(logits, name)


def check_positive(value, name: str) -> None:
    """Raises `ValueError` unless the concrete number `value` is positive, finite."""
    if is_traced(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        if np.ndim(value) != 0 or np.asarray(value).dtype.kind not in "fiu":
            kind = ValueError if np.ndim(value) else TypeError
            raise kind(f"{name} must be one number, got {value!r}")
        value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_count(value, name: str, least: int = 1) -> None:
    """Raises unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_key(key, name: str = "key") -> None:
    """Raises `TypeError` unless it is one JAX key, typed or of two integers."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == np.uint32 and key.ndim == 1
    if not typed and not raw:
        raise TypeError(f"{name} must be a JAX key like jax.random.key(0), got {key!r}")
    if typed and key.ndim:
        raise ValueError(f"{name} must be one key, got an array of shape {key.shape}")


def check_same_temperature(first, second, names: str) -> None:
    """Raises `ValueError` when two temperatures that must agree do not."""
    if not math.isclose(first, second, rel_tol=1e-6):
        raise ValueError(
            f"temperatures disagree: {names} are {first:g} and {second:g}; weights "
            "learned at one temperature do not mean the same at another"
        )


def host_array(values: Any, name: str) -> np.ndarray:
    """`values` as NumPy reads them; masked entries are refused.

    Raises:
      ValueError: an entry is masked, or an array spans processes.
      TypeError: NumPy cannot read `values`, or only under another process' help.
    """
    if np.ma.isMaskedArray(values):
        mask = np.ma.getmaskarray(values)
        if mask.any():
            place = np.argwhere(mask)[0].tolist()
            raise ValueError(f"{name} must have no masked entry; {name}{place} is")
        return np.asarray(values.data)
    check_local(values, name)
    try:
        return np.asarray(values)
    except Exception as error:
        raise TypeError(
            f"{name} must be an array that NumPy can read, got {type(values)}: {error}"
        ) from error


def is_missing(value: Any) -> bool:
    """True for None, NaN, NaT, NA, null, masked and the empty string."""
    if value is None or value is np.ma.masked:
        return True
    if type(value).__name__ in ("NAType", "NaTType", "NullScalar"):
        return True
    if isinstance(value, str):
        return value == ""
    if isinstance(value, list | tuple | dict) or getattr(value, "ndim", 0):
        return False
    return bool(value != value)


def is_floating(dtype) -> bool:
    """True for every float type, bfloat16 included."""
    return np.dtype(dtype).kind == "f" or "float" in np.dtype(dtype).name


def host_indices(values, size: int, name: str, of: str) -> np.ndarray:
    """Returns `values` as int32[N]; raises where one is outside 0 … size−1."""
    array = host_array(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must be int[N], got shape {array.shape}")
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    wrong = np.flatnonzero((array < 0) | (array >= size))
    if wrong.size:
        raise ValueError(
            f"{name} must be in 0 … {size - 1} ({of}); {name}[{wrong[0]}] is "
            f"{array[wrong[0]]}"
        )
    return array.astype(np.int32)


def host_floats(
    values, length: int, name: str, low: float, high: float
) -> np.ndarray | None:
    """Returns `values` as float32[N] within [low, high]; None stays None."""
    if values is None:
        return None
    array = host_array(values, name)
    if array.dtype.kind == "O" and array.ndim == 1:  # A column with missing entries.
        missing = [is_missing(value) for value in array.tolist()]
        if any(missing):
            place = missing.index(True)
            raise ValueError(f"{name}[{place}] is missing ({array[place]!r})")
        with contextlib.suppress(TypeError, ValueError):
            array = array.astype(np.float64)
    if array.dtype.kind not in "fiub" and not is_floating(array.dtype):
        raise TypeError(f"{name} must hold numbers, got dtype {array.dtype}")
    host_length(array, length, name)
    wrong = np.flatnonzero(~((array >= low) & (array <= high) & np.isfinite(array)))
    if wrong.size:
        raise ValueError(
            f"{name} must be finite and in [{low:g}, {high:g}]; {name}[{wrong[0]}] is "
            f"{array[wrong[0]]}"
        )
    double = array.dtype.kind == "f" and array.dtype.itemsize == 8
    kept = np.float64 if double else np.float32
    limit = float(np.finfo(jax_dtype(kept)).max)
    with np.errstate(over="ignore"):
        total = array.sum(dtype=np.float64)
    if total > limit:
        large = np.flatnonzero(array > limit)
        what = f"their sum is {total:.3g}"
        if large.size:
            what = f"{name}[{large[0]}] is {array[large[0]]:.3g}"
        raise ValueError(
            f"{name} must sum to at most {limit:.3g}, what JAX's float holds; {what}"
        )
    return array.astype(kept)


def host_length(array: np.ndarray, length: int, name: str) -> None:
    """Raises `ValueError` unless `array` is one value per pair."""
    if array.shape != (length,):
        raise ValueError(
            f"{name} must have one entry per pair, shape ({length},), got {array.shape}"
        )


def host_table(features: Any) -> Any:
    """A checked float[M, D] in the dtype that JAX makes of it; copied only for that."""
    if is_traced(features):
        raise TypeError(
            "features is traced: build a Preferences outside of jit, grad and vmap, "
            "and use prefs.replace(features=...) inside"
        )
    if not isinstance(features, jax.Array):
        features = host_array(features, "features")
    host_float_table(features)
    if isinstance(features, jax.Array):
        return features
    return features.astype(jax_dtype(features.dtype), copy=False)


def host_float_table(features, name: str = "features") -> None:
    """Raises unless `features` is a finite floating [M, D]; names the row."""
    if np.ndim(features) != 2:
        raise ValueError(f"{name} must be float[M, D], got shape {np.shape(features)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{name} must have at least one column, got {features.shape}")
    if not is_floating(features.dtype):
        raise TypeError(f"{name} must be floating point, got dtype {features.dtype}")
    if isinstance(features, jax.Array) and tuning(features).reduces_on_device:
        # One read where the table is; a sum that is not finite is looked into below.
        if np.isfinite(jnp.sum(features, dtype=jnp.float32)):
            return
    kept = jax_dtype(features.dtype)
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
                f"{say(raw[row, column])}"
            )


def is_traced(value) -> bool:
    """True while `value` is an abstract value inside a transformation."""
    return isinstance(value, jax.core.Tracer)


def where(reference, values: Any) -> Any:
    """Results where the inputs are: JAX arrays beside a JAX array, else NumPy's.

    Args:
      reference: the table of the inputs, an array or a `FeatureSource`.
      values: a tree of arrays; traced ones stay what they are.
    """
    on_device = isinstance(reference, jax.Array)

    def place(value):
        if value is None or is_traced(value):
            return value
        # `jnp.asarray` would compile a program for every shape.
        return jax.device_put(value) if on_device else np.asarray(value)

    return jax.tree.map(place, values)
