"""Additive state of users: pairs come in any order, batch or shard, and are forgotten.

A user's state is a sum over pairs (`quadratic`), so states add where pairs unite. The
posterior over atoms stays exact; the refinement uses a quadratic bound of the
likelihood, which costs at most a fraction of a point against `adapt` on the pairs.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lore_jax import _checks, _ids, _tables
from lore_jax._entry import public
from lore_jax._pairs.blocks import project_rows
from lore_jax._pairs.pack import chunk_reader, chunks
from lore_jax._posterior.sums import pair_sums, refine
from lore_jax.preferences import Ids, Preferences
from lore_jax.prior import Prior, check_prior

FORMAT = "lore_jax.users"

VERSION = 1

_CHUNKS = (16384, 1024, 64)

_SUMS = ("table", "linear", "quadratic", "num_pairs")

_PRIOR = (
    *("atoms", "log_weights", "concentration", "tempering", "spread", "decay"),
    "margin_scale",
)


class UserStates(struct.PyTreeNode):
    """What is remembered of every user; NumPy arrays on the host.

    Attributes:
      table: float[U, A].
      linear: b, float[U, K].
      quadratic: upper triangle of H, row by row, float[U, K (K + 1) / 2].
      num_pairs: float[U], Σ of pair weights.
      prior: under which the sums were taken.
      fingerprint: of the basis, "" before the first pair.
      ids: names of the users, or None where users are numbers.
    """

    table: Any
    linear: Any
    quadratic: Any
    num_pairs: Any
    prior: Prior
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


def basis_fingerprint(basis: Any) -> str:
    """Names a basis: a hash of its shape and of its numbers in float32."""
    array = np.ascontiguousarray(np.asarray(basis, np.float32))
    text = f"{array.shape}".encode() + array.tobytes()
    return hashlib.sha256(text).hexdigest()[:32]


@public("adapt_users, a function of arrays")
def start_users(prior: Prior, num_users: int, user_ids: Any = None) -> UserStates:
    """The state of users who have said nothing.

    Args:
      prior: what `fit` learned.
      num_users: U ≥ 1.
      user_ids: U distinct names, strings or integers.

    Raises:
      ValueError: a shape is wrong, or a name stands twice.
      TypeError: `prior` is no `Prior`.
    """
    check_prior(prior, np.shape(getattr(prior, "atoms", np.zeros((1, 1))))[-1])
    names, _, num_users = _ids.users(np.zeros(0, np.int32), num_users, user_ids)
    prior = jax.tree.map(np.asarray, prior)
    atoms, rank = prior.atoms.shape
    sizes = ((atoms,), (rank,), (rank * (rank + 1) // 2,), ())
    sums = [np.zeros((num_users, *size), prior.atoms.dtype) for size in sizes]
    return UserStates(*sums, prior=prior, ids=_named(names))


@public("adapt_users, a function of arrays")
def observe(state: UserStates, basis: jax.Array, prefs: Preferences) -> UserStates:
    """The state after more pairs; the old one stays as it was.

    The arrays are copied, so observe in batches.

    Args:
      state: of U users.
      basis: V, float[D, K], the same in every call.
      prefs: new pairs. With names, of any of the state's users; without, of all U
        by number.

    Returns:
      `UserStates`.

    Raises:
      ValueError: another basis, an unknown user, or shapes disagree.
    """
    _checks.check_type(state, UserStates, "state")
    _checks.check_type(prefs, Preferences, "prefs")
    _checks.check_basis(basis, prefs.num_features)
    check_prior(state.prior, np.shape(basis)[1])
    mark = _same_fingerprint(state.fingerprint, basis_fingerprint(basis), "basis")
    place = _places(state, prefs)
    prior = jax.tree.map(jnp.asarray, state.prior).replace(temperature=1.0)
    sums = [np.array(getattr(state, name)) for name in _SUMS]
    proj = project_rows(prefs.features, basis)
    _tables.check_projected(proj, prefs.features, state.prior.temperature)
    read = chunk_reader(proj, prefs)
    for chunk in chunks(np.asarray(prefs.counts), np.asarray(prefs.offsets)):
        z, weight, label = read(chunk)
        z = jnp.asarray(z, sums[0].dtype) / state.prior.temperature
        parts = pair_sums(z, weight, label, prior, unit_weights=prefs.weight is None)
        for total, part in zip(sums, parts, strict=True):
            total[place[chunk.users]] += np.asarray(part)[: len(chunk.users)]
    changes = dict(zip(_SUMS, sums, strict=True))
    return state.replace(**changes, fingerprint=mark)


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
        for field in _SUMS:
            _checks.check_finite(getattr(state, field), f"{name}.{field}")
    mark = _same_fingerprint(a.fingerprint, b.fingerprint, "b")
    same = a.prior.temperature == b.prior.temperature and all(
        np.array_equal(getattr(a.prior, n), getattr(b.prior, n)) for n in _PRIOR
    )
    if not same:
        raise ValueError("a and b were started under different priors")
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
        fresh = others[~np.isin(others, names)]
        names = np.concatenate([names, fresh])
        place = _ids.look_up(others, names, "b.user_ids", "a.user_ids")
    sums = {}
    for name in _SUMS:
        mine, other = getattr(a, name), getattr(b, name)
        size = a.num_users if names is None else len(names)
        sums[name] = np.zeros((size, *mine.shape[1:]), mine.dtype)
        sums[name][: a.num_users] = mine
        sums[name][place] += other
    return a.replace(**sums, fingerprint=mark, ids=_named(names))


@public("adapt_users, a function of arrays")
def weights(state: UserStates) -> np.ndarray:
    """Refined posterior weights float[U, K], as `adapt` but from the state.

        argmax_p  η_u (b·p − ½ pᵀ H p) + κ Σ_k p̄_k log p_k   on the simplex

    A user without pairs gets the prior's mean. Users whose solve did not converge
    keep the last iterate, and a warning counts them.
    """
    _checks.check_type(state, UserStates, "state")
    check_prior(state.prior, np.shape(state.linear)[-1])
    for name in _SUMS:
        _checks.check_finite(getattr(state, name), f"state.{name}")
    prior = jax.tree.map(jnp.asarray, state.prior)
    out = np.empty(state.linear.shape, state.linear.dtype)
    failed = start = 0
    while start < len(out):
        left = len(out) - start
        size = next((c for c in _CHUNKS if 4 * left > c), _CHUNKS[-1])
        stop = min(start + size, len(out))
        parts = []
        for name in _SUMS:
            rows = getattr(state, name)[start:stop]
            parts.append(np.zeros((size, *rows.shape[1:]), rows.dtype))
            parts[-1][: stop - start] = rows
        found, good = refine(*parts, prior.replace(temperature=1.0))
        out[start:stop] = np.asarray(found)[: stop - start]
        failed += np.sum(~np.asarray(good)[: stop - start])
        start = stop
    if failed:
        warnings.warn(f"{failed} of {len(out)} users did not converge", stacklevel=3)
    return out


def to_arrays(state: UserStates) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) that a file can hold; `from_arrays` is the inverse."""
    arrays = {name: np.asarray(getattr(state, name)) for name in _SUMS}
    arrays |= {name: np.asarray(getattr(state.prior, name)) for name in _PRIOR}
    if state.user_ids is not None:
        text = json.dumps(state.user_ids.tolist()).encode()
        arrays["user_ids"] = np.frombuffer(text, np.uint8)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "temperature": repr(float(state.prior.temperature)),
        "fingerprint": state.fingerprint,
    }
    return arrays, metadata


