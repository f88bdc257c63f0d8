"""The harness notices mistakes: each is planted in a copy of a kernel file, and a run of the copy must fail.

A build with ThreadSanitizer judges what is a race whatever the schedule; the others judge by results and reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rcu_ops import reference
from tests.cuda_host import harness
from tests.cuda_host import test_cycle_consistency as cycles
from tests.cuda_host import test_nonlocal_gates as relations
from tests.cuda_host import test_recurrent_conv as scans
from tests.cuda_host.harness import LaunchError, Machine, SanitizerReport
from tests.cuda_host.test_fast_gru_columns import check as check_columns
from tests.cuda_host.test_fast_gru_persistent import CLUSTERS
from tests.cuda_host.test_fast_gru_persistent import check as check_steps
from tests.cuda_host.test_fast_gru_persistent import check_backward as check_steps_backward
from tests.cuda_host.test_recurrent_conv import HOPPER, LAYOUTS, check_backward, check_forward, inputs
from tests.cuda_host.test_recurrent_conv_batch_norm import check_fused
from tests.ops import alignment
from tests.planting import plant
from tests.tolerance import assert_close_to_reference


def forward(machine: Machine) -> None:
    machine.plain = True
    x, weight, h0 = inputs((2, 19, 3, 5, 5), torch.float32)
    check_forward(machine, x, weight, h0, False, False)
    check_forward(machine, LAYOUTS["channels_last"](x), weight, None, True, True)


def forward_in_pieces(machine: Machine) -> None:
    machine.device = {"shared_bytes": 26 * 1024, "multiprocessors": 1}
    x, weight, h0 = inputs((1, 130, 2, 2, 5), torch.float32)
    check_forward(machine, x, weight, h0, False, False)
    assert "in pieces" in machine.plan


def backward(machine: Machine) -> None:
    machine.plain = True
    x, weight, h0 = inputs((2, 19, 3, 5, 5), torch.float32)
    check_backward(machine, x, h0, x, weight, h0, False, False)


def fp32(machine: Machine) -> None:
    machine.device = {"multiprocessors": 1}
    for shape, layout in (((1, 20, 3, 6, 6), "contiguous"), ((1, 12, 3, 5, 5), "channels_last")):
        x, weight, h0 = (v.contiguous() for v in inputs(shape, torch.float32))
        check_forward(machine, LAYOUTS[layout](x), weight, h0, False, False)
        assert machine.plan.startswith("fp32")


def tile(machine: Machine) -> None:
    for shape, layout, warps in (((1, 60, 5, 6, 6), "contiguous", 4), ((1, 60, 5, 5, 7), "channels_last", 1)):
        machine.device = {"multiprocessors": 1 if warps == 4 else 108}
        x, weight, h0 = (v.contiguous() for v in inputs(shape, torch.bfloat16))
        check_forward(machine, LAYOUTS[layout](x), weight, h0.float(), False, False)
        assert machine.plan.startswith("tile") and f"blocks of {warps} x" in machine.plan


def tile_with_residual(machine: Machine) -> None:
    machine.device = {"multiprocessors": 1}
    x, weight, _ = inputs((1, 60, 4, 6, 6), torch.bfloat16)
    y, h_n = machine.forward(x, weight, scale=torch.ones(60), shift=torch.ones(60), residual=2 * x)
    assert machine.plan.startswith("tile")
    h, last = reference.recurrent_conv(x.double(), weight.double())
    eager, eager_last = reference.recurrent_conv(x, weight, state_dtype=torch.bfloat16)
    assert_close_to_reference(y, h + 1 + 2 * x.double(), eager + 1 + 2 * x)
    assert_close_to_reference(h_n, last, eager_last)


def tile_with_sums(machine: Machine) -> None:
    for layout in ("contiguous", "channels_last"):
        x, weight, h0 = inputs((1, 24, 5, 8, 20), torch.bfloat16)
        x = LAYOUTS[layout](x)
        check_backward(machine, x, None, x, weight, h0, False, False, fused=True)
        assert machine.plan.startswith("tile")


def tile_with_absent_columns(machine: Machine) -> None:
    scans.test_columns_that_are_not_there_add_nothing_to_the_weight_gradient(machine)


def tile_by_words(machine: Machine) -> None:
    machine.device = {"multiprocessors": 1}
    x, weight, h0 = inputs((1, 64, 3, 6, 20), torch.bfloat16)
    check_forward(machine, x, weight, h0.float(), False, False)
    assert "blocks of 4 x" in machine.plan


def wide(machine: Machine) -> None:
    for shape, layout in (((1, 140, 5, 4, 8), "contiguous"), ((1, 140, 5, 5, 5), "channels_last")):
        x, weight, h0 = (v.contiguous() for v in inputs(shape, torch.bfloat16))
        check_forward(machine, LAYOUTS[layout](x), weight, h0.float(), False, False)
        assert machine.plan.startswith("wide")


def warpgroups(machine: Machine) -> None:
    machine.device, machine.hopper = HOPPER, True
    for shape, layout in (((1, 140, 5, 4, 16), "contiguous"), ((1, 140, 4, 5, 13), "channels_last")):
        x, weight, h0 = (v.contiguous() for v in inputs(shape, torch.bfloat16))
        check_forward(machine, LAYOUTS[layout](x), weight, h0.float(), False, False)
        assert machine.plan.startswith("hopper")


def warpgroups_with_residual(machine: Machine) -> None:
    machine.device, machine.hopper = HOPPER, True
    x, weight = torch.randint(-2, 3, (1, 256, 4, 4, 16)).bfloat16(), torch.eye(256).bfloat16()
    x[:, :, 0] = 256  # bf16 has no odd numbers beyond
    y, h_n = machine.forward(x, weight, scale=torch.ones(256), shift=torch.ones(256), residual=2 * x)
    assert machine.plan.startswith("hopper")
    states = x.float().cumsum(2)
    assert torch.equal(h_n, states[:, :, -1])
    assert torch.equal(y, (states + 1 + 2 * x.float()).bfloat16())


def relate(machine: Machine) -> None:
    machine.plain, machine.device = True, {"shared_bytes": 55 * 1024}
    relations.check_attention(machine, (1, 20, 150, 24, 70), torch.float32)
    relations.check_step(machine, (1, 34, 10, 40), torch.float32)


def relate_tiles(machine: Machine) -> None:
    machine.device, words = relations.TILES["alone"]
    relations.check_step(machine, (1, 70, 72, 72), torch.bfloat16)
    assert words in machine.plan


def relate_gradients(machine: Machine) -> None:
    machine.device, _ = relations.TILES["shares"]
    relations.check_attention(machine, (1, 40, 70, 72, 136), torch.bfloat16, masked=True)
    assert "on the matrix unit" in machine.plan


def dead_queries(machine: Machine) -> None:
    relations.test_dead_queries_reach_no_gradient_on_the_matrix_unit(machine)


def relate_clusters(machine: Machine) -> None:
    machine.device, words = relations.TILES["cluster"]
    relations.check_step(machine, (1, 20, 72, 136), torch.bfloat16)
    assert words in machine.plan


def steps_in_one_launch(machine: Machine) -> None:
    machine.device = {"multiprocessors": 3}
    check_steps(machine, (1, 3, 20, 1, 1, 3), 5, torch.bfloat16, save=True)


def steps_by_columns(machine: Machine) -> None:
    check_columns(machine, (1, 2, 20, 9), 5, torch.bfloat16, "features", save=True)


def steps_in_clusters(machine: Machine) -> None:
    machine.device = CLUSTERS
    check_steps(machine, (1, 3, 300, 1, 1, 3), 40, torch.bfloat16, save=False, cluster=8)


def steps_backward_in_one_launch(machine: Machine) -> None:
    machine.device = {"multiprocessors": 3}
    check_steps_backward(machine, (1, 3, 20, 1, 1, 3), 9, torch.bfloat16, grad=True)


@dataclass(frozen=True)
class Fault:
    name: str
    old: str
    new: str
    run: Callable[[Machine], None]
    sanitizer: str = "none"
    file: str = "recurrent_conv.cu"


def tile_long(machine: Machine) -> None:
    x, weight = torch.ones(1, 32, 300, 1, 1).bfloat16(), torch.eye(32).bfloat16()
    assert torch.equal(machine.forward(x, weight)[1], torch.full((1, 32, 1, 1), 300.0))


def norm_in_tile(machine: Machine) -> None:
    machine.device = {"multiprocessors": 1}
    for layout in ("contiguous", "channels_last_3d"):
        check_fused(machine, (2, 60, 3, 7, 7), torch.bfloat16, layout, "tile", 32)


def norm_in_wide(machine: Machine) -> None:
    for layout in ("contiguous", "channels_last_3d"):
        check_fused(machine, (1, 140, 3, 5, 6), torch.bfloat16, layout, "wide", 24)


def norm_in_fp32(machine: Machine) -> None:
    machine.device = {"multiprocessors": 1}
    check_fused(machine, (1, 12, 3, 6, 7), torch.float32, "channels_last_3d", "fp32: 1 blocks of 64", 32)


def weight_gradient(machine: Machine) -> None:
    for layout in ("contiguous", "channels_last"):
        x, weight, h0 = (v.contiguous() for v in inputs((1, 20, 5, 8, 7), torch.bfloat16))
        check_backward(machine, None, h0.float(), LAYOUTS[layout](x), weight, h0, False, False)
        assert machine.plan.startswith("matrix")


def step(machine: Machine) -> None:
    machine.device = {"multiprocessors": 8}
    for shape, layout in (((1, 530, 1, 3, 3), "contiguous"), ((1, 36, 1, 5, 5), "channels_last")):
        for dtype in (torch.bfloat16, torch.float32):
            x, weight, h0 = (v.contiguous() for v in inputs(shape, dtype))
            check_forward(machine, LAYOUTS[layout](x), weight, h0.float(), False, False)
            assert machine.plan.startswith("step")


def step_by_words(machine: Machine) -> None:
    machine.device = {"multiprocessors": 4}
    for shape in ((2, 32, 1, 3, 3), (1, 128, 1, 9, 9)):
        for dtype in (torch.bfloat16, torch.float32):
            x, weight, h0 = inputs(shape, dtype)
            x, h0 = (LAYOUTS["channels_last"](v) for v in (x, torch.randn(h0.shape).unsqueeze(2)))
            h0 = h0.squeeze(2)
            found = machine.forward(x, weight, h0)
            assert "by words" in machine.plan
            want = machine.forward(x, weight, h0.contiguous())  # by the kernels for any strides
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def short_cycle(machine: Machine) -> None:
    for magnitude in (1.0, 1e31):
        a = magnitude * torch.randn(1, 12, 512)  # a stage more than there are places
        b = a + magnitude * 0.3 * torch.randn(a.shape)
        _, *found = cycles.align(machine, "cycle", a, b, temperature=10 * magnitude**2)
        for index, x, y in zip(found, (a, b), (b, a), strict=True):
            assert alignment.check_indices(index, x, y, 10 * magnitude**2)[1] == 0


def short_cycle_anywhere(machine: Machine) -> None:
    a = torch.randn(1, 12, 512)
    _, *found = cycles.align(machine, "cycle", a, harness.one_number_further(a + 0.1), temperature=100.0)
    for index in found:
        assert alignment.check_indices(index, a, a, 100.0)[1] == 0


def short_cycle_in_clusters(machine: Machine) -> None:
    machine.device = cycles.CLUSTERS
    a = torch.randn(1, 6, 512) * torch.linspace(0.1, 1, 512)
    b = a + 0.3 * torch.randn(a.shape)
    _, *found = cycles.align(machine, "cycle", a, b, temperature=100.0)
    for index, x, y in zip(found, (a, b), (b, a), strict=True):
        assert alignment.check_indices(index, x, y, 100.0)[1] == 0


def losses(machine: Machine) -> None:
    cycles.test_losses(machine, (6, 5, 7, 33), "regression", True, machine.seed)


def long_cycle(machine: Machine) -> None:
    """A scene cut: products alone tell no two frames of a scene apart."""
    a, b = cycles.moving(40, 20)
    far = 1e4 * torch.randn(2, 20)[torch.arange(40) // 20]
    a, b = a + far, b + far
    soft, index = cycles.align(machine, "soft", a, b)
    eager, _ = reference.soft_nearest_neighbor(a, b, state_dtype=torch.float32)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b), eager, "soft")
    _, *found = cycles.align(machine, "cycle", a, b)
    for got, x, y in zip((index, *found), (a, a, b), (b, b, a), strict=True):
        assert alignment.check_indices(got, x, y)[1] <= 1


def flat_weights(machine: Machine) -> None:
    """Every distance stays a product, and those to the soft neighbours are products, too."""
    a, b = cycles.moving(40, 20)
    soft, index = cycles.align(machine, "soft", a, b, temperature=1e3)
    eager, _ = reference.soft_nearest_neighbor(a, b, temperature=1e3, state_dtype=torch.float32)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, 1e3), eager, "soft")
    assert alignment.check_indices(index, a, b, 1e3)[1] <= 1


def soft_of_the_huge(machine: Machine) -> None:
    a = 1e31 * torch.randn(1, 9, 24)
    b = a + 0.3e31 * torch.randn(a.shape)
    index = cycles.align(machine, "soft", a, b, temperature=1e63)[1]
    assert alignment.check_indices(index, a, b, 1e63)[1] == 0


def closed_gate(machine: Machine) -> None:
    for shape in ((2, 3, 2, 3, 3), (2, 3, 2, 3, 4)):  # number by number, and by packs
        x, h = torch.randint(-4, 5, shape).float(), torch.randint(-4, 5, (2, 2, 3)).float()
        gate = torch.tensor([False, True])
        y, dh = cycles.gate_data(machine, "backward", x, h, gate, x)
        want = reference.srtg_fuse_backward(x, x, h, gate)
        assert torch.equal(y, want[0]) and torch.equal(dh, want[1])


SHORT, SHORT_CLUSTERS, SHORT_BODY = (f"cycle_consistency_short{end}" for end in (".cu", "_sm90.cu", "_block.h"))
PRODUCTS = "cycle_consistency_products.cu"
TILE, WIDE, STEP, STEP_WORDS, SM90 = (
    f"recurrent_conv_{name}.cu" for name in ("tile", "wide", "step", "step_words", "sm90")
)
WEIGHT_GRAD = "recurrent_conv_weight_grad.cu"
STEPS_BODY = "fast_gru_steps.h"
RELATE, RELATE_BODY, GRADIENTS = "nonlocal_gates.cu", "nonlocal_gates_tile.h", "nonlocal_gates_gradients.cu"
BARRIER = "    block_barrier();\n"
FAULTS = [
    Fault("no barrier before the product", f"{BARRIER}\n    // Phase 2.", "\n    // Phase 2.", forward),
    Fault(
        "no barrier before the product, as a race",
        f"{BARRIER}\n    // Phase 2.",
        "\n    // Phase 2.",
        forward,
        "thread",
    ),
    Fault("no barrier before y is written", f"{BARRIER}\n    // Phase 3.", "\n    // Phase 3.", forward),
    Fault(
        "a piece of W is overwritten while it is read",
        "          block_barrier();  // the piece before this one has been read\n",
        "",
        forward_in_pieces,
        "thread",
    ),
    Fault(
        "a barrier that only some threads reach",
        f"{BARRIER}\n    // Phase 3.",
        "    if (my_channel < C) block_barrier();\n\n    // Phase 3.",
        forward,
    ),
    Fault(
        "a tile edge off by one",
        "columns_left < P ? static_cast<int>(columns_left) : P",
        "columns_left <= P ? static_cast<int>(columns_left) - 1 : P",
        forward,
    ),
    Fault(
        "a tile edge beyond the tensor",
        "columns_left < P ? static_cast<int>(columns_left) : P",
        "columns_left < P ? static_cast<int>(columns_left) + 1 : P",
        forward,
        "address",
    ),
    Fault(
        "the last row of W is left out",
        "k < count; ++k, w +=",
        "k < count - 1; ++k, w +=",
        forward,
    ),
    Fault(
        "the wrong frame in reverse",
        "p.reverse ? p.T - 1 - i : i;\n    const S alpha",
        "i;\n    const S alpha",
        forward,
    ),
    Fault(
        "fp32: the state is overwritten while it is read",
        "    block_barrier();  // the state has been read\n",
        "",
        fp32,
        file="recurrent_conv_fp32.cu",
    ),
    Fault(
        "fp32: a tile edge off by one",
        "columns_left < P ? static_cast<int>(columns_left) : P",
        "columns_left < P ? static_cast<int>(columns_left) - 1 : P",
        fp32,
        file="recurrent_conv_fp32.cu",
    ),
    Fault(
        "fp32: both parts of a block keep one sum",
        "statistics_at(numbers + part * statistics_floats * table, table)",
        "statistics_at(numbers, table)",
        norm_in_fp32,
        file="recurrent_conv_fp32.cu",
    ),
    Fault(
        "fp32: h is read where the next frame's is",
        "read(p.residual, p.residual.data, plan.residual, residual_offset, t, v);",
        "read(p.residual, p.residual.data, plan.residual, residual_offset, i, v);",
        norm_in_fp32,
        file="recurrent_conv_fp32.cu",
    ),
    Fault("alpha of the first frame", "i == 0 ? p.alpha_first : p.alpha", "p.alpha", forward),
    Fault(
        "no barrier between two stages of rows",
        "    block_barrier();  // this stage",
        "    // this stage",
        backward,
        "thread",
        WEIGHT_GRAD,
    ),
    Fault(
        "a stage of rows is not waited for",
        "    async_wait<0>();\n    block_barrier();  // this stage",
        "    block_barrier();  // this stage",
        backward,
        file=WEIGHT_GRAD,
    ),
    Fault("rows beyond the last of a split", "e < R * pitch", "e < 0", backward, file=WEIGHT_GRAD),
    Fault(
        "sums are stored before all are there",
        "  block_barrier();\n#pragma unroll 4\n  for (int e",
        "#pragma unroll 4\n  for (int e",
        backward,
        file=WEIGHT_GRAD,
    ),
    Fault("the state before is taken from the frame itself", "= row.before;", "= row.dx;", backward, file=WEIGHT_GRAD),
    Fault(
        "a swapped fragment row",
        "const uint32_t first[2] = {b[0], b[1]}",
        "const uint32_t first[2] = {b[1], b[0]}",
        tile,
        file=TILE,
    ),
    Fault(
        "tiles of x in the wrong order",
        "(r / 8 % 2 * 8 + r % 8) * channels_pitch + r / 16 * 16",
        "(r / 16 * 8 + r % 8) * channels_pitch + r / 8 % 2 * 16",
        tile,
        file=TILE,
    ),
    Fault("x is not transposed", "load_matrix<4, true>(r,", "load_matrix<4, false>(r,", tile, file=TILE),
    Fault(
        "no wait for an asynchronous copy",
        "if (plan.stages == 3) async_wait<1>();",
        "if (plan.stages == 3)\n        async_wait<3>();",
        tile,
        file=TILE,
    ),
    Fault("no wait for the residual", "if (with_residual) async_wait<1>();", "", tile_with_residual, file=TILE),
    Fault(
        "W is not waited for",
        "async_wait<0>();\n  block_barrier();",
        "block_barrier();",
        tile_by_words,
        "thread",
        file=TILE,
    ),
    Fault("all warps keep one table", "mean + warp * statistics_floats * CP", "mean", norm_in_tile, file=TILE),
    Fault("no barrier after the wait", "meet();  // frame i", "// frame i", tile, "thread", file=TILE),
    Fault(
        "no wait for the block before a frame",
        "meet();  // frame i",
        "warp_barrier();  //",
        tile_with_sums,
        "thread",
        file=TILE,
    ),
    Fault(
        "no wait for the block before its sums",
        "meet();  // y is",
        "warp_barrier();  //",
        tile_with_sums,
        "thread",
        file=TILE,
    ),
    Fault(
        "no wait for the block after its sums",
        "meet();  // y has",
        "warp_barrier();  //",
        tile_with_sums,
        "thread",
        file=TILE,
    ),
    Fault("sums of the frame itself", "&& i >= 0 ? i + 1 : i;", "&& i >= 0 ? i : i;", tile_with_sums, file=TILE),
    Fault(
        "no first state in the sums",
        "(lane < columns)\n      residual",
        "(lane < 0)\n      residual",
        tile_with_sums,
        file=TILE,
    ),
    Fault(
        "sums of columns that are not there",
        "column >= columns)",
        "column < 0)",
        tile_with_absent_columns,
        file=TILE,
    ),
    Fault("a warp without columns leaves", "columns == 0 && !sums_weights", "columns == 0", tile_with_sums, file=TILE),
    Fault("no warp barrier before y", "      warp_barrier();  // x has been read\n", "", tile, "thread", file=TILE),
    Fault("no barrier after y", "      meet();  // y is complete\n", "", tile, file=TILE),
    Fault("a bf16 state", "rest ? with_rest(v.x, d.x, h[0], h16.x)", "rest ? v.x", tile_long, file=TILE),
    Fault("words beyond the last column", "32, C, columns, pitch, v", "32, C, M, pitch, v", tile, file=TILE),
    Fault(
        "whole words beyond the last column",
        "(lane), C, columns, pitch, v",
        "(lane), C, M, pitch, v",
        tile_by_words,
        file=TILE,
    ),
    Fault("statistics of the last frame alone", "c, columns, i == 0)", "c, columns, true)", norm_in_tile, file=TILE),
    Fault(
        "a gradient with another channel's statistics",
        "norm_gradient(tables, channel, unpack",
        "norm_gradient(tables, channel - r / 2 * 8, unpack",
        norm_in_tile,
        file=TILE,
    ),
    Fault("statistics of one block for all", "/ P, blockIdx.x, thread", "/ P, 0, thread", norm_in_wide, file=WIDE),
    Fault("a swapped half of b", "left[2] = {b[0], b[1]}", "left[2] = {b[0], b[3]}", wide, file=WIDE),
    Fault(
        "W's rows in the wrong order",
        "tile % 2 * 8 + tile_row) * plan.weight",
        "tile_row) * plan.weight",
        wide,
        file=WIDE,
    ),
    Fault("no block barrier in a frame", "    block_barrier();  // the new", "    // the new", wide, file=WIDE),
    Fault(
        "no block barrier in a frame, as a race",
        "    block_barrier();  // the new",
        "    // the new",
        wide,
        "thread",
        WIDE,
    ),
    Fault(
        "no wait for the next frame",
        "      async_wait<1>();\n    else",
        "      async_wait<2>();\n    else",
        wide,
        file=WIDE,
    ),
    Fault("one state for both frames", "states + i % 2 * plan.slot_bytes", "states", wide, "thread", WIDE),
    Fault(
        "the rest of the state is left out",
        "product ? with_rest(added.x, d0, h[0], h16.x)",
        "product ? added.x + 0 * d0",
        warpgroups_with_residual,
        file=SM90,
    ),
    Fault(
        "a diagonal element of the wrong channel", "((d ^ 16) + 130)", "(d + 130)", warpgroups_with_residual, file=SM90
    ),
    Fault(
        "the group does not meet after the wait",
        "      async_wait<1>();\n      meet();  // x is there\n",
        "      async_wait<1>();\n",
        warpgroups,
        "thread",
        SM90,
    ),
    Fault(
        "no wait for the halves of x",
        "      async_wait<1>();\n      meet();  // x is there",
        "      meet();  // x is there",
        warpgroups,
        file=SM90,
    ),
    Fault(
        "units are used in the wrong order",
        "unit + (with_residual ? 4 : 2)",
        "unit + 2",
        warpgroups_with_residual,
        file=SM90,
    ),
    Fault(
        "the residual is fetched before x has been read",
        "        meet();  // x has been read\n",
        "",
        warpgroups_with_residual,
        "thread",
        SM90,
    ),
    Fault("no proxy fence after W", "  async_proxy_fence();\n", "", warpgroups, "thread", SM90),
    Fault(
        "dW without the first state",
        "load_number<S>(p.first.data",
        "0 * load_number<S>(p.first.data",
        backward,
        file=WEIGHT_GRAD,
    ),
    Fault(
        "no barrier in a stage",
        "    block_barrier();  // stage s",
        "    // stage s",
        weight_gradient,
        "thread",
        WEIGHT_GRAD,
    ),
    Fault(
        "no wait for a stage",
        "async_wait<stages - 2>();",
        "async_wait<stages - 1>();",
        weight_gradient,
        file=WEIGHT_GRAD,
    ),
    Fault(
        "no barrier before the statistics are read",
        "      block_barrier();  // the statistics are there, and the results have been taken\n",
        "",
        relate,
        "thread",
        RELATE,
    ),
    Fault("a sum that keeps its old peak", "= exp(query.peak - next.base());", "= 1;", relate, file=RELATE),
    Fault(
        "no wait for a stage of scores",
        "async_wait<0>();\n    block_barrier();  // stage i",
        "block_barrier();  // stage i",
        relate_tiles,
        file="nonlocal_gates_tile.cu",
    ),
    Fault(
        "no cluster barrier before the scores are added",
        "barrier_of_shares();  // all scores are there",
        "block_barrier();",
        relate_clusters,
        "thread",
        "nonlocal_gates_sm90.cu",
    ),
    Fault(
        "no barrier between the maps and the weights",
        "  block_barrier();  // the maps are complete\n",
        "",
        relate_gradients,
        "thread",
        GRADIENTS,
    ),
    Fault(
        "a row is overwritten while it is read",
        "    warp_barrier();  // all lanes have read the row\n",
        "",
        relate_gradients,
        "thread",
        GRADIENTS,
    ),
    Fault(
        "the products of the gradient where the weights belong",
        "row_of(of_value ? 1 : 0, row16",
        "row_of(0, row16",
        relate_gradients,
        file=GRADIENTS,
    ),
    Fault("a dead query's row reaches the keys", "there && totals_of[n] != 0", "there", dead_queries, file=GRADIENTS),
    Fault(
        "the peak of another query",
        "peak = peaks_of[query]",
        "peak = peaks_of[query ^ 1]",
        relate_gradients,
        file=GRADIENTS,
    ),
    Fault("rows beyond the last", "e < Tile * (R - rows)", "e < 0", weight_gradient, file=WEIGHT_GRAD),
    Fault("a and b hold the same channels", "+ 8 * n, true)", "+ 8 * n, false)", weight_gradient, file=WEIGHT_GRAD),
    Fault(
        "rows found too early",
        "find_rows(s + stages);",
        "find_rows(s + stages - 1);",
        weight_gradient,
        file=WEIGHT_GRAD,
    ),
    Fault(
        "a piece is overwritten while it is read",
        "if (k0 > 0) block_barrier();  // the piece before",
        "// the piece before",
        step,
        "thread",
        STEP,
    ),
    Fault("a piece is not waited for", "async_wait<1>();", "async_wait<2>();", step, file=STEP),
    Fault("no wait for W and the state", "async_wait<0>();  // for W", "// for W", step_by_words, file=STEP_WORDS),
    Fault(
        "no barrier after the wait",
        "block_barrier();  // and every",
        "// and every",
        step_by_words,
        "thread",
        STEP_WORDS,
    ),
    Fault(
        "W's rows as they lie in memory",
        "return step_weight_row<Group>(channel);",
        "return channel;",
        step_by_words,
        file=STEP_WORDS,
    ),
    Fault("the diagonal of the next channel", "+ c * 2;", "+ (c ^ 2) * 2;", step_by_words, file=STEP_WORDS),
    Fault("one run for all", "total[n].v[m] += acc[n][m]", "total[n].v[m] = acc[n][m]", step_by_words, file=STEP_WORDS),
    Fault("one half for both pieces", "k0 / D % 2);\n      for", "0);\n      for", step, file=STEP),
    Fault(
        "a range of splits is left out", "int r = 1; r < sum", "int r = 2; r < sum", weight_gradient, file=WEIGHT_GRAD
    ),
    Fault(
        "no barrier before a stage is read",
        "      block_barrier();  // stage i is complete, and stage i - 1 has been read\n",
        "",
        short_cycle,
        file=SHORT,
    ),
    Fault(
        "a stage has not arrived",
        "        async_wait<1>();\n",
        "        async_wait<2>();\n",
        short_cycle,
        file=SHORT,
    ),
    Fault(
        "rows are copied by words for which they do not lie",
        "reinterpret_cast<uintptr_t>(v->data) % word == 0 && ",
        "",
        short_cycle_anywhere,
        file=SHORT,
    ),
    Fault(
        "sums are written where others read a stage",
        "  block_barrier();  // the stages have been read\n",
        "",
        short_cycle,
        "thread",
        file=SHORT,
    ),
    Fault(
        "the cluster's sums are read before they are there",
        "cluster_barrier();  // the sums of all blocks are there",
        "block_barrier();",
        short_cycle_in_clusters,
        "thread",
        file=SHORT_CLUSTERS,
    ),
    Fault(
        "all sums are the first block's",
        "cluster_shared(sums, s)[at]",
        "cluster_shared(sums, 0 * s)[at]",
        short_cycle_in_clusters,
        file=SHORT_CLUSTERS,
    ),
    Fault("squares overflow", "if (factor == 1) break", "if (factor > 0) break", short_cycle, file=SHORT),
    Fault(
        "no distance of products is found again",
        "if (lane % 4 == 0 && wanted[m] >> j & 1)",
        "if (lane % 4 == 0 && wanted[m] >> j & 1 && value < 0)",
        long_cycle,
        file=PRODUCTS,
    ),
    Fault(
        "one lower part is left out",
        "            mma_m16n8k16<__half>(low[j], x[1], y[0]);\n",
        "",
        flat_weights,
        file=PRODUCTS,
    ),
    Fault(
        "weights are read before all warps have written them",
        "if (lane == 0) used[warp] = of_warp_keys;\n        block_barrier();",
        "if (lane == 0) used[warp] = of_warp_keys;",
        flat_weights,
        file=PRODUCTS,
    ),
    Fault(
        "half of the scale is undone",
        "const double sharp = 1 / static_cast<double>(factor) /",
        "const double sharp = 1 /",
        soft_of_the_huge,
        file="cycle_consistency.cu",
    ),
    Fault(
        "what frames of a get as keys is lost",
        "p.add_to_da ? widen(*out, bf16) + value : value",
        "value",
        losses,
        file="cycle_consistency.cu",
    ),
    Fault(
        "a way through no frame has a loss",
        " && some(p.mask_through, p.frames_through)",
        "",
        losses,
        file="cycle_consistency.cu",
    ),
    Fault(
        "queries of a block change places",
        "of[lane / lanes % Q] =",
        "of[Q - 1 - lane / lanes % Q] =",
        losses,
        file="cycle_consistency.cu",
    ),
    Fault(
        "what a word keeps of queries is read key by key",
        "of_query % per_word;",
        "0;",
        losses,
        file="cycle_consistency.cu",
    ),
    Fault(
        "a closed gate lets sums pass",
        "static_cast<S>(positions) : open ?",
        "static_cast<S>(positions) : mine ?",
        closed_gate,
        file="srtg.cu",
    ),
    Fault(
        "a closed gate scales a pack",
        "const bool open = !p.gate || p.gate[n * p.gate_stride];",
        "const bool open = true;",
        closed_gate,
        file="srtg.cu",
    ),
    Fault(
        "hidden is read before all blocks have written it",
        "barrier.arrive_and_wait();",
        "block_barrier();",
        steps_in_one_launch,
        "thread",
        file="fast_gru_persistent.cu",
    ),
    Fault(
        "gates are made before all warps of a block have made hidden",
        "hidden_x = tile.load(hidden_walk, more);\n    }\n    block_barrier();",
        "hidden_x = tile.load(hidden_walk, more);\n    }",
        steps_by_columns,
        "thread",
        file="fast_gru_columns.cu",
    ),
    Fault(
        "a step begins on stale states",
        "    low[row * depth + feature] = narrow<T>(state[i], bf16);\n      if",
        "    if (step == 0) low[row * depth + feature] = narrow<T>(state[i], bf16);\n      if",
        steps_in_one_launch,
        file="fast_gru_persistent.cu",
    ),
    Fault(
        "partial sums are read before all warps have written them",
        "acc[m][n][j];\n    block_barrier();",
        "acc[m][n][j];",
        steps_in_one_launch,
        "thread",
        file="fast_gru_persistent.cu",
    ),
    Fault(
        "pushed sums are read before all of the cluster have pushed theirs",
        "    cluster_barrier();\n#pragma unroll\n    for (int i = 0; i < pairs; ++i) {\n      sums[i] = 0;\n      if",
        "    block_barrier();\n#pragma unroll\n    for (int i = 0; i < pairs; ++i) {\n      sums[i] = 0;\n      if",
        steps_in_clusters,
        "thread",
        file="fast_gru_sm90.cu",
    ),
    Fault(
        "all blocks push to the place of the first",
        "+ rank * most_rows * fast_gru::partial_pitch",
        "+ 0 * rank * most_rows * fast_gru::partial_pitch",
        steps_in_clusters,
        file="fast_gru_sm90.cu",
    ),
    Fault(
        "sums go to the next unit's owner",
        "cluster_shared(received, unit >> both)",
        "cluster_shared(received, ((unit >> both) + 1) % plan.cluster)",
        steps_in_clusters,
        file="fast_gru_sm90.cu",
    ),
    Fault(
        "a slice is multiplied before all warps have staged it",
        "    block_barrier();\n    float acc[2]",
        "    warp_barrier();\n    float acc[2]",
        steps_in_clusters,
        "thread",
        file="fast_gru_sm90.cu",
    ),
    Fault(
        "the sums of the first rank are left out",
        "for (int from = 0; from < fast_gru::persistent_cluster; ++from)",
        "for (int from = 1; from < fast_gru::persistent_cluster; ++from)",
        steps_in_clusters,
        file="fast_gru_sm90.cu",
    ),
    Fault(
        "du is read before all blocks have written it",
        "    barrier.arrive();\n    if (step > 0) read_step(step - 1);\n    barrier.wait();",
        "    block_barrier();\n    if (step > 0) read_step(step - 1);",
        steps_backward_in_one_launch,
        "thread",
        file="fast_gru_persistent.cu",
    ),
    Fault(
        "z's half of du comes from r's gradient",
        "hidden_gradients(step, exchange_z, units_r, units_z);",
        "hidden_gradients(step, exchange_r, units_r, units_z);",
        steps_backward_in_one_launch,
        file="fast_gru_persistent.cu",
    ),
    Fault(
        "closed units pass a gradient on",
        "[at], bf16) <= 0 ? 0.0f",
        "[at], bf16) < 0 ? 0.0f",
        steps_backward_in_one_launch,
        file="fast_gru_persistent.cu",
    ),
]


# The copies are compiled for the types in use alone.
FEWER = {
    "recurrent_conv.cu": [("launch_plain_scan<double>", "launch_plain_scan<float>")],
    WEIGHT_GRAD: [
        ("launch_plain_weight_grad<double>", "launch_plain_weight_grad<float>"),
        ("launch_sum_splits<double>", "launch_sum_splits<float>"),
        ("matrix_weight_grad<128,", "matrix_weight_grad<64,"),
    ],
    TILE: [("launch_padded<8>", "launch_padded<4>")],
    STEP: [("<double>", "<float>")],
    STEP_WORDS: [("<__half,", "<__nv_bfloat16,")],
    SM90: [("<__half>", "<__nv_bfloat16>")],
    RELATE: [("plain_relate<double>", "plain_relate<float>"), ("static_cast<double*>", "static_cast<float*>")],
    SHORT: [("<__half>", "<float>"), ("align_as<__nv_bfloat16>", "align_as<float>")],
    SHORT_CLUSTERS: [("<__half>", "<float>"), ("align_clusters_as<__nv_bfloat16>", "align_clusters_as<float>")],
    "cycle_consistency.cu": [(f"align_as<{kind}>", "align_as<float>") for kind in ("double", "uint16_t")],
    "srtg.cu": [(f"launch_as<{kind}>", "launch_as<float>") for kind in ("double", "uint16_t")],
}


BODIES = {
    "nonlocal_gates_tile.cu": RELATE_BODY,
    "nonlocal_gates_sm90.cu": RELATE_BODY,
    WEIGHT_GRAD: "recurrent_conv_weight_sums.h",
    SHORT: SHORT_BODY,
    SHORT_CLUSTERS: SHORT_BODY,
    "fast_gru_persistent.cu": STEPS_BODY,
    "fast_gru_sm90.cu": STEPS_BODY,
}


def text_of(source: Path) -> str:
    """A kernel file, with the body that two of them include in the include's place: faults are planted there, too."""
    text = source.read_text()
    if (name := BODIES.get(source.name)) is not None:
        body = (source.parent / name).read_text().replace("#pragma once\n", "")
        text = text.replace(f'#include "cuda/{name}"\n', body)
    return text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name.replace(" ", "_"))
