"""The command `lore`: chains of commands, files, one line for bad input."""

import importlib
import json
import logging
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lore_jax as lore

pytest.importorskip("typer", reason="needs the extra 'cli'")
pytest.importorskip("pyarrow", reason="needs the extra 'cli'")
pytest.importorskip("tqdm", reason="needs the extra 'cli'")

from fixtures import sources

from lore_jax.cli import app, inputs, main, output, quickstart, tables, users

ROOT = pathlib.Path(lore.__file__).parent.parent
PAIRS = [
    *(("ann", 0, 1), ("ann", 2, 3), ("ann", 4, 1), ("bob", 1, 0), ("bob", 3, 2)),
    *(("bob", 5, 6), ("cat", 0, 5), ("cat", 7, 8), ("dan", 1, 0), ("dan", 8, 2)),
]
FIT = ["--features", "x.npy", "--rank", "2", "--steps", "5", "--recipe", "joint"]
pytestmark = pytest.mark.filterwarnings("ignore:too few pairs:UserWarning")


@pytest.fixture
def lore_command(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        code = main.main([str(x) for x in arguments])
        return code, *capsys.readouterr()

    yield run
    log = logging.getLogger("lore_jax")
    for handler in list(log.handlers):
        log.removeHandler(handler)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An own folder with a table of ten pairs, features and responses."""
    monkeypatch.chdir(tmp_path)
    features = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    np.save("x.npy", features)
    lines = [f"{user},{chosen},{rejected}" for user, chosen, rejected in PAIRS]
    pathlib.Path("pairs.csv").write_text("\n".join(["user,chosen,rejected", *lines]))
    rows = "".join(f'{{"response": {row}}}\n' for row in (9, 10, 11))
    pathlib.Path("new.jsonl").write_text(rows)
    return tmp_path


def preferences():
    user, chosen, rejected = zip(*PAIRS)
    return lore.Preferences.from_pairs(np.load("x.npy"), chosen, rejected, user)


def fit_in_python(**settings):
    recipe = lore.PublishedJoint(num_steps=5, **settings)
    return lore.fit(preferences(), rank=2, key=jax.random.key(0), recipe=recipe)


@pytest.fixture
def model(folder, lore_command):
    """A fitted model in the folder."""
    code, _, err = lore_command("fit", "pairs.csv", *FIT, "--out", "m.safetensors")
    assert code == 0, err
    return "m.safetensors"


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


BAD = {
    "no_file": (["fit", "no.csv", *FIT, "--out", "m.safetensors"], "no.csv: No such"),
    "no_features": (
        ["fit", "pairs.csv", "--out", "m.safetensors"],
        "give --features, .* or --model",
    ),
    "two_sources": (
        ["fit", "pairs.csv", *FIT, "--model", "x", "--out", "m.safetensors"],
        "give --features, .* or --model",
    ),
    "column": (
        ["fit", "pairs.csv", *FIT, "--user-column", "u", "--out", "m.safetensors"],
        r"missing columns \['u'\]; found \['user', 'chosen', 'rejected'\]",
    ),
    "rank": (
        ["fit", "pairs.csv", "--features", "x.npy", "--rank", "two", "--out", "m"],
        "--out must end in .safetensors",
    ),
    "rank_text": (
        ["fit", "pairs.csv", "--rank", "two", "--out", "m.safetensors"],
        "--rank must be a number of at least 1 or auto, got 'two'",
    ),
    "rank_zero": (
        ["fit", "pairs.csv", "--rank", "0", "--out", "m.safetensors"],
        "--rank must be a number of at least 1 or auto, got '0'",
    ),
    "holdout": (
        ["fit", "pairs.csv", *FIT, "--holdout", "items", "--out", "m.safetensors"],
        "--holdout belongs to --recipe default, not joint",
    ),
    "holdout_name": (
        ["fit", "pairs.csv", *FIT, "--holdout", "all", "--out", "m.safetensors"],
        "'all' is not one of",
    ),
    "temperature": (
        ["fit", "pairs.csv", *FIT, "--temperature", "0", "--out", "m.safetensors"],
        "temperature must be above 0",
    ),
    "folder": (
        ["fit", "pairs.csv", *FIT, "--out", "no/m.safetensors"],
        "--out: there is no folder no",
    ),
    "row": (
        ["fit", "rows.csv", *FIT, "--out", "m.safetensors"],
        "rows.csv, row 1: rejected is row 12, but there are 12 embeddings",
    ),
    "not_features": (
        ["fit", "pairs.csv", "--features", "pairs.csv", "--out", "m.safetensors"],
        "pairs.csv must end in .npy or .safetensors",
    ),
    "half_features": (
        ["fit", "pairs.csv", "--features", "half.npy", "--out", "m.safetensors"],
        "half.npy is no whole .npy file",
    ),
    "items": (
        ["fit", "pairs.csv", *FIT, "--items", "few.txt", "--out", "m.safetensors"],
        "few.txt names 2 rows, but x.npy has 12",
    ),
    "items_twice": (
        ["fit", "pairs.csv", *FIT, "--items", "twice.txt", "--out", "m.safetensors"],
        "twice.txt: 'a' stands in rows 0 and 1",
    ),
    "items_unknown": (
        ["fit", "pairs.csv", *FIT, "--items", "twelve.txt", "--out", "m.safetensors"],
        "pairs.csv, row 0: chosen is '0', which is not in --items",
    ),
    "no_model": (
        ["adapt", "no.safetensors", "pairs.csv", "--out", "u.csv"],
        "no file at no.safetensors",
    ),
    "foreign_model": (["evaluate", "x.npy", "pairs.csv"], "x.npy is truncated or not"),
    "users_ending": (["adapt", "m", "pairs.csv", "--out", "u.txt"], "--out must end"),
    "splits": (["quickstart", "--splits", "0"], "--splits must be at least 1"),
    "no_command": (["fut"], "No such command 'fut'"),
    "no_option": (["fit", "pairs.csv", "--colour", "red"], "No such option"),
    "no_out": (["fit", "pairs.csv"], "Missing option '--out'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, lore_command, name):
    pathlib.Path("rows.csv").write_text("user,chosen,rejected\na,0,1\na,3,12\n")
    pathlib.Path("half.npy").write_bytes(pathlib.Path("x.npy").read_bytes()[:-4])
    pathlib.Path("few.txt").write_text("a\nb\n")
    pathlib.Path("twice.txt").write_text("a\na\n")
    pathlib.Path("twelve.txt").write_text("\n".join("abcdefghijkl"))
    arguments, message = BAD[name]
    code, out, err = lore_command(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"lore: .*{message}.*\n", err), err
    assert not pathlib.Path("m.safetensors").exists()


def test_bad_input_beside_a_model(model, lore_command):
    data = ("--features", "x.npy")
    other = lore.load(model)
    other = other.model.replace(basis=other.model.basis + 1)
    adapted = lore.adapt(other, preferences())
    for name in ("o.safetensors", "o.csv"):
        users.write_users(pathlib.Path(name), adapted, np.ones(4), other)
    text = pathlib.Path("o.csv").read_text().splitlines()
    pathlib.Path("wrong.csv").write_text("\n".join([text[0], '"zoe",1,0.5,0.9,0.9']))
    pathlib.Path("zoe.csv").write_text("user,chosen,rejected\nzoe,0,1\n")
    whole = pathlib.Path(model).read_bytes()
    pathlib.Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    changed = bytearray(whole)
    changed[-1] ^= 1
    pathlib.Path("changed.safetensors").write_bytes(changed)
    score = ("score", model, "new.jsonl", *data)
    for arguments, message in (
        ((*score, "--user", "zoe"), "'zoe', which is not in the users"),
        (score, "give --user NAME, or a column user"),
        ((*score, "--user", "ann", "--top", "0"), "--top must be at least 1"),
        ((*score, "--user", "ann", "--users", "o.safetensors"), "another model"),
        ((*score, "--user", "zoe", "--users", "wrong.csv"), "wrong.csv is damaged"),
        (("evaluate", model, "zoe.csv", *data), "user 'zoe' has no weights: run lore"),
        (("evaluate", "half.safetensors", "zoe.csv", *data), "half.safetensors is tru"),
        (("evaluate", "changed.safetensors", "zoe.csv", *data), "is damaged: the dige"),
    ):
        code, out, err = lore_command(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"lore: .*{message}.*\n", err), err


@pytest.mark.parametrize("name", ["", *app._COMMANDS])
def test_help_has_an_example(lore_command, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    code, said, _ = lore_command(*([name] if name else []), "--help")
    assert code == 0
    example = app._EXAMPLES[name or "fit"]
    assert re.search(rf"Example:\s+{re.escape(example)}", said)
    options = re.findall(r"--[a-z]+", example)
    if name:
        assert all(re.search(rf"{option}\b", said) for option in options)


def test_without_arguments_there_is_help(lore_command):
    code, said, err = lore_command()
    assert (code, err) == (0, "")
    assert "evaluate" in said


def test_verbose_shows_the_traceback(lore_command):
    code, _, err = lore_command("--verbose", "evaluate", "no.safetensors", "x.csv")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("lore: ")


def test_a_bar_on_a_terminal_and_lines_in_a_log(folder, lore_command, monkeypatch):
    call = ("fit", "pairs.csv", *FIT, "--out", "m.safetensors")
    assert "step/s" in lore_command(*call, "--progress")[2]
    monkeypatch.setattr("lore_jax.cli.options.on_terminal", lambda: True)
    assert "step/s" in lore_command(*call)[2]
    assert "step/s" not in lore_command(*call, "--no-progress")[2]


def test_warnings_are_lines_of_the_log(lore_command, monkeypatch):
    import warnings

    def warn(*_, **__):
        warnings.warn("first line\nsecond", UserWarning, stacklevel=1)
        return {"x": float("nan")}

    monkeypatch.setattr(quickstart, "run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = lore_command("quickstart", "--json")
    assert (code, out) == (0, '{"x": null}\n')  # JSON has no NaN.
    assert re.fullmatch(r"\d\d:\d\d:\d\d first line second\n", err)


def run_python(code, **settings):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        **settings,
    )


def test_the_library_does_not_import_the_command():
    done = run_python(
        "import sys, lore_jax\n"
        "names = ('lore_jax.cli', 'lore_jax.hf', 'typer', 'pyarrow', 'tqdm')\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_without_typer_one_line_says_what_to_install():
    done = run_python(
        "import sys; sys.modules['typer'] = None\n"
        "from lore_jax.cli.main import main; sys.exit(main(['fit']))"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"lore: .*pip install 'lore_jax\[cli\]'.*typer.*\n", done.stderr
    )


def test_the_wheel_has_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["lore"].split(":")
    assert getattr(importlib.import_module(module), function) is main.main
    command = [sys.executable, "-m", "lore_jax.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"lore_jax {lore.__version__}\n")
    extras = project["optional-dependencies"]
    assert any(x.startswith("typer") for x in extras["cli"])


# --- the quickstart --------------------------------------------------------------


def test_the_quickstart_of_the_experiments_is_the_commands(monkeypatch):
    from experiments import quickstart as experiment

    calls = []
    monkeypatch.setattr(quickstart, "run", lambda *args: calls.append(args))
    experiment.main(["--splits", "2", "--rank", "3", "--out", "here"])
    experiment.main([])
    default = pathlib.Path("runs/quickstart")
    assert calls == [(2, 3, pathlib.Path("here"), print), (4, 2, default, print)]
    with pytest.raises(SystemExit, match="2"):
        experiment.main(["--splits", "0"])


def few_votes():
    """Votes of the 40 people with most of them, on the 40 statements with most."""
    votes = lore.data.load_bowling_green()
    people = np.argsort(-np.bincount(votes.user), kind="stable")[:40]
    items = np.argsort(-np.bincount(votes.item), kind="stable")[:40]
    keep = np.isin(votes.user, people) & np.isin(votes.item, items)
    return votes._replace(
        features=votes.features[items],
        user=np.argsort(people)[np.searchsorted(np.sort(people), votes.user[keep])],
        item=np.argsort(items)[np.searchsorted(np.sort(items), votes.item[keep])],
        vote=votes.vote[keep],
        text=votes.text[items],
        user_ids=votes.user_ids[people],
        item_ids=votes.item_ids[items],
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_quickstart_says_and_writes_two_tables(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra 'quickstart'")
    monkeypatch.setattr(quickstart, "SHOTS", (0, None))
    few = lore.Marginal(num_steps=2, num_starts=1, search=lore.Search(ridges=(1.0,)))
    monkeypatch.setattr(lore, "Marginal", lambda **_: few)
    fit = lore.fit
    monkeypatch.setattr(
        lore, "fit", lambda p, recipe=None, **k: fit(p, recipe=recipe or few, **k)
    )
    joint = lore.PublishedJoint(num_steps=5)
    monkeypatch.setattr(lore, "PublishedJoint", lambda: joint)
    lines = []
    found = quickstart.run(1, 2, tmp_path / "out", lines.append, few_votes())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    for holdout, title in quickstart.SETTINGS.items():
        assert (tmp_path / "out" / f"accuracy_{holdout}.png").stat().st_size > 1000
        table = lines.index(f"\nMacro accuracy over people on {title}, %")
        rows = lines[table + 3 : table + 3 + len(quickstart.METHODS)]
        for row, (name, said) in zip(rows, quickstart.METHODS.items()):
            assert row.startswith(said)
            seen = found[holdout]["accuracy"][name]["seen"]["mean"]
            assert float(re.search(r"\d+\.\d", row[25:]).group()) == round(seen, 1)


# --- texts -----------------------------------------------------------------------

TEXTS = [
    {"user": u, "prompt": f"{q}?", "chosen": f"yes {q}", "rejected": f"no {q}"}
    for u in "ab"
    for q in "xyz"
]


@pytest.fixture
def texts(folder):
    """A table of texts and a tiny reward model."""
    pytest.importorskip("torch", reason="needs the extra 'hf'")
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    sources.save_tiny(folder / "tiny")
    sources.write_jsonl(folder / "texts.jsonl", TEXTS)
    answers = [{"prompt": "x?", "response": text} for text in ("yes x", "maybe")]
    sources.write_jsonl(folder / "answers.jsonl", answers)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_texts_embedded_once_or_every_time_are_the_same(texts, lore_command):
    tiny = ("--model", "tiny", "--chat")
    rest = ("--rank", 1, "--steps", 3, "--recipe", "joint", "--out")
    code, said, err = lore_command(
        "embed", "texts.jsonl", *tiny, "--out", "e", "--json"
    )
    assert code == 0, err
    assert json.loads(said)["texts"] == 6
    features = ("--features", "e/features.npy")
    code, _, err = lore_command(
        "fit", "e/pairs.jsonl", *features, *rest, "a.safetensors"
    )
    assert code == 0, err
    code, _, err = lore_command("fit", "texts.jsonl", *tiny, *rest, "b.safetensors")
    assert code == 0, err
    found = [lore.load(f"{name}.safetensors") for name in "ab"]
    assert found[0].user_ids.tolist() == found[1].user_ids.tolist() == ["a", "b"]
    assert found[0].model.num_features == 16
    np.testing.assert_allclose(*(fit.model.basis for fit in found), rtol=1e-5)

    code, _, err = lore_command("embed", "answers.jsonl", *tiny, "--out", "r")
    assert code == 0, err
    once = ("r/responses.jsonl", "--features", "r/features.npy")
    said = [
        lore_command("score", "a.safetensors", *given, "--user", "a")[1]
        for given in (once, ("answers.jsonl", *tiny))
    ]
    scores = [[float(x.split("\t")[2]) for x in text.splitlines()] for text in said]
    assert len(scores[0]) == 2
    np.testing.assert_allclose(*scores, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_writes_what_transformers_reads(texts, lore_command):
    from transformers import AutoModelForSequenceClassification

    rest = ("--rank", 2, "--steps", 3, "--recipe", "joint", "--out", "m.safetensors")
    lore_command("fit", "texts.jsonl", "--model", "tiny", "--chat", *rest)
    for options, outputs in (((), 2), (("--user", "a"), 1)):
        out = f"exported {outputs}"
        code, said, err = lore_command(
            *("export", "m.safetensors", "--base", "tiny", "--out", out, "--json"),
            *options,
        )
        assert code == 0, err
        assert json.loads(said) == {"folder": out, "outputs": outputs}
        found = AutoModelForSequenceClassification.from_pretrained(out)
        assert found.config.num_labels == outputs
    code, _, err = lore_command(
        *("export", "m.safetensors", "--base", "tiny", "--out", "z", "--user", "zoe")
    )
    assert code == 2
    assert err.count("\n") == 1
    assert "zoe" in err


def test_tables_that_embed_wrote_are_read_in_bfloat16_and_only_whole(folder):
    values = np.arange(6, dtype=np.float32).reshape(3, 2).astype(jnp.bfloat16)
    np.save("features.npy", values.view(np.uint16))
    path, marker = pathlib.Path("features.npy"), {"rows": 3, "dtype": "bfloat16"}
    pathlib.Path("features.json").write_text(json.dumps({**marker, "done": 3}))
    found = tables.read_embeddings(path)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))
    pathlib.Path("features.json").write_text(json.dumps({**marker, "done": 2}))
    with pytest.raises(ValueError, match="not all of its rows are embedded"):
        tables.read_embeddings(path)


# --- parts -----------------------------------------------------------------------


def test_reports_are_lines_or_json():
    interval = lore.evaluation.Interval(0.5, 0.25, 1.0, 3)
    result = {"a": interval, "long": np.float32(2.0), "x": [1, 2], "p": np.arange(2)}
    assert output.report(result, False).splitlines()[:3] == [
        "a     0.5000 [0.2500, 1.0000]",
        "long  2.0000",
        "x     1, 2",
    ]
    found = json.loads(output.report({**result, "inf": np.inf}, True))
    assert found["a"] == {"mean": 0.5, "low": 0.25, "high": 1.0, "num_users": 3}
    assert (found["inf"], found["p"]) == (None, [0, 1])


@pytest.mark.parametrize(
    ("names", "known", "want"),
    [
        (["1", "-2"], np.array([1, -2]), [1, -2]),
        ([1, 2], np.array(["1", "2"]), ["1", "2"]),
        (["a"], np.array(["a", "bb"]), ["a"]),
    ],
)
def test_names_as_the_known_kind(names, known, want):
    assert inputs.like(names, known).tolist() == want
