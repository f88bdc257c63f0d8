"""soft_nearest_neighbor, cycle_consistency, temporal_cycle_loss: maths, numerics, masks, gradients, citizenship."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import rcu_ops
from rcu_ops import _library, reference
from rcu_ops.ops import OPERATORS
from rcu_ops.reference.cycle_consistency import loss_of_landing
from tests.ops import alignment
from tests.tolerance import assert_close_to_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference"] + (["cpu"] if _library.has_kernel("cycle_consistency", "CPU") else [])

#: (N, T, S, C): short and long sequences, T != S, sizes that are no multiple of anything.
SHAPES = [(2, 5, 7, 3), (3, 16, 16, 64), (1, 1, 4, 33), (2, 9, 1, 17), (1, 40, 70, 20), (1, 131, 97, 9), (1, 3, 3, 1)]
SHAPES.append((1, 115, 131, 24))  # distances by products on the CPU


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with rcu_ops.use_backend(request.param):
        yield request.param


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sequences whose distances are around 1, so that several frames have a say."""
    n, t, s, c = shape
    return (torch.randn(n, t, c) / (2 * c) ** 0.5).to(dtype), (torch.randn(n, s, c) / (2 * c) ** 0.5).to(dtype)


def masks(n: int, frames: int) -> Tensor:
    mask = torch.rand(n, frames) < 0.7
    mask[:, -1] = True
    return mask


def test_the_compiled_backend_is_tested_when_the_library_is_there() -> None:
    if _library.LIBRARY.exists():
        assert _library.load_error() is None, _library.load_error()
        assert "cpu" in BACKENDS


