"""Squeeze and Recursion Temporal Gates ("Learn to Cycle: Time-Consistent Feature Discovery for Action Recognition")."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.nn.frames import batch_to_frames, check_clip, frames_to_batch
from rcu_ops.nn.residual_rnn import ResidualRNN
from rcu_ops.nn.stream_state import StreamSlot, active_slot
from rcu_ops.ops import cycle_consistency, srtg_fuse, srtg_squeeze

FUSIONS = ("mul", "add")


class SRTG(nn.Module):
    """Pool every frame, run an LSTM over the frames, and fuse its output with the activations if the two agree in time.

    ``a_t = mean over positions of x_t``, ``h = LSTM(a)`` (2 layers, as wide as the channels), and ``y_t = x_t h_t`` (or
    ``x_t + h_t``), broadcast over positions. With an active gate a sample is fused only if a and h are cycle-consistent
    (:func:`rcu_ops.cycle_consistency`: every frame of either is nearest to its own place in the other); else y = x. The
    gate carries no gradient. Works in any 3D network, wherever activations are [N,C,T,H,W].

    A gate looks at all frames at once. With ``window`` = W it looks at the last W frames instead, one decision per
    frame: frame t is fused if frames t-W+1 … t are cycle-consistent. Then the output at frame t depends on frames 0..t
    only, and the module streams; so does one with an inactive gate.

    Args:
        channels: C.
        gate: whether the gate is active; inactive, every sample is fused.
        fusion: "mul" or "add".
        window: frames that a causal gate looks back over, itself included; None: the gate looks at the whole clip.

    Shape:
        [N,C,T,H,W] -> [N,C,T,H,W], in the input's dtype and memory format.

    Raises:
        ValueError: an impossible argument, or a clip with other channels.
    """

    carries_state: ClassVar[bool] = True

    def __init__(self, channels: int, *, gate: bool = True, fusion: str = "mul", window: int | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: expected {' or '.join(map(repr, FUSIONS))}, got {fusion!r}")
        if window is not None and (window < 1 or not gate):
            raise ValueError(f"window: expected at least 1 and an active gate, got {window} with gate={gate}")
        self.channels = channels
        self.gate = gate
        self.fusion = fusion
        self.window = window
        self.lstm = ResidualRNN(channels, num_layers=2, residual=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T,H,W]."""
        check_clip(self, x, self.channels)
        slot = active_slot(self)
        pooled = srtg_squeeze(x)
        hidden = self.lstm(pooled.to(next(self.lstm.parameters()).dtype))[0]
        if not self.gate:
            return srtg_fuse(x, hidden, fusion=self.fusion)
        # The gate is a comparison of distances: both sides in the pooled activations' precision.
        a, b = pooled.detach(), hidden.detach().to(pooled.dtype)
        if self.window is None:
            return srtg_fuse(x, hidden, cycle_consistency(a, b).gate, fusion=self.fusion)
        gates = self._trailing_gates(a, b, self.window, slot, x)
        frames = srtg_fuse(
            frames_to_batch(x).unsqueeze(2), hidden.flatten(0, 1).unsqueeze(1), gates, fusion=self.fusion
        )
        return batch_to_frames(frames.squeeze(2), x.shape[0], x.shape[2])

    def _trailing_gates(self, a: Tensor, b: Tensor, window: int, slot: StreamSlot | None, x: Tensor) -> Tensor:
        """Per frame, in the order of ``frames_to_batch``, whether the ``window`` frames that end there agree: [N*T]."""
        # Frames before the stream's first are zeros, marked as not there.
        sequences = {"pooled": a, "recursion": b, "there": torch.ones_like(a[..., :1])}
        windows = {}
        for part, sequence in sequences.items():
            shape = (a.shape[0], window - 1, sequence.shape[2])
            past = None if slot is None or window == 1 else slot.read(x, shape, part)
            joined = torch.cat([a.new_zeros(shape) if past is None else past.to(a.dtype), sequence], dim=1)
            if slot is not None and window > 1:
                slot.write(joined[:, joined.shape[1] - window + 1 :], part)
            windows[part] = joined.unfold(1, window, 1).transpose(2, 3).flatten(0, 1)
        there = windows["there"][..., 0] != 0
        return cycle_consistency(windows["pooled"], windows["recursion"], mask_a=there, mask_b=there).gate

    def extra_repr(self) -> str:
        """The arguments."""
        trailing = "" if self.window is None else f", window={self.window}"
        return f"{self.channels}, gate={self.gate}, fusion={self.fusion!r}{trailing}"
