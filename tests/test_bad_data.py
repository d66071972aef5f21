"""What preferences, splits, sources and files refuse: argument, expectation, place."""

import jax.numpy as jnp
import numpy as np
import pytest
from refusals import (
    KEY,
    PREFS,
    SOURCE,
    WEIGHTS,
    X,
    pairs,
    params,
    planted,
    refuses,
    split_votes,
    votes,
    with_entry,
)

import lore_jax as lore

CASES = {
    # Preferences.from_pairs
    "nan_row": (
        lambda: pairs(features=with_entry(3, 1, np.nan)),
        ValueError,
        r"features must be finite; row 3, column 1 is nan",
    ),
    "inf_row_on_device": (
        lambda: pairs(features=jnp.asarray(with_entry(4, 2, -np.inf))),
        ValueError,
        r"features must be finite; row 4, column 2 is -inf",
    ),
    "nan_row_bfloat16": (
        lambda: pairs(features=with_entry(2, 0, np.nan, jnp.bfloat16)),
        ValueError,
        r"features must be finite; row 2, column 0",
    ),
    "flat_features": (
        lambda: pairs(features=X[0]),
        ValueError,
        r"features must be float\[M, D\], got shape \(4,\)",
    ),
    "no_column": (
        lambda: pairs(features=np.empty((5, 0), np.float32)),
        ValueError,
        "features must have at least one column",
    ),
    "integer_features": (
        lambda: pairs(features=X.astype(int)),
        TypeError,
        "features must be floating point, got dtype int64",
    ),
    "complex_features": (
        lambda: pairs(features=X.astype(complex)),
        TypeError,
        "features must be floating point, got dtype complex128",
    ),
    "chosen_out_of_range": (
        lambda: pairs(chosen=[0, 5]),
        ValueError,
        r"chosen must be in 0 … 4 \(features has M=5 rows\); chosen\[1\] is 5",
    ),
    "chosen_negative": (
        lambda: pairs(chosen=[-1, 1]),
        ValueError,
        r"chosen must be in 0 … 4 .*; chosen\[0\] is -1",
    ),
    "rejected_out_of_range": (
        lambda: pairs(rejected=[2, 9]),
        ValueError,
        r"rejected must be in 0 … 4 .*; rejected\[1\] is 9",
    ),
    "chosen_floats": (
        lambda: pairs(chosen=[0.0, 1.0]),
        TypeError,
        r"chosen must hold integers or strings, got chosen\[0\] = 0\.0",
    ),
    "chosen_matrix": (
        lambda: pairs(chosen=[[0], [1]]),
        ValueError,
        r"chosen must be int\[N\] or str\[N\], got shape \(2, 1\)",
    ),
    "rejected_length": (
        lambda: pairs(rejected=[2]),
        ValueError,
        r"rejected must have one entry per pair, shape \(2,\), got \(1,\)",
    ),
    "chosen_is_rejected": (
        lambda: pairs(rejected=[2, 1]),
        ValueError,
        "chosen and rejected must differ; pair 1 compares row 1 with itself",
    ),
    "user_out_of_range": (
        lambda: pairs(user=[0, 7], num_users=3),
        ValueError,
        r"user must be in 0 … 2 \(num_users is 3\); user\[1\] is 7",
    ),
    "user_negative": (
        lambda: pairs(user=[0, -1]),
        ValueError,
        r"user must be in 0 … 0 .*; user\[1\] is -1",
    ),
    "user_length": (
        lambda: pairs(user=[0, 1, 1]),
        ValueError,
        r"user must have one entry per pair, shape \(2,\), got \(3,\)",
    ),
    "user_floats": (
        lambda: pairs(user=[0.0, 1.0]),
        TypeError,
        r"user must hold integers or strings, got user\[0\] = 0\.0",
    ),
    "num_users_zero": (
        lambda: pairs(num_users=0),
        ValueError,
        "num_users must be at least 1, got 0",
    ),
    "num_users_float": (
        lambda: pairs(num_users=2.0),
        TypeError,
        r"num_users must be an integer, got 2\.0",
    ),
    "unknown_name": (
        lambda: pairs(user=["amy", "bob"], user_ids=["amy", "zoe"]),
        ValueError,
        r"user\[1\] is 'bob', which is not in user_ids",
    ),
    "repeated_name": (
        lambda: pairs(user_ids=["amy", "amy"]),
        ValueError,
        "user_ids must be distinct; .*amy.* repeats",
    ),
    "too_few_names": (
        lambda: pairs(user=["amy", "bob"], user_ids=["amy", "bob"], num_users=3),
        ValueError,
        "user_ids must name every user: 2 names for num_users=3",
    ),
    "item_names_without_ids": (
        lambda: pairs(chosen=["a", "b"]),
        TypeError,
        "chosen holds names, so item_ids must name the rows",
    ),
    "unknown_item": (
        lambda: pairs(chosen=["a", "x"], item_ids=list("abcde")),
        ValueError,
        r"chosen\[1\] is 'x', which is not in item_ids",
    ),
    "item_ids_length": (
        lambda: pairs(item_ids=["a"]),
        ValueError,
        "item_ids must name every row of features: 1 names for M=5 rows",
    ),
    "label_above_one": (
        lambda: pairs(label=[0.5, 1.5]),
        ValueError,
        r"label must be finite and in \[0, 1\]; label\[1\] is 1\.5",
    ),
    "label_nan": (
        lambda: pairs(label=[np.nan, 1.0]),
        ValueError,
        r"label must be finite and in \[0, 1\]; label\[0\] is nan",
    ),
    "label_length": (
        lambda: pairs(label=[1.0]),
        ValueError,
        "label must have one entry per pair",
    ),
    "sample_weight_negative": (
        lambda: pairs(sample_weight=[1.0, -0.5]),
        ValueError,
        r"sample_weight must be finite and in \[0, inf\]; sample_weight\[1\] is -0\.5",
    ),
    "sample_weight_infinite": (
        lambda: pairs(sample_weight=[np.inf, 1.0]),
        ValueError,
        r"sample_weight must be finite .*; sample_weight\[0\] is inf",
    ),
    "sample_weight_words": (
        lambda: pairs(sample_weight=["a", "b"]),
        TypeError,
        "sample_weight must hold numbers",
    ),
    "group_floats": (
        lambda: pairs(group=[0.5, 1.5]),
        TypeError,
        r"group must hold integers or strings, got group\[0\] = 0\.5",
    ),
    "group_length": (
        lambda: pairs(group=[0]),
        ValueError,
        "group must have one entry per pair",
    ),
    # Preferences.from_ragged
    "ragged_nobody": (
        lambda: lore.Preferences.from_ragged([]),
        ValueError,
        "differences must hold at least one user, got none",
    ),
    "ragged_width": (
        lambda: lore.Preferences.from_ragged([X, X[:, :3]]),
        ValueError,
        r"differences\[1\] must be float\[n, D\] with D=4 .*got shape \(5, 3\)",
    ),
    "ragged_nan": (
        lambda: lore.Preferences.from_ragged([X, with_entry(2, 3, np.nan)]),
        ValueError,
        r"differences\[1\] must be finite; row 2, column 3 is nan",
    ),
    "ragged_integers": (
        lambda: lore.Preferences.from_ragged([X.astype(int)]),
        TypeError,
        r"differences\[0\] must be floating point",
    ),
    "ragged_names": (
        lambda: lore.Preferences.from_ragged([X, X], user_ids=["a"]),
        ValueError,
        "user_ids must name every user: 1 names for num_users=2",
    ),
    # data and populations
    "hold_out_share": (
        lambda: lore.data.hold_out(PREFS, share=1.5),
        ValueError,
        r"share must be finite and in \[0, 1\]; .*1\.5",
    ),
    "split_users_all": (
        lambda: lore.data.split_users(4, share=1.0),
        ValueError,
        r"share=1\.0 of 4 users leaves no seen user",
    ),
    "shots_negative": (
        lambda: lore.take_shots(PREFS, -1),
        ValueError,
        "shots must be at least 0, got -1",
    ),
    "take_users_range": (
        lambda: lore.take_users(PREFS, [0, 2]),
        ValueError,
        r"users must be in 0 … 1 \(num_users is 2\); users\[1\] is 2",
    ),
    "take_users_twice": (
        lambda: lore.take_users(PREFS, [1, 1]),
        ValueError,
        "users must be distinct",
    ),
    "take_pairs_mask": (
        lambda: lore.take_pairs(PREFS, np.ones(4, bool)),
        ValueError,
        r"keep must have one entry per pair, shape \(3,\), got \(4,\)",
    ),
    "take_pairs_range": (
        lambda: lore.take_pairs(PREFS, [3]),
        ValueError,
        r"keep must be in 0 … 2 \(N is 3\); keep\[0\] is 3",
    ),
    "votes_limit": (
        lambda: votes(limit=0),
        ValueError,
        "limit must be at least 1, got 0",
    ),
    "votes_length": (
        lambda: votes(vote=[1]),
        ValueError,
        "vote must have one entry per",
    ),
    "split_votes_voter": (
        lambda: split_votes(user=np.repeat([0, 5], 5)),
        ValueError,
        r"user must be in 0 … 1",
    ),
    "split_votes_negative_voter": (
        lambda: split_votes(user=np.repeat([0, -1], 5)),
        ValueError,
        r"user must be in 0 … 1",
    ),
    "split_votes_item": (
        lambda: split_votes(item=np.tile([0, 1, 2, 3, 9], 2)),
        ValueError,
        r"must be in 0 … 4 \(features has M=5 rows\)",
    ),
    "store_as_dtype": (
        lambda: lore.data.store_as(PREFS, np.int8),
        TypeError,
        "dtype must be floating point",
    ),
    "store_as_source": (
        lambda: lore.data.store_as(PREFS.replace(features=SOURCE), np.float16),
        TypeError,
        "features is a FeatureSource",
    ),
    "source_shape": (
        lambda: lore.ArraySource(X[0]),
        ValueError,
        r"array must be float\[M, D\], got \(4,\)",
    ),
    "source_block": (
        lambda: lore.ArraySource(X, block_rows=0),
        ValueError,
        "block_rows must be at least 1, got 0",
    ),
    "dirichlet_alpha": (
        lambda: lore.data.dirichlet_users(KEY, 3, 0.0, 2),
        ValueError,
        r"alpha must be positive and finite, got 0\.0",
    ),
    "choices_one_response": (
        lambda: lore.data.simulate_choices(np.ones((3, 1, 2)), WEIGHTS),
        ValueError,
        r"rewards must be float\[Q, R, J\] with R of at least 2",
    ),
    "choices_models": (
        lambda: lore.data.simulate_choices(np.ones((3, 4, 5)), WEIGHTS),
        ValueError,
        r"weights must be float\[U, J\] with J=5, got shape \(2, 2\)",
    ),
    "choices_prompts": (
        lambda: lore.data.simulated_preferences(
            X, np.ones((2, 2, 2)), WEIGHTS, prompts=[[0, 2], [0, 1]]
        ),
        ValueError,
        r"prompts must be in 0 … 1 \(rewards has Q=2 prompts\); prompts\[1\] is 2",
    ),
    "planted_features": (
        lambda: planted(num_features=1),
        ValueError,
        "num_features must be at least rank=2, got 1",
    ),
    "planted_noise": (
        lambda: planted(label_noise=1.5),
        ValueError,
        r"label_noise .*1\.5",
    ),
    # files
    "save_params": (
        lambda: lore.save("never-written", params()),
        TypeError,
        "fitted must be what fit returned, got .*RewardParams",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_with_the_reason(call, error, message):
    refuses(call, error, message)
