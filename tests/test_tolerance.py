"""The tolerance rule over several draws: bad luck is averaged out, errors are not."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import DRAWS, ToleranceError, assert_close_to_reference, is_keeping, judge_over_draws

EXACT = torch.linspace(1, 2, 8, dtype=torch.float64)
ULP = 2 * torch.finfo(torch.float32).eps


def once(error: float, eager: float = ULP) -> None:
    """A test whose result is off by ``error``, eager's by ``eager``."""
    assert_close_to_reference(EXACT + error, EXACT, EXACT + eager)


def over_draws(*errors: float) -> None:
    with pytest.raises(ToleranceError) as unlucky:
        once(errors[0])
    judge_over_draws(lambda number: once(errors[number % len(errors)]), unlucky.value)


def test_one_unlucky_draw_is_forgiven():
    over_draws(4 * ULP, *[ULP] * (DRAWS - 1))
    assert not is_keeping()


@pytest.mark.parametrize("error", [2.1 * ULP, torch.nan])
def test_what_is_always_over_the_bound_is_not(error):
    with pytest.raises(ToleranceError, match=f"rms error .* in the mean of {DRAWS} draws"):
        over_draws(error)
    assert not is_keeping()


def test_what_is_far_off_once_is_not_forgiven():
    with pytest.raises(ToleranceError, match=r"max error .* in the mean of"):
        judge_over_draws(
            lambda number: assert_close_to_reference(
                EXACT + torch.eye(8, dtype=torch.float64)[0] * (25 * ULP if number == 3 else 0), EXACT, EXACT + ULP
            ),
            ToleranceError("the first"),
        )


def test_draws_of_different_results_are_not_judged():
    with pytest.raises(ToleranceError, match=r"^the first$"):
        judge_over_draws(lambda number: [once(0) for _ in range(1 + number % 2)] and None, ToleranceError("the first"))


runs: list[float] = []


def test_a_test_runs_again_on_other_inputs(request):
    """By its hook in conftest.py: the first inputs come again, and only they are over the bound."""
    runs.append(float(torch.rand(())))
    once(4 * ULP if runs[-1] == runs[0] else 0)
    if is_keeping():
        request.addfinalizer(lambda: _seen(runs))


def _seen(numbers: list[float]) -> None:
    assert len(numbers) == 1 + DRAWS and numbers[0] == numbers[1] and len(set(numbers)) == DRAWS
