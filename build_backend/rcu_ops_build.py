"""What the build will make, and how: finds torch, the C++ compiler and the CUDA toolkit, and compiles and links.

Standard library only, and nothing here imports torch or asks a driver: a machine without a GPU builds the same package
as one with it, and deciding takes milliseconds. ``make_plan`` decides, ``build`` compiles, ``write_record`` keeps what
was decided for ``rcu-ops doctor``.

Environment:
    RCU_OPS_BUILD: ``cuda`` (CPU and CUDA kernels), ``cpu`` or ``none``; a choice that cannot be met is an error. Unset
        or ``auto``: the most that this machine can compile.
    CXX, CXXFLAGS, LDFLAGS: the C++ compiler and additional flags.
    CUDA_HOME: the CUDA toolkit; otherwise that of the ``nvcc`` on PATH, otherwise /usr/local/cuda.
    TORCH_CUDA_ARCH_LIST: GPU architectures, for example ``"8.0;9.0a+PTX"``.
    RCU_OPS_OFFSETS: 64, the default, or 32: the bits in which recurrent_conv's kernels for 16-bit data count offsets
        within a frame (csrc/common/gpu.h).
    MAX_JOBS: compilers run at once.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMIT_FILE = "build_backend/commit.txt"  # written into source distributions, which carry no git history

# The first torch whose stable ABI the bindings use. The library is compiled against it whatever torch is installed.
TORCH_MINIMUM = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000ULL"

GCC_MINIMUM = 11

CUDA_MINIMUM = (12, 0)
CUDA_DEFAULT_HOME = Path("/usr/local/cuda")
ARCHITECTURE_MINIMUM = 80
# Ampere and Hopper code, and PTX for what came later (not of 90a: that is not forward compatible).
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90a", "compute_90")
HOPPER = "sm_90a"  # what files named *_sm90.cu are for
EACH_ARCHITECTURE = "cuda/device/matrix_store.h"  # files that include it have other code for each architecture
# PyTorch's names for TORCH_CUDA_ARCH_LIST, from the first generation that the kernels support.
NAMED_ARCHITECTURES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}

# GCC's own vectors, without an instruction set: compiled in two thirds of -O2's time, and up to a third faster. Only as
# an expensive optimisation does it make one instruction of a product and a sum where the processor has it (aarch64).
PORTABLE_FLAGS = ("-O1", "-ftree-vectorize", "-fschedule-insns2", "-fexpensive-optimizations")

# What GCC's -O2 does for other programs: a twelfth of the time of kernels that unroll and vectorise by themselves, none
# of which is slower without, and some of which are faster. (Not so what -fipa-sra, -fcode-hoisting,
# -frerun-cse-after-loop and -fcse-follow-jumps do, each worth 5 to 20 % of one operator or another.)
KERNEL_FLAGS = (
    "-fno-gcse",
    "-fno-ipa-cp",
    "-fno-ipa-icf",
    "-fno-thread-jumps",
    "-fno-tree-pre",
    "-fno-tree-vrp",
)

# For files that instantiate many templates: GCC need not look for what it can free before 512 MB.
TEMPLATE_FLAGS = ("--param=ggc-min-heapsize=524288",)

# For glibc in the compilers, which allocate and free all the time: memory that they give back, page by page, they want
# again. ptxas takes a fifteenth less time.
COMPILER_ENVIRONMENT = {
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
}

# Kernel files that are compiled as one: nvcc takes a second for its headers, its own programs and the host's half of a
# file before it has seen the first kernel, and GCC as long for the headers of the CPU's kernels. Names in the unnamed
# namespaces of CUDA files must differ; each operator on CPUs has a namespace of its own.
COMPILED_TOGETHER = (
    (
        "csrc/cuda/recurrent_conv.cu",
        "csrc/cuda/cycle_consistency_short.cu",
        "csrc/cuda/recurrent_conv_batch_norm.cu",
        "csrc/cuda/recurrent_conv_fp32.cu",
        "csrc/cuda/recurrent_conv_step.cu",
        "csrc/cuda/recurrent_conv_step_words.cu",
        "csrc/cuda/recurrent_conv_weight_grad.cu",
    ),
    (
        "csrc/cuda/nonlocal_gates.cu",
        "csrc/cuda/nonlocal_gates_gradients.cu",
        "csrc/cuda/nonlocal_gates_products.cu",
        "csrc/cuda/nonlocal_gates_tile.cu",
        "csrc/cuda/srtg.cu",
        "csrc/cuda/fast_gru_columns.cu",
    ),
    (
        "csrc/cuda/cycle_consistency_products.cu",
        "csrc/cuda/cycle_consistency.cu",
        "csrc/cuda/fast_gru.cu",
        "csrc/cuda/fast_gru_persistent.cu",
    ),
    (
        "csrc/cuda/recurrent_conv_sm90.cu",
        "csrc/cuda/cycle_consistency_short_sm90.cu",
        "csrc/cuda/fast_gru_sm90.cu",
        "csrc/cuda/nonlocal_gates_sm90.cu",
    ),
    ("csrc/cuda/recurrent_conv_tile.cu", "csrc/cuda/recurrent_conv_wide.cu"),
    *(
        tuple(
            f"csrc/cpu/{operator}{instruction_set}.cpp"
            for operator in (
                "recurrent_conv",
                "recurrent_conv_batch_norm",
                "nonlocal_gates",
                "cycle_consistency",
                "fast_gru",
            )
        )
        for instruction_set in ("_portable", "_avx2", "_avx512", "_avx512_bf16")
    ),
    (
        "csrc/cpu/recurrent_conv.cpp",
        "csrc/cpu/recurrent_conv_batch_norm.cpp",
        "csrc/cpu/nonlocal_gates.cpp",
        "csrc/cpu/cycle_consistency.cpp",
        "csrc/cpu/fast_gru.cpp",
        "csrc/cpu/memory.cpp",
    ),
)

# What takes longest, in this order: a build ends with small files, and no core waits for another's last large one.
SLOWEST = (
    "csrc/cuda/recurrent_conv_tile.cu",
    "csrc/cuda/recurrent_conv.cu",
    "csrc/cuda/nonlocal_gates.cu",
    "csrc/cpu/recurrent_conv_portable.cpp",
    "csrc/cpu/recurrent_conv_avx2.cpp",
    "csrc/cpu/recurrent_conv_avx512.cpp",
    "csrc/cuda/cycle_consistency_products.cu",
    "csrc/cuda/recurrent_conv_sm90.cu",
    "csrc/bindings_cycle_consistency.cpp",
    "csrc/native.cpp",
)

KINDS = ("cuda", "cpu", "none")
LIBRARY = "librcu_ops.so"
RECORD = "_build_record.json"


class BuildError(SystemExit):
    """The build cannot go on; the message is shown without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: rcu-ops: {message}")


