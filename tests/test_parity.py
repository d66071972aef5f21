"""The published algorithms, against trajectories recorded from the PyTorch original.

`data/parity` holds float64 runs of facebookresearch/LoRe @ 6f93990 from fixed starts
(weights W, basis V). Everything here goes through the public API under x64. After 400
alternating steps at learning rate 0.5 Adam has amplified rounding, so those runs are
compared to what two float64 implementations can agree on.
"""

import pathlib

import jax
import numpy as np
import pytest

import lore_jax as lore

DATA = pathlib.Path(__file__).parent / "data" / "parity"
TIGHT = 1e-10
LOOSE = {
    ("medium", 0): 1e-2,
    ("medium", 10): 1e-4,
    ("small", 0): 1e-9,
    ("small", 10): 1e-4,
}
SIZES = ("small", "medium")
STEPS = (1, 5, 50, 400)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def recorded():
    return {
        size: dict(np.load(DATA / f"upstream_{size}.npz"))
        for size in (*SIZES, "pruned")
    }


def ragged(data):
    ends = np.cumsum(data["counts"])[:-1]
    return lore.Preferences.from_ragged(np.split(data["features"], ends))


def run(data, recipe, start="W0"):
    fitted = lore.fit(
        ragged(data),
        rank=data["V0"].shape[1],
        key=jax.random.key(0),
        recipe=recipe,
        init=lore.RewardParams(data["V0"], data[start]),
        anchor=data["v_ref"][:, 0] if recipe.alpha else None,
    )
    assert fitted.model.basis.dtype == np.float64
    return fitted


def close(got, want, tolerance):
    want = np.asarray(want)
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("alpha", [0, 10])
@pytest.mark.parametrize("size", SIZES)
def test_alternating(recorded, size, alpha, steps):
    data = recorded[size]
    settings = dict(num_steps=steps, alpha=float(alpha), prior=None)
    fitted = run(data, lore.PublishedAlternating(**settings))
    want = {
        name: data[f"alternating_alpha{alpha}_n{steps}_{name}"]
        for name in ("W_logits", "V", "final_nll", "final_cosine_reg")
    }
    tolerance = TIGHT if steps < 400 else LOOSE[size, alpha]
    close(fitted.model.basis, want["V"], tolerance)
    close(fitted.params.logits, want["W_logits"], tolerance)
    close(fitted.weights, softmax(want["W_logits"]), tolerance)
    nll = lore.bradley_terry_loss(fitted.params, ragged(data), 100.0, "pairs")
    close(nll, want["final_nll"], tolerance)
    cosine = lore.losses.cosine_anchor(fitted.model.basis, data["v_ref"][:, 0])
    close(cosine, want["final_cosine_reg"], tolerance)
    assert fitted.history.loss.shape == (steps,)
    assert fitted.model.temperature == 100.0


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("alpha", [0, 0.01])
@pytest.mark.parametrize("size", SIZES)
def test_joint(recorded, size, alpha, steps):
    data = recorded[size]
    settings = dict(num_steps=steps, alpha=float(alpha), prior=None)
    recipe = lore.PublishedJoint(learning_rate=0.1, **settings)
    fitted = run(data, recipe, start="joint_W0")
    want = {
        name: data[f"joint_alpha{alpha}_n{steps}_{name}"]
        for name in ("W", "W_logits", "V", "final_nll", "final_l2_reg")
    }
    close(fitted.model.basis, want["V"], TIGHT)
    close(fitted.params.logits, want["W_logits"], TIGHT)
    close(fitted.weights, want["W"], TIGHT)
    nll = lore.bradley_terry_loss(fitted.params, ragged(data), 100.0, "users")
    close(nll, want["final_nll"], TIGHT)
    distance = lore.losses.l2_anchor(fitted.model.basis, data["v_ref"][:, 0])
    close(alpha * distance, want["final_l2_reg"], TIGHT)


def test_pruning(recorded):
    data = recorded["pruned"]
    fitted = run(data, lore.PublishedAlternating(num_steps=60, prune=True))
    close(fitted.unpruned.logits, data["W_logits"], 1e-9)
    close(fitted.unpruned.basis, data["V"], 1e-9)
    assert fitted.model.basis.shape[1] == len(fitted.kept) == 4
    close(fitted.model.basis, data["kept_V"], 1e-9)
    # The published columns do not sum to 1; ours are renormalised.
    close(fitted.unpruned.weights[:, fitted.kept], data["kept_W"], 1e-9)
    sums = data["kept_W"].sum(1, keepdims=True)
    assert sums.max() < 1
    close(fitted.weights, data["kept_W"] / sums, 1e-9)
    close(fitted.params.weights, fitted.weights, 1e-12)
    assert fitted.model.prior.atoms.shape[1] == 4


@pytest.mark.parametrize("size", SIZES)
def test_few_shot_adaptation(recorded, size):
    data = recorded[size]
    prefs = ragged(data)
    model = lore.RewardModel(data["fewshot_V"], temperature=100.0)
    for steps in (1, 10, 500):
        method = lore.PublishedAdam(num_steps=steps, init=data["fewshot_w0"])
        adapted = lore.adapt(model, prefs, method=method)
        close(adapted.weights, data[f"fewshot_n{steps}_w"], TIGHT)
        close(adapted.loss.sum(), data[f"fewshot_n{steps}_nll_sum"], TIGHT)
    accuracy = lore.accuracy(model, adapted, prefs)
    close(accuracy, data["fewshot_n500_accuracy"], 1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_simulated_choices(recorded, size):
    data = recorded[size]
    table = data["sim_features"].reshape(-1, data["sim_features"].shape[-1])
    prefs = lore.data.simulated_preferences(table, data["sim_rewards"], data["sim_w"])
    features = np.asarray(prefs.features)
    got = features[prefs.chosen] - features[prefs.rejected]
    want = data["sim_feature_diff"]
    close(got.reshape(want.shape), want, 1e-12)
