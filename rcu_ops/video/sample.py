"""Which frames of a video go into which clip: integer arithmetic only, so that every machine takes the same frames.

All functions work on frame indices. ``stride`` is the distance between two frames of a clip (the sampling period). A
video shorter than a clip repeats its last frame.
"""

from __future__ import annotations

import torch

__all__ = ["clip_span", "jittered_clip", "regular_clips", "sliding_clips"]


def clip_span(clip_length: int, stride: int = 1) -> int:
    """Frames from the first to the last frame of a clip, both included: ``(clip_length - 1) * stride + 1``."""
    _check_at_least("clip_length", clip_length, 1)
    _check_at_least("stride", stride, 1)
    return (clip_length - 1) * stride + 1


def regular_clips(frame_count: int, clip_length: int, clip_count: int = 10, *, stride: int = 1) -> torch.Tensor:
    """Indices [clip_count, clip_length] (int64) of regularly spaced clips, the evaluation of action recognition.

    The first clip starts at the first frame and the last one ends at the last frame, with
    ``start_i = floor(i * room / (clip_count - 1))`` and ``room = frame_count - span``; a single clip is centred.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    _check_at_least("clip_count", clip_count, 1)
    room = max(0, frame_count - clip_span(clip_length, stride))
    if clip_count == 1:
        starts = [room // 2]
    else:
        starts = [i * room // (clip_count - 1) for i in range(clip_count)]
    return _clips(starts, clip_length, stride, frame_count)


def jittered_clip(
    frame_count: int, clip_length: int, *, stride: int = 1, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Indices [clip_length] (int64) of one clip that starts anywhere it fits: temporal jitter for training.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    room = max(0, frame_count - clip_span(clip_length, stride))
    start = int(torch.randint(room + 1, (), generator=generator))
    return _clips([start], clip_length, stride, frame_count)[0]


def sliding_clips(frame_count: int, clip_length: int, step: int, *, stride: int = 1) -> torch.Tensor:
    """Indices [clips, clip_length] (int64) of a window that slides by ``step`` frames over the whole video.

    The last window ends at the last frame, moved back if need be, so that every frame from the first to the last is
    inside the span of a window when ``step`` is at most that span.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    _check_at_least("step", step, 1)
    room = max(0, frame_count - clip_span(clip_length, stride))
    starts = list(range(0, room + 1, step))
    if starts[-1] != room:
        starts.append(room)
    return _clips(starts, clip_length, stride, frame_count)


def _clips(starts: list[int], clip_length: int, stride: int, frame_count: int) -> torch.Tensor:
    offsets = torch.arange(clip_length, dtype=torch.int64) * stride
    return (torch.tensor(starts, dtype=torch.int64)[:, None] + offsets).clamp_(max=frame_count - 1)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
