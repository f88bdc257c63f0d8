"""Soft nearest neighbours in time, cycle consistency, and the losses that align two sequences by it, in plain PyTorch.

Eqs. 4 and 5 of "Learn to Cycle: Time-Consistent Feature Discovery for Action Recognition", and the two losses of
"Temporal Cycle-Consistency Learning". Everything is computed in fp64 unless told otherwise: the answers are indices,
and squares of fp32 numbers leave fp32's range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rcu_ops.reference.recurrent_conv import state_dtype_of, without_autocast


class CycleConsistency(NamedTuple):
    """What :func:`cycle_consistency` returns.

    Attributes:
        gate: [N] bool, whether every frame of both sequences maps to its own place in the other one.
        index_ab: [N,T] int64, per frame of a the frame of b nearest to its soft neighbour; -1: there is none.
        index_ba: [N,S] int64, the same from b to a.
    """

    gate: Tensor
    index_ab: Tensor
    index_ba: Tensor


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``|a_t - b_i|^2`` by differences: [N,T,C], [N,S,C] -> [N,T,S]."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


def matching(a: Tensor, b: Tensor, temperature: float, mask_b: Tensor | None) -> Tensor:
    """``softmax_i(-|a_t - b_i|^2 / temperature)`` over the frames of b that are there; rows without any are zero."""
    logits = -squared_distances(a, b) / temperature
    if mask_b is None:
        return logits.softmax(-1)
    there = mask_b.unsqueeze(-2)
    # Infinitely far from what is there is nearer than nothing: such rows are NaN, as they are without a mask.
    logits = logits.masked_fill(~there, -torch.inf).masked_fill(~there.any(-1, keepdim=True), 0)
    return logits.softmax(-1) * there


def present(sequence: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sequence in ``dtype`` with zeros for frames that are not there, whatever padding holds."""
    sequence = sequence.to(dtype)
    return sequence if mask is None else torch.where(mask.unsqueeze(-1), sequence, 0)


