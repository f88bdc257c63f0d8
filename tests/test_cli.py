"""What all commands share."""

from __future__ import annotations

import errno
import os

import pytest

from rcu_ops import cost
from rcu_ops.cli import main


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
