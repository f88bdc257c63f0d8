"""The CUDA kernels of recurrent_conv, run on the CPU: numerics, layouts, edges, determinism, sanitizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rcu_ops import reference
from tests.cuda_host.harness import DTYPES, LaunchError, Machine, one_number_further, state_dtype
from tests.tolerance import assert_close_to_reference

contiguous = functools.partial(torch.clone, memory_format=torch.contiguous_format)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "channels_last": lambda x: contiguous(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3),
    "frame_major": lambda x: contiguous(x.transpose(1, 2)).transpose(1, 2),
    "width_major": lambda x: contiguous(x.transpose(3, 4)).transpose(3, 4),
    "every_other_column": lambda x: contiguous(torch.stack([x, torch.full_like(x, torch.nan)], dim=5))[..., 0],
    "middle_channels": lambda x: torch.cat([torch.full_like(x, torch.nan), x, x], dim=1)[
        :, x.shape[1] : 2 * x.shape[1]
    ],
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, radius: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    n, c, _, height, width = shape
    weight = torch.eye(c) * 0.5 + torch.randn(c, c) * (radius - 0.5) / c**0.5
    return torch.randn(shape).to(dtype), weight.to(dtype), torch.randn(n, c, height, width).to(dtype)


def update(mean: bool) -> str:
    return "mean" if mean else "sum"


def long(v: Tensor | None) -> np.ndarray | None:
    """In extended precision, so that fp64 has an exact result to be held against, too."""
    return None if v is None else v.detach().double().numpy().astype(np.longdouble)


def rounded(v: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(v).astype(np.float64))


def mix(weight: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.einsum("oc,nchw->nohw", weight, h)


def exact_forward(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    xs, w, h = long(x), long(weight), long(h0)
    states = np.zeros_like(xs)
    for i, t in enumerate(range(x.shape[2])[:: -1 if reverse else 1]):
        h = xs[:, :, t] if i == 0 and h is None else (mix(w, h) + xs[:, :, t]) / (1 + mean)
        states[:, :, t] = h
    return rounded(states), rounded(h)


def exact_backward(
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    mean: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    states, w, first = long(h), long(weight), long(h0)
    a = np.longdouble(0.5 if mean else 1)
    order = list(range(h.shape[2]))[:: -1 if reverse else 1]
    g = np.zeros_like(states[:, :, 0]) if grad_h_n is None else long(grad_h_n)
    dx, dw = np.zeros_like(states), np.zeros_like(w)
    for i in range(len(order) - 1, -1, -1):
        if i < len(order) - 1:
            g = a * mix(w.T, g)
        if grad_h is not None:
            g = g + long(grad_h)[:, :, order[i]]
        before = first if i == 0 else states[:, :, order[i - 1]]
        dx[:, :, order[i]] = g if before is None else a * g
        if before is not None:
            dw = dw + a * np.einsum("nohw,nchw->oc", g, before)
    return (rounded(dx), rounded(dw), *(() if h0 is None else (rounded(a * mix(w.T, g)),)))


def check_forward(machine: Machine, x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> None:
    got = machine.forward(x, weight, h0, mean=mean, reverse=reverse)
    exact = exact_forward(x, weight, h0, mean, reverse)
    eager = reference.recurrent_conv(x, weight, h0, update=update(mean), reverse=reverse, state_dtype=x.dtype)
    for g, e, r, name in zip(got, exact, eager, ("h", "h_n"), strict=True):
        assert_close_to_reference(g, e, r, name)


def check_backward(
    machine: Machine,
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    mean: bool,
    reverse: bool,
    fused: bool = False,
) -> None:
    """Eager is autograd through the recurrence in x's dtype. fused: the scan adds up the weight's gradient."""
    leaves = [v.detach().requires_grad_() for v in (x, weight, h0) if v is not None]
    out = reference.recurrent_conv(*leaves, update=update(mean), reverse=reverse, state_dtype=x.dtype)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(out, (grad_h, grad_h_n), strict=True) if g is not None]
    eager = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    h = torch.empty_like(x).copy_(reference.recurrent_conv(x, weight, h0, update=update(mean), reverse=reverse)[0])
    got = machine.backward(grad_h, grad_h_n, h, weight, h0, mean=mean, reverse=reverse, fused=fused)
    states, _ = exact_forward(x, weight, h0, mean, reverse)
    exact = exact_backward(grad_h, grad_h_n, states, weight, h0, mean, reverse)
    for g, e, r, name in zip(got, exact, eager, ("dx", "dweight", "dh0"), strict=False):
        assert g is not None
        assert_close_to_reference(g, e, r, name)


SHAPES = [(2, 3, 4, 2, 3), (1, 16, 5, 7, 7), (2, 33, 3, 5, 3), (1, 64, 1, 3, 3), (3, 1, 6, 4, 1), (1, 130, 2, 3, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(machine, shape, dtype, seed) -> None:
    x, weight, h0 = inputs(shape, dtype)
    for i, (mean, reverse, state) in enumerate(
        [(False, False, None), (True, False, h0), (False, True, h0.to(state_dtype(dtype))), (True, True, None)]
    ):
        machine.seed = seed + i
        check_forward(machine, x, weight, state, mean, reverse)


# A weight gradient of one number is no sample to compare errors by: one channel is in test_integers_are_exact.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 1], ids=str)
def test_backward(machine, shape, dtype, seed) -> None:
    x, weight, h0 = inputs(shape, dtype)
    grad_h, grad_h_n = torch.randn(shape).to(dtype), torch.randn(h0.shape, dtype=state_dtype(dtype))
    for i, (mean, reverse, state, g, g_n) in enumerate(
        [
            (False, False, None, grad_h, None),
            (True, False, h0, grad_h, grad_h_n),
            (False, True, h0.to(state_dtype(dtype)), None, grad_h_n),
            (True, True, None, grad_h, grad_h_n),
        ]
    ):
        machine.seed = seed + i
        check_backward(machine, g, g_n, x, weight, state, mean, reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1, 6, 4, 1), (1, 5, 3, 3, 2)], ids=str)
def test_integers_are_exact(machine, shape, dtype) -> None:
    """Small integers and a permutation with signs as W: no rounding anywhere, not one bit may differ."""
    c = shape[1]
    x, grad_h = (torch.randint(-2, 3, shape).to(dtype) for _ in range(2))
    weight = (torch.eye(c)[torch.randperm(c)] * torch.tensor([1.0, -1.0])[torch.randint(0, 2, (c, 1))]).to(dtype)
    want = exact_forward(x, weight, None, False, False)
    got = machine.forward(x, weight)
    assert all(torch.equal(g.double(), w) for g, w in zip(got, want, strict=True))
    want = exact_backward(grad_h, None, got[0], weight, None, False, False)
    got = machine.backward(grad_h, None, got[0], weight)
    assert all(torch.equal(g.double(), w) for g, w in zip(got, want, strict=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_are_read_and_written_in_place(machine, layout, dtype, seed) -> None:
    x, weight, h0 = inputs((2, 16, 3, 4, 6), dtype)
    machine.seed = seed
    laid_out = LAYOUTS[layout](x)
    state = LAYOUTS["channels_last"](h0.unsqueeze(2)).squeeze(2)
    check_forward(machine, laid_out, weight.t().contiguous().t(), state, False, False)
    check_backward(
        machine, LAYOUTS[layout](torch.randn(x.shape).to(dtype)), None, laid_out, weight, state, False, False
    )


def test_expanded_inputs(machine) -> None:
    x, weight, h0 = inputs((1, 8, 3, 1, 5), torch.float32)
    check_forward(machine, x.expand(4, 8, 3, 6, 5), weight, h0.expand(4, 8, 6, 5), False, False)
    ones = torch.ones(()).expand(2, 8, 3, 4, 5)  # the gradient of a sum
    check_backward(machine, ones, None, torch.randn(2, 8, 3, 4, 5), weight, None, False, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("relu", [False, True])
def test_affine_act(machine, dtype, layout, relu, seed) -> None:
    x, weight, h0 = (LAYOUTS[layout](v) if v.dim() == 5 else v for v in inputs((2, 20, 3, 3, 5), dtype))
    state = state_dtype(dtype)
    scale, shift, residual = torch.randn(20, dtype=state), torch.randn(20, dtype=state), torch.randn(x.shape).to(dtype)
    machine.seed = seed
    for first, added in ((None, residual), (h0, LAYOUTS["contiguous"](residual)), (h0, None)):
        got = machine.forward(x, weight, first, scale=scale, shift=shift, residual=added, relu=relu, mean=True)
        h, h_n = exact_forward(x, weight, first, mean=True, reverse=False)
        per_channel = (slice(None), None, None, None)
        y = long(scale)[per_channel] * long(h) + long(shift)[per_channel] + (0 if added is None else long(added))
        exact = rounded(np.maximum(y, 0) if relu else y), h_n
        eager = reference.recurrent_conv_affine_act(
            x,
            weight,
            scale.to(dtype),
            shift.to(dtype),
            first,
            added,
            update="mean",
            activation="relu" if relu else "identity",
            state_dtype=dtype,
        )
        for g, e, r, name in zip(got, exact, eager, ("y", "h_n"), strict=True):
            assert_close_to_reference(g, e, r, name)


@pytest.mark.parametrize("empty", [(0, 4, 3, 2, 2), (2, 4, 3, 0, 2), (2, 4, 3, 2, 0)], ids=str)
def test_empty(machine, empty) -> None:
    x, weight, h0 = inputs(empty, torch.float32)
    y, h_n = machine.forward(x, weight, h0)
    assert y.shape == empty
    assert h_n.shape == h0.shape
    _, dweight, _ = machine.backward(x, None, x, weight, h0)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_one_frame_without_a_state_has_no_weight_gradient(machine) -> None:
    x, weight, _ = inputs((2, 5, 1, 3, 3), torch.float32)
    dx, dweight, _ = machine.backward(x, None, x, weight)
    assert torch.equal(dx, x)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_the_state_does_not_stall_in_bf16(machine) -> None:
    """W = I and inputs of mean 1: a bf16 state stops growing at 256; the fp32 state does not."""
    x = torch.ones(1, 4, 600, 1, 1, dtype=torch.bfloat16)
    _, h_n = machine.forward(x, torch.eye(4, dtype=torch.bfloat16))
    assert torch.equal(h_n, torch.full((1, 4, 1, 1), 600.0))


def test_nan_and_inf_propagate_like_the_reference(machine) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, h0 = inputs((2, 6, 4, 2, 3), dtype)
        x[0, 1, 1, 0, 0] = torch.nan
        x[1, 2, 2, 1, 1] = torch.inf
        for got, want in zip(machine.forward(x, weight, h0), reference.recurrent_conv(x, weight, h0), strict=True):
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_chunks_continue_exactly(machine, dtype, layout) -> None:
    x, weight, _ = inputs((2, 24, 5, 3, 3), dtype)
    x = LAYOUTS[layout](x)
    whole, whole_n = machine.forward(x, weight)
    state, parts = None, []
    for part in x.split([1, 3, 1], dim=2):
        h, state = machine.forward(part, weight, state)
        parts.append(h)
    assert torch.equal(torch.cat(parts, 2), whole)
    assert torch.equal(state, whole_n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules_change_no_bit(machine, dtype) -> None:
    x, weight, h0 = inputs((2, 20, 3, 9, 9), dtype)
    results = []
    for s in range(3):
        machine.seed = s
        machine.device = {"resident": 1 + s}
        results.append([*machine.forward(x, weight, h0), *machine.backward(x, h0.to(torch.float32), x, weight, h0)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_outside_the_output_is_written(machine, monkeypatch) -> None:
    """Outputs inside a larger allocation: every gap keeps its value."""
    from tests.cuda_host import harness

    x, weight, h0 = inputs((2, 7, 3, 3, 3), torch.float32)
    frames: list[Tensor] = []

    def framed(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        big = torch.full([s + 2 for s in like.shape], 12345.0, dtype=dtype or like.dtype)
        frames.append(big)
        inner = big[tuple(slice(1, -1) for _ in like.shape)]
        return inner.fill_(torch.nan)

    monkeypatch.setattr(harness, "poisoned_like", framed)
    y, h_n = machine.forward(x, weight, h0)
    want, want_n = reference.recurrent_conv(x, weight, h0)
    assert torch.allclose(y, want)
    assert torch.allclose(h_n, want_n)
    assert len(frames) == 2
    for big in frames:
        inside = torch.zeros_like(big, dtype=torch.bool)
        inside[tuple(slice(1, -1) for _ in big.shape)] = True
        assert (big[~inside] == 12345.0).all()


# Pretended devices under which the plan takes every road, for 130 channels and 30 columns.
ROADS = [
    (163 * 1024, "plain: 1 blocks of 64 columns, W resident, state in shared memory"),
    (80 * 1024, "plain: 1 blocks of 32 columns, W in pieces of 32 x 128, state in shared memory"),
    (26 * 1024, "plain: 8 blocks of 4 columns, W in pieces of 4 x 1024, state in shared memory"),
    (24 * 1024, "plain: 1 blocks of 32 columns, W in pieces of 32 x 128, state in scratch memory"),
]


@pytest.mark.parametrize(("shared_bytes", "plan"), ROADS, ids=lambda v: str(v) if isinstance(v, int) else "")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_way_to_cut_the_plain_scan(machine, shared_bytes, plan, dtype, seed) -> None:
    machine.device, machine.seed, machine.plain = {"shared_bytes": shared_bytes, "multiprocessors": 1}, seed, True
    x, weight, h0 = inputs((2, 130, 2, 5, 3), dtype)
    check_forward(machine, x, weight, h0, False, False)
    assert machine.plan.startswith(plan)
    check_backward(machine, x, h0.to(torch.float32), LAYOUTS["channels_last"](x), weight, h0, True, False)


# For the fp32 scan: shape, layout, multiprocessors, plan. Words along either dimension and none; blocks of 64, 48, 32
# and 16 columns that end with the last one and before; whole and partial parts of 8 channels; warps of 32 and of 64.
FP32 = [
    ((2, 32, 3, 4, 8), "contiguous", 1, "1 blocks of 64 columns, * x by words along columns, y by words along columns"),
    ((1, 61, 2, 7, 9), "contiguous", 2, "2 blocks of 32 columns, * x by single numbers, y by single numbers"),
    (
        (2, 20, 3, 5, 7),
        "channels_last",
        4,
        "5 blocks of 16 columns, * x by words along channels, y by words along channels",
    ),
    ((1, 128, 2, 5, 4), "channels_last", 1, "1 blocks of 48 columns, * x by words along channels"),
    ((1, 64, 2, 7, 9), "contiguous", 1, "1 blocks of 64 columns, * x by single numbers"),
    ((3, 9, 4, 5, 5), "every_other_column", 1, "2 blocks of 64 columns, * x by single numbers"),
    ((2, 8, 4, 4, 6), "middle_channels", 1, "1 blocks of 64 columns, * x by words along columns"),
]


@pytest.mark.parametrize(("shape", "layout", "multiprocessors", "plan"), FP32, ids=lambda v: str(v).replace(" ", ""))
def test_fp32_scan(machine, shape, layout, multiprocessors, plan, seed) -> None:
    x, weight, h0 = inputs(shape, torch.float32)
    x = LAYOUTS[layout](x)
    machine.seed, machine.device = seed, {"multiprocessors": multiprocessors}
    channels, residual = torch.randn(2, shape[1]), torch.randn(shape)
    inference = {"scale": channels[0], "shift": channels[1], "residual": residual, "relu": True}
    found = {}
    for plain in (False, True):
        machine.plain = plain
        found[plain] = [
            *machine.forward(x, weight, h0),
            *machine.forward(x, weight, mean=True, reverse=True),
            *machine.forward(x, weight.t().contiguous().t(), h0, **inference),
            *machine.backward(x, h0, x, weight, h0, mean=True),
        ]
        assert machine.plan.startswith("plain") or plain is False
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    machine.plain = False
    check_forward(machine, x, weight, h0, False, False)
    start, *rest = plan.split("*")
    assert machine.plan.startswith("fp32: " + start) and all(part in machine.plan for part in rest)
    check_backward(machine, x, h0, x, weight, h0, True, False)


# For the matrix unit: shape, layout, plan. Words of 16, 8, 4 and 2 bytes; padded and full channels; tiles that end
# inside a sample, with it, and inside a warp; the state of several warps and blocks.
TILES = [
    ((2, 32, 3, 4, 8), "contiguous", "4 x 32 columns, channels padded to 64, along columns by 16 bytes, 3 stages"),
    ((1, 64, 5, 7, 7), "contiguous", "4 x 32 columns, channels padded to 64, along columns by 2 bytes, 3 stages"),
    ((3, 20, 2, 2, 6), "contiguous", "4 x 32 columns, channels padded to 64, along columns by 8 bytes, 3 stages"),
    ((2, 70, 3, 3, 6), "contiguous", "4 x 16 columns, channels padded to 128, along columns by 4 bytes, 3 stages"),
    ((3, 128, 2, 8, 8), "frame_major", "4 x 16 columns, channels padded to 128, along columns by 16 bytes, 3 stages"),
    ((2, 64, 6, 9, 9), "channels_last", "4 x 32 columns, channels padded to 64, along channels by 16 bytes, 3 stages"),
    (
        (1, 128, 3, 3, 5),
        "channels_last",
        "4 x 16 columns, channels padded to 128, along channels by 16 bytes, 3 stages",
    ),
    ((1, 100, 2, 3, 5), "channels_last", "4 x 16 columns, channels padded to 128, along channels by 8 bytes, 3 stages"),
    ((2, 6, 2, 3, 5), "channels_last", "4 x 32 columns, channels padded to 64, along channels by 4 bytes, 3 stages"),
    ((2, 33, 4, 3, 5), "channels_last", "4 x 32 columns, channels padded to 64, along channels by 2 bytes, 3 stages"),
]


# With W in registers: full and padded channels, words of every width, a last block that is not full.
WIDE = [
    ((2, 256, 3, 4, 8), "contiguous", "3 blocks of 24 columns, W in registers, along columns by 16 bytes, 4 stages"),
    ((1, 256, 5, 7, 7), "contiguous", "3 blocks of 24 columns, W in registers, along columns by 2 bytes, 4 stages"),
    ((1, 130, 3, 3, 6), "contiguous", "1 blocks of 24 columns, W in registers, along columns by 4 bytes, 4 stages"),
    ((1, 200, 2, 3, 4), "frame_major", "1 blocks of 24 columns, W in registers, along columns by 8 bytes, 4 stages"),
    (
        (1, 256, 6, 5, 7),
        "channels_last",
        "2 blocks of 24 columns, W in registers, along channels by 16 bytes, 4 stages",
    ),
    ((1, 132, 3, 3, 3), "channels_last", "1 blocks of 24 columns, W in registers, along channels by 8 bytes, 4 stages"),
    ((3, 129, 2, 3, 3), "channels_last", "2 blocks of 24 columns, W in registers, along channels by 2 bytes, 4 stages"),
]


@pytest.mark.parametrize(("shape", "layout", "plan"), TILES + WIDE, ids=lambda v: str(v).replace(" ", "")[:24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_way_to_cut_the_matrix_unit_scan(machine, shape, layout, plan, dtype, seed) -> None:
    machine.seed, machine.device = seed, {"multiprocessors": 1}
    x, weight, h0 = inputs(shape, dtype)
    x, grad_h = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(shape).to(dtype))
    check_forward(machine, x, weight, h0.float(), True, False)
    assert machine.plan.endswith(plan)
    check_forward(machine, x, weight, None, False, True)
    check_backward(machine, grad_h, h0.float(), x, weight, h0, False, False)
    check_backward(machine, None, h0.float(), x, weight, None, True, True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("multiprocessors", "words"), [(2, "2 blocks of 2 x"), (4, "3 blocks of 1 x")])
@pytest.mark.parametrize("channels", [20, 128])
def test_few_positions_are_spread_over_blocks_of_fewer_warps(machine, channels, multiprocessors, words, layout) -> None:
    """And not one bit is another: warps are independent of their block."""
    x, weight, h0 = inputs((2, channels, 3, 6, 7 if channels < 65 else 4), torch.bfloat16)
    x = LAYOUTS[layout](x)
    found = []
    for machine.device in ({"multiprocessors": 1}, {"multiprocessors": multiprocessors}):
        found.append([*machine.forward(x, weight, h0), *machine.backward(x, h0.float(), x, weight, h0)])
    check_forward(machine, x, weight, h0.float(), False, False)
    assert words in machine.plan
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_of_any_alignment_and_pitch(machine) -> None:
    """W comes into shared memory by words or by numbers: the same bits, in blocks of 4 warps and of 1."""
    for shape in ((1, 64, 2, 3, 5), (1, 40, 2, 3, 5), (1, 128, 2, 3, 5)):
        c = shape[1]
        x, weight, h0 = inputs(shape, torch.bfloat16)
        want = machine.forward(x, weight, h0)
        ways = (
            torch.empty(c * c + 1, dtype=torch.bfloat16)[1:].view(c, c),  # not aligned
            torch.full((c, c + 8), torch.nan, dtype=torch.bfloat16)[:, :c],  # words with a pitch
            torch.full((c, c + 4), torch.nan, dtype=torch.bfloat16)[:, :c],  # rows that are not aligned
            torch.full((c, c), torch.nan, dtype=torch.bfloat16).T,
            torch.full((c, 2 * c), torch.nan, dtype=torch.bfloat16)[:, ::2],
        )
        for multiprocessors in (1, 108):
            machine.device = {"multiprocessors": multiprocessors}
            for way in ways:
                got = machine.forward(x, way.copy_(weight), h0)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "dtype", "hopper", "kernel", "words"),
    [
        ((2, 16, 3, 4, 6), torch.bfloat16, False, "tile", "by 2 bytes"),
        ((1, 136, 2, 4, 4), torch.float16, False, "wide", "by 2 bytes"),
        ((1, 136, 2, 4, 4), torch.bfloat16, True, "hopper", "by 2 bytes"),
        ((2, 16, 3, 4, 6), torch.float32, False, "fp32", "x by single numbers"),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_tensors_that_begin_anywhere(machine_with, shape, dtype, hopper, kernel, words, layout) -> None:
    """One number after an aligned address words are as short as can be, and no bit is another."""
    machine = machine_with("address", device=HOPPER if hopper else {"multiprocessors": 1}, hopper=hopper)
    x, weight, h0 = inputs(shape, dtype)
    x, grad_h = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(shape).to(dtype))
    channels = torch.randn(shape[1])
    found = []
    for place in (lambda v: v, one_number_further):
        state, residual = place(h0), place(grad_h)
        found.append([*machine.forward(place(x), place(weight), state)])
        assert machine.plan.startswith(kernel) and (words in machine.plan) == (len(found) == 2)
        found[-1] += machine.forward(place(x), weight, scale=channels, shift=channels, residual=residual, relu=True)
        assert (words in machine.plan) == (len(found) == 2)
        found[-1] += machine.backward(place(grad_h), place(h0.float()), place(x), weight, state, mean=True)
        assert ("by 2 bytes" in machine.plan) == (len(found) == 2 and dtype != torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [160, 256])
def test_wide_epilogue_and_stages(machine, layout, channels, seed) -> None:
    """The epilogue against the plain kernel; with fewer slots the same bits; then the plain kernel takes over."""
    machine.seed = seed
    x, weight, h0 = inputs((1, channels, 6, 5, 8), torch.bfloat16)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(x.shape).bfloat16())
    per_channel = torch.randn(channels)
    options: dict[str, Any] = {"scale": per_channel, "shift": -per_channel, "residual": residual, "relu": True}
    want, want_n = machine.forward(x, weight, h0, **options)
    assert "4 stages" in machine.plan
    exact_h, exact_n = exact_forward(x, weight, h0, False, False)
    shaped = (slice(None), None, None, None)
    y = torch.relu(per_channel.double()[shaped] * exact_h - per_channel.double()[shaped] + residual.double())
    eager = reference.recurrent_conv_affine_act(
        x, weight, per_channel.bfloat16(), -per_channel.bfloat16(), h0, residual, state_dtype=torch.bfloat16
    )
    assert_close_to_reference(want, y, eager[0])
    assert_close_to_reference(want_n, exact_n, eager[1])
    machine.device = {"shared_bytes": 116 * 1024}
    got, got_n = machine.forward(x, weight, h0, **options)
    assert "3 stages" in machine.plan
    assert torch.equal(got, want)
    assert torch.equal(got_n, want_n)
    machine.device = {"shared_bytes": 90 * 1024}
    machine.forward(x, weight, h0, **options)
    assert "too little shared memory" in machine.plan


# By warpgroups: full and padded channels, words of every width, groups that are full, end early and have nothing to do.
HOPPER = {"architecture": 90, "shared_bytes": 227 * 1024}
WARPGROUPS = [
    ((1, 256, 2, 8, 16), "contiguous", "1 blocks of 2 x 64 columns, W in shared memory, along columns by 16 bytes"),
    ((2, 130, 2, 7, 10), "contiguous", "2 blocks of 2 x 64 columns, W in shared memory, along columns by 4 bytes"),
    ((1, 200, 2, 3, 4), "frame_major", "1 blocks of 2 x 64 columns, W in shared memory, along columns by 8 bytes"),
    ((1, 129, 1, 3, 3), "contiguous", "1 blocks of 2 x 64 columns, W in shared memory, along columns by 2 bytes"),
    ((1, 256, 3, 5, 13), "channels_last", "1 blocks of 2 x 64 columns, W in shared memory, along channels by 16 bytes"),
    ((1, 132, 5, 3, 3), "channels_last", "1 blocks of 2 x 64 columns, W in shared memory, along channels by 8 bytes"),
    ((3, 129, 2, 3, 3), "channels_last", "1 blocks of 2 x 64 columns, W in shared memory, along channels by 2 bytes"),
]


@pytest.mark.parametrize(("shape", "layout", "plan"), WARPGROUPS, ids=lambda v: str(v).replace(" ", "")[:24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_way_to_cut_the_scan_by_warpgroups(machine, shape, layout, plan, dtype, seed) -> None:
    machine.seed, machine.device, machine.hopper = seed, HOPPER, True
    x, weight, h0 = inputs(shape, dtype)
    x, grad_h = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(shape).to(dtype))
    check_forward(machine, x, weight, h0.float(), True, False)
    assert machine.plan == f"hopper: {plan}"
    check_forward(machine, x, weight, None, False, True)
    check_backward(machine, grad_h, h0.float(), x, weight, h0, False, False)
    check_backward(machine, None, h0.float(), x, weight, None, True, True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "with_residual"), [(160, True), (256, True), (131, False)])
def test_epilogue_by_warpgroups(machine, layout, channels, with_residual, seed) -> None:
    """Against the reference; other schedules and parts of the clip change no bit."""
    machine.seed, machine.device, machine.hopper = seed, HOPPER, True
    x, weight, h0 = inputs((1, channels, 5, 7, 10), torch.bfloat16)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(x.shape).bfloat16()) if with_residual else None
    scale, shift = torch.randn(2, channels)

    def run(frames: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        added = None if residual is None else residual[:, :, frames]
        return machine.forward(x[:, :, frames], weight, state, scale=scale, shift=shift, residual=added, relu=True)

    y, h_n = run(slice(None), h0)
    assert machine.plan.startswith("hopper")
    exact_h, exact_n = exact_forward(x, weight, h0, False, False)
    shaped = (slice(None), None, None, None)
    exact = scale.double()[shaped] * exact_h + shift.double()[shaped] + (0 if residual is None else residual.double())
    eager = reference.recurrent_conv_affine_act(
        x, weight, scale.bfloat16(), shift.bfloat16(), h0, residual, state_dtype=torch.bfloat16
    )
    assert_close_to_reference(y, torch.relu(exact), eager[0])
    assert_close_to_reference(h_n, exact_n, eager[1])
    machine.seed = seed + 1
    first, state = run(slice(0, 2), h0)
    rest, last = run(slice(2, 5), state)
    assert torch.equal(torch.cat([first, rest], 2), y)
    assert torch.equal(last, h_n)


def test_nan_and_inf_by_warpgroups(machine) -> None:
    machine.device, machine.hopper = HOPPER, True
    x, weight, h0 = inputs((2, 140, 4, 2, 3), torch.bfloat16)
    x[0, 1, 1, 0, 0] = torch.nan
    x[1, 2, 2, 1, 1] = torch.inf
    for got, want in zip(machine.forward(x, weight, h0), reference.recurrent_conv(x, weight, h0), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
    assert machine.plan.startswith("hopper")


def test_warpgroups_are_for_an_sm_90(machine) -> None:
    """Elsewhere, or with less shared memory, the wide kernel runs; few columns are its own on an sm_90, too."""
    x, weight, _ = inputs((1, 140, 1, 2, 2), torch.bfloat16)
    for device, hopper, end in (
        ({"architecture": 80, "shared_bytes": 227 * 1024}, True, "4 stages"),
        ({"architecture": 100, "shared_bytes": 227 * 1024}, True, "4 stages"),
        ({"architecture": 90, "shared_bytes": 200 * 1024}, True, "(not by warpgroups: too little shared memory)"),
        (HOPPER, False, "(not by warpgroups: smaller blocks are predicted to be faster)"),
    ):
        machine.device, machine.hopper = device, hopper
        machine.forward(x, weight)
        assert machine.plan.startswith("wide")
        assert machine.plan.endswith(end)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matrix_unit_epilogue_with_two_stages(machine, layout) -> None:
    """Where shared memory is short two frames are in flight; then the plain kernel takes over."""
    x, weight, h0 = inputs((1, 64, 5, 6, 6), torch.bfloat16)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(x.shape).bfloat16())
    channels = torch.randn(64)
    options: dict[str, Any] = {"scale": channels, "shift": -channels, "residual": residual, "relu": True}
    want, want_n = machine.forward(x, weight, h0, **options)
    assert "3 stages" in machine.plan
    machine.device = {"shared_bytes": 85 * 1024, "multiprocessors": 1}
    y, h_n = machine.forward(x, weight, h0, **options)
    assert "2 stages" in machine.plan
    assert torch.equal(y, want)
    assert torch.equal(h_n, want_n)
    machine.device = {"shared_bytes": 24 * 1024}
    machine.forward(x, weight, h0, **options)
    assert "too little shared memory" in machine.plan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_kernel_on_16_bit_data(machine, dtype, seed) -> None:
    machine.plain, machine.seed = True, seed
    x, weight, h0 = inputs((2, 33, 3, 5, 3), dtype)
    check_forward(machine, x, weight, h0, False, False)
    assert "the plain kernel was asked for" in machine.plan
    check_backward(machine, x, h0.float(), LAYOUTS["channels_last"](x), weight, h0, True, True)
    assert machine.plan.startswith("plain: 1 tiles of 64 x 64 x 1 splits of 96 rows (not the matrix unit: the plain")


@pytest.mark.parametrize(("off_diagonal", "factor"), [(0.0, 1000), (0.02, 20)])
def test_the_matrix_unit_s_state_is_fp32(machine, off_diagonal, factor) -> None:
    """What reaches the next frame through the diagonal is not rounded to bf16 on the way, though the matrix unit reads
    bf16: without other weights the error is fp32's, orders of magnitude below that of a bf16 state."""
    x = torch.randn(1, 64, 200, 2, 2).bfloat16()
    weight = (torch.diag(torch.rand(64) * 0.5 + 0.5) + off_diagonal * torch.randn(64, 64) / 8).bfloat16()
    _, h_n = machine.forward(x, weight)
    assert machine.plan.startswith("tile")
    _, exact = exact_forward(x, weight, None, False, False)
    _, rounded_state = reference.recurrent_conv(x, weight, state_dtype=torch.bfloat16)
    assert (h_n - exact).abs().max() * factor < (rounded_state - exact).abs().max()


