"""Shots, votes and tables, on the NumPy side; every choice is seeded."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lore_jax import _checks, _tables
from lore_jax._entry import public
from lore_jax._votes import pairs_from_votes as pairs_from_votes
from lore_jax.splits import HeldOut as HeldOut
from lore_jax.splits import hold_out as hold_out
from lore_jax.splits import split_users as split_users
from lore_jax.splits import take_pairs as take_pairs
from lore_jax.splits import take_users as take_users
from lore_jax.types import FeatureSource, Preferences


class FourWay(NamedTuple):
    """Seen and unseen users, each with training and held-out pairs.

    Attributes:
      seen: training pairs of the users that `fit` sees.
      seen_heldout: their held-out pairs.
      unseen: pairs that `adapt` may use, of users that `fit` never sees.
      unseen_heldout: their held-out pairs.
    """

    seen: Preferences
    seen_heldout: Preferences
    unseen: Preferences
    unseen_heldout: Preferences


class ArraySource:
    """A `FeatureSource` over an array or memory map, `block_rows` rows at a time."""

    def __init__(self, array: np.ndarray, block_rows: int = 8192):
        """Keeps the array; nothing is read yet.

        Raises:
          ValueError: the array is not [M, D] or `block_rows` is below 1.
        """
        if np.ndim(array) != 2:
            raise ValueError(f"array must be float[M, D], got {np.shape(array)}")
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        self.array = array
        self.block_rows = block_rows
        self.shape = array.shape
        self.dtype = array.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields float[rows, D] in order."""
        for start in range(0, self.shape[0], self.block_rows):
            yield np.asarray(self.array[start : start + self.block_rows])


def take_shots(prefs: Preferences, shots: int | None, *, seed: int = 0) -> Preferences:
    """At most `shots` random pairs of each user; None keeps all.

    For one seed the pairs are nested: 3 shots contain the pair of 1 shot.

    Raises:
      ValueError: `shots` is negative.
      TypeError: `shots` is no integer.
    """
    if shots is None:
        return prefs
    if isinstance(shots, bool) or not isinstance(shots, int | np.integer):
        raise TypeError(f"shots must be an integer or None, got {shots!r}")
    if shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    draw = np.random.default_rng(seed).random(prefs.num_pairs)
    user = np.asarray(prefs.user)
    ranked = np.lexsort((draw, user))
    place = np.arange(prefs.num_pairs) - np.asarray(prefs.offsets)[:-1][user]
    return take_pairs(prefs, ranked[place < shots])


def count_judgements(prefs: Preferences) -> np.ndarray:
    """int[U], distinct rows in each user's pairs: what a pair count overstates."""
    user = np.asarray(prefs.user, np.int64)
    rows = [np.asarray(prefs.chosen, np.int64)]
    if prefs.rejected is not None:
        rows.append(np.asarray(prefs.rejected, np.int64))
    distinct = np.unique(np.concatenate(rows) + np.tile(user, len(rows)) * (2**32))
    return np.bincount(distinct >> 32, minlength=prefs.num_users)


def split_votes(
    features: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    vote: np.ndarray,
    *,
    num_users: int,
    user_ids: Any = None,
    item_ids: Any = None,
    unseen: float = 0.2,
    heldout: float = 0.3,
    holdout: Literal["judgements", "items"] = "judgements",
    max_training: int = 40,
    max_heldout: int = 20,
    seed: int = 0,
) -> FourWay:
    """Seen and unseen voters × training and held-out votes; no vote on two sides.

    "judgements" holds out votes on items that others' training votes are on. "items"
    holds out items with all their votes: every held-out pair compares new items.

    Args:
      features: float[M, D], one row per item.
      user: int[n] in 0 … num_users − 1.
      item: int[n] in 0 … M − 1.
      vote: int[n], see `pairs_from_votes`.
      num_users: how many voters there are.
      user_ids: str[num_users] or None.
      item_ids: str[M] or None.
      unseen: share of the voters that training never sees.
      heldout: share of the votes (or items), of seen and unseen alike, that only test.
      holdout: "judgements" or "items".
      max_training: training pairs per voter, at most.
      max_heldout: held-out pairs per voter, at most.
      seed: of all draws.

    Returns:
      `FourWay`, users renumbered within seen and within unseen.

    Raises:
      ValueError: an argument is out of range or lengths disagree.
    """
    _checks.host_floats([heldout], 1, "heldout", 0.0, 1.0)
    user = _checks.host_indices(user, num_users, "user", f"num_users is {num_users}")
    num_rows = features.shape[0]
    of = f"features has M={num_rows} rows"
    item, vote = _checks.host_indices(item, num_rows, "item", of), np.asarray(vote)
    seeds = np.random.SeedSequence(seed).generate_state(4)
    groups = split_users(num_users, share=unseen, seed=seeds[0])
    if not len(groups[1]):
        raise ValueError(f"unseen={unseen} of {num_users} users leaves no unseen user")
    if holdout not in ("judgements", "items"):
        raise ValueError(f"holdout must be 'judgements' or 'items', got {holdout!r}")
    draw = np.random.default_rng(seeds[1])
    if holdout == "judgements":
        tested = draw.random(len(user)) < heldout
    else:
        tested = (draw.random(num_rows) < heldout)[item]
    parts = []
    for side, limit, part_seed in (
        (~tested, max_training, seeds[2]),
        (tested, max_heldout, seeds[3]),
    ):
        chosen, rejected, voter = pairs_from_votes(
            user[side], item[side], vote[side], limit=limit, seed=part_seed
        )
        everyone = Preferences.from_pairs(
            features,
            chosen if item_ids is None else np.asarray(item_ids)[chosen],
            rejected if item_ids is None else np.asarray(item_ids)[rejected],
            voter if user_ids is None else np.asarray(user_ids)[voter],
            num_users,
            user_ids=user_ids,
            item_ids=item_ids,
        )
        parts.append([take_users(everyone, users) for users in groups])
    (seen, new), (seen_heldout, new_heldout) = parts
    return FourWay(seen, seen_heldout, new, new_heldout)


@public("prefs.replace(features=...)")
def store_as(prefs: Preferences, dtype) -> Preferences:
    """Stores the features as bfloat16 or float16, centred before they are rounded.

    A constant row cancels in every pair, and rounding a centred table loses a tenth
    of what rounding the raw one does. Differences are never centred: their mean is
    the signal.

    Raises:
      ValueError: a number is not finite, or overflows `dtype`.
      TypeError: `dtype` is no floating type, or the features are a `FeatureSource`.
    """
    if isinstance(prefs.features, FeatureSource):
        raise TypeError("features is a FeatureSource; store its blocks as you need")
    if dtype in ("bfloat16", jnp.bfloat16):
        dtype = ml_dtypes.bfloat16
    if not _checks.is_floating(dtype):
        raise TypeError(f"dtype must be floating point, got {dtype!r}")
    table = np.asarray(prefs.features)
    if prefs.rejected is not None:
        table = table - table.mean(0, dtype=np.float64).astype(np.float32)
    return prefs.replace(features=_tables.rounded(table, dtype))
