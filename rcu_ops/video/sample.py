"""Which frames of a video go into which clip: integer arithmetic only, so that every machine takes the same frames.

All functions work on frame indices. ``stride`` is the distance between two frames of a clip (the sampling period). A
video shorter than a clip repeats its last frame.
"""

from __future__ import annotations

import torch

__all__ = [
    "clip_count",
    "clip_span",
    "jittered_clip",
    "random_clips",
    "regular_clips",
    "segment_positions",
    "sliding_clips",
    "spread_over",
    "strided_clips",
]


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


def random_clips(
    frame_count: int,
    clip_length: int,
    clip_count: int,
    *,
    stride: int = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Indices [clip_count, clip_length] (int64) of clips that start anywhere they fit, in the order of the video.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    _check_at_least("clip_count", clip_count, 1)
    room = max(0, frame_count - clip_span(clip_length, stride))
    starts = torch.randint(room + 1, (clip_count,), generator=generator)
    return _clips(sorted(starts.tolist()), clip_length, stride, frame_count)


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


def clip_count(frame_count: int, step: int = 8) -> int:
    """Clips of a video at a distance of ``step`` frames, ``K_v = floor(l_v / r) - 1`` of the residual RNN paper.

    It fits clips of ``2 * step`` frames (16 and 8 in the paper). A video too short for one clip has one all the same.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    _check_at_least("step", step, 1)
    return max(1, frame_count // step - 1)


def strided_clips(frame_count: int, clip_length: int, step: int, *, stride: int = 1) -> torch.Tensor:
    """Indices [clips, clip_length] (int64) of the clips that start every ``step`` frames and lie within the video.

    With ``clip_length = 2 * step`` these are the :func:`clip_count` clips that features are taken from; with any other
    length the fixed-stride augmentation (Eq. 3) of the residual RNN paper. A video shorter than a clip gives one clip.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    _check_at_least("step", step, 1)
    room = max(0, frame_count - clip_span(clip_length, stride))
    return _clips(list(range(0, room + 1, step)), clip_length, stride, frame_count)


def spread_over(count: int, length: int) -> torch.Tensor:
    """Which of ``count`` clips the ``length`` time steps take: indices [length] (int64), from 0.

    ``sigma(t) - 1 = floor((t - 1) (K_v - 1) / (T - 1))`` for t = 1 … T, in integers; T = 1 takes the first clip.
    With more steps than clips, clips repeat.

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("count", count, 1)
    _check_at_least("length", length, 1)
    return torch.tensor([t * (count - 1) // max(1, length - 1) for t in range(length)], dtype=torch.int64)


def segment_positions(
    frame_count: int,
    segments: int,
    *,
    snippet: int = 1,
    positions: int = 1,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """First frames [positions, segments] (int64) of snippets, one per equal segment of the video.

    Segment s of T covers the places ``[s R // T, (s + 1) R // T)`` of the R = ``frame_count - snippet + 1`` at which a
    snippet can start; a video with fewer places than segments uses some of them again. With a generator, every snippet
    is drawn from its segment (training); without one, row j takes the same position in every segment, at
    ``(2 j + 1) / (2 positions)`` of its length (test: the middle for one position).

    Raises:
        ValueError: an argument is below 1.
    """
    _check_at_least("frame_count", frame_count, 1)
    _check_at_least("segments", segments, 1)
    _check_at_least("snippet", snippet, 1)
    _check_at_least("positions", positions, 1)
    room = max(1, frame_count - snippet + 1)
    rows = []
    for j in range(positions):
        row = []
        for s in range(segments):
            start = s * room // segments
            length = max(1, (s + 1) * room // segments - start)
            if generator is None:
                row.append(start + (2 * j + 1) * length // (2 * positions))
            else:
                row.append(start + int(torch.randint(length, (), generator=generator)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def _clips(starts: list[int], clip_length: int, stride: int, frame_count: int) -> torch.Tensor:
    offsets = torch.arange(clip_length, dtype=torch.int64) * stride
    return (torch.tensor(starts, dtype=torch.int64)[:, None] + offsets).clamp_(max=frame_count - 1)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
