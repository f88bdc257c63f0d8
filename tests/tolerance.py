"""The one tolerance rule of the tests: no hand-picked atol anywhere.

The error against an fp64 reference, in rms and in maximum, may be at most twice the error that eager PyTorch makes at
the same dtype on the same input, plus one output ulp of the largest magnitude.

Both errors are luck in part: of a result that hangs on a few roundings, one of two equally good computations errs more
than twice as much as the other now and then, on one processor or with one seed. A test whose inputs are over the bound
is therefore run again on fresh ones (:func:`judge_over_draws`, by tests/conftest.py), and the rule is held against the
mean errors of all draws, the first included: bad luck is averaged out, what is wrong by more than the rule allows is
not, nor what is far off once in a while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 9  # of inputs, the first included


class ToleranceError(AssertionError):
    """A result is outside the rule."""


@dataclass(frozen=True)
class Measured:
    """An error, eager PyTorch's, and one output ulp: of one draw, or means over some."""

    what: str
    error: float
    eager: float
    ulp: float

    def check(self, of: str = "") -> None:
        """Hold the rule against it.

        Raises:
            ToleranceError: it is broken; NaN breaks it.
        """
        bound = 2 * self.eager + self.ulp
        if not self.error <= bound:
            raise ToleranceError(
                f"{self.what} error {self.error:.3e} exceeds {bound:.3e} "
                f"(2 x eager's {self.eager:.3e} + one ulp {self.ulp:.3e}){of}"
            )


_kept: list[Measured] | None = None  # by whom draws are judged together


@contextlib.contextmanager
def keeping(kept: list[Measured]) -> Iterator[None]:
    """Within it results are measured, and the measures kept, instead of judged."""
    global _kept
    _kept = kept
    try:
        yield
    finally:
        _kept = None


def is_keeping() -> bool:
    """Whether results are measured now, and judged later."""
    return _kept is not None


def judge_over_draws(draw: Callable[[int], None], unlucky: ToleranceError) -> None:
    """Hold the rule against the means over draws.

    Args:
        draw: runs the test on the inputs of a number from 0, which stands for the first ones, to ``DRAWS`` - 1.
        unlucky: what the first ones raised.

    Raises:
        ToleranceError: the rule is broken by the means, or draws have different numbers of results: then ``unlucky``.
    """
    draws: list[list[Measured]] = []
    for number in range(DRAWS):
        draws.append([])
        with keeping(draws[-1]):
            draw(number)
    if len({len(measures) for measures in draws}) != 1:
        raise unlucky
    for measures in zip(*draws, strict=True):
        error, eager, one_ulp = (
            sum(values) / DRAWS for values in zip(*((m.error, m.eager, m.ulp) for m in measures), strict=True)
        )
        Measured(measures[0].what, error, eager, one_ulp).check(f" in the mean of {DRAWS} draws")


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
        measured = Measured(f"{name}: {kind}", measure(error).item(), measure(eager_error).item(), one_ulp)
        if _kept is None:
            measured.check()
        else:
            _kept.append(measured)
