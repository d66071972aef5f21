"""The records that everything else passes around.

D features of one response, K rank, U users, M distinct feature rows, N pairs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lore_jax import _checks


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
    """String names of users and items, kept beside the arrays.

    Compared by identity, so that two data sets never share a compiled program that
    carries the wrong names.

    Attributes:
      users: str[U], or None where users are numbers.
      items: str[M], or None where items are numbers.
    """

    def __init__(self, users: np.ndarray | None, items: np.ndarray | None):
        """Keeps both arrays as they are."""
        self.users = users
        self.items = items


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
      ids: string names of users and items, or None.
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
        user_ids: Sequence[str] | None = None,
        item_ids: Sequence[str] | None = None,
    ) -> "Preferences":
        """Builds and validates the choices of many users over one table.

        Args:
          features: float[M, D], one row per response (or per difference, with
            `rejected=None`), or a `FeatureSource`.
          chosen: int[N] rows, or str[N] names out of `item_ids`.
          rejected: like `chosen`, or None when features already are differences.
          user: int[N] in 0 … U−1, or str[N] names; names are numbered in
            `user_ids` order, or sorted order where that is not given.
          num_users: U; default: one more than the largest user.
          label: float[N] in [0, 1], P(chosen is preferred).
          weight: float[N] ≥ 0.
          group: int[N] or str[N].
          user_ids: U distinct names of the users.
          item_ids: M distinct names of the rows.

        Raises:
          ValueError: an argument has the wrong shape, is out of range or not finite,
            or a pair compares a row with itself. The message names the place.
          TypeError: an argument has the wrong dtype.
        """
        if not isinstance(features, FeatureSource):
            features = _checks.host_table(features)
        num_rows = int(features.shape[0])
        items = None if item_ids is None else _checks.host_unique(item_ids, "item_ids")
        if items is not None and len(items) != num_rows:
            raise ValueError(
                f"item_ids must name every row of features: {len(items)} names for "
                f"M={num_rows} rows"
            )
        rows = f"features has M={num_rows} rows"
        chosen = _checks.host_rows(chosen, items, num_rows, "chosen", rows)
        length = len(chosen)
        if rejected is not None:
            rejected = _checks.host_rows(rejected, items, num_rows, "rejected", rows)
            _checks.host_length(rejected, length, "rejected")
            same = np.flatnonzero(chosen == rejected)
            if same.size:
                raise ValueError(
                    f"chosen and rejected must differ; pair {same[0]} compares row "
                    f"{chosen[same[0]]} with itself"
                )
        users, user, num_users = _checks.host_users(user, num_users, user_ids)
        _checks.host_length(user, length, "user")
        label = _checks.host_floats(label, length, "label", 0.0, 1.0)
        weight = _checks.host_floats(weight, length, "weight", 0.0, np.inf)
        if group is not None:
            group = np.asarray(group)
            _checks.host_length(group, length, "group")
            if group.dtype.kind == "O" and all(isinstance(g, str) for g in group):
                group = group.astype(np.str_)
            if group.dtype.kind not in "iuUS":
                raise TypeError(
                    f"group must hold integers or strings, got dtype {group.dtype}"
                )
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
    def from_ragged(
        cls, differences: Sequence[Any], *, user_ids: Sequence[str] | None = None
    ) -> "Preferences":
        """Builds from one array of differences x_chosen − x_rejected per user.

        Args:
          differences: U arrays float[n_u, D]; n_u = 0 is legal.
          user_ids: U distinct names.

        Raises:
          ValueError: no user, or an array is not [n_u, D] with the common D, or not
            finite; the message names the user.
          TypeError: an array is not floating point.
        """
        if len(differences) == 0:
            raise ValueError("differences must hold at least one user, got none")
        arrays = [np.asarray(x) for x in differences]
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
        if user_ids is not None and len(user_ids) != len(arrays):
            raise ValueError(
                f"user_ids must name every user: {len(user_ids)} names for "
                f"num_users={len(arrays)}"
            )
        return cls.from_pairs(
            features,
            np.arange(len(features)),
            None,
            user if user_ids is None else np.asarray(user_ids, np.str_)[user],
            len(arrays),
            user_ids=user_ids,
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
