"""The Residual LSTM over clip features (Eqs. 1-2 of "Residual Stacked RNNs for Action Recognition")."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from rcu_ops.models.registry import register_model
from rcu_ops.nn.residual_rnn import ResidualRNN, State


class ResLSTM(nn.Module):
    """A residual recurrent stack and a linear classifier on its output at the last time step.

    Args:
        num_classes: K.
        input_size: F, the size of a clip's feature; 1024 is the paper's h.
        hidden_size, num_layers, cell, residual: see :class:`rcu_ops.nn.ResidualRNN`.
        classify: what the scores are taken from: "m", the last layer's output ``m_T^L`` (Eq. 2), or "x", the sum
            ``x_T^L``.

    Shape:
        features [N,T,F] -> scores [N,K], before the softmax.

    Attributes:
        time_steps: T of the paper's experiments.
    """

    time_steps: ClassVar[int] = 25

    def __init__(
        self,
        num_classes: int = 51,
        *,
        input_size: int = 1024,
        hidden_size: int | None = None,
        num_layers: int = 2,
        cell: str = "lstm",
        residual: bool = True,
        classify: str = "m",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if classify not in ("m", "x"):
            raise ValueError(f"classify: expected 'm' or 'x', got {classify!r}")
        self.rnn = ResidualRNN(
            input_size,
            hidden_size,
            num_layers,
            cell=cell,
            residual=residual,
            output=classify,
            device=device,
            dtype=dtype,
        )
        self.head = nn.Linear(self.rnn.hidden_size, num_classes, bias=False, device=device, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """[N,T,F] -> [N,K], the scores at the last time step."""
        return self.head(self.rnn(features)[0][:, -1])

    def frame_scores(self, features: Tensor) -> Tensor:
        """[N,T,F] -> [N,K,T]: what the network says after every time step."""
        return self.head(self.rnn(features)[0]).transpose(1, 2)

    def step(self, feature: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The feature [N,F] of the next clip -> (scores [N,K] so far, state)."""
        output, state = self.rnn.step(feature, state)
        return self.head(output), state


@register_model("res_lstm")
def res_lstm(num_classes: int = 51, **options: Any) -> ResLSTM:
    """The paper's network: two residual LSTM layers at 1024."""
    return ResLSTM(num_classes, **options)
