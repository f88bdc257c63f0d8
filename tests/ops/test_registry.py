"""Backend choice: explicit, explained, never silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rcu_ops
from rcu_ops import _library, doctor
from rcu_ops.cli import main
from rcu_ops.ops import OPERATORS, _registry
from rcu_ops.ops._registry import Backend, Operator, Overtaken


@pytest.fixture
def operator() -> Operator:
    """An operator with two backends; the fast one wants an even size and says so."""

    def why_not_fast(x: torch.Tensor) -> str | None:
        return None if x.numel() % 2 == 0 else f"needs an even number of elements, got {x.numel()}"

    return Operator(
        "toy",
        (
            Backend("cpu", lambda x: ("fast", x), why_not_fast, plan=lambda x: f"{x.numel() // 2} pairs"),
            Backend("reference", lambda x: ("slow", x), lambda x: None),
        ),
        check=lambda x: (x,),
        probe=lambda device: (torch.zeros(2, device=device),),
    )


def test_auto_takes_the_first_backend_that_can(operator) -> None:
    assert operator.select(torch.zeros(2)).name == "cpu"
    assert operator.select(torch.zeros(3)).name == "reference"


def test_an_explicit_choice_that_cannot_run_raises_its_reason(operator) -> None:
    with rcu_ops.use_backend("cpu"):
        assert operator.select(torch.zeros(2)).name == "cpu"
        with pytest.raises(ValueError, match="backend 'cpu' cannot run toy: needs an even number of elements, got 3"):
            operator.select(torch.zeros(3))
    with rcu_ops.use_backend("triton"), pytest.raises(ValueError, match="toy has no triton kernel"):
        operator.select(torch.zeros(2))


def test_explain_uses_the_same_predicate(operator) -> None:
    even, odd = operator.explain(torch.zeros(4)), operator.explain(torch.zeros(3))
    assert (even.backend, even.plan) == ("cpu", "2 pairs")
    assert odd.backend == "reference"
    assert odd.reasons["cpu"] == "needs an even number of elements, got 3"
    assert "not cpu: needs an even number" in str(odd)
    assert "not reference: a backend before it was taken" in str(even)
    with rcu_ops.use_backend("cpu"):
        assert operator.explain(torch.zeros(3)).backend is None


def test_use_backend_is_a_setting_and_a_context() -> None:
    before = _registry.current_backend()
    with rcu_ops.use_backend("reference"):
        assert _registry.current_backend() == "reference"
        with rcu_ops.use_backend("auto"):
            assert _registry.current_backend() == "auto"
        assert _registry.current_backend() == "reference"
    assert _registry.current_backend() == before
    setting = rcu_ops.use_backend("reference")
    assert _registry.current_backend() == "reference"
    setting.__exit__(None, None, None)
    assert _registry.current_backend() == before
    with pytest.raises(ValueError, match="use_backend: expected one of auto, cuda, triton, cpu, reference, got 'gpu'"):
        rcu_ops.use_backend("gpu")
    assert _registry.current_backend() == before


def test_backend_restored_after_an_error() -> None:
    before = _registry.current_backend()
    with pytest.raises(RuntimeError, match="boom"), rcu_ops.use_backend("reference"):
        raise RuntimeError("boom")
    assert _registry.current_backend() == before


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backends_refuse_cpu_tensors(name) -> None:
    x, weight = torch.zeros(1, 4, 2, 3, 3), torch.eye(4)
    with rcu_ops.use_backend(name), pytest.raises(ValueError, match=f"backend '{name}' cannot run recurrent_conv"):
        rcu_ops.recurrent_conv(x, weight)


def test_slow_fallback_for_cuda_tensors_warns_once(operator, monkeypatch) -> None:
    monkeypatch.setattr(_registry, "_device_of", lambda args: "cuda")
    monkeypatch.setattr(_registry, "_warned", set())
    with pytest.warns(UserWarning, match="toy runs on the slow reference backend .*cpu: needs an even number"):
        operator.select(torch.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.select(torch.zeros(3))


def test_auto_alone_passes_over_a_backend_that_another_overtakes(monkeypatch) -> None:
    monkeypatch.setattr(_registry, "_warned", set())
    overtaken = Overtaken("odd sizes: PyTorch is faster", lambda x: "PyTorch is faster" if x.numel() % 2 else None)
    toy = Operator(
        "toy",
        (
            Backend("cuda", lambda x: x, lambda x: "it was not built"),
            Backend("triton", lambda x: x, lambda x: None, overtaken=overtaken),
            Backend("reference", lambda x: x, lambda x: None),
        ),
        check=lambda x: (x,),
        probe=lambda device: (torch.zeros(1, device=device),),
    )
    with FakeTensorMode():
        odd, even = (torch.empty(size, device="cuda") for size in (3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing
        assert (toy.select(odd).name, toy.select(even).name) == ("reference", "triton")
    explanation = toy.explain(odd)
    assert explanation.backend == "reference" and "not triton: PyTorch is faster" in str(explanation)
    assert toy.explain(even).backend == "triton"
    with rcu_ops.use_backend("triton"):
        assert toy.select(odd).name == "triton" and toy.explain(odd).reasons["triton"] is None
    assert toy.explain(torch.zeros(3)).reasons["triton"] is None  # on the CPU no GPU's speed says anything


class _Called(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_backends_run_their_own_tensors_and_say_whose_the_others_are(name, monkeypatch) -> None:
    operator = OPERATORS[name]
    on = {device: operator.probe(device) for device in ("cpu", "meta")}
    for device, args in on.items():
        assert {a.device.type for a in args if isinstance(a, torch.Tensor)} == {device}
    with FakeTensorMode():
        on["cuda"] = torch.empty(on["cpu"][0].shape, device="cuda"), *on["cpu"][1:]
    assert operator.backend("cpu").why_not(*on["cuda"]) == "x is on cuda:0"
    assert operator.backend("cuda").why_not(*on["cpu"]) == "x is on cpu"
    assert operator.backend("triton").why_not(*on["meta"]) == "x is on meta"
    monkeypatch.setattr(_library, "_compiled", {})
    assert operator.backend("cpu").why_not(*on["meta"]) is None
    for backend in ("cpu", "cuda"):
        assert "built without" in str(operator.backend(backend).why_not(*on[backend]))


CLIP, CHANNELS = (2, 4, 3, 5, 5), (4,)
ARGUMENTS: dict[str, dict[str, tuple[int, ...]]] = {
    "recurrent_conv": {"x": CLIP, "weight": (4, 4), "h0": (2, 4, 5, 5)},
    "recurrent_conv_affine_act": {
        "x": CLIP, "weight": (4, 4), "scale": CHANNELS, "shift": CHANNELS, "h0": (2, 4, 5, 5), "residual": CLIP,
    },
    "recurrent_conv_batch_norm": {
        "x": CLIP, "weight": (4, 4), "gamma": CHANNELS, "beta": CHANNELS, "h0": (2, 4, 5, 5), "residual": CLIP,
    },
    "srtg_squeeze": {"x": CLIP},
    "srtg_fuse": {"x": CLIP, "h": (2, 3, 4), "gate": (2,)},
    "fast_gru": {
        "x": (2, 3, 4, 1, 2, 2), "weight_ux": (4, 4), "weight_uo": (4, 4), "weight_w": (2, 4, 2), "weight_vx": (4, 4),
        "weight_vo": (4, 4), "o0": (2, 4, 1, 2, 2),
    },
    "fast_gru_step": {
        "x": (2, 4, 1, 2, 2), "o": (2, 4, 1, 2, 2), "weight_ux": (4, 4), "weight_uo": (4, 4), "weight_w": (2, 4, 2),
        "weight_vx": (4, 4), "weight_vo": (4, 4),
    },
    "nonlocal_attention": {"query": (3, 3, 4), "key": (3, 5, 4), "value": (3, 5, 6), "mask": (3, 3, 5)},
    "relational_lstm_step": {
        "x_gates": (2, 4, 3, 6), "query": (2, 4, 3, 5), "key": (2, 4, 3, 5), "value": (2, 4, 3, 6), "cell": (2, 3, 6),
    },
    "soft_nearest_neighbor": {"a": (2, 3, 4), "b": (2, 5, 4), "mask_b": (2, 5)},
    "cycle_consistency": {"a": (2, 3, 4), "b": (2, 5, 4), "mask_a": (2, 3), "mask_b": (2, 5)},
    "temporal_cycle_loss": {"a": (2, 3, 4), "b": (2, 5, 4), "mask_a": (2, 3), "mask_b": (2, 5)},
}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, shapes in ARGUMENTS.items() for a in shapes])
def test_every_tensor_that_does_not_fit_is_refused_by_name(name, argument) -> None:
    given = {
        a: torch.ones(shape, dtype=torch.bool) if a.startswith(("mask", "gate")) else torch.randn(shape)
        for a, shape in ARGUMENTS[name].items()
    }
    OPERATORS[name].check(**given)
    right = given[argument]
    wrong = [(right.to(torch.int32), TypeError), (right.tolist(), TypeError), (right.to_sparse(), TypeError)]
    if argument != next(iter(given)):  # the others go by the first
        wrong += [(right[:-1], ValueError), (right.to("meta"), ValueError)]
    for value, error in wrong:
        with pytest.raises(error, match=f"^{argument}: expected"):
            OPERATORS[name].check(**given | {argument: value})


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_kernels_run_without_the_planners_words(name, monkeypatch) -> None:
    monkeypatch.setattr(_library, "native", lambda: None)
    explanation = OPERATORS[name].explain(*OPERATORS[name].probe("cpu"))
    assert explanation.reasons["cpu"] is None and str(explanation)


def test_every_operator_has_its_arguments_tried() -> None:
    assert set(ARGUMENTS) == set(OPERATORS)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_the_reference_calls_no_kernel_but_stays_one_operator_for_tracers_without_a_binary(name, monkeypatch) -> None:
    operator = OPERATORS[name]

    def runs_operators(backend: str) -> bool:
        with _Called() as called:
            operator.backend(backend).run(*operator.probe("cpu"))
        return any(name.startswith("rcu_ops::") for name in called.names)

    assert runs_operators("cpu") and not runs_operators("reference")
    with monkeypatch.context() as without:
        without.setattr(_library, "_compiled", {})
        assert not runs_operators("reference")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not runs_operators("reference")
    monkeypatch.setattr(_library, "_compiled", {})
    # These are a few operations of PyTorch's, which a tracer may as well see.
    assert runs_operators("reference") != (name in ("nonlocal_attention", "relational_lstm_step"))


def test_the_doctor_says_where_auto_passes_over_a_backend() -> None:
    said = doctor.render(doctor.examine())
    assert "auto passes over triton for heads of more than 256 channels: PyTorch is faster" in said
    assert "auto passes over cuda for bf16 and fp16" in said


def test_explain_of_the_public_operators() -> None:
    explanation = rcu_ops.explain("recurrent_conv", torch.zeros(1, 4, 2, 3, 3), torch.eye(4), update="mean")
    assert explanation.backend in ("cpu", "reference")
    assert set(explanation.reasons) == {"cuda", "triton", "cpu", "reference"}
    if explanation.backend == "cpu":
        assert explanation.plan is not None and explanation.plan in str(explanation)
    with pytest.raises(ValueError, match=r"operator: expected one of .*recurrent_conv.*, got 'conv'"):
        rcu_ops.explain("conv")
    with pytest.raises(ValueError, match=r"weight: expected \[C,C\]"):
        rcu_ops.explain("recurrent_conv", torch.zeros(1, 4, 2, 3, 3), torch.eye(5))
    with pytest.raises(TypeError, match=r"recurrent_conv: missing .*'weight'; its arguments are \(x, weight, h0"):
        rcu_ops.explain("recurrent_conv", torch.zeros(1, 4, 2, 3, 3))
    with rcu_ops.use_backend("reference"):
        assert "before it" not in str(rcu_ops.explain("recurrent_conv", torch.zeros(1, 4, 2, 3, 3), torch.eye(4)))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout) -> None:
    sequences = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(3, 4)], layout=layout)
    dense = torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match="key: expected"):
        rcu_ops.nonlocal_attention(dense, sequences, dense)
    with pytest.raises(TypeError, match="b: expected"):
        rcu_ops.temporal_cycle_loss(dense, sequences)


def test_environment_variable_sets_the_choice() -> None:
    code = "import rcu_ops.ops as o; print(o.current_backend())"
    assert run_python(code, RCU_OPS_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(code, RCU_OPS_BACKEND="fastest")
    assert wrong.returncode != 0
    assert "RCU_OPS_BACKEND: expected one of auto" in wrong.stderr
    command = run_python("from rcu_ops.cli import main; raise SystemExit(main(['doctor']))", RCU_OPS_BACKEND="fastest")
    assert command.returncode == 2
    assert command.stderr.startswith("rcu-ops: error: RCU_OPS_BACKEND: expected") and command.stderr.count("\n") == 1


@pytest.mark.skipif(_library.native() is None, reason="the processor is not known without rcu_ops._native")
def test_a_wrong_instruction_set_is_told_in_one_line_before_a_command_does_anything() -> None:
    code = "from rcu_ops.cli import main; raise SystemExit(main(['cost', 'rcn_resnet18']))"
    command = run_python(code, RCU_OPS_CPU_ISA="mmx")
    assert (command.returncode, command.stdout) == (2, "")
    assert command.stderr.startswith("rcu-ops: error: RCU_OPS_CPU_ISA: expected one of portable")
    assert command.stderr.count("\n") == 1


def test_everything_runs_without_the_binary() -> None:
    """Hide the library: operators, gradients, compile and export still work, on the reference."""
    code = """
