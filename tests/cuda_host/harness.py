"""Builds the CUDA kernels for the host (see machine.h) and runs them on torch CPU tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of rcu_ops::DType

FLAGS = [
    "-std=c++20",
    "-DRCU_OPS_SM90A",
    "-g1",  # lines for the sanitizers' reports; variables would take a quarter more
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Winvalid-pch",  # and no object is compiled without it
    "-ffp-contract=off",
]


def contracted() -> list[str]:
    """Flags under which a product and the sum it goes into round once, as nvcc has it, where this processor can.

    What has the same bits in two kernels, or in two tiles, has them however products and sums are joined.
    """
    fma = ["-ffp-contract=fast", "-fexpensive-optimizations"]
    if platform.machine() != "x86_64":
        return fma
    cpu = Path("/proc/cpuinfo")
    return [*fma, "-mfma"] if cpu.exists() and " fma " in cpu.read_text() else []


# The kernels' offsets are counted in 64 bits, and under AddressSanitizer and UBSan in 32: both are the same source.
# Every build that runs the tests of numbers and layouts stops at an access that is not aligned to its type: this
# processor takes it, a GPU does not.
ABORT = "-fno-sanitize-recover=all"
SANITIZERS: dict[str, list[str]] = {
    "none": ["-O1", "-fsanitize=alignment", ABORT, *contracted()],
    "address": ["-O0", "-fsanitize=address,undefined", ABORT, "-DRCU_OPS_OFFSETS_32"],
    "thread": ["-O1", "-fsanitize=thread"],
}
MACHINE: dict[str, list[str]] = {
    "none": ["-O1"],
    "address": ["-O1", "-fsanitize=address"],
    "thread": ["-O1", "-DCUDA_HOST_THREAD_SANITIZER"],
}


def kernel_sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("probes*.cu"))]


@functools.cache
def nvcc() -> str | None:
    """The CUDA compiler, as the build looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


@functools.cache
def toolkit_headers() -> Path | None:
    """The directory of cuda_bf16.h, or None."""
    if (compiler := nvcc()) is None:
        return None
    # nvcc itself knows its root; what is on PATH may be a wrapper.
    text = subprocess.run([compiler, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    tops = [line.partition("TOP=")[2] for line in text.splitlines() if line.startswith("#$ TOP=")]
    for top in [*tops, str(Path(compiler).parent.parent)]:
        for include in (Path(top) / "include", Path(top) / "targets" / "x86_64-linux" / "include"):
            if (include / "cuda_bf16.h").exists():
                return include.resolve()
    return None


def why_not() -> str | None:
    """Why the kernels cannot be built for the host here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if toolkit_headers() is None:
        return "no CUDA toolkit headers (cuda_bf16.h)"
    return None


class BuildError(Exception):
    pass


PRECOMPILED = HERE / "precompiled.h"
INCLUDE = (HERE / "include", HERE, CSRC)  # where the compiler looks for "headers", in this order


@functools.cache
def _included(header: str) -> frozenset[Path]:
    """Everything that may be meant by ``#include "header"``."""
    return frozenset(path for directory in INCLUDE if (path := directory / header).exists())


def _sources_of(source: Path) -> list[Path]:
    """A source and all of our headers that it can reach, whatever the preprocessor would make of its conditions."""
    found, left = {source}, [source]
    while left:
        at = left.pop()
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', at.read_text(), re.MULTILINE)
        beside = {path for name in names if (path := at.parent / name).exists()}
        new = beside.union(*map(_included, names)) - found
        found |= new
        left += new
    return [source, *sorted(found - {source})]


@functools.cache
def _compiler_identity() -> str:
    version = subprocess.run(["g++", "-v"], capture_output=True, text=True).stderr
    toolkit = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True).stdout
    return f"{version}{toolkit_headers()}{toolkit}"


def _key(source: Path, flags: Sequence[str]) -> str:
    """Of an object: what it is made from, by content and not by date."""
    digest = hashlib.sha256(f"{_compiler_identity()}{flags}".encode())
    for path in (*_sources_of(source), PRECOMPILED):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:24]


