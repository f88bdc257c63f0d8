"""Triton kernels of ``recurrent_conv_batch_norm``: the passes around recurrent_conv's scans.

With the moments (mean, sum of squared deviations, number of values) of a channel, ``r = 1 / sqrt(var + eps)`` and
``s = gamma r``, the passes are those of csrc/common/recurrent_conv_batch_norm.h:

    moments    mean and squared deviations of each frame, put together in fp64 by :func:`finish_kernel`
    normalize  ``y = act(s (h - mean) + beta (+ residual))``
    sums       of ``dz`` and ``r dz (h - mean)``, ``dz`` being the gradient that ReLU let through; put together likewise
    gradient   of h: ``s dz - s r sums_1 / count (h - mean) - s sums_0 / count``

Sums run in an order that depends on the sizes and the layout alone: no atomics, the same bits every time.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels import recurrent_conv as scans
from rcu_ops.triton_kernels.device import clip_offsets
from rcu_ops.triton_kernels.launch import MOST_BLOCKS, Launch, ceil_div, parts

MOMENTS, NORMALIZE, SUMS, GRADIENT = range(4)  # PASS


@triton.jit(do_not_specialize=["c_first", "c_count", "t_count", "positions", "width", "eps"])
def norm_kernel(
    h, other, y, out, partial, moments, gamma, beta, sums, c_first, c_count, t_count, positions, width, eps,
    h_n, h_c, h_t, h_h, h_w, other_n, other_c, other_t, other_h, other_w,
    y_n, y_c, y_t, y_h, y_w, out_n, out_c, out_t, out_h, out_w,
    PASS: tl.constexpr, RELU: tl.constexpr, FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One pass over h [N,C,T,H,W] by strides. Program (n t, i): channels [c_first + i BLOCK_C, ..) of one frame.

    Layout: other (the residual, or the gradient of y), y (read for its sign alone; written by NORMALIZE) and out (dz or
    the gradient of h) like h, or None; moments [3,C], gamma, beta [C], sums [2,C] fp32 contiguous, gamma and beta may
    be None. partial [frames, C, 2] fp64: a frame's mean and squared deviations, or its two sums.

    Ownership: a program walks over its frame's positions, 64 channels side by side where channels are adjacent in
    memory, rows of 256 positions otherwise; every output has one writer. No shared memory but for the sums' reduction.
    MOMENTS reads its frame twice, the second time from L2: the mean, then what deviates from it. Bound by memory.
    """
    frame = tl.program_id(0)
    n, t = (frame // t_count).to(tl.int64), (frame % t_count).to(tl.int64)
    c = c_first + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mine = c < c_count
    if partial is not None:
        to = partial + (frame.to(tl.int64) * c_count + c) * 2
    if PASS == 0:
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in tl.range(0, positions, BLOCK_P):
            position = start + tl.arange(0, BLOCK_P)
            there = mine[:, None] & (position < positions)[None, :]
            at = clip_offsets(n, c, t, position, width, h_n, h_c, h_t, h_h, h_w, FLAT)
            total += tl.load(h + at, mask=there, other=0.0).to(tl.float32)
        center = tl.sum(total, 1) / positions
        rest = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in tl.range(0, positions, BLOCK_P):
            position = start + tl.arange(0, BLOCK_P)
            there = mine[:, None] & (position < positions)[None, :]
            at = clip_offsets(n, c, t, position, width, h_n, h_c, h_t, h_h, h_w, FLAT)
            value = tl.load(h + at, mask=there, other=0.0).to(tl.float32)
            deviation = tl.where(there, value - center[:, None], 0.0)
            rest += deviation
            squares += deviation * deviation
        # What rounding did to the center is taken out again.
        apart = tl.sum(rest, 1).to(tl.float64) / positions
        tl.store(to, center.to(tl.float64) + apart, mask=mine)
        tl.store(to + 1, tl.sum(squares, 1).to(tl.float64) - apart * apart * positions, mask=mine)
    else:
        mean = tl.load(moments + c, mask=mine, other=0.0)
        count = tl.maximum(tl.load(moments + 2 * c_count + c, mask=mine, other=1.0), 1.0)
        variance = tl.load(moments + c_count + c, mask=mine, other=1.0) / count
        inverse = 1.0 / tl.sqrt(variance + eps)
        scale = inverse
        if gamma is not None:
            scale = inverse * tl.load(gamma + c, mask=mine, other=0.0)
        shift = tl.zeros((BLOCK_C,), tl.float32)
        if beta is not None:
            shift = tl.load(beta + c, mask=mine, other=0.0)
        if PASS == 3:
            slope = -scale * inverse * tl.load(sums + c_count + c, mask=mine, other=0.0) / count
            constant = -scale * tl.load(sums + c, mask=mine, other=0.0) / count
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        product = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in tl.range(0, positions, BLOCK_P):
            position = start + tl.arange(0, BLOCK_P)
            there = mine[:, None] & (position < positions)[None, :]
            at = clip_offsets(n, c, t, position, width, h_n, h_c, h_t, h_h, h_w, FLAT)
            deviation = tl.load(h + at, mask=there, other=0.0).to(tl.float32) - mean[:, None]
            z = deviation * scale[:, None] + shift[:, None]
            if other is not None:
                at = clip_offsets(n, c, t, position, width, other_n, other_c, other_t, other_h, other_w, FLAT)
                given = tl.load(other + at, mask=there, other=0.0).to(tl.float32)
            if PASS == 1:
                if other is not None:
                    z += given
                if RELU:
                    z = tl.where(z < 0.0, 0.0, z)  # NaN stays
                at = clip_offsets(n, c, t, position, width, y_n, y_c, y_t, y_h, y_w, FLAT)
                tl.store(y + at, z.to(y.dtype.element_ty), mask=there)
            else:
                dz = given
                if RELU:
                    if y is not None:
                        at = clip_offsets(n, c, t, position, width, y_n, y_c, y_t, y_h, y_w, FLAT)
                        z = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
                    dz = tl.where(z <= 0.0, 0.0, dz)
                if PASS == 2:
                    total += dz
                    product += tl.where(there, dz * deviation, 0.0)
                else:
                    dz = scale[:, None] * dz + (slope[:, None] * deviation + constant[:, None])
                if out is not None:
                    at = clip_offsets(n, c, t, position, width, out_n, out_c, out_t, out_h, out_w, FLAT)
                    tl.store(out + at, dz.to(out.dtype.element_ty), mask=there)
        if PASS == 2:
            tl.store(to, tl.sum(total, 1).to(tl.float64), mask=mine)
            tl.store(to + 1, tl.sum(product, 1).to(tl.float64), mask=mine)


@triton.jit(do_not_specialize=["c_count", "frames", "positions", "eps"])
def finish_kernel(
    partial, moments, result, c_count, frames, positions, eps,
    PASS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The frames' parts of BLOCK_C channels together, in fp64: result [3,C] (MOMENTS) or [2,C] (SUMS), fp32.

    Frames are added BLOCK_F at a time in ascending order. moments as in :func:`norm_kernel`, for SUMS. Bound by the
    latency of reading partial, 16 bytes per frame and channel.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mine = c < c_count
    first = tl.zeros((BLOCK_F, BLOCK_C), tl.float64)
    second = tl.zeros((BLOCK_F, BLOCK_C), tl.float64)
    for start in tl.range(0, frames, BLOCK_F):
        frame = start + tl.arange(0, BLOCK_F)
        there = (frame < frames)[:, None] & mine[None, :]
        at = partial + (frame.to(tl.int64)[:, None] * c_count + c[None, :]) * 2
        first += tl.load(at, mask=there, other=0.0)
        if PASS == 2:
            second += tl.load(at + 1, mask=there, other=0.0)
    total = tl.sum(first, 0)
    if PASS == 2:
        count = tl.maximum(tl.load(moments + 2 * c_count + c, mask=mine, other=1.0), 1.0)
        variance = (tl.load(moments + c_count + c, mask=mine, other=1.0) / count).to(tl.float64)
        spread = tl.sum(second, 0) / tl.sqrt(variance + eps)
    else:
        total = total / frames
        for start in tl.range(0, frames, BLOCK_F):
            frame = start + tl.arange(0, BLOCK_F)
            there = (frame < frames)[:, None] & mine[None, :]
            at = partial + (frame.to(tl.int64)[:, None] * c_count + c[None, :]) * 2
            apart = tl.load(at, mask=there, other=0.0) - total[None, :]
            second += tl.where(there, tl.load(at + 1, mask=there, other=0.0) + positions * apart * apart, 0.0)
        spread = tl.sum(second, 0)
        count = tl.full((BLOCK_C,), 1.0, tl.float64) * frames * positions
        tl.store(result + 2 * c_count + c, count.to(tl.float32), mask=mine)
    tl.store(result + c, total.to(tl.float32), mask=mine)
    tl.store(result + c_count + c, spread.to(tl.float32), mask=mine)


def plan(
    what: int,
    h: Tensor,
    *,
    other: Tensor | None = None,
    y: Tensor | None = None,
    out: Tensor | None = None,
    result: Tensor | None = None,
    moments: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    sums: Tensor | None = None,
    eps: float = 0.0,
    relu: bool = False,
) -> list[Launch]:
    """The launches of one pass over h [N,C,T,H,W]; what it writes is among the arguments. Tables are fp32."""
    n, c, t, height, width = h.shape
    if h.numel() == 0:
        if result is not None:
            result.zero_()
        return []
    along = h.stride(1) == 1 and c > 1
    block_c, block_p = (64, 16) if along else (4, 256)
    partial = None if result is None else h.new_empty((n * t, c, 2), dtype=torch.float64)
    sequences = (h, other, y, out)
    tables = [None if table is None else table.contiguous() for table in (moments, gamma, beta, sums)]
    flat = all(height == 1 or v is None or v.stride(3) == width * v.stride(4) for v in sequences)
    sizes = (
        c, t, height * width, width, eps,
        *(stride for v in sequences for stride in ((0,) * 5 if v is None else v.stride())),
    )  # fmt: skip
    constants = {"PASS": what, "RELU": relu, "FLAT": flat, "BLOCK_C": block_c, "BLOCK_P": block_p}
    launches = [
        Launch(norm_kernel, (n * t, blocks), (*sequences, partial, *tables, first * block_c, *sizes), constants, 4, 2)
        for first, blocks in parts(ceil_div(c, block_c), MOST_BLOCKS)
    ]
    if result is not None:
        finish = (partial, tables[0], result, c, n * t, height * width, eps)
        constants = {"PASS": what, "BLOCK_C": 16, "BLOCK_F": 32}
        launches.append(Launch(finish_kernel, (ceil_div(c, 16),), finish, constants, 4, 1))
    return launches


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def moments(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::recurrent_conv_moments``."""
    h, h_n = scans.forward(x, weight, h0, mean, False)
    result = h.new_empty((3, h.shape[1]), dtype=torch.float32)
    _run(plan(MOMENTS, h, result=result), h.device)
    return h, h_n, result


def normalize(
    h: Tensor,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """``rcu_ops::recurrent_conv_normalize``."""
    y = torch.empty_like(h)
    launches = plan(NORMALIZE, h, other=residual, y=y, moments=moments, gamma=gamma, beta=beta, eps=eps, relu=relu)
    _run(launches, h.device)
    return y


def normalize_sums(
    grad_y: Tensor,
    h: Tensor,
    y: Tensor | None,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """``rcu_ops::recurrent_conv_normalize_sums``."""
    sums = h.new_empty((2, h.shape[1]), dtype=torch.float32)
    dz = None if y is None else torch.empty_like(h)
    tables = {"moments": moments, "gamma": gamma, "beta": beta}
    _run(plan(SUMS, h, other=grad_y, y=y, out=dz, result=sums, eps=eps, relu=relu, **tables), h.device)
    return sums, h.new_empty(0) if dz is None else dz


def normalize_backward(
    dz: Tensor,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    moments: Tensor,
    sums: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    mean: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::recurrent_conv_normalize_backward``."""
    grad_h = torch.empty_like(h)
    tables = {"moments": moments, "gamma": gamma, "beta": beta, "sums": sums}
    _run(plan(GRADIENT, h, other=dz, out=grad_h, eps=eps, relu=relu, **tables), h.device)
    return scans.backward(grad_h, grad_h_n, h, weight, h0, mean, False, need_weight_grad)
