"""Runs the Triton kernels in Triton's interpreter against the reference, in a process of its own.

Prints one line per case, "ok NAME" or "FAILED NAME: why". bf16 is not run here: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rcu_ops import reference
from rcu_ops.ops import _triton
from tests.tolerance import assert_close_to_reference
from tests.triton import reporting

kernels = _triton.kernels("recurrent_conv")
UPDATES = ("sum", "mean")


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last_3d": channels_last,
    "frame_major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "width_major": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "every_other_column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=5)[..., 0],
    "middle_channels": lambda x: torch.cat([torch.full_like(x, torch.nan), x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n, c, _, height, width = shape
    weight = torch.eye(c) * 0.5 + torch.randn(c, c) * 0.4 / c**0.5
    return torch.randn(shape).to(dtype), weight.to(dtype), torch.randn(n, c, height, width).to(dtype)


def poisoned(results: tuple[Tensor, ...]) -> None:
    for result in results:
        assert result.numel() == 0 or not result.isnan().any(), "an element was not written"


def forward(shape, dtype, h0: bool, mean: bool, reverse: bool, layout: str) -> None:
    x, weight, start = inputs(shape, dtype)
    start = start if h0 else None
    laid_out = LAYOUTS[layout](x)
    got = kernels.forward(laid_out, weight, start, mean, reverse)
    poisoned(got)
    assert got[0].stride() == torch.empty_like(laid_out).stride()
    assert got[1].dtype == torch.float32
    options = {"update": UPDATES[mean], "reverse": reverse}
    exact = reference.recurrent_conv(x.double(), weight.double(), None if start is None else start.double(), **options)
    eager = reference.recurrent_conv(x, weight, start, state_dtype=dtype, **options)
    for name, *values in zip(("h", "h_n"), got, exact, eager, strict=True):
        assert_close_to_reference(*values, name)


def backward(shape, dtype, h0: bool, mean: bool, reverse: bool, layout: str, outputs: str = "both") -> None:
    x, weight, start = inputs(shape, dtype)
    grad_h = torch.randn(shape).to(dtype) if outputs != "h_n" else None
    grad_h_n = torch.randn(start.shape) if outputs != "h" else None

    def by_autograd(to: torch.dtype) -> list[Tensor]:
        leaves = [value.to(to).requires_grad_() for value in (x, weight, start)[: 2 + h0]]
        options = {"update": UPDATES[mean], "reverse": reverse, "state_dtype": to}
        pairs = zip(reference.recurrent_conv(*leaves, **options), (grad_h, grad_h_n), strict=True)
        values, grads = zip(*[(value, grad.to(to)) for value, grad in pairs if grad is not None], strict=True)
        found = torch.autograd.grad(values, leaves, grads, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]

    h, _ = kernels.forward(LAYOUTS[layout](x), weight, start if h0 else None, mean, reverse)
    laid_out = None if grad_h is None else LAYOUTS[layout](grad_h)
    got = kernels.backward(laid_out, grad_h_n, h, weight, start if h0 else None, mean, reverse, True)
    poisoned(got)
    assert got[0].stride() == h.stride()
    again = kernels.backward(laid_out, grad_h_n, h, weight, start if h0 else None, mean, reverse, True)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not repeatable"
    without = kernels.backward(laid_out, grad_h_n, h, weight, start if h0 else None, mean, reverse, False)
    assert without[1].shape == (0,) and torch.equal(without[0], got[0])
    for name, *values in zip(
        ("dx", "dweight", "dh0"), got, by_autograd(torch.float64), by_autograd(dtype), strict=False
    ):
        assert_close_to_reference(*values, name)
    assert h0 or got[2].shape == (0,)


def affine_act(shape, dtype, h0: bool, mean: bool, residual: bool, relu: bool, layout: str) -> None:
    x, weight, start = inputs(shape, dtype)
    c = shape[1]
    scale, shift = torch.rand(c) + 0.5, torch.randn(c)
    added = torch.randn(shape).to(dtype) if residual else None
    laid_out = None if added is None else LAYOUTS["channels_last_3d"](added)
    got = kernels.affine_act(LAYOUTS[layout](x), weight, scale, shift, start if h0 else None, laid_out, mean, relu)
    poisoned(got)

    def want(to: torch.dtype) -> tuple[Tensor, Tensor]:
        arguments = (x, weight, scale, shift, start if h0 else None, added)
        return reference.recurrent_conv_affine_act(
            *(None if value is None else value.to(to) for value in arguments),
            update=UPDATES[mean],
            activation="relu" if relu else "identity",
            state_dtype=to,
        )

    for name, *values in zip(("y", "h_n"), got, want(torch.float64), want(dtype), strict=True):
        assert_close_to_reference(*values, name)


def state_does_not_stall() -> None:
    """W = I and inputs of mean 1: a state rounded to fp16 stops growing at 2048, this one does not."""
    frames = 2200
    x = torch.ones(1, 4, 1, 1, 1, dtype=torch.float16).expand(1, 4, frames, 1, 1)
    _, h_n = kernels.forward(x, torch.eye(4, dtype=torch.float16), None, False, False)
    assert torch.equal(h_n, torch.full((1, 4, 1, 1), float(frames))), h_n


def nan_and_inf_propagate(dtype: torch.dtype) -> None:
    x, weight, h0 = inputs((2, 20, 4, 2, 3), dtype)
    x[0, 1, 1, 0, 0] = torch.nan
    x[1, 2, 2, 1, 1] = torch.inf
    got = kernels.forward(x, weight, h0, False, False)
    for value, want in zip(got, reference.recurrent_conv(x, weight, h0), strict=True):
        assert torch.equal(value.isnan(), want.isnan()) and torch.equal(value.isinf(), want.isinf())
    y, _ = kernels.affine_act(x, weight, torch.ones(20), torch.zeros(20), h0, None, False, True)
    assert torch.equal(y.isnan(), got[0].isnan())


def expanded_and_transposed_inputs() -> None:
    x, weight, h0 = inputs((1, 8, 3, 1, 5), torch.float32)
    wide, state = x.expand(4, 8, 3, 6, 5), h0.expand(4, 8, 6, 5)
    got = kernels.forward(wide, weight.t(), state, False, False)
    want = reference.recurrent_conv(wide.double(), weight.t().double(), state.double())
    eager = reference.recurrent_conv(wide, weight.t(), state)
    for values in zip(got, want, eager, strict=True):
        assert_close_to_reference(*values)


def empty(shape: tuple[int, ...]) -> None:
    x, weight, h0 = inputs(shape, torch.float32)
    h, h_n = kernels.forward(x, weight, h0, False, False)
    assert h.shape == shape and h_n.shape == h0.shape
    dx, dweight, dh0 = kernels.backward(torch.empty_like(h), None, h, weight, h0, False, False, True)
    assert dx.shape == shape and dh0.shape == h0.shape and torch.equal(dweight, torch.zeros_like(weight))


def chunks_equal_the_whole(dtype: torch.dtype) -> None:
    """Bitwise: the state is handed on in fp32, and a step does the same whatever comes before it."""
    x, weight, _ = inputs((2, 24, 5, 5, 3), dtype)
    whole, whole_n = kernels.forward(x, weight, None, True, False)
    state, parts = None, []
    for part in x.split([1, 3, 1], dim=2):
        h, state = kernels.forward(part, weight, state, True, False)
        parts.append(h)
    assert torch.equal(torch.cat(parts, 2), whole) and torch.equal(state, whole_n)


def operators_under_autograd() -> None:
    """The registered operators with these kernels: autograd end to end, in fp32."""
    library = torch.library.Library("rcu_ops", "IMPL")
    library.impl("recurrent_conv_triton", kernels.forward, "CPU", allow_override=True)
    library.impl("recurrent_conv_backward_triton", kernels.backward, "CPU", allow_override=True)
    x, weight, h0 = inputs((2, 18, 3, 4, 4), torch.float32)

    def gradients(to: torch.dtype, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = [value.to(to).requires_grad_() for value in (x, weight, h0)]
        h, h_n = function(*leaves)
        return list(torch.autograd.grad(h.square().sum() + h_n.sum(), leaves))

    got = gradients(torch.float32, lambda *leaves: torch.ops.rcu_ops.recurrent_conv_triton(*leaves, False, False))
    want = gradients(torch.float64, reference.recurrent_conv)
    eager = gradients(torch.float32, reference.recurrent_conv)
    for name, *values in zip(("dx", "dweight", "dh0"), got, want, eager, strict=True):
        assert_close_to_reference(*values, name)


def self_tests_pass() -> None:
    """The cases with which users' GPUs are tested agree with the kernels here."""
    from rcu_ops.ops import _selftest

    library = torch.library.Library("rcu_ops", "IMPL")
    for name, kernel in (("", kernels.forward), ("_backward", kernels.backward), ("_affine_act", kernels.affine_act)):
        library.impl(f"recurrent_conv{name}_triton", kernel, "CPU", allow_override=True)
    for name in ("recurrent_conv/triton", "recurrent_conv_affine_act/triton"):
        for dtype in (torch.float32, torch.float16):
            cases = list(_selftest._tests[name].cases(torch.device("cpu"), dtype))
            assert len(cases) == 2
            for case in cases:
                assert _selftest._compare(case) is None, _selftest._compare(case)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    fp32, fp16 = torch.float32, torch.float16
    shapes = [(2, 3, 4, 2, 3), (1, 16, 5, 7, 7), (2, 33, 3, 5, 3), (1, 64, 1, 3, 3), (3, 1, 6, 1, 1), (1, 130, 2, 3, 5)]
    count = 0
    for shape in shapes:
        for dtype in (fp32, fp16):
            for h0, mean, reverse in (
                (False, False, False),
                (True, True, False),
                (False, True, True),
                (True, False, True),
            ):
                layout = list(LAYOUTS)[count % len(LAYOUTS)]
                count += 1
                arguments = (shape, dtype, h0, mean, reverse, layout)
                yield f"forward {arguments}", lambda a=arguments: forward(*a)
                if count % 2 == 0:
                    outputs = ("both", "h", "h_n")[count // 2 % 3]
                    yield f"backward {arguments} {outputs}", lambda a=arguments, o=outputs: backward(*a, o)
    for layout in LAYOUTS:
        for dtype in (fp32, fp16):
            arguments = ((2, 18, 3, 4, 4), dtype, True, layout == "contiguous", True, True, layout)
            yield f"affine_act {arguments}", lambda a=arguments: affine_act(*a)
    for arguments in (
        ((2, 40, 3, 8, 8), fp16, False, True, False, False, "contiguous"),
        ((1, 16, 1, 3, 5), fp32, False, False, True, False, "channels_last_3d"),
        ((1, 24, 2, 3, 3), fp16, True, True, False, True, "contiguous"),
    ):
        yield f"affine_act {arguments}", lambda a=arguments: affine_act(*a)
    # Streamed weights in half precision, aligned and not; several tiles, several blocks of the weight gradient.
    yield "forward 512 channels", lambda: forward((1, 512, 2, 3, 8), fp16, True, False, False, "channels_last_3d")
    yield "forward 500 channels", lambda: forward((1, 500, 2, 3, 3), fp16, False, False, False, "contiguous")
    yield "backward 264 channels", lambda: backward((1, 264, 2, 3, 8), fp16, True, True, False, "channels_last_3d")
    yield "forward many tiles", lambda: forward((3, 8, 3, 24, 24), fp16, True, False, False, "contiguous")
    yield "forward many odd tiles", lambda: forward((3, 8, 3, 13, 11), fp32, True, False, False, "contiguous")
    yield "backward many tiles", lambda: backward((2, 8, 3, 16, 16), fp32, True, False, False, "channels_last_3d")
    yield "the state does not stall", state_does_not_stall
    for dtype in (fp32, fp16):
        yield f"nan and inf {dtype}", lambda dtype=dtype: nan_and_inf_propagate(dtype)
        yield f"chunks {dtype}", lambda dtype=dtype: chunks_equal_the_whole(dtype)
    yield "expanded and transposed", expanded_and_transposed_inputs
    for shape in ((0, 4, 3, 2, 2), (2, 4, 3, 0, 2), (2, 4, 3, 2, 0)):
        yield f"empty {shape}", lambda shape=shape: empty(shape)
    yield "operators under autograd", operators_under_autograd
    yield "self-tests", self_tests_pass


if __name__ == "__main__":
    sys.exit(reporting.run(cases()))
