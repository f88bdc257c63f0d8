"""Pre-activation ResNets over the frames of a clip (ResNet-v2, Table 1 of the Relational LSTM paper), and TSN on them.

A network of its own: normalisation comes before every convolution and once after the last block, the stem has neither,
and shortcuts start from the activated input. Names follow :mod:`rcu_ops.models.resnet` (``layer1`` … ``layer4`` are
conv2 … conv5).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.models.registry import register_model
from rcu_ops.models.resnet import Head
from rcu_ops.nn.frames import laid_out
from rcu_ops.nn.recurrent_conv import FrameConv3d

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EXPANSION = 4


class PreActBottleneck(nn.Module):
    """BN, ReLU, 1x1; BN, ReLU, 3x3 with the stride; BN, ReLU, 1x1; added to the input.

    A shortcut that has to change size is a 1x1 convolution of the first activation.

    Args:
        in_planes: channels of the input. planes: of the block; the output has four times as many.
        stride: spatial.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out_planes = planes * EXPANSION
        self.bn1 = nn.BatchNorm3d(in_planes)
        self.conv1 = FrameConv3d(in_planes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv2 = FrameConv3d(planes, planes, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(planes)
        self.conv3 = FrameConv3d(planes, out_planes, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or in_planes != out_planes
        self.shortcut = (
            FrameConv3d(in_planes, out_planes, (1, 1, 1), (1, stride, stride), bias=False) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,4 planes,T,H',W']."""
        y = self.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.conv2(self.relu(self.bn2(self.conv1(y))))
        return x + self.conv3(self.relu(self.bn3(y)))


class Trunk(nn.Module):
    """conv1, its max-pool, and conv2 … conv5 with the last ``drop`` units of conv5 left out.

    Args:
        depth: 50 or 101.
        in_channels: 3 for RGB, 20 for ten flow fields.
        width: planes of conv1.
        drop: units of conv5 that somebody else has, 0 to 3.

    Attributes:
        channels: of the output.
    """

    def __init__(self, depth: int, in_channels: int = 3, width: int = 64, drop: int = 0) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth: expected one of {', '.join(map(str, DEPTHS))}, got {depth}")
        for name, value in (("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.conv = FrameConv3d(in_channels, width, 7, 2, 3, bias=False)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        planes, stages = width, []
        for index, units in enumerate(DEPTHS[depth]):
            kept = units - drop if index == 3 else units
            stages.append(conv_units(planes, width * 2**index, kept, 1 if index == 0 else 2))
            planes = width * 2**index * EXPANSION
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels = planes

    def forward(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,32 width,T,H/32,W/32], before the last normalisation."""
        x = self.pool(self.conv(laid_out(clip, torch.channels_last_3d)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def conv_units(in_planes: int, planes: int, units: int, stride: int = 1) -> nn.Sequential:
    """``units`` bottlenecks, the stride in the first one."""
    return nn.Sequential(
        *(
            PreActBottleneck(planes * EXPANSION if index else in_planes, planes, 1 if index else stride)
            for index in range(units)
        )
    )


def initialise(module: nn.Module) -> None:
    """He initialisation of every convolution, and weights in the memory format of the clips."""
    for each in module.modules():
        if isinstance(each, nn.Conv3d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
    module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


class TemporalSegmentNetwork(nn.Module):
    """Every snippet classified by a ResNet-v2, and the scores averaged (consensus after the classifier).

    Args:
        num_classes: K.
        depth: 50 or 101.
        in_channels: 3 for RGB, 20 for a snippet of ten flow fields.
        width: planes of conv1.
        dropout: probability before the classifier.

    Shape:
        clip [N,C,T,H,W], one snippet per segment -> scores [N,K].
    """

    feature_layer: ClassVar[str] = "relu"

    def __init__(
        self,
        num_classes: int = 101,
        *,
        depth: int = 101,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.8,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.trunk = Trunk(depth, in_channels, width)
        self.bn = nn.BatchNorm3d(self.trunk.channels)
        self.relu = nn.ReLU(inplace=True)
        self.head = Head(self.trunk.channels, num_classes, dropout)
        initialise(self)
        nn.init.normal_(self.head.conv.weight, 0.0, 0.001)
        assert self.head.conv.bias is not None
        nn.init.zeros_(self.head.conv.bias)

    def features(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> the activated output of conv5, [N,2048,T,H/32,W/32]."""
        return self.relu(self.bn(self.trunk(clip)))

    def frame_scores(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> the scores of every snippet, [N,K,T]."""
        return self.head(self.features(clip))

    def forward(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K], the mean of the snippets' scores."""
        return self.frame_scores(clip).mean(2)


def _register(depth: int) -> None:
    def build(num_classes: int = 101, **options: Any) -> TemporalSegmentNetwork:
        return TemporalSegmentNetwork(num_classes, depth=depth, **options)

    build.__name__ = f"tsn_resnet{depth}v2"
    build.__doc__ = f"A temporal segment network on ResNet-{depth}-v2."
    register_model(build.__name__)(build)


for _depth in DEPTHS:
    _register(_depth)
