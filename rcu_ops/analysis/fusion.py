"""Fusion of streams: of features (mid) and of scores (late), by sum, product or weights.

Products are not renormalised. Whether scores are probabilities is the caller's choice: late fusion of the residual RNN
paper takes softmax scores, that of the Relational LSTM paper weighs the scores before any softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rcu_ops.analysis._checks import to_numpy

__all__ = ["HOWS", "fuse", "softmax", "video_scores"]

HOWS = ("sum", "product", "weighted")


def softmax(scores: Any, axis: int = 0) -> np.ndarray:
    """Probabilities along an axis, float64."""
    values = to_numpy(scores).astype(np.float64)
    exponentials = np.exp(values - values.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def video_scores(scores: Any) -> np.ndarray:
    """One score vector of a video, float64 [K]: the mean over its outputs [K,T]."""
    return to_numpy(scores).mean(axis=1, dtype=np.float64)


def fuse(streams: Sequence[Any], how: str = "sum", weights: Sequence[float] | None = None) -> np.ndarray:
    """Element-wise fusion of equally shaped arrays, float64: features [T,F] (mid fusion) or scores (late fusion).

    Args:
        streams: two or more arrays of real numbers.
        how: "sum" (``u + v``), "product" (``u * v``) or "weighted" (``w_1 u + w_2 v``, as 1.5 flow + 1 RGB).
        weights: one number per stream, for "weighted" alone.

    Raises:
        ValueError: fewer than two streams, shapes that differ, an unknown ``how``, weights that do not fit it.
    """
    arrays = [to_numpy(stream).astype(np.float64) for stream in streams]
    if how not in HOWS:
        raise ValueError(f"how: expected one of {', '.join(HOWS)}, got {how!r}")
    if len(arrays) < 2:
        raise ValueError(f"streams: expected two or more, got {len(arrays)}")
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"streams[{index}]: expected {list(arrays[0].shape)} as in streams[0], got {list(array.shape)}"
            )
    if (weights is not None) != (how == "weighted"):
        raise ValueError(f"weights: expected {'one per stream' if weights is None else 'none'} for {how!r}")
    if weights is not None:
        if len(weights) != len(arrays) or not np.isfinite(weights).all():
            raise ValueError(f"weights: expected {len(arrays)} finite numbers, got {list(weights)}")
        arrays = [weight * array for weight, array in zip(weights, arrays, strict=True)]
    combine = np.multiply if how == "product" else np.add
    result = arrays[0]
    for array in arrays[1:]:
        result = combine(result, array)
    return result
