"""What rewards, losses, adaptation and evaluation refuse."""

import jax.numpy as jnp
import numpy as np
import pytest
from refusals import (
    BASIS,
    KEY,
    LOGITS,
    ML,
    MODEL,
    PREFS,
    PRIOR,
    WEIGHTS,
    X,
    adapt,
    params,
    refuses,
    update,
)

import lore_jax as lore

CASES = {
    # rewards
    "init_params_rank": (
        lambda: lore.init_params(KEY, num_users=2, num_features=3, rank=0),
        ValueError,
        "rank must be at least 1, got 0",
    ),
    "init_params_key": (
        lambda: lore.init_params(0, num_users=2, num_features=3, rank=1),
        TypeError,
        "key must be a JAX key",
    ),
    "planted_key": (
        lambda: lore.data.planted(
            1, num_users=2, pairs_per_user=1, num_features=3, rank=2
        ),
        TypeError,
        "key must be a JAX key",
    ),
    "adapt_key": (
        lambda: adapt(method=lore.PublishedAdam(key=3)),
        TypeError,
        r"method\.key must be a JAX key",
    ),
    "adapt_users_nobody": (
        lambda: lore.adapt_users(np.ones((0, 2, 2)), np.ones((0, 2)), PRIOR),
        ValueError,
        r"z must hold at least one user and one pair, got shape \(0, 2, 2\)",
    ),
    "marginal_loss_nothing": (
        lambda: lore.losses.marginal_loss(np.ones((2, 0, 2)), np.ones((2, 0)), PRIOR),
        ValueError,
        r"z must hold at least one user and one pair, got shape \(2, 0, 2\)",
    ),
    "model_basis_list": (
        lambda: lore.adapt(lore.RewardModel([[1.0, 0.0]]), PREFS),
        TypeError,
        r"model\.basis must be an array, got <class 'list'>",
    ),
    "top_k_ragged": (
        lambda: lore.top_k(MODEL, WEIGHTS, X[0], user=[0, 1], k=1, rows=[[1], [1, 2]]),
        TypeError,
        "rows must be an array",
    ),
    "best_pairs_fraction": (
        lambda: lore.best_pairs(np.zeros(PREFS.num_pairs), PREFS, num=1.5),
        TypeError,
        r"num must be an integer, got 1\.5",
    ),
    "jury_rule": (
        lambda: lore.jury(MODEL, WEIGHTS, X[:1], rule=["mean"]),
        ValueError,
        r"rule must be one of .*, got \['mean'\]",
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
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_with_the_reason(call, error, message):
    refuses(call, error, message)
