"""Draws `docs/quickstart.svg` from the first table of `docs/results.md`.

python docs/figure.py
"""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
PAIRS = ("0", "1", "3", "5", "10", "20", "all")
LOOK = {  # first words of a table row: (label, colour, marker, dashes)
    "global Bradley–Terry": ("global Bradley–Terry", "0.45", "", ":"),
    "published joint recipe": ("published joint recipe", "#D55E00", "s", "--"),
    "lore_jax default": ("lore_jax default", "#0072B2", "o", "-"),
    "lore_jax, `holdout` as here": (
        'lore_jax, holdout="judgements"',
        "#009E73",
        "^",
        "-.",
    ),
}


def read_rows(text: str) -> dict[str, list[list[float]]]:
    """The numbers of every cell of the first table: {method: [[mean, …], …]}."""
    rows = {}
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group()
    for line in table.splitlines()[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        numbers = [re.findall(r"[+-]?\d+\.\d+", cell) for cell in cells]
        rows[name.strip("*")] = [[float(x) for x in cell] for cell in numbers]
    return rows


def main(path: pathlib.Path = HERE / "quickstart.svg") -> None:
    """Writes the figure; the same numbers give the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = read_rows((HERE / "results.md").read_text(encoding="utf-8"))
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (label, color, marker, dashes)) in enumerate(LOOK.items()):
        cells = rows[name][1:]  # the first column is of seen people
        assert len(cells) == len(PAIRS)
        means = [cell[0] for cell in cells]
        look = dict(color=color, label=label, marker=marker, linestyle=dashes)
        axes.plot(range(len(PAIRS)), means, **look, markersize=4.5, linewidth=1.5)
        low, high = cells[-1][1:]
        axes.vlines(len(PAIRS) - 1 + 0.07 * (number - 1.5), low, high, color=color)
    axes.set_xticks(range(len(PAIRS)), PAIRS)
    axes.set_xlabel("pairs that an unseen person has shown")
    axes.set_ylabel("accuracy on known statements, %")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "lore_jax"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
