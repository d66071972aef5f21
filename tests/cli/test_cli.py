"""The command `lore`: chains of commands give what the library gives."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from cli_cases import FIT, PAIRS, preferences

import lore_jax as lore

pytest.importorskip("typer", reason="needs the extra 'cli'")
pytest.importorskip("pyarrow", reason="needs the extra 'cli'")
pytest.importorskip("tqdm", reason="needs the extra 'cli'")


from lore_jax.cli import tables, users

pytestmark = pytest.mark.filterwarnings("ignore:too few pairs:UserWarning")


def fit_in_python(**settings):
    recipe = lore.PublishedJoint(num_steps=5, **settings)
    return lore.fit(preferences(), rank=2, key=jax.random.key(0), recipe=recipe)


def test_fit_is_the_librarys(folder, lore_command):
    arguments = [
        "--temperature",
        "7",
        "--seed",
        "0",
        "--json",
        "--out",
        "m.safetensors",
    ]
    code, out, err = lore_command("fit", "pairs.csv", *FIT, *arguments)
    assert code == 0
    said = json.loads(out)
    assert (said["users"], said["pairs"], said["rank"]) == (4, 10, 2)
    assert said["temperature"] == 7
    found, want = lore.load("m.safetensors"), fit_in_python(temperature=7.0)
    np.testing.assert_array_equal(found.model.basis, want.model.basis)
    assert found.user_ids.tolist() == ["ann", "bob", "cat", "dan"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d fit: 10 pairs of 4 users\n", err)


def test_adapt_score_evaluate_are_the_librarys(model, lore_command):
    fitted, prefs = lore.load(model), preferences()
    want = lore.adapt(fitted.model, prefs)
    data = ["pairs.csv", "--features", "x.npy"]
    scores = lore.score(fitted.model, want, np.load("x.npy")[[9, 10, 11]])
    hits = lore.accuracy(fitted.model, want, prefs)
    for ending in ("safetensors", "csv", "tsv", "parquet"):
        out = f"u.{ending}"
        code, said, _ = lore_command("adapt", model, *data, "--out", out)
        assert code == 0
        assert "converged     4" in said
        found = users.read_users(pathlib.Path(out), fitted.model)
        assert found.user_ids.tolist() == want.user_ids.tolist()
        np.testing.assert_allclose(found.weights, want.weights, rtol=1e-6)

        command = ["score", model, "new.jsonl", "--features", "x.npy", "--users", out]
        code, said, _ = lore_command(*command, "--user", "bob", "--json")
        assert code == 0
        lines = [json.loads(line) for line in said.splitlines()]
        assert [line["response"] for line in lines] == [9, 10, 11]
        got = [line["score"] for line in lines]
        np.testing.assert_allclose(got, scores[1], rtol=1e-5)

        code, said, _ = lore_command("evaluate", model, *data, "--users", out, "--json")
        assert code == 0
        mean = json.loads(said)["accuracy"]["mean"]
        np.testing.assert_allclose(mean, np.mean(hits), rtol=1e-6)


def test_score_takes_the_best_and_users_of_the_table(model, lore_command):
    code, said, _ = lore_command(
        *("score", model, "new.jsonl", "--features", "x.npy", "--top", 2),
        *("--user", "bob", "--user", "ann"),
    )
    fitted = lore.load(model)
    want = np.asarray(lore.score(fitted.model, fitted, np.load("x.npy")[[9, 10, 11]]))
    rows = [line.split("\t") for line in said.splitlines()]
    assert [name for _, name, _ in rows] == ["bob", "bob", "ann", "ann"]
    for number, row in ((1, rows[:2]), (0, rows[2:])):
        best = np.argsort(-want[number])[:2]
        assert [int(place) for place, _, _ in row] == best.tolist()
    pathlib.Path("who.csv").write_text("who,row\nann,3\ncat,3\n")
    code, said, _ = lore_command(
        *("score", model, "who.csv", "--features", "x.npy", "--out", "s.csv"),
        *("--user-column", "who", "--response-column", "row", "--json"),
    )
    assert code == 0
    assert json.loads(said) == {"scores_file": "s.csv", "scores": 2}
    found = tables.read_table("s.csv", needed=("user", "score"), optional=())
    want = lore.score(fitted.model, fitted, np.load("x.npy")[[3]])
    np.testing.assert_allclose(np.array(found["score"], float), want[[0, 2], 0], 1e-5)


def test_evaluate_compares_with_the_mean_weights(model, lore_command):
    code, said, _ = lore_command("evaluate", model, "pairs.csv", "--features", "x.npy")
    assert code == 0
    fitted, prefs = lore.load(model), preferences()
    everyone = np.tile(np.asarray(fitted.model.prior.mean), (4, 1))
    losses = [
        np.mean(lore.log_loss(fitted.model, p, prefs, user_ids=names))
        for p, names in ((fitted, None), (everyone, prefs.user_ids))
    ]
    for name, value in zip(("log_loss ", "log_loss_of_mean_weights"), losses):
        assert re.search(rf"^{name} +{value:.4f} \[", said, re.MULTILINE)


def test_names_of_items_and_columns(folder, lore_command):
    """Three tables of the same pairs make the same model."""
    names = [f"item {row}" for row in range(12)]
    pathlib.Path("names.txt").write_text("\n".join(names) + "\n", encoding="utf-16")
    lines = [json.dumps({"name": name}) for name in names]
    pathlib.Path("names.jsonl").write_text("\n".join(lines))
    rows = [f"{user};item {a};item {b}" for user, a, b in PAIRS]
    text = "\n".join(["who;better;rejected", *rows])
    pathlib.Path("named.csv").write_text(text, encoding="utf-16")
    columns = ["--user-column", "who", "--chosen-column", "better"]
    code, _, err = lore_command(
        *("fit", "named.csv", *FIT, *columns, "--encoding", "utf-16"),
        *("--items", "names.txt", "--out", "a.safetensors"),
    )
    assert code == 0, err
    pathlib.Path("named.csv").write_text(text)
    code, _, err = lore_command(
        *("fit", "named.csv", *FIT, *columns, "--items", "names.jsonl"),
        *("--item-column", "name", "--out", "b.safetensors"),
    )
    assert code == 0, err
    want = fit_in_python().model.basis
    for path in ("a.safetensors", "b.safetensors"):
        np.testing.assert_array_equal(lore.load(path).model.basis, want)


def test_integer_names_stay_integers_and_text_finds_them(folder, lore_command):
    """Parquet keeps integers; a CSV file and a command line have only text."""
    import pyarrow
    import pyarrow.parquet

    number = {"ann": 0, "bob": 1, "cat": 2, "dan": 3}
    columns = [number[user] for user, _, _ in PAIRS], *list(zip(*PAIRS))[1:]
    table = pyarrow.table(dict(zip(("user", "chosen", "rejected"), map(list, columns))))
    pyarrow.parquet.write_table(table, "pairs.parquet")
    code, _, err = lore_command("fit", "pairs.parquet", *FIT, "--out", "m.safetensors")
    assert code == 0, err
    assert lore.load("m.safetensors").user_ids.tolist() == [0, 1, 2, 3]
    score = ("score", "m.safetensors", "new.jsonl", "--features", "x.npy", "--user")
    code, said, _ = lore_command(*score, "2")
    assert code == 0
    assert [line.split("\t")[1] for line in said.splitlines()] == ["2", "2", "2"]
    code, said, err = lore_command(*score, "ann")
    assert (code, said) == (2, "")
    assert err.startswith("lore: user 'ann' is not known: the known names are integers")
