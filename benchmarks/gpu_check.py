"""One run of everything that a GPU can prove; called by gpu_check.sh.

Builds the package (or takes the library that RCU_OPS_LIBRARY names), then runs the GPU tests of the CUDA kernels beside
compute-sanitizer's quicker tools, those of the Triton kernels beside its race checks, the benchmark suite with floors
measured in the same run, whole networks, a video streamed (where PyAV is installed), every kernel's time, and Nsight
Compute on one case of each. What decides most comes first: a machine may be lost at any time. Every step runs, whatever
became of those before it, in what is left of the time. DIR then holds

    gpu_check.json   machine, versions, commit; per step its command, verdict, seconds and summary; tests that failed;
                     every number of the bench, of the networks and of the kernels; written after every step, with the
                     steps to come
    gpu_check.log    the output of all steps
    gpu_check.png    every case as a share of its floor, the baselines beside it
    profile*.ncu-rep what Nsight Compute found, for its own viewers

Exit code: 0 when every step passed, 1 when one did not, 2 without a GPU or with wrong arguments.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = float(os.environ.get("SECONDS_IN_ALL", "525"))
"""For everything; by default nine minutes with a little left for starting and writing."""

SANITIZERS = {"memcheck": 2, "synccheck": 1, "initcheck": 1, "racecheck": 6}
"""Tools, and how many processes share the problems under each."""

SLOW = ("initcheck", "racecheck")
"""Tools under which a problem takes so long that it is run for one format of each size only."""


FOUND = 9
"""Exit code of a sanitizer that has something to report."""

GRACE = 15.0
"""Seconds that an interrupted step has to end by itself: pytest waits ten for its workers before it reports."""

LONGEST = {"gpu tests": 45, "triton tests": 80}
"""Seconds of a test: one that a kernel never returns to leaves time for those behind it. Triton's compile first."""


