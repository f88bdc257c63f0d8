"""Cases of ``cycle_consistency`` (SRTG's gate) and of ``temporal_cycle_loss``, forward + backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import rcu_ops
from rcu_ops import reference
from rcu_ops.bench.baselines import compiled, compiled_once, on_device, with_backend
from rcu_ops.bench.case import OURS, Candidate, Case, Inputs, Outputs, Variant
from rcu_ops.reference.cycle_consistency import loss_of_landing
from rcu_ops.reference.recurrent_conv import state_dtype_of


@dataclass(frozen=True)
class Shape:
    """Two sequences [N,T,C]."""

    n: int
    t: int
    c: int

    def __str__(self) -> str:
        return f"N{self.n} T{self.t} C{self.c}"


CLIPS = tuple(Shape(32, 16, c) for c in (64, 256, 512, 1024, 2048))
LONG = (Shape(1, 512, 128), Shape(8, 2048, 128))
LOSSES = (Shape(1, 32, 128), Shape(16, 32, 128), Shape(4, 256, 128), Shape(1, 512, 128))
#: Divides squared distances of about 16: at 1 every query has one partner, at this one all frames have a say.
FLAT = 100.0
DTYPES = (torch.float32, torch.bfloat16)


def cases(tier: str, device: torch.device) -> list[Case]:
    """The cases of a tier; see :data:`rcu_ops.bench.suite.TIERS`."""
    return list(_quick(device) if tier == "quick" else _suite(tier, device))


def _quick(device: torch.device) -> Iterator[Case]:
    for shape in (Shape(8, 16, 64), Shape(8, 16, 512), Shape(1, 128, 128)):
        for dtype in DTYPES:
            yield Gate(shape, dtype, device, compile=shape.c == 512 and dtype == torch.float32)
    yield Gate(Shape(1, 128, 128), torch.float32, device, compile=False, temperature=FLAT)
    yield Loss(Shape(4, 32, 128), torch.float32, device)


def _suite(tier: str, device: torch.device) -> Iterator[Case]:
    for shape in (*CLIPS, *LONG):
        if device.type == "cpu" and tier != "full":
            shape = replace(shape, n=max(1, min(shape.n, 8 if shape.t == 16 else 1)))
        for dtype in DTYPES:
            yield Gate(shape, dtype, device)
            if shape.t > CLIPS[0].t and dtype == torch.float32:
                yield Gate(shape, dtype, device, temperature=FLAT)
    for shape in LOSSES:
        yield Loss(shape, torch.float32, device)
    yield Loss(LOSSES[-2], torch.bfloat16, device)
    yield Loss(LOSSES[-2], torch.float32, device, of="classification")


# ---- ways to compute the gate --------------------------------------------------------------------------------------


def _verdict(index_ab: Tensor, index_ba: Tensor) -> Outputs:
    frames = torch.arange(index_ab.shape[1], device=index_ab.device)
    return ((index_ab == frames) & (index_ba == frames)).all(1), index_ab, index_ba


def over_frames(inputs: Inputs, temperature: float = 1.0) -> Outputs:
    """As published code does it: frame by frame, in both directions."""
    found = []
    for queries, keys in ((inputs["a"], inputs["b"]), (inputs["b"], inputs["a"])):
        nearest = []
        for t in range(queries.shape[1]):
            distance = (queries[:, t : t + 1] - keys).square().sum(-1)
            soft = (torch.softmax(-distance / temperature, -1).unsqueeze(-1) * keys).sum(1, keepdim=True)
            nearest.append((soft - keys).square().sum(-1).argmin(-1))
        found.append(torch.stack(nearest, 1))
    return _verdict(*found)


def with_cdist(inputs: Inputs, temperature: float = 1.0) -> Outputs:
    """torch.cdist and softmax."""
    a, b = inputs["a"], inputs["b"]
    distance = torch.cdist(a, b).square()
    logits = -distance / temperature
    to_b, to_a = torch.softmax(logits, -1) @ b, torch.softmax(logits.mT, -1) @ a
    return _verdict(torch.cdist(to_b, b).argmin(-1), torch.cdist(to_a, a).argmin(-1))


def with_products(inputs: Inputs, temperature: float = 1.0) -> Outputs:
    """Squares and one matrix product per matrix of distances, on centred data: the best a library has."""
    mean = inputs["a"].mean(1, keepdim=True)
    a, b = inputs["a"] - mean, inputs["b"] - mean
    size_a, size_b = a.square().sum(-1), b.square().sum(-1)
    distance = torch.baddbmm(size_a.unsqueeze(2) + size_b.unsqueeze(1), a, b.mT, alpha=-2)
    logits = -distance / temperature
    to_b, to_a = torch.softmax(logits, -1) @ b, torch.softmax(logits.mT, -1) @ a
    index_ab = torch.baddbmm(size_b.unsqueeze(1), to_b, b.mT, alpha=-2).argmin(-1)
    return _verdict(index_ab, torch.baddbmm(size_a.unsqueeze(1), to_a, a.mT, alpha=-2).argmin(-1))


def differences(inputs: Inputs, temperature: float = 1.0) -> Outputs:
    """The reference's way at the inputs' dtype, without a loop."""
    found = []
    for queries, keys in ((inputs["a"], inputs["b"]), (inputs["b"], inputs["a"])):
        distance = (queries.unsqueeze(2) - keys.unsqueeze(1)).square().sum(-1)
        soft = torch.softmax(-distance / temperature, -1) @ keys
        found.append((soft.unsqueeze(2) - keys.unsqueeze(1)).square().sum(-1).argmin(-1))
    return _verdict(*found)


# ---- cases ---------------------------------------------------------------------------------------------------------


class _Alignment(Case):
    op = "cycle_consistency"

    def __init__(
        self, kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, compile: bool, words: str
    ) -> None:
        super().__init__(kind, words, dtype, "NTC", device, compile)
        self.dims = shape

    def inputs(self) -> Inputs:
        """A sequence and a noisy copy: every frame's partner is well apart from the others at every dtype."""
        generator, s = self.generator(), self.dims
        a = torch.randn(s.n, s.t, s.c, generator=generator) * (8 / s.c) ** 0.5
        b = a + 0.05 * (8 / s.c) ** 0.5 * torch.randn(s.n, s.t, s.c, generator=generator)
        return {"a": a.to(self.device, self.dtype), "b": b.to(self.device, self.dtype)}

    def own(self, call: Callable[[Inputs], Any], verify: Callable[[Any], Outputs]) -> list[Candidate]:
        """Ours as ``auto`` takes it and, on a GPU, by each backend."""
        ways = {OURS: call}
        if self.device.type == "cuda":
            ways |= {name: with_backend(name, call) for name in ("cuda", "triton")}
        return [self.way(name, way, verify, optional=name != OURS) for name, way in ways.items()]

    def way(
        self, name: str, call: Callable[[Inputs], Any], verify: Callable[[Any], Outputs], *, optional: bool = True
    ) -> Candidate:
        """A candidate whose outputs ``verify`` makes comparable."""
        variant = Variant(lambda inputs: lambda: call(inputs), verify=lambda inputs: verify(call(inputs)))
        variants = {name: variant}
        return Candidate(name, variants if self.training else on_device(variants, self.device), optional)

    @property
    def pairs(self) -> int:
        """Pairs of frames, over the batch."""
        return self.dims.n * self.dims.t**2


