"""Curves with intervals that survive a grey printer.

Marker, dash and shade differ beside colour. Colours are Okabe and Ito's, which the
colour-blind tell apart. Every function writes a `.png` and a `.pdf` and touches no
global state of matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"),
    *("#56B4E9", "#E69F00", "#7F7F7F"),
)
MARKERS = "osD^vPX*"
DASHES = (
    *("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), ":"),
    (0, (7, 2, 1, 2)),
)


def line_look(number: int) -> tuple:
    """(colour, marker, dash) of a series: the first 512 differ from one another."""
    place, again = number % len(COLORS), number // len(COLORS)
    markers, dashes = len(MARKERS), len(DASHES)
    marker = MARKERS[(place + again) % markers]
    return COLORS[place], marker, DASHES[(place + again + again // markers) % dashes]


def shots_figure(
    path, curves: Mapping[str, Sequence], *, flat: Mapping[str, Sequence] | None = None,
    xlabel: str = "pairs shown by a new user",
    ylabel: str = "accuracy on held-out pairs, %", title: str = "",
) -> list[Path]:  # fmt: skip
    """Curves with shaded intervals over categories such as shots or ranks.

    Args:
      path: where to write; the ending is replaced.
      curves: {label: [(x, mean, low, high), …]}, shares of 1. All x that occur are
          categories in order of size; text such as "all" comes last.
      flat: {label: (mean, low, high)} drawn as horizontal lines.
      xlabel: of the categories.
      ylabel: of the values.
      title: above the axes.

    Returns:
      The files written.
    """
    figure = new_figure(6.2, 3.8)
    axes = figure.add_subplot()
    draw_curves(axes, curves, flat or {})
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    add_legend(figure, axes)
    return save(figure, path)


def draw_curves(axes, curves: Mapping, flat: Mapping) -> None:
    """Draw curves and horizontal lines on given axes; see `shots_figure`."""
    places = {point[0] for points in curves.values() for point in points}
    order = sorted(places, key=lambda x: (isinstance(x, str), x))
    for number, (label, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda point: order.index(point[0]))
        x = [order.index(point[0]) for point in points]
        mean, low, high = 100 * np.array([point[1:] for point in points]).T
        color, marker, dash = line_look(number)
        if len(order) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        else:  # a single point has no band
            x = [0.02 * (number - (len(curves) - 1) / 2)]
            axes.vlines(x, low, high, color=color, linewidth=1)
        axes.plot(
            x, mean, color=color, label=label, markersize=4.5, linewidth=1.4,
            marker=marker, linestyle=dash,
        )  # fmt: skip
    for number, (label, (mean, low, high)) in enumerate(flat.items()):
        shade = f"{0.15 + 0.55 * number / max(len(flat), 1):.2f}"
        axes.axhspan(100 * low, 100 * high, color=shade, alpha=0.08, linewidth=0)
        axes.axhline(
            100 * mean, color=shade, linewidth=1.2, label=label,
            linestyle=(0, (1 + 3 * number, 1.5)),
        )  # fmt: skip
    axes.set_xticks(range(len(order)), [str(x) for x in order])
    axes.margins(x=0.04)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure, path) -> list[Path]:
    """Write `.png` and `.pdf`, without dates, so equal figures are equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(end) for end in (".png", ".pdf")]
    figure.savefig(files[0], dpi=200)
    figure.savefig(files[1], metadata={"CreationDate": None})
    return files


def new_figure(width: float, height: float):
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure, axes) -> None:
    """One legend beside all axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
