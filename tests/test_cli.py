"""What all commands share."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rcu_ops import cost
from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.progress import Progress


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoint.pt")

    def run(args: object) -> int:
        raise failed

    monkeypatch.setattr(cost, "run", run)
    assert main(["cost", "rcn_resnet18"]) == 2
    assert capsys.readouterr().err == "rcu-ops: error: run/checkpoint.pt: cannot be written: No space left on device\n"
    failed.errno = errno.EIO
    with pytest.raises(OSError, match="run/checkpoint"):
        main(["cost", "rcn_resnet18"])


def test_closed_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rcu-ops ... >&- 2>&-` runs as with both sent to /dev/null."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def run(args: object) -> int:
        with Progress(1) as bar:
            bar._next = 0
            bar.update()
        sys.stdout.flush()
        raise UserError("no such file")

    monkeypatch.setattr(cost, "run", run)
    assert main(["cost", "rcn_resnet18"]) == 2


@pytest.mark.parametrize("allocate", [np.empty, torch.empty])
def test_too_little_memory_is_one_line(
    allocate: Callable[[int], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "run", lambda args: allocate(1 << 58))
    assert main(["cost", "rcn_resnet18"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rcu-ops: error: out of memory: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_place_that_cannot_be_written_is_one_line(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise OSError(code, os.strerror(code), "shared/.c-1234.json")

    monkeypatch.setattr(cost, "run", run)
    assert main(["cost", "rcn_resnet18"]) == 2
    assert capsys.readouterr().err == f"rcu-ops: error: shared/.c-1234.json: {os.strerror(code)}\n"


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "c.json"
    place.mkdir()
    assert main(["cost", "rcn_resnet18", "--size", "32", "--json", str(place)]) == 2
    assert capsys.readouterr().err == f"rcu-ops: error: {place}: Is a directory\n"
    assert list(tmp_path.iterdir()) == [place]