@without_autocast
def soft_nearest_neighbor(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 1.0,
    mask_b: Tensor | None = None,
    state_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Eq. 4, ``soft_t = sum_i z_ti b_i``, ``z_t = softmax_i(-|a_t - b_i|^2 / temperature)``, and Eq. 5, the nearest.

    Args:
        a: [N,T,C]. b: [N,S,C].
        temperature: divides the squared distances.
        mask_b: [N,S] bool, True where b has a frame; None: everywhere.
        state_dtype: of all arithmetic.

    Returns:
        ``(soft, index)``: soft [N,T,C] in a's dtype, zeros where b has no frames; index [N,T] int64,
        ``argmin_i |soft_t - b_i|^2`` (the lowest of equals), -1 where b has no frames or the distances are not numbers.
    """
    b_there = present(b, mask_b, state_dtype)
    soft = matching(a.to(state_dtype), b_there, temperature, mask_b) @ b_there
    distance = squared_distances(soft.detach(), b_there.detach())
    if mask_b is not None:
        distance = distance.masked_fill(~mask_b.unsqueeze(-2), torch.inf)
    index = torch.where(distance.amin(-1).isfinite(), distance.argmin(-1), -1)
    return soft.to(a.dtype), index


@without_autocast
def cycle_consistency(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 1.0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    state_dtype: torch.dtype = torch.float64,
) -> CycleConsistency:
    """Which frame each frame maps to in the other sequence, and whether all map to their own place.

    Args:
        a, b, temperature, state_dtype: as in :func:`soft_nearest_neighbor`.
        mask_a, mask_b: [N,T] and [N,S] bool, True where there is a frame. Other frames have index -1 and no say.

    Returns:
        :class:`CycleConsistency`. With T != S the gate is False.
    """
    a, b = a.detach(), b.detach()
    index_ab = soft_nearest_neighbor(a, b, temperature=temperature, mask_b=mask_b, state_dtype=state_dtype)[1]
    index_ba = soft_nearest_neighbor(b, a, temperature=temperature, mask_b=mask_a, state_dtype=state_dtype)[1]
    gate = torch.full_like(index_ab[:, 0], a.shape[1] == b.shape[1], dtype=torch.bool)
    found = []
    for index, mask in ((index_ab, mask_a), (index_ba, mask_b)):
        stays = index == torch.arange(index.shape[1], device=index.device)
        if mask is not None:
            stays, index = stays | ~mask, torch.where(mask, index, -1)
        gate = gate & stays.all(1)
        found.append(index)
    return CycleConsistency(gate, *found)


@without_autocast
def cycle_back(
    soft: Tensor,
    a: Tensor,
    *,
    temperature: float = 1.0,
    mask_a: Tensor | None = None,
    state_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where soft neighbours land on the way back: ``p_t = softmax_k(-|soft_t - a_k|^2 / temperature)``.

    Args:
        soft, a: [N,T,C]. mask_a: [N,T] bool, True where there is a frame, or None.

    Returns:
        ``(log_probability, mean, variance)``, each [N,T]: ``log p_tt``, ``sum_k p_tk k``, ``sum_k p_tk (k - mean)^2``,
        in fp32 (fp64 for fp64). Zeros for frames that are not there.
    """
    kept = state_dtype_of(a.dtype)
    a_there = present(a, mask_a, state_dtype)
    logits = -squared_distances(present(soft, mask_a, state_dtype), a_there) / temperature
    if mask_a is not None:
        logits = logits.masked_fill(~mask_a.unsqueeze(-2), torch.finfo(state_dtype).min)
    log_p = logits.log_softmax(-1)
    p, k = log_p.exp(), torch.arange(a.shape[1], device=a.device, dtype=state_dtype)
    mean = (p * k).sum(-1)
    variance = (p * (k - mean.unsqueeze(-1)).square()).sum(-1)
    results = [log_p.diagonal(dim1=-2, dim2=-1), mean, variance]
    if mask_a is not None:
        results = [torch.where(mask_a, result, 0) for result in results]
    log_probability, mean, variance = (result.to(kept) for result in results)
    return log_probability, mean, variance


def temporal_cycle_loss(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "regression",
    temperature: float = 1.0,
    variance_weight: float = 0.001,
    min_variance: float = 1e-6,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> Tensor:
    """Per frame of a, how far the cycle a -> b -> a ends from where it began: [N,T], zero for frames not there.

    "classification": ``-log p_tt``; "regression": ``(t - mean)^2 / variance + variance_weight log(variance) / 2``, with
    p, mean and variance of :func:`cycle_back` and the variance at least ``min_variance``.
    """
    a = present(a, mask_a, a.dtype)
    soft, _ = soft_nearest_neighbor(a, b, temperature=temperature, mask_b=mask_b)
    landing = cycle_back(soft, a, temperature=temperature, mask_a=mask_a)
    return loss_of_landing(landing, mask_a, mask_b, kind, variance_weight, min_variance)


def loss_of_landing(
    landing: tuple[Tensor, Tensor, Tensor],
    mask_a: Tensor | None,
    mask_b: Tensor | None,
    kind: str,
    variance_weight: float,
    min_variance: float,
) -> Tensor:
    """The losses of :func:`temporal_cycle_loss` from what :func:`cycle_back` returns."""
    log_probability, mean, variance = landing
    if kind == "classification":
        loss = -log_probability
    else:
        frame = torch.arange(mean.shape[1], device=mean.device, dtype=mean.dtype)
        variance = variance.clamp(min=min_variance)
        loss = (frame - mean).square() / variance + 0.5 * variance_weight * variance.log()
    if mask_a is not None:
        loss = torch.where(mask_a, loss, 0)
    if mask_b is not None:  # nothing to go through: no cycle
        loss = torch.where(mask_b.any(1, keepdim=True), loss, 0)
    return loss


# ---- gradients, written out ---------------------------------------------------------------------------------------


def squared_distances_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`squared_distances`: ``2 sum_i g_ti (a_t - b_i)`` and ``-2 sum_t g_ti (a_t - b_i)``."""
    da = 2 * (grad.sum(-1, keepdim=True) * a - grad @ b)
    db = 2 * (grad.sum(-2).unsqueeze(-1) * b - grad.mT @ a)
    return da, db


@without_autocast
def soft_nearest_neighbor_backward(
    grad_soft: Tensor, a: Tensor, b: Tensor, *, temperature: float = 1.0, mask_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`soft_nearest_neighbor`'s soft, in the dtypes of a and b.

    With ``r_ti = grad_t . b_i`` the softmax has the gradient ``z_ti (r_ti - sum_j z_tj r_tj)``, the distances
    -1 / temperature times that; b has ``sum_t z_ti grad_t`` besides.
    """
    wide = torch.float64
    grad, queries, keys = grad_soft.to(wide), a.to(wide), present(b, mask_b, wide)
    z = matching(queries, keys, temperature, mask_b)
    r = grad @ keys.mT
    grad_distance = -z * (r - (z * r).sum(-1, keepdim=True)) / temperature
    da, db = squared_distances_backward(grad_distance, queries, keys)
    return da.to(a.dtype), (db + z.mT @ grad).to(b.dtype)


@without_autocast
def cycle_back_backward(
    grad_log_probability: Tensor,
    grad_mean: Tensor,
    grad_variance: Tensor,
    soft: Tensor,
    a: Tensor,
    *,
    temperature: float = 1.0,
    mask_a: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`cycle_back` for soft and a, in their dtypes.

    The logits have ``g (delta_tk - p_tk) + p_tk (g' (k - mean) + g'' ((k - mean)^2 - variance))`` with the gradients g,
    g', g'' of the three results; the distances -1 / temperature times that.
    """
    wide = torch.float64
    queries, keys = present(soft, mask_a, wide), present(a, mask_a, wide)
    p = matching(queries, keys, temperature, mask_a)
    k = torch.arange(a.shape[1], device=a.device, dtype=wide)
    away = k - (p * k).sum(-1, keepdim=True)
    variance = (p * away.square()).sum(-1, keepdim=True)
    g, g_mean, g_variance = (g.to(wide).unsqueeze(-1) for g in (grad_log_probability, grad_mean, grad_variance))
    identity = torch.eye(a.shape[1], device=a.device, dtype=wide)
    grad_logits = g * (identity - p) + p * (g_mean * away + g_variance * (away.square() - variance))
    if mask_a is not None:
        grad_logits = torch.where(mask_a.unsqueeze(-1), grad_logits, 0)
    d_soft, da = squared_distances_backward(-grad_logits / temperature, queries, keys)
    return d_soft.to(soft.dtype), da.to(a.dtype)
