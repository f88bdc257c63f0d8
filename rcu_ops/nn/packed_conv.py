"""2D convolution for CPU inference with its weight kept in the matrix library's own layout.

PyTorch's convolution rearranges the weight at every call. For one frame at a time that costs more than the convolution
itself in the deep layers (three times, for 512 channels at 7x7 in bf16). Here the rearranged weight is kept. It is made
when first needed for an input shape, and made anew when the weight changes.

Some processors multiply bf16 slower than fp32 (:func:`arithmetic`). There a bf16 convolution runs in fp32, on a weight
that is widened as it is rearranged: the products are the same, and only the result is rounded.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rcu_ops import _library
from rcu_ops.ops._kept import Kept
from rcu_ops.ops._transforms import forward_mode

_KEPT_LAYOUTS = 2


class PackedWeights(Kept):
    """The rearranged forms of one convolution weight, for the input shapes last used."""

    def __init__(self, most: int = _KEPT_LAYOUTS) -> None:
        super().__init__(most)

    def packed(
        self,
        frames: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        """The form of ``weight`` [O,C/groups,1,kh,kw] for inputs shaped like ``frames`` [B,C,H,W], in their dtype."""

        def make() -> Tensor:
            form = weight.detach().squeeze(2).to(frames.dtype).contiguous()
            size = list(frames.shape)
            return torch.ops.mkldnn._reorder_convolution_weight(form, padding, stride, dilation, groups, size)

        kept: Tensor = self.get((weight,), (frames.shape, frames.dtype), make)
        return kept


def conv2d_act(
    packed: PackedWeights,
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``act(conv2d(frames, weight, bias) + residual)``, with the kept weight where the CPU library can take it.

    Args:
        packed: this weight's kept forms.
        frames: [B,C,H,W]. weight: [O,C/groups,1,kh,kw]. bias: [O] or None. residual: like the output, or None.
        stride, padding, dilation, groups: as in ``F.conv2d``.
        relu: apply a ReLU at the end.
    """
    if not _can_pack(frames, weight):
        y = F.conv2d(frames, weight.squeeze(2), bias, stride, padding, dilation, groups)
        if residual is not None:
            y = y + residual
        return F.relu(y) if relu else y
    given = frames.dtype
    wide = arithmetic(given)[0]
    if wide != given:
        frames = frames.to(wide)
        bias = bias if bias is None else bias.to(wide)
        residual = residual if residual is None else residual.to(wide)
    kept = packed.packed(frames, weight, stride, padding, dilation, groups)
    arguments = (padding, stride, dilation, groups)
    after = "relu" if relu else "none"
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(frames, kept, bias, *arguments, after, [], "")
    else:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            frames, residual, kept, bias, *arguments, "add", 1.0, "relu" if relu else None, [], None
        )
    return y.to(given) if wide != given else y


@cache
def arithmetic(dtype: torch.dtype) -> tuple[torch.dtype, str]:
    """The dtype in which CPU convolutions with kept weights are computed for tensors of ``dtype``, and why."""
    if not _library_takes(dtype):
        return dtype, f"the weights of {dtype} convolutions are not kept: the matrix library does not take them"
    if dtype != torch.bfloat16:
        return dtype, "the matrix library takes it as it is"
    native = _library.native()
    if native is None:
        return dtype, "the processor is not known without rcu_ops._native, which was not built for this Python"
    best = native.cpu_isas()[-1]
    if best == "portable":
        return dtype, "what this processor does with bf16 is not known"
    if best in ("avx2", "avx512"):
        return torch.float32, f"{best} has no bf16 arithmetic"
    if best == "avx512_bf16" and not native.cpu_multiplies_pairs():
        return torch.float32, "this processor multiplies bf16 at half the rate of fp32"
    return dtype, f"{best} multiplies bf16 at least as fast as fp32"


def runs_by_itself(frames: Tensor, weight: Tensor) -> bool:
    """Whether a call on kept weights may take a convolution's place: nobody traces, casts or differentiates it."""
    return (
        not torch.compiler.is_compiling()  # first: what follows cannot be traced
        and frames.is_cpu
        and type(frames) is Tensor
        and frames.dtype == weight.dtype
        and frames.numel() > 0
        and not (torch.is_grad_enabled() and (frames.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not forward_mode()
        and _get_current_dispatch_mode() is None  # counters and tracers know convolutions, not calls on kept weights
    )


def _can_pack(frames: Tensor, weight: Tensor) -> bool:
    return runs_by_itself(frames, weight) and _library_takes(frames.dtype) and bool(torch.backends.mkldnn.enabled)


@cache
def _library_takes(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")):
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False
