"""Runs the Triton kernels of recurrent_conv_batch_norm in Triton's interpreter against the reference, in a process of
its own.

Prints one line per case, "ok NAME" or "FAILED NAME: why". bf16 is not run here: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from rcu_ops.ops import _triton
from rcu_ops.reference.recurrent_conv_batch_norm import (
    activation_gradient,
    channel_moments,
    normalize,
    normalize_backward,
    normalize_sums,
)
from tests.ops.test_recurrent_conv import LAYOUTS, inputs
from tests.tolerance import assert_close_to_reference
from tests.triton import reporting

kernels = _triton.kernels("recurrent_conv_batch_norm")
EPS = 1e-5


def passes(shape: tuple[int, ...], dtype: torch.dtype, layout: str, relu: bool, affine: bool = True) -> None:
    """Every pass against the reference in fp64 on the same inputs, and bitwise the same when it is run again."""
    x, weight, h0 = inputs(shape, dtype)
    c = shape[1]
    h, h_n, moments = kernels.moments(LAYOUTS[layout](x), weight, h0, True)
    again = kernels.moments(LAYOUTS[layout](x), weight, h0, True)
    assert all(torch.equal(a, b) for a, b in zip((h, h_n, moments), again, strict=True)), "not repeatable"
    wide = h.double()
    exact = channel_moments(wide)
    assert_close_to_reference(moments[:2], exact[:2], channel_moments(h.float(), torch.float32)[:2], "moments")
    assert torch.equal(moments[2].double(), exact[2])

    given = moments.double()
    gamma, beta = (torch.rand(c) + 0.5, torch.randn(c)) if affine else (None, None)
    exactly = [None if v is None else v.double() for v in (gamma, beta)]
    grad, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    y = kernels.normalize(h, moments, gamma, beta, LAYOUTS[layout](residual), EPS, relu)
    want = normalize(wide, given, *exactly, residual.double(), EPS, relu)
    assert_close_to_reference(y, want, normalize(h, moments.to(dtype), gamma, beta, residual, EPS, relu), "y")

    for mask in (y, None):
        sums, dz = kernels.normalize_sums(LAYOUTS[layout](grad), h, mask, moments, gamma, beta, EPS, relu)
        exact_dz = activation_gradient(grad.double(), wide, mask, given, *exactly, EPS, relu)
        rough_dz = activation_gradient(grad, h, mask, moments, gamma, beta, EPS, relu)
        rough_sums = normalize_sums(rough_dz.to(dtype), h, moments.to(dtype), EPS)
        assert_close_to_reference(sums, normalize_sums(exact_dz, wide, given, EPS), rough_sums, "sums")
        assert torch.equal(dz.double(), exact_dz) if mask is not None else dz.numel() == 0
    out = torch.empty_like(h)
    tables = {"moments": moments, "gamma": gamma, "beta": beta, "sums": sums}
    launches = kernels.plan(kernels.GRADIENT, h, other=grad, out=out, eps=EPS, relu=relu, **tables)
    for launch in launches:
        launch.run()
    exact_out = normalize_backward(exact_dz, wide, given, sums.double(), exactly[0], EPS)
    low = [None if v is None else v.to(dtype) for v in (moments, sums, gamma)]
    rough = normalize_backward(rough_dz.to(dtype), h, *low, EPS)
    assert_close_to_reference(out, exact_out, rough, "gradient")


def a_large_mean() -> None:
    """Sums of squares would leave nothing of the variance here."""
    h = torch.randn(2, 5, 3, 9, 7) + 1000
    result = torch.empty(3, 5)
    for launch in kernels.plan(kernels.MOMENTS, h, result=result):
        launch.run()
    assert_close_to_reference(result[:2], channel_moments(h.double())[:2], channel_moments(h, torch.float32)[:2])


def many_channels() -> None:
    """More blocks of channels than a grid has places along y are run in parts."""
    shape, run = (1, 10, 1, 2, 3), kernels._run
    launched: list[Any] = []

    def watched(launches: list[Any], device: torch.device) -> None:
        launched.extend(launches)
        run(launches, device)

    with mock.patch.multiple(kernels, MOST_BLOCKS=2, _run=watched):
        passes(shape, torch.float32, "contiguous", True)
    assert [launch.grid[1] for launch in launched if launch.kernel is kernels.norm_kernel] == [2, 1] * 5


def nothing() -> None:
    _, _, moments = kernels.moments(torch.empty(0, 5, 2, 3, 3), torch.eye(5), None, False)
    assert torch.equal(moments, torch.zeros(3, 5))


def self_tests_pass() -> None:
    """The cases with which users' GPUs are tested agree with the kernels here, through the registered operators."""
    from rcu_ops.ops import _selftest

    library = torch.library.Library("rcu_ops", "IMPL")
    for name in ("moments", "normalize", "normalize_sums", "normalize_backward"):
        library.impl(f"recurrent_conv_{name}_triton", getattr(kernels, name), "CPU", allow_override=True)
    for dtype in (torch.float32, torch.float16):
        found = list(_selftest._tests["recurrent_conv_batch_norm/triton"].cases(torch.device("cpu"), dtype))
        assert len(found) == 4
        for case in found:
            assert _selftest._compare(case) is None, _selftest._compare(case)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    shapes = (((2, 35, 3, 5, 7), "contiguous"), ((2, 70, 2, 3, 6), "channels_last_3d"))
    for turn, dtype in enumerate((torch.float32, torch.float16)):
        for index, (shape, layout) in enumerate((*shapes, ((1, 3, 2, 1, 9), "every_other_column"))):
            arguments = (shape, dtype, layout, (index + turn) % 2 == 0)
            yield f"passes {arguments}", lambda a=arguments: passes(*a)
        yield f"plain {dtype}", lambda d=dtype: passes((1, 6, 2, 4, 4), d, "frame_major", True, affine=False)
    yield "large mean", a_large_mean
    yield "many channels", many_channels
    yield "empty", nothing
    yield "self-tests", self_tests_pass


if __name__ == "__main__":
    sys.exit(reporting.run(cases()))
