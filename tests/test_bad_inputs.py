"""Every refusal of the public surface: type, argument, expectation and place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore

KEY = jax.random.key(0)
X = np.arange(20, dtype=np.float32).reshape(5, 4) ** 2
BASIS = np.eye(4, 2, dtype=np.float32)
WEIGHTS = np.full((2, 2), 0.5, np.float32)
LOGITS = np.array([[1.0, -3.0], [0.0, 2.0]], np.float32)
PREFS = lore.Preferences.from_pairs(X, [0, 1, 2], [1, 2, 3], [0, 1, 1])
PRIOR = lore.Prior(
    atoms=jnp.eye(2),
    log_weights=jnp.log(jnp.array([0.5, 0.5])),
    concentration=jnp.asarray(1.0),
    tempering=jnp.asarray(0.0),
)
MODEL = lore.RewardModel(BASIS)
ML = lore.MaximumLikelihood()
SOURCE = lore.ArraySource(X)


def pairs(**changes):
    arguments = dict(features=X, chosen=[0, 1], rejected=[2, 3], user=[0, 1])
    return lore.Preferences.from_pairs(**{**arguments, **changes})


def with_entry(row, column, value, dtype=np.float32):
    table = X.astype(dtype)
    table[row, column] = value
    return table


def fit(**changes):
    return lore.fit(**{**dict(prefs=PREFS, rank=2, key=KEY), **changes})


def params(features=4, users=2, rank=2):
    return lore.RewardParams(np.zeros((features, rank)), np.zeros((users, rank)))


def fit_prior(**changes):
    arguments = dict(basis=BASIS, prefs=PREFS, key=KEY)
    return lore.fit_prior(**{**arguments, **changes})


def adapt(basis=BASIS, prior=None, temperature=1.0, **settings):
    return lore.adapt(lore.RewardModel(basis, prior, temperature), PREFS, **settings)


def update(**changes):
    state = lore.streaming.init(MODEL, num_users=2)
    return lore.streaming.update(MODEL.replace(**changes), state, PREFS)


def planted(**changes):
    sizes = dict(num_users=2, pairs_per_user=2, num_features=3, rank=2)
    return lore.data.planted(KEY, **{**sizes, **changes})


def votes(**changes):
    arguments = dict(user=[0, 0], item=[0, 1], vote=[1, -1], limit=1)
    return lore.data.pairs_from_votes(**{**arguments, **changes})


def split_votes(**changes):
    arguments = dict(features=X, num_users=2, user_ids=["a", "b"], unseen=0.5)
    arguments.update(user=np.repeat([0, 1], 5), item=np.tile(np.arange(5), 2))
    arguments.update(vote=np.tile([1, -1], 5), **changes)
    return lore.data.split_votes(**arguments)


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
    # rewards
    "init_params_rank": (
        lambda: lore.init_params(KEY, num_users=2, num_features=3, rank=0),
        ValueError,
        "rank must be at least 1, got 0",
    ),
    "reward_features": (
        lambda: lore.reward(X[0, :3], BASIS, LOGITS),
        ValueError,
        r"basis must have one row per feature: features have D=3",
    ),
    "reward_rank": (
        lambda: lore.reward(X[0], BASIS, LOGITS[:, :1]),
        ValueError,
        r"logits must end in K=2 like basis\[4, 2\], got shape \(2, 1\)",
    ),
    "reward_flat_basis": (
        lambda: lore.reward(X[0], BASIS[:, 0], LOGITS),
        ValueError,
        r"basis must be float\[D, K\], got shape \(4,\)",
    ),
    "reward_temperature": (
        lambda: lore.reward(X[0], BASIS, LOGITS, temperature=0.0),
        ValueError,
        r"temperature must be positive and finite, got 0\.0",
    ),
    "reward_logits_as_weights": (
        lambda: lore.reward_from_weights(X[0], BASIS, LOGITS),
        ValueError,
        r"weights must lie on the simplex.*row \[0\] is .*Pass softmax\(logits\)",
    ),
    "score_logits": (
        lambda: lore.score(MODEL, LOGITS, X),
        ValueError,
        "weights must lie on the simplex",
    ),
    "score_logits_on_device": (
        lambda: lore.score(MODEL, jnp.asarray(LOGITS), X),
        ValueError,
        "weights must lie on the simplex",
    ),
    "score_nan_weights": (
        lambda: lore.score(MODEL, np.full((2, 2), np.nan), X),
        ValueError,
        r"weights must lie on the simplex.*row \[0\] is \[nan nan\]",
    ),
    "score_rank": (
        lambda: lore.score(MODEL, np.ones((2, 1), np.float32), X),
        ValueError,
        r"weights must be float\[U, K\] with U=2, K=2, got shape \(2, 1\)",
    ),
    "score_features": (
        lambda: lore.score(MODEL, WEIGHTS, X[:, :2]),
        ValueError,
        r"features have D=2, model\.basis has shape",
    ),
    "score_rows_row": (
        lambda: lore.score_rows(MODEL, WEIGHTS, X, [0, 1], [4, 5]),
        ValueError,
        r"rows must be in 0 … 4 .*; rows\[1\] is 5",
    ),
    "score_rows_user": (
        lambda: lore.score_rows(MODEL, WEIGHTS, X, [0, 2], [4, 4]),
        ValueError,
        r"user must be in 0 … 1 \(U is 2\); user\[1\] is 2",
    ),
    "score_rows_shape": (
        lambda: lore.score_rows(MODEL, WEIGHTS, X, [0, 1], [4]),
        ValueError,
        r"rows must be int\[Q\] or int\[Q, C\] with Q=2 like user",
    ),
    "top_k_too_many": (
        lambda: lore.top_k(MODEL, WEIGHTS, X, user=[0], k=6),
        ValueError,
        "k must be in 1 … 5 candidates, got 6",
    ),
    "top_k_user": (
        lambda: lore.top_k(MODEL, WEIGHTS, X, user=[3], k=1),
        ValueError,
        r"user must be in 0 … 1 .*; user\[0\] is 3",
    ),
    "margins_users": (
        lambda: lore.margins(MODEL, WEIGHTS[:1], PREFS),
        ValueError,
        r"weights must be float\[U, K\] with U=2, K=2, got shape \(1, 2\)",
    ),
    # losses
    "loss_users": (
        lambda: lore.bradley_terry_loss(params(users=3), PREFS),
        ValueError,
        r"logits must be float\[U, K\] with U=2, K=2, got shape \(3, 2\)",
    ),
    "loss_features": (
        lambda: lore.bradley_terry_loss(params(features=5), PREFS),
        ValueError,
        "basis must have one row per feature: features have D=4",
    ),
    "loss_weighting": (
        lambda: lore.bradley_terry_loss(params(), PREFS, weighting="users_mean"),
        ValueError,
        "weighting must be 'pairs' or 'users', got 'users_mean'",
    ),
    "loss_temperature": (
        lambda: lore.bradley_terry_loss(params(), PREFS, -1.0),
        ValueError,
        r"temperature must be positive and finite, got -1\.0",
    ),
    "anchor_matrix": (
        lambda: lore.losses.cosine_anchor(BASIS, BASIS[:, :1]),
        ValueError,
        r"anchor must be float\[D\] with D=4, got shape \(4, 1\)",
    ),
    # fit
    "fit_rank_float": (
        lambda: fit(rank=2.0),
        TypeError,
        r"rank must be an integer or 'auto', got 2\.0",
    ),
    "fit_rank_negative": (
        lambda: fit(rank=-1),
        ValueError,
        "rank must be at least 0, got -1",
    ),
    "fit_recipe": (
        lambda: fit(recipe=lore.PosteriorMean()),
        TypeError,
        r"recipe must be one of Marginal, .*, got PosteriorMean\(\)",
    ),
    "fit_rank_zero": (lambda: fit(rank=0), ValueError, "anchor is required at rank 0"),
    "fit_alpha_without_anchor": (
        lambda: fit(recipe=lore.PublishedJoint(num_steps=1, alpha=0.1)),
        ValueError,
        r"anchor is required .*recipe\.alpha > 0",
    ),
    "fit_anchor_shape": (
        lambda: fit(rank=0, anchor=np.ones((4, 1))),
        ValueError,
        r"anchor must be float\[D\] with D=4, got shape \(4, 1\)",
    ),
    "fit_anchor_unused": (
        lambda: fit(anchor=np.ones(4)),
        ValueError,
        "anchor is used at rank 0 and by a published recipe with alpha > 0 only",
    ),
    "fit_anchor_nan": (
        lambda: fit(rank=0, anchor=np.array([1, 2, np.nan, 3])),
        ValueError,
        "anchor must be finite",
    ),
    "fit_init_type": (
        lambda: fit(init=(BASIS, LOGITS)),
        TypeError,
        "init must be RewardParams, got .*tuple",
    ),
    "fit_init_rank": (
        lambda: fit(init=params(rank=3)),
        ValueError,
        r"init\.basis must have K=2 columns like rank, got shape \(4, 3\)",
    ),
    "fit_init_features": (
        lambda: fit(init=params(features=3)),
        ValueError,
        r"features have D=4, init\.basis has shape",
    ),
    "fit_init_users": (
        lambda: fit(init=params(users=5)),
        ValueError,
        r"init\.logits must be float\[U, K\] with U=2, K=2, got shape \(5, 2\)",
    ),
    "fit_nothing": (
        lambda: fit(prefs=pairs(chosen=[], rejected=[], user=[], num_users=2)),
        ValueError,
        "prefs holds no pair to learn from",
    ),
    "fit_rank_word": (
        lambda: fit(rank="best"),
        TypeError,
        "rank must be an integer or 'auto', got 'best'",
    ),
    "fit_auto_init": (
        lambda: fit(rank="auto", init=params()),
        ValueError,
        "rank='auto' and init exclude one another",
    ),
    "fit_auto_published": (
        lambda: fit(rank="auto", recipe=lore.PublishedJoint(num_steps=1)),
        ValueError,
        "rank='auto' and recipe=PublishedJoint exclude one another",
    ),
    "fit_every": (
        lambda: fit(every=0, on_progress=print),
        ValueError,
        "every must be at least 1, got 0",
    ),
    "fit_every_fraction": (
        lambda: fit(every=0.5, on_progress=print),
        TypeError,
        "every must be an integer, got 0.5",
    ),
    "fit_every_alone": (
        lambda: fit(every=3),
        ValueError,
        "every is the number of steps between calls of on_progress",
    ),
    "fit_resume_type": (
        lambda: fit(resume="progress.safetensors"),
        TypeError,
        "resume must be Progress",
    ),
    # fit_prior
    "fit_prior_features": (
        lambda: fit_prior(basis=np.eye(3, 2)),
        ValueError,
        "features have D=4, basis has shape",
    ),
    "fit_prior_not_finite": (
        lambda: fit_prior(basis=np.full((4, 2), np.nan)),
        ValueError,
        r"basis must be finite; basis\[0, 0\] is not",
    ),
    "fit_prior_temperature": (
        lambda: fit_prior(temperature=0.0),
        ValueError,
        r"temperature must be positive and finite, got 0\.0",
    ),
    "fit_prior_search": (
        lambda: fit_prior(search=lore.Search()),
        TypeError,
        r"search must be a PriorSearch, got Search\(",
    ),
    "fit_prior_nothing": (
        lambda: fit_prior(prefs=pairs(chosen=[], rejected=[], user=[], num_users=2)),
        ValueError,
        "prefs holds no pair to learn from",
    ),
    # adapt
    "adapt_features": (
        lambda: adapt(basis=np.eye(3, 2)),
        ValueError,
        r"features have D=4, model\.basis has shape \(3, 2\)",
    ),
    "adapt_model": (
        lambda: lore.adapt(BASIS, PREFS),
        TypeError,
        r"model must be a RewardModel, got .*ndarray.*: pass RewardModel\(basis\)",
    ),
    "adapt_method": (
        lambda: adapt(method=lore.Marginal()),
        TypeError,
        r"method must be one of PosteriorMean, .*, got Marginal\(",
    ),
    "adapt_prior_type": (
        lambda: adapt(prior=np.ones(2)),
        TypeError,
        "prior must be a Prior, got .*ndarray",
    ),
    "adapt_prior_rank": (
        lambda: adapt(prior=PRIOR.replace(atoms=jnp.eye(3))),
        ValueError,
        r"prior\.atoms must be float\[A, K\] with K=2, got \(3, 3\)",
    ),
    "adapt_prior_weights": (
        lambda: adapt(prior=PRIOR.replace(log_weights=jnp.zeros(5))),
        ValueError,
        r"prior\.log_weights must be float\[A\] with A=2, got shape \(5,\)",
    ),
    "adapt_prior_atoms": (
        lambda: adapt(prior=PRIOR.replace(atoms=jnp.asarray(LOGITS))),
        ValueError,
        r"prior\.atoms must lie on the simplex",
    ),
    "adapt_prior_tempering": (
        lambda: adapt(prior=PRIOR.replace(tempering=jnp.asarray(-0.5))),
        ValueError,
        r"prior\.tempering must be at least 0, got -0\.5",
    ),
    "recipe_num_starts": (
        lambda: lore.Marginal(num_starts=0),
        ValueError,
        "num_starts must be",
    ),
    "search_decays": (
        lambda: lore.Marginal(search=lore.Search(decays=(float("nan"),))),
        ValueError,
        "decays",
    ),
    "adapt_prior_decay": (
        lambda: adapt(prior=PRIOR.replace(decay=jnp.asarray(jnp.nan))),
        ValueError,
        r"prior\.decay must be finite, got nan",
    ),
    "adapt_prior_concentration": (
        lambda: adapt(prior=PRIOR.replace(concentration=jnp.asarray(-2.0))),
        ValueError,
        r"prior\.concentration must be at least 0, got -2",
    ),
    "adapt_temperature": (
        lambda: adapt(temperature=0.0),
        ValueError,
        r"model\.temperature must be positive and finite, got 0\.0",
    ),
    "update_temperature": (
        lambda: update(temperature=3.0),
        ValueError,
        "temperatures disagree: those of state and of model are 1 and 3",
    ),
    "adapt_init_and_key": (
        lambda: lore.PublishedAdam(init=LOGITS, key=KEY),
        ValueError,
        "init and key exclude one another",
    ),
    "adapt_std_elsewhere": (
        lambda: adapt(method=ML, return_std=True),
        ValueError,
        "return_std is .*, which MaximumLikelihood does not have",
    ),
    "adapt_init_shape": (
        lambda: adapt(method=lore.PublishedAdam(init=LOGITS[:1])),
        ValueError,
        r"method\.init must be float\[U, K\] with U=2, K=2, got shape \(1, 2\)",
    ),
    "adapt_alpha_length": (
        lambda: adapt(method=lore.MAP((1.0, 1.0, 1.0))),
        ValueError,
        r"method\.alpha must be one number or K=2 of them, got 3",
    ),
    "adapt_basis_nan": (
        lambda: adapt(basis=np.full((4, 2), np.nan, np.float32)),
        ValueError,
        r"model\.basis must be finite",
    ),
    # recipes and methods
    "recipe_start": (
        lambda: lore.Marginal(start="magic"),
        ValueError,
        "start must be one of .*, got 'magic'",
    ),
    "search_holdout": (
        lambda: lore.Search(holdout="magic"),
        ValueError,
        "holdout must be one of .*, got 'magic'",
    ),
    "recipe_search": (
        lambda: lore.Marginal(search=lore.PriorSearch()),
        TypeError,
        "search must be a Search, got PriorSearch",
    ),
    "recipe_prior": (
        lambda: lore.PublishedJoint(prior=lore.Search()),
        TypeError,
        "prior must be a PriorSearch, got a Search",
    ),
    "recipe_steps": (
        lambda: lore.PublishedJoint(num_steps=-1),
        ValueError,
        "num_steps must be at least 0, got -1",
    ),
    "recipe_steps_float": (
        lambda: lore.PublishedAlternating(num_steps=1000.0),
        TypeError,
        r"num_steps must be an integer, got 1000\.0",
    ),
    "recipe_rate": (
        lambda: lore.PublishedJoint(learning_rate=0.0),
        ValueError,
        r"learning_rate must be above 0 and finite, got 0\.0",
    ),
    "recipe_rate_nan": (
        lambda: lore.Marginal(learning_rate=float("nan")),
        ValueError,
        "learning_rate must be above 0 and finite, got nan",
    ),
    "recipe_temperature": (
        lambda: lore.Marginal(temperature=-1.0),
        ValueError,
        r"temperature must be above 0 and finite, got -1\.0",
    ),
    "recipe_alpha": (
        lambda: lore.PublishedJoint(alpha=-0.1),
        ValueError,
        r"alpha must be at least 0 and finite, got -0\.1",
    ),
    "recipe_prune": (
        lambda: lore.Marginal(prune=True),
        TypeError,
        "unexpected keyword argument 'prune'",
    ),
    "recipe_unknown": (
        lambda: lore.Marginal(learning_rte=0.1),
        TypeError,
        "unexpected keyword argument 'learning_rte'",
    ),
    "method_alpha_missing": (
        lambda: lore.MAP(),
        TypeError,
        "missing 1 required positional argument: 'alpha'",
    ),
    "method_alpha_elsewhere": (
        lambda: lore.PosteriorMean(alpha=1.0),
        TypeError,
        "unexpected keyword argument 'alpha'",
    ),
    "method_alpha_zero": (
        lambda: lore.MAP(0.0),
        ValueError,
        r"alpha must be above 0 and finite, got 0\.0",
    ),
    "method_alpha_place": (
        lambda: lore.MAP((1.0, -2.0)),
        ValueError,
        r"alpha\[1\] is out of range: -2\.0",
    ),
    "method_temperature": (
        lambda: lore.MaximumLikelihood(temperature=1.0),
        TypeError,
        "unexpected keyword argument 'temperature'",
    ),
    # evaluation
    "accuracy_logits": (
        lambda: lore.accuracy(MODEL, LOGITS, PREFS),
        ValueError,
        r"weights must lie on the simplex .*; row \[0\]",
    ),
    "accuracy_logits_in_lists": (
        lambda: lore.accuracy(MODEL, LOGITS.tolist(), PREFS),
        ValueError,
        "weights must lie on the simplex",
    ),
    "accuracy_users": (
        lambda: lore.accuracy(MODEL, np.full((3, 2), 0.5), PREFS),
        ValueError,
        r"weights must be float\[U, K\] with U=2, K=2, got shape \(3, 2\)",
    ),
    "log_loss_temperature": (
        lambda: lore.log_loss(MODEL.replace(temperature=float("inf")), WEIGHTS, PREFS),
        ValueError,
        r"model\.temperature must be positive and finite, got inf",
    ),
    "interval_level": (
        lambda: lore.evaluation.bootstrap_interval([0.5], level=1.0),
        ValueError,
        r"level must be in \(0, 1\), got 1\.0",
    ),
    "interval_of_nobody": (
        lambda: lore.evaluation.bootstrap_interval(np.array([np.nan])),
        ValueError,
        "values must hold at least one number in every split",
    ),
    "difference_of_other_users": (
        lambda: lore.evaluation.paired_difference(np.zeros(3), np.zeros(4)),
        ValueError,
        r"first and second must hold the same users, got shapes \(3,\) and \(4,\)",
    ),
    "calibration_range": (
        lambda: lore.evaluation.calibration([0.5, 1.1]),
        ValueError,
        r"probability must be float\[N\] in \[0, 1\]",
    ),
    "calibration_label": (
        lambda: lore.evaluation.calibration([0.5, 1.0], [1.0]),
        ValueError,
        "label must have one entry per pair",
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
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
