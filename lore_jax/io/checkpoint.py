"""Save and load fits, progress and users: checked safetensors, written atomically.

Loading checks a digest of every byte, format, version, names, shapes, dtypes and what
the numbers mean, and executes nothing. Saving refuses what loading would.
"""

import dataclasses
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from lore_jax import _checks
from lore_jax._train.resume import FORMAT as PROGRESS
from lore_jax._train.resume import VERSION as PROGRESS_VERSION
from lore_jax._train.resume import check_progress
from lore_jax._train.resume import from_arrays as progress_from_arrays
from lore_jax._train.resume import to_arrays as progress_to_arrays
from lore_jax.config import TrainConfig
from lore_jax.io import records
from lore_jax.io.files import damage, parse_json, read_record, write_record
from lore_jax.model import RewardParams
from lore_jax.preferences import Ids
from lore_jax.prior import Prior
from lore_jax.results import Fitted, History, Progress
from lore_jax.streaming import FORMAT as USERS
from lore_jax.streaming import VERSION as USERS_VERSION
from lore_jax.streaming import UserStates, from_arrays, to_arrays

FORMAT = "lore_jax.fit"

VERSION = 2


_REQUIRED = {
    "basis": "DK",
    "logits": "UK",
    "weights": "UK",
    "atoms": "AK",
    "log_weights": "A",
    "concentration": "",
    "tempering": "",
    "spread": "",
    "decay": "",
    "margin_scale": "",
    "history.loss": "S",
    "history.weights_norm": "S",
    "history.basis_norm": "S",
    "history.validation": "H",
    "history.validation_steps": "H",
}

_OPTIONAL = {
    "unpruned.basis": "DJ",
    "unpruned.logits": "UJ",
    "kept": "K",
    "user_ids": "B",
    "item_ids": "C",
}


def save(path: str | os.PathLike, fitted: Fitted) -> None:
    """Writes a fit to `path`; a crash while saving leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      fitted: what `fit` returned.

    Raises:
      TypeError: `fitted` is no `Fitted`, or its config no `TrainConfig`.
      ValueError: its numbers are not finite or do not agree with one another.
      OSError: the file cannot be written.
    """
    if not isinstance(fitted, Fitted):
        raise TypeError(f"fitted must be what fit returned, got {type(fitted)}")
    if not isinstance(fitted.config, TrainConfig):
        raise TypeError(f"fitted.config must be a TrainConfig, got {fitted.config!r}")
    tensors = {
        "basis": fitted.params.basis,
        "logits": fitted.params.logits,
        "weights": fitted.weights,
        "atoms": fitted.prior.atoms,
        "log_weights": fitted.prior.log_weights,
        "concentration": fitted.prior.concentration,
        "tempering": fitted.prior.tempering,
        "spread": fitted.prior.spread,
        "decay": fitted.prior.decay,
        "margin_scale": fitted.prior.margin_scale,
        "history.loss": fitted.history.loss,
        "history.weights_norm": fitted.history.weights_norm,
        "history.basis_norm": fitted.history.basis_norm,
        "history.validation": fitted.history.validation,
        "history.validation_steps": fitted.history.validation_steps,
    }
    if fitted.unpruned is not None:
        tensors["unpruned.basis"] = fitted.unpruned.basis
        tensors["unpruned.logits"] = fitted.unpruned.logits
        tensors["kept"] = fitted.kept
    for name in ("users", "items"):
        names = None if fitted.ids is None else getattr(fitted.ids, name)
        if names is not None:
            tensors[name[:-1] + "_ids"] = records.encode_names(names)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "rank": str(fitted.params.basis.shape[1]),
        "temperature": repr(float(fitted.temperature)),
        "config": json.dumps(dataclasses.asdict(fitted.config)),
        "selection": json.dumps(fitted.history.selection),
        "heldout": json.dumps(fitted.history.heldout),
        "starts": json.dumps(fitted.history.starts),
    }
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    if float(fitted.prior.temperature) != float(fitted.temperature):
        raise ValueError(
            f"fitted.prior.temperature is {fitted.prior.temperature}, but "
            f"fitted.temperature {fitted.temperature}"
        )
    try:
        _check(arrays, metadata)
    except ValueError as error:
        raise ValueError(f"fitted cannot be saved: {error}") from error
    write_record(path, arrays, metadata)


def load(path: str | os.PathLike) -> Fitted:
    """Reads a fit.

    Args:
      path: a file that `save` wrote.

    Returns:
      `Fitted`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, foreign, of a newer version, or its arrays
        do not fit together.
    """
    arrays, metadata = read_record(path, FORMAT, VERSION, "fit")
    with damage(path):
        return _from_arrays(arrays, metadata)


