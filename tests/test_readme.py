"""Code of the README and of docs/ runs; commands and links name what exists.

The limits of the README's length are here too.
"""

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
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CHECKED = [README, *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
CHECKED += sorted((ROOT / "experiments").rglob("README.md"))
TABLE = re.compile(r"(?:^\|.*(?:\n|\Z))+", re.MULTILINE)


def name(path):
    return path.relative_to(ROOT).as_posix()


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(text, language):
    """(line, code) of each fenced block."""
    pattern = rf"^```{language}[^\n]*\n(.*?)^```"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match.group(1)


def commands(text):
    """(line, command) out of fenced shell blocks and indented command lines."""
    lines = [
        (first + n, line)
        for first, code in blocks(text, "(?:bash|sh|console)")
        for n, line in enumerate(code.splitlines())
    ]
    starts = ("pip ", "python ", "pytest", "ruff ", "git ", "cd ", "bash ", ".ci/")
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced and line.startswith("    ") and line.strip().startswith(starts):
            lines.append((number, line))
    for number, line in lines:
        line = line.split("#")[0].strip().removeprefix("$ ")
        for command in re.split(r"&&|\|\||;|\|", line):
            if command.strip():
                yield number, command.strip()


def prose(text):
    """What is left without fenced and indented code, tables and addresses of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    text = TABLE.sub("", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


by_page = pytest.mark.parametrize("path", CHECKED, ids=name)


def test_the_readme_is_short():
    text = read(README)
    left = prose(text)
    assert len(left.split()) <= 600
    without_code = re.sub(r"`[^`]*`", "", left)
    assert len(re.findall(r"\d[\d,.]*", without_code)) <= 40
    paragraphs = re.split(r"\n\s*\n|\n(?=- |#)", left)
    assert max(len(paragraph.split()) for paragraph in paragraphs) <= 80
    tables = TABLE.findall(text)
    assert len(tables) == 2  # results and speed
    for table in tables:
        rows = table.strip().splitlines()
        assert len(rows) - 1 <= 6  # with the heading, without the line below it
        assert {row.count("|") - 1 for row in rows} <= set(range(6))
    assert len(re.findall(r"!\[", text)) == 1
    (code,) = (code for _, code in blocks(text, "python"))
    assert len(code.splitlines()) <= 15


@pytest.mark.parametrize(
    "path", [p for p in (README, *DOCS) if "```python" in read(p)], ids=name
)
@pytest.mark.slow
def test_python_blocks_run_in_order(path, tmp_path):
    """In a process of their own; the README's as users compile them."""
    script = ""
    for line, code in blocks(read(path), "python"):  # Line numbers stay the page's.
        script += "\n" * (line - 1 - script.count("\n")) + code
    (tmp_path / "page.py").write_text(script, encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    if path == README:
        environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-W", "error", "page.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr


def test_most_pages_have_code():
    with_code = {path.stem for path in DOCS if "```python" in read(path)}
    assert with_code >= {"own_data", "recipes", "serving"}


@by_page
def test_commands_name_modules_and_files_that_exist(path):
    from experiments.__main__ import COMMANDS

    for line, command in commands(read(path)):
        words = command.split()
        for flag, module in itertools.pairwise(words):
            if flag != "-m" or module.startswith("-"):
                continue
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{module}.__main__")
            assert spec is not None, f"line {line}: no module {module}"
            if module == "experiments":
                verb, data = words[words.index(module) + 1 :][:2]
                assert verb in COMMANDS, f"line {line}: no command {verb}"
                assert (ROOT / "experiments" / data / "prepare.py").exists()
        for word in words:
            if re.fullmatch(r"[\w./-]+\.(py|sh|toml|md)|\.ci/\w+", word):
                assert (ROOT / word).exists(), f"line {line}: no file {word}"


def test_the_two_commands_are_there_and_the_first_installs_no_gigabytes():
    text = read(README).replace("'", '"')
    assert 'pip install -e ".[quickstart]" && python -m experiments.quickstart' in text
    assert 'pip install -e ".[test]" && pytest' in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    heavy = re.compile("torch|transformers|datasets")
    assert not [extra for extra in extras["quickstart"] if heavy.match(extra)]
    named = " ".join([*extras["experiments"], *extras["hf"]])
    for extra in (
        "[quickstart,hf]",
        "transformers",
        "torch",
        "datasets",
        "safetensors",
    ):
        assert extra in named


@by_page
def test_links_inside_the_repository_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", read(path))
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(read(target)), link


def test_every_page_is_in_the_index():
    found = set(re.findall(r"\]\((\w+\.md)\)", read(ROOT / "docs" / "index.md")))
    assert found == {path.name for path in DOCS} - {"index.md"}


def test_the_figure_is_drawn_from_the_table_and_small(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "figure.py"), str(tmp_path / "new.svg")],
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr
    for path in (tmp_path / "new.svg", ROOT / "docs" / "quickstart.svg"):
        assert 1000 < path.stat().st_size < 100_000


def rows_of(table):
    """{method: cells} of a Markdown table."""
    rows = [
        [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        for line in table.strip().splitlines()[2:]
    ]
    return {method: cells for method, *cells in rows}


def test_results_of_the_readme_are_those_of_the_full_tables():
    full = TABLE.findall(read(ROOT / "docs" / "results.md"))
    known, new = map(rows_of, full[:2])
    short = rows_of(TABLE.findall(read(README))[0])
    assert len(short) == 5
    for method, cells in short.items():
        method = method.replace("as tested", "as here")
        of_known = [known[method][column] for column in (2, 4, 7)]
        assert cells == [*of_known, new[method][7]], method


@by_page
def test_no_path_of_a_machine(path):
    text = read(path)
    assert not re.search(r"/(home|tmp|root|Users)/", text)
    assert os.sep + "mnt" + os.sep not in text
