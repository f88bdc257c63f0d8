"""Kernels that no GPU has confirmed are not taken unasked, and are listed where users look."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rcu_ops
from rcu_ops import _library
from rcu_ops.ops import OPERATORS, _evidence, _selftest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


FAMILIES = {
    "soft_nearest_neighbor": "cycle_consistency",
    "temporal_cycle_loss": "cycle_consistency",
    "fast_gru_step": "fast_gru",
    "nonlocal_attention": "nonlocal_gates",
    "relational_lstm_step": "nonlocal_gates",
    "recurrent_conv_affine_act": "recurrent_conv",
    "srtg_squeeze": "srtg",
    "srtg_fuse": "srtg",
} | {name: name for name in ("cycle_consistency", "fast_gru", "recurrent_conv", "recurrent_conv_batch_norm")}
"""By operator the kernel file that it runs on."""


@pytest.fixture
def verified(monkeypatch) -> None:
    monkeypatch.setattr(
        _evidence,
        "VARIANTS",
        tuple(dataclasses.replace(v, evidence="nvidia-h200/run.json") for v in _evidence.VARIANTS),
    )


def test_the_committed_list_is_up_to_date() -> None:
    command = [sys.executable, "-m", "rcu_ops.ops._evidence"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == (RESULTS / "UNVERIFIED.md").read_text()
    assert run.stderr == ""


def test_the_list_names_every_unverified_variant(monkeypatch) -> None:
    text = _evidence.render()
    for variant in _evidence.VARIANTS:
        assert (f"| {variant.name} |" in text) == (variant.evidence is None)
    half = (dataclasses.replace(_evidence.VARIANTS[0], evidence="nvidia-h200/run.json"), *_evidence.VARIANTS[1:])
    monkeypatch.setattr(_evidence, "VARIANTS", half)
    assert f"| {half[0].name} |" not in _evidence.render()
    assert f"| {half[1].name} |" in _evidence.render()


def test_nothing_is_listed_once_all_is_verified(verified) -> None:
    assert "None:" in _evidence.render()
    assert "|" not in _evidence.render()


def test_recorded_evidence_says_so() -> None:
    """The file names a run in which problems launched the variant's kernels and no test of the operator failed."""
    for variant in _evidence.VARIANTS:
        if variant.evidence is not None:
            record = json.loads((RESULTS / variant.evidence).read_text())
            assert record["gpu"]["name"].startswith("NVIDIA")
            steps = {step["name"]: step for step in record["steps"]}
            operators = {name for name, family in FAMILIES.items() if family == variant.operator}
            failed = [
                name
                for name in steps["gpu tests"]["summary"]["failed"]
                if "triton" not in name and any(operator in name for operator in operators)
            ]
            assert not failed, (variant, failed)
            launched = {
                kernel
                for problem, kernels in steps["kernels"]["summary"]["launched"].items()
                if problem.partition("-")[0] in operators
                for kernel in kernels
            }
            assert set(_evidence.KERNELS[variant.name]) <= launched, (variant, launched)
            # initcheck does not see what the library's kernels write by the bulk copy engine: it is for reading.
            reports = {n: step["summary"].get("ours") for n, step in steps.items() if not n.startswith("initcheck")}
            assert all(not count for count in reports.values()), reports


def test_every_variant_s_kernels_are_there() -> None:
    assert set(FAMILIES) == set(OPERATORS)
    assert set(FAMILIES.values()) == {variant.operator for variant in _evidence.VARIANTS}
    names = {variant.name for variant in _evidence.VARIANTS}
    assert names == set(_evidence.KERNELS)
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.*"))
    missing = [k for kernels in _evidence.KERNELS.values() for k in kernels if not re.search(rf"\b{k}\(", sources)]
    assert not missing


def test_names_are_unique_and_belong_to_kernel_files() -> None:
    names = [(v.operator, v.name) for v in _evidence.VARIANTS]
    assert len(set(names)) == len(names)
    files = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {v.operator for v in _evidence.VARIANTS} <= files


