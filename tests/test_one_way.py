"""The way of the data: internal code calls no public verb, and projects once."""

import jax
import numpy as np
import pytest

import lore_jax as lore
from lore_jax import _equations
from lore_jax._pairs import blocks

VERBS = {
    "adaptation": ("adapt", "adapt_users"),
    "prediction": ("posterior", "predict_proba"),
    "evaluation": ("accuracy", "log_loss", "calibration", "four_way", "macro_mean"),
    "acquisition": ("score_pairs", "best_pairs", "expected_information"),
    "model": (
        *("reward", "reward_from_weights", "mixture_weights", "project", "margins"),
        *("score", "score_rows", "top_k"),
    ),
    "choosing": ("best_of_n", "jury"),
    "comparison": ("align", "compare"),
    "losses": (
        *("pair_loss", "pair_coefficients", "bradley_terry_loss", "cosine_anchor"),
        *("l2_anchor", "ridge", "marginal_loss"),
    ),
    "fitting": ("fit", "fit_prior"),
    "streaming": ("init", "update", "merge", "weights"),
}
SMALL = lore.Marginal(
    num_steps=4,
    num_starts=2,
    search=lore.Search(ridges=(0.1, 0.3), smoothings=(1.0,), temperings=(0.4,)),
)


def refuse(name):
    def call(*args, **kwargs):
        raise AssertionError(f"internal code called {name}")

    return call


@pytest.fixture
def without_verbs(monkeypatch):
    """Every module sees verbs that raise; returns the real ones by name."""
    import sys

    modules = [m for n, m in sys.modules.items() if n.split(".")[0] == "lore_jax"]
    real = {}
    for module, names in VERBS.items():
        for name in names:
            verb = getattr(sys.modules[f"lore_jax.{module}"], name)
            real[name] = verb
            for other in modules:
                if getattr(other, name, None) is verb:
                    monkeypatch.setattr(other, name, refuse(f"{module}.{name}"))
    return real


@pytest.mark.parametrize("recipe", [SMALL, lore.PublishedAlternating(num_steps=2)])
def test_internal_code_calls_no_public_verb(
    without_verbs, make_preferences, planted, recipe
):
    verb = without_verbs
    fitted = verb["fit"](planted.prefs, rank=2, key=jax.random.key(0), recipe=recipe)
    model, prefs = fitted.model, planted.prefs
    for method in (lore.MaximumLikelihood(), lore.MAP(1.0), lore.PublishedAdam()):
        verb["adapt"](model, prefs, method=method)
    found = verb["adapt"](model, prefs, return_std=True)
    verb["posterior"](model, prefs, covariance=True)
    verb["predict_proba"](model, prefs, prefs)
    verb["score_pairs"](model, prefs, prefs)
    verb["accuracy"](model, found, prefs)
    verb["log_loss"](model, found, prefs)
    state = verb["update"](model, verb["init"](model, num_users=24), prefs)
    verb["weights"](verb["merge"](state, state))
    verb["fit_prior"](model.basis, prefs, key=jax.random.key(0))
    users = np.zeros(1, int)
    verb["top_k"](model, found, prefs.features, user=users, k=2)
    verb["bradley_terry_loss"](fitted.params, prefs)


class Counter:
    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, features, *args):
        self.calls.append(np.shape(features))
        return self.function(features, *args)


@pytest.fixture
def projections(monkeypatch):
    """Counts reads of a table outside of the steps, which are inside one program."""
    counter = Counter(blocks._project)
    monkeypatch.setattr(blocks, "_project", counter)
    host = Counter(blocks._host_product)
    host.calls = counter.calls
    monkeypatch.setattr(blocks, "_host_product", host)
    return counter


def test_predictions_over_one_table_project_once(
    projections, make_preferences, small_basis, small_prior
):
    prefs = make_preferences()
    model = lore.RewardModel(small_basis, small_prior, 2.0)
    lore.predict_proba(
        model, prefs, make_preferences().replace(features=prefs.features)
    )
    assert len(projections.calls) == 1
    lore.predict_proba(model, prefs, make_preferences())  # Another table.
    assert len(projections.calls) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda model, prefs: lore.adapt(model, prefs, return_std=True),
        lambda model, prefs: lore.adapt(model, prefs, method=lore.MaximumLikelihood()),
        lambda model, prefs: lore.posterior(model, prefs, covariance=True),
        lambda model, prefs: lore.score_pairs(model, prefs, prefs),
        lambda model, prefs: lore.streaming.update(
            model, lore.streaming.init(model, num_users=5), prefs
        ),
        lambda model, prefs: lore.fit_prior(model.basis, prefs, key=jax.random.key(0)),
    ],
)
def test_each_verb_projects_once(
    projections, make_preferences, small_basis, small_prior, call
):
    call(lore.RewardModel(small_basis, small_prior, 2.0), make_preferences())
    assert len(projections.calls) == 1


def test_a_fit_projects_once_per_step_and_question(projections, planted, monkeypatch):
    """Steps are inside of programs; the rest asks the table once per question."""
    steps = Counter(_equations.product)
    monkeypatch.setattr(_equations, "product", steps)
    jax.clear_caches()  # So that every program is traced again.
    lore.fit(planted.prefs, rank=2, key=jax.random.key(3), recipe=SMALL)
    table = planted.prefs.features.shape
    outside = [shape for shape in projections.calls if shape == table]
    # 13 reads of each start by svd, 2 hold-outs and all pairs at ranks 1 or 2; then a
    # read per candidate, for the curve, the refinement and the weights of each start.
    assert len(outside) <= 32
    traced = [shape for shape in steps.calls if shape == table]
    assert len(traced) <= 8  # once per program, not once per step
