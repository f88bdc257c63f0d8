"""Confusion matrices ordered by coarse category, their difference, and the change per class.

Figs. 5 and 6 and Table 3 of the residual RNN paper; Fig. 3 of the Relational LSTM paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.analysis._checks import check_labels, check_scores

__all__ = [
    "Confusion",
    "category_accuracy",
    "category_order",
    "confusion",
    "per_class_change",
    "plot_change",
    "plot_confusion",
    "write_csv",
]

_MOST_NAMES = 60


@dataclass(frozen=True)
class Confusion:
    """Counts of videos, int64 [K,K]: rows are true classes, columns the classes they were taken for."""

    counts: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Every row divided by its sum, float64; rows of classes without a video are zero."""
        totals = self.counts.sum(axis=1, keepdims=True)
        return np.divide(self.counts, totals, out=np.zeros(self.counts.shape), where=totals > 0)

    @property
    def recall(self) -> np.ndarray:
        """Accuracy of every class, float64 [K]; NaN for a class without a video."""
        totals = self.counts.sum(axis=1)
        return np.divide(self.counts.diagonal(), totals, out=np.full(len(totals), np.nan), where=totals > 0)


def confusion(scores: Sequence[Any], labels: Any) -> Confusion:
    """Count for every class what its videos are taken for, from the mean of each video's scores [K,T].

    Ties go to the lowest class index.
    """
    videos = check_scores(scores)
    classes = videos[0].shape[0]
    targets = check_labels(labels, len(videos), classes)
    counts = np.zeros((classes, classes), dtype=np.int64)
    for video, target in zip(videos, targets, strict=True):
        counts[target, video.mean(axis=1, dtype=np.float64).argmax()] += 1
    return Confusion(counts)


def category_order(categories: Sequence[str]) -> list[int]:
    """Class indices grouped by category, categories as they first appear, classes in their own order within one."""
    names = list(dict.fromkeys(categories))
    return sorted(range(len(categories)), key=lambda index: (names.index(categories[index]), index))


def category_accuracy(found: Confusion, categories: Sequence[str]) -> dict[str, tuple[float, int]]:
    """For every category the share of its videos that were classified rightly (as a class), and their number."""
    result = {}
    for name in dict.fromkeys(categories):
        rows = [index for index, category in enumerate(categories) if category == name]
        videos = int(found.counts[rows].sum())
        right = int(found.counts[rows, rows].sum())
        result[name] = (right / videos if videos else float("nan"), videos)
    return result


def per_class_change(before: Confusion, after: Confusion) -> np.ndarray:
    """Accuracy of every class after minus before, float64 [K]; NaN for a class without a video.

    Raises:
        ValueError: the matrices do not count the same videos per class.
    """
    if not np.array_equal(before.counts.sum(axis=1), after.counts.sum(axis=1)):
        raise ValueError("after: expected the same number of videos per class as before")
    return after.recall - before.recall


def write_csv(path: str | Path, matrix: np.ndarray, names: Sequence[str], order: Sequence[int]) -> None:
    """A matrix [K,K] with class names along both sides, rows and columns in ``order``."""
    rows = [[names[i], *(matrix[i, j].item() for j in order)] for i in order]
    report.write_csv(path, ["true \\ taken for", *(names[j] for j in order)], rows)


def plot_confusion(
    path: str | Path,
    matrix: np.ndarray,
    names: Sequence[str],
    categories: Sequence[str] | None = None,
    *,
    difference: bool = False,
    title: str = "",
) -> None:
    """A matrix of rates [K,K] as a picture, ordered by category; ``difference`` for one of changes from -1 to 1."""
    order = list(range(len(names))) if categories is None else category_order(categories)
    shown = 100 * matrix[np.ix_(order, order)]
    count = len(order)
    side = min(11.0, 4.2 + 0.16 * min(count, _MOST_NAMES))
    figure, axes = report.new_figure(side + 1.2, side)
    axes.grid(False)
    limit = max(1.0, float(np.abs(shown).max())) if difference else 100.0
    image = axes.imshow(
        shown,
        cmap="RdBu" if difference else "Blues",
        vmin=-limit if difference else 0.0,
        vmax=limit,
        interpolation="nearest",
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("change (percentage points)" if difference else "share of the true class (%)", fontsize=9)
    if count <= _MOST_NAMES:
        size = max(4, min(8, 320 // count))
        axes.set_xticks(range(count), [names[i] for i in order], rotation=90, fontsize=size)
        axes.set_yticks(range(count), [names[i] for i in order], fontsize=size)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    if categories is not None:
        held = [categories[i] for i in order]
        starts = [i for i in range(count) if i == 0 or held[i] != held[i - 1]]
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            if start:
                axes.axhline(start - 0.5, color=report.GREY, linewidth=0.8)
                axes.axvline(start - 0.5, color=report.GREY, linewidth=0.8)
            axes.text((start + stop - 1) / 2, -0.9, held[start], rotation=30, fontsize=8, ha="left", va="bottom")
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    if title:
        figure.suptitle(title, fontsize=11)
    report.save_figure(figure, path)


def plot_change(path: str | Path, change: np.ndarray, names: Sequence[str], *, top: int | None = None) -> None:
    """Change of accuracy per class as bars, the largest gain first; ``top``: only that many classes of largest gain."""
    kept = [index for index in np.argsort(-change, kind="stable") if np.isfinite(change[index])][:top]
    figure, axes = report.new_figure(7.0, 1.2 + 0.2 * len(kept))
    values = 100 * change[kept]
    axes.barh(range(len(kept)), values, color=[report.PALETTE[1 if value < 0 else 0] for value in values], height=0.7)
    axes.axvline(0, color=report.INK, linewidth=0.8)
    axes.set_yticks(range(len(kept)), [names[index] for index in kept], fontsize=8)
    axes.set_ylim(len(kept) - 0.4, -0.6)
    room = 0.16 * max(1.0, float(np.abs(values).max(initial=0.0)))
    axes.set_xlim(min(0.0, float(values.min(initial=0.0))) - room, max(0.0, float(values.max(initial=0.0))) + room)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:+.1f}",
            (value, place),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=7,
            color=report.INK,
        )
    axes.set_xlabel("change of accuracy (percentage points)")
    report.save_figure(figure, path)
