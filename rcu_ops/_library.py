"""Loading of the compiled parts, and what is known about how they were built.

Two files may stand beside this one: ``librcu_ops.so``, the operators' CPU and CUDA kernels on LibTorch's stable ABI
(one file for many torch versions), and the extension module ``_native`` with build information and planners. Both are
optional: without them everything runs on the reference and Triton backends. The environment variable RCU_OPS_LIBRARY
names another library file to load instead, for a build carried over from another machine.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(os.environ.get("RCU_OPS_LIBRARY", Path(__file__).with_name("librcu_ops.so")))
BUILD_RECORD = Path(__file__).with_name("_build_record.json")

_load_error: str | None = None


def load() -> None:
    """Load the kernel library once. A library that cannot be loaded is remembered as :func:`load_error`, not raised."""
    global _load_error
    if not LIBRARY.exists():
        _load_error = f"{LIBRARY.name} is not there ({build_record().get('reason') or 'it was not built'})"
        return
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        _load_error = f"{LIBRARY.name} cannot be loaded: {error}"


def load_error() -> str | None:
    """Why the kernel library is not loaded, or None when it is."""
    return _load_error


@cache
def build_record() -> dict[str, Any]:
    """What the build wrote down: kind, reason, compiler, cuda, architectures, torch, commit. Empty if it never ran."""
    try:
        return json.loads(BUILD_RECORD.read_text())
    except (OSError, ValueError):
        return {}


@cache
def native() -> Any | None:
    """The extension module ``rcu_ops._native``, or None when it was not built for this Python."""
    try:
        from rcu_ops import _native
    except ImportError:
        return None
    return _native


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether a binary has registered a kernel for ``rcu_ops::operator`` under "CPU" or "CUDA"."""
    return operator in _compiled.get(dispatch_key, ())


_compiled: dict[str, set[str]] = {}


def record_compiled_kernels(operators: list[str]) -> None:
    """Remember which operators the binary brought kernels for, before Python adds any of its own."""
    for key in ("CPU", "CUDA"):
        _compiled[key] = {
            name for name in operators if torch._C._dispatch_has_kernel_for_dispatch_key(f"rcu_ops::{name}", key)
        }
