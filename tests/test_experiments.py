"""The whole chain prepare → train_basis → vary_fewshot → figure, small and offline."""

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import lore_jax as lore

EXTRA = "needs the extra 'quickstart'"
for module in ("matplotlib", "tqdm"):
    pytest.importorskip(module, reason=EXTRA)

from fixtures import sources  # noqa: E402

from experiments import __main__ as entry  # noqa: E402
from experiments import (  # noqa: E402
    baselines,
    cli,
    figures,
    from_table,
    leaks,
    parts,
    planted,
    result_tables,
    reward_bench,
    stored,
    synthetic,
)
from experiments import prepared as prepared_data  # noqa: E402
from experiments.bowling_green import prepare as bowling  # noqa: E402
from experiments.personal_llm import evaluate_at_size  # noqa: E402
from experiments.protocol import Cell, Run, Store, judge  # noqa: E402
from lore_jax.cli import intervals  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::experiments.leaks.LeakWarning"),
    pytest.mark.filterwarnings("ignore:too few pairs to validate on:UserWarning"),
]
QUICK = ["--quick", "--ranks", "0", "2", "--shots", "2"]
PICTURES = ("accuracy_by_rank", "accuracy_by_shots_rank_2", "weights", "cosines")


def write_prepared(folder, *, users=8, pairs=12, width=6, seed=0, **config):
    """A prepared folder with random features and a head; two thirds are seen."""
    rng = np.random.default_rng(seed)
    total = users * pairs
    features = rng.normal(size=(2 * total, width)).astype(np.float32)
    user = np.repeat(np.arange(users), pairs)
    unit = np.array([f"u{u}_{n // 2}" for u in range(users) for n in range(pairs)])
    table = prepared_data.PairTable.from_columns(
        user=[f"user{u}" for u in user], unit=unit, group=unit,
        chosen=np.arange(total), rejected=np.arange(total) + total,
        seen=user < users * 2 // 3, heldout=np.tile(np.arange(pairs), users) % 6 < 2,
    )  # fmt: skip
    prepared_data.write_features(folder, features, head=features[0])
    table.save(folder / "pairs.npz")
    facts = {"shots": "pairs", "shot_counts": [0, 2], "ranks": [0, 1, 2]}
    prepared_data.write_json(
        folder / "config.json", {"variants": [None], **facts, **config}
    )
    return table


@pytest.fixture
def prepared(tmp_path):
    write_prepared(tmp_path / "prepared")
    return tmp_path / "prepared"


def pictures(folder):
    return {path.stem for path in (folder / "figures").glob("*.png")}


# --- the chain -------------------------------------------------------------------


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


