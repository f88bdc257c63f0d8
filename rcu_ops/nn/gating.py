"""Feature gating of S3D-G ("Rethinking Spatiotemporal Feature Learning", section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rcu_ops.nn.frames import check_clip


class FeatureGate(nn.Module):
    """Self-gating: ``y = sigmoid(W pool(x) + b) * x``, one factor per channel.

    Args:
        channels: C.
        causal: pool over the positions of each frame, so that frame t is gated by frame t alone (and streams); else
            over space and time, as S3D-G does.

    Shape:
        [N,C,T,H,W] -> [N,C,T,H,W]
    """

    def __init__(self, channels: int, *, causal: bool) -> None:
        super().__init__()
        self.channels = channels
        self.causal = causal
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T,H,W]."""
        check_clip(self, x, self.channels)
        pooled = x.mean((3, 4)) if self.causal else x.mean((2, 3, 4)).unsqueeze(2)
        gate = torch.sigmoid(self.fc(pooled.transpose(1, 2))).transpose(1, 2)
        return x * gate[..., None, None]

    def extra_repr(self) -> str:
        """Channels and where the pool runs."""
        return f"{self.channels}, causal={self.causal}"
