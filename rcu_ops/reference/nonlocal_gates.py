"""The non-local operation and the gates of the Relational LSTM, in plain PyTorch.

Eqs. 1-3 of "Relational Long Short-Term Memory for Video Action Recognition": ``r(X, Y)_i = sum_j w_ij g(y_j)`` with
``w_ij`` the softmax over j of ``theta(x_i) . phi(y_j)`` (embedded Gaussian), or that product divided by the number of
keys. The projections theta, phi and g are given: query, key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcu_ops.reference.recurrent_conv import state_dtype_of, without_autocast


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, normalize: str) -> tuple[Tensor, Tensor]:
    """The weights [...,N,M], and which queries see any key [...,N,1]: the weights of the others mean nothing.

    Zeros stand in place of a query that sees nothing: its infinities would reach the keys' gradients as 0 * inf.
    """
    if normalize == "count":
        if mask is None:
            scores = scale * (query @ key.mT)
            return scores / max(key.shape[-2], 1), scores.new_ones((*scores.shape[:-1], 1), dtype=torch.bool)
        count = mask.sum(-1, keepdim=True)
        sees = count > 0
        scores = scale * (query.masked_fill(~sees, 0) @ key.mT)
        return scores.masked_fill(~mask, 0) / count.clamp(min=1), sees
    with torch.no_grad():
        scores = scale * (query @ key.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        sees = ~(scores == -torch.inf).all(-1, keepdim=True)
    scores = (scale * (query.masked_fill(~sees, 0) @ key.mT)).masked_fill(~sees, 0)
    if mask is not None:
        scores = scores.masked_fill(~mask & sees, -torch.inf)
    return torch.softmax(scores, -1), sees


@without_autocast
def nonlocal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "softmax",
    state_dtype: torch.dtype | None = None,
) -> Tensor:
    """``out_i = sum_j w_ij value_j`` with w the softmax over j of ``scale query_i . key_j``, or that product / M.

    Args:
        query: [...,N,D]; key: [...,M,D]; value: [...,M,Dv]; any floating dtype.
        mask: bool, broadcastable to [...,N,M], True where query i sees key j; or None: everywhere.
        scale: factor of the scores.
        normalize: "softmax", or "count": scores divided by the number of keys that the query sees.
        state_dtype: dtype of all arithmetic; default fp32 (fp64 for fp64 inputs).

    Returns:
        [...,N,Dv] in value's dtype. Zeros for a query whose keys are all masked or at -inf (softmax).
    """
    state_dtype = state_dtype or state_dtype_of(query.dtype)
    query, key, wide = query.to(state_dtype), key.to(state_dtype), value.to(state_dtype)
    weights, sees = _weights(query, key, mask, scale, normalize)
    return (weights @ wide).masked_fill(~sees, 0).to(value.dtype)


@without_autocast
def nonlocal_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`nonlocal_attention`, written out; differentiable itself.

    With p the weights, ``dp = grad value^T`` and, for "softmax", ``ds_ij = p_ij (dp_ij - sum_k p_ik dp_ik)``::

        dquery = scale ds key,  dkey = scale ds^T query,  dvalue = p^T grad

    Args:
        grad: [...,N,Dv], gradient of the output; the others as the forward pass had them.

    Returns:
        ``(dquery, dkey, dvalue)`` in the dtypes of query, key and value.
    """
    state_dtype = state_dtype_of(query.dtype)
    q, k, v = query.to(state_dtype), key.to(state_dtype), value.to(state_dtype)
    p, sees = _weights(q, k, mask, scale, normalize)
    q, grad = q.masked_fill(~sees, 0), grad.to(state_dtype).masked_fill(~sees, 0)
    dp = grad @ v.mT
    if normalize == "softmax":
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    elif mask is None:
        ds = dp / max(key.shape[-2], 1)
    else:
        ds = dp.masked_fill(~mask, 0) / mask.sum(-1, keepdim=True).clamp(min=1)
    ds = scale * ds.masked_fill(~sees, 0)
    return (ds @ k).to(query.dtype), (ds.mT @ q).to(key.dtype), (p.mT @ grad).to(value.dtype)


