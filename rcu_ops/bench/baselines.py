"""Ways of running a function that every operator is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import rcu_ops
from rcu_ops.bench.case import OURS, Bind, Candidate, Inputs, Variant
from rcu_ops.bench.timing import Thunk


def compiled(function: Callable[[Inputs], Any]) -> Bind:
    """``torch.compile`` of ``function`` for the one shape that is measured; fails where there is no compiler."""
    run = compiled_once(function)
    return lambda inputs: lambda: run()(inputs)


def compiled_once(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """Returns what compiles ``function`` for one shape when first called: one program for all sets of inputs."""

    @functools.cache
    def run() -> Callable[..., Any]:
        torch._dynamo.reset()  # no leftovers of other shapes, and no limit on recompilations
        compiled: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
        return compiled

    return run


def graphed(bind: Bind) -> Bind:
    """The call captured in a CUDA graph: no launch costs, the same kernels.

    With gradients where grad mode is on when inputs are bound: then the backward pass is part of the graph.
    """

    def bind_graph(inputs: Inputs) -> Thunk:
        thunk = bind(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose algorithms and allocate workspaces at their first calls
                thunk()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = thunk()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    return bind_graph


def with_backend(backend: str, function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """``function`` under :class:`rcu_ops.use_backend`."""

    def run(inputs: Inputs) -> Any:
        with rcu_ops.use_backend(backend):
            return function(inputs)

    return run


def in_graph(call: Callable[[Inputs], Any], device: torch.device) -> Candidate:
    """Ours with its gradients in one CUDA graph: the kernels' time, where the call itself pays for launches too."""
    return Candidate("graphed", on_device({OURS: Variant(lambda inputs: lambda: call(inputs))}, device))


def on_device(variants: dict[str, Variant], device: torch.device) -> dict[str, Variant]:
    """The variants as they are on a CPU; each under a CUDA graph on a GPU."""
    if device.type != "cuda":
        return variants
    return {f"{name}, graphed": replace(v, bind=graphed(v.bind)) for name, v in variants.items()}
