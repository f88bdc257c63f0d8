"""Argument checks shared by the operators: ValueError / TypeError with the argument's name, expected, got."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: Any) -> Tensor:
    """``value`` if it is a dense floating tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    return _dense(name, value)


def boolean(name: str, value: Any) -> Tensor:
    """``value`` if it is a dense tensor of truth values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    dtype(name, value, torch.bool)
    return _dense(name, value)


def _dense(name: str, value: Tensor) -> Tensor:
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {value.layout}")
    if value.is_nested:
        raise TypeError(f"{name}: expected one tensor, got a nested tensor")
    return value


def shape(name: str, value: Tensor, expected: tuple[Any, ...], meaning: str) -> None:
    """ValueError unless ``value`` has exactly the shape ``expected``, described by ``meaning``."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected {meaning} = {list(expected)}, got {list(value.shape)}")


def dims(name: str, value: Tensor, meaning: str) -> None:
    """ValueError unless ``value`` has as many dimensions as ``meaning`` ("[N,C,T,H,W]") names."""
    if value.dim() != meaning.count(",") + 1:
        raise ValueError(f"{name}: expected {meaning}, got {value.dim()} dimensions {list(value.shape)}")


def same_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """ValueError unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like {like_name}, got {value.device}")


def dtype(name: str, value: Tensor, *allowed: torch.dtype) -> None:
    """TypeError unless ``value`` has one of the dtypes."""
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in dict.fromkeys(allowed))}, got {value.dtype}")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of the strings."""
    if value not in allowed:
        raise ValueError(f"{name}: expected {' or '.join(repr(a) for a in allowed)}, got {value!r}")


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    kind = "cpu" if tensor.is_cpu else tensor.device.type  # to put the device into words takes longer than all else
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in autocast's dtype (fp64 is left alone, as torch's own rules do); else unchanged."""
    if not autocasts(tensors[0]):
        return tensors
    target = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(target) for t in tensors)
