"""The command where a package that it cannot do without is missing: one line, and a doctor that says so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def _run(missing: str, code: str) -> subprocess.CompletedProcess[str]:
    # None in sys.modules makes an import fail as that of a package which is not installed.
    start = f"import sys, warnings; warnings.simplefilter('ignore'); sys.modules[{missing!r}] = None\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)


def _command(missing: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(missing, f"from rcu_ops.cli import main; sys.exit(main({list(arguments)!r}))")


@pytest.mark.parametrize("missing", ["torch", "numpy", "safetensors"])
@pytest.mark.parametrize("arguments", [("stream",), ("cost", "rcn_resnet18"), ("--help",), ()])
def test_commands_say_what_is_missing_in_one_line(missing: str, arguments: tuple[str, ...]) -> None:
    result = _command(missing, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"rcu-ops: error: {missing} cannot be imported (")
    assert line.endswith(f"pip install {missing}")


def test_the_doctor_and_the_version_do_without_torch() -> None:
    result = _command("torch", "doctor")
    assert (result.returncode, result.stderr) == (1, "rcu-ops: this installation is not usable\n")
    problem, verdict = result.stdout.splitlines()
    assert problem.startswith("problem: ModuleNotFoundError: ") and problem.endswith("(pip install torch)")
    assert verdict == "NOT usable"
    result = _command("torch", "doctor", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["usable"] is False
    assert _command("torch", "--version").returncode == 0


def test_names_that_need_torch_say_so() -> None:
    for use in ("rcu_ops.recurrent_conv", "rcu_ops.nn", "from rcu_ops import Streamer"):
        result = _run("torch", f"import rcu_ops; print(rcu_ops.__version__)\n{use}")
        assert result.returncode == 1 and result.stdout
        assert "PyTorch cannot be imported: " in result.stderr.splitlines()[-1]