def lstm_gates(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """``c = f cell + i g``, ``h = o tanh(c)`` with i, f, o = sigmoid, g = tanh of gates [B,4,P,Dv]; cell [B,P,Dv]."""
    i, f, o, g = _gates(gates)
    c = f * cell + i * g
    return o * torch.tanh(c), c


def _gates(gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # One by one: of a slice of three, Inductor (torch 2.13) makes wrong gradients for a batch of one.
    i, f, o, g = gates.unbind(1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o), torch.tanh(g)


def lstm_gates_backward(
    gates: Tensor, cell: Tensor, grad_h: Tensor | None, grad_c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients (dgates, dcell) of :func:`lstm_gates` in gates' dtype; grad_h and grad_c [B,P,Dv] or None (zero)."""
    i, f, o, g = _gates(gates)
    tanh_c = torch.tanh(f * cell + i * g)
    dh = torch.zeros_like(tanh_c) if grad_h is None else grad_h.to(gates.dtype)
    dc = dh * o * (1 - tanh_c * tanh_c)
    if grad_c is not None:
        dc = dc + grad_c.to(gates.dtype)
    dgates = [dc * g * i * (1 - i), dc * cell * f * (1 - f), dh * tanh_c * o * (1 - o), dc * i * (1 - g * g)]
    return torch.stack(dgates, 1), dc * f


@without_autocast
def relational_lstm_gates(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a step's gates, zeros for a query that sees nothing, and the gates before their nonlinearities.

    Args:
        x_gates: [B,4,P,Dv]; query, key: [B,4,P,D]; value: [B,4,P,Dv].

    Returns:
        [B,4,P,P] and [B,4,P,Dv] in the state's dtype.
    """
    x, q, k, v = (t.to(state_dtype_of(x_gates.dtype)) for t in (x_gates, query, key, value))
    weights, sees = _weights(q, k, None, 1.0, "softmax")
    return weights.masked_fill(~sees, 0), x + nonlocal_attention(q, k, v)


@without_autocast
def relational_lstm_step(
    x_gates: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell: Tensor,
    *,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the Relational LSTM (Eq. 3), all projections given.

    ``a = x_gates + softmax(query key^T) value`` for the gates i, f, o, g; then the LSTM's cell update.

    Args:
        x_gates: [B,4,P,Dv], the input-to-state relations of frame t, gates in the order i, f, o, g.
        query: [B,4,P,D] from frame t; key: [B,4,P,D] and value: [B,4,P,Dv] from the hidden state before it.
        cell: [B,P,Dv], the cell before it.
        state_dtype: dtype of all arithmetic; default fp32 (fp64 for fp64 inputs).

    Returns:
        ``(h, c)``: h [B,P,Dv] in x_gates' dtype; c [B,P,Dv] in ``state_dtype``.
    """
    state_dtype = state_dtype or state_dtype_of(x_gates.dtype)
    relations = nonlocal_attention(*(t.to(state_dtype) for t in (query, key, value)), state_dtype=state_dtype)
    h, c = lstm_gates(x_gates.to(state_dtype) + relations, cell.to(state_dtype))
    return h.to(x_gates.dtype), c


@without_autocast
def relational_lstm_step_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x_gates: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`relational_lstm_step`, written out; differentiable itself.

    Args:
        grad_h, grad_c: [B,P,Dv] or None (zero); the others as the forward pass had them.

    Returns:
        ``(dx_gates, dquery, dkey, dvalue, dcell)`` in the dtypes of their arguments.
    """
    state_dtype = state_dtype_of(x_gates.dtype)
    q, k, v, before = (t.to(state_dtype) for t in (query, key, value, cell))
    a = x_gates.to(state_dtype) + nonlocal_attention(q, k, v)
    da, dcell = lstm_gates_backward(a, before, grad_h, grad_c)
    dq, dk, dv = nonlocal_attention_backward(da, q, k, v)
    return da.to(x_gates.dtype), dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), dcell.to(cell.dtype)
