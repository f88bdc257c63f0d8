"""How recurrent layers find their state when a model runs one chunk of frames at a time.

A :class:`StreamPass` lasts for one call of a model. While it is active, in this thread, each recurrent layer asks
:func:`active_slot` for its place, reads the state it left there at the previous chunk and writes the new one. Outside a
pass ``active_slot`` returns None and layers start from nothing, as in training. The state itself is a plain
``dict[str, Tensor]`` that the caller passes in and gets back; layers keep none of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from rcu_ops.reference.recurrent_conv import state_dtype_of

# A plain threading.local, read with getattr: torch.compile traces and guards it, which it does for neither a
# contextvars.ContextVar nor a threading.local with class attributes.
_LOCAL = threading.local()


class StreamSlot:
    """The place of one recurrent layer, at one call of it, in the state of a stream."""

    def __init__(self, stream: StreamPass, key: str) -> None:
        self.key = key
        self._stream = stream

    @property
    def fresh(self) -> Tensor | None:
        """Bool [N]: samples that start anew with this chunk; None when all continue (or all start)."""
        return self._stream.fresh

    def read(self, like: Tensor, shape: tuple[int, ...], part: str = "") -> Tensor | None:
        """The state the layer wrote last time, or None when the stream starts here.

        Samples that start anew get zeros, whatever their old state held (NaN included).

        Args:
            like: a tensor of the chunk, for the dtype and device the state must suit.
            shape: the shape the state must have.
            part: which of the layer's states, for layers with more than one (an LSTM's "cell").

        Raises:
            ValueError: the state has another shape, dtype or device than the chunk needs, or misses this layer.
        """
        if self._stream.state is None:
            return None
        key = self._key(part)
        value = self._stream.state.get(key)
        if value is None:
            raise ValueError(f"state: expected an entry {key!r} as this model's own states have, got none")
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"state: {key!r} is {list(value.shape)}, but these frames need {list(shape)}: a stream keeps one batch "
                "size and one frame size"
            )
        if value.dtype not in (like.dtype, state_dtype_of(like.dtype)):
            raise ValueError(
                f"state: {key!r} is {value.dtype}, but {like.dtype} frames need {state_dtype_of(like.dtype)} or "
                f"{like.dtype}"
            )
        if value.device != like.device:
            raise ValueError(f"state: {key!r} is on {value.device}, but the frames are on {like.device}")
        if self.fresh is not None:
            value = value.masked_fill(self.fresh.view(-1, *[1] * (value.dim() - 1)), 0)
        return value

    def write(self, value: Tensor, part: str = "") -> None:
        """Hand ``value`` to the next chunk."""
        self._stream.written[self._key(part)] = value

    def _key(self, part: str) -> str:
        return f"{self.key}:{part}" if part else self.key


class StreamPass:
    """One call of a model within a stream, as a context manager.

    Args:
        names: the name of every recurrent layer of the model.
        state: what the previous call wrote, or None at the start of a stream.
        fresh: bool [N], samples that start anew; None when there are none.

    Attributes:
        written: the new state, complete after the call.
    """

    def __init__(
        self, names: Mapping[nn.Module, str], state: Mapping[str, Tensor] | None, fresh: Tensor | None
    ) -> None:
        self.state = state
        self.fresh = fresh if state is not None else None
        self.written: dict[str, Tensor] = {}
        self._names = names
        self._calls: dict[str, int] = {}

    def __enter__(self) -> StreamPass:
        self._outer = getattr(_LOCAL, "stream", None)
        _LOCAL.stream = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _LOCAL.stream = self._outer

    def slot(self, module: nn.Module) -> StreamSlot:
        """The slot of ``module`` for its next call: its name, then ``name#1``, ``name#2`` if it is called again."""
        name = self._names.get(module)
        if name is None:
            raise ValueError(
                f"a {type(module).__name__} that was not in the model when the Streamer was made was called: "
                "make a new Streamer after changing a model"
            )
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        return StreamSlot(self, f"{name}#{call}" if call else name)


def active_slot(module: nn.Module) -> StreamSlot | None:
    """The slot of ``module`` in the stream this thread is running, or None outside a stream."""
    stream = getattr(_LOCAL, "stream", None)
    return None if stream is None else stream.slot(module)


def scan_with_state(
    scan: Callable[[Tensor | None], tuple[Tensor, Tensor]], slot: StreamSlot | None, like: Tensor, update: str
) -> Tensor:
    """Run ``scan(h0) -> (y, h_n)`` from the slot's state and leave ``h_n`` there; outside a stream, from nothing.

    Args:
        scan: the recurrence over [N,C,T,H,W], given the state [N,C,H,W] or None.
        slot: where the state is kept, or None.
        like: the recurrence's input [N,C,T,H,W].
        update: "sum" or "mean".
    """
    if slot is None:
        return scan(None)[0]
    h0 = slot.read(like, (like.shape[0], like.shape[1], like.shape[3], like.shape[4]))
    y, h_n = scan(h0)
    if h0 is not None and slot.fresh is not None and update == "mean":
        # A zero state makes "sum" start with h = x, but "mean" with x / 2: samples that start anew take both scans.
        y_fresh, h_fresh = scan(None)
        fresh = slot.fresh.view(-1, 1, 1, 1)
        y = torch.where(fresh.unsqueeze(1), y_fresh, y)
        h_n = torch.where(fresh, h_fresh, h_n)
    slot.write(h_n)
    return y
