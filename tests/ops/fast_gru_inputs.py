"""Arguments of fast_gru, for tests and for what runs where there is no pytest (tests/gpu/small.py)."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("x", "weight_ux", "weight_uo", "weight_w", "weight_vx", "weight_vo", "o0")


def inputs(
    shape: tuple[int, ...], hidden: int, dtype: torch.dtype = torch.float32, with_o0: bool = True
) -> list[Tensor | None]:
    """x, the five weights, o0.

    Channel 0 of x is 1 or -1 and decides, for every hidden unit and position, whether the ReLU is open: no rounding
    error can flip one, and gradients of different precision can be compared.
    """
    n, _, c, *rest = shape
    sizes = (shape, (2 * hidden, c), (2 * hidden, c), (2, c, hidden), (c, c), (c, c))
    scales = (1, 0.5 * c**-0.5, 0.5 * c**-0.5, 0.5 * hidden**-0.5, c**-0.5, c**-0.5)
    tensors = [torch.randn(size) * scale for size, scale in zip(sizes, scales, strict=True)]
    tensors[0][:, :, 0] = torch.randn(tensors[0][:, :, 0].shape).sign()
    tensors[1][:, 0] = 4 * torch.randn(2 * hidden).sign()
    o0 = torch.randn(n, c, *rest) if with_o0 else None
    return [v if v is None else v.to(dtype) for v in (*tensors, o0)]
