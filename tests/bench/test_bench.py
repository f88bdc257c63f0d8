"""The benchmark's own machinery: what it refuses, how it times, what it writes; and that its loops are right."""

from __future__ import annotations

import itertools
import json
import statistics
import time
import types

import pytest
import torch

from rcu_ops.bench import command, fast_gru, output, recurrent_conv
from rcu_ops.bench.case import OURS, OWN, Candidate, Case, Prepared, Variant
from rcu_ops.bench.correctness import WrongResultError, check_outputs
from rcu_ops.bench.machine import Peaks, describe, peaks_as_data
from rcu_ops.bench.runner import CandidateResult, CaseResult, as_data, run_case
from rcu_ops.bench.suite import OPERATORS, TIERS, collect, spread
from rcu_ops.bench.timing import SCHEDULES, CpuTimer, Schedule, Timing, interleaved, latency, make_timers
from rcu_ops.cli import main

CPU = torch.device("cpu")
FAST = Schedule(repeats=3, block_seconds=0.0, budget_seconds=1.0, least_repeats=2)
CPU_TIMER = {"warm": CpuTimer()}
PEAKS = Peaks(bytes_per_second=1e9, flops_per_second={"fp32": 1e9, "bf16": 2e9})


class _Doubling(Case):
    """Twice the input; the candidates are what a test needs."""

    op = "doubling"

    def __init__(self, **candidates):
        super().__init__("forward", "N3", torch.float32, "contiguous", CPU)
        self._candidates = [
            Candidate(name, call, name != OURS)
            if isinstance(call, dict)
            else Candidate.simple(name, call, optional=name != OURS)
            for name, call in candidates.items()
        ]

    def inputs(self):
        return {"x": torch.randn(3, 4, generator=self.generator())}

    def exact(self, inputs):
        return (2 * inputs["x"].double(),)

    def eager(self, inputs):
        return (2 * inputs["x"],)

    def candidates(self):
        return self._candidates

    @property
    def bytes_moved(self):
        return 96

    @property
    def flops(self):
        return 12

    def backend(self, inputs):
        return "cpu", "in one go"


def right(inputs):
    return (inputs["x"] + inputs["x"],)


def wrong(inputs):
    return (inputs["x"] * 2.0001,)


def broken(inputs):
    raise RuntimeError("no compiler here\nlong trace")


def test_the_tolerance_rule_lets_nothing_slip():
    exact = (torch.randn(4, 5, dtype=torch.float64),)
    eager = (exact[0].float(),)
    assert check_outputs(eager, exact, eager) <= 1
    assert check_outputs((torch.zeros(0, 3),), (torch.zeros(0, 3, dtype=torch.float64),), (torch.zeros(0, 3),)) == 0
    for bad, message in (
        ((eager[0] + 1e-5,), "output 0: rms error"),
        ((eager[0].index_fill(0, torch.tensor([1]), float("nan")),), "output 0: rms error nan"),
        ((eager[0][:, :4],), r"output 0: expected shape \[4, 5\], got \[4, 4\]"),
        ((), "expected 1 outputs, got 0"),
    ):
        with pytest.raises(WrongResultError, match=message):
            check_outputs(bad, exact, eager)
    one_off = eager[0].clone()
    one_off[2, 3] += 4e-6
    many, exact_many = one_off.repeat(1, 500), exact[0].repeat(1, 500)
    many[:, 5:] = exact_many[:, 5:].float()
    with pytest.raises(WrongResultError, match="max error"):
        check_outputs((many,), (exact_many,), (exact_many.float(),))


class _FakeTimer:
    """Counts calls; a candidate takes as many seconds as its thunk returns."""

    def __init__(self):
        self.order = []

    def block(self, thunk, calls):
        self.order.append(thunk())
        return self.order[-1]


