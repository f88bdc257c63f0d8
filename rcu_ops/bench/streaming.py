"""Cases of streaming: one frame of RCN-18 at 112x112, batch 1, against a bare eager loop and a re-run window."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rcu_ops
from rcu_ops.bench.baselines import compiled, on_device
from rcu_ops.bench.case import OURS, Bind, Candidate, Case, Inputs, Outputs, Variant
from rcu_ops.bench.timing import Thunk
from rcu_ops.models import VideoResNet

CLASSES = 400
SIDE = 112
WINDOW = 8
"""Frames of the re-run window, and of the clip on which every candidate is checked."""


def cases(tier: str, device: torch.device) -> list[Case]:
    """fp32 and bf16; the compiled eager loop only outside the quick tier."""
    return [StreamOneFrame(dtype, device, compile=tier != "quick") for dtype in (torch.float32, torch.bfloat16)]


class EagerLoop:
    """RCN-18 frame by frame as one would write it in plain PyTorch, with the weights of ``model``.

    Per recurrent layer ``h = conv2d(x, w_xh) + conv2d(h, w_hh)``, then ``batch_norm`` and ``relu``; no operator of this
    package.  States keep the model's dtype.
    """

    def __init__(self, model: VideoResNet, memory_format: torch.memory_format) -> None:
        self.model = model
        self.memory_format = memory_format
        self.kernels = {
            name: parameter.detach().squeeze(2).contiguous(memory_format=memory_format)
            for name, parameter in model.named_parameters()
            if parameter.dim() == 5
        } | {
            name: parameter.detach()[:, :, None, None].contiguous(memory_format=memory_format)
            for name, parameter in model.named_parameters()
            if name.endswith("weight_hh")
        }

    def __call__(self, frame: Tensor, states: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Scores [N,K] of one frame [N,3,H,W], and the new states, one per recurrent layer."""
        earlier = iter(states) if states is not None else None
        later: list[Tensor] = []

        def recurrent(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
            h = F.conv2d(x, self.kernels[f"{name}.weight_xh"], stride=stride, padding=padding)
            if earlier is not None:
                h = h + F.conv2d(next(earlier), self.kernels[f"{name}.weight_hh"])
            later.append(h)
            return h

        model = self.model
        x = frame.contiguous(memory_format=self.memory_format)
        x = F.relu(_batch_norm(recurrent(x, "stem.conv", 2, 3), model.stem.bn))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for index, block in enumerate(getattr(model, stage)):
                name = f"{stage}.{index}"
                stride = 2 if block.downsample is not None else 1
                shortcut = x
                if block.downsample is not None:
                    shortcut = F.conv2d(x, self.kernels[f"{name}.downsample.0.weight"], stride=stride)
                    shortcut = _batch_norm(shortcut, block.downsample[1])
                x_inner = F.relu(_batch_norm(recurrent(x, f"{name}.conv1", stride, 1), block.bn1))
                x_inner = _batch_norm(recurrent(x_inner, f"{name}.conv2", 1, 1), block.bn2)
                x = F.relu(x_inner + shortcut)
        pooled = x.mean((2, 3), keepdim=True)
        return F.conv2d(pooled, self.kernels["head.conv.weight"], model.head.conv.bias).flatten(1), later

    def clip_scores(self, clip: Tensor) -> Tensor:
        """Scores [N,K,T] of a clip [N,3,T,H,W]."""
        scores, states = [], None
        for t in range(clip.shape[2]):
            score, states = self(clip[:, :, t], states)
            scores.append(score)
        return torch.stack(scores, dim=2)


def _batch_norm(x: Tensor, layer: nn.BatchNorm3d) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps)


