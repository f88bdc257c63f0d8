"""Accuracy of ten regularly sampled segments relative to the first (paper 1, Fig. 3b).

The outputs of a video are cut into equal segments, each segment is classified from the mean of its own scores, and the
accuracy of the first segment is subtracted.  A network that remembers improves towards the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.analysis._checks import check_count, check_labels, check_scores

MODES = ("unrolled", "sliding")


def segment_bounds(num_frames: int, segment: int, segments: int = 10) -> tuple[int, int]:
    """Outputs ``[start, stop)`` of one segment, in integer arithmetic.

    ``start = segment * num_frames // segments`` and ``stop = (segment + 1) * num_frames // segments``: the segments
    cover the video without gap or overlap and differ in length by one at most.  A video with fewer outputs than
    segments has no output for some of them; such a segment takes the one output at ``start``, so that every video
    counts in every segment and the accuracies stay comparable.
    """
    num_frames, segments = check_count("num_frames", num_frames), check_count("segments", segments)
    if not 0 <= segment < segments:
        raise ValueError(f"segment: expected 0 to {segments - 1}, got {segment}")
    start = segment * num_frames // segments
    return start, max(start + 1, (segment + 1) * num_frames // segments)


def segment_accuracy(scores: Sequence[Any], labels: Any, *, segments: int = 10) -> np.ndarray:
    """Top-1 accuracy of every segment, float64 ``[segments]`` in 0..1.

    Args:
        scores: per video ``[K, T_v]``; outputs are frames (unrolled) or clips in temporal order (sliding window).
        labels: class index per video ``[V]``.
        segments: how many; videos with fewer outputs follow the rule of :func:`segment_bounds`.

    Ties go to the lowest class index.  Subtract element 0 for the relative accuracy of the figure.
    """
    videos = check_scores(scores)
    targets = check_labels(labels, len(videos), videos[0].shape[0])
    segments = check_count("segments", segments)
    correct = np.zeros(segments, dtype=np.int64)
    for video, target in zip(videos, targets, strict=True):
        for segment in range(segments):
            start, stop = segment_bounds(video.shape[1], segment, segments)
            correct[segment] += video[:, start:stop].mean(axis=1, dtype=np.float64).argmax() == target
    return correct / len(videos)


@dataclass(frozen=True)
class SegmentCurve:
    """Accuracy per segment of one model on one kind of input (``"unrolled"`` or ``"sliding"``)."""

    model: str
    mode: str
    accuracy: np.ndarray
    num_videos: int
    short_videos: int
    """Videos with fewer outputs than segments."""

    @property
    def relative(self) -> np.ndarray:
        """Accuracy minus that of the first segment."""
        return self.accuracy - self.accuracy[0]


def segment_curve(
    model: str, scores: Sequence[Any], labels: Any, *, mode: str = "unrolled", segments: int = 10
) -> SegmentCurve:
    """:func:`segment_accuracy` with what the table and the picture need beside it."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    accuracy = segment_accuracy(scores, labels, segments=segments)
    short = sum(video.shape[1] < segments for video in check_scores(scores))
    return SegmentCurve(model, mode, accuracy, len(scores), short)


def write_csv(path: str | Path, curves: Sequence[SegmentCurve]) -> None:
    """One row per curve and segment (counted from 1), accuracies in 0..1."""
    rows = [
        (
            c.model,
            c.mode,
            segment + 1,
            float(c.accuracy[segment]),
            float(c.relative[segment]),
            c.num_videos,
            c.short_videos,
        )
        for c in curves
        for segment in range(len(c.accuracy))
    ]
    header = ("model", "input", "segment", "accuracy", "relative_accuracy", "videos", "short_videos")
    report.write_csv(path, header, rows)


def plot(path: str | Path, curves: Sequence[SegmentCurve]) -> None:
    """Relative accuracy in percentage points per segment; one colour per model, dashed for sliding windows, as PNG."""
    figure, axes = report.new_figure()
    colours: Mapping[str, int] = {
        name: index for index, name in enumerate(dict.fromkeys(curve.model for curve in curves))
    }
    axes.axhline(0, color=report.GREY, linewidth=0.8)
    for curve in curves:
        style = report.series(colours[curve.model])
        if curve.mode == "sliding":
            style |= {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
        axes.plot(
            range(1, len(curve.relative) + 1), 100 * curve.relative, **style, label=f"{curve.model}, {curve.mode}"
        )
    count = max(len(curve.accuracy) for curve in curves)
    axes.set_xticks(report.integer_ticks(count))
    axes.set_xlabel("segment of the video")
    axes.set_ylabel("accuracy relative to segment 1 (points)")
    report.legend(axes, len(curves))
    report.save_figure(figure, path)
