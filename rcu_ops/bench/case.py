"""What a benchmark is: inputs, the exact result, and candidates that compute it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rcu_ops.bench.correctness import check_outputs
from rcu_ops.bench.timing import Thunk, Timer

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

OURS = "rcu_ops"

OWN = frozenset({OURS, "cuda", "triton", "graphed", "unfused"})
"""Candidates that are rcu-ops: as it chooses, by each backend of a GPU, in a CUDA graph, in parts. A wrong result of
these is a failure; the others are baselines."""

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


Bind = Callable[[Inputs], Thunk]
"""Takes inputs, returns the call to time."""


@dataclass(frozen=True)
class Variant:
    """A call to time, and how to check it.

    Attributes:
        bind: returns the call for given inputs.
        verify: computes the outputs to check; by default they are what the timed call returns.
        eager: the yardstick, where eager PyTorch computing in this way differs from the case's: a convolution over
            several frames at once may take another algorithm, with another error, than one over a single frame.
    """

    bind: Bind
    verify: Callable[[Inputs], Outputs] | None = None
    eager: Callable[[Inputs], Outputs] | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case's result.

    Attributes:
        name: in tables; :data:`OURS` is the operator under test.
        variants: by name.  With several, all are checked and the one that runs fastest in a short trial is timed.
        optional: a failure to prepare it (no compiler, not supported on this device) leaves it out, with the reason.
    """

    name: str
    variants: Mapping[str, Variant]
    optional: bool = True

    @classmethod
    def simple(cls, name: str, call: Callable[[Inputs], Any], *, optional: bool = True) -> Candidate:
        """A candidate with one variant that calls a function of the inputs."""
        return cls(name, {name: Variant(lambda inputs: lambda: call(inputs))}, optional)


class Case(abc.ABC):
    """One benchmark.

    Attributes:
        op: the operator or system, as in ``--op``.
        kind: what is done with it ("forward", "step", ...).
        shape: the shape in words, such as "N2 C64 T16 56x56".
        dtype, layout, device: of the inputs.
        compile: whether ``torch.compile`` is among the baselines; compiling takes most of a run's time.
        training: grad mode is on.
        waits: somebody waits for every single result, so the time of single calls (p50, p99) matters too.
    """

    op: str
    training: bool = False
    waits: bool = False

    def __init__(
        self, kind: str, shape: str, dtype: torch.dtype, layout: str, device: torch.device, compile: bool = True
    ) -> None:
        self.kind = kind
        self.shape = shape
        self.dtype = dtype
        self.layout = layout
        self.device = device
        self.compile = compile

    @property
    def id(self) -> str:
        """A name that no other case has."""
        return f"{self.op} {self.kind} {self.shape} {DTYPE_NAMES[self.dtype]} {self.layout}"

    @abc.abstractmethod
    def inputs(self) -> Inputs:
        """The same inputs at every call, on the case's device."""

    @abc.abstractmethod
    def exact(self, inputs: Inputs) -> Outputs:
        """The result in fp64."""

    @abc.abstractmethod
    def eager(self, inputs: Inputs) -> Outputs:
        """The result by eager PyTorch at the case's dtype: the yardstick of the tolerance rule."""

    @abc.abstractmethod
    def candidates(self) -> Sequence[Candidate]:
        """Ours first, then the baselines."""

    @property
    @abc.abstractmethod
    def bytes_moved(self) -> int:
        """Inputs read once and outputs written once."""

    @property
    @abc.abstractmethod
    def flops(self) -> int:
        """Two per multiplication with addition."""

    @abc.abstractmethod
    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """Which backend runs ours, and how, if it says so."""

    def generator(self) -> torch.Generator:
        """Random numbers for :meth:`inputs`."""
        return torch.Generator().manual_seed(20190911)

    def normal(self, generator: torch.Generator, *size: int) -> Tensor:
        """The generator's next normal numbers in fp32, on the case's device and, for speed, drawn there."""
        if self.device.type == "cpu":
            return torch.randn(size, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.randn(size, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)


@dataclass
class Prepared:
    """A case with its inputs and yardsticks in memory; hands out checked calls."""

    case: Case
    inputs: Inputs
    exact: Outputs
    eager: Outputs
    chosen: dict[str, str] = field(default_factory=dict)
    """Per candidate the variant that was taken."""
    error_used: dict[str, float] = field(default_factory=dict)
    """Per candidate the share of the allowed error that it used."""

    @classmethod
    def of(cls, case: Case) -> Prepared:
        """Make inputs and yardsticks."""
        inputs = case.inputs()
        with torch.set_grad_enabled(case.training):
            exact, eager = _detached(case.exact(inputs)), _detached(case.eager(inputs))
        return cls(case, inputs, exact, eager)

    def thunk(self, candidate: Candidate, timer: Timer) -> Thunk:
        """The candidate's call, after checking every variant and choosing the fastest.

        Raises:
            WrongResultError: outside the tolerance rule.
            Exception: whatever the candidate raises when it cannot run here.
        """
        best: tuple[float, str, Thunk] | None = None
        for name, variant in candidate.variants.items():
            with torch.set_grad_enabled(self.case.training):
                thunk = self._in_grad_mode(variant.bind(self.inputs))
                outputs = variant.verify(self.inputs) if variant.verify else thunk()
                eager = variant.eager(self.inputs) if variant.eager else self.eager
            used = check_outputs(_detached(outputs), self.exact, _detached(eager))
            self.error_used[candidate.name] = max(used, self.error_used.get(candidate.name, 0.0))
            seconds = 0.0
            if len(candidate.variants) > 1:
                seconds = min(timer.block(thunk, 1) for _ in range(3))
            if best is None or seconds < best[0]:
                best = (seconds, name, thunk)
        assert best is not None, f"{candidate.name} has no variants"
        self.chosen[candidate.name] = best[1]
        return best[2]

    def _in_grad_mode(self, call: Callable[[], Any]) -> Thunk:
        training = self.case.training

        def thunk() -> Any:
            with torch.set_grad_enabled(training):
                return call()

        return thunk


def _detached(outputs: Sequence[Tensor]) -> Outputs:
    return tuple(output.detach() for output in outputs)
