"""What the numbers of a record must mean: checks of fits, priors, users and names.

A file that passes its digest holds what was saved. These checks refuse what should
never have been saved, and what was put together by hand.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lore_jax import _checks, _ids
from lore_jax.io.files import parse_json

_CLOSE = 1e-3  # of sums that are 1, as `_checks.check_simplex` allows

_ROUNDING = 1e-5  # of sums of float32 numbers, relative

_NAME_BYTES = 1 << 30  # of an array of names, whose rows are as long as the longest

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")

_RANGES = {  # of the prior's numbers: least, whether that is excluded, infinity allowed
    "concentration": (0.0, False, True),
    "tempering": (0.0, False, False),
    "spread": (0.0, False, False),
    "decay": (-math.inf, True, False),
    "margin_scale": (0.0, True, False),
}


def check_prior_numbers(arrays: Mapping[str, np.ndarray], temperature: float) -> None:
    """Raises `ValueError` unless these are the fields of a prior at T.

    Args:
      arrays: atoms, log_weights and the numbers, by name.
      temperature: T.
    """
    _checks.check_simplex(arrays["atoms"], "atoms")
    log_weights = np.asarray(arrays["log_weights"], np.float64)
    if not (log_weights <= _CLOSE).all():
        raise ValueError("log_weights must be log π ≤ 0, without NaN")
    if not abs((total := float(np.exp(log_weights).sum())) - 1) < _CLOSE:
        raise ValueError(f"log_weights must be normalised: Σ π is {total:g}")
    for name, (least, strict, infinite) in _RANGES.items():
        if np.shape(arrays[name]) != ():
            raise ValueError(f"{name} must be one number, got {arrays[name]!r}")
        value = float(arrays[name])
        legal = value > least if strict else value >= least
        if not legal or (value == math.inf and not infinite):
            raise ValueError(f"{name} is {value:g}, which is out of its range")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature}, expected above 0")


def check_fit(
    arrays: Mapping[str, np.ndarray], temperature: float, config: Any
) -> None:
    """Raises `ValueError` unless the arrays of a fit agree with one another.

    Args:
      arrays: as a file holds them, of the right shapes.
      temperature: T of the fit.
      config: its `TrainConfig`.
    """
    if not math.isclose(temperature, config.temperature, rel_tol=1e-6):
        raise ValueError(
            f"temperature {temperature:g}, but that of its config is "
            f"{config.temperature:g}"
        )
    check_prior_numbers(arrays, temperature)
    finite = ("basis", "logits", "weights", "unpruned.basis", "unpruned.logits")
    for name in (*finite, "history.loss"):
        if name in arrays:
            _checks.check_finite(arrays[name], name)
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
    for name in ("loss", "weights_norm", "basis_norm", "validation"):
        values = arrays[f"history.{name}"]
        if (values < 0).any() or (name != "validation" and np.isnan(values).any()):
            raise ValueError(f"history.{name} must hold numbers of at least 0")
    if (steps := len(arrays["history.loss"])) > config.num_steps:
        raise ValueError(
            f"history.loss has {steps} steps, but config.num_steps is "
            f"{config.num_steps}"
        )
    counts = arrays["history.validation_steps"].astype(np.int64)
    if counts.size and not (
        counts[0] >= 0
        and counts[-1] <= config.num_steps
        and (np.diff(counts) >= 0).all()
    ):
        raise ValueError(
            f"history.validation_steps must ascend up to {config.num_steps}, got "
            f"{counts}"
        )
    if "kept" in arrays:
        _check_kept(arrays)


def _check_kept(arrays: Mapping[str, np.ndarray]) -> None:
    """`kept` are the columns of the unpruned arrays that the others hold."""
    kept, size = arrays["kept"], arrays["unpruned.basis"].shape[1]
    if (kept < 0).any() or (kept >= size).any() or (np.diff(kept) <= 0).any():
        raise ValueError(f"kept must ascend within 0 … {size - 1}, got {kept}")
    for name in ("basis", "logits"):
        if not np.array_equal(arrays[name], arrays[f"unpruned.{name}"][:, kept]):
            raise ValueError(f"{name} must be the columns {kept} of unpruned.{name}")


def check_users(arrays: Mapping[str, np.ndarray], fingerprint: str) -> None:
    """Raises `ValueError` unless the sums of users can be sums over pairs.

    Args:
      arrays: table, linear, quadratic and num_pairs, of the right shapes.
      fingerprint: of the basis, "" before the first pair.
    """
    if fingerprint and not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(f"fingerprint must be 32 hex digits, got {fingerprint!r}")
    sums = {n: np.asarray(arrays[n], np.float64) for n in ("table", "linear")}
    square = np.asarray(arrays["quadratic"], np.float64)
    count = np.asarray(arrays["num_pairs"], np.float64)
    for name, values in (*sums.items(), ("quadratic", square), ("num_pairs", count)):
        _checks.check_finite(values, name)
    _refuse("num_pairs", count < 0, "at least 0")
    above = sums["table"].max(axis=1, initial=0.0) > _ROUNDING * (1 + count)
    _refuse("table", above, "at most 0, log-likelihoods")
    rows, columns = np.triu_indices(sums["linear"].shape[1])
    diagonal = square[:, rows == columns]
    _refuse("quadratic", (diagonal < 0).any(axis=1), "at least 0 on its diagonal")
    bound = np.sqrt(diagonal[:, rows] * diagonal[:, columns])
    wide = np.abs(square) > bound * (1 + _ROUNDING) + _ROUNDING * diagonal.max(
        axis=1, keepdims=True, initial=0.0
    )
    _refuse("quadratic", wide.any(axis=1), "positive semi-definite")
    for name, values in (*sums.items(), ("quadratic", square)):
        some = (values != 0).any(axis=1)
        _refuse(name, some & (count == 0), "0 for users without pairs")
    if count.any() and not fingerprint:
        raise ValueError("fingerprint is empty, but num_pairs is above 0")


def _refuse(name: str, wrong: Any, what: str) -> None:
    if wrong.any():
        raise ValueError(f"{name} must be {what}; that of user {wrong.argmax()} is not")


def encode_names(names: Any) -> np.ndarray:
    """A list of names as the bytes of JSON."""
    return np.frombuffer(json.dumps(np.asarray(names).tolist()).encode(), np.uint8)


def decode_names(content: np.ndarray, name: str) -> np.ndarray:
    """str[n] or int[n] of what `encode_names` made.

    Raises:
      ValueError: it is no list of distinct strings, or of distinct integers.
    """
    names = parse_json(np.asarray(content).tobytes(), name)
    if isinstance(names, list) and names and {type(n) for n in names} == {int}:
        return _ids.unique(names, name)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{name} must be a list of strings or of integers")
    longest = max(map(len, names), default=0)
    if longest * len(names) * 4 > _NAME_BYTES:
        raise ValueError(
            f"{name} would take {longest * len(names) * 4} bytes: the longest of "
            f"{len(names)} names has {longest} characters"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{name} must be distinct")
    array = np.array(names, dtype=np.str_)
    if array.tolist() != names:
        raise ValueError(f"{name} holds a name that ends with a null character")
    return array
