"""Every compiled entry point lowers for CUDA and TPU, from a machine with a CPU."""

import functools
import importlib
import pkgutil

import jax
import numpy as np
import pytest
from jax import export

import lore_jax as lore
from lore_jax._pairs import pack
from lore_jax._solve import simplex

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(lore.__path__, "lore_jax.")
]


def is_compiled(value):
    return hasattr(value, "lower") and hasattr(value, "trace")


ENTRY_POINTS = {
    f"{module.__name__.removeprefix('lore_jax.')}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if is_compiled(value) and value.__module__ == module.__name__
}


def shapes_only(tree):
    def shape(leaf):
        if isinstance(leaf, jax.Array | np.ndarray | np.generic):
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
        return leaf

    return jax.tree.map(shape, tree)


class Source(lore.FeatureSource):
    """A table in two blocks."""

    def __init__(self, table):
        self.table = table
        self.shape, self.dtype = table.shape, table.dtype

    def blocks(self):
        yield from np.array_split(self.table, 2)


@pytest.fixture(scope="module")
def calls(make_preferences):
    """name → shapes of its arguments, from using everything that there is once."""
    seen = {}

    def recorded(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            seen.setdefault(name, shapes_only((args, kwargs)))
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, function in ENTRY_POINTS.items():
            for module in MODULES:
                for key, value in list(vars(module).items()):
                    if value is function:
                        patch.setattr(module, key, recorded(name, function))
        use_everything(make_preferences, patch)
    return seen


def use_everything(make_preferences, patch):
    prefs = make_preferences(num_users=6, num_pairs=48)
    config = lore.TrainConfig(num_steps=2, ridges=(0.2,), temperings=(0.2, 0.3))
    key = jax.random.key(0)
    fitted = lore.fit(prefs, rank=3, key=key, config=config)
    basis = fitted.basis
    table = np.asarray(prefs.features)
    lore.fit(prefs.replace(features=Source(table)), rank=3, key=key, config=config)
    for reference in (
        lore.TrainConfig.reference_joint(num_steps=2),
        lore.TrainConfig.reference_alternating(num_steps=2),
    ):
        lore.fit(prefs, rank=2, key=key, config=reference)
    for adaptation in (
        lore.AdaptConfig.maximum_likelihood(),
        lore.AdaptConfig.maximum_a_posteriori(0.3),
        lore.AdaptConfig.reference(num_steps=2, temperature=1.0),
    ):
        lore.adapt(basis, prefs, config=adaptation)
    on_device = prefs.replace(features=jax.numpy.asarray(table))
    lore.adapt(basis, on_device, prior=fitted.prior)
    lore.predict_proba(basis, prefs, fitted.prior, prefs)
    state = lore.start_users(fitted.prior, prefs.num_users)
    lore.weights(lore.observe(state, basis, prefs))
    lore.score_pairs(basis, prefs, fitted.prior, prefs)
    patch.setattr(pack, "sized", lambda cpu, accelerator: accelerator)
    patch.setattr(pack, "_ROOM", 40)
    lore.adapt(basis, on_device, prior=fitted.prior)


def test_everything_compiled_is_used(calls):
    assert set(calls) == set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_lowers_for_accelerators(name, calls):
    args, kwargs = calls[name]
    exported = export.export(ENTRY_POINTS[name], platforms=("cuda", "tpu"))
    assert exported(*args, **kwargs).platforms == ("cuda", "tpu")


@pytest.mark.parametrize("rank", [5, 20])
def test_the_solver_lowers_unrolled_and_with_a_library(rank):
    z = jax.ShapeDtypeStruct((9, 12, rank), np.float32)
    weight = jax.ShapeDtypeStruct((9, 12), np.float32)
    solve = jax.jit(simplex.maximum_likelihood)
    text = export.export(solve, platforms=("cuda",))(z, weight).mlir_module()
    assert ("cusolver" in text) == (rank == 20)
