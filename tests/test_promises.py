"""Promises of adaptation that a toy breaks, each on data with a known answer."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import planted_oracle as oracle
import pytest
from jax.test_util import check_grads

import lore_jax as lore
from lore_jax._pairs.pack import make_chunks
from lore_jax._train.refinement import choose_refinement
from lore_jax._train.validation import make_holdouts


def stacked(z):
    """Pairs of users from differences z [U, P, K]."""
    return lore.Preferences.from_ragged(list(z.astype(np.float32)))


def test_many_directions_and_pairs_keep_up_with_map():
    """K=20, 100 pairs: atoms alone lose points, the refinement brings them back.

    So does the additive state, which costs at most 0.7.
    """
    rng = np.random.default_rng(120)
    prior = oracle.drawn_prior(rng, 0.3, 20)
    truth, z, new = oracle.population(rng, 0.3, 20, 100, 200, new_pairs=150)
    model = lore.RewardModel(np.eye(20, dtype=np.float32), prior)
    atoms_only = prior.replace(concentration=np.float32(np.inf))
    prefs = stacked(z)
    state = lore.streaming.init(model, num_users=200)
    state = lore.streaming.update(model, state, prefs)
    weights = {
        "default": lore.adapt(model, prefs).weights,
        "map": lore.adapt(model, prefs, method=lore.MAP(0.3)).weights,
        "atoms": lore.adapt(model.replace(prior=atoms_only), prefs).weights,
        "state": lore.streaming.weights(state),
    }
    gains = {
        name: oracle.expected_accuracy(truth, p, new).mean()
        for name, p in weights.items()
    }
    assert gains["default"] > gains["map"] - 0.5
    assert gains["state"] > gains["default"] - 0.7
    assert gains["atoms"] < gains["default"] - 0.5
    assert np.abs(weights["default"] - weights["state"]).max() > 1e-4


def test_the_pull_is_learned_to_fade_where_atoms_are_far_apart():
    """With 50 pairs a user is known better than 9 atoms at rank 5 can say."""
    rng = np.random.default_rng(8)
    prior = oracle.drawn_prior(rng, 1.0, 5, num_atoms=9)
    _, z, _ = oracle.population(rng, 1.0, 5, 50, 150, new_pairs=0)
    held = make_holdouts(stacked(z), jax.random.key(0), 0.3, "judgements", 1.0)
    splits = list(held.values())
    results = [(split.project(np.eye(5)), prior) for split in splits]
    decays = (0.0, 0.5, -0.5)
    grids = lore.PriorSearch(
        concentrations=(10.0,),
        decays=decays,
        variance_scales=(0.0,),
        margin_scales=(1.0,),
    )
    chosen, rows = choose_refinement(splits, results, np.ones(1), grids)
    assert [row["decay"] for row in rows] == list(decays)
    assert chosen["decay"] == 0.5
    untold, rows = choose_refinement((), (), np.ones(0), grids)
    assert untold["decay"] == 0
    assert rows == []


def test_the_tempering_is_learned_from_how_much_pairs_repeat():
    """Pairs that are copies of each other are worth less, and validation finds out."""
    rng = np.random.default_rng(0)
    _, z, _ = oracle.population(rng, 1.0, 3, 24, 150, new_pairs=1)
    group = np.tile(np.arange(24), 150)
    copied = np.repeat(z[:, :4], 6, axis=1)
    search = lore.PriorSearch(
        num_atoms=30,
        temperings=(0.4, 0.0),
        concentrations=(3.0,),
        variance_scales=(0.0,),
    )

    def learned(z, group):
        prefs = stacked(z).replace(group=group.astype(np.int32))
        eye, key = np.eye(3, dtype=np.float32), jax.random.key(0)
        fitted = lore.fit_prior(eye, prefs, key=key, search=search)
        return float(fitted.model.prior.tempering)

    assert learned(z, group) == 0
    assert learned(copied, group // 6) == pytest.approx(0.4)


def test_the_basis_stays_frozen():
    """Neither in place, nor for one user because of another's pairs."""
    rng = np.random.default_rng(1)
    basis = rng.normal(size=(6, 3)).astype(np.float32)
    kept = basis.copy()
    basis.flags.writeable = False
    on_device = jnp.asarray(kept)
    prefs = stacked(rng.normal(size=(4, 5, 6)))
    for frozen in (basis, on_device):
        lore.adapt(lore.RewardModel(frozen), prefs)
        np.testing.assert_array_equal(frozen, kept)
    loud = np.array(prefs.features)
    loud[5:] *= 100
    again = lore.adapt(lore.RewardModel(basis), prefs.replace(features=loud))
    quiet = lore.adapt(lore.RewardModel(basis), prefs)
    np.testing.assert_allclose(again.weights[0], quiet.weights[0], atol=1e-6)


