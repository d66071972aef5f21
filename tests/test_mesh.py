"""A fit on the devices of a mesh is the fit on one device."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import lore_jax as lore
from benchmarks.mesh_cost import step_cost
from lore_jax import _backend, _mesh
from lore_jax._pairs.pack import pack
from lore_jax._train import coordinates, marginal, steps
from lore_jax.prior import make_atoms

KEY = jax.random.key(0)
QUICK = lore.Marginal(
    num_steps=20,
    search=lore.Search(ridges=(0.1, 0.3), smoothings=(1.0, 4.0), temperings=(0.4,)),
)


def make_mesh(size, kind=AxisType.Auto):
    return jax.make_mesh(
        (size,), ("users",), axis_types=(kind,), devices=jax.devices()[:size]
    )


def uneven(num_users=30, seed=0, **fields):
    """Users with 0 to 60 pairs over one table, and rows that nobody uses."""
    rng = np.random.default_rng(seed)
    counts = np.minimum(rng.geometric(0.08, num_users), 60)
    counts[0] = 0
    user = np.repeat(np.arange(num_users), counts)
    table = rng.normal(size=(90, 12)).astype(np.float32)
    truth = rng.normal(size=(12, 2))
    p = rng.dirichlet(np.ones(2), num_users)
    chosen = rng.integers(80, size=len(user))
    rejected = (chosen + rng.integers(1, 80, size=len(user))) % 80
    margin = ((table[chosen] - table[rejected]) @ truth * p[user]).sum(1)
    swap = rng.random(len(user)) > 1 / (1 + np.exp(-2 * margin))
    chosen, rejected = (
        np.where(swap, rejected, chosen),
        np.where(swap, chosen, rejected),
    )
    if fields.pop("labels", False):
        fields["label"] = rng.random(len(user))
        fields["sample_weight"] = rng.random(len(user)) + 0.1
    return lore.Preferences.from_pairs(
        table, chosen, rejected, user, num_users, **fields
    )


@pytest.mark.parametrize("labels", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_fit_is_that_of_one_device(size, labels):
    prefs = uneven(labels=labels)
    want = lore.fit(prefs, rank=2, key=KEY, recipe=QUICK)
    got = lore.fit(prefs, rank=2, key=KEY, recipe=QUICK, mesh=make_mesh(size))
    chosen = [
        [row for row in f.history.selection if row["chosen"]] for f in (got, want)
    ]
    for new, old in zip(*chosen, strict=True):
        names = set(new) - {"log_loss", "relative", "judgements", "items"}
        assert {n: new[n] for n in names} == {n: old[n] for n in names}
    scale = np.abs(want.model.basis).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
    )
    np.testing.assert_allclose(got.weights, want.weights, atol=1e-4)
    np.testing.assert_allclose(got.history.loss, want.history.loss, rtol=1e-5)


def test_the_same_mesh_gives_the_same_bits_and_one_device_those_of_none():
    prefs = uneven()
    plain = lore.fit(prefs, rank=2, key=KEY, recipe=QUICK)
    fits = [
        lore.fit(prefs, rank=2, key=KEY, recipe=QUICK, mesh=make_mesh(size))
        for size in (4, 4, 1)
    ]
    np.testing.assert_array_equal(fits[0].model.basis, fits[1].model.basis)
    np.testing.assert_allclose(fits[2].model.basis, plain.model.basis, rtol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
)
def test_axes_of_both_types_and_auto_rank(kind):
    recipe = lore.Marginal(
        num_steps=4,
        num_starts=1,
        search=lore.Search(
            ridges=(0.1,), smoothings=(1.0,), temperings=(0.4,), ranks=(1, 2)
        ),
    )
    settings = dict(rank="auto", key=KEY, recipe=recipe)
    want = lore.fit(uneven(), **settings)
    got = lore.fit(uneven(), **settings, mesh=make_mesh(4, kind))
    assert got.model.rank == want.model.rank
    scale = np.abs(want.model.basis).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
    )


def test_a_fit_goes_on_with_another_number_of_devices():
    prefs, records = uneven(), []
    settings = dict(rank=2, key=KEY, recipe=QUICK)
    want = lore.fit(prefs, **settings, mesh=make_mesh(4), on_progress=records.append)
    half = records[len(records) // 2]
    scale = np.abs(want.model.basis).max()
    for mesh in (make_mesh(4), make_mesh(2), None):
        got = lore.fit(prefs, **settings, mesh=mesh, resume=half)
        np.testing.assert_allclose(
            got.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
        )
    again = lore.fit(prefs, **settings, mesh=make_mesh(4), resume=half)
    np.testing.assert_array_equal(again.model.basis, want.model.basis)


def test_what_cannot_be_trained_on_a_mesh_is_refused():
    prefs, mesh = uneven(), make_mesh(2)
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        lore.fit(prefs, rank=2, key=KEY, mesh=2)
    wrong = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"the one axis 'users', got \('data',\)"):
        lore.fit(prefs, rank=2, key=KEY, mesh=wrong)
    with pytest.raises(ValueError, match="mesh trains at rank 1 or more"):
        lore.fit(prefs, rank=0, key=KEY, mesh=mesh, anchor=np.ones(12))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        lore.PublishedJoint(num_steps=20, alpha=0.3, prior=None),
        lore.PublishedAlternating(num_steps=20, alpha=0.3, prune=True, prior=None),
    ],
    ids=["joint", "alternating"],
)
def test_a_published_form_is_that_of_one_device(recipe, labels):
    prefs, records = uneven(labels=labels), []
    settings = dict(rank=3, key=KEY, recipe=recipe, anchor=np.ones(12))
    want = lore.fit(prefs, **settings)
    got = lore.fit(prefs, **settings, mesh=make_mesh(4), on_progress=records.append)
    again = lore.fit(prefs, **settings, mesh=make_mesh(2), resume=records[0])
    alone = lore.fit(prefs, **settings, resume=records[0])
    scale = np.abs(want.model.basis).max()
    for one in (got, again, alone):
        np.testing.assert_allclose(
            one.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
        )
        np.testing.assert_allclose(one.logits, want.logits, atol=1e-4)
        np.testing.assert_allclose(one.history.loss, want.history.loss, rtol=1e-5)
        norms = one.history.weights_norm, want.history.weights_norm
        np.testing.assert_allclose(*norms, rtol=0.01)
    assert records[0].state[1].shape == want.logits.shape  # Of all users, in order.


@pytest.mark.parametrize("labels", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", ["default", "joint", "alternating"])
def test_a_source_on_a_mesh_is_the_table_in_memory(kind, labels):
    """With two reads of it a step, however many devices there are."""
    prefs, steps_taken = uneven(labels=labels), 6
    search = dataclasses.replace(QUICK.search, ridges=(0.1,), smoothings=(1.0,))
    recipe = {
        "default": dataclasses.replace(QUICK, num_steps=steps_taken, search=search),
        "joint": lore.PublishedJoint(num_steps=steps_taken, prior=None),
        "alternating": lore.PublishedAlternating(num_steps=steps_taken, prior=None),
    }[kind]
    settings = dict(rank=3, key=KEY, recipe=recipe)
    want, reads = lore.fit(prefs, **settings), []

    class Source(lore.ArraySource):
        def blocks(self):
            reads.append(self)
            yield from np.array_split(self.array, 3)

    source = prefs.replace(features=Source(prefs.features))
    records = []
    got = lore.fit(
        source, **settings, mesh=make_mesh(4), on_progress=records.append, every=3
    )
    scale = np.abs(np.asarray(want.model.basis)).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
    )
    np.testing.assert_allclose(got.weights, want.weights, atol=1e-4)
    np.testing.assert_allclose(got.history.loss, want.history.loss, rtol=1e-5)
    if kind != "default":
        assert len(reads) <= 2 * steps_taken + 4
    half = records[len(records) // 2]
    again = lore.fit(source, **settings, mesh=make_mesh(4), resume=half)
    np.testing.assert_array_equal(again.model.basis, got.model.basis)
    alone = lore.fit(prefs, **settings, resume=half)
    np.testing.assert_allclose(
        alone.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
    )


def few(kind):
    """Three users with pairs, so that one of four devices has none."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(60, 6)).astype(np.float32)
    chosen, user = rng.integers(20, size=60), rng.integers(3, size=60)
    if kind == "differences":
        return lore.Preferences.from_pairs(table, np.arange(60), None, user, 5)
    weight = rng.integers(0, 2, 60) * (user != 1.0) if kind == "weights" else None
    prefs = lore.Preferences.from_pairs(
        table, chosen, chosen + 20, user, 5, sample_weight=weight
    )
    return lore.store_as(prefs, "bfloat16") if kind == "bfloat16" else prefs


