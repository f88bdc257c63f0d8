"""Cases of ``recurrent_conv``: forward, forward + backward, fused inference, one step."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import rcu_ops
from rcu_ops import reference
from rcu_ops.bench.baselines import compiled, compiled_once, in_graph, on_device, with_backend
from rcu_ops.bench.case import OURS, Bind, Candidate, Case, Inputs, Outputs, Variant
from rcu_ops.bench.timing import Thunk
from rcu_ops.ops import Explanation

LAYOUTS = {"NCTHW": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}

COMPILE_AT_MOST_FRAMES = 32
"""Longer clips are left out of ``torch.compile``: it unrolls the loop over time, and takes minutes."""

CPU_CLIP_BYTES = 32 * 2**20
"""On a CPU, N is cut until an fp32 clip has no more than this, except in the full tier."""


@dataclass(frozen=True)
class Shape:
    """Clip shape [N,C,T,H,W] with H = W."""

    n: int
    c: int
    t: int
    side: int

    def __str__(self) -> str:
        return f"N{self.n} C{self.c} T{self.t} {self.side}x{self.side}"

    @property
    def rows(self) -> int:
        """Positions of one frame, over the batch."""
        return self.n * self.side**2

    @property
    def numel(self) -> int:
        """Elements of the clip."""
        return self.rows * self.c * self.t


RESNET = (Shape(16, 64, 16, 56), Shape(16, 128, 16, 28), Shape(16, 256, 16, 14), Shape(16, 512, 16, 7))
RESNET_NO_POOL = (Shape(8, 64, 8, 112), Shape(8, 128, 8, 56), Shape(8, 256, 8, 28), Shape(8, 512, 8, 14))
LONG = (Shape(1, 256, 256, 14), Shape(1, 512, 256, 7))


def cases(tier: str, device: torch.device) -> list[Case]:
    """The cases of a tier; see :data:`rcu_ops.bench.suite.TIERS`."""
    return list(_quick(device) if tier == "quick" else _suite(tier, device))


def _quick(device: torch.device) -> Iterator[Case]:
    """Few cases with small N, in both layouts and dtypes; compiled baselines only at one of each kind."""
    small, narrow = Shape(1, 64, 8, 56), Shape(2, 256, 8, 14)
    for shape in (small, narrow):
        for layout in LAYOUTS:
            for dtype in (torch.float32, torch.bfloat16):
                first = shape == small and layout == "channels_last_3d" and dtype == torch.float32
                yield Forward(shape, dtype, layout, device, compile=first)
    for kind in (ForwardBackward, AffineAct):
        for layout in LAYOUTS:
            first = layout == "channels_last_3d"
            yield kind(small, torch.float32, layout, device, compile=first)
            yield kind(small, torch.bfloat16, layout, device, compile=False)
    for dtype in (torch.float32, torch.bfloat16):
        yield Step(Shape(1, 256, 1, 14), dtype, "channels_last_3d", device, compile=dtype == torch.float32)


def _suite(tier: str, device: torch.device) -> Iterator[Case]:
    shapes = RESNET + (RESNET_NO_POOL if tier == "full" else ())
    dtypes = (torch.float32, torch.bfloat16)
    for kind in (Forward, ForwardBackward, AffineAct):
        for shape in shapes:
            for dtype in dtypes:
                for layout in LAYOUTS:
                    # Compiling takes most of a run; on a GPU the layout and dtype that models use must do.
                    compile = device.type == "cpu" or (dtype == torch.bfloat16 and layout == "channels_last_3d")
                    yield kind(cut(shape, tier, device), dtype, layout, device, compile)
    for shape in LONG:
        for dtype in dtypes:
            for layout in LAYOUTS if tier == "full" else ("channels_last_3d",):
                yield Forward(shape, dtype, layout, device)
    for shape in RESNET:
        for n in (1, 8):
            for dtype in dtypes:
                yield Step(Shape(n, shape.c, 1, shape.side), dtype, "channels_last_3d", device)


def cut(shape: Shape, tier: str, device: torch.device) -> Shape:
    """The shape with N cut to fit a CPU: the point is the ratio to the baselines, which a few samples show."""
    if device.type == "cpu" and tier != "full":
        while shape.n > 1 and 4 * shape.numel > CPU_CLIP_BYTES:
            shape = replace(shape, n=shape.n // 2)
    return shape


# ---- the hand-written loops ----------------------------------------------------------------------------------------


def _frames_first(x: Tensor, layout: str) -> Tensor:
    """A view whose frames are matrices: [N,T,C,P] of an NCTHW clip, [N,T,P,C] of a channels_last_3d one."""
    n, c, t, height, width = x.shape
    if layout == "NCTHW":
        return x.view(n, c, t, height * width).transpose(1, 2)
    return x.permute(0, 2, 3, 4, 1).view(n, t, height * width, c)


def _mix_batched(source: Tensor, state: Tensor, weight: Tensor, layout: str, out: Tensor) -> None:
    """``out = source + W state`` for one frame of all samples in one call."""
    n = source.shape[0]
    if layout == "NCTHW":
        torch.baddbmm(source, weight.expand(n, -1, -1), state, out=out)
    else:
        torch.baddbmm(source, state, weight.T.expand(n, -1, -1), out=out)


def _mix_per_sample(source: Tensor, state: Tensor, weight: Tensor, layout: str, out: Tensor) -> None:
    """``out = source + W state`` for one frame, one matrix product per sample."""
    for sample in range(source.shape[0]):
        if layout == "NCTHW":
            torch.addmm(source[sample], weight, state[sample], out=out[sample])
        else:
            torch.addmm(source[sample], state[sample], weight.T, out=out[sample])


def _mix_in_place(source: Tensor, state: Tensor, weight: Tensor, layout: str, out: Tensor) -> None:
    """As :func:`_mix_per_sample`, but copying the source first: some libraries do that inside, and slower."""
    out.copy_(source)
    for sample in range(source.shape[0]):
        if layout == "NCTHW":
            out[sample].addmm_(weight, state[sample])
        else:
            out[sample].addmm_(state[sample], weight.T)


Mix = Callable[[Tensor, Tensor, Tensor, str, Tensor], None]
MIXES: dict[str, Mix] = {"baddbmm": _mix_batched, "addmm": _mix_per_sample, "addmm in place": _mix_in_place}


def library_forward(x: Tensor, weight: Tensor, layout: str, mix: Mix) -> Tensor:
    """h [N,C,T,H,W] by one library matrix product per frame (and sample); the state stays in x's dtype."""
    h = torch.empty_like(x)
    source, target = _frames_first(x, layout), _frames_first(h, layout)
    target[:, 0].copy_(source[:, 0])
    for t in range(1, x.shape[2]):
        mix(source[:, t], target[:, t - 1], weight, layout, target[:, t])
    return h