def test_a_planted_fault_is_noticed(fault, objects, tmp_path, seed) -> None:
    source = next(path for path in harness.kernel_sources() if path.name == fault.file)
    text = text_of(source)
    for old, new in FEWER.get(fault.file, ()):
        text = plant(text, old, new, times=None)
    mutant = tmp_path / fault.file
    mutant.write_text(plant(text, fault.old, fault.new))
    machine = Machine(harness.build(objects, fault.sanitizer, {fault.file: mutant}), tmp_path, seed)
    with pytest.raises((LaunchError, SanitizerReport, AssertionError)) as caught:
        fault.run(machine)
    if fault.sanitizer == "thread":
        assert "data race" in str(caught.value)
    if fault.sanitizer == "address":
        assert "AddressSanitizer" in str(caught.value)


@pytest.mark.parametrize(
    "run",
    [
        forward,
        forward_in_pieces,
        backward,
        fp32,
        tile,
        tile_with_sums,
        tile_with_absent_columns,
        tile_by_words,
        tile_long,
        norm_in_tile,
        wide,
        norm_in_wide,
        norm_in_fp32,
        warpgroups,
        warpgroups_with_residual,
        weight_gradient,
        step,
        step_by_words,
        relate,
        relate_tiles,
        relate_gradients,
        dead_queries,
        relate_clusters,
        short_cycle,
        short_cycle_anywhere,
        short_cycle_in_clusters,
        losses,
        long_cycle,
        flat_weights,
        soft_of_the_huge,
        closed_gate,
        steps_by_columns,
        steps_in_one_launch,
        steps_in_clusters,
        steps_backward_in_one_launch,
    ],
    ids=lambda f: f.__name__,
)
def test_and_the_kernels_as_they_are_pass(machine, run) -> None:
    run(machine)


KERNELS = sorted((harness.CSRC / "cuda").glob("*.cu"))
TWINS = harness.HERE / "include" / "cuda" / "device"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernel_files_use_the_wrappers_alone(path: Path) -> None:
    text = path.read_text()
    for forbidden in ("asm", "__shared__", "__sync", "__shfl", "<<<", "cuda_runtime", "torch/"):
        assert forbidden not in text


def test_every_wrapper_with_device_code_has_a_twin() -> None:
    for header in (harness.CSRC / "cuda" / "device").glob("*.h"):
        text = header.read_text()
        needs = any(
            word in text
            for word in ("asm volatile", "asm(", "__sync", "__shfl", "__shared__", "cudaLaunch", "cuda_runtime")
        )
        assert (TWINS / header.name).exists() == needs, header.name
