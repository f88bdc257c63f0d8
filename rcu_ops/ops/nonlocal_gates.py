"""``nonlocal_attention`` and ``relational_lstm_step``: the non-local operation and the gates made of it."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcu_ops import _library, reference
from rcu_ops.ops import _checks, _evidence, _planner, _predicates, _schema, _selftest, _transforms, _triton
from rcu_ops.ops._registry import Backend, Operator, Overtaken, register, settled, wants_gradients
from rcu_ops.reference.nonlocal_gates import lstm_gates, relational_lstm_gates
from rcu_ops.reference.recurrent_conv import state_dtype_of

NORMALIZERS = ("softmax", "count")

#: The widest heads of PyTorch's flash attention; ``narrow_head`` in csrc/common/nonlocal_gates_library.h.
NARROW = 256


def nonlocal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "softmax",
) -> Tensor:
    """The generalised non-local operation (Eqs. 1 and 2 of the Relational LSTM), its three projections given.

    ``out_i = sum_j w_ij value_j`` with ``w_ij = softmax_j(scale query_i . key_j)`` (embedded Gaussian), or
    ``w_ij = scale query_i . key_j / M`` (dot product, ``normalize="count"``, M the number of keys that query i sees).
    Unlike in scaled dot-product attention the scale is 1 by default, and heads of 1024 channels are the normal case.

    Args:
        query: [...,N,D], key: [...,M,D], value: [...,M,Dv]: fp16, bf16, fp32 or fp64, one dtype and device, equal
            leading dimensions, any strides. Every size may be 0.
        mask: bool, broadcastable to [...,N,M], True where query i sees key j; None: everywhere.
        scale: factor of the scores.
        normalize: "softmax" or "count".

    Returns:
        [...,N,Dv], contiguous, in value's dtype. A query that sees no key, or whose scores are all -inf ("softmax"),
        gets zeros and takes no part in any gradient.

    Raises:
        TypeError: not a tensor, wrong dtype, a scale that is no number. ValueError: wrong shape, device,
        ``normalize``, a scale that is not finite, or a backend that cannot run these arguments.

    Scores and sums are fp32 for 16-bit inputs. Nothing but inputs is kept for the backward pass. Under autocast query,
    key and value are cast to its dtype. Differentiable to any order on the reference and cpu backends.

    On CPUs every thread works in memory of its own, whatever the batch: at most 0.2 MiB for 49 keys and 0.8 MiB for
    196, three times that in :func:`relational_lstm_step`. All temporaries of eager PyTorch may be less than twice that
    where there are a few small samples.
    """
    args = _check_attention(query, key, value, mask=mask, scale=scale, normalize=normalize)
    out = ATTENTION.select(*args).run(*args)
    return out.reshape(*query.shape[:-2], *out.shape[1:])


def relational_lstm_step(
    x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the Relational LSTM (Eq. 3): four non-local gates over the hidden state, and the cell update, fused.

    For the gates i, f, o, g in this order: ``a = x_gates + softmax(query key^T) value``; then ``i, f, o = sigmoid(a)``,
    ``g = tanh(a)``, ``c = f cell + i g``, ``h = o tanh(c)``.

    Args:
        x_gates: [B,4,P,Dv], the input-to-state relations ``r(X_t, X_t)``; fp16, bf16, fp32 or fp64.
        query: [B,4,P,D], projections of ``X_t``; key: [B,4,P,D] and value: [B,4,P,Dv], projections of ``H_{t-1}``;
            x_gates' dtype and device, any strides (a key or value that the gates share may be expanded).
        cell: [B,P,Dv], ``C_{t-1}``, in x_gates' dtype or the state's.

    Returns:
        ``(h, c)``: h [B,P,Dv] in x_gates' dtype; c [B,P,Dv] in the state's dtype (fp32, fp64 for fp64).

    Raises:
        TypeError: not a tensor, wrong dtype. ValueError: wrong shape or device, or a backend that cannot run these
        arguments.

    Nothing but inputs is kept for the backward pass, except on CPUs: the weights (4 P^2 numbers per sample), and the
    four gates before their nonlinearities, where that is at most half of what eager PyTorch takes, and on GPUs, where
    "auto" leaves wide heads to PyTorch's own operations: all that eager PyTorch keeps. :func:`rcu_ops.explain` says
    which. Under autocast all but cell are cast to its dtype.
    Differentiable to any order on the reference and cpu backends.
    """
    args = _check_step(x_gates, query, key, value, cell)
    h, c, *_ = STEP.select(*args).run(*args)
    return h, c


