"""One frame at a time on the CPU: a layer's convolution, recurrence and all that follows as one call of one kernel.

A stream of single frames pays for every call of a layer in time that is no arithmetic: two calls per recurrent layer,
each with its checks, and a matrix library that looks its plan up anew. ``recurrent_conv_frame`` is one call on weights
in its own layout (:class:`Panels`): fp32, or pairs of bf16 where vector units multiply these at twice the rate.
:func:`why_not` is the rule; the doctor prints it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rcu_ops import _library
from rcu_ops.nn.packed_conv import arithmetic, runs_by_itself
from rcu_ops.ops import current_backend
from rcu_ops.ops._kept import Kept
from rcu_ops.ops.recurrent_conv_frame import CHANNELS, LEAST_ROW, OPERATOR
from rcu_ops.reference.recurrent_conv_frame import pack_pairs, pack_panels


class Panels(Kept):
    """A layer's weights in the kernel's layout."""

    def panels(self, weight: Tensor, weight_hh: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The panels of ``weight`` [O,C,1,kh,kw] and ``weight_hh`` ([O,O] or None), and the bias in fp32."""
        pairs = _in_pairs(weight.dtype, _isa())

        def make() -> tuple[Tensor, Tensor | None]:
            pack = pack_pairs if pairs else pack_panels
            panels = pack(weight.detach().squeeze(2), None if weight_hh is None else weight_hh.detach())
            return panels, None if bias is None else bias.detach().float().contiguous()

        kept: tuple[Tensor, Tensor | None] = self.get((weight, weight_hh, bias), pairs, make)
        return kept


def run_frame(
    layer: Any,
    panels: Panels,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    relu: bool,
    *,
    weight_hh: Tensor | None = None,
    state: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """``(y [1,O,1,H',W'], state)`` of ``layer`` after the frame x [1,C,1,H,W], or None where the kernel is not taken.

    Args:
        layer: has a convolution's arguments. weight: [O,C,1,kh,kw]. weight_hh: [O,O]; with it go ``state``
            [1,O,H',W'], ``scale`` and ``shift`` [O]. mean: halve every sum.
        residual: expands to the output, or None. relu: end with a ReLU.
    """
    frame = x.squeeze(2)
    if residual is not None:
        residual = residual.squeeze(2)
    if why_not(layer, frame, weight, state, residual) is not None:
        return None
    kept, bias = panels.panels(weight, weight_hh, layer.bias)
    # Nothing here has a gradient, so the call goes past the dispatcher's stop for one.
    with torch._C._AutoDispatchBelowAutograd():
        y, last = OPERATOR(
            frame, kept, bias, state, scale, shift, residual, layer.out_channels, _geometry(layer), mean, relu
        )
    return y.unsqueeze(2), last


def why_not(
    layer: Any, frame: Tensor, weight: Tensor, state: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """None if the kernel runs ``layer`` for ``frame`` [N,C,H,W], else the reason as a sentence."""
    if frame.shape[0] != 1:
        return "several frames at once: the matrix library's calls are worth their time"
    if current_backend() not in ("auto", "cpu"):
        return f"backend {current_backend()!r} was asked for"
    if not runs_by_itself(frame, weight):
        return "traced, compiled, under autocast, with gradients or not on a CPU"
    if (reason := why_not_here(frame.dtype)) is not None:
        return reason
    if layer.groups != 1 or layer._arguments["dilation"] != (1, 1):
        return "groups or dilation"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"padding {layer.padding!r} of {layer.padding_mode}"
    if layer.out_channels % CHANNELS:
        return f"{layer.out_channels} channels are no multiple of {CHANNELS}"
    size = output_size(layer, frame)
    if size[0] < 1 or size[1] < LEAST_ROW:
        return f"output rows of {size[1]} positions are shorter than {LEAST_ROW}"
    shape = (1, layer.out_channels, *size)
    for tensor, dtype in ((frame, frame.dtype), (state, torch.float32), (residual, frame.dtype)):
        if tensor is None:
            continue
        if tensor.stride(1) != 1 or tensor.dtype != dtype or (tensor is not frame and tensor.shape != shape):
            return "channels are not adjacent in every tensor, or a tensor is broadcast or in another dtype"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "gradients are asked for"
    return None


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


def output_size(layer: Any, frame: Tensor) -> tuple[int, int]:
    """Rows and columns of a convolution's output for ``frame`` [N,C,H,W]."""
    kh, kw, sh, sw, ph, pw = _geometry(layer)
    return (frame.shape[2] + 2 * ph - kh) // sh + 1, (frame.shape[3] + 2 * pw - kw) // sw + 1


def _geometry(layer: Any) -> list[int]:
    return [*layer.kernel_size[1:], *layer._arguments["stride"], *layer._arguments["padding"]]
