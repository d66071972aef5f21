"""Results that stay on an accelerator are those that a CPU assembles on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _backend
from lore_jax._pairs import rows
from lore_jax._pairs.pack import pack

METHODS = [
    lore.PosteriorMean(),
    lore.MaximumLikelihood(),
    lore.MAP(0.3),
    lore.PublishedAdam(num_steps=20),
]


@pytest.fixture
def stay(monkeypatch):
    """What an accelerator does, on this CPU."""

    def begin():
        kinds = dict(keeps_results=True, reduces_on_device=True, gather_pairs=50)
        sizes = _backend.CPU._replace(**kinds)
        monkeypatch.setattr(_backend, "CPU", sizes)

    return begin


@pytest.fixture
def two_sets(make_preferences):
    """Uneven users, one without pairs, in another order each; the table is shared."""
    old = make_preferences(70, 900, num_rows=90)
    new = make_preferences(70, 700, num_rows=90, seed=1)
    table = jnp.asarray(old.features)
    return old.replace(features=table), new.replace(features=table)


def assert_alike(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("method", METHODS, ids=lambda x: type(x).__name__)
def test_adapting(two_sets, small_basis, small_prior, stay, method):
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    std = isinstance(method, lore.PosteriorMean)
    want = lore.adapt(model, two_sets[0], method=method, return_std=std)
    stay()
    got = lore.adapt(model, two_sets[0], method=method, return_std=std)
    assert_alike(got, want, rtol=1e-6, atol=1e-6)


def test_users_whom_the_fast_solver_leaves(small_basis, stay):
    """Collinear pairs with large margins: both second tries, steps added up."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(400, 6)).astype(np.float32)
    table *= 10.0 ** rng.uniform(0, 6, (40, 1)).repeat(10, 0).astype(np.float32)
    chosen, user = np.arange(400), np.repeat(np.arange(40), 10)
    prefs = lore.Preferences.from_pairs(jnp.asarray(table), chosen, None, user)
    model, method = lore.RewardModel(small_basis), lore.MaximumLikelihood()
    want = lore.adapt(model, prefs, method=method)
    stay()
    got = lore.adapt(model, prefs, method=method)
    assert_alike(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("covariance", [False, True])
def test_the_posterior(two_sets, small_basis, small_prior, stay, covariance):
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    want = lore.posterior(model, two_sets[0], covariance=covariance)
    stay()
    got = lore.posterior(model, two_sets[0], covariance=covariance)
    assert_alike(got, want, rtol=1e-5, atol=1e-6)


def test_predictions_and_scores_in_the_callers_order(
    two_sets, small_basis, small_prior, stay
):
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    old, new = two_sets
    shuffled = np.random.default_rng(2).permutation(new.num_pairs)
    columns = [np.asarray(x)[shuffled] for x in (new.chosen, new.rejected, new.user)]
    mixed = lore.Preferences.from_pairs(new.features, *columns, new.num_users)

    def all_of():
        yield lore.predict_proba(model, old, new)
        yield lore.predict_proba(model, old, mixed)
        for method in ("margin", "information"):
            yield lore.score_pairs(model, old, mixed, method=method)

    want = list(all_of())
    stay()
    assert_alike(list(all_of()), want, rtol=1e-5, atol=1e-6)
    none = lore.take_shots(new, 0)
    assert lore.predict_proba(model, old, none).shape == (0,)


def test_users_matched_by_name(two_sets, small_basis, small_prior, stay):
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    old, new = two_sets
    names = np.array([f"u{i}" for i in range(70)])
    rng = np.random.default_rng(3)
    some = np.isin(new.user, rng.choice(70, 20, replace=False))
    columns = [np.asarray(x)[some] for x in (new.chosen, new.rejected)]
    old = lore.Preferences.from_pairs(
        old.features, old.chosen, old.rejected, names[old.user]
    )
    new = lore.Preferences.from_pairs(
        new.features, *columns, names[::-1][new.user[some]]
    )
    want = lore.predict_proba(model, old, new)
    stay()
    assert_alike(lore.predict_proba(model, old, new), want, rtol=1e-5, atol=1e-6)


def test_nothing_of_pairs_or_results_is_copied(
    two_sets, small_basis, small_prior, stay, monkeypatch
):
    """What comes back is one number of the table and which users are not solved."""
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    stay()
    lore.predict_proba(model, *two_sets)
    original, seen = np.asarray, []

    def spy(array, *args, **kwargs):
        if isinstance(array, jax.Array):
            seen.append(array.shape)
        return original(array, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", spy)
    monkeypatch.setattr(jax, "device_get", None)
    lore.adapt(model, two_sets[0], return_std=True)
    assert seen == [(70,)]
    lore.predict_proba(model, *two_sets)
    assert seen == [(70,)] * 2


def test_a_table_on_several_devices_takes_the_host(two_sets, stay):
    stay()
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    place = jax.NamedSharding(mesh, jax.P("rows"))
    proj = jax.device_put(jnp.zeros((8, 2)), place)
    assert not rows.stays_on_device(proj)
    assert rows.stays_on_device(jnp.zeros((8, 2)))
    assert not rows.stays_on_device(np.zeros((8, 2)))


def test_rows_are_padded_where_they_are(two_sets):
    values = np.arange(140, dtype=np.float32).reshape(70, 2)
    for chunk in pack(two_sets[0]).chunks():
        want = rows.padded_rows(values, chunk, 7)
        got = rows.padded_rows(jnp.asarray(values), chunk, 7)
        np.testing.assert_array_equal(got, want)
        assert (want[len(chunk.users) :] == 7).all()
