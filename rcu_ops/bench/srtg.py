"""Cases of ``srtg_squeeze`` and ``srtg_fuse``: the data path of an SRTG block."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import rcu_ops
from rcu_ops import reference
from rcu_ops.bench.baselines import compiled, on_device, with_backend
from rcu_ops.bench.case import OURS, Candidate, Case, Inputs, Outputs, Variant
from rcu_ops.bench.recurrent_conv import LAYOUTS, Shape

DTYPES = (torch.float32, torch.bfloat16)
STAGES = (Shape(16, 256, 8, 28), Shape(16, 512, 8, 14), Shape(16, 2048, 8, 7))


def cases(tier: str, device: torch.device) -> list[Case]:
    """The cases of a tier; see :data:`rcu_ops.bench.suite.TIERS`."""
    return list(_quick(device) if tier == "quick" else _suite(tier, device))


def _quick(device: torch.device) -> Iterator[Case]:
    for kind in (Squeeze, Fuse, FuseBackward):
        for layout in LAYOUTS:
            for dtype in DTYPES:
                first = layout == "NCTHW" and dtype == torch.float32 and kind is Fuse
                yield kind(Shape(1, 256, 8, 28), dtype, layout, device, compile=first)


def _suite(tier: str, device: torch.device) -> Iterator[Case]:
    for kind in (Squeeze, Fuse, FuseBackward):
        for shape in STAGES:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    cut = shape if device.type == "cuda" or tier == "full" else Shape(2, shape.c, shape.t, shape.side)
                    yield kind(cut, dtype, layout, device)


class _DataPath(Case):
    op = "srtg"
    kind_name: str

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__(self.kind_name, str(shape), dtype, layout, device, compile)
        self.dims = shape

    def inputs(self) -> Inputs:
        """x, h, and gates that are open but for one sample."""
        generator, s = self.generator(), self.dims
        x, grad = (self.normal(generator, s.n, s.c, s.t, s.side, s.side) for _ in range(2))
        clips = {
            name: value.to(self.dtype).contiguous(memory_format=LAYOUTS[self.layout])
            for name, value in (("x", x), ("grad", grad))
        }
        h = torch.randn(s.n, s.t, s.c, generator=generator).to(self.device)
        gate = torch.arange(s.n, device=self.device) != 1
        return {**clips, "h": h, "gate": gate}

    @abc.abstractmethod
    def ours(self, inputs: Inputs) -> Any:
        """By the public function."""

    @abc.abstractmethod
    def plain(self, inputs: Inputs, wide: bool = False) -> Outputs:
        """In eager PyTorch at the case's dtype, or in fp64."""

    def exact(self, inputs: Inputs) -> Outputs:
        """In fp64."""
        return self.plain({n: v if v.dtype == torch.bool else v.double() for n, v in inputs.items()}, wide=True)

    def eager(self, inputs: Inputs) -> Outputs:
        """At the case's dtype."""
        return self.plain(inputs)

    def candidates(self) -> Sequence[Candidate]:
        """Ours, eager PyTorch, compiled."""

        def way(name: str, call: Callable[[Inputs], Any]) -> Candidate:
            variants = {name: Variant(lambda inputs: lambda: call(inputs))}
            return Candidate(name, on_device(variants, self.device), optional=name != OURS)

        found = [way(OURS, self.ours)]
        if self.device.type == "cuda":
            found += [way(name, with_backend(name, self.ours)) for name in ("cuda", "triton")]
        found.append(way("eager", self.plain))
        if self.compile:
            found.append(Candidate("compile", {"torch.compile": Variant(compiled(self.plain))}))
        return found

    @property
    def clip_bytes(self) -> int:
        """One clip in the case's dtype."""
        return self.dims.numel * self.dtype.itemsize

    @property
    def vector_bytes(self) -> int:
        """One number per sample, frame and channel, in fp32."""
        return 4 * self.dims.n * self.dims.t * self.dims.c

    @property
    def flops(self) -> int:
        """One per element: bytes bind by far."""
        return self.dims.numel


class Squeeze(_DataPath):
    """Spatial means."""

    kind_name = "squeeze"

    def ours(self, inputs: Inputs) -> Any:
        """By the public function."""
        return (rcu_ops.srtg_squeeze(inputs["x"]),)

    def plain(self, inputs: Inputs, wide: bool = False) -> Outputs:
        """x.mean, summed in fp32, as the LSTM after it takes it."""
        dtype = torch.float64 if wide else torch.float32
        return (inputs["x"].mean((3, 4), dtype=dtype).transpose(1, 2).contiguous(),)

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("srtg_squeeze", inputs["x"])
        return str(explanation.backend), explanation.plan

    @property
    def bytes_moved(self) -> int:
        """x and the means."""
        return self.clip_bytes + self.vector_bytes


class Fuse(_DataPath):
    """Gate and product."""

    kind_name = "fuse"

    def ours(self, inputs: Inputs) -> Any:
        """By the public function."""
        return (rcu_ops.srtg_fuse(inputs["x"], inputs["h"], inputs["gate"]),)

    def plain(self, inputs: Inputs, wide: bool = False) -> Outputs:
        """Product, then torch.where, at x's dtype."""
        x, gate = inputs["x"], inputs["gate"][:, None, None, None, None]
        return (torch.where(gate, x * inputs["h"].to(x.dtype).transpose(1, 2)[..., None, None], x),)

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("srtg_fuse", inputs["x"], inputs["h"], inputs["gate"])
        return str(explanation.backend), explanation.plan

    @property
    def bytes_moved(self) -> int:
        """x, y and h."""
        return 2 * self.clip_bytes + self.vector_bytes


class FuseBackward(Fuse):
    """Gradients of gate and product, for x and h."""

    kind_name = "fuse backward"

    def ours(self, inputs: Inputs) -> Any:
        """By the registered operator."""
        return torch.ops.rcu_ops.srtg_fuse_backward(inputs["grad"], inputs["x"], inputs["h"], inputs["gate"])

    def plain(self, inputs: Inputs, wide: bool = False) -> Outputs:
        """The same as elementwise operations and a sum at x's dtype."""
        if wide:
            return reference.srtg_fuse_backward(inputs["grad"], inputs["x"], inputs["h"], inputs["gate"])
        x, grad, gate = inputs["x"], inputs["grad"], inputs["gate"]
        factor = inputs["h"].to(x.dtype).transpose(1, 2)[..., None, None]
        dh = (grad * x).sum((3, 4), dtype=torch.float32).transpose(1, 2)
        dx = torch.where(gate[:, None, None, None, None], grad * factor, grad)
        return dx, torch.where(gate[:, None, None], dh, 0)

    @property
    def bytes_moved(self) -> int:
        """x, grad, dx, h and dh."""
        return 3 * self.clip_bytes + 2 * self.vector_bytes
