"""Stacked recurrent layers with residual connections (Eq. 1 of "Residual Stacked RNNs for Action Recognition")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rcu_ops.nn.stream_state import active_slot

CELLS = ("lstm", "gru", "rnn")
OUTPUTS = ("m", "x")
MAX_DEPTH = 5

State = Tensor | tuple[Tensor, Tensor]

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def _library_layer(cell: str, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of the library's recurrence, x [N,T,F], h and c [N,H]; the library's fastest form of each cell."""
    # num_layers, dropout, train (whether cuDNN keeps what its backward needs), bidirectional, batch_first.
    rest = (True, 1, 0.0, torch.is_grad_enabled(), False, True)
    if cell == "lstm":
        y, h_n, c_n = torch.lstm(x, (h[None], c[None]), weights, *rest)
        return y, h_n[0], c_n[0]
    y, h_n = (torch.gru if cell == "gru" else torch.rnn_tanh)(x, h[None], weights, *rest)
    return y, h_n[0], c


# torch.compile refuses nn.LSTM and its siblings in full graphs, and torch.export unrolls torch.lstm, which fixes the
# number of time steps. While tracing, a layer is therefore this one opaque operator around the library's own.
@torch.library.custom_op("rcu_ops::rnn_layer", mutates_args=())
def rnn_layer(cell: str, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N,T,H], h_T [N,H], c_T [N,H]) of the library's recurrent layer; c passes through cells without one."""
    y, h_n, c_n = _library_layer(cell, x, h, c, weights)
    return y.contiguous(), h_n.clone(), c_n.clone()


@rnn_layer.register_fake
def _(cell: str, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], x.shape[1], weights[1].shape[1])
    return (
        y,
        torch.empty_like(h, memory_format=torch.contiguous_format),
        torch.empty_like(c, memory_format=torch.contiguous_format),
    )


