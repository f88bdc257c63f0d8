"""One frame of a recurrent convolutional layer in plain PyTorch: what the kernel is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32
"""Output channels of a panel of weights."""


def pack_panels(weight: Tensor, weight_hh: Tensor | None = None) -> Tensor:
    """The weights as the kernel reads them: [ceil(O/32), kh*kw*C (+ O), 32], fp32 (fp64 for fp64).

    Args:
        weight: [O,C,kh,kw]. weight_hh: [O,O] (out, in) or None. Rows are ordered by kh, kw and C; then those of
            ``weight_hh``. Output channels beyond O are zeros.
    """
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2)
    if weight_hh is not None:
        rows = torch.cat([rows, weight_hh.t()])
    if rows.dtype != torch.float64:
        rows = rows.float()
    rows = F.pad(rows, (0, -rows.shape[1] % PANEL))
    return rows.unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()


def pack_pairs(weight: Tensor, weight_hh: Tensor | None = None) -> Tensor:
    """bf16 weights for kernels that multiply pairs of bf16: [ceil(O/32), K/2, 32, 2], two rows interleaved.

    Args:
        weight: [O,C,kh,kw]; C is padded to an even number with zeros. weight_hh: [O,O] (out, in), O even, or None.
            Where its diagonal lies in [1/2, 2] it is stored less 1 (exact in bf16), and which ones these are is in the
            first half of one more pair of rows: the kernel adds that part of the state in fp32.
    """
    weight = F.pad(weight, (0, 0, 0, 0, 0, weight.shape[1] % 2))
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2)
    if weight_hh is not None:
        diagonal = weight_hh.diagonal()
        ones = ((diagonal >= 0.5) & (diagonal <= 2)).to(weight_hh.dtype)
        rows = torch.cat([rows, (weight_hh - torch.diag(ones)).t(), ones[None], torch.zeros_like(ones)[None]])
    rows = F.pad(rows, (0, -rows.shape[1] % PANEL))
    return rows.unflatten(1, (-1, PANEL)).unflatten(0, (-1, 2)).permute(2, 0, 3, 1).contiguous()


def _rows(panels: Tensor, recurrent: bool, channels: int) -> Tensor:
    """What was packed: [K,O]."""
    if panels.dim() == 3:
        return panels.transpose(0, 1).flatten(1)[:, :channels]
    rows = panels.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:, :channels]
    rows = rows.to(compute_dtype(panels))
    if not recurrent:
        return rows
    return torch.cat([rows[: -channels - 2], rows[-channels - 2 : -2] + torch.diag(rows[-2])])


def compute_dtype(panels: Tensor) -> torch.dtype:
    """Of the products' sums, the state and what follows: that of the panels, or fp32 for pairs of bf16."""
    return torch.float32 if panels.dtype == torch.bfloat16 else panels.dtype


def recurrent_conv_frame(
    frame: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    channels: int,
    geometry: list[int],
    mean: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """``v = alpha (conv(frame) + bias + W state)``, ``y = act(scale v + shift + residual)``; returns ``(y, v)``.

    Args:
        frame: [N,C,H,W]. panels: from :func:`pack_panels` or, in bf16 alone, :func:`pack_pairs`; with ``state`` they
            hold W too.
        bias, scale, shift: [O] in :func:`compute_dtype`, or None. state: [N,O,H',W'] in it, or None: there is no W,
            alpha = 1, and an empty tensor is returned for v.
        residual: [N,O,H',W'] in the frame's dtype, or None.
        channels: O. geometry: kernel, stride and padding, two numbers each. mean: alpha is 1/2 instead of 1.
    """
    kh, kw, *place = geometry
    c = frame.shape[1]
    rows = _rows(panels, state is not None, channels)
    convolution = rows if state is None else rows[:-channels]
    weight = convolution.unflatten(0, (kh, kw, -1))[:, :, :c].permute(3, 2, 0, 1)
    value = F.conv2d(frame.to(rows.dtype), weight, bias, stride=place[:2], padding=place[2:])
    last = value.new_empty(0)
    if state is not None:
        value = value + torch.einsum("io,nihw->nohw", rows[-channels:], state)
        value = last = value * 0.5 if mean else value
    if scale is not None and shift is not None:
        value = value * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        value = value + residual
    value = F.relu(value) if relu else value
    memory_format = torch.channels_last
    y = value.to(frame.dtype).contiguous(memory_format=memory_format)
    return y, last if state is None else last.contiguous(memory_format=memory_format)
