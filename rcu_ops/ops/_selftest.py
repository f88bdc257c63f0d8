"""Self-tests on the user's own device: kernels proven only elsewhere are tried before ``auto`` takes them.

A Triton kernel proven in the interpreter, or a CUDA variant proven on another architecture, is still compiled by
whatever compiler and driver the user has, and compilers have broken kernels on new chips before. So the first use of
such a backend on a device runs a few small shapes against the reference, under a second plus compilation. The verdict
is kept in ``$XDG_CACHE_HOME/rcu-ops/selftest.json`` by device, driver and build; a change of any of them asks again.
``RCU_OPS_SELFTEST=0`` in the environment skips the tests and trusts the kernels.

A failed test warns, and is the reason that :func:`rcu_ops.explain` and the doctor give. It never fails quietly.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rcu_ops import _library
from rcu_ops._version import __version__

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """One small problem.

    Attributes:
        name: what it is, for the message of a failure.
        got: runs the kernels under test.
        exact: the reference in fp64, on any device.
        eager: the reference in the tested dtype, on any device: the yardstick of the tolerance rule.
    """

    name: str
    got: Callable[[], Tensors]
    exact: Callable[[], Tensors]
    eager: Callable[[], Tensors]


@dataclass(frozen=True)
class SelfTest:
    """The self-test of one operator's backend.

    Attributes:
        name: "operator/backend".
        cases: from a device and a dtype to the problems to try.
        sources: files whose change makes an earlier verdict void.
    """

    name: str
    cases: Callable[[torch.device, torch.dtype], Iterable[Case]]
    sources: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Result:
    """A verdict. ``source``: "tested" (now, in this process), "remembered" (from the cache file), "skipped", or
    "untested": there is none yet (:func:`deferred`).
    """

    name: str
    device: str
    dtype: str
    passed: bool
    detail: str
    seconds: float
    source: str

    def __str__(self) -> str:
        if self.source == "skipped":
            return "skipped (RCU_OPS_SELFTEST=0)"
        if self.source == "untested":
            return "not tested yet: it will be at its first use, or now by rcu-ops doctor --selftest"
        return f"{'passed' if self.passed else 'FAILED'} in {self.seconds:.2f} s ({self.source}): {self.detail}"


_tests: dict[str, SelfTest] = {}
_results: dict[tuple[str, str, str], Result] = {}
_untested: dict[tuple[str, str, str], Result] = {}
_deferred = threading.local()
_lock = threading.RLock()


def register(test: SelfTest) -> None:
    """Make a self-test known under its name."""
    _tests[test.name] = test


def register_backends(
    family: str, cases: Callable[[Any, torch.device, torch.dtype], Iterable[Case]], sources: tuple[Path, ...]
) -> None:
    """The self-tests "family/triton" and "family/cuda": the same cases of operators by the one backend and the other.

    Args:
        cases: from the operators (``operators.recurrent_conv``, ...), a device and a dtype to the problems to try.
        sources: files whose change makes an earlier verdict void: the test's, and the Triton kernels'.
    """
    for backend in ("triton", "cuda"):
        register(SelfTest(f"{family}/{backend}", functools.partial(cases, _Operators(backend)), sources))


class _Operators:
    """``torch.ops.rcu_ops`` with the names of one backend's operators."""

    def __init__(self, backend: str) -> None:
        self._suffix = "_triton" if backend == "triton" else ""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.rcu_ops, f"{name}{self._suffix}")


def known(name: str) -> bool:
    """Whether a self-test of that name is registered."""
    return name in _tests


def results() -> list[Result]:
    """The verdicts this process has asked for, and the tests it has put off, for the doctor."""
    return [*_results.values(), *(result for key, result in _untested.items() if key not in _results)]


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it, on this thread, a test without a verdict is not run, and its kernels count as usable.

    A test compiles every kernel it runs, seconds each on a new machine: too long for who only asks what would run.
    """
    before = getattr(_deferred, "on", False)
    _deferred.on = True
    try:
        yield
    finally:
        _deferred.on = before


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when the self-test ``name`` passes on ``device`` at ``dtype`` (or is skipped), else the reason.

    Runs the test if no verdict is known. Safe to call while torch.compile or torch.export traces: they see a constant.
    """
    return _verdict(name, str(device), str(dtype))


def _verdict(name: str, device: str, dtype: str) -> str | None:
    result = _results.get((name, device, dtype))
    if result is None:
        with _lock:
            found = _results.get((name, device, dtype)) or _find(name, torch.device(device), dtype)
            if isinstance(found, str):
                return found
            result = (_untested if found.source == "untested" else _results)[name, device, dtype] = found
    return None if result.passed else f"its self-test failed on {device} ({result.detail})"


