"""Coordinates against a float64 oracle: a dense SVD of the rows that pairs use."""

import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._train import coordinates

CASES = "wide", "tall", "prompts", "differences", "weights"
GRID = 0.0, 0.1, 1.0, 4.0, np.inf


def make_pairs(case):
    """300 pairs over rows with a power-law spectrum and a constant offset."""
    rng = np.random.default_rng(0)
    num_rows, num_features = (70, 9) if case == "tall" else (24, 40)
    features = rng.normal(size=(num_rows, num_features)) + 3
    features *= np.arange(1, num_features + 1) ** -0.5
    chosen = rng.integers(num_rows, size=300)
    rejected = (chosen + rng.integers(1, num_rows, size=300)) % num_rows
    weight = None
    if case == "prompts":  # Four responses each, compared within a prompt.
        rejected = chosen // 4 * 4 + (chosen + rng.integers(1, 4, size=300)) % 4
    if case == "weights":  # What only pairs without weight use is not used.
        weight = np.where((chosen < 5) | (rejected < 5), 0.0, 0.5)
    return lore.Preferences.from_pairs(
        features.astype(np.float32),
        chosen,
        None if case == "differences" else rejected,
        np.arange(300) % 20,
        sample_weight=weight,
    )


def differences(prefs):
    """float64[N, D] of the pairs that weigh something."""
    x = np.asarray(prefs.features, np.float64)
    z = x[prefs.chosen]
    z = z if prefs.rejected is None else z - x[prefs.rejected]
    return z if prefs.sample_weight is None else z[np.asarray(prefs.sample_weight) > 0]


def centred_rows(prefs):
    """float64[M', D], used rows minus the mean of those they are compared with."""
    keep = np.ones(prefs.num_pairs, bool)
    if prefs.sample_weight is not None:
        keep = np.asarray(prefs.sample_weight) > 0
    x = np.asarray(prefs.features, np.float64)
    chosen = np.asarray(prefs.chosen)[keep]
    if prefs.rejected is None:
        return x[np.unique(chosen)]
    rejected = np.asarray(prefs.rejected)[keep]
    left, rows = set(chosen) | set(rejected), []
    while left:
        component, size = {left.pop()}, 0
        while len(component) > size:
            size = len(component)
            for a, b in zip(chosen, rejected, strict=True):
                if a in component or b in component:
                    component |= {a, b}
        left -= component
        part = x[sorted(component)]
        rows.append(part - part.mean(0))
    return np.concatenate(rows)


def oracle(prefs, smoothing):
    """Q diag(g²) Qᵀ, float64[D, D]: the covariance of V that the ridge stands for."""
    _, values, turn = np.linalg.svd(centred_rows(prefs), full_matrices=False)
    kept = values**2 > 1e-9 * values[0] ** 2
    values, turn = values[kept] ** 2, turn[kept]
    variances = values / values.mean()
    gains = np.ones_like(values)
    if np.isfinite(smoothing):
        gains = (variances + smoothing) ** -0.5
    matrix = turn.T * gains
    norm = np.sqrt((np.square(differences(prefs) @ matrix)).sum(1).mean())
    matrix = matrix / norm
    return matrix @ matrix.T


def made_of(prefs, smoothing, dtype=jnp.float32):
    spectrum = coordinates.measure(prefs)
    return coordinates.make_coordinates(spectrum, smoothing, dtype, prefs.num_features)


def dense(made):
    """The matrix of `basis_of`, float64[D, R]."""
    eye = jnp.eye(made.size, dtype=made.gains.dtype)
    return np.asarray(coordinates.basis_of(eye, made), np.float64)


@pytest.fixture(params=[None, 5], ids=["exact", "tail"])
def leading(request, monkeypatch):
    """How many directions are decomposed apart from the tail; None is all."""
    if request.param is not None:
        monkeypatch.setattr(coordinates, "EXACT_UP_TO", 5)
        monkeypatch.setattr(coordinates, "_LEADING", request.param)
    return request.param