@pytest.mark.parametrize("kind", ["plain", "differences", "bfloat16", "weights"])
def test_a_device_may_have_no_user(kind):
    short = lore.PublishedJoint(num_steps=4, prior=None)
    search = lore.Search(ridges=(0.1,), smoothings=(1.0,), temperings=(0.4,))
    recipes = [short]
    if kind == "plain":
        recipes.append(lore.Marginal(num_steps=4, num_starts=1, search=search))
    for recipe in recipes:
        settings = dict(rank=2, key=KEY, recipe=recipe)
        want = lore.fit(few(kind), **settings)
        got = lore.fit(few(kind), **settings, mesh=make_mesh(4))
        scale = np.abs(np.asarray(want.model.basis)).max()
        np.testing.assert_allclose(
            got.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
        )


def test_no_device_needs_room_for_the_whole_table(monkeypatch):
    monkeypatch.setattr("lore_jax._train.recipe.aligned_rows", None)
    search = lore.Search(ridges=(0.1,), smoothings=(1.0,), temperings=(0.4,))
    short = lore.Marginal(num_steps=4, num_starts=1, search=search)
    lore.fit(few("plain"), rank=2, key=KEY, recipe=short, mesh=make_mesh(4))


def program(prefs, rank, size, num_steps=3):
    """The compiled steps on a mesh, and what they get."""
    mesh = _mesh.check_mesh(make_mesh(size))
    pairs = pack(prefs)
    partition = _mesh.Partition(mesh, pairs, prefs.features.shape[0])
    atoms = make_atoms(KEY, rank, 16)
    made = coordinates.make_coordinates(
        coordinates.measure(prefs), 1.0, jnp.float32, prefs.num_features
    )
    base = jnp.full(len(atoms), 1 / len(atoms))
    table = partition.table(prefs.features)
    problem = marginal.make_mesh_problem(table, pairs, atoms, base, made, partition)
    optimiser = marginal.make_optimiser(0.1, 10)
    numbers = marginal.Settings(*map(jnp.float32, (0.1, 0.3, 1.0, 1.0, 5.0)))
    inputs = marginal.MarginalInputs(problem, numbers)
    state = marginal.init(KEY, problem, 0.1, optimiser)
    parts = marginal.make_steps(optimiser)
    lowered = steps.run_on_mesh.lower(
        state, inputs, steps=parts, num_steps=num_steps, mesh=mesh
    )
    return lowered.compile().as_text(), len(atoms)


