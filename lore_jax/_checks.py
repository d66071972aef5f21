"""Validation of public inputs: every refusal names the argument and the place.

Host checks (`host_*`) run once when data are built; trace checks (`check_*`) run
while tracing and cost nothing once compiled. This is the only module that imports
chex.
"""

import math
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lore_jax.backend import sized

_BLOCK_BYTES = 1 << 26


def check_type(value, expected: type, name: str) -> None:
    """Raises `TypeError` unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be {expected.__name__}, got {type(value)}")


def check_finite(values, name: str) -> None:
    """Raises `ValueError` where a concrete array is not finite; names the place."""
    if is_traced(values):
        return
    finite = np.isfinite(np.asarray(values))
    if not finite.all():
        place = tuple(np.argwhere(~finite)[0].tolist())
        raise ValueError(f"{name} must be finite; {name}{list(place)} is not")


def check_basis(basis, num_features: int | None = None) -> None:
    """Raises `ValueError` unless `basis` is float[D, K] with the right D."""
    shape = np.shape(basis)
    if len(shape) != 2:
        raise ValueError(f"basis must be float[D, K], got shape {shape}")
    if num_features is not None and shape[0] != num_features:
        raise ValueError(
            f"basis must have one row per feature: features have D={num_features}, "
            f"basis has shape {shape}"
        )


def check_weights(weights, num_users: int, rank: int, name: str = "weights") -> None:
    """Raises `ValueError` unless `weights` is float[U, K]."""
    chex.assert_shape(
        weights if hasattr(weights, "shape") else np.asarray(weights),
        (num_users, rank),
        custom_message=f"{name} must be float[U, K] with U={num_users}, K={rank}, "
        f"got shape {np.shape(weights)}",
        exception_type=ValueError,
    )


def check_simplex(weights, name: str = "weights") -> None:
    """Raises `ValueError` for concrete rows off the simplex (logits, say)."""
    if not is_traced(weights):
        rows = np.asarray(weights, np.float64)
        wrong = ~((rows >= 0).all(-1) & (np.abs(rows.sum(-1) - 1.0) < 1e-3))
        if wrong.any():
            where = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"{name} must lie on the simplex (non-negative rows that sum to 1); "
                f"row {where} is {rows[tuple(where)]}. Pass softmax(logits), not "
                "logits"
            )


def check_same_trailing(basis, logits, x) -> None:
    """Raises `ValueError` unless x[..., D], basis[D, K] and logits[..., K] agree."""
    check_basis(basis, np.shape(x)[-1] if np.ndim(x) else 0)
    if np.ndim(logits) < 1 or np.shape(logits)[-1] != np.shape(basis)[1]:
        raise ValueError(
            f"logits must end in K={np.shape(basis)[1]} like basis"
            f"{list(np.shape(basis))}, got shape {np.shape(logits)}"
        )


def check_positive(value, name: str) -> None:
    """Raises `ValueError` unless the concrete number `value` is positive, finite."""
    if is_traced(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        if np.ndim(value) != 0:
            raise ValueError(f"{name} must be one number, got {value!r}")
        value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_same_temperature(first, second, names: str) -> None:
    """Raises `ValueError` when two temperatures that must agree do not."""
    if not math.isclose(first, second, rel_tol=1e-6):
        raise ValueError(
            f"temperatures disagree: {names} are {first:g} and {second:g}; weights "
            "learned at one temperature do not mean the same at another"
        )


def host_float_table(features, name: str = "features") -> None:
    """Raises unless `features` is a finite floating [M, D]; names the row."""
    if np.ndim(features) != 2:
        raise ValueError(f"{name} must be float[M, D], got shape {np.shape(features)}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{name} must have at least one column, got {features.shape}")
    if not is_floating(features.dtype):
        raise TypeError(f"{name} must be floating point, got dtype {features.dtype}")
    if isinstance(features, jax.Array) and sized(False, True):
        # One read where the table is; a sum that is not finite is looked into below.
        if np.isfinite(jnp.sum(features, dtype=jnp.float32)):
            return
    step = max(1, _BLOCK_BYTES // (4 * max(1, features.shape[1])))
    for start in range(0, features.shape[0], step):
        block = np.asarray(features[start : start + step])
        if block.dtype.kind != "f":  # bfloat16 and friends
            block = block.astype(np.float32)
        # A row's sum is finite unless an entry is not (or the sum itself overflows):
        # the exact test runs only on blocks that the cheap one suspects.
        with np.errstate(over="ignore", invalid="ignore"):
            suspect = not np.isfinite(block.sum(dtype=np.float64))
        if suspect and not np.isfinite(block).all():
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise ValueError(
                f"{name} must be finite; row {start + row}, column {column} is "
                f"{block[row, column]}"
            )


def is_floating(dtype) -> bool:
    """True for every float type, bfloat16 included."""
    return np.dtype(dtype).kind == "f" or "float" in np.dtype(dtype).name


def host_indices(values, size: int, name: str, of: str) -> np.ndarray:
    """Returns `values` as int32[N]; raises where one is outside 0 … size−1."""
    array = np.asarray(values)
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
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold numbers, got dtype {array.dtype}")
    host_length(array, length, name)
    wrong = np.flatnonzero(~((array >= low) & (array <= high) & np.isfinite(array)))
    if wrong.size:
        raise ValueError(
            f"{name} must be finite and in [{low:g}, {high:g}]; {name}[{wrong[0]}] is "
            f"{array[wrong[0]]}"
        )
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def host_length(array: np.ndarray, length: int, name: str) -> None:
    """Raises `ValueError` unless `array` is one value per pair."""
    if array.shape != (length,):
        raise ValueError(
            f"{name} must have one entry per pair, shape ({length},), got {array.shape}"
        )


def host_unique(ids: Sequence[str], name: str) -> np.ndarray:
    """Returns `ids` as a string array; raises where one stands twice."""
    array = np.asarray(ids, dtype=np.str_)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a list of strings, got shape {array.shape}")
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{name} must be distinct; {values[counts > 1][0]!r} repeats")
    return array


def host_table(features: Any) -> Any:
    """A checked float[M, D]; float64 becomes what JAX would make of it, once."""
    if not isinstance(features, jax.Array):
        features = np.asarray(features)
    host_float_table(features)
    if isinstance(features, jax.Array):
        return features
    return features.astype(jax.dtypes.canonicalize_dtype(features.dtype), copy=False)


def host_rows(values, items, num_rows: int, name: str, of: str) -> np.ndarray:
    """Rows of the table as int32[N], from numbers or from names out of `items`."""
    values = np.asarray(values)
    if values.dtype.kind in "USO" and (values.size or items is not None):
        if items is None:
            raise TypeError(
                f"{name} holds names, so item_ids must name the rows of features"
            )
        values = _lookup(values, items, name, "item_ids")
    return host_indices(values, num_rows, name, of)


def host_users(user, num_users, user_ids):
    """Returns (str[U] or None, int32[N], U) from numbers or names of users."""
    user = np.asarray(user)
    names = None if user_ids is None else host_unique(user_ids, "user_ids")
    if user.dtype.kind in "USO":
        if names is None:
            names = np.unique(user.astype(np.str_))
        user = _lookup(user, names, "user", "user_ids")
    if num_users is None and names is None:
        num_users = max(int(user.max(initial=-1)) + 1, min(1, user.size))
    elif num_users is None and names is not None:
        num_users = len(names)
    if isinstance(num_users, bool) or not isinstance(num_users, int | np.integer):
        raise TypeError(f"num_users must be an integer, got {num_users!r}")
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1, got {num_users}")
    if names is not None and len(names) != num_users:
        raise ValueError(
            f"user_ids must name every user: {len(names)} names for "
            f"num_users={num_users}"
        )
    num_users = int(num_users)
    of = f"num_users is {num_users}"
    return names, host_indices(user, num_users, "user", of), num_users


def _lookup(values, names: np.ndarray, name: str, of: str) -> np.ndarray:
    """Positions of `values` in the distinct `names`."""
    values = values.astype(np.str_)
    by_name = np.argsort(names)
    if not values.size:
        return np.zeros(0, np.int64)
    place = np.searchsorted(names, values, sorter=by_name)
    found = by_name[np.minimum(place, len(names) - 1)]
    wrong = np.flatnonzero(names[found] != values)
    if wrong.size:
        raise ValueError(
            f"{name}[{wrong[0]}] is {str(values[wrong[0]])!r}, which is not in {of}"
        )
    return found


def is_traced(value) -> bool:
    """True while `value` is an abstract value inside a transformation."""
    return isinstance(value, jax.core.Tracer)
