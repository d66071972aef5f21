"""Slopes of the default recipe against float64 NumPy, and how pairs are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend
from lore_jax._pairs import pack
from lore_jax._train import marginal
from lore_jax._train.coordinates import Coordinates
from lore_jax.prior import make_atoms

RANK, TEMPERATURE, GAMMA = 3, 2.0, 0.4


def expected(proj, prefs, atoms, log_weights):
    """(slopes float[M, K], log marginal, π) pair by pair in float64."""
    proj, atoms = np.asarray(proj, float) / TEMPERATURE, np.asarray(atoms, float)
    slopes, value, share, users = np.zeros_like(proj), 0.0, np.zeros(len(atoms)), 0
    column = {
        name: np.ones(prefs.num_pairs) if given is None else np.asarray(given, float)
        for name, given in (("label", prefs.label), ("weight", prefs.sample_weight))
    }
    for user in range(prefs.num_users):
        pairs = np.flatnonzero(np.asarray(prefs.user) == user)
        if not len(pairs):
            continue
        y, w = column["label"][pairs, None], column["weight"][pairs, None]
        z = proj[prefs.chosen[pairs]]
        if prefs.rejected is not None:
            z = z - proj[prefs.rejected[pairs]]
        m = z @ atoms.T
        power = max(w.sum(), 1) ** -GAMMA
        table = -np.sum(w * (np.logaddexp(0, m) - y * m), axis=0)
        joint = power * table + log_weights
        top = joint.max()
        posterior = np.exp(joint - top)
        value += top + np.log(posterior.sum())
        posterior = posterior / posterior.sum()
        share, users = share + posterior, users + 1
        slope = (w * (y - 1 / (1 + np.exp(-m))) * power * posterior) @ atoms
        np.add.at(slopes, prefs.chosen[pairs], -slope / TEMPERATURE)
        if prefs.rejected is not None:
            np.add.at(slopes, prefs.rejected[pairs], slope / TEMPERATURE)
    return slopes, value, (share + 1 / len(atoms)) / (users + 1)


def slopes_of(proj, prefs):
    """The same by `marginal`, and the atoms and weights that it used."""
    atoms = make_atoms(jax.random.key(0), RANK, 12)
    base = jnp.full(len(atoms), 1 / len(atoms))
    size = prefs.num_features
    coordinates = Coordinates(jnp.eye(size), jnp.ones(size))
    pairs = pack.pack(prefs)
    problem = marginal.make_problem(prefs.features, pairs, atoms, base, coordinates)
    settings = marginal.Settings(*map(jnp.float32, (0.2, GAMMA, TEMPERATURE, 1, 1)))
    optimiser = marginal.make_optimiser(0.3, 8)
    state = marginal.init(jax.random.key(1), problem, 0.1, optimiser)
    log_weights = np.log(np.random.default_rng(2).dirichlet(np.ones(len(atoms))))
    state = state.replace(log_weights=jnp.asarray(log_weights, jnp.float32))
    steps = marginal.make_steps(optimiser)
    inputs = marginal.MarginalInputs(problem, settings)
    slopes, (value, share), _ = steps.slopes(jnp.asarray(proj), state, inputs)
    # As `update` does it, with one user's worth of the base.
    share = (share + base) / (problem.num_users + 1)
    return (slopes, value, share), atoms, log_weights


@pytest.mark.parametrize("sizes", [(9, 40), (30, 60), (3, 300)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"label": True},
        {"sample_weight": True},
        {"label": True, "sample_weight": True},
    ],
)
def test_slopes_are_those_of_the_posterior_over_atoms(
    make_preferences, fields, scale, sizes
):
    prefs = make_preferences(*sizes, **fields)
    proj = scale * np.random.default_rng(3).normal(size=(30, RANK)).astype(np.float32)
    got, *arguments = slopes_of(proj, prefs)
    slopes, value, share = expected(proj, prefs, *arguments)
    bar = 1e-4 * np.abs(slopes).max() * scale**0.5
    np.testing.assert_allclose(got[0], slopes, rtol=1e-4, atol=bar)
    np.testing.assert_allclose(got[1], value, rtol=1e-5)
    np.testing.assert_allclose(got[2], share, rtol=1e-4, atol=1e-6 * scale)


def test_differences_are_added_to_one_row():
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 1, 12, 3)]
    prefs = lore.Preferences.from_ragged(x)
    proj = rng.normal(size=(21, RANK)).astype(np.float32)
    got, *arguments = slopes_of(proj, prefs)
    for a, b in zip(got, expected(proj, prefs, *arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cells", [1, 400, 1 << 20])
def test_the_size_of_chunks_changes_no_number(make_preferences, monkeypatch, cells):
    """One user alone, `_LANES` of them, and all at once."""
    prefs = make_preferences(40, 400)
    proj = np.random.default_rng(3).normal(size=(30, RANK)).astype(np.float32)
    want = slopes_of(proj, prefs)[0]
    sizes = _backend.tuning()._replace(bucket_cells=cells)
    monkeypatch.setattr(pack, "tuning", lambda *_: sizes)
    for a, b in zip(slopes_of(proj, prefs)[0], want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"label": True, "sample_weight": True}])
@pytest.mark.parametrize("by_rows", [True, False])
def test_rows_and_columns_add_up_alike(make_preferences, monkeypatch, by_rows, fields):
    """What K and the backend choose between."""
    prefs = make_preferences(9, 80, **fields)
    proj = np.random.default_rng(3).normal(size=(30, RANK)).astype(np.float32)
    monkeypatch.setattr(marginal, "_by_rows", lambda rank: by_rows)
    got, *arguments = slopes_of(proj, prefs)
    for a, b in zip(got, expected(proj, prefs, *arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        ([], []),
        ([0, 0], []),
        ([7], [7]),
        ([0, 3, 3], [3]),
        ([40] * 90 + [12], [40]),
        ([40] * 90 + [12] * 90, [20, 40]),
        ([3] * 1000 + [3000] * 20, [3, 3000]),
        ([2] * 50 + [7] * 50 + [200], [3, 10, 200]),
    ],
)
def test_a_bucket_is_one_that_pays(capacity, lengths):
    assert pack.bucket_lengths(np.array(capacity, int)) == lengths


def test_every_pair_is_laid_out_once(make_preferences):
    prefs = make_preferences(50, 600)
    pairs = pack.pack(prefs)
    made, counts, _ = pack.make_buckets(pairs, 10, jnp.float32, pairs.counts)
    rows = []
    for bucket, count in zip(made, counts, strict=True):
        real = np.asarray(bucket.weight) > 0
        assert not real[int(count) :].any()
        rows += [np.stack([bucket.chosen, bucket.rejected], -1)[real]]
    got = np.concatenate(rows)
    want = np.stack([prefs.chosen, prefs.rejected], -1)
    order = [np.lexsort(x.T) for x in (got, want)]
    np.testing.assert_array_equal(got[order[0]], want[order[1]])