@torch.library.custom_op("rcu_ops::rnn_layer_backward", mutates_args=())
def _rnn_layer_backward(
    cell: str, dy: Tensor, dh: Tensor, dc: Tensor, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """Gradients of x, h, c and the weights: the layer run again, then backpropagation through time.

    What needs no recurrence (the gates' sums, the weights' gradients) is one matrix product over all steps.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, _, _ = _library_layer(cell, x, h, c, weights)
    y, dy, dh, dc, x, h, c, w_x, w_h, b_x, b_h = (t.to(dtype) for t in (y, dy, dh, dc, x, h, c, *weights))
    previous = torch.cat([h[:, None], y[:, :-1]], 1)
    from_x, from_h = x @ w_x.T + b_x, previous @ w_h.T + b_h
    d_from_x = torch.empty_like(from_x)
    d_from_h = torch.empty_like(from_h) if cell == "gru" else d_from_x
    cells = [c]
    if cell == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, 2)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        for t in range(x.shape[1]):
            cells.append(f[:, t] * cells[-1] + i[:, t] * g[:, t])
    elif cell == "gru":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, 2), from_h.chunk(3, 2)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        n = (n_x + r * n_h).tanh()
    for t in reversed(range(x.shape[1])):
        dh = dh + dy[:, t]
        if cell == "lstm":
            squashed = cells[t + 1].tanh()
            dc = dc + dh * o[:, t] * (1 - squashed**2)
            parts = [
                dc * g[:, t] * i[:, t] * (1 - i[:, t]),
                dc * cells[t] * f[:, t] * (1 - f[:, t]),
                dc * i[:, t] * (1 - g[:, t] ** 2),
                dh * squashed * o[:, t] * (1 - o[:, t]),
            ]
            d_from_x[:, t] = torch.cat(parts, 1)
            dh, dc = d_from_x[:, t] @ w_h, dc * f[:, t]
        elif cell == "gru":
            dn = dh * (1 - z[:, t]) * (1 - n[:, t] ** 2)
            dr = dn * n_h[:, t] * r[:, t] * (1 - r[:, t])
            dz = dh * (previous[:, t] - n[:, t]) * z[:, t] * (1 - z[:, t])
            d_from_x[:, t] = torch.cat([dr, dz, dn], 1)
            d_from_h[:, t] = torch.cat([dr, dz, dn * r[:, t]], 1)
            dh = dh * z[:, t] + d_from_h[:, t] @ w_h
        else:
            d_from_x[:, t] = dh * (1 - y[:, t] ** 2)
            dh = d_from_x[:, t] @ w_h
    sums = [d_from_x.flatten(0, 1).T @ x.flatten(0, 1), d_from_h.flatten(0, 1).T @ previous.flatten(0, 1)]
    biases = [d_from_x.sum((0, 1)), d_from_h.sum((0, 1))]
    if cell != "lstm":  # the cell only passes through
        dc = dc.clone()
    return [grad.to(weights[0].dtype) for grad in (d_from_x @ w_x, dh, dc, *sums, *biases)]


@_rnn_layer_backward.register_fake
def _(
    cell: str, dy: Tensor, dh: Tensor, dc: Tensor, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, h, c, *weights)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.cell, x, h, c, weights = inputs
    ctx.save_for_backward(x, h, c, *weights)


def _backward(ctx: Any, dy: Tensor, dh: Tensor, dc: Tensor) -> tuple[Any, ...]:
    x, h, c, *weights = ctx.saved_tensors
    dx, dh, dc, *dweights = _rnn_layer_backward(ctx.cell, dy, dh, dc, x, h, c, weights)
    return None, dx, dh, dc, dweights


rnn_layer.register_autograd(_backward, setup_context=_setup_context)


class _Layer(nn.Module):
    """Parameters of one layer, named, shaped and initialised as a single-layer nn.LSTM, nn.GRU or nn.RNN has them."""

    def __init__(self, cell: str, input_size: int, hidden_size: int, placement: dict[str, Any]) -> None:
        super().__init__()
        rows = _GATES[cell] * hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size, **placement))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, hidden_size, **placement))
        self.bias_ih_l0 = nn.Parameter(torch.empty(rows, **placement))
        self.bias_hh_l0 = nn.Parameter(torch.empty(rows, **placement))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)

    @property
    def weights(self) -> list[Tensor]:
        """In the library's order."""
        return [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]


class ResidualRNN(nn.Module):
    """A stack of recurrent layers in which every layer adds its output to its input (Eq. 1).

    ``c_t, m_t = cell_l(c_{t-1}, m_{t-1}, x_t^{l-1})`` and ``x_t^l = m_t^l + x_t^{l-1}``; with ``residual=False``
    ``x_t^l = m_t^l``, the plain stack that ``nn.LSTM(num_layers=L)`` is.

    The layers are the library's (``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh``), one after the other over the whole
    sequence; under ``torch.compile`` and ``torch.export`` each is one opaque operator around the library's, so that
    full graphs and any number of steps work (its backward then runs the layer again, and has no second order).

    Args:
        input_size: F. hidden_size: H, by default F; a residual stack needs H = F.
        num_layers: L, 1 to 5.
        cell: "lstm", "gru" or "rnn" (tanh).
        residual: add the connections.
        output: which sequence to return: "m", the last layer's own output, or "x", the sum.

    Shape:
        x [N,T,F], state as returned -> (output [N,T,H], state). The state is ``(h, c)`` for LSTM cells and ``h`` for
        the others, each [L,N,H]: what ``nn.LSTM(batch_first=True)`` takes and returns. None starts from zeros.

    Attributes:
        layers: one module per layer with nn.LSTM's parameters (``weight_ih_l0`` …), so that state dicts of single
            library layers load into them.

    Raises:
        ValueError: unknown ``cell`` or ``output``, depth out of range, sizes that differ in a residual stack, an input
            or a state of another shape. TypeError: a state of another kind.
    """

    carries_state: ClassVar[bool] = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        num_layers: int = 2,
        *,
        cell: str = "lstm",
        residual: bool = True,
        output: str = "m",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden_size = input_size if hidden_size is None else hidden_size
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(map(repr, CELLS))}, got {cell!r}")
        if output not in OUTPUTS:
            raise ValueError(f"output: expected one of {', '.join(map(repr, OUTPUTS))}, got {output!r}")
        if not 1 <= num_layers <= MAX_DEPTH:
            raise ValueError(f"num_layers: expected 1 to {MAX_DEPTH}, got {num_layers}")
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"input_size, hidden_size: expected at least 1, got {input_size}, {hidden_size}")
        if residual and hidden_size != input_size:
            raise ValueError(
                f"hidden_size: a residual stack adds outputs to inputs, so it needs hidden_size = input_size = "
                f"{input_size}, got {hidden_size} (residual=False takes any; PCA brings features to another size)"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.cell = cell
        self.residual = residual
        self.output = output
        placement = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            _Layer(cell, hidden_size if index else input_size, hidden_size, placement) for index in range(num_layers)
        )

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x [N,T,F] -> (output [N,T,H], last state)."""
        if x.dim() != 3 or x.shape[2] != self.input_size or x.shape[1] < 1:
            raise ValueError(f"x: expected [N,T,F] with T >= 1 and F = {self.input_size}, got {list(x.shape)}")
        if x.dtype != self.layers[0].weight_ih_l0.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: expected the layers' dtype {self.layers[0].weight_ih_l0.dtype}, got {x.dtype}")
        given = x.dtype
        slot = active_slot(self) if state is None else None
        if slot is not None:
            state = self._read(slot, x)
        hs, cs = self._unpack(state, x)
        layer = rnn_layer if torch.compiler.is_compiling() else _library_layer
        h_last, c_last = [], []
        for index, each in enumerate(cast(Iterable[_Layer], self.layers)):
            # An empty batch is outside of what the library's kernels take.
            m, h_n, c_n = layer(self.cell, x, hs[index], cs[index], each.weights) if x.shape[0] else _empty(x, hs, cs)
            h_last.append(h_n)
            c_last.append(c_n)
            x = m + x if self.residual else m
        h_all = torch.stack(h_last)
        last: State = (h_all, torch.stack(c_last)) if self.cell == "lstm" else h_all
        if slot is not None:
            for part, value in self._parts(last).items():  # autocast gives back 16 bits; x's dtype is what is read
                slot.write(value.transpose(0, 1).to(given), part)
        return (m if self.output == "m" else x), last

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One time step, x [N,F] -> (output [N,H], state): ``forward`` fed one step at a time."""
        if x.dim() != 2:
            raise ValueError(f"x: expected [N,F] with F = {self.input_size}, got {list(x.shape)}")
        output, last = self(x[:, None], state)  # as a call, for hooks
        return output[:, 0], last

    def _parts(self, state: State) -> dict[str, Tensor]:
        return {"hidden": state[0], "cell": state[1]} if isinstance(state, tuple) else {"hidden": state}

    def _read(self, slot: Any, x: Tensor) -> State | None:
        # In a stream's state the batch comes first, as in every other layer's.
        shape = (x.shape[0], self.num_layers, self.hidden_size)
        names = ("hidden", "cell") if self.cell == "lstm" else ("hidden",)
        parts = [slot.read(x, shape, name) for name in names]
        if parts[0] is None:
            return None
        parts = [part.transpose(0, 1).to(x.dtype) for part in parts]
        return (parts[0], parts[1]) if self.cell == "lstm" else parts[0]

    def _unpack(self, state: State | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and cells, [L,N,H] each; cells of GRU and plain RNN are placeholders."""
        shape = (self.num_layers, x.shape[0], self.hidden_size)
        if state is None:
            zeros = x.new_zeros(shape)
            return zeros, zeros
        parts = list(state) if isinstance(state, (tuple, list)) else [state]
        pair = isinstance(state, (tuple, list)) and len(parts) == 2
        if pair != (self.cell == "lstm") or not all(isinstance(part, Tensor) for part in parts):
            wanted = "a pair (h, c) of tensors" if self.cell == "lstm" else "one tensor h"
            raise TypeError(f"state: expected {wanted} for {self.cell} cells, got {type(state).__name__}")
        for part in parts:
            if tuple(part.shape) != shape:
                raise ValueError(f"state: expected [L,N,H] = {list(shape)}, got {list(part.shape)}")
        return parts[0], parts[-1]

    def extra_repr(self) -> str:
        """Sizes, cell and connections."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, cell={self.cell!r}, "
            f"residual={self.residual}, output={self.output!r}"
        )


def _empty(x: Tensor, hs: Tensor, cs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_zeros(0, x.shape[1], hs.shape[2]), hs[0], cs[0]