def test_auto_waits_for_evidence(monkeypatch) -> None:
    monkeypatch.setattr(_evidence, "EXPERIMENTAL", False)
    with rcu_ops.use_backend("auto"):
        reason = _evidence.why_not("recurrent_conv")
        assert reason is not None
        assert "no run on a GPU has been recorded for plain scan" in reason
        monkeypatch.setattr(_evidence, "EXPERIMENTAL", True)
        assert _evidence.why_not("recurrent_conv") is None


def test_an_explicit_choice_takes_them(monkeypatch) -> None:
    monkeypatch.setattr(_evidence, "EXPERIMENTAL", False)
    with rcu_ops.use_backend("cuda"):
        assert _evidence.why_not("recurrent_conv") is None
    with rcu_ops.use_backend("triton"):
        assert _evidence.why_not("recurrent_conv") is not None


def test_evidence_lifts_the_reserve(verified, monkeypatch) -> None:
    monkeypatch.setattr(_evidence, "EXPERIMENTAL", False)
    with rcu_ops.use_backend("auto"):
        assert _evidence.why_not("recurrent_conv") is None


def test_other_architectures_are_tested_on_the_user_s_gpu(verified, monkeypatch) -> None:
    asked = []

    def fails(name, device, dtype):
        asked.append((name, dtype))
        return "its self-test failed"

    monkeypatch.setattr(_evidence, "EXPERIMENTAL", False)
    monkeypatch.setattr(_evidence, "_capability", lambda device: (9, 0) if device.index else (8, 0))
    monkeypatch.setattr(_selftest, "why_not", fails)
    assert _evidence.why_not("srtg") is None
    ampere, hopper = torch.device("cuda", 0), torch.device("cuda", 1)
    with rcu_ops.use_backend("auto"):
        for family, operator in (("recurrent_conv", "recurrent_conv_affine_act"), ("srtg", None), ("srtg", "fuse")):
            assert _evidence.why_not(family, hopper, torch.float32, operator) is None
            assert _evidence.why_not(family, ampere, torch.float64, operator) == "its self-test failed"
    names = ["recurrent_conv_affine_act/cuda", "srtg/cuda", "srtg/cuda"]
    assert asked == [(name, torch.float32) for name in names]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_self_tests_of_cuda_kernels_are_right(dtype) -> None:
    """On the CPU they try the CPU's kernels under the same operators."""
    tests = [test for name, test in _selftest._tests.items() if name.endswith("/cuda")]
    names = {test.name.partition("/")[0] for test in tests}
    assert all({operator, family} & names for operator, family in FAMILIES.items())
    for test in tests:
        result, lasting = _selftest._run(test, torch.device("cpu"), dtype)
        assert result.passed and lasting, result


@pytest.mark.parametrize("operator", ["recurrent_conv", "recurrent_conv_affine_act"])
def test_the_backend_s_predicate_asks(monkeypatch, operator) -> None:
    """The cuda backend gives the reason for a CUDA tensor, once the library holds its kernel."""

    class OnCuda:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    monkeypatch.setattr(_evidence, "EXPERIMENTAL", False)
    monkeypatch.setattr(_library, "has_kernel", lambda name, key: True)
    backend = OPERATORS[operator].backend("cuda")
    with rcu_ops.use_backend("auto"):
        assert "no run on a GPU" in str(backend.why_not(OnCuda()))
    with rcu_ops.use_backend("cuda"):
        assert backend.why_not(OnCuda()) is None
    assert backend.experimental == _evidence.experimental("recurrent_conv")


def test_the_environment_variable_is_read(monkeypatch) -> None:
    for value, want in (("1", True), ("0", False), ("", False), (None, False)):
        if value is None:
            monkeypatch.delenv("RCU_OPS_EXPERIMENTAL")
        else:
            monkeypatch.setenv("RCU_OPS_EXPERIMENTAL", value)
        imported = importlib.util.module_from_spec(_evidence.__spec__)  # once more, as a new process does
        _evidence.__spec__.loader.exec_module(imported)
        assert imported.EXPERIMENTAL is want
