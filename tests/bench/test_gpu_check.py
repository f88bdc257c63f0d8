"""benchmarks/gpu_check.sh without a GPU says so; and what it does with steps that pass, fail, hang or are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, profile_kernels
from benchmarks.gpu_check import Step
from rcu_ops.bench import suite
from tests.gpu import small

ROOT = Path(gpu_check.__file__).parents[1]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def pretended_gpu(monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "gpu", lambda: ({"name": "no GPU at all"}, None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path) -> None:
    command = [str(ROOT / "benchmarks" / "gpu_check.sh"), str(tmp_path / "out")]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("gpu_check: there is no GPU here to check: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b"]])
def test_usage(arguments, capsys) -> None:
    assert gpu_check.main(arguments) == 2
    assert capsys.readouterr().err == "usage: benchmarks/gpu_check.sh DIR [OPTION OF rcu-ops bench ...]\n"


def test_an_unusable_directory(tmp_path, pretended_gpu, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert gpu_check.main([str(tmp_path / "file" / "out")], []) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_step_runs_and_is_recorded(tmp_path, pretended_gpu, capsys) -> None:
    planned = [
        Step("good", python("print('all is well')"), 60, summary=lambda output, work: {"said": output.strip()}),
        Step("bad", python("import sys; print('oh'); sys.exit(3)"), 60),
        Step("witness", python(f"print(open({str(tmp_path / 'gpu_check.json')!r}).read())"), 60),
        Step("empty", python("print('nothing to do')"), 60, summary=lambda output, work: {"ran": 0}),
        Step("hanging", python("import time; time.sleep(60)"), 5.5),
        Step("theirs", python("import sys; print('1: x'); sys.exit(9)"), 60, summary=gpu_check.sanitizer_summary),
        Step("missing", ("no-such-program",), 60, beside=True),
        Step("too late", python("print(1)"), 60, reserve=gpu_check.SECONDS),
        Step("last", python("import os; print(os.environ['X'], '{seconds}')"), 60, environment={"X": "set"}),
    ]
    assert gpu_check.main([str(tmp_path)], planned) == 1
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    status = {step["name"]: step["status"] for step in record["steps"]}
    assert status == {
        "good": "passed",
        "bad": "failed",
        "witness": "passed",
        "empty": "failed",
        "hanging": "timed out",
        "theirs": "passed",
        "missing": "not run: no-such-program: No such file or directory",
        "too late": "not run: no time left",
        "last": "passed",
    }
    assert record["steps"][0]["summary"] == {"said": "all is well"}
    assert record["steps"][1]["exit_code"] == 3
    assert record["to_come"] == []
    log = (tmp_path / "gpu_check.log").read_text()
    seen = json.loads(log.partition("=== witness:")[2].partition("\n")[2].partition("\n--- witness")[0])
    assert [step["name"] for step in seen["steps"]] == ["good", "bad"]  # as it was when that step ran
    assert seen["to_come"] == [step.name for step in planned[2:]]
    assert "all is well" in log
    assert "set 45" in log
    out = capsys.readouterr().out
    assert "bad failed; empty failed; hanging timed out" in out.splitlines()[-1]
    assert gpu_check.main([str(tmp_path)], planned[:1]) == 0


STEPS = [
    *("build", "gpu tests", "memcheck 1/2", "memcheck 2/2", "synccheck", "initcheck", "kernels"),
    *("triton tests", *(f"racecheck {i}/6" for i in range(1, 7)), "doctor"),
    *("bench", "networks", *(["stream"] if importlib.util.find_spec("av") else []), "kernel times", "profile"),
]


def test_the_real_steps_exist() -> None:
    """As far as a machine without a GPU can tell: their modules and options are there."""
    names = [step.name for step in gpu_check.steps("python3", None)]
    assert names == STEPS
    assert "build" not in [step.name for step in gpu_check.steps("python3", "/a/library.so")]
    commands = [step.command for step in gpu_check.steps(sys.executable, None)]
    modules = {part for command in commands for before, part in itertools.pairwise(command) if before == "-m"} - {"gpu"}
    measuring = {"benchmarks.networks", "benchmarks.kernel_times", "benchmarks.profile_kernels"}
    assert modules == {"rcu_ops", "pytest", "tests.gpu.small", *measuring}
    assert all(importlib.util.find_spec(module) for module in modules)
    tests, _ = (command for command in commands if "pytest" in command)
    # pytest's own options in pyproject.toml may be those of plugins that a bare machine lacks.
    bare = [part.format(work="/nowhere") for part in tests if "junitxml" not in part]
    alone = ["-n0"] if importlib.util.find_spec("xdist") else []  # other processes' tests are not listed
    listed = subprocess.run([*bare, *alone, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout
    assert "test_in_a_cuda_graph" in listed.stdout
    assert "tests/test_streaming.py::test_cuda_graph" in listed.stdout
    without_pytest = "import sys; sys.modules['pytest'] = None; import tests.gpu.small"
    subprocess.run([sys.executable, "-c", without_pytest], cwd=ROOT, check=True)


def test_programs_beside_the_compiler_are_found(tmp_path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text("")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.of_toolkit("compute-sanitizer") == str(tmp_path / "bin" / "compute-sanitizer")
    assert gpu_check.of_toolkit("no-such-program") == "no-such-program"


def test_summaries(tmp_path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
        '<failure message="wrong"/></testcase><testcase classname="a" name="d"><skipped message="one GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert gpu_check.tests_summary("", tmp_path, "tests.xml") == {
        "ran": 2,
        "passed": 1,
        "failed": {"a::c": "wrong"},
        "skipped": {"one GPU": 1},
    }
    text = "1: srtg_fuse-probe torch.float32\n2: srtg_fuse-odd torch.float32\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check.sanitizer_summary(text, tmp_path) == {
        "totals": ["0 errors"],
        "ours": 0,
        "others": [],
        "ran": 2,
        "last": "srtg_fuse-odd torch.float32",
        "failed": [],
    }
    text = "launched a-b torch.float32: tile_scan, sum_splits\nfailed: a-d\nlaunched a-c torch.float64: \n"
    launched = {"a-b torch.float32": ["tile_scan", "sum_splits"], "a-c torch.float64": [""]}
    assert gpu_check.kernels_summary(text, tmp_path) == {"ran": 2, "launched": launched, "failed": ["failed: a-d"]}
    reports = (
        "========= Error: Race reported between Read access at nvjet_a+0xb00\n"
        "=========     and Write access at nvjet_b+0x20 [4 hazards]\n"
        "========= Uninitialized __global__ memory read of size 2 bytes\n"
        "=========     at rcu_ops::cuda::<unnamed>::scan(rcu_ops::Scan)+0x5220\n"
        "=========         Host Frame: launch at rcu_ops::launch [0x1] in librcu_ops.so\n"
    )
    found = gpu_check.sanitizer_summary(reports, tmp_path)
    assert (found["ours"], found["others"]) == (1, ["nvjet_a", "nvjet_b"])
    assert "error" in gpu_check.bench_summary("", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.json").write_text('{"results": []}')
    assert gpu_check.bench_summary("", tmp_path) == {"ran": 0, "results": []}
    assert gpu_check.file_summary("", tmp_path, "networks.json")["ran"] == 0
    (tmp_path / "networks.json").write_text('{"a": 1, "b": 2}')
    assert gpu_check.file_summary("", tmp_path, "networks.json") == {"ran": 2, "found": {"a": 1, "b": 2}}


def test_interrupted_tests_are_reported(tmp_path, pretended_gpu) -> None:
    """pytest at its limit still says which tests passed and which failed, also where interrupts are ignored."""
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert False, 'wrong'\ndef test_slow(): time.sleep(60)\n"
    )
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml={work}/t.xml",
    )
    summary = functools.partial(gpu_check.tests_summary, file="t.xml")
    planned = [Step("tests", (*command, "-p", "no:xdist", str(tmp_path / "test_slow.py")), 12, summary=summary)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert gpu_check.main([str(tmp_path / "out")], planned) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    (step,) = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["steps"]
    assert step["status"] == "timed out"
    (failed,) = step["summary"]["failed"]  # with the names of folders before it, where pytest knows of a root
    assert failed.endswith("test_slow::test_bad")


def test_one_step_of_a_group_is_recorded_before_those_that_take_longer(tmp_path, pretended_gpu) -> None:
    record = tmp_path / "gpu_check.json"
    waits = f"import json, time\nwhile not json.load(open({str(record)!r}))['steps']: time.sleep(0.05)"
    planned = [Step("waits for it", python(waits), 20), Step("quick", python("print(1)"), 20, beside=True)]
    assert gpu_check.main([str(tmp_path)], planned) == 0
    assert [step["name"] for step in json.loads(record.read_text())["steps"]] == ["quick", "waits for it"]


def test_a_failing_problem_does_not_end_the_others(monkeypatch, capsys) -> None:
    def fail(given: object) -> None:
        raise RuntimeError("a launch was refused")

    chosen = [problem for problem in small.problems() if problem.operator == "srtg_squeeze"][:3]
    chosen[1] = dataclasses.replace(chosen[1], call=fail)
    monkeypatch.setattr(small, "on", lambda given, device: given)
    monkeypatch.setattr(small.rcu_ops, "use_backend", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    formats = small.tasks(chosen, lambda dtypes: dtypes[:1])
    assert list(small.run(formats)) == [True, False, True]
    out = capsys.readouterr().out
    assert re.findall(r"^\d+(?=: )", out, re.MULTILINE) == ["1", "3"]
    assert gpu_check.failures(out) == [f"failed: {chosen[1]} torch.float32: RuntimeError: a launch was refused"]

    def lost() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(small.LostDeviceError):
        list(small.run(formats))


def test_a_process_that_ends_in_a_problem_is_followed_by_another(tmp_path, capsys) -> None:
    (tmp_path / "tool.py").write_text(
        "import sys\n"
        "for number in range(1 + int(sys.argv[sys.argv.index('--after') + 1]), 6):\n"
        "    print('begins', number, flush=True)\n"
        "    if number in (2, 5): sys.exit(3)\n"
        "    print(f'{number}: done')\n"
        "print('ran some problems')\n"
    )
    tool = (sys.executable, str(tmp_path / "tool.py"))
    assert small.supervise(tool, ["--one-of-each-size", "0", "2"]) == 1
    out = capsys.readouterr().out
    assert re.findall(r"^(\d+): done", out, re.MULTILINE) == ["1", "3", "4"]
    assert gpu_check.failures(out) == [
        "lost: the process ended with 3 in problem 2",
        "lost: the process ended with 3 in problem 5",
    ]
    (tmp_path / "tool.py").write_text("import sys; print('ran 7 problems'); sys.exit(9)")
    assert small.supervise(tool, []) == gpu_check.FOUND  # the tool's own report
    capsys.readouterr()
    assert small.supervise(("no-such-program",), []) == 1
    assert capsys.readouterr().out == "failed: no-such-program: No such file or directory\n"


def test_formats_for_slow_tools() -> None:
    sixteen, wide = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
    assert set(small.of_each_size((*wide, *sixteen))) == {torch.bfloat16, *wide}
    assert small.of_each_size((torch.float16,)) == [torch.float16]


PAGE = """==PROF== something
"ID","Kernel Name","gpu__time_duration.sum","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio","sm__warps_active.avg.pct_of_peak_sustained_active"
"","","ns","inst","inst","%"
"0","void rcu_ops::cuda::<unnamed>::tile_scan<int>(Scan)","1,250.5","2.5","7.5","18.9"
""".replace("\\\n", "")


def test_profile_pages() -> None:
    (row,) = profile_kernels.rows(PAGE)
    assert profile_kernels.number(row, "gpu__time_duration.sum") == 1250.5
    assert profile_kernels.number(row, "no_such_metric") is None
    assert profile_kernels.stalls(row) == [("no_instruction", 7.5), ("long_scoreboard", 2.5)]
    launch = {"case": "a case", "way": "cuda", "kernel": row["Kernel Name"]}
    line = "a case, cuda: tile_scan 1,250.5, warps 19 %, no_instruction 7.5, long_scoreboard 2.5"
    assert profile_kernels.line_of(launch, row) == line
    assert profile_kernels.rows("==ERROR== no kernels were profiled") == []


def test_profiled_cases_are_in_the_suite() -> None:
    cases = {case.id for case in suite.collect("standard", torch.device("cuda"))}
    assert {name for name, _ in profile_kernels.CASES} <= cases