def _as_numbers(outputs: Outputs) -> Outputs:
    return tuple(output.float() for output in outputs)


class Gate(_Alignment):
    """Gate and both index maps."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool = True,
        temperature: float = 1.0,
    ) -> None:
        words = str(shape) if temperature == 1 else f"{shape} temperature {temperature:g}"
        super().__init__("gate", shape, dtype, device, compile, words)
        self.temperature = temperature

    def exact(self, inputs: Inputs) -> Outputs:
        """Distances in fp64."""
        wide = {name: value.double() for name, value in inputs.items()}
        return tuple(output.double() for output in with_products(wide, self.temperature))

    def eager(self, inputs: Inputs) -> Outputs:
        """With torch.cdist, in fp32: indices, so there is no error to be twice as large as."""
        return _as_numbers(with_cdist({name: value.float() for name, value in inputs.items()}, self.temperature))

    def candidates(self) -> Sequence[Candidate]:
        """Ours, eager PyTorch in four ways, and the loop over frames."""

        def as_fp32(function: Callable[[Inputs, float], Outputs]) -> Callable[[Inputs], Outputs]:
            # torch.cdist does not take bf16, and bf16 distances would not find the nearest frame.
            return lambda inputs: function({name: value.float() for name, value in inputs.items()}, temperature)

        temperature = self.temperature
        found = self.own(
            lambda inputs: rcu_ops.cycle_consistency(inputs["a"], inputs["b"], temperature=temperature), _as_numbers
        )
        if self.pairs * self.dims.c <= 2**26:  # its temporaries have that many elements
            found.append(self.way("eager", as_fp32(differences), _as_numbers))
            if self.compile:
                bind = compiled(as_fp32(differences))
                found.append(Candidate("compile", {"torch.compile": Variant(bind, lambda i: _as_numbers(bind(i)()))}))
        found.append(self.way("cdist", as_fp32(with_cdist), _as_numbers))
        found.append(self.way("matrix products", as_fp32(with_products), _as_numbers))
        found.append(self.way("loop over frames", as_fp32(over_frames), _as_numbers))
        return found

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("cycle_consistency", inputs["a"], inputs["b"])
        return str(explanation.backend), explanation.plan

    @property
    def bytes_moved(self) -> int:
        """a and b, the index maps."""
        s = self.dims
        return 2 * s.n * s.t * (s.c * self.dtype.itemsize + 8) + s.n

    @property
    def flops(self) -> int:
        """Three matrices of distances and two products with them, or five passes over the channels, the fewer."""
        s = self.dims
        return min(2 * self.pairs * (3 * s.c + 2 * s.t), 2 * self.pairs * 5 * s.c)


class Loss(_Alignment):
    """A loss, ``of`` regression or classification, and its gradients."""

    training = True

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool = True,
        of: str = "regression",
    ) -> None:
        words = str(shape) if of == "regression" else f"{shape} {of}"
        super().__init__("loss, forward+backward", shape, dtype, device, compile, words)
        self.of = of

    def inputs(self) -> Inputs:
        """As for the gate, requiring gradients."""
        return {name: value.requires_grad_() for name, value in super().inputs().items()}

    def _of_landing(self, landing: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return loss_of_landing(landing, None, None, self.of, 0.001, 1e-2)

    @staticmethod
    def _with_gradients(rows: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Outputs:
        """The mean of ``rows`` of the sequences and its gradients; 16-bit sequences are taken as fp32, as ours does."""
        state = state_dtype_of(inputs["a"].dtype)
        loss = rows(inputs["a"].to(state), inputs["b"].to(state)).mean()
        return (loss.detach()[None], *torch.autograd.grad(loss, (inputs["a"], inputs["b"])))

    def _plain(self, inputs: Inputs) -> Outputs:
        def rows(a: Tensor, b: Tensor) -> Tensor:
            soft, _ = reference.soft_nearest_neighbor(a, b, state_dtype=a.dtype)
            return self._of_landing(reference.cycle_back(soft, a, state_dtype=a.dtype))

        return self._with_gradients(rows, inputs)

    def exact(self, inputs: Inputs) -> Outputs:
        """The reference in fp64."""
        return self._plain({name: value.detach().double().requires_grad_() for name, value in inputs.items()})

    def eager(self, inputs: Inputs) -> Outputs:
        """The reference in fp32."""
        return self._plain(inputs)

    def candidates(self) -> Sequence[Candidate]:
        """Ours, eager PyTorch as the reference and with torch.cdist, the latter compiled, and the loop over pairs."""

        def ours(inputs: Inputs) -> Outputs:
            loss = rcu_ops.temporal_cycle_loss(inputs["a"], inputs["b"], kind=self.of, min_variance=1e-2)
            return (loss.detach()[None], *torch.autograd.grad(loss, (inputs["a"], inputs["b"])))

        def pair(a: Tensor, b: Tensor) -> Tensor:
            soft = torch.softmax(-torch.cdist(a, b).square(), -1) @ b
            logits = -torch.cdist(soft, a).square()
            frame = torch.arange(a.shape[-2], device=a.device, dtype=a.dtype)
            p = logits.softmax(-1)
            mean = (p * frame).sum(-1)
            variance = (p * (frame - mean.unsqueeze(-1)).square()).sum(-1)
            landing = logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1), mean, variance
            return self._of_landing(landing)

        def with_gradients(rows: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Outputs]:
            return lambda inputs: self._with_gradients(rows, inputs)

        def over_pairs(first: Tensor, second: Tensor) -> Tensor:
            pairs = zip(first, second, strict=True)
            return torch.cat([pair(a.unsqueeze(0), b.unsqueeze(0)) for a, b in pairs])

        # The forward pass: its backward pass is compiled along with it, and gradients are asked for outside.
        run = compiled_once(pair)

        def bind_compiled(inputs: Inputs) -> Callable[[], Outputs]:
            return lambda: self._with_gradients(run(), inputs)

        found = [*self.own(ours, tuple), self.way("eager", self._plain, tuple)]
        if self.compile:
            found.append(Candidate("compile", {"torch.compile": Variant(bind_compiled)}))
        found.append(self.way("cdist", with_gradients(pair), tuple))
        found.append(self.way("loop over pairs", with_gradients(over_pairs), tuple))
        return found

    def backend(self, inputs: Inputs) -> tuple[str, str | None]:
        """As :func:`rcu_ops.explain` says it."""
        explanation = rcu_ops.explain("temporal_cycle_loss", inputs["a"], inputs["b"])
        return str(explanation.backend), explanation.plan

    @property
    def bytes_moved(self) -> int:
        """a, b and their gradients."""
        s = self.dims
        return 4 * s.n * s.t * s.c * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """As the operators count them: three products forward, eight backward."""
        return 2 * self.pairs * self.dims.c * 11
