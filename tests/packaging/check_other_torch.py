"""Prove that the installed op library also serves another torch and another Python: the promise of the stable ABI.

Takes the rcu_ops of the Python that runs this script: its Python files and ``librcu_ops.so``, without the native
module, which belongs to one Python version. Loads that under the other torch and runs the operators' tests there, all
of them on the compiled CPU kernels too. Before that, compiles the sources against the other torch's headers: whoever
has that torch builds with it. Run it whenever the bindings change, and for every new torch:

    python tests/packaging/check_other_torch.py                          # torch 2.11 on a python3.12 found here
    python tests/packaging/check_other_torch.py --python python3.13 --torch 'torch==2.12.*' --venv ~/venvs/torch-2.12
    python tests/packaging/check_other_torch.py --venv ~/venvs/mine      # the torch that this environment has
    python tests/packaging/check_other_torch.py --venv ~/venvs/mine tests/nn tests/test_stream_export.py

The environment is made on the first run (it may download gigabytes) and used again afterwards; what it has is left as
it is, and what the tests need besides is installed into it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ("numpy", "safetensors", "pytest", "pytest-timeout", "pytest-benchmark", "pytest-xdist", "hypothesis")
OLDEST_TORCH = "torch==2.11.*"

# Runs under the other torch, and checks that the library's kernels are what the tests will test: an operator without
# one would be tested on the reference alone.
PROBE = """
import sys
import torch
import rcu_ops
from rcu_ops import _library
from rcu_ops.ops import _schema

assert _library.load_error() is None, _library.load_error()
assert _library.native() is None, "a native module was loaded: is rcu-ops installed in that environment? It must not be"
made_of_others = {"recurrent_conv_batch_norm", "recurrent_conv_batch_norm_backward"}  # statistics may cross processes
names = [name for name in _schema.names() if not name.endswith("_triton") and name not in made_of_others]
missing = [name for name in names if not _library.has_kernel(name, "CPU")]
assert not missing, f"no compiled CPU kernel is registered for {missing}"
record = _library.build_record()
print(f"library built with torch {record['torch']}, Python {record['python']};",
      f"loaded by torch {torch.__version__}, Python {sys.version.split()[0]}: CPU kernels of {', '.join(names)}")
"""


COMPILE = """
from pathlib import Path
import rcu_ops_build as build

plan, torch = build.make_plan(), build.require_torch()
build.build({Path("compiled/librcu_ops.so").resolve(): build.library_target(plan, torch, Path("objects").resolve())})
print(f"the CPU kernels' sources compile against torch {torch.version}")
"""


def find_python(name: str) -> str:
    """Return an interpreter that runs: on PATH (a version manager's shim there may refuse to), or among pyenv's."""
    candidates = [name]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        version = name.removeprefix("python")
        candidates += sorted(map(str, Path(root).glob(f"versions/{version}.*/bin/python")))
    for candidate in candidates:
        path = shutil.which(candidate)
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    raise SystemExit(f"error: no interpreter {name} was found; name one by --python")


def make_environment(directory: Path, python: str, torch: str | None) -> str:
    """Return the interpreter of an environment with ``torch`` (None: any) and what the tests need, made or used."""
    interpreter = directory / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([find_python(python), "-m", "venv", str(directory)], check=True)
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    if torch is None and subprocess.run([str(interpreter), "-c", find]).returncode != 0:
        torch = OLDEST_TORCH
    wanted = [torch, *NEEDED] if torch else NEEDED
    subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return str(interpreter)


def copy_package(destination: Path) -> None:
    """Copy the installed package as another Python sees it: the library, and no native module."""
    spec = importlib.util.find_spec("rcu_ops")
    if spec is None or spec.origin is None:
        raise SystemExit("error: rcu_ops is not installed for this Python")
    package = Path(spec.origin).parent
    if not (package / "librcu_ops.so").is_file():
        raise SystemExit(f"error: {package} has no librcu_ops.so: rcu_ops was built without kernels")
    ignored = shutil.ignore_patterns("_native.*.so", "__pycache__")
    shutil.copytree(package, destination / "rcu_ops", ignore=ignored)
    if not (destination / "rcu_ops" / "triton_kernels").exists():  # an editable install keeps them elsewhere
        shutil.copytree(ROOT / "triton_kernels", destination / "rcu_ops" / "triton_kernels", ignore=ignored)


def main() -> int:
    """Run the check; exit code 0 if the library serves the other torch."""
    parser = argparse.ArgumentParser(description="Prove that the installed op library serves another torch and Python.")
    parser.add_argument("--python", default="python3.12", help="the other Python, name or path (default: %(default)s)")
    parser.add_argument("--torch", help=f"the other torch, for pip (default: what is there, else {OLDEST_TORCH})")
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "other-torch", help="where its environment is")
    parser.add_argument("tests", nargs="*", default=["tests/ops"], help="what to run there (default: %(default)s)")
    arguments = parser.parse_args()

    interpreter = make_environment(arguments.venv, arguments.python, arguments.torch)
    with tempfile.TemporaryDirectory() as scratch:
        copy_package(Path(scratch))
        shutil.copytree(ROOT / "tests", Path(scratch) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", scratch)
        for folder in ("csrc", "build_backend", "benchmarks"):
            shutil.copytree(ROOT / folder, Path(scratch) / folder)
        environment = {**os.environ, "RCU_OPS_BUILD": "cpu", "PYTHONPATH": str(Path(scratch) / "build_backend")}
        compiled = subprocess.run([interpreter, "-c", COMPILE], cwd=scratch, env=environment)
        environment["PYTHONPATH"] = scratch
        probe = subprocess.run([interpreter, "-c", PROBE], cwd=scratch, env=environment)
        if compiled.returncode != 0 or probe.returncode != 0:
            return 1
        parallel = ["-n", "2", "--dist", "loadfile"]
        tests = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *arguments.tests]
        return subprocess.run(tests, cwd=scratch, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