@dataclass(frozen=True)
class Torch:
    """An installed PyTorch, found without importing it."""

    path: Path
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = re.findall(r"\d+", self.version)[:2]
        return int(major), int(minor)

    @property
    def include(self) -> Path:
        """The directory of torch's headers; pybind11's are there too."""
        return self.path / "include"

    @property
    def lib(self) -> Path:
        """The directory of torch's libraries."""
        return self.path / "lib"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command line, and its name and version in words."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that has a compiler."""

    home: Path
    version: str

    @property
    def nvcc(self) -> str:
        """The CUDA compiler."""
        return str(self.home / "bin" / "nvcc")

    @property
    def include(self) -> Path:
        """The directory of the CUDA runtime's headers."""
        directories = [self.home / "include", *sorted(self.home.glob("targets/*/include"))]
        return next((path for path in directories if (path / "cuda_runtime_api.h").is_file()), directories[0])


@dataclass(frozen=True)
class Plan:
    """What this build makes.

    Attributes:
        requested: what RCU_OPS_BUILD asked for, ``auto`` if nothing.
        kind: ``cuda`` (CPU and CUDA kernels), ``cpu`` or ``none``.
        missing: why there is not more, one sentence each; empty when everything is built.
        compiler: the C++ compiler; None for ``none``.
        cuda: the CUDA toolkit; None unless the kind is ``cuda``.
        architectures: what the CUDA kernels are compiled for: ``sm_…`` for code, ``compute_…`` for PTX.
        native: whether ``rcu_ops._native`` is built too, which needs Python's headers.
    """

    requested: str
    kind: str
    missing: tuple[str, ...] = ()
    compiler: Compiler | None = None
    cuda: Cuda | None = None
    architectures: tuple[str, ...] = ()
    native: bool = False


