"""Early action prediction: accuracy of accumulated scores against the observed fraction (paper 1, Fig. 3a).

The class of a whole video is guessed from the sum of all scores up to time t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcu_ops import report
from rcu_ops.analysis._checks import check_count, check_labels, check_scores


def observed_frames(num_frames: int, step: int, steps: int) -> int:
    """Outputs observed after the fraction ``step / steps``: ``ceil(num_frames * step / steps)``, in integers.

    Rounded up, so that at least one output is observed at every step and all of them at the last one, however short
    the video.  ``1 <= step <= steps``, else ValueError.
    """
    num_frames, steps = check_count("num_frames", num_frames), check_count("steps", steps)
    if not 1 <= check_count("step", step) <= steps:
        raise ValueError(f"step: expected 1 to {steps}, got {step}")
    return -(-num_frames * step // steps)


def early_accuracy(scores: Sequence[Any], labels: Any, *, steps: int = 10) -> np.ndarray:
    """Top-1 accuracy at the observed fractions ``1/steps, 2/steps, ..., 1``.

    Args:
        scores: per video ``[K, T_v]``, lengths free; logits or probabilities (accumulated as they are, in float64).
        labels: class index per video ``[V]``.
        steps: number of fractions.

    Returns:
        float64 ``[steps]`` in 0..1.  Ties go to the lowest class index.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    videos = check_scores(scores)
    targets = check_labels(labels, len(videos), videos[0].shape[0])
    steps = check_count("steps", steps)
    correct = np.zeros(steps, dtype=np.int64)
    for video, target in zip(videos, targets, strict=True):
        observed = [observed_frames(video.shape[1], step, steps) for step in range(1, steps + 1)]
        accumulated = np.cumsum(video, axis=1, dtype=np.float64)[:, np.asarray(observed) - 1]
        correct += accumulated.argmax(axis=0) == target
    return correct / len(videos)


def write_csv(path: str | Path, curves: Mapping[str, np.ndarray], num_videos: int) -> None:
    """One row per model and fraction: ``model, observed_fraction, accuracy, videos``."""
    rows = [
        (name, (step + 1) / len(curve), float(value), num_videos)
        for name, curve in curves.items()
        for step, value in enumerate(curve)
    ]
    report.write_csv(path, ("model", "observed_fraction", "accuracy", "videos"), rows)


def plot(path: str | Path, curves: Mapping[str, np.ndarray]) -> None:
    """Accuracy in per cent against the observed part of the video in per cent, one line per model, as PNG."""
    figure, axes = report.new_figure()
    for index, (name, curve) in enumerate(curves.items()):
        observed = 100 * np.arange(1, len(curve) + 1) / len(curve)
        axes.plot(observed, 100 * np.asarray(curve), **report.series(index), label=name)
    axes.set_xlim(0, 103)
    axes.set_xticks(range(0, 101, 10))
    axes.set_xlabel("video observed (%)")
    axes.set_ylabel("accuracy of accumulated scores (%)")
    report.legend(axes, len(curves))
    report.save_figure(figure, path)
