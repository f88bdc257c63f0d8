"""``fast_gru``: the recurrence over clips' features of FASTER, as an operator with backends and autograd."""

from __future__ import annotations

import functools
import math
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
    _schema,
    _selftest,
    _transforms,
    _triton,
)
from rcu_ops.ops._registry import Backend, Operator, Overtaken, register
from rcu_ops.reference.fast_gru import fast_gru_gates
from rcu_ops.reference.recurrent_conv import state_dtype_of

WEIGHTS = ("weight_ux", "weight_uo", "weight_w", "weight_vx", "weight_vo")


def fast_gru(
    x: Tensor,
    weight_ux: Tensor,
    weight_uo: Tensor,
    weight_w: Tensor,
    weight_vx: Tensor,
    weight_vo: Tensor,
    o0: Tensor | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """FAST-GRU over the features of K clips (Eqs. 2-4 of "FASTER Recurrent Networks for ... Video Classification").

    At every position, with all products 1x1x1 convolutions::

        r' = relu(U_rx x + U_ro o)        z' = relu(U_zx x + U_zo o)
        r  = sigmoid(W_r r')              z  = sigmoid(W_z z')
        c  = tanh(V_x x + V_o (r * o))    o <- (1 - z) * o + z * c

    Without o0 the first state is x of the first clip, and the recurrence starts at the second. The state is kept in
    fp32 (fp64 for fp64 inputs) whatever x's dtype, so feeding ``o_n`` back as ``o0`` continues a sequence. A tied
    candidate (one matrix for V_x and V_o) is the same tensor given as weight_vx and weight_vo.

    Args:
        x: [N,K,C,L,H,W], fp16, bf16, fp32 or fp64, any strides. N, L, H, W may be 0; K and C may not.
        weight_ux, weight_uo: [2R,C], r before z; weight_w: [2,C,R]; weight_vx, weight_vo: [C,C]; all of x's dtype and
            device.
        o0: [N,C,L,H,W] state before the first clip in x's dtype or the state's, or None.
        recompute: keep no gates for the backward pass, which runs the steps again for them: K steps of 2R + 3C numbers
            per position less between the passes, for one more forward pass (on a Zen 4 processor, of 8 clips of 512
            channels at 7x7, 1.3 times the time of forward and backward together). No bit of a gradient changes.

    Returns:
        ``(o, o_n)``: o [N,K,C,L,H,W] in x's dtype, channels innermost if they are in x, else contiguous;
        o_n [N,C,L,H,W] in the state's dtype.

    Raises:
        TypeError: not a tensor, wrong dtype. ValueError: wrong shape or device, or a backend chosen by
        :func:`rcu_ops.use_backend` that cannot run these arguments.

    Under autocast x and the weights are cast to its dtype. Differentiable to any order. On CPUs single steps give the
    bits of the whole sequence where the kernels are ours, and its numbers within rounding where the products are
    PyTorch's, in fp64 and where :func:`rcu_ops.explain` says so; the last bits of these, and of gradients, may depend
    on the number of threads.
    """
    args = _check(x, weight_ux, weight_uo, weight_w, weight_vx, weight_vo, o0, recompute=recompute)
    o, o_n = OPERATOR.select(*args).run(*args)
    return o, o_n


def fast_gru_step(
    x: Tensor,
    o: Tensor,
    weight_ux: Tensor,
    weight_uo: Tensor,
    weight_w: Tensor,
    weight_vx: Tensor,
    weight_vo: Tensor,
) -> Tensor:
    """One step of :func:`fast_gru`, for one clip at a time.

    Args:
        x: [N,C,L,H,W], the clip's features. weights: as in :func:`fast_gru`.
        o: [N,C,L,H,W], the state, in x's dtype or, to lose nothing between steps, the state's (fp32; fp64 for fp64).

    Returns:
        The next state [N,C,L,H,W], in o's dtype.

    Raises:
        TypeError, ValueError: as :func:`fast_gru`.
    """
    args = _check_step(x, o, weight_ux, weight_uo, weight_w, weight_vx, weight_vo)
    _, o_n = STEP.select(*args).run(*args)
    return o_n.to(o.dtype)


# ---- checks -------------------------------------------------------------------------------------------------------

Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool]