import torch, rcu_ops
x, w = torch.randn(2, 4, 3, 2, 2, requires_grad=True), torch.eye(4, requires_grad=True)
h, h_n = rcu_ops.recurrent_conv(x, w)
h.sum().backward()
direct, _ = torch.ops.rcu_ops.recurrent_conv(x, w, None, False, False)
assert torch.allclose(direct, h)
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.eye(4))
    def forward(self, x):
        return rcu_ops.recurrent_conv(x, self.w)[0]
program = torch.export.export(M(), (x.detach(),), dynamic_shapes=({2: torch.export.Dim("t", min=1, max=64)},))
longer = torch.randn(2, 4, 9, 2, 2)
assert torch.allclose(program.module()(longer), rcu_ops.recurrent_conv(longer, w)[0])
explanation = rcu_ops.explain("recurrent_conv", x, w)
assert explanation.backend == "reference" and "gone.so is not there" in explanation.reasons["cpu"], explanation
print("fine")
"""
    result = run_python(code, RCU_OPS_LIBRARY="gone.so")
    assert result.stdout.strip() == "fine", result.stderr


def test_doctor_reports_and_says_usable(capsys) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "recurrent_conv on cpu:" in text
    assert text.strip().endswith("usable")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is True
    assert set(report["operators"]) == set(OPERATORS)
    assert report["versions"]["torch"] == torch.__version__


def test_doctor_exits_1_when_an_operator_cannot_run(capsys) -> None:
    with rcu_ops.use_backend("triton"):
        assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "NOT usable" in captured.out
    assert "recurrent_conv cannot run on cpu" in captured.out
    assert captured.err.count("\n") == 1


def test_doctor_survives_an_installation_that_cannot_be_examined(capsys, monkeypatch) -> None:
    def broken(selftest: bool) -> None:
        raise OSError("torch is broken")

    monkeypatch.setattr(doctor, "examine", broken)
    assert main(["doctor"]) == 1
    assert "torch is broken" in capsys.readouterr().out
