"""What the tests of numbers share."""

import jax
import numpy as np

import lore_jax as lore
from lore_jax._solve import simplex

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
BASIS = np.eye(4, 2, dtype=np.float32)
WEIGHTS = np.full((2, 2), 0.5, np.float32)
LOGITS = np.zeros((2, 2), np.float32)
PREFS = lore.Preferences.from_pairs(X, [0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 1, 1])
PRIOR = lore.Prior(
    atoms=np.float32([[1, 0], [0, 1], [0.5, 0.5]]),
    log_weights=np.log(np.float32([0.25, 0.25, 0.5])),
    concentration=np.float32(2),
    tempering=np.float32(0),
)
MODEL = lore.RewardModel(BASIS, PRIOR)
STATE = lore.streaming.init(MODEL, num_users=2)
Z = np.ones((2, 3, 2), np.float32)
ONES = np.ones((2, 3), np.float32)


def spoiled(array, value):
    """A copy whose entry [1, 0] (or the last one of a vector) is `value`."""
    array = np.array(array)
    array[(1, 0) if array.ndim > 1 else -1] = value
    return array


def loss(basis, logits, prefs, temperature=1.0):
    params = lore.RewardParams(basis, logits)
    return lore.bradley_terry_loss(params, prefs, temperature)


def fit(prefs, init_basis=BASIS, init_logits=LOGITS, anchor=X[0]):
    recipe = lore.PublishedJoint(num_steps=1, alpha=0.1, prior=None)
    init = lore.RewardParams(init_basis, init_logits)
    return lore.fit(prefs, rank=2, key=KEY, recipe=recipe, init=init, anchor=anchor)


def adapt_published(basis, prefs, init):
    method = lore.PublishedAdam(num_steps=1, init=init)
    return lore.adapt(lore.RewardModel(basis), prefs, method=method)


def of_model(function, **settings):
    """A function of a model as one of its basis and prior."""

    def call(basis, prior=None, **arguments):
        model = lore.RewardModel(basis, prior)
        return function(model=model, **arguments, **settings)

    return call


# Every public function of numbers: what it is called with, by name.
CALLS = {
    "project": (lore.project, dict(features=X, basis=BASIS)),
    "reward": (lore.reward, dict(x=X, basis=BASIS, logits=LOGITS[0])),
    "reward_from_weights": (
        lore.reward_from_weights,
        dict(x=X, basis=BASIS, weights=WEIGHTS[0]),
    ),
    **{
        function.__name__: (
            of_model(function),
            dict(basis=BASIS, weights=WEIGHTS, prefs=PREFS),
        )
        for function in (lore.margins, lore.accuracy, lore.log_loss)
    },
    **{
        function.__name__: (
            of_model(function, **settings),
            dict(basis=BASIS, weights=WEIGHTS, features=X),
        )
        for function, settings in (
            (lore.score, {}),
            (lore.score_rows, dict(user=[0], rows=[1])),
            (lore.top_k, dict(user=[0], k=1)),
            (lore.best_of_n, dict(user=[0], candidates=[[1, 2]])),
            (lore.jury, dict(candidates=[[1, 2]])),
        )
    },
    "bradley_terry_loss": (loss, dict(basis=BASIS, logits=LOGITS, prefs=PREFS)),
    "cosine_anchor": (lore.losses.cosine_anchor, dict(basis=BASIS, anchor=X[0])),
    "l2_anchor": (lore.losses.l2_anchor, dict(basis=BASIS, anchor=X[0])),
    "ridge": (lore.losses.ridge, dict(basis=BASIS)),
    "adapt": (of_model(lore.adapt), dict(basis=BASIS, prior=PRIOR, prefs=PREFS)),
    "adapt_published": (adapt_published, dict(basis=BASIS, prefs=PREFS, init=LOGITS)),
    "adapt_users": (
        lore.adapt_users,
        dict(z=Z, sample_weight=ONES, prior=PRIOR, label=ONES),
    ),
    "marginal_loss": (
        lore.losses.marginal_loss,
        dict(z=Z, sample_weight=ONES, prior=PRIOR, label=ONES),
    ),
    "maximum_likelihood": (
        simplex.maximum_likelihood,
        dict(z=Z, weight=ONES, label=ONES),
    ),
    "maximum_a_posteriori": (
        simplex.maximum_a_posteriori,
        dict(z=Z, weight=ONES, barrier=WEIGHTS, label=ONES, start=WEIGHTS),
    ),
    "posterior": (
        of_model(lore.posterior),
        dict(basis=BASIS, prior=PRIOR, prefs=PREFS),
    ),
    "compare": (of_model(lore.compare), dict(basis=BASIS, prior=PRIOR, prefs=PREFS)),
    "predict_proba": (
        of_model(lore.predict_proba),
        dict(basis=BASIS, prior=PRIOR, prefs=PREFS, new_pairs=PREFS),
    ),
    "score_pairs": (
        of_model(lore.score_pairs),
        dict(basis=BASIS, prior=PRIOR, prefs=PREFS, candidates=PREFS),
    ),
    "init": (
        of_model(lore.streaming.init, num_users=2),
        dict(basis=BASIS, prior=PRIOR),
    ),
    "update": (
        of_model(lore.streaming.update),
        dict(basis=BASIS, prior=PRIOR, state=STATE, prefs=PREFS),
    ),
    "merge": (lore.streaming.merge, dict(a=STATE, b=STATE)),
    "weights": (lore.streaming.weights, dict(state=STATE)),
    "fit": (
        fit,
        dict(prefs=PREFS, init_basis=BASIS, init_logits=LOGITS, anchor=X[0]),
    ),
    "fit_prior": (
        lambda **a: lore.fit_prior(**a, key=KEY),
        dict(basis=BASIS, prefs=PREFS),
    ),
    "simulate_choices": (
        lore.data.simulate_choices,
        dict(rewards=np.ones((3, 4, 2), np.float32), weights=WEIGHTS),
    ),
    "expected_information": (
        lore.acquisition.expected_information,
        dict(probability=WEIGHTS, margins=LOGITS),
    ),
}
