"""What every test runs under: poisoned uninitialised memory, fresh random inputs, GPU tests only where there is one."""

from __future__ import annotations

import os

# Test processes share the cores: one thread each, so that none waits in a barrier for a core that another has.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import tolerance


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an output element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch from the test's name and RCU_OPS_TEST_SEED (0): another value gives every test fresh inputs."""
    value = zlib.crc32(f"{os.environ.get('RCU_OPS_TEST_SEED', '0')} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Run a test whose result is outside the tolerance rule on further inputs: tests/tolerance.py says why."""
    try:
        return (yield)
    except tolerance.ToleranceError as error:
        if tolerance.is_keeping():
            raise

        def draw(number: int) -> None:
            torch.manual_seed(pyfuncitem.funcargs["seed"] + number)
            pyfuncitem.runtest()

        tolerance.judge_over_draws(draw, error)
        return True


LONGEST = (
    "tests/cuda_host/test_planted_faults.py",
    "tests/packaging/test_distributions.py",
    "tests/ops/test_cuda_compile.py",
    "tests/models/test_compile.py",
)
"""Files whose tests take longest: they begin, so that no test process has one left when the other has finished."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {file: position for position, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """After a fault inside a kernel a process can launch nothing more: a worker ends, and another takes the rest."""
    result = yield
    if item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result
