"""Per-frame and recurrent convolutions over clips: the layers a recurrent video network is made of."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcu_ops.nn.frames import batch_to_frames, check_clip, frames_to_batch
from rcu_ops.nn.stream_state import active_slot, scan_with_state
from rcu_ops.ops import recurrent_conv

UPDATES = ("sum", "mean")
HIDDEN_INITS = ("identity", "random")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Size = int | tuple[int, int, int]


def frame_conv2d(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """2D convolution of frames [B,C,H,W] with a Conv3d-shaped weight [O,C/groups,1,kh,kw], all padding modes."""
    weight = weight.squeeze(2)
    if padding_mode != "zeros":
        top, left, bottom, right = _explicit_padding(padding, weight.shape[2:], dilation)
        frames = F.pad(frames, (left, right, top, bottom), mode=padding_mode)
        padding = (0, 0)
    return F.conv2d(frames, weight, bias, stride, padding, dilation, groups)


def _explicit_padding(
    padding: tuple[int, int] | str, kernel: tuple[int, ...], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2
    assert not isinstance(padding, str)
    return padding[0], padding[1], padding[0], padding[1]


class FrameConv3d(nn.Conv3d):
    """A 1xdxd convolution: ``nn.Conv3d`` with no temporal extent, run as a 2D convolution over the N*T frames.

    Same arguments, parameter names and shapes as ``nn.Conv3d``, same result. Channels_last_3d clips and frame-major
    ones are convolved in place, without copies. Kernel, padding, dilation and stride given as one number are spatial:
    ``kernel_size=3, padding=1`` is (1,3,3) with padding (0,1,1). A temporal stride (st,s,s) keeps every
    st-th frame (and runs as a 3D convolution).

    Shape:
        [N,C_in,T,H,W] -> [N,C_out,ceil(T/st),H',W']

    Raises:
        ValueError: temporal kernel, padding or dilation other than 1, 0, 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            _spatial("kernel_size", kernel_size, 1),
            _spatial("stride", stride, 1, fixed=False),
            padding if isinstance(padding, str) else _spatial("padding", padding, 0),
            _spatial("dilation", dilation, 1),
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]  # a Literal there
            device,
            dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """[N,C_in,T,H,W] -> [N,C_out,ceil(T/st),H',W']."""
        check_clip(self, input, self.in_channels)
        if self.stride[0] != 1:
            return super().forward(input)  # every st-th frame is no view as a batch of frames
        frames = frame_conv2d(
            frames_to_batch(input), self.weight, self.bias, **conv2d_arguments(self), padding_mode=self.padding_mode
        )
        return batch_to_frames(frames, input.shape[0], input.shape[2])


