"""The build, importable, and copies of the source tree to build in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD_VARIABLES = ("RCU_OPS_BUILD", "CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")

sys.path.insert(0, str(ROOT / "build_backend"))


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what steers a build or hides the installed package, plus ``variables``."""
    environment = {name: value for name, value in os.environ.items() if name not in (*BUILD_VARIABLES, "PYTHONPATH")}
    return {**environment, **variables}


def copy_source_tree(destination: Path) -> Path:
    """Copy what a clean checkout would hold, and objects compiled already: what is up to date is not rebuilt."""
    results = ("build", "dist", "*.egg-info", "*.so", "_build_record.json")
    ignored = shutil.ignore_patterns(*results, ".git", "__pycache__", ".*_cache", ".venv", "venv")
    shutil.copytree(ROOT, destination, ignore=ignored)
    if (objects := ROOT / "build" / "objects").is_dir():
        shutil.copytree(objects, destination / "build" / "objects")
    return destination


def call_backend(tree: Path, hook: str, output: Path, **environment: str) -> Path:
    """Call a PEP 517 hook as a frontend does, in a process of its own in ``tree``; return the file it made."""
    output.mkdir(parents=True, exist_ok=True)
    script = f"import rcu_ops_backend, sys; print(rcu_ops_backend.{hook}(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, str(output)],
        cwd=tree,
        env=clean_environment(PYTHONPATH=str(tree / "build_backend"), **environment),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return output / result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, shared by the tests of one file."""
    return copy_source_tree(tmp_path_factory.mktemp("source") / "rcu-ops")


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str, str], Path]:
    """Make an executable shell script: ``program("bin/c++", "echo 1.0")`` returns its path."""

    def make(name: str, body: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return make