# What torch.compiler.assume_constant_result does, without importing the compiler (and Triton with it).
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(name: str, device: torch.device, dtype: str) -> Result | str:
    """The verdict from the environment, the cache file or a run of the test; a string: there can be none right now."""
    if os.environ.get("RCU_OPS_SELFTEST", "1") == "0":
        return Result(name, str(device), dtype, True, "not tested", 0.0, "skipped")
    test = _tests[name]
    key = " | ".join((name, dtype, *_identity(device), _digest(test)))
    remembered = _read_cache().get(key)
    if remembered is not None:
        result = Result(
            name, str(device), dtype, remembered["passed"], remembered["detail"], remembered["seconds"], "remembered"
        )
    elif getattr(_deferred, "on", False):
        return Result(name, str(device), dtype, True, "", 0.0, "untested")
    else:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "its self-test cannot run while a CUDA graph is captured: call it once, or rcu_ops.warmup(), before"
        result, lasting = _run(test, device, dtype)
        if lasting:
            _write_cache(key, result)
    if not result.passed:
        warnings.warn(
            f"{name} failed its self-test on {_identity(device)[0]} at {dtype} and will not be used: {result.detail}. "
            "Please report this. RCU_OPS_SELFTEST=0 skips the test and trusts the kernel.",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def _run(test: SelfTest, device: torch.device, dtype: str) -> tuple[Result, bool]:
    """Try every case. The second value: whether the verdict lasts (an error such as a full memory may not repeat)."""
    begin = time.perf_counter()
    tried: list[str] = []
    failure, lasting = None, True
    kind = getattr(torch, dtype.removeprefix("torch."))
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        try:
            for case in test.cases(device, kind):
                tried.append(case.name)
                failure = _compare(case)
                if failure is not None:
                    break
        except Exception as error:  # whatever goes wrong here would go wrong in the user's call
            lasting = False
            failure = f"{tried[-1] if tried else 'setting up'}: {type(error).__name__}: {' '.join(str(error).split())}"
    if failure is None and not tried:
        failure, lasting = "the self-test has no cases", False
    detail = failure or ", ".join(tried)
    return Result(
        test.name, str(device), dtype, failure is None, detail, time.perf_counter() - begin, "tested"
    ), lasting


#: What a right kernel's error may be: so many times eager PyTorch's at that dtype, plus so many output ulps.
TIMES_EAGER, ULPS = 8, 4


def _compare(case: Case) -> str | None:
    """Rms and largest error within TIMES_EAGER and ULPS.

    Looser than the tolerance rule of the tests, on purpose: what is looked for here is a compiler that broke a kernel
    on a new chip, which is wrong by orders of magnitude. A right kernel whose order of additions is less lucky than
    the library's on this chip must not be refused for an ulp.
    """
    got, exact, eager = case.got(), case.exact(), case.eager()
    for index, (value, truth, rough) in enumerate(zip(got, exact, eager, strict=True)):
        value, rough, truth = value.cpu(), rough.cpu(), truth.cpu()
        if value.shape != truth.shape:
            return f"{case.name}: result {index} has shape {list(value.shape)}, expected {list(truth.shape)}"
        error, allowed = value.double() - truth, rough.double() - truth
        largest = truth.abs().max().item()
        ulp = torch.finfo(value.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1) if largest > 0 else 0.0
        for kind, of in (
            ("rms", lambda e: e.square().mean().sqrt().item()),
            ("largest", lambda e: e.abs().max().item()),
        ):
            bound = TIMES_EAGER * of(allowed) + ULPS * ulp
            if not of(error) <= bound:  # so that NaN fails
                return f"{case.name}: {kind} error of result {index} is {of(error):.2e}, more than {bound:.2e}"
    return None


# ---- identity and cache -------------------------------------------------------------------------------------------


def _identity(device: torch.device) -> tuple[str, str]:
    """Name of the device's model, and of its driver."""
    if device.type != "cuda":
        return device.type, "no driver"
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        driver = f"CUDA {torch.version.cuda}"
    return f"{properties.name} sm_{properties.major}{properties.minor}", " ".join(driver.split())


def _digest(test: SelfTest) -> str:
    """What the kernels are made of: this package, torch, the Triton compiler, and the sources of kernels and test."""
    parts = [__version__, torch.__version__]
    if test.name.endswith("/cuda"):
        parts.append(str(_library.build_record().get("sources")))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(importlib.metadata.version("triton"))
    digest = hashlib.sha256("|".join(parts).encode())
    for path in (Path(__file__), *test.sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_file() -> Path:
    """Where verdicts are kept: ``$XDG_CACHE_HOME/rcu-ops/selftest.json``, by default under ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "rcu-ops" / "selftest.json"


def _read_cache() -> dict[str, Any]:
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home directory
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        key: entry
        for key, entry in content.items()
        if isinstance(entry, dict) and {"passed", "detail", "seconds"} <= entry.keys()
    }


def _write_cache(key: str, result: Result) -> None:
    # Two processes may write at once: each replaces the file as a whole, and a verdict lost that way is asked again.
    entry = {name: value for name, value in asdict(result).items() if name in ("passed", "detail", "seconds")}
    entry["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    temporary = None
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            json.dump({**_read_cache(), key: entry}, file, indent=1)
        temporary.replace(path)
    except (OSError, RuntimeError):  # no place to remember it: the next process tests again
        if temporary is not None:
            temporary.unlink(missing_ok=True)