# --------------------------------------------------------------------------------------------------------- finding


def find_torch() -> Torch | None:
    """Return the torch on ``sys.path``, or None; its version comes from its file, since importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)))
    try:
        text = (path / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, flags=re.MULTILINE)
    return Torch(path, match.group(1)) if match else None


def find_compiler(environ: Mapping[str, str] = os.environ) -> Compiler | str:
    """Return the C++ compiler, or a sentence that says why there is none.

    Raises:
        BuildError: there is a compiler, and it does not even tell its version.
    """
    path = environ.get("PATH", os.defpath)
    if chosen := shlex.split(environ.get("CXX", "")):
        if shutil.which(chosen[0], path=path) is None:
            return f"no C++ compiler: CXX={environ['CXX']!r} was not found"
        command = chosen
    else:
        names = ("c++", "g++")  # where the first is Clang, the second may be GCC
        refused = []
        for name in names:
            if shutil.which(name, path=path):
                compiler = _compiler([name], environ)
                if isinstance(compiler, Compiler):
                    return compiler
                refused.append(compiler)
        return refused[0] if refused else f"no C++ compiler: none of {', '.join(names)} is on PATH and CXX is not set"
    return _compiler(command, environ)


def _compiler(command: list[str], environ: Mapping[str, str]) -> Compiler | str:
    """Return this compiler, or a sentence that says why it cannot serve."""
    try:
        text = _output([*command, "--version"], environ)
        release = _output([*command, "-dumpversion"], environ).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run: {error}") from None
    version = text.splitlines()[0].strip() if text.strip() else command[-1]
    # Vectors, and kernels for several instruction sets in one library, are written in GCC's extensions to C++.
    needed = f"GCC {GCC_MINIMUM} or later is needed"
    if "Free Software Foundation" not in text:
        return f"no C++ compiler that serves: {shlex.join(command)} is {version}, and {needed}"
    if int(release.split(".")[0]) < GCC_MINIMUM:
        return f"no C++ compiler that serves: {shlex.join(command)} is GCC {release}, and {needed}"
    return Compiler(tuple(command), version)


def find_cuda(environ: Mapping[str, str] = os.environ) -> Cuda | str:
    """Return the CUDA toolkit, or a sentence that says why there is none. The environment's CUDA_HOME wins."""
    variable = next((name for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)), None)
    if variable is not None:
        home = Path(environ[variable]).resolve()  # commands run elsewhere
        if not (home / "bin" / "nvcc").is_file():
            return f"no CUDA compiler: {variable}={environ[variable]!r} has no bin/nvcc"
    elif nvcc := shutil.which("nvcc", path=environ.get("PATH", os.defpath)):
        home = _toolkit_of(nvcc, environ)
    elif (CUDA_DEFAULT_HOME / "bin" / "nvcc").is_file():
        home = CUDA_DEFAULT_HOME
    else:
        return f"no CUDA compiler: nvcc is not on PATH, CUDA_HOME is not set and {CUDA_DEFAULT_HOME} has none"
    try:
        text = _output([str(home / "bin" / "nvcc"), "--version"], environ)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no CUDA compiler: {home / 'bin' / 'nvcc'} does not run: {error}"
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        return f"no CUDA compiler: {home / 'bin' / 'nvcc'} does not tell its release"
    release = int(match.group(1)), int(match.group(2))
    if release < CUDA_MINIMUM:
        return f"no CUDA compiler: nvcc is release {match.group(1)}.{match.group(2)}, at least 12.0 is needed"
    return Cuda(home, f"{release[0]}.{release[1]}")


