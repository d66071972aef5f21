"""`UserStore`: users by name, updated in place, for a service."""

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lore_jax import _checks, _ids, _tables
from lore_jax._entry import public
from lore_jax._ids import Ids
from lore_jax._pairs.blocks import project_rows
from lore_jax._pairs.projected import checked_pairs
from lore_jax.io.checkpoint import load_users, save_users
from lore_jax.model import RewardModel, check_model, prior_of
from lore_jax.preferences import Preferences
from lore_jax.streaming import (
    SUMS,
    UserStates,
    basis_fingerprint,
    check_same_model,
    pair_sums_of,
    solve_sums,
)

_LEAST = 64  # users that a new store has arrays for
_MOST = np.iinfo(np.int64).max
_ON_HOST = "streaming.update, a function of records outside of jit"


class UserStore:
    """What users have said, by name: add, observe, read, forget.

    A user's state is the sums over pairs of `streaming`, kept in arrays that grow by
    doubling: adding a user and observing a few pairs cost the same for ten users as for
    a million. Weights are solved for when they are read, for the users that are read,
    and kept until the user says something new.

    Every method may be called from any thread: writers take turns, and a reader sees
    each user before or after a write, never in between.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2, dtype=np.float32))
      >>> store = lore.UserStore(model)
      >>> pairs = lore.Preferences.from_pairs(
      ...     np.eye(3, dtype=np.float32), [0, 0], [1, 2], ["ann", "ann"]
      ... )
      >>> store.observe(pairs)
      >>> len(store), "ann" in store, "bob" in store
      (1, True, False)
      >>> store.weights(["ann"]).shape
      (1, 2)
      >>> store.delete(["ann"])
      >>> len(store)
      0
    """

    def __init__(self, model: RewardModel):
        """An empty store.

        Raises:
          TypeError: `model` is no `RewardModel`.
          ValueError: its parts do not fit together.
        """
        check_model(model)
        self.model = model
        self._prior = jax.tree.map(np.asarray, prior_of(model))
        self._fingerprint = basis_fingerprint(model.basis)
        self._lock = threading.RLock()
        self._slots: dict[Any, int] = {}
        self._limits = 0, 0  # no integer name is outside of them
        self._free: list[int] = []
        atoms, rank = np.shape(self._prior.atoms)
        sizes = ((atoms,), (rank,), (rank * (rank + 1) // 2,), ())
        dtype = self._prior.atoms.dtype
        self._sums = [np.zeros((_LEAST, *size), dtype) for size in sizes]
        self._rank = int(rank)
        self._weights: Any = np.zeros((_LEAST, rank), dtype)
        self._solved: Any = np.zeros(_LEAST, bool)

    def __len__(self) -> int:
        """How many users there are."""
        return len(self._slots)

    def __contains__(self, user: Any) -> bool:
        """Whether the store knows this name."""
        return user in self._slots

    def __iter__(self) -> Iterator[Any]:
        """Names, in no particular order, as they were when this was called."""
        with self._lock:
            return iter(list(self._slots))

    def __repr__(self) -> str:
        """How many users."""
        return f"UserStore({len(self)} users, K={self._rank})"

    @public(_ON_HOST)
    def add(self, users: Sequence[Any]) -> None:
        """Adds users who have said nothing; those that are known stay as they are.

        Args:
          users: names, strings or integers.

        Raises:
          ValueError: a name is missing, or strings and integers are mixed.
          TypeError: `users` is no sequence of names.
        """
        names = _names(users)
        with self._lock:
            self._check_kind(names)
            self._places(names, add=True)

    @public(_ON_HOST)
    def observe(self, pairs: Preferences) -> None:
        """Takes in pairs; users that are not known are added.

        Args:
          pairs: new pairs, whose users have names.

        Raises:
          ValueError: users have no names, or a number is not finite; nothing is taken
            in then.
          TypeError: `pairs` is no `Preferences`.
        """
        found = checked_pairs(self.model, pairs)
        if pairs.user_ids is None:
            raise ValueError(
                "pairs must name its users: a store knows users by name (from_pairs "
                "takes names for user, or user_ids)"
            )
        names = pairs.user_ids.tolist()
        parts = list(pair_sums_of(found, self._prior, self.model.temperature))
        with self._lock:
            self._check_kind(names)
            place = self._places(names, add=True)
            for users, sums in parts:
                for total, part in zip(self._sums, sums, strict=True):
                    total[place[users]] += part
            self._solved[place] = False

    @public(_ON_HOST)
    def weights(self, users: Sequence[Any]) -> np.ndarray:
        """Mixture weights of these users, float[n, K].

        Args:
          users: names of known users.

        Raises:
          ValueError: a user is not known; the message names it.
          TypeError: `users` is no sequence of names.
        """
        names = _names(users)
        with self._lock:
            place = self._places(names)
            stale = place[~self._solved[place]]
            stale = np.unique(stale)
            sums = [total[stale] for total in self._sums]
            if len(stale):
                self._weights[stale] = solve_sums(sums, self._prior)
                self._solved[stale] = True
            return self._weights[place]

    @public(_ON_HOST)
    def score(self, users: Sequence[Any], features: Any) -> np.ndarray:
        """Rewards of every response for these users, float[n, M].

        Args:
          users: names of known users.
          features: float[M, D] or a `FeatureSource`.

        Raises:
          ValueError: a user is not known, or shapes disagree.
          TypeError: `users` is no sequence of names.
        """
        weights = self.weights(users)
        _tables.num_rows(features)
        _checks.check_basis(self.model.basis, _tables.num_columns(features))
        proj = project_rows(features, self.model.basis)
        _tables.check_projected(proj, features, self.model.temperature)
        scale = np.asarray(1 / self.model.temperature, weights.dtype)
        return weights @ np.asarray(proj).T * scale

    @public(_ON_HOST)
    def top_k(
        self, users: Sequence[Any], features: Any, *, k: int, exclude: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best responses for each of these users, best first.

        Args:
          users: names of known users.
          features: float[M, D] or a `FeatureSource`.
          k: how many, at most M.
          exclude: rows that each user must not get, a sequence of int[·], one per user;
            or None.

        Returns:
          (scores float[n, k], rows int64[n, k]); −inf and −1 where fewer than k
          responses are left for a user.

        Raises:
          ValueError: a user is not known, a row or k is out of range, or shapes
            disagree.
          TypeError: `users` is no sequence of names, or k no integer.
        """
        scores = self.score(users, features)
        _checks.check_count(k, "k")
        if k > scores.shape[1]:
            raise ValueError(f"k must be at most M={scores.shape[1]}, got {k}")
        if exclude is not None:
            if not isinstance(exclude, Sequence | np.ndarray):
                raise TypeError(
                    f"exclude must be a sequence of rows per user, got {exclude!r}"
                )
            if len(exclude) != len(scores):
                raise ValueError(
                    f"exclude must hold one sequence of rows per user, {len(scores)}, "
                    f"got {len(exclude)}"
                )
            for i, rows in enumerate(exclude):
                rows = _ids.row_numbers(rows, scores.shape[1], f"exclude[{i}]")
                scores[i, rows] = -np.inf
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        kept = np.take_along_axis(scores, best, axis=1)
        order = np.lexsort((best, -kept), axis=1)
        best = np.take_along_axis(best, order, axis=1)
        kept = np.take_along_axis(kept, order, axis=1)
        return kept, np.where(np.isneginf(kept), -1, best)

    @public(_ON_HOST)
    def delete(self, users: Sequence[Any]) -> None:
        """Forgets users: their names and sums are in no array and in no later file.

        Raises:
          ValueError: a user is not known; nobody is forgotten then.
          TypeError: `users` is no sequence of names.
        """
        names = _names(users)
        with self._lock:
            place = self._places(names)
            for name in names:
                self._slots.pop(name, None)
            for total in (*self._sums, self._weights):
                total[place] = 0
            self._solved[place] = False
            self._free += np.unique(place).tolist()

    def states(self) -> UserStates:
        """A copy of everything as `UserStates`, users in the order they were added."""
        with self._lock:
            names = list(self._slots)
            place = np.fromiter(self._slots.values(), np.int64, len(names))
            sums = [total[place] for total in self._sums]
        ids = _ids.column(names, "users") if names else np.zeros(0, np.str_)
        return UserStates(
            *sums,
            prior=self._prior,
            temperature=float(self.model.temperature),
            fingerprint=self._fingerprint,
            ids=Ids(ids, None),
        )

    @public(_ON_HOST)
    def merge(self, other: "UserStore | UserStates") -> None:
        """Adds what another store or state of the same model holds.

        Raises:
          ValueError: it belongs to another model, or its users have no names.
          TypeError: it is something else.
        """
        state = other.states() if isinstance(other, UserStore) else other
        _checks.check_type(state, UserStates, "other")
        check_same_model(state, self.model, "other")
        if state.user_ids is None:
            raise ValueError("other must name its users: a store knows users by name")
        names = state.user_ids.tolist()
        with self._lock:
            self._check_kind(names)
            place = self._places(names, add=True)
            for total, name in zip(self._sums, SUMS, strict=True):
                total[place] += getattr(state, name)
            self._solved[place] = False

    def save(self, path: str | os.PathLike) -> None:
        """Writes all users to `path`; a crash leaves an old file as it was.

        Raises:
          OSError: the file cannot be written.
        """
        save_users(path, self.states())

    @classmethod
    def load(cls, path: str | os.PathLike, model: RewardModel) -> "UserStore":
        """A store with the users that `save` or `save_users` wrote.

        Args:
          path: the file.
          model: the one that they belong to.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is damaged, or belongs to another model.
        """
        store = cls(model)
        store.merge(load_users(path))
        return store

    def _check_kind(self, names: list) -> None:
        """Raises where kinds of names would be mixed that no file can hold."""
        if not names:
            return
        known = next(iter(self._slots), names[0])
        if isinstance(known, str) != isinstance(names[0], str):
            raise ValueError(
                f"users must be all strings or all integers: the store knows "
                f"{known!r}, got {names[0]!r}"
            )
        if isinstance(known, str):
            return
        limits = _limits([*names, *self._limits])
        if _mixed(limits):  # Perhaps with users who are deleted.
            limits = _limits([*names, *self._slots])
        if _mixed(limits):
            raise ValueError(
                "users must be integers of 64 bits, all signed or all unsigned: the "
                f"store would hold {limits[0]} and {limits[1]}"
            )
        self._limits = limits

    def _places(self, names: list, add: bool = False) -> np.ndarray:
        """int[n], where users stand; unknown ones are added, or refused."""
        if not add:
            for name in names:
                if name not in self._slots:
                    raise ValueError(f"users: {name!r} is not in the store")
        new = [name for name in dict.fromkeys(names) if name not in self._slots]
        if new:
            self._reserve(len(self._slots) + len(new))
            for name in new:
                free = self._free.pop() if self._free else len(self._slots)
                self._slots[name] = free
        return np.array([self._slots[name] for name in names], np.int64)

    def _reserve(self, size: int) -> None:
        """Doubles the arrays until they hold so many users."""
        capacity = len(self._solved)
        if size <= capacity:
            return
        while capacity < size:
            capacity *= 2

        def grown(array):
            out = np.zeros((capacity, *array.shape[1:]), array.dtype)
            out[: len(array)] = array
            return out

        self._sums = [grown(total) for total in self._sums]
        self._weights, self._solved = grown(self._weights), grown(self._solved)


def _names(users: Any) -> list:
    """Names as Python strings or integers."""
    if isinstance(users, str | bytes | int | np.integer) or np.ndim(users) == 0:
        raise TypeError(f"users must be a sequence of names, got {users!r}")
    return _ids.column(users, "users").tolist()


def _limits(names: list[int]) -> tuple[int, int]:
    return min(names), max(names)


def _mixed(limits: tuple[int, int]) -> bool:
    """Whether some need a sign, and others the bit of the sign."""
    return limits[0] < 0 and limits[1] > _MOST