def test_logits_are_refused_where_weights_belong_and_come_back_as_logits():
    rng = np.random.default_rng(2)
    model = lore.RewardModel(rng.normal(size=(6, 3)).astype(np.float32))
    prefs = stacked(rng.normal(size=(4, 5, 6)))
    out = lore.adapt(model, prefs)
    assert np.abs(out.weights - out.logits).max() > 0.1
    np.testing.assert_allclose(lore.mixture_weights(out.logits), out.weights, atol=1e-6)
    with pytest.raises(ValueError, match="weights"):
        lore.accuracy(model, out.logits, prefs)


def test_a_million_users_stay_within_the_memory_bound():
    """Below 4 × the projected input: what the host holds, and one chunk's program."""
    users, pairs, rank = 10**6, 10, 5
    projected = users * pairs * rank * 4
    counts = np.full(users, pairs)
    first = np.arange(users) * pairs
    users_of_a_chunk, length = max(
        ((len(c.count), c.length) for c in make_chunks(counts, first)), key=np.prod
    )
    prior = oracle.drawn_prior(np.random.default_rng(0), 1.0, rank, num_atoms=69)
    shapes = (users_of_a_chunk, length, rank), (users_of_a_chunk, length)
    z, weight = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    kernel = jax.jit(lore.adapt_users, static_argnames="unit_weights")
    program = kernel.lower(z, weight, prior, unit_weights=True).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    assert 4 * analysis.temp_size_in_bytes < projected

    some = 16 * users_of_a_chunk
    rows = np.random.default_rng(0).normal(size=(some * pairs, rank))
    prefs = lore.Preferences.from_pairs(
        rows.astype(np.float32),
        np.arange(some * pairs),
        None,
        np.repeat(np.arange(some), pairs),
        some,
    )
    tracemalloc.start()
    lore.adapt(lore.RewardModel(np.eye(rank, dtype=np.float32), prior), prefs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = prefs.features.nbytes
    assert peak < 3 * held


def test_gradients_flow_to_the_basis_and_the_prior():
    """Through `adapt_users`, implicitly, against differences in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        x = rng.normal(size=(4, 7, 5))
        weight = np.ones((4, 7))
        weight[1, 4:] = 0
        weight[3] = 0  # A user without pairs answers to the prior alone.
        direction = rng.normal(size=(4, 3))
        basis = rng.normal(size=(5, 3))
        prior = lore.Prior(
            atoms=rng.dirichlet(np.ones(3), 6),
            log_weights=np.log(rng.dirichlet(np.ones(6))),
            concentration=np.float64(4),
            tempering=np.float64(0.3),
            variance_scale=np.float64(0.1),
            decay=np.float64(0.4),
        )

        def value(basis, prior):
            z = jnp.einsum("upd,dk->upk", x, basis)
            return jnp.sum(lore.adapt_users(z, weight, prior).weights * direction)

        jitted = jax.jit(value)
        check_grads(
            jitted, (basis, prior), order=1, modes=["rev"], atol=1e-5, rtol=1e-5
        )
        to_basis, to_prior = jax.vjp(jitted, basis, prior)[1](1.0)
        parts = "atoms", "log_weights", "concentration", "tempering", "decay"
        for name in parts:
            assert np.abs(getattr(to_prior, name)).max() > 1e-4, name
        assert np.abs(to_basis).max() > 1e-3


@pytest.mark.parametrize("put", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_results_are_where_the_inputs_are(
    make_preferences, small_basis, small_prior, put
):
    prefs = make_preferences()
    prefs = prefs.replace(features=put(prefs.features))
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    new = lore.adapt(model, prefs, return_std=True)
    user = [0, 1]
    results = {
        "adapt": new,
        "posterior": lore.posterior(model, prefs, covariance=True),
        "predict_proba": lore.predict_proba(model, prefs, prefs),
        "score_pairs": lore.score_pairs(model, prefs, prefs),
        "accuracy": lore.accuracy(model, new, prefs),
        "log_loss": lore.log_loss(model, new, prefs),
        "margins": lore.margins(model, new, prefs),
        "score": lore.score(model, new, prefs.features),
        "score_rows": lore.score_rows(model, new, prefs.features, user, [3, 4]),
        "top_k": lore.top_k(model, new, prefs.features, user=user, k=2),
    }
    kind = np.ndarray if put is np.asarray else jax.Array
    for name, found in results.items():
        for leaf in jax.tree.leaves(found):
            assert isinstance(leaf, kind), name
