"""Planted problems and evaluation at size."""

import json

import numpy as np
import pytest
from experiment_cases import MARKS, pictures

from experiments import (
    baselines,
    planted,
    synthetic,
)
from experiments.personal_llm import evaluate_at_size

pytestmark = MARKS


@pytest.mark.slow
def test_synthetic(tmp_path):
    argv = ["--out", str(tmp_path), "--seeds", "0", "--pairs", "10", "--quick"]
    argv += ["--shots", "0", "3", "--users", "16", "--new-users", "16"]
    argv += ["--shots-at", "10", "--features", "6", "--true-rank", "2"]
    argv += ["--ranks", "0", "1", "2", "--methods", "head", "global", "lore"]
    found = synthetic.main(argv)
    names = {"accuracy_by_pairs", "accuracy_by_shots", "angles_by_pairs"}
    assert pictures(tmp_path) == names
    rows = {(r["method"], r["shots"]): r["unseen_heldout"] for r in found["table"]}
    assert rows[synthetic.ORACLE, 10]["mean"] > rows[synthetic.TRUE, 10]["mean"] > 0.6
    wanted = {baselines.HEAD, baselines.GLOBAL, baselines.LORE}
    wanted |= {baselines.POPULATION, baselines.OTHER, baselines.MAXIMUM}
    swept = {r["method"]: r for r in found["shots"]["table"] if r["shots"] == 0}
    assert wanted <= {method for method, _ in rows}
    assert wanted <= set(swept)
    accuracy = [
        swept[n]["unseen_heldout"]["mean"]
        for n in (baselines.LORE, baselines.POPULATION)
    ]
    assert accuracy[0] == accuracy[1]  # who has shown nothing gets the population's
    assert found["shots"]["shown"]["3"]["pairs"] == 3 * 16
    assert {row["pairs"] for row in found["recovery"]} == {10}
    for name in ("by_pairs", "by_shots", "config"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["versions"]["jax"]
    with pytest.raises(SystemExit):
        synthetic.main([*argv, "--shots-at", "5"])


def test_planted_problems_of_a_seed_are_nested_and_known():
    facts = (5, 3, 4, 2, 0.3, 0.1)
    few, many = (planted.Planted(1, n, 6, facts) for n in (2, 6))
    first, second = few.load(), many.load()
    assert [part.num_pairs for part in first.data] == [10, 250, 6, 150]
    mine = {row.tobytes() for row in np.asarray(second.data.unseen.features)}
    assert {row.tobytes() for row in np.asarray(first.data.unseen.features)} <= mine
    basis, (seen, new) = few.truth()
    assert (basis.shape, seen.shape, new.shape) == ((4, 2), (5, 2), (3, 2))
    rewards = np.asarray(first.data.unseen_heldout.features) @ basis
    owner = np.asarray(first.data.unseen_heldout.user)
    assert np.mean(np.sum(rewards * new[owner], 1) > 0) > 0.75
    assert few.people()["unseen"].tolist() == ["1/5", "1/6", "1/7"]
    assert few.fingerprint() != many.fingerprint()


def test_recovery_ignores_order_and_scale():
    rng = np.random.default_rng(0)
    truth = np.linalg.qr(rng.normal(size=(9, 3)))[0]
    found = planted.recovery(truth[:, [2, 0, 1]] * [2.0, 5.0, 0.1], truth)
    assert found == pytest.approx(dict.fromkeys(planted.ANGLES, 0), abs=1e-5)
    other = np.linalg.svd(truth, full_matrices=True)[0][:, 3:6]
    found = planted.recovery(other, truth)
    assert found == pytest.approx(dict.fromkeys(planted.ANGLES, 90))
    turned = truth[:, :1] * np.cos(0.5) + other[:, :1] * np.sin(0.5)
    assert planted.recovery(turned, truth[:, :1])["mean"] == pytest.approx(
        np.degrees(0.5)
    )


def test_evaluation_at_size_measures_memory(tmp_path):
    argv = ["--users", "5", "--prompts", "12", "--test-prompts", "4"]
    argv += ["--features", "16", "--rank", "2", "--out", str(tmp_path)]
    report = evaluate_at_size.main(argv)
    assert 0 < report["pairs"] <= 20
    values = [r["mean_accuracy"] for r in report["evaluation"].values()]
    assert values[0] == pytest.approx(values[1])
    with pytest.raises(SystemExit):
        evaluate_at_size.main([*argv, "--limit-gb", "-1"])
