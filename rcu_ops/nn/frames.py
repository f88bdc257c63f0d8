"""Views between clips [N,C,T,H,W] and batches of frames [N*T,C,H,W], so that per-frame layers run as 2D ones."""

from __future__ import annotations

import torch
from torch import Tensor


def frames_to_batch(clip: Tensor) -> Tensor:
    """[N,C,T,...] -> [N*T,C,...].

    A view for channels_last_3d clips, for frame-major memory ([N,T,C,H,W] permuted), and whenever N or T is 1. Only a
    contiguous NCTHW clip with several samples and frames has to be copied, into frame-major memory.
    """
    return clip.squeeze(2) if clip.shape[2] == 1 else clip.transpose(1, 2).flatten(0, 1)


def batch_to_frames(frames: Tensor, batch: int, length: int) -> Tensor:
    """[N*T,C,...] -> [N,C,T,...], always a view; ``batch`` and ``length`` are N and T."""
    return frames.unsqueeze(2) if length == 1 else frames.view(batch, length, *frames.shape[1:]).transpose(1, 2)


def laid_out(clip: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The clip in ``memory_format``; under ``torch.vmap``, whose tensors have but the contiguous one, as it is."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return clip
    return clip.contiguous(memory_format=memory_format)


def check_clip(owner: object, clip: Tensor, channels: int) -> None:
    """ValueError unless ``clip`` is [N,C,T,H,W] with the channels the layer ``owner`` was made for."""
    if clip.dim() != 5 or clip.shape[1] != channels:
        raise ValueError(
            f"{type(owner).__name__}: expected a clip [N,C,T,H,W] with C = {channels}, got {list(clip.shape)}"
        )
