"""The time-recurrent 1x1x1 convolution of Recurrent Convolutional Networks, in plain PyTorch.

Eq. 1 of "Recurrent Convolutions for Causal 3D CNNs": ``h_t = w_hh * h_{t-1} + x_t`` with ``x_t`` the output of the
spatial convolution. Every position is independent, so ``w_hh`` is a C x C matrix applied to the channel vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with autocast off: the reference chooses its own dtypes, on purpose."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def state_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the hidden state is kept for inputs of ``dtype``: fp64 for fp64, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mix_channels(weight: Tensor, h: Tensor) -> Tensor:
    """``weight @ h`` over the channel dimension: [O,C] and [N,C,...] -> [N,O,...]."""
    return torch.einsum("oc,nc...->no...", weight, h)


def _channels_last(clip: Tensor) -> bool:
    """Whether frames lie as [N,H,W,C]: then neither they nor their gradients are transposed."""
    return clip.stride(1) == 1


def _frames(clip: Tensor) -> Sequence[Tensor]:
    """[N,C,T,H,W] -> T times [N,C,H,W], whose gradients are gathered at once."""
    if _channels_last(clip):
        return [frame.movedim(-1, 1) for frame in clip.movedim(1, -1).unbind(1)]
    return clip.unbind(2)


def _clip(frames: list[Tensor], like: Tensor) -> Tensor:
    """T times [N,C,H,W] -> [N,C,T,H,W], in memory as ``like`` lies."""
    if _channels_last(like):
        return torch.stack([frame.movedim(1, -1) for frame in frames], dim=1).movedim(-1, 1)
    if like.stride(2) > like.stride(1):  # frames [C,H,W] one after the other
        return torch.stack(frames, dim=1).transpose(1, 2)
    return torch.stack(frames, dim=2)


def _mixer(weight: Tensor, clip: Tensor) -> Callable[[Tensor], Tensor]:
    """:func:`mix_channels` with ``weight`` for the clip's states as they lie."""
    if not _channels_last(clip) or clip.shape[2] == 1:  # one frame does not pay for a transposed weight
        return functools.partial(mix_channels, weight)
    by_rows = weight.T.contiguous()
    return lambda h: (h.movedim(1, -1) @ by_rows).movedim(-1, 1)


@without_autocast
def recurrent_conv(
    x: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    update: str = "sum",
    reverse: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``h_t = W h_{t-1} + x_t`` ("sum") or ``h_t = (W h_{t-1} + x_t) / 2`` ("mean"), one frame after the other.

    Args:
        x: [N,C,T,H,W], any floating dtype.
        weight: [C,C] (out, in).
        h0: [N,C,H,W] state before the first frame, or None: then the first state is x of the first frame.
        update: "sum" or "mean".
        reverse: run time from T-1 to 0.
        state_dtype: dtype of all arithmetic; default fp32 (fp64 for fp64 inputs).

    Returns:
        ``(h, h_n)``: h [N,C,T,H,W] in x's dtype; h_n [N,C,H,W], the last processed state, in ``state_dtype``.
    """
    state_dtype = state_dtype or state_dtype_of(x.dtype)
    weight = weight.to(state_dtype)
    order = range(x.shape[2] - 1, -1, -1) if reverse else range(x.shape[2])
    x_at, mix = _frames(x), _mixer(weight, x)
    h = None if h0 is None else h0.to(state_dtype)
    states: dict[int, Tensor] = {}
    for t in order:
        x_t = x_at[t].to(state_dtype)
        if h is None:
            h = x_t
        else:
            h = mix(h) + x_t
            if update == "mean":
                h = h / 2
        states[t] = h
    assert h is not None, "x has no frames"
    out = _clip([states[t].to(x.dtype) for t in range(x.shape[2])], like=x)
    return out, h.clone() if x.shape[2] == 1 and h0 is None else h


@without_autocast
def recurrent_conv_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    h0: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    update: str = "sum",
    activation: str = "relu",
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = act(scale * h_t + shift (+ residual_t))`` with h of :func:`recurrent_conv`: RCU, BN, residual, ReLU.

    Args:
        x, weight, h0, update, state_dtype: as in :func:`recurrent_conv`.
        scale, shift: [C].
        residual: shaped like x, or None.
        activation: "relu" or "identity".

    Returns:
        ``(y, h_n)``: y like x; h_n [N,C,H,W] the last state in ``state_dtype``.
    """
    state_dtype = state_dtype or state_dtype_of(x.dtype)
    h, h_n = recurrent_conv(x.to(state_dtype), weight, h0, update=update, state_dtype=state_dtype)
    per_channel = (1, -1, 1, 1, 1)
    y = scale.to(state_dtype).view(per_channel) * h + shift.to(state_dtype).view(per_channel)
    if residual is not None:
        y = y + residual.to(state_dtype)
    return (torch.relu(y) if activation == "relu" else y).to(x.dtype), h_n


@without_autocast
def recurrent_conv_backward(
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    update: str = "sum",
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`recurrent_conv`, written out: the same scan in the opposite direction with W transposed.

    With a = 1 ("sum") or 1/2 ("mean") and t+1 the frame processed after t::

        g_t = grad_h_t (+ grad_h_n at the last frame) + a W^T g_{t+1}
        dx_t = a g_t            (dx = g at the first frame when h0 is None)
        dW = a sum_t g_t h_{t-1}^T,  dh0 = a W^T g_first

    Args:
        grad_h: [N,C,T,H,W] or None (zero); grad_h_n: [N,C,H,W] or None (zero); not both None.
        h: the output of the forward pass; weight, h0, update, reverse: its arguments.

    Returns:
        ``(dx, dweight, dh0)`` in the dtypes of h, weight and h0; dh0 is None when h0 is.
    """
    state_dtype = state_dtype_of(h.dtype)
    a = 0.5 if update == "mean" else 1.0
    w = weight.to(state_dtype)
    frames = h.shape[2]
    order = list(range(frames))[::-1] if reverse else list(range(frames))
    dw = torch.zeros_like(w)
    dx: dict[int, Tensor] = {}
    g = torch.zeros_like(h[:, :, 0], dtype=state_dtype)
    for step in range(frames - 1, -1, -1):
        t = order[step]
        if step == frames - 1:
            g = g if grad_h_n is None else grad_h_n.to(state_dtype)
        else:
            g = a * mix_channels(w.T, g)
        if grad_h is not None:
            g = g + grad_h[:, :, t].to(state_dtype)
        before = h0 if step == 0 else h[:, :, order[step - 1]]
        if before is None:
            dx[t] = g
        else:
            dx[t] = a * g
            dw = dw + a * torch.einsum("nohw,nchw->oc", g, before.to(state_dtype))
    dh0 = None if h0 is None else (a * mix_channels(w.T, g)).to(h0.dtype)
    return torch.stack([dx[t] for t in range(frames)], dim=2).to(h.dtype), dw.to(weight.dtype), dh0
