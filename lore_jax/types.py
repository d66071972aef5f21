"""The records that everything else passes around.

D features of one response, K rank, U users, M distinct feature rows, N pairs.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lore_jax import _checks, _ids, _tables
from lore_jax._entry import public


@runtime_checkable
class FeatureSource(Protocol):
    """A feature table read in blocks of rows: for tables larger than memory.

    Attributes:
      shape: (M, D).
      dtype: storage type of the features.
    """

    shape: tuple[int, int]
    dtype: Any

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields consecutive blocks float[rows, D], M rows in all."""
        ...


class Ids:
    """Names of users and items, kept beside the arrays.

    A name is a string or an integer. Two records with equal names are equal, so they
    share compiled programs. The arrays are read-only.

    Attributes:
      users: str[U] or int[U], or None where users are indices.
      items: str[M] or int[M], or None where items are rows.
    """

    def __init__(self, users: np.ndarray | None, items: np.ndarray | None):
        """Keeps read-only views of both arrays."""
        self.users = _read_only(users)
        self.items = _read_only(items)

    @functools.cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the names; worked out once."""
        digest = hashlib.blake2b(digest_size=16)
        for names in (self.users, self.items):
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
        """True where both name the same users and items in the same order."""
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


class RewardParams(struct.PyTreeNode):
    """Parameters of the reward r_u(x) = x · V · softmax(w_u) / T.

    Attributes:
      basis: V, float[D, K], shared by every user.
      logits: w, float[U, K], one unconstrained row per user.
    """

    basis: jax.Array
    logits: jax.Array

    @property
    def weights(self) -> jax.Array:
        """float[U, K], softmax(logits): what `adapt`, `score`, `accuracy` take."""
        return jax.nn.softmax(self.logits, axis=-1)


class Prior(struct.PyTreeNode):
    """What is believed of a user before any pair: a finite mixture on the simplex.

    Attributes:
      atoms: float[A, K], points of the simplex.
      log_weights: float[A], log π, normalised.
      concentration: κ, float[]. Strength of the refinement's pull towards the
        posterior mean of a user with ten pairs, in pairs; infinity keeps the posterior
        mean itself.
      tempering: γ ≥ 0, float[]. The likelihood of a user with n pairs counts with power
        η = n^−γ: pairs of one user share responses and are not independent, so n of
        them are worth n^(1−γ).
      spread: ρ ≥ 0, float[], how much of the posterior's covariance `predict_proba`
        integrates over; `fit` learns it. The default gains less than a learned one.
      decay: δ, float[]. With n pairs the pull is κ_n = κ (n / 10)^−δ: above 0 where
        the atoms lie too far apart for users with many pairs.
      margin_scale: s > 0, float[]. `predict_proba` takes margins s-fold: above 1 where
        a regularised basis is less sure than it should be; `fit` learns it with ρ.
      temperature: T of the rewards that the atoms mix.
    """

    atoms: jax.Array
    log_weights: jax.Array
    concentration: jax.Array
    tempering: jax.Array
    spread: Any = np.float32(0.1)
    decay: Any = np.float32(0.0)
    margin_scale: Any = np.float32(1.0)
    temperature: float = struct.field(pytree_node=False, default=1.0)

    @property
    def mean(self) -> jax.Array:
        """float[K], Σ_a π_a atom_a: the weights of a user without pairs."""
        return mixture_mean(jax.nn.softmax(self.log_weights), self.atoms)


def mixture_mean(probabilities: jax.Array, atoms: jax.Array) -> jax.Array:
    """Σ_a probabilities[..., a] · atoms[a, K] at full precision."""
    return jnp.matmul(probabilities, atoms, precision=jax.lax.Precision.HIGHEST)


class Preferences(struct.PyTreeNode):
    """Pairwise choices over a shared table of responses; build with `from_pairs`.

    Pairs are stored stably sorted by user. Pair n says that `user[n]` preferred row
    `chosen[n]` of `features` to row `rejected[n]`.

    Attributes:
      features: float[M, D], one row per distinct response, or ready-made differences
        where `rejected` is None. NumPy arrays stay on the host, JAX arrays where
        they are; a `FeatureSource` is read in blocks.
      chosen: int32[N], row of the preferred response.
      rejected: int32[N], row of the other, or None.
      user: int32[N], 0 … U−1, ascending.
      offsets: int32[U + 1]; pairs offsets[u] … offsets[u + 1] − 1 are user u's.
      order: int32[N], place of each stored pair in the caller's order.
      label: float[N], P(chosen is preferred), or None for 1.
      weight: float[N], non-negative pair weights, or None for 1.
      group: int32[N], what must not be split between training and validation, or
        None for the default (user and row).
      num_users: U; users without a pair are legal.
      ids: names of users and items, or None.
    """

    features: Any
    chosen: Any
    rejected: Any
    user: Any
    offsets: Any
    order: Any
    label: Any = None
    weight: Any = None
    group: Any = None
    num_users: int = struct.field(pytree_node=False, default=0)
    ids: Ids | None = struct.field(pytree_node=False, default=None)

    @classmethod
    @public("prefs.replace(features=...) of a Preferences that was built outside")
    def from_pairs(
        cls,
        features: Any,
        chosen: Any,
        rejected: Any,
        user: Any,
        num_users: int | None = None,
        label: Any = None,
        weight: Any = None,
        group: Any = None,
        *,
        user_ids: Any = None,
        item_ids: Any = None,
    ) -> "Preferences":
        """Builds and validates the choices of many users over one table.

        The table is not copied, unless its dtype changes: do not write to it
        afterwards. Everything else is copied.

        A name is a string of at most 256 characters or an integer of 64 bits; the
        integer 1 and the string "1" are two names. Integers in `user` are indices
        where `num_users` is given or every number from 0 to the largest occurs.
        Other integers (database keys, hashes) are names.

        Args:
          features: float[M, D], one row per response (or per difference, with
            `rejected=None`), or a `FeatureSource`.
          chosen: int[N] rows; with `item_ids`, int[N] or str[N] names out of it.
          rejected: like `chosen`, or None when features already are differences.
          user: int[N] indices in 0 … U−1, or int[N] or str[N] names. Names are
            numbered in `user_ids` order, or sorted order where that is not given.
          num_users: U; default: as many as there are names, or one more than the
            largest index.
          label: float[N] in [0, 1], P(chosen is preferred).
          weight: float[N] ≥ 0.
          group: int[N] or str[N].
          user_ids: U distinct names of the users; then `user` holds names. With
            `num_users`, integers in `user` are indices into strings.
          item_ids: M distinct names of the rows; then `chosen` and `rejected` hold
            names.

        Raises:
          ValueError: an argument has the wrong shape, is out of range, missing or not
            finite, or a pair compares a row with itself. The message names the place.
          TypeError: an argument has the wrong dtype, or is traced.
        """
        if not isinstance(features, FeatureSource):
            features = _checks.host_table(features)
        _tables.check_source(features)
        num_rows = int(features.shape[0])
        items = None if item_ids is None else _ids.unique(item_ids, "item_ids")
        if items is not None and len(items) != num_rows:
            raise ValueError(
                f"item_ids must name every row of features: {len(items)} names for "
                f"M={num_rows} rows"
            )
        chosen = _ids.rows(chosen, items, num_rows, "chosen")
        length = len(chosen)
        if rejected is not None:
            rejected = _ids.rows(rejected, items, num_rows, "rejected")
            _checks.host_length(rejected, length, "rejected")
            same = np.flatnonzero(chosen == rejected)
            if same.size:
                raise ValueError(
                    f"chosen and rejected must differ; pair {same[0]} compares row "
                    f"{chosen[same[0]]} with itself"
                )
        users, user, num_users = _ids.users(user, num_users, user_ids)
        _checks.host_length(user, length, "user")
        label = _checks.host_floats(label, length, "label", 0.0, 1.0)
        weight = _checks.host_floats(weight, length, "weight", 0.0, np.inf)
        if group is not None:
            group = _ids.column(group, "group")
            _checks.host_length(group, length, "group")
            group = np.unique(group, return_inverse=True)[1].astype(np.int32)
        order = np.argsort(user, kind="stable").astype(np.int32)
        counts = np.bincount(user, minlength=num_users)

        def sort(values):
            return None if values is None else values[order]

        return cls(
            features=features,
            chosen=chosen[order],
            rejected=sort(rejected),
            user=user[order],
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            order=order,
            label=sort(label),
            weight=sort(weight),
            group=sort(group),
            num_users=num_users,
            ids=None if users is None and items is None else Ids(users, items),
        )

    @classmethod
    @public("prefs.replace(features=...) of a Preferences that was built outside")
    def from_ragged(
        cls, differences: Sequence[Any], *, user_ids: Any = None
    ) -> "Preferences":
        """Builds from one array of differences x_chosen − x_rejected per user.

        Args:
          differences: U arrays float[n_u, D]; n_u = 0 is legal.
          user_ids: U distinct names, strings or integers.

        Raises:
          ValueError: no user, or an array is not [n_u, D] with the common D, or not
            finite; the message names the user.
          TypeError: an array is not floating point.
        """
        if len(differences) == 0:
            raise ValueError("differences must hold at least one user, got none")
        arrays = [
            _checks.host_array(x, f"differences[{u}]")
            for u, x in enumerate(differences)
        ]
        width = arrays[0].shape[-1] if arrays[0].ndim == 2 else None
        for u, x in enumerate(arrays):
            if x.ndim != 2 or x.shape[1] != width:
                raise ValueError(
                    f"differences[{u}] must be float[n, D] with D={width} like "
                    f"differences[0], got shape {x.shape}"
                )
            _checks.host_float_table(x, f"differences[{u}]")
        features = np.concatenate(arrays)
        user = np.repeat(np.arange(len(arrays)), [len(x) for x in arrays])
        names = None if user_ids is None else _ids.unique(user_ids, "user_ids")
        if names is not None and len(names) != len(arrays):
            raise ValueError(
                f"user_ids must name every user: {len(names)} names for "
                f"num_users={len(arrays)}"
            )
        return cls.from_pairs(
            features,
            np.arange(len(features)),
            None,
            user if names is None else names[user],
            len(arrays),
            user_ids=names,
        )

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.chosen.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self.features.shape[1]

    @property
    def counts(self):
        """int32[U], pairs of each user."""
        return self.offsets[1:] - self.offsets[:-1]
