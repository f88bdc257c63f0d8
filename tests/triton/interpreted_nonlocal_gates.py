"""Runs the Triton kernels of nonlocal_gates in Triton's interpreter against the reference, in a process of its own.

Prints one line per case, "ok NAME" or "FAILED NAME: why". bf16 is not run here: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from rcu_ops.ops import _triton
from tests.ops import exact_nonlocal as exact
from tests.ops.test_nonlocal_gates import LAYOUTS, eager, eager_step, gradients, inputs, random_mask, step_inputs
from tests.tolerance import assert_close_to_reference
from tests.triton import reporting

kernels = _triton.kernels("nonlocal_gates")


def product(self: Any, a: Any, b: Any, start: Any, *options: Any) -> Any:
    """fp32 dots whose rounding does not depend on the tile's shape, as it does not on a GPU: the keys' gradients are
    made of peaks and sums that belong to the scores of the queries' kernel with every rounding."""
    if a.data.dtype != np.float32:
        return interpreter_product(self, a, b, start, *options)
    total = start.data + a.data.astype(np.float64) @ b.data.astype(np.float64)
    return interpreter.TensorHandle(total.astype(np.float32), start.dtype.scalar)


interpreter_product = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = product  # type: ignore[method-assign]


def attention(
    shape: tuple[int, ...], dtype: torch.dtype, masked: bool, count: bool, layout: str = "contiguous"
) -> None:
    b, n, m, _, e = shape
    arguments, grad = inputs(shape, dtype), torch.randn(b, n, e).to(dtype)
    mask = random_mask(b, n, m) if masked else None
    options = {"mask": mask, "scale": 0.8, "normalize": "count" if count else "softmax"}
    laid_out = [LAYOUTS[layout](a) for a in (grad, *arguments)]
    got = kernels.attention(*laid_out[1:], mask, 0.8, count)
    assert_close_to_reference(got, exact.attention(*arguments, **options), eager(*arguments, **options), "out")
    found = kernels.attention_backward(*laid_out, mask, 0.8, count)
    if n < 10:
        again = kernels.attention_backward(*laid_out, mask, 0.8, count)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not repeatable"
    rough = gradients(lambda *a: eager(*a, **options), arguments, [grad])
    for name, *values in zip(
        ("dq", "dk", "dv"), found, exact.attention_gradients(grad, *arguments, **options), rough, strict=True
    ):
        assert_close_to_reference(*values, name)


def step(shape: tuple[int, ...], dtype: torch.dtype, outputs: str, wide_cell: bool, layout: str = "contiguous") -> None:
    arguments = step_inputs(shape, dtype, wide_cell=wide_cell)
    laid_out = [LAYOUTS[layout](a) for a in arguments]
    found = kernels.step(*laid_out)
    for name, *values in zip("hc", found, exact.step(*arguments), eager_step(*arguments), strict=True):
        assert_close_to_reference(*values, name)
    b, p, _, e = shape
    grads = [
        torch.randn(b, p, e).to(like.dtype) if outputs in (name, "both") else None
        for name, like in zip("hc", found, strict=True)
    ]
    rough = gradients(eager_step, arguments, grads)
    found = kernels.step_backward(*(None if g is None else LAYOUTS[layout](g) for g in grads), *laid_out)
    names = ("dx_gates", "dquery", "dkey", "dvalue", "dcell")
    for name, *values in zip(names, found, exact.step_gradients(*grads, *arguments), rough, strict=True):
        assert_close_to_reference(*values, name)


def limited(name: str, value: int, call: Callable[[], None]) -> None:
    """With another of the kernels' limits."""
    with mock.patch.object(kernels, name, value):
        call()


def many_samples() -> None:
    """More samples than a grid has places along y are run in parts, and give the same bits."""
    (query, key, value), mask, grad = inputs((7, 5, 6, 8, 9), torch.float32), random_mask(7, 5, 6), torch.randn(7, 5, 9)
    steps = step_inputs((7, 5, 8, 9), torch.float32)
    grads = torch.randn(7, 5, 9), None

    def results() -> list[torch.Tensor]:
        found = [kernels.attention(query, key, value, mask, 0.8, False), *kernels.step(*steps)]
        found += kernels.attention_backward(grad, query, key, value, mask, 0.8, False)
        return [*found, *kernels.step_backward(*grads, *steps)]

    want, launched = results(), []
    with mock.patch.multiple(kernels, MOST_SAMPLES=3, MOST_STEPS=2):
        run = kernels._run
        with mock.patch.object(
            kernels, "_run", lambda launches, device: (launched.extend(launches), run(launches, device))
        ):
            got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert max(launch.grid[1] for launch in launched if launch.kernel is not kernels.step_kernel) == 3
    assert all(launch.grid[1] <= 2 for launch in launched if launch.kernel is kernels.step_kernel)


def far_gates(p: int) -> None:
    """Gates further apart than 32 bits reach. Nothing but the gates is touched of the memory between them."""
    near = step_inputs((1, p, 4, 4), torch.float16)
    apart = (1 << 31) // 3 + 4096
    store = torch.empty(4 * apart, dtype=torch.float16)
    far = []
    for index, tensor in enumerate(near[:4]):
        rows, columns = tensor.shape[2:]
        far.append(store.as_strided((1, 4, rows, columns), (4 * apart, apart, columns, 1), index * p * 4))
        far[-1].copy_(tensor)
    for got, want in zip(kernels.step(*far, near[4]), kernels.step(*near), strict=True):
        assert torch.equal(got, want)


