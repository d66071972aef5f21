"""Every code block of the README runs, and every command names what exists."""

import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """(line, code) of each fenced block."""
    pattern = rf"^```{language}[^\n]*\n(.*?)^```"
    for match in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        yield README[: match.start()].count("\n") + 2, match.group(1)


def commands():
    """(line, command) out of fenced shell blocks and indented command lines."""
    lines = [
        (first + n, text)
        for first, code in blocks("(?:bash|sh|console)")
        for n, text in enumerate(code.splitlines())
    ]
    starts = ("pip ", "python ", "pytest", "git ", "cd ", "bash ", ".ci/")
    fenced = False
    for number, text in enumerate(README.splitlines(), 1):
        fenced ^= text.startswith("```")
        if not fenced and text.startswith("    ") and text.strip().startswith(starts):
            lines.append((number, text))
    for number, text in lines:
        text = text.split("#")[0].strip().removeprefix("$ ")
        for command in re.split(r"&&|\|\||;|\|", text):
            if command.strip():
                yield number, command.strip()


def test_the_readme_has_code_and_is_short():
    assert list(blocks("python"))
    assert list(commands())
    assert len(README.splitlines()) <= 150


def test_python_blocks_run_in_order(tmp_path):
    """In a process of their own, compiled as users compile them."""
    script = ""
    for line, code in blocks("python"):  # Line numbers stay those of the README.
        script += "\n" * (line - 1 - script.count("\n")) + code
    (tmp_path / "README.py").write_text(script, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "error", "README.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr


def test_commands_name_modules_and_files_that_exist():
    for line, command in commands():
        words = command.split()
        for flag, name in itertools.pairwise(words):
            if flag == "-m" and not name.startswith("-"):
                spec = importlib.util.find_spec(name)
                assert spec is not None, f"line {line}: no module {name}"
        for word in words:
            if re.fullmatch(r"[\w./-]+\.(py|sh|toml|md)|\.ci/\w+", word):
                assert (ROOT / word).exists(), f"line {line}: no file {word}"


def test_the_two_commands_are_there_and_the_first_installs_no_gigabytes():
    text = README.replace("'", '"')
    assert 'pip install -e ".[quickstart]" && python -m experiments.quickstart' in text
    assert 'pip install -e ".[test]" && pytest' in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    heavy = re.compile("torch|transformers|datasets")
    assert not [name for name in extras["quickstart"] if heavy.match(name)]
    named = " ".join(extras["experiments"])
    for name in ("quickstart", "transformers", "torch", "datasets", "safetensors"):
        assert name in named


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", README)))
)
def test_links_inside_the_repository_lead_somewhere(target):
    assert (ROOT / target.split("#")[0]).exists()


def test_no_path_of_a_machine():
    assert not re.search(r"/(home|tmp|root|Users)/", README)
    assert os.sep + "mnt" + os.sep not in README
