"""Sequences on the CPU: a fault planted in a copy of the sources is noticed by what the tests compare."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcu_ops import reference
from tests.ops import alignment
from tests.planting import plant
from tests.tolerance import ToleranceError, assert_close_to_reference, judge_over_draws

ROOT = Path(__file__).parents[2]
SOURCES = ("cpu/cycle_consistency_portable.cpp", "cpu/memory.cpp")


class Kernels:
    """The portable kernels for one fp32 sample."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.planted = ctypes.c_int.in_dll(self._library, "planted")  # which fault is in force

    def _call(self, name: str, temperature: float, a: Tensor, b: Tensor, *others: Tensor) -> None:
        sizes = map(ctypes.c_int64, (a.shape[1], b.shape[1], a.shape[2]))
        pointers = [ctypes.c_void_p(v.data_ptr()) for v in (a, b, *others)]
        getattr(self._library, name)(*sizes, ctypes.c_double(temperature), *pointers)

    def align(self, a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Soft neighbours and nearest frames."""
        soft, index = torch.full_like(a, torch.nan), torch.full(a.shape[:2], -7)
        self._call("align", temperature, a, b, soft, index)
        return soft, index

    def gradients(self, a: Tensor, b: Tensor, grad: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Of soft neighbours."""
        da, db = torch.full_like(a, torch.nan), torch.full_like(b, torch.nan)
        self._call("gradients", temperature, a, b, grad, da, db)
        return da, db


def compiled(directory: Path) -> Kernels:
    """From a copy of the sources with all faults in it."""
    for part in ("cpu", "common"):
        shutil.copytree(ROOT / "csrc" / part, directory / part)
    with (directory / "cpu" / "memory.h").open("a") as header:
        header.write('extern "C" int planted;\n')
    for number, fault in enumerate(FAULTS, 1):
        source = directory / "cpu" / fault.file
        source.write_text(plant(source.read_text(), fault.old, fault.new.replace("PLANTED", f"(planted == {number})")))
    library = directory / "kernels.so"
    shim = Path(__file__).with_name("run_cycle_consistency.cpp")
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{directory}", "-o", library, shim]
    subprocess.run([*command, *(directory / source for source in SOURCES)], check=True)
    return Kernels(library)


def right(kernels: Kernels, a: Tensor, b: Tensor, temperature: float) -> None:
    a, b = a.contiguous(), b.contiguous()
    soft, index = kernels.align(a, b, temperature)
    eager, _ = reference.soft_nearest_neighbor(a, b, temperature=temperature, state_dtype=torch.float32)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, temperature), eager, "soft")
    assert alignment.check_indices(index, a, b, temperature)[1] <= 1