def dead_queries(dtype: torch.dtype) -> None:
    """A masked row full of infinities, with a gradient full of NaN, gives zeros and reaches nobody."""
    query, key, value = inputs((2, 6, 5, 9, 7), dtype)
    grad, mask = torch.randn(2, 6, 7).to(dtype), torch.ones(2, 6, 5, dtype=torch.bool)
    clean, quiet = query.clone(), grad.clone()
    clean[:, 2], quiet[:, 2] = 0, 0
    mask[:, 2], query[:, 2], grad[:, 2] = False, torch.inf, torch.nan
    for count in (False, True):
        got, want = (kernels.attention(q, key, value, mask, 1.0, count) for q in (query, clean))
        assert torch.equal(got, want) and torch.equal(got[:, 2], torch.zeros_like(got[:, 2]))
        found = kernels.attention_backward(grad, query, key, value, mask, 1.0, count)
        wanted = kernels.attention_backward(quiet, clean, key, value, mask, 1.0, count)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def large_scores(dtype: torch.dtype) -> None:
    query, key = torch.full((1, 3, 16), 25.0).to(dtype), torch.full((1, 4, 16), 25.0).to(dtype)
    key[:, 1:3] = torch.tensor([-25.0, 24.0]).to(dtype).view(1, 2, 1)
    value = torch.randn(1, 4, 8).to(dtype)
    want = ((value[:, :1].double() + value[:, 3:].double()) / 2).expand(1, 3, 8)
    assert_close_to_reference(kernels.attention(query, key, value, None, 1.0, False), want, want.to(dtype))


def nan_stays_in_its_row(dtype: torch.dtype) -> None:
    query, key, value = inputs((1, 6, 5, 8, 7), dtype)
    query[0, 3, 2] = torch.nan
    got = kernels.attention(query, key, value, None, 1.0, False)
    assert got[0, 3].isnan().all() and got[0, [0, 1, 2, 4, 5]].isfinite().all()


def empty(shape: tuple[int, ...]) -> None:
    b, n, m, d, e = shape
    arguments = torch.randn(b, n, d), torch.randn(b, m, d), torch.randn(b, m, e)
    for count in (False, True):
        out = kernels.attention(*arguments, None, 1.0, count)
        mean = arguments[2].mean(1, keepdim=True).expand(b, n, e) if m and d == 0 and not count else None
        torch.testing.assert_close(out, torch.zeros(b, n, e) if mean is None else mean)
        found = kernels.attention_backward(torch.randn(b, n, e), *arguments, None, 1.0, count)
        for gradient, like in zip(found, arguments, strict=True):
            assert gradient.shape == like.shape and not gradient.isnan().any()


def self_tests_pass() -> None:
    """The cases with which users' GPUs are tested agree with the kernels here, and the operators differentiate."""
    from rcu_ops.ops import _selftest

    library = torch.library.Library("rcu_ops", "IMPL")
    for name, kernel in (
        ("nonlocal_attention", kernels.attention),
        ("nonlocal_attention_backward", kernels.attention_backward),
        ("relational_lstm_step", kernels.step),
        ("relational_lstm_step_backward", kernels.step_backward),
    ):
        library.impl(f"{name}_triton", kernel, "CPU", allow_override=True)
    for name in ("nonlocal_attention/triton", "relational_lstm_step/triton"):
        for dtype in (torch.float32, torch.float16):
            cases = list(_selftest._tests[name].cases(torch.device("cpu"), dtype))
            assert len(cases) == 2
            for case in cases:
                assert _selftest._compare(case) is None, _selftest._compare(case)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    fp32, fp16 = torch.float32, torch.float16
    layouts, modes = list(LAYOUTS), [(False, False), (True, False), (True, True), (False, True)]
    for index, shape in enumerate([(4, 5, 7, 9, 12), (1, 33, 40, 20, 70), (1, 18, 270, 8, 19)]):
        for mode, (masked, count) in enumerate(modes):
            arguments = (shape, (fp32, fp16)[(index + mode) % 2], masked, count, layouts[(index + mode) % len(layouts)])
            yield f"attention {arguments}", lambda a=arguments: attention(*a)
    for index, shape in enumerate([(4, 5, 9, 20), (1, 33, 24, 70), (2, 17, 20, 34)]):
        for dtype in (fp32, fp16):
            arguments = (shape, dtype, ("both", "h", "c")[index % 3], index % 2 == 0, layouts[index % len(layouts)])
            yield f"step {arguments}", lambda a=arguments: step(*a)
    # The branches of more than 256 keys, on few: the interpreter takes its time for every tile.
    yield "step of relations made before", lambda: step((2, 70, 8, 70), fp32, "h", False)
    yield "step of many positions", lambda: limited("WHOLE", 64, lambda: step((1, 66, 4, 5), fp16, "both", True))
    for dtype in (fp32, fp16):
        yield f"dead {dtype}", lambda dtype=dtype: dead_queries(dtype)
        yield f"large {dtype}", lambda dtype=dtype: large_scores(dtype)
        yield f"nan {dtype}", lambda dtype=dtype: nan_stays_in_its_row(dtype)
    for shape in ((0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)):
        yield f"empty {shape}", lambda shape=shape: empty(shape)
    yield "many samples", many_samples
    for p in (5, 70):
        yield f"far gates, {p} positions", lambda p=p: far_gates(p)
    yield "self-tests", self_tests_pass


if __name__ == "__main__":
    sys.exit(reporting.run(cases()))
