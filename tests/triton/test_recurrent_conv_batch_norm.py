"""The Triton kernels of recurrent_conv_batch_norm: numerics in the interpreter, registration, resources."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rcu_ops
from rcu_ops.ops import _selftest, _triton
from tests.triton import resources


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_numerics_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.triton.interpreted_recurrent_conv_batch_norm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join([*(line for line in lines if not line.startswith("ok")), run.stderr[-3000:]])
    kinds = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert len(kinds) == len(lines) >= 11
    assert {"passes", "plain", "self-tests", "large", "empty"} <= set(kinds)


def test_cpu_tensors_are_refused_with_the_reason() -> None:
    assert _selftest.known("recurrent_conv_batch_norm/triton")
    with rcu_ops.use_backend("triton"), pytest.raises(ValueError, match=r"'triton' cannot run .*: x is on cpu"):
        rcu_ops.recurrent_conv_batch_norm(torch.zeros(1, 4, 2, 3, 3), torch.eye(4))


def test_opcheck() -> None:
    """The registration: schemas, fakes and autograd are those of the main operators."""
    x, weight, gamma = torch.randn(2, 4, 3, 3, 2, requires_grad=True), torch.eye(4), torch.rand(4)
    torch.library.opcheck(
        torch.ops.rcu_ops.recurrent_conv_batch_norm_triton.default,
        (x, weight, None, gamma, None, x.detach(), False, 1e-5, True, ""),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
@pytest.mark.parametrize(
    ("what", "dtype", "layout", "arch"),
    [
        ("MOMENTS", torch.bfloat16, torch.channels_last_3d, 90),
        ("NORMALIZE", torch.float32, torch.contiguous_format, 80),
        ("SUMS", torch.bfloat16, torch.contiguous_format, 90),
        ("GRADIENT", torch.float16, torch.channels_last_3d, 80),
    ],
    ids=str,
)
def test_compiles_without_spills_and_fits(what, dtype, layout, arch, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernels = _triton.kernels("recurrent_conv_batch_norm")
    h = torch.empty(16, 64, 8, 56, 56, dtype=dtype, device="meta").contiguous(memory_format=layout)
    table = torch.empty(3, 64, device="meta")
    given = {
        "MOMENTS": {"result": table},
        "NORMALIZE": {"other": h, "y": h},
        "SUMS": {"other": h, "y": h, "out": h, "result": table},
        "GRADIENT": {"other": h, "out": h, "sums": table},
    }[what]
    tables = {} if what == "MOMENTS" else {"moments": table, "gamma": table[0], "beta": table[1]}
    launches = kernels.plan(getattr(kernels, what), h, eps=1e-5, relu=what != "MOMENTS", **given, **tables)
    assert len(launches) == 1 + ("result" in given)
    for launch in launches:
        usage = resources.compile_launch(launch, arch)
        assert usage.local == 0 and usage.shared <= resources.SHARED_LIMIT[arch], f"{launch.kernel.__name__}: {usage}"
