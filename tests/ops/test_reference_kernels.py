"""Without a binary a registered operator runs its reference: the same results as the kernels', laid out alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rcu_ops
from rcu_ops import _library
from rcu_ops.ops import _schema

OPERATORS = [name for name in _schema.names() if _library.has_kernel(name, "CPU")]
pytestmark = pytest.mark.skipif(not OPERATORS, reason="no CPU kernels were built")


class Recorded(TorchDispatchMode):
    """The calls of this package's operators: name, arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "rcu_ops":
            self.calls.append((name.partition(".")[0], args, result))
        return result


Numbers = Callable[..., Tensor]
"""Takes sizes, and returns random numbers that require gradients."""


def recurrent_convs(number: Numbers) -> Iterator[Any]:
    x, weight, h0, residual = number(2, 4, 3, 5, 2), number(4, 4), number(2, 4, 5, 2), number(2, 4, 3, 5, 2)
    channels = number(4), number(4)
    yield rcu_ops.recurrent_conv(x, weight)
    yield rcu_ops.recurrent_conv(x, weight.detach(), h0, update="mean", reverse=True)
    for options in ({}, {"h0": h0, "residual": residual, "update": "mean"}, {"residual": residual, "eps": 0.5}):
        for activation in ("relu", "identity"):
            yield rcu_ops.recurrent_conv_batch_norm(x, weight, *channels, **options, activation=activation)
    with torch.no_grad():
        operators, grad = torch.ops.rcu_ops, torch.randn_like(x)
        for masked, first, added in ((True, h0, residual), (False, None, None)):
            h, h_n, moments = operators.recurrent_conv_moments(x, weight, first, masked)
            affine = [value.to(moments.dtype) for value in channels]
            y = operators.recurrent_conv_normalize(h, moments, *affine, added, 0.5, masked)
            mask = y if masked else None
            sums, _ = operators.recurrent_conv_normalize_sums(grad, h, mask, moments, *affine, 0.5, masked)
            rest = moments, sums, *affine, 0.5, masked, masked, masked
            operators.recurrent_conv_normalize_backward(grad, h_n, h, weight, first, *rest)
        yield rcu_ops.recurrent_conv_affine_act(x, weight, *channels)
        yield rcu_ops.recurrent_conv_affine_act(
            x, weight, *channels, h0, residual, update="mean", activation="identity"
        )


def srtgs(number: Numbers) -> Iterator[Any]:
    x, h, gate = number(2, 4, 3, 5, 2), number(2, 3, 4), torch.tensor([True, False])
    yield rcu_ops.srtg_squeeze(x)
    for options in ({}, {"gate": gate}, {"gate": gate, "fusion": "add"}):
        yield rcu_ops.srtg_fuse(x, h, **options)


def fast_grus(number: Numbers) -> Iterator[Any]:
    x, o0 = number(2, 3, 4, 1, 2, 3), number(2, 4, 1, 2, 3)
    weights = number(4, 4), number(4, 4), number(2, 4, 2), number(4, 4), number(4, 4)
    yield rcu_ops.fast_gru(x, *weights)
    yield rcu_ops.fast_gru(x.detach(), *weights, o0)
    yield rcu_ops.fast_gru(x, *(weight.detach() for weight in weights), o0)


def nonlocal_gates(number: Numbers) -> Iterator[Any]:
    query, key, value = number(2, 3, 4), number(2, 5, 4), number(2, 5, 6)
    mask = torch.rand(2, 3, 5) < 0.5
    for options in ({"scale": 0.5}, {"mask": mask, "normalize": "count"}, {"mask": mask, "scale": 2.0}):
        yield rcu_ops.nonlocal_attention(query, key, value, **options)
    x_gates, query, key, value, cell = (
        number(2, 4, 3, 6), number(2, 4, 3, 5), number(2, 4, 3, 5), number(2, 4, 3, 6), number(2, 3, 6)
    )  # fmt: skip
    yield rcu_ops.relational_lstm_step(x_gates, query, key, value, cell)
    yield torch.ops.rcu_ops.relational_lstm_step(x_gates, query, key, value, cell)
    yield torch.ops.rcu_ops.relational_lstm_step_kept(x_gates, query, key, value, cell, 2)[:2]


def alignments(number: Numbers) -> Iterator[Any]:
    for frames, others, names in ((5, 7, ""), (5, 7, "b"), (6, 70, "ab")):
        a, b = number(2, frames, 8), number(2, others, 8)
        masks = {f"mask_{name}": torch.rand(2, {"a": frames, "b": others}[name]) < 0.7 for name in names}
        yield rcu_ops.soft_nearest_neighbor(a, b, temperature=5.0, mask_b=masks.get("mask_b"))[0]
        rcu_ops.cycle_consistency(a, b, temperature=5.0, **masks)
        for kind, reduction in (("regression", "mean"), ("classification", "none")):
            options = {"kind": kind, "reduction": reduction, "variance_weight": 0.5, "min_variance": 0.1}
            yield rcu_ops.temporal_cycle_loss(a, b, temperature=5.0, **options, **masks)
        yield torch.ops.rcu_ops.cycle_back(number(2, frames, 8), a, masks.get("mask_a"), 5.0)


@functools.cache
def calls(problems: Callable[[Numbers], Iterator[Any]], dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...], Any]]:
    with rcu_ops.use_backend("cpu"), Recorded() as recorded:
        for results in problems(lambda *shape: torch.randn(shape, dtype=dtype, requires_grad=True)):
            results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
            if results:
                torch.autograd.backward(results, [torch.randn_like(r) for r in results])
    return recorded.calls


# What is kept between the passes in the kernels' own order, by the first result of it.
OPAQUE = {"fast_gru": 2}


PROBLEMS = (recurrent_convs, srtgs, fast_grus, nonlocal_gates, alignments)


def layouts(results: Any) -> list[tuple[Any, ...]]:
    return [(r.shape, r.dtype, r.stride()) for r in ((results,) if isinstance(results, Tensor) else results)]


@pytest.mark.parametrize("problems", PROBLEMS)
def test_references_do_what_the_kernels_do(problems) -> None:
    for name, args, result in calls(problems, torch.float64):
        want = _schema._reference_kernels[name](*args)
        assert layouts(want) == layouts(result), name
        results, wanted = ((r,) if isinstance(r, Tensor) else r for r in (result, want))
        for index, (got, expected) in enumerate(zip(results, wanted, strict=True)):
            if index < OPAQUE.get(name, len(results)):
                torch.testing.assert_close(got, expected, msg=lambda text, at=(name, index): f"{at}: {text}")


@pytest.mark.parametrize("problems", PROBLEMS)
def test_tracers_see_results_of_16_bits_as_they_are(problems) -> None:
    recorded = calls(problems, torch.bfloat16)
    with FakeTensorMode() as mode:
        for name, args, result in recorded:
            fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            assert layouts(getattr(torch.ops.rcu_ops, name)(*fake)) == layouts(result), name


def test_every_operator_was_tried() -> None:
    tried = {name for problems in PROBLEMS for name, *_ in calls(problems, torch.float64)}
    assert set(OPERATORS) - tried == {"recurrent_conv_frame"}  # of which test_recurrent_conv_frame.py tries both
