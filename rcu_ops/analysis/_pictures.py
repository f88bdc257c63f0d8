"""Parts of pictures of frames."""

from __future__ import annotations

import numpy as np


def spread(count: int, shown: int) -> list[int]:
    """At most ``shown`` evenly spaced indices from the first to the last."""
    if count <= shown:
        return list(range(count))
    return [round(k * (count - 1) / (shown - 1)) for k in range(shown)]


def heated(picture: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The picture [H,W,3] in grey with its salient areas (saliency [H,W], from 0 to 1) in colour: floats [H,W,3]."""
    import matplotlib

    grey = picture.astype(np.float64).mean(-1, keepdims=True) / 255 * 0.75
    colour = matplotlib.colormaps["inferno"](np.clip(saliency, 0, 1))[..., :3]
    strength = np.clip(saliency, 0, 1)[..., None] * 0.85
    return grey * (1 - strength) + colour * strength
