"""Triton kernels of ``fast_gru``: three launches per step forward, three per step backward.

A column is a position of a step; columns are ordered by step, sample, position, and every matrix here is
[columns, features] with its features contiguous, so that a product reads both operands along its sum.

**What is fused.** U_x x and V_x x of all steps are the library's: two large products. What remains of a step is three
products that depend on one another, each followed by elementwise work on its result: with C = 2048 and R = 512 16.8
MFLOP per column, and passes of their own would move 37 C bytes per column in 16 bits. By arithmetic, at 790 TFLOP/s
and 4.3 TB/s, those bytes take 0.8 of the products' time, whatever the number of columns, and four launches more per
step. So where the matrix unit is used (16 bits, TF32) the passes are the products' epilogues: a step is three launches,
and no product is rounded before it is used. Exact fp32 runs on the FMA units, at 60 TFLOP/s: there the passes weigh an
eighth of the products, no more than the library gains by its own FMA loops and by splitting K when columns are few.
There the products are the library's and the same kernels read them instead (``FUSED``).

**Backward.** From the last step to the first, with g the gradient of the step's result: (1) U_o^T du of the step after
completes g and gives dc and dz; (2) q = V_o^T dc gives dr and a part of the next g; (3) W^T of dr and dz gives du. The
gradients of x and of the weights are library products over all steps at once. Gates are read as the forward pass saved
them.

The state, its gradient and all sums are fp32. There are no atomics, and every sum has a fixed order. Configurations are
a fixed table (:data:`TILES`), never tuned at run time; neither the number of columns nor of steps is a compile key.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcu_ops.triton_kernels.device import sigmoid, tanh
from rcu_ops.triton_kernels.launch import MULTIPROCESSORS, Launch, architecture, ceil_div, precision_of

# ---- kernels ------------------------------------------------------------------------------------------------------
#
# Matrices are [rows, features], contiguous; rows are the columns of one step, or of all. ALIGNED: every row of every
# matrix, and of the weight along its contiguous dimension, is 16-byte words.


@triton.jit
def _words(base, at, ALONG: tl.constexpr, ALIGNED: tl.constexpr):
    # base + at, telling the compiler that 16-byte words lie along dimension ALONG.
    SIZE: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
    pointers = base + at
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16, SIZE] if ALONG == 0 else [SIZE, 16])
    return pointers


@triton.jit
def _get(base, at, mask, ALIGNED: tl.constexpr):
    return tl.load(_words(base, at, 1, ALIGNED), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(base, at, value, mask, ALIGNED: tl.constexpr):
    tl.store(_words(base, at, 1, ALIGNED), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    a, weight, row, rows, out, OUTS: tl.constexpr, SUM: tl.constexpr, PITCH: tl.constexpr, WEIGHT_PITCH: tl.constexpr,
    ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # [BLOCK_M, BLOCK_N] of a weight^T in fp32, summed in slices of BLOCK_K in order: a [rows, SUM] with rows PITCH
    # apart; weight [OUTS, SUM] with rows WEIGHT_PITCH apart or, if not ALONG_SUM, [SUM, OUTS].
    inner = tl.arange(0, BLOCK_K)
    in_a = row.to(tl.int64)[:, None] * PITCH + inner[None, :]
    if ALONG_SUM:
        in_weight = inner[:, None] + out.to(tl.int64)[None, :] * WEIGHT_PITCH
    else:
        in_weight = inner.to(tl.int64)[:, None] * WEIGHT_PITCH + out[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, SUM, BLOCK_K):
        a_mask = (row < rows)[:, None]
        weight_mask = (out < OUTS)[None, :]
        if SUM % BLOCK_K != 0:
            a_mask = a_mask & (k + inner < SUM)[None, :]
            weight_mask = weight_mask & (k + inner < SUM)[:, None]
        left = tl.load(_words(a, in_a + k, 1, ALIGNED), mask=a_mask, other=0.0)
        if ALONG_SUM:
            pointers = _words(weight, in_weight + k, 0, ALIGNED)
        else:
            pointers = _words(weight, in_weight + tl.cast(k, tl.int64) * WEIGHT_PITCH, 1, ALIGNED)
        acc = tl.dot(left, tl.load(pointers, mask=weight_mask, other=0.0), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile(program, rows, OUTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # A program's rows, outputs and offsets in a matrix [rows, OUTS], and which of them exist. Neighbouring programs
    # share outputs, and with them their weights.
    blocks = (rows + BLOCK_M - 1) // BLOCK_M
    row = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    out = program // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None]
    if OUTS % BLOCK_N != 0:
        mask = mask & (out < OUTS)[None, :]
    else:
        mask = tl.broadcast_to(mask, (BLOCK_M, BLOCK_N))
    return row, out, row.to(tl.int64)[:, None] * OUTS + out[None, :], mask


@triton.jit(
    do_not_specialize=[
        "low", "weight", "product", "hidden", "rows",
    ]
)  # fmt: skip
def hidden_kernel(
    low, weight, product, hidden, rows,
    C: tl.constexpr, R: tl.constexpr, PITCH: tl.constexpr, ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``hidden = relu(hidden + low U_o^T)`` in place: hidden [rows, 2R] holds U_x x; low [rows, C].

    Program i owns a BLOCK_M x BLOCK_N tile of hidden and nobody else touches it. Bound by U_o from L2 where rows are
    few, by the matrix unit where they are many. Not FUSED: ``product`` [rows, 2R] is low U_o^T.
    """
    row, out, at, mask = _tile(tl.program_id(0), rows, 2 * R, BLOCK_M, BLOCK_N)
    if FUSED:
        value = _product(
            low, weight, row, rows, out, 2 * R, C, C, PITCH, ALONG_SUM, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        value = _get(product, at, mask, ALIGNED)
    value += _get(hidden, at, mask, ALIGNED)
    _put(hidden, at, tl.where(value < 0.0, 0.0, value), mask, ALIGNED)  # unlike a maximum, keeps NaN


@triton.jit(
    do_not_specialize=[
        "hidden", "weight", "weight_gate", "product", "state", "r", "z", "gated", "rows",
    ]
)  # fmt: skip
def gates_kernel(
    hidden, weight, weight_gate, product, state, r, z, gated, rows,
    C: tl.constexpr, R: tl.constexpr, PITCH: tl.constexpr, ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``r = sigmoid(r' W_r^T); z = sigmoid(z' W_z^T); gated = r state``; all results [rows, C], r may be None.

    The programs of the first half own tiles of r and gated, those of the second tiles of z. hidden [rows, 2R], weight
    [2,C,R] with weight_gate between the two, state [rows, C]. Not FUSED: ``product`` [2, rows, C].
    """
    programs = tl.num_programs(0) // 2
    second = tl.program_id(0) >= programs
    row, out, at, mask = _tile(tl.program_id(0) % programs, rows, C, BLOCK_M, BLOCK_N)
    if FUSED:
        acc = _product(
            hidden + tl.where(second, R, 0), weight + tl.where(second, tl.cast(weight_gate, tl.int64), 0),
            row, rows, out, C, R, 2 * R, PITCH, ALONG_SUM, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _get(product + tl.where(second, tl.cast(rows, tl.int64) * C, 0), at, mask, ALIGNED)
    gate = sigmoid(acc)
    if second:
        _put(z, at, gate, mask, ALIGNED)
    else:
        if r is not None:
            _put(r, at, gate, mask, ALIGNED)
        _put(gated, at, gate * _get(state, at, mask, ALIGNED), mask, ALIGNED)


@triton.jit(
    do_not_specialize=[
        "gated", "weight", "product", "candidate", "z", "state", "next_state", "low", "rows",
    ]
)  # fmt: skip
def output_kernel(
    gated, weight, product, candidate, z, state, next_state, low, rows,
    C: tl.constexpr, PITCH: tl.constexpr, ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``candidate = tanh(candidate + gated V_o^T)``, then the new state; candidate [rows, C] holds V_x x.

    ``(1 - z) state + z candidate`` goes to next_state (fp32; may be state) and to low, the operand of the next products
    (None in fp32, where next_state is it). Program i owns a tile of all of them. Not FUSED: ``product`` [rows, C] is
    gated V_o^T.
    """
    row, out, at, mask = _tile(tl.program_id(0), rows, C, BLOCK_M, BLOCK_N)
    if FUSED:
        acc = _product(
            gated, weight, row, rows, out, C, C, C, PITCH, ALONG_SUM, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        acc = _get(product, at, mask, ALIGNED)
    new = tanh(acc + _get(candidate, at, mask, ALIGNED))
    _put(candidate, at, new, mask, ALIGNED)
    update = _get(z, at, mask, ALIGNED)
    value = (1.0 - update) * _get(state, at, mask, ALIGNED) + update * new
    _put(next_state, at, value, mask, ALIGNED)
    if low is not None:
        _put(low, at, value, mask, ALIGNED)


@triton.jit(
    do_not_specialize=[
        "du", "weight", "product", "carry", "grad", "z", "candidate", "before", "dc", "dz", "first", "rows",
    ]
)  # fmt: skip
def output_gradient_kernel(
    du, weight, product, carry, grad, z, candidate, before, dc, dz, first, rows,
    C: tl.constexpr, R: tl.constexpr, PITCH: tl.constexpr, ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``g = carry + du U_o + grad``, the gradient of a step's result, and from it

        dc = g z (1 - candidate^2)      dz = g (candidate - before) z (1 - z)      carry = g (1 - z)

    all [rows, C]; carry is fp32 and in place, grad may be None. du [rows, 2R] is of the step after, and None (product
    too) after the last. Where ``first`` is given g goes there and nothing else is written: it is the gradient of the
    first state. Not FUSED: ``product`` [rows, C] is du U_o.
    """
    row, out, at, mask = _tile(tl.program_id(0), rows, C, BLOCK_M, BLOCK_N)
    g = _get(carry, at, mask, ALIGNED)
    if FUSED:
        if du is not None:
            g += _product(
                du, weight, row, rows, out, C, 2 * R, 2 * R, PITCH, ALONG_SUM, ALIGNED, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        if product is not None:
            g += _get(product, at, mask, ALIGNED)
    if grad is not None:
        g += _get(grad, at, mask, ALIGNED)
    if first is not None:
        _put(first, at, g, mask, ALIGNED)
    else:
        update = _get(z, at, mask, ALIGNED)
        new = _get(candidate, at, mask, ALIGNED)
        old = _get(before, at, mask, ALIGNED)
        _put(dc, at, g * update * (1.0 - new * new), mask, ALIGNED)
        _put(dz, at, g * (new - old) * update * (1.0 - update), mask, ALIGNED)
        _put(carry, at, g * (1.0 - update), mask, ALIGNED)


@triton.jit(
    do_not_specialize=[
        "dc", "weight", "product", "carry", "r", "before", "dr", "gated", "rows",
    ]
)  # fmt: skip
def gate_gradient_kernel(
    dc, weight, product, carry, r, before, dr, gated, rows,
    C: tl.constexpr, PITCH: tl.constexpr, ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``q = dc V_o; dr = q before r (1 - r); gated = r before; carry += q r``, all [rows, C]; carry is fp32, in place.

    Not FUSED: ``product`` [rows, C] is q.
    """
    row, out, at, mask = _tile(tl.program_id(0), rows, C, BLOCK_M, BLOCK_N)
    if FUSED:
        q = _product(
            dc, weight, row, rows, out, C, C, C, PITCH, ALONG_SUM, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        q = _get(product, at, mask, ALIGNED)
    gate = _get(r, at, mask, ALIGNED)
    old = _get(before, at, mask, ALIGNED)
    _put(dr, at, q * old * gate * (1.0 - gate), mask, ALIGNED)
    _put(gated, at, gate * old, mask, ALIGNED)
    _put(carry, at, _get(carry, at, mask, ALIGNED) + q * gate, mask, ALIGNED)


@triton.jit(
    do_not_specialize=[
        "dr", "dz", "weight", "weight_gate", "product", "hidden", "du", "rows",
    ]
)  # fmt: skip
def hidden_gradient_kernel(
    dr, dz, weight, weight_gate, product, hidden, du, rows,
    C: tl.constexpr, R: tl.constexpr, PITCH: tl.constexpr, ALONG_SUM: tl.constexpr, ALIGNED: tl.constexpr,
    FUSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``du = [dr W_r, dz W_z]``, 0 where hidden <= 0; dr [rows, C], the same of z dz elements on; hidden, du
    [rows, 2R].

    The programs of the first half own tiles of the first R features, the others of the second. Not FUSED: ``product``
    [2, rows, R].
    """
    programs = tl.num_programs(0) // 2
    second = tl.program_id(0) >= programs
    row, out, within, mask = _tile(tl.program_id(0) % programs, rows, R, BLOCK_M, BLOCK_N)
    at = row.to(tl.int64)[:, None] * (2 * R) + (tl.where(second, R, 0) + out)[None, :]
    if FUSED:
        value = _product(
            dr + tl.where(second, tl.cast(dz, tl.int64), 0),
            weight + tl.where(second, tl.cast(weight_gate, tl.int64), 0),
            row, rows, out, R, C, C, PITCH, ALONG_SUM, ALIGNED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        value = _get(product + tl.where(second, tl.cast(rows, tl.int64) * R, 0), within, mask, ALIGNED)
    off = _get(hidden, at, mask, ALIGNED) <= 0.0  # not where it is NaN
    _put(du, at, tl.where(off, 0.0, value), mask, ALIGNED)


# ---- configurations and launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a product [rows, outputs] is cut: a program's block, the slice of the sum loaded at a time, and how many."""

    rows: int
    outputs: int
    part: int
    warps: int
    stages: int


#: By precision, the largest first. A block of m rows and n outputs reads (m + n) words per step of its sum, and what a
#: multiprocessor can read from L2 bounds products of few rows, so the largest blocks that still occupy nearly every
#: multiprocessor are taken, and none with twice the rows there are. Under 99 KB of shared memory, to run everywhere.
#: "ieee" has no products, only elementwise passes.
TILES: dict[str, tuple[Tile, ...]] = {
    "half": (
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 32, 128, 4, 3),
        Tile(64, 16, 128, 4, 4),
        Tile(32, 16, 128, 4, 4),
        Tile(16, 16, 128, 4, 4),
    ),
    "tf32": (
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 4),
        Tile(64, 32, 64, 4, 3),
        Tile(64, 16, 64, 4, 4),
        Tile(32, 16, 64, 4, 4),
        Tile(16, 16, 64, 4, 4),
    ),
    "ieee": (Tile(16, 64, 16, 4, 1),),
}


#: The largest block without aligned words: every number is addressed on its own there, and larger ones spill.
SCATTERED = 64 * 32


@functools.cache
def choose(precision: str, rows: int, width: int, halves: int, arch: int, aligned: bool) -> Tile:
    """The tile for ``halves`` matrices [rows, width]."""
    table = [tile for tile in TILES[precision] if aligned or tile.rows * tile.outputs <= SCATTERED]
    choice = [tile for tile in table if tile.rows < 2 * rows] or [table[-1]]
    programs = [halves * ceil_div(rows, t.rows) * ceil_div(width, t.outputs) for t in choice]
    enough = 0.9 * MULTIPROCESSORS[arch]
    return next((t for t, count in zip(choice, programs, strict=True) if count >= enough), choice[-1])


@dataclass(frozen=True)
class Product:
    """A library product ``out = a b``, or added to out, in the order of the launches."""

    a: Tensor
    b: Tensor
    out: Tensor
    added: bool = False

    def run(self) -> None:
        """Enqueue it on the current stream."""
        if self.added:
            torch.addmm(self.out, self.a, self.b, out=self.out)
        else:
            torch.mm(self.a, self.b, out=self.out)


@dataclass(frozen=True)
class OuterProduct:
    """A weight's gradient: ``out = a^T b`` by the library, a sum over the columns of all steps.

    A library's fp32 sum may be one chain of additions, whose rounding error grows with its length; PyTorch's own
    gradient adds step after step. So small fp32 results are made in pieces of no more columns than a step's and the
    pieces added: by emulation over 40 draws, with steps of 30 to 45 columns, one chain of all has 1.6 times the rms
    error of PyTorch's and up to 5 times its maximum; pieces of 16 have 0.75 to 0.85 times. Large results would cost as
    much to add as to make.

    Attributes:
        step: columns of a step.
    """

    a: Tensor
    b: Tensor
    out: Tensor
    step: int

    def run(self) -> None:
        """Enqueue it on the current stream."""
        a, b, out = self.a, self.b, self.out
        piece, small = 16 if self.step < 128 else 64, 1 << 16
        whole = a.shape[0] // piece * piece
        if a.dtype != torch.float32 or out.numel() > small or whole <= piece:
            torch.mm(a.T, b, out=out)
            return
        at_once = min((1 << 22) // out.numel(), 1 << 15) * piece
        for begin in range(0, whole, at_once):
            some = slice(begin, min(begin + at_once, whole))
            left, right = (value[some].unflatten(0, (-1, piece)) for value in (a, b))
            products = torch.bmm(left.mT, right)
            if begin == 0:
                torch.sum(products, 0, out=out)
            else:
                out += products.sum(0)
        if whole < a.shape[0]:
            torch.addmm(out, a[whole:].T, b[whole:], out=out)


def _aligned(*values: Any) -> bool:
    return all(v.data_ptr() % 16 == 0 for v in values if isinstance(v, Tensor))


def _in_words(size: int, *counts: int) -> bool:
    """Whether so many numbers of ``size`` bytes are whole 16-byte words."""
    return all(count * size % 16 == 0 for count in counts)


def _matrix(weight: Tensor) -> Tensor:
    """The weight with one of its last two dimensions contiguous."""
    return weight if 1 in weight.stride()[-2:] else weight.contiguous()


def _rows(sequence: Tensor) -> Tensor:
    """[columns, C] of a sequence [N,K,C,L,H,W]: a view where its memory is one, else a copy."""
    return sequence.permute(1, 0, 3, 4, 5, 2).reshape(-1, sequence.shape[2]).contiguous()


def _sequence(rows: Tensor, like: Tensor) -> Tensor:
    """Rows of ``like``'s clips as a sequence [N,K,C,L,H,W]."""
    n, k, c, *positions = like.shape
    return rows.view(k, n, *positions, c).permute(1, 0, 5, 2, 3, 4)


def _empty_sequence(x: Tensor) -> Tensor:
    n, k, c, *positions = x.shape
    return x.new_empty(n, k, *positions, c).movedim(-1, 2) if x.stride(2) == 1 else x.new_empty(x.shape)


def _empty_state(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, _, c, *positions = x.shape
    if x.stride(2) == 1:
        return x.new_empty((n, *positions, c), dtype=dtype).movedim(-1, 1)
    return x.new_empty((n, c, *positions), dtype=dtype)


@dataclass(frozen=True)
class _Call:
    """What the launches of a call share. ``spare``: memory for the library's products where the kernels make none."""

    c: int
    r: int
    arch: int
    precision: str
    uo: Tensor
    w: Tensor
    vo: Tensor
    spare: Tensor | None

    @staticmethod
    def of(x: Tensor, uo: Tensor, w: Tensor, vo: Tensor, rows: int, arch: int | None) -> _Call:
        c, r, precision = x.shape[2], uo.shape[0] // 2, precision_of(x.dtype)
        spare = x.new_empty(rows * 2 * max(r, c)) if precision == "ieee" else None
        arch = architecture(x.device) if arch is None else arch
        return _Call(c, r, arch, precision, _matrix(uo), _matrix(w), _matrix(vo), spare)

    def part(self, *shape: int) -> Tensor | None:
        """The spare memory in this shape."""
        return None if self.spare is None else self.spare[: math.prod(shape)].view(shape)

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None) -> Iterator[Product]:
        """The library's product, where the kernels make none."""
        if out is not None:
            yield Product(a, b, out)

    def launch(
        self, kernel: Any, rows: int, width: int, halves: int, arguments: tuple[Any, ...], weight: Tensor,
        transposed: bool,
    ) -> Launch:  # fmt: skip
        """A kernel whose ``halves`` matrices of ``width`` outputs are cut; ``transposed``: sums run over outputs."""
        *_, row, column = weight.stride()
        pitch = row if column == 1 else column
        aligned = _in_words(weight.element_size(), self.c, self.r, pitch, self.w.stride(0)) and _aligned(*arguments)
        tile = choose(self.precision, rows, width, halves, self.arch, aligned)
        constants = {
            "PITCH": pitch,
            "ALONG_SUM": (column == 1) != transposed,
            "ALIGNED": aligned,
            "FUSED": self.precision != "ieee",
            "PRECISION": "tf32" if self.precision == "tf32" else "ieee",
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.outputs,
            "BLOCK_K": tile.part,
            **{name: value for name, value in (("C", self.c), ("R", self.r)) if name in kernel.arg_names},
        }
        programs = halves * ceil_div(rows, tile.rows) * ceil_div(width, tile.outputs)
        return Launch(kernel, (programs,), (*arguments, rows), constants, tile.warps, tile.stages)

    def gates(
        self, low: Tensor, state: Tensor, hidden: Tensor, r: Tensor | None, z: Tensor, gated: Tensor
    ) -> Iterator[Launch | Product]:
        """hidden (U_x x) to itself, r, z and gated."""
        m, half = low.shape[0], self.r
        product = self.part(m, 2 * half)
        yield from self.mm(low, self.uo.T, product)
        yield self.launch(hidden_kernel, m, 2 * half, 1, (low, self.uo, product, hidden), self.uo, False)
        product = self.part(2, m, self.c)
        for i in range(2):
            rows = hidden[:, i * half : (i + 1) * half]
            yield from self.mm(rows, self.w[i].T, None if product is None else product[i])
        arguments = (hidden, self.w, self.w.stride(0), product, state, r, z, gated)
        yield self.launch(gates_kernel, m, self.c, 2, arguments, self.w, False)

    def output(
        self, gated: Tensor, candidate: Tensor, z: Tensor, state: Tensor, next_state: Tensor, low: Tensor | None
    ) -> Iterator[Launch | Product]:
        """candidate (V_x x) to itself, and the next state."""
        product = self.part(*gated.shape)
        yield from self.mm(gated, self.vo.T, product)
        arguments = (gated, self.vo, product, candidate, z, state, next_state, low)
        yield self.launch(output_kernel, gated.shape[0], self.c, 1, arguments, self.vo, False)

    def output_gradient(
        self, du: Tensor | None, carry: Tensor, grad: Tensor | None, saved: tuple[Tensor | None, ...],
        first: Tensor | None = None,
    ) -> Iterator[Launch | Product]:  # fmt: skip
        """``saved``: z, candidate, before, dc, dz."""
        product = None if du is None else self.part(*carry.shape)
        if du is not None:
            yield from self.mm(du, self.uo, product)
        arguments = (du, self.uo, product, carry, grad, *saved, first)
        yield self.launch(output_gradient_kernel, carry.shape[0], self.c, 1, arguments, self.uo, True)

    def gate_gradients(
        self, d: Tensor, carry: Tensor, r: Tensor, before: Tensor, gated: Tensor, hidden: Tensor, du: Tensor
    ) -> Iterator[Launch | Product]:
        """``d`` [3, columns, C]: dr and dz before dc."""
        m, half = carry.shape[0], self.r
        dr, dc = d[0], d[2]
        product = self.part(m, self.c)
        yield from self.mm(dc, self.vo, product)
        arguments = (dc, self.vo, product, carry, r, before, dr, gated)
        yield self.launch(gate_gradient_kernel, m, self.c, 1, arguments, self.vo, True)
        product = self.part(2, m, half)
        for i in range(2):
            yield from self.mm(d[i], self.w[i], None if product is None else product[i])
        arguments = (dr, d.stride(0), self.w, self.w.stride(0), product, hidden, du)
        yield self.launch(hidden_gradient_kernel, m, half, 2, arguments, self.w, True)


@dataclass
class Planned:
    """Results to be filled, the work that fills them in order, and what is copied to the caller's layout afterwards."""

    results: tuple[Tensor, ...]
    work: list[Launch | Product | OuterProduct]
    copies: list[tuple[Tensor, Tensor]]

    def launches(self) -> list[Launch]:
        """The kernels among the work."""
        return [step for step in self.work if isinstance(step, Launch)]

    def run(self) -> tuple[Tensor, ...]:
        """Enqueue everything on the current stream."""
        device = self.results[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for step in self.work:
                step.run()
            for to, source in self.copies:
                to.copy_(source)
        return self.results


def plan_forward(
    x: Tensor, ux: Tensor, uo: Tensor, w: Tensor, vx: Tensor, vo: Tensor, o0: Tensor | None, save: bool,
    arch: int | None = None,
) -> Planned:  # fmt: skip
    """``rcu_ops::fast_gru``: (o, o_n, hidden, gates)."""
    (n, clips, c), first = x.shape[:3], 0 if o0 is not None else 1
    m, steps, r2 = n * x.shape[3:].numel(), clips - first, ux.shape[0]
    o, o_n = _empty_sequence(x), _empty_state(x, torch.float32)
    start = x[:, 0] if o0 is None else o0
    hidden = x.new_empty(steps * m * r2 if save else 0)
    gates = x.new_empty(3 * steps * m * c if save else 0)
    results = o, o_n, hidden, gates
    if m == 0 or steps == 0:
        return Planned(results, [], [(o[:, 0], start), (o_n, start)] if first else [])
    call, gated = _Call.of(x, uo, w, vo, m, arch), x.new_empty(m, c)
    inputs = _rows(x[:, first:])
    hiddens = hidden.view(-1, r2) if save else x.new_empty(steps * m, r2)
    r, z, candidates = gates.view(3, -1, c) if save else (None, x.new_empty(m, c), x.new_empty(steps * m, c))
    work: list[Launch | Product | OuterProduct] = [Product(inputs, ux.T, hiddens), Product(inputs, vx.T, candidates)]
    # The states in x's dtype, the first included: operands of the products, and o.
    low, one_type = x.new_empty(steps + 1, m, c), x.dtype == torch.float32
    _sequence(low[0], x[:, :1]).copy_(start.unsqueeze(1))
    state = low[0] if one_type else _rows(start.unsqueeze(1)).to(torch.float32, copy=True)
    for k in range(steps):
        at = slice(k * m, (k + 1) * m)
        z_k, later = z[at] if save else z, low[k + 1] if one_type else state
        work += call.gates(low[k], state, hiddens[at], None if r is None else r[at], z_k, gated)
        work += call.output(gated, candidates[at], z_k, state, later, None if one_type else low[k + 1])
        state = later
    every = _sequence(low if first else low[1:], x)
    return Planned(results, work, [(o, every), (o_n, _sequence(state, x[:, :1]).squeeze(1))])


def plan_backward(
    grad_o: Tensor | None, grad_o_n: Tensor | None, x: Tensor, ux: Tensor, uo: Tensor, w: Tensor, vx: Tensor,
    vo: Tensor, o0: Tensor | None, o: Tensor, hidden: Tensor, gates: Tensor, need_x: bool, need_weights: bool,
    arch: int | None = None,
) -> Planned:  # fmt: skip
    """``rcu_ops::fast_gru_backward``: (dx, the five weights' gradients, do0)."""
    (n, clips, c), first = x.shape[:3], 0 if o0 is not None else 1
    m, steps, r = n * x.shape[3:].numel(), clips - first, ux.shape[0] // 2
    dx = _empty_sequence(x) if need_x else x.new_empty(0)
    dweights = [x.new_empty(weight.shape if need_weights else 0) for weight in (ux, uo, w, vx, vo)]
    do0 = x.new_empty(0) if o0 is None else _empty_state(x, o0.dtype)
    if m * steps == 0:
        for gradient in dweights:
            gradient.zero_()
    results = dx, *dweights, do0
    if m == 0:
        return Planned(results, [], [])
    call = _Call.of(x, uo, w, vo, m, arch)
    work: list[Launch | Product | OuterProduct] = []
    copies: list[tuple[Tensor, Tensor]] = []
    inputs = _rows(x[:, first:])
    before = _rows(o[:, :steps]) if o0 is None else torch.cat([_rows(o0.unsqueeze(1)).to(x.dtype), _rows(o[:, :-1])])
    hidden, (r_all, z_all, candidates) = hidden.view(-1, 2 * r), gates.view(3, -1, c)
    gated = torch.empty_like(before)
    carry = torch.zeros(m, c, dtype=torch.float32, device=x.device)
    if grad_o_n is not None:
        _sequence(carry, x[:, :1]).copy_(grad_o_n.unsqueeze(1))
    grads = [None] * clips if grad_o is None else list(_rows(grad_o).view(clips, m, c))
    d, du_all, du = x.new_empty(3, steps * m, c), x.new_empty(steps * m, 2 * r), None
    for k in reversed(range(steps)):
        at = slice(k * m, (k + 1) * m)
        _, dz, dc = d[:, at]
        work += call.output_gradient(du, carry, grads[first + k], (z_all[at], candidates[at], before[at], dc, dz))
        du = du_all[at]
        work += call.gate_gradients(d[:, at], carry, r_all[at], before[at], gated[at], hidden[at], du)
    if o0 is not None or need_x:
        start = torch.empty(m, c, dtype=x.dtype if o0 is None else o0.dtype, device=x.device)
        work += call.output_gradient(du, carry, None if o0 is not None else grads[0], (None,) * 5, start)
        copies.append((dx[:, :1] if o0 is None else do0.unsqueeze(1), _sequence(start, x[:, :1])))
    if steps == 0:
        return Planned(results, work, copies)
    dr, dz, dc = d
    if need_weights:
        dux, duo, dw, dvx, dvo = dweights
        pairs = [(du_all, inputs, dux), (du_all, before, duo), (dc, inputs, dvx), (dc, gated, dvo)]
        pairs += [(d[half], hidden[:, half * r : (half + 1) * r], dw[half]) for half in range(2)]
        work += [OuterProduct(a, b, out, m) for a, b, out in pairs]
    if need_x:  # dr is free now
        work += [Product(du_all, ux, dr), Product(dc, vx, dr, added=True)]
        copies.append((dx[:, first:], _sequence(dr, x[:, first:])))
    return Planned(results, work, copies)


def describe(x: Tensor, uo: Tensor, *_: Any) -> str:
    """How the steps of x would be cut, in words."""
    m, c, r = x.shape[0] * x.shape[3:].numel(), x.shape[2], uo.shape[0] // 2
    precision, arch = precision_of(x.dtype), architecture(x.device)
    if precision == "ieee":
        return (
            f"{m} columns per step: the library's products and 3 elementwise launches (exact fp32 has no matrix unit)"
        )
    aligned = _in_words(x.element_size(), c, r)
    tiles = [choose(precision, m, width, halves, arch, aligned) for width, halves in ((2 * r, 1), (c, 2), (c, 1))]
    cut = ", ".join(f"{t.rows}x{t.outputs}x{t.part}" for t in tiles)
    return f"{m} columns per step: 3 launches, products with fused epilogues in tiles of {cut}"


# ---- the operators ------------------------------------------------------------------------------------------------


def forward(*args: Any) -> tuple[Tensor, ...]:
    """``rcu_ops::fast_gru``."""
    return plan_forward(*args).run()


def backward(*args: Any) -> tuple[Tensor, ...]:
    """``rcu_ops::fast_gru_backward``."""
    return plan_backward(*args).run()
