"""What all commands share."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