def cut(kernels: Kernels) -> None:
    """Two scenes: products alone tell no two frames of a scene apart, wherever the centre."""
    a = 0.3 * torch.randn(1, 70, 64).cumsum(1)
    a += 1e4 * torch.randn(2, 64)[torch.arange(70) // 35]
    right(kernels, a[:, ::9], a + 0.05 * torch.randn(a.shape), 1.0)


def far_pair(kernels: Kernels) -> None:
    """Two frames close to each other, far from the centre and from all others: pairs to be found again one by one."""
    b = torch.randn(1, 70, 64)
    b[:, 30] += 1e4 * torch.randn(64)
    b[:, 31] = b[:, 30] + 0.1 * torch.randn(64)
    right(kernels, b[:, torch.arange(30, 38) % 2 + 30] + 0.02 * torch.randn(1, 8, 64), b, 0.2)


def flat_scene(kernels: Kernels) -> None:
    """Most frames are one scene, in which all weights are alike, and the mean of all is far from it."""
    a = torch.randn(1, 70, 64)
    a[:, 50:] += 1e4
    right(kernels, a[:, :50:9], a + 0.05 * torch.randn(a.shape), 300.0)


def nearly_flat(kernels: Kernels) -> None:
    """Soft neighbours near each other, but not so near that the frame nearest to one is nearest to all."""
    for temperature in (40.0, 50.0, 60.0, 75.0, 100.0):
        right(kernels, torch.randn(1, 64, 64), torch.randn(1, 90, 64), temperature)


def scenes_within_a_block(kernels: Kernels) -> None:
    """Every other frame is of a scene far away, which has no gradient: no one frame is a centre for the numbers of its
    neighbours in time, which are small beside it."""
    near = (torch.arange(24) % 2)[:, None]
    a = torch.randn(1, 24, 24) + 1e4 * torch.randn(24) * (1 - near)
    b, grad = a + 0.5 * torch.randn(a.shape), torch.randn(a.shape) * near

    def plain(to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [v.to(to).requires_grad_() for v in (a, b)]
        soft, _ = reference.soft_nearest_neighbor(*leaves, temperature=30.0, state_dtype=to)
        return torch.autograd.grad(soft, leaves, grad.to(to))

    values = zip(kernels.gradients(a, b, grad, 30.0), plain(torch.float64), plain(torch.float32), strict=True)
    for name, triple in zip(("da", "db"), values, strict=True):
        assert_close_to_reference(*triple, name)


@dataclass(frozen=True)
class Fault:
    name: str
    old: str
    new: str
    noticed_by: Callable[[Kernels], None]
    file: str = "cycle_consistency_products.h"


FAULTS = [
    Fault("no pair is found again by itself", "i < found; ++i) d[", "i < (PLANTED ? 0 : found); ++i) d[", far_pair),
    Fault(
        "no block is found again",
        "      distances<V>(OfPanel<V>(a.panels, t0, C), b.panels, b.count, C, d, s.pitch);\n      return false;",
        "      if (!PLANTED) distances<V>(OfPanel<V>(a.panels, t0, C), b.panels, b.count, C, d, s.pitch);\n"
        "      return false;",
        cut,
    ),
    Fault(
        "the mean of all frames is always near enough",
        "if (!(4 * V::sum(squares) <= 3 * V::sum(whole))) return false;",
        "if (!PLANTED && !(4 * V::sum(squares) <= 3 * V::sum(whole))) return false;",
        flat_scene,
        "cycle_consistency_core.h",
    ),
    Fault(
        "soft neighbours are all where the point near them is",
        "+ 2 * __builtin_sqrt(static_cast<double>(apart(m)))",
        "+ (PLANTED ? 0 : 2 * __builtin_sqrt(static_cast<double>(apart(m))))",
        nearly_flat,
    ),
    Fault(
        "one frame's place is near enough for the sums of a block",
        "if (!(extent <= 16 * squares))",
        "if (!PLANTED && !(extent <= 16 * squares))",
        scenes_within_a_block,
        "cycle_consistency_sums.h",
    ),
    Fault(
        "one frame is near enough for the products of a block",
        "if (V::sum(apart) <= V::sum(size)) continue;",
        "if (PLANTED || V::sum(apart) <= V::sum(size)) continue;",
        scenes_within_a_block,
        "cycle_consistency_sums.h",
    ),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return compiled(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("check", [cut, far_pair, flat_scene, nearly_flat, scenes_within_a_block])
def test_the_checks_pass(kernels: Kernels, check: Callable[[Kernels], None]) -> None:
    kernels.planted.value = 0
    check(kernels)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=lambda number: FAULTS[number - 1].name)
def test_the_checks_notice_planted_faults(kernels: Kernels, number: int, seed: int) -> None:
    kernels.planted.value = number

    def draw(which: int) -> None:
        torch.manual_seed(seed + which)
        FAULTS[number - 1].noticed_by(kernels)

    uneven = ToleranceError("draws of different numbers of results")  # which would be no fault noticed
    with pytest.raises(AssertionError) as noticed:
        judge_over_draws(draw, uneven)
    assert noticed.value is not uneven
