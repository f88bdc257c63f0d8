"""``recurrent_conv_batch_norm``: the recurrent convolution, batch normalisation by the batch's statistics (training),
residual addition and ReLU, as an operator with backends and autograd.

Four operators do the work, and between them the statistics are in the open, so that several processes can share them::

    recurrent_conv_moments             x, W, h0 -> h, h_n, moments    the scan, and each channel's statistics
    recurrent_conv_normalize           h, moments -> y                normalisation, residual and ReLU in one pass
    recurrent_conv_normalize_sums      grad_y, h -> sums              gradients of gamma and beta
    recurrent_conv_normalize_backward  grad_y, h, sums -> dx, dW, dh0 the gradient of h, and the reversed scan over it

``recurrent_conv_batch_norm`` and ``recurrent_conv_batch_norm_backward`` call them, with the exchange in between. Saved
for backward are h and the moments, and y where a residual makes it impossible to tell from h what ReLU let through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from rcu_ops import _library, reference
from rcu_ops.ops import _checks, _evidence, _family, _selftest, _transforms, _triton
from rcu_ops.ops._registry import Backend, Operator, register
from rcu_ops.ops.recurrent_conv import (
    ACTIVATIONS,
    BINARY,
    UPDATES,
    check_sequence,
    cuda_plan,
    empty_state,
    scan_flops,
    why_not_triton,
)
from rcu_ops.reference.recurrent_conv import state_dtype_of
from rcu_ops.reference.recurrent_conv_batch_norm import (
    activation_gradient,
    channel_moments,
    combine_moments,
    normalize,
    normalize_backward,
    normalize_sums,
    per_channel,
)


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
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training form: ``y = act(gamma (h - mean) / sqrt(var + eps) + beta (+ residual))`` with the batch's statistics.

    h is that of :func:`recurrent_conv`, mean and var (biased) are its statistics over N, T, H and W: the RCU, the
    batch normalisation, the residual addition and the ReLU of a video ResNet in training. Beside the scans that is one
    pass for the statistics and one for everything after them, and two in backward, which needs h and, where there are
    both a residual and a ReLU, y.

    Args:
        x, weight, h0, update: as in :func:`recurrent_conv`.
        gamma, beta: [C], any floating dtype (used in the state's), or None: 1 and 0.
        residual: shaped like x, x's dtype, any strides, or None.
        eps: added to the variance; not negative.
        activation: "relu" or "identity".
        group: processes that share their statistics, as in ``nn.SyncBatchNorm``; all of them must make the same calls,
            forward and backward. Gradients of gamma and beta are each process's own. No second derivatives then.

    Returns:
        ``(y, h_n, moments)``: y like x; h_n [N,C,H,W] and moments [3,C] in the state's dtype. The moments are every
        channel's mean, sum of squared deviations from it, and number of values N*T*H*W, over all processes: the biased
        variance is ``moments[1] / moments[2]``.

    Raises:
        TypeError, ValueError: as :func:`recurrent_conv`. ValueError: a single value per channel, as nn.BatchNorm3d.

    Under autocast x, weight and residual are cast to its dtype. Differentiable to any order.
    """
    args = _check(x, weight, gamma, beta, h0, residual, update=update, eps=eps, activation=activation, group=group)
    y, h_n, moments = OPERATOR.select(*args).run(*args)
    return y, h_n, moments


def _check(
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
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Any, ...]:
    x, weight, h0 = check_sequence(x, weight, h0, update)
    _checks.choice("activation", activation, ACTIVATIONS)
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    if group is None and x.numel() == x.shape[1]:
        raise ValueError(
            f"x: expected more than one value per channel, to have a variance, got [N,C,T,H,W] = {list(x.shape)}"
        )
    state = state_dtype_of(x.dtype)
    if gamma is not None:
        gamma = _channels("gamma", gamma, x, state)
    if beta is not None:
        beta = _channels("beta", beta, x, state)
    if residual is not None:
        _checks.shape("residual", _checks.tensor("residual", residual), tuple(x.shape), "x's shape [N,C,T,H,W]")
        _checks.same_device("residual", residual, x, "x")
        (residual,) = _checks.autocast(residual)
        _checks.dtype("residual", residual, x.dtype)
    name = "" if group is None else group.group_name
    return x, weight, h0, gamma, beta, residual, update == "mean", float(eps), activation == "relu", name


