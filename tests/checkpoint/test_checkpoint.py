"""Fits: round trips, what may not be saved, and a crash while saving."""

import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_cases import NAN, make_fit, rewrite

import lore_jax as lore
from lore_jax.preferences import Ids


def assert_same(first, second):
    left, right = jax.tree.leaves_with_path(first), jax.tree.leaves_with_path(second)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, a), (_, b) in zip(left, right, strict=True):
        assert np.shape(a) == np.shape(b), path
        assert np.asarray(a).dtype == np.asarray(b).dtype, path
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert first.model.temperature == second.model.temperature
    assert first.recipe == second.recipe
    assert first.history.selection == second.history.selection
    for name in ("users", "items"):
        a, b = (getattr(x.ids, name, None) for x in (first, second))
        assert (a is None) == (b is None)
        if a is not None:
            assert a.tolist() == b.tolist()


@pytest.mark.parametrize("names", [True, False], ids=["names", "numbers"])
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "whole"])
def test_round_trip(tmp_path, pruned, names):
    original = make_fit(pruned=pruned, names=names)
    lore.save(tmp_path / "fit", original)
    assert_same(original, lore.load(tmp_path / "fit"))


def test_round_trip_of_a_real_fit(tmp_path, fitted, planted):
    path = str(tmp_path / "fit.safetensors")
    lore.save(path, fitted)
    loaded = lore.load(path)
    assert_same(fitted, loaded)
    assert loaded.user_ids.tolist() == [f"user-{u}" for u in range(24)]
    first, second = (lore.adapt(f.model, planted.heldout) for f in (fitted, loaded))
    np.testing.assert_array_equal(first.weights, second.weights)


def test_names_of_groups_are_not_part_of_a_fit(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30, 4)).astype(np.float32)
    chosen = rng.integers(15, size=60)
    users = np.array(["ann", "bob", "cy"])[rng.integers(3, size=60)]
    prefs = lore.Preferences.from_pairs(
        table, chosen, chosen + 15, users, group=chosen % 5
    )
    assert prefs.ids.groups.tolist() == [0, 1, 2, 3, 4]
    recipe = lore.PublishedJoint(num_steps=2, prior=None)
    fitted = lore.fit(prefs, rank=2, key=jax.random.key(0), recipe=recipe)
    lore.save(tmp_path / "fit", fitted)
    loaded = lore.load(tmp_path / "fit")
    assert loaded.ids == fitted.ids
    assert loaded.user_ids.tolist() == ["ann", "bob", "cy"]


def test_a_fit_without_a_prior_round_trips(tmp_path):
    original = make_fit()
    original = original.replace(model=original.model.replace(prior=None))
    lore.save(tmp_path / "fit", original)
    loaded = lore.load(tmp_path / "fit")
    assert_same(original, loaded)
    assert loaded.model.prior is None


def test_rank_zero_round_trips(tmp_path, make_preferences):
    prefs = make_preferences()
    anchor = np.arange(6, dtype=np.float32)
    original = lore.fit(prefs, rank=0, key=jax.random.key(0), anchor=anchor)
    lore.save(tmp_path / "fit", original)
    assert_same(original, lore.load(tmp_path / "fit"))


@pytest.mark.parametrize("temperature", [5, np.float32(5)])
def test_any_number_may_be_the_temperature(tmp_path, make_preferences, temperature):
    recipe = lore.PublishedJoint(num_steps=0, temperature=temperature, prior=None)
    original = lore.fit(
        make_preferences(), rank=2, key=jax.random.key(0), recipe=recipe
    )
    lore.save(tmp_path / "fit", original)
    assert lore.load(tmp_path / "fit").model.temperature == 5.0


def test_double_precision_round_trips(tmp_path):
    with jax.enable_x64(True):
        fit = make_fit()
        wide = jax.tree.map(lambda x: x.astype(np.float64), fit.params)
        original = fit.replace(
            model=fit.model.replace(basis=wide.basis),
            logits=wide.logits,
            weights=wide.weights,
        )
        lore.save(tmp_path / "fit", original)
        assert_same(original, lore.load(tmp_path / "fit"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda f: f.replace(model=f.model.replace(temperature=50.0)),
            "temperature 50, but that of its recipe is 100",
        ),
        (
            lambda f: f.replace(model=f.model.replace(basis=f.model.basis * NAN)),
            "basis must be finite",
        ),
        (lambda f: f.replace(weights=f.weights[::-1]), r"be softmax\(logits\)"),
        (
            lambda f: f.replace(
                model=f.model.replace(
                    prior=f.model.prior.replace(atoms=-f.model.prior.atoms)
                )
            ),
            "atoms",
        ),
        (lambda f: f.replace(ids=Ids(np.array(["a"] * 4), None)), "must be distinct"),
    ],
    ids=["temperature", "basis", "weights", "atoms", "names"],
)
def test_what_loading_would_refuse_is_not_saved(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        lore.save(tmp_path / "fit", changed(make_fit()))
    assert list(tmp_path.iterdir()) == []


def test_a_fit_without_a_recipe_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"fitted\.recipe must be a recipe"):
        lore.save(tmp_path / "fit", make_fit().replace(recipe=None))


@pytest.mark.parametrize("step", ["replace", "fsync", "write"])
def test_a_crash_while_saving_leaves_the_old_file(saved, monkeypatch, step):
    before = saved.read_bytes()

    def crash(*_, **__):
        raise KeyboardInterrupt

    def tear(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    if step == "write":
        monkeypatch.setattr(pathlib.Path, "write_bytes", tear)
    else:
        monkeypatch.setattr(os, step, crash)
    with pytest.raises(KeyboardInterrupt):
        lore.save(saved, make_fit(seed=5))
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    lore.load(saved)


def test_saving_again_replaces_the_file(saved):
    lore.save(saved, make_fit(seed=5))
    assert_same(make_fit(seed=5), lore.load(saved))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_does_not_exist_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="absent"):
        lore.save(tmp_path / "absent" / "fit", make_fit())


def test_the_file_is_plain_safetensors(saved):
    """Nothing in it is pickled; anybody can read the arrays."""
    arrays = safetensors.numpy.load_file(saved)
    np.testing.assert_array_equal(
        arrays["model.basis"], np.asarray(make_fit(pruned=True).model.basis)
    )


@pytest.mark.parametrize("mark", ["", "0" * 31, "G" * 32])
def test_fingerprints_are_32_hex_digits(tmp_path, users, mark):
    path = tmp_path / "users"
    lore.save_users(path, users[2])
    rewrite(path, record={"fingerprint": mark})
    with pytest.raises(ValueError, match="users is damaged: fingerprint"):
        lore.load_users(path)
    with pytest.raises(ValueError, match="fingerprint"):
        lore.save_users(path, users[2].replace(fingerprint=mark))