# ---- checks -------------------------------------------------------------------------------------------------------


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    normalize: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool]:
    """The backends' arguments: leading dimensions folded into one, the mask expanded (not copied) to [B,N,M]."""
    _checks.tensor("query", query)
    if query.dim() < 2:
        raise ValueError(f"query: expected [...,N,D], got {query.dim()} dimensions {list(query.shape)}")
    lead, (n, d) = query.shape[:-2], query.shape[-2:]
    for name, given in (("key", key), ("value", value)):
        _checks.tensor(name, given)
        _checks.same_device(name, given, query, "query")
        if given.dim() != query.dim():
            raise ValueError(f"{name}: expected {query.dim()} dimensions like query, got {list(given.shape)}")
    m, dv = key.shape[-2], value.shape[-1]
    _checks.shape("key", key, (*lead, m, d), "[...,M,D]")
    _checks.shape("value", value, (*lead, m, dv), "[...,M,Dv]")
    query, key, value = _checks.autocast(query, key, value)
    _checks.dtype("key", key, query.dtype)
    _checks.dtype("value", value, query.dtype)
    _checks.choice("normalize", normalize, NORMALIZERS)
    if not isinstance(scale, float | int | torch.SymFloat | torch.SymInt):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    # Compared, not asked math.isfinite, which torch.compile(dynamic=True) cannot trace.
    if isinstance(scale, float) and not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if mask is not None:
        _checks.same_device("mask", _checks.boolean("mask", mask), query, "query")
        whole = (*lead, n, m)
        padded = (1,) * (len(whole) - mask.dim()) + tuple(mask.shape)
        if len(padded) != len(whole) or any(a not in (1, b) for a, b in zip(padded, whole, strict=True)):
            raise ValueError(
                f"mask: expected broadcastable to [...,N,M] = {[int(s) for s in whole]}, got {list(mask.shape)}"
            )
        mask = _fold(mask.expand(whole))
    return _fold(query), _fold(key), _fold(value), mask, float(scale), normalize == "count"


def _fold(value: Tensor) -> Tensor:
    """[...,a,b] -> [B,a,b]: a view wherever there is one."""
    if value.dim() == 3:
        return value
    return value.unsqueeze(0) if value.dim() == 2 else value.flatten(0, -3)