class RecurrentConv3d(nn.Module):
    """The Recurrent Convolutional Unit: ``h_t = w_hh * h_{t-1} + w_xh * x_t`` (Eq. 1 of the RCN paper).

    ``w_xh`` is a 1xdxd convolution, run as a 2D convolution over the N*T frames; ``w_hh`` is a 1x1x1 one at the output
    resolution, run by :func:`rcu_ops.recurrent_conv`. The output at frame t depends on frames 0..t only, has one frame
    per input frame, and starts with ``h_0 = w_xh * x_0``. Inside a :class:`rcu_ops.Streamer` the state carries over
    from one chunk to the next.

    Args:
        in_channels, out_channels: C and O.
        kernel_size: d, or (1,d,d) (any (1,kh,kw)).
        stride, padding, dilation: one number is spatial; three numbers must have no temporal part (1, 0, 1).
            ``padding`` may be "same" or "valid".
        groups: groups of ``w_xh``; ``w_hh`` always mixes all channels.
        bias: add a bias to ``w_xh * x_t`` (the paper has none).
        padding_mode: as for ``nn.Conv3d``.
        update: "sum" is Eq. 1; "mean" halves every sum, ``h_t = (w_hh * h_{t-1} + w_xh * x_t) / 2`` with
            ``h_0 = w_xh * x_0``: with an identity ``w_hh`` it stays bounded where "sum" grows with the clip.
        hidden_init: "identity" (section 4.6) or "random" (He normal, the other rows of Table 5).

    Shape:
        [N,C,T,H,W] -> [N,O,T,H',W'], in the memory format of the input (frame-major for a contiguous clip).

    Attributes:
        weight_xh: [O, C/groups, 1, kh, kw], as nn.Conv3d's weight. weight_hh: [O,O] (out, in). bias: [O] or None.

    Raises:
        ValueError: temporal kernel, stride, padding or dilation; unknown ``update``, ``hidden_init``, ``padding_mode``.
    """

    carries_state: ClassVar[bool] = True

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        update: str = "sum",
        hidden_init: str = "identity",
    ) -> None:
        super().__init__()
        _one_of("update", update, UPDATES)
        _one_of("hidden_init", hidden_init, HIDDEN_INITS)
        _one_of("padding_mode", padding_mode, PADDING_MODES)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels = {in_channels} and out_channels = {out_channels}, "
                f"got {groups}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _spatial("kernel_size", kernel_size, 1)
        self.stride = _spatial("stride", stride, 1)
        self.padding: tuple[int, int, int] | str
        if isinstance(padding, str):
            _one_of("padding", padding, ("same", "valid"))
            if padding == "same" and self.stride != (1, 1, 1):
                raise ValueError(f"padding: 'same' needs stride 1, got stride {self.stride}")
            self.padding = padding
        else:
            self.padding = _spatial("padding", padding, 0)
        self.dilation = _spatial("dilation", dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        self.update = update
        self.hidden_init = hidden_init
        placement = {"device": device, "dtype": dtype}
        self.weight_xh = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **placement))
        self.weight_hh = nn.Parameter(torch.empty(out_channels, out_channels, **placement))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **placement))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation of ``w_xh`` (and of a random ``w_hh``), identity ``w_hh`` by default, zero bias."""
        nn.init.kaiming_normal_(self.weight_xh, mode="fan_out", nonlinearity="relu")
        if self.hidden_init == "identity":
            nn.init.eye_(self.weight_hh)
        else:
            nn.init.kaiming_normal_(self.weight_hh, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> hidden states [N,O,T,H',W']."""
        xh = self.project(x)
        return scan_with_state(
            lambda h0: recurrent_conv(xh, self.weight_hh, h0, update=self.update), active_slot(self), xh, self.update
        )

    def project(self, x: Tensor) -> Tensor:
        """``w_xh * x`` of every frame, the recurrence's input: [N,C,T,H,W] -> [N,O,T,H',W']."""
        check_clip(self, x, self.in_channels)
        frames = frame_conv2d(
            frames_to_batch(x), self.weight_xh, self.bias, **conv2d_arguments(self), padding_mode=self.padding_mode
        )
        return batch_to_frames(frames, x.shape[0], x.shape[2])

    def extra_repr(self) -> str:
        """The arguments that differ from the defaults, as nn.Conv3d prints them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding != (0, 0, 0):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        parts.append(f"bias={self.bias is not None}, update={self.update!r}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        return ", ".join(parts)


def conv2d_arguments(conv: Any) -> dict[str, Any]:
    """The spatial arguments of a 1xdxd convolution, as ``F.conv2d`` takes them."""
    padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding[1:])
    return {
        "stride": tuple(conv.stride[1:]),
        "padding": padding,
        "dilation": tuple(conv.dilation[1:]),
        "groups": conv.groups,
    }


def _spatial(name: str, value: Size, temporal: int, *, fixed: bool = True) -> tuple[int, int, int]:
    """``value`` as (temporal, height, width); ValueError if three numbers give time another value than ``temporal``."""
    if isinstance(value, int):
        return temporal, value, value
    if len(value) != 3:
        raise ValueError(f"{name}: expected one number or three (time, height, width), got {value!r}")
    if fixed and value[0] != temporal:
        raise ValueError(
            f"{name}: expected {temporal} in time: a per-frame convolution has no temporal extent, got {tuple(value)}"
        )
    return value[0], value[1], value[2]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