# ---- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_neighbors_keep_the_tolerance_rule(backend, shape, dtype, temperature, masked) -> None:
    a, b = inputs(shape, dtype)
    mask_b = masks(shape[0], shape[2]) if masked else None
    if masked:
        b[~mask_b] = torch.nan
    options = {"temperature": temperature, "mask_b": mask_b}
    soft, index = rcu_ops.soft_nearest_neighbor(a, b, **options)
    assert soft.dtype == dtype and index.dtype == torch.int64
    eager, _ = reference.soft_nearest_neighbor(a, b, **options, state_dtype=dtype)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, **options), eager, "soft")
    alignment.check_indices(index, a, b, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cycle_consistency_maps_both_ways(backend, shape, dtype, masked) -> None:
    n, t, s, _ = shape
    a, b = inputs(shape, dtype)
    mask_a, mask_b = (masks(n, t), masks(n, s)) if masked else (None, None)
    if masked:
        a[~mask_a], b[~mask_b] = torch.nan, torch.inf
    gate, index_ab, index_ba = rcu_ops.cycle_consistency(a, b, mask_a=mask_a, mask_b=mask_b, temperature=0.3)
    assert gate.dtype == torch.bool and gate.shape == (n,)
    for x, y, index, mask_x, mask_y in ((a, b, index_ab, mask_a, mask_b), (b, a, index_ba, mask_b, mask_a)):
        there = torch.ones_like(index, dtype=torch.bool) if mask_x is None else mask_x
        assert (index[~there] == -1).all()
        for sample in range(n):
            alignment.check_indices(
                index[sample][there[sample]][None],
                x[sample][there[sample]][None],
                y[sample][None],
                0.3,
                None if mask_y is None else mask_y[sample][None],
            )
    stays = [
        ((index == torch.arange(index.shape[1])) | (index == -1)).all(1)
        & (torch.ones(n, dtype=torch.bool) if mask is None else ((index >= 0) == mask).all(1))
        for index, mask in ((index_ab, mask_a), (index_ba, mask_b))
    ]
    assert torch.equal(gate, stays[0] & stays[1] & (t == s))


def test_by_hand(backend) -> None:
    """Two frames on a line: z = softmax(-[0.01, 0.81]) and softmax(-[1.44, 0.04])."""
    a, b = torch.tensor([[[0.1], [1.2]]]), torch.tensor([[[0.0], [1.0]]])
    soft, index = rcu_ops.soft_nearest_neighbor(a, b)
    torch.testing.assert_close(soft.flatten(), torch.sigmoid(torch.tensor([0.01 - 0.81, 1.44 - 0.04])))
    assert index.tolist() == [[0, 1]]
    gate, index_ab, index_ba = rcu_ops.cycle_consistency(a, b)
    assert gate.tolist() == [True] and index_ab.tolist() == index_ba.tolist() == [[0, 1]]
    swapped = rcu_ops.cycle_consistency(a, b.flip(1))
    assert swapped.gate.tolist() == [False] and swapped.index_ab.tolist() == [[1, 0]]


def test_one_direction_alone_does_not_open_the_gate(backend) -> None:
    """Every frame of a maps to its place in b, but b's last frame is nearer to a's first."""
    a, b = torch.tensor([[[0.0], [10.0]]]), torch.tensor([[[0.0], [4.0]]])
    gate, index_ab, index_ba = rcu_ops.cycle_consistency(a, b, temperature=0.1)
    assert index_ab.tolist() == [[0, 1]] and index_ba.tolist() == [[0, 0]] and not gate.item()


@pytest.mark.parametrize("frames", [1, 16, 100])
def test_a_sequence_is_consistent_with_itself(backend, frames) -> None:
    a = torch.randn(3, frames, 24)
    gate, index_ab, index_ba = rcu_ops.cycle_consistency(a, a, temperature=1e-3)
    assert gate.all() and torch.equal(index_ab, index_ba)
    assert torch.equal(index_ab, torch.arange(frames).expand(3, -1))
    assert not rcu_ops.cycle_consistency(a, torch.randn(3, frames + 1, 24)).gate.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frames", [6, 80, 120])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_ties_go_to_the_lowest_index(backend, frames, dtype, offset) -> None:
    b = (torch.randn(2, frames, 19) + offset).to(dtype)
    copies = torch.randint(0, frames // 2, (frames,))
    b = b[:, copies]
    first = torch.tensor([copies.tolist().index(c) for c in copies.tolist()])
    found = rcu_ops.cycle_consistency(b, b, temperature=1e-4 if dtype != torch.bfloat16 else 1e-2)
    lowest = torch.stack([(row[:, None] == row[None]).all(-1).int().argmax(1) for row in b])
    assert torch.equal(found.index_ab, lowest) and torch.equal(found.index_ba, lowest)
    if offset == 0:
        assert torch.equal(lowest, first.expand(2, -1))


@pytest.mark.parametrize("frames", [24, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["offset", "cut", "cut and offset", "huge", "tiny", "huge cut", "equal but one"])
def test_indices_agree_with_fp64_whatever_the_magnitude(backend, case, dtype, frames) -> None:
    """Offsets, scene cuts and extreme magnitudes: right within the rounding bound, and the bound is rarely needed."""
    c, half = 48, frames // 2
    a = torch.randn(2, frames, c)
    b = a + 0.3 * torch.randn(2, frames, c)
    temperature = 1.0
    if "offset" in case:
        a, b = a + 1e4, b + 1e4
    if "cut" in case:
        far = 1e5 if case == "cut" else 3e4
        a, b = (
            torch.cat([a[:, :half] - far, a[:, half:] + far], 1),
            torch.cat([b[:, :half] - far, b[:, half:] + far], 1),
        )
    if "huge" in case:
        a, b, temperature = a * 1e31, b * 1e31, 1e38
    if case == "tiny":
        a, b, temperature = a * 1e-31, b * 1e-31, 1e-30
    if case == "equal but one":
        b[:, 1:] = b[:, :1]
    a, b = a.to(dtype), b.to(dtype)
    soft, index = rcu_ops.soft_nearest_neighbor(a, b, temperature=temperature)
    assert soft.isfinite().all()
    rows, excused = alignment.check_indices(index, a, b, temperature)
    found = rcu_ops.cycle_consistency(a, b, temperature=temperature)
    for x, y, got in ((a, b, found.index_ab), (b, a, found.index_ba)):
        more_rows, more = alignment.check_indices(got, x, y, temperature)
        rows, excused = rows + more_rows, excused + more
    assert excused <= 0.02 * rows, f"{excused} of {rows} rows needed the rounding bound"


def moving(frames: int, channels: int) -> tuple[Tensor, Tensor]:
    """A sequence that moves slowly, so that many frames have a say, and a noisy copy."""
    a = 0.3 * torch.randn(1, frames, channels).cumsum(1)
    return a, a + 0.05 * torch.randn(1, frames, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", ["still", "flat", "flat but far", "offset 1e4", "offset 1e6", "cut", "three scenes", "copies"]
)
def test_long_sequences_agree_with_fp64(case, dtype) -> None:
    """Distances by products: right where they cannot be trusted, and the test's own bound is rarely needed."""
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU kernels are not built")
    frames, channels, temperature = 210, 40, 1.0
    a, b = moving(frames, channels)
    if "flat" in case:
        temperature = 1e4
    if case == "flat but far":  # most of the frames from the mean of all
        a, b = (torch.where(torch.arange(frames)[:, None] < 150, x, x + 1e5) for x in (a, b))
    if case.startswith("offset"):
        a, b = a + float(case.split()[1]), b + float(case.split()[1])
    scenes = {"cut": 2, "three scenes": 3}.get(case)
    if scenes:
        far = 1e5 * torch.randn(scenes, channels)[torch.arange(frames) * scenes // frames]
        a, b = a + far, b + far
    if case == "copies":
        b = b[:, torch.arange(frames) // 3 * 3]
    a, b = a.to(dtype), b.to(dtype)
    with rcu_ops.use_backend("cpu"):
        soft, index = rcu_ops.soft_nearest_neighbor(a, b, temperature=temperature)
        found = rcu_ops.cycle_consistency(a, b, temperature=temperature)
    options = {"temperature": temperature}
    eager, _ = reference.soft_nearest_neighbor(a, b, **options, state_dtype=torch.float32)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, **options), eager, "soft")
    rows = excused = 0
    for x, y, got in ((a, b, index), (a, b, found.index_ab), (b, a, found.index_ba)):
        more_rows, more = alignment.check_indices(got, x, y, temperature)
        rows, excused = rows + more_rows, excused + more
    assert excused <= 0.02 * rows, f"{excused} of {rows} rows needed the rounding bound"
    if case == "copies":
        assert (found.index_ab % 3 == 0).all()


def test_explain_names_the_form_and_its_reason() -> None:
    if "cpu" not in BACKENDS or _library.native() is None:
        pytest.skip("the CPU kernels or their planner are not built")

    def plan(frames: int, dtype: torch.dtype = torch.float32, channels: int = 64) -> str:
        x = torch.zeros(1, frames, channels, dtype=dtype)
        return str(rcu_ops.explain("cycle_consistency", x, x).plan)

    assert "within each sequence: at most 64 frames" in plan(16)
    assert "differences: fewer than 96 frames" in plan(80, channels=63)
    assert "by products on centred frames" in plan(65)
    assert "differences: float64" in plan(200, torch.float64)
    assert "by products on centred frames" in plan(200)
    loss = rcu_ops.explain("temporal_cycle_loss", torch.zeros(1, 100, 64), torch.zeros(1, 20, 64)).plan
    assert loss is not None and "soft: " in loss and "back: " in loss


def test_the_plan_for_a_gpu_covers_every_task_and_keeps_within_its_shared_memory() -> None:
    if (native := _library.native()) is None:
        pytest.skip("rcu_ops._native was not built")
    plan = functools.partial(native.cycle_consistency_gpu_plan, multiprocessors=132)
    assert plan("cycle", 32, 16, 16, 64, "bfloat16")["form"] == "short cycle"
    for options, words in (({"architecture": 80}, "a second launch"), ({"architecture": 90}, "a cluster of 8 blocks")):
        few = plan("cycle", 4, 16, 32, 2048, "float32", **options)
        assert few["splits"] * few["channels_per_split"] >= 2048 and words in few["text"]
    without = plan("cycle", 4, 16, 32, 2048, "float32", architecture=90, sm90a=False)
    assert "a second launch" in without["text"]
    for arguments, why in (
        (("cycle", 1, 100, 100, 64, "float64"), "float64"),
        (("soft_backward", 1, 100, 100, 64, "float32"), "gradients"),
        (("soft", 1, 100, 32, 64, "float32"), "fewer than 33 frames"),
        (("back", 1, 100, 100, 15, "float32"), "fewer than 16 channels"),
        (("soft", 4, 256, 256, 128, "float32"), "few enough for differences"),
        (("back", 1, 512, 512, 128, "bfloat16"), "few enough for differences"),
    ):
        found = plan(*arguments)
        assert found["form"] == "query rows" and why in found["text"]
    for n, t, s, c in ((1, 512, 512, 128), (8, 2048, 2048, 128), (2, 33, 5000, 100), (1, 40, 70, 3000)):
        for shared in (99 * 1024, 163 * 1024, 227 * 1024):
            found = plan("cycle", n, t, s, c, "float32", shared_bytes=shared)
            assert found["form"] == "product tiles" and found["shared_bytes"] <= shared
            assert found["tasks"] == n * (-(-t // 16) + -(-s // 16)) and 1 <= found["blocks"] <= found["tasks"]
            assert found["padded"] % 32 == 0 and found["padded"] >= c and found["pitch"] >= max(t, s)
            places = [found[f"{name}_at"] for name in ("mean", "largest", "size", "factor", "parts", "rows")]
            assert places == sorted(places) and all(place % 16 == 0 for place in places)
            frames = n * (t + s)
            assert places[3] - places[2] >= 4 * frames and places[5] - places[4] == 4 * frames * found["padded"]
            rows = 0 if found["in_shared"] else found["blocks"] * found["row_bytes"]
            assert found["scratch_bytes"] == places[5] + rows
            assert ("the scratch" in found["text"]) == (not found["in_shared"])
    assert plan("soft", 2, 512, 512, 128, "float32")["in_shared"]
    assert plan("back", 1, 512, 512, 128, "float32", multiprocessors=108)["form"] == "product tiles"
    assert plan("soft", 8, 2048, 2048, 128, "float32", shared_bytes=163 * 1024)["in_shared"]


def test_frames_that_are_not_there(backend) -> None:
    a, b = inputs((3, 6, 6, 8))
    b = a.clone()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    other = mask.clone()
    other[1, 5] = False
    a[~mask], b[~other] = torch.nan, torch.nan
    gate, index_ab, index_ba = rcu_ops.cycle_consistency(a, b, temperature=1e-3, mask_a=mask, mask_b=other)
    # a frame without a partner maps elsewhere; nothing at all is consistent with nothing at all
    assert gate.tolist() == [True, False, True]
    assert index_ab[0].tolist() == index_ba[0].tolist() == [0, 1, 2, 3, -1, -1]
    assert index_ab[1, 5] in range(5) and (index_ab[2] == -1).all() and (index_ba[2] == -1).all()
    soft, index = rcu_ops.soft_nearest_neighbor(torch.randn(3, 4, 8), b, mask_b=other)
    assert (soft[2] == 0).all() and (index[2] == -1).all() and soft.isfinite().all()


def test_not_a_number(backend) -> None:
    a, b = inputs((3, 4, 5, 6))
    a[0, 1, 2], b[1, 3, 0] = torch.nan, torch.inf
    soft, index = rcu_ops.soft_nearest_neighbor(a, b)
    want, want_index = reference.soft_nearest_neighbor(a, b)
    assert torch.equal(soft.isnan(), want.isnan()) and torch.equal(index, want_index)
    assert index[0, 1] == -1 and (index[1] == -1).all()
    found = rcu_ops.cycle_consistency(a, b)
    for got, expected in zip(found, reference.cycle_consistency(a, b), strict=True):
        assert torch.equal(got, expected)


def test_an_infinite_frame_has_no_neighbour_under_a_mask_either(backend) -> None:
    a, b = inputs((2, 4, 5, 6))
    a[0, 1, 2] = torch.inf
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3] = False
    soft, index = rcu_ops.soft_nearest_neighbor(a, b, mask_b=mask)
    assert soft[0, 1].isnan().all() and index[0, 1] == -1
    assert soft.isnan().sum() == 6 and (index == -1).sum() == 1


def test_strides_are_read_in_place(backend) -> None:
    a, b = inputs((2, 10, 12, 16))
    plain = rcu_ops.soft_nearest_neighbor(a, b)
    views = [
        (a.transpose(1, 2).contiguous().transpose(1, 2), b.transpose(0, 1).contiguous().transpose(0, 1)),
        (torch.stack([a, a.new_full(a.shape, torch.nan)], -1)[..., 0], torch.cat([b, b], 2)[..., :16]),
        (torch.cat([a.new_full((2, 1, 16), torch.nan), a], 1)[:, 1:], b.expand(1, 2, 12, 16)[0]),
    ]
    for x, y in views:
        got = rcu_ops.soft_nearest_neighbor(x, y)
        assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])
    mask = masks(2, 24)
    strided = rcu_ops.soft_nearest_neighbor(a, b, mask_b=mask[:, ::2])
    assert torch.equal(strided[0], rcu_ops.soft_nearest_neighbor(a, b, mask_b=mask[:, ::2].contiguous())[0])
    one = torch.randn(1, 1, 16)
    wide = rcu_ops.soft_nearest_neighbor(one.expand(3, 4, 16), b[:1].expand(3, 12, 16))[0]
    torch.testing.assert_close(wide, rcu_ops.soft_nearest_neighbor(one, b[:1])[0].expand(3, 4, 16))


def test_empty_batch(backend) -> None:
    a, b = (x.requires_grad_() for x in inputs((0, 4, 5, 3)))
    soft, index = rcu_ops.soft_nearest_neighbor(a, b)
    assert soft.shape == (0, 4, 3) and index.shape == (0, 4)
    soft.sum().backward()
    assert a.grad is not None and a.grad.shape == a.shape
    gate, index_ab, index_ba = rcu_ops.cycle_consistency(a, b)
    assert gate.shape == (0,) and index_ab.shape == (0, 4) and index_ba.shape == (0, 5)
    assert rcu_ops.temporal_cycle_loss(a, b, reduction="none").shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 12, 12, 40), (2, 70, 70, 24)], ids=str)
