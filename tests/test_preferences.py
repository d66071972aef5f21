"""`Preferences`: builders, names, storage order and the caller's order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore


def pairs(**changes):
    arguments = {
        "features": np.arange(12, dtype=np.float32).reshape(4, 3) ** 2,
        "chosen": [3, 0, 1, 2, 0],
        "rejected": [0, 1, 2, 3, 2],
        "user": [2, 0, 2, 0, 2],
        **changes,
    }
    if "user" not in changes:  # User 1 has no pair.
        arguments.setdefault("num_users", 3)
    return lore.Preferences.from_pairs(**arguments)


def test_pairs_are_stored_stably_sorted_by_user():
    prefs = pairs(label=[0.1, 0.2, 0.3, 0.4, 0.5], sample_weight=[1, 2, 3, 4, 5])
    np.testing.assert_array_equal(prefs.user, [0, 0, 2, 2, 2])
    np.testing.assert_array_equal(prefs.order, [1, 3, 0, 2, 4])
    np.testing.assert_array_equal(prefs.chosen, [0, 2, 3, 1, 0])
    np.testing.assert_array_equal(prefs.rejected, [1, 3, 0, 2, 2])
    np.testing.assert_allclose(prefs.label, [0.2, 0.4, 0.1, 0.3, 0.5])
    np.testing.assert_array_equal(prefs.sample_weight, [2, 4, 1, 3, 5])
    np.testing.assert_array_equal(prefs.offsets, [0, 2, 2, 5])
    np.testing.assert_array_equal(prefs.counts, [2, 0, 3])
    assert (prefs.num_users, prefs.num_pairs, prefs.num_features) == (3, 5, 3)


def test_group_is_sorted_with_the_pairs_and_may_hold_names():
    prefs = pairs(group=["b", "a", "b", "c", "a"])
    np.testing.assert_array_equal(prefs.group, [0, 2, 1, 1, 0])


def test_integer_fields_are_int32_whatever_came():
    prefs = pairs(chosen=np.array([3, 0, 1, 2, 0], np.uint8))
    for name in ("chosen", "rejected", "user", "offsets", "order"):
        assert getattr(prefs, name).dtype == np.int32, name


def test_users_without_a_pair_are_legal():
    prefs = pairs(num_users=7)
    np.testing.assert_array_equal(prefs.counts, [2, 0, 3, 0, 0, 0, 0])


def test_no_pair_at_all_is_legal():
    prefs = pairs(chosen=[], rejected=[], user=[], num_users=2)
    assert prefs.num_pairs == 0
    np.testing.assert_array_equal(prefs.counts, [0, 0])


def test_names_are_looked_up_and_kept():
    prefs = pairs(
        chosen=["d", "a", "b", "c", "a"],
        rejected=["a", "b", "c", "d", "c"],
        user=["zoe", "amy", "zoe", "amy", "zoe"],
        item_ids=["a", "b", "c", "d"],
    )
    numbered = pairs(user=[1, 0, 1, 0, 1])
    np.testing.assert_array_equal(prefs.chosen, numbered.chosen)
    np.testing.assert_array_equal(prefs.rejected, numbered.rejected)
    np.testing.assert_array_equal(prefs.user, numbered.user)
    assert prefs.ids.users.tolist() == ["amy", "zoe"]
    assert prefs.ids.items.tolist() == ["a", "b", "c", "d"]


def test_user_ids_fix_the_numbering():
    names = ["zoe", "nobody", "amy"]
    prefs = pairs(user=["zoe", "amy", "zoe", "amy", "zoe"], user_ids=names)
    np.testing.assert_array_equal(prefs.user, [0, 0, 0, 2, 2])
    assert prefs.ids.users.tolist() == names
    assert prefs.num_users == 3


def test_names_travel_through_adapt():
    prefs = pairs(user=["zoe", "amy", "zoe", "amy", "zoe"])
    adapted = lore.adapt(lore.RewardModel(np.eye(3, 2)), prefs)
    assert adapted.user_ids.tolist() == ["amy", "zoe"]


def test_without_names_there_are_no_ids():
    assert pairs().ids is None
    assert lore.adapt(lore.RewardModel(np.eye(3, 2)), pairs()).user_ids is None


def test_from_ragged_is_from_pairs_on_differences():
    parts = [np.ones((2, 3)), np.empty((0, 3)), 2 * np.ones((1, 3))]
    prefs = lore.Preferences.from_ragged(parts)
    np.testing.assert_array_equal(prefs.user, [0, 0, 2])
    np.testing.assert_array_equal(prefs.chosen, [0, 1, 2])
    np.testing.assert_array_equal(prefs.counts, [2, 0, 1])
    np.testing.assert_array_equal(prefs.features[:, 0], [1, 1, 2])
    assert prefs.rejected is None


def test_from_ragged_keeps_the_given_order_of_names():
    parts = [np.ones((1, 3)), np.ones((2, 3))]
    prefs = lore.Preferences.from_ragged(parts, user_ids=["z", "a"])
    np.testing.assert_array_equal(prefs.counts, [1, 2])
    assert prefs.ids.users.tolist() == ["z", "a"]


def test_margins_come_back_in_the_callers_order():
    prefs = pairs()
    basis = np.eye(3, 2, dtype=np.float32)
    weights = np.array([[1, 0], [0.5, 0.5], [0, 1]], np.float32)
    x, user = np.asarray(prefs.features), [2, 0, 2, 0, 2]
    first, second = [3, 0, 1, 2, 0], [0, 1, 2, 3, 2]
    want = [(x[i] - x[j])[:2] @ weights[u] for i, j, u in zip(first, second, user)]
    got = lore.margins(lore.RewardModel(basis), weights, prefs)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_storage_dtype_is_kept(dtype):
    assert pairs(features=np.ones((4, 3), dtype)).features.dtype == dtype


def test_float64_becomes_what_jax_would_make_of_it():
    table = np.ones((4, 3))
    assert pairs(features=table).features.dtype == np.float32
    with jax.enable_x64(True):
        assert pairs(features=table).features.dtype == np.float64


def test_features_stay_where_they_are():
    assert isinstance(pairs(features=np.ones((4, 3), np.float32)).features, np.ndarray)
    assert isinstance(pairs(features=jnp.ones((4, 3))).features, jax.Array)


def test_features_are_not_copied():
    table = np.ones((4, 3), np.float32)
    assert np.shares_memory(pairs(features=table).features, table)


def test_preferences_cross_jit_as_a_pytree():
    prefs = pairs(sample_weight=[1, 2, 3, 4, 5])
    total = jax.jit(lambda p: p.sample_weight.sum() + p.num_users)(prefs)
    assert float(total) == 18.0


def test_an_array_source_is_a_feature_source_and_an_array_is_not():
    table = np.ones((4, 3), np.float32)
    assert isinstance(lore.ArraySource(table), lore.FeatureSource)
    assert not isinstance(table, lore.FeatureSource)


def test_named_users_without_any_pair_are_legal():
    prefs = pairs(
        chosen=[], rejected=[], user=np.array([], np.str_), user_ids=["a", "b"]
    )
    np.testing.assert_array_equal(prefs.counts, [0, 0])
    empty = np.empty((0, 3), np.float32)
    prefs = lore.Preferences.from_ragged([empty, empty], user_ids=["a", "b"])
    assert prefs.ids.users.tolist() == ["a", "b"]


def test_reward_params_give_weights_on_the_simplex():
    params = lore.RewardParams(np.zeros((2, 2)), np.log([[1.0, 3.0], [2.0, 2.0]]))
    np.testing.assert_allclose(params.weights, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)


def test_the_mean_of_a_prior_is_its_atoms_mean():
    prior = lore.Prior(
        atoms=jnp.array([[1.0, 0.0], [0.5, 0.5]]),
        log_weights=jnp.log(jnp.array([0.2, 0.8])),
        concentration=jnp.array(1.0),
        tempering=jnp.array(0.0),
    )
    np.testing.assert_allclose(prior.mean, [0.6, 0.4], rtol=1e-6)
