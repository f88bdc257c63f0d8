"""Triton kernels of ``srtg_squeeze`` and ``srtg_fuse`` and their gradients: one read, one write, whatever the strides.

A program owns one frame of one sample and a block of channels, and walks over its positions: 32 channels side by side
where channels are adjacent in memory, one row of positions after another where positions are. Sums are fp32, in an
order that depends on the sizes and the layout alone. Bound by memory: x read once (and grad), y written once.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels.device import clip_offsets
from rcu_ops.triton_kernels.launch import MOST_BLOCKS, Launch, ceil_div, parts

#: What a program does: means of x; x h; x + h; grad h and the sums of grad x.
SQUEEZE, MUL, ADD, BACKWARD = range(4)


@triton.jit(do_not_specialize=["c_first", "c_count", "t_count", "positions", "width"])
def gate_kernel(
    x, grad, y, h, gate, sums, c_first, c_count, t_count, positions, width,
    x_n, x_c, x_t, x_h, x_w, g_n, g_c, g_t, g_h, g_w, y_n, y_c, y_t, y_h, y_w, gate_n,
    PASS: tl.constexpr, FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``y`` like x, and ``sums [n, t, c]`` fp32 contiguous. Program (n t, i): channels [c_first + i BLOCK_C, ..) of one
    frame.

    The gate is open where it is None. Closed, ``mul`` and ``add`` copy x, ``backward`` copies grad and its sums are 0.
    """
    frame = tl.program_id(0)
    n, t = (frame // t_count).to(tl.int64), (frame % t_count).to(tl.int64)
    c = c_first + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    to = frame.to(tl.int64) * c_count + c
    is_open = True
    if gate is not None:
        is_open = tl.load(gate + n * gate_n) != 0
    if PASS != 0:
        factor = tl.load(h + to, mask=c < c_count, other=0.0)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in tl.range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        there = (c < c_count)[:, None] & (position < positions)[None, :]
        raw = tl.load(x + clip_offsets(n, c, t, position, width, x_n, x_c, x_t, x_h, x_w, FLAT), mask=there, other=0.0)
        value = raw.to(tl.float32)
        if PASS == 0:
            total += value
        else:
            through = raw
            if PASS == 1:
                result = value * factor[:, None]
            elif PASS == 2:
                result = value + factor[:, None]
            else:
                through = tl.load(
                    grad + clip_offsets(n, c, t, position, width, g_n, g_c, g_t, g_h, g_w, FLAT), mask=there, other=0.0
                )
                result = through.to(tl.float32) * factor[:, None]
                total += value * through.to(tl.float32)
            result = tl.where(is_open, result, through.to(tl.float32))
            into = y + clip_offsets(n, c, t, position, width, y_n, y_c, y_t, y_h, y_w, FLAT)
            tl.store(into, result.to(y.dtype.element_ty), mask=there)
    if PASS == 0:
        tl.store(sums + to, tl.sum(total, 1) / positions, mask=c < c_count)
    if PASS == 3:
        tl.store(sums + to, tl.where(is_open, tl.sum(total, 1), 0.0), mask=c < c_count)


def plan(
    what: int, x: Tensor, h: Tensor | None = None, gate: Tensor | None = None, grad: Tensor | None = None
) -> tuple[tuple[Tensor | None, Tensor | None], list[Launch]]:
    """``(y, sums)`` to be filled (None where there is none), and the launches that fill them."""
    n, c, t, height, width = x.shape
    y = None if what == SQUEEZE else torch.empty_like(x)
    sums = x.new_empty((n, t, c), dtype=torch.float32) if what in (SQUEEZE, BACKWARD) else None
    if n * c * t == 0:
        return (y, sums), []
    if height * width == 0:
        if sums is not None:
            sums.zero_()
        return (y, sums), []
    along = x.stride(1) == 1 and c > 1
    block_c, block_p = (64, 16) if along else (4, 256)
    strides = [tuple(v.stride()) if v is not None else (0,) * 5 for v in (x, grad, y)]
    pointers = (x, grad, y, None if h is None else h.contiguous(), gate, sums)
    sizes = (
        c, t, height * width, width,
        *(s for of in strides for s in of), 0 if gate is None else gate.stride(0),
    )  # fmt: skip
    flat = all(height == 1 or v is None or v.stride(3) == width * v.stride(4) for v in (x, grad, y))
    constants = {"PASS": what, "FLAT": flat, "BLOCK_C": block_c, "BLOCK_P": block_p}
    return (y, sums), [
        Launch(gate_kernel, (n * t, blocks), (*pointers, first * block_c, *sizes), constants, 4, 2)
        for first, blocks in parts(ceil_div(c, block_c), MOST_BLOCKS)
    ]


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def squeeze(x: Tensor) -> Tensor:
    """``rcu_ops::srtg_squeeze``."""
    (_, sums), launches = plan(SQUEEZE, x)
    assert sums is not None
    _run(launches, x.device)
    return sums


def fuse(x: Tensor, h: Tensor, gate: Tensor | None, add: bool) -> Tensor:
    """``rcu_ops::srtg_fuse``."""
    (y, _), launches = plan(ADD if add else MUL, x, h, gate)
    assert y is not None
    _run(launches, x.device)
    return y


def fuse_backward(grad: Tensor, x: Tensor, h: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """``rcu_ops::srtg_fuse_backward``."""
    (dx, dh), launches = plan(BACKWARD, x, h, gate, grad)
    assert dx is not None and dh is not None
    _run(launches, x.device)
    return dx, dh