def _put(command: Sequence[str | Path], output: Path) -> subprocess.Popen[str]:
    """Start a compiler that writes beside ``output``; see :func:`_finish`."""
    beside = output.with_name(f"{output.name}.{os.getpid()}")
    words = [*map(str, command), "-o", str(beside)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str], output: Path) -> None:
    """Wait for it and give the file its name: under that name it is whole, whoever else builds at the same time."""
    beside = output.with_name(f"{output.name}.{os.getpid()}")
    text = process.communicate()[0]
    if process.returncode != 0:
        beside.unlink(missing_ok=True)
        raise BuildError(text)
    beside.replace(output)


def cache() -> Path:
    """The directory for objects and executables that later sessions may want, too.

    What none of them has used for three days goes.
    """
    directory = ROOT / "build" / "cuda_host"
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another session cleans up, too
            if path.stat().st_mtime < time.time() - 3 * 24 * 3600:
                path.unlink()
    return directory


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time compiles in the directory, on two cores; the others wait and find its objects."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def whole(directory: Path, sanitizer: str) -> Path:
    """The executable of the kernels as they are."""
    with _alone(directory):
        return build(directory, sanitizer)


def _precompiled(directory: Path, flags: Sequence[str], include: Sequence[str]) -> Path:
    """A copy of ``precompiled.h``, beside which the compiler finds it compiled under these flags."""
    header = directory / f"precompiled-{_key(PRECOMPILED, flags)}.h"
    compiled = header.with_name(f"{header.name}.gch")
    if not (_used(header) and _used(compiled)):
        shutil.copyfile(PRECOMPILED, header)
        _finish(_put(["g++", *flags, *include, "-x", "c++-header", PRECOMPILED], compiled), compiled)
    return header


def build(directory: Path, sanitizer: str, replaced: dict[str, Path] | None = None) -> Path:
    """Compile the machine with all kernels; ``replaced``: file names of kernel sources to take from elsewhere.

    Objects are named by the content of what they are made from: builds in ``directory`` share them. An executable with
    replaced sources is put beside these. Two compilers run at once.
    """
    if replaced:
        whole(directory, sanitizer)
    headers = toolkit_headers()
    assert headers is not None
    include = [*(f"-I{path}" for path in INCLUDE), "-isystem", str(headers)]
    jobs = []
    for source in [*kernel_sources(), HERE / "machine.cpp", HERE / "main.cpp", *sorted(HERE.glob("run_*.cpp"))]:
        flags = [*FLAGS, *SANITIZERS[sanitizer]]
        if replaced and source.name in replaced:
            source = replaced[source.name]
            if sanitizer == "none":
                flags = [*FLAGS, "-O0"]  # it runs a case or two: compiling it is what takes time
        if source.name == "machine.cpp":
            # Only the kernels are under test. ThreadSanitizer is told about fibers and must not see the machine itself.
            flags = [*FLAGS, *MACHINE[sanitizer]]
        elif source.name == "main.cpp" or source.name.startswith("run_"):
            flags = [*FLAGS, *MACHINE["none"]]
        output = directory / f"{source.stem}-{_key(source, flags)}.o"
        command = ["g++", *flags, *include]
        if source.suffix == ".cu" and not _used(output):
            command += ["-include", str(_precompiled(directory, flags, include))]
        jobs.append(([*command, "-x", "c++", "-c", str(source)], output))
    running: list[tuple[subprocess.Popen[str], Path]] = []
    waiting = [job for job in jobs if not _used(job[1])]
    while waiting or running:
        while waiting and len(running) < 2:
            command, output = waiting.pop()
            running.append((_put(command, output), output))
        _finish(*running.pop(0))
    objects = [str(output) for _, output in jobs]
    place = next(iter(replaced.values())).parent if replaced else directory
    executable = place / f"cuda_host-{sanitizer}-{hashlib.sha256(''.join(objects).encode()).hexdigest()[:16]}"
    if not _used(executable):
        _finish(_put(["g++", *SANITIZERS[sanitizer], *objects], executable), executable)
    return executable


