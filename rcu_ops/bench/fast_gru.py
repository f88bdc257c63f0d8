"""Cases of ``fast_gru``: forward, forward + backward, one step."""

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

LAYOUTS = ("contiguous", "channels_last")
WEIGHTS = ("weight_ux", "weight_uo", "weight_w", "weight_vx", "weight_vo")


@dataclass(frozen=True)
class Shape:
    """Features [N,K,C,L,H,W] with H = W, and R."""

    n: int
    k: int
    c: int
    r: int
    length: int
    side: int

    def __str__(self) -> str:
        return f"N{self.n} K{self.k} C{self.c} L{self.length} {self.side}x{self.side}"

    @property
    def columns(self) -> int:
        """Positions of one clip, over the batch."""
        return self.n * self.length * self.side**2


PAPER = tuple(Shape(1, k, 2048, 512, length, 7) for k, length in ((8, 4), (16, 2), (32, 1)))
"""FASTER's features of 256 frames; in the full tier also with N = 8 and 32."""
SMALL = (Shape(1, 16, 64, 16, 1, 28), Shape(1, 16, 128, 32, 1, 14))
"""Few channels: what stands between the products shows."""


def cases(tier: str, device: torch.device) -> list[Case]:
    """The cases of a tier; see :data:`rcu_ops.bench.suite.TIERS`."""
    return list(_quick(device) if tier == "quick" else _suite(tier, device))


def _quick(device: torch.device) -> Iterator[Case]:
    narrow, wide = replace(SMALL[0], k=6), Shape(1, 3, 512, 128, 1, 7)
    for shape in (narrow, wide):
        for dtype in (torch.float32, torch.bfloat16):
            yield Forward(shape, dtype, "contiguous", device, compile=shape == narrow and dtype == torch.float32)
    yield ForwardBackward(narrow, torch.float32, "channels_last", device, compile=False)
    yield Step(wide, torch.float32, "contiguous", device, compile=False)


def _suite(tier: str, device: torch.device) -> Iterator[Case]:
    large = [replace(shape, n=n) for n in ((1, 8, 32) if tier == "full" else (1,)) for shape in PAPER]
    for kind in (Forward, ForwardBackward):
        for shape in (*SMALL, *large):
            for dtype in (torch.float32, torch.bfloat16):
                for layout in LAYOUTS if shape in SMALL or tier == "full" else LAYOUTS[:1]:
                    yield kind(shape, dtype, layout, device, compile=shape in SMALL)
    for shape in (*SMALL, *PAPER):
        for dtype in (torch.float32, torch.bfloat16):
            yield Step(shape, dtype, "contiguous", device)


# ---- the hand-written loops ----------------------------------------------------------------------------------------


def library_rows(x: Tensor, weights: Sequence[Tensor], o0: Tensor | None = None) -> Tensor:
    """o [N,K,C,L,H,W] with positions as rows: U_x and V_x once for all clips, then library calls in place per clip."""
    ux, uo, w, vx, vo = weights
    n, k, c, *positions = x.shape
    rows = x.permute(1, 0, 3, 4, 5, 2).reshape(k, -1, c)
    out = torch.empty_like(rows)
    first = 0 if o0 is not None else 1
    o = rows[0] if o0 is None else o0.permute(0, 2, 3, 4, 1).reshape(-1, c)
    if first:
        out[0].copy_(o)
    hidden, candidates = (torch.matmul(rows[first:], weight.T) for weight in (ux, vx))
    r, z, half = torch.empty_like(out[0]), torch.empty_like(out[0]), ux.shape[0] // 2
    for step in range(k - first):
        h = hidden[step].addmm_(o, uo.T).relu_()
        torch.mm(h[:, :half], w[0].T, out=r).sigmoid_()
        torch.mm(h[:, half:], w[1].T, out=z).sigmoid_()
        candidate = candidates[step].addmm_(r.mul_(o), vo.T).tanh_()
        torch.lerp(o, candidate, z, out=out[first + step])
        o = out[first + step]
    return out.view(k, n, *positions, c).permute(1, 0, 5, 2, 3, 4)


def library_features(x: Tensor, weights: Sequence[Tensor], o0: Tensor | None = None) -> Tensor:
    """The same with features as rows, as [N,K,C,L,H,W] lies in memory; per sample."""
    ux, uo, w, vx, vo = weights
    n, k, c, *positions = x.shape
    matrices = x.reshape(n, k, c, -1)
    out = torch.empty_like(matrices)
    first = 0 if o0 is not None else 1
    if first:
        out[:, 0].copy_(matrices[:, 0])
    hidden, candidates = (torch.matmul(weight, matrices[:, first:]) for weight in (ux, vx))
    r, z, half = torch.empty_like(out[0, 0]), torch.empty_like(out[0, 0]), ux.shape[0] // 2
    for sample in range(n):
        o = matrices[sample, 0] if o0 is None else o0[sample].reshape(c, -1)
        for step in range(k - first):
            h = hidden[sample, step].addmm_(uo, o).relu_()
            torch.mm(w[0], h[:half], out=r).sigmoid_()
            torch.mm(w[1], h[half:], out=z).sigmoid_()
            candidate = candidates[sample, step].addmm_(vo, r.mul_(o)).tanh_()
            torch.lerp(o, candidate, z, out=out[sample, first + step])
            o = out[sample, first + step]
    return out.view(n, k, c, *positions)


