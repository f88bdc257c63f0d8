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
from tests.cuda_host.harness import DTYPES, LaunchError, Machine, one_number_further, poisoned_like, state_dtype
from tests.cuda_host.test_recurrent_conv import exact_backward, inputs
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
    for shape in ((2, 35, 3, 7, 5), (1, 3, 2, 1, 9), (2, 68, 2, 4, 6)):  # single numbers, and packs of four
        h, grad, residual = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(3))
        check_all_passes(machine, h, LAYOUTS["contiguous"](grad), residual, relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
def test_several_parts_and_a_large_mean(machine, layout) -> None:
    h = LAYOUTS[layout](torch.randn(2, 3, 3, 30, 25) + 1000)
    assert_close_to_reference(
        moments_of(machine, h)[:2], channel_moments(h.double())[:2], channel_moments(h, torch.float32)[:2]
    )
    for dtype, shape in ((torch.double, (2, 3, 3, 30, 25)), (torch.float, (2, 4, 3, 30, 24))):
        exact = LAYOUTS[layout](torch.randint(-3, 4, shape).to(dtype))
        got, want = moments_of(machine, exact), channel_moments(exact.double())
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_in_several_parts_of_a_sample(machine, dtype, layout) -> None:
    """The last one shorter, and threads that go round more than once."""
    h, grad, residual = (LAYOUTS[layout](torch.randn(2, 8, 3, 40, 36).to(dtype)) for _ in range(3))
    check_all_passes(machine, h, grad, residual, relu=True)


def test_no_values(machine) -> None:
    assert torch.equal(moments_of(machine, torch.empty(0, 5, 2, 3, 3)), torch.zeros(3, 5))


# What the scan takes over: statistics on its way out, the gradient on its way in. Columns that end inside a tile, tiles
# whose rows are channels and columns; 16 bytes and fewer; the kernels of up to 64, 128 and 256 channels.
FUSED = [
    ((2, 20, 3, 5, 7), "contiguous", "tile: 1 blocks of 4 x"),
    ((1, 64, 4, 6, 12), "channels_last_3d", "tile: 2 blocks of 2 x"),
    ((3, 72, 3, 2, 8), "contiguous", "tile: 1 blocks of 4 x"),
    ((1, 128, 2, 5, 5), "channels_last_3d", "tile: 2 blocks of 1 x"),
    ((2, 140, 3, 3, 7), "channels_last_3d", "wide"),
    ((1, 256, 2, 4, 8), "contiguous", "wide"),
]


# The same of the kernel for fp32: blocks of 64 columns with two parts of the statistics, of 32 and of 16 columns;
# channels beyond the last of a thread; words along columns, along channels and single numbers.
FUSED_FP32 = [
    ((2, 20, 3, 5, 7), "contiguous", "fp32: 2 blocks of 64", 32, 2),
    ((3, 9, 3, 6, 6), "contiguous", "fp32: 4 blocks of 32", 32, 4),
    ((1, 64, 2, 6, 7), "channels_last_3d", "fp32: 3 blocks of 16", 16, 3),
    ((1, 128, 2, 5, 5), "every_other_column", "fp32: 1 blocks of 48", 24, 1),
]


def check_fused(
    machine: Machine, shape: tuple[int, ...], dtype: torch.dtype, layout: str, kernel: str, columns: int
) -> None:
    """Statistics, of parts of so many columns, and gradients that the scan takes over, by the tolerance rule."""
    x, weight, h0 = (v.contiguous() for v in inputs(shape, dtype))
    x, h0 = LAYOUTS[layout](x), h0.float()
    n, c, t, height, width = shape
    parts = -(-n * height * width // columns)
    partial, moments = torch.full((c, parts, 2), torch.nan, dtype=torch.float64), torch.full((3, c), torch.nan)
    h, _ = machine.forward(x, weight, h0, partial=partial)
    assert machine.plan.startswith(kernel)
    assert torch.equal(h, machine.forward(x, weight, h0)[0])
    machine.call(
        "norm_finish", {"partial": partial, "result": moments},
        N=n, C=c, T=t, H=height, W=width, dtype=DTYPES.index(dtype), columns=columns,
    )  # fmt: skip
    exact = channel_moments(h.double())
    assert_close_to_reference(moments[:2], exact[:2], channel_moments(h.float(), torch.float32)[:2], "moments")
    assert torch.equal(moments[2].double(), exact[2])

    gamma, beta, sums = torch.rand(c) + 0.5, torch.randn(c), torch.randn(2, c)
    grad, grad_h_n = LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.randn(h0.shape)
    tables = {"moments": moments, "gamma": gamma, "beta": beta, "sums": sums}
    got = machine.backward(grad, grad_h_n, h, weight, h0, norm=tables, eps=EPS, relu=True)
    wide = [v.double() for v in (h, moments, gamma, beta, sums)]
    dz = activation_gradient(grad.double(), wide[0], None, *wide[1:4], EPS, True)
    want = exact_backward(
        normalize_backward(dz, *wide[:2], wide[4], wide[2], EPS), grad_h_n, h, weight, h0, False, False
    )
    low = [v.to(dtype) for v in (moments, sums, gamma)]
    g = grad_h_n.to(dtype)
    rough_dz = activation_gradient(grad, h, None, moments, gamma, beta, EPS, True).to(dtype)
    rough = normalize_backward(rough_dz, h, *low, EPS).to(dtype)
    eager = torch.empty_like(h)
    for i in reversed(range(t)):
        eager[:, :, i] = g = g + rough[:, :, i]
        g = torch.einsum("oc,nchw->nohw", weight.T, g)
    assert_close_to_reference(got[0], want[0], eager, "dx")
    assert_close_to_reference(got[2], want[2], g, "dh0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "layout", "kernel"), FUSED, ids=str)
def test_what_the_scan_takes_over(machine, dtype, shape, layout, kernel, seed) -> None:
    """The tile's tables lie beside each other for 4 warps, for 2 and for 1."""
    machine.seed, machine.device = seed, {"multiprocessors": 1 if layout == "contiguous" else 2}
    check_fused(machine, shape, dtype, layout, kernel, 32 if shape[1] <= 64 else 16 if shape[1] <= 128 else 24)


@pytest.mark.parametrize(("shape", "layout", "kernel", "columns", "multiprocessors"), FUSED_FP32, ids=str)
def test_what_the_scan_in_fp32_takes_over(machine, shape, layout, kernel, columns, multiprocessors, seed) -> None:
    machine.seed, machine.device = seed, {"multiprocessors": multiprocessors}
    check_fused(machine, shape, torch.float32, layout, kernel, columns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_statistics_of_a_large_mean_and_of_schedules(machine, dtype) -> None:
    """A mean a hundred times the deviation costs the variance nothing; the order of threads changes no bit."""
    x, weight = torch.randn(2, 8, 40, 3, 5).to(dtype) / 16 + 2, torch.zeros(8, 8).to(dtype)
    machine.device, found = {"multiprocessors": 1}, []
    for machine.seed in range(3):
        partial = torch.full((8, 1, 2), torch.nan, dtype=torch.float64)
        h, _ = machine.forward(x, weight, partial=partial)
        found.append(partial)
    wide = h.double().transpose(0, 1).flatten(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0][:, 0, 0] / wide.mean(1) - 1).abs().max() < 1e-7
    assert (found[0][:, 0, 1] / (wide - wide.mean(1, keepdim=True)).square().sum(1) - 1).abs().max() < 1e-5


def test_other_kernels_refuse_it(machine) -> None:
    x, weight, _ = inputs((1, 8, 3, 3, 3), torch.float32)
    with pytest.raises(LaunchError, match="takes no part of batch normalisation"):
        machine.forward(x, weight, partial=torch.zeros(8, 1, 2, dtype=torch.float64))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed, device={"multiprocessors": 1})
    check_fused(machine, (1, 20, 3, 5, 7), torch.bfloat16, "contiguous", "tile", 32)
    check_fused(machine, (1, 130, 2, 5, 5), torch.bfloat16, "channels_last_3d", "wide", 24)
    check_fused(machine, (1, 11, 2, 5, 7), torch.float32, "channels_last_3d", "fp32", 32)
    for layout in ("contiguous", "channels_last_3d"):
        h, grad, residual = (LAYOUTS[layout](torch.randn(1, 36, 2, 3, 4).bfloat16()) for _ in range(3))
        check_all_passes(machine, h, grad, residual, relu=True)
        check_all_passes(machine, h, one_number_further(grad), residual, relu=True)  # no packs of four
