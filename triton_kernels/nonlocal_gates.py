"""Triton kernels of ``nonlocal_attention`` and ``relational_lstm_step``, and their gradients.

Heads here are wide (1024 channels) and rows few (49 to 196 positions), the opposite of what attention kernels are
made for: a block of queries keeps its *weights* on chip and walks over the channels, so that no accumulator is as wide
as a head. Up to :data:`WHOLE` keys the weights of a block are one tile; beyond, a first pass finds each query's peak
and sum, and a second one computes the scores again: fp32 results add up over the tiles of keys where they lie, 16-bit
ones cannot, and their scores are computed for every slice of channels.

Scores, sums and results are fp32 whatever the inputs; the matrix unit reads weights (and their gradients) in the
inputs' dtype. A query that sees no key is dead: zeros come out, and no gradient passes through it. Nothing but the
inputs is kept for the backward pass; its kernels recompute the weights, one for queries (dquery, and three numbers per
query), one for keys (dkey, dvalue). There are no atomics, so results repeat bit for bit.

Rows are contiguous, everything else is read by strides. Configurations are fixed by the shapes (:func:`_tiles`), never
tuned at run time.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels.device import add_product, sigmoid, tanh
from rcu_ops.triton_kernels.launch import MOST_SAMPLES, Launch, by_samples, ceil_div

#: The most keys whose weights are one tile; in fp32, whose products may be without the matrix unit, what registers
#: hold.
WHOLE, WHOLE_FP32 = 256, 128
#: The most positions of a step in one kernel. Of more, the weights of four gates do not fit the registers: every warp
#: holds a whole copy of them, as operands of the matrix unit.
FUSED = 64

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _load(base, rows, row_count, row_stride, columns, column_count):
    # [rows, columns] of a matrix whose rows are contiguous, zero beyond its edges.
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(pointers, mask=(rows < row_count)[:, None] & (columns < column_count)[None, :], other=0.0)


@triton.jit
def _products(
    a, a_rows, a_count, a_row, b, b_rows, b_count, b_row, width,
    A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The products of rows of a with rows of b: [A, B] fp32.
    acc = tl.zeros((A, B), tl.float32)
    for start in tl.range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        left = _load(a, a_rows, a_count, a_row, column, width)
        right = _load(b, b_rows, b_count, b_row, column, width)
        acc = add_product(acc, left, tl.trans(right), PRECISION)
    return acc


@triton.jit
def _visible(mask, rows, n, keys, m, mask_row, mask_key):
    # Which keys a query sees: those that are there, and not masked.
    there = (rows < n)[:, None] & (keys < m)[None, :]
    if mask is not None:
        pointers = mask + rows.to(tl.int64)[:, None] * mask_row + keys.to(tl.int64)[None, :] * mask_key
        there = there & (tl.load(pointers, mask=there, other=0) != 0)
    return there


@triton.jit
def _tile_scores(
    query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Scaled scores of a tile, and which of them are seen.
    visible = _visible(mask, rows, n, keys, m, mask_row, mask_key)
    scores = scale * _products(
        query, rows, n, query_row, key, keys, m, key_row, d, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION
    )  # fmt: skip
    return scores, visible


@triton.jit
def _exp(scores, peak, visible):
    # exp(scores - peak) where visible, else 0; a peak of -inf belongs to a query without any finite score.
    return tl.where(visible, tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 0.0)


@triton.jit
def _largest(scores):
    # NaN does not count: it reaches the sum of its row by itself.
    return tl.max(tl.where(scores == scores, scores, float("-inf")), 1)


@triton.jit
def _row_weights(scores, visible, COUNT: tl.constexpr):
    # All scores of a block of queries at once: weights, peak, and the sum that divided them (0: dead).
    if COUNT:
        peak = tl.zeros((scores.shape[0],), tl.float32)
        powers = tl.where(visible, scores, 0.0)
        total = tl.sum(visible.to(tl.float32), 1)
    else:
        scores = tl.where(visible, scores, float("-inf"))
        peak = _largest(scores)
        powers = _exp(scores, peak, visible)
        total = tl.sum(powers, 1)
    return powers / tl.where(total == 0.0, 1.0, total)[:, None], peak, total


@triton.jit
def _tile_weights(
    query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key, peak, total,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The weights of a tile, peak and sum of its queries given.
    scores, visible = _tile_scores(
        query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
        BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    if COUNT:
        powers = tl.where(visible, scores, 0.0)
    else:
        powers = _exp(scores, peak, visible)
    return powers / tl.where(total == 0.0, 1.0, total)[:, None], visible


@triton.jit
def _store(base, batch, rows, n, columns, width, acc, total):
    # acc to [rows, columns] of a contiguous [b, n, width]; zeros for dead queries.
    to = base + (batch * n + rows)[:, None] * width + columns[None, :]
    acc = tl.where((total == 0.0)[:, None], 0.0, acc)
    tl.store(to, acc.to(base.dtype.element_ty), mask=(rows < n)[:, None] & (columns < width)[None, :])


@triton.jit
def _add_products(
    weights, base, keys, m, base_row, to, batch, rows, n, width, total, more, first, step,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The products of a tile of weights with every step-th slice of base's channels, into fp32 results [b, n, width];
    # with `more` added to what the tiles before left there.
    for start in tl.range(first * BLOCK, width, step * BLOCK):
        channel = start + tl.arange(0, BLOCK)
        there = (rows < n)[:, None] & (channel < width)[None, :] & more
        acc = tl.load(to + (batch * n + rows)[:, None] * width + channel[None, :], mask=there, other=0.0)
        acc = add_product(acc, weights, _load(base, keys, m, base_row, channel, width), PRECISION)
        _store(to, batch, rows, n, channel, width, acc, total)
    tl.debug_barrier()  # whichever thread reads a result next


@triton.jit(do_not_specialize=["n", "m", "d", "e", "scale"])
def attend_kernel(
    query, key, value, mask, out, n, m, d, e, scale,
    query_batch, query_row, key_batch, key_row, value_batch, value_row,
    mask_batch, mask_row, mask_key,
    COUNT: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``out[b, n, e]``, contiguous.

    Program (i, b) owns queries [i / SPLIT BLOCK_N, ..) and every SPLIT-th slice of channels.
    ONE: BLOCK_M holds all keys, and the weights stay in registers for all slices; else they are recomputed, for fp32
    results once, for others once per slice.
    Bound by the matrix unit, (2 D + 2 E) operations per weight, where a sample's key and value come from L2.
    """
    block, batch = tl.program_id(0) // SPLIT, tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    if mask is not None:
        mask += batch * mask_batch
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if ONE:
        keys = tl.arange(0, BLOCK_M)
        scores, visible = _tile_scores(
            query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
            BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        weights, peak, total = _row_weights(scores, visible, COUNT)
    else:
        for start in tl.range(0, m, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M)
            visible = _visible(mask, rows, n, keys, m, mask_row, mask_key)
            if COUNT:
                total += tl.sum(visible.to(tl.float32), 1)
            else:
                scores = scale * _products(
                    query, rows, n, query_row, key, keys, m, key_row, d,
                    BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                )  # fmt: skip
                scores = tl.where(visible, scores, float("-inf"))
                higher = tl.maximum(peak, _largest(scores))
                base = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(peak - base) + tl.sum(_exp(scores, higher, visible), 1)
                peak = higher
    own = tl.program_id(0) % SPLIT
    if not ONE and out.dtype.element_ty == tl.float32:
        for start in tl.range(0, m, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M)
            weights, visible = _tile_weights(
                query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
                peak, total, COUNT, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
            _add_products(
                weights, value, keys, m, value_row, out, batch, rows, n, e, total, start > 0, own, SPLIT,
                BLOCK_N, BLOCK_E, PRECISION,
            )  # fmt: skip
    else:
        for first in tl.range(own * BLOCK_E, e, SPLIT * BLOCK_E):
            channel = first + tl.arange(0, BLOCK_E)
            acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
            if ONE:
                values = _load(value, keys, m, value_row, channel, e)
                acc = add_product(acc, weights.to(values.dtype), values, PRECISION)
            else:
                for start in tl.range(0, m, BLOCK_M):
                    keys = start + tl.arange(0, BLOCK_M)
                    weights, visible = _tile_weights(
                        query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
                        peak, total, COUNT, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                    )  # fmt: skip
                    values = _load(value, keys, m, value_row, channel, e)
                    acc = add_product(acc, weights.to(values.dtype), values, PRECISION)
            _store(out, batch, rows, n, channel, e, acc, total)


@triton.jit
def _score_gradient(weights, products, delta, total, visible, scale, COUNT: tl.constexpr):
    # ds of a tile; zero for dead queries, whatever their gradient holds.
    if COUNT:
        ds = tl.where(visible, products, 0.0) / tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        ds = weights * (products - delta[:, None])
    return tl.where((total == 0.0)[:, None], 0.0, scale * ds)


@triton.jit
def _score_gradient_again(
    grad, query, key, value, mask, rows, keys, n, m, d, e, scale, peak, total, delta,
    grad_row, query_row, key_row, value_row, mask_row, mask_key,
    COUNT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # ds of a tile from the inputs, once the rows' statistics are known.
    weights, visible = _tile_weights(
        query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
        peak, total, COUNT, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    products = _products(
        grad, rows, n, grad_row, value, keys, m, value_row, e,
        BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    return _score_gradient(weights, products, delta, total, visible, scale, COUNT)


@triton.jit(do_not_specialize=["n", "m", "d", "e", "scale"])
def query_gradient_kernel(
    grad, query, key, value, mask, dquery, peaks, totals, deltas, n, m, d, e, scale,
    grad_batch, grad_row, query_batch, query_row,
    key_batch, key_row, value_batch, value_row, mask_batch, mask_row, mask_key,
    COUNT: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``dquery[b, n, d]``, and peak, sum and delta [b, n] fp32 for the keys' kernel; all contiguous.

    Program (i, b) owns queries [i BLOCK_N, ..). With ONE the gradients of the scores stay in registers for all slices;
    else they are recomputed, as in attend_kernel.
    """
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    grad += batch * grad_batch
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    if mask is not None:
        mask += batch * mask_batch
    if ONE:
        keys = tl.arange(0, BLOCK_M)
        scores, visible = _tile_scores(
            query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
            BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        products = _products(
            grad, rows, n, grad_row, value, keys, m, value_row, e, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION
        )
        weights, peak, total = _row_weights(scores, visible, COUNT)
        delta = tl.sum(weights * products, 1)
        ds = _score_gradient(weights, products, delta, total, visible, scale, COUNT)
    else:
        peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        delta = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.range(0, m, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M)
            visible = _visible(mask, rows, n, keys, m, mask_row, mask_key)
            if COUNT:
                total += tl.sum(visible.to(tl.float32), 1)
            else:
                scores = scale * _products(
                    query, rows, n, query_row, key, keys, m, key_row, d,
                    BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                )  # fmt: skip
                products = _products(
                    grad, rows, n, grad_row, value, keys, m, value_row, e,
                    BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                )  # fmt: skip
                scores = tl.where(visible, scores, float("-inf"))
                higher = tl.maximum(peak, _largest(scores))
                shrink = tl.exp(peak - tl.where(higher == float("-inf"), 0.0, higher))
                powers = _exp(scores, higher, visible)
                total = total * shrink + tl.sum(powers, 1)
                delta = delta * shrink + tl.sum(powers * products, 1)
                peak = higher
        if COUNT:
            peak = tl.zeros((BLOCK_N,), tl.float32)
        delta = delta / tl.where(total == 0.0, 1.0, total)
    inside = rows < n
    tl.store(peaks + batch * n + rows, peak, mask=inside)
    tl.store(totals + batch * n + rows, total, mask=inside)
    tl.store(deltas + batch * n + rows, delta, mask=inside)
    if not ONE and dquery.dtype.element_ty == tl.float32:
        for start in tl.range(0, m, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M)
            ds = _score_gradient_again(
                grad, query, key, value, mask, rows, keys, n, m, d, e, scale, peak, total, delta,
                grad_row, query_row, key_row, value_row, mask_row, mask_key,
                COUNT, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            _add_products(
                ds, key, keys, m, key_row, dquery, batch, rows, n, d, total, start > 0, 0, 1,
                BLOCK_N, BLOCK_E, PRECISION,
            )  # fmt: skip
    else:
        for first in tl.range(0, d, BLOCK_E):
            channel = first + tl.arange(0, BLOCK_E)
            acc = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
            if ONE:
                right = _load(key, keys, m, key_row, channel, d)
                acc = add_product(acc, ds.to(right.dtype), right, PRECISION)
            else:
                for start in tl.range(0, m, BLOCK_M):
                    keys = start + tl.arange(0, BLOCK_M)
                    ds = _score_gradient_again(
                        grad, query, key, value, mask, rows, keys, n, m, d, e, scale, peak, total, delta,
                        grad_row, query_row, key_row, value_row, mask_row, mask_key,
                        COUNT, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
                    )  # fmt: skip
                    right = _load(key, keys, m, key_row, channel, d)
                    acc = add_product(acc, ds.to(right.dtype), right, PRECISION)
            _store(dquery, batch, rows, n, channel, d, acc, total)


@triton.jit
def _live(base, rows, row_count, row_stride, columns, column_count, total):
    # Rows of query or grad; those of dead queries are zero, so that what they hold reaches no key.
    loaded = _load(base, rows, row_count, row_stride, columns, column_count)
    return tl.where((total == 0.0)[:, None], 0.0, loaded)


@triton.jit(do_not_specialize=["n", "m", "d", "e", "scale"])
def key_gradient_kernel(
    grad, query, key, value, mask, dkey, dvalue, peaks, totals, deltas, n, m, d, e, scale,
    grad_batch, grad_row, query_batch, query_row,
    key_batch, key_row, value_batch, value_row, mask_batch, mask_row, mask_key,
    COUNT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``dkey[b, m, d]`` and ``dvalue[b, m, e]``, contiguous.

    Program (i, b) owns keys [i / SPLIT BLOCK_M, ..) and every SPLIT-th slice of the channels of key, then of value. For
    each slice it walks over the queries and recomputes the weights: the maps of a sample are small beside its channels.
    """
    block, batch = tl.program_id(0) // SPLIT, tl.program_id(1).to(tl.int64)
    keys = block * BLOCK_M + tl.arange(0, BLOCK_M)
    grad += batch * grad_batch
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    if mask is not None:
        mask += batch * mask_batch
    d_slices = (d + BLOCK_E - 1) // BLOCK_E
    slices = d_slices + (e + BLOCK_E - 1) // BLOCK_E
    for piece in tl.range(tl.program_id(0) % SPLIT, slices, SPLIT):
        of_key = piece < d_slices
        channel = tl.where(of_key, piece, piece - d_slices) * BLOCK_E + tl.arange(0, BLOCK_E)
        acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for start in tl.range(0, n, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            total = tl.load(totals + batch * n + rows, mask=rows < n, other=0.0)
            peak = tl.load(peaks + batch * n + rows, mask=rows < n, other=0.0)
            weights, visible = _tile_weights(
                query, key, mask, rows, keys, n, m, d, scale, query_row, key_row, mask_row, mask_key,
                peak, total, COUNT, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
            weights = tl.where((total == 0.0)[:, None], 0.0, weights)
            if of_key:
                delta = tl.load(deltas + batch * n + rows, mask=rows < n, other=0.0)
                products = _products(
                    grad, rows, n, grad_row, value, keys, m, value_row, e,
                    BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
                )  # fmt: skip
                ds = _score_gradient(weights, products, delta, total, visible, scale, COUNT)
                right = _live(query, rows, n, query_row, channel, d, total)
                acc = add_product(acc, tl.trans(ds.to(right.dtype)), right, PRECISION)
            else:
                right = _live(grad, rows, n, grad_row, channel, e, total)
                acc = add_product(acc, tl.trans(weights.to(right.dtype)), right, PRECISION)
        inside = (keys < m)[:, None]
        if of_key:
            to = dkey + (batch * m + keys)[:, None] * d + channel[None, :]
            tl.store(to, acc.to(dkey.dtype.element_ty), mask=inside & (channel < d)[None, :])
        else:
            to = dvalue + (batch * m + keys)[:, None] * e + channel[None, :]
            tl.store(to, acc.to(dvalue.dtype.element_ty), mask=inside & (channel < e)[None, :])


@triton.jit
def _gate_weights(
    gate, query, key, rows, keys, p, d, query_gate, query_row, key_gate, key_row,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scores = _products(
        query + tl.cast(query_gate, tl.int64) * gate, rows, p, query_row,
        key + tl.cast(key_gate, tl.int64) * gate, keys, p, key_row, d, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    visible = (rows < p)[:, None] & (keys < p)[None, :]
    weights, _, total = _row_weights(scores, visible, False)
    return tl.where((total == 0.0)[:, None], 0.0, weights).to(query.dtype.element_ty), total


@triton.jit
def _gate(
    gate, weights, total, x_gates, value, rows, keys, channel, p, e,
    x_gate, x_row, value_gate, value_row, PRECISION: tl.constexpr,
):  # fmt: skip
    # The pre-activation of one gate for a slice of channels.
    values = _load(value + tl.cast(value_gate, tl.int64) * gate, keys, p, value_row, channel, e)
    x = _load(x_gates + tl.cast(x_gate, tl.int64) * gate, rows, p, x_row, channel, e)
    relation = add_product(tl.zeros((weights.shape[0], values.shape[1]), tl.float32), weights, values, PRECISION)
    return x.to(tl.float32) + tl.where((total == 0.0)[:, None], 0.0, relation)


@triton.jit
def _pre_activation(gate, x_gates, relations, rows, p, channel, e, x_gate, x_row, plane):
    x = _load(x_gates + tl.cast(x_gate, tl.int64) * gate, rows, p, x_row, channel, e).to(tl.float32)
    return x + _load(relations + gate * plane, rows, p, e, channel, e).to(tl.float32)


@triton.jit
def _update_cell(
    i, f, o, g, cell, grad_h, grad_c, h, c, dx_gates, dcell, rows, batch, p, channel, e,
    cell_batch, cell_row, grad_h_batch, grad_h_row, grad_c_batch, grad_c_row, BACKWARD: tl.constexpr,
):  # fmt: skip
    # From the gates of a tile to h and c, or dx_gates and dcell.
    before = _load(cell + batch * cell_batch, rows, p, cell_row, channel, e).to(tl.float32)
    after = f * before + i * g
    squashed = tanh(after)
    mask = (rows < p)[:, None] & (channel < e)[None, :]
    to = (batch * p + rows)[:, None] * e + channel[None, :]
    if BACKWARD:
        dh = tl.zeros(squashed.shape, tl.float32)
        if grad_h is not None:
            dh = _load(grad_h + batch * grad_h_batch, rows, p, grad_h_row, channel, e).to(tl.float32)
        dc = dh * o * (1.0 - squashed * squashed)
        if grad_c is not None:
            dc += _load(grad_c + batch * grad_c_batch, rows, p, grad_c_row, channel, e)
        gates = dx_gates + (batch * 4 * p + rows)[:, None] * e + channel[None, :]
        plane = tl.cast(p, tl.int64) * e
        kind: tl.constexpr = dx_gates.dtype.element_ty
        tl.store(gates, (dc * g * i * (1.0 - i)).to(kind), mask=mask)
        tl.store(gates + plane, (dc * before * f * (1.0 - f)).to(kind), mask=mask)
        tl.store(gates + 2 * plane, (dh * squashed * o * (1.0 - o)).to(kind), mask=mask)
        tl.store(gates + 3 * plane, (dc * i * (1.0 - g * g)).to(kind), mask=mask)
        tl.store(dcell + to, (dc * f).to(dcell.dtype.element_ty), mask=mask)
    else:
        tl.store(c + to, after, mask=mask)
        tl.store(h + to, (o * squashed).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["p", "d", "e"])
def step_kernel(
    x_gates, query, key, value, cell, grad_h, grad_c, h, c, dx_gates, dcell, p, d, e,
    x_batch, x_gate, x_row, query_batch, query_gate, query_row,
    key_batch, key_gate, key_row, value_batch, value_gate, value_row,
    cell_batch, cell_row, grad_h_batch, grad_h_row, grad_c_batch, grad_c_row,
    BACKWARD: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The four gates and the cell update of P <= BLOCK_M positions; outputs are contiguous.

    Forward: h [b, p, e] and c [b, p, e]. BACKWARD: dx_gates [b, 4, p, e] and dcell [b, p, e], from grad_h and grad_c
    (either may be None). Program (i, b) owns positions [i / SPLIT BLOCK_N, ..) and every SPLIT-th slice of channels of
    all four gates, so the cell update needs nobody else. The weights of the four gates stay in registers.
    """
    block, batch = tl.program_id(0) // SPLIT, tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = tl.arange(0, BLOCK_M)
    query += batch * query_batch
    key += batch * key_batch
    value += batch * value_batch
    x_gates += batch * x_batch
    w0, t0 = _gate_weights(
        0, query, key, rows, keys, p, d, query_gate, query_row, key_gate, key_row,
        BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    w1, t1 = _gate_weights(
        1, query, key, rows, keys, p, d, query_gate, query_row, key_gate, key_row,
        BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    w2, t2 = _gate_weights(
        2, query, key, rows, keys, p, d, query_gate, query_row, key_gate, key_row,
        BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    w3, t3 = _gate_weights(
        3, query, key, rows, keys, p, d, query_gate, query_row, key_gate, key_row,
        BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    for first in tl.range(tl.program_id(0) % SPLIT * BLOCK_E, e, SPLIT * BLOCK_E):
        channel = first + tl.arange(0, BLOCK_E)
        i = sigmoid(_gate(0, w0, t0, x_gates, value, rows, keys, channel, p, e, x_gate, x_row, value_gate,
                           value_row, PRECISION))  # fmt: skip
        f = sigmoid(_gate(1, w1, t1, x_gates, value, rows, keys, channel, p, e, x_gate, x_row, value_gate,
                           value_row, PRECISION))  # fmt: skip
        o = sigmoid(_gate(2, w2, t2, x_gates, value, rows, keys, channel, p, e, x_gate, x_row, value_gate,
                           value_row, PRECISION))  # fmt: skip
        g = tanh(_gate(3, w3, t3, x_gates, value, rows, keys, channel, p, e, x_gate, x_row, value_gate,
                        value_row, PRECISION))  # fmt: skip
        _update_cell(
            i, f, o, g, cell, grad_h, grad_c, h, c, dx_gates, dcell, rows, batch, p, channel, e,
            cell_batch, cell_row, grad_h_batch, grad_h_row, grad_c_batch, grad_c_row, BACKWARD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["p", "e"])
def cell_kernel(
    x_gates, relations, cell, grad_h, grad_c, h, c, dx_gates, dcell, p, e,
    x_batch, x_gate, x_row, cell_batch, cell_row, grad_h_batch, grad_h_row, grad_c_batch, grad_c_row,
    BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The cell update of a step whose relations [b, 4, p, e], contiguous, are there; outputs as step_kernel's.

    Program (i, b) owns BLOCK_N positions and BLOCK_E channels of a sample. Bound by memory.
    """
    slices = (e + BLOCK_E - 1) // BLOCK_E
    block, batch = tl.program_id(0) // slices, tl.program_id(1).to(tl.int64)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(0) % slices * BLOCK_E + tl.arange(0, BLOCK_E)
    x_gates += batch * x_batch
    plane = tl.cast(p, tl.int64) * e
    relations += batch * 4 * plane
    i = sigmoid(_pre_activation(0, x_gates, relations, rows, p, channel, e, x_gate, x_row, plane))
    f = sigmoid(_pre_activation(1, x_gates, relations, rows, p, channel, e, x_gate, x_row, plane))
    o = sigmoid(_pre_activation(2, x_gates, relations, rows, p, channel, e, x_gate, x_row, plane))
    g = tanh(_pre_activation(3, x_gates, relations, rows, p, channel, e, x_gate, x_row, plane))
    _update_cell(
        i, f, o, g, cell, grad_h, grad_c, h, c, dx_gates, dcell, rows, batch, p, channel, e,
        cell_batch, cell_row, grad_h_batch, grad_h_row, grad_c_batch, grad_c_row, BACKWARD,
    )  # fmt: skip


# ---- configurations and launches ----------------------------------------------------------------------------------

#: The most samples of a step at a time: its four gates are samples of an attention.
MOST_STEPS = MOST_SAMPLES // 4

#: Programs that fill a GPU of any size we meet; more slices of channels are given away until there are as many.
PROGRAMS = 256


def _input_precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _tiles(keys: int, dtype: torch.dtype) -> tuple[int, int, int, int, bool]:
    """BLOCK_N, BLOCK_M, channels per slice, warps, and whether all keys are one tile: such that nothing spills."""
    one = keys <= (WHOLE_FP32 if dtype == torch.float32 else WHOLE)
    block_m = max(16, triton.next_power_of_2(keys)) if one else 64
    wide = dtype == torch.float32
    large = block_m > 64
    warps = 8 if large or wide or not one else 4
    return (16 if large or wide else 32), block_m, (32 if large or wide else 64), warps, one


def _depth(block: int, dtype: torch.dtype) -> int:
    """Channels of a step of the scores, the same in all kernels of an operator: the keys' gradients take peaks and sums
    that belong to scores with every rounding. In fp32 few, for they are one chain of additions.
    """
    return 16 if dtype == torch.float32 else block


def _split(blocks: int, slices: int) -> int:
    """Programs that share a block's slices of channels: a power of two, for few compiled kernels."""
    split = 1
    while split < slices and blocks * split < PROGRAMS:
        split *= 2
    return split


def _strides(value: Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides."""
    return (0,) * count if value is None else tuple(value.stride())[:count]


def _rows(*values: Tensor | None) -> list[Any]:
    """The tensors with contiguous rows: only one whose last dimension is strided is copied."""
    return [v if v is None or v.shape[-1] < 2 or v.stride(-1) == 1 else v.contiguous() for v in values]


def plan_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> tuple[Tensor, list[Launch]]:
    """The result to be filled, and the launches that fill it."""
    query, key, value = _rows(query, key, value)
    (b, n, d), m, e = query.shape, key.shape[1], value.shape[2]
    out = query.new_empty(b, n, e)
    if out.numel() == 0:
        return out, []
    block_n, block_m, block, warps, one = _tiles(m, query.dtype)
    blocks = ceil_div(n, block_n)
    split = _split(blocks * b, ceil_div(e, block))
    arguments = (
        query, key, value, mask, out, n, m, d, e, float(scale),
        *_strides(query, 2), *_strides(key, 2), *_strides(value, 2), *_strides(mask, 3),
    )  # fmt: skip
    constants = {
        "COUNT": count, "ONE": one, "SPLIT": split, "PRECISION": _input_precision(query.dtype),
        "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": _depth(block, query.dtype), "BLOCK_E": block,
    }  # fmt: skip
    return out, [Launch(attend_kernel, (blocks * split, b), arguments, constants, warps, 2)]


def plan_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The gradients to be filled, and the launches that fill them."""
    grad, query, key, value = _rows(grad, query, key, value)
    (b, n, d), m, e = query.shape, key.shape[1], value.shape[2]
    results = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    if b * n * m == 0:
        for result in results:
            result.zero_()
        return results, []
    dquery, dkey, dvalue = results
    peaks, totals, deltas = (query.new_empty((b, n), dtype=torch.float32) for _ in range(3))
    sizes = n, m, d, e, float(scale)
    strides = (*(s for t in (grad, query, key, value) for s in _strides(t, 2)), *_strides(mask, 3))
    block_n, block_m, block, _, one = _tiles(m, query.dtype)
    constants = {"COUNT": count, "PRECISION": _input_precision(query.dtype), "BLOCK_D": _depth(block, query.dtype)}
    # Found by compiling: these would spill with 32 channels, and the other fp32 ones with 16.
    full = query.dtype == torch.float32 and constants["PRECISION"] == "ieee"
    narrow = 16 if (full and block_m <= 64) or (query.dtype == torch.float32 and not one) else block
    launches = [
        Launch(
            query_gradient_kernel,
            (ceil_div(n, block_n), b),
            (grad, query, key, value, mask, dquery, peaks, totals, deltas, *sizes, *strides),
            {**constants, "ONE": one, "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_E": narrow},
            8,
            2,
        )
    ]
    if d + e > 0:
        rows, keys = (16 if full else 32), 32
        blocks = ceil_div(m, keys)
        split = _split(blocks * b, ceil_div(d, block) + ceil_div(e, block))
        launches.append(
            Launch(
                key_gradient_kernel,
                (blocks * split, b),
                (grad, query, key, value, mask, dkey, dvalue, peaks, totals, deltas, *sizes, *strides),
                {**constants, "SPLIT": split, "BLOCK_N": rows, "BLOCK_M": keys, "BLOCK_E": block},
                8,
                2,
            )
        )
    return results, launches


def plan_step(
    grads: tuple[Tensor | None, Tensor | None] | None,
    x_gates: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell: Tensor,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """(h, c), or with ``grads`` (dx_gates, dcell), to be filled, and the launches that fill them.

    Up to FUSED positions one kernel; beyond, the relations first (one tensor like x_gates), then the cell update.
    """
    x_gates, query, key, value, cell = _rows(x_gates, query, key, value, cell)
    grads = None if grads is None else tuple(_rows(*grads))
    b, _, p, e = x_gates.shape
    if grads is None:
        results = x_gates.new_empty(b, p, e), x_gates.new_empty((b, p, e), dtype=torch.float32)
        outputs = (*results, None, None)
    else:
        results = x_gates.new_empty(x_gates.shape), cell.new_empty(cell.shape)
        outputs = (None, None, *results)
    if b * p * e == 0:
        return results, []
    grad_h, grad_c = grads or (None, None)
    beside = (*_strides(cell, 2), *_strides(grad_h, 2), *_strides(grad_c, 2))
    if p > FUSED:
        relations, launches = plan_attention(*(t.flatten(0, 1) for t in (query, key, value)), None, 1.0, False)
        arguments = (
            x_gates, relations, cell, grad_h, grad_c, *outputs, p, e, *_strides(x_gates, 3), *beside,
        )  # fmt: skip
        constants = {"BACKWARD": grads is not None, "BLOCK_N": 16, "BLOCK_E": 64}
        grid = ceil_div(p, 16) * ceil_div(e, 64), b
        return results, [*launches, Launch(cell_kernel, grid, arguments, constants, 4, 1)]
    _, block_m, block, _, _ = _tiles(p, query.dtype)
    block_n, slice_e = 16, 32
    blocks = ceil_div(p, block_n)
    split = _split(blocks * b, ceil_div(e, slice_e))
    arguments = (
        x_gates, query, key, value, cell, grad_h, grad_c, *outputs, p, query.shape[3], e,
        *_strides(x_gates, 3), *_strides(query, 3), *_strides(key, 3), *_strides(value, 3), *beside,
    )  # fmt: skip
    constants = {
        "BACKWARD": grads is not None, "SPLIT": split, "PRECISION": _input_precision(query.dtype),
        "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": _depth(block, query.dtype), "BLOCK_E": slice_e,
    }  # fmt: skip
    return results, [Launch(step_kernel, (blocks * split, b), arguments, constants, 8, 2)]


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


# ---- the operators ------------------------------------------------------------------------------------------------


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool) -> Tensor:
    """``rcu_ops::nonlocal_attention``."""
    found: Tensor = by_samples(MOST_SAMPLES, _attention, query, key, value, mask, scale, count)
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool) -> Tensor:
    out, launches = plan_attention(query, key, value, mask, scale, count)
    _run(launches, query.device)
    return out


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::nonlocal_attention_backward``."""
    found: tuple[Tensor, Tensor, Tensor] = by_samples(
        MOST_SAMPLES, _attention_backward, grad, query, key, value, mask, scale, count
    )
    return found


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    results, launches = plan_attention_backward(grad, query, key, value, mask, scale, count)
    _run(launches, query.device)
    return results


def step(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """``rcu_ops::relational_lstm_step``."""
    found: tuple[Tensor, Tensor] = by_samples(MOST_STEPS, _step, x_gates, query, key, value, cell)
    return found


def _step(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    results, launches = plan_step(None, x_gates, query, key, value, cell)
    _run(launches, x_gates.device)
    return results


def step_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x_gates: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``rcu_ops::relational_lstm_step_backward``."""
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = by_samples(
        MOST_STEPS, _step_backward, grad_h, grad_c, x_gates, query, key, value, cell
    )
    return found


def _step_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x_gates: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (dx_gates, dcell), launches = plan_step((grad_h, grad_c), x_gates, query, key, value, cell)
    _run(launches, x_gates.device)
    flat = (t.flatten(0, 1) for t in (dx_gates, query, key, value))
    gradients = attention_backward(*flat, None, 1.0, False)
    dquery, dkey, dvalue = (g.view(t.shape) for g, t in zip(gradients, (query, key, value), strict=True))
    return dx_gates, dquery, dkey, dvalue, dcell


def describe(query: Tensor, key: Tensor, *_: Any) -> str:
    """How the kernels would cut a call, in words; query and key [..., rows, D]."""
    block_n, block_m, block, _, one = _tiles(key.shape[-2], query.dtype)
    again = "once more" if query.dtype == torch.float32 else "for every slice of channels"
    weights = "kept for all channels" if one else f"in tiles of {block_m} keys, recomputed {again}"
    return f"blocks of {block_n} queries, weights {weights}, slices of {block} channels"
