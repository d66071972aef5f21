"""Adaptation: programs built, large margins among small, sharding, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaptation_cases import FEATURES, ML, RANK, TEMPERATURE, random_basis, random_prior

import lore_jax as lore
from lore_jax._posterior.table import log_likelihoods, posterior_mean
from lore_jax._solve import simplex


def test_batches_of_any_size_share_a_few_programs(compilations):
    """At most 20 programs from 1 to 10,000 users, wherever the features live."""
    model = lore.RewardModel(random_basis(rank=4), random_prior(rank=4))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(700, FEATURES)).astype(np.float32)
    before = compilations.count
    first = None
    for users in (1, 2, 3, 7, 40, 199, 1000, 1777, 4096, 10_000):
        chosen = np.arange(users * 10) % 699
        for place in (np.asarray, jnp.asarray, lore.ArraySource):
            prefs = lore.Preferences.from_pairs(
                place(rows), chosen, chosen + 1, np.repeat(np.arange(users), 10)
            )
            out = jax.device_get(lore.adapt(model, prefs))
            assert out.converged.all()
            first = out.weights[0] if first is None else first
            np.testing.assert_allclose(out.weights[0], first, atol=1e-4)
    # The 10,000 users hold 699 kinds of pairs: their weights differ.
    assert len(np.unique(out.weights.round(4), axis=0)) > 60
    # Servers see a new NumPy table with every request.
    for users in (4, 13, 480, 1300, 9_000, 10_000):
        parts = rng.normal(size=(users, 10, FEATURES)).astype(np.float32)
        lore.adapt(model, lore.Preferences.from_ragged(parts))
    assert compilations.count - before <= 20


@pytest.mark.parametrize("method", [ML, lore.MAP(0.1)], ids=["ml", "map"])
def test_a_few_large_margins_are_solved_among_many_small(method, compilations):
    """By a program of their own, which other calls do not compile."""
    rank = 7  # of no other test, which would have compiled the program before
    model = lore.RewardModel(np.eye(rank, dtype=np.float32), temperature=TEMPERATURE)
    rng = np.random.default_rng(5)
    z = rng.standard_normal((70, 40, rank)).astype(np.float32)
    hard = [3, 64]
    easy = lore.Preferences.from_ragged([*np.delete(z, hard, axis=0)])
    z[hard] *= 1e4
    mixed = lore.Preferences.from_ragged([*z])
    few = lore.adapt(model, easy, method=method)
    before = compilations.count
    out = lore.adapt(model, mixed, method=method)
    assert compilations.count > before
    assert out.converged.all()
    assert (out.num_steps[hard] > 16).all()
    same = np.delete(np.arange(70), hard)
    np.testing.assert_array_equal(out.weights[same], few.weights)
    tiny = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(out.weights, tiny))
    np.testing.assert_array_equal(out.logits, logits)


def test_pure_kernels_shard_over_users(prior):
    """z, mask and prior → weights under shard_map on four devices equals one."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 4, RANK)).astype(np.float32)
    mask = (rng.random((8, 4)) < 0.7).astype(np.float32)

    def kernel(z, mask, prior):
        mean = posterior_mean(z, mask, None, prior)
        return simplex.maximum_a_posteriori(z, mask, prior.concentration * mean).weights

    mesh = jax.make_mesh((4,), ("users",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("users")
    sharded = jax.jit(
        jax.shard_map(kernel, mesh=mesh, in_specs=(spec, spec, jax.P()), out_specs=spec)
    )
    got = sharded(z, mask, prior)
    assert len(got.sharding.device_set) == 4
    np.testing.assert_allclose(got, jax.jit(kernel)(z, mask, prior), atol=1e-5)


def test_pure_kernels_are_differentiable_through_the_posterior(prior):
    """How the posterior mean answers to a margin, against a difference quotient."""
    z = np.random.default_rng(0).normal(size=(2, 3, RANK)).astype(np.float32)
    ones = np.ones((2, 3), np.float32)

    @jax.jit
    def first(z):
        return posterior_mean(z, ones, None, prior)[0, 0]

    got = jax.grad(first)(z)
    step = np.zeros_like(z)
    step[0, 1, 2] = 1e-2
    want = (first(z + step) - first(z - step)) / 2e-2
    np.testing.assert_allclose(got[0, 1, 2], want, rtol=2e-2, atol=1e-5)
    assert not np.any(got[1])


@pytest.mark.parametrize("kind", ["plain", "weighted", "labelled"])
def test_many_pairs_side_by_side_are_the_same_posterior(kind, prior):
    """401 pairs of one user become three users' worth of work, and one table."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 401, RANK)).astype(np.float32)
    weight, label = np.ones((3, 401), np.float32), None
    weight[0, 170:] = 0  # whole parts of padding
    if kind == "weighted":
        weight = weight * rng.random((3, 401), np.float32)
    if kind == "labelled":
        label = rng.random((3, 401), np.float32)
    atoms, unit = np.asarray(prior.atoms), kind != "weighted"
    got = log_likelihoods(z, weight, label, atoms, unit_weights=unit)
    m = np.float64(z) @ np.float64(atoms).T
    y = 1 if label is None else label[..., None]
    table = -(weight[..., None] * (np.logaddexp(0, m) - y * m)).sum(1)
    np.testing.assert_allclose(got, table, rtol=1e-5, atol=1e-3)
    joint = weight.sum(1, keepdims=True) ** -float(prior.tempering) * table
    share = np.exp(joint + np.asarray(prior.log_weights) - joint.max(1, keepdims=True))
    mean = posterior_mean(z, weight, label, prior, unit_weights=unit)
    want = share @ atoms / share.sum(1, keepdims=True)
    np.testing.assert_allclose(mean, want, atol=1e-4)
