"""Triton kernels of ``soft_nearest_neighbor``, ``cycle_consistency``, ``cycle_back`` and their gradients.

Cycles of at most :data:`SHORT` frames are one kernel: a program reads a sample's a and b once, keeps the three matrices
of distances on chip, and maps through the distances within a sequence, ``argmin_i sum_j z_tj |b_j - b_i|^2``. All else
goes through matrices of weights, [N, T, S] fp32, in a few kernels: distances, softmax, sums of keys, nearest frames.
A soft neighbour is kept as the sum u as it comes out and the rest, ``sum_i z_i (b_i - u)``, which is right where
rounding u loses the differences between frames.

Distances of few frames or channels, and those of gradients, are sums of squared differences in three-dimensional fp32
tiles, queries x keys x channels. Those of long sequences are products on the matrix unit, ``|a|^2 + |b|^2 - 2 a.b`` of
frames centred at the mean of both sequences, each multiplied by a power of two of its own and cut in two fp16 parts,
22 bits together: hi hi + hi lo + lo hi is their product but for 2^-22. Every such distance has a bound on its rounding,
and those that cannot stand are found again by differences, tile by tile, by the rules of
``csrc/common/cycle_consistency_products.h``: a common offset or a scene cut costs time at most. The nearest frame is
sought by differences among those that the triangle inequality leaves, ``|soft - b_i| >= |a - b_i| - |a - soft|``; where
they are many, products with the soft neighbour leave a few. Programs for which there is nothing to do end at once: no
launch depends on the data.

Numbers are multiplied by a power of two per sample where their squares would leave the range of fp32. Frames that are
not there have weight 0, whatever they hold. Every result has one writer and a fixed order of summation: results repeat
bit for bit. Any strides are read where they lie; configurations are fixed.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels.launch import MOST_SAMPLES, Launch, by_samples, ceil_div

#: The most frames of a sequence that the one-kernel cycle takes.
SHORT = 32

#: The fewest keys and channels for which distances are products.
LEAST_KEYS, LEAST_CHANNELS = 33, 16

#: The most frames that may be nearest before products with the soft neighbour thin them out.
MOST_COMPARED = 16

#: The index of a query whose nearest frame is not known yet.
OPEN = tl.constexpr(-2)

#: No place.
NOWHERE = tl.constexpr(2147483647)

#: A weight may be wrong by this, relative to itself, whatever its distance.
FLAT = tl.constexpr(16 * 2.0**-24)

#: What the softmax's rows are for.
WEIGHTS, LANDING, LANDING_GRADIENT = range(3)

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _there(mask, n, t, count, s_n, s_t):
    there = t < count
    if mask is not None:
        there = there & (tl.load(mask + n * s_n + t.to(tl.int64) * s_t, mask=there, other=0) != 0)
    return there


@triton.jit
def _numbers(base, n, t, there, c, c_count, s_n, s_t, s_c):
    # [frames, channels] as they lie in memory, zero where there is nothing.
    pointers = base + n * s_n + t.to(tl.int64)[:, None] * s_t + c.to(tl.int64)[None, :] * s_c
    return tl.load(pointers, mask=there[:, None] & (c < c_count)[None, :], other=0.0)


@triton.jit
def _frames(base, n, t, there, c, c_count, s_n, s_t, s_c, factor):
    # The same in fp32, times a power of two.
    return _numbers(base, n, t, there, c, c_count, s_n, s_t, s_c).to(tl.float32) * factor


@triton.jit
def _add_pairs(parts, a, b):
    # Squared differences of all pairs, channel by channel, added to `parts`, whose sum over its channels is taken when
    # all are in: a sum over channels, and be it over a few, makes threads meet.
    difference = b[None, :, :] - a[:, None, :]
    return parts + difference * difference


@triton.jit
def _size(value):
    return tl.where(value == value, tl.abs(value), 0.0)


@triton.jit
def _power(largest):
    # 2^-e with largest = m 2^e where squares would leave fp32's range, else 1.
    outside = ((largest < 9.313225746154785e-10) | (largest > 1.125899906842624e15)) & (largest > 0.0)
    outside = outside & (largest < float("inf"))
    exponent = tl.floor(tl.log2(tl.where(outside, largest, 1.0)))
    return tl.exp2(-tl.minimum(tl.maximum(exponent, -120.0), 120.0))


@triton.jit
def _sharpness(factor, temperature):
    return tl.minimum((1.0 / factor / temperature) * (1.0 / factor), 3.4e38)


@triton.jit
def _first_smallest(value, place, COUNT: tl.constexpr):
    # Per row: the first of the smallest of value, -1 where none is less than infinity; and the smallest.
    finite = value < float("inf")
    least = tl.min(tl.where(finite, value, float("inf")), 1)
    at = tl.min(tl.where(finite & (value == least[:, None]), place[None, :], COUNT), 1)
    return tl.where(at == COUNT, -1, at), least


@triton.jit
def _map(d, within, to_there, key, sharpness, S: tl.constexpr):
    # Nearest keys of all queries from distances to keys and between keys; nothing is there beyond `to_there`.
    d = tl.where(to_there[None, :], d, float("inf"))
    _, least = _first_smallest(d, key, S)
    z = tl.where(to_there[None, :], tl.exp((least[:, None] - d) * sharpness), 0.0)
    z = z / tl.sum(z, 1)[:, None]
    within = tl.where(to_there[:, None] & to_there[None, :], within, 0.0)
    spread = tl.dot(z, within, input_precision="ieee")
    index, _ = _first_smallest(tl.where(to_there[None, :], spread, float("inf")), key, S)
    return index


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count", "temperature"])
def short_cycle_kernel(
    a, b, mask_a, mask_b, gate, index_ab, index_ba, t_count, s_count, c_count, temperature,
    a_n, a_t, a_c, b_n, b_t, b_c, ma_n, ma_t, mb_n, mb_t,
    T: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Both index maps and the gate of sample n, program n. Bound by the differences: three matrices times C.

    The second pass over a and b is for numbers whose squares leave fp32's range; it is not made otherwise.
    """
    n = tl.program_id(0).to(tl.int64)
    t, s = tl.arange(0, T), tl.arange(0, S)
    a_there, b_there = _there(mask_a, n, t, t_count, ma_n, ma_t), _there(mask_b, n, s, s_count, mb_n, mb_t)
    factor = 1.0
    again = 1
    ab, aa, bb = tl.zeros((T, S), tl.float32), tl.zeros((T, T), tl.float32), tl.zeros((S, S), tl.float32)
    while again > 0:
        ab_parts = tl.zeros((T, S, BLOCK_C), tl.float32)
        aa_parts, bb_parts = tl.zeros((T, T, BLOCK_C), tl.float32), tl.zeros((S, S, BLOCK_C), tl.float32)
        a_sizes, b_sizes = tl.zeros((T, BLOCK_C), tl.float32), tl.zeros((S, BLOCK_C), tl.float32)
        c = tl.arange(0, BLOCK_C)
        a_next = _numbers(a, n, t, a_there, c, c_count, a_n, a_t, a_c)
        b_next = _numbers(b, n, s, b_there, c, c_count, b_n, b_t, b_c)
        for start in tl.range(0, c_count, BLOCK_C):
            x, y = a_next.to(tl.float32) * factor, b_next.to(tl.float32) * factor
            c = start + BLOCK_C + tl.arange(0, BLOCK_C)  # on their way while these are used
            a_next = _numbers(a, n, t, a_there, c, c_count, a_n, a_t, a_c)
            b_next = _numbers(b, n, s, b_there, c, c_count, b_n, b_t, b_c)
            a_sizes, b_sizes = tl.maximum(a_sizes, _size(x)), tl.maximum(b_sizes, _size(y))
            ab_parts = _add_pairs(ab_parts, x, y)
            aa_parts = _add_pairs(aa_parts, x, x)
            bb_parts = _add_pairs(bb_parts, y, y)
        ab, aa, bb = tl.sum(ab_parts, 2), tl.sum(aa_parts, 2), tl.sum(bb_parts, 2)
        power = tl.where(factor == 1.0, _power(tl.maximum(tl.max(a_sizes), tl.max(b_sizes))), 1.0)
        again = (power != 1.0).to(tl.int32)
        factor = factor * power
    sharpness = _sharpness(factor, temperature)
    to_b = tl.where(a_there, _map(ab, bb, b_there, s, sharpness, S), -1)
    to_a = tl.where(b_there, _map(tl.trans(ab), aa, a_there, t, sharpness, T), -1)
    tl.store(index_ab + n * t_count + t, to_b.to(tl.int64), mask=t < t_count)
    tl.store(index_ba + n * s_count + s, to_a.to(tl.int64), mask=s < s_count)
    away = tl.sum((a_there & (to_b != t)).to(tl.int32), 0) + tl.sum((b_there & (to_a != s)).to(tl.int32), 0)
    tl.store(gate + n, (away == 0) & (t_count == s_count))


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count"])
def pair_kernel(
    query, key, rest, mask, factors, out, t_count, s_count, c_count, q_n, q_t, q_c, k_n, k_t, k_c, m_n, m_t,
    PRODUCT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n, t, i]`` fp32: ``|key_i - query_t|^2``, infinite for keys that are not there.

    With ``rest`` [N,T,C] query is a soft neighbour [N,T,C] that is scaled already, and this is
    ``|(key_i - query_t) - rest_t|^2``; with PRODUCT ``rest_t . (key_i - query_t)``, 0 for keys that are not there, and
    rest is read by query's strides. Program (i, n): a block of queries and one of keys.
    """
    n = tl.program_id(1).to(tl.int64)
    columns = (s_count + BLOCK_S - 1) // BLOCK_S
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.program_id(0) % columns * BLOCK_S + tl.arange(0, BLOCK_S)
    factor = tl.load(factors + n)
    there = _there(mask, n, i, s_count, m_n, m_t)
    parts = tl.zeros((BLOCK_T, BLOCK_S, BLOCK_C), tl.float32)
    for start in tl.range(0, c_count, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        keys = _frames(key, n, i, there, c, c_count, k_n, k_t, k_c, factor)
        if rest is None:
            parts = _add_pairs(parts, _frames(query, n, t, t < t_count, c, c_count, q_n, q_t, q_c, factor), keys)
        else:
            wide = tl.cast(c_count, tl.int64)
            centre = _frames(query, n, t, t < t_count, c, c_count, t_count * wide, wide, 1, 1.0)
            if PRODUCT:
                other = _frames(rest, n, t, t < t_count, c, c_count, q_n, q_t, q_c, 1.0)
                parts += (keys[None, :, :] - centre[:, None, :]) * other[:, None, :]
            else:
                other = _frames(rest, n, t, t < t_count, c, c_count, t_count * wide, wide, 1, 1.0)
                difference = (keys[None, :, :] - centre[:, None, :]) - other[:, None, :]
                parts += difference * difference
    missing = 0.0 if PRODUCT else float("inf")
    acc = tl.where(there[None, :], tl.sum(parts, 2), missing)
    to = out + (n * t_count + t)[:, None] * s_count + i[None, :]
    tl.store(to, acc, mask=(t < t_count)[:, None] & (i < s_count)[None, :])


@triton.jit
def _rows_first(rows, inside, s_count, BLOCK: tl.constexpr):
    # Per row: the first of the smallest numbers, -1 where none is less than infinity; and the smallest.
    best = tl.full((rows.shape[0], BLOCK), float("inf"), tl.float32)
    at = tl.full((rows.shape[0], BLOCK), -1, tl.int32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(rows[:, None] + i[None, :], mask=inside[:, None] & (i < s_count)[None, :], other=float("inf"))
        smaller = value < best
        best = tl.where(smaller, value, best)
        at = tl.where(smaller, i[None, :], at)
    least = tl.min(best, 1)
    place = tl.min(tl.where((at >= 0) & (best == least[:, None]), at, NOWHERE), 1)
    return tl.where(place == NOWHERE, -1, place), least


@triton.jit
def _weights(rows, inside, there, i, s_count, least, sharpness):
    # exp(sharpness (least - distance)) of some keys, 0 for those that are not there.
    value = tl.load(rows[:, None] + i[None, :], mask=inside[:, None] & (i < s_count)[None, :], other=float("inf"))
    return tl.where(there[None, :], tl.exp((least[:, None] - value) * sharpness), 0.0)


@triton.jit(do_not_specialize=["t_count", "s_count", "temperature"])
def softmax_kernel(
    distance, mask_a, mask_b, factors, z, w, g_log, g_mean, g_variance, log_probability, mean, variance,
    t_count, s_count, temperature, ma_n, ma_t, mb_n, mb_t,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``z[n, t, :] = softmax(-distance / temperature)``, zeros for queries that are not there.

    Program (i, n): some rows. LANDING: also log z_tt, mean and variance of i under z_t. LANDING_GRADIENT: also ``w``,
    the gradient of the logits times 2 / temperature, for three gradients [N,T].
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = t < t_count
    at = n * t_count + t
    factor = tl.load(factors + n)
    sharpness = _sharpness(factor, temperature)
    row = distance + at * s_count
    likely, least = _rows_first(row, inside, s_count, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = _there(mask_b, n, i, s_count, mb_n, mb_t)
        sums += _weights(row, inside, there, i, s_count, least, sharpness)
        count += there.to(tl.int32)
    total = tl.sum(sums, 1)
    alive = _there(mask_a, n, t, t_count, ma_n, ma_t) & (tl.sum(count, 0) > 0)
    origin = tl.maximum(likely, 0)
    moments = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = _there(mask_b, n, i, s_count, mb_n, mb_t)
        weight = _weights(row, inside, there, i, s_count, least, sharpness) / total[:, None]
        weight = tl.where(alive[:, None], weight, 0.0)
        to = z + at[:, None] * s_count + i[None, :]
        tl.store(to, weight, mask=inside[:, None] & (i < s_count)[None, :])
        moments += weight * (i[None, :] - origin[:, None]).to(tl.float32)
    if KIND != 0:
        centre = tl.sum(moments, 1)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in tl.range(0, s_count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            there = _there(mask_b, n, i, s_count, mb_n, mb_t)
            weight = _weights(row, inside, there, i, s_count, least, sharpness) / total[:, None]
            away = (i[None, :] - origin[:, None]).to(tl.float32) - centre[:, None]
            squares += weight * (away * away)
        spread = tl.sum(squares, 1)
        if KIND == 1:
            own = tl.load(row + t, mask=inside, other=0.0)
            tl.store(log_probability + at, tl.where(alive, (least - own) * sharpness - tl.log(total), 0.0), mask=inside)
            tl.store(mean + at, tl.where(alive, origin.to(tl.float32) + centre, 0.0), mask=inside)
            tl.store(variance + at, tl.where(alive, spread, 0.0), mask=inside)
        else:
            g = tl.load(g_log + at, mask=inside, other=0.0)[:, None]
            gm = tl.load(g_mean + at, mask=inside, other=0.0)[:, None]
            gv = tl.load(g_variance + at, mask=inside, other=0.0)[:, None]
            by = 2.0 / factor / temperature
            for start in tl.range(0, s_count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                there = _there(mask_b, n, i, s_count, mb_n, mb_t)
                weight = _weights(row, inside, there, i, s_count, least, sharpness) / total[:, None]
                away = (i[None, :] - origin[:, None]).to(tl.float32) - centre[:, None]
                of_row = weight * (gm * away + gv * (away * away - spread[:, None]) - g)
                of_row += tl.where(i[None, :] == t[:, None], g, 0.0)
                of_row = tl.where(alive[:, None] & there[None, :], by * of_row, 0.0)
                to = w + at[:, None] * s_count + i[None, :]
                tl.store(to, of_row, mask=inside[:, None] & (i < s_count)[None, :])


@triton.jit(do_not_specialize=["t_count", "s_count", "temperature"])
def score_gradient_kernel(
    z, r, factors, w, t_count, s_count, temperature, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``w = 2 sharpness z (r - sum z r)``, row by row. Program (i, n): some rows."""
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = (n * t_count + t)[:, None] * s_count
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (t < t_count)[:, None] & (i < s_count)[None, :]
        to = row + i[None, :]
        sums += tl.load(z + to, mask=inside, other=0.0) * tl.load(r + to, mask=inside, other=0.0)
    mean = tl.sum(sums, 1)
    by = 2.0 * _sharpness(tl.load(factors + n), temperature)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (t < t_count)[:, None] & (i < s_count)[None, :]
        to = row + i[None, :]
        weight = tl.load(z + to, mask=inside, other=0.0)
        products = tl.load(r + to, mask=inside, other=0.0)
        tl.store(w + to, weight * (products - mean[:, None]) * by, mask=inside)


