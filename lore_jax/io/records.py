"""What the numbers of a record must mean: checks of fits, priors and users.

A file that passes its digest holds what was saved. These checks refuse what should
never have been saved, and what was put together by hand.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lore_jax import _checks
from lore_jax._ids import Ids
from lore_jax.config import Marginal, PriorSearch, PublishedAlternating, PublishedJoint
from lore_jax.model import RewardModel, RewardParams
from lore_jax.prior import Prior
from lore_jax.results import Fitted, History
from lore_jax.streaming import UserStates

RECIPES = Marginal, PriorSearch, PublishedJoint, PublishedAlternating
_CLOSE = 1e-3  # of sums that are 1, as `_checks.check_simplex` allows

_ROUNDING = 1e-5  # of sums of float32 numbers, relative


_FINGERPRINT = re.compile(r"[0-9a-f]{32}")

_RANGES = {  # of the prior's numbers: least, whether that is excluded, infinity allowed
    "concentration": (0.0, False, True),
    "tempering": (0.0, False, False),
    "variance_scale": (0.0, False, False),
    "decay": (-math.inf, True, False),
    "margin_scale": (0.0, True, False),
}


_FIT = {  # shapes by letters; every letter has one size
    "model.basis": "DK",
    "model.prior.atoms": "AK",
    "model.prior.log_weights": "A",
    "weights": "UK",
    "logits": "UK",
    "history.loss": "S",
    "history.weights_norm": "S",
    "history.basis_norm": "S",
    "history.validation": "C",
    "history.validation_steps": "C",
    "unpruned.basis": "DJ",
    "unpruned.logits": "UJ",
    "kept": "K",
}


def check_prior(prior: Any) -> None:
    """Raises `ValueError` unless a prior's numbers are those of a mixture."""
    if not isinstance(prior, Prior):
        raise ValueError(f"prior must be a Prior, got {type(prior)}")
    _checks.check_simplex(prior.atoms, "atoms")
    log_weights = np.asarray(prior.log_weights, np.float64)
    if not (log_weights <= _CLOSE).all():
        raise ValueError("log_weights must be log π ≤ 0, without NaN")
    if not abs((total := float(np.exp(log_weights).sum())) - 1) < _CLOSE:
        raise ValueError(f"log_weights must be normalised: Σ π is {total:g}")
    for name, (least, strict, infinite) in _RANGES.items():
        number = getattr(prior, name)
        if np.shape(number) != ():
            raise ValueError(f"{name} must be one number, got {number!r}")
        value = float(number)
        legal = value > least if strict else value >= least
        if not legal or (value == math.inf and not infinite):
            raise ValueError(f"{name} is {value:g}, which is out of its range")


def _check_temperature(temperature: Any) -> None:
    if not isinstance(temperature, float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature!r}, expected above 0")


def check_fit(fitted: Fitted) -> None:
    """Raises `ValueError` unless the parts of a fit agree with one another."""
    if not isinstance(fitted.model, RewardModel):
        raise ValueError(f"model must be a RewardModel, got {type(fitted.model)}")
    if not isinstance(fitted.recipe, RECIPES):
        raise ValueError(f"recipe must be a recipe, got {fitted.recipe!r}")
    if not isinstance(fitted.unpruned, RewardParams | None):
        raise ValueError(f"unpruned must be RewardParams, got {fitted.unpruned!r}")
    if not isinstance(fitted.history, History):
        raise ValueError(f"history must be a History, got {type(fitted.history)}")
    arrays = _arrays_of_fit(fitted)
    _check_shapes(arrays)
    model, recipe, history = fitted.model, fitted.recipe, fitted.history
    _check_temperature(model.temperature)
    wanted = getattr(recipe, "temperature", model.temperature)
    if not math.isclose(model.temperature, wanted, rel_tol=1e-6):
        raise ValueError(
            f"temperature {model.temperature:g}, but that of its recipe is {wanted:g}"
        )
    if model.prior is not None:
        check_prior(model.prior)
    finite = ("model.basis", "logits", "weights", "unpruned.basis", "unpruned.logits")
    for name in (*finite, "history.loss"):
        if name in arrays:
            _checks.check_finite(arrays[name], name)
    _check_weights(arrays)
    steps = getattr(recipe, "num_steps", 0)
    _check_history(history, arrays, steps)
    if fitted.ids is not None:
        if not isinstance(fitted.ids, Ids):
            raise ValueError(f"ids must be Ids, got {type(fitted.ids)}")
        users = fitted.user_ids
        if users is not None and len(users) != len(arrays["weights"]):
            raise ValueError(
                f"user_ids names {len(users)} users, but weights have shape "
                f"{arrays['weights'].shape}"
            )
    if fitted.kept is not None:
        _check_kept(arrays)


def _arrays_of_fit(fitted: Fitted) -> dict[str, np.ndarray]:
    """The arrays of a fit by their place; raises where one is missing."""
    arrays = {}
    for place in _FIT:
        value: Any = fitted
        for name in place.split("."):
            value = getattr(value, name, None)
            if value is None:
                break
        if value is not None:
            if not isinstance(value, np.ndarray | jax.Array):
                raise ValueError(f"{place} must be an array, got {type(value)}")
            arrays[place] = np.asarray(value)
        elif not place.startswith(("model.prior", "unpruned", "kept")):
            raise ValueError(f"{place} is missing")
    parts = {"unpruned.basis", "unpruned.logits", "kept"}
    if parts & set(arrays) and not parts <= set(arrays):
        raise ValueError(f"it holds only part of {sorted(parts)}")
    return arrays


