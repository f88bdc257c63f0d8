"""``recurrent_conv`` in chunks of frames side by side, made of the library's products: few launches that depend on each
other for long clips of few positions, and for channels that no kernel's registers hold.

With ``Q = alpha W^T`` (states are rows) and chunks j = 0 .. J-1 of L frames:

1. every chunk's frames from a zero state, all chunks at once:  ``v_{j,i} = v_{j,i-1} Q + alpha x_{j,i}``
2. the true ends, chunk after chunk:  ``e_j = e_{j-1} Q^L + v_{j,L-1}``
3. what the frames before a chunk add to it, all frames at once:  ``v_{j,i} += e_{j-1} Q^{i+1}``

so L - 1 + J - 2 + 1 products follow one another instead of T. The planner (csrc/common/recurrent_conv_chunk_plan.h)
decides when; the bindings call the operator defined here, which writes into memory of theirs and runs on any device.

The state stays in fp32. Products of 16-bit data run on the matrix unit in bf16 with fp32 sums, and whatever bf16 does
not hold is multiplied as a sum of two numbers, high and low: the state always, W in fp16, the powers of Q. These are
made in fp64, because their errors enter every chunk alike and would add up; fp32 data take their high and low part in
fp32.
Powers that leave the range of fp32 make infinities and NaN where the frames one after the other might not.

They cost 2 (L - 1) C^3 FLOPs in fp64 beside 4 T C^2 of every position: whoever runs the same W again and again keeps
them (:class:`KeptPowers`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rcu_ops.ops import _schema
from rcu_ops.ops._kept import Kept

# Values of rcu_ops::Init (csrc/common/recurrent_conv.h).
NO_STATE, STATE, ADDED = range(3)

SCHEMA = (
    "recurrent_conv_chunked_(Tensor? x, Tensor weight, Tensor? first, Tensor(a!) y, Tensor(b!)? last, Tensor? scale, "
    "Tensor? shift, Tensor? residual, int frames, int init, bool project, float alpha, float alpha_first, "
    "float alpha_final, bool relu, bool reverse) -> ()"
)


def chunked_scan(
    x: Tensor | None,
    weight: Tensor,
    first: Tensor | None,
    y: Tensor,
    last: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    frames: int,
    init: int,
    project: bool,
    alpha: float,
    alpha_first: float,
    alpha_final: float,
    relu: bool,
    reverse: bool,
) -> None:
    """The scan of csrc/common/recurrent_conv.h, ``v_i = alpha_i (W v_{i-1} + x_i)``, in chunks of ``frames`` frames.

    Args:
        x: [N,C,T,H,W] fp16, bf16 or fp32, any strides, or None for zeros.
        weight: [C,C] (out, in), y's dtype, any strides.
        first: [N,C,H,W] in y's dtype or fp32: the state before the first frame (init STATE), or what is added to its
            x (ADDED); None with NO_STATE.
        y: [N,C,T,H,W], 2 ``frames`` <= T, written: v, or ``act(scale v + shift (+ residual))``.
        last: [N,C,H,W] in y's dtype or fp32, written: the last v, or W times it (``project``); or None.
        scale, shift: [C] fp32, or None. residual: as x, or None.
        frames: L, at least 1.
        alpha, alpha_first, alpha_final: of all frames, of the first and of the last in the order of processing.
        relu, reverse: of the output; time runs backwards.
    """
    n, c, t, height, width = y.shape
    length, chunks, rows = frames, -(-t // frames), n * height * width
    filled = t - (chunks - 1) * length  # frames of the last chunk in the order of processing
    # [L, J, N, H, W, C], in the order of time: the empty frames are the latest, or with `reverse` the earliest.
    state = y.new_empty((length, chunks, n, height, width, c), dtype=torch.float32)

    def frames_of(sequence: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the sequence and of the states that belong to it, [N,C,j,l,H,W] each."""
        states = state.permute(2, 5, 1, 0, 3, 4)
        begin = filled if reverse else 0
        whole = sequence[:, :, begin : begin + (chunks - 1) * length].unflatten(2, (chunks - 1, length))
        if reverse:
            yield whole, states[:, :, 1:]
            yield sequence[:, :, None, :filled], states[:, :, :1, length - filled :]
        else:
            yield whole, states[:, :, :-1]
            yield sequence[:, :, None, t - filled :], states[:, :, -1:, :filled]

    def slot(i: int) -> int:
        return length - 1 - i if reverse else i

    def at(i: int, begin: int, count: int) -> Tensor:
        """Frame i of chunks [begin, begin + count): [1, count * rows, C]."""
        begin = chunks - begin - count if reverse else begin
        return state[slot(i), begin : begin + count].view(1, count * rows, c)

    def as_rows(value: Tensor) -> Tensor:
        return value.permute(0, 2, 3, 1).to(torch.float32).reshape(1, rows, c)

    if x is None:
        state.zero_()
    else:
        for source, states in frames_of(x):
            states.copy_(source)

    powers = _powers_of(weight, alpha, length, reverse)
    factor = _Factor.exact(weight.T)
    head = at(0, 0, 1)
    if init == ADDED and first is not None:
        head += as_rows(first)
    if init == STATE and first is not None:
        factor.accumulate(head, as_rows(first), alpha_first, alpha_first)
    elif alpha_first != 1:
        head *= alpha_first
    if alpha != 1:
        at(0, 1, chunks - 1).mul_(alpha)
    for i in range(1, length):
        count = chunks if i < filled else chunks - 1
        factor.accumulate(at(i, 0, count), at(i - 1, 0, count), alpha, alpha)

    end = length - 1
    step = powers.step
    for j in range(1, chunks - 1):
        step.accumulate(at(end, j, 1), at(end, j - 1, 1))
    if filled == length:
        step.accumulate(at(end, chunks - 1, 1), at(end, chunks - 2, 1))

    def correct(begin: int, stop: int, count: int) -> None:
        """Frames [begin, stop) of chunks 1 .. count, from the ends of chunks 0 .. count - 1."""
        if begin >= stop or count == 0:
            return
        low, high = sorted((slot(begin), slot(stop - 1)))
        first_chunk = chunks - 1 - count if reverse else 1
        target = state[low : high + 1, first_chunk : first_chunk + count].view(high - low + 1, count * rows, c)
        powers.all.part(low, high + 1).accumulate(target, at(end, 0, count))

    correct(0, min(filled, end), chunks - 1)
    correct(filled, end, chunks - 2)

    final = at(filled - 1, chunks - 1, 1)
    if alpha_final != alpha:
        final *= alpha_final / alpha
    if last is not None:
        value = final
        if project:
            value = torch.zeros_like(final)
            factor.accumulate(value, final)
        last.copy_(value.view(n, height, width, c).permute(0, 3, 1, 2))

    if scale is not None and shift is not None:
        torch.addcmul(shift, state, scale, out=state)
    if residual is not None:
        for source, states in frames_of(residual):
            states += source
    for target, states in frames_of(y):
        target.copy_(states.relu_() if relu else states)


