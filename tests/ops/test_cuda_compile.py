"""Every CUDA kernel of the library keeps within one table of limits, spills nothing and is made of the instructions
meant for it.

What is looked at is the code that ships: the library is taken apart, and nothing is compiled again.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest

from rcu_ops import _library
from tests.cuda_host import harness

sys.path.insert(0, str(harness.ROOT / "build_backend"))
import rcu_ops_build

BUILT_FOR = rcu_ops_build.DEFAULT_ARCHITECTURES
ARCHITECTURES = ("sm_80", "sm_90")  # of the kernels for every GPU; files named *_sm90.cu are for sm_90a alone
HOPPER = "sm_90a"

# Registers per thread. A block must find room: 65536 registers per multiprocessor / (threads x limit) blocks at once.
REGISTERS = {
    "plain_scan": 128,  # 2 blocks of 256
    "fp32_scan": 128,  # the same
    "matrix_weight_grad": 128,  # 4 blocks of 128 or 2 of 256
    "weight_grad_partial": 168,  # 6 blocks of 64
    "weight_grad_partial<double>": 200,  # 1 block of 256
    "tile_scan": 168,  # 3 blocks of 128
    "step_scan": 128,  # 4 blocks of 128
    "plain_step_scan": 128,  # the same
    "step_words": 128,  # the same
    "plain_step_words": 128,  # 8 blocks of 64
    "fast_gru_pass": 64,  # bound by memory: 4 blocks of 256
    "fast_gru_column_steps": 80,  # 1 block of 768, 3 of 256
    "fast_gru_column_steps_backward": 80,  # the same
    "fast_gru_steps": 255,  # 1 block of 256
    "fast_gru_steps_backward": 255,  # the same
    "fast_gru_cluster_steps": 255,  # the same
    "wide_scan": 255,  # 1 block of 256
    "hopper_scan": 255,  # 1 block of 256: 192 are the state and its rounded copy
    "gate_pass": 128,  # bound by memory: 2 blocks of 256 with many loads on their way
    "gate_packs": 80,  # bound by memory: 3 blocks of 256 with many loads on their way
    "norm_pass": 128,  # 2 blocks of 256
    "norm_packs": 128,  # bound by memory: 2 blocks of 256 with many loads on their way, mostly 3 or 4
    "norm_finish": 64,
    "measure": 64,  # bound by memory: 4 blocks of 256
    "gate_of": 64,
    "align_query": 128,  # 2 blocks of 256
    "align_short_kernel": 128,  # 2 blocks of 256
    "align_short_cluster": 128,  # the same
    "key_gradient": 128,  # 2 blocks of 256
    "survey": 64,  # 2 blocks of 512
    "split_frames": 64,  # 4 blocks of 256
    "align_tile": 255,  # 1 block of 256, whose shared memory leaves no room for a second
    "tile_relate": 128,  # 2 blocks of 256
    "cluster_relate": 128,  # 2 blocks of 256
    "tile_gradient": 128,  # 2 blocks of 256
    "plain_relate": 128,  # 2 blocks of 256
    "plain_query_gradient": 128,
    "plain_key_gradient": 128,
    "plain_relate<double>": 255,  # 1 block of 256
    "plain_query_gradient<double>": 255,
    "plain_key_gradient<double>": 255,
    "map_weights": 64,  # bound by memory: 4 blocks of 256
    "map_gradients": 64,
    "update_cells": 128,  # 4 blocks of 128, all of whose numbers are on their way at once
    "sum_splits": 40,  # bound by memory alone: 6 blocks of 256
}
# Bytes that CUDA 12's compilers, 12.0 to 12.9, keep on the stack where CUDA 13's need none.
STACK_OF_CUDA_12 = {
    "align_tile": 32,
    "hopper_scan": 32,
    "plain_key_gradient<float>": 32,
    "plain_query_gradient<float>": 56,
    "tile_scan": 8,
    "update_cells": 16,
    "wide_scan": 8,
}
# Static shared memory: none, kernels ask for theirs at the launch (cuda/device/shared_memory.h). From sm_90 on the
# system has 1 KB.
STATIC_SHARED_BYTES = {"sm_80": 0, "sm_90": 1024, "sm_90a": 1024}


@dataclass(frozen=True)
class Usage:
    registers: int
    stack_bytes: int  # where spilled registers would be
    local_bytes: int
    shared_bytes: int


# Kernels of both 16-bit formats, which must have the instructions of both.
BOTH_FORMATS = {
    "tile_scan",
    "wide_scan",
    "step_scan",
    "tile_relate",
    "cluster_relate",
    "tile_gradient",
    "fast_gru_steps",
    "fast_gru_steps_backward",
    "fast_gru_cluster_steps",
    "matrix_weight_grad",
}
# The matrix unit's instructions in the machine code. A kernel without them would still be right, and slow.
MATRIX_INSTRUCTIONS = {
    "tile_scan": "HMMA",
    "wide_scan": "HMMA",
    "step_scan": "HMMA",
    "step_words": "HMMA",
    "hopper_scan": "HGMMA",
    "tile_relate": "HMMA",
    "cluster_relate": "HMMA",
    "tile_gradient": "HMMA",
    "fast_gru_steps": "HMMA",
    "fast_gru_steps_backward": "HMMA",
    "fast_gru_cluster_steps": "HMMA",
    **{
        f"{kernel}<rcu_ops::cuda::{dtype}>": "HMMA"
        for kernel in ("fast_gru_column_steps", "fast_gru_column_steps_backward")
        for dtype in ("__nv_bfloat16", "__half")
    },
    "matrix_weight_grad": "HMMA",
    "align_tile": "HMMA",
}


def disassembler() -> str:
    """The toolkit's cuobjdump, or the one that comes with Triton."""
    compiler = harness.nvcc()
    candidates = [which("cuobjdump"), str(Path(compiler).parent / "cuobjdump") if compiler else None]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    found = next((found for name in candidates if name and (found := which(name))), None)
    return found or pytest.skip("no cuobjdump, neither the toolkit's nor Triton's")


