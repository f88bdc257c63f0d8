"""The course of a video's class scores as a picture, kept in bounded memory however long the video runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops.report import GREY, INK, PALETTE, save_figure, tidy
from rcu_ops.video.draw import require_matplotlib

__all__ = ["ScoreHistory", "plot_timeline"]


class ScoreHistory:
    """Class probabilities over time, thinned as they come: at most ``limit`` moments are kept, evenly spread.

    When the store is full every second moment is dropped, and from then on only every second new one is kept.
    """

    def __init__(self, limit: int = 4096) -> None:
        if limit < 2:
            raise ValueError(f"limit: expected at least 2, got {limit}")
        self._limit = limit
        self._stride = 1
        self._seen = 0
        self._rows: list[tuple[float, np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, time_seconds: float, running: np.ndarray, instant: np.ndarray) -> None:
        """Add the probabilities [classes] of the video so far, and those of this frame alone or the cost so far [1]."""
        if self._seen % self._stride == 0:
            self._rows.append((time_seconds, running.astype(np.float32), instant.astype(np.float32)))
            if len(self._rows) >= self._limit:
                self._rows = self._rows[::2]
                self._stride *= 2
        self._seen += 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times [n], running probabilities [n, classes], and what was added beside them [n, classes] or [n, 1]."""
        times, running, instant = zip(*self._rows, strict=True)
        return np.asarray(times), np.stack(running), np.stack(instant)


def plot_timeline(
    path: str | os.PathLike[str],
    history: ScoreHistory,
    labels: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    warning: str = "",
    top: int = 5,
    cost: bool = False,
) -> None:
    """Draw the scores of the leading classes over time to a PNG.

    The upper panel is the score of the video so far (softmax of the mean over all frames up to each moment), the
    lower panel that of every frame alone. The classes are those that lead at the end.

    Networks of clips have no score of a frame alone: with ``cost`` the lower panel is what has been computed up to
    each moment, in 1e9 multiply-accumulates, and what the history holds beside the scores.

    Args:
        history: at least one moment.
        labels: of all classes.
        title, subtitle: said above; ``warning`` in a warning colour beside them.
        top: number of classes.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times, running, instant = history.arrays()
    leading = np.argsort(-running[-1], kind="stable")[: min(top, len(PALETTE))]

    figure = Figure(figsize=(10, 5.6), facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2], "hspace": 0.16, "left": 0.075, "right": 0.745,
                                        "top": 0.85, "bottom": 0.1}
    )  # fmt: skip
    single: dict[str, Any] = {"marker": "o", "markersize": 4} if len(times) == 1 else {}
    for colour, index in zip(PALETTE, leading, strict=False):
        name = labels[index] if len(labels[index]) <= 21 else labels[index][:20].rstrip() + "…"
        label = f"{100 * running[-1, index]:.1f} %  {name}"
        upper.plot(times, running[:, index], color=colour, linewidth=2, label=label, **single)
        if not cost:
            lower.plot(times, instant[:, index], color=colour, linewidth=0.9, alpha=0.9, **single)
    if cost:
        lower.plot(times, instant, color=GREY, linewidth=1.4, **single)
    beside = instant if cost else instant[:, leading]
    for axes, name, values in ((upper, "video so far", running[:, leading]), (lower, "each frame", beside)):
        highest = float(values.max())
        axes.set_xlim(times[0], times[-1] if times[-1] > times[0] else times[0] + 1)
        if axes is lower and cost:
            axes.set_ylim(0, highest * 1.12)
            axes.set_ylabel("GMAC so far")
        else:
            axes.set_ylim(0, min(1.02, highest * 1.12) if highest > 0 else 1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
            axes.set_ylabel(name)
        tidy(axes)
    lower.set_xlabel("time (s)")
    upper.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=9, labelcolor=INK)
    figure.text(0.075, 0.945, title, fontsize=13, fontweight="bold", va="center")
    figure.text(0.075, 0.895, subtitle, fontsize=9.5, color="#5A606B", va="center")
    if warning:
        figure.text(
            0.985, 0.945, warning, fontsize=10, fontweight="bold", color="#7A4A00", ha="right", va="center",
            bbox={"boxstyle": "round,pad=0.4", "facecolor": "#FFE3B0", "edgecolor": "none"},
        )  # fmt: skip
    save_figure(figure, Path(path))
