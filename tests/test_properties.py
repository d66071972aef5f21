"""Adaptation of whatever is legal: random problems of every scale, type and size.

`PROPERTY_EXAMPLES` says how many of each, 6 by default; with more than 100, K is any
number up to 64 instead of a few, which share programs.
"""

import itertools
import os

import hypothesis
import jax
import jax.numpy as jnp
import large_margins_oracle as oracle
import numpy as np
import pytest
from hypothesis import strategies as st

import lore_jax as lore
from lore_jax._solve import simplex

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "6"))
RANKS = st.integers(1, 64) if EXAMPLES > 100 else st.sampled_from([1, 3, 64])
ALPHA = 0.4
METHODS = {
    "default": lore.PosteriorMean(),
    "ml": lore.MaximumLikelihood(),
    "map": lore.MAP(ALPHA),
    "published": lore.PublishedAdam(num_steps=5),
}
SOLVE = jax.jit(simplex.maximum_likelihood)
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True
)


DRAWN = itertools.count(1)


@st.composite
def problems(draw):
    """z [U, P, K] in float64, exact in `dtype`; counts, weights and labels."""
    if next(DRAWN) % 50 == 0:  # Thousands of programs would exhaust memory maps.
        jax.clear_caches()
    rank, users = draw(RANKS), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 6), min_size=users, max_size=users))
    dtype = draw(st.sampled_from([np.float32, np.float16, jnp.bfloat16, np.float64]))
    largest = 3 if dtype is np.float16 else 6
    scale = 10.0 ** draw(st.integers(-largest, largest))
    kind = draw(st.sampled_from(["gauss", "integer", "collinear", "zero"]))
    labels = draw(st.sampled_from(["none", "soft", "hard"]))
    weighted = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = rng.standard_normal((sum(counts), rank))
    if kind == "integer":
        z = np.round(z)
    if kind == "collinear":
        z = z[:, :1] * rng.standard_normal(rank)
    z = (scale * z * (kind != "zero")).astype(dtype)
    label = rng.random(len(z)).astype(np.float32)
    if labels == "hard":
        label = np.round(label)
    weight = rng.integers(0, 3, len(z)) * np.float32(0.75)
    return {
        "z": z,
        "user": np.repeat(np.arange(users), counts),
        "users": users,
        "label": None if labels == "none" else label,
        "weight": weight if weighted else None,
    }


def preferences(case, order=None, columns=None):
    order = np.arange(len(case["z"])) if order is None else order
    z = case["z"] if columns is None else case["z"][:, columns]
    take = lambda x: None if x is None else x[order]  # noqa: E731
    return lore.Preferences.from_pairs(
        z,
        order,
        None,
        case["user"][order],
        case["users"],
        label=take(case["label"]),
        sample_weight=take(case["weight"]),
    )


def padded(case):
    """(z, weight, label) float64[U, P, …] of the pairs as they are stored."""
    users, rank = case["users"], case["z"].shape[1]
    z, weight, label = np.zeros((users, 6, rank)), *np.ones((2, users, 6))
    weight[:] = 0
    for u in range(users):
        mine = np.flatnonzero(case["user"] == u)
        z[u, : len(mine)] = case["z"][mine].astype(np.float32)
        weight[u, : len(mine)] = 1 if case["weight"] is None else case["weight"][mine]
        if case["label"] is not None:
            label[u, : len(mine)] = case["label"][mine]
    return z, weight, label


def posterior_mean(z, weight, label, prior):
    """Of users under the atoms, without tempering: float64[U, K]."""
    atoms = np.asarray(prior.atoms, float)
    m = np.einsum("upk,ak->upa", z, atoms)
    loss = np.logaddexp(0, m) - label[..., None] * m
    score = -(weight[..., None] * loss).sum(1) + np.asarray(prior.log_weights, float)
    share = np.exp(score - score.max(1, keepdims=True))
    return share / share.sum(1, keepdims=True) @ atoms


def minimised(name, z, weight, label, prior):
    """(weight, barrier) of what the method minimises."""
    total = weight.sum(1, keepdims=True)
    if name == "map":
        return weight, np.full((len(z), z.shape[2]), ALPHA)
    if name == "default":
        mean = posterior_mean(z, weight, label, prior)
        return weight, float(prior.concentration) * mean
    return weight / np.maximum(total, 1e-300), np.zeros((len(z), z.shape[2]))


