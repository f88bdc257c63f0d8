"""Access to the Triton kernels without importing Triton before a kernel is needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

#: Whether the package triton is there. Asked once, without importing it, and a plain value that tracers can read.
PRESENT = importlib.util.find_spec("triton") is not None

#: The most channels recurrent_conv's kernels take: beyond, a tile of states does not fit the registers.
MAX_CHANNELS = 512

_PACKAGE = "rcu_ops.triton_kernels"


def kernels(operator: str) -> ModuleType:
    """The module ``rcu_ops.triton_kernels.<operator>``; imports Triton.

    Raises:
        ImportError: triton is not installed or cannot be imported.
    """
    if _PACKAGE not in sys.modules and importlib.util.find_spec(_PACKAGE) is None:
        _mount(source_directory())
    return importlib.import_module(f"{_PACKAGE}.{operator}")


def source_directory() -> Path:
    """Where the kernels' sources lie: in the installed package, or beside it in a source tree that is not installed."""
    installed = Path(__file__).parents[1] / "triton_kernels"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "triton_kernels"


def sources(*operators: str) -> tuple[Path, ...]:
    """The files that the kernels of these operators are made of."""
    return tuple(source_directory() / f"{name}.py" for name in (*operators, "device", "launch"))


def _mount(directory: Path) -> None:
    """Make ``directory`` the package rcu_ops.triton_kernels, as an editable install does."""
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)


def why_not_device(device: torch.device) -> str | None:
    """None when Triton supports the CUDA device, else the reason. Safe to call while torch.compile traces."""
    return _why_not_device(device.index)


def _why_not_device(index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"


# What torch.compiler.assume_constant_result does, without importing the compiler (and Triton with it).
_why_not_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
