"""Ahead-of-time compilation of the Triton kernels for sm_80 and sm_90: they compile, do not spill, and fit."""

from __future__ import annotations

import pytest
import torch

from rcu_ops.ops import _triton, _warmup
from tests.triton import resources

pytestmark = pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")

# (kernel, channels, dtype, layout); `python -m tests.triton.resources` prints every other one too.
CASES = [
    ("affine_act", 64, torch.bfloat16, "channels_last"),
    ("backward", 64, torch.bfloat16, "channels_last"),
    ("backward", 128, torch.bfloat16, "frames"),
    ("forward", 256, torch.bfloat16, "channels_last"),
    ("forward", 512, torch.bfloat16, "frames_of_49"),
    ("forward", 64, torch.float16, "frames"),
    ("affine_act", 100, torch.float16, "strided"),
    ("backward", 32, torch.float16, "channels_last_few"),
    ("affine_act", 64, torch.float32, "channels_last"),
    ("backward", 64, torch.float32, "frames"),
    ("forward", 128, torch.float32, "frames"),
    ("affine_act", 128, torch.float32, "channels_last"),
    ("backward", 512, torch.float32, "frames_of_196"),
    ("forward", 256, torch.float32, "channels_last"),
]


@pytest.fixture(autouse=True)
def quiet_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # set per launch as well; newer compilers warn when it is unset


# Bytes per thread that may spill: none, but for 512 channels without aligned memory (see the table of tiles).
SPILLS = {(512, "frames_of_49"): 512}


def check(kernel: str, channels: int, dtype: torch.dtype, layout: str, arch: int, matrix_unit: bool) -> None:
    launches = resources.launches(kernel, channels, dtype, layout, arch)
    assert [launch.kernel.__name__ for launch in launches] == {
        "backward": ["scan_kernel", "weight_grad_kernel", "reduce_kernel"]
    }.get(kernel, ["scan_kernel"])
    for launch in launches:
        usage = resources.compile_launch(launch, arch)
        name = launch.kernel.__name__
        assert usage.local <= SPILLS.get((channels, layout), 0), f"{name} spills {usage.local} bytes: {usage}"
        assert usage.shared <= resources.SHARED_LIMIT[arch], f"{name} does not fit: {usage}"
        if name != "reduce_kernel":
            assert (usage.matrix_instructions > 0) == matrix_unit, f"{name}: {usage}"
        if name == "scan_kernel" and layout in ("channels_last", "frames"):
            assert usage.vector_loads > 0, f"{name} reads one element at a time: {usage}"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("kernel", "channels", "dtype", "layout"), CASES, ids=str)
def test_compiles_without_spills_and_fits(kernel, channels, dtype, layout, arch) -> None:
    check(kernel, channels, dtype, layout, arch, matrix_unit=dtype != torch.float32)


@pytest.mark.parametrize("arch", [80, 90])
def test_tf32_is_used_exactly_when_torch_allows_it(arch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        check("forward", 64, torch.float32, "channels_last", arch, matrix_unit=True)
        torch.set_float32_matmul_precision("highest")
        check("forward", 64, torch.float32, "channels_last", arch, matrix_unit=False)
    finally:
        torch.set_float32_matmul_precision(before)


def test_small_shared_memory_is_respected() -> None:
    for launch in resources.launches("forward", 256, torch.bfloat16, "channels_last", 86):
        usage = resources.compile_launch(launch, 86)
        assert usage.local == 0 and usage.shared <= resources.SHARED_LIMIT[86], usage


def test_neither_frames_nor_direction_nor_update_is_a_compile_key() -> None:
    kernels = _triton.kernels("recurrent_conv")
    weight = torch.empty(64, 64, dtype=torch.float16, device="meta")
    keys = set()
    for frames in (2, 3, 16, 128):
        for mean in (False, True):
            for reverse in (False, True):
                x = resources.sequence("channels_last", 64, torch.float16, frames)
                (launch,) = kernels.plan_forward(x, weight, None, mean, reverse, 90)[1]
                keys.add(launch.key())
    assert len(keys) == 1


def test_offsets_beyond_2_31_are_64_bits_wide() -> None:
    kernels = _triton.kernels("recurrent_conv")
    weight = torch.empty(64, 64, dtype=torch.float16, device="meta")
    for n, wide in ((2, False), (700, True)):
        x = torch.empty(n, 64, 16, 56, 56, dtype=torch.float16, device="meta")
        (launch,) = kernels.plan_forward(x, weight, None, False, False, 90)[1]
        assert launch.constants["WIDE"] is wide
    usage = resources.compile_launch(launch, 90)
    assert usage.local == 0, usage


def test_the_table_serves_every_channel_count_the_operator_accepts() -> None:
    kernels = _triton.kernels("recurrent_conv")
    for arch, precisions in kernels.SCAN_TILES.items():
        assert arch in kernels.MULTIPROCESSORS
        for tiles in precisions.values():
            assert max(tiles) == _triton.MAX_CHANNELS
            assert sorted(tiles) == [16, 32, 64, 128, 256, 512]


def test_warmup_plans_what_the_operators_launch() -> None:
    """Every launch of the three operators, with any optional argument, is among those that warmup compiles."""
    kernels = _triton.kernels("recurrent_conv")
    for layout, memory_format in (("channels_last", torch.channels_last_3d), ("frames", torch.contiguous_format)):
        shape = (16, 64, 8, 56, 56)
        planned = {
            launch.key() for launch in _warmup.planned(kernels, shape, torch.bfloat16, memory_format, 90, True, True)
        }
        for kernel in ("forward", "affine_act", "backward"):
            for launch in resources.launches(kernel, 64, torch.bfloat16, layout, 90):
                assert launch.key() in planned, kernel
