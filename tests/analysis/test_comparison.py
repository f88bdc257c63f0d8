from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from rcu_ops.cli import main


def evaluation(folder: Path, top1: float, **more: object) -> str:
    folder.mkdir()
    accuracy = {"video_top1": top1, "video_top5": 1.0, "clip_top1": top1 / 2, "clip_top5": 0.75}
    (folder / "summary.json").write_text(json.dumps({"accuracy": {"clips": accuracy}, **more}))
    return str(folder)


def test_mean_over_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = [evaluation(tmp_path / name, top1) for name, top1 in (("one", 0.5), ("two", 0.75), ("three", 0.25))]
    assert main(["analyze", "splits", *splits, "--out", str(tmp_path)]) == 0
    assert "50.00 % +- 25.00  (50.00, 75.00, 25.00)" in capsys.readouterr().out
    with (tmp_path / "splits.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["mode"], first["measure"], float(first["mean"]), float(first["split2"])) == (
        "clips", "video_top1", 0.5, 0.75,
    )  # fmt: skip
    other = evaluation(tmp_path / "other", 0.5, map={"sliding": {"1": 0.5}})
    for bad, message in ((other, "other modes or measures"), (str(tmp_path / "none"), "cannot be read")):
        assert main(["analyze", "splits", *splits, bad, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("[]")
    assert main(["analyze", "splits", str(tmp_path)]) == 2


def test_accuracy_against_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    table = tmp_path / "networks.csv"
    table.write_text("name,gmac,accuracy,group\nr3d-50,109.3,78.4,r3d\nr3d-34,150.8,74.8,r3d\nsrtg,109.8,80.4,SRTG\n")
    assert main(["analyze", "cost", str(table), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["r3d-50", "109.30", "GMAC", "78.40", "%", "r3d"]
    assert (tmp_path / "accuracy_cost.png").read_bytes().startswith(b"\x89PNG")
    for content, message in (
        ("name,gmac\na,1\n", "got no accuracy"),
        ("name,gmac,accuracy\na,x,50\n", "line 2: gmac: expected a number, got 'x'"),
        ("name,gmac,accuracy\na,1,150\n", "an accuracy in percent, got 1 and 150"),
        ("name,gmac,accuracy\n", "no network"),
    ):
        table.write_text(content)
        assert main(["analyze", "cost", str(table), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_map_of_videos_with_several_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Class 0: by the maximum a, c, b; by the mean c, b, a. It is in a and b.
    scores = {
        "a": [[9.0, -9.0, -9.0], [0.0, 0.0, 0.0]], "b": [[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]],
        "c": [[2.0, 2.0, 2.0], [1.0, 1.0, 1.0]],
    }  # fmt: skip
    np.savez(tmp_path / "scores.npz", **{name: np.asarray(values) for name, values in scores.items()})
    (tmp_path / "labels.csv").write_text("video,label\na,0\nb,0\nb,1\nc,1\n")
    command = ["analyze", "video-map", str(tmp_path / "scores.npz"), "--labels", str(tmp_path / "labels.csv")]
    for pool, precision in (("max", (1 + 2 / 3) / 2), ("mean", (1 / 2 + 2 / 3) / 2)):
        assert main([*command, "--out", str(tmp_path), "--pool", pool]) == 0
        with (tmp_path / "video_map.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert float(rows[0]["average_precision"]) == pytest.approx(precision)
        assert [row["videos"] for row in rows] == ["2", "2"]
        assert float(rows[1]["average_precision"]) == 1
        assert f"{100 * (precision + 1) / 2:.2f}" in capsys.readouterr().out
    (tmp_path / "labels.csv").write_text("video,label\na,2\n")
    assert main([*command, "--out", str(tmp_path)]) == 2
    assert "from 0 to 1, got 2" in capsys.readouterr().err