def test_candidates_take_turns_and_every_one_starts_a_round():
    timer = _FakeTimer()
    timings = interleaved({str(s): (lambda s=s: s) for s in (1.0, 2.0, 3.0)}, timer, Schedule(3, 0.0, 60.0, 3))
    assert timer.order[6:] == [1.0, 2.0, 3.0, 2.0, 3.0, 1.0, 3.0, 1.0, 2.0]
    assert {name: t.samples for name, t in timings.items()} == {str(s): (s,) * 3 for s in (1.0, 2.0, 3.0)}


def test_short_calls_are_timed_in_blocks():
    calls = []
    interleaved({"a": lambda: calls.append(0)}, CpuTimer(), Schedule(2, 1e-4, 1.0, 1))
    assert len(calls) > 8


def test_the_budget_ends_the_repeats_but_not_before_the_least():
    timing = interleaved({"a": lambda: None}, CpuTimer(), Schedule(50, 0.0, 0.0, 4))["a"]
    assert len(timing.samples) == 4


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert Timing((1.0, 2.0)).median == 1.5
    assert Timing((7.0,)).quartiles == (7.0, 7.0)


def test_a_cpu_has_one_timer():
    assert list(make_timers(CPU, ("cold", "warm"))) == ["warm"]


def test_right_candidates_are_timed_and_wrong_ones_are_not():
    case = _Doubling(**{OURS: right, "slow but right": right, "wrong": wrong, "broken": broken})
    (result,) = run_case(case, CPU_TIMER, PEAKS, FAST)
    assert {c.name: c.timing is not None for c in result.candidates} == {
        OURS: True,
        "slow but right": True,
        "wrong": False,
        "broken": False,
    }
    assert result.speedup("slow but right") == pytest.approx(
        result.timing("slow but right").median / result.ours.median
    )
    assert result.speedup("wrong") is None
    assert result.failures == []
    (left_out,) = [c.left_out for c in result.candidates if c.name == "broken"]
    assert left_out == "RuntimeError: no compiler here"
    # 96 bytes at 1 GB/s take longer than 12 operations at 1 GFLOP/s.
    assert result.floor_seconds == pytest.approx(96e-9)


