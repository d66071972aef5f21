"""The exact posterior mean, and how close the default adaptation comes to it."""

import numpy as np
import planted_oracle as oracle
import pytest


@pytest.mark.slow
def test_adapt_is_close_to_the_exact_posterior():
    few = dict(temperings=(0.0, 0.4), concentrations=(3.0, np.inf))
    few["variance_scales"] = (0.0,)
    row = oracle.compare(0.3, 5, 5, users=300, steps=200, burn=100, grids=few)
    assert abs(row["difference"]) < 0.5 + 2 * row["error"]
    assert row["exact"] <= row["truth"]


def test_the_two_exact_samplers_agree():
    _, z, _ = oracle.population(np.random.default_rng(0), 0.3, 5, 5, 20)
    chain = oracle.elliptical_slice(z, 0.3, steps=1500)
    drawn = oracle.importance_sampling(z, 0.3)
    assert np.abs(chain - drawn).mean() < 0.01