def test_bitwise_repeatable_and_independent_of_threads(backend, dtype, shape) -> None:
    a, b = inputs(shape, dtype)
    grad = torch.randn(a.shape).to(dtype)

    def run() -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in (a, b)]
        soft, index = rcu_ops.soft_nearest_neighbor(*leaves)
        gradients = torch.autograd.grad(soft, leaves, grad)
        loss = rcu_ops.temporal_cycle_loss(*leaves)
        return [soft, index, *gradients, *rcu_ops.cycle_consistency(a, b), *torch.autograd.grad(loss, leaves)]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            if backend == "cpu":
                assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))
        torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_of_one_sample_is_the_same_by_blocks(masked) -> None:
    """One thread takes the sample whole; several share its blocks, and leave no frame of another call's behind."""
    leaves = [x.requires_grad_() for x in inputs((1, 60, 64, 70))]
    options = {"mask_a": masks(1, 60), "mask_b": masks(1, 64)} if masked else {}

    def run() -> list[Tensor]:
        rows = rcu_ops.temporal_cycle_loss(*leaves, reduction="none", **options)
        return [rows.detach(), *torch.autograd.grad(rows.square().sum(), leaves)]

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    assert all(x.isfinite().all() and (x != 0).any() for x in found[0])


# ---- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_losses_are_those_of_the_paper(backend, temperature) -> None:
    """Against PyTorch's own cross entropy and a mean and variance taken frame by frame."""
    a, b = (x.double() for x in inputs((3, 7, 9, 5)))
    soft = torch.softmax(-torch.cdist(a, b).square() / temperature, -1) @ b
    logits = -torch.cdist(soft, a).square() / temperature
    labels = torch.arange(7).expand(3, -1)
    got = rcu_ops.temporal_cycle_loss(a, b, kind="classification", temperature=temperature)
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    want = []
    for row, label in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        p = row.softmax(0)
        mu = sum(p[k] * k for k in range(7))
        variance = sum(p[k] * (k - mu) ** 2 for k in range(7))
        want.append((label - mu) ** 2 / variance + 0.01 * variance.sqrt().log())
    options = {"temperature": temperature, "variance_weight": 0.01, "min_variance": 1e-12}
    rows = rcu_ops.temporal_cycle_loss(a, b, reduction="none", **options)
    torch.testing.assert_close(rows.flatten(), torch.stack(want))
    torch.testing.assert_close(rcu_ops.temporal_cycle_loss(a, b, **options), torch.stack(want).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 12, 14, 24), (1, 70, 66, 10)], ids=str)