@pytest.mark.parametrize("name", sorted(OWN - {OURS}))
def test_a_wrong_result_of_ours_is_a_failure_under_every_name(name):
    (result,) = run_case(_Doubling(**{OURS: right, name: wrong, "eager": right}), CPU_TIMER, PEAKS, FAST)
    assert len(result.failures) == 1
    assert f"doubling forward N3 fp32 contiguous: {name}: wrong: output 0" in result.failures[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_candidate_is_known_as_ours_or_as_a_baseline(device):
    """So that no wrong result of ours passes for a baseline's."""
    libraries = {"scaled_dot_product_attention", "cdist", "matrix products"}
    loops = {"library loop", "graphed loop", "loop over frames", "loop over pairs"}
    cases = collect("standard", torch.device(device), [name for name in OPERATORS if name != "streaming"])
    names = {candidate.name for case in cases for candidate in case.candidates()}
    assert names - OWN - libraries - loops == {"eager", "compile"}
    assert names & OWN == {OURS, "unfused"} | ({"cuda", "triton", "graphed"} if device == "cuda" else set())


def test_ours_must_run():
    (result,) = run_case(_Doubling(**{OURS: broken, "eager": right}), CPU_TIMER, PEAKS, FAST)
    assert result.failures == [f"doubling forward N3 fp32 contiguous: {OURS}: RuntimeError: no compiler here"]
    assert result.speedup("eager") is None


def test_the_fastest_variant_is_taken_and_all_are_checked():
    slow = Variant(lambda inputs: lambda: (sum(torch.ones(10**6)[:1] for _ in range(20)), *right(inputs))[1:])
    quick = Variant(lambda inputs: lambda: right(inputs))
    case = _Doubling(**{OURS: {"slow": slow, "quick": quick}})
    ready = Prepared.of(case)
    ready.thunk(case.candidates()[0], CpuTimer())
    assert ready.chosen == {OURS: "quick"}
    case = _Doubling(**{OURS: {"quick": quick, "wrong": Variant(lambda inputs: lambda: wrong(inputs))}})
    with pytest.raises(WrongResultError):
        Prepared.of(case).thunk(case.candidates()[0], CpuTimer())


def test_a_variant_may_be_checked_by_another_call_and_yardstick():
    verified = Variant(lambda inputs: lambda: None, verify=right)
    case = _Doubling(**{OURS: {"a": verified}})
    Prepared.of(case).thunk(case.candidates()[0], CpuTimer())
    rough = Variant(lambda inputs: lambda: wrong(inputs), eager=wrong)
    case = _Doubling(**{OURS: {"a": rough}})
    Prepared.of(case).thunk(case.candidates()[0], CpuTimer())


@pytest.mark.parametrize("layout", list(recurrent_conv.LAYOUTS))
@pytest.mark.parametrize("mix", list(recurrent_conv.MIXES))
@pytest.mark.parametrize(
    "kind", [recurrent_conv.Forward, recurrent_conv.ForwardBackward, recurrent_conv.AffineAct, recurrent_conv.Step]
)
def test_every_library_loop_is_right(kind, mix, layout):
    shape = recurrent_conv.Shape(2, 5, 1 if kind is recurrent_conv.Step else 4, 3)
    case = kind(shape, torch.float32, layout, CPU, compile=False)
    ready = Prepared.of(case)
    loops = next(c for c in case.candidates() if c.name == "library loop")
    ready.thunk(Candidate("one", {mix: loops.variants[mix]}), CpuTimer())
    assert ready.chosen == {"one": mix}


@pytest.mark.parametrize("kind", [recurrent_conv.Forward, recurrent_conv.ForwardBackward, recurrent_conv.AffineAct])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_cases_run_through(kind, dtype):
    (result,) = run_case(
        kind(recurrent_conv.Shape(2, 8, 3, 4), dtype, "channels_last_3d", CPU, compile=False), CPU_TIMER, PEAKS, FAST
    )
    assert result.failures == []
    assert all(c.timing is not None for c in result.candidates)
    assert all(0 <= c.error_used <= 1 for c in result.candidates)


def test_counted_work():
    shape = recurrent_conv.Shape(2, 8, 4, 3)
    arguments = (shape, torch.bfloat16, "NCTHW", CPU)
    clip, state, weight = 2 * 8 * 4 * 9 * 2, 2 * 8 * 9 * 4, 8 * 8 * 2
    scan = 2 * 2 * 9 * 8 * 8 * 3
    forward, both = recurrent_conv.Forward(*arguments), recurrent_conv.ForwardBackward(*arguments)
    fused = recurrent_conv.AffineAct(*arguments)
    assert (forward.bytes_moved, forward.flops) == (2 * clip + state + weight, scan)
    assert (both.bytes_moved, both.flops) == (5 * clip + 3 * weight, 3 * scan)
    assert (fused.bytes_moved, fused.flops) == (3 * clip + state + weight, scan)
    step = recurrent_conv.Step(recurrent_conv.Shape(2, 8, 1, 3), *arguments[1:])
    assert (step.bytes_moved, step.flops) == (2 * clip // 4 + 2 * state + weight, 2 * 2 * 9 * 8 * 8)


@pytest.mark.parametrize("layout", fast_gru.LAYOUTS)
@pytest.mark.parametrize("loop", list(fast_gru.LOOPS))
@pytest.mark.parametrize("kind", [fast_gru.Forward, fast_gru.Step])
def test_every_fast_gru_loop_is_right(kind, loop, layout):
    case = kind(fast_gru.Shape(2, 3, 8, 2, 1, 3), torch.float32, layout, CPU, compile=False)
    ready = Prepared.of(case)
    loops = next(c for c in case.candidates() if c.name == "library loop")
    ready.thunk(Candidate("one", {loop: loops.variants[loop]}), CpuTimer())
    assert ready.chosen == {"one": loop}


@pytest.mark.parametrize("kind", [fast_gru.Forward, fast_gru.ForwardBackward, fast_gru.Step])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fast_gru_has_all_its_baselines(kind, device):
    case = kind(fast_gru.SMALL[0], torch.float32, "contiguous", torch.device(device))
    graphed = {"graphed loop", *(["graphed"] if case.training else [])} if device == "cuda" else set()
    backends = {"cuda", "triton"} if device == "cuda" else set()
    wanted = {OURS, "eager", "compile", "library loop"} | graphed | backends
    assert {c.name for c in case.candidates()} == wanted


@pytest.mark.parametrize("kind", [fast_gru.Forward, fast_gru.ForwardBackward, fast_gru.Step])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_fast_gru_cases_run_through(kind, dtype):
    case = kind(fast_gru.Shape(2, 3, 16, 4, 1, 3), dtype, "contiguous", CPU, compile=False)
    (result,) = run_case(case, CPU_TIMER, PEAKS, FAST)
    assert result.failures == []
    assert all(0 <= c.error_used <= 1 for c in result.candidates)


def test_counted_fast_gru_work():
    arguments = (fast_gru.Shape(2, 4, 8, 2, 1, 3), torch.bfloat16, "contiguous", CPU)
    clip, weights, step = 2 * 9 * 8 * 2, (6 * 16 + 2 * 64) * 2, 2 * 18 * (6 * 16 + 2 * 64)
    cases = [kind(*arguments) for kind in (fast_gru.Forward, fast_gru.ForwardBackward, fast_gru.Step)]
    assert [case.flops for case in cases] == [3 * step, 9 * step, step]
    assert [case.bytes_moved for case in cases] == [
        8 * clip + 2 * clip + weights,
        20 * clip + 3 * weights,
        2 * clip + 4 * clip + weights,
    ]


@pytest.mark.parametrize("tier", TIERS)
def test_ids_are_unique(tier):
    ids = [case.id for case in collect(tier, CPU)]
    assert len(ids) == len(set(ids))
    assert {id.split()[0] for id in ids} == set(OPERATORS)
    assert tier in SCHEDULES


def test_the_suite_has_the_shapes_that_were_promised():
    standard, full = ({case.id for case in collect(tier, CPU)} for tier in ("standard", "full"))
    for c, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
        for kind, dtype, layout in itertools.product(
            ("forward", "forward+backward", "fused inference"), ("fp32", "bf16"), ("NCTHW", "channels_last_3d")
        ):
            assert f"recurrent_conv {kind} N16 C{c} T16 {side}x{side} {dtype} {layout}" in full
            assert f"recurrent_conv {kind} N8 C{c} T8 {2 * side}x{2 * side} {dtype} {layout}" in full
            assert any(
                f"recurrent_conv {kind} N" in i and f"C{c} T16 {side}x{side} {dtype} {layout}" in i for i in standard
            )
        for n in (1, 8):
            assert f"recurrent_conv step N{n} C{c} T1 {side}x{side} fp32 channels_last_3d" in standard
    assert "recurrent_conv forward N1 C512 T256 7x7 bf16 NCTHW" in full
    assert "streaming one frame RCN-18 N1 112x112 bf16 channels_last_3d" in standard
    for words in ("N1 T32 C128 fp32", "N4 T256 C128 bf16", "N4 T256 C128 classification fp32", "N1 T512 C128 fp32"):
        assert f"cycle_consistency loss, forward+backward {words} NTC" in standard


def _results():
    good = _Doubling(**{OURS: right, "eager": right, "compile": broken})
    bad = _Doubling(**{OURS: wrong, "eager": right})
    return [next(run_case(case, CPU_TIMER, PEAKS, FAST)) for case in (good, bad)]


def test_table():
    text = output.table(_results())
    header, first, second = text.splitlines()
    assert header.split("  ")[0] == "doubling: forward"
    assert "vs eager" in header
    assert "vs compile" in header
    assert first.startswith("N3 fp32 contiguous")
    assert "x" in first.split()[-3]
    assert "wrong" in second


def test_json_round_trip(tmp_path):
    results = _results()
    output.write_json(tmp_path / "bench.json", describe(CPU), PEAKS, "quick", results)
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["format"] == output.FORMAT
    assert data["machine"]["versions"]["torch"] == torch.__version__
    assert data["machine"]["threads"] == torch.get_num_threads()
    good, bad = data["results"]
    ours, eager, compiled = good["candidates"]
    assert ours["median_s"] == results[0].ours.median == statistics.median(ours["samples_s"])
    assert eager["speedup_of_ours"] == results[0].speedup("eager")
    assert compiled["left_out"].startswith("RuntimeError")
    assert "median_s" not in bad["candidates"][0]
    assert bad["candidates"][0]["left_out"].startswith("wrong")
    assert (good["plan"], good["floor_s"]) == ("in one go", pytest.approx(96e-9))


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    output.plot(tmp_path / "bench.png", "doubling", _results(), "a machine")
    image = imread(tmp_path / "bench.png")[..., :3]
    drawn = (image < 0.95).any(axis=-1)
    assert 0.003 < drawn.mean() < 0.5
    assert (image.max(axis=-1) - image.min(axis=-1) > 0.3).sum() > 50
    assert not any(edge.any() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))


def test_roofline(tmp_path):
    """A bar is as long as the share of the floor says."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    def result(kind: str, shares: dict[str, float]) -> CaseResult:
        case = _Doubling(**{OURS: right, "eager": right})
        case.kind = kind
        found = [CandidateResult(name, timing=Timing((1e-3 / share,))) for name, share in shares.items()]
        return CaseResult(case, "warm", "cpu", None, 1e-3, tuple(found))

    def blue(share: float) -> float:
        path = tmp_path / f"{share}.png"
        output.roofline(path, [result("forward", {OURS: share, "eager": 0.2})], "a machine")
        image = imread(path)[..., :3]
        rows, columns = (abs(image - (0, 0x72 / 255, 0xB2 / 255)).max(axis=-1) < 0.02).nonzero()
        keep = rows < 0.8 * image.shape[0]  # above the legend
        return columns[keep].max() - columns[keep].min() + 1

    assert blue(0.8) / blue(0.4) == pytest.approx(2, rel=0.05)
    output.roofline(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


def test_cases_take_turns():
    cases = collect("standard", CPU)
    turns = spread(cases)
    assert sorted(case.id for case in turns) == sorted(case.id for case in cases)
    kinds = len({(case.op, case.kind, case.dtype) for case in cases})
    assert len({(case.op, case.kind, case.dtype) for case in turns[:kinds]}) == kinds


def test_latency_of_single_calls():
    seconds = iter([0.0] * 19 + [0.03])
    result = latency(lambda: time.sleep(next(seconds)), CPU, calls=20)
    assert result.calls == 20
    assert result.p50 < 0.01 < 0.03 <= result.p99
    assert latency(lambda: None, CPU, calls=500, budget_seconds=0).calls == 20


def test_waiting_cases_show_percentiles():
    case = _Doubling(**{OURS: right, "eager": right})
    case.waits = True
    (result,) = run_case(case, CPU_TIMER, PEAKS, FAST)
    assert all(c.latency is not None and c.latency.p50 <= c.latency.p99 for c in result.candidates)
    header, row = output.table([result]).splitlines()
    assert header.split()[-3:] == ["p50", "p99", "backend"]
    assert len(row.split()) > 8
    data = as_data([result])[0]["candidates"][0]
    assert data["p50_s"] <= data["p99_s"]
    assert data["latency_calls"] >= 20


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.0243, "24.3 ms"), (0.123, "123 ms"), (2.5e-6, "2.50 µs"), (3e-8, "30 ns")],
)
def test_seconds_for_people(seconds, text):
    assert output.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nonsense"], "--device: expected cpu, cuda or cuda:N, got 'nonsense'"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--filter", "no such case"], "--filter: no case of the standard tier contains 'no such case'"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcu-ops: error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_is_said_in_one_line(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_list(capsys):
    assert main(["bench", "--quick", "--list", "--op", "streaming"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"streaming one frame RCN-18 N1 112x112 {dtype} channels_last_3d" for dtype in ("fp32", "bf16")
    ]


def test_the_command_writes_its_results_and_fails_on_wrong_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "collect", lambda *_: [_Doubling(**{OURS: right, "eager": right})])
    monkeypatch.setattr("rcu_ops.bench.machine.measure_peaks", lambda *_: PEAKS)
    monkeypatch.setitem(SCHEDULES, "quick", FAST)
    assert main(["bench", "--quick", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "bench.json").exists()
    assert (tmp_path / "out" / "bench_doubling.png").exists()
    assert (tmp_path / "out" / "bench_roofline.png").exists()
    assert "doubling: forward" in capsys.readouterr().out
    monkeypatch.setattr(command, "collect", lambda *_: [_Doubling(**{OURS: wrong, "eager": right})])
    assert main(["bench", "--quick", "--out", str(tmp_path / "out")]) == 1
    assert f"FAILED: doubling forward N3 fp32 contiguous: {OURS}: wrong: output 0" in capsys.readouterr().err


def test_a_baseline_outside_the_tolerance_rule_is_left_out_and_fails_nothing(tmp_path, monkeypatch, capsys):
    case = _Doubling(**{OURS: right, "eager": right, "compile": wrong, "library loop": broken})
    monkeypatch.setattr(command, "collect", lambda *_: [case])
    monkeypatch.setattr("rcu_ops.bench.machine.measure_peaks", lambda *_: PEAKS)
    monkeypatch.setitem(SCHEDULES, "quick", FAST)
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "FAILED" not in shown.err
    reason = "its own error breaks the tolerance rule"
    assert f"left out: doubling forward N3 fp32 contiguous: compile: {reason}: output 0: rms error" in shown.err
    lines = shown.out.splitlines()
    row, note = next(line for line in lines if line.startswith("N3")), lines[-3]
    assert row.split()[-3:] == ["inexact", "-", "cpu"]
    assert note == f"inexact: a baseline that has no time, because {reason}"
    found = {c["name"]: c for c in json.loads((tmp_path / "bench.json").read_text())["results"][0]["candidates"]}
    assert found["compile"]["left_out"].startswith(f"{reason}: output 0")
    assert "median_s" not in found["compile"]
    assert found["eager"]["median_s"] > 0


def test_a_budget_leaves_cases_out_and_names_them(tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def slow(inputs):
        clock[0] += 1
        return right(inputs)

    cases = [_Doubling(**{OURS: slow}), _Doubling(**{OURS: slow})]
    cases[1].shape = "N4"
    monkeypatch.setattr(command, "collect", lambda *_: cases)
    monkeypatch.setattr(command, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("rcu_ops.bench.machine.measure_peaks", lambda *_: PEAKS)
    monkeypatch.setitem(SCHEDULES, "quick", FAST)
    assert main(["bench", "--quick", "--budget", "0.5", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["not_run"] == [cases[1].id]
    shown = capsys.readouterr()
    assert "incomplete: 1 of 2 cases were not run, bench.json names them: no time was left" in shown.err
    assert shown.out.count("doubling: incomplete, 1 of 2 cases were run\ndoubling: forward") == 1
    for wrong_budget in ("-1", "soon"):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", "--budget", wrong_budget])


def test_the_higher_of_the_peaks_before_and_after_a_run_counts(tmp_path, monkeypatch, capsys):
    case = _Doubling(**{OURS: right, "eager": right})
    measured = [
        Peaks(bytes_per_second=16e9, flops_per_second={"fp32": 1e9, "bf16": 3e9}),
        Peaks(bytes_per_second=1e9, flops_per_second={"fp32": 8e9, "bf16": 2e9}),
    ]
    best = Peaks(bytes_per_second=16e9, flops_per_second={"fp32": 8e9, "bf16": 3e9})
    calls = iter(measured)
    monkeypatch.setattr(command, "collect", lambda *_: [case])
    monkeypatch.setattr("rcu_ops.bench.machine.measure_peaks", lambda *_: next(calls))
    monkeypatch.setitem(SCHEDULES, "quick", FAST)
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["peaks"] == peaks_as_data(best)
    floor = max(case.bytes_moved / 16e9, case.flops / 8e9)
    assert data["results"][0]["floor_s"] == pytest.approx(floor)
    assert floor < min(peaks.floor(case.bytes_moved, case.flops, case.dtype) for peaks in measured)
    out = capsys.readouterr().out
    assert "measured peaks: copy 16.0 GB/s, fp32 1 GFLOP/s, bf16 3 GFLOP/s" in out
    assert "measured peaks at the end: copy 1.0 GB/s, fp32 8 GFLOP/s, bf16 2 GFLOP/s; bench.json" in out


def _operators(monkeypatch, last) -> list[Case]:
    """Three cases of two operators; ours in the last one is ``last``."""
    cases = [_Doubling(**{OURS: right}), _Doubling(**{OURS: right}), _Doubling(**{OURS: last})]
    cases[0].op, cases[1].shape, cases[2].shape = "tripling", "N4", "N5"
    monkeypatch.setattr(command, "collect", lambda *_: cases)
    monkeypatch.setattr("rcu_ops.bench.machine.measure_peaks", lambda *_: PEAKS)
    monkeypatch.setitem(SCHEDULES, "quick", FAST)
    return cases


def test_a_table_is_printed_when_its_operator_is_done(tmp_path, monkeypatch, capsys) -> None:
    before: list[str] = []
    written: list[dict] = []

    def last(inputs):
        if not before:
            before.append(capsys.readouterr().out)
            written.append(json.loads((tmp_path / "bench.json").read_text()))
        return right(inputs)

    cases = _operators(monkeypatch, last)
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    assert "tripling: forward" in before[0]
    assert "doubling: forward" not in before[0]
    assert [result["id"] for result in written[0]["results"]] == [case.id for case in cases[:2]]
    assert written[0]["not_run"] == [cases[2].id]
    after = capsys.readouterr().out
    assert "tripling" not in after
    assert after.count("doubling: forward") == 1
    assert [row.split()[0] for row in after.splitlines() if row.startswith("N")] == ["N4", "N5"]


def test_an_interrupt_leaves_what_there_is(tmp_path, monkeypatch, capsys) -> None:
    def last(inputs):
        raise KeyboardInterrupt

    cases = _operators(monkeypatch, last)
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 130
    shown = capsys.readouterr()
    assert "incomplete: 1 of 3 cases were not run, bench.json names them: interrupted" in shown.err
    assert shown.out.count("tripling: forward") == shown.out.count("doubling: forward") == 1
    assert "tripling: incomplete" not in shown.out
    assert "doubling: incomplete, 1 of 2 cases were run\ndoubling: forward" in shown.out
    data = json.loads((tmp_path / "bench.json").read_text())
    assert [result["id"] for result in data["results"]] == [case.id for case in cases[:2]]
    assert data["not_run"] == [cases[2].id]
    assert not list(tmp_path.glob(".bench*"))


def test_the_floor_of_16_bit_products_is_the_faster_of_two_ways() -> None:
    slow_pairs = Peaks(bytes_per_second=1e9, flops_per_second={"fp32": 4e9, "bf16": 2e9})
    assert slow_pairs.floor(0, 8 * 10**9, torch.bfloat16) == 2
    assert PEAKS.floor(0, 8 * 10**9, torch.bfloat16) == 4
    assert PEAKS.floor(0, 8 * 10**9, torch.float32) == 8
