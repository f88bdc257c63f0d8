"""One configurable video ResNet: recurrent (RCN), inflated (I3D, R3D), factorised ((2+1)D) and per-frame 2D networks.

Table 1 of "Recurrent Convolutions for Causal 3D CNNs", Table 1 of "FASTER Recurrent Networks for Efficient Video
Classification", and the networks of "Learn to Cycle". Names follow torchvision's ResNet (``layer1`` …
``layer4`` are res2 … res5), so that 2D weights map onto them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.models.registry import register_model
from rcu_ops.nn.frames import laid_out
from rcu_ops.nn.gating import FeatureGate
from rcu_ops.nn.layer_choice import LayerChoice, choose_layers
from rcu_ops.nn.nonlocal_block import NonLocalBlock
from rcu_ops.nn.recurrent_conv import FrameConv3d, RecurrentConv3d
from rcu_ops.nn.srtg import SRTG

CONVOLUTIONS = ("rcn", "i3d", "r2plus1d", "2d")
MEMORY_FORMATS = (torch.channels_last_3d, torch.contiguous_format)


def matched_mid_planes(in_planes: int, out_planes: int, kernel: int, temporal_kernel: int) -> int:
    """Planes between the two halves of a (2+1)D convolution, so that it has as many weights as the 3D one.

    ``floor(n d^2 M_in M_out / (d^2 M_in + n M_out))`` of R(2+1)D, with n the temporal and d the spatial kernel.
    """
    d2, n = kernel * kernel, temporal_kernel
    return n * d2 * in_planes * out_planes // (d2 * in_planes + n * out_planes)


class Conv2Plus1d(nn.Module):
    """A 3D convolution factorised into 1xdxd, BN, ReLU, nx1x1.

    Args:
        in_planes, out_planes: channels.
        mid_planes: channels between the halves.
        kernel, temporal_kernel: d and n, both odd.
        stride, temporal_stride: of the spatial and the temporal half.
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        mid_planes: int,
        kernel: int,
        temporal_kernel: int,
        stride: int = 1,
        temporal_stride: int = 1,
    ) -> None:
        super().__init__()
        self.spatial = FrameConv3d(in_planes, mid_planes, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm3d(mid_planes)
        self.relu = nn.ReLU(inplace=True)
        self.temporal = nn.Conv3d(
            mid_planes,
            out_planes,
            (temporal_kernel, 1, 1),
            (temporal_stride, 1, 1),
            (temporal_kernel // 2, 0, 0),
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,O,T',H',W']."""
        return self.temporal(self.relu(self.bn(self.spatial(x))))


class ConvolutionFactory:
    """Makes the convolutions of one network, in network order, in the kind the network is made of.

    Args:
        kind: "rcn" (recurrent), "i3d" (n x d x d), "r2plus1d", "2d" (1xdxd).
        temporal_kernel: n.
        recurrent: for "rcn", whether the i-th convolution is recurrent; the others are 1xdxd.
        update, hidden_init: of the recurrent ones.
    """

    def __init__(
        self, kind: str, temporal_kernel: int, recurrent: Sequence[bool], update: str, hidden_init: str
    ) -> None:
        self.kind = kind
        self.temporal_kernel = temporal_kernel
        self.update = update
        self.hidden_init = hidden_init
        self._recurrent = iter(recurrent)

    def __call__(
        self,
        in_planes: int,
        out_planes: int,
        kernel: int,
        stride: int = 1,
        temporal_stride: int = 1,
        mid_planes: int | None = None,
    ) -> nn.Module:
        """A convolution with spatial kernel d > 1; ``mid_planes`` overrides the matched number of (2+1)D."""
        padding = kernel // 2
        if self.kind == "rcn" and next(self._recurrent):
            return RecurrentConv3d(
                in_planes, out_planes, kernel, stride, padding, update=self.update, hidden_init=self.hidden_init
            )
        if self.kind in ("rcn", "2d"):
            return FrameConv3d(in_planes, out_planes, kernel, (temporal_stride, stride, stride), padding, bias=False)
        n = self.temporal_kernel
        if self.kind == "i3d":
            return nn.Conv3d(
                in_planes,
                out_planes,
                (n, kernel, kernel),
                (temporal_stride, stride, stride),
                (n // 2, padding, padding),
                bias=False,
            )
        mid_planes = mid_planes or matched_mid_planes(in_planes, out_planes, kernel, n)
        return Conv2Plus1d(in_planes, out_planes, mid_planes, kernel, n, stride, temporal_stride)


def _pointwise(in_planes: int, out_planes: int, stride: int = 1, temporal_stride: int = 1) -> FrameConv3d:
    return FrameConv3d(in_planes, out_planes, 1, (temporal_stride, stride, stride), bias=False)


class _Block(nn.Module):
    """What both kinds of residual block have: a shortcut, a feature gate, and a temporal gate in one of its places.

    Args:
        in_planes: channels of the input. planes: channels of the block; the output has ``planes * expansion``.
        stride, temporal_stride: of the block and the shortcut.
        gate: a :class:`FeatureGate` on the residual branch, or None.
        srtg: makes the block's :class:`SRTG` for a number of channels, or None.
        placement: where the SRTG stands (section 3.3 of its paper). "start": before the first convolution of the
            residual branch; "top" (bottlenecks): after the first; "mid": in the middle of a simple block, after a
            bottleneck's second; "end" (bottlenecks): after the last, before the addition; "res": on the shortcut;
            "final": after the addition and its ReLU.
    """

    expansion: ClassVar[int]
    placements: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        temporal_stride: int,
        gate: FeatureGate | None = None,
        srtg: Callable[[int], SRTG] | None = None,
        placement: str = "final",
    ) -> None:
        super().__init__()
        out_planes = planes * self.expansion
        self.relu = nn.ReLU(inplace=True)
        self.gate = gate
        self.downsample = _downsample(in_planes, out_planes, stride, temporal_stride)
        self.placement = placement
        channels = {"start": in_planes, "top": planes, "mid": planes}.get(placement, out_planes)
        self.srtg = None if srtg is None else srtg(channels)
        self.relation: NonLocalBlock | None = None  # after the block, where the network has one

    def _at(self, placement: str, x: Tensor) -> Tensor:
        """``x`` through the SRTG, if this is its place."""
        return x if self.srtg is None or placement != self.placement else self.srtg(x)

    def _shortcut(self, x: Tensor) -> Tensor:
        return self._at("res", x if self.downsample is None else self.downsample(x))

    def _joined(self, out: Tensor, shortcut: Tensor) -> Tensor:
        if self.gate is not None:
            out = self.gate(out)
        out = self._at("final", self.relu(self._at("end", out) + shortcut))
        return out if self.relation is None else self.relation(out)


class BasicBlock(_Block):
    """Two dxd convolutions with a residual connection.

    Args: as for both kinds of block, and conv: makes the convolutions. The strides sit in the first one.
    """

    expansion = 1
    placements = ("start", "mid", "res", "final")

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        temporal_stride: int,
        conv: ConvolutionFactory,
        gate: FeatureGate | None = None,
        srtg: Callable[[int], SRTG] | None = None,
        placement: str = "final",
    ) -> None:
        super().__init__(in_planes, planes, stride, temporal_stride, gate, srtg, placement)
        self.conv1 = conv(in_planes, planes, 3, stride, temporal_stride)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm3d(planes)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,O,T',H',W']."""
        shortcut = self._shortcut(x)
        out = self.relu(self.bn1(self.conv1(self._at("start", x))))
        out = self.bn2(self.conv2(self._at("mid", out)))
        return self._joined(out, shortcut)


class Bottleneck(_Block):
    """1x1, dxd, 1x1 convolutions with a residual connection.

    Args: as for both kinds of block, and conv: makes the dxd convolution, in which both strides sit.
    """

    expansion = 4
    placements = ("start", "top", "mid", "end", "res", "final")

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        temporal_stride: int,
        conv: ConvolutionFactory,
        gate: FeatureGate | None = None,
        srtg: Callable[[int], SRTG] | None = None,
        placement: str = "final",
    ) -> None:
        super().__init__(in_planes, planes, stride, temporal_stride, gate, srtg, placement)
        self.conv1 = _pointwise(in_planes, planes)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = conv(planes, planes, 3, stride, temporal_stride)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = _pointwise(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm3d(planes * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,O,T',H',W']."""
        shortcut = self._shortcut(x)
        out = self.relu(self.bn1(self.conv1(self._at("start", x))))
        out = self.relu(self.bn2(self.conv2(self._at("top", out))))
        out = self.bn3(self.conv3(self._at("mid", out)))
        return self._joined(out, shortcut)


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _downsample(in_planes: int, out_planes: int, stride: int, temporal_stride: int) -> nn.Sequential | None:
    if in_planes == out_planes and stride == 1 and temporal_stride == 1:
        return None
    return nn.Sequential(_pointwise(in_planes, out_planes, stride, temporal_stride), nn.BatchNorm3d(out_planes))


class Stem(nn.Module):
    """conv1: 7x7 with spatial stride 2, BN, ReLU; with ``pool``, a 1x3x3 max-pool of stride 2 after it.

    With ``frames`` = m > 1, conv1 is m x 7 x 7 with stride m in time.
    """

    def __init__(
        self, in_channels: int, width: int, conv: ConvolutionFactory, pool: bool, mid_planes: int | None, frames: int
    ) -> None:
        super().__init__()
        if frames > 1:  # every step of `frames` frames becomes one
            kernel, stride = (frames, 7, 7), (frames, 2, 2)
            self.conv: nn.Module = nn.Conv3d(in_channels, width, kernel, stride, (0, 3, 3), bias=False)
        else:
            self.conv = conv(in_channels, width, 7, 2, mid_planes=mid_planes)
        self.bn = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,O,T/frames,H/2,W/2] (H/4, W/4 with the pool)."""
        x = self.relu(self.bn(self.conv(x)))
        return x if self.pool is None else self.pool(x)


class Head(nn.Module):
    """Spatial average pool, dropout and convC: a 1x1x1 convolution to one score vector per frame."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.conv = FrameConv3d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K,T]."""
        return self.conv(self.dropout(x.mean((3, 4), keepdim=True))).flatten(2)


def _named(prefix: str, layer: Callable[..., Any], channels: int, **options: Any) -> Any:
    """``layer(channels, **options)``, whose errors name the network's options: ``prefix`` and an underscore before."""
    try:
        return layer(channels, **options)
    except ValueError as error:
        raise ValueError(f"{prefix}_{error}") from None


class VideoResNet(nn.Module):
    """A ResNet over clips with per-frame scores.

    Args:
        block: "basic" or "bottleneck".
        layers: blocks in res2 … res5.
        conv: "rcn": recurrent convolutions (causal); "i3d": n x d x d; "r2plus1d": 1xdxd, BN, ReLU, nx1x1; "2d": 1xdxd.
            In bottlenecks the 1x1x1 convolutions and everywhere the shortcuts stay 1x1x1.
        num_classes: K. in_channels: channels of the clip. width: planes of conv1 and res2, doubling from stage to
            stage.
        temporal_kernel: n of "i3d" and "r2plus1d".
        temporal_strides: of res2 … res5; must be 1 for "rcn".
        stem_pool: a max-pool after conv1.
        stem_mid_planes: for "r2plus1d", planes between the halves of conv1; None: matched in number of weights.
        stem_frames: for "2d", temporal kernel and stride of conv1: that many frames become one, and a remainder is
            left out. A network with more than 1 does not stream.
        gating: S3D-G feature gating on every residual branch, pooled per frame in "rcn" and "2d" networks and over
            space and time in the others.
        recurrent_layers: for "rcn", which convolutions are recurrent: "all", "none", ("last", n), ("every", k),
            ("spaced", n), or a predicate (name, module) -> bool over their names ("stem.conv", "layer1.0.conv1", …;
            the module is a placeholder, as no layer exists yet); the others are 1xdxd (section 5.6).
        update: "sum" or "mean", see :class:`rcu_ops.nn.RecurrentConv3d`.
        hidden_init: "identity" or "random", of the recurrent weights (Table 5).
        srtg: None, or where in every residual block a :class:`rcu_ops.nn.SRTG` stands: "start", "mid", "res", "final",
            and in bottlenecks "top" and "end".
        srtg_gate, srtg_fusion, srtg_window: its ``gate``, ``fusion`` and ``window``.
        nonlocal_after: names of residual blocks ("layer2.1", "layer3.5") with a :class:`rcu_ops.nn.NonLocalBlock` after
            them (section 5.3).
        nonlocal_kind: its ``kind``. nonlocal_memory: its ``memory`` in networks of causal layers; in the others it
            looks at the whole clip.
        dropout: probability before convC.
        memory_format: clips are brought into it on entry, and weights are kept in it; ``torch.contiguous_format``
            leaves both as they come (what views weights as one row, as torch.nn.utils.prune, parameters_to_vector and
            FSDP's fully_shard do, needs that, or ``model.to(memory_format=torch.contiguous_format)``).

    Shape:
        clip [N,C,T,H,W] -> scores [N,K]. T' = T unless there are temporal strides.

    Raises:
        ValueError: an argument with an impossible value.
    """

    def __init__(
        self,
        block: str = "basic",
        layers: Sequence[int] = (2, 2, 2, 2),
        conv: str = "rcn",
        num_classes: int = 400,
        *,
        in_channels: int = 3,
        width: int = 64,
        temporal_kernel: int = 3,
        temporal_strides: Sequence[int] = (1, 1, 1, 1),
        stem_pool: bool = False,
        stem_mid_planes: int | None = None,
        stem_frames: int = 1,
        gating: bool = False,
        recurrent_layers: LayerChoice = "all",
        update: str = "sum",
        hidden_init: str = "identity",
        srtg: str | None = None,
        srtg_gate: bool = True,
        srtg_fusion: str = "mul",
        srtg_window: int | None = None,
        nonlocal_after: Sequence[str] = (),
        nonlocal_kind: str = "gaussian",
        nonlocal_memory: int = 8,
        dropout: float = 0.0,
        memory_format: torch.memory_format = torch.channels_last_3d,
    ) -> None:
        super().__init__()
        _expect("block", block, tuple(BLOCKS))
        _expect("conv", conv, CONVOLUTIONS)
        _expect("memory_format", memory_format, MEMORY_FORMATS)
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers: expected four positive numbers, got {tuple(layers)}")
        if len(temporal_strides) != 4 or min(temporal_strides) < 1:
            raise ValueError(f"temporal_strides: expected four positive numbers, got {tuple(temporal_strides)}")
        if conv == "rcn" and set(temporal_strides) != {1}:
            raise ValueError(f"temporal_strides: recurrent networks keep every frame, got {tuple(temporal_strides)}")
        if temporal_kernel < 1 or temporal_kernel % 2 == 0:
            raise ValueError(f"temporal_kernel: expected an odd number, got {temporal_kernel}")
        if stem_frames < 1 or (stem_frames > 1 and conv != "2d"):
            raise ValueError(f"stem_frames: expected 1, or more for conv='2d', got {stem_frames} for conv={conv!r}")
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")
        for name, changed, owner, there in (
            ("srtg_gate", not srtg_gate, "srtg", srtg is not None),
            ("srtg_fusion", srtg_fusion != "mul", "srtg", srtg is not None),
            ("srtg_window", srtg_window is not None, "srtg", srtg is not None),
            ("nonlocal_kind", nonlocal_kind != "gaussian", "nonlocal_after", bool(nonlocal_after)),
            ("nonlocal_memory", nonlocal_memory != 8, "nonlocal_after", bool(nonlocal_after)),
        ):
            if changed and not there:
                raise ValueError(f"{name}: changes nothing without {owner}")
        kind = BLOCKS[block]
        if srtg is not None and srtg not in kind.placements:
            allowed = ", ".join(map(repr, kind.placements))
            raise ValueError(f"srtg: {block} blocks have the places {allowed}, got {srtg!r}")

        def temporal_gate(channels: int) -> SRTG:
            return _named("srtg", SRTG, channels, gate=srtg_gate, fusion=srtg_fusion, window=srtg_window)

        known = {f"layer{stage}.{index}" for stage, blocks in enumerate(layers, 1) for index in range(blocks)}
        if not known >= set(nonlocal_after):
            unknown = sorted(set(nonlocal_after) - known)
            raise ValueError(f"nonlocal_after: expected names of blocks such as 'layer2.1', got {unknown}")
        names = ["stem.conv"]
        for stage, blocks in enumerate(layers, start=1):
            convs = ("conv1", "conv2") if kind is BasicBlock else ("conv2",)
            names += [f"layer{stage}.{index}.{name}" for index in range(blocks) for name in convs]
        # Which layers are recurrent is settled before any layer exists: predicates see names and this placeholder.
        placeholder = nn.Identity()
        recurrent = choose_layers([(name, placeholder) for name in names], recurrent_layers, "recurrent_layers")
        factory = ConvolutionFactory(conv, temporal_kernel, recurrent, update, hidden_init)

        self.conv_kind = conv
        framewise = conv in ("rcn", "2d") and stem_frames == 1
        clip_gate = srtg is not None and srtg_gate and srtg_window is None
        self.causal = framewise and not clip_gate
        self._channels_last = memory_format == torch.channels_last_3d
        self.stem = Stem(in_channels, width, factory, stem_pool, stem_mid_planes, stem_frames)
        planes = width
        stages = []
        in_planes = width
        for stage, (blocks, temporal_stride) in enumerate(zip(layers, temporal_strides, strict=True)):
            stage_blocks = []
            for index in range(blocks):
                first = index == 0
                stage_blocks.append(
                    kind(
                        in_planes,
                        planes,
                        2 if first and stage > 0 else 1,
                        temporal_stride if first else 1,
                        factory,
                        FeatureGate(planes * kind.expansion, causal=framewise) if gating else None,
                        None if srtg is None else temporal_gate,
                        srtg or "final",
                    )
                )
                in_planes = planes * kind.expansion
                if f"layer{stage + 1}.{index}" in nonlocal_after:
                    memory = nonlocal_memory if framewise else None
                    relation = _named("nonlocal", NonLocalBlock, in_planes, kind=nonlocal_kind, memory=memory)
                    stage_blocks[-1].relation = relation
            stages.append(nn.Sequential(*stage_blocks))
            planes *= 2
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.head = Head(in_planes, num_classes, dropout)
        self._initialise()
        if self._channels_last:
            # Weights as the convolutions want them for such clips; otherwise every call would rearrange them.
            self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @property
    def memory_format(self) -> torch.memory_format:
        """What clips are brought into; no attribute, since torch.save, which uses pickle's protocol 2, takes none."""
        return torch.channels_last_3d if self._channels_last else torch.contiguous_format

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module is not self.head.conv:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.conv.weight, 0.0, 0.01)
        assert self.head.conv.bias is not None
        nn.init.zeros_(self.head.conv.bias)

    def features(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> the output of res5, [N, 512 or 2048, T', H/16, W/16] (half that with ``stem_pool``)."""
        x = self.stem(laid_out(clip, self.memory_format))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def frame_scores(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K,T'], one score vector per frame that is left (all, without temporal strides)."""
        return self.head(self.features(clip))

    def forward(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K], the mean of the frames' scores."""
        return self.frame_scores(clip).mean(2)


def _expect(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


# ---- names ---------------------------------------------------------------------------------------------------------

_DEPTHS: dict[int, dict[str, Any]] = {
    18: {"block": "basic", "layers": (2, 2, 2, 2)},
    26: {"block": "bottleneck", "layers": (2, 2, 2, 2)},
    34: {"block": "basic", "layers": (3, 4, 6, 3)},
    50: {"block": "bottleneck", "layers": (3, 4, 6, 3)},
    101: {"block": "bottleneck", "layers": (3, 4, 23, 3)},
}

# Networks of the RCN, SRTG and FASTER papers: family -> (depths, arguments).
_FAMILIES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "rcn": ((18, 34, 50), {"conv": "rcn"}),
    "i3d": ((18, 34, 50), {"conv": "i3d", "temporal_strides": (1, 2, 2, 2)}),
    "r3d": ((34, 50, 101), {"conv": "i3d", "temporal_strides": (1, 2, 2, 2)}),
    "r2plus1d": ((18, 34, 50, 101), {"conv": "r2plus1d", "temporal_strides": (1, 2, 2, 2)}),
    "r2d": ((26,), {"conv": "2d", "stem_frames": 8}),
}

# The clip-level backbones of FASTER have a max-pool after conv1 and 45 planes within (2+1)D's conv1.
_PARTICULAR: dict[str, dict[str, Any]] = {
    "r2d_resnet26": {"stem_pool": True},
    "r3d_resnet50": {"stem_pool": True},
    "r2plus1d_resnet50": {"stem_pool": True, "stem_mid_planes": 45},
}


def _register(name: str, arguments: dict[str, Any]) -> None:
    def build(num_classes: int = 400, *, dense: bool = False, **options: Any) -> VideoResNet:
        merged = {**arguments, **options}
        if dense:
            if "temporal_strides" in options:
                raise ValueError(
                    "dense: it sets the temporal strides to 1, so temporal_strides cannot be given as well"
                )
            merged["temporal_strides"] = (1, 1, 1, 1)
        return VideoResNet(num_classes=num_classes, **merged)

    build.__name__ = name
    build.__doc__ = (
        f"{name}: VideoResNet with {arguments}; ``dense=True`` sets all temporal strides to 1 (section 4.3)."
    )
    register_model(name)(build)


for _family, (_depths, _arguments) in _FAMILIES.items():
    for _depth in _depths:
        _name = f"{_family}_resnet{_depth}"
        _register(_name, {**_DEPTHS[_depth], **_arguments, **_PARTICULAR.get(_name, {})})
        if _family in ("r3d", "r2plus1d") and _depth > 18:
            _register(f"srtg_{_name}", {**_DEPTHS[_depth], **_arguments, "srtg": "final"})
        if _family == "i3d":
            _register(f"{_name}_dense", {**_DEPTHS[_depth], **_arguments, "temporal_strides": (1, 1, 1, 1)})