# Channels that one product in exact fp32 adds up. Products of many rows over 512 channels, added up in one go, had 2.4
# times the largest error of frames one after the other on an H200: the library splits its sums where rows are few.
LONGEST_RUN = 256


class _Factor:
    """Matrices [B, C, C] that rows of fp32 states are multiplied by, laid out for one product each."""

    def __init__(self, parts: list[Tensor], copies_of_high: int) -> None:
        self._parts, self._copies_of_high = parts, copies_of_high

    @staticmethod
    def exact(matrix: Tensor) -> _Factor:
        """Of a matrix [C,C] in the data's dtype. bf16: times high and low state; fp16: as :meth:`split`."""
        if matrix.dtype == torch.float32:
            return _Factor([matrix.contiguous().unsqueeze(0)], 0)
        if matrix.dtype == torch.float16:
            return _Factor.split(matrix.unsqueeze(0).float(), matrix.dtype)
        return _Factor([torch.cat([matrix, matrix]).unsqueeze(0)], 1)

    @staticmethod
    def split(matrices: Tensor, dtype: torch.dtype, low_part: bool = True) -> _Factor:
        """Of matrices [B,C,C] in fp64 or fp32, each as a sum of two numbers, for data of a dtype."""
        b, c, _ = matrices.shape
        if dtype == torch.float32:
            high = matrices.to(torch.float32)
            return _Factor([high, (matrices - high).to(torch.float32)] if low_part else [high], 0)
        # state (high, high, low) times (low, high, high); low times low is below fp32's last digit
        parts = matrices.new_empty((b, 3, c, c), dtype=torch.bfloat16)
        parts[:, 1:] = matrices.unsqueeze(1)
        torch.sub(matrices, parts[:, 1], out=parts[:, 0])
        return _Factor([parts.view(b, 3 * c, c)], 2)

    def part(self, begin: int, stop: int) -> _Factor:
        """Matrices [begin, stop), in the same memory."""
        return _Factor([part[begin:stop] for part in self._parts], self._copies_of_high)

    def accumulate(self, out: Tensor, rows: Tensor, beta: float = 1.0, alpha: float = 1.0) -> None:
        """out [B,R,C] = beta out + alpha rows [1,R,C] times each matrix; out and rows fp32, apart in memory."""
        if self._copies_of_high:
            _, count, c = rows.shape
            parts = rows.new_empty((count, self._copies_of_high + 1, c), dtype=torch.bfloat16)
            parts[:, :-1] = rows[0].unsqueeze(1)
            torch.sub(rows[0], parts[:, 0], out=parts[:, -1])
            rows = parts.view(1, count, -1)
        depth = rows.shape[-1]
        run = depth if self._copies_of_high else min(depth, LONGEST_RUN)
        for part in self._parts:
            for k in range(0, depth, run):
                factor = part[:, k : k + run]
                _multiply(out, rows[..., k : k + run].expand(part.shape[0], -1, -1), factor, beta, alpha)
                beta = 1.0


