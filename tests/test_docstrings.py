"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

import lore_jax as lore

MODULES = [
    module.name
    for module in pkgutil.walk_packages(lore.__path__, "lore_jax.")
    if ".cli" not in module.name and ".hf" not in module.name
]
PUBLIC = [
    name
    for name, value in vars(lore).items()
    if not name.startswith("_") and callable(value)
]
# What others return, or the second half of an example.
WITHOUT = {
    *("load", "load_progress", "load_users", "FeatureSource"),
    *("Adapted", "Fitted", "Posterior", "Progress", "UserStates"),
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    space = {"lore": lore, "np": np, "jax": jax, "jnp": jax.numpy}
    for found in doctest.DocTestFinder().find(module, name):
        found.globs.update(space)
        runner.run(found)
    assert not runner.failures


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - WITHOUT))
def test_public_names_have_an_example(name):
    assert ">>>" in (inspect.getdoc(getattr(lore, name)) or ""), name