def test_a_step_costs_one_all_reduce():
    prefs = uneven(200)
    rank = 3
    text, num_atoms = program(prefs, rank, 4)
    found = re.findall(r"= f32\[(\d+)\]\S* all-reduce\(", text)
    assert len(found) == 1, found
    assert 4 * int(found[0]) <= 4 * (12 * rank + num_atoms) + 64
    cost = step_cost(rows=80, width=12, rank=rank, pairs=prefs.num_pairs, devices=4,
                     atoms=num_atoms)  # fmt: skip
    assert cost.reduced == 4 * int(found[0])
    exchanges = re.findall(r"all-to-all\(", text)
    assert len(exchanges) == 2  # There and back, once a step.
    for word in ("all-gather", "collective-permute", "reduce-scatter"):
        assert word not in text
    private = lore.Preferences.from_pairs(
        np.eye(80, dtype=np.float32), np.arange(0, 80, 2), np.arange(1, 80, 2),
        np.arange(40) // 2,
    )  # fmt: skip
    text, _ = program(private, rank, 4)
    assert "all-to-all" not in text  # Nobody needs another's rows.


def test_parts_hold_their_own_rows_and_users_balanced():
    prefs = uneven(200)
    mesh = _mesh.check_mesh(make_mesh(4))
    pairs = pack(prefs)
    partition = _mesh.Partition(mesh, pairs, 90)
    parts = partition.pairs(pairs)
    loads = [len(part.chosen) for part in parts]
    assert sum(loads) == prefs.num_pairs
    assert max(loads) - min(loads) <= 60
    users = np.concatenate([part.users for part in partition.parts])
    assert sorted(users) == list(range(200))
    for part, mine, place in zip(partition.parts, parts, partition.places(pairs)):
        given = np.unique([pairs.chosen[place], pairs.rejected[place]])
        np.testing.assert_array_equal(part.used, given)
        where = dict(zip(part.used.tolist(), part.place.tolist()))
        for side in ("chosen", "rejected"):
            want = [where[row] for row in getattr(pairs, side)[place].tolist()]
            np.testing.assert_array_equal(getattr(mine, side), want)
    rows = np.concatenate([part.rows for part in partition.parts])
    used = np.unique([pairs.chosen, pairs.rejected])
    np.testing.assert_array_equal(np.sort(rows), used)  # Each on one device.
    table = partition.table(prefs.features)
    assert table.shape == (4, partition.num_rows_each, 12)
    for part, rows in zip(partition.parts, np.asarray(table)):
        np.testing.assert_array_equal(rows[: len(part.rows)], prefs.features[part.rows])


