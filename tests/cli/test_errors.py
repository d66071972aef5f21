"""The command `lore`: bad input, help, logs, what is not installed."""

import importlib
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from cli_cases import FIT, preferences

import lore_jax as lore

pytest.importorskip("typer", reason="needs the extra 'cli'")
pytest.importorskip("pyarrow", reason="needs the extra 'cli'")
pytest.importorskip("tqdm", reason="needs the extra 'cli'")


from lore_jax.cli import app, main, quickstart, users

pytestmark = pytest.mark.filterwarnings("ignore:too few pairs:UserWarning")


ROOT = pathlib.Path(lore.__file__).parent.parent


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
    "null_first": (
        ["fit", "null.jsonl", *FIT, "--out", "m.safetensors"],
        "null.jsonl, row 0: must be an object of columns, got None",
    ),
    "seed": (
        ["fit", "pairs.csv", *FIT, "--seed", "9" * 20, "--out", "m.safetensors"],
        "Invalid value for '--seed'",
    ),
    "no_option": (["fit", "pairs.csv", "--colour", "red"], "No such option"),
    "no_out": (["fit", "pairs.csv"], "Missing option '--out'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, lore_command, name):
    pathlib.Path("rows.csv").write_text("user,chosen,rejected\na,0,1\na,3,12\n")
    pathlib.Path("half.npy").write_bytes(pathlib.Path("x.npy").read_bytes()[:-4])
    pathlib.Path("few.txt").write_text("a\nb\n")
    pathlib.Path("null.jsonl").write_text("null\n{}\n")
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
    short = [line.rsplit(",", 1)[0] for line in text]
    pathlib.Path("short.csv").write_text("\n".join(short))
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
        ((*score, "--users", "short.csv"), "missing columns .*'weight_1'.*found"),
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
