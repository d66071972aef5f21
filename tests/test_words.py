"""No word of the old glossary is left, in code, docstrings or pages."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("lore_jax", "experiments", "benchmarks", "docs")
PAGES = [
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))),
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md"))),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
]
OLD = {
    r"reward floor|on_floor|checked_floor|(?<![.\w])floor\b": "projected rewards",
    r"\bspread_losses\b|\bspread=|\.spread\b|spreads\b": "variance_scale, std",
    r"\bMixture\(|\bmixture_of\b": "PosteriorMoments",
    r"\breference (head|config|recipe|form)": "base reward head, published",
    r"\breference_(joint|alternating)\b": "Published…",
    r"\bsized\(|\bapart\(|\btwice_over\b|\b_?room\b": "tuning, capacity, …",
    r"\bFAST\b|\bCAREFUL\b|\bcareful (solver|one)\b|\bfast solver\b": "primal_dual, …",
    r"\brows_of\b|\bknown_of\b|\blikeliest\b|\bsomeone_else\b|\bAlone\b": "see STYLE",
    r"\bsurely\b": "by two standard errors",
    r"\b(TrainConfig|AdaptConfig|start_users)\b|\blore\.observe\b": "recipes, methods",
    r"called back|gone on from|each of which then works it out": "plain words",
    r"Read plainly|not to be seen here|\bstaircase\b": "plain words",
    r"\bprefs\.weight\b": "sample_weight",
}
TABLE_WORDS = {"reward_bench.py"}  # RewardBench's own "spread" of tied answers


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_old_word_is_left(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":
        return
    for pattern, instead in OLD.items():
        if path.name in TABLE_WORDS and "spread" in pattern:
            continue
        found = re.search(pattern, text)
        line = "" if found is None else text[: found.start()].count("\n") + 1
        assert found is None, f"line {line}: {found.group()!r} ({instead})"


def test_every_file_of_the_library_is_looked_at():
    assert len([p for p in PAGES if p.suffix == ".py"]) > 60