def test_devices_hold_as_many_rows_as_predicted():
    rng = np.random.default_rng(0)
    rows, pairs = 3000, 4000
    chosen = rng.integers(rows, size=pairs)
    rejected = (chosen + rng.integers(1, rows, size=pairs)) % rows
    prefs = lore.Preferences.from_pairs(
        np.zeros((rows, 2), np.float32), chosen, rejected, np.arange(pairs) // 10
    )
    for size in (2, 4):
        mesh = _mesh.check_mesh(make_mesh(size))
        partition = _mesh.Partition(mesh, pack(prefs), rows)
        cost = step_cost(rows=rows, width=2, rank=3, pairs=pairs, devices=size)
        held = [len(part.rows) for part in partition.parts]
        np.testing.assert_allclose(held, cost.rows, rtol=0.06)
        others = [len(part.used) - len(part.rows) for part in partition.parts]
        np.testing.assert_allclose(4 * 3 * np.mean(others), cost.exchanged, rtol=0.06)
        # The rounds are as long as the longest list.
        sent = 4 * 3 * partition.num_sent * (size - 1)
        assert sent <= 1.25 * cost.exchanged


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(QUICK, marks=pytest.mark.slow),
        lore.PublishedJoint(num_steps=10, prior=None),
    ],
)
def test_on_an_accelerator_what_comes_back_is_gathered(monkeypatch, recipe):
    prefs = uneven(labels=True)
    want = lore.fit(prefs, rank=2, key=KEY, recipe=recipe, mesh=make_mesh(4))
    monkeypatch.setattr(_backend, "CPU", _backend.CPU._replace(scatters=False))
    jax.clear_caches()
    got = lore.fit(prefs, rank=2, key=KEY, recipe=recipe, mesh=make_mesh(4))
    scale = np.abs(want.model.basis).max()
    np.testing.assert_allclose(
        got.model.basis, want.model.basis, rtol=0, atol=1e-5 * scale
    )


def test_splits_have_the_shapes_of_the_whole():
    prefs = uneven(60)
    mesh = _mesh.check_mesh(make_mesh(4))
    pairs = pack(prefs)
    partition = _mesh.Partition(mesh, pairs, 90)
    half = lore.take_pairs(
        prefs, np.random.default_rng(0).random(len(pairs.user)) < 0.5
    )
    atoms = make_atoms(KEY, 2, 8)
    base = jnp.full(len(atoms), 1 / len(atoms))
    made = coordinates.make_coordinates(
        coordinates.measure(prefs), 1.0, jnp.float32, 12
    )
    table = partition.table(prefs.features)
    whole, part = (
        marginal.make_mesh_problem(table, x, atoms, base, made, partition)
        for x in (pairs, pack(half))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(part, whole)