def _check_shapes(arrays: Mapping[str, np.ndarray]) -> None:
    """Dtypes, and one size for each letter."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        letters = _FIT[name]
        kind = "i" if name in ("kept", "history.validation_steps") else "f"
        if array.dtype.kind != kind:
            raise ValueError(f"{name} has dtype {array.dtype}")
        if array.ndim != len(letters):
            raise ValueError(
                f"{name} must be [{', '.join(letters)}], got {array.shape}"
            )
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has shape {array.shape}, but {letter} is "
                    f"{sizes[letter]} elsewhere in the fit"
                )


def _check_weights(arrays: Mapping[str, np.ndarray]) -> None:
    weights = np.asarray(arrays["weights"], np.float64)
    _checks.check_simplex(weights, "weights")
    logits = np.asarray(arrays["logits"], np.float64)
    share = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    share /= share.sum(axis=1, keepdims=True)
    wrong = np.flatnonzero((np.abs(share - weights) > _CLOSE).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"weights must be softmax(logits); of user {wrong[0]} they are "
            f"{weights[wrong[0]]}, softmax(logits) is {share[wrong[0]]}"
        )


def _check_history(history: History, arrays, num_steps: int) -> None:
    for name in ("loss", "weights_norm", "basis_norm", "validation"):
        values = arrays[f"history.{name}"]
        if (values < 0).any() or (name != "validation" and np.isnan(values).any()):
            raise ValueError(f"history.{name} must hold numbers of at least 0")
    if (steps := len(arrays["history.loss"])) > num_steps:
        raise ValueError(
            f"history.loss has {steps} steps, but recipe.num_steps is {num_steps}"
        )
    counts = arrays["history.validation_steps"].astype(np.int64)
    if counts.size and not (
        counts[0] >= 0 and counts[-1] <= num_steps and (np.diff(counts) >= 0).all()
    ):
        raise ValueError(
            f"history.validation_steps must ascend up to {num_steps}, got {counts}"
        )
    for name in ("selection", "heldout"):
        rows = getattr(history, name)
        if not isinstance(rows, tuple) or not all(isinstance(x, dict) for x in rows):
            raise ValueError(f"history.{name} must be a tuple of objects")
    if not isinstance(history.starts, dict | None):
        raise ValueError("history.starts must be an object")


def _check_kept(arrays: Mapping[str, np.ndarray]) -> None:
    """`kept` are the columns of the unpruned arrays that the others hold."""
    kept, size = arrays["kept"], arrays["unpruned.basis"].shape[1]
    if (kept < 0).any() or (kept >= size).any() or (np.diff(kept) <= 0).any():
        raise ValueError(f"kept must ascend within 0 … {size - 1}, got {kept}")
    for name in ("basis", "logits"):
        own = "model.basis" if name == "basis" else name
        if not np.array_equal(arrays[own], arrays[f"unpruned.{name}"][:, kept]):
            raise ValueError(f"{name} must be the columns {kept} of unpruned.{name}")


def check_users(state: UserStates) -> None:
    """Raises `ValueError` unless the sums of users can be sums over pairs."""
    check_prior(state.prior)
    _check_temperature(state.temperature)
    if not isinstance(state.fingerprint, str) or not _FINGERPRINT.fullmatch(
        state.fingerprint
    ):
        raise ValueError(
            f"fingerprint must be 32 hex digits, got {state.fingerprint!r}"
        )
    users, (atoms, rank) = np.shape(state.num_pairs), np.shape(state.prior.atoms)
    shapes = {
        "table": (*users, atoms),
        "linear": (*users, rank),
        "quadratic": (*users, rank * (rank + 1) // 2),
        "num_pairs": users,
    }
    dtype = np.asarray(state.prior.atoms).dtype
    for name, shape in shapes.items():
        values = np.asarray(getattr(state, name))
        if values.shape != shape or values.dtype != dtype or len(users) != 1:
            raise ValueError(
                f"{name} must be {dtype}{list(shape)}, got "
                f"{values.dtype}{list(values.shape)}"
            )
        _checks.check_finite(values, name)
    if state.ids is not None and (
        not isinstance(state.ids, Ids)
        or state.user_ids is None
        or len(state.user_ids) != users[0]
    ):
        raise ValueError(f"ids must name every one of {users[0]} users")
    count = np.asarray(state.num_pairs, np.float64)
    table = np.asarray(state.table, np.float64)
    linear = np.asarray(state.linear, np.float64)
    square = np.asarray(state.quadratic, np.float64)
    _refuse("num_pairs", count < 0, "at least 0")
    above = table.max(axis=1, initial=0.0) > _ROUNDING * (1 + count)
    _refuse("table", above, "at most 0, log-likelihoods")
    rows, columns = np.triu_indices(rank)
    diagonal = square[:, rows == columns]
    _refuse("quadratic", (diagonal < 0).any(axis=1), "at least 0 on its diagonal")
    bound = np.sqrt(diagonal[:, rows] * diagonal[:, columns])
    wide = np.abs(square) > bound * (1 + _ROUNDING) + _ROUNDING * diagonal.max(
        axis=1, keepdims=True, initial=0.0
    )
    _refuse("quadratic", wide.any(axis=1), "positive semi-definite")
    for name, values in (("table", table), ("linear", linear), ("quadratic", square)):
        some = (values != 0).any(axis=1)
        _refuse(name, some & (count == 0), "0 for users without pairs")


def _refuse(name: str, wrong: Any, what: str) -> None:
    if wrong.any():
        raise ValueError(f"{name} must be {what}; that of user {wrong.argmax()} is not")
