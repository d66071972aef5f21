"""Names of users and items: read, checked and looked up, on the NumPy side.

A name is a string or an integer, and stays what it is: 1 and "1" are two names, and
a lookup of one among the other is an error.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lore_jax import _checks

MAX_LENGTH = 256  # characters of one name: an array of names is as wide as the longest


class Ids:
    """Names of users, items and groups, kept beside the arrays.

    A name is a string or an integer. Two records with equal names are equal, so they
    share compiled programs. The arrays are read-only.

    Attributes:
      users: str[U] or int[U], or None where users are indices.
      items: str[M] or int[M], or None where items are rows.
      groups: str[G] or int[G] of `Preferences.group`, or None without groups.
    """

    def __init__(self, users: Any, items: Any, groups: Any = None):
        """Keeps read-only views of the arrays."""
        self.users = _read_only(users)
        self.items = _read_only(items)
        self.groups = _read_only(groups)

    @functools.cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the names; worked out once."""
        digest = hashlib.blake2b(digest_size=16)
        for names in (self.users, self.items, self.groups):
            if names is None:
                digest.update(b"none")
            elif names.dtype.kind == "U":
                text = "\0".join(names.tolist())
                digest.update(b"str%d\0" % len(names))
                digest.update(text.encode("utf-8", "surrogatepass"))
            else:
                digest.update(b"int%d\0" % len(names) + names.tobytes())
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        """True where both have the same names in the same order."""
        if not isinstance(other, Ids):
            return NotImplemented
        return self is other or self.digest == other.digest

    def __hash__(self) -> int:
        """By value."""
        return hash(self.digest)


def _read_only(names: np.ndarray | None) -> np.ndarray | None:
    if names is None:
        return None
    view = names.view()
    view.flags.writeable = False
    return view


def column(values: Any, name: str) -> np.ndarray:
    """Integers or names as int64[N], uint64[N] or str[N]; an array of its own.

    Lists, NumPy arrays of any dtype, and columns of pandas, Polars and PyArrow are
    read. Integers that need it are uint64.

    Raises:
      ValueError: an entry is missing (None, NaN, NA, null, masked, ""), integers and
        strings are mixed, a name is too long, or an integer needs more than 64 bits.
      TypeError: an entry is neither an integer nor a string.
    """
    if isinstance(values, list | tuple):
        array = np.fromiter(values, object, len(values))
    else:
        array = _checks.host_array(values, name)
    if array.ndim != 1 or (len(array) and _is_nested(array[0])):
        shape = array.shape if array.ndim != 1 else _shape(values)
        raise ValueError(f"{name} must be int[N] or str[N], got shape {shape}")
    kind = array.dtype.kind
    if not len(array) and kind not in "iuU":
        return np.zeros(0, np.int64)
    if kind == "f" and np.isnan(array).any():
        raise _missing(name, int(np.flatnonzero(np.isnan(array))[0]), np.nan)
    if kind == "U":
        return _strings(array, name)
    if kind in "iu":
        wide = kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max
        return array.astype(np.uint64 if wide else np.int64)
    if kind not in "OST":
        raise _wrong_type(name, f"dtype {array.dtype}")
    return _from_objects(array.tolist(), name)


def _is_nested(value) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def _shape(values):
    try:
        return np.shape(values)
    except ValueError:  # Lists of several lengths.
        return (len(values), "…")


def _wrong_type(name: str, what: str) -> TypeError:
    return TypeError(f"{name} must hold integers or strings, got {what}")


def _missing(name: str, place: int, value) -> ValueError:
    return ValueError(
        f"{name} must have an entry everywhere; {name}[{place}] is missing ({value!r})"
    )


