"""The Triton kernels of recurrent_conv: numerics in the interpreter (own process), operators, backend and warm-up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rcu_ops
from rcu_ops.ops import OPERATORS, _selftest, _triton, _warmup

NAMES = ("recurrent_conv", "recurrent_conv_affine_act")


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_numerics_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.triton.interpreted_recurrent_conv"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, "\n".join([*(line for line in lines if not line.startswith("ok")), run.stderr[-3000:]])
    kinds = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert len(kinds) == len(lines) >= 100
    assert {"forward", "backward", "affine_act", "nan", "chunks", "empty", "operators", "self-tests"} <= set(kinds)


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, with_h0) -> None:
    """The registration: schemas, fakes and autograd are those of the main operators."""
    x, weight = torch.randn(2, 4, 3, 3, 2).to(dtype).requires_grad_(), torch.eye(4).to(dtype)
    h0 = torch.randn(2, 4, 3, 2) if with_h0 else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (x, weight, h0, True, False)
    torch.library.opcheck(torch.ops.rcu_ops.recurrent_conv_triton.default, args, test_utils=tests)
    with torch.no_grad():
        h, h_n = torch.ops.rcu_ops.recurrent_conv_triton(*args)
    backward = (torch.randn_like(h), torch.randn_like(h_n), h, weight, h0, False, True, True)
    torch.library.opcheck(torch.ops.rcu_ops.recurrent_conv_backward_triton.default, backward, test_utils=tests)
    per_channel = torch.ones(4)
    fused = (x.detach(), weight, per_channel, per_channel, h0, None, False, True)
    torch.library.opcheck(torch.ops.rcu_ops.recurrent_conv_affine_act_triton.default, fused, test_utils=tests[::2])


def test_vmap_and_flops_are_those_of_the_main_operators() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.randn(3, 2, 4, 3, 2, 2), torch.eye(4)
    counts, values = [], []
    for suffix in ("", "_triton"):
        operator = getattr(torch.ops.rcu_ops, f"recurrent_conv{suffix}")
        values.append(torch.vmap(lambda v, operator=operator: operator(v, weight, None, False, False)[0])(x))
        with FlopCounterMode(display=False) as counter:
            operator(x[0], weight, None, False, False)
        counts.append(counter.get_total_flops())
    torch.testing.assert_close(*values)
    assert counts[0] == counts[1] > 0


def on_cuda(dtype: torch.dtype = torch.float32, channels: int = 8) -> tuple[object, ...]:
    """Arguments as a CUDA tensor would present them, for the predicate alone."""

    class Stub:
        device = torch.device("cuda", 0)
        shape = (1, channels, 2, 4, 4)

    stub = Stub()
    stub.dtype = dtype  # type: ignore[attr-defined]
    return stub, None, None, False, False


@pytest.mark.parametrize("name", NAMES)
def test_every_reason_against_the_backend(name, monkeypatch) -> None:
    backend = OPERATORS[name].backend("triton")
    assert backend.why_not(torch.zeros(1, 4, 2, 3, 3)) == "x is on cpu"
    assert backend.why_not(torch.zeros(1, 4, 2, 3, 3, device="meta")) == "x is on meta"
    monkeypatch.setattr(_triton, "why_not_device", lambda device: None)
    monkeypatch.setattr(_selftest, "why_not", lambda *_: None)
    assert backend.why_not(*on_cuda()) is None
    assert "float64" in backend.why_not(*on_cuda(torch.float64))
    assert "at most 512" in backend.why_not(*on_cuda(channels=513))
    asked = []
    monkeypatch.setattr(_selftest, "why_not", lambda *args: asked.append(args) or "its self-test failed")
    assert backend.why_not(*on_cuda(torch.bfloat16)) == "its self-test failed"
    assert asked == [(f"{name}/triton", torch.device("cuda", 0), torch.bfloat16)]
    monkeypatch.setattr(_triton, "why_not_device", lambda device: "the GPU is sm_75")
    assert backend.why_not(*on_cuda()) == "the GPU is sm_75"
    monkeypatch.setattr(_triton, "PRESENT", False)
    assert backend.why_not(*on_cuda()) == "the package triton is not installed"


@pytest.mark.parametrize("name", NAMES)
def test_auto_tries_triton_after_cuda_and_before_the_rest(name) -> None:
    assert [backend.name for backend in OPERATORS[name].backends] == ["cuda", "triton", "cpu", "reference"]


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, rcu_ops, rcu_ops.ops; print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_warmup_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="warmup: there is no CUDA device"):
        rcu_ops.warmup([(1, 64, 8, 56, 56)])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            [(1, 64, 8, 56)],
            {},
            ValueError,
            r"shapes: expected \[N,T,C\], \[N,C,T,H,W\] or \[N,K,C,L,H,W\] of positive sizes, got \[1, 64, 8, 56\]",
        ),
        (
            [(1, 64, 8, 7, 7)],
            {"files": ["gates"]},
            ValueError,
            "files: expected some of cycle_consistency, .*, got 'gates'",
        ),
        ([(1, 1024, 8, 7, 7)], {}, ValueError, "at most 512 channels"),
        ([(1, 64, 8, 7, 7)], {"dtypes": [torch.float64]}, TypeError, "dtypes: expected float16, bfloat16 or float32"),
        ([(1, 64, 8, 7, 7)], {"memory_formats": [torch.preserve_format]}, ValueError, "memory_formats: expected"),
        ([(1, 64, 8, 7, 7)], {"training": False, "inference": False}, ValueError, "at least one"),
    ],
)
def test_warmup_names_wrong_arguments(arguments, options, error, message) -> None:
    with pytest.raises(error, match=message):
        rcu_ops.warmup(arguments, **options)


@pytest.mark.skipif(not _triton.PRESENT, reason="triton is not installed")
def test_warmup_compiles_each_kernel_once(monkeypatch) -> None:
    """With a stand-in for the device and the compiler: what it would compile, and that it asks for the self-tests."""
    launch = _triton.kernels("launch")
    compiled, asked = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(launch.Launch, "compile_ahead", lambda this: compiled.append(this.key()))
    monkeypatch.setattr(_selftest, "why_not", lambda *args: asked.append(args))
    options = {"device": "cuda:0", "files": ["recurrent_conv"]}
    count = _warmup.warmup([(2, 64, 8, 56, 56), (4, 64, 2, 56, 56)], training=False, **options)
    assert count == len(compiled) == len(set(compiled))
    assert {key[0] for key in compiled} == {"scan_kernel"}
    assert {name for name, *_ in asked} >= {"recurrent_conv/triton", "recurrent_conv_affine_act/triton"}
    more = _warmup.warmup([(2, 64, 8, 56, 56)], inference=False, **options)
    assert {key[0] for key in compiled[count:]} == {"scan_kernel", "weight_grad_kernel", "reduce_kernel"}
    assert more == len(compiled) - count
    assert _warmup.warmup([(2, 2048, 8, 7, 7), (2, 16, 64)], device="cuda:0", files=["srtg", "cycle_consistency"]) > 10
    assert {"gate_kernel", "short_cycle_kernel", "key_sum_kernel"} <= {key[0] for key in compiled}
