"""The machine that is measured on: what it is, and how fast it copies and multiplies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rcu_ops import _library
from rcu_ops._version import __version__
from rcu_ops.bench.case import DTYPE_NAMES
from rcu_ops.bench.timing import Timer

COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Peaks:
    """Measured rates.

    Attributes:
        bytes_per_second: of a large copy, read plus written.
        flops_per_second: of a large matrix product, per dtype name ("fp32", "bf16").
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def floor(self, bytes_moved: int, flops: int, dtype: torch.dtype) -> float:
        """Seconds that no implementation can beat: the larger of moving the bytes and doing the arithmetic.

        On a CPU whose caches hold the tensors the bytes can come faster than the copy suggests. 16-bit data can be
        multiplied at the rate of its own products or, widened, at that of fp32: the faster one counts.
        """
        rates = [self.flops_per_second[DTYPE_NAMES[dtype]]]
        if dtype.itemsize == 2 and "fp32" in self.flops_per_second:
            rates.append(self.flops_per_second["fp32"])
        return max(bytes_moved / self.bytes_per_second, flops / max(rates))

    def best_of(self, other: Peaks) -> Peaks:
        """The higher rate of each kind.

        A machine that others share, or whose clock depends on its temperature, shows its peaks only at times, and a
        peak that is measured too low makes every share of a floor too high.
        """
        names = dict.fromkeys([*self.flops_per_second, *other.flops_per_second])
        return Peaks(
            max(self.bytes_per_second, other.bytes_per_second),
            {n: max(self.flops_per_second.get(n, 0.0), other.flops_per_second.get(n, 0.0)) for n in names},
        )

    def __str__(self) -> str:
        """In a few words: ``copy 40.1 GB/s, fp32 160 GFLOP/s``."""
        rates = [f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self.flops_per_second.items()]
        return ", ".join([f"copy {self.bytes_per_second / 1e9:.1f} GB/s", *rates])


def measure_peaks(device: torch.device, timer: Timer, dtypes: tuple[torch.dtype, ...]) -> Peaks:
    """Copy bandwidth and matrix rate of ``device``, the best of several runs: a peak, not a typical value."""
    rates: dict[str, float] = {}
    side = MATRIX_SIDE[device.type]
    for dtype in dtypes:
        # Random numbers: a GPU multiplies zeros and ones faster, at a lower power draw.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[DTYPE_NAMES[dtype]] = 2 * side**3 / _best(timer, lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
    copied = COPY_BYTES[device.type]
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best(timer, lambda: target.copy_(source))
    return Peaks(2 * copied / seconds, rates)


def _best(timer: Timer, call: Any, seconds: float = 0.7, repeats: int = 7) -> float:
    timer.block(call, 1)
    best, end = timer.block(call, 1), time.perf_counter() + seconds
    while repeats > 0 or time.perf_counter() < end:
        best, repeats = min(best, timer.block(call, 1)), repeats - 1
    return best


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, device, versions and commit, as plain data for the JSON file."""
    native = _library.native()
    report: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_isa": native.cpu_isa() if native is not None and hasattr(native, "cpu_isa") else None,
        "kernel_library": _library.load_error() or "loaded",
        "load_average": os.getloadavg()[0],
        "device": str(device),
        "versions": _versions(),
        "commit": commit(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        report["gpu"] = properties.name
        report["gpu_arch"] = f"sm_{properties.major}{properties.minor}"
        report["gpu_l2_bytes"] = properties.L2_cache_size
        report["cuda"] = torch.version.cuda
    return report


def _versions() -> dict[str, str]:
    versions = {"rcu-ops": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout this package runs from, with ``+`` if files differ from it; else that of the build."""
    package = Path(__file__).resolve().parent
    try:
        head = _git(package, "rev-parse", "HEAD")
        # Only a checkout of this very project counts, not one that a virtual environment happens to lie in.
        if not _git(package, "ls-files", "--", Path(__file__).name):
            raise OSError("not a tracked file")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no")
        return head + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return _library.build_record().get("commit")


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return result.stdout.strip()


def peaks_as_data(peaks: Peaks) -> dict[str, Any]:
    """For the JSON file."""
    return asdict(peaks)