def _check(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple:
    """(config, texts of the history, T, names of users, of items) of a fit's file.

    Raises:
      ValueError: something is missing, or does not fit together.
    """
    _check_shapes(arrays)
    config = _config(parse_json(metadata["config"], "config"))
    selection = parse_json(metadata["selection"], "selection")
    if not isinstance(selection, list) or not all(
        isinstance(row, dict) for row in selection
    ):
        raise ValueError("selection must be a list of objects")
    selection = tuple(selection)
    heldout = parse_json(metadata["heldout"], "heldout")
    starts = parse_json(metadata["starts"], "starts")
    if not isinstance(heldout, list) or not isinstance(starts, dict | None):
        raise ValueError("heldout must be a list, and starts an object")
    temperature = float(metadata["temperature"])
    users, items = (
        records.decode_names(arrays[key], key) if key in arrays else None
        for key in ("user_ids", "item_ids")
    )
    if users is not None and users.shape != arrays["weights"].shape[:1]:
        raise ValueError(
            f"user_ids names {users.size} users, but weights have shape "
            f"{arrays['weights'].shape}"
        )
    if (rank := int(metadata["rank"])) != arrays["basis"].shape[1]:
        raise ValueError(
            f"rank {rank}, but its basis has shape {arrays['basis'].shape}"
        )
    records.check_fit(arrays, temperature, config)
    said = {"selection": selection, "heldout": tuple(heldout), "starts": starts}
    return config, said, temperature, users, items


def _from_arrays(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Fitted:
    """The fit that a file holds."""
    config, said, temperature, users, items = _check(arrays, metadata)
    x = {name: jnp.asarray(a) for name, a in arrays.items() if "_ids" not in name}
    for name in ("basis", "logits"):  # Without x64, float64 becomes float32.
        _checks.check_finite(x[name], name)
    curves = ("loss", "weights_norm", "basis_norm", "validation", "validation_steps")
    unpruned = None
    if "kept" in x:
        unpruned = RewardParams(basis=x["unpruned.basis"], logits=x["unpruned.logits"])
    numbers = ("spread", "decay", "margin_scale", "concentration", "tempering")
    return Fitted(
        params=RewardParams(basis=x["basis"], logits=x["logits"]),
        weights=x["weights"],
        prior=Prior(
            atoms=x["atoms"],
            log_weights=x["log_weights"],
            temperature=temperature,
            **{name: x[name] for name in numbers},
        ),
        history=History(**{f: x[f"history.{f}"] for f in curves}, **said),
        unpruned=unpruned,
        kept=x.get("kept"),
        temperature=temperature,
        config=config,
        ids=None if users is None and items is None else Ids(users, items),
    )


def save_progress(path: str | os.PathLike, progress: Progress) -> None:
    """Writes how far a fit is; a crash leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      progress: what `fit` hands to `on_progress`.

    Raises:
      TypeError: `progress` is no `Progress`.
      ValueError: it is not what `fit` handed out.
      OSError: the file cannot be written.
    """
    if not isinstance(progress, Progress):
        raise TypeError(f"progress must be a Progress, got {type(progress)}")
    check_progress(progress)
    write_record(path, *progress_to_arrays(progress))


def load_progress(path: str | os.PathLike) -> Progress:
    """Reads what `fit(..., resume=progress)` goes on from.

    Args:
      path: a file that `save_progress` wrote.

    Returns:
      `Progress`; `fit` refuses it with other data or settings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, foreign, of a newer version, or its arrays
        do not fit together.
    """
    arrays, metadata = read_record(
        path, PROGRESS, PROGRESS_VERSION, "progress of a fit"
    )
    with damage(path):
        return progress_from_arrays(arrays, metadata)


def save_users(path: str | os.PathLike, state: UserStates) -> None:
    """Writes users' state to `path`; a crash leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      state: what `start_users`, `observe` or `merge` returned.

    Raises:
      TypeError: `state` is no `UserStates`.
      ValueError: its sums cannot be sums over pairs.
      OSError: the file cannot be written.
    """
    if not isinstance(state, UserStates):
        raise TypeError(f"state must be a UserStates, got {type(state)}")
    arrays, metadata = to_arrays(state)
    _users_from_arrays(arrays, metadata)
    write_record(path, arrays, metadata)


def load_users(path: str | os.PathLike) -> UserStates:
    """Reads users' state, with their names, prior and basis fingerprint.

    Args:
      path: a file that `save_users` wrote.

    Returns:
      `UserStates`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, foreign, of a newer version, or its arrays
        do not fit together.
    """
    arrays, metadata = read_record(path, USERS, USERS_VERSION, "set of users")
    with damage(path):
        return _users_from_arrays(arrays, metadata)


def _users_from_arrays(arrays, metadata) -> UserStates:
    """`streaming.from_arrays`, with what the numbers must mean."""
    if "user_ids" in arrays:
        records.decode_names(arrays["user_ids"], "user_ids")
    state = from_arrays(arrays, metadata)
    records.check_prior_numbers(arrays, state.prior.temperature)
    records.check_users(arrays, state.fingerprint)
    return state


def _check_shapes(arrays: dict[str, np.ndarray]) -> None:
    """Names, ranks, dtypes, and one size for each letter."""
    names = set(arrays)
    optional = set(_OPTIONAL) & names
    if names != set(_REQUIRED) | optional:
        missing, foreign = set(_REQUIRED) - names, names - set(_REQUIRED) - optional
        raise ValueError(
            f"it must hold the arrays of a fit; missing {sorted(missing)}, "
            f"unexpected {sorted(foreign)}"
        )
    pruned = {"unpruned.basis", "unpruned.logits", "kept"}
    if pruned & names and not pruned <= names:
        raise ValueError(f"it holds only part of {sorted(pruned)}")
    sizes: dict[str, int] = {}
    for name, letters in {**_REQUIRED, **_OPTIONAL}.items():
        if name not in arrays:
            continue
        array = arrays[name]
        whole = name in ("kept", "history.validation_steps")
        kind = "u" if name.endswith("_ids") else "i" if whole else "f"
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
                    f"{sizes[letter]} elsewhere in the file"
                )


def _config(fields: Any) -> TrainConfig:
    if not isinstance(fields, dict):
        raise ValueError("config must be an object")
    lists = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
    return TrainConfig(**{**fields, **lists})
