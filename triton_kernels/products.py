"""Sums of matrix products that round no more than a library's, for every Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr):
    """``acc + a b``.

    Full fp32 does not use the matrix unit, and a dot that begins with ``acc`` is then one chain of additions over all
    tiles: a fresh sum per tile rounds as a library's does. The compiler would fold ``acc + dot`` back into that chain,
    but not an fma; the 1 costs nothing. The matrix unit begins with ``acc``.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), tl.full(acc.shape, 1.0, tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
