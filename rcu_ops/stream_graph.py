"""Chunks of a stream as CUDA graphs: captured once per shape, replayed on fixed buffers, with a reason where not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rcu_ops.ops import current_backend

State = dict[str, Tensor]
Run = Callable[[Tensor, State | None, Tensor | None], tuple[Tensor, State]]
"""(frames, carried state, samples that start anew) -> (scores, new state): a pure function of a chunk."""


class Capture(Protocol):
    """What records a function's kernels and runs them again."""

    def why_not(self, device: torch.device) -> str | None:
        """Why nothing can be captured on the device, or None."""

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> None:
        """Call the function so that libraries have chosen algorithms and allocated workspaces before the capture."""

    def record(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """What the function returns, and what computes it anew, into the same memory, from its inputs' memory."""


class CudaCapture:
    """``torch.cuda.CUDAGraph``; all graphs share one memory pool.

    They may, because they are replayed one after the other on one stream, and a replay's results are copied out of the
    pool before the next one.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def why_not(self, device: torch.device) -> str | None:
        """None on a CUDA device."""
        return None if device.type == "cuda" else f"the frames are on {device}"

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> None:
        """Three calls on a side stream, as captures ask for."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream(device).wait_stream(side)

    def record(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """Capture on a stream of the device."""
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                results = function()
        return results, graph.replay


class ChunkGraphs:
    """Runs chunks through graphs, one per shape, and as they are where no graph can be had.

    A chunk runs without a graph on devices without graphs, when its capture has failed, and when ``most`` other shapes
    have graphs already. Each such reason is warned of once and stays readable in :meth:`report`.

    Args:
        run: without data-dependent control flow.
        weights: the tensors ``run`` reads besides its arguments. Changes of their values are seen; when one has got
            other memory, everything is captured again.
        capture: what captures.
        most: graphs at once; each holds its own buffers.
    """

    def __init__(
        self, run: Run, weights: Sequence[Tensor] = (), capture: Capture | None = None, most: int = 16
    ) -> None:
        self._run = run
        self._weights = list(weights)
        self._capture = capture or CudaCapture()
        self._most = most
        self._graphs: dict[Any, _Graph] = {}
        self._refused: dict[Any, str] = {}
        self._addresses: tuple[int, ...] = ()
        self._warned: set[str] = set()
        self.replays: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()

    def __call__(self, frames: Tensor, carried: State | None, fresh: Tensor | None) -> tuple[Tensor, State]:
        """``run(frames, carried, fresh)``, in tensors of the caller's own."""
        addresses = tuple(weight.data_ptr() for weight in self._weights)
        if addresses != self._addresses:
            self._addresses = addresses
            self._graphs.clear()
            self._refused.clear()
        key = _key(frames, carried, fresh)
        graph = self._graphs.get(key)
        if graph is None:
            reason = self._refused.get(key) or self._why_not(frames)
            if reason is None:
                graph = self._captured(key, frames, carried, fresh)
                reason = self._refused.get(key)
            if graph is None:
                assert reason is not None
                self._fall_back(reason)
                return self._run(frames, carried, fresh)
        self.replays[_described(frames, carried, fresh)] += 1
        return graph(frames, carried, fresh)

    def report(self) -> str:
        """What has run as a graph, what has not, and why."""
        lines = [f"replayed as a CUDA graph: {chunk}, {times} times" for chunk, times in self.replays.items()]
        lines += [f"run without a CUDA graph: {times} chunks, because {why}" for why, times in self.fallbacks.items()]
        return "\n".join(lines) or "no chunk has run yet"

    def _why_not(self, frames: Tensor) -> str | None:
        reason = self._capture.why_not(frames.device)
        if reason is None and len(self._graphs) >= self._most:
            reason = f"{self._most} other chunk shapes have graphs already: keep to a few chunk sizes"
        return reason

    def _captured(self, key: Any, frames: Tensor, carried: State | None, fresh: Tensor | None) -> _Graph | None:
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            graph = _Graph(self._run, frames, carried, fresh)
            self._capture.warm_up(graph.call, frames.device)  # raises what the chunk itself would raise
            try:
                graph.record(self._capture)
            except Exception as error:  # whatever the model does that a capture cannot hold; the reason is passed on
                self._refused[key] = f"its capture failed: {type(error).__name__}: {str(error).splitlines()[0]}"
                return None
        self._graphs[key] = graph
        return graph

    def _fall_back(self, reason: str) -> None:
        self.fallbacks[reason] += 1
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"Streamer(graph=True) runs a chunk without a CUDA graph: {reason}", stacklevel=4)


def _key(frames: Tensor, carried: State | None, fresh: Tensor | None) -> Any:
    """Everything a captured graph has fixed: shapes, strides, dtypes and what chooses kernels."""
    layout = None
    if carried is not None:
        layout = tuple((name, value.shape, value.dtype, value.device) for name, value in sorted(carried.items()))
    kind = frames.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    arithmetic = (autocast, torch.get_float32_matmul_precision(), current_backend())
    return frames.shape, frames.stride(), frames.dtype, frames.device, layout, fresh is None, arithmetic


def _described(frames: Tensor, carried: State | None, fresh: Tensor | None) -> str:
    where = "at a stream's start" if carried is None else "within a stream" if fresh is None else "with resets"
    return f"{str(frames.dtype).removeprefix('torch.')} {list(frames.shape)} {where}"


class _Graph:
    """One chunk shape on fixed buffers.

    Args:
        run: what is captured.
        frames, carried, fresh: example arguments, which fix shapes, strides, dtypes and which are None.
    """

    def __init__(self, run: Run, frames: Tensor, carried: State | None, fresh: Tensor | None) -> None:
        self._run = run
        self._frames = torch.empty_like(frames)
        self._carried = None if carried is None else {key: torch.empty_like(value) for key, value in carried.items()}
        self._fresh = None if fresh is None else torch.empty_like(fresh)
        self._load(frames, carried, fresh)
        self._replay: Callable[[], None] | None = None

    def call(self) -> tuple[Tensor, State]:
        """The function of the buffers that is captured."""
        carried = None if self._carried is None else dict(self._carried)
        return self._run(self._frames, carried, self._fresh)

    def record(self, capture: Capture) -> None:
        """Capture :meth:`call`."""
        (self._scores, self._written), self._replay = capture.record(self.call, self._frames.device)

    @torch.no_grad()
    def __call__(self, frames: Tensor, carried: State | None, fresh: Tensor | None) -> tuple[Tensor, State]:
        assert self._replay is not None
        self._load(frames, carried, fresh)
        self._replay()
        # The buffers are overwritten at the next replay; what is handed out must not be.
        names, values = list(self._written), [self._scores, *self._written.values()]
        scores, *written = _copies(values)
        return scores, dict(zip(names, written, strict=True))

    def _load(self, frames: Tensor, carried: State | None, fresh: Tensor | None) -> None:
        self._frames.copy_(frames)
        if self._carried:
            assert carried is not None
            torch._foreach_copy_(list(self._carried.values()), [carried[key] for key in self._carried])
        if self._fresh is not None:
            assert fresh is not None
            self._fresh.copy_(fresh)


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    """Clones; those of one dtype in as few launches as the library needs: a network has a state per layer."""
    results: list[Tensor] = [torch.empty_like(value) for value in values]
    for dtype in {value.dtype for value in values}:
        places = [i for i, value in enumerate(values) if value.dtype == dtype]
        torch._foreach_copy_([results[i] for i in places], [values[i] for i in places])
    return results