def _check_step(
    x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _checks.dims("x_gates", _checks.tensor("x_gates", x_gates), "[B,4,P,Dv]")
    b, gates, p, dv = x_gates.shape
    if gates != 4:
        raise ValueError(f"x_gates: expected the 4 gates i, f, o, g in [B,4,P,Dv], got {list(x_gates.shape)}")
    _checks.dims("query", _checks.tensor("query", query), "[B,4,P,D]")
    d = query.shape[-1]
    for name, given, shape, meaning in (
        ("query", query, (b, 4, p, d), "[B,4,P,D]"),
        ("key", key, (b, 4, p, d), "[B,4,P,D]"),
        ("value", value, (b, 4, p, dv), "[B,4,P,Dv]"),
        ("cell", cell, (b, p, dv), "[B,P,Dv]"),
    ):
        _checks.shape(name, _checks.tensor(name, given), shape, meaning)
        _checks.same_device(name, given, x_gates, "x_gates")
    x_gates, query, key, value = _checks.autocast(x_gates, query, key, value)
    for name, given in (("query", query), ("key", key), ("value", value)):
        _checks.dtype(name, given, x_gates.dtype)
    _checks.dtype("cell", cell, x_gates.dtype, state_dtype_of(x_gates.dtype))
    return x_gates, query, key, value, cell


# ---- registered operators -----------------------------------------------------------------------------------------


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


def _fake_step(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    return x_gates.new_empty(cell.shape), cell.new_empty(cell.shape, dtype=state_dtype_of(x_gates.dtype))


def _fake_step_kept_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, *forward: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _fake_step_backward(grad_h, grad_c, *forward[:5])


def _fake_step_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, *forward: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_gates, query, key, value, cell = forward
    return _empty(x_gates), _empty(query), _empty(key), _empty(value), _empty(cell)


def _kept_keys(x_gates: Tensor) -> Any:
    """The length of kept weights' rows: whole lines of 64 bytes."""
    line = 64 // state_dtype_of(x_gates.dtype).itemsize
    return (x_gates.shape[2] + line - 1) // line * line


def _fake_step_kept(
    x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor, gates: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, four, p, dv = x_gates.shape
    state = state_dtype_of(x_gates.dtype)
    return (
        *_fake_step(x_gates, query, key, value, cell),
        x_gates.new_empty((b, four, p, _kept_keys(x_gates)), dtype=state),
        x_gates.new_empty((b, gates, p, dv), dtype=state),
    )


def _contiguous(results: Tensor | tuple[Tensor, ...]) -> Any:
    return results.contiguous() if isinstance(results, Tensor) else tuple(r.contiguous() for r in results)


def _reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> Tensor:
    return _contiguous(
        reference.nonlocal_attention(query, key, value, mask=mask, scale=scale, normalize=NORMALIZERS[int(count)])
    )


def _reference_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous(
        reference.nonlocal_attention_backward(
            grad, query, key, value, mask=mask, scale=scale, normalize=NORMALIZERS[int(count)]
        )
    )


def _reference_step(*args: Tensor) -> tuple[Tensor, Tensor]:
    return _contiguous(reference.relational_lstm_step(*args))


def _reference_step_backward(grad_h: Tensor | None, grad_c: Tensor | None, *forward: Tensor) -> tuple[Tensor, ...]:
    return _contiguous(reference.relational_lstm_step_backward(grad_h, grad_c, *forward))


def _reference_step_kept(
    x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor, gates: int
) -> tuple[Tensor, ...]:
    h, c, weights, before = _fake_step_kept(x_gates, query, key, value, cell, gates)
    found, found_gates = relational_lstm_gates(x_gates, query, key, value)
    weights.zero_()[..., : found.shape[-1]].copy_(found)
    before.copy_(found_gates[:, :gates])
    for to, result in zip((h, c), lstm_gates(found_gates, cell.to(found_gates.dtype)), strict=True):
        to.copy_(result)
    return h, c, weights, before


def _reference_step_kept_backward(grad_h: Tensor | None, grad_c: Tensor | None, *forward: Tensor) -> tuple[Tensor, ...]:
    return _reference_step_backward(grad_h, grad_c, *forward[:5])


# ---- autograd -----------------------------------------------------------------------------------------------------


def _vector_jacobian(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Cotangents times the Jacobian of a differentiable function; inputs that are None stay out of it."""
    given = [i for i, value in enumerate(inputs) if value is not None]

    def of_given(*tensors: Tensor) -> tuple[Tensor, ...]:
        everything = list(inputs)
        for i, tensor in zip(given, tensors, strict=True):
            everything[i] = tensor
        return function(*everything)

    outputs, pull, *_ = torch.func.vjp(of_given, *(inputs[i] for i in given))
    gradients: list[Tensor | None] = [None] * len(inputs)
    pulled = pull(tuple(torch.zeros_like(o) if c is None else c for o, c in zip(outputs, cotangents, strict=True)))
    for i, gradient in zip(given, pulled, strict=True):
        gradients[i] = gradient
    return gradients


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, ctx.count = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _attention_gradients(operators: _Operators, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    query, key, value, mask = ctx.saved_tensors
    gradients = operators.attention_backward(grad, query, key, value, mask, ctx.scale, ctx.count)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)), None, None, None


def _attention_second_gradients(operators: _Operators, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    *tensors, mask = ctx.saved_tensors
    backward = functools.partial(
        reference.nonlocal_attention_backward, mask=mask, scale=ctx.scale, normalize=NORMALIZERS[ctx.count]
    )
    return *_vector_jacobian(backward, tuple(tensors), cotangents), None, None, None


def _save_step(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _step_gradients(
    operators: _Operators, ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_h is None and grad_c is None:
        return (None,) * 5
    gradients = operators.step_backward(grad_h, grad_c, *ctx.saved_tensors)
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _save_step_kept(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    kept = output[2:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*inputs[:5], *kept)


def _step_kept_gradients(
    operators: _Operators, ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_h is None and grad_c is None:
        return (None,) * 6
    gradients = operators.step_kept_backward(grad_h, grad_c, *ctx.saved_tensors)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)), None


def _save_step_kept_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])  # weights and gates are functions of these


def _step_kept_second_gradients(operators: _Operators, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return *_step_second_gradients(operators, ctx, *cotangents), None, None


def _step_second_gradients(operators: _Operators, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return tuple(_vector_jacobian(reference.relational_lstm_step_backward, ctx.saved_tensors, cotangents))


# ---- vmap ---------------------------------------------------------------------------------------------------------


def _vmap(operator: str) -> Callable[..., Any]:
    """Every tensor of these operators has a leading batch dimension, and the mapped dimension joins it."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        folded = []
        for value, dim in zip(args, in_dims, strict=True):
            if isinstance(value, Tensor):
                every = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
                value = every.flatten(0, 1)
            folded.append(value)
        results = getattr(torch.ops.rcu_ops, operator)(*folded)
        if isinstance(results, Tensor):
            return results.unflatten(0, (info.batch_size, -1)), 0
        return tuple(r.unflatten(0, (info.batch_size, -1)) for r in results), (0,) * len(results)

    return rule


# ---- FLOPs --------------------------------------------------------------------------------------------------------


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None) -> int:
    b, n, d = query
    return 2 * b * n * value[1] * (d + value[2])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None) -> int:
    b, n, d = query
    return 2 * b * n * value[1] * (3 * d + 2 * value[2])


def _step_flops(x_gates: Any, query: Any, key: Any, value: Any, cell: Any, out_shape: Any = None) -> int:
    b, gates, p, d = query
    return 2 * b * gates * p * p * (d + value[3])


def _step_backward_flops(
    grad_h: Any, grad_c: Any, x_gates: Any, query: Any, key: Any, value: Any, cell: Any, out_shape: Any = None
) -> int:
    b, gates, p, d = query
    return 2 * b * gates * p * p * 3 * (d + value[3])


def _step_kept_flops(
    x_gates: Any, query: Any, key: Any, value: Any, cell: Any, gates: int, out_shape: Any = None
) -> int:
    return _step_flops(x_gates, query, key, value, cell)


def _step_kept_backward_flops(
    grad_h: Any, grad_c: Any, x_gates: Any, query: Any, key: Any, value: Any, cell: Any, weights: Any, gates: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    b, four, p, d = query
    return 2 * b * p * p * (four * 2 * d + (four * 3 - gates[1]) * value[3])


# ---- registration -------------------------------------------------------------------------------------------------

_STEP = "Tensor x_gates, Tensor query, Tensor key, Tensor value, Tensor cell"
_ATTENTION = "Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool count"

_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

#: name: signature, fake, reference, FLOP formula, what it saves, its gradient.
_DEFINITIONS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., int], Any, Any]] = {
    "nonlocal_attention": (
        f"({_ATTENTION}) -> Tensor",
        _fake_attention,
        _reference_attention,
        _attention_flops,
        _save_attention,
        _attention_gradients,
    ),
    "nonlocal_attention_backward": (
        f"(Tensor grad, {_ATTENTION}) -> (Tensor, Tensor, Tensor)",
        _fake_attention_backward,
        _reference_attention_backward,
        _attention_backward_flops,
        _save_attention,
        _attention_second_gradients,
    ),
    "relational_lstm_step": (
        f"({_STEP}) -> (Tensor, Tensor)",
        _fake_step,
        _reference_step,
        _step_flops,
        _save_step,
        _step_gradients,
    ),
    "relational_lstm_step_backward": (
        f"(Tensor? grad_h, Tensor? grad_c, {_STEP}) -> {_GRADIENTS}",
        _fake_step_backward,
        _reference_step_backward,
        _step_backward_flops,
        _save_step,
        _step_second_gradients,
    ),
}

