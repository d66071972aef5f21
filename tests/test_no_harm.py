"""Where nothing personal is there to learn, the default learns what is there."""

import jax
import numpy as np
import pytest

import lore_jax as lore


@pytest.fixture(scope="module")
def alike():
    """(pairs, new pairs) of 100 people who all share one direction."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=32) * 2 / np.sqrt(32)

    def choices(num_pairs):
        x = rng.normal(size=(100, num_pairs, 32))
        right = rng.random(x.shape[:2]) < 1 / (1 + np.exp(-x @ direction))
        x *= np.where(right, 1, -1)[..., None]
        return lore.Preferences.from_ragged(list(x.astype(np.float32)))

    return choices(25), choices(200)


@pytest.mark.slow
def test_five_directions_lose_nothing_to_one(alike):
    """Within 0.3 points of global Bradley-Terry, its ridge chosen the same way."""
    pairs, new = alike
    config = lore.Marginal(
        search=lore.Search(ridges=(0.2, 0.05, 0.8), temperings=(0.4, 0.0))
    )
    one, five = (
        lore.fit(pairs, rank=k, key=jax.random.key(0), recipe=config) for k in (1, 5)
    )
    accuracy = [lore.accuracy(f.model, f.weights, new) for f in (one, five)]
    assert np.mean(accuracy[0]) > 0.7
    assert np.mean(accuracy[1]) > np.mean(accuracy[0]) - 0.003
    assert lore.diagnostics.report(five)["effective_rank"] < 1.05