Summary = Callable[[str, Path], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: in the log and the JSON file.
        command: with ``{work}`` for a scratch directory and ``{seconds}`` for the time that is left.
        seconds: at most.
        reserve: seconds of the whole that must be left to the steps after it.
        environment: added to this process's.
        summary: from the output and the scratch directory to what the JSON file keeps. A step whose summary has
            ``ran`` = 0 has failed: nothing passes because nothing ran.
        beside: start together with the step before.
        margin: of the time left, seconds that ``{seconds}`` leaves out: what the command takes to come to its end.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    reserve: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    summary: Summary = lambda output, work: {}
    beside: bool = False
    margin: float = 15.0


def tests_summary(output: str, work: Path, file: str) -> dict[str, Any]:
    """Counts, reasons of skips and messages of failures from pytest's XML file."""
    try:
        cases = list(xml.etree.ElementTree.parse(work / file).iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return {"ran": 0, "error": "pytest wrote no report"}
    kinds: dict[str, dict[str, str]] = {"failure": {}, "error": {}, "skipped": {}}
    for case in cases:
        for kind, found in kinds.items():
            if (element := case.find(kind)) is not None:
                found[f"{case.get('classname')}::{case.get('name')}"] = (element.get("message") or "")[:500]
    failed = kinds["failure"] | kinds["error"]
    skips = list(kinds["skipped"].values())
    return {
        "ran": len(cases) - len(skips),
        "passed": len(cases) - len(failed) - len(skips),
        "failed": failed,
        "skipped": {reason: skips.count(reason) for reason in dict.fromkeys(skips)},
    }


def sanitizer_summary(output: str, work: Path) -> dict[str, Any]:
    """The tool's own counts, its reports in our kernels and names of others', how many problems ran under it, and which
    failed.
    """
    totals = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", output)
    ran = re.findall(r"^(\d+): (.*)$", output, re.MULTILINE)
    places = re.findall(r"^=+ .*(?:access at| {4}at) (.*)\+0x", output, re.MULTILINE)
    ours = [place for place in places if "rcu_ops" in place]
    others = sorted({place.partition("(")[0] for place in places} - {place.partition("(")[0] for place in ours})
    return {
        "totals": totals,
        "ours": len(ours),
        "others": others,
        "ran": len(ran),
        "last": ran[-1][1] if ran else None,
        "failed": failures(output),
    }


def failures(output: str) -> list[str]:
    """Problems that failed or took their process with them."""
    return re.findall(r"^((?:failed|lost): .*)$", output, re.MULTILINE)


def kernels_summary(output: str, work: Path) -> dict[str, Any]:
    """Per problem and dtype the kernels that it launched."""
    lines = re.findall(r"^launched (.*): (.*)$", output, re.MULTILINE)
    launched = {problem: names.split(", ") for problem, names in lines}
    return {"ran": len(lines), "launched": launched, "failed": failures(output)}


def bench_summary(output: str, work: Path) -> dict[str, Any]:
    """All of bench.json."""
    try:
        data = json.loads((work / "bench" / "bench.json").read_text())
    except (OSError, ValueError):
        return {"ran": 0, "error": "rcu-ops bench wrote no results"}
    return {"ran": len(data["results"]), **data}


def file_summary(output: str, work: Path, file: str) -> dict[str, Any]:
    """All of a JSON file that a step has written."""
    try:
        data = json.loads((work / file).read_text())
    except (OSError, ValueError):
        return {"ran": 0, "error": f"the step wrote no {file}"}
    return {"ran": len(data), "found": data}


def gpu_test_files() -> list[str]:
    """The files with tests marked ``gpu``: others may need packages that a GPU machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"^(pytestmark = |@)pytest\.mark\.gpu$", re.MULTILINE)
    return [str(file.relative_to(ROOT)) for file in files if marked.search(file.read_text(encoding="utf-8"))]


def of_toolkit(program: str) -> str:
    """Where a program of the CUDA toolkit is, on PATH or beside the compiler that the build would take."""
    if found := shutil.which(program):
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if compiler := shutil.which("nvcc"):
        homes.insert(0, str(Path(compiler).resolve().parents[1]))
    places = [Path(home) / "bin" / program for home in homes if home]
    return next((str(place) for place in places if place.exists()), program)


def steps(python: str, library: str | None, bench_options: Sequence[str] = (), seconds: float = SECONDS) -> list[Step]:
    """What is run, in order; the limits of the steps are for nine minutes, and shorter or longer with ``seconds``."""
    part = seconds / 525
    environment = {"RCU_OPS_EXPERIMENTAL": "1", "PYTHONPATH": str(ROOT)}
    measuring = environment | {"RCU_OPS_SELFTEST": "0"}
    kernels = environment | {"OMP_NUM_THREADS": "1"}  # of many processes beside each other
    build = (python, "setup.py", "build_ext", "--inplace")
    found = [] if library else [Step("build", build, 180, 240 * part, {"RCU_OPS_BUILD": "cuda"})]
    # Without the options of pyproject.toml, whose strictness stumbles over plugins that are not there.
    tests = (python, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    cores = os.cpu_count() or 1

    def tested(name: str, chosen: str, workers: int, beside: bool) -> Step:
        file = f"{name.replace(' ', '_')}.xml"
        command = (*tests, "-k", chosen, f"--junitxml={{work}}/{file}")
        if importlib.util.find_spec("pytest_timeout"):  # which ends a process that waits for a kernel
            command += ("--timeout", str(LONGEST[name]), "--timeout-method", "thread")
        if importlib.util.find_spec("xdist"):
            command += ("-n", str(max(1, workers)))
        summary = functools.partial(tests_summary, file=file)
        return Step(name, (*command, *gpu_test_files()), 110 * part, 60 * part, kernels, summary, beside)

    def sanitized(tool: str) -> list[Step]:
        parts = SANITIZERS[tool]
        command = (of_toolkit("compute-sanitizer"), "--tool", tool, "--error-exitcode", str(FOUND))
        # One allocation per tensor, so that an access beside it is seen.
        environment = kernels | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = (python, "-m", "tests.gpu.small", "--under", shlex.join((*command, "--print-limit", "20")))
        run += ("--one-of-each-size",) if tool in SLOW else ()
        return [
            Step(
                tool if parts == 1 else f"{tool} {i + 1}/{parts}",
                (*run, str(i), str(parts)),
                110 * part,
                60 * part,
                environment,
                sanitizer_summary,
                beside=True,
            )
            for i in range(parts)
        ]

    # Each process beside others has a core to itself: most of them wait for the host, not for the GPU.
    found.append(tested("gpu tests", "not triton", cores * 5 // 8, beside=False))
    found += [*sanitized("memcheck"), *sanitized("synccheck"), *sanitized("initcheck")]
    kernels_of = (python, "-m", "tests.gpu.small", "--kernels", "--under", "")
    found.append(Step("kernels", kernels_of, 110 * part, 60 * part, kernels, kernels_summary, beside=True))
    found.append(tested("triton tests", "triton", cores // 2, beside=False))
    found += sanitized("racecheck")
    found.append(Step("doctor", (python, "-m", "rcu_ops", "doctor"), 60 * part, 60 * part, kernels, beside=True))
    bench = (python, "-m", "rcu_ops", "bench", "--device", "cuda", "--cache", "cold")
    bench += ("--budget", "{seconds}", "--out", "{work}/bench", *bench_options)
    # It stops by itself after the case that it is at; compiling one can take long.
    margin = 15.0 if "--no-compile" in bench else 45.0
    found.append(Step("bench", bench, seconds, 150 * part, measuring, bench_summary, margin=margin))
    for name, limit, command, file in (
        ("networks", 35, ("benchmarks.networks", "{work}/networks.json", "--quick"), "networks.json"),
        ("stream", 30, ("rcu_ops", "stream", "--device", "cuda", "--out", "{work}/stream"), "stream/summary.json"),
        (
            "kernel times",
            50,
            ("benchmarks.kernel_times", "{work}/kernels.json", "--seconds", "{seconds}"),
            "kernels.json",
        ),
        (
            "profile",
            60,
            ("benchmarks.profile_kernels", "{work}/profile.json", "--seconds", "{seconds}"),
            "profile.json",
        ),
    ):
        if name == "stream" and not importlib.util.find_spec("av"):
            continue  # PyAV, which reads and writes videos
        summary = functools.partial(file_summary, file=file)
        found.append(Step(name, (python, "-m", *command), limit * part, 0, measuring, summary))
    return found


def gpu() -> tuple[dict[str, str], str | None]:
    """The first GPU as nvidia-smi names it, and why there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}, "nvidia-smi is not installed"
    fields = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        return {}, (result.stdout + result.stderr).strip().splitlines()[
            0
        ] if result.stdout + result.stderr else "no GPU"
    return dict(zip(fields, (value.strip() for value in lines[0].split(",")), strict=False)), None


@dataclass
class Result:
    """What became of a step. status: passed, failed, timed out or not run."""

    name: str
    command: list[str]
    status: str
    seconds: float
    exit_code: int | None
    summary: dict[str, Any]


class Running:
    """A step's process; its output goes to a file of its own."""

    def __init__(self, step: Step, work: Path, deadline: float) -> None:
        self.step, self.work, self.start = step, work, time.monotonic()
        self.limit = min(step.seconds, deadline - step.reserve - self.start)
        words = {"work": str(work), "seconds": f"{max(1.0, self.limit - step.margin):.0f}"}
        self.command = [part.format(**words) for part in step.command]
        self.output = work / f"{re.sub('[^a-z]', '_', step.name)}_{id(step)}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.failure = ""
        if self.limit < 5:
            self.failure = "not run: no time left"
            return
        try:
            with self.output.open("wb") as file:
                self.process = subprocess.Popen(
                    self.command,
                    cwd=ROOT,
                    env={**os.environ, **step.environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # so that the whole of it can be ended
                    # What a shell starts with & ignores interrupts, and so would all that it starts.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
        except OSError as error:
            self.failure = f"not run: {self.command[0]}: {error.strerror}"

    def poll(self) -> bool:
        """Whether it has ended; one that is beyond its limit is interrupted, and a little later killed."""
        if self.process is None or self.process.poll() is not None:
            return True
        late = time.monotonic() - self.start - self.limit
        if late > 0 and not self.failure:
            self.failure = "timed out"
            self.process.send_signal(signal.SIGINT)  # interrupted, pytest still reports what it has
        if late > GRACE:
            self.kill()
        return False

    def kill(self) -> None:
        """End all of its processes."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self, log: Any) -> Result:
        """What became of it, once it has ended."""
        status, code, seconds = self.failure, None, time.monotonic() - self.start
        if self.process is not None:
            code = self.process.wait()
            status = status or ("passed" if code == 0 else "failed")
            self.kill()  # what it has left behind
        text = self.output.read_text(errors="replace") if self.output.exists() else ""
        summary = self.step.summary(text, self.work)
        if status == "passed" and summary.get("ran") == 0:
            status = "failed"
        if status == "failed" and code == FOUND and summary.get("ours") == 0:
            status = "passed"  # what a sanitizer says of the library's kernels is recorded, but is not ours
        log.write(f"=== {self.step.name}: {' '.join(self.command)}\n{text}\n--- {self.step.name}: {status}\n\n")
        log.flush()
        return Result(self.step.name, self.command, status, seconds, code, summary)


def run(
    planned: Sequence[Step],
    work: Path,
    log: Any,
    seconds: float = SECONDS,
    keep: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """All steps; those beside each other at once. A line per step on the standard output; ``keep`` after each."""
    deadline = time.monotonic() + seconds
    results: list[Result] = []
    groups: list[list[Step]] = []
    for step in planned:
        if step.beside and groups:
            groups[-1].append(step)
        else:
            groups.append([step])
    for group in groups:
        print(f"{', '.join(step.name for step in group)} ...", flush=True)
        left = [Running(step, work, deadline) for step in group]
        while left:
            for running in [running for running in left if running.poll()]:
                left.remove(running)
                results.append(running.finish(log))
                print(f"  {results[-1].name}: {results[-1].status} ({results[-1].seconds:.0f} s)", flush=True)
                keep(results)
            if left:
                time.sleep(0.1)
    return results


def main(arguments: Sequence[str], planned: Sequence[Step] | None = None) -> int:
    """See the module's text; ``planned`` replaces the steps."""
    if not arguments or arguments[0].startswith("-") or not all(word.startswith("-") for word in arguments[1:2]):
        print("usage: benchmarks/gpu_check.sh DIR [OPTION OF rcu-ops bench ...]", file=sys.stderr)
        return 2
    device, reason = gpu()
    if reason is not None:
        print(f"gpu_check: there is no GPU here to check: {reason}", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        log = (directory / "gpu_check.log").open("w", encoding="utf-8")
    except OSError as error:
        print(f"gpu_check: {directory}: {error.strerror}", file=sys.stderr)
        return 2
    library = os.environ.get("RCU_OPS_LIBRARY")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    start = time.time()
    planned = steps(sys.executable, library, arguments[1:], SECONDS) if planned is None else planned

    def keep(results: list[Result]) -> None:  # after every step: whoever ends this one early has the evidence so far
        record = {
            "format": 1,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
            "seconds": time.time() - start,
            "commit": commit or None,
            "library": library or "built here",
            "gpu": device,
            "steps": [asdict(result) for result in results],
            "to_come": [step.name for step in planned if step.name not in {result.name for result in results}],
        }
        temporary = directory / ".gpu_check.json"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(directory / "gpu_check.json")

    with tempfile.TemporaryDirectory() as scratch, log:
        work = Path(scratch)
        keep([])
        results = run(planned, work, log, keep=keep)
        picture = work / "bench" / "bench_roofline.png"
        if picture.exists():
            shutil.copyfile(picture, directory / "gpu_check.png")
        for report in work.glob("profile*.ncu-rep"):
            shutil.copyfile(report, directory / report.name)
    wrong = [f"{result.name} {result.status}" for result in results if result.status != "passed"]
    seconds = time.time() - start
    print(f"{directory}: {'every step passed' if not wrong else '; '.join(wrong)} ({seconds:.0f} s)")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
