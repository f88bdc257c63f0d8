"""Temporal alignment of two videos: cycle errors, the shift between them, the pictures of "Learn to Cycle"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops.analysis._pictures import heated, spread

__all__ = ["Alignment", "align_maps", "plot_alignment", "plot_distances"]


@dataclass(frozen=True)
class Alignment:
    """What two index maps say.

    Attributes:
        index_ab: int [T], the frame of B that each frame of A maps to. index_ba: int [S], the same from B to A.
        cycle_error_a: int [T], how many frames from its start the cycle A -> B -> A of each frame ends.
            cycle_error_b: int [S], the same from B.
        offset, speed: of the line ``index_ab[t] = offset + speed * t`` through the frames of A without cycle error,
            fitted by medians (Theil-Sen), which stragglers do not move; None if fewer than a quarter of A's frames (or
            than two) are such frames.
    """

    index_ab: np.ndarray
    index_ba: np.ndarray
    cycle_error_a: np.ndarray
    cycle_error_b: np.ndarray
    offset: float | None
    speed: float | None

    @property
    def consistent_a(self) -> np.ndarray:
        """Bool [T]: frames of A whose cycle ends where it began."""
        return self.cycle_error_a == 0

    @property
    def consistent_b(self) -> np.ndarray:
        """Bool [S]: the same for B."""
        return self.cycle_error_b == 0


def align_maps(index_ab: Any, index_ba: Any) -> Alignment:
    """Cycle errors and the fitted line of two index maps.

    Raises:
        ValueError: an empty map, or an index outside the other sequence.
    """
    ab, ba = np.asarray(index_ab, dtype=np.int64), np.asarray(index_ba, dtype=np.int64)
    for name, index, count in (("index_ab", ab, len(ba)), ("index_ba", ba, len(ab))):
        if index.ndim != 1 or index.size == 0 or index.min() < 0 or index.max() >= count:
            raise ValueError(f"{name}: expected indices from 0 to {count - 1}, got {index.tolist()}")
    error_a, error_b = ba[ab] - np.arange(len(ab)), ab[ba] - np.arange(len(ba))
    # Frames without a partner pile up somewhere in B; the cycle leads back to one of them at most.
    kept = np.flatnonzero(error_a == 0)
    offset = speed = None
    if kept.size >= max(2, len(ab) / 4):
        first, second = np.triu_indices(kept.size, 1)
        speed = float(np.median((ab[kept[second]] - ab[kept[first]]) / (kept[second] - kept[first])))
        offset = float(np.median(ab[kept] - speed * kept))
    return Alignment(ab, ba, error_a, error_b, offset, speed)


def plot_distances(
    path: str | Path, distances: Any, alignment: Alignment, *, names: tuple[str, str], title: str = ""
) -> None:
    """The map of squared distances [T,S], in units of their mean, with both index maps over it, as a PNG.

    The twentieth part that is largest is all white: a few frames unlike all others would leave the rest black.
    """
    from rcu_ops.report import INK, PALETTE, new_figure, save_figure

    distances = np.asarray(distances, dtype=np.float64)
    figure, axes = new_figure(6.4, 5.4)
    axes.grid(False)
    brightest = float(np.quantile(distances, 0.95))
    cut = brightest < distances.max()
    image = axes.imshow(distances, cmap="Greys_r", aspect="auto", interpolation="nearest", vmax=brightest)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, extend="max" if cut else "neither")
    bar.set_label("squared distance / its mean", size=10, color=INK)
    bar.ax.tick_params(labelsize=9, labelcolor=INK)
    t = np.arange(len(alignment.index_ab))
    axes.plot(alignment.index_ab, t, color=PALETTE[5], linewidth=1.6, label="A to B")
    axes.plot(
        np.arange(len(alignment.index_ba)), alignment.index_ba, ".", color=PALETTE[4], markersize=5, label="B to A"
    )
    wrong = ~alignment.consistent_a
    axes.plot(alignment.index_ab[wrong], t[wrong], "x", color=PALETTE[1], markersize=6, label="cycle error")
    axes.set_xlim(-0.5, distances.shape[1] - 0.5)
    axes.set_ylim(distances.shape[0] - 0.5, -0.5)
    axes.set_xlabel(f"frame of B, {names[1]}")
    axes.set_ylabel(f"frame of A, {names[0]}")
    axes.set_title(title, fontsize=11, loc="left", pad=26)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    save_figure(figure, path)


def plot_alignment(
    path: str | Path,
    frames_a: np.ndarray,
    frames_b: np.ndarray,
    saliency_a: np.ndarray,
    saliency_b: np.ndarray,
    alignment: Alignment,
    *,
    names: tuple[str, str],
    title: str = "",
    shown: int = 8,
) -> None:
    """Frames of A above, frames of B below, saliency under each, arrows from A to B and back, as a PNG.

    Args:
        frames_a, frames_b: uint8 [T,H,W,3] and [S,H,W,3] of one picture size.
        saliency_a, saliency_b: [T,H,W] and [S,H,W], from 0 to 1.
        alignment: of the two.
        names: of the videos. title: of the picture.
        shown: frames of A that are shown, evenly spaced; with them the frames of B that they map to and that those map
            back to.
    """
    from matplotlib.patches import FancyArrowPatch

    from rcu_ops.report import INK, PALETTE, new_figure, save_figure

    taken = spread(len(frames_a), shown)
    places_b = spread(len(frames_b), shown)
    width, height = 1.0, frames_a.shape[1] / frames_a.shape[2]
    gap = 0.12
    columns = max(len(taken), len(places_b), 5)  # titles and legend need the width of five
    across = columns * (width + gap) - gap
    between = 1.1 * height
    bottom_b = 0.0
    bottom_a = 2 * height + 2 * gap + between
    top = bottom_a + 2 * height + gap
    figure, axes = new_figure(1.35 * columns + 0.4, 1.35 * (top + 0.75))
    axes.set_axis_off()
    axes.set_xlim(-0.1, across + 0.1)
    axes.set_ylim(-0.6, top + 0.45)
    axes.set_aspect("equal")

    def centre(position: float, places: Sequence[int]) -> float:
        """Where a frame stands: the shown ones at their pictures, others between them."""
        x = [column * (width + gap) + width / 2 for column in range(len(places))]
        return float(np.interp(position, places, x))

    def strip(frames: np.ndarray, saliency: np.ndarray, places: Sequence[int], bottom: float, above: bool) -> None:
        for column, place in enumerate(places):
            left = column * (width + gap)
            for row, picture in enumerate((heated(frames[place], saliency[place]), frames[place])):
                low = bottom + row * (height + gap / 2)
                axes.imshow(picture, extent=(left, left + width, low, low + height), aspect="auto", zorder=1)
            y = bottom + 2 * height + gap / 2 + 0.07 if above else bottom - 0.07
            axes.text(left + width / 2, y, f"{place}", ha="center", va="bottom" if above else "top", size=9, color=INK)

    strip(frames_a, saliency_a, taken, bottom_a, True)
    strip(frames_b, saliency_b, places_b, bottom_b, False)
    start, end = bottom_a - 0.04, bottom_b + 2 * height + gap / 2 + 0.04
    for t in taken:
        colour = PALETTE[2] if alignment.consistent_a[t] else PALETTE[1]
        x_a, x_b = centre(t, taken), centre(alignment.index_ab[t], places_b)
        x_back = centre(t + alignment.cycle_error_a[t], taken)
        arrow: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "color": colour, "zorder": 3}
        axes.add_patch(FancyArrowPatch((x_a, start), (x_b, end), linewidth=1.5, shrinkA=0, shrinkB=0, **arrow))
        if not alignment.consistent_a[t]:
            bend: dict[str, Any] = {"connectionstyle": "arc3,rad=0.18", "linestyle": (0, (4, 2)), "linewidth": 1.0}
            axes.add_patch(FancyArrowPatch((x_b, end), (x_back, start), shrinkA=0, shrinkB=0, **bend, **arrow))
    axes.text(0, top + 0.2, f"A  {names[0]}", size=10, color=INK, weight="bold")
    axes.text(0, -0.4, f"B  {names[1]}", size=10, color=INK, weight="bold")
    good = int(alignment.consistent_a[taken].sum())
    for colour, y, text in (
        (PALETTE[2], -0.3, f"→ cycle-consistent ({good} of those shown)"),
        (PALETTE[1], -0.5, f"→ cycle error ({len(taken) - good})"),
    ):
        axes.text(across, y, text, size=9, color=colour, ha="right")
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    save_figure(figure, path)
