"""``recurrent_conv``: the time-recurrent 1x1x1 hidden-state convolution, as an operator with backends and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcu_ops import _library, reference
from rcu_ops.ops import (
    _checks,
    _evidence,
    _planner,
    _predicates,
    _recurrent_conv_chunked,  # noqa: F401 - defines the operator that the bindings call
    _schema,
    _selftest,
    _transforms,
    _triton,
)
from rcu_ops.ops._registry import Backend, Operator, register
from rcu_ops.reference.recurrent_conv import mix_channels, state_dtype_of

UPDATES = ("sum", "mean")
ACTIVATIONS = ("relu", "identity")


def recurrent_conv(
    x: Tensor, weight: Tensor, h0: Tensor | None = None, *, update: str = "sum", reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The recurrent convolution of an RCU (Eq. 1 of "Recurrent Convolutions for Causal 3D CNNs").

    ``update="sum"``:  ``h_t = W h_{t-1} + x_t``;  ``update="mean"``: ``h_t = (W h_{t-1} + x_t) / 2``; both at every
    position independently, with x the output of the 1xdxd spatial convolution. Without h0 the first state is x of
    the first frame. The state is kept in fp32 (fp64 for fp64 inputs) whatever the dtype of x, so feeding ``h_n`` back
    as ``h0`` continues a sequence exactly where it stopped.

    Args:
        x: [N,C,T,H,W], fp16, bf16, fp32 or fp64, any strides. N, H, W may be 0; T and C may not.
        weight: [C,C] (out, in), x's dtype and device.
        h0: [N,C,H,W] state before the first frame in x's dtype or the state's, or None.
        update: "sum" or "mean".
        reverse: run time backwards; ``h_n`` is then the state at t = 0.

    Returns:
        ``(h, h_n)``: h like x (dtype, and strides as ``torch.empty_like``); h_n [N,C,H,W] in the state's dtype, which
        shares no memory with h, of a single frame neither: what follows may change h in place.

    Raises:
        TypeError: not a tensor, wrong dtype. ValueError: wrong shape, device, ``update``, or a backend chosen by
        :func:`rcu_ops.use_backend` that cannot run these arguments.

    Under autocast x and weight are cast to its dtype. Differentiable to any order.
    """
    args = _check(x, weight, h0, update=update, reverse=reverse)
    h, h_n = OPERATOR.select(*args).run(*args)
    return h, h_n


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
) -> tuple[Tensor, Tensor]:
    """Inference form: ``y_t = act(scale * h_t + shift (+ residual_t))`` with h of :func:`recurrent_conv`, in one pass.

    With ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale`` this is an RCU, batch normalisation,
    the residual addition and the ReLU of a video ResNet; h itself is never written, except its last frame.

    Args:
        x, weight, h0, update: as in :func:`recurrent_conv`.
        scale, shift: [C], any floating dtype (used in the state's dtype).
        residual: shaped like x, x's dtype, any strides, or None.
        activation: "relu" or "identity".

    Returns:
        ``(y, h_n)``: y like x; h_n [N,C,H,W] in the state's dtype.

    Raises:
        TypeError, ValueError: as :func:`recurrent_conv`. RuntimeError: an argument requires grad and grad mode is
        on: train with :func:`recurrent_conv` and separate layers.
    """
    args = _check_affine_act(x, weight, scale, shift, h0, residual, update=update, activation=activation)
    y, h_n = AFFINE_ACT.select(*args).run(*args)
    return y, h_n


# ---- checks -------------------------------------------------------------------------------------------------------