def _channels(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    _checks.shape(name, _checks.tensor(name, value), (x.shape[1],), "[C]")
    _checks.same_device(name, value, x, "x")
    return value.to(dtype)


# ---- registered operators -----------------------------------------------------------------------------------------


def _fake_moments(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), empty_state(x), x.new_empty((3, x.shape[1]), dtype=state_dtype_of(x.dtype))


def _moments(x: Tensor, weight: Tensor, h0: Tensor | None, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    h, h_n = reference.recurrent_conv(x, weight, h0, update=UPDATES[int(mean)])
    return torch.empty_like(x).copy_(h), empty_state(x).copy_(h_n), channel_moments(h)


def _fake_normalize(h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h)


def _normalize(
    h: Tensor,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    return torch.empty_like(h).copy_(normalize(h, moments, gamma, beta, residual, eps, relu))


def _fake_sums(grad_y: Tensor, h: Tensor, y: Tensor | None, moments: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return moments.new_empty((2, h.shape[1])), h.new_empty(0) if y is None else torch.empty_like(h)


def _sums(
    grad_y: Tensor,
    h: Tensor,
    y: Tensor | None,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    dz = activation_gradient(grad_y, h, y, moments, gamma, beta, eps, relu)
    sums = normalize_sums(dz, h, moments, eps)
    return sums, h.new_empty(0) if y is None else torch.empty_like(h).copy_(dz)


def _fake_normalize_backward(
    dz: Tensor,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    moments: Tensor,
    sums: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    mean: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if need_weight_grad else weight.new_empty(0)
    return torch.empty_like(h), dweight, torch.empty_like(h0) if h0 is not None else h.new_empty(0)


def _normalize_backward(
    dz: Tensor,
    grad_h_n: Tensor | None,
    h: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    moments: Tensor,
    sums: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    mean: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = activation_gradient(dz, h, None, moments, gamma, beta, eps, relu)
    grad_h = normalize_backward(wide, h, moments, sums, gamma, eps)
    # In the state's precision, as a kernel that makes grad_h while reading it does: only h0's gradient and dx round.
    grads = reference.recurrent_conv_backward(
        grad_h, grad_h_n, h.to(grad_h.dtype), weight.to(grad_h.dtype), h0, update=UPDATES[int(mean)]
    )
    dx, dweight, dh0 = grads
    return (
        torch.empty_like(h).copy_(dx),
        dweight.to(weight.dtype) if need_weight_grad else weight.new_empty(0),
        torch.empty_like(h0).copy_(dh0) if h0 is not None and dh0 is not None else h.new_empty(0),
    )


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: bool,
    eps: float,
    relu: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, h_n, moments = _fake_moments(x, weight, h0, mean)
    return torch.empty_like(h), h, h_n, moments


def _forward(
    family: Callable[[], _family.Family],
    x: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: bool,
    eps: float,
    relu: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = family()
    h, h_n, moments = parts["recurrent_conv_moments"](x, weight, h0, mean)
    if group:
        moments = combine_moments(_gathered(moments, group))
    y = parts["recurrent_conv_normalize"](h, moments, gamma, beta, residual, eps, relu)
    return y, h, h_n, moments


def _fake_backward(
    grad_y: Tensor,
    grad_h_n: Tensor | None,
    h: Tensor,
    y: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: bool,
    eps: float,
    relu: bool,
    group: str,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums, dz = _fake_sums(grad_y, h, y, moments)
    dx, dweight, dh0 = _fake_normalize_backward(
        grad_y, grad_h_n, h, weight, h0, moments, sums, gamma, beta, eps, relu, mean, need_weight_grad
    )
    return dx, dweight, dh0, sums, dz


def _backward(
    family: Callable[[], _family.Family],
    grad_y: Tensor,
    grad_h_n: Tensor | None,
    h: Tensor,
    y: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: bool,
    eps: float,
    relu: bool,
    group: str,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parts = family()
    sums, dz = parts["recurrent_conv_normalize_sums"](grad_y, h, y, moments, gamma, beta, eps, relu)
    shared = sums
    if group:
        shared = _gathered(sums, group).double().sum(0).to(sums.dtype)
    # What the residual's gradient needs anyway, the gradient before ReLU, the scan need not make again.
    given, masks = (grad_y, relu) if y is None else (dz, False)
    dx, dweight, dh0 = parts["recurrent_conv_normalize_backward"](
        given, grad_h_n, h, weight, h0, moments, shared, gamma, beta, eps, masks, mean, need_weight_grad
    )
    return dx, dweight, dh0, sums, dz


def _gathered(value: Tensor, group: str) -> Tensor:
    """``value`` of every process, in the order of their ranks: [P, ...], the same bits everywhere."""
    found = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    processes = torch.distributed.get_world_size(found)
    parts = value.new_empty((processes * value.shape[0], *value.shape[1:]))  # gloo takes no [P, ...]
    torch.distributed.all_gather_into_tensor(parts, value.contiguous(), group=found)
    return parts.unflatten(0, (processes, value.shape[0]))


# ---- autograd -----------------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, h0, gamma, beta, residual, ctx.mean, ctx.eps, ctx.relu, ctx.group = inputs
    y, h, _, moments = output
    ctx.with_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, y if ctx.relu and ctx.with_residual else None, weight, h0, moments, gamma, beta)


def _gradients(
    family: _family.Family,
    ctx: Any,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_h_n: Tensor | None,
    grad_moments: Tensor | None,
) -> tuple[Tensor | None, ...]:
    none = (None,) * 10
    if grad_y is None and grad_h is None and grad_h_n is None and grad_moments is None:
        return none
    h, y, weight, h0, moments, gamma, beta = ctx.saved_tensors
    need_x, need_weight, need_h0, need_gamma, need_beta, need_residual = ctx.needs_input_grad[:6]
    if grad_y is None:
        grad_y = torch.zeros_like(h)
    arguments = (grad_y, grad_h_n, h, y, weight, h0, moments, gamma, beta, ctx.mean, ctx.eps, ctx.relu, ctx.group)
    if grad_h is None and grad_moments is None:
        dx, dweight, dh0, sums, dz = family["recurrent_conv_batch_norm_backward"](*arguments, need_weight)
    else:  # h has gradients of its own in second derivatives only, and few ask for those of the moments
        dx, dweight, dh0, sums, dz = _unfused_backward(*arguments, need_weight, grad_h, grad_moments)
    dresidual = dz if y is not None else grad_y
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dh0 if need_h0 else None,
        sums[1] if need_gamma else None,
        sums[0] if need_beta else None,
        dresidual if need_residual else None,
        *none[6:],
    )


def _unfused_backward(
    grad_y: Tensor,
    grad_h_n: Tensor | None,
    h: Tensor,
    y: Tensor | None,
    weight: Tensor,
    h0: Tensor | None,
    moments: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: bool,
    eps: float,
    relu: bool,
    group: str,
    need_weight_grad: bool,
    grad_h: Tensor | None = None,
    grad_moments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass made of differentiable operators, with gradients that arrive at h and at the moments too."""
    if group:
        raise RuntimeError(
            "recurrent_conv_batch_norm has no second derivatives, nor gradients of its moments, while processes share "
            "statistics"
        )
    dz = activation_gradient(grad_y, h, y, moments, gamma, beta, eps, relu)
    sums = normalize_sums(dz, h, moments, eps)
    total = normalize_backward(dz, h, moments, sums, gamma, eps)
    if grad_h is not None:
        total = total + grad_h.to(total.dtype)
    if grad_moments is not None:
        deviations = h.to(total.dtype) - per_channel(moments[0])
        total = total + per_channel(grad_moments[0] / moments[2].clamp(min=1))
        total = total + per_channel(2 * grad_moments[1]) * deviations
    dx, dweight, dh0 = BINARY.backward(total.to(h.dtype), grad_h_n, h, weight, h0, mean, False, need_weight_grad)
    return dx, dweight, dh0, sums, h.new_empty(0) if y is None else dz.to(h.dtype)


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9])


_MASK = 3  # y in the backward operator's arguments: read for its sign alone


def _second_gradients(family: _family.Family, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    places = [i for i, value in enumerate(tensors) if value is not None and i != _MASK]

    def backward(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, values, strict=True))
        return _unfused_backward(*(given.get(i, value) for i, value in enumerate(tensors)), *ctx.options)

    vjp: Any = torch.func.vjp
    results, pull = vjp(backward, *(tensors[i] for i in places))
    found = pull(tuple(torch.zeros_like(r) if c is None else c for r, c in zip(results, cotangents, strict=True)))
    gradients = dict(zip(places, found, strict=True))
    return (*(gradients.get(i) for i in range(len(tensors))), *(None for _ in ctx.options))


def _refuse_gradient(family: _family.Family, ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "the parts of recurrent_conv_batch_norm have no gradients of their own: call recurrent_conv_batch_norm"
    )


# ---- registration -------------------------------------------------------------------------------------------------


def _one_call_per_sample(operator: Callable[..., Any]) -> Callable[..., Any]:
    # The statistics are those of one sample's batch: mapped samples must not share them.
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def call(*given: Any) -> tuple[Tensor, ...]:
            found = operator(*given)
            return (found,) if isinstance(found, Tensor) else found

        results, dims = _transforms.one_call_per_sample(call, info, in_dims, *args)
        return (results[0], dims[0]) if len(operator.default._schema.returns) == 1 else (results, dims)  # type: ignore[attr-defined]

    return rule


def _scan_flops(x: Any, weight: Any, h0: Any, *_: Any, out_shape: Any = None) -> int:
    return scan_flops(x, h0 is None)


def _normalize_backward_flops(
    dz: Any, grad_h_n: Any, h: Any, weight: Any, h0: Any, *rest: Any, out_shape: Any = None
) -> int:
    return scan_flops(h, h0 is None) * (1 + int(rest[-1]))


def _backward_flops(
    grad_y: Any, grad_h_n: Any, h: Any, y: Any, weight: Any, h0: Any, *rest: Any, out_shape: Any = None
) -> int:
    return scan_flops(h, h0 is None) * (1 + int(rest[-1]))


def _part(signature: str, fake: Callable[..., Any], of: Callable[..., Any], flops: Any = None) -> _family.Definition:
    return _family.Definition(
        signature, fake, of, flops, _refuse_gradient, lambda ctx, inputs, output: None, _one_call_per_sample
    )


_CHANNELS = "Tensor? gamma, Tensor? beta"


def _definitions(family: Callable[[], _family.Family]) -> dict[str, _family.Definition]:
    """The operators; those made of others call them in the family that ``family`` returns."""
    return {
        "recurrent_conv_moments": _part(
            "(Tensor x, Tensor weight, Tensor? h0, bool mean) -> (Tensor, Tensor, Tensor)",
            _fake_moments,
            _moments,
            _scan_flops,
        ),
        "recurrent_conv_normalize": _part(
            f"(Tensor h, Tensor moments, {_CHANNELS}, Tensor? residual, float eps, bool relu) -> Tensor",
            _fake_normalize,
            _normalize,
        ),
        "recurrent_conv_normalize_sums": _part(
            f"(Tensor grad_y, Tensor h, Tensor? y, Tensor moments, {_CHANNELS}, float eps, bool relu) -> "
            "(Tensor, Tensor)",
            _fake_sums,
            _sums,
        ),
        "recurrent_conv_normalize_backward": _part(
            "(Tensor dz, Tensor? grad_h_n, Tensor h, Tensor weight, Tensor? h0, Tensor moments, Tensor sums, "
            f"{_CHANNELS}, float eps, bool relu, bool mean, bool need_weight_grad) -> (Tensor, Tensor, Tensor)",
            _fake_normalize_backward,
            _normalize_backward,
            _normalize_backward_flops,
        ),
        "recurrent_conv_batch_norm": _family.Definition(
            f"(Tensor x, Tensor weight, Tensor? h0, {_CHANNELS}, Tensor? residual, bool mean, float eps, bool relu, "
            "str group) -> (Tensor, Tensor, Tensor, Tensor)",
            _fake_forward,
            functools.partial(_forward, family),
            _scan_flops,
            _gradients,
            _save_for_backward,
            _one_call_per_sample,
        ),
        "recurrent_conv_batch_norm_backward": _family.Definition(
            "(Tensor grad_y, Tensor? grad_h_n, Tensor h, Tensor? y, Tensor weight, Tensor? h0, Tensor moments, "
            f"{_CHANNELS}, bool mean, float eps, bool relu, str group, bool need_weight_grad) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor)",
            _fake_backward,
            functools.partial(_backward, family),
            _backward_flops,
            _second_gradients,
            _save_for_second_backward,
            _one_call_per_sample,
        ),
    }


_FAMILY: _family.Family = _family.Family(_definitions(lambda: _FAMILY))
_TRITON: _family.Family = _family.Family(
    _definitions(lambda: _TRITON),
    "_triton",
    _family.kernels_of(
        "recurrent_conv_batch_norm",
        {
            "recurrent_conv_moments": "moments",
            "recurrent_conv_normalize": "normalize",
            "recurrent_conv_normalize_sums": "normalize_sums",
            "recurrent_conv_normalize_backward": "normalize_backward",
        },
    ),
)

#: Those that a binary may bring kernels for; the others call these.
PARTS = (
    "recurrent_conv_moments",
    "recurrent_conv_normalize",
    "recurrent_conv_normalize_sums",
    "recurrent_conv_normalize_backward",
)

# ---- backends -----------------------------------------------------------------------------------------------------


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, _, h_n, moments = _FAMILY["recurrent_conv_batch_norm"](*args)
    return y, h_n, moments


def _run_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, _, h_n, moments = _TRITON["recurrent_conv_batch_norm"](*args)
    return y, h_n, moments


def _run_reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.compiler.is_compiling() and not _has_kernels(x.device.type):
        return _run(x, *rest)  # runs the reference, and keeps its loop over frames out of the traced graph
    weight, h0, gamma, beta, residual, mean, eps, relu, name = rest
    return reference.recurrent_conv_batch_norm(
        x,
        weight,
        gamma,
        beta,
        h0,
        residual,
        update=UPDATES[int(mean)],
        eps=eps,
        activation="relu" if relu else "identity",
        group=torch.distributed.distributed_c10d._resolve_process_group(name) if name else None,
    )


_KERNEL_FILES = ("recurrent_conv", "recurrent_conv_batch_norm")  # the scans, and the passes around them


def _has_kernels(device: str) -> bool:
    return all(_library.has_kernel(name, device.upper()) for name in PARTS)


def _why_not_cpu(x: Tensor, *_: Any) -> str | None:
    if x.device.type not in ("cpu", "meta"):
        return f"x is on {x.device}"
    if x.device.type == "cpu" and not _has_kernels("cpu"):
        return _library.load_error() or "the library was built without these CPU kernels"
    return None


def _why_not_cuda(x: Tensor, *_: Any) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device}"
    if not _has_kernels("cuda"):
        return _library.load_error() or "the library was built without these CUDA kernels"
    return next((reason for family in _KERNEL_FILES if (reason := _evidence.why_not(family, x.device, x.dtype))), None)


def _triton_plan(x: Tensor, weight: Tensor, *_: Any) -> str:
    return f"{_triton.kernels('recurrent_conv').describe(x, weight)}; batch normalisation in passes of its own"


def _probe(device: str) -> tuple[Any, ...]:
    x = torch.empty(1, 8, 2, 4, 4, device=device)
    channels = torch.empty(8, device=device)
    return x, torch.empty(8, 8, device=device), None, channels, channels, None, False, 1e-5, True, ""


OPERATOR = register(
    Operator(
        "recurrent_conv_batch_norm",
        (
            Backend(
                "cuda",
                _run,
                _why_not_cuda,
                lambda *a: cuda_plan(a[0], a[2], statistics=True, weight=a[1]),
                experimental=sum(map(_evidence.experimental, _KERNEL_FILES), ()),
            ),
            Backend("triton", _run_triton, why_not_triton("recurrent_conv_batch_norm"), _triton_plan),
            Backend("cpu", _run, _why_not_cpu),
            Backend("reference", _run_reference, lambda *_: None),
        ),
        check=_check,
        probe=_probe,
    )
)


# ---- self-test of the Triton kernels ------------------------------------------------------------------------------


def _selftest_cases(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    """Forward and backward in both memory layouts; without ReLU, whose mask hangs on rounding, and then its passes."""
    generator = torch.Generator("cpu").manual_seed(40)
    shape = (2, 24, 3, 5, 7)
    c = shape[1]

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cpu")

    for layout in (torch.contiguous_format, torch.channels_last_3d):
        name = "frames" if layout == torch.contiguous_format else "channels last"
        weight = torch.eye(c, device="cpu") / 2 + random(c, c) * (0.4 / c**0.5)
        x, residual, grad = (random(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
        given = [x, weight.to(dtype), random(c).abs() + 0.5, random(c), residual, grad]

        def run(values: list[Tensor], relu: bool) -> list[Tensor]:
            x, weight, gamma, beta, residual, grad = values
            y, h, h_n, moments = operators.recurrent_conv_batch_norm(
                x, weight, None, gamma, beta, residual, False, 1e-5, relu, ""
            )
            if relu:
                return [y, h_n, moments[:2]]
            return [
                *(y, h_n, moments[:2]),
                *operators.recurrent_conv_batch_norm_backward(
                    grad, None, h, None, weight, None, moments, gamma, beta, False, 1e-5, False, "", True
                )[:2],
            ]

        for relu in (False, True):

            def got(values: list[Tensor] = given, relu: bool = relu) -> list[Tensor]:
                return run([v.to(device) for v in values], relu)

            def want(to: torch.dtype, values: list[Tensor] = given, relu: bool = relu) -> list[Tensor]:
                x, weight, gamma, beta, residual, grad = (v.to(to, copy=True).requires_grad_() for v in values)
                with torch.enable_grad():
                    h, h_n = reference.recurrent_conv(x, weight, state_dtype=to)
                    moments = channel_moments(h, to)
                    y = normalize(h, moments, gamma, beta, residual, 1e-5, relu)
                    found = [y, h_n, moments[:2]]
                    return found if relu else [*found, *torch.autograd.grad(y, (x, weight), grad)]

            yield _selftest.Case(
                f"{name}, {'relu' if relu else 'forward and backward'}",
                got,
                functools.partial(want, torch.float64),
                functools.partial(want, dtype),
            )


_selftest.register_backends(
    "recurrent_conv_batch_norm",
    _selftest_cases,
    (Path(__file__), *_triton.sources("recurrent_conv", "recurrent_conv_batch_norm")),
)