def _toolkit_of(nvcc: str, environ: Mapping[str, str]) -> Path:
    """Return the root of the toolkit behind ``nvcc``, which may be a link or a wrapper: nvcc itself knows it as TOP."""
    dry_run = subprocess.run(
        [nvcc, "-dryrun", "-c", "x.cu"], env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    match = re.search(r"^#\$ TOP=(.+)$", dry_run.stdout, flags=re.MULTILINE)
    if match and (Path(match.group(1)) / "bin" / "nvcc").is_file():
        return Path(match.group(1).strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def find_architectures(environ: Mapping[str, str] = os.environ) -> tuple[str, ...] | str:
    """Return what to compile CUDA kernels for, as ``sm_90a`` (code) and ``compute_90`` (PTX), or why there is nothing.

    TORCH_CUDA_ARCH_LIST is honoured as PyTorch reads it, except that no GPU is ever probed and that architectures older
    than the kernels support are left out: images with a long list for many packages stay usable.

    Raises:
        BuildError: an entry of TORCH_CUDA_ARCH_LIST cannot be read.
    """
    text = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not text:
        return DEFAULT_ARCHITECTURES
    for name, numbers in NAMED_ARCHITECTURES.items():
        text = re.sub(rf"\b{name}\b", numbers, text)
    found: dict[str, None] = {}
    for entry in re.split(r"[;,\s]+", text.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            known = ", ".join(NAMED_ARCHITECTURES)
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a+PTX or {known}, got {entry!r}")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) < ARCHITECTURE_MINIMUM:
            continue
        found[f"sm_{major}{minor}{suffix}"] = None
        if ptx:
            found[f"compute_{major}{minor}{suffix}"] = None
    if not found:
        given = environ["TORCH_CUDA_ARCH_LIST"]
        return f"TORCH_CUDA_ARCH_LIST={given!r} names no architecture the kernels support (8.0 and later)"
    return tuple(found)


def offset_flags(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the compilers' flags for RCU_OPS_OFFSETS.

    Raises:
        BuildError: it is neither 64 nor 32.
    """
    bits = environ.get("RCU_OPS_OFFSETS", "").strip() or "64"
    if bits not in ("64", "32"):
        raise BuildError(f"RCU_OPS_OFFSETS: expected 64 or 32, got {environ['RCU_OPS_OFFSETS']!r}")
    return ["-DRCU_OPS_OFFSETS_32"] if bits == "32" else []


def find_python_headers() -> Path | None:
    """Return the directory of this interpreter's ``Python.h``, or None when its development files are not installed."""
    for key in ("include", "platinclude"):
        path = Path(sysconfig.get_path(key))
        if (path / "Python.h").is_file():
            return path
    return None


def make_plan(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Plan:
    """Decide what to build.

    Raises:
        BuildError: RCU_OPS_BUILD is not one of its values, or asks for what cannot be built here; the message says why.
    """
    requested = environ.get("RCU_OPS_BUILD", "").strip().lower() or "auto"
    if requested not in ("auto", *KINDS):
        raise BuildError(f"RCU_OPS_BUILD: expected cuda, cpu, none or auto, got {environ['RCU_OPS_BUILD']!r}")
    if requested == "none":
        return Plan(requested, "none", ("RCU_OPS_BUILD=none asked for no compiled part",))

    compiler: Compiler | str = find_compiler(environ) if sys.platform == "linux" else "compiled kernels need Linux"
    if isinstance(compiler, str):
        if requested != "auto":
            raise BuildError(f"RCU_OPS_BUILD={requested}: {compiler}")
        return Plan(requested, "none", (compiler,))

    missing = []
    native = find_python_headers() is not None
    if not native:
        missing.append("no Python.h (Python's development files): rcu_ops._native is left out")
    cuda: Cuda | str = "RCU_OPS_BUILD=cpu asked for no CUDA kernels"
    architectures: tuple[str, ...] | str = ()
    if requested != "cpu":
        cuda = find_cuda(environ)
        if isinstance(cuda, Cuda) and isinstance(architectures := find_architectures(environ), str):
            cuda = architectures
        if isinstance(cuda, Cuda) and not cuda_sources(root):
            cuda = "this source tree has no CUDA kernels"
        if isinstance(cuda, str) and requested == "cuda":
            raise BuildError(f"RCU_OPS_BUILD=cuda: {cuda}")
    if isinstance(cuda, str):
        return Plan(requested, "cpu", (*missing, cuda), compiler, native=native)
    return Plan(requested, "cuda", tuple(missing), compiler, cuda, tuple(architectures), native)


# --------------------------------------------------------------------------------------------------------- sources


def _files(root: Path, *patterns: str) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern))


def library_sources(root: Path = ROOT) -> list[str]:
    """Return the C++ sources of the op library."""
    return _files(root, "csrc/bindings*.cpp", "csrc/cpu/*.cpp")


def cuda_sources(root: Path = ROOT) -> list[str]:
    """Return the CUDA sources of the op library."""
    return _files(root, "csrc/cuda/*.cu")


def compiled_together(sources: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the sources, those that are compiled as one together."""
    groups = [tuple(source for source in group if source in sources) for group in COMPILED_TOGETHER]
    alone = [(source,) for source in sources if not any(source in group for group in groups)]
    return [group for group in groups if group] + alone


def native_sources(root: Path = ROOT) -> list[str]:
    """Return the sources of ``rcu_ops._native``."""
    return _files(root, "csrc/native*.cpp", "csrc/build_facts.cpp")


def read_version(root: Path = ROOT) -> str:
    """Return the package's version without importing the package."""
    text = (root / "rcu_ops/_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise BuildError("rcu_ops/_version.py has no __version__")
    return match.group(1)


def read_commit(root: Path = ROOT) -> str:
    """Return the git commit of the sources, ``-dirty`` appended when tracked files differ from it, or ``unknown``."""
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        try:
            commit = _output([*git, "rev-parse", "HEAD"]).strip()
            # No optional locks: a build must not get in the way of a commit made meanwhile.
            changes = _output([*git, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"])
            return commit + ("-dirty" if changes.strip() else "")
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
    try:
        return (root / COMMIT_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def hash_sources(root: Path = ROOT) -> str:
    """Return a digest of everything under csrc/, by which an editable install can tell that it was not rebuilt."""
    digest = hashlib.sha256()
    for path in _files(root, "csrc/**/*.*"):
        digest.update(path.encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- compiling


@dataclass(frozen=True)
class Job:
    """One source file to compile."""

    source: str
    command: tuple[str, ...]
    output: Path


@dataclass(frozen=True)
class Target:
    """One shared object: the files to compile, and the linker's command before and after the objects."""

    jobs: tuple[Job, ...]
    link: tuple[str, ...]
    link_tail: tuple[str, ...] = ()

    def link_command(self, output: Path) -> list[str]:
        """Return the command that links the compiled files into ``output``."""
        return [*self.link, "-o", str(output), *(str(job.output) for job in self.jobs), *self.link_tail]


def require_writable(root: Path = ROOT) -> None:
    """Check that the source tree takes what a build leaves there: objects, and setuptools' copies.

    Raises:
        BuildError: it does not.
    """
    place = root / "build" if (root / "build").is_dir() else root
    if not os.access(place, os.W_OK):
        raise BuildError(
            f"{place} cannot be written to, and a build keeps its objects there; copy the source tree first"
        )


def require_torch() -> Torch:
    """Return the torch to compile against.

    Raises:
        BuildError: there is none, or it is too old.
    """
    torch = find_torch()
    if torch is None or torch.release < TORCH_MINIMUM:
        needed = ".".join(map(str, TORCH_MINIMUM))
        advice = "install it first, let pip isolate the build so that it is fetched, or set RCU_OPS_BUILD=none"
        found = "none" if torch is None else torch.version
        raise BuildError(f"compiling needs torch >= {needed}, and this environment has {found}: {advice}")
    return torch


def differs_by_architecture(source: str, root: Path = ROOT) -> bool:
    """Return whether a kernel file has other code for each architecture: whether it includes ``matrix_store.h``."""
    path = root / source
    return path.is_file() and f'#include "{EACH_ARCHITECTURE}"' in path.read_text(encoding="utf-8")


def architecture_flags(source: str, architectures: Sequence[str], root: Path = ROOT) -> list[str]:
    """Return nvcc's flags for a kernel file and architectures as ``find_architectures`` names them.

    Files named ``*_sm90.cu`` use instructions of sm_90a alone and are compiled for nothing else; without sm_90a among
    the architectures they are compiled as others are and hold no kernels (``RCU_OPS_SM90A`` is not defined). All others
    use no architecture-specific instruction and are compiled for sm_90 where sm_90a was asked for. The front end runs
    once, for the oldest architecture, whose PTX serves every later one; only files that say
    (``differs_by_architecture``) that their code differs go through it once for each.
    """
    specific = [HOPPER] if HOPPER in architectures else []
    each = differs_by_architecture(source, root)
    defines = [f"-DRCU_OPS_{name}" for name, on in (("SM90A", specific), ("EACH_ARCHITECTURE", each)) if on]
    if source.endswith("_sm90.cu") and specific:
        return [f"-gencode=arch=compute_90a,code={HOPPER}", *defines]
    named = [name.rstrip("af").split("_") for name in architectures]
    oldest = min((number for _, number in named), key=int)
    codes: dict[str, dict[str, None]] = {}
    for kind, number in named:
        front = number if each else oldest
        codes.setdefault(front, {})[f"sm_{number}" if kind == "sm" else f"compute_{front}"] = None
    return [f"-gencode=arch=compute_{front},code=[{','.join(found)}]" for front, found in codes.items()] + defines


def _cxx_command(compiler: Compiler, torch: Torch, environ: Mapping[str, str]) -> list[str]:
    flags = [
        "-std=c++20",
        "-O2",  # the kernels unroll by themselves: -O3 takes half as long again and gives the same speed
        "-DNDEBUG",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Icsrc",
        f"-isystem{torch.include}",
    ]
    flags.append("-fvect-cost-model=dynamic")  # but vectorises loops as -O3 does
    flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC 12 warns about its own AVX-512 headers
    # torch's checks quote their file names; the map keeps paths of the building machine out of the result.
    flags.append(f"-ffile-prefix-map={torch.path}=torch")
    flags += offset_flags(environ)
    return [*compiler.command, *flags, *shlex.split(environ.get("CXXFLAGS", ""))]


def library_target(plan: Plan, torch: Torch, objects: Path, environ: Mapping[str, str] = os.environ) -> Target:
    """Return how to build the op library: one file for every Python, and for every torch that has the stable ABI."""
    assert plan.compiler is not None
    cxx = list(plan.compiler.command)
    command = [*_cxx_command(plan.compiler, torch, environ), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    key = f"{plan.compiler.version} torch {torch.version}"
    # Only the bindings know of CUDA: the CPU kernels' objects serve both kinds of build.
    cuda = [] if plan.cuda is None else ["-DRCU_OPS_WITH_CUDA", f"-isystem{plan.cuda.include}"]
    bindings = [source for source in library_sources() if source.startswith("csrc/bindings")]
    # -O1: what bindings do besides calling others does not show in a call.
    binding = [*command, "-O1", *TEMPLATE_FLAGS, *cuda]
    jobs = [_job_of_all(bindings, binding, objects, key)] + [
        _job_of_all(
            group, [*command, *(PORTABLE_FLAGS if group[0].endswith("_portable.cpp") else KERNEL_FLAGS)], objects, key
        )
        for group in compiled_together([source for source in library_sources() if source not in bindings])
    ]
    # --no-as-needed: the registrations run on load and must find torch loaded, also when no symbol of it seems needed.
    torch_flags = [f"-L{torch.lib}", "-ltorch"]
    extra = shlex.split(environ.get("LDFLAGS", ""))
    if plan.cuda is None:
        return Target(tuple(jobs), (*cxx, "-shared"), ("-Wl,--no-as-needed", *torch_flags, *extra))

    nvcc = [plan.cuda.nvcc]
    if len(cxx) == 1 and "NVCC_CCBIN" not in environ:
        nvcc += ["-ccbin", cxx[0]]
    # A file's architectures side by side shorten the longest file's time, which only counts where there is a core for
    # every file; with fewer cores compilers only take the caches from each other.
    threads = str(max(1, min(len(plan.architectures), _workers(environ) // 4)))
    flags = ["-std=c++20", "-O1", "-DNDEBUG", "--threads", threads, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
    flags += offset_flags(environ)
    key += f" CUDA {plan.cuda.version}"
    cuda_jobs = []
    for group in compiled_together(cuda_sources()):
        named = next((source for source in group if differs_by_architecture(source)), group[0])
        command = [*nvcc, *flags, *architecture_flags(named, plan.architectures)]
        cuda_jobs.append(_job_of_all(group, command, objects, key, "--pre-include"))
    jobs = [*cuda_jobs, *jobs]
    # The CUDA runtime is linked in: the library must load beside a torch that ships no CUDA.
    link = (*nvcc, "-shared", "-cudart", "static", "-nodlink")
    linker = [option for flag in extra for option in ("-Xcompiler", flag)]
    return Target(tuple(jobs), link, ("-Xlinker", "--no-as-needed", *torch_flags, *linker))


def native_target(plan: Plan, torch: Torch, objects: Path, environ: Mapping[str, str] = os.environ) -> Target:
    """Return how to build ``rcu_ops._native``, which needs pybind11 (torch ships it) and no other part of torch."""
    assert plan.compiler is not None
    headers = find_python_headers()
    assert headers is not None
    # Planners and tests: nothing here needs more than -Og, which makes less of pybind11's templates than -O1, and the
    # standard library's headers of C++17 are read in two thirds of the time that C++20's take.
    command = [*_cxx_command(plan.compiler, torch, environ), "-std=c++17", "-Og", f"-isystem{headers}"]
    command += TEMPLATE_FLAGS
    key = f"{plan.compiler.version} torch {torch.version} python {sys.version}"
    facts = {
        "RCU_OPS_VERSION": read_version(),
        "RCU_OPS_COMMIT": read_commit(),
        "RCU_OPS_BUILD_KIND": plan.kind,
        "RCU_OPS_TORCH_VERSION": torch.version,
        "RCU_OPS_CUDA_VERSION": plan.cuda.version if plan.cuda else "",
        "RCU_OPS_CUDA_ARCHITECTURES": ",".join(plan.architectures),
    }
    defines = [f'-D{name}="{value}"' for name, value in facts.items()]
    *others, facts_source = sorted(native_sources(), key="csrc/build_facts.cpp".__eq__)
    jobs = [_job_of_all(others, command, objects, key), _job(facts_source, [*command, *defines], objects, key)]
    return Target(tuple(jobs), (*plan.compiler.command, "-shared"), tuple(shlex.split(environ.get("LDFLAGS", ""))))


def _job(source: str, command: Sequence[str], objects: Path, key: str) -> Job:
    """Name the object after everything that goes into it but the files, which the dependency file beside it lists."""
    digest = hashlib.sha256("\0".join([source, key, *command]).encode()).hexdigest()[:16]
    output = objects / f"{Path(source).stem}-{digest}.o"
    return Job(source, tuple(command), output)


def _job_of_all(
    sources: Sequence[str], command: Sequence[str], objects: Path, key: str, option: str = "-include"
) -> Job:
    """Compile files as one: the headers of torch, pybind11 and CUDA take the compilers as long as the files do."""
    first, *others = sources
    included = [word for source in others for word in (option, source)]
    return _job(first, [*command, *included], objects, key)


def _up_to_date(job: Job) -> bool:
    """Return whether the object is newer than its source and the headers that the compiler listed when it was made."""
    try:
        made = job.output.stat().st_mtime_ns
        rule = job.output.with_suffix(".d").read_text(encoding="utf-8")
        names = re.split(r"(?<!\\)\s+", rule.replace("\\\n", " ").partition(": ")[2].strip())
        return all((ROOT / name.replace("\\ ", " ")).stat().st_mtime_ns < made for name in names)
    except OSError:
        return False


def _compile(job: Job, environ: Mapping[str, str]) -> str:
    """Compile, and return what to tell about it, the compiler's warnings included."""
    if _up_to_date(job):
        return f"{job.source} is up to date"
    job.output.parent.mkdir(parents=True, exist_ok=True)
    # Compiled under another name: neither an interrupted build nor a second one at the same time leaves half an object.
    scratch = job.output.with_name(f"{job.output.stem}.{os.getpid()}.o")
    dependencies = scratch.with_suffix(".d")
    command = [*job.command, "-c", job.source, "-o", str(scratch), "-MMD", "-MF", str(dependencies)]
    started = time.time_ns()
    try:
        text = _run(command, {**COMPILER_ENVIRONMENT, **environ})
        os.utime(scratch, ns=(started, started))  # a file edited while it was compiled counts as newer than its object
        dependencies.replace(job.output.with_suffix(".d"))
        scratch.replace(job.output)
    finally:
        scratch.unlink(missing_ok=True)
        dependencies.unlink(missing_ok=True)
    return f"compiled {job.source} in {(time.time_ns() - started) / 1e9:.0f} s\n{text}".rstrip()


def build(targets: Mapping[Path, Target], environ: Mapping[str, str] = os.environ) -> None:
    """Compile and link ``targets``, several files at once; objects that are up to date are kept.

    Raises:
        BuildError: a compiler failed; what it printed is shown.
    """
    jobs = list({job.output: job for target in targets.values() for job in target.jobs}.values())
    rank = {source: place for place, source in enumerate(SLOWEST)}
    jobs.sort(key=lambda job: (rank.get(job.source, len(rank)), not job.source.endswith(".cu")))
    with concurrent.futures.ThreadPoolExecutor(_workers(environ)) as pool:
        futures = [pool.submit(_compile, job, environ) for job in jobs]
        try:
            for future in futures:
                say(future.result())
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    for output, target in targets.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            _run(target.link_command(scratch), environ)
            scratch.replace(output)
        finally:
            scratch.unlink(missing_ok=True)
        say(f"linked {output.name}")


def _workers(environ: Mapping[str, str]) -> int:
    """How many compilers run at once: MAX_JOBS, or one per core."""
    limit = environ.get("MAX_JOBS", "")
    if limit.isdecimal() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: Sequence[str], environ: Mapping[str, str]) -> str:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode != 0:
        advice = "RCU_OPS_BUILD=cpu leaves the CUDA kernels out, RCU_OPS_BUILD=none all compiled parts"
        raise BuildError(f"this command failed ({advice}):\n{shlex.join(command)}\n{result.stdout}")
    return result.stdout


def _output(command: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    return subprocess.run(
        command, env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    ).stdout


# ------------------------------------------------------------------------------------------------------- reporting


def say(message: str) -> None:
    """Print for whoever watches the build (``pip install -v``)."""
    print(f"rcu-ops: {message}", file=sys.stderr, flush=True)


def describe(plan: Plan) -> str:
    """Return the plan in a few lines."""
    built = {
        "cuda": f"CPU and CUDA kernels ({', '.join(plan.architectures)})",
        "cpu": "CPU kernels",
        "none": "nothing; every op will run in plain PyTorch or Triton",
    }[plan.kind]
    lines = [f"compiling {built}"]
    if plan.compiler is not None:
        lines.append(f"C++ compiler: {plan.compiler.version}")
    if plan.cuda is not None:
        lines.append(f"CUDA toolkit: {plan.cuda.version} at {plan.cuda.home}")
    lines += [f"missing: {sentence}" for sentence in plan.missing]
    return "\nrcu-ops: ".join(lines)


def make_record(plan: Plan, root: Path = ROOT) -> dict[str, object]:
    """Return what ``rcu-ops doctor`` shows about the build: no times, no paths, so that equal builds are equal."""
    torch = find_torch() if plan.kind != "none" else None
    return {
        "kind": plan.kind,
        "requested": plan.requested,
        "reason": "; ".join(plan.missing) or None,
        "version": read_version(root),
        "commit": read_commit(root),
        "sources": hash_sources(root),
        "compiler": plan.compiler.version if plan.compiler else None,
        "cuda": plan.cuda.version if plan.cuda else None,
        "architectures": list(plan.architectures),
        "torch": torch.version if torch else None,
        "torch_target": ".".join(map(str, TORCH_MINIMUM)),
        "python": ".".join(map(str, sys.version_info[:3])),
        "library": plan.kind != "none",
        "native": plan.native,
    }


def write_record(plan: Plan, path: Path, root: Path = ROOT) -> None:
    """Write the record as JSON, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(make_record(plan, root), indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)