def test_weight_gradient_of_many_rows_and_channels(machine) -> None:
    """Several splits, several tiles, odd edges of both."""
    x, weight, h0 = inputs((3, 67, 4, 9, 10), torch.float32)
    check_backward(machine, torch.randn(x.shape), None, x, weight, h0, False, False)


# ---- one frame per launch -------------------------------------------------------------------------------------------

STEPS = [  # with 4 multiprocessors; the larger tile when it fills them
    ((1, 64, 1, 7, 7), "contiguous", {"multiprocessors": 8}, "8 blocks of 32 channels x 16 columns"),
    ((3, 20, 1, 3, 5), "channels_last", {}, "3 blocks of 32 channels x 16 columns"),
    ((1, 130, 1, 4, 4), "width_major", {"multiprocessors": 64}, "5 blocks of 32 channels x 16 columns"),
    ((2, 264, 1, 6, 6), "channels_last", {"multiprocessors": 8}, "10 blocks of 64 channels x 64 columns"),
]


@pytest.mark.parametrize(("shape", "layout", "device", "plan"), STEPS, ids=lambda v: str(v).replace(" ", "")[:24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_frames(machine, shape, layout, device, plan, dtype, seed) -> None:
    """A frame after a given state, with and without the epilogue; h0 in x's dtype and in the state's."""
    machine.seed, machine.device = seed, device
    x, weight, h0 = inputs(shape, dtype)
    x = LAYOUTS[layout](x)
    check_forward(machine, x, weight, h0, True, False)
    # fp32 and fp64 have the small tile alone, and are cut otherwise where the scan fills the device.
    on_matrix_unit = dtype in (torch.bfloat16, torch.float16)
    assert not on_matrix_unit or machine.plan.startswith(f"step: {plan} on the matrix unit")
    state = LAYOUTS[layout](h0.to(state_dtype(dtype)).unsqueeze(2)).squeeze(2)
    channels = torch.randn(shape[1], dtype=state_dtype(dtype))
    options: dict[str, Any] = {"scale": channels, "shift": -channels, "residual": x, "relu": True}
    y, h_n = machine.forward(x, weight.t().contiguous().t(), state, **options)
    machine.plain = True
    want, want_n = machine.forward(x, weight, state, **options)
    if not on_matrix_unit:  # the same order of additions
        assert torch.equal(y, want)
        assert torch.equal(h_n, want_n)
    exact_h, exact_n = exact_forward(x, weight, state, False, False)
    shaped = channels.double()[:, None, None, None]
    eager = reference.recurrent_conv_affine_act(
        x, weight, channels.to(dtype), -channels.to(dtype), state.to(dtype), x, state_dtype=dtype
    )
    assert_close_to_reference(y, torch.relu(shaped * exact_h - shaped + x.double()), eager[0])
    assert_close_to_reference(h_n, exact_n, eager[1])


# By words of contiguous channels: both tiles, full and partial blocks of columns, samples that are one row of columns
# and, cut out of a clip, blocks of their own.
STEP_WORDS = [
    ((1, 64, 1, 7, 7), 1, {"multiprocessors": 8}, "8 blocks of 32 channels x 16 columns"),
    ((2, 32, 1, 3, 6), 1, {}, "3 blocks of 32 channels x 16 columns"),
    ((3, 96, 1, 3, 6), 2, {}, "18 blocks of 32 channels x 16 columns"),
    ((1, 128, 1, 9, 9), 1, {"multiprocessors": 4}, "4 blocks of 64 channels x 64 columns"),
    ((2, 192, 1, 5, 13), 2, {"multiprocessors": 4}, "12 blocks of 64 channels x 64 columns"),
]


@pytest.mark.parametrize(("shape", "frames", "device", "plan"), STEP_WORDS, ids=lambda v: str(v).replace(" ", "")[:24])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_single_frames_by_words(machine, shape, frames, device, plan, dtype, seed) -> None:
    """Against the reference, and the bits of the kernels that need no words."""
    machine.seed, machine.device = seed, device
    n, c, _, height, width = shape
    x, weight, h0 = inputs((n, c, frames, height, width), dtype)
    h0 = torch.randn(h0.shape)  # numbers that the matrix unit sees rounded
    x, h0 = LAYOUTS["channels_last"](x), LAYOUTS["channels_last"](h0.unsqueeze(2)).squeeze(2)
    residual, x = LAYOUTS["channels_last"](torch.randn(x.shape).to(dtype))[:, :, :1], x[:, :, frames - 1 :]
    channels = torch.randn(c)
    options: dict[str, Any] = {"scale": channels, "shift": -channels, "residual": residual}

    def all_ways(x: Tensor, weight: Tensor, h0: Tensor) -> list[Tensor]:
        return [
            *machine.forward(x, weight, h0),
            *machine.forward(x, weight, h0, mean=True, scale=channels, shift=channels),
            *machine.forward(x, weight, h0, relu=True, **options),
        ]

    check_forward(machine, x, weight, h0, True, False)
    # In fp32 there is the small tile alone.
    if dtype != torch.float32 or "32 channels" in plan:
        matrix = " on the matrix unit" if dtype != torch.float32 else ""
        assert machine.plan.startswith(f"step: {plan}{matrix}, by words of contiguous channels")
    found = all_ways(x, weight, h0)
    assert machine.plan.startswith("step") and "by words" in machine.plan
    want = all_ways(x, weight, contiguous(h0))
    assert "by words" not in machine.plan
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    exact, _ = exact_forward(x, weight, h0, False, False)
    per_channel = channels.double()[:, None, None, None]
    eager = reference.recurrent_conv_affine_act(
        x, weight, channels.to(dtype), -channels.to(dtype), h0.to(dtype), residual, state_dtype=dtype
    )
    assert_close_to_reference(found[4], torch.relu(per_channel * exact - per_channel + residual.double()), eager[0])


def test_what_goes_by_words(machine) -> None:
    """Every condition once: what only just does not fulfil it goes another way, to the same result."""
    x, weight, h0 = inputs((2, 32, 1, 4, 5), torch.bfloat16)
    frame, h0 = LAYOUTS["channels_last"](x), LAYOUTS["channels_last"](h0.float().unsqueeze(2)).squeeze(2)
    want = machine.forward(frame, weight, h0)
    assert "by words" in machine.plan
    wide = torch.full((32, 36), torch.nan, dtype=torch.bfloat16)[:, :32].copy_(weight)
    tall = torch.full((2, 1, 8, 5, 32), torch.nan, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3)[..., ::2, :]
    for other in (
        (contiguous(frame), weight, h0),
        (one_number_further(frame), weight, h0),
        (tall.copy_(frame), weight, h0),  # rows of a frame that do not follow each other
        (frame, wide, h0),
        (frame, weight.T.contiguous().T, h0),
        (frame, weight, contiguous(h0)),
        (frame, weight, one_number_further(h0)),
    ):
        got = machine.forward(*other)
        assert "by words" not in machine.plan
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    machine.forward(frame, weight, h0.bfloat16())
    assert "by words" not in machine.plan
    x, weight, h0 = inputs((1, 512, 1, 1, 3), torch.bfloat16)
    x, h0 = LAYOUTS["channels_last"](x), LAYOUTS["channels_last"](h0.float().unsqueeze(2)).squeeze(2)
    machine.device = {"multiprocessors": 32}
    want = machine.forward(x, weight, h0)
    assert "by words" in machine.plan
    machine.device |= {"shared_bytes": 60 * 1024}  # not all input channels at a time
    got = machine.forward(x, weight, h0)
    assert "by words" not in machine.plan
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "layout"), [(24, "contiguous"), (128, "channels_last"), (160, "contiguous")])
def test_single_frames_continue_a_sequence_exactly(machine, channels, layout, dtype) -> None:
    """A stream of single frames, split over output channels, has the bits of the scan over all of them."""
    x, weight, h0 = inputs((1, channels, 3, 3, 4), dtype)
    x, state = LAYOUTS[layout](x), h0.to(state_dtype(dtype))
    whole, whole_n = machine.forward(x, weight, state)
    assert not machine.plan.startswith("step")
    frames = []
    for frame in x.split(1, dim=2):
        h, state = machine.forward(frame, weight, state)
        assert machine.plan.startswith("step")
        frames.append(h)
    assert torch.equal(torch.cat(frames, 2), whole)
    assert torch.equal(state, whole_n)


