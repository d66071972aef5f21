"""What the refusals of the public surface are tried on, and what they must be."""

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


def refuses(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