def _multiply(out: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """out = beta out + alpha a b, batches of matrices, with sums in out's fp32."""
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.device.type == "cpu":  # has no products of bf16 with sums in fp32; these are the same sums
        torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
    else:
        torch.ops.aten.baddbmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)


def _powers(matrix: Tensor, count: int, descending: bool) -> Tensor:
    """[count,C,C]: the first powers of a matrix, the highest first if ``descending``; log2(count) products."""
    powers = matrix.new_empty((count, *matrix.shape))

    def part(begin: int, stop: int) -> Tensor:  # exponents begin + 1 .. stop
        return powers[count - stop : count - begin] if descending else powers[begin:stop]

    part(0, 1)[0].copy_(matrix)
    known = 1
    while known < count:
        more = min(known, count - known)
        torch.matmul(part(0, more), part(known - 1, known)[0], out=part(known, known + more))
        known += more
    return powers


@dataclass(frozen=True)
class _Powers:
    """Those of Q that a scan multiplies by.

    Attributes:
        all: the first to the L-th, or with ``reverse`` the other way round. One use each: nothing adds up, so fp32
            powers do without their low part.
        step: the L-th.
    """

    all: _Factor
    step: _Factor


def _make_powers(weight: Tensor, alpha: float, length: int, reverse: bool) -> _Powers:
    powers = _powers(weight.T.to(torch.float64) * alpha, length, reverse)
    step = powers[0 if reverse else length - 1].unsqueeze(0)
    low_part = weight.dtype != torch.float32
    return _Powers(_Factor.split(powers, weight.dtype, low_part), _Factor.split(step, weight.dtype))


# ---- powers that are kept -----------------------------------------------------------------------------------------


class KeptPowers(Kept):
    """The powers of one weight in the forms that a scan multiplies by, for the chunks last used.

    L C^2 numbers of 6 bytes for 16-bit data and 4 for fp32; on the device, and for the stream, that made them.
    """

    @contextlib.contextmanager
    def offered(self, weight: Tensor) -> Iterator[None]:
        """Scans of this thread with ``weight`` [C,C] take their powers from here, or leave them here."""
        before = getattr(_offered, "powers", None)
        _offered.powers = (self, weight)
        try:
            yield
        finally:
            _offered.powers = before


_offered = threading.local()


def _offer(pointer: int) -> tuple[KeptPowers, Tensor] | None:
    """Who keeps the powers of the weight at an address, and that weight.

    Nobody where a CUDA graph is recorded: it would refer to memory that is freed when the weight changes, or fill what
    others read before it is replayed.
    """
    offered: tuple[KeptPowers, Tensor] | None = getattr(_offered, "powers", None)
    if offered is None or offered[1].data_ptr() != pointer:
        return None
    return None if offered[1].is_cuda and torch.cuda.is_current_stream_capturing() else offered


def _powers_of(weight: Tensor, alpha: float, length: int, reverse: bool) -> _Powers:
    def make() -> _Powers:
        return _make_powers(weight, alpha, length, reverse)

    offered = _offer(weight.data_ptr())
    if offered is None or offered[1].stride() != weight.stride():
        return make()
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    kept: _Powers = offered[0].get((offered[1],), (alpha, length, reverse, stream), make)
    return kept


def _powers_are_kept(weight: int) -> bool:
    return _offer(weight) is not None


_schema.library.define(SCHEMA)
_schema.library.define("recurrent_conv_powers_are_kept(int weight) -> bool")
_schema.library.impl("recurrent_conv_powers_are_kept", _powers_are_kept, "CompositeExplicitAutograd")
_schema.library.impl("recurrent_conv_chunked_", chunked_scan, "CompositeExplicitAutograd")
