r"""Run tests on aarch64's CPU kernels on any other machine: cross-compiled, under qemu.

Compiles the library and the native module as the build would there, by a cross compiler and against the aarch64
torch, and runs pytest in an aarch64 Python with that torch. qemu is slow, a tenth of the machine's own speed or less:
name what to run. Debian 12, once:

    dpkg --add-architecture arm64 && apt-get update && apt-get install g++-aarch64-linux-gnu qemu-user
    mkdir -p build/aarch64/debs && cd build/aarch64/debs
    apt-get download {python3.11,python3.11-minimal}:arm64 {libpython3.11-minimal,libpython3.11-stdlib}:arm64 \
        {libpython3.11-dev,libc6,libstdc++6,libgcc-s1,libexpat1,zlib1g,libssl3,libffi8,libbz2-1.0,liblzma5,libuuid1,libcrypt1}:arm64
    for package in *.deb; do dpkg -x $package ../root; done; cd ..
    pip install --target site --python-version 3.11 --only-binary=:all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        torch numpy safetensors pytest pytest-timeout pytest-benchmark pytest-xdist hypothesis

and then, from the top of the source tree,

    python tests/packaging/check_aarch64.py build/aarch64 tests/gpu/test_problems.py tests/ops/test_srtg.py -k cpu
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ("fp", "asimd", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp", "asimdrdm", "asimddp")
# torch reads what kind of core it has from here, and does not get over an x86 one. A Neoverse N1:
CPUINFO = "".join(
    f"processor\t: {core}\nFeatures\t: {' '.join(FLAGS)}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
    for core in range(os.cpu_count() or 1)
)


def compile_there(machine: Path, package: Path) -> None:
    """Make the library, the native module and the record of the build in ``package``."""
    sys.path[:0] = [str(ROOT / "build_backend"), str(machine / "site")]  # where the build finds torch
    import rcu_ops_build as build

    headers = machine / "root" / "usr" / "include"
    os.environ.update(RCU_OPS_BUILD="cpu", CXX="aarch64-linux-gnu-g++", CXXFLAGS=f"-isystem{headers}")
    build.find_python_headers = lambda: headers / "python3.11"
    plan, torch, objects = build.make_plan(), build.require_torch(), machine / "objects"
    native = package / "_native.cpython-311-aarch64-linux-gnu.so"
    build.say(build.describe(plan))
    build.build(
        {
            package / build.LIBRARY: build.library_target(plan, torch, objects),
            native: build.native_target(plan, torch, objects),
        }
    )
    build.write_record(plan, package / build.RECORD)


def copy_tree(tree: Path) -> None:
    """Copy what tests read, and the package's Python files as they are installed."""
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_record.json")
    for folder in ("rcu_ops", "tests", "benchmarks", "csrc", "build_backend"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", tree / "rcu_ops" / "triton_kernels", ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, tree)


def main() -> int:
    """Run the check; pytest's exit code."""
    if len(sys.argv) < 3:
        raise SystemExit(f"usage: {sys.argv[0]} MACHINE TESTS... (see the head of this file)")
    machine = Path(sys.argv[1]).resolve()
    tree, root, site = machine / "tree", machine / "root", machine / "site"
    copy_tree(tree)
    compile_there(machine, tree / "rcu_ops")

    # What is under -L stands for the system's files of the same names.
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(CPUINFO)
    there = {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": f"{tree}:{site}", "QEMU_CPU": "neoverse-n1"}
    python = ["qemu-aarch64", "-L", str(root), str(root / "usr" / "bin" / "python3.11")]
    pytest = ["-m", "pytest", "-v", "-p", "no:cacheprovider", *sys.argv[2:]]
    return subprocess.run([*python, *pytest], cwd=tree, env={**os.environ, **there}).returncode


if __name__ == "__main__":
    sys.exit(main())
