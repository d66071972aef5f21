"""Small random problems of adaptation.

All have rank 3 and users of at most 10 pairs, so that the tests share the few programs
that `adapt` compiles.
"""

import jax.numpy as jnp
import numpy as np

import lore_jax as lore

RANK, FEATURES, TEMPERATURE = 3, 5, 2.0
COUNTS = (10, 7, 6, 0, 9, 2, 8, 10)
EMPTY = 3
ML = lore.MaximumLikelihood()


def random_basis(seed=0, rank=RANK):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(FEATURES, rank)).astype(np.float32)


def random_differences(counts=COUNTS, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, FEATURES)).astype(np.float32) for n in counts]


def random_prior(rank=RANK, seed=2, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "atoms": jnp.asarray(rng.dirichlet(np.ones(rank), 6), jnp.float32),
        "log_weights": jnp.asarray(np.log(rng.dirichlet(np.ones(6))), jnp.float32),
        "concentration": jnp.asarray(4.0, jnp.float32),
        "tempering": jnp.asarray(0.25, jnp.float32),
        "decay": jnp.asarray(0.5, jnp.float32),
        **changes,
    }
    return lore.Prior(**fields)


def user_margins(basis, differences, temperature=TEMPERATURE):
    """z of every user, float64, divided by the temperature."""
    basis = np.asarray(basis, float) / temperature
    return [np.asarray(x, np.float64) @ basis for x in differences]
