"""Cases of ``recurrent_conv_batch_norm``: an RCU with its batch normalisation and ReLU in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

import rcu_ops
from rcu_ops import reference
from rcu_ops.bench.baselines import compiled_once, in_graph, with_backend
from rcu_ops.bench.case import OURS, Bind, Candidate, Case, Inputs, Outputs, Variant
from rcu_ops.bench.recurrent_conv import COMPILE_AT_MOST_FRAMES, LAYOUTS, RESNET, RESNET_NO_POOL, Shape, cut

EPS = 1e-5
LEAVES = ("x", "weight", "gamma", "beta")


def cases(tier: str, device: torch.device) -> list[Case]:
    """The cases of a tier; see :data:`rcu_ops.bench.suite.TIERS`."""
    return list(_quick(device) if tier == "quick" else _suite(tier, device))


def _quick(device: torch.device) -> Iterator[Case]:
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            yield Training(Shape(1, 64, 8, 28), dtype, layout, device, compile=False)


def _suite(tier: str, device: torch.device) -> Iterator[Case]:
    for shape in RESNET + (RESNET_NO_POOL if tier == "full" else ()):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                compile = dtype == torch.bfloat16 and layout == "channels_last_3d"
                yield Training(cut(shape, tier, device), dtype, layout, device, compile)


class Training(Case):
    """y, then the gradients of x, W, gamma and beta for a given gradient of y."""

    op = "recurrent_conv_batch_norm"
    training = True

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__(
            "forward+backward", str(shape), dtype, layout, device, compile and shape.t <= COMPILE_AT_MOST_FRAMES
        )
        self.dims = shape

    def inputs(self) -> Inputs:
        """A clip, a weight of spectral radius below 1, a gradient that is zero where ReLU's mask hangs on rounding."""
        generator, s = self.generator(), self.dims
        c = s.c
        x, grad = (self.normal(generator, s.n, c, s.t, s.side, s.side) for _ in range(2))
        weight = 0.5 * torch.eye(c) + 0.4 / c**0.5 * torch.randn(c, c, generator=generator)
        inputs = {
            "x": x.to(self.dtype).contiguous(memory_format=LAYOUTS[self.layout]),
            "weight": weight.to(self.device, self.dtype),
            "gamma": (1 + 0.1 * torch.randn(c, generator=generator)).to(self.device),
            "beta": (0.1 * torch.randn(c, generator=generator)).to(self.device),
        }
        with torch.no_grad():
            sure = _normalised({name: value.double() for name, value in inputs.items()}).abs() > 0.05
        grad = (grad * sure).to(self.dtype).contiguous(memory_format=LAYOUTS[self.layout])
        return {name: value.requires_grad_() for name, value in inputs.items()} | {"grad": grad}

    def exact(self, inputs: Inputs) -> Outputs:
        """Separate layers in fp64."""
        return _separate({n: v.detach().double().requires_grad_(v.requires_grad) for n, v in inputs.items()})

    def eager(self, inputs: Inputs) -> Outputs:
        """Separate layers with every step in the case's dtype."""
        return _separate(inputs)

    def candidates(self) -> Sequence[Candidate]:
        """Ours; our scan with PyTorch's layers after it: what the fusion brings; eager PyTorch; compiled."""
        found = [Candidate.simple(OURS, _ours, optional=False)]
        if self.device.type == "cuda":
            found += [Candidate.simple(name, with_backend(name, _ours)) for name in ("cuda", "triton")]
            found.append(in_graph(_ours, self.device))
        found.append(Candidate.simple("unfused", _unfused))
        found.append(Candidate.simple("eager", _separate))
        if self.compile:
            found.append(Candidate("compile", {"torch.compile": Variant(_compiled())}))
        return found

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("recurrent_conv_batch_norm", *(inputs[name] for name in LEAVES))
        return str(explanation.backend), explanation.plan

    @property
    def bytes_moved(self) -> int:
        """x in and h out; h in and y out; grad and h in for the sums; grad and h in and dx out; h and dx in for dW."""
        return 11 * self.dims.numel * self.dtype.itemsize + 3 * self.dims.c**2 * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """A scan forwards, one backwards, and dW."""
        return 3 * 2 * self.dims.rows * self.dims.c**2 * (self.dims.t - 1)


def _gradients(y: torch.Tensor, inputs: Inputs) -> Outputs:
    return y, *torch.autograd.grad(y, [inputs[name] for name in LEAVES], inputs["grad"])


def _ours(inputs: Inputs) -> Outputs:
    y, _, _ = rcu_ops.recurrent_conv_batch_norm(*(inputs[name] for name in LEAVES), eps=EPS)
    return _gradients(y, inputs)


def _normalised(inputs: Inputs, scan: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None) -> torch.Tensor:
    dtype = inputs["x"].dtype
    if scan is None:
        h, _ = reference.recurrent_conv(inputs["x"], inputs["weight"], state_dtype=dtype)
    else:
        h, _ = scan(inputs["x"], inputs["weight"])
    return F.batch_norm(h, None, None, inputs["gamma"].to(dtype), inputs["beta"].to(dtype), training=True, eps=EPS)


def _unfused(inputs: Inputs) -> Outputs:
    return _gradients(F.relu(_normalised(inputs, rcu_ops.recurrent_conv)), inputs)


def _separate(inputs: Inputs) -> Outputs:
    return _gradients(F.relu(_normalised(inputs)), inputs)


def _compiled() -> Bind:
    run = compiled_once(lambda given: F.relu(_normalised(given)))
    return lambda inputs: lambda: _gradients(run()(inputs), inputs)
