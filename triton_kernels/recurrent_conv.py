"""Triton kernels of ``recurrent_conv``: the scan, its fused inference form, its adjoint, and the weight gradient.

One kernel is all three scans. With q_t = a g_t the adjoint of ``h_t = a (W h_{t-1} + x_t)`` is the same recurrence with
W transposed, ``q_t = a (W^T q_{t+1} + grad_t)``, and then ``dx_t = q_t``, ``dh0 = W^T q_first``, ``dW = sum_t q_t
h_{t-1}^T`` (a is a power of two, so nothing is rounded by moving it). Transposition is a swap of W's strides and
reversed time a negative frame step, so neither is a compile key; nor is the number of frames.

**The state is fp32**, whatever the matrix unit reads. With low(h) the state rounded to the unit's input format and d
the diagonal of W, a step is

    h  <-  W low(h)  +  d * (h - low(h))  +  x

The second term gives the diagonal what rounding took from it, and h - low(h) is exact, so a channel's own memory is
kept in full fp32: with W = I the state is the exact sum of its inputs, where a recurrence on low(h) alone stops
growing. It costs one multiply-add per element, and unlike a split of W it needs no second copy of W, so that W can also
be streamed. In fp32 with ``input_precision="ieee"`` low(h) is h and the term vanishes.

Configurations are a fixed table (:data:`SCAN_TILES`), never tuned at run time. Every launch is described by a
:class:`Launch`, which runs it, compiles it ahead (:func:`rcu_ops.warmup`), or tells its signature (the compile tests).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels.device import add_product
from rcu_ops.triton_kernels.launch import MULTIPROCESSORS, Launch, architecture, ceil_div, precision_of

STRIDED, CHANNEL_CONTIGUOUS, FRAME_CONTIGUOUS = 0, 1, 2  # the unit-stride direction of a tensor: X_LAYOUT and its like
FIRST_INPUT, GIVEN, ADDED = 0, 1, 2  # START: what the state before the first step is made of
NOTHING, STATE, PRODUCT = 0, 1, 2  # LAST: what is written after the last step

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _place(tile, positions, frame_size, PER_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    # The positions of a tile as (sample, place in the frame), and which of them exist. Tiles run over the flattened
    # positions, so that small frames fill them; PER_SAMPLE tiles stay within a frame, where neighbours are neighbours
    # in memory for certain: without alignment that is what keeps the accesses coalesced.
    if PER_SAMPLE:
        tiles = (frame_size + BLOCK_M - 1) // BLOCK_M
        sample = tl.cast(tile // tiles, tl.int64)
        place = tl.cast(tile % tiles, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < frame_size
    else:
        position = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        sample = position // frame_size
        place = position % frame_size
        inside = position < positions
    return sample, place, inside


@triton.jit
def _offsets(sample, place, channel, width, n, c, h, w, LAYOUT: tl.constexpr, WIDE: tl.constexpr):
    # [positions, channels] offsets within a frame, 32 bits where they suffice. The branches leave out what is known, so
    # that the compiler sees the contiguity.
    if LAYOUT == 2:
        rows = sample * n + place
    else:
        rows = sample * n + (place // width) * h + (place % width) * w
    if not WIDE:
        rows = rows.to(tl.int32)
    if LAYOUT == 1:
        columns = channel
    else:
        columns = channel.to(tl.int64) * c
        if not WIDE:
            columns = columns.to(tl.int32)
    return rows[:, None] + columns[None, :]


@triton.jit
def _pointers(frame, offsets, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    # Hands the compiler what the launcher has checked: aligned groups of VECTOR elements along the contiguous
    # direction.
    SIZE: tl.constexpr = frame.dtype.element_ty.primitive_bitwidth // 8
    pointers = frame + offsets
    if LAYOUT == 1:
        pointers = tl.multiple_of(pointers, [SIZE, SIZE * VECTOR])
    if LAYOUT == 2:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [SIZE * VECTOR, SIZE]), [VECTOR, 1])
    return pointers


@triton.jit
def _weight_tile(weight, k, channel, channels, stride_in, stride_out, LAYOUT: tl.constexpr, WIDE: tl.constexpr):
    # W^T[k, channel], zero beyond the edge. LAYOUT 1: contiguous along k, 2: along channel, both in aligned groups of
    # 16 bytes.
    SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    IN: tl.constexpr = 16 // SIZE if LAYOUT == 1 else 1
    OUT: tl.constexpr = 16 // SIZE if LAYOUT == 2 else 1
    rows = k
    if LAYOUT != 1:
        rows = k.to(tl.int64) * stride_in
    columns = channel
    if LAYOUT != 2:
        columns = channel.to(tl.int64) * stride_out
    if not WIDE:
        rows = rows.to(tl.int32)
        columns = columns.to(tl.int32)
    pointers = weight + (rows[:, None] + columns[None, :])
    pointers = tl.max_contiguous(tl.multiple_of(pointers, [SIZE * IN, SIZE * OUT]), [IN, OUT])
    mask = tl.max_constancy((k < channels)[:, None] & (channel < channels)[None, :], [IN, OUT])
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _low(h, dtype: tl.constexpr, PRECISION: tl.constexpr):
    # The state as the matrix unit reads it. tf32 is fp32 with 10 bits of mantissa: round to nearest, ties away.
    if dtype != tl.float32:
        low = h.to(dtype)
    elif PRECISION == "tf32":
        bits = h.to(tl.int32, bitcast=True)
        special = (bits & 0x7F800000) == 0x7F800000  # inf and NaN: adding would carry into the exponent
        low = tl.where(special, bits, (bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        low = h
    return low


@triton.jit
def _advance(
    h, acc, resident, diagonal, exchange_to, exchange_from, weight, channel, channels, stride_in, stride_out,
    WEIGHT_LAYOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # acc + W h. With W resident one matrix product; otherwise a loop over slices of W and of the exchanged state.
    low = _low(h, weight.dtype.element_ty, PRECISION)
    if not EXACT:
        # An infinite state equals its rounding: no lost bits, and no inf - inf.
        rounded = low.to(tl.float32)
        acc += diagonal[None, :] * tl.where(h == rounded, 0.0, h - rounded)
    if resident is not None:
        acc = add_product(acc, low, resident, PRECISION)
    else:
        tl.store(exchange_to, low)
        tl.debug_barrier()
        for k in tl.range(0, channels, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K)
            columns = _weight_tile(weight, inner, channel, channels, stride_in, stride_out, WEIGHT_LAYOUT, WIDE)
            columns = _low(columns, weight.dtype.element_ty, PRECISION)
            acc = add_product(acc, tl.load(exchange_from + k), columns, PRECISION)
    return acc


@triton.jit
def _epilogue(value, scale, shift, residual, mask, RELU: tl.constexpr):
    value = value * scale[None, :] + shift[None, :]
    if residual is not None:
        value += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # unlike a maximum, keeps NaN
    return value


@triton.jit(
    do_not_specialize=[
        "x", "weight", "start", "y", "last", "scale", "shift", "residual", "exchange",
        "positions", "frame_size", "width", "channels", "frames", "alpha", "first_alpha", "last_alpha",
        "x_first", "x_step", "x_n", "x_c", "x_h", "x_w",
        "y_first", "y_step", "y_n", "y_c", "y_h", "y_w",
        "residual_first", "residual_step", "residual_n", "residual_c", "residual_h", "residual_w",
        "start_n", "start_c", "start_h", "start_w",
        "last_n", "last_c", "last_h", "last_w",
        "weight_out", "weight_in",
    ]
)  # fmt: skip
def scan_kernel(
    x, weight, start, y, last, scale, shift, residual, exchange,
    positions, frame_size, width, channels, frames, alpha, first_alpha, last_alpha,
    x_first, x_step, x_n, x_c, x_h, x_w,
    y_first, y_step, y_n, y_c, y_h, y_w,
    residual_first, residual_step, residual_n, residual_c, residual_h, residual_w,
    start_n, start_c, start_h, start_w,
    last_n, last_c, last_h, last_w,
    weight_out, weight_in,
    START: tl.constexpr,
    LAST: tl.constexpr,
    RELU: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Y_LAYOUT: tl.constexpr,
    RESIDUAL_LAYOUT: tl.constexpr,
    X_LIKE_Y: tl.constexpr,
    RESIDUAL_LIKE_Y: tl.constexpr,
    START_LAYOUT: tl.constexpr,
    LAST_LAYOUT: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One scan over time: ``h = a (W h + x)`` at BLOCK_M positions, for all channels and all frames, per program.

    Layout: x, y, residual [N,C,T,H,W] by strides; ``*_first`` is the offset of the frame processed first, ``*_step``
    the signed distance to the next. weight [C,C] by strides. start, last [N,C,H,W] by strides. x may be None (zero).
    scale and shift [C] fp32, or both None. START: FIRST_INPUT (the first state is first_alpha times the first input),
    GIVEN (start is the state before the first frame) or ADDED (start is added to the first input). LAST: NOTHING, STATE
    (last is the final state) or PRODUCT (W times it). y and last alias nothing.

    Ownership: program i owns positions [i BLOCK_M, (i+1) BLOCK_M) of the flattened (sample, row, column) in every
    frame, and no other program touches them. The state is a [BLOCK_M, BLOCK_C] fp32 tile in registers. BLOCK_C >= C is
    a power of two; channels and positions beyond the edge are loaded as 0, stay 0 and are never stored.

    Shared memory: BLOCK_K = BLOCK_C keeps W on chip for the whole scan (in registers as matrix-unit fragments, or in
    shared memory where wgmma reads it there), plus the tile's layout exchanges between global and matrix-unit order.
    BLOCK_K < BLOCK_C streams W through shared memory in slices of BLOCK_K input channels, and passes low(h) between the
    threads through ``exchange``, [2, programs, BLOCK_M, BLOCK_C] in weight's dtype and resident in L1 and L2: with two
    slots in turn, one barrier per frame is enough.

    Bound by memory (x read once, y written once) where W is resident; by the FMA rate in fp32 with "ieee"; by L2 where
    W is streamed, C^2 / BLOCK_M words per position and frame.
    """
    LOW: tl.constexpr = weight.dtype.element_ty
    EXACT: tl.constexpr = LOW == tl.float32 and PRECISION == "ieee"  # noqa: SIM300
    IN_CHANNELS: tl.constexpr = VECTOR if X_LAYOUT == 1 or Y_LAYOUT == 1 or RESIDUAL_LAYOUT == 1 else 1
    IN_FRAME: tl.constexpr = VECTOR if X_LAYOUT == 2 or Y_LAYOUT == 2 or RESIDUAL_LAYOUT == 2 else 1

    tile = tl.program_id(0)
    sample, place, inside = _place(tile, positions, frame_size, PER_SAMPLE, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    if EVEN_CHANNELS:
        mask = tl.broadcast_to(inside[:, None], (BLOCK_M, BLOCK_C))
    else:
        mask = inside[:, None] & (channel < channels)[None, :]
    mask = tl.max_constancy(mask, [IN_FRAME, IN_CHANNELS])

    y_offsets = _offsets(sample, place, channel, width, y_n, y_c, y_h, y_w, Y_LAYOUT, WIDE)
    y_frame = y + tl.cast(y_first, tl.int64)
    if x is not None:
        if X_LIKE_Y:
            x_offsets = y_offsets
        else:
            x_offsets = _offsets(sample, place, channel, width, x_n, x_c, x_h, x_w, X_LAYOUT, WIDE)
        x_frame = x + tl.cast(x_first, tl.int64)
    if residual is not None:
        if RESIDUAL_LIKE_Y:
            residual_offsets = y_offsets
        else:
            residual_offsets = _offsets(
                sample, place, channel, width, residual_n, residual_c, residual_h, residual_w, RESIDUAL_LAYOUT, WIDE
            )
        residual_frame = residual + tl.cast(residual_first, tl.int64)
    if scale is not None:
        scale_row = tl.load(scale + channel, mask=channel < channels, other=0.0)
        shift_row = tl.load(shift + channel, mask=channel < channels, other=0.0)

    exchange_to = None
    exchange_from = None
    exchange_slot = 0
    resident = None
    if BLOCK_K == BLOCK_C:
        resident = _weight_tile(weight, channel, channel, channels, weight_in, weight_out, WEIGHT_LAYOUT, WIDE)
        resident = _low(resident, LOW, PRECISION)
    else:
        rows = exchange + (tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None] * BLOCK_C
        exchange_to = rows + channel[None, :]
        exchange_from = rows + tl.arange(0, BLOCK_K)[None, :]
        exchange_slot = tl.num_programs(0).to(tl.int64) * (BLOCK_M * BLOCK_C)
    diagonal = None
    if not EXACT:
        to_diagonal = weight + channel.to(tl.int64) * (tl.cast(weight_in, tl.int64) + weight_out)
        diagonal = tl.load(to_diagonal, mask=channel < channels, other=0.0).to(tl.float32)

    if START != 0:
        offsets = _offsets(sample, place, channel, width, start_n, start_c, start_h, start_w, START_LAYOUT, WIDE)
        h = tl.load(_pointers(start, offsets, START_LAYOUT, VECTOR), mask=mask, other=0.0).to(tl.float32)
    else:
        h = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    begin = 0
    if START != 1:
        if x is not None:
            h += tl.load(_pointers(x_frame, x_offsets, X_LAYOUT, VECTOR), mask=mask, other=0.0).to(tl.float32)
            x_frame += x_step
        h *= first_alpha
        value = h
        if scale is not None:
            added = None
            if residual is not None:
                added = _pointers(residual_frame, residual_offsets, RESIDUAL_LAYOUT, VECTOR)
                residual_frame += residual_step
            value = _epilogue(value, scale_row, shift_row, added, mask, RELU)
        tl.store(_pointers(y_frame, y_offsets, Y_LAYOUT, VECTOR), value.to(y.dtype.element_ty), mask=mask)
        y_frame += y_step
        begin = 1

    if x is not None and STAGES == 1:
        # One frame ahead in registers, where the compiler does not pipeline the loads through shared memory.
        if begin == frames:  # nothing is ahead: read the last frame again rather than beyond the end
            x_frame -= x_step
        ahead = tl.load(_pointers(x_frame, x_offsets, X_LAYOUT, VECTOR), mask=mask, other=0.0)
    for step in tl.range(begin, frames, num_stages=STAGES):
        if x is None:
            acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        elif STAGES == 1:
            acc = ahead.to(tl.float32)
            x_frame += tl.where(step + 1 < frames, x_step, 0)
            ahead = tl.load(_pointers(x_frame, x_offsets, X_LAYOUT, VECTOR), mask=mask, other=0.0)
        else:
            acc = tl.load(_pointers(x_frame, x_offsets, X_LAYOUT, VECTOR), mask=mask, other=0.0).to(tl.float32)
            x_frame += x_step
        to = None
        source = None
        if BLOCK_K != BLOCK_C:
            to = exchange_to + (step % 2) * exchange_slot
            source = exchange_from + (step % 2) * exchange_slot
        acc = _advance(
            h, acc, resident, diagonal, to, source, weight, channel, channels, weight_in, weight_out,
            WEIGHT_LAYOUT, WIDE, PRECISION, EXACT, BLOCK_K,
        )  # fmt: skip
        h = acc * tl.where(step == frames - 1, last_alpha, alpha)
        value = h
        if scale is not None:
            added = None
            if residual is not None:
                added = _pointers(residual_frame, residual_offsets, RESIDUAL_LAYOUT, VECTOR)
                residual_frame += residual_step
            value = _epilogue(value, scale_row, shift_row, added, mask, RELU)
        tl.store(_pointers(y_frame, y_offsets, Y_LAYOUT, VECTOR), value.to(y.dtype.element_ty), mask=mask)
        y_frame += y_step

    if LAST != 0:
        offsets = _offsets(sample, place, channel, width, last_n, last_c, last_h, last_w, LAST_LAYOUT, WIDE)
        if LAST == 2:
            to = None
            source = None
            if BLOCK_K != BLOCK_C:
                to = exchange_to + (frames % 2) * exchange_slot
                source = exchange_from + (frames % 2) * exchange_slot
            h = _advance(
                h, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), resident, diagonal, to, source, weight, channel, channels,
                weight_in, weight_out, WEIGHT_LAYOUT, WIDE, PRECISION, EXACT, BLOCK_K,
            )  # fmt: skip
        tl.store(_pointers(last, offsets, LAST_LAYOUT, VECTOR), h.to(last.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "q", "h", "start", "partial", "positions", "frame_size", "width", "channels", "frames", "tiles",
        "q_first", "q_step", "q_n", "q_c", "q_h", "q_w",
        "h_first", "h_step", "h_n", "h_c", "h_h", "h_w",
        "start_n", "start_c", "start_h", "start_w",
    ]
)  # fmt: skip
def weight_grad_kernel(
    q, h, start, partial, positions, frame_size, width, channels, frames, tiles,
    q_first, q_step, q_n, q_c, q_h, q_w,
    h_first, h_step, h_n, h_c, h_h, h_w,
    start_n, start_c, start_h, start_w,
    Q_LAYOUT: tl.constexpr,
    H_LAYOUT: tl.constexpr,
    START_LAYOUT: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One split of ``dW[o, i] = sum_t q_t[o] h_{t-1}[i]`` (q the adjoint state, h_{-1} = start or absent), in fp32.

    Layout: q (the scan's dx), h [N,C,T,H,W] by strides, ``*_first`` the offset of the frame processed first, ``*_step``
    the signed distance to the next; start [N,C,H,W] by strides or None. partial: [splits, C, C] contiguous fp32.

    Ownership: program (b, s) owns the [BLOCK_C, BLOCK_C] block b of W and the tiles s, s + splits, ... of BLOCK_M
    positions, all frames of each in order, and writes its block of partial[s] once. :func:`reduce_kernel` adds the
    splits in order: no atomics, so the result is the same in every run. Blocks of one split are neighbours in the grid
    and share their reads in L2.

    Shared memory: STAGES tiles of q and of h, [BLOCK_M, BLOCK_C] each, prefetched one frame ahead and more.
    Bound by memory (q and h read once per row and column of blocks), in fp32 with "ieee" by the FMA rate.
    """
    IN_CHANNELS: tl.constexpr = VECTOR if Q_LAYOUT == 1 or H_LAYOUT == 1 else 1
    IN_FRAME: tl.constexpr = VECTOR if Q_LAYOUT == 2 or H_LAYOUT == 2 else 1
    across = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0)
    row = (block // across) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (block % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1)):
        sample, place, inside = _place(tile, positions, frame_size, PER_SAMPLE, BLOCK_M)
        if EVEN_CHANNELS:
            q_mask = tl.broadcast_to(inside[:, None], (BLOCK_M, BLOCK_C))
            h_mask = q_mask
        else:
            q_mask = inside[:, None] & (row < channels)[None, :]
            h_mask = inside[:, None] & (column < channels)[None, :]
        q_mask = tl.max_constancy(q_mask, [IN_FRAME, IN_CHANNELS])
        h_mask = tl.max_constancy(h_mask, [IN_FRAME, IN_CHANNELS])
        q_offsets = _offsets(sample, place, row, width, q_n, q_c, q_h, q_w, Q_LAYOUT, WIDE)
        h_offsets = _offsets(sample, place, column, width, h_n, h_c, h_h, h_w, H_LAYOUT, WIDE)
        q_frame = q + tl.cast(q_first, tl.int64)
        h_frame = h + tl.cast(h_first, tl.int64)
        if start is not None:
            offsets = _offsets(sample, place, column, width, start_n, start_c, start_h, start_w, START_LAYOUT, WIDE)
            before = tl.load(_pointers(start, offsets, START_LAYOUT, VECTOR), mask=h_mask, other=0.0)
            before = before.to(h.dtype.element_ty)
            grad = tl.load(_pointers(q_frame, q_offsets, Q_LAYOUT, VECTOR), mask=q_mask, other=0.0)
            acc = add_product(acc, tl.trans(grad), before, PRECISION)
        for _ in tl.range(1, frames, num_stages=STAGES):
            q_frame += q_step
            grad = tl.load(_pointers(q_frame, q_offsets, Q_LAYOUT, VECTOR), mask=q_mask, other=0.0)
            before = tl.load(_pointers(h_frame, h_offsets, H_LAYOUT, VECTOR), mask=h_mask, other=0.0)
            acc = add_product(acc, tl.trans(grad), before, PRECISION)
            h_frame += h_step
    to = partial + tl.program_id(1).to(tl.int64) * channels * channels + row[:, None] * channels + column[None, :]
    tl.store(to, acc, mask=(row < channels)[:, None] & (column < channels)[None, :])


@triton.jit(do_not_specialize=["partial", "dweight", "splits", "size"])
def reduce_kernel(partial, dweight, splits, size, BLOCK: tl.constexpr):
    """``dweight[e] = sum_s partial[s, e]``, s in ascending order, rounded once to dweight's dtype.

    Layout: partial [splits, size] fp32, dweight [size], both contiguous. Ownership: program i owns BLOCK elements.
    No shared memory. Bound by the latency of reading splits * size words from L2.
    """
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits):
        acc += tl.load(partial + tl.cast(split, tl.int64) * size + element, mask=element < size, other=0.0)
    tl.store(dweight + element, acc.to(dweight.dtype.element_ty), mask=element < size)


# ---- configurations -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a scan is cut.

    Attributes:
        rows: positions per program.
        warps: warps per program.
        part: input channels of W per turn of the inner loop, with W streamed; 0 = W resident.
        frames: x is prefetched one frame ahead in registers (1) or, where its alignment allows, frames - 1 ahead
            through shared memory.
        parts: pipeline stages of the inner loop.
    """

    rows: int
    warps: int
    part: int = 0
    frames: int = 1
    parts: int = 1


@dataclass(frozen=True)
class Tiles:
    """The tiles of one kind, each list from many rows to few.

    Attributes:
        aligned: for plain scans whose memory has aligned groups of 8 bytes or more.
        scattered: for scans whose memory has not.
        fuller: like ``aligned``, for scans that need registers for more: a residual, or the product after the last
        step.
        projected: of these, for scans with that product, where they need yet other tiles.
    """

    aligned: tuple[Tile, ...]
    scattered: tuple[Tile, ...]
    fuller: tuple[Tile, ...] = ()
    projected: tuple[Tile, ...] = ()


# Chosen from the compiler's register, spill and shared-memory counts (tests/triton/test_compile.py holds them): W stays
# on chip where it fits, aligned scans do not spill, and among those the tile with the most bytes in flight per
# multiprocessor; in full fp32 the tile with the fewest instructions per position, four fifths of which are products
# where W lies in shared memory, and half of them where it is streamed.
# Memory without aligned groups costs registers for addresses: there, fp32 tiles of 128 channels may spill a register or
# six, and 512 channels up to 512 bytes per thread; what bounds those is the stream of W from L2, half a megabyte per
# frame and program.
_HALF = {
    16: Tiles((Tile(128, 4, frames=3), Tile(32, 4)), (Tile(64, 4),)),
    32: Tiles((Tile(64, 8, frames=3), Tile(32, 4)), (Tile(32, 4),)),
    64: Tiles((Tile(64, 4, frames=3), Tile(16, 4)), (Tile(32, 8),), (Tile(64, 8), Tile(16, 4))),
    128: Tiles((Tile(64, 8, frames=3), Tile(16, 8)), (Tile(16, 8),), (Tile(32, 8), Tile(16, 8))),
    256: Tiles((Tile(32, 16), Tile(16, 16)), (Tile(16, 8, part=32, frames=2),), (Tile(16, 8),)),
    512: Tiles((Tile(16, 8, part=32, parts=2),), (Tile(16, 16, part=16, frames=2),)),
}
_TF32 = {
    16: Tiles((Tile(64, 4, frames=3), Tile(16, 4)), (Tile(64, 4),)),
    32: Tiles((Tile(64, 4, frames=3), Tile(16, 4)), (Tile(64, 4),)),
    64: Tiles((Tile(64, 8, frames=2), Tile(16, 4)), (Tile(32, 8, frames=2),)),
    128: Tiles((Tile(32, 8), Tile(16, 8)), (Tile(32, 8),)),
    256: Tiles((Tile(16, 8, part=32, parts=2),), (Tile(16, 8, part=32),)),
    512: Tiles((Tile(16, 8, part=16, parts=2),), (Tile(16, 16, part=16),)),
}
_IEEE = {
    16: Tiles((Tile(64, 4, frames=3), Tile(16, 4)), (Tile(64, 4),)),
    32: Tiles((Tile(64, 8), Tile(16, 4)), (Tile(32, 4),), (Tile(32, 8), Tile(16, 4))),
    64: Tiles(
        (Tile(32, 8, frames=2), Tile(16, 8)),
        (Tile(16, 4, part=16),),
        projected=(Tile(64, 8, part=16), Tile(16, 4, part=16)),
    ),
    128: Tiles((Tile(16, 8, frames=2),), (Tile(16, 8, part=16),), projected=(Tile(16, 8, part=16),)),
    256: Tiles((Tile(16, 8, part=16, parts=2),), (Tile(16, 8, part=16, frames=2),)),
    512: Tiles((Tile(16, 8, part=16),), (Tile(16, 8, part=16, frames=2),)),
}

#: Tiles per architecture class, precision and padded channel count. 80: 163 KB of shared memory per program (A100); 86:
#: 99 KB (consumer chips, L40); 90: 227 KB (H100 and later data-centre chips).
SCAN_TILES: dict[int, dict[str, dict[int, Tiles]]] = {
    80: {"half": _HALF, "tf32": _TF32, "ieee": _IEEE},
    86: {
        "half": _HALF | {256: Tiles((Tile(32, 8, part=32, parts=2),), (Tile(16, 8, part=32, frames=2),))},
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    90: {
        "half": _HALF | {256: replace(_HALF[256], aligned=(Tile(64, 8, frames=2), *_HALF[256].aligned))},
        "tf32": _TF32,
        "ieee": _IEEE
        | {
            64: replace(_IEEE[64], aligned=(Tile(64, 8, frames=2), Tile(16, 8))),
            128: replace(_IEEE[128], aligned=(Tile(32, 8, frames=2), Tile(16, 8))),
        },
    },
}


@dataclass(frozen=True)
class GradTile:
    """How the weight gradient is cut: ``channels`` is the side of a program's block of W."""

    channels: int
    rows: int
    warps: int
    frames: int


WEIGHT_GRAD_TILES = {
    "half": {
        16: GradTile(16, 32, 4, 3),
        32: GradTile(32, 32, 4, 3),
        64: GradTile(64, 32, 4, 3),
        128: GradTile(128, 16, 8, 3),
    },
    "tf32": {16: GradTile(16, 64, 4, 3), 32: GradTile(32, 64, 4, 3), 64: GradTile(64, 32, 4, 3)},
    "ieee": {16: GradTile(16, 32, 4, 2), 32: GradTile(32, 16, 4, 2), 64: GradTile(64, 32, 8, 3)},
}
# Twice an H100's multiprocessors; a constant, so that the order of summation is the same everywhere.
WEIGHT_GRAD_PROGRAMS = 264
REDUCE_BLOCK = 256


# ---- launches -----------------------------------------------------------------------------------------------------


def _layout(value: Tensor) -> tuple[int, int]:
    """The unit-stride direction of a [N,C,T,H,W] tensor, and how many neighbours there are aligned together."""
    sizes, strides = value.shape, value.stride()
    n, c, frames, height, width = zip(sizes, strides, strict=True)
    if c[0] > 1 and c[1] == 1:
        layout, run, others = CHANNEL_CONTIGUOUS, c[0], (n, frames, height, width)
    elif (width[0] == 1 or width[1] == 1) and (height[0] == 1 or height[1] == width[0]):
        layout, run, others = FRAME_CONTIGUOUS, height[0] * width[0], (n, c, frames)
    else:
        return STRIDED, 1
    address = value.data_ptr() // value.element_size()
    return layout, math.gcd(16, run, address, *(stride for size, stride in others if size > 1))


def _vector(values: Iterable[Tensor]) -> int:
    """Elements per aligned access, the same for all tensors of a launch: 16 or 8 bytes' worth, or 1."""
    values = list(values)
    size = values[0].element_size()
    found = [alignment for layout, alignment in map(_layout, values) if layout != STRIDED]
    vector = min([16 // size, *found]) if found else 1
    return vector if vector * size >= 8 else 1


def _span(value: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))


def _sequence(value: Tensor | None, backwards: bool) -> tuple[int, ...]:
    """first, step and the strides n, c, h, w of a sequence walked in one direction of time."""
    if value is None:
        return (0,) * 6
    n, c, t, h, w = value.stride()
    return ((value.shape[2] - 1) * t, -t, n, c, h, w) if backwards else (0, t, n, c, h, w)


def _frame_strides(value: Tensor) -> tuple[int, ...]:
    n, c, _, h, w = value.stride()
    return n, c, h, w


def _state_layout(state: Tensor | None, vector: int) -> int:
    """The unit-stride direction of a [N,C,H,W] state, where its neighbours are aligned like the sequences'."""
    if state is None:
        return STRIDED
    layout, alignment = _layout(state.unsqueeze(2))
    return layout if alignment % vector == 0 else STRIDED


def _strides(value: Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if value is None else value.stride()


def _programs(shape: torch.Size, rows: int, per_sample: bool) -> int:
    n, _, _, height, width = shape
    return n * ceil_div(height * width, rows) if per_sample else ceil_div(n * height * width, rows)


def _stays_in_frame(layouts: list[int], vector: int, frame_size: int, rows: int) -> bool:
    return vector == 1 and FRAME_CONTIGUOUS in layouts and 2 * frame_size > rows


def _scan(
    x: Tensor | None,
    weight: Tensor,
    start: Tensor | None,
    y: Tensor,
    last: Tensor | None,
    *,
    start_as: int,
    last_as: int,
    alphas: tuple[float, float, float],
    backwards: bool,
    transposed: bool = False,
    affine: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    arch: int,
) -> Launch:
    n, channels, frames, height, width = y.shape
    sequences = [value for value in (x, y, residual) if value is not None]
    vector = _vector(sequences)
    layouts = [_layout(value)[0] for value in sequences]
    stride_out, stride_in = reversed(weight.stride()) if transposed else weight.stride()
    weight_layout = _weight_layout(weight, stride_out, stride_in)

    precision = precision_of(weight.dtype)
    block = max(16, triton.next_power_of_2(channels))
    tiles = SCAN_TILES[arch][precision][block]
    if vector == 1 or STRIDED in layouts or weight_layout == STRIDED:
        choice = tiles.scattered
    elif last_as == PRODUCT:
        choice = tiles.projected or tiles.fuller or tiles.aligned
    elif residual is not None:
        choice = tiles.fuller or tiles.aligned
    else:
        choice = tiles.aligned
    tile = next((t for t in choice if _programs(y.shape, t.rows, False) >= MULTIPROCESSORS[arch]), choice[-1])
    per_sample = _stays_in_frame(layouts, vector, height * width, tile.rows)
    programs = _programs(y.shape, tile.rows, per_sample)
    exchange = None
    if tile.part:
        exchange = weight.new_empty(2 * programs * tile.rows * block)

    return Launch(
        scan_kernel,
        (programs,),
        (
            x, weight, start, y, last, *(affine or (None, None)), residual, exchange,
            n * height * width, height * width, width, channels, frames, *alphas,
            *_sequence(x, backwards), *_sequence(y, backwards), *_sequence(residual, backwards),
            *_strides(start), *_strides(last), stride_out, stride_in,
        ),
        {
            "START": start_as,
            "LAST": last_as,
            "RELU": relu,
            "X_LAYOUT": STRIDED if x is None else _layout(x)[0],
            "Y_LAYOUT": _layout(y)[0],
            "RESIDUAL_LAYOUT": STRIDED if residual is None else _layout(residual)[0],
            "X_LIKE_Y": x is not None and _frame_strides(x) == _frame_strides(y),
            "RESIDUAL_LIKE_Y": residual is not None and _frame_strides(residual) == _frame_strides(y),
            "START_LAYOUT": _state_layout(start, vector),
            "LAST_LAYOUT": _state_layout(last, vector),
            "WEIGHT_LAYOUT": weight_layout,
            "VECTOR": vector,
            "EVEN_CHANNELS": channels == block,
            "WIDE": any(_span(value) >= 2**31 for value in (*sequences, weight, start, last) if value is not None),
            "PER_SAMPLE": per_sample,
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
            "BLOCK_M": tile.rows,
            "BLOCK_C": block,
            "BLOCK_K": tile.part or block,
            "STAGES": tile.frames,
        },
        tile.warps,
        tile.parts,
    )  # fmt: skip


def _weight_layout(weight: Tensor, stride_out: int, stride_in: int) -> int:
    group = 16 // weight.element_size()
    channels = weight.shape[0]
    if channels % group or weight.data_ptr() % 16:
        return STRIDED
    if stride_in == 1 and stride_out % group == 0:
        return 1
    if stride_out == 1 and stride_in % group == 0:
        return 2
    return STRIDED


def _weight_grad(dx: Tensor, h: Tensor, h0: Tensor | None, dweight: Tensor, reverse: bool) -> list[Launch]:
    n, channels, frames, height, width = h.shape
    vector = _vector((dx, h))
    layouts = [_layout(dx)[0], _layout(h)[0]]
    precision = precision_of(h.dtype)
    by_channels = WEIGHT_GRAD_TILES[precision]
    tile = by_channels[min(max(16, triton.next_power_of_2(channels)), max(by_channels))]
    per_sample = _stays_in_frame(layouts, vector, height * width, tile.rows)
    tiles = _programs(h.shape, tile.rows, per_sample)
    blocks = ceil_div(channels, tile.channels) ** 2
    splits = min(tiles, max(1, WEIGHT_GRAD_PROGRAMS // blocks))
    partial = torch.empty(splits, channels, channels, dtype=torch.float32, device=h.device)
    size = channels * channels
    return [
        Launch(
            weight_grad_kernel,
            (blocks, splits),
            (
                dx, h, h0, partial, n * height * width, height * width, width, channels, frames, tiles,
                *_sequence(dx, reverse), *_sequence(h, reverse), *_strides(h0),
            ),
            {
                "Q_LAYOUT": layouts[0],
                "H_LAYOUT": layouts[1],
                "START_LAYOUT": _state_layout(h0, vector),
                "VECTOR": vector,
                "EVEN_CHANNELS": channels % tile.channels == 0,
                "WIDE": any(_span(value) >= 2**31 for value in (dx, h, h0) if value is not None),
                "PER_SAMPLE": per_sample,
                "PRECISION": "tf32" if precision == "tf32" else "ieee",
                "BLOCK_M": tile.rows,
                "BLOCK_C": tile.channels,
                "STAGES": tile.frames,
            },
            tile.warps,
            tile.frames,
        ),
        Launch(
            reduce_kernel,
            (ceil_div(size, REDUCE_BLOCK),),
            (partial, dweight, splits, size),
            {"BLOCK": REDUCE_BLOCK},
            4,
            1,
        ),
    ]  # fmt: skip


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


# ---- the three operators ------------------------------------------------------------------------------------------
# Arguments and results are those of the operators of the same name (rcu_ops/ops/recurrent_conv.py), already checked.
# The plan_ functions allocate the results and describe the launches; on meta tensors nothing is allocated, for
# compiling ahead.


def plan_forward(
    x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool, arch: int | None = None
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results (h, h_n) and the launches that fill them."""
    h, h_n = torch.empty_like(x), torch.empty_like(x.select(2, 0), dtype=torch.float32)
    if h_n.numel() == 0:
        return (h, h_n), []
    alpha = 0.5 if mean else 1.0
    launch = _scan(
        x, weight, h0, h, h_n,
        start_as=FIRST_INPUT if h0 is None else GIVEN,
        last_as=STATE,
        alphas=(alpha, 1.0, alpha),
        backwards=reverse,
        arch=arch or architecture(x.device),
    )  # fmt: skip
    return (h, h_n), [launch]


def plan_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    h0: Tensor | None,
    residual: Tensor | None,
    mean: bool,
    relu: bool,
    arch: int | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The results (y, h_n) and the launches that fill them."""
    y, h_n = torch.empty_like(x), torch.empty_like(x.select(2, 0), dtype=torch.float32)
    if h_n.numel() == 0:
        return (y, h_n), []
    alpha = 0.5 if mean else 1.0
    launch = _scan(
        x, weight, h0, y, h_n,
        start_as=FIRST_INPUT if h0 is None else GIVEN,
        last_as=STATE,
        alphas=(alpha, 1.0, alpha),
        backwards=False,
        affine=(scale.contiguous(), shift.contiguous()),
        residual=residual,
        relu=relu,
        arch=arch or architecture(x.device),
    )  # fmt: skip
    return (y, h_n), [launch]


def plan_backward(
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    mean: bool,
    reverse: bool,
    need_weight_grad: bool,
    arch: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results (dx, dweight, dh0) and the launches that fill them."""
    dx = torch.empty_like(h)
    dh0 = h.new_empty(0) if h0 is None else torch.empty_like(h0)
    frames = h.shape[2]
    sums_nothing = h.numel() == 0 or (frames == 1 and h0 is None)
    if not need_weight_grad:
        dweight = weight.new_empty(0)
    else:
        dweight = (weight.new_zeros if sums_nothing else weight.new_empty)(weight.shape)
    if h.numel() == 0:
        return (dx, dweight, dh0), []
    # The first frame enters the recurrence unscaled when there is no h0, so the last step of the adjoint is too.
    alpha = 0.5 if mean else 1.0
    last_alpha = alpha if h0 is not None else 1.0
    launches = [
        _scan(
            grad_h, weight, grad_h_n, dx, None if h0 is None else dh0,
            start_as=FIRST_INPUT if grad_h_n is None else ADDED,
            last_as=NOTHING if h0 is None else PRODUCT,
            alphas=(alpha, alpha if frames > 1 else last_alpha, last_alpha),
            backwards=not reverse,
            transposed=True,
            arch=arch or architecture(h.device),
        )
    ]  # fmt: skip
    if need_weight_grad and not sums_nothing:
        launches += _weight_grad(dx, h, h0, dweight, reverse)
    return (dx, dweight, dh0), launches


def describe(x: Tensor, weight: Tensor) -> str:
    """How the forward scan of x would be cut, in words."""
    on_meta = (value.new_empty_strided(value.shape, value.stride(), device="meta") for value in (x, weight))
    _, launches = plan_forward(*on_meta, None, False, False, architecture(x.device))
    if not launches:
        return "nothing to do"
    (launch,) = launches
    tile = launch.constants
    where = "resident" if tile["BLOCK_K"] == tile["BLOCK_C"] else f"streamed {tile['BLOCK_K']} channels at a time"
    return (
        f"one scan of {launch.grid[0]} programs, {tile['BLOCK_M']} positions and {tile['BLOCK_C']} channels each, "
        f"weight {where}, accesses of {tile['VECTOR'] * x.element_size()} bytes, {launch.warps} warps"
    )


def forward(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """``rcu_ops::recurrent_conv``."""
    results, launches = plan_forward(x, weight, h0, mean, reverse)
    _run(launches, x.device)
    return results


def affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    h0: Tensor | None,
    residual: Tensor | None,
    mean: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """``rcu_ops::recurrent_conv_affine_act``."""
    results, launches = plan_affine_act(x, weight, scale, shift, h0, residual, mean, relu)
    _run(launches, x.device)
    return results


def backward(
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    mean: bool,
    reverse: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::recurrent_conv_backward``."""
    results, launches = plan_backward(grad_h, grad_h_n, h, weight, h0, mean, reverse, need_weight_grad)
    _run(launches, h.device)
    return results
