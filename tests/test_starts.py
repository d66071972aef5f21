"""The start from singular directions against a dense SVD, and who starts where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._train import coordinates, starts, trainer
from lore_jax._train.coordinates import Coordinates
from lore_jax._train.resume import Run
from lore_jax._train.validation import make_holdouts

KEY = jax.random.key(0)
SCALED = Coordinates(jnp.eye(8), jnp.full(8, 0.1))


def made_of(prefs, smoothing=1.0):
    spectrum = coordinates.measure(prefs)
    return coordinates.make_coordinates(spectrum, smoothing, jnp.float32, 8)


@pytest.fixture(scope="module")
def prefs():
    """Three strong directions on which 40 users differ, labels and weights."""
    rng = np.random.default_rng(4)
    features = rng.normal(size=(60, 8)) * [9, 5, 3, 1, 0.3, 0.3, 0.3, 0.3] + 2
    user = np.repeat(np.arange(40), 15)
    first = rng.integers(60, size=600)
    second = (first + rng.integers(1, 60, size=600)) % 60
    taste = rng.normal(size=(8, 40)) + np.array([2, 1, 0, 0, 0, 0, 0, 0])[:, None]
    z = ((features[first] - features[second]) * taste.T[user]).sum(1)
    chosen, rejected = np.where(z > 0, (first, second), (second, first))
    return lore.Preferences.from_pairs(
        features.astype(np.float32),
        chosen,
        rejected,
        user,
        41,
        label=rng.uniform(0.6, 1, 600),
        sample_weight=rng.uniform(0.5, 2, 600),
    )


def mean_differences(prefs):
    """[U, D] of the weighted, label-signed mean difference of each user."""
    x = np.asarray(prefs.features, np.float64)
    z = x[prefs.chosen] - x[prefs.rejected]
    out = np.zeros((prefs.num_users, x.shape[1]))
    for u in range(prefs.num_users):
        mine = prefs.user == u
        if mine.any():
            w = prefs.sample_weight[mine] / prefs.sample_weight[mine].sum()
            out[u] = w * (2 * prefs.label[mine] - 1) @ z[mine]
    return out


@pytest.mark.parametrize("kind", ["host", "device", "source"])
def test_directions_are_those_of_a_dense_svd(prefs, kind):
    start = jax.random.normal(KEY, (8, 3))
    means = mean_differences(prefs)
    table = np.asarray(prefs.features)
    made = {"host": np.asarray, "device": jnp.asarray}
    made["source"] = lambda table: lore.ArraySource(table, 25)
    prefs = prefs.replace(features=made[kind](table))
    got = starts.singular_directions(start, prefs, SCALED)
    want = np.linalg.svd(means)[2][:3].T
    np.testing.assert_allclose(got.T @ got, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(got * want, 0)), 1, atol=1e-3)
    # The first one points to what people choose.
    assert (means @ got[:, 0]).sum() > 0


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_columns_are_a_simplex_around_the_population(prefs, rank):
    made = made_of(prefs)
    theta = starts.make_start(KEY, "svd", prefs, made, rank)
    assert theta.shape == (8, rank)
    theta = np.asarray(theta, np.float64)
    apart = theta - theta.mean(1, keepdims=True)
    gram = apart.T @ apart / (0.3**2 * len(theta))
    off = -1 / (rank - 1) if rank > 1 else 0
    want = np.full((rank, rank), off) + (1 - off) * np.eye(rank)
    np.testing.assert_allclose(gram, want if rank > 1 else 0, atol=1e-4)
    np.testing.assert_allclose(apart.T @ theta.mean(1), 0, atol=1e-4)
    basis = np.asarray(coordinates.basis_of(jnp.asarray(theta, jnp.float32), made))
    assert (mean_differences(prefs) @ basis.mean(1)).sum() > 0


@pytest.mark.parametrize(("rank", "users"), [(9, range(41)), (3, (0, 1, 40))])
def test_without_room_for_a_simplex_the_start_is_random(prefs, rank, users):
    """The last user has no pair."""
    some = lore.take_users(prefs, np.array(users))
    kinds = (starts.make_start(KEY, k, some, SCALED, rank) for k in ("svd", "random"))
    np.testing.assert_array_equal(*kinds)


def test_the_recipe_says_which_start_and_the_others_are_random(prefs):
    keys = KEY, jax.random.key(1)
    theta = []
    for kind in ("random", "svd"):
        recipe = lore.Marginal(start=kind)
        train = trainer.CandidateTrainer(prefs, keys, recipe, None, Run())
        made = train.coordinates_of("all", prefs, 1.0)
        theta.append(train.start(prefs, made, 2, 0))
        want = starts.make_start(keys[1], kind, prefs, made, 2)
        np.testing.assert_array_equal(theta[-1], want)
        again = train.start(prefs, made, 2, 1)
        key = jax.random.fold_in(keys[1], 1)
        want = starts.make_start(key, "random", prefs, made, 2)
        np.testing.assert_array_equal(again, want)
    assert not np.allclose(*theta)


def test_what_is_held_out_has_no_part_in_the_start(prefs, monkeypatch):
    seen = []
    original = trainer.make_start

    def spy(key, kind, part, made, rank):
        seen.append((kind, rank, part.num_pairs))
        return original(key, kind, part, made, rank)

    monkeypatch.setattr(trainer, "make_start", spy)
    grids = dict(smoothings=(1.0,), ridges=(0.2,), temperings=(0.2, 0.3))
    search = lore.Search(**grids)
    recipe = lore.Marginal(num_steps=1, search=search)
    lore.fit(prefs, rank=2, key=KEY, recipe=recipe)
    key = jax.random.split(KEY, 3)[2]
    held = make_holdouts(prefs, key, search.validation_share, "both", 1.0)
    assert set(held) == {"judgements", "items"}
    sizes = [x.training.num_pairs for x in held.values()]
    # The global model and K = 2 on each; threads make them in any order.
    want = [("svd", rank, size) for rank in (1, 2) for size in sizes]
    assert sorted(seen[:4]) == sorted(want)
    want = [("random", 2, prefs.num_pairs), ("svd", 2, prefs.num_pairs)]
    assert sorted(seen[4:]) == want


def test_candidates_are_compared_at_the_first_pull(prefs):
    search = lore.Search(concentrations=(7.0, 1.0), decays=(-0.25, 0.0))
    recipe = lore.Marginal(search=search)
    train = trainer.CandidateTrainer(prefs, (KEY, KEY), recipe, None, Run())
    theta = train.start(prefs, train.coordinates_of("all", prefs, 1.0), 2, 0)
    candidate = trainer.Candidate(rank=2, smoothing=1.0, ridge=0.1, tempering=0.3)
    _, prior = train.result("all", prefs, theta, np.zeros(66, np.float32), candidate)
    got = prior.concentration, prior.decay, prior.tempering
    np.testing.assert_allclose(got, (7.0, -0.25, 0.3))
