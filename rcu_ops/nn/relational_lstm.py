"""The Relational LSTM: an LSTM over feature maps whose gates are non-local operations (Eq. 3 of its paper)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcu_ops.nn.frames import check_clip
from rcu_ops.nn.stream_state import active_slot
from rcu_ops.ops import nonlocal_attention, relational_lstm_step
from rcu_ops.reference.recurrent_conv import state_dtype_of

GATES = 4
NORMALIZERS = ("softmax", "count")

State = tuple[Tensor, Tensor]


class RelationalLSTM(nn.Module):
    """Gates i, f, o, g of ``r(X_t, X_t) + r(X_t, H_{t-1})``, then ``C_t = f C + i g`` and ``H_t = o tanh(C_t)``.

    ``r(X, Y)`` is :func:`rcu_ops.nonlocal_attention` over the positions of a frame, of linear maps theta(X), phi(Y) and
    g(Y); there are eight sets of them. X is batch-normalised first, and a 1x1 convolution brings H back to C channels.
    The input-to-state relations of all frames are one call; per step remain one matrix product with H and
    :func:`rcu_ops.relational_lstm_step`. ``H_0 = C_0 = 0``.

    Args:
        channels: C.
        hidden_channels: of H, C / 2 by default.
        key_channels: of theta and phi, as many as H by default.
        normalize: "softmax" (embedded Gaussian), or "count" (dot product divided by the number of positions).
        bias: biases of theta, phi and g; without them (the paper's form) r(X, 0) is 0.
        norm: batch normalisation of X.
        project: the 1x1 convolution after; without it the output is H itself.

    Shape:
        [N,C,T,H,W] -> [N,C,T,H,W], or [N,hidden_channels,T,H,W] without ``project``. The state is ``(h, c)``, each
        [N,H W,hidden_channels]; c in fp32 for 16-bit inputs.

    Attributes:
        weight_x: [4 (3 D + Dv), C]: theta, phi and g of ``r(X, X)`` and theta of ``r(X, H)``, the gates i, f, o, g
            within each. weight_h: [4 (D + Dv), Dv]: phi and g of ``r(X, H)``, likewise. bias_x, bias_h: or None.

    A program of torch.export or torch.compile has the number of frames of its example, since the steps are written out.

    Raises:
        ValueError: a number below 1, an unknown ``normalize``, an odd C without ``hidden_channels``, a state of another
            shape.
    """

    carries_state: ClassVar[bool] = True

    bias_x: nn.Parameter | None
    bias_h: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        key_channels: int | None = None,
        *,
        normalize: str = "softmax",
        bias: bool = False,
        norm: bool = True,
        project: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if hidden_channels is None:
            if channels % 2:
                raise ValueError(f"channels: expected an even number without hidden_channels, got {channels}")
            hidden_channels = channels // 2
        key_channels = hidden_channels if key_channels is None else key_channels
        sizes = {"channels": channels, "hidden_channels": hidden_channels, "key_channels": key_channels}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if normalize not in NORMALIZERS:
            raise ValueError(f"normalize: expected one of {', '.join(map(repr, NORMALIZERS))}, got {normalize!r}")
        self.channels, self.hidden_channels, self.key_channels = channels, hidden_channels, key_channels
        self.normalize = normalize
        self.sizes_x = [GATES * size for size in (key_channels, key_channels, hidden_channels, key_channels)]
        self.sizes_h = [GATES * size for size in (key_channels, hidden_channels)]
        placement = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm3d(channels, **placement) if norm else None
        self.weight_x = nn.Parameter(torch.empty(sum(self.sizes_x), channels, **placement))
        self.weight_h = nn.Parameter(torch.empty(sum(self.sizes_h), hidden_channels, **placement))
        for name, weight in (("bias_x", self.weight_x), ("bias_h", self.weight_h)):
            parameter = nn.Parameter(torch.empty(len(weight), **placement)) if bias else None
            self.register_parameter(name, parameter)
        self.conv = nn.Linear(hidden_channels, channels, bias=False, **placement) if project else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier initialisation of every map by itself, zero biases."""
        for weight, sizes in ((self.weight_x, self.sizes_x), (self.weight_h, self.sizes_h)):
            for part in weight.data.split(sizes):
                for gate in part.chunk(GATES):
                    nn.init.xavier_uniform_(gate)
        for bias in (self.bias_x, self.bias_h):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.conv is not None:
            nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor, *, last_only: bool = False) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T,H,W]; with ``last_only`` the last frame alone, [N,C,1,H,W]."""
        check_clip(self, x, self.channels)
        slot = active_slot(self)
        state = None
        if slot is not None:
            shape = (x.shape[0], x.shape[3] * x.shape[4], self.hidden_channels)
            h, c = (slot.read(x, shape, part) for part in ("hidden", "cell"))
            state = None if h is None or c is None else (h, c)
        y, state = self.unroll(x, state, last_only=last_only)
        if slot is not None:
            for part, value in zip(("hidden", "cell"), state, strict=True):
                slot.write(value, part)
        return y

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One frame [N,C,H,W] -> (output [N,C,H,W], state)."""
        if x.dim() != 4:
            raise ValueError(f"x: expected [N,C,H,W] with C = {self.channels}, got {list(x.shape)}")
        y, state = self.unroll(x.unsqueeze(2), state)
        return y.squeeze(2), state

    def unroll(self, x: Tensor, state: State | None = None, *, last_only: bool = False) -> tuple[Tensor, State]:
        """[N,C,T,H,W] -> (output, last state), from ``state`` or from zeros."""
        check_clip(self, x, self.channels)
        t, height, width = x.shape[2:]
        query_x, key, value, query_h = self._maps_of_input(x)
        from_x = nonlocal_attention(query_x, key, value, normalize=self.normalize)
        h, c = self._start(from_x, state)
        outputs = []
        # Not by index: a program of torch.jit.trace would take the first frames of a longer clip for all of it.
        for step, (gates, query) in enumerate(zip(from_x.unbind(1), query_h.unbind(1), strict=True)):
            h, c = self._advance(gates, query, h, c)
            if not last_only or step == t - 1:
                outputs.append(h)
        hidden = torch.stack(outputs, 1)  # [N,T,P,Dv]
        y = hidden if self.conv is None else self.conv(hidden)
        return y.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3), (h, c)

    def attention(self, x: Tensor, position: int, state: State | None = None) -> Tensor:
        """Where every gate looks from one position: the weights ``w_j`` that the relations sum ``g(y_j)`` with.

        Args:
            x: [N,C,T,H,W], the module's input. position: row * W + column, 0 to H W - 1.
            state: before the first frame; zeros if None, of which every position is worth the same.

        Returns:
            [N,T,2,4,H,W] in x's dtype: of ``r(X_t, X_t)``, then of ``r(X_t, H_{t-1})``; gates in the order i, f, o, g.

        Raises:
            ValueError: a position outside of the frame.
        """
        check_clip(self, x, self.channels)
        t, height, width = x.shape[2:]
        if not 0 <= position < height * width:
            raise ValueError(f"position: expected 0 to {height * width - 1}, got {position}")
        query, key, value, query_h = self._maps_of_input(x)
        from_x = nonlocal_attention(query, key, value, normalize=self.normalize)
        h, c = self._start(from_x, state)
        # Attention over one-hot values is the weights themselves.
        one_hot = torch.eye(height * width, dtype=x.dtype, device=x.device).expand(*key.shape[:-1], -1)
        one = slice(position, position + 1)
        current = nonlocal_attention(query[..., one, :], key, one_hot, normalize=self.normalize)
        memory = []
        for step in range(t):
            keys = self._maps_of_state(h)[0]
            memory.append(
                nonlocal_attention(query_h[:, step, :, one], keys, one_hot[:, step], normalize=self.normalize)
            )
            h, c = self._advance(from_x[:, step], query_h[:, step], h, c)
        return torch.stack([current, torch.stack(memory, 1)], 2).squeeze(-2).unflatten(-1, (height, width))

    def _maps_of_input(self, x: Tensor) -> list[Tensor]:
        """theta, phi and g of ``r(X, X)`` and theta of ``r(X, H)``, [N,T,4,P,D] each."""
        rows = (x if self.bn is None else self.bn(x)).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [N,T,P,C]
        rows = rows.contiguous()  # the library's bf16 product of strided rows takes ten times as long as the copy
        parts = F.linear(rows, self.weight_x, self.bias_x).split(self.sizes_x, -1)
        return [part.unflatten(-1, (GATES, -1)).transpose(2, 3) for part in parts]

    def _maps_of_state(self, h: Tensor) -> list[Tensor]:
        """phi and g of ``r(X, H)``, [N,4,P,D] each."""
        parts = F.linear(h, self.weight_h, self.bias_h).split(self.sizes_h, -1)
        return [part.unflatten(-1, (GATES, -1)).transpose(1, 2) for part in parts]

    def _advance(self, from_x: Tensor, query: Tensor, h: Tensor, c: Tensor) -> State:
        key, value = self._maps_of_state(h)
        if self.normalize == "softmax":
            return relational_lstm_step(from_x, query, key, value, c)
        gates = from_x + nonlocal_attention(query, key, value, normalize=self.normalize)
        i, f, o, g = gates.to(c.dtype).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return (o.sigmoid() * c.tanh()).to(from_x.dtype), c

    def _start(self, from_x: Tensor, state: State | None) -> State:
        shape = (from_x.shape[0], from_x.shape[3], self.hidden_channels)
        if state is None:
            return from_x.new_zeros(shape), from_x.new_zeros(shape, dtype=state_dtype_of(from_x.dtype))
        for name, part in zip("hc", state, strict=True):
            if tuple(part.shape) != shape:
                raise ValueError(
                    f"state: expected {name} [N,P,hidden_channels] = {list(shape)}, got {list(part.shape)}"
                )
        return state[0].to(from_x.dtype), state[1]

    def extra_repr(self) -> str:
        """Channels and the normaliser."""
        return (
            f"{self.channels}, hidden_channels={self.hidden_channels}, key_channels={self.key_channels}, "
            f"normalize={self.normalize!r}, bias={self.bias_x is not None}"
        )