#: The same step, which leaves the weights [B,4,P,P padded] and the first gates before their nonlinearities
#: [B,gates,P,Dv] to its backward pass: as the CPU's kernels have them, in the state's dtype.
_KEPT_DEFINITIONS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., int], Any, Any]] = {
    "relational_lstm_step_kept": (
        f"({_STEP}, int gates) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_step_kept,
        _reference_step_kept,
        _step_kept_flops,
        _save_step_kept,
        _step_kept_gradients,
    ),
    "relational_lstm_step_kept_backward": (
        f"(Tensor? grad_h, Tensor? grad_c, {_STEP}, Tensor weights, Tensor gates) -> {_GRADIENTS}",
        _fake_step_kept_backward,
        _reference_step_kept_backward,
        _step_kept_backward_flops,
        _save_step_kept_backward,
        _step_kept_second_gradients,
    ),
}


class _Operators:
    """The registered operators of one family: defined, differentiable, mappable, counted.

    Args:
        suffix: after the operators' names. "" are those whose kernels the binary brings.
        definitions: as :data:`_DEFINITIONS`.
        cuda: per operator a Python function that is its CUDA kernel.
    """

    def __init__(
        self, suffix: str, definitions: dict[str, tuple[Any, ...]], cuda: dict[str, Callable[..., Any]]
    ) -> None:
        calls = {}
        for name, (signature, fake, reference_kernel, flops, save, gradient) in definitions.items():
            _schema.define(f"{name}{suffix}{signature}", fake=fake, reference=reference_kernel, cuda=cuda.get(name))
            _schema.flop_formula(f"{name}{suffix}", flops)
            rule, gradient = _vmap(f"{name}{suffix}"), functools.partial(gradient, self)
            torch.library.register_vmap(f"rcu_ops::{name}{suffix}", rule, lib=_schema.library)
            torch.library.register_autograd(
                f"rcu_ops::{name}{suffix}", gradient, setup_context=save, lib=_schema.library
            )
            calls[name] = _differentiable(getattr(torch.ops.rcu_ops, f"{name}{suffix}"), save, gradient, rule)
        self.attention, self.attention_backward, self.step, self.step_backward = (calls[n] for n in _DEFINITIONS)
        self.step_kept: Any
        self.step_kept_backward: Any
        self.step_kept, self.step_kept_backward = (calls.get(n) for n in _KEPT_DEFINITIONS)


