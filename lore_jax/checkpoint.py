"""Save and load fits, progress and users: checked safetensors, written atomically.

Loading checks format, version, names, shapes and dtypes, and executes nothing.
"""

import dataclasses
import json
import math
import os
import pathlib
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lore_jax import _ids
from lore_jax.config import TrainConfig
from lore_jax.progress import FORMAT as PROGRESS
from lore_jax.progress import VERSION as PROGRESS_VERSION
from lore_jax.progress import from_arrays as progress_from_arrays
from lore_jax.progress import to_arrays as progress_to_arrays
from lore_jax.results import Fitted, History, Progress
from lore_jax.streaming import FORMAT as USERS
from lore_jax.streaming import VERSION as USERS_VERSION
from lore_jax.streaming import UserStates, from_arrays, to_arrays
from lore_jax.types import Ids, Prior, RewardParams

FORMAT = "lore_jax.fit"
VERSION = 1

_REQUIRED = {
    "basis": "DK",
    "logits": "UK",
    "weights": "UK",
    "atoms": "AK",
    "log_weights": "A",
    "concentration": "",
    "tempering": "",
    "history.loss": "S",
    "history.weights_norm": "S",
    "history.basis_norm": "S",
}
_OPTIONAL = {
    "unpruned.basis": "DJ",
    "unpruned.logits": "UJ",
    "kept": "K",
    "spread": "",  # files before these five existed take the defaults
    "decay": "",
    "margin_scale": "",
    "history.validation": "H",
    "history.validation_steps": "H",
    "user_ids": "B",
    "item_ids": "C",
}


def save(path: str | os.PathLike, fitted: Fitted) -> None:
    """Writes a fit to `path`; a crash while saving leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      fitted: what `fit` returned.

    Raises:
      TypeError: `fitted` is no `Fitted`.
      OSError: the file cannot be written.
    """
    if not isinstance(fitted, Fitted):
        raise TypeError(f"fitted must be what fit returned, got {type(fitted)}")
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
            text = json.dumps(names.tolist()).encode()
            tensors[name[:-1] + "_ids"] = np.frombuffer(text, np.uint8)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "rank": str(fitted.params.basis.shape[1]),
        "temperature": repr(float(fitted.temperature)),
        "config": json.dumps(dataclasses.asdict(fitted.config)),
        "selection": json.dumps(fitted.history.selection),
    }
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    _write(pathlib.Path(path), safetensors.numpy.save(arrays, metadata))


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
    path = pathlib.Path(path)
    arrays, metadata = _read(path, FORMAT, VERSION, "fit")
    _check(path, arrays)
    try:
        config = _config(json.loads(metadata["config"]))
        selection = tuple(json.loads(metadata["selection"]))
        if not all(isinstance(row, dict) for row in selection):
            raise ValueError("selection must be a list of objects")
        temperature = float(metadata["temperature"])
        rank = int(metadata["rank"])
        names = [
            _ids.from_file(json.loads(arrays[key].tobytes()), key)
            if key in arrays
            else None
            for key in ("user_ids", "item_ids")
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} has damaged metadata: {error}") from error
    if names[0] is not None and names[0].shape != arrays["weights"].shape[:1]:
        raise ValueError(
            f"{path}: user_ids names {names[0].size} users, but weights have shape "
            f"{arrays['weights'].shape}"
        )
    if rank != arrays["basis"].shape[1]:
        raise ValueError(
            f"{path} says rank {rank}, but its basis has shape {arrays['basis'].shape}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{path} has temperature {temperature}, expected above 0")
    x = {name: jnp.asarray(a) for name, a in arrays.items() if "_ids" not in name}
    history = {f: x[f"history.{f}"] for f in History._fields if f"history.{f}" in x}
    later = {n: x[n] for n in ("spread", "decay", "margin_scale") if n in x}
    unpruned = None
    if "kept" in x:
        unpruned = RewardParams(basis=x["unpruned.basis"], logits=x["unpruned.logits"])
    return Fitted(
        params=RewardParams(basis=x["basis"], logits=x["logits"]),
        weights=x["weights"],
        prior=Prior(
            atoms=x["atoms"],
            log_weights=x["log_weights"],
            concentration=x["concentration"],
            tempering=x["tempering"],
            temperature=temperature,
            **later,
        ),
        history=History(**history, selection=selection),
        unpruned=unpruned,
        kept=x.get("kept"),
        temperature=temperature,
        config=config,
        ids=None if all(x is None for x in names) else Ids(*names),
    )


