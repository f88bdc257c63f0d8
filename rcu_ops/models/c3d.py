"""C3D of "Learning Spatiotemporal Features with 3D Convolutional Networks": clip features of the residual RNN paper."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from rcu_ops.models.registry import register_model

_STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""Convolutions of the five stages, in multiples of the first one's planes."""


class C3D(nn.Module):
    """Eight 3x3x3 convolutions, five max-pools, two fully connected layers and a classifier.

    Args:
        num_classes: K (487 in Sports-1M).
        in_channels: channels of the clip. width: planes of the first convolution. hidden: size of fc6 and fc7.
        dropout: probability after fc6 and fc7.

    Shape:
        clip [N,C,16,112,112] -> scores [N,K]. The fully connected layers fix the size of the clip.

    Raises:
        ValueError: a number below 1, or a clip of another size.
    """

    feature_layer: ClassVar[str] = "relu6"
    frames: ClassVar[int] = 16
    size: ClassVar[int] = 112

    def __init__(
        self,
        num_classes: int = 487,
        *,
        in_channels: int = 3,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width, "hidden": hidden}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.in_channels = in_channels
        stages: list[nn.Module] = []
        planes = in_channels
        for index, convolutions in enumerate(_STAGES):
            layers: list[nn.Module] = []
            for multiple in convolutions:
                layers += [nn.Conv3d(planes, multiple * width, 3, padding=1), nn.ReLU(inplace=True)]
                planes = multiple * width
            # The first pool keeps all frames; the last one rounds 7x7 up to 4x4.
            pool = 1 if index == 0 else 2
            layers.append(nn.MaxPool3d((pool, 2, 2), padding=(0, 1, 1) if index == len(_STAGES) - 1 else 0))
            stages.append(nn.Sequential(*layers))
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = stages
        self.fc6 = nn.Linear(planes * 4 * 4, hidden)
        self.relu6 = nn.ReLU()
        self.fc7 = nn.Linear(hidden, hidden)
        self.relu7 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_classes)

    def features(self, clip: Tensor) -> Tensor:
        """[N,C,16,112,112] -> the activations of fc6, [N,4096]."""
        if clip.dim() != 5 or tuple(clip.shape[1:]) != (self.in_channels, self.frames, self.size, self.size):
            raise ValueError(
                f"C3D: expected a clip [N,{self.in_channels},{self.frames},{self.size},{self.size}], "
                f"got {list(clip.shape)}"
            )
        x = self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(clip)))))
        return self.relu6(self.fc6(x.flatten(1)))

    def forward(self, clip: Tensor) -> Tensor:
        """[N,C,16,112,112] -> [N,K]."""
        return self.head(self.dropout(self.relu7(self.fc7(self.dropout(self.features(clip))))))


@register_model("c3d")
def c3d(num_classes: int = 487, **options: Any) -> C3D:
    """C3D over 16 frames of 112x112."""
    return C3D(num_classes, **options)