@pytest.mark.parametrize("smoothing", GRID)
@pytest.mark.parametrize("case", CASES)
def test_the_prior_of_the_basis_is_that_of_a_dense_svd(case, smoothing):
    prefs = make_pairs(case)
    matrix, want = dense(made_of(prefs, smoothing)), oracle(prefs, smoothing)
    assert made_of(prefs, smoothing).tail is None
    np.testing.assert_allclose(
        matrix @ matrix.T, want, rtol=1e-3, atol=1e-4 * np.abs(want).max()
    )


@pytest.mark.parametrize("smoothing", GRID)
@pytest.mark.parametrize("case", CASES)
def test_a_difference_has_norm_one_on_average(case, smoothing, leading):
    prefs = make_pairs(case)
    z = differences(prefs) @ dense(made_of(prefs, smoothing))
    assert np.sqrt(np.square(z).sum(1).mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("case", ["wide", "tall"])
def test_the_ends_are_the_embedding_and_the_items(case):
    """At ε = ∞ a projection times a number; at 0 all directions vary alike."""
    prefs = make_pairs(case)
    z = centred_rows(prefs)
    matrix = dense(made_of(prefs, np.inf))
    moved = z @ matrix @ matrix.T
    np.testing.assert_allclose(moved, z * (moved[0] @ z[0]) / (z[0] @ z[0]), atol=1e-4)
    white = z @ dense(made_of(prefs, 0.0))
    gram = white.T @ white
    np.testing.assert_allclose(gram / gram[0, 0], np.eye(len(gram)), atol=1e-3)
    if case == "wide":  # Which item a row is, and nothing else.
        gram = white @ white.T
        ids = np.eye(len(z)) - 1 / len(z)
        np.testing.assert_allclose(gram / gram[0, 0], ids / ids[0, 0], atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_slopes_are_transposed_and_theta_is_found_again(case, leading):
    prefs = make_pairs(case)
    made = made_of(prefs, 0.3)
    rng = np.random.default_rng(1)
    theta = rng.normal(size=(made.size, 3)).astype(np.float32)
    slope = rng.normal(size=(prefs.num_features, 3)).astype(np.float32)
    basis = coordinates.basis_of(jnp.asarray(theta), made)
    back = coordinates.slope_of(jnp.asarray(slope), made)
    assert (basis.shape, back.shape) == (slope.shape, theta.shape)
    np.testing.assert_allclose(dense(made) @ theta, basis, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(dense(made).T @ slope, back, rtol=1e-3, atol=1e-4)
    again = coordinates.theta_of(basis, made)
    np.testing.assert_allclose(again, theta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["wide", "tall", "prompts"])
def test_a_tail_scales_what_the_leading_directions_leave(case, leading):
    made = made_of(make_pairs(case), 0.3)
    if leading is None:
        return
    directions, gains, tail = (np.asarray(x, np.float64) for x in jax_leaves(made))
    assert directions.shape[1] == leading
    np.testing.assert_allclose(directions.T @ directions, np.eye(leading), atol=1e-5)
    size = len(directions)
    want = tail * np.eye(size)
    want += directions @ np.diag(gains - tail) @ directions.T
    np.testing.assert_allclose(dense(made), want, atol=1e-5 * np.abs(want).max())


def jax_leaves(made):
    return made.directions, made.gains, made.tail


@pytest.mark.parametrize("case", ["wide", "prompts", "weights"])
def test_a_tail_has_the_span_of_the_differences(case, monkeypatch):
    monkeypatch.setattr(coordinates, "EXACT_UP_TO", 5)
    monkeypatch.setattr(coordinates, "_LEADING", 5)
    prefs = make_pairs(case)
    spectrum = coordinates.measure(prefs)
    z = differences(prefs)
    span = np.linalg.svd(z, full_matrices=False)[2][: np.linalg.matrix_rank(z)]
    assert spectrum.span.shape == span.shape[::-1]
    basis = np.random.default_rng(2).normal(size=(40, 3)).astype(np.float32)
    got = coordinates.in_span(jnp.asarray(basis), spectrum)
    np.testing.assert_allclose(got, span.T @ (span @ basis), atol=1e-5)
    np.testing.assert_allclose(z @ np.asarray(got), z @ basis, atol=1e-4)


def test_where_differences_span_everything_nothing_is_left_out(leading):
    spectrum = coordinates.measure(make_pairs("tall"))
    assert spectrum.span is None
    basis = jnp.ones((9, 2))
    np.testing.assert_array_equal(coordinates.in_span(basis, spectrum), basis)


@pytest.mark.parametrize("smoothing", [0.1, 1.0, 4.0, np.inf])
@pytest.mark.parametrize("case", ["wide", "tall"])
def test_there_is_no_cliff_where_only_leading_directions_are_decomposed(
    case, smoothing, monkeypatch
):
    """The kernel of the rows, X G GᵀXᵀ, on both sides of the limit."""
    prefs = make_pairs(case)
    z = differences(prefs)
    kernels = []
    for most in (1024, 5):
        monkeypatch.setattr(coordinates, "EXACT_UP_TO", most)
        monkeypatch.setattr(coordinates, "_LEADING", 20 if case == "wide" else 7)
        moved = z @ dense(made_of(prefs, smoothing))
        kernels.append(moved @ moved.T)
    exact, tail = kernels
    # Near ε = 0 it counts that all of the tail has one variance.
    limit = 0.1 if smoothing < 1 else 0.02
    assert np.linalg.norm(exact - tail) < limit * np.linalg.norm(exact)


@pytest.mark.parametrize("case", ["wide", "tall", "prompts", "weights"])
def test_rows_that_no_pair_uses_have_no_part(case, leading):
    prefs = make_pairs(case)
    want = coordinates.measure(prefs)
    noise = np.random.default_rng(3).normal(size=(50, prefs.num_features)) * 100
    table = np.concatenate([noise[:20], prefs.features, noise[20:]]).astype(np.float32)
    more = prefs.replace(
        features=table,
        chosen=np.asarray(prefs.chosen) + 20,
        rejected=np.asarray(prefs.rejected) + 20,
    )
    for got in (
        coordinates.measure(more),
        coordinates.measure(more.replace(features=lore.ArraySource(table, 7))),
    ):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_features_cancels(scale, leading):
    prefs = make_pairs("prompts")
    scaled = prefs.replace(features=np.asarray(prefs.features) * np.float32(scale))
    first, second = (dense(made_of(p, 0.3)) for p in (prefs, scaled))
    want = first @ first.T
    got = second @ second.T * scale**2
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_a_sample_of_the_rows_says_nearly_the_same(monkeypatch):
    """Where a table is too large to be read into memory."""
    rng = np.random.default_rng(4)
    features = (rng.normal(size=(3000, 6)) * [5, 3, 2, 1, 1, 1]).astype(np.float32)
    chosen = rng.integers(3000, size=6000)
    rejected = (chosen + rng.integers(1, 3000, size=6000)) % 3000
    prefs = lore.Preferences.from_pairs(
        features, chosen, rejected, np.arange(6000) % 20
    )
    exact = dense(made_of(prefs, 0.3))
    monkeypatch.setattr(coordinates, "_SAMPLE_CELLS", 6 * 1000)
    made = made_of(prefs, 0.3)
    assert made.tail is not None
    got = dense(made)
    want = exact @ exact.T
    np.testing.assert_allclose(got @ got.T, want, atol=0.1 * np.abs(want).max())


def test_without_differences_nothing_can_be_learned():
    prefs = lore.Preferences.from_pairs(
        np.ones((4, 3), np.float32), [0, 2], [1, 3], [0, 1]
    )
    assert coordinates.measure(prefs) is None
    made = made_of(prefs, 1.0)
    assert made.size == 1
    np.testing.assert_array_equal(
        coordinates.in_span(jnp.ones((3, 2)), None), np.ones((3, 2))
    )


def test_columns_of_zeros_change_nothing():
    made = made_of(make_pairs("wide"), 0.3)
    wider = coordinates.padded(made, made.size + 4)
    assert wider.size == made.size + 4
    theta = np.random.default_rng(5).normal(size=(wider.size, 2)).astype(np.float32)
    want = coordinates.basis_of(jnp.asarray(theta[: made.size]), made)
    got = coordinates.basis_of(jnp.asarray(theta), wider)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert coordinates.padded(made, made.size) is made
    found = coordinates.theta_of(want, wider)
    np.testing.assert_allclose(found[: made.size], theta[: made.size], atol=1e-4)
    np.testing.assert_array_equal(found[made.size :], np.zeros((4, 2)))
