"""Where the gates of a Relational LSTM look from one position, as numbers and as pictures over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops.analysis._pictures import heated, spread

__all__ = ["GATES", "SOURCES", "looked_at", "plot_relations"]

GATES = ("i", "f", "o", "g")
SOURCES = ("current", "memory")

_NAMES = ("input gate", "forget gate", "output gate", "new content")


def looked_at(weights: Any) -> np.ndarray:
    """As how many equally weighted positions the weights [...,h,w] are spread out: ``(sum |w|)^2 / sum w^2``, [...]."""
    size = np.abs(np.asarray(weights, dtype=np.float64)).reshape(*np.shape(weights)[:-2], -1)
    squares = np.square(size).sum(-1)
    return np.where(squares > 0, size.sum(-1) ** 2 / np.where(squares > 0, squares, 1), 0.0)


def plot_relations(
    path: str | Path,
    frames: np.ndarray,
    weights: np.ndarray,
    cell: tuple[int, int],
    *,
    labels: Sequence[str],
    title: str = "",
    shown: int = 6,
) -> None:
    """One row per frame: the frame, and over it where each gate looks in it and in the memory of the frame before.

    Every map is stretched to its own largest weight, which stands below it with the number of positions that it is
    spread over (:func:`looked_at`).

    Args:
        frames: uint8 [T,H,W,3].
        weights: [T,2,4,h,w], sources as in :data:`SOURCES`, gates as in :data:`GATES`.
        cell: row and column of the position that looks.
        labels: of the frames.
        title: of the picture.
        shown: rows, evenly spaced frames.

    Raises:
        ValueError: arrays of other shapes, a cell outside of the maps.
    """
    from matplotlib.patches import Rectangle

    from rcu_ops.report import GREY, INK, PALETTE, new_figure, save_figure

    count, height, width = frames.shape[:3]
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 5 or weights.shape[:3] != (count, 2, 4) or len(labels) != count:
        raise ValueError(
            f"weights: expected [T,2,4,h,w] for the {count} frames and {len(labels)} labels, got {list(weights.shape)}"
        )
    rows, columns = weights.shape[3:]
    if not (0 <= cell[0] < rows and 0 <= cell[1] < columns):
        raise ValueError(f"cell: expected a row and a column of {rows} x {columns}, got {cell}")
    places = spread(count, shown)
    side = height / width  # of a picture one wide
    across, down, gap = 1.12, side + 0.36, 0.3
    left = [
        0.0,
        *(across + gap + across * gate for gate in range(4)),
        *(5 * across + 2 * gap + across * g for g in range(4)),
    ]
    right, bottom = left[-1] + 1, down * len(places)
    figure, axes = new_figure(1.25 * right + 0.3, 1.25 * (bottom + 0.95))
    axes.set_axis_off()
    axes.set_xlim(0, right)
    axes.set_ylim(bottom, -0.75)
    axes.set_aspect("equal")
    for first, text in ((1, "in the current frame"), (5, "in memory, drawn over the frame before")):
        axes.text(left[first], -0.52, text, size=10, color=INK, weight="bold")
        for gate, name in enumerate(_NAMES):
            axes.text(left[first + gate] + 0.5, -0.24, name, size=9, color=INK, ha="center")
    spread_over = looked_at(weights)
    cell_width, cell_height = 1 / columns, side / rows

    def show(picture: np.ndarray, x: float, y: float) -> None:
        axes.imshow(picture, extent=(x, x + 1, y + side, y), aspect="equal", interpolation="nearest")
        corner = (x + cell[1] * cell_width, y + cell[0] * cell_height)
        axes.add_patch(Rectangle(corner, cell_width, cell_height, fill=False, edgecolor=PALETTE[1], linewidth=1.4))

    for row, t in enumerate(places):
        y = row * down
        show(frames[t], left[0], y)
        axes.text(left[0], y - 0.04, labels[t], size=8, color=INK, va="bottom")
        for source, gate in np.ndindex(2, 4):
            x = left[1 + 4 * source + gate]
            if source == 1 and t == 0:
                axes.text(x + 0.5, y + side / 2, "no memory\nyet", size=8, color=GREY, ha="center", va="center")
                continue
            found = np.abs(weights[t, source, gate])
            largest = found.max()
            stretched = found / largest if largest > 0 else found
            show(heated(frames[t - source], _enlarged(stretched, height, width)), x, y)
            text = f"max {largest:.2g}, over {spread_over[t, source, gate]:.1f}"
            axes.text(x + 0.5, y + side + 0.03, text, size=7, color=GREY, ha="center", va="top")
    # imshow has set the limits to its last picture.
    axes.set_xlim(0, right)
    axes.set_ylim(bottom, -0.75)
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    save_figure(figure, path)


def _enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Every cell of [h,w] as the pixels [height,width] that it stands for."""
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    return values[rows][:, columns]
