"""How the CUDA kernels cut a scan, for GPUs that are not there: who reads and writes what, asked of rcu_ops._native.

The loops that are walked are the kernels' own (csrc/common/recurrent_conv_index.h), compiled for the host.
"""

from __future__ import annotations

import itertools
import random
import types
from typing import Any

import pytest
import torch

from rcu_ops import _library
from rcu_ops.ops._registry import OPERATORS

native = _library.native()
pytestmark = pytest.mark.skipif(native is None, reason="rcu_ops._native was not built for this Python")

DTYPES = ("float64", "float32", "bfloat16", "float16")
GPUS = (
    {"architecture": 80, "multiprocessors": 108, "shared_bytes": 163 * 1024},
    {"architecture": 86, "multiprocessors": 10, "shared_bytes": 99 * 1024},
    {"architecture": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024},
    {"architecture": 80, "multiprocessors": 2, "shared_bytes": 48 * 1024},
)


def int64s(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int64) if data else torch.zeros(0, dtype=torch.int64)


def strides(shape: tuple[int, ...], order: tuple[int, ...], gap: int = 0) -> tuple[int, ...]:
    """Of a tensor whose dimensions lie in memory in ``order``, the last one innermost, ``gap`` between its rows."""
    found, step = [0] * 5, 1
    for position, dimension in enumerate(reversed(order)):
        found[dimension] = step
        step = step * max(1, shape[dimension]) + (gap if position == 0 else 0)
    return tuple(found)


def offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Of every element, in [n, c, t, h, w]."""
    total = torch.zeros(shape, dtype=torch.int64)
    for dimension, (size, step) in enumerate(zip(shape, stride, strict=True)):
        total += (torch.arange(size) * step).view([-1 if d == dimension else 1 for d in range(5)])
    return total


CHANNELS = (1, 2, 3, 7, 8, 16, 24, 31, 32, 33, 48, 64, 65, 100, 128, 129, 160, 200, 256, 260)


def random_problem(rng: random.Random, channels: tuple[int, ...] = CHANNELS) -> dict[str, object]:
    c = rng.choice(channels)
    shape = (
        rng.randint(0, 4),
        c,
        rng.randint(1, 3),
        rng.choice([0, 1, 2, 3, 5, 7, 8]),
        rng.choice([1, 2, 3, 4, 7, 8, 9]),
    )
    orders = [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 2, 1, 3, 4), (0, 1, 2, 4, 3)]
    x_order = rng.choice(orders)
    return {
        "shape": shape,
        "dtype": rng.choice(DTYPES),
        "x": strides(shape, x_order, rng.choice([0, 0, 1, 2, 8])),
        "y": strides(shape, x_order if rng.random() < 0.8 else rng.choice(orders), rng.choice([0, 0, 8])),
        "misalignment": rng.choice([0, 0, 2, 4, 8]),
        "with_state": rng.random() < 0.5,
        "reverse": rng.random() < 0.5,
        "plain": rng.random() < 0.2,
        **rng.choice(GPUS),
    }


def road_that_touches_all_once(problem: dict[str, object]) -> str:
    """Walk over all blocks; the name of the kernel that the plan takes."""
    plan = native.recurrent_conv_gpu_plan(**problem, end=2**31)
    for name, stride in (("read", problem["x"]), ("written", problem["y"])):
        touched = int64s(plan[name]).sort().values
        assert torch.equal(touched, offsets(problem["shape"], stride).flatten().sort().values), (problem, name)
    assert plan["shared_bytes"] <= problem["shared_bytes"], problem
    return plan["text"].partition(":")[0]


@pytest.mark.parametrize("part", range(8))
def test_every_element_is_read_and_written_once(part, seed) -> None:
    """Blocks together read every element of x and write every element of y, once each and nothing else."""
    rng = random.Random(seed)
    roads: set[str] = set()
    for _ in range(250):
        problem = random_problem(rng)
        roads.add(road_that_touches_all_once(problem))
    assert roads >= {"plain", "tile", "wide", "step"}


def test_every_element_is_read_and_written_once_in_fp32(seed) -> None:
    rng = random.Random(seed)
    roads = []
    for _ in range(100):
        problem = random_problem(rng, (8, 9, 16, 33, 64, 100, 128)) | {"dtype": "float32", "plain": False}
        problem |= {"multiprocessors": rng.choice([1, 1, 3]), "shared_bytes": 163 * 1024}
        roads.append(road_that_touches_all_once(problem))
    assert roads.count("fp32") > 20


def test_every_element_is_read_and_written_once_by_warpgroups(seed) -> None:
    rng = random.Random(seed)
    roads = []
    for _ in range(100):
        problem = random_problem(rng, (129, 130, 132, 136, 160, 200, 256)) | GPUS[2]
        problem |= {"dtype": "bfloat16", "plain": False, "warpgroups": True}
        roads.append(road_that_touches_all_once(problem))
    assert roads.count("hopper") > 20


LARGE = [
    ((9, 64, 64, 270, 270), "bfloat16"),
    ((2, 128, 40, 480, 481), "float16"),
    ((3, 256, 30, 310, 313), "bfloat16"),
    ((70000, 64, 16, 7, 7), "float32"),
    ((9, 64, 1, 2000, 2000), "bfloat16"),  # one frame after a state, where channels are contiguous by words
]


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1)], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "dtype"), LARGE, ids=str)
def test_offsets_of_more_than_2_to_the_31_elements(shape, dtype, order, seed) -> None:
    n, c, t, h, w = shape
    assert n * c * t * h * w > 2**31
    rng = random.Random(seed)
    stride = strides(shape, order)
    problem = {"shape": shape, "dtype": dtype, "x": stride, "y": stride, "with_state": t == 1, **GPUS[2]}
    whole = native.recurrent_conv_gpu_plan(**problem)
    blocks = whole["blocks"]
    assert ("by words of contiguous channels" in whole["text"]) == (t == 1 and stride[1] == 1)
    columns = -(-n * h * w // blocks)
    columns += -columns % 8  # of a block, which takes a multiple of 8
    for block in [0, blocks - 1, *(rng.randrange(blocks) for _ in range(3))]:
        plan = native.recurrent_conv_gpu_plan(**problem, begin=block, end=block + 1)
        column = torch.arange(block * columns, min((block + 1) * columns, n * h * w))
        at = column // (h * w) * stride[0] + column // w % h * stride[3] + column % w * stride[4]
        at = at.view(-1, 1, 1) + (torch.arange(c) * stride[1]).view(-1, 1) + torch.arange(t) * stride[2]
        for name in ("read", "written"):
            assert torch.equal(int64s(plan[name]).sort().values, at.flatten().sort().values)
    assert at.max() == n * c * t * h * w - 1 or block != blocks - 1


@pytest.mark.parametrize("part", range(4))
def test_rows_of_the_weight_gradient(part, seed) -> None:
    """Every frame with a state before it, at every position, once: dx of the frame beside the state before it."""
    rng = random.Random(seed)
    for _ in range(250):
        shape = (rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 5))
        order = rng.choice([(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 2, 1, 4, 3)])
        dx, h, first = (strides(shape, order, rng.choice([0, 3])) for _ in range(3))
        given, reverse = rng.random() < 0.5, rng.random() < 0.5
        plan = native.recurrent_conv_gpu_weight_grad(
            shape, rng.choice(DTYPES), dx, h, first if given else None, reverse=reverse, end=2**40
        )
        frames = list(range(shape[2]))[:: -1 if reverse else 1]
        of_dx, of_h, of_first = (offsets(shape, s)[:, 0] for s in (dx, h, first))  # [n, t, h, w]
        want = [(of_dx[:, t], of_h[:, before]) for before, t in itertools.pairwise(frames)]
        if given:
            want.append((of_dx[:, frames[0]], -1 - of_first[:, 0]))
        pairs = torch.cat([torch.stack([a.flatten(), b.flatten()], 1) for a, b in want] or [torch.zeros(0, 2).long()])
        got = torch.stack([int64s(plan["dx"]), int64s(plan["before"])], 1)
        assert plan["rows"] == len(pairs) == len(got)
        assert sorted(got.tolist()) == sorted(pairs.tolist())
        assert plan["splits"] == 1 or (plan["splits"] - 1) * plan["rows_per_split"] < plan["rows"]
        assert plan["splits"] * plan["rows_per_split"] >= plan["rows"]


@pytest.mark.parametrize("part", range(4))
def test_blocks_of_the_weight_gradient_read_their_rows_and_channels(part, seed) -> None:
    """A block of the matrix unit's kernel reads its rows and channels of dx and the states once, in aligned words."""
    rng = random.Random(seed)
    roads: set[str] = set()
    for _ in range(40):
        shape = (
            *(rng.randint(1, 4), rng.choice([1, 8, 20, 33, 64, 65, 72, 128, 130, 264]), rng.randint(1, 5)),
            *(rng.choice([1, 3, 4, 7, 8]), rng.choice([1, 2, 5, 8])),
        )
        order = rng.choice([(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 2, 1, 3, 4)])
        dx, h = (strides(shape, order, rng.choice([0, 0, 8, 2])) for _ in range(2))
        first = strides(shape, rng.choice([(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (0, 2, 1, 4, 3)]))
        problem = {
            **{"shape": shape, "dtype": rng.choice(DTYPES[2:]), "dx": dx, "h": h},
            **{"first": first if rng.random() < 0.5 else None, "reverse": rng.random() < 0.5},
            "misalignment": rng.choice([0, 0, 2, 4, 8]),
        }
        plan = native.recurrent_conv_gpu_weight_grad(**problem, end=2**40)
        assert plan["shared_bytes"] <= 64 * 1024  # of every GPU from sm_80 on
        roads.add(plan["text"].partition(":")[0])
        if plan["text"].startswith("plain"):
            continue
        tile, split = rng.randrange(plan["tiles"]), rng.randrange(plan["splits"])
        got = native.recurrent_conv_gpu_weight_grad(**problem, block=(tile, split))
        rows = slice(split * plan["rows_per_split"], (split + 1) * plan["rows_per_split"])
        per_side = -(-shape[1] // plan["tile"])
        for name, side, step in (("dx", tile // per_side, dx[1]), ("before", tile % per_side, h[1])):
            channel = torch.arange(side * plan["tile"], min((side + 1) * plan["tile"], shape[1]))
            at = int64s(plan[name])[rows].unsqueeze(1)
            want = torch.where(at >= 0, at + channel * step, at - channel * first[1]).flatten().sort().values
            assert torch.equal(int64s(got[f"block_{name.replace('before', 'states')}"]).sort().values, want), problem
    assert roads == {"matrix", "plain"}


def test_splits_of_the_weight_gradient_fill_a_gpu_and_stay_short() -> None:
    for c, n, t, size, text in (
        (64, 16, 16, 56, "matrix: 1 tiles of 64 x 64 x 523 splits of 1440 rows, along channels by 16 bytes"),
        (256, 16, 16, 14, "matrix: 4 tiles of 128 x 128 x 64 splits of 736 rows, along channels by 16 bytes"),
        (128, 64, 64, 56, "matrix: 1 tiles of 128 x 128 x 772 splits of 16384 rows, along channels by 16 bytes"),
    ):
        shape = (n, c, t, size, size)
        stride = strides(shape, (0, 2, 3, 4, 1))
        plan = native.recurrent_conv_gpu_weight_grad(shape, "bfloat16", stride, stride)
        assert plan["text"] == text
        assert plan["scratch_bytes"] == 4 * c * c * plan["splits"]
        small = native.recurrent_conv_gpu_weight_grad(shape, "bfloat16", stride, stride, shared_bytes=20 * 1024)
        assert small["text"].endswith("(not the matrix unit: too little shared memory)")


def test_when_the_scan_adds_up_the_weight_gradient() -> None:
    """A matter of shape and strides alone: no GPU's sums are in another order than another's."""

    def parts(shape: tuple[int, ...], dtype: str = "bfloat16", **options: Any) -> int:
        x = torch.empty(shape, device="meta").stride()
        residual = options.pop("h", x)
        return native.recurrent_conv_gpu_plan(
            shape, dtype, x, x, residual=residual, reverse=True, **{"weight_sums": True, **options}
        )["weight_parts"]

    assert parts((16, 64, 16, 56, 56)) == parts((16, 20, 4, 56, 56), "float16") == 16 * 56 * 56 // 128
    assert parts((16, 64, 16, 56, 56), weight_sums=False) == 0
    for least in (4, 128):
        assert parts((1, 64, least, 127, 128)) == 0
        assert parts((1, 64, least, 128, 128)) == 128
    assert [parts((1, 64, frames, 128, 128)) for frames in (3, 129)] == [0, 0]
    assert parts((1, 65, 16, 128, 128)) == 0
    assert parts((1, 64, 16, 128, 128), "float32") == 0
    assert parts((1, 64, 16, 128, 128), statistics=True) == 0
    columns_last = torch.empty(1, 128, 128, 64, 16, device="meta").permute(0, 3, 4, 1, 2).stride()
    assert parts((1, 64, 16, 128, 128), h=columns_last) == 0  # neither way contiguous in all
    found = {parts((1, 64, 16, 130, 127), multiprocessors=many, architecture=90) for many in (16, 108, 132, 500)}
    assert found == {-(-130 * 127 // 128)}


def test_the_weight_gradient_of_more_than_2_to_the_31_elements() -> None:
    shape = (9, 64, 64, 270, 270)
    stride = strides(shape, (0, 1, 2, 3, 4))
    rows = 9 * 63 * 270 * 270
    plan = native.recurrent_conv_gpu_weight_grad(shape, "bfloat16", stride, stride, begin=rows - 2, end=rows + 5)
    last = 8 * stride[0] + 63 * stride[2] + 269 * stride[3] + 269
    assert last > 2**31
    assert int64s(plan["dx"]).tolist() == [last - 1, last]
    assert int64s(plan["before"]).tolist() == [last - 1 - stride[2], last - stride[2]]


def test_words_for_people() -> None:
    x = torch.empty(16, 64, 16, 56, 56, device="meta")
    problem = {"shape": x.shape, "x": x.stride(), "y": x.stride(), **GPUS[2]}
    assert native.recurrent_conv_gpu_plan(dtype="bfloat16", **problem)["text"].startswith(
        "tile: 392 blocks of 4 x 32 columns, channels padded to 64, along columns by 16 bytes"
    )
    text = native.recurrent_conv_gpu_plan(dtype="float32", **problem)["text"]
    assert text.startswith("fp32: 784 blocks of 64 columns, 8 channels x 4 columns per thread, x by words along")
    text = native.recurrent_conv_gpu_plan(dtype="float64", **problem)["text"]
    assert text.startswith("plain: 784 blocks of 64 columns, W resident")
    assert "the matrix unit is used for 16-bit data" in text
    for samples, words in (
        (16, "wide: 131 blocks of 24 columns, W in registers, along columns by 8 bytes, 4 stages (not by warpgroups: "),
        (1024, "hopper: 1568 blocks of 2 x 64 columns, W in shared memory, along columns by 8 bytes"),
    ):
        x = torch.empty(samples, 256, 8, 14, 14, device="meta")
        plan = native.recurrent_conv_gpu_plan(x.shape, "bfloat16", x.stride(), x.stride(), **GPUS[2])
        assert plan["text"].startswith(words)
        assert plan["shared_bytes"] <= 227 * 1024


def test_reading_the_weight_counts_in_short_clips() -> None:
    for frames, kernel in ((2, "hopper"), (16, "wide")):
        x = torch.empty(40, 256, frames, 14, 14, device="meta")
        text = native.recurrent_conv_gpu_plan(x.shape, "bfloat16", x.stride(), x.stride(), **GPUS[2])["text"]
        assert text.startswith(kernel)


def chunk_plan(
    shape: tuple[int, ...], dtype: str, gpu: dict[str, int] = GPUS[2], **options: object
) -> dict[str, object]:
    stride = strides(shape, (0, 2, 3, 4, 1))
    return native.recurrent_conv_gpu_plan(shape, dtype, stride, stride, **gpu, **options)


def test_long_clips_of_few_positions_are_cut_into_chunks() -> None:
    """Where the scan's frames, one after the other, are predicted to take longer than products over all chunks."""
    for shape, dtype in (
        ((1, 512, 256, 7, 7), "bfloat16"),
        ((1, 512, 256, 7, 7), "float32"),
        ((1, 64, 2048, 7, 7), "float16"),
    ):
        plan = chunk_plan(shape, dtype)
        assert plan["chunk"] >= 4 and 2 * plan["chunk"] <= shape[2]
        assert 0 < 1.2 * plan["chunked_us"] < plan["sequential_us"]
        chunks = -(-shape[2] // plan["chunk"])
        assert plan["text"].startswith(
            f"chunked: {chunks} chunks of {plan['chunk']} frames side by side by the library, "
        )
        assert f"{plan['chunk'] + chunks - 2} products one after the other instead of {shape[2]}" in plan["text"]
        assert f"predicted {plan['chunked_us']:.0f} us instead of {plan['sequential_us']:.0f} us" in plan["text"]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 512, 256, 7, 7), "float64", "fp64 is not cut into chunks"),
        ((1, 512, 8, 7, 7), "bfloat16", "too few frames for chunks"),
        ((0, 512, 256, 7, 7), "bfloat16", "no positions"),
        ((1, 9000, 16, 1, 1), "bfloat16", "states and powers of W would take more than 1 GiB"),
        ((16, 64, 16, 56, 56), "bfloat16", "predicted "),
        ((8, 512, 16, 14, 14), "float32", "predicted "),
    ],
    ids=str,
)
def test_why_not_in_chunks(shape, dtype, reason) -> None:
    plan = chunk_plan(shape, dtype)
    assert plan["chunk"] == 0
    assert f"; one frame after the other: {reason}" in plan["text"]


def test_chunks_that_are_hardly_faster_are_refused_in_these_words() -> None:
    near = 0
    for frames in range(16, 256, 8):
        plan = chunk_plan((1, 512, frames, 7, 7), "bfloat16")
        faster = plan["chunked_us"] < plan["sequential_us"]
        assert ("not a fifth less" in plan["text"]) == (faster and plan["chunk"] == 0)
        near += faster and plan["chunk"] == 0
    assert near


def test_chunks_follow_what_the_device_is_good_at() -> None:
    """Powers of W are made in fp64, which small GPUs hardly have; and the forms cross once, as the clip gets longer."""
    shape = (1, 512, 256, 7, 7)
    assert chunk_plan(shape, "bfloat16", GPUS[2])["chunk"] and not chunk_plan(shape, "bfloat16", GPUS[1])["chunk"]
    for dtype in ("float32", "bfloat16"):
        taken = [chunk_plan((1, 512, t, 7, 7), dtype)["chunk"] > 0 for t in (16, 32, 64, 128, 256, 512, 1024, 4096)]
        assert taken == sorted(taken) and taken[-1] and taken[0] == (dtype == "float32")  # the plain scan is slow
        taken = [chunk_plan((n, 512, 256, 7, 7), dtype)["chunk"] > 0 for n in (1, 4, 16, 64, 256)]
        assert taken == sorted(taken, reverse=True) and taken[0] and not taken[-1]


def test_chunks_where_powers_of_the_weight_are_kept() -> None:
    """They are then longer, and predicted to be faster by more than what the powers cost at the old length."""
    for dtype, gain in (("bfloat16", 0.8), ("float32", 0.82)):
        made, kept = (chunk_plan((1, 512, 256, 7, 7), dtype, powers_kept=k) for k in (False, True))
        assert kept["chunk"] > made["chunk"] > 0
        assert kept["chunked_us"] < gain * made["chunked_us"] and kept["sequential_us"] == made["sequential_us"]
    made, kept = (chunk_plan((1, 1024, 64, 7, 7), "bfloat16", powers_kept=k) for k in (False, True))
    assert made["chunk"] == 0 < kept["chunk"]


def test_few_positions_are_spread_over_blocks_of_fewer_warps() -> None:
    """The fewest columns on the busiest multiprocessor of 132; of equals, the most warps: fewest copies of W."""
    for shape, words in (
        ((16, 64, 16, 56, 56), "tile: 392 blocks of 4 x 32 columns"),  # three blocks of 128 on the busiest
        ((16, 128, 16, 28, 28), "tile: 392 blocks of 2 x 16 columns"),  # three of 32, against two of 64
        ((1, 64, 16, 56, 56), "tile: 98 blocks of 1 x 32 columns"),
        ((1, 64, 16, 112, 112), "tile: 392 blocks of 1 x 32 columns"),
        ((1, 128, 16, 28, 28), "tile: 49 blocks of 1 x 16 columns"),
        ((1, 32, 16, 160, 132), "tile: 660 blocks of 1 x 32 columns"),  # five of 32, against three of 64
        ((1, 32, 16, 160, 264), "tile: 330 blocks of 4 x 32 columns"),  # not five of 64: 10 warps are too many
    ):
        assert chunk_plan(shape, "bfloat16")["text"].startswith(words), chunk_plan(shape, "bfloat16")["text"]


def test_which_scans_take_batch_normalisation() -> None:
    """Those of up to 256 channels on the matrix unit, and the one in fp32; not by warpgroups, which then are not taken;
    not where frames are cut into chunks."""
    for shape, dtype, columns in (
        ((16, 64, 16, 56, 56), "bfloat16", 32),
        ((16, 128, 16, 28, 28), "float16", 16),
        ((16, 256, 16, 14, 14), "bfloat16", 24),
        ((1024, 256, 8, 14, 14), "bfloat16", 24),
        ((16, 64, 16, 56, 56), "float32", 32),
        ((2, 64, 8, 40, 40), "float32", 16),
        ((16, 256, 16, 14, 14), "float32", 0),
        ((16, 512, 16, 7, 7), "bfloat16", 0),
        ((1, 64, 2048, 7, 7), "bfloat16", 0),
    ):
        plan, without = chunk_plan(shape, dtype, statistics=True), chunk_plan(shape, dtype)
        assert plan["norm_columns"] == columns
        assert plan["text"].endswith(f"of parts of {columns} columns" if columns else "in a pass of their own")
        assert plan["shared_bytes"] <= GPUS[2]["shared_bytes"]
        if without["text"].startswith("hopper"):
            assert "(not by warpgroups: they take no part of batch normalisation)" in plan["text"]
            continue
        assert plan["blocks"] == without["blocks"]
        assert columns == 0 or plan["shared_bytes"] > without["shared_bytes"]
        assert "statistics" not in without["text"]


def test_the_gpu_tests_have_a_problem_in_chunks() -> None:
    from tests.gpu.problems import SCANS

    shape, _ = SCANS["many chunks"]
    for dtype in ("float32", "bfloat16", "float16"):
        assert chunk_plan(shape, dtype)["chunk"] > 0


def test_explain_asks_for_the_device_s_plan(monkeypatch) -> None:
    """The tensors' addresses, strides and optional arguments count, and so do the device's limits."""
    device = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    x, weight = torch.empty(2, 64, 4, 8, 8, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
    plan = OPERATORS["recurrent_conv"].backend("cuda").plan
    short = "; one frame after the other: too few frames for chunks"
    many = torch.empty(6, 64, 4, 56, 56, dtype=torch.bfloat16)
    beside = "; gradient of the weight: added up by the scan backwards in time, in 147 parts"
    assert plan(many, weight.detach().requires_grad_(), None, False, False).endswith(beside)
    assert plan(x, weight, None, False, False).endswith(f"along columns by 16 bytes, 3 stages{short}")
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    assert plan(shifted, weight, None, False, True).endswith(f"along columns by 2 bytes, 3 stages{short}")
    fused = OPERATORS["recurrent_conv_affine_act"].backend("cuda").plan
    mixed = x.to(memory_format=torch.channels_last_3d)
    text = fused(mixed, weight, torch.ones(64), torch.ones(64), None, x, False, True)
    assert "neither channels nor positions are contiguous" in text


def test_explain_says_how_the_weight_s_gradient_is_summed_up(monkeypatch) -> None:
    device = types.SimpleNamespace(major=8, minor=0, multi_processor_count=108, shared_memory_per_block=163 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    x, weight = torch.empty(2, 64, 4, 8, 8, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.bfloat16)
    h0 = torch.empty(2, 64, 8, 8)
    plan = OPERATORS["recurrent_conv"].backend("cuda").plan
    assert "gradient of the weight" not in plan(x, weight, h0, False, False)
    text = plan(x, weight.requires_grad_(), h0, False, False)
    assert "; gradient of the weight: matrix: 1 tiles of 64 x 64 x 2 splits of 256 rows" in text
    fused = OPERATORS["recurrent_conv_batch_norm"].backend("cuda").plan
    text = fused(x, weight, h0, None, None, None, False, 1e-5, True, "")
    assert "; batch normalisation's statistics on the way out, of parts of 32 columns; gradient of the weight: " in text
    with torch.no_grad():
        assert "gradient of the weight" not in plan(x, weight, h0, False, False)


@pytest.mark.parametrize("built", [True, False])
def test_explain_knows_whether_the_library_has_code_for_sm_90a(built, monkeypatch) -> None:
    device = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(_library, "build_record", lambda: {"architectures": ["sm_80"] + ["sm_90a"] * built})
    x, weight = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((1024, 256, 8, 14, 14), (256, 256)))
    text = OPERATORS["recurrent_conv"].backend("cuda").plan(x, weight, None, False, False)
    assert text.startswith("hopper") == built
    assert ("(not by warpgroups: the library has no code for sm_90a)" in text) != built


@pytest.mark.parametrize(
    ("change", "message"), [({"shape": (1, 0, 1, 1, 1)}, "shape: expected"), ({"dtype": "int8"}, "dtype: expected")]
)
def test_wrong_arguments(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        native.recurrent_conv_gpu_plan(
            **({"shape": (1, 1, 1, 1, 1), "dtype": "float32", "x": [1] * 5, "y": [1] * 5} | change)
        )
