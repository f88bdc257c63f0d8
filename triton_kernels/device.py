"""Functions that kernels of several operators are made of: sums of products, activations, addresses in clips."""

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


@triton.jit
def sigmoid(a):
    """The logistic function of fp32 numbers."""
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def tanh(a):
    """The hyperbolic tangent of fp32 numbers."""
    # 1 - 2 / (1 + exp(2 a)) cancels near zero, where the odd polynomial is exact to fp32.
    size = tl.abs(a)
    square = a * a
    poly = (((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square) + 1.33314422036e-1
    near = (poly * square - 3.33332819422e-1) * square * a + a
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    return tl.where(size < 0.625, near, tl.where(a < 0.0, -far, far))


@triton.jit
def clip_offsets(n, c, t, position, width, s_n, s_c, s_t, s_h, s_w, FLAT: tl.constexpr):
    """Offsets [channels, positions] of one frame of [N,C,T,H,W]. FLAT: positions are s_w apart throughout."""
    if FLAT:
        plane = position.to(tl.int64) * s_w
    else:
        plane = (position // width).to(tl.int64) * s_h + (position % width).to(tl.int64) * s_w
    return n * s_n + t * s_t + c.to(tl.int64)[:, None] * s_c + plane[None, :]
