"""Why a backend cannot run: the parts of the predicates that every operator shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rcu_ops import _library
from rcu_ops.ops import _evidence


def why_not_cpu(operator: str) -> Callable[..., str | None]:
    """The predicate of the kernels that the binary registers for CPU tensors under ``rcu_ops::operator``."""

    def why_not(x: Tensor, *_: Any) -> str | None:
        if x.is_cpu:
            if _library.has_kernel(operator, "CPU"):
                return None
            return _library.load_error() or "the library was built without this CPU kernel"
        return None if x.is_meta else f"x is on {x.device}"

    return why_not


def why_not_cuda(operator: str, family: str) -> Callable[..., str | None]:
    """The same for CUDA tensors; ``family`` is the kernel file's name, under which its evidence is kept."""

    def why_not(x: Tensor, *_: Any) -> str | None:
        if x.device.type != "cuda":
            return f"x is on {x.device}"
        if not _library.has_kernel(operator, "CUDA"):
            return _library.load_error() or "the library was built without this CUDA kernel"
        return _evidence.why_not(family, x.device, x.dtype, operator)

    return why_not


def why_not_reference(*_: Any) -> None:
    """The reference runs everything."""