def _differentiable(
    operator: Callable[..., Any], save: Callable[..., None], gradient: Callable[..., Any], rule: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator, also under torch.func.grad and its kin, which torch.library's gradients do not serve."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradient(ctx, *grads)

        setup_context = staticmethod(save)
        vmap = staticmethod(rule)

    def call(*args: Any) -> Any:
        return _transforms.call(operator, *args, function=Function)

    return call


def _misalignment(*tensors: Tensor) -> int:
    """What keeps rows from lying at multiples of 16 bytes: bits of addresses and strides, 0 where nothing does."""
    found = 0
    for tensor in tensors:
        found |= tensor.data_ptr() % 16
        for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False):
            found |= (stride * tensor.element_size()) % 16 if size > 1 else 0
    return found


def _attention_is_on(query: Tensor) -> bool:
    """Whether the kernel of PyTorch's attention that would be taken is switched on: the wide heads' or flash's."""
    if query.device.type == "cuda" and query.shape[-1] > NARROW:
        return torch.backends.cuda.mem_efficient_sdp_enabled()
    return torch.backends.cuda.flash_sdp_enabled()  # one switch for all devices


def _why_not_library(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> str | None:
    """Why PyTorch's own attention does not run the forward pass, or None where it is faster and does."""
    native = _library.native()
    if native is None:
        return _planner.NO_WORDS
    if not _attention_is_on(query):
        return (
            "its attention for wide heads is switched off"
            if query.shape[-1] > NARROW
            else ("its flash attention is switched off")
        )
    cuda = query.device.type == "cuda"
    (b, n, d), (m, e) = query.shape, value.shape[1:]
    why_not: str | None = native.nonlocal_gates_why_not_library(
        b, n, m, d, e, str(query.dtype).removeprefix("torch."), mask is not None, count,
        _planner.gpu_limits(query.device)["architecture"] if cuda else None,
        _misalignment(query, key, value) if cuda and d > NARROW else 0,
    )  # fmt: skip
    return why_not


def _attention_plan(*args: Any, kernels: str) -> str:
    """Who runs the forward pass, and how the kernels run what they run."""
    why_not = _why_not_library(*args)
    if why_not is None:
        return f"forward: PyTorch's scaled_dot_product_attention, which is faster here; gradients: {kernels}"
    if why_not == _planner.NO_WORDS:
        return f"{kernels}; {why_not}"
    return f"{kernels}; not PyTorch's attention: {why_not}"


def _triton_kernel(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(_triton.kernels("nonlocal_gates"), name)(*args)

    return run


def _triton_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> Tensor:
    """The Triton kernel, or PyTorch's flash attention where that is faster; dead queries get zeros from either."""
    if query.shape[-1] <= NARROW and _why_not_library(query, key, value, mask, scale, count) is None:
        heads = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no other kernel of the library's is faster
            out = torch.nn.functional.scaled_dot_product_attention(*heads, scale=scale).squeeze(1)
        if out.dtype == query.dtype:  # autocast may have made another of it
            return out.contiguous()
    found: Tensor = _triton_kernel("attention")(query, key, value, mask, scale, count)
    return found


_BINARY = _Operators("", {**_DEFINITIONS, **_KEPT_DEFINITIONS}, {})
_TRITON = _Operators(
    "_triton",
    _DEFINITIONS,
    dict(
        zip(
            _DEFINITIONS,
            (_triton_attention, *map(_triton_kernel, ("attention_backward", "step", "step_backward"))),
            strict=True,
        )
    ),
)

# ---- backends -----------------------------------------------------------------------------------------------------


def _run_reference_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> Tensor:
    return reference.nonlocal_attention(query, key, value, mask=mask, scale=scale, normalize=NORMALIZERS[int(count)])


def _why_not_triton(operator: str) -> Callable[..., str | None]:
    def why_not(x: Tensor, *_: Any) -> str | None:
        if x.device.type != "cuda":
            return f"x is on {x.device}"
        if not _triton.PRESENT:
            return "the package triton is not installed"
        if x.dtype == torch.float64:
            return "x is float64, and the Triton kernels add up in float32"
        return _triton.why_not_device(x.device) or _selftest.why_not(f"{operator}/triton", x.device, x.dtype)

    return why_not


# Wide heads are left to PyTorch's own operations where an H200 was faster with them, in microseconds of Triton and of
# eager PyTorch (benchmarks/results/nvidia-h200/first_run/, calls in CUDA graphs but for the gradients):
#   fp32 attention   B1 P49 D1024 166 : 45, B24 P49 D1024 325 : 79, B1 P196 D512 1306 : 37
#   bf16 attention   B1 P49 D1024 26 : 36, B24 P49 D1024 53 : 64 (Triton's), B1 P196 D512 101 : 22
#   fp32 step        379 : 58, 1128 : 130, 1311 : 50
#   bf16 step        73 : 58, 223 : 123, 105 : 44
#   step, gradients  fp32 2548 : 1746, 26342 : 2062, 7092 : 1619; bf16 1665 : 1865, 2706 : 1660, 1740 : 1428
# The attention's gradients are the step's kernels (key_gradient_kernel alone 1337 of 1859 us, bf16 B24 P49). Nothing
# says anything of narrow heads, nor of maps of weights larger than the tensors, which only the kernels never hold.
_WIDE = f"heads of more than {NARROW} channels"
_MANY = 64
_AT_WHAT_COST = "in eager PyTorch's memory"


def _map_outgrows(query: Tensor, key: Tensor, value: Tensor) -> bool:
    (n, d), (m, e) = query.shape[-2:], value.shape[-2:]
    return settled(n * m > n * d + m * (d + e))


def _why_pytorch_attends(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, count: bool
) -> str | None:
    if not settled(query.shape[-1] > NARROW) or _map_outgrows(query, key, value):
        return None
    if query.dtype == torch.float32:
        what = "in fp32"
    elif wants_gradients(query, key, value):
        what = "where gradients are asked for"
    elif settled(query.shape[-2] > _MANY):
        what = f"and more than {_MANY} positions"
    else:
        return None
    return f"PyTorch's own operations were measured faster for {_WIDE} {what}, {_AT_WHAT_COST}"


def _why_pytorch_steps(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> str | None:
    if not settled(query.shape[-1] > NARROW) or _map_outgrows(query, key, value):
        return None
    return f"PyTorch's own operations were measured faster for {_WIDE} in a step, {_AT_WHAT_COST}"


def _cuda_plan(
    kind: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 1.0,
    count: bool = False,
) -> str:  # fmt: skip
    native = _library.native()
    if native is None:
        return _planner.NO_WORDS
    b, *gates, n, d = query.shape
    said: str = native.nonlocal_gates_gpu_plan(
        kind, b, *(gates or [1]), n, key.shape[-2], d, value.shape[-1],
        str(query.dtype).removeprefix("torch."),
        **_planner.gpu_limits(query.device),
        misalignment=_misalignment(query, key, value),
        sm90a=_planner.holds_sm90a(),
        masked=mask is not None,
        count=count,
        attention=_attention_is_on(query),
    )["said"]  # fmt: skip
    if kind == "step" or (why_not := _why_not_library(query, key, value, mask, scale, count)) is None:
        return said
    return f"{said}; not PyTorch's attention: {why_not}"


def _triton_plan(query: Tensor, key: Tensor, *_: Any) -> str:
    return _triton.kernels("nonlocal_gates").describe(query, key)


def _cpu_plan(*_: Any) -> str:
    native = _library.native()
    isa = "" if native is None else f" ({native.cpu_isa()})"
    return f"blocks of queries{isa}: their scores, weights and results stay in the cache; no map of the batch"


# A step's gradients cost six products where its weights and its gates (before their nonlinearities) are computed again,
# five with the weights kept, and a quarter less for every gate kept; eager PyTorch's cost four. Kept is as much as
# leaves all temporaries within half of eager PyTorch's; and the weights of no more samples than threads where the
# kernels, by smaller blocks, stay within it too. Eager's, per sample, are the weights and, at their most, ten numbers
# per position and channel (the four nonlinearities, tanh(c), and as many gradients before they are added up):
# tests/ops/test_nonlocal_gates_memory.py counts them. Gates are not kept where that was measured to gain nothing:
# of few positions, and in tensors of which the C library makes a new mapping at every call.
#
# Milliseconds of a step with gradients, of B P D = Dv in fp32 on an Emerald Rapids processor (2 threads, torch 2.13):
# nothing kept : weights : weights and four gates : eager PyTorch.
#   2 49 1024   2.4 : 2.2 : 2.0 : 3.6      1 196 512   5.7 : 5.1 : 4.5 : 5.7      4 196 512  22.5 : 20.1 : 17.4 : 21.9
#   24 49 1024  36 : 32 : 33 : 49         24 196 512   154 : 145 : 142 : 178
# and in bf16 on a Zen 4 processor
#   1 49 1024  0.88 : 0.79 : 0.68 : 1.6    1 196 512   4.3 : 3.5 : 3.3 : 4.3      4 196 512  15.6 : 13.8 : 13.4 : 15.9
_MOST_OF_GATES = 32 << 20
_MOST_OF_A_MAP = 1 << 18  # numbers of a sample's four maps that are made at once: whole_block in nonlocal_gates_core.h
_LEAST_SCRATCH = 64 << 10  # bytes that a thread of the kernels may take in any case: least_scratch there
_CORES = os.cpu_count() or 1


def _scratch_of_a_step(p: int, size: int, narrow: bool) -> int:
    """Bytes that a thread of the CPU's kernels takes for a step of p positions that keeps weights, and its gradients.

    size: of a number of the state; narrow: the tensors' are of 16 bits. Where there is less room than that, the kernels
    make do with it, by smaller blocks or by computing weights again (``scratch_room`` in nonlocal_gates_core.h).
    """
    keys = (p + 15) // 16 * 16
    gradients = min(p, 256) * (keys + 128 + 1)
    gates = min(p, 210) * 4 * (48 + (keys // 2 if narrow else 0) + 1)
    return max(gradients, gates) * size + (25 << 10)


def _threads() -> int:
    """How many threads the CPU's kernels run on; a tracer, which cannot ask, takes them to be all there are."""
    return _CORES if torch.compiler.is_compiling() else torch.get_num_threads()


def _what_a_step_keeps(x_gates: Tensor) -> tuple[int | None, int, int]:
    """How many gates the CPU's kernels keep beside the weights (None: nothing), the bytes, and half of eager's."""
    b, four, p, dv = x_gates.shape
    size = state_dtype_of(x_gates.dtype).itemsize
    half = b * (10 * p * dv + four * p * p) * x_gates.element_size() // 2
    weights, gate = b * four * p * _kept_keys(x_gates) * size, b * p * dv * size
    room = half - _threads() * _scratch_of_a_step(p, size, x_gates.element_size() < size) - weights
    few = settled(b <= _threads()) and settled(four * p * p <= _MOST_OF_A_MAP)
    few = few and settled(weights + _threads() * _LEAST_SCRATCH <= half)
    if not few and not settled(room >= 0):
        return None, 0, half
    gates = 0
    while gates < four and settled(p > _MANY) and settled((gates + 1) * gate <= min(room, _MOST_OF_GATES)):
        gates += 1
    return gates, weights + gates * gate, half


def _cpu_step(x_gates: Tensor, query: Tensor, key: Tensor, value: Tensor, cell: Tensor) -> Any:
    if wants_gradients(x_gates, query, key, value, cell):
        gates, *_ = _what_a_step_keeps(x_gates)
        if gates is not None:
            return _BINARY.step_kept(x_gates, query, key, value, cell, gates)
    return _BINARY.step(x_gates, query, key, value, cell)


def _cpu_step_plan(*args: Tensor) -> str:
    if not wants_gradients(*args):
        return _cpu_plan()
    gates, kept, half = _what_a_step_keeps(args[0])
    if gates is None:
        return (
            f"{_cpu_plan()}; for the gradients they are computed again: kept, they would be over half of eager's memory"
        )
    what = f"weights and {gates} of the gates" if gates else "weights"
    return f"{_cpu_plan()}; for the gradients {what} are kept, {kept} bytes (half of eager's memory: {half})"


def _probe_attention(device: str) -> tuple[Any, ...]:
    query = torch.empty(1, 4, 8, device=device)
    return query, query, query, None, 1.0, False


def _probe_step(device: str) -> tuple[Any, ...]:
    gates = torch.empty(1, 4, 4, 8, device=device)
    return gates, gates, gates, gates, gates[:, 0]


ATTENTION = register(
    Operator(
        "nonlocal_attention",
        (
            Backend(
                "cuda",
                _BINARY.attention,
                _predicates.why_not_cuda("nonlocal_attention", "nonlocal_gates"),
                lambda *a: _cuda_plan("attend", *a),
                _evidence.experimental("nonlocal_gates"),
            ),
            Backend(
                "triton",
                _TRITON.attention,
                _why_not_triton("nonlocal_attention"),
                lambda *a: (
                    _triton_plan(*a) if a[0].shape[-1] > NARROW else _attention_plan(*a, kernels=_triton_plan(*a))
                ),
                overtaken=Overtaken(
                    f"{_WIDE} in fp32, with gradients or more than {_MANY} positions: PyTorch is faster",
                    _why_pytorch_attends,
                ),
            ),
            Backend(
                "cpu",
                _BINARY.attention,
                _predicates.why_not_cpu("nonlocal_attention"),
                lambda *a: _attention_plan(*a, kernels=_cpu_plan()),
            ),
            Backend("reference", _run_reference_attention, _predicates.why_not_reference),
        ),
        check=_check_attention,
        probe=_probe_attention,
    )
)
STEP = register(
    Operator(
        "relational_lstm_step",
        (
            Backend(
                "cuda",
                _BINARY.step,
                _predicates.why_not_cuda("relational_lstm_step", "nonlocal_gates"),
                lambda *a: _cuda_plan("step", *a[1:4]),
                _evidence.experimental("nonlocal_gates"),
            ),
            Backend(
                "triton",
                _TRITON.step,
                _why_not_triton("relational_lstm_step"),
                lambda *a: _triton_plan(a[1], a[2]),
                overtaken=Overtaken(f"{_WIDE}: PyTorch is faster", _why_pytorch_steps),
            ),
            Backend("cpu", _cpu_step, _predicates.why_not_cpu("relational_lstm_step"), _cpu_step_plan),
            Backend("reference", reference.relational_lstm_step, _predicates.why_not_reference),
        ),
        check=_check_step,
        probe=_probe_step,
    )
)

# ---- self-tests of the GPU kernels -----------------------------------------------------------------------------


def _selftest_case(
    name: str,
    operator: Callable[..., Any],
    arguments: list[Tensor],
    options: tuple[Any, ...],
    definition: Callable[..., Any],
) -> _selftest.Case:
    """Forward and backward of one operator; the gradients that come in are the reference's outputs."""
    outputs = definition(*(a.detach().cpu().double() for a in arguments))
    weights = [o.to(arguments[0].dtype) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        pairs = [(r, w.to(r.device, r.dtype)) for r, w in zip(results, weights, strict=True)]
        return [*results, *torch.autograd.grad([r for r, _ in pairs], leaves, [w for _, w in pairs])]

    def want(dtype: torch.dtype) -> list[Tensor]:
        leaves = [a.detach().cpu().to(dtype).requires_grad_() for a in arguments]
        return run(functools.partial(definition, state_dtype=dtype), leaves)

    return _selftest.Case(
        name,
        lambda: run(
            lambda *leaves: operator(*leaves, *options),
            [a.detach().requires_grad_() for a in arguments],
        ),
        functools.partial(want, torch.float64),
        functools.partial(want, arguments[0].dtype),
    )


def _random(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(30)
    return [(torch.randn(s, generator=generator, device="cpu") / s[-1] ** 0.25).to(device, dtype) for s in shapes]


def _selftest_attention(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    for name, (b, n, m, d, e) in (("odd sizes", (2, 19, 30, 24, 70)), ("many keys", (1, 20, 300, 16, 24))):
        arguments = _random(device, dtype, (b, n, d), (b, m, d), (b, m, e))
        options = (None, 1.0, False)
        yield _selftest_case(name, operators.nonlocal_attention, arguments, options, reference.nonlocal_attention)


def _selftest_step(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    for name, (b, p, d, e) in (("odd sizes", (2, 19, 24, 34)), ("49 positions", (1, 49, 32, 64))):
        arguments = _random(device, dtype, (b, 4, p, e), (b, 4, p, d), (b, 4, p, d), (b, 4, p, e), (b, p, e))
        yield _selftest_case(name, operators.relational_lstm_step, arguments, (), reference.relational_lstm_step)


_SOURCES = (Path(__file__), *_triton.sources("nonlocal_gates"))
_selftest.register_backends("nonlocal_attention", _selftest_attention, _SOURCES)
_selftest.register_backends("relational_lstm_step", _selftest_step, _SOURCES)
