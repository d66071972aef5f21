"""Sums into rows by gathers: equal to a scatter, and no scatter in the program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend
from lore_jax._pairs import row_sums
from lore_jax._pairs.pack import pack
from lore_jax._train import coordinates, marginal, published, resume, steps
from lore_jax.prior import make_atoms

KEY = jax.random.key(0)


@pytest.fixture
def gathers(monkeypatch):
    """What an accelerator does, on this CPU."""
    monkeypatch.setattr(_backend, "CPU", _backend.CPU._replace(scatters=False))
    yield
    jax.clear_caches()  # Later tests trace with scatters again.


@pytest.mark.parametrize("num_terms", [0, 1, 7, 400])
def test_sums_are_those_of_a_scatter(num_terms):
    rng = np.random.default_rng(num_terms)
    row = (30 * rng.random(num_terms) ** 3).astype(int)  # Few rows have most terms.
    entry = rng.integers(50, size=num_terms)
    values = rng.normal(size=(3, 50)).astype(np.float32)
    counts = np.bincount(row, minlength=30)
    for capacity in (counts, counts + rng.integers(3, size=30)):
        index = row_sums.make_row_index(row, entry, 50, capacity)
        want = np.zeros((3, 30))
        np.add.at(want.T, row, values[:, entry].T)
        got = row_sums.sum_rows(jnp.asarray(values), index)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_splits_have_the_shapes_of_the_whole():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(40, size=(2, 300))
    counts = row_sums.count_sides(chosen, rejected, 50)
    whole = row_sums.make_pair_index(chosen, rejected, np.arange(300), 300, counts)
    half = rng.random(300) < 0.5
    part = row_sums.make_pair_index(
        chosen[half], rejected[half], np.flatnonzero(half), 300, counts
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(part, whole)


@pytest.mark.parametrize("kind", ["rows", "differences", "labels and weights"])
@pytest.mark.parametrize(
    "recipe",
    [
        lore.Marginal(
            num_steps=6,
            num_starts=1,
            search=lore.Search(
                ridges=(0.1,), smoothings=(1.0,), temperings=(0.4,), decays=(0.0,)
            ),
        ),
        lore.PublishedJoint(num_steps=6, prior=None, temperature=1.0),
        lore.PublishedAlternating(num_steps=6, prior=None, temperature=1.0),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
@pytest.mark.slow
def test_fits_are_those_with_scatters(make_preferences, monkeypatch, recipe, kind):
    prefs = make_preferences(12, 200, num_rows=60)
    if kind == "differences":
        prefs = prefs.replace(rejected=None)
    if kind == "labels and weights":
        prefs = make_preferences(12, 200, num_rows=60, label=True, sample_weight=True)
    settings = dict(rank=2, key=KEY, recipe=recipe)
    want = lore.fit(prefs, **settings)
    monkeypatch.setattr(_backend, "CPU", _backend.CPU._replace(scatters=False))
    jax.clear_caches()
    got = lore.fit(prefs, **settings)
    again = lore.fit(prefs, **settings)
    jax.clear_caches()
    size = np.abs(want.model.basis).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=2e-4 * size
    )
    np.testing.assert_array_equal(got.model.basis, again.model.basis)


def default_program(prefs, rank):
    atoms = make_atoms(KEY, rank, 8)
    made = coordinates.make_coordinates(
        coordinates.measure(prefs), 1.0, jnp.float32, prefs.num_features
    )
    base = jnp.full(len(atoms), 1 / len(atoms))
    table = jnp.asarray(prefs.features)
    problem = marginal.make_problem(table, pack(prefs), atoms, base, made)
    optimiser = marginal.make_optimiser(0.1, 10)
    numbers = marginal.Settings(*map(jnp.float32, (0.1, 0.3, 1.0, 1.0, 5.0)))
    state = marginal.init(KEY, problem, 0.1, optimiser)
    inputs = marginal.MarginalInputs(problem, numbers)
    return state, inputs, marginal.make_steps(optimiser)


def published_program(prefs, rank, recipe):
    shape = dict(num_users=prefs.num_users, num_features=prefs.num_features)
    trainer = published.make_trainer(recipe)
    bare = prefs.replace(ids=None, group=None, order=None, offsets=None)
    bare = jax.tree.map(jnp.asarray, bare)
    anchor = jnp.zeros(prefs.num_features)
    problem = published.make_problem(bare, bare.features, anchor)
    state = trainer.init(lore.init_params(KEY, rank=rank, **shape))
    return state, problem, trainer.steps


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["default", "joint", "alternating"])
def test_a_step_has_no_scatter_and_no_sort(gathers, make_preferences, name, weighted):
    prefs = make_preferences(12, 200, num_rows=60, sample_weight=weighted or None)
    if name == "default":
        state, problem, parts = default_program(prefs, 3)
    else:
        kinds = {"joint": lore.PublishedJoint, "alternating": lore.PublishedAlternating}
        recipe = kinds[name](num_steps=2, prior=None)
        state, problem, parts = published_program(prefs, 3, recipe)
    lowered = steps.run.trace(state, problem, steps=parts, num_steps=2)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.gather" in text
    for word in ("scatter", "sort"):
        assert f"stablehlo.{word}" not in text, word


def test_a_cpu_keeps_its_scatter(make_preferences):
    state, problem, parts = default_program(make_preferences(12, 200), 3)
    lowered = steps.run.trace(state, problem, steps=parts, num_steps=2)
    assert "stablehlo.scatter" in lowered.lower().as_text()


@pytest.mark.parametrize("kind", ["default", "joint", "alternating", "mesh"])
def test_rows_of_zeros_change_nothing(make_preferences, monkeypatch, kind):
    """What a GPU trains on has a multiple of 1,024 rows."""
    prefs = make_preferences(12, 200, num_rows=60)
    search = lore.Search(ridges=(0.1,), smoothings=(1.0,), temperings=(0.4,))
    recipe = lore.Marginal(num_steps=6, search=search)
    if kind == "joint":
        recipe = lore.PublishedJoint(num_steps=6, prior=None)
    if kind == "alternating":
        recipe = lore.PublishedAlternating(num_steps=6, prior=None)
    mesh = None
    if kind == "mesh":
        mesh = jax.make_mesh((2,), ("users",), devices=jax.devices()[:2])
    settings = dict(rank=2, key=KEY, recipe=recipe, mesh=mesh)
    want = lore.fit(prefs, **settings)
    monkeypatch.setattr(_backend, "CPU", _backend.CPU._replace(row_multiple=64))
    sizes, original = [], steps.train

    def spy(state, problem, **kinds):
        sizes.append(problem.features.shape[-2])
        return original(state, problem, **kinds)

    monkeypatch.setattr(resume, "train", spy)
    got = lore.fit(prefs, **settings)
    assert set(sizes) == {64}
    size = np.abs(want.model.basis).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=1e-5 * size
    )
    np.testing.assert_allclose(got.weights, want.weights, atol=1e-5)
