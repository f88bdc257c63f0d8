from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda_host import harness


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where objects and executables are kept: from session to session, or for this one where the tree is read-only."""
    if reason := harness.why_not():
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {reason}")
    try:
        return harness.cache()
    except OSError:
        return tmp_path_factory.mktemp("cuda_host")


@pytest.fixture
def machine_with(objects: Path, tmp_path: Path) -> Callable[..., harness.Machine]:
    """From a sanitizer's name ("none", "address", "thread") to a machine."""

    def make(sanitizer: str = "none", **options: object) -> harness.Machine:
        return harness.Machine(harness.whole(objects, sanitizer), tmp_path, **options)

    return make


@pytest.fixture
def machine(machine_with: Callable[..., harness.Machine]) -> harness.Machine:
    return machine_with()