def _from_objects(values: list, name: str) -> np.ndarray:
    types = set(map(type, values))
    if types == {str}:
        return _from_strings(values, name)
    if types == {int}:
        return _from_integers(values, name)
    plain: list[Any] = [
        _plain(value, place, name) for place, value in enumerate(values)
    ]
    kinds = [isinstance(value, str) for value in plain]
    if all(kinds):
        return _from_strings(plain, name)
    if not any(kinds):
        return _from_integers(plain, name)
    text, number = kinds.index(True), kinds.index(False)
    raise ValueError(
        f"{name} must hold strings or integers, not both; {name}[{text}] is "
        f"{plain[text]!r} and {name}[{number}] is {plain[number]!r}"
    )


def _plain(value: Any, place: int, name: str) -> str | int:
    """One entry as Python's own `str` or `int`."""
    if not _checks.is_missing(value):
        if hasattr(value, "as_py"):  # A PyArrow scalar.
            value = value.as_py()
        elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
    if _checks.is_missing(value):
        raise _missing(name, place, value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}[{place}] is {value!r}, which is not UTF-8: {error}"
            ) from error
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    raise _wrong_type(name, f"{name}[{place}] = {value!r} of {type(value)}")


def _from_integers(values: list[int], name: str) -> np.ndarray:
    low, high = min(values), max(values)
    for dtype in (np.int64, np.uint64):
        info = np.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return np.array(values, dtype)
    place = values.index(high if high > np.iinfo(np.int64).max else low)
    raise ValueError(
        f"{name} must hold integers of 64 bits, all signed or all unsigned; "
        f"{name}[{place}] is {values[place]}. Pass larger ones as strings"
    )


def _from_strings(values: list[str], name: str) -> np.ndarray:
    longest = max(map(len, values), default=0)
    if longest > MAX_LENGTH:
        raise _too_long(name, [len(value) for value in values])
    if "" in values:
        raise _missing(name, values.index(""), "")
    if "\0" in "".join(values):
        place = next(i for i, value in enumerate(values) if "\0" in value)
        raise ValueError(f"{name}[{place}] holds a null character: {values[place]!r}")
    return np.array(values, np.str_)


def _strings(array: np.ndarray, name: str) -> np.ndarray:
    lengths = np.strings.str_len(array)
    longest = int(lengths.max(initial=1))
    if longest > MAX_LENGTH:
        raise _too_long(name, lengths)
    if not lengths.all():
        raise _missing(name, int(np.flatnonzero(lengths == 0)[0]), "")
    if (np.strings.find(array, "\0") >= 0).any():
        return _from_strings(array.tolist(), name)
    return array.astype(f"<U{longest}")


def _too_long(name: str, lengths) -> ValueError:
    place = int(np.argmax(np.asarray(lengths) > MAX_LENGTH))
    return ValueError(
        f"{name} must hold names of at most {MAX_LENGTH} characters; {name}[{place}] "
        f"has {lengths[place]}. Pass a hash or a number of longer ones"
    )


def unique(ids: Any, name: str) -> np.ndarray:
    """`column` of distinct names, in the order given."""
    array = column(ids, name)
    values, counts = np.unique(array, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1][0]
        places = np.flatnonzero(array == twice)[:2].tolist()
        raise ValueError(
            f"{name} must be distinct; {twice.item()!r} repeats, at {places}"
        )
    return array


