"""The data path of a Squeeze and Recursion Temporal Gate, in plain PyTorch: what surrounds its LSTM and its gate.

"Learn to Cycle: Time-Consistent Feature Discovery for Action Recognition", section 3: activations are pooled per frame,
an LSTM runs over the pooled vectors, and what it returns is fused with the activations where the gate is open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcu_ops.reference.recurrent_conv import state_dtype_of, without_autocast


@without_autocast
def srtg_squeeze(x: Tensor, *, state_dtype: torch.dtype | None = None) -> Tensor:
    """Spatial mean per frame: x [N,C,T,H,W] -> [N,T,C] in fp32 (fp64 for fp64)."""
    return x.mean((3, 4), dtype=state_dtype or state_dtype_of(x.dtype)).transpose(1, 2)


@without_autocast
def srtg_fuse(
    x: Tensor, h: Tensor, gate: Tensor | None = None, *, fusion: str = "mul", state_dtype: torch.dtype | None = None
) -> Tensor:
    """``y = x h`` ("mul") or ``x + h`` ("add"), h broadcast over H and W, where the gate is open; ``y = x`` elsewhere.

    Args:
        x: [N,C,T,H,W]. h: [N,T,C]. gate: [N] bool, or None: open everywhere.
        fusion: "mul" or "add".
        state_dtype: of the arithmetic; default fp32 (fp64 for fp64).

    Returns:
        y like x.
    """
    state_dtype = state_dtype or state_dtype_of(x.dtype)
    per_frame = h.to(state_dtype).transpose(1, 2)[..., None, None]
    if gate is not None:
        per_frame = torch.where(gate[:, None, None, None, None], per_frame, 1.0 if fusion == "mul" else 0.0)
    wide = x.to(state_dtype)
    return (wide * per_frame if fusion == "mul" else wide + per_frame).to(x.dtype)


@without_autocast
def srtg_fuse_backward(grad: Tensor, x: Tensor, h: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`srtg_fuse` with "mul": ``dx = grad h``, ``dh = sum_hw grad x``; closed: grad and 0."""
    state_dtype = state_dtype_of(x.dtype)
    dh = (grad.to(state_dtype) * x.to(state_dtype)).sum((3, 4)).transpose(1, 2)
    if gate is not None:
        dh = torch.where(gate[:, None, None], dh, 0.0)
    return srtg_fuse(grad, h, gate).to(x.dtype), dh.to(h.dtype)
