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
        frame: [N,C,H,W]. panels: from :func:`pack_panels`; with ``state`` they hold W too.
        bias, scale, shift: [O] in the panels' dtype, or None. state: [N,O,H',W'] in the panels' dtype, or None: there
            is no W, alpha = 1, and an empty tensor is returned for v.
        residual: [N,O,H',W'] in the frame's dtype, or None.
        channels: O. geometry: kernel, stride and padding, two numbers each. mean: alpha is 1/2 instead of 1.
    """
    kh, kw, *place = geometry
    c = frame.shape[1]
    rows = panels.transpose(0, 1).flatten(1)[:, :channels]
    weight = rows[: kh * kw * c].unflatten(0, (kh, kw, c)).permute(3, 2, 0, 1)
    value = F.conv2d(frame.to(panels.dtype), weight, bias, stride=place[:2], padding=place[2:])
    last = value.new_empty(0)
    if state is not None:
        value = value + torch.einsum("io,nihw->nohw", rows[kh * kw * c :], state)
        value = last = value * 0.5 if mean else value
    if scale is not None and shift is not None:
        value = value * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        value = value + residual
    value = F.relu(value) if relu else value
    memory_format = torch.channels_last
    y = value.to(frame.dtype).contiguous(memory_format=memory_format)
    return y, last if state is None else last.contiguous(memory_format=memory_format)