def joined(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Names of one kind in one array; NumPy would make int64 and uint64 floats.

    Raises:
      ValueError: some are negative and some need 64 bits without a sign.
    """
    if len({part.dtype for part in parts if part.dtype.kind != "U"}) < 2:
        return np.concatenate(parts)
    return _from_integers([x for part in parts for x in part.tolist()], name)


def from_file(names: list, name: str) -> np.ndarray:
    """Names as a file holds them; files of version 0.1.0 may hold an empty string."""
    if names and all(isinstance(value, str) for value in names):
        return np.array(names, np.str_)
    return column(names, name)


def rows(values: Any, items: np.ndarray | None, num_rows: int, name: str) -> np.ndarray:
    """Rows of the table as int32[N], from numbers or from names out of `items`."""
    array = column(values, name)
    if items is None and array.dtype.kind == "U" and array.size:
        raise TypeError(
            f"{name} holds names, so item_ids must name the rows of features"
        )
    array = array if items is None else look_up(array, items, name, "item_ids")
    of = f"features has M={num_rows} rows"
    return _checks.host_indices(array, num_rows, name, of)


def users(user: Any, num_users: int | None, user_ids: Any):
    """(names or None, int32[N], U) from indices or names of users.

    Integers are indices where `num_users` is given or every number from 0 to the
    largest occurs, unless `user_ids` names the users. With `num_users` and strings in
    `user_ids` they are indices too. Names without `user_ids` are numbered in sorted
    order.
    """
    if num_users is not None:
        if isinstance(num_users, bool) or not isinstance(num_users, int | np.integer):
            raise TypeError(f"num_users must be an integer, got {num_users!r}")
        if num_users < 1:
            raise ValueError(f"num_users must be at least 1, got {num_users}")
    place = column(user, "user")
    names = None if user_ids is None else unique(user_ids, "user_ids")
    by_number = num_users is not None and place.dtype.kind != "U"
    if names is not None and not (by_number and names.dtype.kind == "U"):
        place = look_up(place, names, "user", "user_ids")
    elif names is None and not by_number and not _are_indices(place):
        names, place = np.unique(place, return_inverse=True)
    if num_users is None:
        most = int(place.max(initial=-1)) + 1
        num_users = max(most, min(1, place.size)) if names is None else len(names)
    if num_users < 1:
        raise ValueError(f"num_users must be at least 1, got {num_users}")
    if names is not None and len(names) != num_users:
        raise ValueError(
            f"user_ids must name every user: {len(names)} names for "
            f"num_users={num_users}"
        )
    num_users = int(num_users)
    of = f"num_users is {num_users}"
    return names, _checks.host_indices(place, num_users, "user", of), num_users


def _are_indices(array: np.ndarray) -> bool:
    """True where the numbers from 0 to the largest all occur; memory is O(N)."""
    if array.dtype.kind == "U":
        return False
    array = array[array >= 0] if (array < 0).any() else array
    if array.dtype == np.uint64 or array.max(initial=-1) >= len(array):
        return False
    return bool(np.bincount(array).all()) if len(array) else False


def look_up(values: np.ndarray, names: np.ndarray, name: str, of: str) -> np.ndarray:
    """Positions of `values` among the distinct `names`, int[N]; both from `column`."""
    if not values.size:
        return np.zeros(0, np.int64)
    check_same_kind(values, names, name, of)
    if values.dtype != names.dtype and values.dtype.kind != "U":  # int64 and uint64
        values, names = values.astype(object), names.astype(object)
    if not len(names):
        wrong = np.zeros(1, np.int64)
        found = wrong
    else:
        by_name = np.argsort(names)
        place = np.searchsorted(names, values, sorter=by_name)
        found = by_name[np.minimum(place, len(names) - 1)]
        wrong = np.flatnonzero(names[found] != values)
    if wrong.size:
        value = values[wrong[0]]
        value = value.item() if isinstance(value, np.generic) else value
        raise ValueError(f"{name}[{wrong[0]}] is {value!r}, which is not in {of}")
    return found


def check_same_kind(values: np.ndarray, names: np.ndarray, name: str, of: str) -> None:
    """Raises `TypeError` where one holds strings and the other integers."""
    strings = values.dtype.kind == "U"
    if values.size and strings != (names.dtype.kind == "U"):
        kinds = ("strings", "integers")[:: 1 if strings else -1]
        raise TypeError(
            f"{name} holds {kinds[0]} and {of} {kinds[1]}: what is named is referred "
            "to by its name, and 1 and '1' are two names"
        )


def of_weights(weights: Any) -> tuple[Any, np.ndarray | None, bool]:
    """(float[U, K], names or None, whether a record brought them).

    Args:
      weights: an array, or what `adapt`, `posterior` or `fit` returned.
    """
    if hasattr(weights, "weights") and hasattr(weights, "user_ids"):
        return weights.weights, weights.user_ids, True
    return weights, None, False


def match_weights(weights: Any, names: np.ndarray | None, user_ids: Any = None) -> Any:
    """Weights float[U, K] of the users of `prefs`, by name where they have names.

    Args:
      weights: what `adapt`, `posterior` or `fit` returned, or float[U, K], whose row u
        is user u of `prefs`.
      names: of the users of `prefs`, or None.
      user_ids: of the rows of plain weights, or None.

    Raises:
      ValueError: a user of `prefs` is not among those of `weights`, or only one of them
        names its users.
    """
    array, own, is_record = of_weights(weights)
    if isinstance(array, list | tuple):
        array = _checks.host_array(array, "weights")
    if user_ids is not None:
        if is_record:
            raise ValueError(
                "user_ids belongs to plain weights; what adapt or fit returned brings "
                "its own"
            )
        own = unique(user_ids, "user_ids")
        if len(own) != np.shape(array)[0]:
            raise ValueError(
                f"user_ids must name every row of weights: {len(own)} names for "
                f"{np.shape(array)[0]} rows"
            )
    if own is None and names is None:
        return array
    if own is None and not is_record:
        raise ValueError(
            "prefs names its users and weights is a plain array: pass what adapt or "
            "fit returned, or user_ids, the names of the rows of weights"
        )
    sizes = len(own) if own is not None else np.shape(array)[0]
    if own is None or names is None or not np.array_equal(own, names):
        return array[match_users(names, own, sizes, sizes, "prefs", "weights")]
    return array


def match_users(
    names: np.ndarray | None,
    known: np.ndarray | None,
    num_users: int,
    num_known: int,
    name: str,
    of: str,
) -> np.ndarray:
    """int[U'], where users stand among known ones: by name, or by number without names.

    Args:
      names: of the users, or None.
      known: names of the known users, or None.
      num_users: U'.
      num_known: U, which U' must be where neither side has names.
      name: of the argument that has the users.
      of: of what has the known ones.

    Raises:
      ValueError: a user is not known, only one side has names, or neither has and the
        numbers differ.
    """
    if (names is None) != (known is None):
        named, plain = (name, of)[:: 1 if known is None else -1]
        raise ValueError(
            f"{named} names its users and {plain} does not: users are never matched "
            "by position where one side has names"
        )
    if names is not None and known is not None:
        return look_up(np.asarray(names), np.asarray(known), f"user_ids of {name}", of)
    if num_users != num_known:
        raise ValueError(
            f"{name} must hold the users of {of}: {num_users} and {num_known} users, "
            "and neither has names"
        )
    return np.arange(num_users)


def queried(
    user: Any,
    names: np.ndarray | None,
    num_users: int,
    name: str = "user",
    of: str = "weights",
) -> Any:
    """int32[Q] numbers of users, from numbers or from names where `of` has names."""
    if _checks.is_traced(user):
        if names is None:
            return _traced_numbers(user, name)
        raise TypeError(
            f"{name} is traced and the users of {of} have names: pass {of} without "
            "names, or names outside of jit, grad and vmap"
        )
    array = column(user, name)
    if names is not None:
        array = look_up(array, np.asarray(names), name, f"the users of {of}")
    elif array.dtype.kind == "U" and array.size:
        raise TypeError(
            f"{name} holds names, so {of} must name its users, as what adapt or fit "
            "returned for named users does"
        )
    return _checks.host_indices(array, num_users, name, f"U is {num_users}")


def row_numbers(rows: Any, num_rows: int, name: str = "rows") -> Any:
    """int32[n] rows of the table; traced ones are not checked."""
    if _checks.is_traced(rows):
        return _traced_numbers(rows, name)
    of = f"features has M={num_rows} rows"
    return _checks.host_indices(rows, num_rows, name, of)


def _traced_numbers(values, name: str):
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be integers, got {values.dtype}{list(values.shape)}"
        )
    return values