def test_losses_and_gradients_keep_the_tolerance_rule(backend, shape, kind, dtype, masked) -> None:
    a, b = inputs(shape, dtype)
    mask_a, mask_b = (masks(shape[0], shape[1]), masks(shape[0], shape[2])) if masked else (None, None)

    def run(to: torch.dtype, function) -> list[Tensor]:
        leaves = [v.to(to).requires_grad_() for v in (a, b)]
        rows = function(*leaves)
        return [rows.detach(), *torch.autograd.grad(rows.sum(), leaves)]

    options = {"kind": kind, "mask_a": mask_a, "mask_b": mask_b}

    def plain(x: Tensor, y: Tensor) -> Tensor:
        """Eager PyTorch in its inputs' dtype throughout."""
        soft, _ = reference.soft_nearest_neighbor(x, y, mask_b=mask_b, state_dtype=x.dtype)
        landing = reference.cycle_back(soft, x, mask_a=mask_a, state_dtype=x.dtype)
        return loss_of_landing(landing, mask_a, mask_b, kind, 0.001, 1e-6)

    got = run(dtype, lambda x, y: rcu_ops.temporal_cycle_loss(x, y, reduction="none", **options))
    exact = run(torch.float64, lambda x, y: reference.temporal_cycle_loss(x, y, **options))
    eager = run(dtype, plain)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    for name, *values in zip(("loss", "da", "db"), got, exact, eager, strict=True):
        assert_close_to_reference(*values, name)


@pytest.mark.parametrize("frames", [24, 80])
@pytest.mark.parametrize("case", ["cut", "cut and offset", "slow"])
def test_losses_keep_the_tolerance_rule_whatever_frames_lie_around(backend, case, frames) -> None:
    """Frames near each other and far from the others: no one centre does for the sums of all."""
    a = torch.randn(2, frames, 24).mul(0.2).cumsum(1)
    if case != "slow":
        a += 300 * torch.randn(2, 1, 24) * (torch.arange(frames) % 20 > 12)[None, :, None]
    a += 1000.0 * ("offset" in case)
    b = a + 0.05 * torch.randn(a.shape)

    def run(to: torch.dtype, function) -> list[Tensor]:
        leaves = [v.to(to).requires_grad_() for v in (a, b)]
        rows = function(*leaves)
        return [rows.detach(), *torch.autograd.grad(rows.sum(), leaves)]

    def plain(x: Tensor, y: Tensor) -> Tensor:
        soft, _ = reference.soft_nearest_neighbor(x, y, state_dtype=x.dtype)
        return loss_of_landing(reference.cycle_back(soft, x, state_dtype=x.dtype), None, None, "regression", 0.001, 0.1)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return rcu_ops.temporal_cycle_loss(x, y, min_variance=0.1, reduction="none")

    values = zip(run(torch.float32, ours), run(torch.float64, plain), run(torch.float32, plain), strict=True)
    for name, triple in zip(("loss", "da", "db"), values, strict=True):
        assert_close_to_reference(*triple, name)


@pytest.mark.parametrize("of", ["soft neighbours", "loss"])
@pytest.mark.parametrize("order", ["one scene after the other", "frame by frame"])
@pytest.mark.parametrize("frames", [24, 80])
def test_frames_keep_their_digits_beside_a_scene_of_far_larger_ones(backend, frames, order, of) -> None:
    far = torch.arange(frames) % 2 == 0 if order == "frame by frame" else torch.arange(frames) >= frames // 2
    a = torch.randn(2, frames, 24) + 1e4 * torch.randn(2, 1, 24) * far[:, None]
    b, grad = a + 0.5 * torch.randn(a.shape), torch.randn(2, int((~far).sum()), 24)

    def run(to: torch.dtype, function) -> list[Tensor]:
        leaves = [v.to(to).requires_grad_() for v in (a, b)]
        rows = function(*leaves)[:, ~far]  # what is judged has to do with small numbers alone
        found = torch.autograd.grad(rows, leaves, (grad if rows.dim() == 3 else grad[..., 0]).to(to))
        return [rows.detach(), *(v[:, ~far] for v in found)]

    def plain(x: Tensor, y: Tensor) -> Tensor:
        soft, _ = reference.soft_nearest_neighbor(x, y, temperature=30.0, state_dtype=x.dtype)
        if of == "soft neighbours":
            return soft
        landing = reference.cycle_back(soft, x, temperature=30.0, state_dtype=x.dtype)
        return loss_of_landing(landing, None, None, "regression", 0.001, 0.1)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        if of == "soft neighbours":
            return rcu_ops.soft_nearest_neighbor(x, y, temperature=30.0)[0]
        return rcu_ops.temporal_cycle_loss(x, y, temperature=30.0, min_variance=0.1, reduction="none")

    values = zip(run(torch.float32, ours), run(torch.float64, plain), run(torch.float32, plain), strict=True)
    for name, triple in zip((of, "da", "db"), values, strict=True):
        assert_close_to_reference(*triple, name)


