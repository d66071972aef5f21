"""Votes: the latest of each user and item, and random pairs of them."""

from typing import Any

import numpy as np

from lore_jax import _checks, _ids


def pairs_from_votes(
    user: Any, item: Any, vote: Any, *, limit: int, seed: int = 0, time: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random distinct pairs (agreed with, disagreed with) of each voter.

    A positive vote agrees, a negative one disagrees, 0 is passed over: votes coded 0
    and 1 give no pair. (The database of Polis stores agreement as −1, its exports as
    +1: turn the sign of the former.)

    Args:
      user: int[n] or str[n], who voted.
      item: int[n] or str[n], on what.
      vote: finite numbers[n].
      limit: at most so many pairs per user.
      seed: of the draw.
      time: numbers or datetimes[n]. Of several votes of a user on an item the latest
        counts; without `time` they are refused.

    Returns:
      (chosen, rejected, user), each [N], of the given users and items; int32 where
      the numbers fit.

    Raises:
      ValueError: lengths disagree, `limit` is below 1, an entry is missing or not
        finite, or a user has several votes on an item, none of them the latest.
      TypeError: an argument has the wrong dtype; votes are booleans.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    user, item, vote = read_votes(user, item, vote, time)
    rng = np.random.default_rng(seed)
    code = np.unique(user, return_inverse=True)[1]
    by_user = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[by_user], prepend=-1))
    none = np.zeros(0, np.intp)
    out = [(none, none, none)]
    for place in np.split(by_user, starts[1:]):
        agreed, disagreed = place[vote[place] > 0], place[vote[place] < 0]
        total = len(agreed) * len(disagreed)
        drawn = rng.choice(total, min(limit, total), replace=False)
        first, second = np.divmod(drawn, max(1, len(disagreed)))
        out.append((agreed[first], disagreed[second], agreed[first]))
    first, second, voter = (np.concatenate(c) for c in zip(*out))
    return _short(item[first]), _short(item[second]), _short(user[voter])


def _short(ids: np.ndarray) -> np.ndarray:
    fits = ids.dtype.kind != "U" and (ids == ids.astype(np.int32)).all()
    return ids.astype(np.int32) if fits else ids


def read_votes(user: Any, item: Any, vote: Any, time: Any = None):
    """(user, item, vote) with one vote of a user on an item.

    Args:
      user: int[n] or str[n], who voted.
      item: int[n] or str[n], on what.
      vote: finite numbers[n].
      time: numbers or datetimes[n]: of several votes of a user on an item the latest
        counts. None: there must be one.

    Raises:
      ValueError: lengths disagree, an entry is missing or not finite, or the latest
        vote of a user on an item is not one.
      TypeError: an argument has the wrong dtype; votes are booleans.
    """
    user, item = _ids.column(user, "user"), _ids.column(item, "item")
    array = _checks.host_array(vote, "vote")
    if array.dtype.kind == "b":
        raise TypeError(
            "vote must hold signed numbers, got booleans: pass 2 * vote - 1 where "
            "False disagrees"
        )
    _checks.host_length(item, len(user), "item")
    vote = _checks.host_floats(array, len(user), "vote", -np.inf, np.inf)
    if vote is None:
        raise TypeError("vote must hold signed numbers, got None")
    codes = [
        np.unique(x, return_inverse=True)[1].astype(np.int64) for x in (user, item)
    ]
    cast = codes[0] * (codes[1].max(initial=0) + 1) + codes[1]
    moments = None if time is None else _times(time, len(user))
    order = np.lexsort((cast,) if moments is None else (moments, cast))
    again = np.flatnonzero(cast[order][1:] == cast[order][:-1])
    latest = np.ones(len(user), bool)
    latest[order[again]] = False
    for place in again:
        first, second = order[place : place + 2]
        if moments is None:
            raise ValueError(
                "vote must hold one vote of a user on an item; "
                f"{_of(user, item, first)} stands at {first} and at {second}. Pass "
                "time=, and the latest counts"
            )
        if latest[second] and moments[first] == moments[second]:
            raise ValueError(
                f"time must say which vote is the latest; {_of(user, item, first)} "
                f"stands at {first} and at {second} at the same time"
            )
    return user[latest], item[latest], vote[latest]


def _of(user, item, place) -> str:
    return f"that of {user[place].item()!r} on {item[place].item()!r}"


def _times(time: Any, length: int) -> np.ndarray:
    array = _checks.host_array(time, "time")
    if array.dtype.kind in "Mm":
        _checks.host_length(array, length, "time")
        missing = np.flatnonzero(np.isnat(array))
        if missing.size:
            raise ValueError(f"time[{missing[0]}] is missing (NaT)")
        return array
    if array.dtype.kind in "iu":  # Nanoseconds need all of their 64 bits.
        _checks.host_length(array, length, "time")
        return array
    found = _checks.host_floats(array, length, "time", -np.inf, np.inf)
    if found is None:
        raise TypeError("time must hold numbers or datetimes, got None")
    return found
