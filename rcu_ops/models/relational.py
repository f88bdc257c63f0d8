"""The two-branch network of "Relational Long Short-Term Memory for Video Action Recognition" on ResNet-v2."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.models.registry import register_model
from rcu_ops.models.resnet_v2 import Trunk, conv_units, initialise
from rcu_ops.nn.relational_lstm import RelationalLSTM
from rcu_ops.nn.running_mean import RunningMean

BACKBONES = {"resnet50v2": 50, "resnet101v2": 101}
BRANCHES = ("both", "local", "nonlocal")
UNITS = 3


class Branch(nn.Module):
    """What a branch has of conv5 after the split, its last normalisation, and the spatial pool: -> [N,C,T]."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.units = conv_units(channels, channels // 4, units)
        self.bn = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T]."""
        return self.relu(self.bn(self.units(x))).mean((3, 4))


class RelationalTwoBranch(nn.Module):
    """Local features averaged over time beside the last state of a Relational LSTM, classified together.

    The backbone up to conv5_``insert_after`` is shared. The local branch goes on with the rest of conv5, pools in space
    and averages over time. The non-local one is a Relational LSTM and its own rest of conv5; its feature is that of the
    last state H_T. Both are concatenated, dropped out and classified.

    Args:
        num_classes: K.
        backbone: "resnet101v2" or "resnet50v2".
        branches: "both", or "local" or "nonlocal" alone (Table 4).
        insert_after: unit of conv5, 1 to 3, after which the branches part (Table 5).
        in_channels: 3 for RGB, 20 for snippets of ten flow fields.
        width: planes of conv1.
        dropout: probability before the classifier; the paper has 0.8 for RGB and 0.7 for flow.
        hidden_channels, key_channels, normalize, bias: of :class:`rcu_ops.nn.RelationalLSTM`.

    Shape:
        clip [N,C,T,H,W], one snippet per segment -> scores [N,K], before the softmax.

    Raises:
        ValueError: an argument with an impossible value.
    """

    feature_layer: ClassVar[str] = "dropout"

    def __init__(
        self,
        num_classes: int = 101,
        *,
        backbone: str = "resnet101v2",
        branches: str = "both",
        insert_after: int = 2,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.8,
        hidden_channels: int | None = None,
        key_channels: int | None = None,
        normalize: str = "softmax",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {backbone!r}")
        if branches not in BRANCHES:
            raise ValueError(f"branches: expected one of {', '.join(BRANCHES)}, got {branches!r}")
        if not 1 <= insert_after <= UNITS:
            raise ValueError(f"insert_after: expected 1 to {UNITS}, got {insert_after}")
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        rest = UNITS - insert_after
        self.trunk = Trunk(BACKBONES[backbone], in_channels, width, drop=rest)
        channels = self.trunk.channels
        self.local = Branch(channels, rest) if branches != "nonlocal" else None
        self.lstm = (
            RelationalLSTM(channels, hidden_channels, key_channels, normalize=normalize, bias=bias)
            if branches != "local"
            else None
        )
        self.relational = Branch(channels, rest) if branches != "local" else None
        self.running_mean = RunningMean()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels * (2 if branches == "both" else 1), num_classes)
        initialise(self)
        if self.relational is not None:  # new in this network: no image network has weights for it
            for module in self.relational.modules():
                if isinstance(module, nn.Conv3d):
                    nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.head.weight, 0.0, 0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K]: the local mean over all snippets beside the state after the last one."""
        x = self.trunk(clip)
        features = []
        if self.local is not None:
            features.append(self.local(x).mean(2))
        if self.lstm is not None and self.relational is not None:
            features.append(self.relational(self.lstm(x, last_only=True))[..., 0])
        return self.head(self.dropout(torch.cat(features, 1)))

    def frame_scores(self, clip: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,K,T]: the scores after every snippet; the last ones are those of ``forward``."""
        x = self.trunk(clip)
        features = []
        if self.local is not None:
            features.append(self.running_mean(self.local(x)))
        if self.lstm is not None and self.relational is not None:
            features.append(self.relational(self.lstm(x)))
        return self.head(self.dropout(torch.cat(features, 1).transpose(1, 2))).transpose(1, 2)


@register_model("relational_two_branch")
def relational_two_branch(num_classes: int = 101, **options: Any) -> RelationalTwoBranch:
    """The paper's network on ResNet-101-v2 (``backbone="resnet50v2"`` for smaller machines)."""
    return RelationalTwoBranch(num_classes, **options)
