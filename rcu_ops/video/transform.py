"""From decoded pictures to what a network takes.

Pictures are uint8 RGB [T, H, W, 3], as the decoder gives them; networks take float [3, T, H, W]. The last step is a
view: its memory stays frame by frame with the channels innermost, which is ``channels_last_3d`` once batched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "TSN_SCALES",
    "FrameTransform",
    "center_crop",
    "corner_crops",
    "flip",
    "multi_scale_crop",
    "normalize",
    "random_crop",
    "resize_short_side",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FLOW_CHANNELS = 2
TSN_SCALES = (1000, 875, 750, 660)
"""Sides of training crops of temporal segment networks, in thousandths of the short side."""


def resize_short_side(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Scale frames so that their short side is ``size``, with the aspect ratio kept (the long side is rounded).

    Bilinear with antialiasing: every input pixel counts when the picture shrinks.

    Args:
        frames: uint8 [T, H, W, 3].
        size: pixels.

    Returns:
        uint8 [T, h, w, 3].
    """
    _check_frames(frames)
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    height, width = frames.shape[1:3]
    if height <= width:
        target = (size, max(1, round(width * size / height)))
    else:
        target = (max(1, round(height * size / width)), size)
    if target == (height, width):
        return frames
    scaled = F.interpolate(frames.permute(0, 3, 1, 2), size=target, mode="bilinear", antialias=True)
    return scaled.permute(0, 2, 3, 1)


def center_crop(frames: torch.Tensor, size: int) -> torch.Tensor:
    """The middle ``size`` x ``size`` of frames [T, H, W, 3], as a view."""
    room_y, room_x = _room(frames, size)
    return frames[:, room_y // 2 : room_y // 2 + size, room_x // 2 : room_x // 2 + size]


def random_crop(frames: torch.Tensor, size: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """A ``size`` x ``size`` window of frames [T, H, W, 3], the same in all of them, uniform over the places it fits."""
    room_y, room_x = _room(frames, size)
    y = int(torch.randint(room_y + 1, (), generator=generator))
    x = int(torch.randint(room_x + 1, (), generator=generator))
    return frames[:, y : y + size, x : x + size]


def corner_crops(frames: torch.Tensor, size: int, *, mirror: bool = False) -> torch.Tensor:
    """The four corners and the centre, and with ``mirror`` their mirror images: [5 or 10, T, size, size, 3]."""
    room_y, room_x = _room(frames, size)
    places = [(0, 0), (0, room_x), (room_y, 0), (room_y, room_x), (room_y // 2, room_x // 2)]
    crops = torch.stack([frames[:, y : y + size, x : x + size] for y, x in places])
    return torch.cat([crops, crops.flip(3)]) if mirror else crops


def multi_scale_crop(
    frames: torch.Tensor, size: int, *, generator: torch.Generator | None = None, scales: Sequence[int] = TSN_SCALES
) -> torch.Tensor:
    """A window of random size at a corner or the centre, resized to ``size`` x ``size`` (temporal segment networks).

    Height and width are ``scales`` thousandths of the short side, drawn independently but at most one step of the list
    apart; the same window in all frames.

    Args:
        frames: uint8 [T, H, W, 3].
        size: of the result, pixels.
        generator: the source of randomness.
        scales: in thousandths of the short side.

    Returns:
        uint8 [T, size, size, 3].
    """
    _check_frames(frames)
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if not scales or not all(1 <= scale <= 1000 for scale in scales):
        raise ValueError(f"scales: expected thousandths from 1 to 1000, got {tuple(scales)}")
    height, width = frames.shape[1:3]
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    rows, columns = pairs[int(torch.randint(len(pairs), (), generator=generator))]
    h, w = (max(1, min(height, width) * scale // 1000) for scale in (rows, columns))
    room_y, room_x = height - h, width - w
    places = [(0, 0), (0, room_x), (room_y, 0), (room_y, room_x), (room_y // 2, room_x // 2)]
    y, x = places[int(torch.randint(len(places), (), generator=generator))]
    window = frames[:, y : y + h, x : x + w]
    if (h, w) == (size, size):
        return window
    scaled = F.interpolate(window.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)
    return scaled.permute(0, 2, 3, 1)


def flip(
    frames: torch.Tensor,
    *,
    probability: float = 0.5,
    generator: torch.Generator | None = None,
    mirrored: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mirror frames [T, H, W, 3] left to right, all or none of them, with the given probability.

    Args:
        frames: pictures. probability: of mirroring. generator: the source of randomness.
        mirrored: how; by default columns in the opposite order, which is not enough for flow.
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")
    if float(torch.rand((), generator=generator)) >= probability:
        return frames
    return frames.flip(2) if mirrored is None else mirrored(frames)


def normalize(
    frames: torch.Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``(frames / 255 - mean) / std`` per channel, computed in float32.

    Args:
        frames: uint8 [T, H, W, 3], on any device.
        mean, std: per channel, on a scale of 0 to 1.
        dtype: of the result.

    Returns:
        [3, T, H, W]: a view of [T, H, W, 3] memory.
    """
    _check_frames(frames)
    if frames.shape[3] != len(mean):
        raise ValueError(f"frames: expected [T, H, W, {len(mean)}], got {list(frames.shape)}")
    # One multiplication and one addition per value: x * 1/(255 std) - mean/std.
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], device=frames.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=frames.device)
    return torch.addcmul(shift, frames.float(), scale).to(dtype).permute(3, 0, 1, 2)


class FrameTransform:
    """The per-frame path of streaming and evaluation: short side to ``size``, centre crop, normalise.

    Call it with uint8 RGB [H, W, 3] or [T, H, W, 3] (numpy or torch); it returns [3, T, size, size] on ``device`` in
    ``dtype``. Resizing happens on the CPU in uint8, so that the same picture gives the same input on every device, and
    only the cropped uint8 picture crosses to the device.

    Args:
        size: side of the square that the network sees.
        dtype: of the result.
        device: of the result.
        mean, std: per channel, on a scale of 0 to 1; ImageNet's unless told.
    """

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.mean = tuple(mean)
        self.std = tuple(std)

    def __call__(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Pictures uint8 [H, W, 3] or [T, H, W, 3] -> [3, T, size, size]."""
        pictures = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
        if pictures.dim() == 3:
            pictures = pictures[None]
        pictures = center_crop(resize_short_side(pictures.cpu(), self.size), self.size)
        pictures = pictures.contiguous().to(self.device)
        return normalize(pictures, mean=self.mean, std=self.std, dtype=self.dtype)


def _room(frames: torch.Tensor, size: int) -> tuple[int, int]:
    _check_frames(frames)
    height, width = frames.shape[1:3]
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size: expected 1 to {min(height, width)} for frames of {width}x{height}, got {size}")
    return height - size, width - size


def _check_frames(frames: torch.Tensor) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames: expected uint8, got {frames.dtype}")
    if frames.dim() != 4 or (frames.shape[3] != 3 and frames.shape[3] % FLOW_CHANNELS) or 0 in frames.shape:
        raise ValueError(
            f"frames: expected [T, H, W, 3] (or stacks of {FLOW_CHANNELS} channels) with nothing empty, "
            f"got {list(frames.shape)}"
        )
