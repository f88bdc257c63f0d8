"""fast_gru's kernels by columns, unchanged, thread by thread on a CPU: numerics, layouts, sanitizers, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda_host.harness import LaunchError, Machine
from tests.ops.fast_gru_inputs import inputs
from tests.tolerance import assert_close_to_reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """[steps, samples, positions, features] full of NaN with adjacent features or columns, in a longer sequence."""
    k, n, p, f = shape
    if layout == "features":
        return torch.full((n, k + 1, p, f), torch.nan, dtype=dtype)[:, :k].transpose(0, 1)
    return torch.full((n, k + 1, f, p), torch.nan, dtype=dtype)[:, :k].permute(1, 0, 3, 2)


def assert_rest_untouched(tensors: dict[str, Tensor]) -> None:
    """The clip after the last one of every sequence from laid_out is as it was."""
    for name, tensor in tensors.items():
        assert tensor._base is not None and tensor._base[:, tensor.shape[0] :].isnan().all(), name


def check(
    machine: Machine, shape: tuple[int, int, int, int], hidden: int, dtype: torch.dtype, layout: str, save: bool,
    start_dtype: torch.dtype = torch.float32, given: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Against the reference; ``shape``: samples, steps, C, positions; ``given``: the products with x."""
    n, k, c, p = shape
    x, ux, uo, w, vx, vo, o0 = inputs((n, k, c, 1, 1, p), hidden, dtype)

    def of(sequence: Tensor) -> Tensor:  # [K,N,P,C] of [N,K,C,1,1,P]
        return sequence.flatten(3).permute(1, 0, 3, 2)

    products = {"hidden": ux, "candidate": vx}
    rows = of(x)
    start = of(o0.unsqueeze(1)).to(start_dtype)
    tensors: dict[str, Tensor] = {}
    if save or given:
        tensors = {name: laid_out((k, n, p, len(weight)), dtype, layout) for name, weight in products.items()}
    if given:
        for name, weight in products.items():
            tensors[name].copy_(rows.float() @ weight.float().T)
    else:
        tensors["x"] = laid_out((k, n, p, c), dtype, layout).copy_(rows)
    before = {name: value.clone() for name, value in tensors.items()}
    if start_dtype == dtype:
        tensors["first"] = laid_out((1, n, p, c), dtype, layout)
    tensors |= {"start": laid_out((1, n, p, c), start_dtype, layout).copy_(start)}
    tensors |= {name: laid_out((k, n, p, c), dtype, layout) for name in ("r", "z", "out") if save or name == "out"}
    tensors["last"] = laid_out((1, n, p, c), FP32, layout)
    sizes = {"samples": n, "positions": p, "C": c, "R": hidden, "steps": k}
    weights = {"uo": uo, "w": w, "vo": vo} if given else {"uo": uo, "w": w, "vo": vo, "ux": ux, "vx": vx}
    machine.call("fast_gru_columns", weights | tensors, **sizes)
    assert f"one launch of {-(-n * p // 8)} blocks of 8 columns" in machine.plan
    assert ("and those of x" in machine.plan) == (not given)
    assert_rest_untouched(tensors)

    def run(to: torch.dtype) -> dict[str, Tensor]:
        o, results = start[0].to(to), []
        for step in range(k):
            of_x = [before[name][step].to(to) if given else rows[step].to(to) @ weight.to(to).T
                    for name, weight in products.items()]  # fmt: skip
            h = torch.relu(of_x[0] + o @ uo.to(to).T)
            r, z = (torch.sigmoid(part @ gate.to(to).T) for part, gate in zip(h.chunk(2, -1), w, strict=True))
            candidate = torch.tanh(of_x[1] + (r * o) @ vo.to(to).T)
            o = (1 - z) * o + z * candidate
            results.append((h, candidate, r, z, o))
        names = ("hidden", "candidate", "r", "z", "out")
        return dict(zip(names, map(torch.stack, zip(*results, strict=True)), strict=True)) | {"last": o[None]}

    exact, eager = run(torch.float64), run(dtype)
    for name in ("out", "last", *(("hidden", "candidate", "r", "z") if save else ())):
        assert_close_to_reference(tensors[name], exact[name], eager[name], name)
    for name, value in before.items():
        assert torch.equal(tensors[name].nan_to_num(), value.nan_to_num()) or save, name
    if start_dtype == dtype:
        assert torch.equal(tensors["first"], tensors["start"])
    return tensors


