"""One frame at a time on the CPU: a layer's convolution, recurrence and all that follows as one call of one kernel.

A stream of single frames pays for every call of a layer in time that is no arithmetic: two calls per recurrent layer,
each with its checks, and a matrix library that looks its plan up anew. ``recurrent_conv_frame`` is one call on weights
in its own layout (:class:`Panels`): fp32, or pairs of bf16 where vector units multiply these at twice the rate.
:func:`why_not` is the rule; the doctor prints it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rcu_ops import _library
from rcu_ops.nn.packed_conv import arithmetic, runs_by_itself
from rcu_ops.ops import current_backend
from rcu_ops.ops._kept import Kept
from rcu_ops.ops.recurrent_conv_frame import CHANNELS, OPERATOR
from rcu_ops.reference.recurrent_conv_frame import pack_pairs, pack_panels

LEAST_ROW = 7
"""Positions that a row of the output has at least, half of the kernel's block."""


class Plan(NamedTuple):
    """What a layer's sizes, and those of the frames, decide.

    Attributes:
        refusal: None if the kernel runs the layer for such frames, else the reason as a sentence.
        pairs: on pairs of bf16.
        geometry: sizes of the kernel, strides, padding.
        shape: of the output, (1, O, H', W').
    """

    refusal: str | None
    pairs: bool
    geometry: list[int]
    shape: tuple[int, int, int, int]


