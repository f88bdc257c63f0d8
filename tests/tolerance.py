"""The one tolerance rule of the tests: no hand-picked atol anywhere.

The error against an fp64 reference, in rms and in maximum, may be at most twice the error that eager PyTorch makes at
the same dtype on the same input, plus one output ulp of the largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance from ``magnitude`` to the next larger number of ``dtype``."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.smallest_normal * info.eps
    return 2.0 ** (torch.tensor(magnitude, dtype=torch.float64).log2().floor().item()) * info.eps


def assert_close_to_reference(
    got: Tensor, exact: Tensor, eager: Tensor, name: str = "result", *, by_sample: bool = False
) -> None:
    """Fail unless ``got`` keeps the tolerance rule.

    Args:
        got: the result under test, in the dtype it is tested at.
        exact: the fp64 reference.
        eager: eager PyTorch's result at the tested dtype (any dtype; it is compared in fp64).
        name: what to call the result in the failure message.
        by_sample: take the maximum of each sample (dimension 0) and average these. For whole networks: they amplify
            single roundings, so that which of two equally good results has the one largest error is a matter of luck.
    """
    assert got.shape == exact.shape == eager.shape, f"{name}: shapes {got.shape}, {exact.shape}, {eager.shape}"
    assert exact.dtype == torch.float64, f"{name}: the exact result must be fp64, is {exact.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(exact).all(), f"{name}: the rule needs a finite reference"
    error = got.double() - exact
    eager_error = eager.double() - exact
    one_ulp = ulp(exact.abs().max().item(), got.dtype)
    rows = got.shape[0] if by_sample else 1
    for kind, measure in (
        ("rms", lambda e: e.square().mean().sqrt()),
        ("max", lambda e: e.abs().reshape(rows, -1).amax(1).mean()),
    ):
        value, bound = measure(error).item(), 2 * measure(eager_error).item() + one_ulp
        assert value <= bound, (
            f"{name}: {kind} error {value:.3e} exceeds {bound:.3e} "
            f"(2 x eager's {measure(eager_error).item():.3e} + one ulp {one_ulp:.3e})"
        )