def differentiable_rows(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """:func:`library_rows` for autograd: nothing in place, so that each step's gates stay for its backward pass."""
    ux, uo, w, vx, vo = weights
    n, k, c, *positions = x.shape
    rows = x.permute(1, 0, 3, 4, 5, 2).reshape(k, -1, c)
    hidden, candidates = (torch.matmul(rows[1:], weight.T) for weight in (ux, vx))
    half, o = ux.shape[0] // 2, rows[0]
    states = [o]
    for step in range(k - 1):
        h = torch.addmm(hidden[step], o, uo.T).relu()
        r, z = torch.mm(h[:, :half], w[0].T).sigmoid(), torch.mm(h[:, half:], w[1].T).sigmoid()
        o = torch.lerp(o, torch.addmm(candidates[step], r * o, vo.T).tanh(), z)
        states.append(o)
    return torch.stack(states).view(k, n, *positions, c).permute(1, 0, 5, 2, 3, 4)


Loop = Callable[..., Tensor]
LOOPS: dict[str, Loop] = {"positions as rows": library_rows, "features as rows": library_features}


# ---- cases ---------------------------------------------------------------------------------------------------------


class _Recurrence(Case):
    op = "fast_gru"

    def __init__(
        self, kind: str, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__(kind, str(shape), dtype, layout, device, compile)
        self.dims = shape

    def features(self, generator: torch.Generator, clips: int) -> Tensor:
        """Random features; channel 0 is 1 or -1, see :meth:`inputs`."""
        s = self.dims
        x = self.normal(generator, s.n, clips, s.c, s.length, s.side, s.side)
        x[:, :, 0] = torch.where(x[:, :, 0] < 0, -1.0, 1.0)
        x = x.to(self.dtype)
        return x if self.layout == "contiguous" else x.movedim(2, -1).contiguous().movedim(-1, 2)

    def inputs(self) -> Inputs:
        """Channel 0 of x opens or closes every ReLU clearly, so that no rounding error flips one."""
        generator, c, r = self.generator(), self.dims.c, self.dims.r
        sizes = ((2 * r, c), (2 * r, c), (2, c, r), (c, c), (c, c))
        scales = (0.5 * c**-0.5, 0.5 * c**-0.5, 0.5 * r**-0.5, c**-0.5, c**-0.5)
        weights = [scale * torch.randn(size, generator=generator) for size, scale in zip(sizes, scales, strict=True)]
        weights[0][:, 0] = torch.where(weights[0][:, 0] < 0, -4.0, 4.0)
        found = {name: weight.to(self.device, self.dtype) for name, weight in zip(WEIGHTS, weights, strict=True)}
        return found | self._more_inputs(generator)

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        return {"x": self.features(generator, self.dims.k)}

    @abc.abstractmethod
    def _results(self, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Outputs:
        """What is timed, with ``run`` for the operator."""

    def _ours(self, inputs: Inputs) -> Outputs:
        return self._results(rcu_ops.fast_gru, inputs)

    def _by_reference(self, inputs: Inputs) -> Outputs:
        return self._results(reference.fast_gru, inputs)

    def exact(self, inputs: Inputs) -> Outputs:
        """The reference in fp64."""
        return self._by_reference(
            {name: v.detach().double().requires_grad_(v.requires_grad) for name, v in inputs.items()}
        )

    def eager(self, inputs: Inputs) -> Outputs:
        """The reference with every step in the case's dtype."""
        return self._results(lambda *args: reference.fast_gru(*args, state_dtype=self.dtype), inputs)

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("fast_gru", *(inputs[name] for name in ("x", *WEIGHTS)))
        return str(explanation.backend), explanation.plan

    def candidates(self) -> Sequence[Candidate]:
        """Ours, the reference in eager mode, compiled, the library loops, and on a GPU these under a CUDA graph.

        Training on a GPU has ours under a graph, too: forward and backward pass in one.
        """
        found = [self._own_candidate(OURS, self._ours)]
        if self.device.type == "cuda":
            found += [self._own_candidate(name, with_backend(name, self._ours)) for name in ("cuda", "triton")]
        found.append(Candidate.simple("eager", self._by_reference))
        if self.compile:
            found.append(Candidate("compile", {"torch.compile": Variant(self.compiled())}))
        if self.training:
            loops = {"positions as rows": Variant(self._bind_loop(differentiable_rows))}
            found.append(Candidate("library loop", loops))
            if self.device.type == "cuda":
                found.append(in_graph(self._ours, self.device))
                found.append(Candidate("graphed loop", on_device(loops, self.device)))
            return found
        loops = {name: Variant(self._bind_loop(loop)) for name, loop in LOOPS.items()}
        found.append(Candidate("library loop", loops))
        if self.device.type == "cuda":
            found.append(Candidate("graphed loop", on_device(loops, self.device)))
        return found

    def compiled(self) -> Bind:
        """The reference under torch.compile."""
        return compiled(self._by_reference)

    def _own_candidate(self, name: str, call: Callable[[Inputs], Outputs]) -> Candidate:
        variants = {name: Variant(lambda inputs: lambda: call(inputs))}
        # Launch costs are the caller's: without autograd's graph around it, a CUDA graph leaves the kernels alone.
        return Candidate(name, variants if self.training else on_device(variants, self.device), optional=name != OURS)

    def _bind_loop(self, loop: Loop) -> Bind:
        def run(x: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            weights, more = arguments[:5], (o0.to(x.dtype) for o0 in arguments[5:])
            o = loop(x, weights, *more)
            return o, o[:, -1].float()

        return lambda inputs: lambda: self._results(run, inputs)

    @property
    def steps(self) -> int:
        """Of the recurrence; the first clip is the first state."""
        return self.dims.k - 1

    @property
    def step_flops(self) -> int:
        """Of one step."""
        return 2 * self.dims.columns * (6 * self.dims.r * self.dims.c + 2 * self.dims.c**2)

    @property
    def weight_bytes(self) -> int:
        """All weights in the case's dtype."""
        return (6 * self.dims.r * self.dims.c + 2 * self.dims.c**2) * self.dtype.itemsize

    @property
    def clip_bytes(self) -> int:
        """One clip's features in the case's dtype."""
        return self.dims.columns * self.dims.c * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """One state, kept in fp32."""
        return 4 * self.dims.columns * self.dims.c


class Forward(_Recurrence):
    """o and o_n without o0."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("forward", shape, dtype, layout, device, compile)

    def _results(self, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Outputs:
        return run(*(inputs[name] for name in ("x", *WEIGHTS)))

    @property
    def bytes_moved(self) -> int:
        """x, o, o_n, the weights."""
        return 2 * self.dims.k * self.clip_bytes + self.state_bytes + self.weight_bytes

    @property
    def flops(self) -> int:
        """All steps."""
        return self.steps * self.step_flops


class ForwardBackward(_Recurrence):
    """o, then the gradients of x and the weights for a given gradient of o."""

    training = True

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("forward+backward", shape, dtype, layout, device, compile)

    def inputs(self) -> Inputs:
        """x and the weights require grad."""
        inputs = super().inputs()
        for name in ("x", *WEIGHTS):
            inputs[name].requires_grad_()
        return inputs

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        return {name: self.features(generator, self.dims.k) for name in ("x", "grad_o")}

    def _results(self, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Outputs:
        leaves = [inputs[name] for name in ("x", *WEIGHTS)]
        o, _ = run(*leaves)
        return o, *torch.autograd.grad(o, leaves, inputs["grad_o"])

    def compiled(self) -> Bind:
        """The forward pass under torch.compile, which compiles its backward pass along with it."""
        run = compiled_once(reference.fast_gru)
        return lambda inputs: lambda: self._results(run(), inputs)

    @property
    def bytes_moved(self) -> int:
        """x, o, grad_o, o again, dx; the weights twice and their gradients."""
        return 5 * self.dims.k * self.clip_bytes + 3 * self.weight_bytes

    @property
    def flops(self) -> int:
        """All steps, backwards through the states, and the weights' gradients."""
        return 3 * self.steps * self.step_flops


class Step(_Recurrence):
    """One clip from a given state, as in streaming."""

    waits = True

    def __init__(
        self, shape: Shape, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        super().__init__("step", replace(shape, k=1), dtype, layout, device, compile)

    def _more_inputs(self, generator: torch.Generator) -> Inputs:
        """The state is fp32 for every dtype."""
        return {"x": self.features(generator, 1), "o0": self.features(generator, 1)[:, 0].float()}

    def _results(self, run: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> Outputs:
        return run(*(inputs[name] for name in ("x", *WEIGHTS, "o0")))

    @property
    def steps(self) -> int:
        """One."""
        return 1

    @property
    def bytes_moved(self) -> int:
        """x, o, o0, o_n, the weights."""
        return 2 * self.clip_bytes + 2 * self.state_bytes + self.weight_bytes

    @property
    def flops(self) -> int:
        """One step."""
        return self.step_flops