def output(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> list[str]:
    return subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


@pytest.fixture(scope="module")
def library() -> Path:
    record = _library.build_record()
    if "cuda" not in record or record["kind"] != "cuda" or sorted(record["architectures"]) != sorted(BUILT_FOR):
        pytest.skip(f"the library was not built with CUDA kernels for {', '.join(BUILT_FOR)}")
    assert record["sources"] == rcu_ops_build.hash_sources(), "the library was built from other sources: install again"
    return _library.LIBRARY


def short_name(signature: str) -> str:
    """``void rcu_ops::cuda::(anonymous namespace)::kernel<float, true>(...)`` -> ``kernel<float, true>``."""
    match = re.search(r"namespace\)::(\w+(?:<.*?>)?)\(", signature)
    assert match is not None, signature
    return match.group(1)


@pytest.fixture(scope="module")
def kernels(library) -> dict[tuple[str, str], tuple[str, Usage]]:
    """From architecture and kernel to its symbol and what it uses."""
    found = {}
    text = output(disassembler(), "-res-usage", library)
    for element in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", element)
        assert architecture is not None
        entries = re.findall(r"Function (\w+):\s+(REG:.*)", element)
        for (symbol, line), signature in zip(entries, demangled([symbol for symbol, _ in entries]), strict=False):
            numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            use = Usage(numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"])
            found[architecture.group(1), short_name(signature)] = symbol, use
    return found


@pytest.fixture(scope="module")
def usage(kernels) -> dict[tuple[str, str], Usage]:
    return {key: use for key, (_, use) in kernels.items()}


def test_every_kernel_has_a_limit_and_every_limit_a_kernel(usage) -> None:
    names = {
        architecture: {name.partition("<")[0] for arch, name in usage if arch == architecture}
        for architecture in (*ARCHITECTURES, HOPPER)
    }
    assert names["sm_80"] == names["sm_90"]
    assert not names["sm_80"] & names[HOPPER]
    assert names["sm_80"] | names[HOPPER] == {name.partition("<")[0] for name in REGISTERS}


def test_registers(usage) -> None:
    over = {}
    for (architecture, name), use in usage.items():
        limit = REGISTERS.get(name, REGISTERS[name.partition("<")[0]])
        if use.registers > limit:
            over[architecture, name] = use.registers
    assert not over


def test_nothing_spills(usage) -> None:
    known = STACK_OF_CUDA_12 if _library.build_record()["cuda"].startswith("12.") else {}
    stack = {key: known.get(key[1], known.get(key[1].partition("<")[0], 0)) for key in usage}
    assert not {key: use for key, use in usage.items() if use.stack_bytes > stack[key] or use.local_bytes}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, HOPPER])