def save_progress(path: str | os.PathLike, progress: Progress) -> None:
    """Writes how far a fit is; a crash leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      progress: what `fit` hands to `on_progress`.

    Raises:
      TypeError: `progress` is no `Progress`.
      OSError: the file cannot be written.
    """
    if not isinstance(progress, Progress):
        raise TypeError(f"progress must be a Progress, got {type(progress)}")
    _write(pathlib.Path(path), safetensors.numpy.save(*progress_to_arrays(progress)))


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
    path = pathlib.Path(path)
    arrays, metadata = _read(path, PROGRESS, PROGRESS_VERSION, "progress of a fit")
    try:
        return progress_from_arrays(arrays, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def save_users(path: str | os.PathLike, state: UserStates) -> None:
    """Writes users' state to `path`; a crash leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      state: what `start_users`, `observe` or `merge` returned.

    Raises:
      TypeError: `state` is no `UserStates`.
      OSError: the file cannot be written.
    """
    if not isinstance(state, UserStates):
        raise TypeError(f"state must be a UserStates, got {type(state)}")
    _write(pathlib.Path(path), safetensors.numpy.save(*to_arrays(state)))


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
    path = pathlib.Path(path)
    arrays, metadata = _read(path, USERS, USERS_VERSION, "set of users")
    try:
        return from_arrays(arrays, metadata)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read(path: pathlib.Path, kind: str, version: int, what: str):
    """(arrays, metadata) of a file of this format and version."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(
                    f"{path} is a safetensors file but not a lore_jax {what}: its "
                    f"format is {metadata.get('format')!r}, expected {kind!r}"
                )
            if metadata.get("version") != str(version):
                raise ValueError(
                    f"{path} has format version {metadata.get('version')!r}; this "
                    f"lore_jax reads version {version}"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file: {error}"
        ) from error


def _check(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Names, ranks, dtypes, and one size for each letter."""
    names = set(arrays)
    optional = set(_OPTIONAL) & names
    if names != set(_REQUIRED) | optional:
        missing, foreign = set(_REQUIRED) - names, names - set(_REQUIRED) - optional
        raise ValueError(
            f"{path} must hold the arrays of a fit; missing {sorted(missing)}, "
            f"unexpected {sorted(foreign)}"
        )
    pruned = {"unpruned.basis", "unpruned.logits", "kept"}
    if pruned & names and not pruned <= names:
        raise ValueError(f"{path} holds only part of {sorted(pruned)}")
    sizes: dict[str, int] = {}
    for name, letters in {**_REQUIRED, **_OPTIONAL}.items():
        if name not in arrays:
            continue
        array = arrays[name]
        whole = name in ("kept", "history.validation_steps")
        kind = "u" if name.endswith("_ids") else "i" if whole else "f"
        if array.dtype.kind != kind:
            raise ValueError(f"{path}: {name} has dtype {array.dtype}")
        if array.ndim != len(letters):
            raise ValueError(
                f"{path}: {name} must be [{', '.join(letters)}], got {array.shape}"
            )
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{path}: {name} has shape {array.shape}, but {letter} is "
                    f"{sizes[letter]} elsewhere in the file"
                )


def _config(fields: Any) -> TrainConfig:
    if not isinstance(fields, dict):
        raise ValueError("config must be an object")
    lists = {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
    return TrainConfig(**{**fields, **lists})


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes beside `path`, then renames over it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
