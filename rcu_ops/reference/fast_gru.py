"""The recurrence of FASTER's clip features (FAST-GRU), in plain PyTorch.

Eqs. 2-4 of "FASTER Recurrent Networks for Efficient Video Classification", with all products 1x1x1 convolutions, so
that every position is independent and the resolution is kept::

    r' = relu(U_rx x + U_ro o)        z' = relu(U_zx x + U_zo o)        R channels each (the paper: C / 4)
    r  = sigmoid(W_r r')              z  = sigmoid(W_z z')              C channels
    c  = tanh(V_x x + V_o (r * o))    o <- (1 - z) * o + z * c
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcu_ops.reference.recurrent_conv import mix_channels, state_dtype_of, without_autocast


class Gates(NamedTuple):
    """What one step computes on the way: hidden [N,2R,...] (r' before z'), r, z and the candidate [N,C,...]."""

    hidden: Tensor
    r: Tensor
    z: Tensor
    candidate: Tensor


def fast_gru_gates(
    x: Tensor, o: Tensor, weight_ux: Tensor, weight_uo: Tensor, weight_w: Tensor, weight_vx: Tensor, weight_vo: Tensor
) -> Gates:
    """The gates of one step: x, o [N,C,...]; the weights as in :func:`fast_gru`; all of one dtype."""
    hidden = torch.relu(mix_channels(weight_ux, x) + mix_channels(weight_uo, o))
    first, second = hidden.chunk(2, dim=1)
    r = torch.sigmoid(mix_channels(weight_w[0], first))
    z = torch.sigmoid(mix_channels(weight_w[1], second))
    candidate = torch.tanh(mix_channels(weight_vx, x) + mix_channels(weight_vo, r * o))
    return Gates(hidden, r, z, candidate)


@without_autocast
def fast_gru(
    x: Tensor,
    weight_ux: Tensor,
    weight_uo: Tensor,
    weight_w: Tensor,
    weight_vx: Tensor,
    weight_vo: Tensor,
    o0: Tensor | None = None,
    *,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """FAST-GRU over the clips' features, one clip after the other.

    Args:
        x: [N,K,C,L,H,W], any floating dtype: the features of K clips.
        weight_ux, weight_uo: [2R,C], r before z. weight_w: [2,C,R]. weight_vx, weight_vo: [C,C].
        o0: [N,C,L,H,W] state before the first clip, or None: then o_0 = x_0 and the recurrence starts at clip 1.
        state_dtype: dtype of all arithmetic; default fp32 (fp64 for fp64 inputs).

    Returns:
        ``(o, o_n)``: o [N,K,C,L,H,W] in x's dtype; o_n [N,C,L,H,W], the last state, in ``state_dtype``.
    """
    state_dtype = state_dtype or state_dtype_of(x.dtype)
    weights = [w.to(state_dtype) for w in (weight_ux, weight_uo, weight_w, weight_vx, weight_vo)]
    o = None if o0 is None else o0.to(state_dtype)
    states = []
    for k in range(x.shape[1]):
        x_k = x[:, k].to(state_dtype)
        if o is None:
            o = x_k.clone()
        else:
            gates = fast_gru_gates(x_k, o, *weights)
            o = (1 - gates.z) * o + gates.z * gates.candidate
        states.append(o)
    assert o is not None, "x has no clips"
    return torch.stack(states, dim=1).to(x.dtype), o


@without_autocast
def fast_gru_backward(
    grad_o: Tensor | None,
    grad_o_n: Tensor | None,
    x: Tensor,
    weight_ux: Tensor,
    weight_uo: Tensor,
    weight_w: Tensor,
    weight_vx: Tensor,
    weight_vo: Tensor,
    o0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`fast_gru`, written out; itself differentiable.

    From the last step to the first, with g the gradient of the step's result and d· those before the activations::

        dc = g z (1 - c^2)        dz = g (c - o) z (1 - z)        q = V_o^T dc        dr = q o r (1 - r)
        du = [W_r^T dr, W_z^T dz], 0 where r', z' <= 0
        dx = U_x^T du + V_x^T dc        g <- g (1 - z) + q r + U_o^T du

    Args:
        grad_o: [N,K,C,L,H,W] or None (zero); grad_o_n: [N,C,L,H,W] or None (zero).
        x, weights, o0: the arguments of the forward pass, which is run again.

    Returns:
        ``(dx, dweight_ux, dweight_uo, dweight_w, dweight_vx, dweight_vo, do0)`` in the arguments' dtypes; do0 is None
        when o0 is.
    """
    state_dtype = state_dtype_of(x.dtype)
    given = (weight_ux, weight_uo, weight_w, weight_vx, weight_vo)
    ux, uo, w, vx, vo = weights = [weight.to(state_dtype) for weight in given]
    outer = "nolhw,nclhw->oc"
    clips = x.shape[1]
    first = 1 if o0 is None else 0
    o = x[:, 0].to(state_dtype) if o0 is None else o0.to(state_dtype)
    steps = []
    for k in range(first, clips):
        gates = fast_gru_gates(x[:, k].to(state_dtype), o, *weights)
        steps.append((k, o, gates))
        o = (1 - gates.z) * o + gates.z * gates.candidate

    g = torch.zeros_like(o) if grad_o_n is None else grad_o_n.to(state_dtype)
    sums = [torch.zeros_like(weight) for weight in weights]
    dx: dict[int, Tensor] = {}
    for k, before, (hidden, r, z, c) in reversed(steps):
        if grad_o is not None:
            g = g + grad_o[:, k].to(state_dtype)
        x_k = x[:, k].to(state_dtype)
        dc = g * z * (1 - c * c)
        dz = g * (c - before) * z * (1 - z)
        q = mix_channels(vo.T, dc)
        dr = q * before * r * (1 - r)
        du = torch.cat([mix_channels(w[0].T, dr), mix_channels(w[1].T, dz)], dim=1).masked_fill(hidden <= 0, 0)
        dx[k] = mix_channels(ux.T, du) + mix_channels(vx.T, dc)
        g = g * (1 - z) + q * r + mix_channels(uo.T, du)
        halves = hidden.chunk(2, dim=1)
        parts = (
            torch.einsum(outer, du, x_k),
            torch.einsum(outer, du, before),
            torch.stack([torch.einsum(outer, d, half) for d, half in zip((dr, dz), halves, strict=True)]),
            torch.einsum(outer, dc, x_k),
            torch.einsum(outer, dc, r * before),
        )
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    do0 = None
    if o0 is None:
        dx[0] = g if grad_o is None else g + grad_o[:, 0].to(state_dtype)
    else:
        do0 = g.to(o0.dtype)
    dux, duo, dw, dvx, dvo = (total.to(weight.dtype) for total, weight in zip(sums, given, strict=True))
    return torch.stack([dx[k] for k in range(clips)], dim=1).to(x.dtype), dux, duo, dw, dvx, dvo, do0
