"""Situations from public reports of neighbouring projects, with their right values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore

X = np.eye(4, dtype=np.float32)
EYE = np.eye(2, dtype=np.float32)
PAIR = lore.Preferences.from_pairs(EYE, [0], [1], [0])
PRIOR = lore.Prior(
    atoms=EYE,
    log_weights=np.log(np.float32([0.5, 0.5])),
    concentration=np.float32(1),
    tempering=np.float32(0),
)
from_pairs = lore.Preferences.from_pairs


def test_the_deviation_without_pairs_is_the_priors():
    prior = lore.Prior(
        atoms=np.float32([[1, 0], [0, 1], [0.5, 0.5]]),
        log_weights=np.log(np.float32([0.25, 0.25, 0.5])),
        concentration=np.float32(0.3),
        tempering=np.float32(0),
    )
    silent = from_pairs(EYE, [], [], np.zeros(0, int), 1)
    std = lore.posterior(lore.RewardModel(EYE, prior), silent).std
    np.testing.assert_allclose(std, 0.125**0.5, rtol=1e-5)


def test_maximum_likelihood_at_large_margins_is_the_linear_program():
    """minimise Σ max(0, −z_n · p): p = (.5, .25, .25), mean loss a twelfth of 4e6."""
    z = np.array([[1, -2, 0], [-1, 1, 0], [0, 1, -1]], np.float32) * np.float32(4e6)
    model = lore.RewardModel(np.eye(3, dtype=np.float32))
    pairs = lore.Preferences.from_ragged([z])
    found = lore.adapt(model, pairs, method=lore.MaximumLikelihood())
    assert found.converged.all()
    assert found.loss[0] == pytest.approx(1e6 / 3, rel=1e-3)
    np.testing.assert_allclose(found.weights[0], [0.5, 0.25, 0.25], atol=2e-3)


@pytest.mark.parametrize(
    ("user", "place"),
    [(["ann", None, "bob"], 1), (["ann", "bob", float("nan")], 2), (["", "a", "b"], 0)],
)
def test_a_missing_user_is_refused_with_its_place(user, place):
    with pytest.raises(ValueError, match=rf"user\[{place}\] is missing"):
        from_pairs(X, [0, 1, 2], [1, 2, 3], user)


@pytest.mark.parametrize("user", [[7, 1_234_567_890_123], [7, 3_000_000]])
def test_large_ids_are_names(user):
    prefs = from_pairs(X, [0, 1], [1, 2], user)
    assert prefs.num_users == 2
    assert prefs.user_ids.tolist() == user


def test_a_column_of_integers_with_a_hole_is_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"user\[1\] is missing"):
        from_pairs(X, [0, 1], [1, 2], pandas.Series([7, None]))


def test_integer_item_ids_are_looked_up():
    prefs = from_pairs(X, [2], [0], ["u"], item_ids=[2, 0, 1, 3])
    assert prefs.item_ids[prefs.chosen].tolist() == [2]
    assert prefs.item_ids[prefs.rejected].tolist() == [0]
    assert prefs.chosen.tolist() == [0]


def test_a_changed_vote_is_refused_or_the_latest_counts():
    votes = [0, 0, 0], [3, 4, 3], [-1, 1, 1]
    with pytest.raises(ValueError, match="one vote of a user on an item"):
        lore.data.pairs_from_votes(*votes, limit=10)
    chosen, _, _ = lore.data.pairs_from_votes(*votes, limit=10, time=[1, 2, 3])
    assert chosen.size == 0  # Both items are agreed with now.


def test_overflow_in_a_smaller_dtype_is_refused_with_its_place():
    table = np.float32([[1e5, 0], [-1e5, 1], [0, 2]])
    with pytest.raises(ValueError, match=r"row 0, column 0 .*overflows float16"):
        lore.store_as(from_pairs(table, [0, 1], [1, 2], [0, 0]), np.float16)


def test_weights_that_are_all_zero_are_refused():
    rng = np.random.default_rng(0)
    prefs = from_pairs(
        rng.normal(size=(9, 3)).astype(np.float32),
        np.arange(8),
        np.arange(1, 9),
        np.repeat([0, 1], 4),
        sample_weight=np.zeros(8),
    )
    with pytest.raises(ValueError, match="sample_weight is 0 for every pair"):
        lore.fit(prefs, rank=2, key=jax.random.key(0))


def test_states_with_names_pass_through_jit():
    model = lore.RewardModel(EYE, PRIOR)
    total = jax.jit(lambda state: state.num_pairs.sum())
    for _ in range(2):
        assert total(lore.streaming.init(model, user_ids=["a", "b"])) == 0


def test_debug_flags_of_jax_change_nothing():
    model = lore.RewardModel(EYE)
    want = lore.adapt(model, PAIR).weights
    with jax.debug_nans(True):
        np.testing.assert_array_equal(lore.adapt(model, PAIR).weights, want)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(lore.adapt(model, PAIR).weights, want)


def test_adapt_under_jit_names_what_can():
    with pytest.raises(TypeError, match=r"adapt works on the host.*use adapt_users"):
        jax.jit(lambda v: lore.adapt(lore.RewardModel(v), PAIR).weights)(EYE)


def test_shapes_of_adapt_users_are_named():
    with pytest.raises(ValueError, match=r"z must be float\[U, P, K\], got shape"):
        lore.adapt_users(jnp.ones((3, 2)), jnp.ones(3), PRIOR)


def test_a_torch_table_of_bfloat16_is_accepted_or_named():
    torch = pytest.importorskip("torch")
    table = torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match="features must be an array that NumPy can read"
    ):
        from_pairs(table, [0], [1], [0])
