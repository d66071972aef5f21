"""Figures that survive a grey printer: marker, dash and shade differ beside colour.

Every function writes a ``.png`` and a ``.pdf`` and touches no global state of
matplotlib.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lore_jax.cli.figures import (
    COLORS,
    add_legend,
    draw_curves,
    new_figure,
    save,
)
from lore_jax.cli.figures import DASHES as DASHES
from lore_jax.cli.figures import line_look as line_look
from lore_jax.cli.figures import shots_figure as shots_figure

HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++", "oooo")


def area_look(number: int) -> tuple[str, str]:
    """(colour, hatch) of an area: the first 64 differ from one another."""
    place, again = number % len(COLORS), number // len(COLORS)
    return COLORS[place], HATCHES[(place + again) % len(HATCHES)]


def rank_figure(
    path, panels: Mapping[str, tuple[Mapping, Mapping]], *, title: str = ""
) -> list[Path]:
    """Accuracy against rank: {panel: (curves, flat)} side by side, one legend."""
    figure = new_figure(3.4 * len(panels) + 2.4, 3.6)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (name, (curves, flat)) in enumerate(panels.items()):
        draw_curves(axes[place], curves, flat)
        axes[place].set(xlabel="rank K", title=name)
    axes[0].set_ylabel("accuracy on held-out pairs, %")
    if title:
        figure.suptitle(title)
    add_legend(figure, axes[-1])
    return save(figure, path)


def weights_figure(path, weights, mean=None, *, title: str = "") -> list[Path]:
    """Everybody's mixture weights, stacked, users sorted by their largest direction.

    Args:
        path: where to write.
        weights: float[U, K] on the simplex.
        mean: float[K] the population's mean, or None for the mean of ``weights``.
        title: above the axes.
    """
    weights = np.asarray(weights, np.float64)
    mean = weights.mean(0) if mean is None else np.asarray(mean)
    names = np.argsort(-mean, kind="stable")
    weights, mean = weights[:, names], mean[names]
    largest = weights.argmax(1)
    size = -weights[:, 0] if weights.shape[1] == 2 else -weights.max(1)
    weights = weights[np.lexsort((size, largest))]
    figure = new_figure(6.2, 3.4)
    axes, side = figure.subplots(1, 2, sharey=True, width_ratios=[9, 1])
    edges = np.concatenate([np.zeros((len(weights), 1)), weights.cumsum(1)], axis=1)
    tops = np.concatenate([[0.0], mean.cumsum()])
    x = np.arange(len(weights) + 1)
    for k, name in enumerate(names):
        color, hatch = area_look(k)
        look = {"facecolor": color, "edgecolor": "white", "hatch": hatch}
        look.update(linewidth=0, alpha=0.85)
        low, high = (np.append(edges[:, j], edges[-1, j]) for j in (k, k + 1))
        axes.fill_between(x, low, high, step="post", label=f"direction {name}", **look)
        side.bar([0], [tops[k + 1] - tops[k]], bottom=[tops[k]], width=0.8, **look)
    axes.set(xlabel="users, sorted", ylabel="mixture weight", ylim=(0, 1), title=title)
    axes.set_xlim(0, len(weights))
    side.set_xticks([0], ["mean"])
    add_legend(figure, axes)
    return save(figure, path)


def cosines_figure(path, basis, head=None, *, title: str = "") -> list[Path]:
    """Cosines between directions, and with the base reward head if there is one.

    Args:
        path: where to write.
        basis: float[D, K].
        head: float[D] or None.
        title: above the axes.
    """
    columns = np.asarray(basis, np.float64).T
    names = [str(k) for k in range(len(columns))]
    if head is not None:
        columns = np.concatenate([columns, np.asarray(head, np.float64)[None]])
        names.append("head")
    norms = np.linalg.norm(columns, axis=1, keepdims=True)
    unit = columns / np.maximum(norms, 1e-30)
    cosines = unit @ unit.T
    size = 1.8 + 0.34 * len(names)
    figure = new_figure(size + 1.0, size)
    axes = figure.add_subplot()
    image = axes.imshow(cosines, cmap="PuOr", vmin=-1, vmax=1)
    if len(names) <= 12:
        for (i, j), value in np.ndenumerate(cosines):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6,
                      color=color)  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="direction", ylabel="direction", title=title)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.85)
    return save(figure, path)
