"""Ahead-of-time compilation of the Triton kernels without a GPU, and what the compiler says they use.

``python -m tests.triton.resources`` prints the table for every configuration; test_compile.py holds a part of it.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcu_ops.ops import _triton

TARGETS = {80: "sm_80", 86: "sm_86", 90: "sm_90"}
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
SHAPES = {  # memory layout and size: [N, H, W] of many positions, of few, and of sizes without aligned groups
    "channels_last": (16, 56, 56),
    "channels_last_few": (1, 28, 28),
    "frames": (16, 56, 56),
    "frames_of_196": (16, 14, 14),
    "frames_of_49": (16, 7, 7),
    "strided": (16, 8, 8),
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses, per thread (registers, local bytes) and per block (shared bytes)."""

    registers: int
    local: int
    shared: int
    matrix_instructions: int
    vector_loads: int


def sequence(layout: str, channels: int, dtype: torch.dtype, frames: int = 8) -> Tensor:
    """A meta tensor [N,C,T,H,W] in the named memory layout."""
    n, height, width = SHAPES[layout]
    if layout.startswith("channels_last"):
        return torch.empty(n, frames, height, width, channels, dtype=dtype, device="meta").permute(0, 4, 1, 2, 3)
    if layout == "strided":
        return torch.empty(n, channels, frames, height, width, 2, dtype=dtype, device="meta")[..., 0]
    return torch.empty(n, channels, frames, height, width, dtype=dtype, device="meta")


def launches(kernel: str, channels: int, dtype: torch.dtype, layout: str, arch: int) -> list[Any]:
    """The launches of "forward", "affine_act" or "backward" for one shape, as the operator would make them."""
    kernels = _triton.kernels("recurrent_conv")
    x = sequence(layout, channels, dtype)
    weight = torch.empty(channels, channels, dtype=dtype, device="meta")
    state = torch.empty_like(x.select(2, 0), dtype=torch.float32)
    if kernel == "forward":
        return kernels.plan_forward(x, weight, None, False, False, arch)[1]
    if kernel == "affine_act":
        per_channel = torch.empty(channels, device="meta")
        return kernels.plan_affine_act(x, weight, per_channel, per_channel, state, x, True, True, arch)[1]
    grad = torch.empty_like(x)
    return kernels.plan_backward(grad, state, grad, weight, state, False, False, True, arch)[1]


def compile_launch(launch: Any, arch: int) -> Usage:
    """Compile one launch for an architecture and read its resources from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = launch.signature()
    names = launch.kernel.arg_names
    source = ASTSource(launch.kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert usage, text
    ptx = compiled.asm["ptx"]
    return Usage(
        registers=int(usage[1]),
        local=int(usage[2]) + int(usage[3]),
        shared=compiled.metadata.shared,
        matrix_instructions=len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
        vector_loads=len(
            re.findall(r"ld\.global[.\w:]*\.v[24]\.|cp\.async\.c[ag]\.shared\.global \[[^;]*, 0x(?:8|10),", ptx)
        ),
    )


def cases() -> Iterator[tuple[str, int, torch.dtype, str, int]]:
    """Every kernel, channel count, dtype, layout and architecture of the table."""
    for arch, dtype, channels, layout, kernel in itertools.product(
        TARGETS,
        (torch.float16, torch.bfloat16, torch.float32),
        (16, 32, 64, 128, 256, 512, 100),
        SHAPES,
        ("forward", "affine_act", "backward"),
    ):
        yield kernel, channels, dtype, layout, arch


def main(arguments: list[str]) -> int:
    """Print a line per compiled launch that matches every given word; exit code 1 if one spills or does not fit."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    failed = False
    seen = set()
    for kernel, channels, dtype, layout, arch in cases():
        name = f"{kernel} C={channels} {dtype} {layout} {TARGETS[arch]}".replace("torch.", "")
        if not all(word in name for word in arguments):
            continue
        for launch in launches(kernel, channels, dtype, layout, arch):
            key = (arch, launch.kernel.__name__, *map(str, launch.signature()), launch.warps, launch.stages)
            if key in seen:
                continue
            seen.add(key)
            usage = compile_launch(launch, arch)
            bad = usage.local > 0 or usage.shared > SHARED_LIMIT[arch]
            failed |= bad
            c = launch.constants
            print(
                f"{'BAD ' if bad else '    '}{name:52} {launch.kernel.__name__:18} rows {c.get('BLOCK_M', 0):3} warps "
                f"{launch.warps:2} registers {usage.registers:3} local {usage.local:4} shared {usage.shared:6} "
                f"mma {usage.matrix_instructions:3} vector loads {usage.vector_loads:3}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