def test_frames_that_are_not_there_do_not_change_the_loss(backend) -> None:
    a, b = inputs((2, 6, 8, 5))
    whole = rcu_ops.temporal_cycle_loss(a, b)
    pad_a, pad_b = F.pad(a, (0, 0, 0, 3), value=torch.nan), F.pad(b, (0, 0, 0, 2), value=torch.nan)
    mask_a, mask_b = (torch.arange(9) < 6).expand(2, -1), (torch.arange(10) < 8).expand(2, -1)
    leaves = pad_a.requires_grad_(), pad_b.requires_grad_()
    padded = rcu_ops.temporal_cycle_loss(*leaves, mask_a=mask_a, mask_b=mask_b)
    torch.testing.assert_close(padded, whole)
    padded.backward()
    for leaf, frames in zip(leaves, (6, 8), strict=True):
        assert (leaf.grad[:, frames:] == 0).all() and leaf.grad.isfinite().all()
        assert (leaf.grad[:, :frames] != 0).any(-1).all()
    nothing = rcu_ops.temporal_cycle_loss(a, b, mask_b=torch.tensor([[True] * 8, [False] * 8]), reduction="none")
    assert (nothing[1] == 0).all() and (nothing[0] != 0).all()


def test_all_pairs(backend) -> None:
    a, b = inputs((3, 5, 6, 4))[0], inputs((2, 5, 6, 4))[1]
    mask_a, mask_b = masks(3, 5), masks(2, 6)

    def one(x: Tensor, y: Tensor, mask_x: Tensor | None = None, mask_y: Tensor | None = None) -> Tensor:
        given = {name: None if m is None else m[None] for name, m in (("mask_a", mask_x), ("mask_b", mask_y))}
        return rcu_ops.temporal_cycle_loss(x[None], y[None], reduction="none", **given)[0]

    rows = rcu_ops.temporal_cycle_loss(a, b, pairs="all", mask_a=mask_a, mask_b=mask_b, reduction="none")
    want = [one(x, y, m, k) for x, m in zip(a, mask_a, strict=True) for y, k in zip(b, mask_b, strict=True)]
    torch.testing.assert_close(rows, torch.stack(want))
    own = rcu_ops.temporal_cycle_loss(a, a, pairs="all", reduction="none")
    torch.testing.assert_close(own, torch.stack([one(a[i], a[j]) for i in range(3) for j in range(3) if i != j]))
    with pytest.raises(ValueError, match="a: expected at least two samples"):
        rcu_ops.temporal_cycle_loss(alone := a[:1], alone, pairs="all")
    for first, second in ((a, b[:0]), (a[:0], b), (alone, b[:0])):
        assert rcu_ops.temporal_cycle_loss(first, second, pairs="all", reduction="none").shape == (0, 5)


def test_a_certain_landing_has_a_finite_loss(backend) -> None:
    a = 100 * torch.randn(2, 6, 8)
    b = a.clone().requires_grad_()
    for kind in ("regression", "classification"):
        loss = rcu_ops.temporal_cycle_loss(a, b, kind=kind)
        assert loss.isfinite() and torch.autograd.grad(loss, b)[0].isfinite().all()


