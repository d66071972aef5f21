"""RewardBench 2 on a fixture."""

import csv

import numpy as np
import pytest
from experiment_cases import MARKS
from fixtures import sources

import lore_jax as lore
from experiments import (
    baselines,
    reward_bench,
)
from experiments import prepared as prepared_data

pytestmark = MARKS


def bench_rows():
    """Two subsets and ties, in the schema of the source."""
    rng = np.random.default_rng(0)

    def row(name, subset, right, wrong):
        chosen, rejected = (
            [sources.sentence(rng) for _ in range(number)] for number in (right, wrong)
        )
        return {
            **{"id": name, "prompt": sources.sentence(rng), "chosen": chosen},
            **{"rejected": rejected, "num_correct": right, "num_incorrect": wrong},
            **{"total_completions": right + wrong, "models": ["m"] * (right + wrong)},
            **{"subset": subset, "additional_metadata": {"category": None}},
        }

    rows = [row(str(n), subset, 1, 3) for subset in ("Math", "Focus") for n in range(3)]
    rows += [row(f"ref:{n}", "Ties", 1, 4) for n in range(2)]
    return rows + [row(f"tied:{n}", "Ties", 3, 4) for n in range(2)]


def test_reward_bench_on_a_fixture(tmp_path, prepared):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="needs the extra 'experiments'")
    sources.write_jsonl(tmp_path / "data/test.jsonl", bench_rows())
    model = sources.save_tiny(tmp_path / "model")
    rng = np.random.default_rng(0)
    prefs = lore.Preferences.from_pairs(
        rng.normal(size=(24, 16)).astype(np.float32), np.arange(12), np.arange(12, 24),
        np.arange(12) % 3, 3, user_ids=["ann", "bob", "eve"],
    )  # fmt: skip
    config = lore.Marginal(num_steps=3, search=lore.Search(num_atoms=4, ridges=(0.1,)))
    key = baselines.jax.random.key(0)
    fitted = lore.fit(prefs, rank=2, key=key, recipe=config)
    lore.save(tmp_path / "fit.safetensors", fitted)
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    argv += ["--model", str(model), "--model-dtype", "float32", "--device", "cpu"]
    argv += ["--table-dtype", "float32", "--fit", str(tmp_path / "fit.safetensors")]
    table = reward_bench.main([*argv, "--users", "bob"])
    names = ["base reward head", "direction 0", "direction 1", "population mixture"]
    assert list(table) == [*names, "user bob"]
    with open(tmp_path / "runs/reward_bench.csv", newline="") as file:
        header, first, *rest = csv.reader(file)
    assert header == ["reward", "Focus", "Math", "Ties", "mean"]
    assert len(rest) == 4
    features = prepared_data.load_features(tmp_path / "runs/prepared")
    head = np.load(tmp_path / "runs/prepared/head.npy")
    prompts = reward_bench.read_prompts(bench_rows(), reward_bench.TextIndex())
    right = [int((features @ head)[p.rows].argmax() == 0) for p in prompts[:3]]
    assert float(first[2]) == pytest.approx(np.mean(right))
    with pytest.raises(ValueError, match="knows no user 'tim'"):
        reward_bench.main([*argv, "--users", "tim"])


def test_reward_bench_best_of_four():
    assert reward_bench.score_best(np.array([3.0, 1, 2, 0])) == 1
    assert reward_bench.score_best(np.array([3.0, 3, 3, 0])) == pytest.approx(1 / 3)
    assert reward_bench.score_best(np.array([1.0, 3, 3, 0])) == 0


def test_reward_bench_ties_by_hand():
    ties = {
        "ref:0": (np.array([5.0, 1.0]), 1),  # gap 4
        "ref:1": (np.array([2.0, 1.5]), 1),  # gap 0.5
        "ref:2": (np.array([0.0, 1.0]), 1),  # wrong
        "tied:0": (np.array([4.0, 3.0, 1.0]), 2),  # gap 2, spread 1
        "tied:1": (np.array([4.0, 3.0, 1.0]), 2),  # gap 2, spread 1; hard gap 0.5
        "tied:9": (np.array([1.0, 0.0, 2.0]), 2),  # wrong, and without a ref
    }
    extra = (np.tanh(2 / 1 - 1) + np.tanh(0.5 / 1 - 1)) / 2
    by_hand = 0.3 * 2 / 3 + 0.3 * 2 / 3 + 0.2 * 1 + 0.2 * 0.5 + 0.01 * extra
    assert reward_bench.score_ties(ties) == pytest.approx(by_hand)
    equal = {"ref:0": (np.zeros(2), 1), "tied:0": (np.zeros(3), 2)}
    assert (
        reward_bench.score_ties(equal) == 0
    )  # nothing is preferred, nothing undefined
    with pytest.raises(ValueError, match="ref:N or tied:N"):
        reward_bench.score_ties({"x:0": (np.zeros(2), 1)})


def test_reward_bench_refuses_a_list_as_text():
    row = {**bench_rows()[0], "chosen": [["text"]]}
    with pytest.raises(TypeError, match=r"row 0 \(0\).*must be a string, got list"):
        reward_bench.read_prompts([row], reward_bench.TextIndex())


def test_reward_bench_equal_completions_tie():
    row = {**bench_rows()[0], "chosen": [" Same.\n"], "rejected": ["Same.", "b", "c"]}
    texts = reward_bench.TextIndex()
    (prompt,) = reward_bench.read_prompts([row], texts)
    assert prompt.rows.tolist() == [0, 0, 1, 2]
    assert texts.messages[0][-1]["content"] == "Same."
    assert reward_bench.score_best(np.array([2.0, 1, 1])[prompt.rows]) == 0.5


def test_reward_bench_texts_only(tmp_path):
    sources.write_jsonl(tmp_path / "data/test.jsonl", bench_rows())
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs")]
    assert reward_bench.main([*argv, "--texts-only"]) == {}
    assert (tmp_path / "runs/prepared/texts.jsonl").exists()
    with pytest.raises(SystemExit, match="2"):
        reward_bench.main([*argv, "--leak-threshold", "0.9"])