def _used(path: Path) -> bool:
    """Whether it is there; if so, it has just been used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


class LaunchError(Exception):
    """A launch returned an error, or the machine reported a fault."""


class SanitizerReport(Exception):
    """AddressSanitizer, UndefinedBehaviorSanitizer or ThreadSanitizer ended the process."""


@dataclasses.dataclass
class Machine:
    """An executable of :func:`build` and where its cases are written.

    Attributes:
        seed: of the schedule.
        device: limits of the pretended GPU (shared_bytes, multiprocessors, clusters, architecture) and ``resident``
            blocks.
        plain, hopper: run scans on the plain or the sm_90a kernel whatever the planner prefers.
        products: run relations by a library's products (1), or mend what is there (2).
        plan: how the last scan ran, in the planner's words.
    """

    executable: Path
    directory: Path
    seed: int = 0
    device: dict[str, int] = dataclasses.field(default_factory=dict)
    plain: bool = False
    hopper: bool = False
    products: int = 0
    plan: str = ""

    def run(self, fields: dict[str, object], storages: Iterable[Tensor]) -> None:
        """One case; the tensors' storages are updated in place."""
        case = self.directory / "case"
        storages = list(storages)
        raw = [torch.empty(0, dtype=torch.uint8).set_(s.untyped_storage()) for s in storages]
        lines = {"storages": [r.numel() for r in raw], "seed": self.seed, **self.device, **fields}
        case.with_suffix(".txt").write_text(
            "".join(
                f"{key} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}\n"
                for key, value in lines.items()
            )
        )
        case.with_suffix(".bin").write_bytes(b"".join(r.numpy().tobytes() for r in raw))
        environment = {
            **os.environ,
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # an aborted launch abandons its fibers
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        }
        # ThreadSanitizer's memory layout does not survive every kind of address space randomisation.
        command = (
            ["setarch", "-R", str(self.executable)] if "-thread-" in self.executable.name else [str(self.executable)]
        )
        result = subprocess.run(
            [*command, str(case)], env=environment, capture_output=True, text=True, errors="replace"
        )
        if result.returncode != 0:
            raise SanitizerReport(f"exit code {result.returncode}\n{result.stdout}{result.stderr[:8000]}")
        verdict, _, self.plan = result.stdout.strip().partition(" ")
        if verdict != "ok":
            raise LaunchError(result.stdout.strip())
        data, at = bytearray(case.with_suffix(".out").read_bytes()), 0
        for r in raw:
            if r.numel():
                r.copy_(torch.frombuffer(data, dtype=torch.uint8, count=r.numel(), offset=at))
            at += r.numel()

    def probe(self, name: str, *tensors: Tensor) -> None:
        self.run({"op": "probe", "name": name}, tensors)

    # ---- recurrent_conv, as its bindings call the kernels ----

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        h0: Tensor | None = None,
        *,
        mean: bool = False,
        reverse: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
        partial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """recurrent_conv, or recurrent_conv_affine_act when scale is given; partial: for the statistics of h."""
        alpha = 0.5 if mean else 1.0
        y, h_n = poisoned_like(x), poisoned_like(x.select(2, 0), state_dtype(x.dtype))
        first = alpha if h0 is not None else 1.0
        self._recurrent_conv(
            "scan",
            {
                **{"x": x, "y": y, "residual": residual, "first": h0, "last": h_n},
                **{"weight": weight, "scale": scale, "shift": shift, "partial": partial},
            },
            shape=x,
            reverse=int(reverse),
            relu=int(relu),
            init=0 if h0 is None else 1,
            last_kind=1,
            alpha=alpha,
            alpha_first=first,
            alpha_final=alpha if x.shape[2] > 1 else first,
        )
        return y, h_n

    def backward(
        self,
        grad_h: Tensor | None,
        grad_h_n: Tensor | None,
        h: Tensor,
        weight: Tensor,
        h0: Tensor | None = None,
        *,
        mean: bool = False,
        reverse: bool = False,
        norm: dict[str, Tensor] | None = None,
        eps: float = 0,
        relu: bool = False,
        fused: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """norm: tables of the batch normalisation after it, whose gradient grad_h then is.

        fused: the scan makes the weight gradient's sums.
        """
        alpha = 0.5 if mean else 1.0
        dx, dweight = poisoned_like(h), poisoned_like(torch.empty(weight.shape, dtype=weight.dtype))
        dh0 = None if h0 is None else poisoned_like(h0)
        final = 1.0 if h0 is None else alpha
        n, c, _, height, width = h.shape
        partial = poisoned_like(torch.empty(-(-n * height * width // 128) if fused else 0, c, c))
        self._recurrent_conv(
            "scan",
            {"x": grad_h, "y": dx, "first": grad_h_n, "last": dh0, "weight": weight.T}
            | ({"residual": h, **norm} if norm else {})
            | ({"residual": h, "weight_partial": partial, "weight_first": h0} if fused else {}),
            shape=h,
            reverse=int(not reverse),
            relu=int(relu),
            eps=eps,
            init=0 if grad_h_n is None else 2,
            last_kind=0 if h0 is None else 2,
            alpha=alpha,
            alpha_first=alpha if h.shape[2] > 1 else final,
            alpha_final=final,
        )
        if fused:
            sums, plan = {"weight_partial": partial, "dweight": dweight}, self.plan
            self._recurrent_conv("weight_grad_parts", sums, shape=h, reverse=0, parts=len(partial))
            self.plan = plan
            return dx, dweight, dh0
        device = self.device
        if "shared_bytes" in device:  # of which the weight gradient's kernel for all formats needs what every GPU has
            fewest = (72 if h.dtype == torch.float64 else 48) * 1024
            self.device = device | {"shared_bytes": max(device["shared_bytes"], fewest)}
        self._recurrent_conv(
            "weight_grad",
            {"dx": dx, "h": h, "first": h0, "dweight": dweight},
            shape=h,
            reverse=int(reverse),
        )
        self.device = device
        return dx, dweight, dh0

    def _recurrent_conv(self, op: str, tensors: dict[str, Tensor | None], shape: Tensor, **fields: float) -> None:
        n, c, t, height, width = shape.shape
        states = {  # a state's strides are those of a sequence with one frame
            name: tensor.unsqueeze(2) if tensor is not None and tensor.dim() == 4 else tensor
            for name, tensor in tensors.items()
        }
        fields.update(
            N=n,
            C=c,
            T=t,
            H=height,
            W=width,
            dtype=DTYPES.index(shape.dtype),
            kernel=1 if self.plain else 2 * self.hopper,
        )
        self.call(op, states, **fields)

    def call(self, op: str, tensors: dict[str, Tensor | None], **fields: object) -> None:
        """A case of ``run_<op>.cpp``: tensors by name (None: absent), and its other fields."""
        case: dict[str, object] = {"op": op, **fields}
        storages: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor is not None:
                key = tensor.untyped_storage()._cdata
                storages.setdefault(key, tensor)
                offset = tensor.storage_offset() * tensor.element_size()
                dtype = DTYPES.index(tensor.dtype) if tensor.dtype in DTYPES else -1
                case[name] = [list(storages).index(key), offset, dtype, *tensor.stride()]
        self.run(case, storages.values())


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_number_further(x: Tensor) -> Tensor:
    """A copy of a dense tensor, in its strides, that begins one number after an aligned address."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.as_strided(x.shape, x.stride()).copy_(x)


def poisoned_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like`` in which an element that nobody writes stays NaN."""
    return torch.full_like(x, torch.nan, dtype=dtype)
