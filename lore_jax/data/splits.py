"""Splits: pairs, users and votes that are held out. Every choice is seeded.

Pairs of one user share responses, so a random split of pairs leaks. What is held out
here is held out by judgement, by item or by group.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from lore_jax import _checks
from lore_jax.data.votes import pairs_from_votes
from lore_jax.preferences import Preferences, take_pairs, take_users


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


class HeldOut(NamedTuple):
    """A split of pairs.

    Attributes:
      training: pairs to learn from.
      heldout: pairs to validate on.
      num_dropped: pairs with one row on either side, in neither.
    """

    training: Preferences
    heldout: Preferences
    num_dropped: int


def split_users(
    num_users: int, *, share: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A random `share` of the users is unseen: (seen int[·], unseen int[·]), sorted.

    Raises:
      ValueError: `share` is not in [0, 1], or leaves no seen user.
    """
    _checks.host_floats([share], 1, "share", 0.0, 1.0)
    unseen = round(share * num_users)
    if unseen >= num_users:
        raise ValueError(f"share={share} of {num_users} users leaves no seen user")
    shuffled = np.random.default_rng(seed).permutation(num_users)
    return np.sort(shuffled[unseen:]), np.sort(shuffled[:unseen])


def hold_out(
    prefs: Preferences,
    *,
    share: float = 0.3,
    seed: int = 0,
    unit: Literal["judgements", "items"] = "judgements",
) -> HeldOut:
    """Splits pairs so that no judgement, or no item, stands on both sides.

    A judgement is what one user says of one row. An item is a row, for all users;
    where pairs join rows into many components (the responses of a prompt), an item is a
    component. Items are held out with all their pairs. Pairs with one judgement, or one
    item, on either side are dropped and counted.

    With `prefs.group`, "judgements" holds out whole groups. "items" joins the rows of a
    group, and drops held-out pairs whose group also stands among the training pairs.
    A pair whose rows its user has in no other pair is held out as one judgement, as
    often as the others of those that are kept: s² / (s² + (1 − s)²).

    Args:
      prefs: N pairs.
      share: s, probability that a judgement, an item or a group is held out.
      seed: of the draw. It depends neither on the order of pairs, nor on rows that no
        pair uses, nor on the order of rows that have names.
      unit: "judgements" or "items".

    Returns:
      `HeldOut`.

    Raises:
      ValueError: `share` is not in [0, 1] or `unit` is neither.
    """
    _checks.host_floats([share], 1, "share", 0.0, 1.0)
    if unit not in ("judgements", "items"):
        raise ValueError(f"unit must be 'judgements' or 'items', got {unit!r}")
    rng = np.random.default_rng(seed)
    rows = canonical_rows(prefs)
    group = None if prefs.group is None else np.asarray(prefs.group)
    if unit == "items":
        item = items_of(rows, group)
        sides = (rng.random(item.max(initial=-1) + 1) < share)[item]
    elif group is not None:
        sides = (rng.random(group.max(initial=-1) + 1) < share)[group][None]
    else:
        user = np.asarray(prefs.user, np.int64)
        judgement = rows + user * (rows.max(initial=0) + 1)
        place = np.unique(judgement, return_inverse=True)[1].reshape(rows.shape)
        times = np.bincount(place.ravel())
        draw = rng.random(len(times))[place]
        sides = draw < share
        if len(rows) == 2:
            alone = (times[place] == 1).all(0)
            kept = share**2 / (share**2 + (1 - share) ** 2)
            sides = np.where(alone, draw[0] < kept, sides)
    heldout = np.logical_and.reduce(sides)
    training = ~np.logical_or.reduce(sides)
    if unit == "items" and group is not None:
        heldout &= ~np.isin(group, group[training])
    return HeldOut(
        take_pairs(prefs, training),
        take_pairs(prefs, heldout),
        int(prefs.num_pairs - training.sum() - heldout.sum()),
    )


def canonical_rows(prefs: Preferences) -> np.ndarray:
    """int[2 or 1, N], rows of pairs as ranks among those used: by name, else by row."""
    columns = [x for x in (prefs.chosen, prefs.rejected) if x is not None]
    rows = np.stack([np.asarray(x, np.int64) for x in columns])
    used, place = np.unique(rows, return_inverse=True)
    place = place.reshape(rows.shape)
    if prefs.ids is None or prefs.ids.items is None:
        return place
    rank = np.empty(len(used), np.int64)
    rank[np.argsort(np.asarray(prefs.ids.items)[used], kind="stable")] = range(
        len(used)
    )
    return rank[place]


def items_of(rows: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """int[2 or 1, N], the item of each side of each pair; rows are `canonical_rows`.

    Components of the graph of pairs (and groups), unless one has half of the pairs.
    """
    count = rows.max(initial=-1) + 1
    first, second = rows[0], rows[-1]
    if group is not None:  # A node for every group joins its rows.
        first, second = rows.ravel(), np.tile(count + group, len(rows))
        count += int(group.max(initial=-1)) + 1
    component = connected(count, first, second)[rows]
    largest = np.bincount(component[0]).max(initial=0)
    return component if 2 * largest <= rows.shape[1] else rows


def connected(num_nodes: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int[num_nodes], the component of each node of a graph, 0 … C − 1."""
    label = np.arange(num_nodes)
    while True:
        least = label.copy()
        np.minimum.at(least, first, label[second])
        np.minimum.at(least, second, label[first])
        least = least[least]
        if (least == label).all():
            return np.unique(label, return_inverse=True)[1]
        label = least


def shares_items(prefs: Preferences) -> bool:
    """Whether two users judge the same row; if not, judgements and items are one."""
    rows = canonical_rows(prefs)
    user = np.broadcast_to(np.asarray(prefs.user, np.int64), rows.shape)
    pairs = np.unique(rows.ravel() * (user.max(initial=0) + 1) + user.ravel())
    return bool(len(pairs) > rows.max(initial=-1) + 1)
