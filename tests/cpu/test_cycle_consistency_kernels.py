"""Long sequences on the CPU: a fault planted in a copy of the sources is noticed by what the tests compare."""

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
from tests.tolerance import assert_close_to_reference

ROOT = Path(__file__).parents[2]
SOURCES = ("cpu/cycle_consistency_portable.cpp", "cpu/memory.cpp")

Align = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def compiled(directory: Path) -> tuple[Align, ctypes.c_int]:
    """Soft neighbours and nearest frames of one fp32 sample by the portable kernels; which fault is in force."""
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
    loaded = ctypes.CDLL(str(library))

    def align(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        soft, index = torch.full_like(a, torch.nan), torch.full(a.shape[:2], -7)
        sizes = map(ctypes.c_int64, (a.shape[1], b.shape[1], a.shape[2]))
        pointers = [ctypes.c_void_p(v.data_ptr()) for v in (a, b, soft, index)]
        loaded.align(*sizes, ctypes.c_double(temperature), *pointers)
        return soft, index

    return align, ctypes.c_int.in_dll(loaded, "planted")


def right(align: Align, a: Tensor, b: Tensor, temperature: float) -> None:
    a, b = a.contiguous(), b.contiguous()
    soft, index = align(a, b, temperature)
    eager, _ = reference.soft_nearest_neighbor(a, b, temperature=temperature, state_dtype=torch.float32)
    assert_close_to_reference(soft, alignment.soft_neighbors(a, b, temperature), eager, "soft")
    assert alignment.check_indices(index, a, b, temperature)[1] <= 1


def cut(align: Align) -> None:
    """Two scenes: products alone tell no two frames of a scene apart, wherever the centre."""
    a = 0.3 * torch.randn(1, 70, 64).cumsum(1)
    a += 1e4 * torch.randn(2, 64)[torch.arange(70) // 35]
    right(align, a[:, ::9], a + 0.05 * torch.randn(a.shape), 1.0)


def far_pair(align: Align) -> None:
    """Two frames close to each other, far from the centre and from all others: pairs to be found again one by one."""
    b = torch.randn(1, 70, 64)
    b[:, 30] += 1e4 * torch.randn(64)
    b[:, 31] = b[:, 30] + 0.1 * torch.randn(64)
    right(align, b[:, torch.arange(30, 38) % 2 + 30] + 0.02 * torch.randn(1, 8, 64), b, 0.2)


def flat_scene(align: Align) -> None:
    """Most frames are one scene, in which all weights are alike, and the mean of all is far from it."""
    a = torch.randn(1, 70, 64)
    a[:, 50:] += 1e4
    right(align, a[:, :50:9], a + 0.05 * torch.randn(a.shape), 300.0)


def nearly_flat(align: Align) -> None:
    """Soft neighbours near each other, but not so near that the frame nearest to one is nearest to all."""
    for temperature in (40.0, 50.0, 60.0, 75.0, 100.0):
        right(align, torch.randn(1, 64, 64), torch.randn(1, 90, 64), temperature)


@dataclass(frozen=True)
class Fault:
    name: str
    old: str
    new: str
    noticed_by: Callable[[Align], None]
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
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_checks_pass_and_notice_planted_faults(tmp_path: Path) -> None:
    align, planted = compiled(tmp_path)
    for check in (cut, far_pair, flat_scene, nearly_flat):
        check(align)
    for number, fault in enumerate(FAULTS, 1):
        planted.value = number
        with pytest.raises(AssertionError):
            fault.noticed_by(align)
            pytest.fail(f"nobody noticed: {fault.name}", pytrace=False)
