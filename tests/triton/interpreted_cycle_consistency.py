"""Runs the Triton kernels of cycle_consistency and srtg in Triton's interpreter against the reference, in a process of
its own.

Prints one line per case, "ok NAME" or "FAILED NAME: why". bf16 is not run here: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rcu_ops import reference
from rcu_ops.ops import _selftest, _triton
from tests.ops import alignment
from tests.ops.test_cycle_consistency import inputs, masks
from tests.ops.test_srtg import LAYOUTS
from tests.tolerance import assert_close_to_reference
from tests.triton import reporting

kernels, srtg = _triton.kernels("cycle_consistency"), _triton.kernels("srtg")


def gradients(function: Callable[..., object], leaves: list[Tensor], grads: list[Tensor], dtype: torch.dtype):
    """Of the reference in one precision."""
    wide = [v.detach().to(dtype).requires_grad_() for v in leaves]
    outputs = function(*wide, state_dtype=dtype)
    outputs = [o for o in outputs if o.is_floating_point()]
    return torch.autograd.grad(outputs, wide, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])


def soft(shape: tuple[int, int, int, int], dtype: torch.dtype, masked: bool) -> None:
    n, t, s, _ = shape
    a, b = inputs(shape, dtype)
    grad, mask = torch.randn(a.shape).to(dtype), masks(n, s) if masked else None
    if mask is not None:
        b[~mask] = torch.nan
    options = {"temperature": 0.5, "mask_b": mask}
    got, index = kernels.soft_nearest_neighbor(a, b, mask, 0.5, True)
    eager, _ = reference.soft_nearest_neighbor(a, b, **options, state_dtype=dtype)
    assert_close_to_reference(got, alignment.soft_neighbors(a, b, **options), eager, "soft")
    alignment.check_indices(index, a, b, 0.5, mask)
    assert kernels.soft_nearest_neighbor(a, b, mask, 0.5, False)[1].shape == (n, 0)
    found = kernels.soft_nearest_neighbor_backward(grad, a, b, mask, 0.5)
    if t < 10:
        again = kernels.soft_nearest_neighbor_backward(grad, a, b, mask, 0.5)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True)), "not repeatable"

    def definition(x: Tensor, y: Tensor, state_dtype: torch.dtype) -> object:
        return reference.soft_nearest_neighbor(x, y, **options, state_dtype=state_dtype)

    wanted = [gradients(definition, [a, b], [grad], to) for to in (torch.float64, dtype)]
    for name, *values in zip(("da", "db"), found, *wanted, strict=True):
        assert_close_to_reference(*values, name)


def landing(shape: tuple[int, int, int], dtype: torch.dtype, masked: bool) -> None:
    n, t, c = shape
    a, near = inputs((n, t, t, c), dtype)
    mask = masks(n, t) if masked else None
    given = [torch.randn(n, t) for _ in range(3)]

    def definition(x: Tensor, y: Tensor, state_dtype: torch.dtype) -> tuple[Tensor, ...]:
        return reference.cycle_back(x, y, mask_a=mask, state_dtype=state_dtype)

    found = kernels.cycle_back(near, a, mask, 1.0)
    for values in zip(
        found, definition(near.double(), a.double(), torch.float64), definition(near, a, dtype), strict=True
    ):
        assert_close_to_reference(*values)
    found = kernels.cycle_back_backward(*given, near, a, mask, 1.0)
    wanted = [gradients(definition, [near, a], given, to) for to in (torch.float64, dtype)]
    for name, *values in zip(("d_soft", "da"), found, *wanted, strict=True):
        assert_close_to_reference(*values, name)


def cycle(shape: tuple[int, int, int, int], dtype: torch.dtype, masked: bool) -> None:
    n, t, s, _ = shape
    a, b = inputs(shape, dtype)
    mask_a, mask_b = (masks(n, t), masks(n, s)) if masked else (None, None)
    if mask_a is not None and mask_b is not None:
        a[~mask_a], b[~mask_b] = torch.nan, torch.inf
    gate, *found = kernels.cycle_consistency(a, b, mask_a, mask_b, 0.3)
    stays = []
    for x, y, index, own, other in ((a, b, found[0], mask_a, mask_b), (b, a, found[1], mask_b, mask_a)):
        there = torch.ones_like(index, dtype=torch.bool) if own is None else own
        assert torch.equal(index >= 0, there)
        stays.append(((index == torch.arange(index.shape[1])) | ~there).all(1))
        for sample in range(n):
            rows, mask = there[sample], None if other is None else other[sample][None]
            alignment.check_indices(index[sample][rows][None], x[sample][rows][None], y[sample][None], 0.3, mask)
    assert torch.equal(gate, stays[0] & stays[1] & (t == s))


def magnitudes(case: str, frames: int, dtype: torch.dtype) -> None:
    a, temperature = torch.randn(1, frames, 20), 1.0
    b = a + 0.3 * torch.randn(1, frames, 20)
    if case == "offset":
        a, b = a + 1e3, b + 1e3
    if case == "cut":
        far = torch.where(torch.arange(frames) < frames // 2, -3e4, 3e4)[:, None]
        a, b = a + far, b + far
    if case == "huge":
        a, b, temperature = a * 1e31, b * 1e31, 1e38
    if case == "tiny":
        a, b, temperature = a * 1e-31, b * 1e-31, 1e-30
    if case == "copies":
        b[:, 1::2] = b[:, ::2]
    a, b = a.to(dtype), b.to(dtype)
    if frames > kernels.SHORT:  # a few queries, from all of the sequence
        a = a[:, 1::5]
        index = kernels.soft_nearest_neighbor(a, b, None, temperature, True)[1]
        assert alignment.check_indices(index, a, b, temperature)[1] == 0
        return
    _, index_ab, index_ba = kernels.cycle_consistency(a, b, None, None, temperature)
    excused = [alignment.check_indices(i, x, y, temperature)[1] for i, x, y in ((index_ab, a, b), (index_ba, b, a))]
    assert sum(excused) == 0


def moving(case: str) -> None:
    """Slowly, so that many frames have a say. Flat: all distances are products, and those to soft neighbours, too."""
    frames, temperature = 34, 1e3 if case == "flat" else 1.0
    a = 0.3 * torch.randn(1, frames, 18).cumsum(1)
    if case == "cut":
        a += 1e4 * torch.randn(2, 18)[torch.arange(frames) * 2 // frames]
    b = a + 0.05 * torch.randn(a.shape)
    a = a[:, 2::5]
    soft, index = kernels.soft_nearest_neighbor(a, b, None, temperature, True)
    eager, _ = reference.soft_nearest_neighbor(a, b, temperature=temperature, state_dtype=torch.float32)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, temperature), eager, "soft")
    assert alignment.check_indices(index, a, b, temperature)[1] <= 1


def faults() -> None:
    """What these tests are for is noticed: no distance found again; the lower parts missing; no frame compared."""

    def without(kernel: Any) -> Callable[[list[Any], torch.device], None]:
        return lambda launches, device: run([launch for launch in launches if launch.kernel is not kernel], device)

    def without_lower_parts(launches: list[Any], device: torch.device) -> None:
        for launch in launches:
            run([launch], device)
            if launch.kernel is kernels.split_kernel:
                launch.arguments[launch.kernel.arg_names.index("parts")][:, :, 1] = 0

    run = kernels._run
    for fault, case in (
        (without(kernels.settle_kernel), "cut"),
        (without_lower_parts, "flat"),
        (without(kernels.compare_kernel), "flat"),
    ):
        kernels._run = fault
        try:
            moving(case)
        except AssertionError:
            continue
        finally:
            kernels._run = run
        raise RuntimeError(f"{case} did not notice a fault")


def nothing_there() -> None:
    for t, s, channels in ((4, 4, 6), (4, 34, 6), (7, 33, 16)):
        a, b = inputs((3, t, s, channels))
        mask = torch.ones(3, s, dtype=torch.bool)
        mask[0] = False
        a[1, 1, 3] = torch.nan
        b[2, 3, 2] = torch.inf  # has no weight, but 0 * infinity is not a number
        soft_b, index = kernels.soft_nearest_neighbor(a, b, mask, 1.0, True)
        want_soft, want_index = reference.soft_nearest_neighbor(a, b, mask_b=mask)
        torch.testing.assert_close(soft_b, want_soft, equal_nan=True)
        assert torch.equal(index, want_index)
        if channels < 16:
            got = kernels.cycle_consistency(a, b, None, mask, 1.0)
            want = reference.cycle_consistency(a, b, mask_b=mask)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert kernels.cycle_consistency(a[:0], b[:0], None, None, 1.0)[1].shape == (0, 7)


def strides() -> None:
    a, b = inputs((2, 5, 35, 16))
    mask = masks(2, 70)
    want = kernels.soft_nearest_neighbor(a, b, mask[:, ::2].contiguous(), 1.0, True)
    views = a.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([b, b], -1)[..., 0]
    got = kernels.soft_nearest_neighbor(*views, mask[:, ::2], 1.0, True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def data_path(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    n, c, t, height, width = shape
    x, grad = (torch.randint(-4, 5, shape).to(dtype) for _ in range(2))
    h, gate = torch.randint(-4, 5, (n, t, c)).float(), torch.arange(n) % 2 == 0
    laid_out = LAYOUTS[layout](x)
    assert torch.equal(srtg.squeeze(laid_out), x.float().sum((3, 4)).transpose(1, 2) / (height * width))
    for given in (gate, None):
        for add in (False, True):
            y = srtg.fuse(laid_out, h, given, add)
            assert torch.equal(y, reference.srtg_fuse(x, h, given, fusion=("mul", "add")[add]))
            assert y.stride() == torch.empty_like(laid_out).stride()
        found = srtg.fuse_backward(grad, laid_out, h, given)
        assert all(
            torch.equal(x, y) for x, y in zip(found, reference.srtg_fuse_backward(grad, x, h, given), strict=True)
        )


def many_samples() -> None:
    """More samples than a grid has places along y are run in parts, and give the same bits."""
    a, b = torch.randn(3, 5, 4), torch.randn(3, 34, 4)
    mask, grads = torch.rand(3, 34) < 0.8, [torch.randn(3, 5) for _ in range(3)]

    def results() -> list[torch.Tensor]:
        found = [*kernels.soft_nearest_neighbor(a, b, mask, 1.0, True), *kernels.cycle_back(a, a, None, 1.0)]
        found += kernels.soft_nearest_neighbor_backward(a, a, b, mask, 1.0)
        return [
            *found,
            *kernels.cycle_back_backward(*grads, a, a, None, 1.0),
            *kernels.cycle_consistency(a, b, None, mask, 1.0),
        ]

    want = results()
    with mock.patch.object(kernels, "MOST_SAMPLES", 2), mock.patch.object(kernels, "_run", wraps=kernels._run) as run:
        got = results()
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    launched = [launch for call in run.call_args_list for launch in call.args[0]]
    assert {launch.grid[1] for launch in launched} == {1, 2}


def many_channels() -> None:
    """The same of blocks of channels."""
    with mock.patch.object(srtg, "MOST_BLOCKS", 2), mock.patch.object(srtg, "_run", wraps=srtg._run) as run:
        data_path((2, 10, 1, 2, 3), torch.float32, "contiguous")
    assert [launch.grid[1] for call in run.call_args_list for launch in call.args[0]] == [2, 1] * 7


def means() -> None:
    x = torch.randn(1, 5, 2, 19, 21)
    assert_close_to_reference(srtg.squeeze(x), x.double().mean((3, 4)).mT, x.mean((3, 4)).mT)
    assert (
        srtg.squeeze(x[:, :, :0]).shape == (1, 0, 5) and srtg.fuse(x[:0], torch.zeros(0, 2, 5), None, True).numel() == 0
    )


def self_tests_pass() -> None:
    """The cases with which users' GPUs are tested agree with the kernels here, and the operators differentiate."""
    library = torch.library.Library("rcu_ops", "IMPL")
    names = ("soft_nearest_neighbor", "cycle_back")
    names = (*names, *(f"{name}_backward" for name in names), "cycle_consistency")
    found = {name: getattr(kernels, name) for name in names}
    found |= {f"srtg_{name}": getattr(srtg, name) for name in ("squeeze", "fuse", "fuse_backward")}
    for name, kernel in found.items():
        library.impl(f"{name}_triton", kernel, "CPU", allow_override=True)
    for name, count, runs in (
        ("cycle_consistency/triton", 4, {torch.float32: 4, torch.float16: 2}),  # what cycles add is not of a dtype
        ("srtg/triton", 2, {torch.float16: 2}),
    ):
        for dtype, first in runs.items():
            cases = list(_selftest._tests[name].cases(torch.device("cpu"), dtype))
            assert len(cases) == count
            for case in cases[:first]:
                assert _selftest._compare(case) is None, _selftest._compare(case)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    fp32, fp16 = torch.float32, torch.float16
    for index, shape in enumerate([(2, 5, 7, 3), (1, 17, 34, 20)]):  # distances by differences, by products
        for masked in (False, True):
            arguments = (shape, (fp32, fp16)[(index + masked) % 2], masked)
            yield f"soft {arguments}", lambda a=arguments: soft(*a)
    for arguments in (((2, 5, 3), fp32, False), ((1, 17, 12), fp16, True), ((1, 35, 17), fp32, True)):
        yield f"landing {arguments}", lambda a=arguments: landing(*a)
    for index, shape in enumerate([(2, 5, 7, 3), (1, 16, 16, 33), (1, 20, 32, 24)]):
        for masked in (False, True):
            arguments = (shape, (fp32, fp16)[(index + masked) % 2], masked)
            yield f"cycle {arguments}", lambda a=arguments: cycle(*a)
    for arguments in (((1, 34, 6, 9), fp16, True), ((1, 34, 37, 20), fp32, True)):
        yield f"cycle {arguments}", lambda a=arguments: cycle(*a)
    for frames in (16, 34):
        for case in ("offset", "cut", "huge", "tiny", "copies"):
            dtype = fp16 if case == "offset" else fp32
            yield f"magnitudes {case} {frames}", lambda a=(case, frames, dtype): magnitudes(*a)
    for case in ("flat", "cut"):
        yield f"moving {case}", lambda case=case: moving(case)
    yield "faults", faults
    yield "nothing", nothing_there
    yield "strides", strides
    for index, layout in enumerate(LAYOUTS):
        shape = (2, 70, 1, 3, 7) if layout == "channels_last_3d" else (2, 9, 2, 3, 7)  # a block's channels, and more
        arguments = (shape, (fp32, fp16)[index % 2], layout)
        yield f"data {arguments}", lambda a=arguments: data_path(*a)
    yield "means", means
    yield "many samples", many_samples
    yield "many channels", many_channels
    yield "self-tests", self_tests_pass


if __name__ == "__main__":
    sys.exit(reporting.run(cases()))
