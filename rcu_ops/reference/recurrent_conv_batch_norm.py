"""The recurrent convolution followed by batch normalisation in training, in plain PyTorch.

    h = recurrent_conv(x, W)                                        the hidden states
    mean_c, var_c over the batch, time and space of h               the batch's statistics
    y = act(gamma (h - mean) / sqrt(var + eps) + beta (+ residual))

The statistics travel as *moments* [3,C]: the mean, the sum of squared deviations from it, and the number of values.
Unlike a sum and a sum of squares they keep the variance whatever the mean, and unlike a mean and a variance those of
several processes (or blocks) combine exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcu_ops.reference.recurrent_conv import recurrent_conv, state_dtype_of, without_autocast

EACH_CHANNEL = (0, 2, 3, 4)  # the dimensions of [N,C,T,H,W] that are summed over


def per_channel(values: Tensor) -> Tensor:
    """[C] as [1,C,1,1,1]."""
    return values.view(1, -1, 1, 1, 1)


@without_autocast
def recurrent_conv_batch_norm(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    h0: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    update: str = "sum",
    eps: float = 1e-5,
    activation: str = "relu",
    group: Any = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act(gamma (h - mean) / sqrt(var + eps) + beta (+ residual))`` with h of ``recurrent_conv``.

    Args:
        x, weight, h0, update: as in ``recurrent_conv``.
        gamma, beta: [C], or None: 1 and 0.
        residual: shaped like x, or None.
        eps: added to the variance.
        activation: "relu" or "identity".
        group: the torch.distributed group whose processes share their statistics, or None.
        state_dtype: dtype of all arithmetic; default fp32 (fp64 for fp64 inputs).

    Returns:
        ``(y, h_n, moments)``: y like x; h_n [N,C,H,W] the last state; moments [3,C] of the whole group, both in
        ``state_dtype``.
    """
    state_dtype = state_dtype or state_dtype_of(x.dtype)
    h, h_n = recurrent_conv(x, weight, h0, update=update, state_dtype=state_dtype)
    moments = channel_moments(h, state_dtype)
    if group is not None:
        moments = _shared_moments(moments, group)
    return normalize(h, moments, gamma, beta, residual, eps, activation == "relu"), h_n, moments


def channel_moments(h: Tensor, state_dtype: torch.dtype | None = None) -> Tensor:
    """Mean, sum of squared deviations and number of values of every channel: [N,C,T,H,W] -> [3,C]."""
    wide = h.to(state_dtype or state_dtype_of(h.dtype))
    count = h.shape[0] * h.shape[2] * h.shape[3] * h.shape[4]
    mean = wide.sum(EACH_CHANNEL) / max(count, 1)
    mean = mean + (wide - per_channel(mean)).sum(EACH_CHANNEL) / max(count, 1)  # what rounding the long sum has cost
    deviations = (wide - per_channel(mean)).square().sum(EACH_CHANNEL)
    return torch.stack([mean, deviations, torch.full_like(mean, count)])


def combine_moments(parts: Tensor) -> Tensor:
    """The moments of several parts as those of the whole, in fp64 and in the parts' order: [P,3,C] -> [3,C]."""
    mean, deviations, count = parts.double().unbind(1)
    total = count.sum(0)
    center = (count * mean).sum(0) / total.clamp(min=1)
    spread = (deviations + count * (mean - center).square()).sum(0)
    return torch.stack([center, spread, total]).to(parts.dtype)


def _shared_moments(moments: Tensor, group: Any) -> Tensor:
    from torch.distributed.nn.functional import all_reduce  # the one whose backward is a reduction too

    mean, deviations, count = moments.double().unbind(0)
    total = all_reduce(count.detach(), group=group)
    center = all_reduce(count * mean, group=group) / total.clamp(min=1)
    spread = all_reduce(deviations + count * (mean - center).square(), group=group)
    return torch.stack([center, spread, total]).to(moments.dtype)


def scale_of(moments: Tensor, gamma: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``1 / sqrt(var + eps)`` and gamma times that, both [C]."""
    inverse = torch.rsqrt(moments[1] / moments[2].clamp(min=1) + eps)
    return inverse, inverse if gamma is None else gamma.to(inverse.dtype) * inverse


@without_autocast
def normalize(
    h: Tensor,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """``act(scale (h - mean) + beta (+ residual))`` in h's dtype. The mean is subtracted first: it may be large."""
    y = _preactivation(h, moments, gamma, beta, eps)
    if residual is not None:
        y = y + residual.to(moments.dtype)
    return (torch.relu(y) if relu else y).to(h.dtype)


def _preactivation(h: Tensor, moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    _, scale = scale_of(moments, gamma, eps)
    y = (h.to(moments.dtype) - per_channel(moments[0])) * per_channel(scale)
    return y if beta is None else y + per_channel(beta.to(moments.dtype))


@without_autocast
def activation_gradient(
    grad_y: Tensor,
    h: Tensor,
    y: Tensor | None,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """The gradient before the activation, in the arithmetic's dtype.

    Args:
        y: the output, when there was a residual; without one, whether it was positive is computed again from h.
    """
    dz = grad_y.to(moments.dtype)
    if not relu:
        return dz
    z = _preactivation(h, moments, gamma, beta, eps) if y is None else y
    return torch.where(z <= 0, 0, dz)  # NaN lets the gradient through, as in ReLU's own backward


@without_autocast
def normalize_sums(dz: Tensor, h: Tensor, moments: Tensor, eps: float) -> Tensor:
    """``sum dz`` and ``sum dz x^``, the gradients of beta and gamma, [2,C]; ``x^ = (h - mean) / sqrt(var + eps)``."""
    inverse, _ = scale_of(moments, None, eps)
    deviations = h.to(moments.dtype) - per_channel(moments[0])
    return torch.stack([dz.sum(EACH_CHANNEL), (dz * deviations).sum(EACH_CHANNEL) * inverse])


@without_autocast
def normalize_backward(
    dz: Tensor, h: Tensor, moments: Tensor, sums: Tensor, gamma: Tensor | None, eps: float
) -> Tensor:
    """The gradient of h: ``gamma / sqrt(var + eps) (dz - sum dz / M - x^ sum(dz x^) / M)``, M values per channel."""
    inverse, scale = scale_of(moments, gamma, eps)
    count = moments[2].clamp(min=1)
    deviations = h.to(moments.dtype) - per_channel(moments[0])
    return (
        per_channel(scale) * dz
        - per_channel(scale * inverse * sums[1] / count) * deviations
        - per_channel(scale * sums[0] / count)
    )
