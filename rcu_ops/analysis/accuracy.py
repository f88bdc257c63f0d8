"""Clip and video accuracy, top-1 and top-5 (paper 1, §5.1).

A video is classified from the mean of the scores of ten regularly spaced clips, or, unrolled, from the mean of all
per-frame scores; clip accuracy counts every clip (or frame) by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rcu_ops import report
from rcu_ops.analysis._checks import check_count, check_labels, check_scores, to_numpy
from rcu_ops.video.sample import regular_clips


class FrameScorer(Protocol):
    """What :func:`score_unrolled` needs of a network."""

    def frame_scores(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip ``[N, 3, T, H, W]`` to one score vector per output ``[N, K, T']``."""


def topk_correct(scores: Any, labels: Any, k: int) -> np.ndarray:
    """Whether each label is among the k best classes: scores ``[n, K]``, labels ``[n]`` to bool ``[n]``.

    Ties go to the lower class index, so exactly k classes are among the k best; with ``k >= K`` all are.
    """
    values = to_numpy(scores)
    if values.ndim != 2:
        raise ValueError(f"scores: expected shape [n, K], got {list(values.shape)}")
    targets = check_labels(labels, *values.shape)
    k = check_count("k", k)
    own = values[np.arange(len(values)), targets][:, None]
    ahead = (values > own) | ((values == own) & (np.arange(values.shape[1]) < targets[:, None]))
    return ahead.sum(axis=1) < k


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracies in 0..1 with the counts they were taken over."""

    clip_top1: float
    clip_top5: float
    video_top1: float
    video_top5: float
    num_clips: int
    num_videos: int


def accuracy_report(scores: Sequence[Any], labels: Any) -> AccuracyReport:
    """Clip and video accuracy.

    Args:
        scores: per video ``[K, clips]`` (one column per clip), or unrolled ``[K, T_v]`` (a "clip" is then one frame).
        labels: class index per video ``[V]``.

    Every clip counts once in the clip accuracy, every video once in the video accuracy; the average over a video's
    clips is taken in float64.
    """
    videos = check_scores(scores)
    targets = check_labels(labels, len(videos), videos[0].shape[0])
    clips = np.concatenate([video.T for video in videos])
    clip_targets = np.repeat(targets, [video.shape[1] for video in videos])
    means = np.stack([video.mean(axis=1, dtype=np.float64) for video in videos])
    return AccuracyReport(
        clip_top1=float(topk_correct(clips, clip_targets, 1).mean()),
        clip_top5=float(topk_correct(clips, clip_targets, 5).mean()),
        video_top1=float(topk_correct(means, targets, 1).mean()),
        video_top5=float(topk_correct(means, targets, 5).mean()),
        num_clips=len(clips),
        num_videos=len(videos),
    )


@torch.no_grad()
def score_clips(
    model: Callable[[torch.Tensor], torch.Tensor],
    video: torch.Tensor,
    clip_frames: int,
    *,
    num_clips: int = 10,
    period: int = 1,
) -> torch.Tensor:
    """Scores ``[K, num_clips]`` of regularly spaced clips of one video ``[3, T, H, W]``, one clip at a time.

    Which frames: :func:`rcu_ops.video.sample.regular_clips`, every ``period``-th frame in a clip.

    ``model`` maps ``[1, 3, clip_frames, H, W]`` to ``[1, K]``.  For a sliding window take ``num_clips`` large enough
    that neighbouring clips overlap.
    """
    _check_video(video)
    indices = regular_clips(video.shape[1], clip_frames, num_clips, stride=period).to(video.device)
    return torch.stack([model(video[:, clip].unsqueeze(0)).squeeze(0) for clip in indices], dim=1)


@torch.no_grad()
def score_unrolled(model: FrameScorer, video: torch.Tensor) -> torch.Tensor:
    """Scores ``[K, T']`` of a network unrolled over one whole video ``[3, T, H, W]``."""
    _check_video(video)
    return model.frame_scores(video.unsqueeze(0)).squeeze(0)


def _check_video(video: torch.Tensor) -> None:
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(f"video: expected shape [3, T, H, W] without empty dimensions, got {list(video.shape)}")


def write_csv(path: str | Path, reports: Sequence[tuple[str, AccuracyReport]]) -> None:
    """One row per model, accuracies in 0..1."""
    header = ("model", "clip_top1", "clip_top5", "video_top1", "video_top5", "clips", "videos")
    rows = [
        (name, r.clip_top1, r.clip_top5, r.video_top1, r.video_top5, r.num_clips, r.num_videos) for name, r in reports
    ]
    report.write_csv(path, header, rows)


def plot(path: str | Path, reports: Sequence[tuple[str, AccuracyReport]]) -> None:
    """One line of four dots per model (clip and video, top-1 and top-5), as PNG."""
    figure, axes = report.new_figure(height=1.4 + 0.5 * len(reports))
    rows = np.arange(len(reports))[::-1]
    for index, (key, text) in enumerate(
        (
            ("clip_top1", "clip top-1"),
            ("video_top1", "video top-1"),
            ("clip_top5", "clip top-5"),
            ("video_top5", "video top-5"),
        )
    ):
        values = [100 * getattr(each, key) for _, each in reports]
        style = report.series(index // 2)
        filled = key.startswith("video")
        axes.plot(
            values,
            rows,
            linestyle="none",
            marker=style["marker"],
            markersize=8,
            color=style["color"],
            markerfacecolor=style["color"] if filled else "white",
            label=text,
        )
        if filled:
            for value, row in zip(values, rows, strict=True):
                axes.annotate(
                    f"{value:.1f}",
                    (value, row),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=report.INK,
                )
    axes.set_yticks(rows, [name for name, _ in reports])
    axes.set_ylim(-0.6, len(reports) - 0.4)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("accuracy (%)")
    axes.legend(
        frameon=False, fontsize=9, labelcolor=report.INK, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    report.save_figure(figure, path)
