"""recurrent_conv and its gradients in numpy's extended precision: something exact to hold fp64 results against.

Written per frame from the equations, independently of ``rcu_ops.reference``. Inputs are torch tensors of any dtype,
results are rounded to fp64 once, at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _extended(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(np.longdouble)


def _rounded(value: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value.astype(np.float64)))


def _scan(x: np.ndarray, w: np.ndarray, h0: np.ndarray | None, scale: np.longdouble, order: list[int]) -> np.ndarray:
    h = np.empty_like(x)
    before = h0
    for t in order:
        h[:, :, t] = x[:, :, t] if before is None else scale * (np.einsum("oc,nchw->nohw", w, before) + x[:, :, t])
        before = h[:, :, t]
    return h


def _order(frames: int, reverse: bool) -> list[int]:
    return list(range(frames))[::-1] if reverse else list(range(frames))


def recurrent_conv(
    x: Tensor, weight: Tensor, h0: Tensor | None = None, *, update: str = "sum", reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """(h, h_n) as fp64 tensors."""
    order = _order(x.shape[2], reverse)
    scale = np.longdouble(0.5 if update == "mean" else 1)
    h = _scan(_extended(x), _extended(weight), None if h0 is None else _extended(h0), scale, order)
    return _rounded(h), _rounded(h[:, :, order[-1]])


def gradients(
    x: Tensor,
    weight: Tensor,
    h0: Tensor,
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    *,
    update: str = "sum",
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dh0) as fp64 tensors, h0 given."""
    order = _order(x.shape[2], reverse)
    scale = np.longdouble(0.5 if update == "mean" else 1)
    w, start = _extended(weight), _extended(h0)
    h = _scan(_extended(x), w, start, scale, order)
    dx, dw = np.zeros_like(h), np.zeros_like(w)
    g = np.zeros_like(start) if grad_h_n is None else _extended(grad_h_n)
    for step in range(len(order) - 1, -1, -1):
        t = order[step]
        if grad_h is not None:
            g = g + _extended(grad_h)[:, :, t]
        before = start if step == 0 else h[:, :, order[step - 1]]
        dx[:, :, t] = scale * g
        dw += np.einsum("nohw,nchw->oc", dx[:, :, t], before)
        g = np.einsum("oc,nohw->nchw", w, dx[:, :, t])
    return _rounded(dx), _rounded(dw), _rounded(g)