def from_arrays(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> UserStates:
    """A state from what `to_arrays` gave; checks format, names, shapes and numbers.

    Raises:
      ValueError: something is missing, foreign, or does not fit together.
    """
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"expected format {FORMAT!r} version {VERSION}, got "
            f"{metadata.get('format')!r} version {metadata.get('version')!r}"
        )
    needed = {*_SUMS, *_PRIOR}
    if set(arrays) - {"user_ids"} != needed:
        raise ValueError(f"arrays must be {sorted(needed)}, got {sorted(arrays)}")
    try:
        temperature, mark = float(metadata["temperature"]), metadata["fingerprint"]
        names = None
        if "user_ids" in arrays:
            names = json.loads(np.asarray(arrays["user_ids"]).tobytes())
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"damaged metadata: {error}") from error
    fields: Any = {n: np.asarray(arrays[n]) for n in _PRIOR}
    prior = Prior(**fields, temperature=temperature)
    try:
        fresh = start_users(prior, len(arrays["num_pairs"]), names)
    except TypeError as error:
        raise ValueError(f"damaged arrays: {error}") from error
    for name in _SUMS:
        want, got = getattr(fresh, name), arrays[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"{name} must be {want.dtype}{list(want.shape)}, got "
                f"{got.dtype}{list(got.shape)}"
            )
        _checks.check_finite(got, name)
    sums = {name: arrays[name] for name in _SUMS}
    return fresh.replace(**sums, fingerprint=mark)


def _named(names: np.ndarray | None) -> Ids | None:
    return None if names is None else Ids(names, None)


def _same_fingerprint(old: str, new: str, what: str) -> str:
    if old and new and old != new:
        raise ValueError(
            f"{what} has fingerprint {new}, but the state belongs to the basis {old}"
        )
    return old or new


def _places(state: UserStates, prefs: Preferences) -> np.ndarray:
    """int[U'], where each user of `prefs` stands in the state."""
    names: Any = None if prefs.ids is None else prefs.ids.users
    known: Any = state.user_ids
    if (names is None) != (state.user_ids is None):
        raise ValueError(
            "prefs and the state must both name their users, or neither: users are "
            "never matched by position where one side has names"
        )
    if names is not None:
        return _ids.look_up(names, known, "prefs.ids.users", "the state")
    if prefs.num_users != state.num_users:
        raise ValueError(
            f"prefs has num_users={prefs.num_users}, the state {state.num_users}, and "
            "neither has names"
        )
    return np.arange(state.num_users)
