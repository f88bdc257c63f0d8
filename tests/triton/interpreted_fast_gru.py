"""Runs the Triton kernels of fast_gru in Triton's interpreter against the reference, in a process of its own.

Prints one line per case, "ok NAME" or "FAILED NAME: why". bf16 is not run here: the interpreter computes it wrongly.
fp32 is run with the library's products, and as TF32 with the kernels' own, which the interpreter computes in full fp32.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rcu_ops.ops import _triton
from tests.ops import extended_precision
from tests.ops.test_fast_gru import LAYOUTS, RESULTS, Errors, eager, gradients, inputs, leaves_of
from tests.triton import reporting

kernels = _triton.kernels("fast_gru")


def precision(name: str) -> None:
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")


def both_ways(
    shape: tuple[int, ...], hidden: int, kind: str, with_o0: bool, layout: str = "contiguous", outputs: str = "both"
) -> None:
    """Forward and backward; the errors of two draws judged together."""
    dtype = torch.float16 if kind == "fp16" else torch.float32
    errors = Errors()
    for draw in range(2):
        tensors = inputs(shape, hidden, dtype, with_o0)
        grads: list[Tensor | None] = [torch.randn(shape).to(dtype), torch.randn(shape[:1] + shape[2:])]
        if outputs != "both":
            grads[int(outputs == "o")] = None
        precision("ieee")
        exact, wanted = extended_precision.fast_gru(tensors, *grads)
        rough_leaves = leaves_of(tensors)
        rough = eager(rough_leaves)
        roughly = gradients(rough, rough_leaves, grads)
        laid_out = [LAYOUTS[layout](tensors[0]), *tensors[1:]]
        if layout != "contiguous":
            laid_out[1:6] = [w.transpose(-1, -2).contiguous().transpose(-1, -2) for w in tensors[1:6]]
            grads[0] = None if grads[0] is None else LAYOUTS[layout](grads[0])
        precision(kind)
        o, o_n, *saved = kernels.forward(*laid_out, True)
        for name, *values in zip(("o", "o_n"), (o, o_n), exact, rough, strict=True):
            errors.add(name, *values)
        got = kernels.backward(*grads, *laid_out, o, *saved, True, True)
        found = [g for g in wanted if g is not None]
        for name, *values in zip(RESULTS, got, found, roughly, strict=False):
            errors.add(name, *values)
        if draw == 0:
            again = kernels.backward(*grads, *laid_out, o, *saved, True, True)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not repeatable"
            without, _, *nothing = kernels.forward(*laid_out, False)
            assert torch.equal(without, o) and [n.numel() for n in nothing] == [0, 0]
    errors.check()


def only_what_is_asked() -> None:
    tensors = inputs((1, 2, 8, 1, 1, 3), 2)
    o, _, *saved = kernels.forward(*tensors, True)
    arguments = torch.ones_like(o), None, *tensors, o, *saved
    everything = kernels.backward(*arguments, True, True)
    for need_x, need_weights in ((True, False), (False, True), (False, False)):
        part = kernels.backward(*arguments, need_x, need_weights)
        for index, (a, b) in enumerate(zip(part, everything, strict=True)):
            needed = need_x if index == 0 else need_weights if index < 6 else True
            assert torch.equal(a, b) if needed else a.numel() == 0


def nan_stays_at_its_position(kind: str) -> None:
    precision(kind)
    tensors = inputs((1, 2, 16, 1, 1, 5), 4, torch.float16 if kind == "fp16" else torch.float32)
    tensors[0][0, 0, 3, 0, 0, 2] = torch.nan
    o, o_n, *_ = kernels.forward(*tensors, False)
    bad = torch.arange(5) == 2
    assert o[..., bad].isnan().all() and o_n[..., bad].isnan().all() and o[..., ~bad].isfinite().all()


def nan_reaches_every_gradient(kind: str) -> None:
    """One feature of hidden is NaN everywhere, as a weight's row is: PyTorch's ReLU hands its gradient on."""
    precision(kind)
    tensors = inputs((1, 3, 8, 1, 1, 3), 4, torch.float16 if kind == "fp16" else torch.float32)
    tensors[1][3] = torch.nan
    o, _, *saved = kernels.forward(*tensors, True)
    leaves = leaves_of(tensors)
    want = torch.autograd.grad(eager(leaves)[0].sum(), leaves)
    got = kernels.backward(torch.ones_like(o), None, *tensors, o, *saved, True, True)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(got, want, strict=True))


def empty(shape: tuple[int, ...]) -> None:
    tensors = inputs(shape, 2, with_o0=shape[1] > 1)
    o, o_n, *saved = kernels.forward(*tensors, True)
    assert o.shape == shape and o_n.shape == shape[:1] + shape[2:]
    got = kernels.backward(torch.ones_like(o), None, *tensors, o, *saved, True, True)
    assert got[0].shape == shape
    if shape[1] == 1 and o.numel():  # no step: x is the state, and its gradient passes through
        assert torch.equal(o, tensors[0]) and torch.equal(got[0], torch.ones_like(o))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in got[1:6])


def self_test_passes() -> None:
    """The cases with which users' GPUs are tested agree with the kernels here, and the operators differentiate."""
    from rcu_ops.ops import _selftest

    library = torch.library.Library("rcu_ops", "IMPL")
    for name, kernel in (("fast_gru", kernels.forward), ("fast_gru_backward", kernels.backward)):
        library.impl(f"{name}_triton", kernel, "CPU", allow_override=True)
    for kind, dtype in (("ieee", torch.float32), ("fp16", torch.float16)):
        precision(kind)
        cases = list(_selftest._tests["fast_gru/triton"].cases(torch.device("cpu"), dtype))
        assert len(cases) == 2
        for case in cases[:1]:
            assert _selftest._compare(case) is None, _selftest._compare(case)
    precision("ieee")
    leaves = leaves_of(inputs((1, 2, 8, 1, 1, 3), 2))
    torch.ops.rcu_ops.fast_gru_triton(*leaves, True)[0].sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    problems = [
        ((2, 3, 4, 1, 2, 3), 2, "ieee", True, "clips_first", "o"),
        ((2, 2, 33, 1, 5, 3), 7, "ieee", False, "channels_last", "both"),
        ((2, 2, 17, 1, 3, 3), 5, "fp16", True, "channels_last", "both"),
        ((1, 3, 16, 1, 3, 3), 4, "fp16", False, "every_other_column", "o_n"),
        ((1, 2, 70, 1, 1, 2), 17, "tf32", False, "contiguous", "both"),  # several tiles of outputs, and of the sum
        ((1, 2, 16, 1, 3, 7), 8, "fp16", True, "contiguous", "both"),  # whole words, several tiles of rows
    ]
    for problem in problems:
        yield f"numerics {problem}", lambda problem=problem: both_ways(*problem)
    yield "asked", only_what_is_asked
    for kind in ("ieee", "fp16"):
        yield f"nan {kind}", lambda kind=kind: nan_stays_at_its_position(kind)
        yield f"gradients of nan {kind}", lambda kind=kind: nan_reaches_every_gradient(kind)
    for shape in ((0, 3, 4, 1, 2, 2), (2, 3, 4, 0, 2, 2), (2, 1, 5, 1, 2, 3), (0, 1, 4, 1, 2, 2)):
        yield f"empty {shape}", lambda shape=shape: empty(shape)
    yield "self-test", self_test_passes


if __name__ == "__main__":
    sys.exit(reporting.run(cases(), before=lambda: precision("ieee")))