def test_training_aligns_two_sequences(backend) -> None:
    """Minimising the loss makes a map to b in order, though the loss names no frame of b."""
    a = torch.linspace(0, 1, 8)[None, :, None].repeat(1, 1, 2)
    b = (a + 0.4 * torch.randn(1, 8, 2)).requires_grad_()
    optimizer = torch.optim.Adam([b], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = rcu_ops.temporal_cycle_loss(a, b, kind="classification", temperature=0.01)
        loss.backward()
        optimizer.step()
    assert torch.equal(rcu_ops.soft_nearest_neighbor(a, b, temperature=0.01)[0].argsort(1)[0, :, 0], torch.arange(8))


@pytest.mark.parametrize("odd", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("frames", [12, 65])  # in one pass, and one after the other
def test_a_gradient_that_is_no_number_reaches_what_it_reaches_in_the_reference(frames, odd) -> None:
    a, b = (torch.randn(2, frames, 16) for _ in range(2))
    grad, found = torch.zeros(2, frames), []
    grad[0, 3] = odd
    for name in BACKENDS:
        with rcu_ops.use_backend(name):
            leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
            loss = rcu_ops.temporal_cycle_loss(*leaves, reduction="none", min_variance=1e-2)
            found.append(torch.autograd.grad(loss, leaves, grad))
    for gradients in zip(*found, strict=True):
        for got in gradients:
            assert torch.equal(got.isfinite(), gradients[0].isfinite())
            assert not got[0].isfinite().all() and got[1].isfinite().all()


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 4, 1, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(backend, shape, masked) -> None:
    a, b = (x.double().requires_grad_() for x in inputs(shape))
    mask_a, mask_b = (masks(shape[0], shape[1]), masks(shape[0], shape[2])) if masked else (None, None)
    soft = lambda a, b: rcu_ops.soft_nearest_neighbor(a, b, temperature=0.7, mask_b=mask_b)[0]  # noqa: E731
    assert torch.autograd.gradcheck(soft, (a, b))
    assert torch.autograd.gradgradcheck(soft, (a, b))
    for kind in ("regression", "classification"):
        loss = functools.partial(rcu_ops.temporal_cycle_loss, kind=kind, mask_a=mask_a, mask_b=mask_b)
        if kind == "regression" and min(shape[1:3]) == 1:
            continue  # every frame lands in the same place, and the variance's floor is a kink
        assert torch.autograd.gradcheck(loss, (a, b))
        assert torch.autograd.gradgradcheck(loss, (a, b))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_keeps_the_tolerance_rule(backend, shape, dtype, masked) -> None:
    a, b = inputs(shape, dtype)
    grad = torch.randn(a.shape).to(dtype)
    mask_b = masks(shape[0], shape[2]) if masked else None

    def run(to: torch.dtype, function) -> tuple[Tensor, ...]:
        leaves = [v.to(to).requires_grad_() for v in (a, b)]
        return torch.autograd.grad(function(*leaves, mask_b=mask_b)[0], leaves, grad.to(to))

    got = run(dtype, rcu_ops.soft_nearest_neighbor)
    exact = run(torch.float64, reference.soft_nearest_neighbor)
    eager = run(dtype, functools.partial(reference.soft_nearest_neighbor, state_dtype=dtype))
    for name, *values in zip(("da", "db"), got, exact, eager, strict=True):
        assert values[0].dtype == dtype
        assert_close_to_reference(*values, name)


@pytest.mark.parametrize("shape", [(2, 8, 9, 16), (1, 80, 70, 12)], ids=str)
def test_gradients_of_far_offsets(backend, shape) -> None:
    """A common offset is no part of the gradient: what offset sequences give is what their exact differences give."""
    a, b = (torch.round(x * 2**12) / 2**12 for x in inputs(shape))
    grads = []
    for offset in (0.0, 1024.0):  # exact in fp32
        leaves = [(x + offset).requires_grad_() for x in (a, b)]
        soft, _ = rcu_ops.soft_nearest_neighbor(*leaves)
        grads.append(torch.autograd.grad((soft - offset).square().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * want.abs().max().item())


def test_no_gradient_is_missing(backend) -> None:
    for shape in ((2, 9, 11, 19), (1, 67, 71, 5)):
        leaves = [x.requires_grad_() for x in inputs(shape)]
        rcu_ops.soft_nearest_neighbor(*leaves)[0].square().sum().backward()
        assert all((leaf.grad != 0).all() for leaf in leaves)


def test_indices_and_gates_carry_no_gradient(backend) -> None:
    a, b = (x.requires_grad_() for x in inputs((2, 4, 4, 3)))
    assert not rcu_ops.soft_nearest_neighbor(a, b)[1].requires_grad
    assert not any(x.requires_grad for x in rcu_ops.cycle_consistency(a, b))
    rcu_ops.soft_nearest_neighbor(a, b.detach())[0].sum().backward()
    assert a.grad is not None and b.grad is None


# ---- PyTorch citizenship ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, masked) -> None:
    a, b = inputs((2, 4, 5, 3), dtype)
    mask_a, mask_b = (masks(2, 4), masks(2, 5)) if masked else (None, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == torch.float32:
        tests += ("test_aot_dispatch_dynamic",)
    check = functools.partial(torch.library.opcheck, test_utils=tests)
    ops, soft = torch.ops.rcu_ops, torch.randn(2, 4, 3).to(dtype)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    check(ops.soft_nearest_neighbor.default, (*leaves, mask_b, 1.0, True))
    check(ops.soft_nearest_neighbor.default, (*leaves, mask_b, 1.0, False))
    check(ops.soft_nearest_neighbor_backward.default, (torch.randn(a.shape).to(dtype), a, b, mask_b, 0.5))
    check(ops.cycle_consistency.default, (a, b, mask_a, mask_b, 1.0))
    check(ops.cycle_back.default, (soft.requires_grad_(), leaves[0], mask_a, 1.0))
    grads = [torch.randn(2, 4) for _ in range(3)]
    check(ops.cycle_back_backward.default, (*grads, soft.detach(), a, mask_a, 1.0))
    if dtype == torch.float32:  # the loss is computed in the precision of sums
        numbers = (mask_a, mask_b, 0.5, masked, 0.001, 1e-6)
        check(ops.temporal_cycle_loss.default, (*leaves, *numbers))
        grad = grads[0].T.contiguous().T
        check(ops.temporal_cycle_loss_backward.default, (grad, *leaves, soft.detach(), *numbers))
        check(ops.temporal_cycle_loss_mean.default, (*leaves, *numbers))
        saved = torch.randn(2, 4, 3), torch.randn(2, 5, 3)
        check(ops.temporal_cycle_loss_mean_backward.default, (grad[0, 0], *leaves, *saved, *numbers))
        check(ops.temporal_cycle_loss_kept.default, (*leaves, *numbers))
        kept = torch.rand(2, 4, 9)
        check(ops.temporal_cycle_loss_kept_backward.default, (grad, *leaves, soft.detach(), kept, *numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", ["", "a", "b", "ab", "all of b"])
@pytest.mark.parametrize("shape", [(3, 6, 5, 7), (9, 64, 60, 130), (2, 70, 50, 33)], ids=str)
def test_mean_of_a_loss_in_one_operator(shape, masked, dtype) -> None:
    """With its gradients: for a gradient of 1 those that the plain operator's are, bit for bit."""
    a, b = (x.requires_grad_() for x in inputs(shape, dtype))
    n, t, s, _ = shape
    mask_a = masks(n, t) if "a" in masked else None
    mask_b = masks(n, s) if masked.endswith("b") else None
    if masked == "all of b":
        mask_b = torch.zeros(n, s, dtype=torch.bool)
    elif mask_b is not None:
        mask_b[1] = False  # no way: its frames have no loss, and do not count
    there = torch.ones(n, t, dtype=torch.bool) if mask_a is None else mask_a
    there = there if mask_b is None else there & mask_b.any(1, keepdim=True)
    ops, numbers = torch.ops.rcu_ops, (mask_a, mask_b, 0.7, True, 0.001, 1e-2)

    rows, _ = ops.temporal_cycle_loss(a, b, *numbers)
    mean, *gradients = ops.temporal_cycle_loss_mean(a, b, *numbers)
    assert mean.shape == () and mean.dtype == dtype
    torch.testing.assert_close(mean, rows[there].sum() / there.sum(), equal_nan=True)
    assert not any(gradient.requires_grad for gradient in gradients)
    share = (1 / there.sum().to(torch.float64)).to(dtype).expand(n, t)
    wanted = torch.autograd.grad(rows, (a, b), share)
    if "cpu" in BACKENDS:  # the reference divides what comes in
        assert all(torch.equal(x, want) for x, want in zip(gradients, wanted, strict=True))
    for factor in (1.0, 3.0, math.nan):
        grad = torch.tensor(factor, dtype=dtype)
        got = torch.autograd.grad(mean, (a, b), grad, retain_graph=True)
        for x, want in zip(got, wanted, strict=True):
            expected = torch.where(want == 0, want, want * factor)  # no frame: no gradient, of whatever
            torch.testing.assert_close(x, expected, equal_nan=True)
    again = ops.temporal_cycle_loss_mean(a, b, *numbers)[0]
    assert torch.equal(again, mean) or mean.isnan()
    mapped = torch.vmap(lambda x: ops.temporal_cycle_loss_mean(x, b, *numbers)[0])(torch.stack([a, 2 * a]).detach())
    torch.testing.assert_close(mapped[0], mean.detach(), equal_nan=True)
    if "cpu" in BACKENDS:
        given = [g.detach() for g in gradients]
        with pytest.raises(RuntimeError, match="grad_mean: expected"):
            ops.temporal_cycle_loss_mean_backward(rows.detach(), a, b, *given, *numbers)
        with pytest.raises(RuntimeError, match="db: expected"):
            ops.temporal_cycle_loss_mean_backward(mean.detach(), a, b, given[0], given[0][:, :1], *numbers)


@pytest.mark.parametrize("masked", [False, True])
def test_second_gradients_of_a_mean(masked) -> None:
    """They go through a and b, not through the gradients that were kept."""
    leaves = [x.requires_grad_() for x in inputs((2, 4, 5, 3), torch.float64)]
    options = {"mask_a": masks(2, 4), "mask_b": masks(2, 5)} if masked else {}
    there = options["mask_a"].sum() if masked else 8

    def second(reduction: str) -> tuple[Tensor, ...]:
        rows = rcu_ops.temporal_cycle_loss(*leaves, reduction=reduction, **options)
        first = torch.autograd.grad(rows if reduction == "mean" else rows.sum() / there, leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    for x, want in zip(second("mean"), second("none"), strict=True):
        torch.testing.assert_close(x, want)
        assert (x != 0).any()


def test_which_operator_finds_the_mean_of_a_loss() -> None:
    """The one that finds it too on CPUs, for short sequences with gradients; traced and mapped it is the plain one."""
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU kernels are not built")

    def operators(frames: int, call=rcu_ops.temporal_cycle_loss, **options) -> set[str]:
        a, b = (x.requires_grad_() for x in inputs((1, frames, frames, 64)))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(a, b, **options)
        return {e.key.removeprefix("rcu_ops::") for e in profile.key_averages() if e.key.startswith("rcu_ops::")}

    assert operators(8) == operators(64) == {"temporal_cycle_loss_mean"}
    assert operators(8, torch.no_grad()(rcu_ops.temporal_cycle_loss)) == {"temporal_cycle_loss"}
    assert operators(8, reduction="none") == {"temporal_cycle_loss"}
    assert operators(70) == {"temporal_cycle_loss_kept"}
    mapped = torch.vmap(lambda x, y: rcu_ops.temporal_cycle_loss(x[None], y[None]))
    assert operators(8, mapped) == {"temporal_cycle_loss"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("frames", "others", "channels"), [(100, 130, 40), (70, 65, 16), (66, 3, 5)])
def test_kept_distances_change_no_bit(frames, others, channels, masked, dtype) -> None:
    a, b = inputs((2, frames, others, channels), dtype)
    mask_a, mask_b = (masks(2, frames), masks(2, others)) if masked else (None, None)
    ops = torch.ops.rcu_ops
    for regression, temperature in itertools.product((True, False), (1.0, 10.0)):
        numbers = (mask_a, mask_b, temperature, regression, 0.001, 1e-2)
        loss, soft = ops.temporal_cycle_loss(a, b, *numbers)
        *same, distances = ops.temporal_cycle_loss_kept(a, b, *numbers)
        assert torch.equal(same[0], loss) and torch.equal(same[1], soft)
        grad = torch.randn(2, frames, dtype=dtype)
        want = ops.temporal_cycle_loss_backward(grad, a, b, soft, *numbers)
        got = ops.temporal_cycle_loss_kept_backward(grad, a, b, soft, distances, *numbers)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert distances.shape == (2, frames, others + frames)
        if masked:
            there = torch.cat([mask_b, mask_a], 1)[:, None] & mask_a[..., None]
            assert torch.equal(distances != 0, there & (distances != 0))
        if _library.has_kernel("temporal_cycle_loss_kept", "CPU"):  # and they are what the gradients are made of
            other = ops.temporal_cycle_loss_kept_backward(grad, a, b, soft, 2 * distances + 1, *numbers)
            assert not torch.equal(other[0], want[0])


@pytest.mark.parametrize("frames", [64, 65, 24 * 8, 24 * 8 + 1])
def test_distances_are_kept_where_they_take_little_memory(frames) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU kernels are not built")
    a, b = inputs((1, frames, frames, 32), torch.float32)
    saved: list[tuple[int, ...]] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t)
    with keep:
        rcu_ops.temporal_cycle_loss(a.requires_grad_(), b)
    kept = (1, frames, 2 * frames) in saved
    assert kept == (64 < frames <= 6 * 32)
    plan = str(rcu_ops.explain("temporal_cycle_loss", a, b).plan)
    assert (f"{8 * frames**2} bytes of distances are kept" in plan) == kept or _library.native() is None
    assert sum(math.prod(shape) for shape in saved) <= 5 * 3 * a.numel()


def test_autocast(backend) -> None:
    a, b = inputs((2, 6, 7, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        soft, index = rcu_ops.soft_nearest_neighbor(a, b)
        loss = rcu_ops.temporal_cycle_loss(a.float(), b)
        assert rcu_ops.soft_nearest_neighbor(a.double(), b.double())[0].dtype == torch.float64
        found = rcu_ops.cycle_consistency(a, b.float())
    assert soft.dtype == torch.float32 and loss.dtype == torch.float32
    want = rcu_ops.soft_nearest_neighbor(a.float(), b.float())
    assert torch.equal(soft, want[0]) and torch.equal(index, want[1])
    assert all(map(torch.equal, found, rcu_ops.cycle_consistency(a.float(), b.float())))


@pytest.mark.parametrize("in_dims", [(0, None), (1, 0), (2, 3)], ids=str)
def test_vmap(backend, in_dims) -> None:
    a, b = inputs((2, 4, 5, 3))
    args = [
        value if dim is None else torch.stack([value * (i + 1) for i in range(3)], dim)
        for value, dim in zip((a, b), in_dims, strict=True)
    ]
    got = torch.vmap(rcu_ops.soft_nearest_neighbor, in_dims=in_dims)(*args)
    found = torch.vmap(rcu_ops.cycle_consistency, in_dims=in_dims)(*args)
    for i in range(3):
        one = [v if d is None else v.select(d, i) for v, d in zip(args, in_dims, strict=True)]
        for x, want in zip(got, rcu_ops.soft_nearest_neighbor(*one), strict=True):
            torch.testing.assert_close(x[i], want)
        for x, want in zip(found, rcu_ops.cycle_consistency(*one), strict=True):
            assert torch.equal(x[i], want)


def test_functorch_gradients(backend) -> None:
    a, b = inputs((3, 4, 5, 6))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return rcu_ops.temporal_cycle_loss(x[None], y[None])

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(a, b)
    for i in range(3):
        x, y = a[i].clone().requires_grad_(), b[i].clone().requires_grad_()
        for g, want in zip(got, torch.autograd.grad(loss(x, y), (x, y)), strict=True):
            torch.testing.assert_close(g[i], want)


def test_compile_fullgraph(backend) -> None:
    torch._dynamo.reset()

    def step(a: Tensor, b: Tensor) -> Tensor:
        soft, index = rcu_ops.soft_nearest_neighbor(a, b, temperature=0.5)
        gate, index_ab, _ = rcu_ops.cycle_consistency(a, b)
        loss = rcu_ops.temporal_cycle_loss(a, b)
        return soft.square().sum() + loss + gate.sum() + index.sum() + index_ab.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in ((2, 4, 5, 8), (3, 6, 7, 8)):
        leaves, twins = ([v.clone().requires_grad_() for v in inputs(shape)] for _ in range(2))
        with torch.no_grad():
            for twin, leaf in zip(twins, leaves, strict=True):
                twin.copy_(leaf)
        results = compiled(*leaves), step(*twins)
        torch.testing.assert_close(*results)
        for result in results:
            result.backward()
        for x, y in zip(leaves, twins, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


def test_export_with_dynamic_batch_and_time() -> None:
    class Align(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            loss = rcu_ops.temporal_cycle_loss(a, b, kind="classification")
            return (*rcu_ops.soft_nearest_neighbor(a, b), *rcu_ops.cycle_consistency(a, b), loss)

    n, t = torch.export.Dim("n", min=1, max=64), torch.export.Dim("t", min=1, max=1024)
    s = torch.export.Dim("s", min=1, max=1024)
    program = torch.export.export(Align(), inputs((2, 4, 5, 6)), dynamic_shapes=({0: n, 1: t}, {0: n, 1: s}))
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.rcu_ops.cycle_consistency.default in targets
    for shape in ((1, 1, 1, 6), (3, 17, 9, 6)):
        args = inputs(shape)
        for got, want in zip(program.module()(*args), Align()(*args), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("n", "t", "s", "gradients", "pytorch"),
    [
        (16, 32, 32, True, True),
        (4, 256, 256, True, True),
        (4, 256, 257, True, False),  # more differences than were measured
        (4, 257, 255, True, False),
        (16, 32, 32, False, False),
    ],
)
def test_where_auto_prefers_pytorch_to_tritons_loss(n, t, s, gradients, pytorch) -> None:
    with FakeTensorMode():
        a = torch.empty(n, t, 128, device="cuda")
        b = torch.empty(n, s, 128, device="cuda", requires_grad=gradients)
    triton = OPERATORS["temporal_cycle_loss"].backend("triton")
    reason = triton.why_passed((a, b))
    assert (reason is not None) == pytorch
    assert reason is None or "measured faster" in reason
    with torch.no_grad():
        assert triton.why_passed((a, b)) is None


def test_meta_tensors_and_flop_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n, t, s, c = 2, 5, 7, 3
    a, b = torch.empty(n, t, c, device="meta", requires_grad=True), torch.empty(n, s, c, device="meta")
    with FlopCounterMode(display=False) as counter:
        soft, index = rcu_ops.soft_nearest_neighbor(a, b)
    assert soft.shape == (n, t, c) and index.shape == (n, t)
    product = 2 * n * t * s * c
    assert counter.get_total_flops() == 3 * product  # distances, soft, distances to it
    with FlopCounterMode(display=False) as counter:
        soft.sum().backward()
    assert counter.get_total_flops() == 5 * product
    with FlopCounterMode(display=False) as counter:
        found = rcu_ops.cycle_consistency(a, b)
    assert found.index_ba.shape == (n, s)
    assert counter.get_total_flops() == 2 * n * (c * (t * s + t * t + s * s) + t * s * s + s * t * t)
    with FlopCounterMode(display=False) as counter:
        loss = rcu_ops.temporal_cycle_loss(a, b)
    assert loss.shape == ()
    back = 2 * n * t * t * c
    assert counter.get_total_flops() == 2 * product + back
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 5 * product + 3 * back


def test_activation_checkpointing(backend) -> None:
    a, b = (x.requires_grad_() for x in inputs((2, 5, 7, 3)))
    plain = torch.autograd.grad(rcu_ops.temporal_cycle_loss(a, b), (a, b))
    again = torch.utils.checkpoint.checkpoint(rcu_ops.temporal_cycle_loss, a, b, use_reentrant=False)
    assert all(torch.equal(x, y) for x, y in zip(plain, torch.autograd.grad(again, (a, b)), strict=True))


def test_explain_and_doctor_know_the_operators() -> None:
    a, b = inputs((2, 16, 16, 64))
    for name in ("soft_nearest_neighbor", "cycle_consistency", "temporal_cycle_loss"):
        explanation = rcu_ops.explain(name, a, b)
        assert explanation.backend == BACKENDS[-1], explanation


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": [1]}, TypeError, "a: expected a tensor, got list"),
        ({"a": torch.zeros(2, 4, 3).long()}, TypeError, "a: expected float16"),
        ({"a": torch.zeros(4, 3)}, ValueError, r"a: expected \[N,T,C\], got 2 dimensions"),
        ({"a": torch.zeros(2, 0, 3)}, ValueError, "a: expected at least one frame"),
        ({"b": torch.zeros(2, 5, 0)}, ValueError, "b: expected at least one frame and one channel"),
        ({"b": torch.zeros(2, 5, 4)}, ValueError, r"b: expected \[N,S,C\].*= \[2, 5, 3\], got \[2, 5, 4\]"),
        ({"b": torch.zeros(3, 5, 3)}, ValueError, r"b: expected \[N,S,C\]"),
        ({"b": torch.zeros(2, 5, 3).double()}, TypeError, "b: expected torch.float32, got torch.float64"),
        ({"b": torch.zeros(2, 5, 3, device="meta")}, ValueError, "b: expected on cpu like a, got meta"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number > 0"),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number > 0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"mask_b": torch.ones(2, 5)}, TypeError, "mask_b: expected torch.bool"),
        ({"mask_b": [True]}, TypeError, "mask_b: expected a tensor"),
        ({"mask_b": torch.ones(2, 4).bool()}, ValueError, r"mask_b: expected b's samples and frames = \[2, 5\]"),
        ({"mask_b": torch.ones(2, 5, device="meta").bool()}, ValueError, "mask_b: expected on cpu"),
    ],
)
def test_wrong_arguments_are_named(backend, change, error, message) -> None:
    arguments = {"a": torch.zeros(2, 4, 3), "b": torch.zeros(2, 5, 3)} | change
    for function in (rcu_ops.soft_nearest_neighbor, rcu_ops.cycle_consistency, rcu_ops.temporal_cycle_loss):
        with pytest.raises(error, match=message):
            function(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask_a": torch.ones(2, 5).bool()}, ValueError, r"mask_a: expected a's samples and frames = \[2, 4\]"),
        ({"kind": "both"}, ValueError, "kind: expected 'regression' or 'classification', got 'both'"),
        ({"pairs": "some"}, ValueError, "pairs: expected 'each' or 'all', got 'some'"),
        ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
        ({"variance_weight": -1.0}, ValueError, "variance_weight: expected a finite number >= 0"),
        ({"min_variance": 0.0}, ValueError, "min_variance: expected a finite number > 0"),
    ],
)
def test_wrong_loss_arguments_are_named(backend, change, error, message) -> None:
    with pytest.raises(error, match=message):
        rcu_ops.temporal_cycle_loss(**{"a": torch.zeros(2, 4, 3), "b": torch.zeros(2, 5, 3)} | change)