def test_matrix_kernels_run_on_the_matrix_unit(kernels, library, architecture) -> None:
    # One instance of each: the instruction stands in the body that all of them share, and disassembling takes its time.
    instances = {
        name if name in MATRIX_INSTRUCTIONS else name.partition("<")[0]: (symbol, name)
        for (arch, name), (symbol, _) in kernels.items()
        if arch == architecture
    }
    wanted = {
        symbol: (name, MATRIX_INSTRUCTIONS[base])
        for base, (symbol, name) in instances.items()
        if base in MATRIX_INSTRUCTIONS
    }
    assert wanted
    text = output(disassembler(), "-sass", "-arch", architecture, "-fun", ",".join(wanted), library)
    found = {function.partition("\n")[0].strip(): function for function in text.split("Function : ")[1:]}
    assert found.keys() == wanted.keys()
    for symbol, (name, instruction) in wanted.items():
        used = re.findall(rf"\*/\s+(?:@!?U?P\w+ )?({instruction}\b\S*)", found[symbol])
        assert used, name
        if name.partition("<")[0] in BOTH_FORMATS:
            assert {"BF16" in word for word in used} == {True, False}, name


def test_shared_memory(usage) -> None:
    assert not {key: use for key, use in usage.items() if use.shared_bytes > STATIC_SHARED_BYTES[key[0]]}


def test_all_types_are_there(usage) -> None:
    assert sum(arch == HOPPER and name.startswith("hopper_scan<") for arch, name in usage) == 2
    for architecture in ARCHITECTURES:
        assert sum(arch == architecture and name.startswith("tile_scan<") for arch, name in usage) == 2 * 2
        assert sum(arch == architecture and name == "wide_scan" for arch, name in usage) == 1
        assert sum(arch == architecture and name.startswith("plain_step_scan<") for arch, name in usage) == 2
        assert sum(arch == architecture and name.startswith("step_words<") for arch, name in usage) == 2 * 2
        # Both 16-bit formats in one kernel: see test_matrix_kernels_run_on_the_matrix_unit.
        assert sum(arch == architecture and name.startswith("step_scan<") for arch, name in usage) == 2
        assert sum(arch == architecture and name.startswith("matrix_weight_grad<") for arch, name in usage) == 2 * 2
        for kernel, expected in (
            ("fast_gru_pass", {"double", "float", "unsigned short"}),
            ("fast_gru_column_steps", {"float", "__nv_bfloat16", "__half"}),
            ("fast_gru_column_steps_backward", {"float", "__nv_bfloat16", "__half"}),
            *((kernel, {"double", "float"}) for kernel in ("plain_scan", "weight_grad_partial", "sum_splits")),
        ):
            types = {
                name.split("<")[1].split(",")[0].strip(">").split("::")[-1]
                for arch, name in usage
                if arch == architecture and name.startswith(kernel + "<")
            }
            assert types == expected


def test_every_wrapper_assembles(tmp_path) -> None:
    """The probes of tests/cuda_host use every instruction behind csrc/cuda/device once."""
    if (compiler := harness.nvcc()) is None:
        pytest.skip("no nvcc: the probes cannot be compiled")
    for name, code in [*(("probes", code) for code in ARCHITECTURES), ("probes_sm90", HOPPER)]:
        target = [f"-gencode=arch={code.replace('sm', 'compute')},code={code}", "-cubin", "-o", tmp_path / code]
        source = harness.HERE / f"{name}.cu"
        defines = ["-DRCU_OPS_SM90A", "-DRCU_OPS_EACH_ARCHITECTURE"]
        command = [compiler, "-std=c++20", "-O1", *defines, f"-I{harness.CSRC}", *target, source]
        result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        assert output(disassembler(), "-res-usage", tmp_path / code).count("Function ") > 5


def test_ptx_for_later_architectures(library) -> None:
    """The library ships PTX for later GPUs of every kernel that is not for sm_90a alone."""
    text = output(disassembler(), "-lptx", library)
    groups = [
        group
        for group in rcu_ops_build.compiled_together(rcu_ops_build.cuda_sources())
        if not group[0].endswith("_sm90.cu")
    ]
    each = [group for group in groups if any(map(rcu_ops_build.differs_by_architecture, group))]
    assert len(re.findall(r"sm_90\.ptx", text)) == len(each)
    assert len(re.findall(r"sm_80\.ptx", text)) == len(groups) - len(each)