def library_backward(grad_h: Tensor, h: Tensor, weight: Tensor, layout: str, mix: Mix) -> tuple[Tensor, Tensor]:
    """dx and dW: the loop backwards in time, then one library matrix product per sample over all frames."""
    dx = torch.empty_like(grad_h)
    source, target, states = (_frames_first(tensor, layout) for tensor in (grad_h, dx, h))
    transposed = weight.T.contiguous()
    frames = grad_h.shape[2]
    target[:, frames - 1].copy_(source[:, frames - 1])
    for t in range(frames - 2, -1, -1):
        mix(source[:, t], target[:, t + 1], transposed, layout, target[:, t])
    dweight = torch.zeros_like(weight)
    channels = weight.shape[0]
    for sample in range(h.shape[0]):
        later, earlier = target[sample, 1:], states[sample, :-1]
        if layout == "NCTHW":
            later, earlier = later.transpose(0, 1), earlier.transpose(0, 1)
            dweight.addmm_(later.reshape(channels, -1), earlier.reshape(channels, -1).T)
        else:
            dweight.addmm_(later.reshape(-1, channels).T, earlier.reshape(-1, channels))
    return dx, dweight


def library_affine_act(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, layout: str, mix: Mix
) -> tuple[Tensor, Tensor]:
    """y and h_n: per frame a library matrix product into one of two small buffers, then the epilogue in place."""
    y = torch.empty_like(x)
    source, target, rest = (_frames_first(tensor, layout) for tensor in (x, y, residual))
    broadcast = (-1, 1) if layout == "NCTHW" else (-1,)
    gain, offset = (value.to(x.dtype).view(broadcast) for value in (scale, shift))
    now, before = (torch.empty(source[:, 0].shape, dtype=x.dtype, device=x.device) for _ in range(2))
    for t in range(x.shape[2]):
        if t == 0:
            now.copy_(source[:, 0])
        else:
            mix(source[:, t], before, weight, layout, now)
        frame = target[:, t]
        torch.addcmul(offset, gain, now, out=frame)
        frame.add_(rest[:, t]).relu_()
        now, before = before, now
    state = before if layout == "NCTHW" else before.transpose(1, 2)
    return y, state.unflatten(2, x.shape[3:])


