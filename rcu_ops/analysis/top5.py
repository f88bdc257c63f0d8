"""The five best classes of single videos beside a picture of each (Fig. 4 of both LSTM papers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.analysis.fusion import softmax

__all__ = ["best_classes", "plot"]

TRUTH, RIGHT, WRONG = report.PALETTE[0], report.PALETTE[2], report.PALETTE[1]


def best_classes(scores: Any, count: int = 5) -> list[tuple[int, float]]:
    """The best classes of one video with their probabilities, best first; ties go to the lower index.

    Args:
        scores: the video's score vector [K], before any softmax.
        count: how many.
    """
    probabilities = softmax(scores)
    return [(int(index), float(probabilities[index])) for index in np.argsort(-probabilities, kind="stable")[:count]]


def plot(
    path: str | Path,
    videos: Sequence[str],
    pictures: Mapping[str, np.ndarray],
    models: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, int],
    names: Sequence[str],
) -> None:
    """One row per video: its picture under its true class (blue), and for every model the five best classes as bars.

    A bar is green where its class is the true one, and red otherwise; its length is the probability.

    Args:
        path: the PNG.
        videos: which, from top to bottom.
        pictures: uint8 [H,W,3] of the videos that have one.
        models: for every model the score vector [K] of every video.
        labels: the true class of every video.
        names: of the classes.
    """
    figure, grid = report.new_figure(
        3.0 + 3.4 * len(models),
        0.3 + 1.9 * len(videos),
        nrows=len(videos),
        ncols=1 + len(models),
        squeeze=False,
        width_ratios=[1.0, *[1.15] * len(models)],
    )
    for row, video in enumerate(videos):
        axes = grid[row, 0]
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        if video in pictures:
            axes.imshow(pictures[video])
        else:
            axes.text(0.5, 0.5, video, ha="center", va="center", transform=axes.transAxes, fontsize=8)
        box = {"facecolor": TRUTH, "edgecolor": "none", "pad": 2.5}
        axes.set_title(names[labels[video]], fontsize=9, color="white", bbox=box)
        for column, (model, scores) in enumerate(models.items(), start=1):
            axes = grid[row, column]
            axes.grid(False)
            best = best_classes(scores[video])
            colours = [RIGHT if index == labels[video] else WRONG for index, _ in best]
            axes.barh(range(len(best)), [share for _, share in best], color=colours, height=0.75, alpha=0.55)
            for place, (index, share) in enumerate(best):
                axes.text(
                    0.02, place, f"{names[index]}  {100 * share:.1f} %", va="center", fontsize=8, color=report.INK
                )
            axes.set_xlim(0, 1)
            axes.set_ylim(4.6, -0.6)
            axes.set_yticks([])
            axes.set_xticks([])
            if row == 0:
                axes.set_title(model, fontsize=10, color=report.INK)
    report.save_figure(figure, path)
