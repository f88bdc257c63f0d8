"""What the commands share that look into a network on real clips."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rcu_ops.cli_errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

__all__ = ["SampledClip", "calibrate", "report_faults", "sample_clip", "seen_pictures"]

EXIT_BROKEN = 3


class SampledClip(NamedTuple):
    """Sampled frames: uint8 [T,H,W,3], their numbers in the video, their times in seconds; why the video breaks."""

    name: str
    images: np.ndarray
    numbers: list[int]
    times: np.ndarray
    fault: str | None = None

    def part(self, places: list[int], name: str | None = None) -> SampledClip:
        """The frames at these places."""
        numbers = [self.numbers[place] for place in places]
        return SampledClip(name or self.name, self.images[places], numbers, self.times[places], self.fault)


def sample_clip(source: str, wanted: int, every: int | None = None, least: int = 2) -> SampledClip:
    """``wanted`` frames of a video, as many as there are, at distances of ``every`` or over the whole video.

    Raises:
        UserError: there are fewer than ``least``. VideoError: it cannot be read.
    """
    from rcu_ops.recipes.dataset import read_clip

    numbers: list[int] = []

    def choose(count: int) -> list[int]:
        distance = every or max(1, count // wanted)
        numbers[:] = list(range(0, count, distance))[:wanted]
        return numbers

    excerpt = read_clip(source, choose)
    if len(numbers) < least:
        raise UserError(f"{source}: expected at least {least} sampled frames, got {len(numbers)}")
    return SampledClip(Path(source).name, excerpt.images, list(numbers), excerpt.times, excerpt.fault)


def check_out(out: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raise UserError if the folder ``--out`` is a file, or holds one of the results and may not be overwritten."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; expected a folder")
    held = [name for name in names if (out / name).exists()]
    if held and not overwrite:
        raise UserError(f"--out: {out} holds {held[0]} already; --overwrite replaces it")


def report_faults(*clips: SampledClip) -> int:
    """Say which videos broke before their end; the exit code: 3 if any did, else 0."""
    faults = {clip.fault: clip.name for clip in clips if clip.fault is not None}
    for fault, name in faults.items():
        print(f"rcu-ops: warning: {name} {fault}; what came before it was used", file=sys.stderr)
    return EXIT_BROKEN if faults else 0


def seen_pictures(images: np.ndarray, size: int) -> np.ndarray:
    """What a network of input ``size`` sees of frames [T,H,W,3]: uint8 [T,size,size,3]."""
    import torch

    from rcu_ops.video.transform import center_crop, resize_short_side

    return center_crop(resize_short_side(torch.from_numpy(images), size), size).numpy()


def calibrate(model: nn.Module, clips: Sequence[Tensor], run: Callable[[Tensor], Any]) -> None:
    """Give an untrained network the statistics of these clips: with 0 and 1 its activations would explode or die.

    Args:
        run: what of the model to run over a clip.
    """
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over the clips
    with torch.no_grad():
        model.train()
        for clip in clips:
            run(clip)
    model.eval()