@triton.jit(do_not_specialize=["t_count", "s_count"])
def nearest_kernel(
    distance, mask_a, index, t_count, s_count, ma_n, ma_t, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The first of the smallest distances of a row; -1 where there is none or the query is not there."""
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, _ = _rows_first(distance + (n * t_count + t) * s_count, t < t_count, s_count, BLOCK)
    place = tl.where(_there(mask_a, n, t, t_count, ma_n, ma_t), place, -1)
    tl.store(index + n * t_count + t, place.to(tl.int64), mask=t < t_count)


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count"])
def query_sum_kernel(
    weight, key, centre, mask, factors, finite, out, add, t_count, s_count, c_count, k_n, k_t, k_c, m_n, m_t,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n, t, c] = sum_i weight_ti (key_i - centre_t)``, program (i, n): a block of queries and one of channels.

    centre None: 0. With ``add``, the centre of ``out``'s number in unscaled form: ``(add + out) / factor`` is written.
    Tiles without any weight are passed over, unless ``finite[n]`` is False: 0 times infinity has to be seen.
    """
    n = tl.program_id(1).to(tl.int64)
    columns = (c_count + BLOCK_C - 1) // BLOCK_C
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    factor = tl.load(factors + n)
    inside = (t < t_count)[:, None] & (c < c_count)[None, :]
    to = (n * t_count + t)[:, None] * c_count + c[None, :]
    around = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if centre is not None:
        around = tl.load(centre + to, mask=inside, other=0.0)
    every = tl.load(finite + n) == 0
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in tl.range(0, s_count, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        there = _there(mask, n, i, s_count, m_n, m_t)
        rows = weight + (n * t_count + t)[:, None] * s_count + i[None, :]
        weights = tl.load(rows, mask=(t < t_count)[:, None] & there[None, :], other=0.0)
        if every | (tl.max(tl.max((weights != 0.0).to(tl.int32), 1), 0) > 0):
            keys = _frames(key, n, i, there, c, c_count, k_n, k_t, k_c, factor)
            acc += tl.sum(weights[:, :, None] * (keys[None, :, :] - around[:, None, :]), 1)
    if add is not None:
        acc = (tl.load(add + to, mask=inside, other=0.0) + acc) / factor
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count"])
def key_sum_kernel(
    z, w, query, key, grad, mask_a, mask_b, factors, out, t_count, s_count, c_count,
    q_n, q_t, q_c, k_n, k_t, k_c, g_n, g_t, g_c, ma_n, ma_t, mb_n, mb_t,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n, i, c] = sum_t (w_ti (query_t - key_i) + z_ti grad_t)``, program (i, n): a block of keys and of channels.

    grad None: without the second term. Zero for keys that are not there.
    """
    n = tl.program_id(1).to(tl.int64)
    columns = (c_count + BLOCK_C - 1) // BLOCK_C
    i = tl.program_id(0) // columns * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    factor = tl.load(factors + n)
    there = _there(mask_b, n, i, s_count, mb_n, mb_t)
    keys = _frames(key, n, i, there, c, c_count, k_n, k_t, k_c, factor)
    acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in tl.range(0, t_count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        present = _there(mask_a, n, t, t_count, ma_n, ma_t)
        queries = _frames(query, n, t, present, c, c_count, q_n, q_t, q_c, factor)
        rows = (n * t_count + t)[None, :] * s_count + i[:, None]
        weights = tl.load(w + rows, mask=there[:, None] & present[None, :], other=0.0)
        term = weights[:, :, None] * (queries[None, :, :] - keys[:, None, :])
        if grad is not None:
            grads = _frames(grad, n, t, present, c, c_count, g_n, g_t, g_c, 1.0)
            weights = tl.load(z + rows, mask=there[:, None] & present[None, :], other=0.0)
            term += weights[:, :, None] * grads[None, :, :]
        acc += tl.sum(term, 1)
    to = (n * s_count + i)[:, None] * c_count + c[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=(i < s_count)[:, None] & (c < c_count)[None, :])


# ---- distances by products ----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count"])
def mean_kernel(
    a, b, mask_a, mask_b, factors, mean, t_count, s_count, c_count,
    a_n, a_t, a_c, b_n, b_t, b_c, ma_n, ma_t, mb_n, mb_t, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``mean[n, c]`` fp32 over the frames of both sequences that are there, scaled. Program (i, n): some channels.

    Not a number, or infinite, where a frame is: then no distance of the sample is a product.
    """
    n = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    factor = tl.load(factors + n)
    total = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.zeros((BLOCK_T,), tl.int32)
    for start in tl.range(0, t_count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = _there(mask_a, n, t, t_count, ma_n, ma_t)
        total += tl.sum(_frames(a, n, t, there, c, c_count, a_n, a_t, a_c, factor), 0)
        count += there.to(tl.int32)
    for start in tl.range(0, s_count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = _there(mask_b, n, t, s_count, mb_n, mb_t)
        total += tl.sum(_frames(b, n, t, there, c, c_count, b_n, b_t, b_c, factor), 0)
        count += there.to(tl.int32)
    frames = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(mean + n * c_count + c, total / frames, mask=c < c_count)


@triton.jit
def _centred(frames, rest, mean, n, t, there, c, c_count, s_n, s_t, s_c, factor):
    value = _frames(frames, n, t, there, c, c_count, s_n, s_t, s_c, factor)
    value -= tl.load(mean + n * c_count + c, mask=c < c_count, other=0.0)[None, :]
    if rest is not None:
        value += _frames(rest, n, t, there, c, c_count, s_n, s_t, s_c, 1.0)
    return tl.where(there[:, None] & (c < c_count)[None, :], value, 0.0)


@triton.jit
def _part(parts, row, which, c, c_padded):
    # Pointers to channels of one part of frames; c_padded is a multiple of a tile's channels.
    pointers = parts + (row * 2 + which)[:, None] * c_padded + c[None, :]
    return tl.multiple_of(pointers, [2, 16])


@triton.jit(do_not_specialize=["t_count", "c_count", "c_padded"])
def split_kernel(
    frames, rest, mask, index, mean, factors, parts, sizes, inverses, t_count, c_count, c_padded,
    f_n, f_t, f_c, m_n, m_t, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Centred frames v in two parts, ``2^k v = parts[n, t, 0] + parts[n, t, 1]`` fp16 but for 2^-22 of the largest.

    Also ``sizes[n, t] = |v|^2`` and ``inverses[n, t] = 2^-k``, fp32. Zeros for frames that are not there. With ``rest``
    the frames are soft neighbours, scaled already, and only those whose index is open are done. Program (i, n): some
    frames.
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < t_count
    there = _there(mask, n, t, t_count, m_n, m_t)
    factor = tl.load(factors + n)
    end = c_padded
    if rest is not None:
        there = there & (tl.load(index + n * t_count + t, mask=inside, other=0) == OPEN)
        end = tl.where(tl.max(there.to(tl.int32), 0) > 0, c_padded, 0)
        factor = 1.0
    largest = tl.zeros((BLOCK_T,), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float64)
    for start in tl.range(0, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        value = _centred(frames, rest, mean, n, t, there, c, c_count, f_n, f_t, f_c, factor)
        largest = tl.maximum(largest, tl.max(tl.where(value == value, tl.abs(value), 0.0), 1))
        wide = value.to(tl.float64)
        squares += tl.sum(wide * wide, 1)
    # 2^14 <= 2^k |v| < 2^15 of the largest number: inside fp16, and its lower part far above fp16's smallest.
    exponent = tl.minimum(141 - (largest.to(tl.int32, bitcast=True) >> 23), 120)
    exponent = tl.where(largest > 0.0, exponent, 0)
    by = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(inverses + n * t_count + t, ((127 - exponent) << 23).to(tl.float32, bitcast=True), mask=inside)
    tl.store(sizes + n * t_count + t, squares.to(tl.float32), mask=inside)
    for start in tl.range(0, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        value = _centred(frames, rest, mean, n, t, there, c, c_count, f_n, f_t, f_c, factor) * by[:, None]
        high = value.to(tl.float16)
        row, low = n * t_count + t, (value - high.to(tl.float32)).to(tl.float16)
        tl.store(_part(parts, row, 0, c, c_padded), high, mask=inside[:, None])
        tl.store(_part(parts, row, 1, c, c_padded), low, mask=inside[:, None])


@triton.jit(do_not_specialize=["t_count", "s_count", "c_padded"])
def product_kernel(
    query, key, query_sizes, key_sizes, query_inverses, key_inverses, mask, index, out, t_count, s_count, c_padded,
    m_n, m_t, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n, t, i] = |query_t|^2 + |key_i|^2 - 2 query_t . key_i`` from parts, infinite for keys that are not there.

    With ``index`` only where a query of the tile is open. Program (i, n): a block of queries and one of keys. The
    products of high parts are added up from zero for every step of channels: what the unit cuts off is measured by
    these alone.
    """
    n = tl.program_id(1).to(tl.int64)
    columns = (s_count + BLOCK_S - 1) // BLOCK_S
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.program_id(0) % columns * BLOCK_S + tl.arange(0, BLOCK_S)
    rows, inside = t < t_count, i < s_count
    end = c_padded
    if index is not None:
        rows = rows & (tl.load(index + n * t_count + t, mask=rows, other=0) == OPEN)
        end = tl.where(tl.max(rows.to(tl.int32), 0) > 0, c_padded, 0)
    of_query, of_key = n * t_count + t, n * s_count + i
    scale = tl.load(query_inverses + of_query, mask=rows, other=0.0)[:, None]
    scale = scale * tl.load(key_inverses + of_key, mask=inside, other=0.0)[None, :]
    acc, low = tl.zeros((BLOCK_T, BLOCK_S), tl.float32), tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for start in tl.range(0, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x_high = tl.load(_part(query, of_query, 0, c, c_padded), mask=rows[:, None], other=0.0)
        x_low = tl.load(_part(query, of_query, 1, c, c_padded), mask=rows[:, None], other=0.0)
        y_high = tl.load(_part(key, of_key, 0, c, c_padded), mask=inside[:, None], other=0.0)
        y_low = tl.load(_part(key, of_key, 1, c, c_padded), mask=inside[:, None], other=0.0)
        acc += tl.dot(x_high, tl.trans(y_high)) * scale
        low = tl.dot(x_high, tl.trans(y_low), low)
        low = tl.dot(x_low, tl.trans(y_high), low)
    acc += low * scale
    sizes = tl.load(query_sizes + of_query, mask=rows, other=0.0)[:, None]
    sizes = sizes + tl.load(key_sizes + of_key, mask=inside, other=0.0)[None, :]
    there = _there(mask, n, i, s_count, m_n, m_t)
    acc = tl.where(there[None, :], sizes - 2.0 * acc, float("inf"))
    to = out + of_query[:, None] * s_count + i[None, :]
    tl.store(to, acc, mask=rows[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["t_count", "s_count", "temperature", "products", "least"])
def reach_kernel(
    distance, query_sizes, key_sizes, factors, reach, t_count, s_count, temperature, products, least,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``reach[n, t]``: the distance beyond which no error can be seen in row t's weights, as ``Settling`` has it."""
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = t < t_count
    row = distance + (n * t_count + t) * s_count
    size = tl.load(query_sizes + n * t_count + t, mask=inside, other=0.0)
    ends = tl.full((ROWS, BLOCK), float("inf"), tl.float32)
    errors = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(row[:, None] + i[None, :], mask=inside[:, None] & (i < s_count)[None, :], other=float("inf"))
        of_key = tl.load(key_sizes + n * s_count + i, mask=i < s_count, other=0.0)
        error = (size[:, None] + of_key[None, :]) * products + least
        known = value < float("inf")
        ends = tl.minimum(ends, tl.where(known, value + error, float("inf")))
        errors = tl.maximum(errors, tl.where(known, error, 0.0))
    sharpness = _sharpness(tl.load(factors + n), temperature)
    many = tl.cast(s_count, tl.float32)
    error = tl.max(errors, 1) * sharpness / FLAT * 4.0 * many
    if MOMENTS:
        error = error * many * many
    steps = tl.minimum(tl.log(tl.maximum(error, 1.0)) + 0.01, 90.0)  # exp gives 0 beyond
    tl.store(reach + n * t_count + t, tl.min(ends, 1) + steps / sharpness, mask=inside)


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count", "temperature", "products", "differences", "least"])
def settle_kernel(
    query, key, mask_a, mask_b, factors, query_sizes, key_sizes, reach, out, t_count, s_count, c_count,
    temperature, products, differences, least, q_n, q_t, q_c, k_n, k_t, k_c, ma_n, ma_t, mb_n, mb_t,
    OWN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The distances of a tile that cannot stand, by differences of the frames as they were given.

    Programs as pair_kernel's. OWN: also those of frames at the same place.
    """
    n = tl.program_id(1).to(tl.int64)
    columns = (s_count + BLOCK_S - 1) // BLOCK_S
    t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.program_id(0) % columns * BLOCK_S + tl.arange(0, BLOCK_S)
    factor = tl.load(factors + n)
    query_there = _there(mask_a, n, t, t_count, ma_n, ma_t)
    key_there = _there(mask_b, n, i, s_count, mb_n, mb_t)
    both = query_there[:, None] & key_there[None, :]
    to = out + (n * t_count + t)[:, None] * s_count + i[None, :]
    value = tl.load(to, mask=both, other=0.0)
    error = tl.load(query_sizes + n * t_count + t, mask=query_there, other=0.0)[:, None]
    error = error + tl.load(key_sizes + n * s_count + i, mask=key_there, other=0.0)[None, :]
    error = error * products + least
    beyond = value - error > tl.load(reach + n * t_count + t, mask=query_there, other=0.0)[:, None]
    stands = (error <= 2.0 * differences * value) | (error * _sharpness(factor, temperature) <= FLAT) | beyond
    again = both & (stands == 0)
    if OWN:
        again = again | (both & (t[:, None] == i[None, :]))
    end = tl.where(tl.max(tl.max(again.to(tl.int32), 1), 0) > 0, c_count, 0)
    parts = tl.zeros((BLOCK_T, BLOCK_S, BLOCK_C), tl.float32)
    for start in tl.range(0, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        keys = _frames(key, n, i, key_there, c, c_count, k_n, k_t, k_c, factor)
        parts = _add_pairs(parts, _frames(query, n, t, query_there, c, c_count, q_n, q_t, q_c, factor), keys)
    tl.store(to, tl.sum(parts, 2), mask=again)


@triton.jit
def _to_soft(frames, n, t, there, centre, rest, at, open_, c_count, s_n, s_t, s_c, factor, end, BLOCK_C: tl.constexpr):
    # |(frame_t - centre) - rest|^2 of one frame per row; centre and rest are contiguous, at their rows `at`.
    acc = tl.zeros((at.shape[0],), tl.float32)
    for start in tl.range(0, end, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        to = at[:, None] * c_count + c[None, :]
        inside = open_[:, None] & (c < c_count)[None, :]
        away = _frames(frames, n, t, there, c, c_count, s_n, s_t, s_c, factor)
        away -= tl.load(centre + to, mask=inside, other=0.0)
        away -= tl.load(rest + to, mask=inside, other=0.0)
        acc += tl.sum(away * away, 1)
    return acc


@triton.jit
def _distance_and_error(rows, open_, i, s_count, size, key_sizes, n, products, differences, least):
    # Where a frame of the sample is not finite, neither are sizes, and distances are differences.
    value = tl.load(rows[:, None] + i[None, :], mask=open_[:, None] & (i < s_count)[None, :], other=float("inf"))
    of_key = tl.load(key_sizes + n * s_count + i, mask=i < s_count, other=0.0)
    error = (size[:, None] + of_key[None, :]) * products + least
    by_differences = value * differences
    return value, tl.where(error < float("inf"), tl.maximum(error, by_differences), by_differences)


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count", "products", "differences", "least"])
def compare_kernel(
    query, key, centre, rest, distance, to_soft, query_sizes, key_sizes, soft_sizes, mask_a, mask_b, factors, index,
    t_count, s_count, c_count, products, differences, least, q_n, q_t, q_c, k_n, k_t, k_c, ma_n, ma_t, mb_n, mb_t,
    MOST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The frames nearest to soft neighbours: ``index[n, t]``, -1 for queries that are not there.

    Program (i, n): some rows. Candidates are the keys whose distance to the query is not beyond what the triangle
    inequality allows, with ``to_soft`` (distances to the soft neighbour by products, sizes ``soft_sizes``) only those
    that these allow, too. Of them the nearest by differences is taken. Without ``to_soft`` a row with more than MOST is
    left open; with it open rows are done whatever they have.
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = t < t_count
    at = n * t_count + t
    own = _there(mask_a, n, t, t_count, ma_n, ma_t)
    likely, _ = _rows_first(distance + at * s_count, inside, s_count, BLOCK)
    open_ = own & (likely >= 0)
    if to_soft is not None:
        open_ = open_ & (tl.load(index + at, mask=inside, other=0) == OPEN)
    was_open = open_
    any_open = tl.max(open_.to(tl.int32), 0) > 0
    s_end, c_end = tl.where(any_open, s_count, 0), tl.where(any_open, c_count, 0)
    factor = tl.load(factors + n)
    size = tl.load(query_sizes + at, mask=open_, other=0.0)
    place = tl.where(open_, likely, 0)
    of_query = _to_soft(
        query, n, t, open_, centre, rest, at, open_, c_count, q_n, q_t, q_c, factor, c_end, BLOCK_C
    )  # fmt: skip
    of_likely = _to_soft(
        key, n, place, open_, centre, rest, at, open_, c_count, k_n, k_t, k_c, factor, c_end, BLOCK_C
    )  # fmt: skip
    away = tl.sqrt(of_query) + tl.sqrt(of_likely)
    reach = 1.001 * away * away + least  # roots and distances are good to far more than that
    open_ = open_ & (reach == reach)  # else the soft neighbour is not a number, and nothing is near
    high = tl.full((ROWS,), float("inf"), tl.float32)
    soft_size = high
    if to_soft is not None:
        soft_size = tl.load(soft_sizes + at, mask=open_, other=0.0)
        for start in tl.range(0, s_end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value, error = _distance_and_error(
                to_soft + at * s_count, open_, i, s_count, soft_size, key_sizes, n, products, 0.0, least
            )  # fmt: skip
            high = tl.minimum(high, tl.min(tl.where(value < float("inf"), value + error, float("inf")), 1))
    count = tl.zeros((ROWS,), tl.int32)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    found = tl.full((ROWS,), -1, tl.int32)
    mine = open_
    if to_soft is None:
        for start in tl.range(0, s_end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value, error = _distance_and_error(
                distance + at * s_count, open_, i, s_count, size, key_sizes, n, products, differences, least
            )  # fmt: skip
            there = open_[:, None] & _there(mask_b, n, i, s_count, mb_n, mb_t)[None, :]
            count += tl.sum((there & ((value - error > reach[:, None]) == 0)).to(tl.int32), 1)
        mine = open_ & (count > 0) & (count <= MOST)
    for start in tl.range(0, s_end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value, error = _distance_and_error(
            distance + at * s_count, open_, i, s_count, size, key_sizes, n, products, differences, least
        )  # fmt: skip
        candidate = mine[:, None] & _there(mask_b, n, i, s_count, mb_n, mb_t)[None, :]
        candidate = candidate & ((value - error > reach[:, None]) == 0)
        if to_soft is not None:
            value, error = _distance_and_error(
                to_soft + at * s_count, open_, i, s_count, soft_size, key_sizes, n, products, 0.0, least
            )  # fmt: skip
            candidate = candidate & ((value - error > high[:, None]) == 0)
        candidates = tl.where(candidate, i[None, :], NOWHERE)
        now = tl.min(candidates, 1)
        while tl.min(now, 0) < NOWHERE:
            there = now < NOWHERE
            taken = tl.where(there, now, 0)
            distances = _to_soft(
                key, n, taken, there, centre, rest, at, there, c_count, k_n, k_t, k_c, factor, c_count, BLOCK_C
            )  # fmt: skip
            nearer = there & (distances < best)
            best = tl.where(nearer, distances, best)
            found = tl.where(nearer, taken, found)
            now = tl.min(tl.where(candidates > now[:, None], candidates, NOWHERE), 1)
    if to_soft is None:
        found = tl.where(open_ & (mine == 0), OPEN, found)
        tl.store(index + at, found.to(tl.int64), mask=inside)
    else:
        tl.store(index + at, found.to(tl.int64), mask=was_open)


# ---- launches -----------------------------------------------------------------------------------------------------

#: Queries, keys and channels of a tile of pairs by differences and by products; of a tile of sums over keys or queries;
#: frames and channels of a tile of frames; rows, and elements of each, at a time.
PAIRS = {"BLOCK_T": 16, "BLOCK_S": 32, "BLOCK_C": 8}
PRODUCTS = {"BLOCK_T": 64, "BLOCK_S": 32, "BLOCK_C": 32}
QUERY_SUMS = {"BLOCK_T": 16, "BLOCK_S": 16, "BLOCK_C": 32}
KEY_SUMS = {"BLOCK_T": 16, "BLOCK_S": 8, "BLOCK_C": 32}
FRAMES = {"BLOCK_T": 16, "BLOCK_C": 32}
ROWS = {"ROWS": 8, "BLOCK": 128}


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else tuple(mask.stride())


class _Bounds:
    """Of the rounding of products and of sums of squared differences, as ``Rounding`` has it, for C channels.

    A product: the matrix unit adds 17 numbers at a time, each cut off below two units of the largest, for as many
    steps of 16 channels as there are from zero; then the sums of the tiles; what two parts leave of a number, and the
    product of the lower ones, 3. Squares: the channels of a tile, then the tiles.
    """

    def __init__(self, c: int) -> None:
        unit, channels = 1.01 * 2.0**-24, PRODUCTS["BLOCK_C"]
        self.product_steps = 2 * 17 * (channels // 16) + ceil_div(c, channels) + 3
        self.difference_steps = PAIRS["BLOCK_C"] + ceil_div(c, PAIRS["BLOCK_C"])
        self.products, self.differences = unit * (self.product_steps + 16), unit * (self.difference_steps + 3)
        self.least = c * 2.0**-122


def _scales(a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per sample the power of two by which numbers are multiplied before they are squared, and whether all are finite.

    [N] fp32 and [N] bool; not a number is left to show by itself.
    """

    def size(value: Tensor, mask: Tensor | None) -> Tensor:
        found = torch.nan_to_num(value.float().abs(), nan=0.0, posinf=torch.inf)
        return (found if mask is None else torch.where(mask.unsqueeze(-1), found, 0.0)).amax((1, 2))

    largest = torch.maximum(size(a, mask_a), size(b, mask_b))
    finite = largest.isfinite()
    outside = ((largest < 2.0**-30) | (largest > 2.0**50)) & (largest > 0) & finite
    exponent = torch.frexp(torch.where(outside, largest, 0.75)).exponent
    return torch.ldexp(torch.ones_like(largest), -exponent.clamp(-120, 120)), finite


def why_not_products(kind: str, t: int, s: int, c: int) -> str | None:
    """Why distances of an alignment of [t, c] and [s, c] ("soft", "cycle", "back", or a gradient) are no products."""
    if kind not in ("soft", "cycle", "back"):
        return "gradients take every pair's difference as it is"
    if (min(t, s) if kind == "cycle" else s) < LEAST_KEYS:
        return f"fewer than {LEAST_KEYS} frames"
    return f"fewer than {LEAST_CHANNELS} channels" if c < LEAST_CHANNELS else None


def describe(kind: str, t: int, s: int, c: int) -> str:
    """How such an alignment is run, and why."""
    if kind == "cycle" and max(t, s) <= SHORT:
        return f"short cycle: at most {SHORT} frames each, one program per sample, distances by differences"
    if reason := why_not_products(kind, t, s, c):
        return f"distances by differences: {reason}"
    return (
        "distances by products of centred frames in two fp16 parts, by differences within the bound of their rounding: "
        f"at least {LEAST_KEYS} frames of at least {LEAST_CHANNELS} channels"
    )


class _Parts(NamedTuple):
    """What split_kernel makes of the frames of a sequence."""

    parts: Tensor
    sizes: Tensor
    inverses: Tensor


class _Problem:
    """One alignment in steps; ``launches`` in order."""

    def __init__(
        self, a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float, kind: str
    ) -> None:
        self.a, self.b, self.mask_a, self.mask_b = a, b, mask_a, mask_b
        self.temperature, self.kind = float(temperature), kind
        (self.n, self.t, self.c), self.s = a.shape, b.shape[1]
        self.factors, self.finite = _scales(a, b, mask_a, mask_b)
        self.launches: list[Launch] = []
        self.products = why_not_products(kind, self.t, self.s, self.c) is None
        self.bounds = _Bounds(self.c)
        if self.products:
            self.mean = self._mean()
            self.queries, self.keys = self._split(a, mask_a), self._split(b, mask_b)

    def turned(self) -> _Problem:
        """The same with a and b exchanged; its launches join these."""
        other = copy.copy(self)
        other.a, other.b, other.mask_a, other.mask_b, other.t, other.s = (
            self.b, self.a, self.mask_b, self.mask_a, self.s, self.t,
        )  # fmt: skip
        if self.products:
            other.queries, other.keys = self.keys, self.queries
        return other

    def _add(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int = 4
    ) -> None:
        self.launches.append(Launch(kernel, grid, arguments, constants, warps, 2))

    def _add_rows(
        self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any] | None = None, warps: int = 4
    ) -> None:
        grid = ceil_div(self.t, ROWS["ROWS"]), self.n
        self._add(kernel, grid, arguments, {**(constants or {}), **ROWS}, warps)

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.a.new_empty((self.n, *size), dtype=dtype)

    def map(self) -> Tensor:
        """An [N,T,S] matrix."""
        return self._empty(self.t, self.s)

    def vectors(self) -> Tensor:
        """[N,T,C] fp32."""
        return self._empty(self.t, self.c)

    def _mean(self) -> Tensor:
        mean = self._empty(self.c)
        arguments = (
            self.a, self.b, self.mask_a, self.mask_b, self.factors, mean, self.t, self.s, self.c,
            *self.a.stride(), *self.b.stride(), *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(mean_kernel, (ceil_div(self.c, FRAMES["BLOCK_C"]), self.n), arguments, dict(FRAMES))
        return mean

    def _split(
        self, frames: Tensor, mask: Tensor | None, rest: Tensor | None = None, index: Tensor | None = None
    ) -> _Parts:
        t, padded = frames.shape[1], ceil_div(self.c, PRODUCTS["BLOCK_C"]) * PRODUCTS["BLOCK_C"]
        found = _Parts(self._empty(t, 2, padded, dtype=torch.float16), self._empty(t), self._empty(t))
        arguments = (
            frames, rest, mask, index, self.mean, self.factors, *found, t, self.c, padded,
            *frames.stride(), *_mask_strides(mask),
        )  # fmt: skip
        self._add(split_kernel, (ceil_div(t, FRAMES["BLOCK_T"]), self.n), arguments, dict(FRAMES))
        return found

    def _by_products(self, queries: _Parts, index: Tensor | None = None) -> Tensor:
        out = self.map()
        blocks = ceil_div(self.t, PRODUCTS["BLOCK_T"]) * ceil_div(self.s, PRODUCTS["BLOCK_S"])
        arguments = (
            queries.parts, self.keys.parts, queries.sizes, self.keys.sizes, queries.inverses, self.keys.inverses,
            self.mask_b, index, out, self.t, self.s, queries.parts.shape[-1], *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(product_kernel, (blocks, self.n), arguments, dict(PRODUCTS))
        return out

    def distances(self) -> Tensor:
        """Between queries and keys, [N,T,S]: right wherever it matters."""
        if not self.products:
            return self.pairs(self.a)
        out, reach, bounds = self._by_products(self.queries), self._empty(self.t), self.bounds
        sizes = self.queries.sizes, self.keys.sizes
        arguments: tuple[Any, ...] = (
            out, *sizes, self.factors, reach, self.t, self.s, self.temperature, bounds.products, bounds.least,
        )  # fmt: skip
        back = self.kind == "back"
        self._add_rows(reach_kernel, arguments, {"MOMENTS": back})
        arguments = (
            self.a, self.b, self.mask_a, self.mask_b, self.factors, *sizes, reach, out, self.t, self.s, self.c,
            self.temperature, bounds.products, bounds.differences, bounds.least,
            *self.a.stride(), *self.b.stride(), *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        blocks = ceil_div(self.t, PAIRS["BLOCK_T"]) * ceil_div(self.s, PAIRS["BLOCK_S"])
        self._add(settle_kernel, (blocks, self.n), arguments, {"OWN": back, **PAIRS})
        return out

    def pairs(self, query: Tensor, rest: Tensor | None = None, product: bool = False) -> Tensor:
        out, strides = self.map(), (rest if product else query).stride()  # type: ignore[union-attr]
        blocks = ceil_div(self.t, PAIRS["BLOCK_T"]) * ceil_div(self.s, PAIRS["BLOCK_S"])
        arguments = (
            query, self.b, rest, self.mask_b, self.factors, out, self.t, self.s, self.c,
            *strides, *self.b.stride(), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(pair_kernel, (blocks, self.n), arguments, {"PRODUCT": product, **PAIRS})
        return out

    def softmax(self, distance: Tensor, kind: int, grads: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        z = self.map()
        results: tuple[Tensor, ...] = ()
        if kind == LANDING:
            results = tuple(self._empty(self.t) for _ in range(3))
        w = self.map() if kind == LANDING_GRADIENT else None
        arguments = (
            distance, self.mask_a, self.mask_b, self.factors, z, w, *(grads or (None,) * 3), *(results or (None,) * 3),
            self.t, self.s, self.temperature, *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add_rows(softmax_kernel, arguments, {"KIND": kind})
        return z, results if w is None else (w,)

    def score_gradient(self, z: Tensor, r: Tensor) -> Tensor:
        w = self.map()
        self._add_rows(score_gradient_kernel, (z, r, self.factors, w, self.t, self.s, self.temperature))
        return w

    def sums(self, weight: Tensor, centre: Tensor | None, out: Tensor, add: Tensor | None = None) -> Tensor:
        blocks = ceil_div(self.t, QUERY_SUMS["BLOCK_T"]) * ceil_div(self.c, QUERY_SUMS["BLOCK_C"])
        arguments = (
            weight, self.b, centre, self.mask_b, self.factors, self.finite, out, add, self.t, self.s, self.c,
            *self.b.stride(), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(query_sum_kernel, (blocks, self.n), arguments, dict(QUERY_SUMS))
        return out

    def key_sums(self, z: Tensor, w: Tensor, grad: Tensor | None, out: Tensor) -> Tensor:
        blocks = ceil_div(self.s, KEY_SUMS["BLOCK_S"]) * ceil_div(self.c, KEY_SUMS["BLOCK_C"])
        arguments = (
            z, w, self.a, self.b, grad, self.mask_a, self.mask_b, self.factors, out, self.t, self.s, self.c,
            *self.a.stride(), *self.b.stride(), *((0, 0, 0) if grad is None else grad.stride()),
            *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(key_sum_kernel, (blocks, self.n), arguments, dict(KEY_SUMS))
        return out

    def nearest(self, distance: Tensor, centre: Tensor, rest: Tensor) -> Tensor:
        """The frames nearest to the soft neighbours, from the distances between queries and keys."""
        index = self._empty(self.t, dtype=torch.int64)
        if not self.products:
            found = self.pairs(centre, rest)
            arguments: tuple[Any, ...] = (found, self.mask_a, index, self.t, self.s, *_mask_strides(self.mask_a))
            self._add_rows(nearest_kernel, arguments)
            return index
        self._compare(distance, centre, rest, index)
        soft = self._split(centre, self.mask_a, rest, index)
        self._compare(distance, centre, rest, index, self._by_products(soft, index), soft.sizes)
        return index

    def _compare(
        self,
        distance: Tensor,
        centre: Tensor,
        rest: Tensor,
        index: Tensor,
        to_soft: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> None:
        bounds = self.bounds
        arguments = (
            self.a, self.b, centre, rest, distance, to_soft, self.queries.sizes, self.keys.sizes, sizes,
            self.mask_a, self.mask_b, self.factors, index, self.t, self.s, self.c,
            bounds.products, bounds.differences, bounds.least,
            *self.a.stride(), *self.b.stride(), *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        # Of 4 warps, some would spill a register or six on sm_80.
        self._add_rows(compare_kernel, arguments, {"MOST": MOST_COMPARED, "BLOCK_C": FRAMES["BLOCK_C"]}, warps=8)

    def soft(self, need_soft: bool, need_index: bool) -> tuple[Tensor, Tensor]:
        """Soft neighbours (an empty tensor unless asked for) and the frames nearest to them (the same)."""
        distance = self.distances()
        z, _ = self.softmax(distance, WEIGHTS)
        centre = self.sums(z, None, self.vectors())
        soft, index = self.a.new_empty(0), self._empty(0, dtype=torch.int64)
        if need_soft:
            soft = self.sums(z, centre, self.a.new_empty(self.a.shape), add=centre)
        if need_index:
            index = self.nearest(distance, centre, self.sums(z, centre, self.vectors()))
        return soft, index


def plan_short_cycle(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Gate and index maps to be filled, and the launch that fills them."""
    (n, t, c), s = a.shape, b.shape[1]
    gate = a.new_empty((n,), dtype=torch.bool)
    indices = a.new_empty((n, t), dtype=torch.int64), a.new_empty((n, s), dtype=torch.int64)
    arguments = (
        a, b, mask_a, mask_b, gate, *indices, t, s, c, float(temperature),
        *a.stride(), *b.stride(), *_mask_strides(mask_a), *_mask_strides(mask_b),
    )  # fmt: skip
    side = 16 if max(t, s) <= 16 else SHORT
    constants = {"T": side, "S": side, "BLOCK_C": 32 if side == 16 else 16}
    launches = [Launch(short_cycle_kernel, (n,), arguments, constants, 8 if side == 16 else 16, 1)] if n else []
    return (gate, *indices), launches


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


# ---- the operators ------------------------------------------------------------------------------------------------


def _planned(plan: Any, a: Tensor, *arguments: Any) -> Any:
    def run(a: Tensor, *arguments: Any) -> Any:
        results, launches = plan(a, *arguments)
        _run(launches, a.device)
        return results

    return by_samples(MOST_SAMPLES, run, a, *arguments)


def plan_soft(
    a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float, need_index: bool
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Results to be filled, and the launches that fill them."""
    if a.shape[0] == 0:
        return (a.new_empty(a.shape), a.new_empty((0, a.shape[1] if need_index else 0), dtype=torch.int64)), []
    problem = _Problem(a, b, None, mask_b, temperature, "soft")
    return problem.soft(True, need_index), problem.launches


def soft_nearest_neighbor(
    a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float, need_index: bool
) -> tuple[Tensor, Tensor]:
    """``rcu_ops::soft_nearest_neighbor``."""
    return _planned(plan_soft, a, b, mask_b, temperature, need_index)


def plan_soft_backward(
    a: Tensor, b: Tensor, grad_soft: Tensor, mask_b: Tensor | None, temperature: float
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The same for its gradients."""
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    if a.shape[0] == 0:
        return (da, db), []
    problem = _Problem(a, b, None, mask_b, temperature, "soft_backward")
    z, _ = problem.softmax(problem.pairs(a), WEIGHTS)
    centre = problem.sums(z, None, problem.vectors())
    w = problem.score_gradient(z, problem.pairs(centre, grad_soft, product=True))
    problem.sums(w, centre, da)
    problem.key_sums(z, w, grad_soft, db)
    return (da, db), problem.launches


def soft_nearest_neighbor_backward(
    grad_soft: Tensor, a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """``rcu_ops::soft_nearest_neighbor_backward``."""
    return _planned(plan_soft_backward, a, b, grad_soft, mask_b, temperature)


def plan_cycle(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The index maps of sequences that one program does not hold, and their launches."""
    problem = _Problem(a, b, mask_a, mask_b, temperature, "cycle")
    return (problem.soft(False, True)[1], problem.turned().soft(False, True)[1]), problem.launches


def cycle_consistency(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::cycle_consistency``."""
    if max(a.shape[1], b.shape[1]) <= SHORT or a.shape[0] == 0:
        results, launches = plan_short_cycle(a, b, mask_a, mask_b, temperature)
        _run(launches, a.device)
        return results
    indices = _planned(plan_cycle, a, b, mask_a, mask_b, temperature)
    gate = torch.full((a.shape[0],), a.shape[1] == b.shape[1], device=a.device)
    for index, mask in zip(indices, (mask_a, mask_b), strict=True):
        stays = index == torch.arange(index.shape[1], device=a.device)
        gate = gate & (stays if mask is None else stays | ~mask).all(1)
    return gate, *indices


def plan_back(
    soft: Tensor, a: Tensor, mask_a: Tensor | None, temperature: float
) -> tuple[tuple[Tensor, ...], list[Launch]]:
    """Where soft neighbours land: results to be filled, and the launches."""
    if a.shape[0] == 0:
        return tuple(a.new_empty(a.shape[:2], dtype=torch.float32) for _ in range(3)), []
    problem = _Problem(soft, a, mask_a, mask_a, temperature, "back")
    return problem.softmax(problem.distances(), LANDING)[1], problem.launches


def cycle_back(soft: Tensor, a: Tensor, mask_a: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::cycle_back``."""
    return _planned(plan_back, soft, a, mask_a, temperature)


def plan_back_backward(
    soft: Tensor,
    a: Tensor,
    grad_log_probability: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    mask_a: Tensor | None,
    temperature: float,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The same for its gradients; those given are contiguous."""
    d_soft, da = soft.new_empty(soft.shape), a.new_empty(a.shape)
    if a.shape[0] == 0:
        return (d_soft, da), []
    problem = _Problem(soft, a, mask_a, mask_a, temperature, "back_backward")
    z, (w,) = problem.softmax(problem.pairs(soft), LANDING_GRADIENT, (grad_log_probability, grad_mean, grad_variance))
    centre = problem.sums(z, None, problem.vectors())
    problem.sums(w, centre, d_soft)
    problem.key_sums(z, w, None, da)
    return (d_soft, da), problem.launches


def cycle_back_backward(
    grad_log_probability: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    soft: Tensor,
    a: Tensor,
    mask_a: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """``rcu_ops::cycle_back_backward``."""
    grads = (g.contiguous() for g in (grad_log_probability, grad_mean, grad_variance))
    return _planned(plan_back_backward, soft, a, *grads, mask_a, temperature)