def _check(
    x: Tensor,
    weight_ux: Tensor,
    weight_uo: Tensor,
    weight_w: Tensor,
    weight_vx: Tensor,
    weight_vo: Tensor,
    o0: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Arguments:
    _checks.dims("x", _checks.tensor("x", x), "[N,K,C,L,H,W]")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x: expected at least one clip and one channel, got [N,K,C,L,H,W] = {list(x.shape)}")
    return _check_arguments(x, (weight_ux, weight_uo, weight_w, weight_vx, weight_vo), "o0", o0, recompute)


def _check_step(
    x: Tensor,
    o: Tensor,
    weight_ux: Tensor,
    weight_uo: Tensor,
    weight_w: Tensor,
    weight_vx: Tensor,
    weight_vo: Tensor,
) -> Arguments:
    _checks.dims("x", _checks.tensor("x", x), "[N,C,L,H,W]")
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one channel, got [N,C,L,H,W] = {list(x.shape)}")
    _checks.tensor("o", o)
    weights = (weight_ux, weight_uo, weight_w, weight_vx, weight_vo)
    return _check_arguments(x.unsqueeze(1), weights, "o", o, False)


def _check_arguments(
    x: Tensor, weights: tuple[Tensor, ...], state_name: str, o0: Tensor | None, recompute: bool
) -> Arguments:
    n, _, c, length, height, width = x.shape
    for name, weight in zip(WEIGHTS, weights, strict=True):
        _checks.tensor(name, weight)
    hidden = weights[0].shape[0]
    if weights[0].dim() != 2 or hidden == 0 or hidden % 2:
        raise ValueError(f"weight_ux: expected [2R,C] with R of at least 1, got {list(weights[0].shape)}")
    shapes = ((hidden, c), (hidden, c), (2, c, hidden // 2), (c, c), (c, c))
    meanings = ("[2R,C]", "[2R,C]", "[2,C,R]", "[C,C]", "[C,C]")
    for name, weight, shape, meaning in zip(WEIGHTS, weights, shapes, meanings, strict=True):
        _checks.shape(name, weight, shape, meaning)
        _checks.same_device(name, weight, x, "x")
    x, ux, uo, w, vx, vo = _checks.autocast(x, *weights)
    for name, weight in zip(WEIGHTS, (ux, uo, w, vx, vo), strict=True):
        _checks.dtype(name, weight, x.dtype)
    if o0 is not None:
        _checks.shape(state_name, _checks.tensor(state_name, o0), (n, c, length, height, width), "[N,C,L,H,W]")
        _checks.same_device(state_name, o0, x, "x")
        if o0.dtype != x.dtype and o0.dtype != state_dtype_of(x.dtype):
            _checks.dtype(state_name, o0, x.dtype, state_dtype_of(x.dtype))
    differentiated = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, ux, uo, w, vx, vo, o0)
    )
    return x, ux, uo, w, vx, vo, o0, differentiated and not recompute


# ---- what the operators return ------------------------------------------------------------------------------------
#
# Sequences and states are contiguous, or have their channels innermost where x has. What is saved for the backward pass
# is one run of numbers each, in the kernels' own order: h [2R, columns], and r, z and the candidate [3, C, columns]. A
# column is a position of a step; steps are the clips that are computed (all but the first where it is the state).


def _channels_innermost(x: Tensor) -> bool:
    return bool(x.stride(2) == 1)


def _empty_sequence(x: Tensor) -> Tensor:
    n, k, c, length, height, width = x.shape
    if _channels_innermost(x):
        return x.new_empty(n, k, length, height, width, c).permute(0, 1, 5, 2, 3, 4)
    return x.new_empty(x.shape)


def _empty_state(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, _, c, length, height, width = x.shape
    if _channels_innermost(x):
        return x.new_empty(n, length, height, width, c, dtype=dtype).permute(0, 4, 1, 2, 3)
    return x.new_empty(n, c, length, height, width, dtype=dtype)


def _laid_out_anew(x: Tensor, innermost: bool) -> Tensor:
    """x with channels innermost, or not: also where strides of a size of one would say otherwise."""
    n, k, c, *positions = x.shape
    if innermost:
        return x.new_empty(n, k, *positions, c).movedim(-1, 2).copy_(x)
    apart = 2 if math.prod(positions) == 1 else 1
    return x.new_empty(n, k, c, apart, *positions)[:, :, :, 0].copy_(x)


def _empty_saved(x: Tensor, features: int, o0: Tensor | None) -> Tensor:
    n, k, _, length, height, width = x.shape
    return x.new_empty((k if o0 is not None else k - 1) * n * length * height * width * features)


def _fake_forward(
    x: Tensor, ux: Tensor, uo: Tensor, w: Tensor, vx: Tensor, vo: Tensor, o0: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = _empty_saved(x, ux.shape[0], o0) if save else x.new_empty(0)
    gates = _empty_saved(x, 3 * x.shape[2], o0) if save else x.new_empty(0)
    return _empty_sequence(x), _empty_state(x, state_dtype_of(x.dtype)), hidden, gates


def _fake_backward(
    grad_o: Tensor | None,
    grad_o_n: Tensor | None,
    x: Tensor,
    ux: Tensor,
    uo: Tensor,
    w: Tensor,
    vx: Tensor,
    vo: Tensor,
    o0: Tensor | None,
    o: Tensor,
    hidden: Tensor,
    gates: Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    return (
        _empty_sequence(x) if need_x else x.new_empty(0),
        *(x.new_empty(weight.shape if need_weights else (0,)) for weight in (ux, uo, w, vx, vo)),
        x.new_empty(0) if o0 is None else _empty_state(x, o0.dtype),
    )


def _reference_forward(
    x: Tensor, ux: Tensor, uo: Tensor, w: Tensor, vx: Tensor, vo: Tensor, o0: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, o_n, hidden, gates = _fake_forward(x, ux, uo, w, vx, vo, o0, save)
    wanted, wanted_n = reference.fast_gru(x, ux, uo, w, vx, vo, o0)
    o.copy_(wanted)
    o_n.copy_(wanted_n)
    if save:
        state = o_n.dtype
        weights = [weight.to(state) for weight in (ux, uo, w, vx, vo)]
        before = None if o0 is None else o0.to(state)
        steps = []
        for k in range(x.shape[1]):
            x_k = x[:, k].to(state)
            if before is not None:
                steps.append(step := fast_gru_gates(x_k, before, *weights))
                before = (1 - step.z) * before + step.z * step.candidate
            else:
                before = x_k
        if steps:
            hidden.copy_(torch.stack([step.hidden for step in steps]).flatten())
            gates.copy_(torch.stack([torch.stack([step[i] for step in steps]) for i in (1, 2, 3)]).flatten())
    return o, o_n, hidden, gates


def _reference_backward(
    grad_o: Tensor | None,
    grad_o_n: Tensor | None,
    x: Tensor,
    ux: Tensor,
    uo: Tensor,
    w: Tensor,
    vx: Tensor,
    vo: Tensor,
    o0: Tensor | None,
    o: Tensor,
    hidden: Tensor,
    gates: Tensor,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    outputs = _fake_backward(grad_o, grad_o_n, x, ux, uo, w, vx, vo, o0, o, hidden, gates, need_x, need_weights)
    gradients = reference.fast_gru_backward(grad_o, grad_o_n, x, ux, uo, w, vx, vo, o0)
    for output, gradient in zip(outputs, gradients, strict=True):
        if gradient is not None and output.shape == gradient.shape:
            output.copy_(gradient)
    return outputs


# ---- autograd -----------------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.saved_gates = inputs
    o, _, hidden, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hidden, gates)
    ctx.channels_innermost = _channels_innermost(tensors[0])
    ctx.save_for_backward(*tensors, o, hidden, gates)


def _backward(
    operators: _Operators, ctx: Any, grad_o: Tensor | None, grad_o_n: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:7]
    if grad_o is None and grad_o_n is None:
        return (None,) * 8
    x, *others, o, hidden, gates = ctx.saved_tensors
    # Gates lie in the order that x had. Hooks on saved tensors, of save_on_cpu for one, may return it in another.
    if _channels_innermost(x) != ctx.channels_innermost:
        x = _laid_out_anew(x, ctx.channels_innermost)
    if not ctx.saved_gates:  # not from o: of 16 bits it is not the state that the gates were found of
        hidden, gates = operators.gates(x, *others)
    gradients = operators.backward(grad_o, grad_o_n, x, *others, o, hidden, gates, needed[0], any(needed[1:6]))
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), None


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.need_x, ctx.need_weights = inputs[12:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])  # o, hidden and gates are functions of these


def _second_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the backward pass: of the reference's, written in differentiable operations, so any order works."""
    given = ctx.saved_tensors
    present = [i for i, value in enumerate(given) if value is not None]
    returned = [ctx.need_x, *(ctx.need_weights,) * 5, given[8] is not None]
    wanted = [there and c is not None for there, c in zip(returned, cotangents, strict=True)]
    results: list[Tensor | None] = [None] * 14
    if any(wanted):

        def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
            arguments: list[Any] = [None] * 9
            for i, tensor in zip(present, tensors, strict=True):
                arguments[i] = tensor
            gradients = reference.fast_gru_backward(*arguments)
            return tuple(g for g, want in zip(gradients, wanted, strict=True) if want and g is not None)

        pull = torch.func.vjp(backward, *(given[i] for i in present))[1]
        pulled = pull(tuple(c for c, want in zip(cotangents, wanted, strict=True) if want and c is not None))
        for i, gradient in zip(present, pulled, strict=True):
            results[i] = gradient
    return tuple(results)


# ---- FLOPs --------------------------------------------------------------------------------------------------------


def _step_flops(x: Any, ux: Any, o0: Any) -> int:
    n, k, c, length, height, width = x
    steps = k if o0 is not None else k - 1
    return 2 * n * steps * length * height * width * (3 * ux[0] * c + 2 * c * c)


def _forward_flops(
    x: Any, ux: Any, uo: Any, w: Any, vx: Any, vo: Any, o0: Any, save: bool, out_shape: Any = None
) -> int:
    return _step_flops(x, ux, o0)


def _backward_flops(
    grad_o: Any,
    grad_o_n: Any,
    x: Any,
    ux: Any,
    uo: Any,
    w: Any,
    vx: Any,
    vo: Any,
    o0: Any,
    o: Any,
    hidden: Any,
    gates: Any,
    need_x: bool,
    need_weights: bool,
    out_shape: Any = None,
) -> int:
    step = _step_flops(x, ux, o0)
    through_inputs = step * (ux[0] + x[2]) // (3 * ux[0] + 2 * x[2])  # of Ux and Vx
    return step - (0 if need_x else through_inputs) + (step if need_weights else 0)


# ---- registration -------------------------------------------------------------------------------------------------

_WEIGHT_ARGUMENTS = "Tensor weight_ux, Tensor weight_uo, Tensor weight_w, Tensor weight_vx, Tensor weight_vo"
_FORWARD = f"(Tensor x, {_WEIGHT_ARGUMENTS}, Tensor? o0, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor? grad_o, Tensor? grad_o_n, Tensor x, {_WEIGHT_ARGUMENTS}, Tensor? o0, Tensor o, Tensor hidden, "
    "Tensor gates, bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Operators:
    """The two registered operators of one family: defined, differentiable, mappable, counted.

    Args:
        suffix: after the operators' names. "" are those whose kernels the binary brings.
        cuda: per operator a Python function that is its CUDA kernel.
    """

    def __init__(self, suffix: str, cuda: dict[str, Callable[..., Any]]) -> None:
        forward_name, backward_name = f"fast_gru{suffix}", f"fast_gru_backward{suffix}"
        _schema.define(
            forward_name + _FORWARD, fake=_fake_forward, reference=_reference_forward, cuda=cuda.get("fast_gru")
        )
        _schema.define(
            backward_name + _BACKWARD,
            fake=_fake_backward,
            reference=_reference_backward,
            cuda=cuda.get("fast_gru_backward"),
        )
        _schema.flop_formula(forward_name, _forward_flops)
        _schema.flop_formula(backward_name, _backward_flops)
        self._forward_operator = forward_operator = getattr(torch.ops.rcu_ops, forward_name)
        self._backward_operator = backward_operator = getattr(torch.ops.rcu_ops, backward_name)
        backward = functools.partial(_backward, self)
        rules = [functools.partial(_transforms.one_call_per_sample, op) for op in (forward_operator, backward_operator)]
        for name, function, setup_context, rule in (
            (forward_name, backward, _save_for_backward, rules[0]),
            (backward_name, _second_backward, _save_for_second_backward, rules[1]),
        ):
            torch.library.register_vmap(f"rcu_ops::{name}", rule, lib=_schema.library)
            torch.library.register_autograd(
                f"rcu_ops::{name}", function, setup_context=setup_context, lib=_schema.library
            )

        # For torch.func.grad and its kin, which gradients registered with torch.library do not serve.
        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return forward_operator(*args)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return backward(ctx, *grads)

            setup_context = staticmethod(_save_for_backward)
            vmap = staticmethod(rules[0])

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return backward_operator(*args)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return _second_backward(ctx, *grads)

            setup_context = staticmethod(_save_for_second_backward)
            vmap = staticmethod(rules[1])

        self._forward_function, self._backward_function = Forward, Backward

    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        """o and o_n, also under functorch transforms."""
        o, o_n, _, _ = _transforms.call(self._forward_operator, *args, function=self._forward_function)
        return o, o_n

    def gates(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        """What the forward pass saves: hidden and gates."""
        _, _, hidden, gates = _transforms.call(self._forward_operator, *tensors, True, function=self._forward_function)
        return hidden, gates

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        """fast_gru_backward, also under functorch transforms."""
        return _transforms.call(self._backward_operator, *args, function=self._backward_function)


def _triton_kernel(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return getattr(_triton.kernels("fast_gru"), name)(*args)

    return kernel


_BINARY = _Operators("", {})
_TRITON = _Operators(
    "_triton", {"fast_gru": _triton_kernel("forward"), "fast_gru_backward": _triton_kernel("backward")}
)

# ---- backends -----------------------------------------------------------------------------------------------------


def _run_reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    # Tracers unroll the reference's loop over clips and fix K. Where no binary holds the operator's kernel, the
    # operator itself runs the reference, so a traced graph may as well hold the operator.
    if torch.compiler.is_compiling() and not _library.has_kernel("fast_gru", x.device.type.upper()):
        return _BINARY.forward(x, *args)
    return reference.fast_gru(x, *args[:-1])


def _probe(device: str) -> Arguments:
    x, ux, w, v = (torch.zeros(shape, device=device) for shape in ((1, 2, 8, 1, 2, 2), (4, 8), (2, 8, 2), (8, 8)))
    return x, ux, ux, w, v, v, None, False


def _probe_step(device: str) -> Arguments:
    x, ux, uo, w, vx, vo, _, save = _probe(device)
    return x[:, :1], ux, uo, w, vx, vo, x[:, 1], save


def _plan(x: Tensor, ux: Tensor, uo: Tensor, w: Tensor, vx: Tensor, vo: Tensor, o0: Tensor | None, save: bool) -> str:
    n, k, _, length, height, width = x.shape
    steps, columns = k - int(o0 is None), n * length * height * width
    return (
        f"{steps} steps of {columns} columns: U_x and V_x for all steps at once, then per step 4 library products "
        f"and 3 fused passes, gates {'saved' if save else 'not saved'}"
    )


def _cpu_plan(
    x: Tensor, ux: Tensor, uo: Tensor, w: Tensor, vx: Tensor, vo: Tensor, o0: Tensor | None, save: bool
) -> str:
    native = _library.native()
    if native is None:
        return _planner.NO_WORDS
    n, k, c, *positions = x.shape
    columns, steps, threads = n * math.prod(positions), k - int(o0 is None), torch.get_num_threads()
    dtype = str(x.dtype).removeprefix("torch.")
    r = ux.shape[0] // 2
    if not native.fast_gru_by_columns(columns, c, r, dtype, threads=threads):
        words = _plan(x, ux, uo, w, vx, vo, o0, save)
        wide = x.numel() > 0 and x.dtype != torch.float32 and native.fast_gru_in_fp32(columns, c, r, steps, dtype)
        return f"{words}; in fp32, which this processor multiplies faster" if wide else words
    few = native.fast_gru_few_weights(c, r)
    how = "each column through all steps in one core's caches" if few else "each weight read once per step for all"
    words = f"{steps} steps of {columns} columns, {how}, gates {'saved' if save else 'not saved'}"
    likewise = save and native.fast_gru_gradients_by_columns(columns, c, r, dtype, threads=threads)
    return f"{words}; gradients likewise" if likewise else words


def _gpu_plans(x: Tensor, ux: Tensor, backward: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """How one launch would take these columns through all steps on x's device: by columns, and by shares of weights."""
    native, limits = _library.native(), _planner.gpu_limits(x.device)
    assert native is not None
    n, _, c, *positions = x.shape
    arguments = n * math.prod(positions), c, ux.shape[0] // 2, str(x.dtype).removeprefix("torch.")
    columns = native.fast_gru_gpu_columns_plan(*arguments, shared_bytes=limits["shared_bytes"], backward=backward)
    return columns, native.fast_gru_gpu_plan(*arguments, **limits, backward=backward, sm90a=_planner.holds_sm90a())


def _cuda_plan(x: Tensor, ux: Tensor, *rest: Any) -> str:
    if _library.native() is None:
        return _planner.NO_WORDS
    if x.numel() == 0:
        return _plan(x, ux, *rest)
    forward, backward = (_gpu_plans(x, ux, backward) for backward in (False, True))
    # The backward pass goes the forward pass's way, or step by step.
    for ours, theirs in zip(forward, backward, strict=True):
        if ours["why_not"] is None:
            before = "" if ours.get("makes_x") else "U_x and V_x for all steps at once, then "
            return f"{before}{ours['text']}; backward: {theirs['text']}"
    return f"{_plan(x, ux, *rest)}; {'; '.join(plan['text'] for plan in forward)}"


_why_not_cuda = _predicates.why_not_cuda("fast_gru", "fast_gru")


def _why_triton(x: Tensor, ux: Tensor, *rest: Any) -> str | None:
    if torch.compiler.is_compiling() or _why_not_cuda(x, ux, *rest) is not None:  # no tracer can look into the planner
        return None
    if x.dtype not in (torch.bfloat16, torch.float16) or x.numel() == 0 or _library.native() is None:
        return None
    if any(plan["why_not"] is None for plan in _gpu_plans(x, ux, False)) or _why_not_triton(x) is not None:
        return None
    # benchmarks/results/nvidia-h200/: C = 2048, 196 columns, 8 clips: 29 kernels of 261 us against 84 of 561.
    return (
        "one launch cannot make all steps of so many columns and channels, and step by step the Triton kernels, which "
        "add a product and what follows it in one launch, were measured 1.4 to 2.7 times as fast in 16 bits"
    )


def _why_not_triton(x: Tensor, *_: Any) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}"
    if not _triton.PRESENT:
        return "the package triton is not installed"
    if x.dtype == torch.float64:
        return "x is float64, and the Triton kernels keep the state in float32"
    return _triton.why_not_device(x.device) or _selftest.why_not("fast_gru/triton", x.device, x.dtype)


def _triton_plan(x: Tensor, ux: Tensor, *_: Any) -> str:
    return _triton.kernels("fast_gru").describe(x, ux)


_BACKENDS = (
    Backend(
        "cuda",
        _BINARY.forward,
        _why_not_cuda,
        _cuda_plan,
        _evidence.experimental("fast_gru"),
        Overtaken("bf16 and fp16 where one launch cannot make all steps: Triton is faster", _why_triton),
    ),
    Backend("triton", _TRITON.forward, _why_not_triton, _triton_plan),
    Backend("cpu", _BINARY.forward, _predicates.why_not_cpu("fast_gru"), _cpu_plan),
    Backend("reference", _run_reference, _predicates.why_not_reference),
)
OPERATOR = register(Operator("fast_gru", _BACKENDS, check=_check, probe=_probe))
STEP = register(Operator("fast_gru_step", _BACKENDS, check=_check_step, probe=_probe_step))

# ---- self-test of the Triton kernels ------------------------------------------------------------------------------


def _selftest_inputs(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], hidden: int
) -> tuple[list[Tensor], list[Tensor]]:
    """x, weights and o0; gradients of o and o_n. Channel 0 of x opens or closes every ReLU beyond rounding."""
    generator = torch.Generator("cpu").manual_seed(25)

    def random(scale: float, *size: int) -> Tensor:
        return scale * torch.randn(size, generator=generator, device="cpu")

    n, _, c, *positions = shape
    x, state = random(1, *shape), (n, c, *positions)
    x[:, :, 0] = torch.where(x[:, :, 0] < 0, -1.0, 1.0)
    ux, uo = random(0.5 * c**-0.5, 2 * hidden, c), random(0.5 * c**-0.5, 2 * hidden, c)
    ux[:, 0] = torch.where(ux[:, 0] < 0, -4.0, 4.0)
    weights = [ux, uo, random(0.5 * hidden**-0.5, 2, c, hidden), random(c**-0.5, c, c), random(c**-0.5, c, c)]
    tensors = [value.to(device, dtype) for value in (x, *weights, random(1, *state))]
    return tensors, [random(1, *shape).to(device, dtype), random(1, *state).to(device)]


def _selftest_cases(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    """Forward and backward: odd sizes, and sizes of whole words."""
    for name, shape, hidden in (("odd sizes", (2, 3, 19, 1, 3, 5), 5), ("64 channels", (2, 3, 64, 1, 6, 6), 16)):
        tensors, grads = _selftest_inputs(device, dtype, shape, hidden)

        def got(tensors: list[Tensor] = tensors, grads: list[Tensor] = grads) -> list[Tensor]:
            o, o_n, *saved = operators.fast_gru(*tensors, True)
            return [o, o_n, *operators.fast_gru_backward(*grads, *tensors, o, *saved, True, True)]

        def want(to: torch.dtype, tensors: list[Tensor] = tensors, grads: list[Tensor] = grads) -> list[Tensor]:
            leaves = [value.detach().cpu().to(to).requires_grad_() for value in tensors]
            with torch.enable_grad():
                outputs = reference.fast_gru(*leaves, state_dtype=to)
            gradients = torch.autograd.grad(outputs, leaves, [grad.cpu().to(to) for grad in grads])
            return [*outputs, *gradients]

        yield _selftest.Case(
            f"forward and backward, {name}", got, functools.partial(want, torch.float64), functools.partial(want, dtype)
        )


_selftest.register_backends("fast_gru", _selftest_cases, (Path(__file__), *_triton.sources("fast_gru")))
