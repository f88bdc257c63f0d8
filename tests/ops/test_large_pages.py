"""Large outputs on the CPU ask the system for large pages, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcu_ops import _library

pytestmark = [
    pytest.mark.skipif(_library.load_error() is not None, reason="the kernel library was not built"),
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
        reason="this system has no transparent large pages",
    ),
]

PROGRAM = """
import torch, rcu_ops

def asked(tensor):  # by the mapping that holds the tensor's middle
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in open("/proc/self/smaps"):
        field = line.split()[0]
        if not field.endswith(":"):
            begin, end = (int(number, 16) for number in field.split("-"))
            inside = begin <= address < end
        elif inside and field == "VmFlags:":
            return "hg" in line.split()
    raise RuntimeError("no mapping holds the tensor")

rcu_ops.use_backend("cpu").__enter__()
x, weight = torch.randn(1, 16, 4, 256, 256, requires_grad=True), torch.randn(16, 16)
h, _ = rcu_ops.recurrent_conv(x, weight)
dx, = torch.autograd.grad(h, x, torch.randn_like(h))
fused, _ = rcu_ops.recurrent_conv_affine_act(x.detach(), weight, torch.ones(16), torch.ones(16))
print(asked(x), asked(h), asked(dx), asked(fused))
"""


@pytest.mark.parametrize(("wanted", "asked"), [(None, True), ("1", True), ("0", False)])
def test_large_outputs_ask_for_large_pages(wanted: str | None, asked: bool) -> None:
    names = ("RCU_OPS_LARGE_PAGES", "THP_MEM_ALLOC_ENABLE", "RCU_OPS_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if wanted is not None:
        environment["RCU_OPS_LARGE_PAGES"] = wanted
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False", *[str(asked)] * 3]
