"""Triton kernels of ``soft_nearest_neighbor``, ``cycle_consistency``, ``cycle_back`` and their gradients.

Distances are sums of squared differences, never differences of squares: a common offset or a scene cut costs nothing.
They are found in three-dimensional tiles, queries x keys x channels, in fp32: no matrix unit could be trusted here.

Cycles of at most :data:`SHORT` frames are one kernel: a program reads a sample's a and b once, keeps the three matrices
of distances on chip, and maps through the distances within a sequence, ``argmin_i sum_j z_tj |b_j - b_i|^2``. All else
goes through matrices of weights, [N, T, S] fp32, in a few kernels: distances, softmax, sums of keys, distances to the
soft neighbours. A soft neighbour is kept as the sum u as it comes out and the rest, ``sum_i z_i (b_i - u)``, which is
right where rounding u loses the differences between frames.

Numbers are multiplied by a power of two per sample where their squares would leave the range of fp32. Frames that are
not there have weight 0, whatever they hold. Every result has one writer and a fixed order of summation: results repeat
bit for bit. Any strides are read where they lie; configurations are fixed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels.recurrent_conv import Launch

#: The most frames of a sequence that the one-kernel cycle takes.
SHORT = 32

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
def _frames(base, n, t, there, c, c_count, s_n, s_t, s_c, factor):
    # [frames, channels] fp32 times a power of two, zero where there is nothing.
    pointers = base + n * s_n + t.to(tl.int64)[:, None] * s_t + c.to(tl.int64)[None, :] * s_c
    return tl.load(pointers, mask=there[:, None] & (c < c_count)[None, :], other=0.0).to(tl.float32) * factor


@triton.jit
def _pairs(a, b):
    # Squared differences of all pairs, added up over the channels.
    difference = b[None, :, :] - a[:, None, :]
    return tl.sum(difference * difference, 2)


@triton.jit
def _largest(value):
    return tl.max(tl.max(tl.where(value == value, tl.abs(value), 0.0), 1), 0)


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
        ab, aa, bb = tl.zeros((T, S), tl.float32), tl.zeros((T, T), tl.float32), tl.zeros((S, S), tl.float32)
        largest = 0.0
        for start in tl.range(0, c_count, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = _frames(a, n, t, a_there, c, c_count, a_n, a_t, a_c, factor)
            y = _frames(b, n, s, b_there, c, c_count, b_n, b_t, b_c, factor)
            largest = tl.maximum(largest, tl.maximum(_largest(x), _largest(y)))
            ab += _pairs(x, y)
            aa += _pairs(x, x)
            bb += _pairs(y, y)
        power = tl.where(factor == 1.0, _power(largest), 1.0)
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
    acc = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for start in tl.range(0, c_count, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        keys = _frames(key, n, i, there, c, c_count, k_n, k_t, k_c, factor)
        if rest is None:
            acc += _pairs(_frames(query, n, t, t < t_count, c, c_count, q_n, q_t, q_c, factor), keys)
        else:
            wide = tl.cast(c_count, tl.int64)
            centre = _frames(query, n, t, t < t_count, c, c_count, t_count * wide, wide, 1, 1.0)
            if PRODUCT:
                other = _frames(rest, n, t, t < t_count, c, c_count, q_n, q_t, q_c, 1.0)
                acc += tl.sum((keys[None, :, :] - centre[:, None, :]) * other[:, None, :], 2)
            else:
                other = _frames(rest, n, t, t < t_count, c, c_count, t_count * wide, wide, 1, 1.0)
                difference = (keys[None, :, :] - centre[:, None, :]) - other[:, None, :]
                acc += tl.sum(difference * difference, 2)
    missing = 0.0 if PRODUCT else float("inf")
    acc = tl.where(there[None, :], acc, missing)
    to = out + (n * t_count + t)[:, None] * s_count + i[None, :]
    tl.store(to, acc, mask=(t < t_count)[:, None] & (i < s_count)[None, :])


@triton.jit
def _row_first(row, s_count, BLOCK: tl.constexpr):
    # The first of the smallest of a row, -1 where none is less than infinity; the smallest; whether it holds a NaN.
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    at = tl.full((BLOCK,), -1, tl.int32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(row + i, mask=i < s_count, other=float("inf"))
        smaller = value < best
        best = tl.where(smaller, value, best)
        at = tl.where(smaller, i, at)
    least = tl.min(best, 0)
    place = tl.min(tl.where((at >= 0) & (best == least), at, 2147483647), 0)
    return tl.where(place == 2147483647, -1, place), least


@triton.jit(do_not_specialize=["t_count", "s_count", "temperature"])
def softmax_kernel(
    distance, mask_a, mask_b, factors, z, w, g_log, g_mean, g_variance, log_probability, mean, variance,
    t_count, s_count, temperature, ma_n, ma_t, mb_n, mb_t,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``z[n, t, :] = softmax(-distance / temperature)``, program (t, n); zeros for queries that are not there.

    LANDING: also log z_tt, mean and variance of i under z_t. LANDING_GRADIENT: also ``w``, the gradient of the logits
    times 2 / temperature, for three gradients [N,T].
    """
    t, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = n * t_count + t
    factor = tl.load(factors + n)
    sharpness = _sharpness(factor, temperature)
    own_there = True
    if mask_a is not None:
        own_there = tl.load(mask_a + n * ma_n + t.to(tl.int64) * ma_t) != 0
    row, z_row = distance + at * s_count, z + at * s_count
    likely, least = _row_first(row, s_count, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = _there(mask_b, n, i, s_count, mb_n, mb_t)
        value = tl.load(row + i, mask=i < s_count, other=float("inf"))
        sums += tl.where(there, tl.exp((least - value) * sharpness), 0.0)
        count += there.to(tl.int32)
    total = tl.sum(sums, 0)
    alive = own_there & (tl.sum(count, 0) > 0)
    origin = tl.maximum(likely, 0)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = _there(mask_b, n, i, s_count, mb_n, mb_t)
        value = tl.load(row + i, mask=i < s_count, other=float("inf"))
        weight = tl.where(alive & there, tl.exp((least - value) * sharpness) / total, 0.0)
        tl.store(z_row + i, weight, mask=i < s_count)
        moments += weight * (i - origin).to(tl.float32)
    if KIND != 0:
        centre = tl.sum(moments, 0)
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, s_count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            there = _there(mask_b, n, i, s_count, mb_n, mb_t)
            value = tl.load(row + i, mask=i < s_count, other=float("inf"))
            weight = tl.where(alive & there, tl.exp((least - value) * sharpness) / total, 0.0)
            away = (i - origin).to(tl.float32) - centre
            squares += weight * (away * away)
        spread = tl.sum(squares, 0)
        if KIND == 1:
            own = tl.load(row + t)
            tl.store(log_probability + at, tl.where(alive, (least - own) * sharpness - tl.log(total), 0.0))
            tl.store(mean + at, tl.where(alive, origin.to(tl.float32) + centre, 0.0))
            tl.store(variance + at, tl.where(alive, spread, 0.0))
        else:
            g, gm, gv = tl.load(g_log + at), tl.load(g_mean + at), tl.load(g_variance + at)
            by = 2.0 / factor / temperature
            for start in tl.range(0, s_count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                there = _there(mask_b, n, i, s_count, mb_n, mb_t)
                value = tl.load(row + i, mask=i < s_count, other=float("inf"))
                weight = tl.exp((least - value) * sharpness) / total
                away = (i - origin).to(tl.float32) - centre
                of_row = weight * (gm * away + gv * (away * away - spread) - g) + tl.where(i == t, g, 0.0)
                of_row = tl.where(alive & there, by * of_row, 0.0)
                tl.store(w + at * s_count + i, of_row, mask=i < s_count)


@triton.jit(do_not_specialize=["t_count", "s_count", "temperature"])
def score_gradient_kernel(z, r, factors, w, t_count, s_count, temperature, BLOCK: tl.constexpr):
    """``w = 2 sharpness z (r - sum z r)``, row by row, program (t, n)."""
    n = tl.program_id(1).to(tl.int64)
    row = (n * t_count + tl.program_id(0)) * s_count
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(z + row + i, mask=i < s_count, other=0.0) * tl.load(r + row + i, mask=i < s_count, other=0.0)
    mean = tl.sum(sums, 0)
    by = 2.0 * _sharpness(tl.load(factors + n), temperature)
    for start in tl.range(0, s_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weight = tl.load(z + row + i, mask=i < s_count, other=0.0)
        products = tl.load(r + row + i, mask=i < s_count, other=0.0)
        tl.store(w + row + i, weight * (products - mean) * by, mask=i < s_count)


@triton.jit(do_not_specialize=["s_count"])
def nearest_kernel(distance, mask_a, index, t_count, s_count, ma_n, ma_t, BLOCK: tl.constexpr):
    """The first of the smallest distances of row (t, n); -1 where there is none or the query is not there."""
    t, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, _ = _row_first(distance + (n * t_count + t) * s_count, s_count, BLOCK)
    if mask_a is not None:
        place = tl.where(tl.load(mask_a + n * ma_n + t.to(tl.int64) * ma_t) != 0, place, -1)
    tl.store(index + n * t_count + t, place.to(tl.int64))


@triton.jit(do_not_specialize=["t_count", "s_count", "c_count"])
def query_sum_kernel(
    weight, key, centre, mask, factors, out, add, t_count, s_count, c_count, k_n, k_t, k_c, m_n, m_t,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n, t, c] = sum_i weight_ti (key_i - centre_t)``, program (i, n): a block of queries and one of channels.

    centre None: 0. With ``add``, the centre of ``out``'s number in unscaled form: ``(add + out) / factor`` is written.
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
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in tl.range(0, s_count, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        there = _there(mask, n, i, s_count, m_n, m_t)
        keys = _frames(key, n, i, there, c, c_count, k_n, k_t, k_c, factor)
        rows = weight + (n * t_count + t)[:, None] * s_count + i[None, :]
        weights = tl.load(rows, mask=(t < t_count)[:, None] & there[None, :], other=0.0)
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


# ---- launches -----------------------------------------------------------------------------------------------------

#: Queries, keys and channels of a tile of pairs; of a tile of sums over keys or queries; elements of a row at a time.
PAIRS = {"BLOCK_T": 16, "BLOCK_S": 32, "BLOCK_C": 8}
QUERY_SUMS = {"BLOCK_T": 8, "BLOCK_S": 16, "BLOCK_C": 32}
KEY_SUMS = {"BLOCK_T": 16, "BLOCK_S": 8, "BLOCK_C": 32}
ROW = 512


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else tuple(mask.stride())


def _factors(a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
    """Per sample the power of two by which its numbers are multiplied before they are squared: [N] fp32."""

    def size(value: Tensor, mask: Tensor | None) -> Tensor:
        found = torch.nan_to_num(value.float().abs(), nan=0.0, posinf=torch.inf)
        return (found if mask is None else torch.where(mask.unsqueeze(-1), found, 0.0)).amax((1, 2))

    largest = torch.maximum(size(a, mask_a), size(b, mask_b))
    outside = ((largest < 2.0**-30) | (largest > 2.0**50)) & (largest > 0) & largest.isfinite()
    exponent = torch.frexp(torch.where(outside, largest, 0.75)).exponent
    return torch.ldexp(torch.ones_like(largest), -exponent.clamp(-120, 120))


class _Problem:
    """One alignment in steps; ``launches`` in order."""

    def __init__(
        self, a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float, factors: Tensor
    ) -> None:
        self.a, self.b, self.mask_a, self.mask_b = a, b, mask_a, mask_b
        self.temperature, self.factors = float(temperature), factors
        (self.n, self.t, self.c), self.s = a.shape, b.shape[1]
        self.launches: list[Launch] = []

    def _add(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel, grid, arguments, constants, 4, 2))

    def map(self) -> Tensor:
        """An [N,T,S] matrix."""
        return self.a.new_empty((self.n, self.t, self.s), dtype=torch.float32)

    def vectors(self) -> Tensor:
        """[N,T,C] fp32."""
        return self.a.new_empty((self.n, self.t, self.c), dtype=torch.float32)

    def pairs(self, query: Tensor, rest: Tensor | None = None, product: bool = False) -> Tensor:
        out, strides = self.map(), (rest if product else query).stride()  # type: ignore[union-attr]
        blocks = triton.cdiv(self.t, PAIRS["BLOCK_T"]) * triton.cdiv(self.s, PAIRS["BLOCK_S"])
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
            results = tuple(self.a.new_empty((self.n, self.t), dtype=torch.float32) for _ in range(3))
        w = self.map() if kind == LANDING_GRADIENT else None
        arguments = (
            distance, self.mask_a, self.mask_b, self.factors, z, w, *(grads or (None,) * 3), *(results or (None,) * 3),
            self.t, self.s, self.temperature, *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(softmax_kernel, (self.t, self.n), arguments, {"KIND": kind, "BLOCK": ROW})
        return z, results if w is None else (w,)

    def sums(self, weight: Tensor, centre: Tensor | None, out: Tensor, add: Tensor | None = None) -> Tensor:
        blocks = triton.cdiv(self.t, QUERY_SUMS["BLOCK_T"]) * triton.cdiv(self.c, QUERY_SUMS["BLOCK_C"])
        arguments = (
            weight, self.b, centre, self.mask_b, self.factors, out, add, self.t, self.s, self.c,
            *self.b.stride(), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(query_sum_kernel, (blocks, self.n), arguments, dict(QUERY_SUMS))
        return out

    def key_sums(self, z: Tensor, w: Tensor, grad: Tensor | None, out: Tensor) -> Tensor:
        blocks = triton.cdiv(self.s, KEY_SUMS["BLOCK_S"]) * triton.cdiv(self.c, KEY_SUMS["BLOCK_C"])
        arguments = (
            z, w, self.a, self.b, grad, self.mask_a, self.mask_b, self.factors, out, self.t, self.s, self.c,
            *self.a.stride(), *self.b.stride(), *((0, 0, 0) if grad is None else grad.stride()),
            *_mask_strides(self.mask_a), *_mask_strides(self.mask_b),
        )  # fmt: skip
        self._add(key_sum_kernel, (blocks, self.n), arguments, dict(KEY_SUMS))
        return out

    def nearest(self, centre: Tensor, rest: Tensor) -> Tensor:
        index = self.a.new_empty((self.n, self.t), dtype=torch.int64)
        distance = self.pairs(centre, rest)
        arguments = (distance, self.mask_a, index, self.t, self.s, *_mask_strides(self.mask_a))
        self._add(nearest_kernel, (self.t, self.n), arguments, {"BLOCK": ROW})
        return index

    def soft(self, need_soft: bool, need_index: bool) -> tuple[Tensor, Tensor]:
        """Soft neighbours (an empty tensor unless asked for) and the frames nearest to them (the same)."""
        z, _ = self.softmax(self.pairs(self.a), WEIGHTS)
        centre = self.sums(z, None, self.vectors())
        soft, index = self.a.new_empty(0), self.a.new_empty((self.n, 0), dtype=torch.int64)
        if need_soft:
            soft = self.sums(z, centre, self.a.new_empty(self.a.shape), add=centre)
        if need_index:
            index = self.nearest(centre, self.sums(z, centre, self.vectors()))
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
    constants = {"T": side, "S": side, "BLOCK_C": 16 if side == 16 else 8}
    launches = [Launch(short_cycle_kernel, (n,), arguments, constants, 4 if side == 16 else 8, 2)] if n else []
    return (gate, *indices), launches


def _run(launches: list[Launch], device: torch.device) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


# ---- the operators ------------------------------------------------------------------------------------------------


def _problem(a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float) -> _Problem:
    return _Problem(a, b, mask_a, mask_b, temperature, _factors(a, b, mask_a, mask_b))


def _planned(plan: Any, a: Tensor, *arguments: Any) -> Any:
    results, launches = plan(a, *arguments)
    _run(launches, a.device)
    return results


def plan_soft(
    a: Tensor, b: Tensor, mask_b: Tensor | None, temperature: float, need_index: bool
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Results to be filled, and the launches that fill them."""
    if a.shape[0] == 0:
        return (a.new_empty(a.shape), a.new_empty((0, a.shape[1] if need_index else 0), dtype=torch.int64)), []
    problem = _problem(a, b, None, mask_b, temperature)
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
    problem = _problem(a, b, None, mask_b, temperature)
    z, _ = problem.softmax(problem.pairs(a), WEIGHTS)
    centre = problem.sums(z, None, problem.vectors())
    r, w = problem.pairs(centre, grad_soft, product=True), problem.map()
    arguments = (z, r, problem.factors, w, problem.t, problem.s, problem.temperature)
    problem.launches.append(Launch(score_gradient_kernel, (problem.t, problem.n), arguments, {"BLOCK": ROW}, 4, 2))
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
    there = _problem(a, b, mask_a, mask_b, temperature)
    back = _Problem(b, a, mask_b, mask_a, temperature, there.factors)
    indices = there.soft(False, True)[1], back.soft(False, True)[1]
    return indices, [*there.launches, *back.launches]


def cycle_consistency(
    a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::cycle_consistency``."""
    if max(a.shape[1], b.shape[1]) <= SHORT or a.shape[0] == 0:
        return _planned(plan_short_cycle, a, b, mask_a, mask_b, temperature)
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
    problem = _problem(soft, a, mask_a, mask_a, temperature)
    return problem.softmax(problem.pairs(soft), LANDING)[1], problem.launches


def cycle_back(soft: Tensor, a: Tensor, mask_a: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``rcu_ops::cycle_back``."""
    return _planned(plan_back, soft, a, mask_a, temperature)


def plan_back_backward(
    soft: Tensor, a: Tensor, grads: tuple[Tensor, ...], mask_a: Tensor | None, temperature: float
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The same for its gradients; grads: of log probability, mean and variance, contiguous."""
    d_soft, da = soft.new_empty(soft.shape), a.new_empty(a.shape)
    if a.shape[0] == 0:
        return (d_soft, da), []
    problem = _problem(soft, a, mask_a, mask_a, temperature)
    z, (w,) = problem.softmax(problem.pairs(soft), LANDING_GRADIENT, grads)
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
    grads = tuple(g.contiguous() for g in (grad_log_probability, grad_mean, grad_variance))
    return _planned(plan_back_backward, soft, a, grads, mask_a, temperature)
