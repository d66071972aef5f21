"""What fits, priors of given bases and recipes refuse."""

import jax
import numpy as np
import pytest
from refusals import BASIS, LOGITS, fit, fit_prior, pairs, params, refuses

import lore_jax as lore

CASES = {
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
    "fit_key": (
        lambda: fit(key=0),
        TypeError,
        r"key must be a JAX key like jax\.random\.key\(0\), got 0",
    ),
    "fit_keys": (
        lambda: fit(key=jax.random.split(jax.random.key(0))),
        ValueError,
        r"key must be one key, got an array of shape \(2,\)",
    ),
    "fit_prior_key": (lambda: fit_prior(key=None), TypeError, "key must be a JAX key"),
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
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_it_is_refused_with_the_reason(call, error, message):
    refuses(call, error, message)
