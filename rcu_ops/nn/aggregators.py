"""Aggregation of clips' features into a prediction that can be read after every clip.

Sections 3.1-3.3 of "FASTER Recurrent Networks for Efficient Video Classification". All aggregators have one interface:

* ``scores, state = aggregator(x, state=None)``: the next K clips, scores [N,K,classes] after each of them;
* ``scores, state = aggregator.step(x_k, state=None)``: one clip, scores [N,classes]; the same numbers.

``x`` is [N,K,C,L,H,W], the clips' features, or for :class:`AverageScores` [N,K,classes], their scores (``takes`` says
which). The state is a ``dict[str, Tensor]`` with the batch first; None starts with the first clip: ``o_0 = x_0``.
In a model that a :class:`rcu_ops.streaming.Streamer` runs, its clips being frames (L = 1), the streamer carries it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rcu_ops.nn.residual_rnn import ResidualRNN
from rcu_ops.nn.stream_state import active_slot
from rcu_ops.ops import fast_gru

State = dict[str, Tensor]


class Aggregator(nn.Module):
    """``o_t = f(o_{t-1}, x_t)`` and scores ``fc(pool(o_t))`` after every clip; subclasses are f.

    Args:
        channels: C of the features. num_classes: of the scores.

    Attributes:
        parts: the entries of the state.

    Raises:
        ValueError: a size below 1; features of another shape; a state of another aggregator or of another batch size.
    """

    carries_state: ClassVar[bool] = True
    takes: ClassVar[str] = "features"
    parts: ClassVar[tuple[str, ...]] = ("o",)

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        if channels < 1 or num_classes < 1:
            raise ValueError(f"channels, num_classes: expected at least 1, got {channels}, {num_classes}")
        self.channels = channels
        self.num_classes = num_classes
        self.fc = nn.Linear(channels, num_classes)

    def aggregate(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """x [N,K,C,L,H,W] -> (o [N,K,C] or [N,K,C,L,H,W], state)."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """x [N,K,C,L,H,W] -> (scores [N,K,classes], state)."""
        if x.dim() != 6 or x.shape[1] < 1 or x.shape[2] != self.channels:
            raise ValueError(f"x: expected [N,K,C,L,H,W] with K >= 1 and C = {self.channels}, got {list(x.shape)}")
        return self._run(x, state)

    def scores(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """The same for arguments that are checked, outside of a stream."""
        o, last = self.aggregate(x, state)
        return self.fc(_pool(o)), last

    def state_shapes(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """The shape of every part of the state after clips such as ``x``."""
        return {"o": (x.shape[0], *x.shape[2:])}

    def _run(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        self._check_state(state, x.shape[0])
        slot = active_slot(self) if state is None else None
        if slot is None:
            return self.scores(x, state)
        before = {part: slot.read(x, shape, part) for part, shape in self.state_shapes(x).items()}
        carried = {part: value for part, value in before.items() if value is not None}
        scores, last = self.scores(x, carried or None)
        if carried and slot.fresh is not None:
            # No state makes a recurrence of these start with o = x: samples that start anew take both.
            anew, start = self.scores(x, None)
            scores = _choose(slot.fresh, anew, scores)
            last = {part: _choose(slot.fresh, start[part], value) for part, value in last.items()}
        for part, value in last.items():
            slot.write(value, part)
        return scores, last

    def _check_state(self, state: Mapping[str, Tensor] | None, samples: int) -> None:
        for part in () if state is None else self.parts:
            assert state is not None
            if part not in state:
                raise ValueError(
                    f"state: expected the entries {', '.join(self.parts)}, got {', '.join(state) or 'none'}"
                )
            if state[part].shape[0] != samples:
                raise ValueError(f"state: holds {state[part].shape[0]} samples, but x has N = {samples}")

    def step(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """One clip: x [N,C,L,H,W] -> (scores [N,classes], state)."""
        scores, last = self(x.unsqueeze(1), state)
        return scores[:, 0], last


def _choose(samples: Tensor, these: Tensor, others: Tensor) -> Tensor:
    """``these`` for the samples [N] that are set, and ``others``."""
    return torch.where(samples.view(-1, *[1] * (others.dim() - 1)), these, others)


def _pool(o: Tensor) -> Tensor:
    """Mean over L, H, W: [N,K,C,L,H,W] -> [N,K,C]."""
    return o.mean((3, 4, 5)) if o.dim() == 6 else o


class AverageScores(Aggregator):
    """The mean of the scores of the clips so far, whichever network they come from (average pooling).

    Shape:
        x [N,K,classes] -> (scores [N,K,classes], state).
    """

    takes = "scores"
    parts = ("sum", "count")

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        del self.fc  # the clips' networks have classified already

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """x [N,K,classes] -> (scores [N,K,classes], state)."""
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.num_classes:
            raise ValueError(f"x: expected scores [N,K,{self.num_classes}] with K >= 1, got {list(x.shape)}")
        return self._run(x, state)

    def scores(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """The means, for arguments that are checked."""
        wide = torch.promote_types(x.dtype, torch.float32)  # a sum of 16-bit numbers would stop growing
        total = x.to(wide).cumsum(1)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=wide).expand(x.shape[0], -1)
        if state is not None:
            total, count = total + state["sum"].to(wide).unsqueeze(1), count + state["count"].to(wide)[:, None]
        scores = (total / count.unsqueeze(2)).to(x.dtype)
        return scores, {"sum": total[:, -1], "count": count[:, -1]}

    def state_shapes(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Sums of scores, and how many."""
        return {"sum": (x.shape[0], self.num_classes), "count": (x.shape[0],)}