def check_backward(
    machine: Machine, shape: tuple[int, int, int, int], hidden: int, dtype: torch.dtype, layout: str, grad: bool
) -> dict[str, Tensor]:
    """The gradients of the gates of all steps and of the first state, from given gates and states."""
    n, k, c, p = shape
    _, _, uo, w, _, vo, _ = inputs((n, k, c, 1, 1, p), hidden, dtype)
    sizes = {"hidden": 2 * hidden, "r": c, "z": c, "candidate": c, "before": c, "grad": c}
    given = {name: torch.randn(k, n, p, size) for name, size in sizes.items()}
    given["hidden"].relu_(), given["r"].sigmoid_(), given["z"].sigmoid_(), given["candidate"].tanh_()
    given = {name: value.to(dtype) for name, value in given.items()}
    tensors = {name: laid_out(value.shape, dtype, layout).copy_(value) for name, value in given.items()}
    if not grad:
        del tensors["grad"]
    last = torch.randn(1, n, p, c)
    results = {name: laid_out((k, n, p, c), dtype, layout) for name in ("dc", "dr", "dz", "gated")}
    results |= {"du": laid_out((k, n, p, 2 * hidden), dtype, layout)}
    results |= {"carry": laid_out((1, n, p, c), FP32, layout).copy_(last)}
    counts = {"samples": n, "positions": p, "C": c, "R": hidden, "steps": k}
    machine.call("fast_gru_columns_backward", {"uo": uo, "w": w, "vo": vo, **tensors, **results}, **counts)
    assert_rest_untouched(results)

    def run(to: torch.dtype) -> dict[str, Tensor]:
        h, r, z, candidate, before, grads = (value.to(to) for value in given.values())
        carry, found = last[0].to(to), []
        for step in reversed(range(k)):
            g = carry + grads[step] if grad else carry
            dc = g * z[step] * (1 - candidate[step] ** 2)
            dz = g * (candidate[step] - before[step]) * z[step] * (1 - z[step])
            q = dc @ vo.to(to)
            dr = q * before[step] * r[step] * (1 - r[step])
            du = torch.cat([d @ gate.to(to) for d, gate in zip((dr, dz), w, strict=True)], -1) * (h[step] > 0)
            carry = g * (1 - z[step]) + q * r[step] + du @ uo.to(to)
            found.append((dc, dr, dz, r[step] * before[step], du))
        stacked = [torch.stack(values[::-1]) for values in zip(*found, strict=True)]
        return dict(zip(results, [*stacked, carry[None]], strict=True))

    exact, eager = run(torch.float64), run(dtype)
    for name, value in results.items():
        assert_close_to_reference(value, exact[name], eager[name], name)
    return results


# Samples, steps, C, positions; R. Odd sizes, a block across samples, slices of every product; more pairs per thread
# than are read ahead; chains in pieces; more hidden features than others; one of everything.
PROBLEMS = [((2, 3, 19, 7), 5), ((1, 2, 140, 9), 3), ((1, 2, 9, 3), 40), ((3, 1, 1, 1), 1)]


@pytest.mark.parametrize(("shape", "hidden"), PROBLEMS, ids=str)
@pytest.mark.parametrize("layout", ["features", "columns"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_numerics(machine, shape, hidden, layout, dtype, seed) -> None:
    machine.seed = seed
    machine.device = {"shared_bytes": 227 * 1024}  # where all weights fit
    check(machine, shape, hidden, dtype, layout, save=layout == "features", start_dtype=dtype)
    check(machine, shape, hidden, dtype, layout, save=layout == "columns", given=True)
    check_backward(machine, shape, hidden, dtype, layout, grad=layout == "features")


def test_the_suite_s_sizes(machine) -> None:
    check(machine, (1, 3, 64, 20), 16, BF16, "columns", save=True)
    check_backward(machine, (1, 3, 64, 20), 16, FP32, "columns", grad=True)


def test_what_other_columns_there_are_does_not_matter(machine, seed) -> None:
    """Every bit: nor in how many launches the steps are made, nor in which order threads run."""
    found = []
    for index, (samples, seeds) in enumerate([(1, seed), (1, seed + 1)]):
        machine.seed = seeds + index
        torch.manual_seed(seed)
        found.append(check(machine, (samples, 2, 24, 10), 6, FP32, "columns", save=True))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("out", "last", "r", "z", "hidden"))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_have_nothing_to_report(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed)
    for layout in ("features", "columns"):
        check(machine, (2, 2, 20, 5), 5, BF16, layout, save=True)
        check_backward(machine, (2, 2, 20, 5), 5, FP32, layout, grad=True)


def test_what_does_not_fit_is_refused_with_the_reason(machine) -> None:
    machine.device = {"shared_bytes": 48 * 1024}
    with pytest.raises(LaunchError, match=r"columns: the weights take .* bytes of shared memory, of 49152"):
        check(machine, (1, 2, 72, 3), 18, FP32, "columns", save=False)
    with pytest.raises(LaunchError, match=r"columns: .* weights of 4 bytes, of 49152"):
        check_backward(machine, (1, 2, 140, 3), 18, FP32, "columns", grad=False)