class StreamOneFrame(Case):
    """One more frame of a running stream."""

    op = "streaming"
    waits = True

    def __init__(self, dtype: torch.dtype, device: torch.device, compile: bool = True) -> None:
        super().__init__("one frame", f"RCN-18 N1 {SIDE}x{SIDE}", dtype, "channels_last_3d", device, compile)

    @cached_property
    def model(self) -> VideoResNet:
        """The network with fixed random weights; the recurrent ones keep the state bounded."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator().initial_seed())
            model = VideoResNet(num_classes=CLASSES)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("weight_hh"):
                        c = parameter.shape[0]
                        parameter.copy_(0.5 * torch.eye(c) + 0.3 / c**0.5 * torch.randn(c, c))
        return model.eval().to(self.device, self.dtype)

    def inputs(self) -> Inputs:
        """A clip of as many frames as the window; the last one is the frame that is timed."""
        clip = torch.randn(1, 3, WINDOW, SIDE, SIDE, generator=self.generator())
        return {"clip": clip.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last_3d)}

    def exact(self, inputs: Inputs) -> Outputs:
        """Per-frame scores by the eager loop in fp64."""
        model = VideoResNet(num_classes=CLASSES).eval().to(self.device, torch.float64)
        model.load_state_dict(self.model.state_dict())
        return (EagerLoop(model, torch.contiguous_format).clip_scores(inputs["clip"].double()),)

    def eager(self, inputs: Inputs) -> Outputs:
        """Per-frame scores by the eager loop."""
        return (EagerLoop(self.model, torch.contiguous_format).clip_scores(inputs["clip"]),)

    def candidates(self) -> Sequence[Candidate]:
        """Ours fused, ours unfused, the eager loop, compiled, and a window of frames run anew for every frame."""
        graph = self.device.type == "cuda"  # on a GPU everything but the compiled loop runs in a CUDA graph
        fused = cast(VideoResNet, rcu_ops.fuse_for_inference(self.model))
        found = [
            self._stream_candidate(OURS, rcu_ops.Streamer(fused, graph=graph), optional=False),
            self._stream_candidate("unfused", rcu_ops.Streamer(self.model, graph=graph)),
            self._loop_candidate(),
        ]
        if self.compile:
            found.append(self._compiled_candidate())
        window = Variant(lambda inputs: lambda: (fused.frame_scores(inputs["clip"]),), eager=self._eager_clip)
        found.append(Candidate(f"{WINDOW}-frame window", on_device({"fused": window}, self.device)))
        return found if graph else [_in_inference_mode(candidate) for candidate in found]

    def _eager_clip(self, inputs: Inputs) -> Outputs:
        with rcu_ops.use_backend("reference"):
            return (self.model.frame_scores(inputs["clip"]),)

    def _stream_candidate(self, name: str, streamer: rcu_ops.Streamer, optional: bool = True) -> Candidate:
        def bind(inputs: Inputs) -> Thunk:
            clip = inputs["clip"]
            _, state = streamer(clip[:, :, :-1])
            frame = clip[:, :, -1:]
            return lambda: streamer(frame, state)[0]

        def verify(inputs: Inputs) -> Outputs:
            clip, state, scores = inputs["clip"], None, []
            for t in range(clip.shape[2]):
                score, state = streamer(clip[:, :, t : t + 1], state)
                scores.append(score)
            return (torch.cat(scores, dim=2),)

        return Candidate(name, {name: Variant(bind, verify)}, optional)

    def _loop_candidate(self) -> Candidate:
        def variant(memory_format: torch.memory_format) -> Variant:
            loop = EagerLoop(self.model, memory_format)

            def bind(inputs: Inputs) -> Thunk:
                frame, states = _last_frame(loop, inputs["clip"])
                return lambda: loop(frame, states)

            return Variant(bind, lambda inputs: (loop.clip_scores(inputs["clip"]),))

        formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
        variants = {name: variant(memory_format) for name, memory_format in formats.items()}
        return Candidate("eager loop", on_device(variants, self.device))

    def _compiled_candidate(self) -> Candidate:
        loop = EagerLoop(self.model, torch.channels_last)

        step = compiled(lambda given: loop(given["frame"], list(given.values())[1:]))

        def bind(inputs: Inputs) -> Thunk:
            frame, states = _last_frame(loop, inputs["clip"])
            return step({"frame": frame} | {f"state {index}": state for index, state in enumerate(states)})

        def verify(inputs: Inputs) -> Outputs:
            # The compiled step gives the last frame; the frames before it, which led there, are the eager loop's.
            scores = loop.clip_scores(inputs["clip"])
            last, _ = bind(inputs)()
            return (torch.cat([scores[:, :, :-1], last.unsqueeze(2)], dim=2),)

        return Candidate("compile", {"torch.compile": Variant(bind, verify)})

    @cached_property
    def bytes_moved(self) -> int:
        """Weights, the frame, and the fp32 states read and written."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        _, states = EagerLoop(self.model, torch.contiguous_format)(self.inputs()["clip"][:, :, 0], None)
        return weights + 3 * SIDE**2 * self.dtype.itemsize + 2 * sum(4 * state.numel() for state in states)

    @cached_property
    def flops(self) -> int:
        """Counted by PyTorch on the eager loop."""
        loop = EagerLoop(self.model, torch.contiguous_format)
        frame, states = _last_frame(loop, self.inputs()["clip"][:, :, :2])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            loop(frame, states)
        return counter.get_total_flops()

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """The backend of the recurrence inside the network."""
        x = torch.zeros(1, 64, 1, 56, 56, dtype=self.dtype, device=self.device)
        weight = torch.zeros(64, 64, dtype=self.dtype, device=self.device)
        return str(rcu_ops.explain("recurrent_conv", x, weight).backend), None


def _in_inference_mode(candidate: Candidate) -> Candidate:
    """The candidate as one who streams runs it: without autograd's bookkeeping."""

    def bound(bind: Bind) -> Bind:
        @torch.inference_mode()
        def bind_in_inference_mode(inputs: Inputs) -> Thunk:
            return torch.inference_mode()(bind(inputs))

        return bind_in_inference_mode

    variants = {
        name: dataclasses.replace(variant, bind=bound(variant.bind)) for name, variant in candidate.variants.items()
    }
    return dataclasses.replace(candidate, variants=variants)


@torch.no_grad()
def _last_frame(loop: EagerLoop, clip: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The last frame of the clip, and the states before it."""
    states: list[Tensor] | None = None
    for t in range(clip.shape[2] - 1):
        _, states = loop(clip[:, :, t], states)
    assert states is not None, "the clip needs two frames"
    return clip[:, :, -1].contiguous(memory_format=loop.memory_format), states