@pytest.mark.parametrize(("layout", "channels"), [("contiguous", 280), ("channels_last", 280), ("channels_last", 288)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_channels_than_a_scan_holds(machine, layout, channels, dtype, seed) -> None:
    """Frame after frame on the matrix unit, forward and backward; cut in two, the same bits."""
    machine.seed = seed
    x, weight, h0 = inputs((2, channels, 4, 3, 3), dtype)
    x, grad_h = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(x.shape).to(dtype))
    check_forward(machine, x, weight, h0.float(), True, True)
    assert machine.plan.startswith("step: 4 launches of ")
    check_backward(machine, grad_h, h0.float(), x, weight, h0, False, False)
    check_backward(machine, None, h0.float(), x, weight, None, True, True)
    whole, whole_n = machine.forward(x, weight)
    head, state = machine.forward(x[:, :, :1], weight)
    tail, state = machine.forward(x[:, :, 1:], weight, state)
    assert torch.equal(torch.cat([head, tail], 2), whole)
    assert torch.equal(state, whole_n)


# ---- the weight gradient ---------------------------------------------------------------------------------------------

# On the matrix unit: full and partial tiles and stages, words of every width, several tiles, several splits.
WEIGHT_GRADIENTS = [
    ((2, 64, 4, 8, 8), "contiguous", "1 tiles of 64 x 64 x 2 splits of 256 rows, along columns by 16 bytes"),
    ((1, 130, 3, 7, 7), "contiguous", "4 tiles of 128 x 128 x 1 splits of 160 rows, along columns by 2 bytes"),
    ((1, 72, 2, 6, 6), "frame_major", "1 tiles of 128 x 128 x 1 splits of 96 rows, along columns by 8 bytes"),
    ((2, 20, 4, 9, 7), "channels_last", "1 tiles of 64 x 64 x 2 splits of 256 rows, along channels by 8 bytes"),
    ((3, 136, 2, 5, 5), "channels_last", "4 tiles of 128 x 128 x 1 splits of 160 rows, along channels by 16 bytes"),
]


@pytest.mark.parametrize(("shape", "layout", "plan"), WEIGHT_GRADIENTS, ids=lambda v: str(v).replace(" ", "")[:24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_on_the_matrix_unit(machine, shape, layout, plan, dtype, seed) -> None:
    """With a state in fp32 and any layout, in x's dtype, and without one."""
    machine.seed = seed
    x, weight, h0 = inputs(shape, dtype)
    x, grad_h = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(shape).to(dtype))
    check_backward(machine, grad_h, None, x, weight, None, False, True)
    assert "matrix: " in machine.plan
    check_backward(machine, grad_h, h0.float(), x, weight, h0, True, False)
    state = LAYOUTS["channels_last"](h0.float().unsqueeze(2)).squeeze(2)
    check_backward(machine, grad_h, None, x, weight, state, False, False)
    assert machine.plan == "matrix: " + plan


def test_weight_gradient_of_the_matrix_unit_in_integers(machine) -> None:
    """Sums of small integers, exact in fp16 up to 2048: not one bit may differ, whatever the layout."""
    for layout in ("contiguous", "channels_last"):
        h, dx, h0 = (LAYOUTS[layout](torch.randint(-1, 2, (2, 40, 3, 8, 8)).half()) for _ in range(3))
        _, dweight, _ = machine.backward(dx, None, h, torch.zeros(40, 40).half(), h0[:, :, 0])
        before = torch.cat([h0[:, :, :1], h[:, :, :-1]], 2)
        want = torch.einsum("nothw,nithw->oi", dx.double(), before.double())
        assert machine.plan.startswith("matrix")
        assert want.abs().max() < 2048
        assert torch.equal(dweight.double(), want)


# Sums beside the scan: one block and several, the last one's columns all of one warp or of some, words of every width,
# and channels that fill the tile or not.
FUSED = [
    ((1, 64, 4, 8, 16), "contiguous"),
    ((1, 64, 4, 8, 20), "channels_last"),
    ((2, 20, 5, 9, 10), "channels_last"),
    ((3, 33, 3, 5, 9), "contiguous"),
    ((2, 40, 4, 8, 9), "frame_major"),
]


@pytest.mark.parametrize(("shape", "layout"), FUSED, ids=lambda v: str(v).replace(" ", "")[:24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scan_adds_up_the_weight_gradient(machine, shape, layout, dtype, seed) -> None:
    """Without a first state, and with one in fp32 and in x's dtype, as it lies; both directions and updates."""
    machine.seed = seed
    x, weight, h0 = inputs(shape, dtype)
    x, grad_h = LAYOUTS[layout](x), LAYOUTS[layout](torch.randn(shape).to(dtype))
    grad_h_n = torch.randn(h0.shape)
    check_backward(machine, grad_h, grad_h_n, x, weight, None, False, True, fused=True)
    assert machine.plan.startswith("tile: "), machine.plan
    check_backward(machine, grad_h, None, x, weight, h0.float(), True, False, fused=True)
    state = LAYOUTS["channels_last"](h0.unsqueeze(2)).squeeze(2)
    check_backward(machine, None, grad_h_n, x, weight, state, True, True, fused=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stages", [2, 3])
def test_sums_beside_the_scan_in_integers(machine, layout, stages) -> None:
    """With W = 0 dx is the gradient: not one bit may differ, and nothing of one block is another's."""
    machine.device = {"multiprocessors": 1, "shared_bytes": (78 if stages == 2 else 100) * 1024}
    h, dx, h0 = (LAYOUTS[layout](torch.randint(-1, 2, (2, 60, 7, 11, 10)).half()) for _ in range(3))
    for state in (h0[:, :, 0], None):
        got, dweight, _ = machine.backward(dx, None, h, torch.zeros(60, 60).half(), state, fused=True)
        assert machine.plan.endswith(f"{stages} stages"), machine.plan
        before = torch.cat([h0[:, :, :1] if state is not None else torch.zeros_like(h[:, :, :1]), h[:, :, :-1]], 2)
        want = torch.einsum("nothw,nithw->oi", dx.double(), before.double())
        assert torch.equal(got, dx)
        assert want.abs().max() < 2048
        assert torch.equal(dweight.double(), want)


def test_columns_that_are_not_there_add_nothing_to_the_weight_gradient(machine) -> None:
    """An infinite weight makes NaN of the zeros beside the last column, in a channel that it makes infinite itself."""
    h, grad_h = (torch.rand(1, 24, 3, 5, 7).bfloat16() for _ in range(2))
    weight = torch.eye(24).bfloat16()
    weight[3, 5] = torch.inf
    grad_h[:, 3] = 1  # times infinity: dx of channel 5
    apart, together = (machine.backward(grad_h, None, h, weight, fused=fused) for fused in (False, True))
    assert torch.equal(apart[0].nan_to_num(), together[0].nan_to_num())
    for dweight in (apart[1], together[1]):
        assert dweight[:5].isfinite().all()
        assert dweight[6:].isfinite().all()
        assert (dweight[5] == torch.inf).all()


@pytest.mark.parametrize("shape", [(1, 72, 4, 8, 16), (1, 16, 129, 2, 2)], ids=str)
def test_a_scan_that_cannot_add_up_the_weight_gradient_says_so(machine, shape) -> None:
    """More channels than its sums have room for, and more rows than the matrix unit's additions bear."""
    x, weight, _ = inputs(shape, torch.bfloat16)
    with pytest.raises(LaunchError, match="takes no part of the weight's gradient"):
        machine.backward(x, None, x, weight, fused=True)


# ---- sanitizers ---------------------------------------------------------------------------------------------------

SANITIZED = [
    ((1, 64, 3, 5, 5), torch.bfloat16, "contiguous", {"multiprocessors": 1}),
    ((2, 24, 3, 4, 4), torch.float16, "contiguous", {}),
    ((1, 128, 4, 3, 7), torch.bfloat16, "channels_last", {}),
    ((1, 20, 4, 3, 7), torch.float16, "channels_last", {}),
    ((1, 250, 2, 3, 4), torch.bfloat16, "contiguous", {}),
    ((1, 256, 4, 1, 2), torch.float16, "channels_last", {}),
    ((1, 250, 2, 5, 14), torch.bfloat16, "contiguous", HOPPER),
    ((1, 136, 4, 3, 5), torch.float16, "channels_last", HOPPER),
    ((1, 33, 2, 5, 7), torch.bfloat16, "channels_last", {}),
    ((2, 66, 3, 6, 8), torch.bfloat16, "contiguous", {}),
    # Steps of 32 x 16 and 64 x 64, each with input channels in two pieces, and with several blocks of columns.
    ((1, 530, 2, 1, 5), torch.bfloat16, "contiguous", {"multiprocessors": 16}),
    ((1, 264, 1, 1, 5), torch.bfloat16, "contiguous", {}),
    ((1, 264, 2, 6, 6), torch.float16, "channels_last", {"multiprocessors": 8}),
    ((1, 136, 1, 3, 5), torch.float32, "channels_last", {}),
    ((2, 288, 2, 3, 5), torch.bfloat16, "channels_last", {}),
    ((2, 320, 2, 5, 13), torch.float16, "channels_last", {"multiprocessors": 8}),
    ((1, 12, 2, 3, 6), torch.float32, "channels_last", {"multiprocessors": 1}),
    ((1, 130, 2, 3, 7), torch.float16, "middle_channels", {"shared_bytes": 26 * 1024, "multiprocessors": 1}),
    ((1, 130, 2, 3, 3), torch.float64, "every_other_column", {"shared_bytes": 40 * 1024, "multiprocessors": 1}),
]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(("shape", "dtype", "layout", "device"), SANITIZED, ids=lambda v: str(v).replace(" ", ""))
def test_sanitizers_have_nothing_to_report(machine_with, sanitizer, shape, dtype, layout, device, seed) -> None:
    machine = machine_with(sanitizer, seed=seed, device=device, hopper=device is HOPPER)
    x, weight, h0 = inputs(shape, dtype)
    x = LAYOUTS[layout](x)
    state = state_dtype(dtype)
    channels = torch.ones(shape[1], dtype=state)
    y, _ = machine.forward(x, weight, h0, scale=channels, shift=channels, residual=x, relu=True)
    assert not y.isnan().any()
    assert machine.plan.startswith("hopper") == (device is HOPPER)
    check_backward(machine, x, h0.to(state), x, weight, h0, True, True)
    check_backward(machine, x, None, x, weight, None, False, False)
    if shape[1] <= 64 and shape[2] > 2 and dtype != torch.float32:
        check_backward(machine, x, h0.to(state), x, weight, h0, True, True, fused=True)
        assert machine.plan.startswith("tile: ")