@pytest.mark.parametrize("name", METHODS)
@SETTINGS
@hypothesis.given(case=problems())
def test_what_adapt_says_is_true(name, case):
    """On the simplex, losses as computed in float64, and no silent acceptance."""
    rank = case["z"].shape[1]
    prior = lore.uniform_prior(rank, num_atoms=64)
    model = lore.RewardModel(np.eye(rank, dtype=np.float32), prior)
    out = lore.adapt(model, preferences(case), method=METHODS[name])
    z, weight, label = padded(case)
    some = weight.sum(1) > 0
    assert out.weights.shape == (case["users"], rank)
    assert out.weights.dtype == out.loss.dtype == np.float32
    assert (out.weights >= 0).all()
    np.testing.assert_allclose(out.weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.isnan(out.loss), ~some)
    assert (out.gap >= 0).all()
    assert np.isfinite(out.gap).all()
    assert out.converged[~some].all()
    none = np.zeros_like(out.weights, np.float64)
    share = weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
    loss = oracle.objective(z, share, label, none, out.weights)
    size = np.abs(z * (weight > 0)[..., None]).max((1, 2), initial=0)
    # A margin in float32 is off by eps R, which counts where nothing large is left.
    close = np.abs(out.loss - loss) <= 1e-3 * loss + 1e-6 * (1 + size)
    assert close[some].all()
    weight, barrier = minimised(name, z, weight, label, prior)
    if name == "default" and not np.isfinite(barrier).all():
        return
    found = oracle.objective(z, weight, label, barrier, out.weights)
    lower, upper = oracle.bounds(z, weight, label, barrier)
    pull, total = barrier.sum(1), weight.sum(1)
    allowed = np.where(
        size <= 84,
        1e-5 * (size * total + pull),
        1e-3 * (np.abs(upper) + pull) + 1e-6 * total,
    )
    slack = 1e-6 * np.abs(upper) + 1e-9 + np.maximum(upper - lower, 0)
    if name == "default":  # The mean of atoms is computed in float32.
        allowed = allowed + 1e-3 * np.abs(upper)
    assert (found <= upper + allowed + slack)[out.converged & some].all()
    if name == "published":
        assert (found - lower <= 1.01 * out.gap + 1e-5 * (1 + size) + slack)[some].all()


@pytest.mark.parametrize("name", ["default", "ml", "map"])
@SETTINGS
@hypothesis.given(case=problems(), seed=st.integers(0, 99))
@pytest.mark.slow
def test_orders_do_not_matter(name, case, seed):
    """Of pairs, of directions, and pairs of weight 0 beside the others."""
    rank = case["z"].shape[1]
    rng, method = np.random.default_rng(seed), METHODS[name]
    prior = lore.uniform_prior(rank, num_atoms=64)
    model = lore.RewardModel(np.eye(rank, dtype=np.float32), prior)
    out = lore.adapt(model, preferences(case), method=method)
    mixed = rng.permutation(len(case["z"]))
    other = lore.adapt(model, preferences(case, mixed), method=method)
    columns = rng.permutation(rank)
    moved_prior = prior.replace(atoms=prior.atoms[:, columns])
    moved = lore.adapt(
        model.replace(prior=moved_prior),
        preferences(case, None, columns),
        method=method,
    )
    z, weight, label = padded(case)
    weight, barrier = minimised(name, z, weight, label, prior)

    def value(weights):
        return oracle.objective(z, weight, label, barrier, weights)

    first = value(out.weights)
    size = np.abs(z * (weight > 0)[..., None]).max((1, 2), initial=0)
    allowed = (
        2e-3 * (np.abs(first) + barrier.sum(1))
        + 1e-6 * weight.sum(1)
        + np.where(size <= 84, 1e-5 * size * weight.sum(1), 0)
    )
    back = np.argsort(columns)
    for again, weights in ((other, other.weights), (moved, moved.weights[:, back])):
        both = out.converged & again.converged
        assert (np.abs(value(weights) - first) <= allowed + 1e-9)[both].all()


@SETTINGS
@hypothesis.given(
    case=problems(),
    place=st.integers(0, 10**6),
    fault=st.sampled_from(["z", "label", "weight"]),
    bad=st.sampled_from([np.nan, np.inf, -1.0]),
)
def test_what_is_illegal_is_refused(case, place, fault, bad):
    """A number that is not finite, a label or a weight below 0: a ValueError."""
    n = len(case["z"])
    hypothesis.assume(n)
    changed = dict(case)
    if fault == "z":
        hypothesis.assume(bad != -1)
        changed["z"] = np.array(case["z"])
        changed["z"].flat[place % changed["z"].size] = bad
    else:
        column = case[fault]
        changed[fault] = np.ones(n, np.float32) if column is None else column.copy()
        changed[fault][place % n] = bad
    rank = case["z"].shape[1]
    with pytest.raises(ValueError, match="features" if fault == "z" else fault):
        lore.adapt(
            lore.RewardModel(np.eye(rank, dtype=np.float32)), preferences(changed)
        )


@SETTINGS
@hypothesis.given(case=problems())
def test_a_pure_solver_never_accepts_in_silence(case):
    """Under jit, in float32: no user within the tolerance who is not."""
    z, weight, label = padded(case)
    weight, barrier = minimised("ml", z, weight, label, None)
    four = [np.zeros((4, *x.shape[1:]), np.float32) for x in (z, weight, label)]
    for whole, part in zip(four, (z, weight, label)):  # One program for all.
        whole[: len(part)] = part
    out = SOLVE(*four[:2], label=four[2])
    out = jax.tree.map(lambda x: np.asarray(x)[: len(z)], out)
    found = oracle.objective(z, weight, label, barrier, out.weights)
    _, upper = oracle.bounds(z, weight, label)
    size = np.abs(z * (weight > 0)[..., None]).max((1, 2), initial=0)
    allowed = np.where(size <= 84, 1e-5 * size, 1e-3 * upper + 2e-6)
    assert (found <= upper + allowed + 1e-6)[out.converged].all()
