"""One small problem, and what two methods make of it."""

import pytest
from adaptation_cases import (
    ML,
    TEMPERATURE,
    random_basis,
    random_differences,
    random_prior,
)

import lore_jax as lore


@pytest.fixture(scope="module")
def basis():
    return random_basis()


@pytest.fixture(scope="module")
def prefs():
    return lore.Preferences.from_ragged(random_differences())


@pytest.fixture(scope="module")
def prior():
    return random_prior()


@pytest.fixture(scope="module")
def default(basis, prefs, prior):
    return lore.adapt(lore.RewardModel(basis, prior, TEMPERATURE), prefs)


@pytest.fixture(scope="module")
def max_likelihood(basis, prefs):
    return lore.adapt(
        lore.RewardModel(basis, temperature=TEMPERATURE), prefs, method=ML
    )