class ConcatAggregator(Aggregator):
    """``o_t = relu(BN(W o_{t-1} + U x_t))`` (Eq. 5), W and U 1x1x1 convolutions; the resolution is kept."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.project = nn.Conv3d(2 * channels, channels, 1, bias=False)  # [W, U] over (o, x) one above the other
        self.bn = nn.BatchNorm3d(channels)

    def aggregate(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """x [N,K,C,L,H,W] -> (o [N,K,C,L,H,W], state)."""
        o = None if state is None else state["o"]
        outputs = []
        for x_k in x.unbind(1):
            o = x_k if o is None else self.bn(self.project(torch.cat([o, x_k], dim=1))).relu()
            outputs.append(o)
        return torch.stack(outputs, dim=1), {"o": outputs[-1]}


class LSTMAggregator(Aggregator):
    """An LSTM over pooled features; the first clip's are its first hidden state, with a zero cell."""

    parts = ("hidden", "cell")

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.lstm = ResidualRNN(channels, num_layers=1, residual=False)

    def state_shapes(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Of features without positions."""
        return dict.fromkeys(self.parts, (x.shape[0], self.channels))

    def aggregate(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """x [N,K,C,L,H,W] -> (o [N,K,C], state)."""
        pooled = _pool(x)
        first = pooled[:, :0]
        if state is None:
            first, pooled = pooled[:, :1], pooled[:, 1:]
            state = {"hidden": first[:, 0], "cell": torch.zeros_like(first[:, 0])}
        hidden, cell = (state[part].to(x.dtype).unsqueeze(0).contiguous() for part in ("hidden", "cell"))
        if pooled.shape[1] == 0:
            return first, {"hidden": hidden[0], "cell": cell[0]}
        o, last = self.lstm(pooled, (hidden, cell))
        return torch.cat([first, o], dim=1), {"hidden": last[0][0], "cell": last[1][0]}


class GRUAggregator(Aggregator):
    """The gated recurrent unit of Eqs. 2 and 3 over pooled features; the first clip's are its first state.

    ``r = sigmoid(G_rx x + G_ro o)``, ``z`` alike, ``c = tanh(V_x x + V_o (r o))``, ``o <- (1 - z) o + z c``. The reset
    acts before the matrix product (in ``nn.GRU`` it acts after).
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.from_x = nn.Linear(channels, 3 * channels)  # G_rx, G_zx, V_x
        self.gates_from_o = nn.Linear(channels, 2 * channels, bias=False)
        self.candidate_from_o = nn.Linear(channels, channels, bias=False)

    def state_shapes(self, x: Tensor) -> dict[str, tuple[int, ...]]:
        """Of features without positions."""
        return {"o": (x.shape[0], self.channels)}

    def aggregate(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """x [N,K,C,L,H,W] -> (o [N,K,C], state)."""
        pooled = _pool(x)
        o = None if state is None else state["o"].to(x.dtype)
        outputs = []
        for x_k, projected in zip(pooled.unbind(1), self.from_x(pooled).unbind(1), strict=True):
            if o is None:
                o = x_k
            else:
                gates, candidate = projected.split([2 * self.channels, self.channels], dim=1)
                r, z = torch.sigmoid(gates + self.gates_from_o(o)).chunk(2, dim=1)
                o = (1 - z) * o + z * torch.tanh(candidate + self.candidate_from_o(r * o))
            outputs.append(o)
        return torch.stack(outputs, dim=1), {"o": outputs[-1]}


class FastGRU(Aggregator):
    """FAST-GRU (section 3.2): gates with a bottleneck, 1x1x1 convolutions, resolution kept; :func:`rcu_ops.fast_gru`.

    Args:
        channels: C. num_classes: of the scores.
        reduction: r; the gates' bottleneck has C / r channels.
        tie_candidate: one matrix for V_x and V_o.
        recompute: keep no gates for the backward pass but compute them again.

    Attributes:
        weight_ux, weight_uo: [2C/r, C], read gate before update gate. weight_w: [2, C, C/r]. weight_vx, weight_vo:
            [C,C], the same parameter when tied.

    Raises:
        ValueError: ``reduction`` does not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        reduction: int = 4,
        tie_candidate: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(channels, num_classes)
        if reduction < 1 or channels % reduction:
            raise ValueError(f"reduction: expected a divisor of {channels} channels, got {reduction}")
        self.recompute = recompute
        self.tie_candidate = tie_candidate
        rank = channels // reduction
        self.weight_ux = nn.Parameter(torch.empty(2 * rank, channels))
        self.weight_uo = nn.Parameter(torch.empty(2 * rank, channels))
        self.weight_w = nn.Parameter(torch.empty(2, channels, rank))
        self.weight_vx = nn.Parameter(torch.empty(channels, channels))
        self.weight_vo = None if tie_candidate else nn.Parameter(torch.empty(channels, channels))
        for name, parameter in self.named_parameters():
            if name.startswith("weight_u"):  # two products add up before the ReLU
                nn.init.normal_(parameter, 0.0, 1 / math.sqrt(channels))
            elif name.startswith("weight_"):
                nn.init.normal_(parameter, 0.0, 1 / math.sqrt(2 * parameter.shape[-1]))

    def states(self, x: Tensor, o0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [N,K,C,L,H,W], o0 [N,C,L,H,W] -> (o [N,K,C,L,H,W], the last o in the state's dtype)."""
        vo = self.weight_vx if self.weight_vo is None else self.weight_vo
        return fast_gru(
            x, self.weight_ux, self.weight_uo, self.weight_w, self.weight_vx, vo, o0, recompute=self.recompute
        )

    def aggregate(self, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, State]:
        """x [N,K,C,L,H,W] -> (o [N,K,C,L,H,W], state)."""
        o, o_n = self.states(x, None if state is None else state["o"])
        return o, {"o": o_n}

    def extra_repr(self) -> str:
        """Sizes and options."""
        rank = self.weight_w.shape[2]
        return f"{self.channels}, bottleneck {rank}, tie_candidate={self.tie_candidate}, recompute={self.recompute}"


AGGREGATORS: dict[str, type[Aggregator]] = {
    "average": AverageScores,
    "concat": ConcatAggregator,
    "lstm": LSTMAggregator,
    "gru": GRUAggregator,
    "fast_gru": FastGRU,
}
"""The aggregators of Table 3 by name."""


def make_aggregator(name: str, channels: int, num_classes: int, **options: Any) -> Aggregator:
    """An aggregator of :data:`AGGREGATORS`; ``options`` are those of its class. ValueError: no such name."""
    if name not in AGGREGATORS:
        raise ValueError(f"aggregator: expected one of {', '.join(map(repr, AGGREGATORS))}, got {name!r}")
    return AGGREGATORS[name](channels, num_classes, **options)
