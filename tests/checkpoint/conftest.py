"""A saved fit, and users to save."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import make_fit

import lore_jax as lore


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "fit"
    lore.save(path, make_fit(pruned=True))
    return path


@pytest.fixture(scope="module")
def users():
    """(model, pairs, state) of two users with names, one of them far from ASCII."""
    rng = np.random.default_rng(0)
    prior = make_fit().model.prior.replace(variance_scale=jnp.float32(0.5))
    basis = rng.normal(size=(5, 3)).astype(np.float32)
    rows = [rng.normal(size=(4, 5)).astype(np.float32) for _ in range(2)]
    names = ["Ünal", "b c"]
    prefs = lore.Preferences.from_ragged(rows, user_ids=names)
    model = lore.RewardModel(basis, prior, temperature=100.0)
    start = lore.streaming.init(model, user_ids=names)
    return model, prefs, lore.streaming.update(model, start, prefs)
