"""The block of "Non-local Neural Networks", over a whole clip or, causally, over a bounded memory of frames."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.nn.frames import check_clip
from rcu_ops.nn.stream_state import StreamSlot, active_slot
from rcu_ops.ops import nonlocal_attention
from rcu_ops.reference.recurrent_conv import state_dtype_of

KINDS = {"gaussian": "softmax", "dot": "count"}


class NonLocalBlock(nn.Module):
    """``z = x + BN(W r(x, y))`` with ``r`` the non-local operation and y the positions that x attends to.

    Args:
        channels: C.
        inner_channels: of theta, phi and g, C / 2 by default.
        kind: "gaussian" (embedded Gaussian: softmax of ``theta(x) . phi(y)``) or "dot" (divided by the number of
            positions).
        memory: None: every position attends to all positions of the whole clip. A number m: to those of its own frame
            and of the m frames before it, so that frame t depends on frames t - m … t only, and the block streams.

    The batch normalisation starts at zero: a new block changes nothing, and goes into a trained network as it is.

    With a memory a program of torch.export or torch.compile has the number of frames of its example.

    Shape:
        [N,C,T,H,W] -> [N,C,T,H,W]

    Raises:
        ValueError: a number out of range, an unknown ``kind``.
    """

    carries_state: ClassVar[bool] = True

    def __init__(
        self, channels: int, inner_channels: int | None = None, *, kind: str = "gaussian", memory: int | None = None
    ) -> None:
        super().__init__()
        inner_channels = max(1, channels // 2) if inner_channels is None else inner_channels
        if channels < 1 or inner_channels < 1:
            raise ValueError(f"channels, inner_channels: expected at least 1, got {channels}, {inner_channels}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        if memory is not None and memory < 0:
            raise ValueError(f"memory: expected None or a number from 0, got {memory}")
        self.channels, self.inner_channels = channels, inner_channels
        self.kind, self.memory = kind, memory
        self.qkv = nn.Linear(channels, 3 * inner_channels)
        self.out = nn.Linear(inner_channels, channels)
        self.bn = nn.BatchNorm3d(channels)
        nn.init.zeros_(self.bn.weight)

    @property
    def causal(self) -> bool:
        """Whether the block looks at no frame of the future."""
        return self.memory is not None

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T,H,W]."""
        check_clip(self, x, self.channels)
        t, height, width = x.shape[2:]
        rows = x.permute(0, 2, 3, 4, 1).flatten(1, 3)  # [N,T P,C]
        query, key, value = self.qkv(rows).chunk(3, -1)
        if self.memory is None:
            related = nonlocal_attention(query, key, value, normalize=KINDS[self.kind])
        else:
            related = self._look_back(query, key, value, height * width, self.memory, active_slot(self))
        y = self.out(related).unflatten(1, (t, height, width)).permute(0, 4, 1, 2, 3)
        return x + self.bn(y)

    def _look_back(
        self, query: Tensor, key: Tensor, value: Tensor, positions: int, memory: int, slot: StreamSlot | None
    ) -> Tensor:
        """[N,T P,D] each -> [N,T P,D], every frame over itself and the ``memory`` frames before it."""
        n, frames = query.shape[0], query.shape[1] // positions
        kept, seen = 0, None
        if slot is not None and memory:
            shape = (n, memory * positions, self.inner_channels)
            old = [slot.read(query, shape, part) for part in ("key", "value")]
            # How many frames of the memory are real, for each sample: a sample that starts anew has none.
            seen = slot.read(query, (n,), "seen")
            if old[0] is None or old[1] is None or seen is None:
                old = [query.new_zeros(shape), query.new_zeros(shape)]
                seen = query.new_zeros(n, dtype=state_dtype_of(query.dtype))
            key, value = (torch.cat([a.to(b.dtype), b], 1) for a, b in zip(old, (key, value), strict=True))  # type: ignore[union-attr]
            kept = memory
            for part, whole in (("key", key), ("value", value)):
                slot.write(whole[:, whole.shape[1] - memory * positions :].clone(), part)
            slot.write((seen + frames).clamp(max=memory), "seen")
        elif slot is not None:
            slot.write(query.new_zeros(n, dtype=state_dtype_of(query.dtype)), "seen")
        outputs = []
        for frame in range(frames):
            first, last = max(0, frame + kept - memory), frame + kept + 1
            mask = None
            if seen is not None:
                age = kept - torch.arange(first, last, device=query.device)  # how long before this chunk; 0: within it
                mask = (age[None] <= seen[:, None]).repeat_interleave(positions, 1)[:, None]
            span = slice(first * positions, last * positions)
            q = query[:, frame * positions : (frame + 1) * positions]
            outputs.append(nonlocal_attention(q, key[:, span], value[:, span], mask=mask, normalize=KINDS[self.kind]))
        return torch.cat(outputs, 1)

    def step(self, x: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """One frame [N,C,H,W] -> (output [N,C,H,W], state); only with a bounded memory.

        The state is that of a :class:`rcu_ops.Streamer` over this block alone.
        """
        from rcu_ops.nn.stream_state import StreamPass

        if self.memory is None:
            raise ValueError("memory: a block that looks at the whole clip has no steps")
        if x.dim() != 4:
            raise ValueError(f"x: expected [N,C,H,W] with C = {self.channels}, got {list(x.shape)}")
        with StreamPass({self: "block"}, state, None) as stream:
            y = self.forward(x.unsqueeze(2))
        return y.squeeze(2), stream.written

    def extra_repr(self) -> str:
        """Channels, kind and memory."""
        return f"{self.channels}, inner_channels={self.inner_channels}, kind={self.kind!r}, memory={self.memory}"
