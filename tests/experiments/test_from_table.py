"""A table of one's own through the whole chain."""

import json

import numpy as np
import pytest
from experiment_cases import MARKS, QUICK, pictures
from fixtures import sources

from experiments import (
    baselines,
    from_table,
    leaks,
    parts,
)
from experiments import prepared as prepared_data

pytestmark = MARKS


TEN_LINES = "user,prompt,chosen,rejected\n" + "".join(
    f"{user},Question {number}?,{'Good' if number % 2 else 'Fine'} answer {user} "
    f"{number}.,Other answer {number} {user}.\n"
    for user in ("ann", "bob")
    for number in range(5)
)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_table_on_ten_lines(tmp_path):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="needs the extra 'experiments'")
    (tmp_path / "mine.csv").write_text(TEN_LINES)
    model = sources.save_tiny(tmp_path / "model")
    argv = [str(tmp_path / "mine.csv"), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--model", str(model), "--model-dtype", "float32", "--device", "cpu"]
    trained, swept = from_table.main([*argv, "--methods", "head", "global", "lore"])
    rows = {row["method"]: row for row in trained["table"]}
    assert 0 <= rows[baselines.LORE]["unseen_heldout"]["mean"] <= 1
    assert swept["shown"]["2"]["pairs"] == 2
    assert "accuracy_by_shots_rank_2" in pictures(tmp_path / "runs")


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_from_table_with_ready_embeddings(tmp_path, ending):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4)).astype(np.float32)
    if ending == "npy":
        np.save(tmp_path / "x.npy", features)
    else:
        from safetensors.numpy import save_file

        save_file({"x": features}, tmp_path / "x.safetensors")
    lines = []
    for user in range(6):
        for _ in range(20):
            chosen, rejected = map(int, rng.choice(60, 2, replace=False))
            row = {"user": f"u{user}", "chosen": chosen, "rejected": rejected}
            lines.append(json.dumps({**row, "label": 0.9, "weight": 2.0}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    argv = [str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--embeddings", str(tmp_path / f"x.{ending}")]
    trained, _ = from_table.main([*argv, "--methods", "alone"])
    counts = trained["counts"]["prepared"]["seen_training"]
    assert counts["judgements"] == counts["user_rows"] > 0
    found = prepared_data.load(tmp_path / "runs/prepared").pairs
    assert set(found.weight.tolist()) == {2.0}
    for user in range(6):  # no row of a person on both sides
        mine = found.select(found.user == user)
        sides = [mine.select(mine.heldout == side) for side in (False, True)]
        rows = [set(s.chosen) | set(s.rejected) for s in sides]
        assert not rows[0] & rows[1]


def test_from_table_reads_parquet_and_names_what_is_wrong(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'experiments'")
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="needs the extra 'experiments'"
    )
    rows = [{"user": "a", "prompt": "p", "chosen": "x", "rejected": "y"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert from_table.read_table(tmp_path / "t.parquet")["chosen"] == ["x"]
    path = tmp_path / "t.jsonl"
    path.write_text('{"user": "a", "chosen": "x"}\n')
    with pytest.raises(ValueError, match=r"missing columns \['rejected'\]"):
        from_table.read_table(path)
    columns = {"user": ["a"], "prompt": ["p"], "chosen": ["x"], "rejected": [["y"]]}
    with pytest.raises(TypeError, match=r"row 0, rejected.*must be a string, got list"):
        from_table.text_rows(columns, from_table.TextIndex())


def test_from_table_shared_units_stand_on_one_side():
    user = [f"u{n % 5}" for n in range(60)]
    unit = [f"p{n // 6}" for n in range(60)]  # everybody answers the same prompts
    columns = {"user": user, "prompt": unit, "chosen": list(range(60))}
    columns["rejected"] = list(range(60, 120))
    table, _, votes = from_table.build(columns)
    assert not votes
    leaks.check_split(table)
    assert 0 < table.heldout.mean() < 1


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {"user": "a", "chosen": 0, "rejected": 1}


def test_from_table_columns_are_those_of_any_row(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [ROW, {**ROW, "label": 0.7}])
    with pytest.raises(ValueError, match=r"t.jsonl, row 0: no label"):
        from_table.read_table(path)
    write_rows(path, [{**ROW, "weight": None}, ROW])
    assert set(from_table.read_table(path)) == {"user", "chosen", "rejected"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": 1.5}, "label must be a number from 0 to 1, got 1.5"),
        ({"label": float("nan")}, "label must be a number"),
        ({"label": "yes"}, "label must be a number.* got 'yes'"),
        ({"weight": -1}, "weight must be a number finite and >= 0, got -1"),
        ({"chosen": 0.6}, "chosen must be a row number, an integer, got 0.6"),
        ({"rejected": 9}, "rejected is row 9, but there are 4 embeddings"),
        ({"rejected": -1}, "rejected is row -1"),
        ({"rejected": 0}, "chosen and rejected are the same"),
    ],
)
def test_from_table_names_row_and_column(tmp_path, change, words):
    good = {**ROW, "label": 1, "weight": 2}
    columns = from_table.read_table(
        write_rows(tmp_path / "t.jsonl", [good, {**good, **change}])
    )
    with pytest.raises(ValueError, match=rf"^t, row 1: {words}"):
        from_table.check_columns(columns, "t", 4)


def test_from_table_refuses_wrong_embeddings_heads_and_shares(tmp_path):
    rows = [{**ROW, "user": user, "prompt": n} for user in "ab" for n in range(3)]
    table = write_rows(tmp_path / "t.jsonl", rows)
    features = np.random.default_rng(0).normal(size=(4, 3))
    for name, value in {"x": features, "flat": features[0], "h": np.ones(4)}.items():
        np.save(tmp_path / f"{name}.npy", value)
    argv = [str(table), "--out", str(tmp_path / "out"), "--embeddings"]
    with pytest.raises(ValueError, match=r"a row per text.*\(3,\)"):
        from_table.main([*argv, str(tmp_path / "flat.npy")])
    argv.append(str(tmp_path / "x.npy"))
    with pytest.raises(ValueError, match=r"shape \(4,\), but .* length 3"):
        from_table.main([*argv, "--head", str(tmp_path / "h.npy")])
    for flags in (
        *(["--heldout-share", "0"], ["--seen-share", "1"], ["--splits", "0"]),
        ["--texts-only"],
    ):
        with pytest.raises(SystemExit, match="2"):
            from_table.main([*argv, *flags])
    with pytest.raises(ValueError, match="heldout_share must be between 0 and 1"):
        from_table.build(from_table.read_table(table), heldout_share=1.5)
    with pytest.raises(ValueError, match="splits must be at least 1"):
        parts.list_splits([tmp_path], splits=0)


def test_from_table_refuses_other_embeddings_in_the_same_folder(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = []
    for user in range(4):
        for _ in range(20):
            chosen, rejected = map(int, rng.choice(40, 2, replace=False))
            rows.append({"user": user, "chosen": chosen, "rejected": rejected})
    argv = [str(write_rows(tmp_path / "t.jsonl", rows)), *QUICK, "--methods", "alone"]
    argv += ["--out", str(tmp_path / "out"), "--embeddings", str(tmp_path / "x.npy")]
    np.save(tmp_path / "x.npy", features := rng.normal(size=(40, 3)))
    from_table.main(argv)
    assert "left out: " in capsys.readouterr().err
    features[17, 2] += 1e-3
    np.save(tmp_path / "x.npy", features)
    with pytest.raises(ValueError, match="begun with other arguments: embeddings"):
        from_table.main(argv)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_from_table_texts_first_then_a_model(tmp_path):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason="needs the extra 'experiments'")
    (tmp_path / "mine.csv").write_text(TEN_LINES)
    argv = [str(tmp_path / "mine.csv"), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--methods", "head", "global", "--device", "cpu"]
    assert from_table.main([*argv, "--texts-only"]) == []
    argv += ["--model", str(sources.save_tiny(tmp_path / "model"))]
    argv += ["--model-dtype", "float32"]
    from_table.main(argv)
    with pytest.raises(ValueError, match="other arguments: model_dtype"):
        from_table.main([*argv, "--model-dtype", "bfloat16"])


def test_from_table_prompts_are_never_cut_by_finer_groups():
    number = range(80)
    columns = {
        "user": [f"u{n % 4}" for n in number],
        "prompt": [f"p{n // 8}" for n in number],
        "group": [f"turn{n // 4 % 2}" for n in number],  # numbered anew everywhere
        "chosen": [2 * n for n in number],
        "rejected": [2 * n + 1 for n in number],
    }
    table = from_table.build(columns)[0]
    prompt = (table.chosen // 2) // 8
    assert not set(prompt[table.heldout]) & set(prompt[~table.heldout])
    assert table.num_judgements() == 80
    coarse = {**columns, "group": [f"d{n // 16}" for n in number]}
    table = from_table.build(coarse)[0]
    dialogue = (table.chosen // 2) // 16
    assert not set(dialogue[table.heldout]) & set(dialogue[~table.heldout])
