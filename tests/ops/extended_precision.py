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


# ---- fast_gru -----------------------------------------------------------------------------------------------------


def fast_gru(
    tensors: list[Tensor | None], grad_o: Tensor | None = None, grad_o_n: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """``(o, o_n)`` and the gradients of ``tensors``: x [N,K,C,L,H,W], the five weights, o0 or None; fp64."""
    x, ux, uo, w, vx, vo = (_extended(t) for t in tensors[:6])
    columns = np.moveaxis(x, 2, -1)  # [N,K,L,H,W,C]: a row vector per position
    start = columns[:, 0] if tensors[6] is None else np.moveaxis(_extended(tensors[6]), 1, -1)
    hidden, first = w.shape[2], int(tensors[6] is None)

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    states, steps = [start] if first else [], []
    o = start
    for k in range(first, x.shape[1]):
        u = np.maximum(columns[:, k] @ ux.T + o @ uo.T, 0)
        r, z = sigmoid(u[..., :hidden] @ w[0].T), sigmoid(u[..., hidden:] @ w[1].T)
        c = np.tanh(columns[:, k] @ vx.T + (r * o) @ vo.T)
        steps.append((k, o, u, r, z, c))
        o = (1 - z) * o + z * c
        states.append(o)

    def outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])

    above = None if grad_o is None else np.moveaxis(_extended(grad_o), 2, -1)
    g = np.zeros_like(o) if grad_o_n is None else np.moveaxis(_extended(grad_o_n), 1, -1)
    dx, (dux, duo, dw, dvx, dvo) = np.zeros_like(columns), (np.zeros_like(v) for v in (ux, uo, w, vx, vo))
    for k, before, u, r, z, c in reversed(steps):
        g = g if above is None else g + above[:, k]
        dc, dz = g * z * (1 - c * c), g * (c - before) * z * (1 - z)
        q = dc @ vo
        dr = q * before * r * (1 - r)
        du = np.concatenate([dr @ w[0], dz @ w[1]], axis=-1) * (u > 0)
        dx[:, k] = du @ ux + dc @ vx
        dux += outer(du, columns[:, k])
        duo += outer(du, before)
        dw += np.stack([outer(dr, u[..., :hidden]), outer(dz, u[..., hidden:])])
        dvx += outer(dc, columns[:, k])
        dvo += outer(dc, r * before)
        g = g * (1 - z) + q * r + du @ uo
    if first:
        dx[:, 0] = g if above is None else g + above[:, 0]
    do0 = None if first else _rounded(np.moveaxis(g, -1, 1))
    gradients = [_rounded(np.moveaxis(dx, -1, 2)), *(_rounded(v) for v in (dux, duo, dw, dvx, dvo)), do0]
    return (_rounded(np.moveaxis(np.stack(states, 1), -1, 2)), _rounded(np.moveaxis(o, -1, 1))), gradients
