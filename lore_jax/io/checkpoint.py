"""Save and load fits, progress and users: checked safetensors, written atomically.

Loading checks a digest of every byte, format, version, shapes, dtypes and what the
numbers mean, and executes nothing. Saving refuses what loading would.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lore_jax import _checks, _processes
from lore_jax._train.resume import check_progress
from lore_jax.io import records, user_files
from lore_jax.io.files import damage, read_record, write_record
from lore_jax.io.tree import VERSION, from_record, to_record
from lore_jax.results import Fitted, Progress
from lore_jax.streaming import UserStates

_CURVES = "loss", "weights_norm", "basis_norm"


def save(path: str | os.PathLike, fitted: Fitted, *, mesh: Mesh | None = None) -> None:
    """Writes a fit to `path`; a crash while saving leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      fitted: what `fit` returned.
      mesh: as in `fit`. With devices of several processes all of them call this, with
        one path on a file system that they share: it gets the model, and a file beside
        it per process, `PATH.….users`, the weights of that process's users.

    Raises:
      TypeError: `fitted` is no `Fitted`, or its recipe no recipe.
      ValueError: its numbers are not finite or do not agree with one another; with a
        mesh also, on every process, what went wrong on one.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "record"
      >>> users = lore.data.planted(
      ...     jax.random.key(0), num_users=9, pairs_per_user=5, num_features=4, rank=2
      ... )
      >>> fitted = lore.fit_prior(users.basis, users.prefs, key=jax.random.key(1))
      >>> lore.save(path, fitted)
      >>> bool((lore.load(path).weights == fitted.weights).all())
      True
    """
    if not isinstance(fitted, Fitted):
        raise TypeError(f"fitted must be what fit returned, got {type(fitted)}")
    if not isinstance(fitted.recipe, records.RECIPES):
        raise TypeError(f"fitted.recipe must be a recipe, got {fitted.recipe!r}")
    names: list[str] = []
    if several := _processes.spans(mesh):
        names = user_files.save_together(path, fitted)
        fitted = user_files.without_users(fitted)

    def write():
        metadata = {user_files.LISTED: json.dumps(names)} if names else {}
        _save(path, "fit", fitted, records.check_fit, "fitted", metadata)
        user_files.remove_others(path, names)

    if several:
        _processes.together(write if _processes.here() == 0 else lambda: None)
    else:
        write()


def load(path: str | os.PathLike, *, user_ids: Any = None) -> Fitted:
    """Reads a fit, whatever number of processes saved it.

    Args:
      path: a file that `save` wrote.
      user_ids: names of the users whose weights to keep, in this order; None keeps all.

    Returns:
      `Fitted`.

    Raises:
      FileNotFoundError: there is no such file, or one of those beside it is missing.
      ValueError: the file is truncated, foreign, of another version, or its arrays
        do not fit together; or the fit does not know a user.
    """
    fitted, metadata = _load(path, "fit", Fitted, records.check_fit)
    if user_files.LISTED in metadata:
        fitted = user_files.join(path, fitted, metadata[user_files.LISTED])
        with damage(path):
            records.check_fit(fitted)
    if user_ids is not None:
        fitted = user_files.take_named(fitted, user_ids)
    arrays = ("model", "weights", "logits", "unpruned", "kept")
    parts = {name: getattr(fitted, name) for name in arrays}
    curves = dict(zip(_CURVES, map(jnp.asarray, fitted.history)))
    fitted = fitted.replace(
        **jax.tree.map(jnp.asarray, parts), history=fitted.history._replace(**curves)
    )
    with damage(path):  # Without x64, float64 becomes float32.
        _checks.check_finite(fitted.model.basis, "model.basis")
        _checks.check_finite(fitted.logits, "logits")
    return fitted


def save_progress(path: str | os.PathLike, progress: Progress) -> None:
    """Writes how far a fit is; a crash leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      progress: what `fit` hands to `on_progress`.

    Raises:
      TypeError: `progress` is no `Progress`.
      ValueError: it is not what `fit` handed out.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "record"
      >>> users = lore.data.planted(
      ...     jax.random.key(0), num_users=9, pairs_per_user=5, num_features=4, rank=2
      ... )
      >>> recipe = lore.PublishedJoint(num_steps=4, prior=None)
      >>> settings = dict(rank=2, key=jax.random.key(1), recipe=recipe)
      >>> def keep(progress):
      ...     lore.save_progress(path, progress)
      >>> fitted = lore.fit(users.prefs, **settings, on_progress=keep)
      >>> lore.load_progress(path)
      Progress('PublishedJoint', 4 steps, 0 candidates compared)
    """
    if not isinstance(progress, Progress):
        raise TypeError(f"progress must be a Progress, got {type(progress)}")
    _save(path, "progress", progress, check_progress, "progress")


def load_progress(path: str | os.PathLike) -> Progress:
    """Reads what `fit(..., resume=progress)` goes on from.

    Args:
      path: a file that `save_progress` wrote.

    Returns:
      `Progress`; `fit` refuses it with other data or settings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, foreign, of another version, or its arrays
        do not fit together.
    """
    return _load(path, "progress", Progress, check_progress)[0]


def save_users(path: str | os.PathLike, state: UserStates) -> None:
    """Writes users' state to `path`; a crash leaves an old file as it was.

    Args:
      path: file to write, in an existing folder.
      state: what `streaming.init`, `update` or `merge` returned.

    Raises:
      TypeError: `state` is no `UserStates`.
      ValueError: its sums cannot be sums over pairs.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "record"
      >>> model = lore.RewardModel(np.eye(3, 2, dtype=np.float32))
      >>> lore.save_users(path, lore.streaming.init(model, user_ids=["ann"]))
      >>> lore.load_users(path)
      UserStates(1 users, named, K=2)
    """
    if not isinstance(state, UserStates):
        raise TypeError(f"state must be a UserStates, got {type(state)}")
    _save(path, "users", state, records.check_users, "state")


def load_users(path: str | os.PathLike) -> UserStates:
    """Reads users' state, with their names, prior and basis fingerprint.

    Args:
      path: a file that `save_users` wrote.

    Returns:
      `UserStates`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, foreign, of another version, or its arrays
        do not fit together.
    """
    return _load(path, "users", UserStates, records.check_users)[0]


def _save(
    path,
    kind: str,
    tree: Any,
    check: Callable[[Any], None],
    name: str,
    more: dict[str, str] | None = None,
) -> None:
    try:
        check(tree)
        arrays, text = to_record(tree)
        check(from_record(arrays, text))  # What loading will see.
    except ValueError as error:
        raise ValueError(f"{name} cannot be saved: {error}") from error
    metadata = {"format": f"lore_jax.{kind}", "version": str(VERSION), "record": text}
    metadata |= more or {}
    write_record(path, arrays, metadata)


def _load(path, kind: str, expected: type, check: Callable[[Any], None]) -> Any:
    arrays, metadata = read_record(path, f"lore_jax.{kind}", VERSION, kind)
    with damage(path):
        found = from_record(arrays, metadata["record"])
        if not isinstance(found, expected):
            raise ValueError(f"it holds a {type(found).__name__}, not a {kind}")
        check(found)
    return found, metadata
