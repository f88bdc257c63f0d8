"""Self-tests of kernels on the user's device, here with injected runs on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rcu_ops.ops import _selftest
from rcu_ops.ops._selftest import Case, SelfTest

CPU = torch.device("cpu")


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Counted:
    """A self-test of ``run`` against doubling, that counts how often it was run."""

    def __init__(self, run: Callable[[Tensor], Tensor] = doubled) -> None:
        self.run = run
        self.runs = 0

    def cases(self, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
        x = torch.arange(1, 9, dtype=dtype, device=device)

        def got() -> tuple[Tensor]:
            self.runs += 1
            return (self.run(x),)

        yield Case("eight numbers", got, lambda: (doubled(x.double()),), lambda: (doubled(x),))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "not yet"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("RCU_OPS_SELFTEST", raising=False)
    monkeypatch.setattr(_selftest, "_tests", {})
    monkeypatch.setattr(_selftest, "_results", {})
    monkeypatch.setattr(_selftest, "_untested", {})
    return cache / "rcu-ops" / "selftest.json"


def register(counted: Counted, sources: tuple[Path, ...] = ()) -> None:
    _selftest.register(SelfTest("toy/triton", counted.cases, sources))


def ask(dtype: torch.dtype = torch.float32) -> str | None:
    return _selftest.why_not("toy/triton", CPU, dtype)


def forget() -> None:
    """What a new process knows."""
    _selftest._results.clear()


def test_a_pass_is_remembered_in_the_process_and_on_disk(fresh: Path) -> None:
    counted = Counted()
    register(counted)
    assert ask() is None
    assert ask() is None
    assert counted.runs == 1
    (entry,) = json.loads(fresh.read_text()).values()
    assert entry["passed"] is True and entry["detail"] == "eight numbers"
    forget()
    assert ask() is None
    assert counted.runs == 1
    assert [r.source for r in _selftest.results()] == ["remembered"]
    assert not list(fresh.parent.glob("*.tmp"))


def test_every_dtype_is_asked_for_itself() -> None:
    counted = Counted()
    register(counted)
    for dtype in (torch.float32, torch.float16):
        assert ask(dtype) is None
    assert counted.runs == 2
    assert {r.dtype for r in _selftest.results()} == {"torch.float32", "torch.float16"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: 2 * x + 1e-3, "rms error of result 0"),
        (lambda x: torch.where(x == 3, torch.nan, 2 * x), "rms error of result 0 is nan"),
        (lambda x: 2 * x[:-1], "has shape"),
    ],
)
def test_a_wrong_kernel_is_refused_loudly_and_remembered(fresh: Path, wrong, message) -> None:
    counted = Counted(wrong)
    register(counted)
    with pytest.warns(RuntimeWarning, match="toy/triton failed its self-test on cpu at torch.float32 and will not"):
        reason = ask()
    assert reason is not None and message in reason and "eight numbers" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per process
        assert ask() == reason
    forget()
    with pytest.warns(RuntimeWarning, match="will not be used"):
        assert ask() == reason
    assert counted.runs == 1
    assert "FAILED" in str(_selftest.results()[0])


@pytest.mark.parametrize(("ulps", "refused"), [(4, False), (40, True)])
def test_rounding_is_forgiven_and_an_error_is_not(ulps, refused) -> None:
    """Eager PyTorch doubles exactly, so that ulps of the largest magnitude, 16, are all that is allowed."""
    register(Counted(lambda x: 2 * x + ulps * 16 * torch.finfo(x.dtype).eps))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (ask() is not None) == refused
    assert len(caught) == refused


def test_several_times_eagers_error_is_forgiven_and_orders_of_magnitude_are_not() -> None:
    x = torch.linspace(1, 2, 64)
    case = {factor: Case("thirds", lambda f=factor: (x / 3 + f * 1e-5,), lambda: (x.double() / 3,),
                         lambda: (x / 3 + 1e-5,)) for factor in (1, 7, 20)}  # fmt: skip
    assert _selftest._compare(case[1]) is None
    assert _selftest._compare(case[7]) is None
    assert "rms error of result 0" in str(_selftest._compare(case[20]))


def test_the_doctor_does_not_wait_for_a_test_but_tells_its_verdict(fresh: Path) -> None:
    counted = Counted()
    register(counted)
    with _selftest.deferred():
        assert ask() is None
        (result,) = _selftest.results()
        assert "not tested yet" in str(result) and counted.runs == 0 and not fresh.exists()
    assert ask() is None
    assert counted.runs == 1
    assert [r.source for r in _selftest.results()] == ["tested"]
    forget()
    with _selftest.deferred():
        assert ask() is None
    assert [r.source for r in _selftest.results()] == ["remembered"]


def test_an_error_is_a_failure_for_this_process_only(fresh: Path) -> None:
    def crash(x: Tensor) -> Tensor:
        raise MemoryError("no room")

    counted = Counted(crash)
    register(counted)
    with pytest.warns(RuntimeWarning, match="MemoryError: no room"):
        assert "MemoryError" in str(ask())
    assert not fresh.exists()
    forget()
    counted.run = doubled
    assert ask() is None


def test_a_case_that_fails_is_not_made_good_by_the_next() -> None:
    wrong, right = Counted(lambda x: 3 * x), Counted()
    both = SelfTest("toy/triton", lambda *at: [*wrong.cases(*at), *right.cases(*at)])
    _selftest.register(both)
    with pytest.warns(RuntimeWarning, match="will not be used"):
        assert ask() is not None
    assert (wrong.runs, right.runs) == (1, 0)


def test_no_test_runs_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selftest, "_identity", lambda device: ("a chip", "a driver"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    register(counted := Counted())
    reason = _selftest.why_not("toy/triton", torch.device("cuda"), torch.float32)
    assert "cannot run while a CUDA graph is captured" in str(reason)
    assert counted.runs == 0 and _selftest.results() == []


def test_a_test_without_cases_does_not_pass() -> None:
    _selftest.register(SelfTest("toy/triton", lambda device, dtype: ()))
    with pytest.warns(RuntimeWarning):
        assert "no cases" in str(ask())


def test_skipping(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    counted = Counted(lambda x: 3 * x)
    register(counted)
    monkeypatch.setenv("RCU_OPS_SELFTEST", "0")
    assert ask() is None
    assert counted.runs == 0
    assert str(_selftest.results()[0]) == "skipped (RCU_OPS_SELFTEST=0)"
    assert not fresh.exists()


def test_a_new_device_driver_or_source_asks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("a")
    counted = Counted()
    register(counted, (source,))
    ask()
    for change in (
        lambda: source.write_text("b"),
        lambda: monkeypatch.setattr(_selftest, "_identity", lambda device: ("another chip", "driver 1")),
        lambda: monkeypatch.setattr(_selftest, "_identity", lambda device: ("another chip", "driver 2")),
        lambda: monkeypatch.setattr(_selftest, "__version__", "99"),
    ):
        before = counted.runs
        change()
        forget()
        ask()
        assert counted.runs == before + 1


def test_a_new_build_asks_again_for_what_the_binary_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests() -> list[str]:
        return [_selftest._digest(SelfTest(f"toy/{backend}", lambda *at: ())) for backend in ("triton", "cuda")]

    (triton, cuda), record = digests(), {"sources": "other"}
    monkeypatch.setattr(_selftest._library, "build_record", lambda: record)
    assert digests()[0] == triton and digests()[1] != cuda


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"key": 1}'])
def test_a_damaged_cache_file_is_replaced(fresh: Path, content: str) -> None:
    fresh.parent.mkdir(parents=True)
    fresh.write_text(content)
    register(Counted())
    assert ask() is None
    assert len(json.loads(fresh.read_text())) == 1


def test_nowhere_to_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    register(Counted())
    assert ask() is None


def test_a_write_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", full)
    register(Counted())
    assert ask() is None
    assert list(fresh.parent.iterdir()) == []


def test_threads_share_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selftest, "_write_cache", lambda key, result: None)  # nor can they take it from the disk
    counted = Counted()
    register(counted)
    verdicts: list[str | None] = []
    threads = [threading.Thread(target=lambda: verdicts.append(ask())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [None] * 8
    assert counted.runs == 1


def test_the_users_random_numbers_and_modes_are_left_alone() -> None:
    register(Counted(lambda x: doubled(x) if not (torch.is_autocast_enabled("cpu") or torch.is_grad_enabled()) else x))
    state = torch.random.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert ask() is None
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("run", [doubled, lambda x: 3 * x], ids=["right", "wrong"])
def test_inside_a_traced_graph_the_verdict_is_a_constant(run) -> None:
    """The first call happens while torch.compile or torch.export traces: the test runs for real, outside the graph."""
    counted = Counted(run)
    register(counted)

    def choose(x: Tensor) -> Tensor:
        return x + 1 if _selftest.why_not("toy/triton", x.device, x.dtype) is None else x - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        torch._dynamo.reset()
        compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
        x = torch.ones(4)
        assert torch.equal(compiled(x), choose(x))

        class Layer(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return choose(x)

        forget()
        _selftest.cache_file().unlink()
        for strict in (False, True):
            program = torch.export.export(Layer(), (x,), strict=strict)
            assert torch.equal(program.module()(x), choose(x))
            operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
            assert operators & {"aten.add.Tensor", "aten.sub.Tensor"}
            assert not operators & {"aten.mul.Tensor", "aten.arange.start"}  # nothing of the test itself
    assert counted.runs == 2


def test_the_cache_outlives_the_process(fresh: Path) -> None:
    code = """
import torch
from rcu_ops.ops import _selftest
from rcu_ops.ops._selftest import Case, SelfTest
x = torch.ones(3)
case = Case("ones", lambda: (x,), lambda: (x.double(),), lambda: (x,))
_selftest.register(SelfTest("toy/triton", lambda device, dtype: [case]))
assert _selftest.why_not("toy/triton", torch.device("cpu"), torch.float32) is None
print(_selftest.results()[0].source)
"""
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [run.stdout.strip() for run in runs] == ["tested", "remembered"]
