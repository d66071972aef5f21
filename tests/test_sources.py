"""`fit` from a table larger than memory: the steps in memory, blocks one at a time."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._train import coordinates

KEY = jax.random.key(0)
BLOCK = 16
ONE = dict(
    temperings=(0.4,),
    concentrations=(3.0,),
    decays=(0.0,),
    variance_scales=(0.1,),
    margin_scales=(1.0,),
)
SEARCH = lore.Search(smoothings=(1.0,), ridges=(0.2,), **ONE)
BOTH = dataclasses.replace(SEARCH, ridges=(0.2, 0.05))
PUBLISHED = dict(num_steps=6, temperature=5.0, prior=lore.PriorSearch(**ONE))
RECIPES = {
    "default": lore.Marginal(num_steps=6, search=BOTH),
    "joint": lore.PublishedJoint(**PUBLISHED),
    "alternating": lore.PublishedAlternating(**PUBLISHED, alpha=0.1),
}


class CountingSource:
    """Blocks of 16 rows, the last one shorter; counts reads, forbids two at a time."""

    def __init__(self, table):
        self.table, self.shape, self.dtype = table, table.shape, table.dtype
        self.reads = np.zeros(-(-len(table) // BLOCK), int)
        self.alive = None

    def blocks(self):
        for index, start in enumerate(range(0, len(self.table), BLOCK)):
            assert self.alive is None or self.alive() is None, "two blocks in memory"
            block = self.table[start : start + BLOCK].copy()
            self.reads[index] += 1
            self.alive = weakref.ref(block)
            yield block
            del block


@pytest.fixture(scope="module")
def table():
    """12 users who compare 45 rows (two blocks and a ragged one) or single rows."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(45, 6)).astype(np.float32) + 2
    user = np.repeat(np.arange(12), 12)
    first = rng.integers(45, size=144)
    second = (first + rng.integers(1, 45, size=144)) % 45
    truth = (features @ rng.normal(size=(6, 12)))[:, user]
    place = np.arange(144)
    better = truth[first, place] > truth[second, place]
    chosen, rejected = np.where(better, (first, second), (second, first))
    return lore.Preferences.from_pairs(features, chosen, rejected, user)


def fit(prefs, recipe):
    anchor = np.ones(6) if getattr(recipe, "alpha", 0) else None
    return lore.fit(prefs, rank=2, key=KEY, recipe=recipe, anchor=anchor)


