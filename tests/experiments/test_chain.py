"""The whole chain prepare → train_basis → vary_fewshot → figure, small and offline."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from experiment_cases import MARKS, QUICK, pictures
from fixtures import sources

from experiments import __main__ as entry
from experiments import (
    baselines,
    figures,
    from_table,
)
from experiments import prepared as prepared_data
from experiments.bowling_green import prepare as bowling

pytestmark = MARKS


def write_source(name, folder):
    if name == "reddit_tldr":
        for split in ("train", "validation"):
            path = folder / f"comparisons_{split}.jsonl"
            sources.write_jsonl(path, sources.tldr_rows(split, pairs=6))
    elif name == "prism":
        names = ("conversations", "survey", "utterances")
        for part, rows in zip(names, sources.prism_rows(users=8)):
            sources.write_jsonl(folder / f"{part}.jsonl", rows)
    else:
        for split in ("train", "test"):
            rows = sources.personal_rows(split, prompts=12)
            sources.write_jsonl(folder / f"{split}.jsonl", rows)


CHAINS = {
    "reddit_tldr": ([], ["head", "alternating"]),
    "prism": ([], ["head", "alone"]),
    "personal_llm": (
        [
            *("--seen-users", "6", "--unseen-users", "4", "--alphas", "0.1"),
            *("--seen-share", "0.5", "--unseen-share", "0.3"),
        ],
        ["head", "alone"],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_three_commands(tmp_path, name, capsys):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="needs the extra 'experiments'")
    prepare = importlib.import_module(f"experiments.{name}.prepare")
    write_source(name, tmp_path / "data")
    model = sources.save_tiny(tmp_path / "model")
    argv = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "prepared")]
    argv += ["--model", str(model), "--model-dtype", "float32", "--device", "cpu"]
    flags, methods = CHAINS[name]
    prepare.main([*argv, *flags])
    folders = ["--data", str(tmp_path / "prepared"), "--out", str(tmp_path / "runs")]
    folders += [*QUICK, "--methods", *methods]
    (trained,) = entry.main(["train_basis", name, *folders])
    (swept,) = entry.main(["vary_fewshot", name, *folders])
    found = pictures(tmp_path / "runs")
    shots = "accuracy_by_shots" + ("_rank_2" if "alternating" in methods else "")
    assert found == {"accuracy_by_rank", shots}
    for stem in ("four_way", "fewshot", "config"):
        path = tmp_path / "runs" / f"{stem}.json"
        assert json.loads(path.read_text())["versions"]["jax"]
    rows = {row["method"].removesuffix(", 10 steps") for row in trained["table"]}
    assert {baselines.METHODS[method] for method in methods} <= rows
    assert {row["shots"] for row in swept["table"]} == {2, "all"}
    (part,) = (counts["unseen_heldout"] for counts in trained["counts"].values())
    assert 0 < part["judgements"] <= part["pairs"]
    if name == "prism":  # three rejected answers of a turn are one judgement
        assert part["pairs"] > part["judgements"]
    assert "| method | K |" in capsys.readouterr().out


def test_figures_are_the_same_twice(tmp_path):
    curves = {
        "a": [(1, 0.5, 0.4, 0.6), ("all", 0.7, 0.6, 0.8)],
        "b": [(1, 0.6, 0.5, 0.7)],
    }
    flat = {"c": (0.5, 0.45, 0.55)}
    for name in ("one", "two"):
        files = figures.shots_figure(tmp_path / name / "x.png", curves, flat=flat)
        assert [path.suffix for path in files] == [".png", ".pdf"]
    for name in ("x.png", "x.pdf"):
        first, second = ((tmp_path / n / name).read_bytes() for n in ("one", "two"))
        assert first == second


def test_looks_stay_distinct_beyond_eight():
    assert len({figures.line_look(n) for n in range(512)}) == 512
    assert len({figures.area_look(n) for n in range(64)}) == 64
    assert len(set(map(str, figures.DASHES))) == len(figures.DASHES)


def test_bowling_green_codes_beyond_int16():
    assert bowling.smallest(np.array([0, 32767])).dtype == np.int16
    wide = bowling.smallest(np.array([0, 32768]))
    assert wide.dtype == np.int32
    assert wide[1] == 32768


SCRIPTS = [
    *(f"{d}.prepare" for d in (*CHAINS, "bowling_green")),
    *("from_table", "reward_bench", "synthetic", "personal_llm.evaluate_at_size"),
]  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"experiments.{name}").main(["--help"])
    assert "--out" in capsys.readouterr().out


@pytest.mark.parametrize("command", entry.COMMANDS)
def test_help_of_the_entry(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        entry.main([command, "prism", "--help"])
    assert "--out" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["train_basis"], ["train", "prism"]])
def test_an_entry_without_a_command_says_what_there_is(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        entry.main(argv)
    assert "train_basis DATASET" in capsys.readouterr().out


def test_the_ten_line_file_of_the_documentation(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "own_data.md"
    text = page.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert len(text.splitlines()) == 10
    table = tmp_path / "mine.csv"
    table.write_text(text)
    assert from_table.main([str(table), "--texts-only", "--out", str(tmp_path)]) == []
    pairs = prepared_data.PairTable.load(tmp_path / "prepared" / "pairs.npz")
    assert len(pairs.chosen) == 9
    assert sorted(pairs.users) == ["ann", "bob", "cat"]
