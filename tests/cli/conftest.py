"""The command, and a folder to run it in."""

import logging
import pathlib

import numpy as np
import pytest
from cli_cases import FIT, PAIRS

from lore_jax.cli import main


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


@pytest.fixture
def model(folder, lore_command):
    """A fitted model in the folder."""
    code, _, err = lore_command("fit", "pairs.csv", *FIT, "--out", "m.safetensors")
    assert code == 0, err
    return "m.safetensors"
