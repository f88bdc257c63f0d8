"""The clips of one video through a network, keeping the output of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rcu_ops.recipes.dataset import network_input
from rcu_ops.video import BrokenVideoError, open_video
from rcu_ops.video.sample import clip_span
from rcu_ops.video.transform import center_crop, corner_crops, resize_short_side

__all__ = ["CROPS", "FeatureExtractor", "feature_layer"]

CROPS = (1, 5, 10)


def feature_layer(model: nn.Module, name: str | None) -> tuple[str, nn.Module]:
    """The layer of that name; by default the one the network names (``feature_layer``), or ``layer4``.

    Raises:
        ValueError: there is no such layer; similar names are listed.
    """
    import difflib

    modules = dict(model.named_modules())
    name = getattr(model, "feature_layer", "layer4") if name is None else name
    if not name or name not in modules:
        similar = difflib.get_close_matches(name, [key for key in modules if key], n=4, cutoff=0.4)
        some = similar or [key for key in modules if key and "." not in key]
        raise ValueError(f"layer: {type(model).__name__} has no layer {name!r}; there are {', '.join(some)}")
    return name, modules[name]


class FeatureExtractor:
    """Runs clips through a network and keeps what one layer puts out.

    Outputs [N,C,T,H,W] are averaged over time and space, [N,C,T] over time; [N,F] is taken as it is. With several crops
    the feature of a clip is the mean over its crops (Eqs. 4-5 of the residual RNN paper).

    Args:
        model: in evaluation mode; it is called with clips [N,3,T,size,size].
        layer: a name of ``model.named_modules()``, or None for the network's own choice.
        clip_length: frames of a clip. step: frames from the start of one clip to the next. stride: frames from one
            frame of a clip to the next.
        size: side of the network's input. scale: short side of the picture before it is cropped.
        crops: 1 (centre), 5 (corners and centre) or 10 (and their mirror images).
        batch: clips run at once, all crops of a clip counted as one.

    Raises:
        ValueError: no such layer, a number below 1, a scale below the size, another number of crops.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        *,
        clip_length: int = 16,
        step: int = 8,
        stride: int = 1,
        size: int = 112,
        scale: int = 128,
        crops: int = 1,
        batch: int = 8,
    ) -> None:
        numbers = {"clip_length": clip_length, "step": step, "stride": stride, "size": size, "batch": batch}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if scale < size:
            raise ValueError(f"scale: expected at least the size {size}, got {scale}")
        if crops not in CROPS:
            raise ValueError(f"crops: expected one of {', '.join(map(str, CROPS))}, got {crops}")
        self.layer, self._module = feature_layer(model, layer)
        self.model = model
        self.clip_length, self.step, self.stride = clip_length, step, stride
        self.size, self.scale, self.crops, self.batch = size, scale, crops, batch
        self.fault: str | None = None
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    @torch.inference_mode()
    def __call__(self, source: str, skip: int = 0) -> Iterator[Tensor]:
        """Features [n,F] (fp32) of the next few clips of a video, until its end.

        Clips are those of :func:`rcu_ops.video.sample.strided_clips`. The video is decoded once, holding only the
        frames of the clips that are under way. ``self.fault`` says afterwards why the video broke off, or None.

        Args:
            source: the video.
            skip: clips to leave out at the beginning.

        Raises:
            VideoError: it cannot be opened, or not one frame of it decodes. ValueError: the layer puts out something
                that is no feature.
        """
        self.fault = None
        window: list[Tensor] = []
        waiting: list[Tensor] = []
        span, first, clips = clip_span(self.clip_length, self.stride), 0, 0
        with open_video(source) as reader:
            try:
                for frame in reader:
                    if frame.index >= first:
                        # A frame of a clip that is skipped is decoded, but neither scaled nor kept.
                        window.append(
                            self._picture(frame.image) if clips >= skip or frame.index >= first + self.step else _NONE
                        )
                    if len(window) == span:
                        if clips >= skip:
                            waiting.append(torch.stack(window[:: self.stride]))
                        clips, first = clips + 1, first + self.step
                        window = window[self.step :]
                        if len(waiting) == self.batch:
                            yield self._run(waiting)
                            waiting = []
            except BrokenVideoError as error:
                self.fault = f"broke at frame {error.frame_index}: {error.reason}"
        if clips == 0 and skip == 0 and window:  # shorter than a clip: the last frame repeated
            waiting.append(torch.stack([*window, *[window[-1]] * (span - len(window))][:: self.stride]))
        if waiting:
            yield self._run(waiting)

    def _picture(self, image: Any) -> Tensor:
        """uint8 [crops,size,size,3]."""
        frames = resize_short_side(torch.from_numpy(image)[None], self.scale)
        if self.crops == 1:
            return center_crop(frames, self.size)
        return corner_crops(frames, self.size, mirror=self.crops == 10)[:, 0]

    def _run(self, clips: list[Tensor]) -> Tensor:
        """Clips uint8 [T,crops,size,size,3] each -> [n,F]."""
        frames = torch.stack(clips).transpose(1, 2).flatten(0, 1).to(self._device)
        kept: list[Any] = []
        hook = self._module.register_forward_hook(lambda module, arguments, output: kept.append(output))
        try:
            self.model(network_input(frames, self._dtype))
        finally:
            hook.remove()
        if not kept:
            raise ValueError(f"layer: {self.layer} does not run in a forward pass of {type(self.model).__name__}")
        output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        if not isinstance(output, Tensor) or output.dim() not in (2, 3, 5) or output.shape[0] != len(frames):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer: expected {self.layer} to put out [N,F], [N,C,T] or [N,C,T,H,W], got {shape}")
        features = output.float()
        if features.dim() > 2:
            features = features.flatten(2).mean(2)
        features = features.unflatten(0, (len(clips), self.crops)).mean(1).cpu()
        if not torch.isfinite(features).all():
            raise ValueError(f"layer: the output of {self.layer} is not finite")
        return features


_NONE = torch.empty(0)
