"""Every compiled entry point lowers for CUDA and TPU, from a machine with a CPU."""

import functools
import importlib
import pkgutil

import jax
import numpy as np
import pytest
from jax import export

import lore_jax as lore
from lore_jax import _backend
from lore_jax._pairs import pack, rows
from lore_jax._solve import simplex

MODULES = [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(lore.__path__, "lore_jax.")
]


# The steps of `run` and `run_blocks` on devices that are there: test_mesh.
OF_A_MESH = {"run_on_mesh", "_basis_on_mesh", "_slopes_on_mesh", "_update_on_mesh"}


def is_compiled(value):
    return hasattr(value, "lower") and hasattr(value, "trace")


ENTRY_POINTS = {
    f"{module.__name__.removeprefix('lore_jax.')}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if is_compiled(value)
    and value.__module__ == module.__name__
    and name not in OF_A_MESH
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
    search = lore.Search(ridges=(0.2,), temperings=(0.2, 0.3))
    recipe = lore.Marginal(num_steps=2, search=search)
    key = jax.random.key(0)
    fitted = lore.fit(prefs, rank=3, key=key, recipe=recipe)
    model, table = fitted.model, np.asarray(prefs.features)
    source = Source(table.astype(jax.numpy.bfloat16))  # NumPy multiplies float32.
    lore.fit(prefs.replace(features=source), rank=3, key=key, recipe=recipe)
    for published in (
        lore.PublishedJoint(num_steps=2),
        lore.PublishedAlternating(num_steps=2),
    ):
        lore.fit(prefs, rank=2, key=key, recipe=published)
    for method in (
        lore.MaximumLikelihood(),
        lore.MAP(0.3),
        lore.PublishedAdam(num_steps=2),
    ):
        lore.adapt(model, prefs, method=method)
    on_device = prefs.replace(features=jax.numpy.asarray(table))
    lore.adapt(model, on_device)
    lore.predict_proba(model, prefs, prefs)
    state = lore.streaming.init(model, num_users=prefs.num_users)
    lore.streaming.weights(lore.streaming.update(model, state, prefs))
    lore.score_pairs(model, prefs, prefs)
    lore.compare(model, prefs)
    sizes = _backend.ACCELERATOR._replace(gather_pairs=40)
    for module in (pack, rows):
        patch.setattr(module, "tuning", lambda *_: sizes)
    lore.adapt(model, on_device)
    turned = np.argsort(-np.asarray(prefs.order))
    columns = [
        np.asarray(x)[turned] for x in (prefs.chosen, prefs.rejected, prefs.user)
    ]
    mixed = lore.Preferences.from_pairs(on_device.features, *columns, 6)
    lore.predict_proba(model, on_device, mixed)


def test_everything_compiled_is_used(calls):
    assert set(calls) == set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_lowers_for_accelerators(name, calls):
    args, kwargs = calls[name]
    export_of = export.export(ENTRY_POINTS[name], platforms=("cuda", "tpu"))
    exported = export_of(*args, **kwargs)
    assert exported.platforms == ("cuda", "tpu")
    for line in exported.mlir_module().splitlines():
        if "stablehlo.dot_general" in line and "f32>," in line:
            assert "precision = [HIGHEST, HIGHEST]" in line, line


@pytest.mark.parametrize("rank", [5, 20])
def test_the_solver_lowers_unrolled_and_with_a_library(rank):
    z = jax.ShapeDtypeStruct((9, 12, rank), np.float32)
    weight = jax.ShapeDtypeStruct((9, 12), np.float32)
    solve = jax.jit(simplex.maximum_likelihood)
    text = export.export(solve, platforms=("cuda",))(z, weight).mlir_module()
    assert ("cusolver" in text) == (rank == 20)