def write_polis(folder, people=24, statements=12, seed=0):
    """A raw Polis export with everything that has to be left out."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    ids = [str(7 * n) for n in range(statements)]
    texts = [sources.sentence(rng, 8, 14) for _ in ids]
    texts[3], texts[5] = "Short", texts[4].upper()
    with open(folder / bowling.COMMENTS, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow("timestamp,datetime,comment-id,author-id,agrees,disagrees,"
                     "moderated,comment-body".split(","))  # fmt: skip
        for n in reversed(range(statements)):
            moderated = -1 if n == 1 else 1
            out.writerow([0, "Tue", ids[n], 0, 1, 1, moderated, texts[n]])
    votes = rng.choice([1, 1, -1, -1, 0, None], size=(people, statements))
    votes[:, 2] = None  # nobody voted on it
    votes[0] = 1  # somebody who disagrees with nothing
    with open(folder / bowling.VOTES, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        head = "participant,group-id,n-comments,n-votes,n-agree,n-disagree".split(",")
        out.writerow([*head, *ids])
        for person, row in enumerate(votes):
            cells = ["" if vote is None else vote for vote in row]
            out.writerow([person, 0, 0, 0, 0, 0, *cells])
    return ids, votes


def test_bowling_green_from_a_raw_export(tmp_path, monkeypatch):
    ids, votes = write_polis(tmp_path / "raw")
    rng = np.random.default_rng(1)
    monkeypatch.setattr(
        bowling, "sentence_embedder", lambda *_: lambda t: rng.normal(size=(len(t), 5))
    )
    argv = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "prepared")]
    argv += ["--splits", "1", "--user-votes", "2", "--unseen-share", "0.4"]
    done = bowling.main(argv)
    kept = [n for n in reversed(range(len(ids))) if n not in (1, 2, 3, 4)]
    counted = [sum(vote in (1, -1) for vote in votes[:, n]) for n in range(len(ids))]
    kept = [n for n in kept if counted[n] >= 8]
    with np.load(tmp_path / "prepared/package/bowling_green_v1.npz") as package:
        matrix = np.full((done["participants"], done["texts"]), None)
        matrix[package["vote_user"], package["vote_item"]] = package["vote"]
        assert package["emb"].dtype == np.float16
    path = tmp_path / "prepared/package/bowling_green_items.csv"
    with open(path, newline="", encoding="utf-8") as file:
        items = list(csv.DictReader(file))
    assert [row["source_comment_id"] for row in items] == [ids[n] for n in kept]
    enough = [
        person
        for person in range(len(votes))
        if min((votes[person, kept] == 1).sum(), (votes[person, kept] == -1).sum()) >= 2
    ]
    np.testing.assert_array_equal(matrix, votes[np.ix_(enough, kept)])
    folders = ["--data", str(tmp_path / "prepared"), "--out", str(tmp_path / "runs")]
    folders += [*QUICK, "--methods", "global", "lore", "auto"]
    (trained,) = entry.main(["train_basis", "bowling_green", *folders])
    (swept,) = entry.main(["vary_fewshot", "bowling_green", *folders])
    assert pictures(tmp_path / "runs") == set(PICTURES)
    assert set(trained["counts"]) == {"split_0"}
    rows = {row["method"] for row in trained["table"]}
    assert {baselines.GLOBAL, baselines.LORE, baselines.CHOSEN} <= rows
    more = {baselines.POPULATION, baselines.OTHER, baselines.MAXIMUM}
    assert more <= rows
    assert {baselines.LORE, baselines.CHOSEN, *more} <= {
        r["method"] for r in swept["table"]
    }
    assert set(trained["chosen_rank"].values()) <= {1, 2}
    for results in (trained, swept):  # the plug-in differs in its probabilities alone
        row = next(r for r in results["table"] if r["method"] == baselines.PLUG_IN)
        assert row["unseen_heldout"] is None
        assert row["unseen_heldout_brier"]["mean"] > 0
    assert (
        f"{baselines.PLUG_IN} | 2 | ECE" in (tmp_path / "runs/fewshot.md").read_text()
    )


def test_bowling_green_shipped_votes_have_no_vote_on_two_sides(tmp_path):
    bowling.main(["--out", str(tmp_path), "--splits", "1", "--max-training", "3"])
    found = prepared_data.load(tmp_path, "split_0")
    assert found.features.shape == (607, 384)
    table = found.pairs
    moved = table.heldout.copy()
    moved[np.flatnonzero(table.heldout)[0]] = False
    broken = parts.dataclasses.replace(table, heldout=moved)
    with pytest.raises(leaks.LeakError, match="vote"):
        parts.check_leaks(parts.dataclasses.replace(found, pairs=broken))


def test_polis_errors_name_the_place(tmp_path):
    write_polis(tmp_path / "raw")
    path = tmp_path / "raw" / bowling.VOTES
    with pytest.raises(ValueError, match=r"no column for comments \['1000'\]"):
        bowling.read_votes(path, ["0", "1000"])
    path.write_text(path.read_text().replace("\n5,0,0,0,0,0,", "\n5,0,0,0,0,0,x"))
    with pytest.raises(ValueError, match=r"row 5: 'x.*' is not a vote"):
        bowling.read_votes(path, ["0"])


# --- your own table --------------------------------------------------------------


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


# --- the protocol ----------------------------------------------------------------


def test_finished_cells_are_not_computed_again(prepared, tmp_path, monkeypatch):
    argv = ["--data", str(prepared), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--methods", "head", "alone"]
    parser = cli.make_parser("x", "y")
    (first,) = cli.train(cli.parse(parser, argv))
    cli.fewshot(cli.parse(parser, argv))
    monkeypatch.setattr(baselines.Recipe, "fit", None)
    monkeypatch.setattr(lore, "adapt", None)
    (again,) = cli.train(cli.parse(parser, argv))
    cli.fewshot(cli.parse(parser, argv))
    assert again["table"] == first["table"]
    with pytest.raises(TypeError):  # another seed is another cell
        cli.train(cli.parse(parser, [*argv, "--seeds", "1"]))


def test_variants_are_populations_or_splits(tmp_path):
    argv = ["--data", str(tmp_path / "p"), *QUICK, "--methods", "head", "--out"]
    for kind, number in (("populations", 2), ("splits", 1)):
        names = ["alpha_1", "alpha_10"]
        table = write_prepared(tmp_path / "p", variants=names, variants_are=kind)
        for name in names:
            table.save(prepared_data.pairs_path(tmp_path / "p", name))
        found = cli.train_main("x", "y", [*argv, str(tmp_path / kind)])
        assert len(found) == number
        rows = [row for results in found for row in results["table"]]
        assert {r["unseen_heldout"]["num_splits"] for r in rows} == {3 - number}
    assert (tmp_path / "populations/alpha_10/four_way.json").exists()
    write_prepared(tmp_path / "p", variants=names)
    with pytest.raises(ValueError, match="several populations"):
        parts.list_splits([tmp_path / "p"])


def test_other_data_are_other_cells(prepared, tmp_path):
    source = parts.list_splits([prepared])[0]
    recipe = baselines.Recipe("head", 0)
    store = Store(tmp_path / "runs")
    before = store.path("cells", Run(store, [source]).key(source, 0, recipe))
    write_prepared(prepared, seed=1)
    after = store.path("cells", Run(store, [source]).key(source, 0, recipe))
    assert before != after


def test_every_byte_of_features_and_head_is_in_the_fingerprint(prepared):
    (source,) = parts.list_splits([prepared])
    marks = [source.fingerprint()]
    assert marks[0] == source.fingerprint({})
    features, head = (np.load(prepared / f"{n}.npy") for n in ("features", "head"))
    for values in (features, head):
        values.flat[3] += 1e-3
        stored.write_features(prepared, features, head)
        marks.append(source.fingerprint())
    stored.write_features(prepared, features)
    marks.append(source.fingerprint())
    assert len(set(marks)) == 4
    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    assert parts.hash_array(values, block=41) == parts.hash_array(values)
    assert parts.hash_array(values) != parts.hash_array(values.reshape(5, 7))


def test_tables_say_pairs_judgements_and_differences(tmp_path):
    table = write_prepared(tmp_path / "p")
    argv = ["--data", str(tmp_path / "p"), "--out", str(tmp_path / "runs"), *QUICK]
    argv += ["--methods", "global", "alone"]
    cli.train_main("x", "y", argv)
    (swept,) = cli.fewshot_main("x", "y", argv)
    count = table.counts()["unseen_heldout"]
    assert count["judgements"] < count["pairs"]
    for name in ("four_way", "fewshot"):
        text = (tmp_path / f"runs/{name}.md").read_text()
        line = [count[n] for n in ("users", "pairs", "judgements")]
        words = " | ".join(map(str, line))
        assert f"| prepared | unseen heldout | {words} |" in text
        with open(tmp_path / f"runs/{name}.csv", newline="") as file:
            rows = [
                r for r in csv.DictReader(file) if r["quantity"] == "unseen_heldout"
            ]
        assert {r["pairs"] for r in rows} == {str(count["pairs"])}
        assert {r["judgements"] for r in rows} == {str(count["judgements"])}
        assert all(r["difference"] for r in rows if r["method"] == baselines.ALONE)
    assert f"| {baselines.ALONE}: vs global |" in text
    assert "| pairs shown |  | 6 | 24 |" in text
    assert swept["shown"]["all"] == {"pairs": 24, "judgements": 12, "user_rows": 48}


def test_a_run_without_methods_is_an_error(prepared, tmp_path):
    stored.write_features(prepared, np.load(prepared / "features.npy"))
    argv = ["--data", str(prepared), "--out", str(tmp_path / "runs"), *QUICK]
    with pytest.raises(ValueError, match="no method is left"):
        cli.train_main("x", "y", [*argv, "--methods", "head"])


def test_config_file_sets_flags(prepared, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"ranks": [0, 3], "seeds": [4], "data": [str(prepared)]})
    )
    parser = cli.make_parser("x", "y")
    args = cli.parse(parser, ["--config", str(path), "--seeds", "7"])
    assert (args.ranks, args.seeds, args.data) == ([0, 3], [7], [prepared])
    path.write_text('{"rank": 3}')
    with pytest.raises(SystemExit):
        cli.parse(parser, ["--config", str(path)])


def test_users_are_numbered_alike_on_both_sides(prepared):
    split = parts.list_splits([prepared])[0].load()
    for first, second in (split.data[:2], split.data[2:]):
        np.testing.assert_array_equal(first.ids.users, second.ids.users)
    assert split.data.seen.num_users == 5
    assert split.counts["seen_training"]["judgements"] == 5 * 4
    assert split.counts["seen_training"]["pairs"] == 5 * 8


def test_redraws_move_people_but_no_pair(prepared):
    plain, redrawn = (s.read().pairs for s in parts.list_splits([prepared], splits=2))
    assert redrawn.seen.sum() == plain.seen.sum()
    assert (redrawn.seen != plain.seen).any()
    np.testing.assert_array_equal(redrawn.heldout, plain.heldout)
    leaks.check_split(redrawn)


def test_personal_llm_users_cannot_change_sides(tmp_path):
    write_prepared(tmp_path, dataset="personal_llm")
    assert len(parts.list_splits([tmp_path])) == 1
    with pytest.raises(ValueError, match="another --seed"):
        parts.list_splits([tmp_path], splits=2)


def test_redraws_keep_the_limit_of_unseen_people(tmp_path):
    table = write_prepared(tmp_path)
    training = table.mask(seen=False, heldout=False)
    few = table.select(~training | (np.arange(len(table)) % 2 == 0))
    redrawn = parts.redraw(few, 1)
    counts = np.bincount(redrawn.user[redrawn.mask(seen=False, heldout=False)])
    assert (
        counts.max() <= np.bincount(few.user[few.mask(seen=False, heldout=False)]).max()
    )


def test_shots_of_units_take_whole_units(tmp_path):
    write_prepared(tmp_path, shots="units")
    split = parts.list_splits([tmp_path])[0].load()
    one, two = (parts.take_shots(split, n, seed=3) for n in (1, 2))
    assert set(np.asarray(one.counts)) == {2}
    assert set(np.asarray(two.counts)) == {4}
    assert set(one.chosen) <= set(two.chosen)
    assert (
        parts.take_shots(split, None, seed=0).num_pairs == split.data.unseen.num_pairs
    )


def test_published_recipes_see_scaled_features_and_fold_back(prepared):
    split = parts.list_splits([prepared])[0].load()
    recipe = baselines.Recipe("joint", 2, {"num_steps": 5}, {"num_steps": 5})
    fitted = recipe.fit(split, 0)
    far = [part.replace(features=7 * np.asarray(part.features)) for part in split.data]
    moved = parts.dataclasses.replace(split, data=lore.data.FourWay(*far))
    again = recipe.fit(moved, 0)
    np.testing.assert_allclose(
        7 * again.model.basis, fitted.model.basis, rtol=1e-4, atol=1e-4
    )
    table = np.asarray(split.data.seen.features)
    scale = 100 / np.linalg.norm(table - table.mean(0), axis=1).mean()
    key = baselines.jax.random.key(0)
    scaled = split.data.seen.replace(features=(table - table.mean(0)) * scale)
    config = lore.PublishedJoint(num_steps=5)
    plain = lore.fit(scaled, rank=2, key=key, recipe=config)
    np.testing.assert_allclose(fitted.model.basis, plain.model.basis * scale, rtol=1e-4)


def test_published_recipes_do_not_centre_differences():
    rng = np.random.default_rng(0)
    delta = rng.normal(3.0, 1.0, size=(12, 4)).astype(np.float32)
    prefs = lore.Preferences.from_ragged([delta[:6], delta[6:]])
    data = lore.data.FourWay(prefs, prefs, prefs, prefs)
    split = parts.Split("x", data, None, "pairs", np.zeros(0, int), None, {})
    fitted = baselines.Recipe("joint", 1, {"num_steps": 5}, {}).fit(split, 0)
    scale = 100 / np.linalg.norm(delta, axis=1).mean()
    plain = lore.fit(
        prefs.replace(features=np.asarray(prefs.features) * np.float32(scale)),
        rank=1,
        key=baselines.jax.random.key(0),
        recipe=lore.PublishedJoint(num_steps=5),
    )
    np.testing.assert_allclose(fitted.model.basis, plain.model.basis * scale, rtol=1e-4)


def test_labels_say_what_is_not_as_published():
    names = [
        baselines.Recipe(method, 2, {"num_steps": steps, "alpha": alpha}).label
        for method, steps, alpha in (
            *(("joint", 1000, 0.0), ("alternating", 20_000, 10.0)),
            ("alternating", 1000, 0.0),
        )
    ]
    assert names[0] == "published joint"
    assert names[1] == "published alternating, anchor 10"
    assert names[2] == "published alternating, 1,000 steps"


def test_each_user_alone_solves_its_own_ridge_problem(prepared):
    seen = parts.list_splits([prepared])[0].load().data.seen
    own = baselines.PerUserBradleyTerry(ridge=0.7, scale=3.0)
    direction = own.directions(seen)[:, 2].astype(np.float64)
    delta = baselines.differences(seen, 2)
    p = 1 / (1 + np.exp(-delta @ direction))
    gradient = delta.T @ (p - 1) + 0.7 * 3.0 * direction
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    ones = np.tile(direction[:, None], seen.num_users).astype(np.float32)
    alike = np.ones((seen.num_users, 1), np.float32)
    users, _ = judge(baselines.own_margins(ones, seen), seen)
    plain = lore.accuracy(
        lore.RewardModel(ones[:, :1]), alike, seen, user_ids=seen.user_ids
    )
    np.testing.assert_allclose(users[""], plain)


def test_another_users_weights_are_nobodys_own():
    weights = np.eye(7)
    for seed in range(5):
        other = baselines.shuffled_weights(weights, seed)
        assert (other != weights).any(1).all()
        np.testing.assert_array_equal(other.sum(0), 1)


def test_judged_pairs_are_those_of_the_library():
    rng = np.random.default_rng(0)
    prefs = lore.Preferences.from_pairs(
        rng.normal(size=(30, 3)).astype(np.float32), np.arange(15), np.arange(15, 30),
        rng.integers(3, size=15), 4, label=rng.random(15),
    )  # fmt: skip
    basis, p = np.eye(3, dtype=np.float32), rng.dirichlet(np.ones(3), 4)
    p = p.astype(np.float32)
    margins = np.asarray(
        lore.margins(lore.RewardModel(basis, temperature=0.5), p, prefs)
    )[prefs.order]
    users, error = judge(margins, prefs)
    np.testing.assert_allclose(
        users[""], lore.accuracy(lore.RewardModel(basis), p, prefs), rtol=1e-6
    )
    loss = lore.log_loss(lore.RewardModel(basis, temperature=0.5), p, prefs)
    np.testing.assert_allclose(users["_log_loss"], loss, rtol=1e-5)
    chance, label = 1 / (1 + np.exp(-margins)), np.asarray(prefs.label)
    for user in range(3):
        mine = prefs.user == user
        brier = np.mean((chance[mine] - label[mine]) ** 2)
        assert users["_brier"][user] == pytest.approx(brier, rel=1e-5)
    assert np.isnan(users["_brier"][3])
    assert 0 < error < 1
    assert judge(np.zeros(15), prefs.replace(label=None))[1] == 0  # undecided is right


def draw_splits(rng, *, users=120, splits=4, share=0.8, own=0.1, split=0.0, pairs=0.05):
    """Values and ids of splits of the same people, whose true mean is 0."""
    taste, shift = rng.normal(0, own, users), rng.normal(0, split, splits)
    some = [rng.permutation(users)[: round(share * users)] for _ in range(splits)]
    noise = [rng.normal(0, pairs, len(ids)) for ids in some]
    return [taste[i] + shift[s] + noise[s] for s, i in enumerate(some)], some


@pytest.mark.parametrize("design", [{}, {"split": 0.02}, {"share": 0.2}])
def test_intervals_cover_the_truth_though_splits_share_users(design):
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(300):
        found = intervals.bootstrap(*draw_splits(rng, **design), resamples=300)
        hits.append(found.low <= 0 <= found.high)
    assert 0.91 < np.mean(hits) < 0.985  # 95 % ± 3 deviations of 300 draws


def test_intervals_of_splits_that_share_users_are_no_narrower_than_of_one():
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    ids = np.arange(60)
    one = intervals.bootstrap([values], [ids])
    again = intervals.bootstrap([values] * 5, [ids] * 5)
    assert (again.low, again.high) == pytest.approx((one.low, one.high))
    assert (again.mean, again.num_users) == pytest.approx((values.mean(), 60))
    plain = lore.evaluation.bootstrap_interval(values)
    assert one.high - one.low == pytest.approx(plain.high - plain.low, rel=0.1)
    moved = intervals.paired([values + 0.3] * 3, [values] * 3, [ids] * 3)
    assert (moved.low, moved.high) == pytest.approx((0.3, 0.3))
    values[7] = np.nan
    assert intervals.bootstrap([values], [ids]).num_users == 59
    with pytest.raises(ValueError, match="equal shapes"):
        intervals.bootstrap([values], [ids[1:]])
    with pytest.raises(ValueError, match="at least one number in every split"):
        intervals.bootstrap([values, values[7:8]], [ids, ids[7:8]])


def test_rows_average_seeds_and_pair_differences():
    rows = result_tables.Rows({s: {"seen": ["x", "y", "z"]} for s in "ab"})
    for split, base in (("a", 0.5), ("b", 0.7)):
        for seed in (0.0, 0.1):
            values = np.array([base, base + 0.2, np.nan]) + seed
            for name, shift in ((baselines.GLOBAL, 0.0), (baselines.LORE, 0.1)):
                cell = Cell({(name, "seen_heldout"): values + shift}, {})
                rows.add(split, 1 if name == baselines.GLOBAL else 2, cell)
    found = rows.interval(baselines.LORE, 2, "seen_heldout")
    assert found["mean"] == pytest.approx(0.85)
    assert (found["num_splits"], found["num_users"]) == (2, 2)
    assert found["difference"]["mean"] == pytest.approx(0.1)
    assert found["difference"]["high"] == pytest.approx(0.1)


def test_the_rank_is_chosen_by_fit_among_those_asked_for(prepared, monkeypatch):
    args = cli.make_parser("x", "y").parse_args(["--methods", "auto"])
    (recipe,) = cli.recipes(args, [0, 5, 2], head=True)
    asked = {}
    monkeypatch.setattr(lore, "fit", lambda prefs, **found: asked.update(found))
    recipe.fit(parts.list_splits([prepared])[0].load(), 0)
    assert asked["rank"] == "auto"
    assert asked["recipe"].search.ranks == (1, 2, 5)


def test_a_leak_stops_a_run(prepared, tmp_path):
    found = prepared_data.load(prepared)
    heldout = found.pairs.heldout.copy()
    heldout[np.flatnonzero(heldout)[0]] = False
    parts.dataclasses.replace(found.pairs, heldout=heldout).save(prepared / "pairs.npz")
    argv = ["--data", str(prepared), "--out", str(tmp_path / "runs"), *QUICK]
    with pytest.raises(leaks.LeakError, match="unit"):
        cli.train_main("x", "y", argv)


# --- RewardBench 2 ---------------------------------------------------------------


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


# --- the rest --------------------------------------------------------------------


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
    page = Path(__file__).parent.parent / "docs" / "own_data.md"
    text = page.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert len(text.splitlines()) == 10
    table = tmp_path / "mine.csv"
    table.write_text(text)
    assert from_table.main([str(table), "--texts-only", "--out", str(tmp_path)]) == []
    pairs = prepared_data.PairTable.load(tmp_path / "prepared" / "pairs.npz")
    assert len(pairs.chosen) == 9
    assert sorted(pairs.users) == ["ann", "bob", "cat"]
