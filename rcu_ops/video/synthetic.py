"""A short clip made from arithmetic: coloured shapes that move, the same on every machine and in every run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from rcu_ops.video.write import VideoWriter

__all__ = ["sample_frames", "write_sample_clip"]


def sample_frames(frame_count: int, height: int = 240, width: int = 320) -> Iterator[np.ndarray]:
    """Yield ``frame_count`` uint8 RGB pictures [height, width, 3].

    A disc circles, a square turns and a triangle swings in front of a slowly drifting background, with soft edges.
    Every motion has a whole number of periods, so that the clip loops.
    """
    rows = (np.arange(height, dtype=np.float64)[:, None] + 0.5) / height - 0.5
    columns = ((np.arange(width, dtype=np.float64)[None, :] + 0.5) - width / 2) / height
    softness = 1.0 / height  # one pixel
    for index in range(frame_count):
        phase = 2 * np.pi * index / frame_count
        shade = 0.5 + 0.5 * np.sin(4 * columns + 3 * rows + phase)
        picture = np.stack([0.10 + 0.08 * shade, 0.13 + 0.10 * shade, 0.24 + 0.16 * shade], axis=-1)

        x, y = columns - 0.32 * np.cos(phase), rows - 0.22 * np.sin(phase)
        _paint(picture, 0.13 - np.hypot(x, y), softness, (0.95, 0.36, 0.30))

        x, y = _turned(columns + 0.30 * np.sin(phase), rows + 0.10 * np.cos(2 * phase), 2 * phase)
        _paint(picture, 0.11 - np.maximum(np.abs(x), np.abs(y)), softness, (0.20, 0.72, 0.80))

        x, y = _turned(columns - 0.05 * np.sin(2 * phase), rows - 0.28 * np.sin(2 * phase), -phase)
        sides = [y - 0.09, *(-0.5 * y + s * 0.8660254 * x - 0.09 for s in (1, -1))]
        _paint(picture, -np.maximum.reduce(sides), softness, (0.98, 0.80, 0.28))

        yield np.round(picture * 255).astype(np.uint8)


def write_sample_clip(
    path: str | os.PathLike[str],
    *,
    frame_count: int = 100,
    frame_rate: float = 25.0,
    height: int = 240,
    width: int = 320,
) -> None:
    """Encode :func:`sample_frames` into an MP4 file (four seconds of 320x240 unless told)."""
    with VideoWriter(path, height, width, frame_rate=frame_rate) as writer:
        for index, image in enumerate(sample_frames(frame_count, height, width)):
            writer.write(image, index / frame_rate)


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = np.cos(angle), np.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def _paint(picture: np.ndarray, inside: np.ndarray, softness: float, colour: tuple[float, float, float]) -> None:
    """Blend ``colour`` in where the signed distance ``inside`` is positive; the edge is one pixel wide."""
    cover = np.clip(inside / softness + 0.5, 0.0, 1.0)[..., None]
    picture += cover * (np.asarray(colour) - picture)
