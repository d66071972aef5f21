"""What the tests of the command share."""

import numpy as np

import lore_jax as lore

PAIRS = [
    *(("ann", 0, 1), ("ann", 2, 3), ("ann", 4, 1), ("bob", 1, 0), ("bob", 3, 2)),
    *(("bob", 5, 6), ("cat", 0, 5), ("cat", 7, 8), ("dan", 1, 0), ("dan", 8, 2)),
]
FIT = ["--features", "x.npy", "--rank", "2", "--steps", "5", "--recipe", "joint"]


def preferences():
    user, chosen, rejected = zip(*PAIRS)
    return lore.Preferences.from_pairs(np.load("x.npy"), chosen, rejected, user)
