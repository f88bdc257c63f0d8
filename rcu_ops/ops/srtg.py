"""``srtg_squeeze`` and ``srtg_fuse``: the data path of a Squeeze and Recursion Temporal Gate, around its LSTM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcu_ops import reference
from rcu_ops.ops import _checks, _family, _selftest, _triton
from rcu_ops.ops._family import Definition, Family
from rcu_ops.ops._registry import Operator, register
from rcu_ops.reference.recurrent_conv import state_dtype_of

FUSIONS = ("mul", "add")


def srtg_squeeze(x: Tensor) -> Tensor:
    """Spatial mean per frame, read once and added up in fp32: x [N,C,T,H,W] -> [N,T,C].

    Args:
        x: fp16, bf16, fp32 or fp64, any strides. N and T may be 0; C, H and W may not.

    Returns:
        [N,T,C], fp32 (fp64 for fp64), contiguous: what an LSTM with ``batch_first`` takes. Differentiable to any order;
        the gradient is a broadcast view and costs no pass over memory of its own.

    Raises:
        TypeError: not a tensor, wrong dtype. ValueError: wrong shape, or a backend chosen by
        :func:`rcu_ops.use_backend` that cannot run x.
    """
    args = _check_squeeze(x)
    return SQUEEZE.select(*args).run(*args)


def srtg_fuse(x: Tensor, h: Tensor, gate: Tensor | None = None, *, fusion: str = "mul") -> Tensor:
    """``x h`` ("mul") or ``x + h`` ("add") where a sample's gate is open, x where it is closed: one read, one write.

    Args:
        x: [N,C,T,H,W], fp16, bf16, fp32 or fp64, any strides, any sizes.
        h: [N,T,C], one number per frame and channel, any floating dtype (used in fp32; fp64 with fp64 x), x's device.
        gate: [N] bool, or None: open for every sample. Carries no gradient.
        fusion: "mul" or "add".

    Returns:
        y like x (dtype, and strides as ``torch.empty_like``). Differentiable in x and h to any order; where the gate is
        closed x's gradient passes unchanged and h's is zero, even if h is not finite.

    Raises:
        TypeError: not a tensor, wrong dtype. ValueError: wrong shape, device, ``fusion``, or a backend chosen by
        :func:`rcu_ops.use_backend` that cannot run these arguments.

    Under autocast x keeps its dtype: the result has x's dtype always.
    """
    args = _check_fuse(x, h, gate, fusion=fusion)
    return FUSE.select(*args).run(*args)


# ---- checks -------------------------------------------------------------------------------------------------------


def _check_squeeze(x: Tensor) -> tuple[Tensor]:
    _checks.dims("x", _checks.tensor("x", x), "[N,C,T,H,W]")
    if x.shape[1] == 0 or x.shape[3] == 0 or x.shape[4] == 0:
        raise ValueError(f"x: expected at least one channel and one position, got [N,C,T,H,W] = {list(x.shape)}")
    return (x,)


def _check_fuse(
    x: Tensor, h: Tensor, gate: Tensor | None = None, *, fusion: str = "mul"
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    _checks.dims("x", _checks.tensor("x", x), "[N,C,T,H,W]")
    _checks.choice("fusion", fusion, FUSIONS)
    n, c, t = x.shape[:3]
    _checks.shape("h", _checks.tensor("h", h), (n, t, c), "[N,T,C]")
    _checks.same_device("h", h, x, "x")
    if gate is not None:
        _checks.shape("gate", _checks.boolean("gate", gate), (n,), "[N]")
        _checks.same_device("gate", gate, x, "x")
    return x, h.to(state_dtype_of(x.dtype)), gate, fusion == "add"


# ---- registered operators -----------------------------------------------------------------------------------------


def _fake_squeeze(x: Tensor) -> Tensor:
    n, c, t = x.shape[:3]
    return x.new_empty((n, t, c), dtype=state_dtype_of(x.dtype))


def _fake_fuse(x: Tensor, h: Tensor, gate: Tensor | None, add: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_fuse_backward(grad: Tensor, x: Tensor, h: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), h.new_empty(h.shape)


def _reference_squeeze(x: Tensor) -> Tensor:
    return reference.srtg_squeeze(x).contiguous()


def _reference_fuse(x: Tensor, h: Tensor, gate: Tensor | None, add: bool) -> Tensor:
    return torch.empty_like(x).copy_(reference.srtg_fuse(x, h, gate, fusion=FUSIONS[int(add)]))


def _reference_fuse_backward(grad: Tensor, x: Tensor, h: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    dx, dh = reference.srtg_fuse_backward(grad, x, h, gate)
    return torch.empty_like(x).copy_(dx), dh.contiguous()


# ---- autograd -----------------------------------------------------------------------------------------------------


def _save_squeeze(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    (x,) = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _squeeze_gradient(family: Family, ctx: Any, grad: Tensor) -> Tensor:
    height, width = ctx.shape[3:]
    return (grad / (height * width)).to(ctx.dtype).transpose(1, 2)[..., None, None].expand(ctx.shape)


def _save_fuse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, h, gate, ctx.add = inputs
    ctx.h_dtype = h.dtype
    ctx.save_for_backward(*((None, None) if ctx.add else (x, h)), gate)


def _fuse_gradients(family: Family, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, h, gate = ctx.saved_tensors
    if not ctx.add:
        return *family["srtg_fuse_backward"](grad, x, h, gate), None, None
    positions = grad.shape[3] * grad.shape[4]
    if positions == 0 or grad.shape[1] == 0:
        return grad, grad.new_zeros((grad.shape[0], grad.shape[2], grad.shape[1]), dtype=ctx.h_dtype), None, None
    dh = family["srtg_squeeze"](grad) * positions
    return grad, dh if gate is None else torch.where(gate[:, None, None], dh, 0.0), None, None


def _save_fuse_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


_transpose_fuse_backward = _family.transpose_of(reference.srtg_fuse_backward, 3)


def _fuse_second(family: Family, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    return _transpose_fuse_backward(ctx.saved_tensors, cotangents)


# ---- registration -------------------------------------------------------------------------------------------------

_DEFINITIONS = {
    "srtg_squeeze": Definition(
        "(Tensor x) -> Tensor",
        _fake_squeeze,
        _reference_squeeze,
        backward=_squeeze_gradient,
        setup_context=_save_squeeze,
    ),
    "srtg_fuse": Definition(
        "(Tensor x, Tensor h, Tensor? gate, bool add) -> Tensor",
        _fake_fuse,
        _reference_fuse,
        backward=_fuse_gradients,
        setup_context=_save_fuse,
    ),
    "srtg_fuse_backward": Definition(
        "(Tensor grad, Tensor x, Tensor h, Tensor? gate) -> (Tensor, Tensor)",
        _fake_fuse_backward,
        _reference_fuse_backward,
        backward=_fuse_second,
        setup_context=_save_fuse_backward,
    ),
}

_BINARY = Family(_DEFINITIONS)
_TRITON = Family(
    _DEFINITIONS, "_triton", _family.kernels_of("srtg", {n: n.removeprefix("srtg_") for n in _DEFINITIONS})
)


def _fuse_by_reference(x: Tensor, h: Tensor, gate: Tensor | None, add: bool) -> Tensor:
    return reference.srtg_fuse(x, h, gate, fusion=FUSIONS[int(add)])


SQUEEZE = register(
    Operator(
        "srtg_squeeze",
        _family.backends(
            "srtg",
            ("srtg_squeeze",),
            _BINARY["srtg_squeeze"],
            _reference_squeeze,
            triton=lambda *args: _TRITON["srtg_squeeze"](*args),
        ),
        check=_check_squeeze,
        probe=lambda device: (torch.zeros(1, 8, 2, 3, 3, device=device),),
    )
)
FUSE = register(
    Operator(
        "srtg_fuse",
        _family.backends(
            "srtg",
            ("srtg_fuse",),
            _BINARY["srtg_fuse"],
            _fuse_by_reference,
            triton=lambda *args: _TRITON["srtg_fuse"](*args),
        ),
        check=_check_fuse,
        probe=lambda device: (
            torch.zeros(1, 8, 2, 3, 3, device=device),
            torch.zeros(1, 2, 8, device=device),
            torch.ones(1, dtype=torch.bool, device=device),
            False,
        ),
    )
)


# ---- self-test of the Triton kernels ------------------------------------------------------------------------------


def _selftest_cases(operators: Any, device: torch.device, dtype: torch.dtype) -> Iterator[_selftest.Case]:
    """Means, both fusions and the product's gradients, in both memory layouts."""
    generator = torch.Generator("cpu").manual_seed(30)
    gate = torch.tensor([True, False])
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x, grad = (
            torch.randn(2, 35, 3, 5, 7, generator=generator).to(device, dtype).contiguous(memory_format=layout)
            for _ in range(2)
        )
        h = torch.randn(2, 3, 35, generator=generator).to(device)

        def got(x: Tensor = x, grad: Tensor = grad, h: Tensor = h) -> list[Tensor]:
            opened = gate.to(x.device)
            fused = [operators.srtg_fuse(x, h, opened, add) for add in (False, True)]
            return [operators.srtg_squeeze(x), *fused, *operators.srtg_fuse_backward(grad, x, h, opened)]

        def want(state: torch.dtype, x: Tensor = x, grad: Tensor = grad, h: Tensor = h) -> list[Tensor]:
            x, grad, h = x.cpu().to(state), grad.cpu().to(state), h.cpu().to(state_dtype_of(state))
            fused = [reference.srtg_fuse(x, h, gate, fusion=fusion) for fusion in FUSIONS]
            return [reference.srtg_squeeze(x), *fused, *reference.srtg_fuse_backward(grad, x, h, gate)]

        yield _selftest.Case(
            "frames" if layout == torch.contiguous_format else "channels last",
            got,
            lambda want=want: want(torch.float64),  # type: ignore[misc]
            lambda want=want, dtype=dtype: want(dtype),  # type: ignore[misc]
        )


_selftest.register_backends("srtg", _selftest_cases, (Path(__file__), *_triton.sources("srtg")))
