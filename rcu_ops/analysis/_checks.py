"""Shared checks of scores and labels, so that every analysis refuses the same things in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_numpy(value: Any) -> np.ndarray:
    """``value`` as an array on the host; tensors may live anywhere, require grad, and be bfloat16."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def check_scores(scores: Sequence[Any]) -> list[np.ndarray]:
    """Every video's scores as a floating-point ``[K, T_v]`` array with one K and T_v >= 1.

    Raises ValueError for no videos, a wrong shape, differing K, no outputs, NaN or infinity; TypeError for a dtype
    that is not a real number.
    """
    checked: list[np.ndarray] = []
    for video, value in enumerate(scores):
        array = to_numpy(value)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"scores[{video}]: expected real numbers, got dtype {array.dtype}")
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"scores[{video}]: expected shape [K, T] with K, T >= 1, got {list(array.shape)}")
        if checked and array.shape[0] != checked[0].shape[0]:
            raise ValueError(
                f"scores[{video}]: expected {checked[0].shape[0]} classes as in scores[0], got {array.shape[0]}"
            )
        if array.dtype.kind != "f":
            array = array.astype(np.float64)
        elif array.dtype == np.float16:
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"scores[{video}]: expected finite numbers, got NaN or infinity")
        checked.append(array)
    if not checked:
        raise ValueError("scores: expected at least one video, got none")
    return checked


def check_labels(labels: Any, num_videos: int, num_classes: int) -> np.ndarray:
    """One class index per video as int64 ``[V]``; ValueError or TypeError naming what is wrong."""
    array = to_numpy(labels)
    if array.shape != (num_videos,):
        raise ValueError(f"labels: expected one per video, shape [{num_videos}], got {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got dtype {array.dtype}")
    outside = np.flatnonzero((array < 0) | (array >= num_classes))
    if outside.size:
        video = int(outside[0])
        raise ValueError(f"labels[{video}]: expected 0 to {num_classes - 1}, got {int(array[video])}")
    return array.astype(np.int64)


def check_count(name: str, value: Any) -> int:
    """``value`` as a positive int; TypeError or ValueError naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)
