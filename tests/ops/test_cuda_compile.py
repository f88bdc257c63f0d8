"""Every CUDA kernel compiles for the architectures of the build, without spilling and within one table of limits."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest

from tests.cuda_host import harness

ARCHITECTURES = ("sm_80", "sm_90a")

# Registers per thread. A block must find room: 65536 registers per multiprocessor / (threads x limit) blocks at once.
REGISTERS = {
    "plain_scan": 128,  # 2 blocks of 256
    "matrix_weight_grad": 128,  # 4 blocks of 128 or 2 of 256
    "weight_grad_partial": 128,  # 2 blocks of 256
    "weight_grad_partial<double>": 200,  # 1 block of 256
    "tile_scan": 255,  # 2 blocks of 128
    "fast_gru_pass": 64,  # bound by memory: 4 blocks of 256
    "wide_scan": 255,  # 1 block of 256
    "gate_pass": 64,  # bound by memory: 4 blocks of 256
    "measure": 64,  # the same
    "gate_of": 64,
    "align_query": 128,  # 2 blocks of 256
    "key_gradient": 128,  # 2 blocks of 256
    "sum_splits": 40,  # bound by memory alone: 6 blocks of 256
}
# Static shared memory: none, kernels ask for theirs at the launch (cuda/device/shared_memory.h).
STATIC_SHARED_BYTES = 0


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int


# The matrix unit's instructions in the machine code. A kernel without them would still be right, and slow.
MATRIX_INSTRUCTIONS = {"tile_scan": "HMMA", "wide_scan": "HMMA", "matrix_weight_grad": "HMMA"}


def disassembler() -> str | None:
    """The toolkit's cuobjdump, or the one that comes with Triton."""
    compiler = harness.nvcc()
    candidates = [which("cuobjdump"), str(Path(compiler).parent / "cuobjdump") if compiler else None]
    if (triton := importlib.util.find_spec("triton")) is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((found for name in candidates if name and (found := which(name))), None)


def instructions(cubin: Path) -> dict[str, list[str]]:
    """From a kernel's demangled signature to the names of its instructions."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump, neither the toolkit's nor Triton's")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return {
        function.partition("\n")[0].strip(): re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9.]*)", function)
        for function in text.split("Function : ")[1:]
    }


def compile_for(source: Path, architecture: str, directory: Path) -> dict[str, Usage]:
    """From a kernel's demangled signature to what it uses."""
    compiler = harness.nvcc()
    assert compiler is not None
    target = ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}", "-cubin"]
    output = directory / f"{source.stem}-{architecture}"
    flags = ["-std=c++20", "-O3", "-DNDEBUG", f"-I{harness.CSRC}", "-Xptxas", "-v"]
    result = subprocess.run(
        [compiler, *flags, *target, "-o", str(output), str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    assert not warnings, warnings
    text = subprocess.run(["c++filt"], input=result.stderr, capture_output=True, text=True, check=True).stdout
    found = {}
    for entry in text.split("Compiling entry function ")[1:]:
        numbers = {
            key: int(match.group(1)) if (match := re.search(pattern, entry)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "stack_bytes": r"(\d+) bytes stack frame",
                "shared_bytes": r"(\d+) bytes smem",
            }.items()
        }
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", entry)))
        name = re.match(r"'(.*?)' for", entry)
        assert name is not None
        assert numbers["registers"] > 0
        found[name.group(1)] = Usage(spilled_bytes=spilled, **numbers)
    return found


def short_name(signature: str) -> str:
    """``void rcu_ops::cuda::(anonymous namespace)::kernel<float, true>(...)`` -> ``kernel<float, true>``."""
    match = re.search(r"namespace\)::(\w+(?:<.*?>)?)\(", signature)
    assert match is not None, signature
    return match.group(1)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


@pytest.fixture(scope="module")
def usage(cubins: Path) -> dict[tuple[str, str], Usage]:
    """From architecture and kernel to what it uses."""
    if harness.nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    sources = sorted((harness.CSRC / "cuda").glob("*.cu"))
    jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_for(*job, cubins), jobs))
    return {
        (architecture, short_name(signature)): use
        for (_, architecture), kernels in zip(jobs, results, strict=True)
        for signature, use in kernels.items()
    }


def test_every_kernel_has_a_limit_and_every_limit_a_kernel(usage) -> None:
    for architecture in ARCHITECTURES:
        kernels = {name.partition("<")[0] for arch, name in usage if arch == architecture}
        assert kernels == {name.partition("<")[0] for name in REGISTERS}


def test_registers(usage) -> None:
    over = {}
    for (architecture, name), use in usage.items():
        limit = REGISTERS.get(name, REGISTERS[name.partition("<")[0]])
        if use.registers > limit:
            over[architecture, name] = use.registers
    assert not over


def test_nothing_spills(usage) -> None:
    assert not {key: use for key, use in usage.items() if use.spilled_bytes or use.stack_bytes}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrix_kernels_run_on_the_matrix_unit(usage, cubins, architecture) -> None:
    found = {
        short_name(signature): names
        for cubin in sorted(cubins.glob(f"*-{architecture}"))
        for signature, names in instructions(cubin).items()
    }
    assert found.keys() == {name for arch, name in usage if arch == architecture}
    for name, names in found.items():
        wanted = MATRIX_INSTRUCTIONS.get(name.partition("<")[0])
        on_matrix_unit = {n.partition(".")[0] for n in names} & {"HMMA", "HGMMA", "DMMA", "IMMA"}
        assert on_matrix_unit == ({wanted} if wanted else set()), name


def test_shared_memory(usage) -> None:
    assert not {key: use for key, use in usage.items() if use.shared_bytes > STATIC_SHARED_BYTES}


def test_all_types_are_there(usage) -> None:
    for architecture in ARCHITECTURES:
        assert sum(arch == architecture and name.startswith("tile_scan<") for arch, name in usage) == 2 * 3 * 2
        assert sum(arch == architecture and name.startswith("wide_scan<") for arch, name in usage) == 2 * 2
        assert sum(arch == architecture and name.startswith("matrix_weight_grad<") for arch, name in usage) == 2 * 2 * 2
        for kernel in ("plain_scan", "weight_grad_partial", "sum_splits", "fast_gru_pass"):
            types = {
                name.split("<")[1].split(",")[0].strip(">")
                for arch, name in usage
                if arch == architecture and name.startswith(kernel + "<")
            }
            assert types == {"double", "float", "__nv_bfloat16", "__half"}


def test_every_wrapper_assembles(tmp_path) -> None:
    """The probes of tests/cuda_host use every instruction behind csrc/cuda/device once."""
    if harness.nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    jobs = [(harness.HERE / "probes.cu", architecture) for architecture in ARCHITECTURES]
    jobs.append((harness.HERE / "probes_sm90.cu", "sm_90a"))
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda job: compile_for(*job, tmp_path), jobs):
            assert len(found) > 5


def test_ptx_for_later_architectures(tmp_path) -> None:
    """The build ships PTX of compute_90: nothing in a kernel may need an architecture-specific feature."""
    if (compiler := harness.nvcc()) is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    for source in sorted((harness.CSRC / "cuda").glob("*.cu")):
        command = [compiler, "-std=c++20", "-O3", f"-I{harness.CSRC}", "-ptx", "-arch=compute_90"]
        result = subprocess.run(
            [*command, "-o", str(tmp_path / "x.ptx"), str(source)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert ".target sm_90\n" in (tmp_path / "x.ptx").read_text()
