"""The CUDA kernels of recurrent_conv_batch_norm, run on the CPU: numerics, layouts, a large mean, sanitizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rcu_ops.reference.recurrent_conv_batch_norm import (
    activation_gradient,
    channel_moments,
    normalize,
    normalize_backward,
    normalize_sums,
)
from tests.cuda_host.harness import DTYPES, Machine, poisoned_like, state_dtype
from tests.ops.test_recurrent_conv import LAYOUTS
from tests.tolerance import assert_close_to_reference

PASSES = ("moments", "normalize", "sums", "gradient")
EPS = 1e-5


def norm(machine: Machine, name: str, h: Tensor, *, relu: bool = False, **tensors: Tensor | None) -> None:
    """One pass, as the bindings put it; outputs are among the tensors."""
    n, c, t, height, width = h.shape
    machine.call(
        "norm",
        {"h": h, **tensors},
        **{"pass": PASSES.index(name)}, N=n, C=c, T=t, H=height, W=width, dtype=DTYPES.index(h.dtype),
        eps=EPS, relu=int(relu),
    )  # fmt: skip


def moments_of(machine: Machine, h: Tensor) -> Tensor:
    result = torch.full((3, h.shape[1]), torch.nan, dtype=state_dtype(h.dtype))
    norm(machine, "moments", h, result=result)
    return result


def check_all_passes(machine: Machine, h: Tensor, grad: Tensor, residual: Tensor, relu: bool) -> None:
    """Every pass against the reference in fp64, by the tolerance rule."""
    c, dtype = h.shape[1], h.dtype
    state = state_dtype(dtype)
    gamma, beta = torch.rand(c).to(state) + 0.5, torch.randn(c).to(state)
    moments = moments_of(machine, h)
    wide = h.double()
    exact = channel_moments(wide)
    assert_close_to_reference(moments[:2], exact[:2], channel_moments(h.float(), torch.float32)[:2], "moments")
    assert torch.equal(moments[2].double(), exact[2])
    given = moments.double()

    y = poisoned_like(h)
    norm(machine, "normalize", h, relu=relu, moments=moments, gamma=gamma, beta=beta, other=residual, y=y)
    want = normalize(wide, given, gamma.double(), beta.double(), residual.double(), EPS, relu)
    assert_close_to_reference(y, want, normalize(h, moments.to(dtype), gamma, beta, residual, EPS, relu), "y")

    for mask in (y, None):  # with a residual, and without
        sums = torch.full((2, c), torch.nan, dtype=state)
        dz = poisoned_like(h) if mask is not None else None
        tensors = {"moments": moments, "gamma": gamma, "beta": beta, "other": grad}
        norm(machine, "sums", h, relu=relu, y=mask, out=dz, result=sums, **tensors)
        exact_dz = activation_gradient(grad.double(), wide, mask, given, gamma.double(), beta.double(), EPS, relu)
        rough_dz = activation_gradient(grad, h, mask, moments, gamma, beta, EPS, relu)
        rough_sums = normalize_sums(rough_dz.to(dtype), h, moments.to(dtype), EPS)
        assert_close_to_reference(sums, normalize_sums(exact_dz, wide, given, EPS), rough_sums, "sums")
        if dz is not None:
            assert torch.equal(dz.double(), exact_dz)
        out = poisoned_like(h)
        norm(machine, "gradient", h, relu=relu, sums=sums, out=out, y=mask, **tensors)
        exact_out = normalize_backward(exact_dz, wide, given, sums.double(), gamma.double(), EPS)
        rough = normalize_backward(rough_dz.to(dtype), h, moments.to(dtype), sums.to(dtype), gamma.to(dtype), EPS)
        assert_close_to_reference(out, exact_out, rough, "gradient")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d", "every_other_column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_passes(machine, dtype, layout, seed) -> None:
    machine.seed = seed
    for shape in ((2, 35, 3, 7, 5), (1, 3, 2, 1, 9)):
        h, grad, residual = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(3))
        check_all_passes(machine, h, LAYOUTS["contiguous"](grad), residual, relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_several_parts_and_a_large_mean(machine, layout) -> None:
    h = LAYOUTS[layout](torch.randn(2, 3, 3, 30, 25) + 1000)
    assert_close_to_reference(
        moments_of(machine, h)[:2], channel_moments(h.double())[:2], channel_moments(h, torch.float32)[:2]
    )
    exact = LAYOUTS[layout](torch.randint(-3, 4, (2, 3, 3, 30, 25)).double())
    torch.testing.assert_close(moments_of(machine, exact), channel_moments(exact))


def test_no_values(machine) -> None:
    assert torch.equal(moments_of(machine, torch.empty(0, 5, 2, 3, 3)), torch.zeros(3, 5))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed)
    for layout in ("contiguous", "channels_last_3d"):
        h, grad, residual = (LAYOUTS[layout](torch.randn(1, 34, 2, 3, 5).bfloat16()) for _ in range(3))
        check_all_passes(machine, h, grad, residual, relu=True)
