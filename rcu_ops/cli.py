"""The command ``rcu-ops``: a thin dispatcher. Each command lives in the module that knows its subject."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

from rcu_ops._version import __version__
from rcu_ops.cli_errors import StoppedError, UserError

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # in PyTorch's errors, of CPUs and of GPUs

# Each module has add_parser(subparsers), which sets `run`: a function from the parsed arguments to the exit code.
COMMAND_MODULES = (
    "rcu_ops.stream_command",
    "rcu_ops.align_command",
    "rcu_ops.relations_command",
    "rcu_ops.doctor",
    "rcu_ops.cost",
    "rcu_ops.bench.command",
    "rcu_ops.analysis.command",
    "rcu_ops.analysis.fusion_command",
    "rcu_ops.recipes.command",
    "rcu_ops.faster.command",
    "rcu_ops.features.command",
    "rcu_ops.features.train_command",
    "rcu_ops.video.flow_command",
)


# What no command but the doctor does without.
REQUIRED = ("torch", "numpy", "safetensors")


def build_parser(modules: Sequence[str] = COMMAND_MODULES) -> argparse.ArgumentParser:
    """The parser of all commands, or of those of some modules."""
    parser = argparse.ArgumentParser(
        prog="rcu-ops",
        description="Recurrent video networks: stream a video through one, measure, analyse, and see what this "
        "installation can run.",
    )
    parser.add_argument("--version", action="version", version=f"rcu-ops {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in modules:
        importlib.import_module(module).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The command's exit code; 2 for bad input, full disks and memory, places that cannot be written and packages that
        cannot be imported, with one line on standard error; 130 when interrupted.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before we began; what is opened first would take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as we run
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A class or a file may have a name that the terminal's encoding lacks: no reason to lose a run's results.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for name in REQUIRED:
            importlib.import_module(name)
    except (ImportError, OSError) as error:  # not installed, or one of its libraries is missing
        return _without_a_requirement(name, error, argv)
    from rcu_ops.ops._registry import BackendError, current_backend

    args = build_parser().parse_args(argv)
    try:
        current_backend()  # a wrong RCU_OPS_BACKEND is told before any work is done
        _check_instruction_set()
        return args.run(args)
    except (UserError, BackendError) as error:
        print(f"rcu-ops: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        print(f"rcu-ops: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("rcu-ops: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; nothing is wrong
        sys.stderr.close()
        return 0
    except (MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(sign in words for sign in _OUT_OF_MEMORY):
            raise
        print(f"rcu-ops: error: out of memory: {words}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (*_DISK_IS_FULL, *_NOT_ALLOWED):
            raise
        # The file that is replaced, where there are two names: the other one is a temporary one's.
        place = f"{error.filename2 or error.filename}: " if error.filename else ""
        what = "cannot be written: " if error.errno in _DISK_IS_FULL else ""
        print(f"rcu-ops: error: {place}{what}{error.strerror}", file=sys.stderr)
        return 2


def _check_instruction_set() -> None:
    """UserError for an RCU_OPS_CPU_ISA that the CPU kernels would refuse in the midst of the work."""
    from rcu_ops import _library

    native = _library.native() if os.environ.get("RCU_OPS_CPU_ISA") else None
    if native is not None:
        try:
            native.cpu_isa()
        except RuntimeError as error:
            raise UserError(str(error)) from error


def _without_a_requirement(name: str, error: Exception, argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in ("doctor", "--version"):
        args = build_parser(("rcu_ops.doctor",)).parse_args(argv)
        return args.run(args)
    reason = " ".join(str(error).split())
    print(f"rcu-ops: error: {name} cannot be imported ({reason}): pip install {name}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
