"""fast_gru's persistent kernels, unchanged, thread by thread on a CPU: numerics, schedules, sanitizers, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.cuda_host.harness import LaunchError, Machine
from tests.ops.fast_gru_inputs import inputs
from tests.tolerance import assert_close_to_reference

BF16, FP16 = torch.bfloat16, torch.float16


def rows(sequence: Tensor) -> Tensor:
    """[K, rows, features] of [N,K,features,L,H,W]."""
    return sequence.permute(1, 0, 3, 4, 5, 2).reshape(sequence.shape[1], -1, sequence.shape[2]).contiguous()


def check(
    machine: Machine, shape: tuple[int, ...], hidden: int, dtype: torch.dtype, save: bool, cluster: int = 1
) -> dict[str, Tensor]:
    """o, the last state and what is saved against the reference; the library's products are made here."""
    tensors = inputs(shape, hidden, dtype)
    x, ux, uo, w, vx, vo, o0 = tensors
    n, k, c, *positions = shape
    low = [rows(x).float() @ weight.float().T for weight in (ux, vx)]
    given = {"hidden": low[0].to(dtype), "candidate": low[1].to(dtype)}
    state = rows(o0.unsqueeze(1))[0].float()
    # Clips of a longer sequence: neighbours in time and sample must not be written.
    around = torch.full((n, k + 1, *positions, c), 7.0, dtype=dtype)
    out = around[:, :k]
    out.fill_(torch.nan)
    saved = {name: torch.full((k, state.shape[0], c), torch.nan, dtype=dtype) for name in "rz"} if save else {}
    tensors = {"uo": uo, "w": w, "vo": vo, **given, **saved, "state": state, "out": out}
    sizes = {"rows": state.shape[0], "C": c, "R": hidden, "steps": k, "positions": state.shape[0] // n}
    machine.call("fast_gru_steps", tensors, **sizes, cluster=cluster)
    assert (around[:, k] == 7).all()

    # Both start from the rounded products with x, which are the library's business.
    def run(to: torch.dtype) -> dict[str, Tensor]:
        o, results = rows(o0.unsqueeze(1))[0].to(to), []
        hx, cx = (given_.to(to) for given_ in (low[0].to(dtype), low[1].to(dtype)))
        for step in range(k):
            h = torch.relu(hx[step] + o @ uo.to(to).T)
            r, z = (torch.sigmoid(half @ gate.to(to).T) for half, gate in zip(h.chunk(2, 1), w, strict=True))
            candidate = torch.tanh(cx[step] + (r * o) @ vo.to(to).T)
            o = (1 - z) * o + z * candidate
            results.append((h, candidate, r, z, o))
        stacked = [torch.stack(values) for values in zip(*results, strict=True)]
        return dict(zip(("hidden", "candidate", "r", "z", "out"), stacked, strict=True)) | {"state": o}

    exact, eager = run(torch.float64), run(dtype)
    got = {**given, **saved, "state": state, "out": rows(out.movedim(-1, 2))}
    for name in ("out", "state", *(("hidden", "candidate", "r", "z") if save else ())):
        assert_close_to_reference(got[name], exact[name], eager[name], name)
    if not save:
        assert torch.equal(given["hidden"], low[0].to(dtype)) and torch.equal(given["candidate"], low[1].to(dtype))
    return got


def check_backward(machine: Machine, shape: tuple[int, ...], hidden: int, dtype: torch.dtype, grad: bool) -> None:
    """The gradients of the gates of all steps and of the first state, from given gates and states."""
    _, _, uo, w, _, vo, _ = inputs(shape, hidden, dtype)
    n, k, c, *positions = shape
    m = n * positions[0] * positions[1] * positions[2]
    sizes = {"hidden": 2 * hidden, "r": c, "z": c, "candidate": c, "before": c}
    given = {name: torch.randn(k, m, size) for name, size in sizes.items()}
    given["hidden"].relu_(), given["r"].sigmoid_(), given["z"].sigmoid_(), given["candidate"].tanh_()
    given = {name: value.to(dtype) for name, value in given.items()}
    last = torch.randn(m, c)
    # Clips of a longer sequence, channels innermost.
    around = torch.randn(n, k + 1, *positions, c).to(dtype)
    got = {name: torch.full((k, m, c), torch.nan, dtype=dtype) for name in ("dc", "dr", "dz", "gated")}
    got |= {"du": torch.full((k, m, 2 * hidden), torch.nan, dtype=dtype), "carry": last.clone()}
    tensors = {"uo": uo, "w": w, "vo": vo, **given, **got, "grad": around[:, :k] if grad else None}
    machine.call("fast_gru_steps_backward", tensors, rows=m, C=c, R=hidden, steps=k, positions=m // n)

    def run(to: torch.dtype) -> dict[str, Tensor]:
        h, r, z, candidate, before = (value.to(to) for value in given.values())
        grads = rows(around[:, :k].movedim(-1, 2)).to(to)
        carry, results = last.to(to), []
        for step in reversed(range(k)):
            g = carry + grads[step] if grad else carry
            dc = g * z[step] * (1 - candidate[step] ** 2)
            dz = g * (candidate[step] - before[step]) * z[step] * (1 - z[step])
            q = dc @ vo.to(to)
            dr = q * before[step] * r[step] * (1 - r[step])
            du = torch.cat([d @ gate.to(to) for d, gate in zip((dr, dz), w, strict=True)], 1) * (h[step] > 0)
            carry = g * (1 - z[step]) + q * r[step] + du @ uo.to(to)
            results.append((dc, dr, dz, r[step] * before[step], du))
        stacked = [torch.stack(values[::-1]) for values in zip(*results, strict=True)]
        return dict(zip(got, [*stacked, carry], strict=True))

    exact, eager = run(torch.float64), run(dtype)
    for name, value in got.items():
        assert_close_to_reference(value, exact[name], eager[name], name)


CLUSTERS = {"architecture": 90, "multiprocessors": 25, "shared_bytes": 227 * 1024}

# Two units per block; odd sizes and a partly empty last block; more hidden units than others, fewer rows than a tile;
# weights in whole words.
PROBLEMS = [
    ((2, 3, 40, 1, 3, 5), 10, 3),
    ((1, 2, 35, 2, 3, 7), 19, 4),
    ((1, 2, 9, 1, 1, 3), 20, 4),
    ((1, 2, 40, 1, 1, 5), 24, 4),
]


@pytest.mark.parametrize(("shape", "hidden", "multiprocessors"), PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_numerics(machine, shape, hidden, multiprocessors, dtype, seed) -> None:
    machine.seed, machine.device = seed, {"multiprocessors": multiprocessors}
    check(machine, shape, hidden, dtype, save=dtype == BF16)
    assert "one launch" in machine.plan


@pytest.mark.parametrize(("shape", "hidden", "multiprocessors"), PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_backward_numerics(machine, shape, hidden, multiprocessors, dtype, seed) -> None:
    machine.seed, machine.device = seed, {"multiprocessors": multiprocessors}
    check_backward(machine, shape, hidden, dtype, grad=dtype == BF16)
    assert "one launch" in machine.plan


# One cluster with slices of one run, most blocks without outputs; three clusters, two units per block and slices of two
# runs, the last ones padding; more hidden units than others; weights in whole words.
SLICED = [((1, 3, 20, 1, 1, 3), 5), ((2, 2, 290, 1, 3, 6), 35), ((1, 2, 35, 1, 1, 2), 99), ((1, 2, 296, 1, 1, 3), 40)]


@pytest.mark.parametrize(("shape", "hidden"), SLICED, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_numerics_in_clusters(machine, shape, hidden, dtype, seed) -> None:
    machine.seed, machine.device = seed, CLUSTERS
    check(machine, shape, hidden, dtype, save=dtype == BF16, cluster=8)
    assert "in clusters of 8" in machine.plan


def test_clusters_that_the_chip_s_parts_have_room_for(machine) -> None:
    """Two of three: two units per block instead of one, or, where that is too many, blocks alone."""
    machine.device = {**CLUSTERS, "clusters": 2}
    check(machine, (1, 2, 136, 1, 1, 3), 19, BF16, save=True, cluster=8)
    assert "one launch of 16 blocks in clusters of 8" in machine.plan
    check(machine, (1, 2, 296, 1, 1, 3), 40, BF16, save=False, cluster=8)
    assert "one launch of 19 blocks, weights" in machine.plan
    machine.device = {**CLUSTERS, "clusters": 0}
    check(machine, (1, 2, 136, 1, 1, 3), 19, BF16, save=False, cluster=8)
    assert "one launch of 17 blocks, weights" in machine.plan


def test_in_clusters_schedules_do_not_matter(machine, seed) -> None:
    """Every bit: partial sums are added in the order of the ranks, whoever pushes first."""
    results = []
    for index in range(3):
        machine.seed, machine.device = seed + index, CLUSTERS
        torch.manual_seed(seed)
        results.append(check(machine, (1, 2, 40, 1, 1, 3), 9, BF16, save=False, cluster=8))
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_many_runs_of_inputs_for_every_warp(machine) -> None:
    machine.device = {"multiprocessors": 20}
    check(machine, (1, 2, 300, 1, 1, 3), 33, BF16, save=True)
    check_backward(machine, (1, 2, 300, 1, 1, 3), 33, BF16, grad=True)


def test_schedules_do_not_matter(machine, seed) -> None:
    plans = set()
    for index, multiprocessors in itertools.product(range(2), (2, 3)):
        machine.seed, machine.device = seed + index, {"multiprocessors": multiprocessors}
        check(machine, (1, 2, 24, 1, 2, 3), 6, BF16, save=False)
        check_backward(machine, (1, 2, 24, 1, 2, 3), 6, BF16, grad=False)
        plans.add(machine.plan)
    assert len(plans) == 2


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_have_nothing_to_report(machine_with, sanitizer, seed) -> None:
    machine = machine_with(sanitizer, seed=seed, device={"multiprocessors": 3})
    check(machine, (1, 2, 20, 1, 1, 3), 5, BF16, save=True)
    check_backward(machine, (1, 2, 20, 1, 1, 3), 5, BF16, grad=True)
    machine.device = CLUSTERS
    check(machine, (1, 2, 20, 1, 1, 3), 5, BF16, save=True, cluster=8)


def test_what_does_not_fit_is_refused_with_the_reason(machine) -> None:
    machine.device = {"multiprocessors": 2}
    with pytest.raises(LaunchError, match="5 and 4 units of 8 outputs for 2 multiprocessors"):
        check(machine, (2, 2, 40, 1, 1, 3), 10, BF16, save=False)
    machine.device = {"multiprocessors": 4, "shared_bytes": 48 * 1024}
    with pytest.raises(LaunchError, match="bytes of shared memory, of 49152"):
        check(machine, (1, 2, 40, 1, 1, 3), 10, BF16, save=False)
    machine.device = {**CLUSTERS, "architecture": 80}
    with pytest.raises(LaunchError, match="clusters are for forward passes on sm_90"):
        check(machine, (1, 2, 40, 1, 1, 3), 10, BF16, save=False, cluster=8)
    machine.device = {"multiprocessors": 4, "shared_bytes": 47 * 1024}
    with pytest.raises(LaunchError, match="bytes of shared memory, of 48128"):
        check_backward(machine, (1, 2, 40, 1, 1, 3), 10, BF16, grad=False)