def check_sequence(x: Tensor, weight: Tensor, h0: Tensor | None, update: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and h0 as the operators take them, or a TypeError or ValueError that names what is wrong."""
    _checks.dims("x", _checks.tensor("x", x), "[N,C,T,H,W]")
    n, c, t, height, width = x.shape
    if t == 0 or c == 0:
        raise ValueError(f"x: expected at least one frame and one channel, got [N,C,T,H,W] = {list(x.shape)}")
    _checks.choice("update", update, UPDATES)
    _checks.shape("weight", _checks.tensor("weight", weight), (c, c), "[C,C]")
    _checks.same_device("weight", weight, x, "x")
    x, weight = _checks.autocast(x, weight)
    _checks.dtype("weight", weight, x.dtype)
    if h0 is not None:
        _checks.shape("h0", _checks.tensor("h0", h0), (n, c, height, width), "[N,C,H,W]")
        _checks.same_device("h0", h0, x, "x")
        if h0.dtype != x.dtype and h0.dtype != state_dtype_of(x.dtype):
            _checks.dtype("h0", h0, x.dtype, state_dtype_of(x.dtype))
    return x, weight, h0


def _check(
    x: Tensor, weight: Tensor, h0: Tensor | None = None, *, update: str = "sum", reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, bool, bool]:
    x, weight, h0 = check_sequence(x, weight, h0, update)
    return x, weight, h0, update == "mean", bool(reverse)


def _check_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    h0: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    update: str = "sum",
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, bool]:
    x, weight, h0 = check_sequence(x, weight, h0, update)
    _checks.choice("activation", activation, ACTIVATIONS)
    state = state_dtype_of(x.dtype)
    for name, value in (("scale", scale), ("shift", shift)):
        _checks.shape(name, _checks.tensor(name, value), (x.shape[1],), "[C]")
        _checks.same_device(name, value, x, "x")
    if scale.dtype != state:
        scale = scale.to(state)
    if shift.dtype != state:
        shift = shift.to(state)
    if residual is not None:
        _checks.shape("residual", _checks.tensor("residual", residual), tuple(x.shape), "x's shape [N,C,T,H,W]")
        _checks.same_device("residual", residual, x, "x")
        (residual,) = _checks.autocast(residual)
        _checks.dtype("residual", residual, x.dtype)
    if torch.is_grad_enabled() and any(
        a is not None and a.requires_grad for a in (x, weight, scale, shift, h0, residual)
    ):
        raise RuntimeError(_INFERENCE_ONLY)
    return x, weight, scale, shift, h0, residual, update == "mean", activation == "relu"


_INFERENCE_ONLY = (
    "recurrent_conv_affine_act has no gradient: call it under torch.no_grad(), or train with recurrent_conv followed "
    "by separate normalisation and activation layers"
)

# ---- registered operators -----------------------------------------------------------------------------------------


def empty_state(x: Tensor) -> Tensor:
    """The state [N,C,H,W] in x's memory format and the state's dtype."""
    return torch.empty_like(x.select(2, 0), dtype=state_dtype_of(x.dtype))


def _fake_forward(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_state(x)


def _fake_backward(
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    mean: bool,
    reverse: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if need_weight_grad else weight.new_empty(0)
    return torch.empty_like(h), dweight, torch.empty_like(h0) if h0 is not None else h.new_empty(0)


def _fake_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    h0: Tensor | None,
    residual: Tensor | None,
    mean: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), empty_state(x)


def _reference_forward(
    x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    h, h_n = reference.recurrent_conv(x, weight, h0, update=UPDATES[int(mean)], reverse=reverse)
    return torch.empty_like(x).copy_(h), empty_state(x).copy_(h_n)


def _reference_backward(
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    mean: bool,
    reverse: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, dh0 = reference.recurrent_conv_backward(
        grad_h, grad_h_n, h, weight, h0, update=UPDATES[int(mean)], reverse=reverse
    )
    return (
        torch.empty_like(h).copy_(dx),
        dw if need_weight_grad else weight.new_empty(0),
        torch.empty_like(h0).copy_(dh0) if h0 is not None and dh0 is not None else h.new_empty(0),
    )


def _reference_affine_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    h0: Tensor | None,
    residual: Tensor | None,
    mean: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    y, h_n = reference.recurrent_conv_affine_act(
        x, weight, scale, shift, h0, residual, update=UPDATES[int(mean)], activation="relu" if relu else "identity"
    )
    return torch.empty_like(x).copy_(y), empty_state(x).copy_(h_n)


# ---- autograd -----------------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, h0, ctx.mean, ctx.reverse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight, h0)


def _backward(
    operators: _Operators, ctx: Any, grad_h: Tensor | None, grad_h_n: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_h is None and grad_h_n is None:
        return None, None, None, None, None
    h, weight, h0 = ctx.saved_tensors
    need_x, need_weight, need_h0 = ctx.needs_input_grad[:3]
    dx, dweight, dh0 = operators.backward(grad_h, grad_h_n, h, weight, h0, ctx.mean, ctx.reverse, need_weight)
    return dx if need_x else None, dweight if need_weight else None, dh0 if need_h0 else None, None, None


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    grad_h, grad_h_n, h, weight, h0, ctx.mean, ctx.reverse, ctx.need_weight_grad = inputs
    ctx.grad_h_dtype = None if grad_h is None else grad_h.dtype
    ctx.grad_h_n_dtype = None if grad_h_n is None else grad_h_n.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], h, weight, h0)


def _second_backward(
    operators: _Operators, ctx: Any, u: Tensor | None, v: Tensor | None, w: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the backward pass, for cotangents u, v, w of dx, dweight, dh0.

    The adjoint of the reversed scan is the forward scan again: with p_{-1} = w,

        p = recurrent_conv(u + v h_{t-1}, W, h0=w)       gradient of grad_h (and, at the last frame, of grad_h_n)
        gradient of h_{t-1} = v^T dx_t,   gradient of h0 = v^T dx_first,   gradient of W = sum_t dx_t p_{t-1}^T

    The factors 1/2 of update="mean" cancel. Everything is made of differentiable operators, so any order works.
    """
    dx, h, weight, h0 = ctx.saved_tensors
    if not ctx.need_weight_grad:
        v = None
    if h0 is None:
        w = None
    source = torch.zeros_like(dx) if u is None else u
    if v is not None:
        source = source + mix_channels(v, _previous(h, h0, ctx.reverse)).to(dx.dtype)
    start = w if w is not None or h0 is None else torch.zeros_like(h0)
    p, p_n = operators.forward(source, weight, start, ctx.mean, ctx.reverse)
    state = state_dtype_of(h.dtype)
    grad_weight = torch.einsum("nothw,ncthw->oc", dx.to(state), _previous(p, start, ctx.reverse).to(state)).to(
        weight.dtype
    )
    grad_h = grad_h0 = None
    if v is not None:
        earlier = mix_channels(v.T, dx)
        zeros = torch.zeros_like(earlier[:, :, :1])
        if ctx.reverse:
            grad_h = torch.cat([zeros, earlier[:, :, :-1]], dim=2)
            grad_h0 = earlier[:, :, -1]
        else:
            grad_h = torch.cat([earlier[:, :, 1:], zeros], dim=2)
            grad_h0 = earlier[:, :, 0]
    return (
        None if ctx.grad_h_dtype is None else p.to(ctx.grad_h_dtype),
        None if ctx.grad_h_n_dtype is None else p_n.to(ctx.grad_h_n_dtype),
        grad_h,
        grad_weight,
        None if h0 is None or grad_h0 is None else grad_h0.to(h0.dtype),
        None,
        None,
        None,
    )


def _previous(h: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """The state before each frame: h shifted by one frame in processing order, starting with ``first`` (or zero)."""
    start = (torch.zeros_like(h[:, :, 0]) if first is None else first.to(h.dtype)).unsqueeze(2)
    return torch.cat([h[:, :, 1:], start], dim=2) if reverse else torch.cat([start, h[:, :, :-1]], dim=2)


def _no_gradient(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(_INFERENCE_ONLY)


# ---- vmap ---------------------------------------------------------------------------------------------------------


def _fold(value: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move the mapped dimension into the batch: [N,...] or mapped [.., B, ..] -> [B*N,...]."""
    if value is None:
        return None
    mapped = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _vmap(operator: str, batched: tuple[int, ...]) -> Any:
    """The vmap rule of an operator whose arguments at positions ``batched`` have a leading batch dimension.

    When nothing else is mapped, the mapped dimension joins the batch; otherwise (a weight per sample, or a weight
    gradient, which sums over the batch) the operator runs once per index.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call = getattr(torch.ops.rcu_ops, operator)
        sums_over_batch = operator.startswith("recurrent_conv_backward") and args[-1]
        others_mapped = any(d is not None for i, d in enumerate(in_dims) if i not in batched)
        if sums_over_batch or others_mapped:
            return _transforms.one_call_per_sample(call, info, in_dims, *args)
        folded = [_fold(a, in_dims[i], info.batch_size) if i in batched else a for i, a in enumerate(args)]
        results = call(*folded)
        shaped = tuple(
            r.unflatten(0, (info.batch_size, -1)) if r.dim() > 1 else r.expand(info.batch_size, *r.shape)
            for r in results
        )
        return shaped, (0,) * len(shaped)

    return rule


# ---- FLOPs --------------------------------------------------------------------------------------------------------


def scan_flops(shape: Any, first_frame_free: bool) -> int:
    """FLOPs of W times every state of a scan over ``shape`` [N,C,T,H,W]; the first frame's is none without h0."""
    n, c, t, height, width = shape
    return 2 * n * c * c * (t - int(first_frame_free)) * height * width


def _forward_flops(x: Any, weight: Any, h0: Any, mean: bool, reverse: bool, out_shape: Any = None) -> int:
    return scan_flops(x, h0 is None)


def _backward_flops(
    grad_h: Any,
    grad_h_n: Any,
    h: Any,
    weight: Any,
    h0: Any,
    mean: bool,
    reverse: bool,
    need_weight_grad: bool,
    out_shape: Any = None,
) -> int:
    return scan_flops(h, h0 is None) * (1 + int(need_weight_grad))


def _affine_act_flops(
    x: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    h0: Any,
    residual: Any,
    mean: bool,
    relu: bool,
    out_shape: Any = None,
) -> int:
    return scan_flops(x, h0 is None)


# ---- registration -------------------------------------------------------------------------------------------------

_DEFINITIONS: dict[str, dict[str, Any]] = {
    "recurrent_conv": {
        "signature": "(Tensor x, Tensor weight, Tensor? h0, bool mean, bool reverse) -> (Tensor, Tensor)",
        "fake": _fake_forward,
        "reference": _reference_forward,
        "flops": _forward_flops,
        "batched": (0, 2),
    },
    "recurrent_conv_backward": {
        "signature": "(Tensor? grad_h, Tensor? grad_h_n, Tensor h, Tensor weight, Tensor? h0, bool mean, bool reverse, "
        "bool need_weight_grad) -> (Tensor, Tensor, Tensor)",
        "fake": _fake_backward,
        "reference": _reference_backward,
        "flops": _backward_flops,
        "batched": (0, 1, 2, 4),
    },
    "recurrent_conv_affine_act": {
        "signature": "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? h0, Tensor? residual, bool mean, "
        "bool relu) -> (Tensor, Tensor)",
        "fake": _fake_affine_act,
        "reference": _reference_affine_act,
        "flops": _affine_act_flops,
        "batched": (0, 4, 5),
    },
}


class _Operators:
    """The three registered operators of one family: defined, differentiable, mappable, counted.

    Args:
        suffix: after the operators' names. "" are those whose kernels the binary brings.
        cuda: per operator a Python function that is its CUDA kernel.
    """

    def __init__(self, suffix: str, cuda: dict[str, Callable[..., Any]]) -> None:
        for name, definition in _DEFINITIONS.items():
            _schema.define(
                f"{name}{suffix}{definition['signature']}",
                fake=definition["fake"],
                reference=definition["reference"],
                cuda=cuda.get(name),
            )
            _schema.flop_formula(f"{name}{suffix}", definition["flops"])
        rules = {name: _vmap(f"{name}{suffix}", definition["batched"]) for name, definition in _DEFINITIONS.items()}
        for name, rule in rules.items():
            torch.library.register_vmap(f"rcu_ops::{name}{suffix}", rule, lib=_schema.library)
        backward = functools.partial(_backward, self)
        second_backward = functools.partial(_second_backward, self)
        for name, function, setup_context in (
            ("recurrent_conv", backward, _save_for_backward),
            ("recurrent_conv_backward", second_backward, _save_for_second_backward),
            ("recurrent_conv_affine_act", _no_gradient, None),
        ):
            torch.library.register_autograd(
                f"rcu_ops::{name}{suffix}", function, setup_context=setup_context, lib=_schema.library
            )
        self._forward_operator = forward_operator = getattr(torch.ops.rcu_ops, f"recurrent_conv{suffix}")
        self._backward_operator = backward_operator = getattr(torch.ops.rcu_ops, f"recurrent_conv_backward{suffix}")
        self._affine_act_operator = getattr(torch.ops.rcu_ops, f"recurrent_conv_affine_act{suffix}")

        # For torch.func.grad and its kin, which gradients registered with torch.library do not serve.
        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return forward_operator(*args)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return backward(ctx, *grads)

            setup_context = staticmethod(_save_for_backward)
            vmap = staticmethod(rules["recurrent_conv"])

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return backward_operator(*args)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return second_backward(ctx, *grads)

            setup_context = staticmethod(_save_for_second_backward)
            vmap = staticmethod(rules["recurrent_conv_backward"])

        self._forward_function, self._backward_function = Forward, Backward

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """recurrent_conv, also under functorch transforms."""
        h, h_n = _transforms.call(self._forward_operator, *args, function=self._forward_function)
        return h, h_n

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        """recurrent_conv_backward, also under functorch transforms."""
        dx, dweight, dh0 = _transforms.call(self._backward_operator, *args, function=self._backward_function)
        return dx, dweight, dh0

    def affine_act(self, *args: Any) -> tuple[Tensor, Tensor]:
        """recurrent_conv_affine_act, which has no gradient."""
        y, h_n = _transforms.call(self._affine_act_operator, *args)
        return y, h_n


def _triton_kernel(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(_triton.kernels("recurrent_conv"), name)(*args)

    return run


BINARY = _Operators("", {})
_TRITON = _Operators(
    "_triton",
    {
        "recurrent_conv": _triton_kernel("forward"),
        "recurrent_conv_backward": _triton_kernel("backward"),
        "recurrent_conv_affine_act": _triton_kernel("affine_act"),
    },
)

# ---- backends -----------------------------------------------------------------------------------------------------


def why_not_triton(operator: str) -> Any:
    """The predicate of the backend triton, of operators around this one's scans too: takes x and anything more."""

    def why_not(x: Tensor, *_: Any) -> str | None:
        if x.device.type != "cuda":
            return f"x is on {x.device}"
        if not _triton.PRESENT:
            return "the package triton is not installed"
        if x.dtype == torch.float64:
            return "x is float64, and the Triton kernels keep the state in float32"
        if x.shape[1] > _triton.MAX_CHANNELS:
            return f"x has {x.shape[1]} channels, and the Triton kernels hold a state of at most {_triton.MAX_CHANNELS}"
        return _triton.why_not_device(x.device) or _selftest.why_not(f"{operator}/triton", x.device, x.dtype)

    return why_not


def cuda_plan(
    x: Tensor,
    h0: Tensor | None,
    residual: Tensor | None = None,
    reverse: bool = False,
    statistics: bool = False,
    weight: Tensor | None = None,
) -> str:
    """How the CUDA kernels would run a scan on x's device, in words.

    Args:
        statistics: for batch normalisation after it.
        weight: how its gradient would be summed up is said too, if it requires one.
    """
    native = _library.native()
    if native is None:
        return _planner.NO_WORDS
    limits = _planner.gpu_limits(x.device)
    misalignment = 0
    for tensor in (x, residual):
        misalignment |= 0 if tensor is None else tensor.data_ptr() % 16
    dtype, like_x = str(x.dtype).removeprefix("torch."), torch.empty_like(x, device="meta").stride()
    text = native.recurrent_conv_gpu_plan(
        x.shape,
        dtype,
        x.stride(),
        like_x,
        residual=None if residual is None else residual.stride(),
        misalignment=misalignment,
        with_state=h0 is not None,
        reverse=reverse,
        statistics=statistics,
        **limits,
        sm90a=_planner.holds_sm90a(),
    )["text"]
    if weight is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return text
    backwards = native.recurrent_conv_gpu_plan(
        x.shape,
        dtype,
        like_x,
        like_x,
        residual=like_x,
        reverse=not reverse,
        weight_sums=not statistics,
        **limits,
        sm90a=_planner.holds_sm90a(),
    )
    if parts := backwards["weight_parts"]:
        return f"{text}; gradient of the weight: added up by the scan backwards in time, in {parts} parts"
    first = None if h0 is None else (h0.stride(0), h0.stride(1), 0, h0.stride(2), h0.stride(3))
    summed = native.recurrent_conv_gpu_weight_grad(
        x.shape, dtype, like_x, like_x, first, reverse=reverse, shared_bytes=limits["shared_bytes"]
    )["text"]
    return f"{text}; gradient of the weight: {summed}"


def _triton_plan(x: Tensor, weight: Tensor, *_: Any) -> str:
    return _triton.kernels("recurrent_conv").describe(x, weight)


def _cpu_plan(x: Tensor, h0: Tensor | None, residual: Tensor | None = None) -> str:
    native = _library.native()
    if native is None:
        return f"one scan; {_planner.NO_WORDS}"
    n, c, t, height, width = x.shape
    return native.recurrent_conv_plan(
        n,
        c,
        t,
        height * width,
        str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        channels_last=x.stride(1) == 1,
        with_state=h0 is not None,
        dense=all(value is None or value.stride(1) == 1 for value in (h0, residual)),
    )


def _through_operator(x: Tensor) -> bool:
    # Tracers unroll the reference's loop over frames and fix T. Where no binary holds the operator's kernel, the
    # operator itself runs the reference, so a traced graph may as well hold the operator.
    return torch.compiler.is_compiling() and not _library.has_kernel("recurrent_conv", x.device.type.upper())


def _run_reference(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    if _through_operator(x):
        return BINARY.forward(x, weight, h0, mean, reverse)
    return reference.recurrent_conv(x, weight, h0, update=UPDATES[int(mean)], reverse=reverse)


def _run_reference_affine_act(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if _through_operator(x):
        return BINARY.affine_act(x, *args)
    weight, scale, shift, h0, residual, mean, relu = args
    return reference.recurrent_conv_affine_act(
        x,
        weight,
        scale,
        shift,
        h0,
        residual,
        update=UPDATES[int(mean)],
        activation="relu" if relu else "identity",
    )


def _probe(device: str) -> tuple[Any, ...]:
    return torch.empty(1, 8, 2, 4, 4, device=device), torch.empty(8, 8, device=device), None, False, False


def _probe_affine_act(device: str) -> tuple[Any, ...]:
    x, weight, *_ = _probe(device)
    channels = torch.empty(8, device=device)
    return x, weight, channels, channels, None, None, False, True


OPERATOR = register(
    Operator(
        "recurrent_conv",
        (
            Backend(
                "cuda",
                BINARY.forward,
                _predicates.why_not_cuda("recurrent_conv", "recurrent_conv"),
                lambda *a: cuda_plan(a[0], a[2], reverse=a[4], weight=a[1]),
                experimental=_evidence.experimental("recurrent_conv"),
            ),
            Backend("triton", _TRITON.forward, why_not_triton("recurrent_conv"), _triton_plan),
            Backend("cpu", BINARY.forward, _predicates.why_not_cpu("recurrent_conv"), lambda *a: _cpu_plan(a[0], a[2])),
            Backend("reference", _run_reference, _predicates.why_not_reference),
        ),
        check=_check,
        probe=_probe,
    )
)
AFFINE_ACT = register(
    Operator(
        "recurrent_conv_affine_act",
        (
            Backend(
                "cuda",
                BINARY.affine_act,
                _predicates.why_not_cuda("recurrent_conv_affine_act", "recurrent_conv"),
                lambda *a: cuda_plan(a[0], a[4], a[5]),
                experimental=_evidence.experimental("recurrent_conv"),
            ),
            Backend("triton", _TRITON.affine_act, why_not_triton("recurrent_conv_affine_act"), _triton_plan),
            Backend(
                "cpu",
                BINARY.affine_act,
                _predicates.why_not_cpu("recurrent_conv_affine_act"),
                lambda *a: _cpu_plan(a[0], a[4], a[5]),
            ),
            Backend("reference", _run_reference_affine_act, _predicates.why_not_reference),
        ),
        check=_check_affine_act,
        probe=_probe_affine_act,
    )
)

# ---- self-tests of the Triton kernels -----------------------------------------------------------------------------


def _selftest_inputs(device: torch.device, dtype: torch.dtype) -> list[tuple[str, list[Tensor]]]:
    """x, weight, h0 and a residual, for channels_last_3d with odd sizes, and for frames in contiguous memory."""
    generator = torch.Generator("cpu").manual_seed(20)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    problems = []
    for name, (n, c, t, height, width) in (("odd sizes", (2, 24, 3, 5, 7)), ("64 channels", (1, 64, 4, 8, 8))):
        weight = (torch.eye(c, device="cpu") / 2 + random(c, c).float() * (0.4 / c**0.5)).to(dtype)
        tensors = [random(n, c, t, height, width), weight, random(n, c, height, width), random(n, c, t, height, width)]
        if name == "odd sizes":
            tensors[0] = tensors[0].to(memory_format=torch.channels_last_3d)
        problems.append((name, [value.to(device) for value in tensors]))
    return problems


def _selftest_cases(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    """Forward with h0 and backward with everything asked for."""
    for name, (x, weight, h0, grad) in _selftest_inputs(device, dtype):

        def got(x: Tensor = x, weight: Tensor = weight, h0: Tensor = h0, grad: Tensor = grad) -> list[Tensor]:
            h, h_n = operators.recurrent_conv(x, weight, h0, True, False)
            backward = (grad, h0.to(h_n.dtype), h, weight, h0, True, False, True)
            return [h, h_n, *operators.recurrent_conv_backward(*backward)]

        def want(
            to: torch.dtype, x: Tensor = x, weight: Tensor = weight, h0: Tensor = h0, grad: Tensor = grad
        ) -> list[Tensor]:
            leaves = [value.detach().cpu().to(to).requires_grad_() for value in (x, weight, h0)]
            with torch.enable_grad():
                outputs = reference.recurrent_conv(*leaves, update="mean", state_dtype=to)
            weights = [grad.cpu().to(to), h0.detach().cpu().to(to)]
            return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

        yield _selftest.Case(
            f"forward and backward, {name}", got, functools.partial(want, torch.float64), functools.partial(want, dtype)
        )


def _selftest_affine_act_cases(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    """The fused form with h0, residual and ReLU."""
    for name, (x, weight, h0, residual) in _selftest_inputs(device, dtype):
        scale, shift = (value.float().contiguous() for value in (weight[0] + 1, weight[1]))

        def got(args: tuple[Any, ...] = (x, weight, scale, shift, h0, residual, False, True)) -> Any:
            return operators.recurrent_conv_affine_act(*args)

        def want(to: torch.dtype, args: tuple[Tensor, ...] = (x, weight, scale, shift, h0, residual)) -> Any:
            return reference.recurrent_conv_affine_act(*(value.cpu().to(to) for value in args), state_dtype=to)

        yield _selftest.Case(name, got, functools.partial(want, torch.float64), functools.partial(want, dtype))


_SOURCES = (Path(__file__), *_triton.sources("recurrent_conv"))
_selftest.register_backends("recurrent_conv", _selftest_cases, _SOURCES)
_selftest.register_backends("recurrent_conv_affine_act", _selftest_affine_act_cases, _SOURCES)