def assert_close(first, second, tolerance):
    scale = np.abs(np.asarray(first.model.basis)).max()
    np.testing.assert_allclose(
        second.model.basis, first.model.basis, atol=tolerance * scale
    )
    np.testing.assert_allclose(second.weights, first.weights, atol=10 * tolerance)
    for name in ("loss", "weights_norm", "basis_norm", "validation"):
        got, want = (np.asarray(getattr(f.history, name)) for f in (second, first))
        np.testing.assert_allclose(got, want, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", RECIPES)
def test_a_few_steps_from_a_memory_map_are_those_in_memory(table, name, tmp_path):
    """With two reads of each block an iteration, and one block in memory at a time."""
    np.save(tmp_path / "table.npy", table.features)
    source = CountingSource(np.load(tmp_path / "table.npy", mmap_mode="r"))
    recipe = RECIPES[name]
    here = fit(table, recipe)
    there = fit(table.replace(features=source), recipe)
    assert_close(here, there, 1e-4)
    rows = [[r["log_loss"] for r in f.history.selection] for f in (here, there)]
    np.testing.assert_allclose(*rows, rtol=1e-4)
    # Two λ at ranks 1 and 2 on two hold-outs, with a loss each, and all pairs twice, or
    # once by a published recipe. Singular directions are 13 reads, of each rank on each
    # hold-out and of all pairs; coordinates are 2 each.
    default = name == "default"
    trained = 2 * 2 * 2 * (2 * 6 + 1) + 2 * 2 * len(there.history.loss)
    expected = trained + 5 * 13 + 3 * 2 if default else 2 * 6
    assert len(set(source.reads)) == 1
    # Curves and the settings of the prior on both hold-outs, both starts' weights, and
    # once to see that all is finite; or the prior alone, and that.
    assert 0 <= source.reads[0] - expected <= (7 if default else 2)


def test_coordinates_are_those_in_memory(table, monkeypatch):
    """From columns or rows, of responses or differences, with a tail and without."""
    x = table.features[table.chosen] - table.features[table.rejected]
    differences = table.replace(features=x, chosen=np.arange(144), rejected=None)
    wide = np.random.default_rng(2).normal(size=(45, 60)).astype(np.float32) + 1
    wide = table.replace(features=wide)
    monkeypatch.setattr(coordinates, "_LEADING", 3)
    for prefs, limit in ((table, 1024), (differences, 1024), (wide, 1024), (table, 5)):
        monkeypatch.setattr(coordinates, "EXACT_UP_TO", limit)
        want = coordinates.measure(prefs)
        rank = 3 if limit == 5 else min(prefs.features.shape) - (prefs is wide)
        assert want.directions.shape == (prefs.num_features, rank)
        assert (want.tail is None) == (limit > 5)
        for rows in (BLOCK, 7):
            source = lore.ArraySource(prefs.features, rows)
            got = coordinates.measure(prefs.replace(features=source))
            for a, b in zip(got, want, strict=True):
                if b is not None:
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_tables_with_a_tail_are_trained_on_alike(table, monkeypatch):
    """Where few directions are decomposed, and features already are differences."""
    monkeypatch.setattr(coordinates, "EXACT_UP_TO", 5)
    monkeypatch.setattr(coordinates, "_LEADING", 3)
    x = table.features[table.chosen] - table.features[table.rejected]
    prefs = table.replace(features=x, chosen=np.arange(144), rejected=None)
    source = prefs.replace(features=lore.ArraySource(x, BLOCK))
    recipe = lore.Marginal(num_steps=4, search=SEARCH)
    fits = (lore.fit(p, rank=2, key=KEY, recipe=recipe) for p in (prefs, source))
    assert_close(*fits, 1e-4)


def test_a_source_that_yields_other_rows_than_it_says_is_refused(table):
    source = lore.ArraySource(np.asarray(table.features), BLOCK)
    for rows, got in ((44, "at least 45"), (46, "got 45")):
        source.shape = (rows, 6)
        prefs = table.replace(features=source)
        with pytest.raises(ValueError, match=rf"M={rows} rows of one table, {got}|got"):
            fit(prefs, RECIPES["default"])
    source.shape = (45, 7)
    with pytest.raises(ValueError, match=r"D=7; the block at row 0 has shape"):
        lore.fit(
            table.replace(features=source), rank=2, key=KEY, recipe=RECIPES["default"]
        )


def test_a_block_that_is_not_finite_is_refused(table):
    features = np.array(table.features)
    features[40, 3] = np.nan
    prefs = table.replace(features=lore.ArraySource(features, BLOCK))
    place = "the block of features at row 32 must be finite; row 8, column 3 is nan"
    for recipe in RECIPES.values():
        with pytest.raises(ValueError, match=place):
            fit(prefs, recipe)


@pytest.mark.parametrize(
    ("kind", "said"), [(int, "int64"), ("U1", "<U1"), (None, "<class 'list'>")]
)
def test_blocks_of_anything_but_floats_are_refused(kind, said):
    class Wrong(lore.FeatureSource):
        shape, dtype = (3, 2), np.dtype(np.float32)

        def blocks(self):
            block = np.ones((3, 2))
            yield block.tolist() if kind is None else block.astype(kind)

    prefs = lore.Preferences.from_pairs(Wrong(), [0], [1], [0])
    model = lore.RewardModel(np.eye(2, dtype=np.float32))
    message = f"blocks.. must yield arrays float.*the block at row 0 holds {said}"
    for call in (
        lambda: lore.adapt(model, prefs),
        lambda: lore.fit(prefs, rank=1, key=jax.random.key(0)),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match="array must be an array, got <class 'list'>"):
        lore.ArraySource([[1.0, 2.0]])
