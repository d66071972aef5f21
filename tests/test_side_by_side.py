"""Candidates that share reads of the table are those trained one by one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend
from lore_jax._pairs.pack import pack
from lore_jax._train import coordinates, marginal, steps
from lore_jax.prior import make_atoms

KEY = jax.random.key(0)
SEARCH = dict(
    ridges=(0.1, 0.3, 1.0),
    smoothings=(1.0, 4.0),
    temperings=(0.4, 0.2),
    ranks=(1, 2, 3),
    concentrations=(1.0,),
    decays=(0.0,),
)
QUICK = lore.Marginal(num_steps=20, search=lore.Search(**SEARCH))
LOSSES = {"log_loss", "relative", "judgements", "items"}


@pytest.fixture
def share_reads(monkeypatch):
    """What an accelerator does, on this CPU."""

    def begin():
        sizes = _backend.CPU._replace(columns_at_once=12, scatters=False)
        monkeypatch.setattr(_backend, "CPU", sizes)
        jax.clear_caches()

    yield begin
    jax.clear_caches()  # Later tests trace one by one again.


@pytest.fixture
def prefs(make_preferences):
    return make_preferences(14, 400, num_features=5, num_rows=60)


class CountingSource(lore.ArraySource):
    """Counts its readings."""

    reads = 0

    def blocks(self):
        self.reads += 1
        yield from super().blocks()


def assert_same_fit(got, want):
    plain = [
        [{k: v for k, v in row.items() if k not in LOSSES} for row in x]
        for x in (got.history.selection, want.history.selection)
    ]
    assert plain[0] == plain[1]  # Nothing that was only trained ahead is told.
    for new, old in zip(got.history.selection, want.history.selection):
        assert new["log_loss"] == pytest.approx(old["log_loss"], rel=1e-4)
    scale = np.abs(want.model.basis).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=2e-4 * scale
    )
    np.testing.assert_allclose(got.weights, want.weights, atol=1e-3)
    np.testing.assert_allclose(got.history.loss, want.history.loss, rtol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        pytest.param("labels", marks=pytest.mark.slow),
        pytest.param("bfloat16", marks=pytest.mark.slow),
        "mesh",
    ],
)
def test_the_same_settings_are_chosen(prefs, make_preferences, share_reads, kind):
    if kind == "labels":
        fields = dict(label=True, sample_weight=True)
        prefs = make_preferences(14, 400, num_features=5, num_rows=60, **fields)
    if kind == "bfloat16":
        prefs = lore.store_as(prefs, "bfloat16")
    mesh = None
    if kind == "mesh":
        mesh = jax.make_mesh((4,), ("users",), devices=jax.devices()[:4])
    rank = "auto" if mesh is None else 2
    settings = dict(rank=rank, key=KEY, recipe=QUICK, mesh=mesh)
    want = lore.fit(prefs, **settings)
    share_reads()
    got = lore.fit(prefs, **settings)
    assert_same_fit(got, want)


def test_a_source_is_read_once_for_all(prefs, share_reads):
    settings = dict(rank=2, key=KEY, recipe=QUICK)
    fits, reads = [], []
    for begin in (lambda: None, share_reads):
        begin()
        source = CountingSource(prefs.features)
        fits.append(lore.fit(prefs.replace(features=source), **settings))
        reads.append(source.reads)
    assert_same_fit(*fits)
    assert reads[1] < 0.6 * reads[0]


def test_a_recorded_fit_trains_one_by_one(prefs, share_reads):
    share_reads()
    records = []
    settings = dict(rank=2, key=KEY, recipe=QUICK)
    want = lore.fit(prefs, **settings, on_progress=records.append)
    assert {np.ndim(r.metrics.loss) for r in records} == {1}
    half = records[len(records) // 2]
    again = lore.fit(prefs, **settings, resume=half)
    np.testing.assert_array_equal(again.model.basis, want.model.basis)


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_reads_the_table_twice_for_all(prefs, count):
    """Two products with the table in the program for CUDA, of C · K columns."""
    rank, optimiser = 3, marginal.make_optimiser(0.1, 10)
    spectrum = coordinates.measure(prefs)
    atoms = make_atoms(KEY, rank, 8)
    base = jnp.full(len(atoms), 1 / len(atoms))
    table = jnp.asarray(prefs.features)
    made = [
        coordinates.make_coordinates(spectrum, eps, jnp.float32, prefs.num_features)
        for eps in (0.1, 1.0, 4.0, np.inf)
    ]
    problems = [
        marginal.make_problem(table, pack(prefs), atoms, base, x) for x in made[:count]
    ]
    numbers = marginal.Settings(*map(jnp.float32, (0.1, 0.3, 1.0, 1.0, 5.0)))
    states = [marginal.init(KEY, x, 0.1, optimiser) for x in problems]
    inputs = [marginal.MarginalInputs(x, numbers) for x in problems]
    one = marginal.make_steps(optimiser)
    joined = jax.tree.map(lambda *x: jnp.stack(x), *states), marginal.stack(inputs)
    many = steps.side_by_side(one, count)
    run = jax.jit(lambda state, data: steps.step(many, state, data))
    text = jax.export.export(run, platforms=["cuda"])(*joined).mlir_module()
    shape = "x".join(map(str, table.shape))
    products = [x for x in text.split("\n") if "dot_general" in x and shape in x]
    assert len(products) == 2
    sizes = [set(re.findall(r"tensor<([\dx]+)xf32>", x)) for x in products]
    width = {3: 3, 12: 16}[count * rank]  # padded as on this CPU
    assert f"{table.shape[0]}x{width}" in sizes[0]
    got, _ = run(*joined)
    for i, (state, data) in enumerate(zip(states, inputs)):
        want, _ = steps.step(one, state, data)
        np.testing.assert_allclose(got.theta[i], want.theta, rtol=1e-4, atol=1e-5)
