"""``recurrent_conv_frame``: one frame of a recurrent layer (or of a plain convolution) for inference on the CPU.

Convolution, recurrence, normalisation, residual and ReLU are one operator without a gradient, on weights that were
rearranged before: what :func:`rcu_ops.nn.fuse_for_inference` runs where one frame at a time comes by, and a call of the
matrix library per convolution costs more than its memory traffic. :mod:`rcu_ops.nn.frame_kernel` says where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcu_ops.ops import _schema
from rcu_ops.reference.recurrent_conv_frame import compute_dtype, recurrent_conv_frame

CHANNELS = 16
"""The number of output channels is a multiple of it."""


def _fake(
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
    size = [(frame.shape[2 + i] + 2 * geometry[4 + i] - geometry[i]) // geometry[2 + i] + 1 for i in (0, 1)]

    def empty(dtype: torch.dtype) -> Tensor:
        shape = (frame.shape[0], channels, *size)
        return torch.empty(shape, dtype=dtype, device=frame.device, memory_format=torch.channels_last)

    dtype = compute_dtype(panels)
    last = frame.new_empty(0, dtype=dtype) if state is None else empty(dtype)
    return empty(frame.dtype), last


_schema.define(
    "recurrent_conv_frame(Tensor frame, Tensor panels, Tensor? bias, Tensor? state, Tensor? scale, Tensor? shift, "
    "Tensor? residual, int channels, int[] geometry, bool mean, bool relu) -> (Tensor, Tensor)",
    fake=_fake,
    reference=recurrent_conv_frame,
)


def _flops(
    frame: tuple[int, ...],
    panels: tuple[int, ...],
    bias: object,
    state: object,
    *args: object,
    out_shape: tuple[tuple[int, ...], ...],
    **_: object,
) -> int:
    n, o, h, w = out_shape[0]
    rows = panels[1] if len(panels) == 3 else 2 * panels[1] - (0 if state is None else 2)
    return 2 * n * o * h * w * rows


_schema.flop_formula("recurrent_conv_frame", _flops)
OPERATOR = torch.ops.rcu_ops.recurrent_conv_frame
