"""What only an accelerator runs gives the numbers that a CPU's path gives."""

import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend, _checks
from lore_jax._pairs import pack


@pytest.fixture
def accelerator(monkeypatch):
    """Sizes and paths of an accelerator, on this CPU."""
    sizes = _backend.ACCELERATOR._replace(gather_pairs=50)
    for module in (_checks, pack):
        monkeypatch.setattr(module, "tuning", lambda *_: sizes)


def on_device(prefs):
    return prefs.replace(features=jnp.asarray(prefs.features))


def read_all(prefs):
    """(chunk, its arrays) of every chunk of the pairs."""
    pairs = pack.pack(prefs)
    read = pairs.reader(prefs.features)
    for chunk in pairs.chunks():
        arrays = read(chunk)
        yield chunk, [None if x is None else np.asarray(x) for x in arrays]


@pytest.mark.parametrize("kind", ["pairs", "differences"])
def test_chunks_are_read_on_the_device_as_on_the_host(
    kind, make_preferences, accelerator, monkeypatch
):
    used, original = [], pack._read_on_device

    def spy(*args, **kwargs):
        used.append(args)
        return original(*args, **kwargs)

    prefs = make_preferences(30, 200, label=True, sample_weight=True)
    if kind == "differences":
        prefs = prefs.replace(rejected=None, sample_weight=None, label=None)
    monkeypatch.setattr(pack, "_read_on_device", spy)
    chunks = zip(read_all(on_device(prefs)), read_all(prefs), strict=True)
    for (chunk, got), (_, want) in chunks:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        z, weight, label = want
        assert z.shape == (len(chunk.count), chunk.length, prefs.num_features)
        for row, user in enumerate(chunk.users):
            mine = prefs.user == user
            rows = prefs.features[prefs.chosen[mine]]
            if prefs.rejected is not None:
                rows = rows - prefs.features[prefs.rejected[mine]]
            real = np.arange(chunk.length) < mine.sum()
            np.testing.assert_array_equal(z[row][real], rows)
            assert not weight[row][~real].any()
            if prefs.sample_weight is not None:
                for got, stored in (
                    (weight, prefs.sample_weight),
                    (label, prefs.label),
                ):
                    np.testing.assert_allclose(got[row][real], stored[mine], rtol=1e-6)
            else:
                assert weight[row][real].all()
    assert used


def test_adapting_takes_larger_chunks_to_the_same_weights(
    make_preferences, small_basis, small_prior, monkeypatch
):
    prefs = make_preferences(1100, 3000, label=True)
    model, pairs = lore.RewardModel(small_basis, small_prior, 2.0), pack.pack(prefs)
    want = lore.adapt(model, prefs)
    sizes = [len(c.count) for c in pairs.chunks()]
    monkeypatch.setattr(pack, "tuning", lambda *_: _backend.ACCELERATOR)
    larger = [len(c.count) for c in pairs.chunks()]
    assert len(larger) < len(sizes)
    assert max(larger) > max(sizes)
    got = lore.adapt(model, on_device(prefs))
    np.testing.assert_allclose(got.weights, want.weights, atol=1e-5)
    np.testing.assert_allclose(got.loss, want.loss, atol=1e-5)


def test_nobody_has_a_pair(small_basis, small_prior, accelerator):
    prefs = lore.Preferences.from_ragged([np.zeros((0, 6), np.float32)] * 3)
    got = lore.adapt(lore.RewardModel(small_basis, small_prior, 2.0), on_device(prefs))
    mean = np.exp(small_prior.log_weights) @ small_prior.atoms
    np.testing.assert_allclose(got.weights, np.tile(mean, (3, 1)), atol=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_table_on_the_device_is_looked_at_there(wrong, accelerator):
    table = np.full((7, 4), 1e38, np.float32)  # finite, though its sum is not
    arguments = [0, 1], [2, 3], [0, 1]
    lore.Preferences.from_pairs(jnp.asarray(table), *arguments)
    table[5, 2] = wrong
    with pytest.raises(ValueError, match=f"row 5, column 2 is {wrong}"):
        lore.Preferences.from_pairs(jnp.asarray(table), *arguments)


def test_a_finite_table_on_the_device_stays_there(accelerator, monkeypatch):
    monkeypatch.setattr(_checks, "_BLOCK_BYTES", None)  # No block can be made.
    _checks.host_float_table(jnp.ones((3, 2)))
