"""Frame-wise mean average precision of dense multi-label scores (paper 1, §5.4 and Table 4: mAP@1 and mAP@8).

Average precision of a class is taken over all frames of all videos together; mAP@n looks at every n-th frame of each
video, and is the mean over the classes that have at least one positive frame among those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.analysis._checks import check_count, check_scores, to_numpy


def average_precision(scores: Any, positive: Any) -> float:
    """Average precision of one ranking.

    ``AP = sum_k (R_k - R_{k-1}) P_k`` over the distinct score values in falling order, with precision and recall of
    "score >= value".  Frames with equal scores enter together, so the result does not depend on their order; without
    ties it is the mean of the precision at the rank of every positive.

    Args:
        scores: real ``[n]``, finite.
        positive: bool or 0 / 1 ``[n]``.

    Returns:
        a float in 0..1, NaN if nothing is positive.
    """
    values = to_numpy(scores)
    truth = _as_bool(to_numpy(positive), "positive")
    if values.ndim != 1 or values.shape != truth.shape:
        raise ValueError(
            f"scores, positive: expected two vectors of one length, got {list(values.shape)} and {list(truth.shape)}"
        )
    if not np.isfinite(values).all():
        raise ValueError("scores: expected finite numbers, got NaN or infinity")
    total = int(truth.sum())
    if total == 0:
        return float("nan")
    order = np.argsort(values)[::-1]
    ranked = values[order]
    last_of_group = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), ranked.size - 1)
    hits = np.cumsum(truth[order])[last_of_group]
    precision = hits / (last_of_group + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / total)


@dataclass(frozen=True)
class DetectionResult:
    """Average precision of every class at one sampling of the frames."""

    every: int
    average_precision: np.ndarray
    """float64 ``[K]`` in 0..1, NaN for a class without positives."""
    positives: np.ndarray
    """int64 ``[K]``: positive frames among those looked at."""
    num_frames: int
    num_videos: int

    @property
    def excluded(self) -> tuple[int, ...]:
        """Classes without a positive frame, which the mean leaves out."""
        return tuple(int(k) for k in np.flatnonzero(self.positives == 0))

    @property
    def mean(self) -> float:
        """mAP in 0..1 over the classes that are not excluded."""
        return float(self.average_precision[self.positives > 0].mean())


def frame_map(
    scores: Sequence[Any], labels: Sequence[Any], *, every: int = 1, frames: Sequence[Any] | None = None
) -> DetectionResult:
    """Frame-wise mAP over all videos, at every frame (``every=1``) or every n-th.

    Args:
        scores: per video ``[K, T_v]``.
        labels: per video ``[K, T_v]``, bool or 0 / 1: which classes are present in each frame.
        every: frames 0, n, 2n, ... of each video are looked at.
        frames: per video ``[T_v]`` frame numbers, for scores that do not start at frame 0 or have holes (frames that a
            live stream dropped); by default output t is frame t.

    Raises:
        ValueError: shapes that differ, labels other than 0 and 1, or no positive frame in any class.
        TypeError: a dtype that cannot be used.
    """
    videos = check_scores(scores)
    every = check_count("every", every)
    if len(labels) != len(videos):
        raise ValueError(f"labels: expected one per video, {len(videos)}, got {len(labels)}")
    if frames is not None and len(frames) != len(videos):
        raise ValueError(f"frames: expected one per video, {len(videos)}, got {len(frames)}")
    picked, truths = [], []
    for index, video in enumerate(videos):
        truth = _as_bool(to_numpy(labels[index]), f"labels[{index}]")
        if truth.shape != video.shape:
            raise ValueError(f"labels[{index}]: expected shape {list(video.shape)}, got {list(truth.shape)}")
        number = np.arange(video.shape[1]) if frames is None else to_numpy(frames[index])
        if number.shape != video.shape[1:] or number.dtype.kind not in "iu":
            raise ValueError(
                f"frames[{index}]: expected {video.shape[1]} integers, got {list(number.shape)} of {number.dtype}"
            )
        keep = number % every == 0
        picked.append(video[:, keep])
        truths.append(truth[:, keep])
    positives = sum(truth.sum(axis=1, dtype=np.int64) for truth in truths)
    if not np.any(positives):
        raise ValueError("labels: expected at least one positive frame among those looked at, got none")
    # One class at a time: a vector of all frames is small, the matrix of all classes need not exist twice.
    precision = np.array(
        [
            average_precision(
                np.concatenate([video[k] for video in picked]), np.concatenate([truth[k] for truth in truths])
            )
            for k in range(videos[0].shape[0])
        ]
    )
    num_frames = sum(video.shape[1] for video in picked)
    return DetectionResult(every, precision, np.asarray(positives), num_frames, len(videos))


def _as_bool(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected bool or numbers 0 and 1, got dtype {array.dtype}")
    if array.dtype.kind != "b" and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name}: expected only 0 and 1, got other values")
    return array.astype(bool)


def write_csv(
    path: str | Path, results: Mapping[str, Sequence[DetectionResult]], classes: Sequence[str] | None = None
) -> None:
    """One row per model, sampling and class, then a row ``mean``; the average precision of an excluded class is empty.

    Columns ``model, every, class, name, average_precision, positives, frames``.
    """
    rows: list[tuple[Any, ...]] = []
    for model, samplings in results.items():
        for result in samplings:
            for k, value in enumerate(result.average_precision):
                shown = float(value) if result.positives[k] else ""
                rows.append(
                    (
                        model,
                        result.every,
                        k,
                        _class_name(k, classes),
                        shown,
                        int(result.positives[k]),
                        result.num_frames,
                    )
                )
            rows.append((model, result.every, "mean", "", result.mean, int(result.positives.sum()), result.num_frames))
    header = ("model", "every", "class", "name", "average_precision", "positives", "frames")
    report.write_csv(path, header, rows)


def plot(
    path: str | Path, results: Mapping[str, Sequence[DetectionResult]], classes: Sequence[str] | None = None
) -> None:
    """Average precision per class as a dot plot, best class of the first model on top, as PNG.

    One colour per model; the first sampling is filled, the others hollow; the mAP stands in the legend.
    """
    first = next(iter(results.values()))[0]
    shown = np.flatnonzero(first.positives > 0)
    shown = shown[np.argsort(first.average_precision[shown], kind="stable")]
    figure, axes = report.new_figure(width=6.4, height=max(2.4, 1.3 + 0.17 * len(shown)))
    rows = np.arange(len(shown))
    for index, (model, samplings) in enumerate(results.items()):
        style = report.series(index)
        for position, result in enumerate(samplings):
            values = 100 * result.average_precision[shown]
            axes.plot(
                values,
                rows,
                linestyle="none",
                marker=style["marker"],
                markersize=5 if position == 0 else 7,
                color=style["color"],
                markerfacecolor=style["color"] if position == 0 else "none",
                zorder=3 - position * 0.1,
                label=f"{model}  mAP@{result.every} {100 * result.mean:.1f} %",
            )
            axes.axvline(
                100 * result.mean, color=style["color"], linewidth=0.9, linestyle="-" if position == 0 else (0, (4, 2))
            )
    axes.set_yticks(rows, [_class_name(int(k), classes) or f"class {k}" for k in shown])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(-0.8, len(shown) - 0.2)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("average precision (%)")
    axes.legend(
        frameon=False, fontsize=9, labelcolor=report.INK, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    report.save_figure(figure, path)


def _class_name(k: int, classes: Sequence[str] | None) -> str:
    return classes[k] if classes is not None else ""