# ---- cases ---------------------------------------------------------------------------------------------------------


def _exact_dtype(inputs: Inputs) -> Inputs:
    return {name: value.detach().double().requires_grad_(value.requires_grad) for name, value in inputs.items()}


class _Recurrence(Case):
    op = "recurrent_conv"

    def __init__(
        self, kind: str, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__(kind, str(shape), dtype, layout, device, compile and shape.t <= COMPILE_AT_MOST_FRAMES)
        self.dims = shape

    def clip(self, generator: torch.Generator) -> Tensor:
        s = self.dims
        values = self.normal(generator, s.n, s.c, s.t, s.side, s.side)
        return values.to(self.dtype).contiguous(memory_format=LAYOUTS[self.layout])

    def inputs(self) -> Inputs:
        """A clip and a weight of spectral radius below 1, so that the state stays bounded."""
        generator, c = self.generator(), self.dims.c
        weight = 0.5 * torch.eye(c) + 0.4 / c**0.5 * torch.randn(c, c, generator=generator)
        return {"weight": weight.to(self.device, self.dtype)} | self._more_inputs(generator)

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        return {"x": self.clip(generator)}

    @abc.abstractmethod
    def _ours(self, inputs: Inputs) -> Outputs:
        """The result by the public function."""

    @abc.abstractmethod
    def _by_reference(self, inputs: Inputs, state_dtype: torch.dtype | None = None) -> Outputs:
        """The result by the reference in eager mode."""

    @abc.abstractmethod
    def _with_library(self, inputs: Inputs, mix: Mix) -> Outputs:
        """The result by a hand-written loop over library matrix products."""

    def compiled(self) -> Bind:
        """The reference under torch.compile."""
        return compiled(self._by_reference)

    def exact(self, inputs: Inputs) -> Outputs:
        """The reference in fp64."""
        return self._by_reference(_exact_dtype(inputs))

    def eager(self, inputs: Inputs) -> Outputs:
        """The reference with every step in the case's dtype."""
        return self._by_reference(inputs, self.dtype)

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        return _explained(rcu_ops.explain("recurrent_conv", inputs["x"], inputs["weight"], inputs.get("h0")))

    def candidates(self) -> Sequence[Candidate]:
        """Ours, the reference in eager mode, compiled, and the library loops."""
        found = [self._own_candidate(OURS, self._ours)]
        if self.device.type == "cuda":
            found += [self._own_candidate(name, with_backend(name, self._ours)) for name in ("cuda", "triton")]
            if self.training:
                found.append(in_graph(self._ours, self.device))
        found.append(Candidate.simple("eager", self._by_reference))
        if self.compile:
            found.append(Candidate("compile", {"torch.compile": Variant(self.compiled())}))
        loops = {name: Variant(self._bind_loop(mix)) for name, mix in MIXES.items()}
        found.append(Candidate("library loop", on_device(loops, self.device)))
        return found

    def _own_candidate(self, name: str, call: Callable[[Inputs], Outputs]) -> Candidate:
        variants = {name: Variant(lambda inputs: lambda: call(inputs))}
        # Launch costs are the caller's: without autograd's graph around it, a CUDA graph leaves the kernels alone.
        return Candidate(name, variants if self.training else on_device(variants, self.device), optional=name != OURS)

    def _bind_loop(self, mix: Mix) -> Bind:
        return lambda inputs: lambda: self._with_library(inputs, mix)

    @property
    def state_bytes(self) -> int:
        """One frame of state, kept in fp32."""
        return 4 * self.dims.rows * self.dims.c

    @property
    def clip_bytes(self) -> int:
        """One clip in the case's dtype."""
        return self.dims.numel * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """The weight in the case's dtype."""
        return self.dims.c**2 * self.dtype.itemsize

    @property
    def scan_flops(self) -> int:
        """Of one pass over time; the first frame has no product."""
        return 2 * self.dims.rows * self.dims.c**2 * (self.dims.t - 1)


def _explained(explanation: Explanation) -> tuple[str, str | None]:
    return str(explanation.backend), explanation.plan


class Forward(_Recurrence):
    """h and h_n without h0."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("forward", shape, dtype, layout, device, compile)

    def _ours(self, inputs: Inputs) -> Outputs:
        return rcu_ops.recurrent_conv(inputs["x"], inputs["weight"])

    def _by_reference(self, inputs: Inputs, state_dtype: torch.dtype | None = None) -> Outputs:
        return reference.recurrent_conv(inputs["x"], inputs["weight"], state_dtype=state_dtype)

    def _with_library(self, inputs: Inputs, mix: Mix) -> Outputs:
        h = library_forward(inputs["x"], inputs["weight"], self.layout, mix)
        return h, h[:, :, -1].float()

    @property
    def bytes_moved(self) -> int:
        """x, h, h_n, W."""
        return 2 * self.clip_bytes + self.state_bytes + self.weight_bytes

    @property
    def flops(self) -> int:
        """One scan."""
        return self.scan_flops


class ForwardBackward(_Recurrence):
    """h, then dx and dW for a given gradient of h."""

    training = True

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("forward+backward", shape, dtype, layout, device, compile)

    def inputs(self) -> Inputs:
        """x and the weight require grad."""
        inputs = super().inputs()
        inputs["x"].requires_grad_()
        inputs["weight"].requires_grad_()
        return inputs

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        return {"x": self.clip(generator), "grad_h": self.clip(generator)}

    def _ours(self, inputs: Inputs) -> Outputs:
        h, _ = rcu_ops.recurrent_conv(inputs["x"], inputs["weight"])
        return h, *torch.autograd.grad(h, (inputs["x"], inputs["weight"]), inputs["grad_h"])

    def _by_reference(self, inputs: Inputs, state_dtype: torch.dtype | None = None) -> Outputs:
        h, _ = reference.recurrent_conv(inputs["x"], inputs["weight"], state_dtype=state_dtype)
        return h, *torch.autograd.grad(h, (inputs["x"], inputs["weight"]), inputs["grad_h"])

    def compiled(self) -> Bind:
        """The forward pass under torch.compile, which compiles its backward pass along with it."""
        run = compiled_once(reference.recurrent_conv)

        def bind(inputs: Inputs) -> Thunk:
            def call() -> Outputs:
                h, _ = run()(inputs["x"], inputs["weight"])
                return h, *torch.autograd.grad(h, (inputs["x"], inputs["weight"]), inputs["grad_h"])

            return call

        return bind

    @torch.no_grad()
    def _with_library(self, inputs: Inputs, mix: Mix) -> Outputs:
        h = library_forward(inputs["x"], inputs["weight"], self.layout, mix)
        return h, *library_backward(inputs["grad_h"], h, inputs["weight"], self.layout, mix)

    @property
    def bytes_moved(self) -> int:
        """x, h, grad_h, h again, dx; W and dW."""
        return 5 * self.clip_bytes + 3 * self.weight_bytes

    @property
    def flops(self) -> int:
        """A scan forwards, one backwards, and dW."""
        return 3 * self.scan_flops


class AffineAct(_Recurrence):
    """The fused inference form with a residual."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("fused inference", shape, dtype, layout, device, compile)

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        scale = 1 + 0.1 * torch.randn(self.dims.c, generator=generator)
        shift = 0.1 * torch.randn(self.dims.c, generator=generator)
        return {
            "x": self.clip(generator),
            "residual": self.clip(generator),
            "scale": scale.to(self.device),
            "shift": shift.to(self.device),
        }

    def _ours(self, inputs: Inputs) -> Outputs:
        return rcu_ops.recurrent_conv_affine_act(
            inputs["x"], inputs["weight"], inputs["scale"], inputs["shift"], residual=inputs["residual"]
        )

    def _by_reference(self, inputs: Inputs, state_dtype: torch.dtype | None = None) -> Outputs:
        return reference.recurrent_conv_affine_act(
            inputs["x"],
            inputs["weight"],
            inputs["scale"],
            inputs["shift"],
            residual=inputs["residual"],
            state_dtype=state_dtype,
        )

    def candidates(self) -> Sequence[Candidate]:
        """Also our own operator with separate layers after it: what the fusion brings."""

        def unfused(inputs: Inputs) -> Outputs:
            h, h_n = rcu_ops.recurrent_conv(inputs["x"], inputs["weight"])
            shape = (1, -1, 1, 1, 1)
            gain, offset = (inputs[name].to(self.dtype).view(shape) for name in ("scale", "shift"))
            return torch.addcmul(offset, gain, h).add_(inputs["residual"]).relu_(), h_n

        return [*super().candidates(), Candidate.simple("unfused", unfused)]

    def _with_library(self, inputs: Inputs, mix: Mix) -> Outputs:
        x, weight, scale, shift, residual = (inputs[name] for name in ("x", "weight", "scale", "shift", "residual"))
        y, h_n = library_affine_act(x, weight, scale, shift, residual, self.layout, mix)
        return y, h_n.float()

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        arguments = (inputs[name] for name in ("x", "weight", "scale", "shift"))
        return _explained(rcu_ops.explain("recurrent_conv_affine_act", *arguments, residual=inputs["residual"]))

    @property
    def bytes_moved(self) -> int:
        """x, residual, y, h_n, W."""
        return 3 * self.clip_bytes + self.state_bytes + self.weight_bytes

    @property
    def flops(self) -> int:
        """One scan; the epilogue does not count."""
        return self.scan_flops


class Step(_Recurrence):
    """One frame from a given state, as in streaming."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("step", shape, dtype, layout, device, compile)

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        """The state is fp32 for every dtype, in the layout of a frame of x."""
        state = self.clip(generator).float().select(2, 0)
        return {"x": self.clip(generator), "h0": state}

    def _ours(self, inputs: Inputs) -> Outputs:
        return rcu_ops.recurrent_conv(inputs["x"], inputs["weight"], inputs["h0"])

    def _by_reference(self, inputs: Inputs, state_dtype: torch.dtype | None = None) -> Outputs:
        return reference.recurrent_conv(inputs["x"], inputs["weight"], inputs["h0"], state_dtype=state_dtype)

    def _with_library(self, inputs: Inputs, mix: Mix) -> Outputs:
        x = inputs["x"]
        h = torch.empty_like(x)
        source, state, target = (
            _frames_first(clip, self.layout)[:, 0] for clip in (x, inputs["h0"].to(x.dtype).unsqueeze(2), h)
        )
        mix(source, state, inputs["weight"], self.layout, target)
        return h, h[:, :, -1].float()

    @property
    def bytes_moved(self) -> int:
        """x, h, h0, h_n, W."""
        return 2 * self.clip_bytes + 2 * self.state_bytes + self.weight_bytes

    @property
    def flops(self) -> int:
        """One product."""
        return 2 * self.dims.rows * self.dims.c**2