class Panels(Kept):
    """A layer's weights in the kernel's layout, and its plan for the frames that came last."""

    def __init__(self, most: int = 1) -> None:
        super().__init__(most)
        self._planned: tuple[tuple[Any, ...], Plan] | None = None

    def plan(self, layer: Any, x: Tensor, weight: Tensor) -> Plan | None:
        """How the kernel runs ``layer``, which these panels belong to, for x [N,C,T,H,W]; None where it does not."""
        shape = x.shape
        if shape[0] != 1 or shape[2] != 1 or _why_not_now(x, weight) is not None:
            return None
        key = shape, x.dtype, _isa()
        # Between two kernels Python runs from cold caches, at a third of its speed: the rule is gone through once.
        planned = self._planned  # another thread may put another in its place at any moment
        if planned is None or planned[0] != key:
            self._planned = planned = key, _make_plan(layer, shape[3], shape[4], x.dtype)
        return planned[1] if planned[1].refusal is None else None

    def panels(
        self, weight: Tensor, weight_hh: Tensor | None, bias: Tensor | None, pairs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The panels of ``weight`` [O,C,1,kh,kw] and ``weight_hh`` ([O,O] or None), and the bias in fp32."""

        def make() -> tuple[Tensor, Tensor | None]:
            pack = pack_pairs if pairs else pack_panels
            panels = pack(weight.detach().squeeze(2), None if weight_hh is None else weight_hh.detach())
            return panels, None if bias is None else bias.detach().float().contiguous()

        kept: tuple[Tensor, Tensor | None] = self.get((weight, weight_hh, bias), pairs, make)
        return kept


def run_frame(
    plan: Plan,
    panels: Panels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    *,
    weight_hh: Tensor | None = None,
    state: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """``(y [1,O,1,H',W'], state)`` of a layer after the frame x [1,C,1,H,W], or None where the kernel is not taken.

    Args:
        plan: what ``panels.plan`` returned for x.
        weight: [O,C,1,kh,kw]. bias: [O] or None. weight_hh: [O,O]; with it go ``state`` [1,O,H',W'], ``scale`` and
            ``shift`` [O]. mean: halve every sum.
        residual: expands to the output, or None. relu: end with a ReLU.
    """
    frame = x.squeeze(2)
    if residual is not None:
        residual = residual.squeeze(2)
    if _why_not_laid(plan.shape, frame, state, residual) is not None:
        return None
    kept, kept_bias = panels.panels(weight, weight_hh, bias, plan.pairs)
    # Nothing here has a gradient, so the call goes past the dispatcher's stop for one.
    with torch._C._AutoDispatchBelowAutograd():
        y, last = OPERATOR(
            frame, kept, kept_bias, state, scale, shift, residual, plan.shape[1], plan.geometry, mean, relu
        )
    return y.unsqueeze(2), last


def why_not(
    layer: Any, frame: Tensor, weight: Tensor, state: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """None if the kernel runs ``layer`` for ``frame`` [N,C,H,W], else the reason as a sentence."""
    if frame.shape[0] != 1:
        return "several frames at once: the matrix library's calls are worth their time"
    if (reason := _why_not_now(frame, weight)) is not None:
        return reason
    plan = _make_plan(layer, frame.shape[2], frame.shape[3], frame.dtype)
    return plan.refusal or _why_not_laid(plan.shape, frame, state, residual)


def _why_not_now(frame: Tensor, weight: Tensor) -> str | None:
    if (backend := current_backend()) not in ("auto", "cpu"):
        return f"backend {backend!r} was asked for"
    if not runs_by_itself(frame, weight):
        return "traced, compiled, under autocast, with gradients or not on a CPU"
    return None


def _make_plan(layer: Any, height: int, width: int, dtype: torch.dtype) -> Plan:
    def refused(reason: str) -> Plan:
        return Plan(reason, False, [], (1, 0, 0, 0))

    if (reason := why_not_here(dtype)) is not None:
        return refused(reason)
    if layer.groups != 1 or layer._arguments["dilation"] != (1, 1):
        return refused("groups or dilation")
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return refused(f"padding {layer.padding!r} of {layer.padding_mode}")
    if layer.out_channels % CHANNELS:
        return refused(f"{layer.out_channels} channels are no multiple of {CHANNELS}")
    geometry = [*layer.kernel_size[1:], *layer._arguments["stride"], *layer._arguments["padding"]]
    kh, kw, sh, sw, ph, pw = geometry
    rows, columns = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    pairs = _in_pairs(dtype, _isa())
    # A single position, as in the head of a network, is a product with a vector: the weights' way from memory is all.
    if rows < 1 or (columns < LEAST_ROW and not (pairs and rows == columns == 1)):
        return refused(f"output rows of {columns} positions are shorter than {LEAST_ROW}")
    return Plan(None, pairs, geometry, (1, layer.out_channels, rows, columns))


def _why_not_laid(shape: tuple[int, ...], frame: Tensor, state: Tensor | None, residual: Tensor | None) -> str | None:
    adjacent = frame.stride(1) == 1
    for tensor, dtype in ((state, torch.float32), (residual, frame.dtype)):
        if tensor is None:
            continue
        adjacent = adjacent and tensor.stride(1) == 1 and tensor.dtype == dtype and tensor.shape == shape
        if torch.is_grad_enabled() and tensor.requires_grad:
            return "gradients are asked for"
    return (
        None if adjacent else "channels are not adjacent in every tensor, or a tensor is broadcast or in another dtype"
    )


def why_not_here(dtype: torch.dtype) -> str | None:
    """The same as far as the processor and the dtype decide it."""
    return _why_not_on(dtype, _isa())


@cache
def _why_not_on(dtype: torch.dtype, isa: str | None) -> str | None:
    if dtype == torch.float64:
        return "float64 is left to the matrix library"
    if not _library.has_kernel("recurrent_conv_frame", "CPU"):
        return _library.load_error() or "the library was built without this CPU kernel"
    if isa in (None, "portable", "avx2"):
        return "measured to be faster on processors with AVX-512 only"
    if (wide := arithmetic(dtype)[0]) != torch.float32 and not _in_pairs(dtype, isa):
        return f"the matrix library multiplies {wide} faster than this kernel fp32"
    return None


@cache
def _in_pairs(dtype: torch.dtype, isa: str | None) -> bool:
    """Whether the kernel multiplies pairs of bf16; the matrix unit is left to the matrix library."""
    return dtype == torch.bfloat16 and isa == "avx512_bf16" and arithmetic(dtype)[0] == dtype


def _isa() -> str | None:
    native = _library.native()
    return None if native is None else native.cpu_isa()
