"""The non-local operators and their gradients in numpy's extended precision, to hold fp64 results against.

Written per gate from the equations, independently of ``rcu_ops.reference``. Inputs are torch tensors of any dtype with
the operators' shapes (attention: [B,N,D], [B,M,D], [B,M,Dv]), results are rounded to fp64 once, at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _extended(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(np.longdouble)


def _rounded(*values: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(v.astype(np.float64))) for v in values)


def _weights(q: np.ndarray, k: np.ndarray, mask: np.ndarray, scale: float, count: bool) -> np.ndarray:
    scores = np.longdouble(scale) * np.einsum("bnd,bmd->bnm", q, k)
    seen = np.maximum(mask.sum(-1, keepdims=True), 1)
    if count:
        return np.where(mask, scores, 0) / seen
    scores = np.where(mask, scores, -np.inf)
    peak = scores.max(-1, keepdims=True, initial=-np.inf)
    powers = np.exp(scores - np.where(np.isneginf(peak), 0, peak))
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total)


def _attention_gradients(
    grad: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float, count: bool
) -> tuple[np.ndarray, ...]:
    p = _weights(q, k, mask, scale, count)
    dp = np.einsum("bne,bme->bnm", grad, v)
    if count:
        ds = np.where(mask, dp, 0) / np.maximum(mask.sum(-1, keepdims=True), 1)
    else:
        ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    ds = np.longdouble(scale) * ds
    return (
        np.einsum("bnm,bmd->bnd", ds, k),
        np.einsum("bnm,bnd->bmd", ds, q),
        np.einsum("bnm,bne->bme", p, grad),
    )


def _mask(mask: Tensor | None, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    whole = (q.shape[0], q.shape[1], k.shape[1])
    return np.broadcast_to(np.True_ if mask is None else mask.numpy(), whole)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "softmax",
) -> Tensor:
    """nonlocal_attention's result."""
    q, k, v = map(_extended, (query, key, value))
    return _rounded(np.einsum("bnm,bme->bne", _weights(q, k, _mask(mask, q, k), scale, normalize == "count"), v))[0]


def attention_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "softmax",
) -> tuple[Tensor, ...]:
    """(dquery, dkey, dvalue)."""
    g, q, k, v = map(_extended, (grad, query, key, value))
    return _rounded(*_attention_gradients(g, q, k, v, _mask(mask, q, k), scale, normalize == "count"))


def _gates(x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    everything = np.ones((q.shape[0], q.shape[2], q.shape[2]), dtype=bool)
    a = np.stack(
        [
            x[:, n] + np.einsum("bnm,bme->bne", _weights(q[:, n], k[:, n], everything, 1.0, False), v[:, n])
            for n in range(4)
        ],
        1,
    )
    i, f, o = (1 / (1 + np.exp(-a[:, n])) for n in range(3))
    g = np.tanh(a[:, 3])
    return i, f, o, g, f * c + i * g


def step(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    """(h, c) of relational_lstm_step."""
    _, _, o, _, after = _gates(*map(_extended, (x_gates, query, key, value, cell)))
    return _rounded(o * np.tanh(after), after)


def step_gradients(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x_gates: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell: Tensor,
) -> tuple[Tensor, ...]:
    """(dx_gates, dquery, dkey, dvalue, dcell)."""
    x, q, k, v, c = map(_extended, (x_gates, query, key, value, cell))
    i, f, o, g, after = _gates(x, q, k, v, c)
    th = np.tanh(after)
    dh = np.zeros_like(c) if grad_h is None else _extended(grad_h)
    dc = dh * o * (1 - th * th) + (0 if grad_c is None else _extended(grad_c))
    da = np.stack([dc * g * i * (1 - i), dc * c * f * (1 - f), dh * th * o * (1 - o), dc * i * (1 - g * g)], 1)
    everything = np.ones((q.shape[0], q.shape[2], q.shape[2]), dtype=bool)
    parts = [_attention_gradients(da[:, n], q[:, n], k[:, n], v[:, n], everything, 1.0, False) for n in range(4)]
    return _rounded(da, *(np.stack(p, 1) for p in zip(*parts, strict=True)), dc * f)
