"""A basis that already exists is kept; the users' weights and the prior are learned."""

import jax
import numpy as np
import pytest

import lore_jax as lore
from lore_jax._train import validation

KEY = jax.random.key(0)
SEARCH = lore.PriorSearch(concentrations=(3.0, 30.0), variance_scales=(0.1,))
U, K, P = 120, 3, 40


@pytest.fixture(scope="module")
def scored():
    """Scores of 3 reward models for 80 responses; two camps and a few in between."""
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(80, K)).astype(np.float32) * 6
    weights = rng.dirichlet([0.3, 0.3, 0.3], U) * [1, 1, 0.4]
    weights = weights / weights.sum(1, keepdims=True)
    user = np.repeat(np.arange(U), P)
    first = rng.integers(80, size=U * P)
    second = (first + rng.integers(1, 80, size=U * P)) % 80
    margin = ((scores[first] - scores[second]) * weights[user]).sum(1)
    flip = margin < rng.logistic(size=U * P)
    chosen, rejected = np.where(flip, (second, first), (first, second))
    prefs = lore.Preferences.from_pairs(scores, chosen, rejected, user)
    return prefs, weights


@pytest.fixture(scope="module")
def given(scored):
    return lore.fit_prior(np.eye(K), scored[0], key=KEY, search=SEARCH)


def test_the_basis_comes_back_as_it_was(given):
    np.testing.assert_array_equal(given.model.basis, np.eye(K))
    assert len(given.history.loss) == 0
    assert given.recipe == SEARCH


def test_weights_and_prior_are_recovered(scored, given):
    weights = scored[1]
    error = np.abs(np.asarray(given.weights) - weights).mean()
    assert error < 0.3 * np.abs(weights.mean(0) - weights).mean()
    np.testing.assert_allclose(given.model.prior.mean, weights.mean(0), atol=0.03)
    # The prior says how users differ, not only where they are on average.
    mass = np.exp(np.asarray(given.model.prior.log_weights, np.float64))
    centred = np.asarray(given.model.prior.atoms, np.float64) - weights.mean(0)
    np.testing.assert_allclose(mass @ centred**2, weights.var(0), rtol=0.25)


def test_settings_are_chosen_on_held_out_judgements(given):
    chosen = {}
    for row in given.history.selection:
        if row["chosen"]:
            chosen.update(row)
    np.testing.assert_allclose(
        given.model.prior.tempering, chosen["tempering"], rtol=1e-6
    )
    for name in ("concentration", "decay"):
        np.testing.assert_allclose(
            getattr(given.model.prior, name), chosen[name], rtol=1e-6
        )


def test_few_pairs_of_a_new_user_help(scored, given):
    prefs, weights = scored
    few = lore.take_shots(prefs, 5)
    new = lore.adapt(given.model, few)
    everyone = np.broadcast_to(given.model.prior.mean, weights.shape)
    error = [np.abs(np.asarray(w) - weights).mean() for w in (new.weights, everyone)]
    assert error[0] < 0.8 * error[1]


def test_a_given_basis_with_a_source_and_from_a_file(scored, given, tmp_path):
    prefs = scored[0]
    source = lore.ArraySource(np.asarray(prefs.features), 32)
    prefs = prefs.replace(features=source)
    got = lore.fit_prior(np.eye(K), prefs, key=KEY, search=SEARCH)
    np.testing.assert_allclose(got.weights, given.weights, atol=1e-5)
    lore.save(tmp_path / "given", given)
    again = lore.load(tmp_path / "given")
    np.testing.assert_array_equal(again.model.basis, given.model.basis)
    np.testing.assert_array_equal(again.weights, given.weights)


def test_the_share_of_the_search_is_held_out(scored, monkeypatch):
    seen = []
    original = validation.hold_out

    def spy(prefs, **settings):
        seen.append(original(prefs, **settings))
        return seen[-1]

    monkeypatch.setattr(validation, "hold_out", spy)
    lore.fit_prior(np.eye(K), scored[0], key=KEY, search=SEARCH)
    [held] = seen
    used = held.heldout.num_pairs + held.training.num_pairs
    share = SEARCH.validation_share
    assert share == 2 * lore.Search().validation_share == 0.3
    assert held.heldout.num_pairs / used == pytest.approx(share, abs=0.03)
