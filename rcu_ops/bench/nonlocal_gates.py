"""Cases of ``nonlocal_attention`` and ``relational_lstm_step``: attention over few positions with wide heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import rcu_ops
from rcu_ops.bench.baselines import compiled, compiled_once, in_graph, on_device, with_backend
from rcu_ops.bench.case import OURS, Candidate, Case, Inputs, Outputs, Variant
from rcu_ops.reference.nonlocal_gates import lstm_gates

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """B samples of P positions, D = Dv channels per head."""

    b: int
    p: int
    d: int

    def __str__(self) -> str:
        return f"B{self.b} P{self.p} D{self.d}"


SHAPES = (Shape(1, 49, 1024), Shape(24, 49, 1024), Shape(1, 196, 512), Shape(24, 196, 512))
#: Heads too wide for flash attention, keys too many for the matrix-unit kernels: is the library's other one faster?
WIDE = Shape(4, 784, 512)


def cases(tier: str, device: torch.device) -> list[Case]:
    """The cases of a tier; see :data:`rcu_ops.bench.suite.TIERS`."""
    return list(_cases(tier, device))


def _cases(tier: str, device: torch.device) -> Iterator[Case]:
    kinds = (Attention, Step, StepForwardBackward)
    if tier == "quick":
        for kind in kinds:
            for dtype in DTYPES:
                yield kind(Shape(2, 49, 1024), dtype, device, compile=kind is Step and dtype == torch.float32)
        return
    for kind in kinds:
        more = (WIDE,) if kind is Attention and device.type == "cuda" else ()
        for shape in (*SHAPES, *more):
            for dtype in DTYPES:
                cut = shape if device.type == "cuda" or tier == "full" else replace(shape, b=min(shape.b, 4))
                yield kind(cut, dtype, device)


class Step(Case):
    """Four gates over the hidden state, and the cell update."""

    op = "nonlocal_gates"
    kind_name = "step"
    waits = True

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, compile: bool = True) -> None:
        super().__init__(self.kind_name, str(shape), dtype, "contiguous", device, compile)
        self.dims = shape

    def inputs(self) -> Inputs:
        """x_gates, query, key, value [B,4,P,D], scores of unit spread, and a cell in fp32."""
        generator, (b, p, d) = self.generator(), (self.dims.b, self.dims.p, self.dims.d)
        found: Inputs = {}
        for name, spread in (("x_gates", 1.0), ("query", d**-0.25), ("key", d**-0.25), ("value", 1.0)):
            found[name] = (self.normal(generator, b, 4, p, d) * spread).to(self.dtype)
        found["cell"] = torch.randn(b, p, d, generator=generator).to(self.device)
        return {name: value.requires_grad_(self.training) for name, value in found.items()}

    def ours(self, inputs: Inputs) -> Any:
        """By the public function."""
        return rcu_ops.relational_lstm_step(**inputs)

    def plain(self, inputs: Inputs) -> Outputs:
        """In eager PyTorch at the inputs' dtype."""
        scores = inputs["query"] @ inputs["key"].mT
        gates = torch.softmax(scores, -1) @ inputs["value"] + inputs["x_gates"]
        h, c = lstm_gates(gates, inputs["cell"])
        return h.to(gates.dtype), c

    def by_library(self, inputs: Inputs) -> Outputs:
        """The same on the library's attention."""
        relations = torch.nn.functional.scaled_dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], scale=1.0
        )
        h, c = lstm_gates(relations + inputs["x_gates"], inputs["cell"])
        return h.to(relations.dtype), c

    def exact(self, inputs: Inputs) -> Outputs:
        """In fp64."""
        return self.plain({name: value.double() for name, value in inputs.items()})

    def eager(self, inputs: Inputs) -> Outputs:
        """At the case's dtype."""
        return self.plain(inputs)

    def candidates(self) -> Sequence[Candidate]:
        """Ours, eager PyTorch, the library's attention, compiled."""

        def way(name: str, call: Callable[[Inputs], Any]) -> Candidate:
            variants = {name: Variant(lambda inputs: lambda: call(inputs))}
            variants = variants if self.training else on_device(variants, self.device)
            return Candidate(name, variants, optional=name != OURS)

        found = [way(OURS, self.ours)]
        if self.device.type == "cuda":
            found += [way(name, with_backend(name, self.ours)) for name in ("cuda", "triton")]
            if self.training:
                found.append(in_graph(self.ours, self.device))
        found += [way("eager", self.plain), way("scaled_dot_product_attention", self.by_library)]
        if self.compile:
            found.append(Candidate("compile", {"torch.compile": Variant(compiled(self.plain))}))
        return found

    @property
    def head_bytes(self) -> int:
        """One [B,4,P,D] tensor."""
        return 4 * self.dims.b * self.dims.p * self.dims.d * self.dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        """x_gates, query, key, value; cell and c in fp32; h."""
        return 4 * self.head_bytes + self.head_bytes // 4 + 2 * 4 * self.dims.b * self.dims.p * self.dims.d

    @property
    def flops(self) -> int:
        """The two products."""
        return 2 * 4 * self.dims.b * self.dims.p**2 * 2 * self.dims.d

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("relational_lstm_step", **inputs)
        return str(explanation.backend), explanation.plan


