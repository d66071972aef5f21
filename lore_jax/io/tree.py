"""One serialiser for every record: fits, progress and user states.

A record is a tree of this library's dataclasses and named tuples. Its arrays are named
by their place ("model.basis"), and a text of JSON says how they fit together. Only the
types that are listed here are ever made from a file.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lore_jax import _ids
from lore_jax._ids import Ids
from lore_jax.config import (
    Marginal,
    PriorSearch,
    PublishedAlternating,
    PublishedJoint,
    Search,
)
from lore_jax.io.files import parse_json
from lore_jax.model import RewardModel, RewardParams
from lore_jax.prior import Prior
from lore_jax.results import Fitted, History, Metrics, Progress
from lore_jax.streaming import UserStates

VERSION = 4  # of the format

_KINDS = {
    kind.__name__: kind
    for kind in (
        *(Fitted, RewardModel, RewardParams, Prior, History, Progress, Metrics),
        *(UserStates, Marginal, Search, PriorSearch),
        *(PublishedJoint, PublishedAlternating),
    )
}
_NAME_BYTES = 1 << 30  # of an array of names, whose rows are as long as the longest


def to_record(tree: Any) -> tuple[dict[str, np.ndarray], str]:
    """(arrays by their place, how they fit together) of a record.

    Raises:
      TypeError: something in it is no record, array or plain value.
    """
    arrays: dict[str, np.ndarray] = {}
    return arrays, json.dumps(_taken_apart(tree, "", arrays))


def _taken_apart(value: Any, place: str, arrays: dict[str, np.ndarray]) -> Any:
    def part(name, x):
        return _taken_apart(x, f"{place}.{name}" if place else str(name), arrays)

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Ids):
        names = {"users": value.users, "items": value.items}
        for name, x in names.items():
            if x is not None:
                arrays[f"{place}.{name}"] = encode_names(x)
        return {"kind": "Ids", **{name: x is not None for name, x in names.items()}}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        arrays[place] = np.asarray(value, order="C")
        return {"kind": "array"}
    if type(value).__name__ in _KINDS:
        return {
            "kind": type(value).__name__,
            "fields": {n: part(n, getattr(value, n)) for n in _fields(type(value))},
        }
    if isinstance(value, tuple | list):
        items = [part(i, x) for i, x in enumerate(value)]
        return {"kind": "tuple", "items": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {"kind": "dict", "items": {k: part(k, x) for k, x in value.items()}}
    raise TypeError(f"{place} cannot be saved: {type(value)}")


def from_record(arrays: Mapping[str, np.ndarray], text: str) -> Any:
    """What `to_record` took apart, with NumPy arrays.

    Raises:
      ValueError: the text and the arrays do not fit together.
    """
    used: set[str] = set()
    found = _put_together(parse_json(text, "record"), "", arrays, used)
    if used != set(arrays):
        raise ValueError(f"unexpected arrays {sorted(set(arrays) - used)}")
    return found


def _put_together(value: Any, place: str, arrays, used: set[str]) -> Any:
    def part(name, x):
        inner = f"{place}.{name}" if place else str(name)
        return _put_together(x, inner, arrays, used)

    def take(name):
        if name not in arrays:
            raise ValueError(f"the array {name} is missing")
        used.add(name)
        return arrays[name]

    if isinstance(value, list):
        return [part(i, x) for i, x in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if kind == "array":
        return take(place)
    if kind == "tuple":
        return tuple(part(i, x) for i, x in enumerate(value["items"]))
    if kind == "dict":
        return {k: part(k, x) for k, x in value["items"].items()}
    if kind == "Ids":
        names = {
            name: decode_names(take(f"{place}.{name}"), f"{place}.{name}")
            for name in ("users", "items")
            if value.get(name)
        }
        return Ids(names.get("users"), names.get("items"))
    if kind not in _KINDS:
        raise ValueError(f"{place or 'the record'} is of the unknown kind {kind!r}")
    fields = value["fields"]
    if set(fields) != set(_fields(_KINDS[kind])):
        raise ValueError(f"{place or kind} has the fields {sorted(fields)}")
    return _KINDS[kind](**{name: part(name, x) for name, x in fields.items()})


def _fields(kind: Any) -> list[str]:
    if hasattr(kind, "_fields"):
        return list(kind._fields)
    return [field.name for field in dataclasses.fields(kind)]


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
