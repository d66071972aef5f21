"""A shared table, and a fit of few steps."""

import numpy as np
import pytest
from fitting_cases import KEY, QUICK

import lore_jax as lore


@pytest.fixture(scope="module")
def table():
    """12 users who compare 40 shared responses; truth of rank 2 behind it."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5)).astype(np.float32)
    basis, weights = rng.normal(size=(5, 2)), rng.dirichlet([0.3, 0.3], 12)
    user = np.repeat(np.arange(12), 10)
    first = rng.integers(40, size=120)
    second = (first + rng.integers(1, 40, size=120)) % 40
    gap = ((features[first] - features[second]) @ basis * weights[user]).sum(1)
    flip = gap < rng.logistic(size=120) / 2
    chosen, rejected = np.where(flip, second, first), np.where(flip, first, second)
    return lore.Preferences.from_pairs(features, chosen, rejected, user)


@pytest.fixture(scope="module")
def quick(table):
    return lore.fit(table, rank=2, key=KEY, recipe=QUICK)
