"""``rcu-ops doctor``: what this installation can run, and why not the rest."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

REQUIRED = ("torch", "numpy", "safetensors")
PACKAGES = (*REQUIRED, "triton", "av", "matplotlib", "opencv-python-headless", "scikit-learn")


def examine(selftest: bool = False) -> dict[str, Any]:
    """Everything the doctor reports, as plain data. Says how far it is where it takes more than two seconds.

    Args:
        selftest: run the self-tests of the Triton kernels that have no verdict on this GPU yet. Their kernels are
            compiled for it, a minute or more on a new machine; otherwise they are reported as not tested yet.

    Returns:
        ``versions`` (package to version or None), ``devices``, ``build`` (the build record, whether the library and
        the native module are loaded, and why not), ``operators`` (per operator and device kind the backend that runs,
        the reasons against each other one, and experimental variants), ``usable`` and ``problems``.
    """
    import torch

    from rcu_ops import _library
    from rcu_ops._version import __version__
    from rcu_ops.nn.frame_kernel import why_not_here
    from rcu_ops.nn.packed_conv import arithmetic
    from rcu_ops.ops import OPERATORS, current_backend
    from rcu_ops.ops._selftest import deferred, results
    from rcu_ops.progress import Progress

    versions: dict[str, str | None] = {"rcu-ops": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__

    devices = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    ]
    native = _library.native()
    if native is not None and hasattr(native, "cpu_isa"):
        devices[0]["isa"] = native.cpu_isa()
    computed, reason = arithmetic(torch.bfloat16)
    devices[0]["bf16 convolutions of fused models"] = f"{str(computed).removeprefix('torch.')}: {reason}"
    for dtype in (torch.float32, torch.bfloat16):
        reason = why_not_here(dtype) or "convolution and recurrence are one kernel, on weights in its layout"
        devices[0][f"{str(dtype).removeprefix('torch.')} streams of single frames in fused models"] = reason
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {"device": f"cuda:{index}", "name": properties.name, "arch": f"sm_{properties.major}{properties.minor}"}
        )

    problems = [f"{name} is not installed: pip install {name}" for name in REQUIRED if versions[name] is None]
    operators: dict[str, Any] = {}
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with (
        Progress(len(OPERATORS) * len(kinds), "examining operators", "operators") as bar,
        contextlib.nullcontext() if selftest else deferred(),
    ):
        for name, operator in sorted(OPERATORS.items()):
            experimental = {b.name: list(b.experimental) for b in operator.backends if b.experimental}
            overtaken = {b.name: b.overtaken.where for b in operator.backends if b.overtaken is not None}
            operators[name] = {"experimental": experimental, "overtaken": overtaken}
            for kind in kinds:
                explanation = operator.explain(*operator.probe(kind))
                operators[name][kind] = {"backend": explanation.backend, "reasons": explanation.reasons}
                if explanation.backend is None:
                    problems.append(f"{name} cannot run on {kind}: {explanation.reasons[explanation.requested]}")
                else:
                    try:
                        operator.backend(explanation.backend).run(*operator.probe(kind))
                    except Exception as error:  # the doctor reports whatever goes wrong
                        problems.append(f"{name} fails on {kind} with backend {explanation.backend}: {error}")
                bar.update(note=f"{name} on {kind}")

    return {
        "versions": versions,
        "devices": devices,
        "requested_backend": current_backend(),
        "build": {
            "record": _library.build_record(),
            "library": "loaded" if _library.load_error() is None else _library.load_error(),
            "native_module": "loaded"
            if native is not None
            else "not built for this Python (only planners' words need it)",
        },
        "operators": operators,
        "selftests": [{"name": r.name, "device": r.device, "dtype": r.dtype, "result": str(r)} for r in results()],
        "problems": problems,
        "usable": not problems,
    }


def render(report: dict[str, Any]) -> str:
    """The report of :func:`examine` as text."""
    from rcu_ops.ops._registry import passed_over

    lines = ["versions"]
    lines += [f"  {name:24}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines.append("devices")
    for device in report["devices"]:
        words = {key: value for key, value in device.items() if " " not in key and key not in ("device", "name")}
        rest = ", ".join(f"{key} {value}" for key, value in words.items())
        lines.append(f"  {device['device']:24}{device['name']}" + (f" ({rest})" if rest else ""))
        lines += [f"    {key}: {value}" for key, value in device.items() if " " in key]
    if len(report["devices"]) == 1:
        lines.append(f"  {'cuda':24}no CUDA device")
    build = report["build"]
    lines.append("build")
    lines += [f"  {key:24}{_plain(value)}" for key, value in build["record"].items()]
    lines.append(f"  {'kernel library':24}{build['library']}")
    lines.append(f"  {'native module':24}{build['native_module']}")
    lines.append(f"operators (requested backend: {report['requested_backend']})")
    for name, entry in report["operators"].items():
        for kind in ("cpu", "cuda"):
            if kind not in entry:
                continue
            verdict = entry[kind]
            lines.append(f"  {name} on {kind}: {verdict['backend'] or 'nothing'} runs")
            for backend, reason in verdict["reasons"].items():
                if backend != verdict["backend"]:
                    lines.append(f"    not {backend}: {reason or passed_over(report['requested_backend'])}")
        for backend, variants in entry["experimental"].items():
            lines.append(f"    experimental on {backend}: {', '.join(variants)}")
        lines += [f"    auto passes over {backend} for {where}" for backend, where in entry["overtaken"].items()]
    if report["selftests"]:
        lines.append("self-tests")
        lines += [f"  {t['name']} on {t['device']}, {t['dtype']}: {t['result']}" for t in report["selftests"]]
    for problem in report["problems"]:
        lines.append(f"problem: {problem}")
    lines.append("usable" if report["usable"] else "NOT usable")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(str(v) for v in value) or "none" if isinstance(value, list) else str(value)


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 0 if the package is usable, 1 otherwise."""
    try:
        report = examine(args.selftest)
    except Exception as error:  # an installation so broken that the operators cannot be imported
        hint = f" (pip install {error.name})" if isinstance(error, ModuleNotFoundError) and error.name else ""
        report = {"usable": False, "problems": [f"{type(error).__name__}: {error}{hint}"]}
        text = f"problem: {report['problems'][0]}\nNOT usable"
    else:
        text = render(report)
    print(json.dumps(report, indent=2) if args.json else text)
    if not report["usable"]:
        print("rcu-ops: this installation is not usable", file=sys.stderr)
    return 0 if report["usable"] else 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``rcu-ops doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this installation can run, and why not the rest",
        description="Versions and devices, what was built and for which architectures, and for every operator which "
        "backend will run and why each other one will not. Exit codes: 0 the package is usable, 1 it is not.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="test the Triton kernels on this GPU now, not at their first use; they are compiled, which takes a minute",
    )
    parser.set_defaults(run=run)
