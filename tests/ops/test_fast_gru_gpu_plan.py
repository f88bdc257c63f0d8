"""The planners of fast_gru's one-launch kernels: what fits on which GPU, cuts, memory, and what auto takes of it."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rcu_ops import _library
from rcu_ops.ops import _planner

operator = importlib.import_module("rcu_ops.ops.fast_gru")  # the package's attribute is the function
native = _library.native()
pytestmark = pytest.mark.skipif(native is None, reason="rcu_ops._native is not built")

A100 = {"architecture": 80, "multiprocessors": 108, "shared_bytes": 163 * 1024}
H200 = {"architecture": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}


def plan(rows: int, c: int, r: int, dtype: str = "bfloat16", cluster: int = 1, **gpu: int) -> dict:
    return native.fast_gru_gpu_plan(rows, c, r, dtype, cluster=cluster, **gpu)


def test_the_paper_s_sizes() -> None:
    """C = 2048, R = 512: 131 KB of weights and 40 KB of partial sums per block fit an H200, not 108 x 163 KB."""
    found = plan(49, 2048, 512, **H200)
    assert found["why_not"] is None
    assert (found["blocks"], found["units"], found["hidden_units"]) == (128, 2, 1)
    assert found["shared_bytes"] == 16 * 4160 + 2 * 16 * 1088 + 8 * 4160 + 8 * 64 * 20 * 4 <= 227 * 1024
    refused = plan(49, 2048, 512, **A100)
    assert refused["why_not"] == "256 and 128 units of 8 outputs for 108 multiprocessors, of at most 2 each"
    assert refused["shared_bytes"] > 163 * 1024  # three units of outputs would not have fitted either
    assert "one launch of 128 blocks" in found["text"] and "not in one launch" in refused["text"]
    assert plan(49, 1024, 256, **A100)["why_not"] is None
    backward = plan(49, 2048, 512, **H200, backward=True)
    assert backward["why_not"] is None and (backward["blocks"], backward["units"]) == (128, 2)
    assert backward["shared_bytes"] == 16 * 4160 + 16 * 2112 + 8 * 4160 + 8 * 64 * 20 * 4 <= 227 * 1024
    assert plan(49, 1024, 256, **A100, backward=True)["why_not"] is None


def test_the_paper_s_sizes_in_clusters() -> None:
    """16 clusters of 8 on 132 multiprocessors, each block with 256 inputs of U_o and V_o for the outputs of all 8."""
    found = plan(49, 2048, 512, cluster=0, **H200)
    assert found["why_not"] is None and "128 blocks in clusters of 8" in found["text"]
    assert (found["cluster"], found["slice"], found["units"], found["hidden_units"]) == (8, 256, 2, 1)
    weights, received = 128 * 576 + 2 * 16 * 1088 + 64 * 576, 8 * 64 * 20 * 4
    assert found["received_at"] == weights + 8 * 64 * 20 * 4  # partial sums need more than 64 rows of a slice
    assert found["shared_bytes"] == found["received_at"] + received <= 227 * 1024
    # Few weights or rows: what clusters save is less than what they cost.
    for rows, c in ((49, 512), (4, 1024)):
        assert plan(rows, c, c // 4, cluster=0, **H200)["cluster"] == 1
    assert plan(49, 1024, 256, cluster=0, **H200)["cluster"] == 8
    for less in ({"sm90a": False}, {"backward": True}, {"multiprocessors": 7}, {"architecture": 100}):
        assert plan(49, 2048, 512, cluster=0, **{**H200, **less})["cluster"] == 1
        assert plan(49, 64, 16, cluster=8, **{**H200, **less})["why_not"] is not None
    with pytest.raises(ValueError, match="cluster: expected 0, 1 or 8"):
        plan(49, 64, 16, cluster=4, **H200)


@pytest.mark.parametrize("c", [1, 40, 290, 1000, 2048])
@pytest.mark.parametrize("r", [1, 19, 512])
@pytest.mark.parametrize("multiprocessors", [8, 33, 132])
def test_clusters_cover_every_output_and_every_input_once(c, r, multiprocessors) -> None:
    gpu = {"architecture": 90, "multiprocessors": multiprocessors, "shared_bytes": 1 << 30}
    p = plan(49, c, r, cluster=8, **gpu)
    if p["why_not"] is not None:
        assert max(p["units"], p["hidden_units"]) > 2
        return
    assert p["blocks"] % 8 == 0 and p["blocks"] <= multiprocessors
    assert p["blocks"] * 8 * p["units"] >= c and p["blocks"] * p["hidden_units"] >= 2 * p["half_units"]
    assert p["slice"] % 32 == 0 and p["depth"] == 8 * p["slice"] >= c
    assert p["weight_pitch"] % 128 == 64 and p["weight_pitch"] >= 2 * p["slice"]
    assert p["gate_at"] == 64 * p["units"] * p["weight_pitch"]
    assert p["hidden_at"] == p["gate_at"] + 16 * p["units"] * p["hidden_pitch"]
    assert p["partial_at"] == p["hidden_at"] + 64 * p["hidden_units"] * p["weight_pitch"]
    assert p["received_at"] == p["partial_at"] + max(8 * 64 * 20 * 4, 64 * p["weight_pitch"])
    assert p["shared_bytes"] == p["received_at"] + 8 * 64 * 20 * 4
    assert p["gated_at"] == p["low_at"] + 2 * 49 * p["depth"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((65, 64, 16, "bfloat16"), "65 columns per step, of at most 64"),
        ((49, 64, 16, "float32"), "the matrix unit is used for 16-bit data"),
        ((49, 2304, 8, "float16"), "288 and 2 units"),
    ],
)
def test_reasons(arguments, reason) -> None:
    assert reason in plan(*arguments, **H200)["why_not"]
    assert "needs sm_80" in plan(1, 64, 16, **{**H200, "architecture": 75})["why_not"]
    assert "bytes of shared memory, of 65536" in plan(1, 1024, 64, **{**H200, "shared_bytes": 65536})["why_not"]


@pytest.mark.parametrize("c", [1, 7, 8, 40, 100, 1000, 2048])
@pytest.mark.parametrize("r", [1, 8, 19, 512])
@pytest.mark.parametrize("multiprocessors", [4, 33, 132])
@pytest.mark.parametrize("backward", [False, True])
def test_blocks_cover_every_output_once_and_areas_do_not_overlap(c, r, multiprocessors, backward) -> None:
    gpu = {"architecture": 90, "multiprocessors": multiprocessors, "shared_bytes": 1 << 30}
    p = plan(49, c, r, **gpu, backward=backward)
    if p["why_not"] is not None:
        assert max(p["units"], p["hidden_units"]) > 2
        return
    assert p["blocks"] <= multiprocessors
    features = [b * 8 * p["units"] + i for b in range(p["blocks"]) for i in range(8 * p["units"])]
    assert sorted(f for f in features if f < c) == list(range(c))
    hidden = []
    for block in range(p["blocks"]):
        for i in range(8 * p["hidden_units"]):
            unit = block * p["hidden_units"] + i // 8
            half, within = divmod(unit, p["half_units"])
            feature = 8 * within + i % 8
            if half < 2 and feature < r:
                hidden.append(half * r + feature)
    assert sorted(hidden) == list(range(2 * r))
    assert p["depth"] % 32 == p["hidden_depth"] % 32 == 0 and p["depth"] >= c and p["hidden_depth"] >= r
    # Rows of 16-byte words, 64 bytes apart in the banks; areas one after the other.
    halves = 2 if backward else 1  # of the hidden units, in one row; else in a matrix each
    for pitch, depth in ((p["weight_pitch"], p["depth"]), (p["hidden_pitch"], halves * p["hidden_depth"])):
        assert pitch % 128 == 64 and pitch >= 2 * depth
    assert p["gate_at"] == 8 * p["units"] * p["weight_pitch"]
    assert p["hidden_at"] == p["gate_at"] + 16 // halves * p["units"] * p["hidden_pitch"]
    assert p["partial_at"] == p["hidden_at"] + 8 * p["hidden_units"] * p["weight_pitch"]
    assert p["shared_bytes"] == p["partial_at"] + 8 * 64 * 20 * 4
    areas = [p["low_at"], p["gated_at"], p["reset_at"], p["exchange_at"], p["scratch_bytes"]]
    assert areas == sorted(areas) and all(at % 16 == 0 for at in areas) and p["low_at"] >= 8
    sizes = [b - a for a, b in itertools.pairwise(areas)]
    one = 2 * 49 * p["depth"]
    assert sizes == [one, one, one if backward else 0, 4 * 49 * p["hidden_depth"]]


# ---- by columns ----------------------------------------------------------------------------------------------------


def columns_plan(columns: int, c: int, r: int, dtype: str = "float32", **gpu: object) -> dict:
    return native.fast_gru_gpu_columns_plan(columns, c, r, dtype, **{"shared_bytes": H200["shared_bytes"], **gpu})


@pytest.mark.parametrize("c", [1, 7, 33, 64, 128, 144])
@pytest.mark.parametrize("r", [1, 16, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_columns_areas_do_not_overlap_and_rows_meet_every_bank(c, r, dtype, backward) -> None:
    p = columns_plan(49, c, r, dtype, backward=backward)
    assert p["why_not"] is None and p["blocks"] == 7 and f"{p['shared_bytes']} bytes" in p["text"]
    assert (p["units"], p["half_units"]) == (-(-c // 8), -(-r // 8))
    assert p["threads"] == 32 * max(p["units"], 2 * p["half_units"]) <= 32 * 24
    size = 4 if dtype == "float32" else 2
    wide, transposed = size == 4, backward and size == 2
    places = 8 * 13 * 8 // size  # a sample, a position and 11 offsets of 64 bits for every column
    sizes = [(1, c, c), (2, r, c), (1, c, 2 * r)] if backward else [(1, 2 * r, c), (2, c, r), (1, c, c)]
    too_many = wide and (c, r) in {(128, 40), (144, 16), (144, 40)}  # to have those of x, too
    assert p["makes_x"] == (not backward and not too_many)
    assert ("and those of x" in p["text"]) == p["makes_x"]
    if p["makes_x"]:
        sizes += [(1, 2 * r, c), (1, c, c)]
    taken: dict[int, str] = {}

    def take(begin: int, count: int, what: str) -> None:
        assert begin * size % 16 == 0 and begin >= places and begin + count <= p["numbers"]
        for at in range(begin, begin + count):
            assert taken.setdefault(at, what) == what

    for index, (product, expected) in enumerate(zip(p["products"], sizes, strict=True)):
        assert tuple(product[name] for name in ("halves", "outputs", "inputs")) == expected
        halves, outputs, inputs = expected
        unit = 8 if wide else 32
        depth, pitch = product["depth"], product["pitch"]
        assert depth == -(-inputs // unit) * unit
        # An odd number of 16-byte words: eight rows meet every bank once, and so do every second of eight.
        assert pitch * size % 32 == 16 and pitch >= (outputs if transposed else depth)
        assert (product["rows"], product["length"]) == ((inputs, outputs) if backward else (outputs, inputs))
        steps = (1, pitch) if backward and wide else (pitch, 1)
        assert (product["row_step"], product["step"]) == steps
        # A unit of 8 outputs is read whole, and all inputs up to the depth.
        last = max([r + 8 * (-(-r // 8)), outputs]) if index in (0, 3) and not backward else 8 * (-(-outputs // 8))
        reach = (depth - 1) * pitch + last if transposed else (last - 1) * pitch + depth
        assert reach <= product["half_weights"]
        assert p["zeros_at"] <= product["weight_at"] or depth == inputs
        assert product["half_operands"] == 8 * (pitch if wide else depth) and p["zeros_at"] <= product["operand_at"]
        for half in range(halves):
            weights = product["weight_at"] + half * product["half_weights"]
            take(weights, product["half_weights"], f"weights {index} {half}")
        # V_x has U_x's operands, of which there are two steps.
        index = min(index, 3)
        for half in range(2 if index == 3 else halves):
            operands = product["operand_at"] + half * product["half_operands"]
            take(operands, product["half_operands"], f"operands {index} {half}")
    assert p["shared_bytes"] == size * p["numbers"] <= H200["shared_bytes"]


def test_columns_reasons() -> None:
    assert columns_plan(784, 128, 32, shared_bytes=163 * 1024)["why_not"] is None
    assert columns_plan(784, 128, 32, shared_bytes=163 * 1024, backward=True)["why_not"] is None
    assert "fp64" in columns_plan(49, 64, 16, "float64")["why_not"]
    assert "131072 weights of 4 bytes" in columns_plan(49, 256, 64)["why_not"]
    assert "65536 weights of 2 bytes" in columns_plan(49, 128, 96, "bfloat16", shared_bytes=1 << 16)["why_not"]
    assert "bytes of shared memory, of 49152" in columns_plan(49, 72, 18, shared_bytes=48 * 1024)["why_not"]
    assert columns_plan(49, 192, 1)["why_not"] is None
    assert "25 units of 8 features, of at most 24" in columns_plan(49, 193, 1)["why_not"]
    assert "26 units" in columns_plan(49, 8, 97)["why_not"]
    assert columns_plan(18310, 64, 16)["why_not"] is None
    assert "18311 columns of 8192 weights" in columns_plan(18311, 64, 16)["why_not"]


# Columns, channels, dtype; whether CUDA's kernels are taken.
CHOICES = [
    ((1, 64, 1, 28, 28), torch.bfloat16, True),  # by columns
    ((1, 64, 1, 28, 28), torch.float32, True),
    ((1, 2048, 1, 7, 7), torch.bfloat16, True),  # with a share of the weights in every block
    ((1, 2048, 4, 7, 7), torch.bfloat16, False),  # step by step
    ((1, 2048, 4, 7, 7), torch.float32, True),  # there both make the library's products
    ((0, 2048, 4, 7, 7), torch.float16, True),
]


@pytest.mark.parametrize(("shape", "dtype", "cuda"), CHOICES, ids=str)
def test_what_auto_takes_on_an_h200(shape, dtype, cuda, monkeypatch) -> None:
    monkeypatch.setattr(_planner, "gpu_limits", lambda device: H200)
    monkeypatch.setattr(operator, "_why_not_cuda", lambda *_: None)
    monkeypatch.setattr(operator, "_why_not_triton", lambda *_: None)
    found = operator.OPERATOR.backend("cuda")
    n, c, *positions = shape
    with FakeTensorMode():
        x = torch.empty(n, 4, c, *positions, dtype=dtype, device="cuda")
        ux = torch.empty(c // 2, c, dtype=dtype, device="cuda")
    reason = found.why_passed((x, ux))
    assert (reason is None) == cuda
    if not cuda:
        assert "Triton" in reason
        monkeypatch.setattr(operator, "_why_not_triton", lambda *_: "it is not installed")
        assert found.why_passed((x, ux)) is None
        monkeypatch.setattr(operator, "_why_not_triton", lambda *_: None)
        monkeypatch.setattr(operator, "_why_not_cuda", lambda *_: "it was not built")
        assert found.why_passed((x, ux)) is None
    assert operator._cuda_plan(x, ux, ux, ux, ux, ux, None, False)
