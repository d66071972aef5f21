"""Products of bfloat16 tables: exact with V in three parts, forwards and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend, _equations


@pytest.fixture(params=[True, False], ids=["three parts", "converted"])
def split(request, monkeypatch):
    changed = _backend.CPU._replace(splits_bfloat16=request.param)
    monkeypatch.setattr(_backend, "CPU", changed)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def table_of(rows, width, seed=0):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return jnp.asarray(x).astype(jnp.bfloat16)


def test_three_parts_are_exact():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 4)) * 10.0 ** rng.integers(-20, 20, (500, 4))
    values = values.astype(np.float32)
    parts = np.asarray(_equations.bfloat16_parts(jnp.asarray(values)), np.float64)
    total = sum(np.split(parts, 3, axis=1))
    np.testing.assert_array_equal(total.astype(np.float32), values)


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_products_are_those_of_float64(split, rank):
    table = table_of(300, 512)
    basis = np.random.default_rng(1).normal(size=(512, rank)).astype(np.float32)
    slopes = np.random.default_rng(2).normal(size=(300, rank)).astype(np.float32)
    exact = np.asarray(table, np.float64)
    got, pullback = jax.vjp(lambda v: _equations.product(table, v), jnp.asarray(basis))
    assert got.dtype == jnp.float32
    want = exact @ basis
    assert np.abs(got - want).max() < 2e-6 * np.abs(want).max()
    (back,) = pullback(jnp.asarray(slopes))
    want = exact.T @ slopes
    assert back.dtype == jnp.float32
    assert np.abs(back - want).max() < 2e-6 * np.abs(want).max()


def test_the_table_may_be_differentiated(split):
    table, basis = table_of(6, 8), jnp.asarray(np.eye(8, 2, dtype=np.float32))
    slope = jax.grad(lambda x: _equations.product(x, basis).sum())(table)
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_array_equal(slope[:, :2], 1)
    np.testing.assert_array_equal(slope[:, 2:], 0)


def test_a_table_is_read_in_bfloat16_on_an_accelerator(monkeypatch):
    changed = _backend.CPU._replace(splits_bfloat16=True)
    monkeypatch.setattr(_backend, "CPU", changed)
    shape = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
    basis = jax.ShapeDtypeStruct((32, 5), jnp.float32)
    traced = jax.jit(lambda x, v: _equations.product(x, v)).trace(shape, basis)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<64x32xbf16>" in text
    assert "tensor<64x32xf32>" not in text


@pytest.mark.slow
def test_fits_of_a_bfloat16_table_are_as_good(split, planted):
    rounded = planted.prefs.replace(
        features=jnp.asarray(lore.store_as(planted.prefs, "bfloat16").features)
    )
    fits = [
        lore.fit(
            prefs, rank=2, key=jax.random.key(0), recipe=lore.Marginal(num_steps=20)
        )
        for prefs in (planted.prefs, rounded)
    ]
    scores = [lore.accuracy(f.model, f, planted.prefs).mean() for f in fits]
    assert abs(scores[0] - scores[1]) < 0.01
