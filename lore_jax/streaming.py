"""Additive state of users: pairs come in any order, batch or shard, and are forgotten.

A user's state is a sum over pairs, so states add where pairs unite. The posterior over
atoms stays exact. The refinement uses a quadratic bound of the likelihood.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lore_jax import _checks, _ids
from lore_jax._entry import public
from lore_jax._ids import Ids
from lore_jax._pairs.projected import Projected, checked_pairs
from lore_jax._posterior.sums import pair_sums, refine
from lore_jax.model import RewardModel, check_model, prior_of
from lore_jax.preferences import Preferences
from lore_jax.prior import Prior, check_prior

_CHUNKS = (16384, 1024, 64)

SUMS = ("table", "linear", "quadratic", "num_pairs")

_PRIOR = tuple(field.name for field in dataclasses.fields(Prior))


class UserStates(struct.PyTreeNode):
    """What is remembered of every user; NumPy arrays on the host.

    Attributes:
      table: float[U, A].
      linear: b, float[U, K].
      quadratic: upper triangle of H, row by row, float[U, K (K + 1) / 2].
      num_pairs: float[U], Σ of pair weights.
      prior: of the model, under which the sums were taken.
      temperature: T of the model.
      fingerprint: of the model's basis.
      ids: names of the users, or None where users are numbers.
    """

    table: Any
    linear: Any
    quadratic: Any
    num_pairs: Any
    prior: Prior
    temperature: float = struct.field(pytree_node=False, default=1.0)
    fingerprint: str = struct.field(pytree_node=False, default="")
    ids: Ids | None = struct.field(pytree_node=False, default=None)

    @property
    def user_ids(self) -> np.ndarray | None:
        """str[U] or int[U], or None where users are numbers."""
        return None if self.ids is None else self.ids.users

    @property
    def num_users(self) -> int:
        """U."""
        return self.table.shape[0]

    def __repr__(self) -> str:
        """How many users and pairs."""
        names = "" if self.ids is None else ", named"
        users, rank = np.shape(self.linear)
        return f"UserStates({users} users{names}, K={rank})"


def basis_fingerprint(basis: Any) -> str:
    """Names a basis: a hash of its shape and of its numbers in float32."""
    array = np.ascontiguousarray(np.asarray(basis, np.float32))
    text = f"{array.shape}".encode() + array.tobytes()
    return hashlib.sha256(text).hexdigest()[:32]


@public("adapt_users, a function of arrays")
def init(
    model: RewardModel, *, num_users: int | None = None, user_ids: Any = None
) -> UserStates:
    """The state of users who have said nothing.

    Args:
      model: the reward model.
      num_users: U ≥ 1; not needed where `user_ids` is given.
      user_ids: U distinct names, strings or integers.

    Raises:
      ValueError: a shape is wrong, a name stands twice, or neither of `num_users` and
        `user_ids` is given.
      TypeError: `model` is something else.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> lore.streaming.init(model, user_ids=["ann", "bob"]).num_users
      2
    """
    check_model(model)
    if num_users is None and user_ids is None:
        raise ValueError("num_users or user_ids must say how many users there are")
    names, _, num_users = _ids.users(np.zeros(0, np.int32), num_users, user_ids)
    prior = jax.tree.map(np.asarray, prior_of(model))
    mark = basis_fingerprint(model.basis)
    return empty_states(prior, num_users, names, model.temperature, mark)


def empty_states(
    prior: Prior, num_users: int, names, temperature: float, fingerprint: str
) -> UserStates:
    """`init` from the parts of a model; nothing is checked."""
    atoms, rank = prior.atoms.shape
    sizes = ((atoms,), (rank,), (rank * (rank + 1) // 2,), ())
    sums = [np.zeros((num_users, *size), prior.atoms.dtype) for size in sizes]
    return UserStates(
        *sums,
        prior=prior,
        temperature=float(temperature),
        fingerprint=fingerprint,
        ids=_named(names),
    )


@public("adapt_users, a function of arrays")
def update(model: RewardModel, state: UserStates, prefs: Preferences) -> UserStates:
    """The state after more pairs; the old one stays as it was.

    The arrays are copied, so update in batches.

    Args:
      model: the one that `init` got.
      state: of U users.
      prefs: new pairs. With names, of any of the state's users; without, of all U
        by number.

    Returns:
      `UserStates`.

    Raises:
      ValueError: another model, an unknown user, or shapes disagree.
      TypeError: an argument is something else.

    Example:
      >>> prefs = lore.Preferences.from_pairs(np.eye(3), [0, 0], [1, 2], [0, 0])
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> state = lore.streaming.init(model, num_users=1)
      >>> lore.streaming.update(model, state, prefs).num_pairs.tolist()
      [2.0]
    """
    _checks.check_type(state, UserStates, "state")
    found = checked_pairs(model, prefs)
    check_same_model(state, model, "state")
    users = (prefs.user_ids, state.user_ids), (prefs.num_users, state.num_users)
    place = _ids.match_users(*users[0], *users[1], "prefs", "state")
    sums = [np.array(getattr(state, name)) for name in SUMS]
    for users, parts in pair_sums_of(found, state.prior, state.temperature):
        for total, part in zip(sums, parts, strict=True):
            total[place[users]] += part
    return state.replace(**dict(zip(SUMS, sums, strict=True)))


def pair_sums_of(found: Projected, prior: Prior, temperature: float):
    """Yields (users int[n], their four sums over pairs) chunk by chunk."""
    dtype = prior.atoms.dtype
    prior = jax.tree.map(jnp.asarray, prior)
    for chunk in found.pairs.chunks():
        z, weight, label = found.read(chunk)
        z = jnp.asarray(z, dtype) / temperature
        kinds = dict(unit_weights=found.pairs.unit_weights)
        parts = pair_sums(z, weight, label, prior, **kinds)
        yield chunk.users, [np.asarray(x)[: len(chunk.users)] for x in parts]


@public("adapt_users, a function of arrays")
def merge(a: UserStates, b: UserStates) -> UserStates:
    """The state of the union of two disjoint sets of pairs.

    Named users are matched by name and may stand in either state: `a`'s come first,
    then those that only `b` knows, so merging with fresh users adds them.

    Raises:
      ValueError: the states belong to different bases or priors, only one of them
        names its users, or neither does and U differs.
    """
    for name, state in (("a", a), ("b", b)):
        _checks.check_type(state, UserStates, name)
        for field in SUMS:
            _checks.check_finite(getattr(state, field), f"{name}.{field}")
    _check_same(a, b.fingerprint, b.prior, b.temperature, "a", "b")
    if (a.user_ids is None) != (b.user_ids is None):
        raise ValueError("a and b must both name their users, or neither")
    names: Any = a.user_ids
    others: Any = b.user_ids
    if names is None:
        if a.num_users != b.num_users:
            raise ValueError(
                f"a and b must hold the same users: {a.num_users} and {b.num_users}, "
                "and neither has names"
            )
        place = np.arange(a.num_users)
    else:
        _ids.check_same_kind(others, names, "b", "a")
        both = _ids.joined([names, others], "user_ids of a and b")
        names, others = both[: len(names)], both[len(names) :]
        fresh = others[~np.isin(others, names)]
        names = np.concatenate([names, fresh])
        place = _ids.look_up(others, names, "b.user_ids", "a.user_ids")
    sums = {}
    for name in SUMS:
        mine, other = getattr(a, name), getattr(b, name)
        size = a.num_users if names is None else len(names)
        sums[name] = np.zeros((size, *mine.shape[1:]), mine.dtype)
        sums[name][: a.num_users] = mine
        sums[name][place] += other
    return a.replace(**sums, ids=_named(names))


@public("adapt_users, a function of arrays")
def weights(state: UserStates) -> np.ndarray:
    """Refined posterior weights float[U, K], as `adapt` but from the state.

        argmax_p  η_u (b·p − ½ pᵀ H p) + κ Σ_k p̄_k log p_k   on the simplex

    A user without pairs gets the prior's mean. Users whose solve did not converge
    keep the last iterate, and a warning counts them.

    Example:
      >>> model = lore.RewardModel(np.eye(3, 2))
      >>> lore.streaming.weights(lore.streaming.init(model, num_users=2)).round(2)
      array([[0.5, 0.5],
             [0.5, 0.5]], dtype=float32)
    """
    _checks.check_type(state, UserStates, "state")
    check_prior(state.prior, np.shape(state.linear)[-1])
    for name in SUMS:
        _checks.check_finite(getattr(state, name), f"state.{name}")
    return solve_sums([getattr(state, name) for name in SUMS], state.prior)


def solve_sums(sums: Sequence[np.ndarray], prior: Prior) -> np.ndarray:
    """`weights` of users with these four sums."""
    prior = jax.tree.map(jnp.asarray, prior)
    out = np.empty(sums[1].shape, sums[1].dtype)
    failed = start = 0
    while start < len(out):
        left = len(out) - start
        size = next((c for c in _CHUNKS if 4 * left > c), _CHUNKS[-1])
        stop = min(start + size, len(out))
        parts = []
        for values in sums:
            rows = values[start:stop]
            parts.append(np.zeros((size, *rows.shape[1:]), rows.dtype))
            parts[-1][: stop - start] = rows
        found, good = refine(*parts, prior)
        out[start:stop] = np.asarray(found)[: stop - start]
        failed += np.sum(~np.asarray(good)[: stop - start])
        start = stop
    if failed:
        _checks.warn(f"{failed} of {len(out)} users did not converge")
    return out


def _named(names: np.ndarray | None) -> Ids | None:
    return None if names is None else Ids(names, None)


def check_same_model(state: UserStates, model: RewardModel, name: str) -> None:
    """Raises `ValueError` unless a state belongs to a model."""
    mark, prior = basis_fingerprint(model.basis), prior_of(model)
    check_prior(state.prior, model.rank)
    _check_same(state, mark, prior, model.temperature, name, "model")


def _check_same(state: UserStates, mark, prior, temperature, name, other) -> None:
    if state.fingerprint != mark:
        raise ValueError(
            f"{name} belongs to a basis with fingerprint {state.fingerprint}, {other} "
            f"to that with {mark}"
        )
    names = f"those of {name} and of {other}"
    _checks.check_same_temperature(state.temperature, temperature, names)
    for field in _PRIOR:
        if not np.array_equal(getattr(state.prior, field), getattr(prior, field)):
            raise ValueError(
                f"{name} and {other} have different priors: {field} disagrees"
            )
