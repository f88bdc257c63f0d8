"""A chunk of a stream as an exported program: what a Streamer computes, without the model's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rcu_ops.stream_graph import State

Advance = Callable[[Tensor, Mapping[str, Tensor] | None, Tensor | None], tuple[Tensor, State]]
"""(frames, state, reset) -> (scores, new state)."""

# torch.export takes a size of 0 or 1 for a constant and equal sizes for one: free sizes are traced at 2 and 3.
_BATCH, _LENGTH = 2, 3


class _Chunk(nn.Module):
    """One chunk as a module, as torch.export wants it; the model's parameters become the program's."""

    def __init__(self, model: nn.Module, advance: Advance) -> None:
        super().__init__()
        self.model = model
        self._advance = advance

    def forward(
        self, frames: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """[N,C,t,H,W] (and state, and reset) -> ([N,K,t], state)."""
        return self._advance(frames, state, reset)


def export_chunk(
    model: nn.Module,
    advance: Advance,
    frames: Tensor,
    state: Mapping[str, Tensor] | None,
    reset: Tensor | None,
    any_length: bool,
) -> ExportedProgram:
    """Export ``advance`` for any batch size and, if ``any_length``, any number of frames.

    The tensors are examples for their other sizes, dtypes and device; which of them are given is the program's
    signature.
    """
    batch = Dim("N", min=1)
    length = _LENGTH if any_length else frames.shape[2]
    arguments: list[Any] = [frames.new_zeros((_BATCH, frames.shape[1], length, *frames.shape[3:]))]
    free: list[Any] = [{0: batch, 2: Dim("t", min=1)} if any_length else {0: batch}]
    if state is not None:
        arguments.append({key: value.new_zeros((_BATCH, *value.shape[1:])) for key, value in state.items()})
        free.append({key: {0: batch} for key in state})
        if reset is not None:
            arguments.append(reset.new_zeros(_BATCH))
            free.append({0: batch})
    with torch.no_grad():
        return torch.export.export(_Chunk(model, advance), tuple(arguments), dynamic_shapes=tuple(free))