class Attention(Step):
    """The relations of four gates alone."""

    kind_name = "attention"
    waits = False

    def inputs(self) -> Inputs:
        """query, key, value."""
        return {name: value for name, value in super().inputs().items() if name in ("query", "key", "value")}

    def ours(self, inputs: Inputs) -> Any:
        """By the public function."""
        return (rcu_ops.nonlocal_attention(inputs["query"], inputs["key"], inputs["value"]),)

    def plain(self, inputs: Inputs) -> Outputs:
        """In eager PyTorch at the inputs' dtype."""
        return (torch.softmax(inputs["query"] @ inputs["key"].mT, -1) @ inputs["value"],)

    def by_library(self, inputs: Inputs) -> Outputs:
        """The library's attention."""
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        return (torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0),)

    @property
    def bytes_moved(self) -> int:
        """query, key, value, out."""
        return 4 * self.head_bytes

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("nonlocal_attention", **inputs)
        return str(explanation.backend), explanation.plan


class StepForwardBackward(Step):
    """The step and its gradients."""

    kind_name = "step, forward+backward"
    training = True
    waits = False

    def _gradients(self, call: Callable[[Inputs], Any], inputs: Inputs) -> Outputs:
        outputs = call(inputs)
        return torch.autograd.grad(outputs, list(inputs.values()), [torch.ones_like(o) for o in outputs])

    def ours(self, inputs: Inputs) -> Any:
        """By the public function."""
        return self._gradients(super().ours, inputs)

    def plain(self, inputs: Inputs) -> Outputs:
        """In eager PyTorch at the inputs' dtype."""
        return self._gradients(super().plain, inputs)

    def by_library(self, inputs: Inputs) -> Outputs:
        """The same on the library's attention."""
        return self._gradients(super().by_library, inputs)

    def candidates(self) -> Sequence[Candidate]:
        """As for the step; compiled forward passes with the gradients that autograd makes of them."""
        found = [c for c in super().candidates() if c.name != "compile"]
        if self.compile:
            run = compiled_once(super().plain)

            def bind(inputs: Inputs) -> Callable[[], Outputs]:
                return lambda: self._gradients(run(), inputs)

            found.append(Candidate("compile", {"torch.compile": Variant(bind)}))
        return found

    @property
    def bytes_moved(self) -> int:
        """The inputs, the gradients that come in (h's and c's), and those that go out."""
        vector = self.dims.b * self.dims.p * self.dims.d
        return 8 * self.head_bytes + self.head_bytes // 4 + 3 * 4 * vector

    @property
    def flops(self) -> int:
        """Forward once, backward twice its products: nothing is computed again."""
        return 3 * super().flops
