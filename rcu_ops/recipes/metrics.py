"""Accuracy and mAP over many videos, one video at a time where the measure allows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rcu_ops.analysis import AccuracyReport, accuracy_report, frame_map

__all__ = ["accuracy_over", "mean_average_precision", "video_mean_average_precision"]


def accuracy_over(videos: Iterable[tuple[np.ndarray, int]]) -> AccuracyReport:
    """:func:`rcu_ops.analysis.accuracy_report` of (scores [K, outputs], label) pairs that need not fit in memory."""
    counts = np.zeros(6, dtype=np.int64)
    for scores, label in videos:
        one = accuracy_report([scores], [label])
        in_clips = [round(share * one.num_clips) for share in (one.clip_top1, one.clip_top5)]
        counts += [*in_clips, int(one.video_top1), int(one.video_top5), one.num_clips, 1]
    clip1, clip5, video1, video5, clips, total = counts.tolist()
    return AccuracyReport(clip1 / clips, clip5 / clips, video1 / total, video5 / total, clips, total)


def mean_average_precision(scores: Sequence[np.ndarray], present: Sequence[np.ndarray], every: int) -> float | None:
    """mAP@``every`` of per-frame scores and labels [K, T]; None if no class is present in any frame looked at."""
    if not any(labels[:, ::every].any() for labels in present):
        return None
    return frame_map(scores, present, every=every).mean


def video_mean_average_precision(scores: Iterable[np.ndarray], present: Sequence[np.ndarray]) -> float | None:
    """mAP of videos with several labels [K, 1], by the greatest of each video's scores [K, outputs]; None as above."""
    return mean_average_precision([outputs.max(axis=1, keepdims=True) for outputs in scores], present, 1)
