"""What the host knows of launches: a kernel with its grid, and what sizes and compiler options depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Programs that fill the chip: the largest tile that leaves none of them idle is taken.
MULTIPROCESSORS = {80: 108, 86: 84, 90: 132}


def architecture(device: torch.device) -> int:
    """The architecture class of the tile tables that serves ``device``; 80 where it is not CUDA (interpreter)."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return 80
    return 90 if major in (9, 10) else 86


def precision_of(dtype: torch.dtype) -> str:
    """How tensors of ``dtype`` are multiplied: "half", "tf32" or, in full fp32, "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def ceil_div(count: int, block: int) -> int:
    """How many blocks hold ``count``: what ``triton.cdiv`` takes 2 us of the host for when called from Python."""
    return -(-count // block)


#: The largest size of a grid along y, where kernels have the samples, or blocks of channels.
MOST_SAMPLES = MOST_BLOCKS = 65535


def parts(count: int, most: int) -> list[tuple[int, int]]:
    """``(first, how many)`` of each part of ``count``, none longer than ``most``."""
    return [(first, min(most, count - first)) for first in range(0, count, most)]


def by_samples(most: int, operator: Callable[..., Any], *arguments: Any) -> Any:
    """``operator(*arguments)``, of no more than ``most`` samples at a time: the first dimension of every tensor."""
    samples = next(value.shape[0] for value in arguments if isinstance(value, Tensor))
    if samples <= most:
        return operator(*arguments)
    found = [
        operator(*(value.narrow(0, first, size) if isinstance(value, Tensor) else value for value in arguments))
        for first, size in parts(samples, most)
    ]
    return torch.cat(found) if isinstance(found[0], Tensor) else tuple(map(torch.cat, zip(*found, strict=True)))


@dataclass(frozen=True)
class Launch:
    """One kernel launch, described: run it, compile it ahead, or ask its signature."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Compiler options. Fused multiply-add is meant: it is more exact than two roundings."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def key(self) -> tuple[Any, ...]:
        """What is compiled: equal for launches that share a compiled kernel."""
        types, constants = self.signature()
        return (self.kernel.__name__, *types.values(), *sorted(constants.items(), key=str), self.warps, self.stages)

    def run(self) -> None:
        """Launch on the current device and stream. Triton raises if the launch fails."""
        self.kernel[self.grid](*self.arguments, **self.constants, **self.options())

    def compile_ahead(self) -> None:
        """Compile for the current device without launching; the arguments may be meta tensors."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self.constants, **self.options())

    def signature(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Triton types by parameter name, and the values of the compile-time ones."""
        types: dict[str, str] = {}
        constants = dict(self.constants)
        for name, value in zip(self.kernel.arg_names, self.arguments, strict=False):
            if value is None:
                constants[name] = None
            elif isinstance(value, Tensor):
                types[name] = "*" + _TYPES[value.dtype]
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        return {name: types.get(name, "constexpr") for name in self.kernel.arg_names}, constants


_TYPES = {
    **{torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"},
    **{torch.bool: "i1", torch.int64: "i64"},
}
