"""A fit whose users are in several files: one for each process that saved it.

The file of the fit lists the names of the others, and those hold digests of what is in
them: a crash leaves an old fit with its own files.
"""

import glob
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lore_jax import _ids, _processes
from lore_jax._ids import Ids
from lore_jax.io.files import damage, digest, parse_json, read_record, write_record
from lore_jax.io.tree import VERSION, from_record, to_record
from lore_jax.results import Fitted

LISTED = "users"  # of the metadata of a fit: names of its files of users

_KIND = "fit_users"
_MARK = 16  # digits of a digest, in the name
_ENDING = re.compile(rf"\.[0-9a-f]{{{_MARK}}}\.users\Z")


def save_together(path: str | os.PathLike, fitted: Fitted) -> list[str]:
    """Writes this process's users beside `path`; the names of all processes' files.

    Raises:
      ValueError: on every process, where one cannot write, two have other models, or
        users have no names.
    """

    def write() -> str:
        if fitted.user_ids is None:
            raise ValueError("fitted must name its users, as a fit on a mesh does")
        users = {
            "weights": np.asarray(fitted.weights),
            "logits": np.asarray(fitted.logits),
            "ids": Ids(fitted.user_ids, None),
        }
        if fitted.unpruned is not None:
            users["unpruned"] = np.asarray(fitted.unpruned.logits)
        arrays, text = to_record(users)
        metadata = {"format": f"lore_jax.{_KIND}", "version": str(VERSION)}
        metadata["record"] = text
        mark = digest(arrays, metadata)[:_MARK]
        file = pathlib.Path(path).with_name(f"{pathlib.Path(path).name}.{mark}.users")
        write_record(file, arrays, metadata)
        return file.name

    model = {"basis": np.asarray(fitted.model.basis)}
    _processes.agree(**{"the path to save to": pathlib.Path(path).name})
    _processes.agree(**{"fitted.model": digest(model, {})})
    own = _processes.together(write)
    return [name.decode() for name in _processes.gather_bytes(own.encode())]


def without_users(fitted: Fitted) -> Fitted:
    """The fit without its users, as the file at `path` holds it."""
    unpruned = fitted.unpruned
    if unpruned is not None:
        unpruned = unpruned.replace(logits=unpruned.logits[:0])
    return fitted.replace(
        weights=fitted.weights[:0],
        logits=fitted.logits[:0],
        unpruned=unpruned,
        ids=None,
    )


def join(path: str | os.PathLike, fitted: Fitted, listed: str) -> Fitted:
    """The fit of all users, in the order of their names.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: one is damaged, or of another fit.
    """
    found = [_read(path, name) for name in _names(path, listed)]
    with damage(path):
        if len({one["ids"].users.dtype.kind == "U" for one in found}) > 1:
            raise ValueError("its files of users name them by texts and by numbers")
        names = _ids.joined([one["ids"].users for one in found], "users")
        order = np.argsort(names, kind="stable")
        if len(np.unique(names)) < len(names):
            raise ValueError("two files of users hold the same user")
        kinds = [name for name in ("weights", "logits", "unpruned") if name in found[0]]
        if any(set(one) != {*kinds, "ids"} for one in found):
            raise ValueError("its files of users are of different kinds")
        users: dict[str, Any] = {
            name: np.concatenate([one[name] for one in found])[order] for name in kinds
        }
        logits = users.pop("unpruned", None)
        if (logits is None) != (fitted.unpruned is None):
            raise ValueError("its files of users are of another recipe")
    if fitted.unpruned is not None:
        users["unpruned"] = fitted.unpruned.replace(logits=logits)
    return fitted.replace(**users, ids=Ids(names[order], None))


def take_named(fitted: Fitted, user_ids: Any) -> Fitted:
    """The fit with the weights of some users, in the order given.

    Raises:
      ValueError: users have no names, or one is not known.
    """
    if fitted.user_ids is None:
        raise ValueError("user_ids is given, but the users of this fit have no names")
    wanted = _ids.unique(user_ids, "user_ids")
    at = _ids.look_up(wanted, np.asarray(fitted.user_ids), "user_ids", "the fit")
    unpruned = fitted.unpruned
    if unpruned is not None:
        unpruned = unpruned.replace(logits=unpruned.logits[at])
    items = None if fitted.ids is None else fitted.ids.items
    return fitted.replace(
        weights=fitted.weights[at],
        logits=fitted.logits[at],
        unpruned=unpruned,
        ids=Ids(wanted, items),
    )


def remove_others(path: str | os.PathLike, names: Sequence[str]) -> None:
    """Removes files of users beside `path` that are not those of its fit."""
    path = pathlib.Path(path)
    for file in path.parent.glob(f"{glob.escape(path.name)}.*.users"):
        mine = file.name.removeprefix(path.name)
        if _ENDING.fullmatch(mine) and file.name not in names:
            file.unlink(missing_ok=True)


def _names(path, listed: str) -> list[str]:
    with damage(path):
        names = parse_json(listed, LISTED)
        if not isinstance(names, list) or not names:
            raise ValueError(f"{LISTED} must list files, got {listed:.200}")
        for name in names:  # Nothing but files beside it is ever read.
            whole = isinstance(name, str) and re.search(_ENDING, name)
            if not whole or pathlib.PurePath(name).name != name:
                raise ValueError(f"{LISTED} lists {name!r}, which is no file of users")
    return names


def _read(path, name: str) -> dict[str, Any]:
    file = pathlib.Path(path).with_name(name)
    arrays, metadata = read_record(file, f"lore_jax.{_KIND}", VERSION, _KIND)
    with damage(file):
        if digest(arrays, metadata)[:_MARK] != name.split(".")[-2]:
            raise ValueError("it was replaced by another file of users")
        found = from_record(arrays, metadata["record"])
        if not isinstance(found, dict) or not isinstance(found.get("ids"), Ids):
            raise ValueError("it holds no users")
        users = found["ids"].users
        for key, values in found.items():
            if key != "ids" and np.shape(values)[:1] != (len(users),):
                raise ValueError(f"{key} must have a row for each of {len(users)}")
    return found
