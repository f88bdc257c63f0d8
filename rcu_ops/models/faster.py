"""FASTER: an expensive network on some clips of a video, a cheap one on the others, a recurrent network over them all.

"FASTER Recurrent Networks for Efficient Video Classification" (Zhu et al.).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rcu_ops.models.registry import create_model, register_model
from rcu_ops.models.resnet import VideoResNet
from rcu_ops.nn.aggregators import Aggregator, State, make_aggregator

PATTERNS = (0, 1, 3, 7, 15, 31)
"""The paper's cheap clips per expensive one (Table 4)."""

FRAMES = 256
"""Frames of a video that all of the paper's settings look at."""

_SEEN = "#frames"
_PENDING = "#pending"


class Faster(nn.Module):
    """Clips of ``clip_length`` frames, by turns through the expensive and the cheap network, aggregated as they come.

    Clip k is expensive where k is a multiple of 1 + x, for the pattern 1:x; the first clip is always expensive, and its
    features start the recurrence. ``pattern=(0, 1)`` makes all clips cheap.

    Args:
        expensive, cheap: networks with ``features(clip [N,3,L,H,W]) -> [N,C,l,h,w]`` of one shape, and, for aggregators
            that take scores, ``forward`` to [N,classes].
        aggregator: see :mod:`rcu_ops.nn.aggregators`.
        pattern: (1, x), or (0, 1).
        clip_length: L.

    An aggregator that takes features leaves the networks' classifiers without gradients: to train all of it under
    ``DistributedDataParallel`` needs ``find_unused_parameters=True``, without which its first step is not averaged;
    after :meth:`freeze_backbones` nothing is needed.

    Shape:
        frames [N,3,T,H,W], T a multiple of L, one clip after the other -> scores [N,classes] after the last clip.

    Attributes:
        frames, size: of the paper's input, 256 and 224.

    Raises:
        ValueError: another pattern, a clip length below 1, frames that are not whole clips.
    """

    frames = FRAMES
    size = 224

    def __init__(
        self,
        expensive: nn.Module,
        cheap: nn.Module,
        aggregator: Aggregator,
        pattern: tuple[int, int] = (1, 1),
        clip_length: int = 32,
    ) -> None:
        super().__init__()
        if len(pattern) != 2 or not ((pattern[0] == 1 and pattern[1] >= 0) or tuple(pattern) == (0, 1)):
            raise ValueError(f"pattern: expected (1, x) with x >= 0, or (0, 1), got {tuple(pattern)}")
        if clip_length < 1:
            raise ValueError(f"clip_length: expected at least 1, got {clip_length}")
        self.expensive = expensive
        self.cheap = cheap
        self.aggregator = aggregator
        self.pattern = (int(pattern[0]), int(pattern[1]))
        self.clip_length = clip_length
        self._frozen = False

    def is_expensive(self, clip: int) -> bool:
        """Whether the ``clip``-th clip (from 0) is the expensive network's."""
        return self.pattern[0] == 1 and clip % sum(self.pattern) == 0

    def freeze_backbones(self) -> Faster:
        """Train the aggregator alone: the two networks get no gradients and stay in evaluation mode (stage two)."""
        for network in (self.expensive, self.cheap):
            network.requires_grad_(False)
        self._frozen = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> Faster:
        """As ``nn.Module.train``, but frozen networks stay in evaluation mode."""
        super().train(mode)
        if self._frozen:
            self.expensive.eval()
            self.cheap.eval()
        return self

    def clip_inputs(self, clips: Tensor, first: int = 0) -> Tensor:
        """What the aggregator takes, features [N,K,C,l,h,w] or scores [N,K,classes], of clips [N,K,3,L,H,W].

        ``first`` is the number of the first of them in the video. Each network runs once, on all its clips.
        """
        if clips.dim() != 6 or clips.shape[3] != self.clip_length:
            raise ValueError(f"clips: expected [N,K,3,L,H,W] with L = {self.clip_length}, got {list(clips.shape)}")
        n, count = clips.shape[:2]
        parts: dict[int, Tensor] = {}
        for network, takes in ((self.expensive, True), (self.cheap, False)):
            taken = [k for k in range(count) if self.is_expensive(first + k) == takes]
            if not taken:
                continue
            batch = torch.stack([clips[:, k] for k in taken]).flatten(0, 1)
            run = network.features if self.aggregator.takes == "features" else network
            outputs = run(batch)  # type: ignore[operator]
            parts.update(zip(taken, outputs.unflatten(0, (len(taken), n)).unbind(), strict=True))
        return torch.stack([parts[k] for k in range(count)], dim=1)

    def clip_scores(self, frames: Tensor) -> Tensor:
        """frames [N,3,T,H,W] -> [N,classes,K]: the prediction after each of the K = T / L clips."""
        if frames.dim() != 5 or frames.shape[2] == 0 or frames.shape[2] % self.clip_length:
            raise ValueError(
                f"frames: expected [N,3,T,H,W] with T a multiple of {self.clip_length}, got {list(frames.shape)}"
            )
        clips = torch.stack(frames.split(self.clip_length, dim=2), dim=1)
        return self.aggregator(self.clip_inputs(clips))[0].transpose(1, 2)

    def forward(self, frames: Tensor) -> Tensor:
        """frames [N,3,T,H,W] -> scores [N,classes] after the last clip."""
        return self.clip_scores(frames)[:, :, -1]

    def stream(self, frames: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """The next frames of a video: [N,3,t,H,W], any t >= 1 -> (scores [N,classes,c], state).

        A clip is run when its last frame has come; c is the number of clips that these frames complete, perhaps 0. The
        scores are those of :meth:`clip_scores` over all frames so far. The state (frames of the unfinished clip, what
        the aggregator carries, number of frames) does not grow with the video.

        Raises:
            ValueError: the network is in training mode; a state of another network, batch or frame size.
        """
        if self.training:
            raise ValueError("model: expected evaluation mode (call model.eval())")
        if frames.dim() != 5 or frames.shape[2] < 1:
            raise ValueError(f"frames: expected [N,3,t,H,W] with t >= 1, got {list(frames.shape)}")
        seen = 0
        carried: State | None = None
        if state is not None:
            if _SEEN not in state or _PENDING not in state:
                raise ValueError(f"state: expected what stream returned, got the entries {', '.join(state) or 'none'}")
            seen = int(state[_SEEN].max())
            pending = state[_PENDING]
            if pending.shape[:2] + pending.shape[3:] != frames.shape[:2] + frames.shape[3:]:
                raise ValueError(f"state: has frames {list(pending.shape)}, but these are {list(frames.shape)}")
            frames = torch.cat([pending, frames], dim=2)
            carried = {key: value for key, value in state.items() if key not in (_SEEN, _PENDING)} or None
            seen -= pending.shape[2]
            if seen and carried is None:
                raise ValueError(f"state: has seen {seen} frames' clips, but nothing of what the aggregator carries")
        scores = []
        while frames.shape[2] >= self.clip_length:
            clip, frames = frames.split([self.clip_length, frames.shape[2] - self.clip_length], dim=2)
            inputs = self.clip_inputs(clip.unsqueeze(1), seen // self.clip_length)
            score, carried = self.aggregator(inputs, carried)
            scores.append(score[:, 0])
            seen += self.clip_length
        kept = {**(carried or {}), _PENDING: frames.clone()}
        kept[_SEEN] = torch.full((frames.shape[0],), seen + frames.shape[2], dtype=torch.int64)
        if not scores:
            return frames.new_zeros(frames.shape[0], self.aggregator.num_classes, 0), kept
        return torch.stack(scores, dim=2), kept

    def extra_repr(self) -> str:
        """Pattern and clip length."""
        return f"pattern={self.pattern[0]}:{self.pattern[1]}, clip_length={self.clip_length}"


def _build(
    pattern: int,
    clip_length: int,
    num_classes: int,
    expensive: str,
    cheap: str,
    aggregator: str,
    aggregator_options: Mapping[str, Any] | None,
    **backbone_options: Any,
) -> Faster:
    if pattern < -1:
        raise ValueError(f"pattern: expected x >= 0 for 1:x, or -1 for all clips cheap, got {pattern}")
    networks = [create_model(name, num_classes=num_classes, **backbone_options) for name in (expensive, cheap)]
    channels = set()
    for name, network in zip((expensive, cheap), networks, strict=True):
        if not isinstance(network, VideoResNet):
            raise ValueError(f"{name}: expected a video ResNet as a clip-level network")
        channels.add(network.head.conv.in_channels)
    if len(channels) > 1:
        raise ValueError(f"expensive, cheap: expected features of as many channels, got {sorted(channels)}")
    made = make_aggregator(aggregator, channels.pop(), num_classes, **(aggregator_options or {}))
    return Faster(networks[0], networks[1], made, (0, 1) if pattern < 0 else (1, pattern), clip_length)


def _register(name: str, default_pattern: int, default_length: int) -> None:
    def build(
        num_classes: int = 400,
        *,
        expensive: str = "r2plus1d_resnet50",
        cheap: str = "r2d_resnet26",
        aggregator: str = "fast_gru",
        pattern: int = default_pattern,
        clip_length: int = default_length,
        aggregator_options: Mapping[str, Any] | None = None,
        **backbone_options: Any,
    ) -> Faster:
        return _build(
            pattern, clip_length, num_classes, expensive, cheap, aggregator, aggregator_options, **backbone_options
        )

    build.__name__ = name
    build.__doc__ = (
        f"{name}: clips of {default_length} frames, 1 expensive to {default_pattern} cheap; input [N,3,256,H,W]. "
        "``pattern=x`` is 1:x, -1 makes all clips cheap; further options go to both clip-level networks."
    )
    register_model(name)(build)


_register("faster16", 7, 16)
_register("faster32", 1, 32)
