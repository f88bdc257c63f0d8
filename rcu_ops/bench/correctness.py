"""The tolerance rule that every candidate must keep before it is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class WrongResultError(AssertionError):
    """A candidate's result is outside the tolerance rule; its time would mean nothing."""


def check_outputs(outputs: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor]) -> float:
    """Hold each output against the exact one: error in rms and in maximum <= 2 x eager's + one output ulp.

    Args:
        outputs: of the candidate, in the dtypes it returns.
        exact: the same in fp64.
        eager: the same by eager PyTorch at the tested dtype.

    Returns:
        The largest share of the allowed error that was used (at most 1).

    Raises:
        WrongResultError: naming the output, the error and the bound.
    """
    if len(outputs) != len(exact):
        raise WrongResultError(f"expected {len(exact)} outputs, got {len(outputs)}")
    used = 0.0
    for index, (got, want, rough) in enumerate(zip(outputs, exact, eager, strict=True)):
        if got.shape != want.shape:
            raise WrongResultError(f"output {index}: expected shape {list(want.shape)}, got {list(got.shape)}")
        if want.numel() == 0:
            continue
        for kind in ("rms", "max"):
            error, allowed = _size(got, want, kind), 2 * _size(rough, want, kind) + _ulp(want, got.dtype)
            if not error <= allowed:
                raise WrongResultError(f"output {index}: {kind} error {error:.3e} exceeds {allowed:.3e}")
            used = max(used, error / allowed)
    return used


def _size(value: Tensor, exact: Tensor, kind: str) -> float:
    # Sample by sample: a whole fp64 difference of a large clip would be the largest tensor of the benchmark.
    total, largest = 0.0, 0.0
    for got, want in zip(value, exact, strict=True):
        difference = got.double() - want
        total += float(difference.square().sum())
        largest = max(largest, float(difference.abs().max())) if not torch.isnan(difference).any() else math.nan
    return math.sqrt(total / exact.numel()) if kind == "rms" else largest


def _ulp(exact: Tensor, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    magnitude = float(exact.abs().max())
    if magnitude < info.smallest_normal:
        return info.smallest_normal * info.eps
    return 2.0 ** math.floor(math.log2(magnitude)) * info.eps
