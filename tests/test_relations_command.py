"""``rcu-ops relations`` on real pictures: its weights against the layer's equation, its files, its errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rcu_ops import create_model
from rcu_ops.analysis.relations import looked_at, plot_relations
from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.models import resnet_v2
from rcu_ops.relations_command import _cell
from rcu_ops.video.synthetic import write_sample_clip

pytest.importorskip("matplotlib")

SMALL = ["--size", "64", "--device", "cpu", "--model-option", "backbone=resnet50v2", "--model-option", "width=2"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 1, 3))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relations") / "clip.mp4"
    write_sample_clip(path, frame_count=12, height=72, width=96)
    return path


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "relations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_untrained(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["relations", str(clip), "--out", str(out), "--frames", "3", "--every", "2", *SMALL]
    assert main([*command, "--position", "0.1,0.9"]) == 0
    assert "untrained" in capsys.readouterr().out
    summary = json.loads((out / "relations.json").read_text())
    assert (summary["weights"], summary["grid"], summary["frames"]) == ("untrained", [2, 2], [0, 2, 4])
    assert summary["position"] == {"row": 1, "column": 0}
    rows = rows_of(out)
    assert {row["weights"] for row in rows} == {"untrained"}
    found = np.array([float(row["weight"]) for row in rows]).reshape(3, 2, 4, 4)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)  # a softmax over the frame
    np.testing.assert_allclose(found[0, 1], 0.25, rtol=1e-6)  # an empty memory prefers nothing
    assert found[1:, 1].std() > 0
    for look in summary["looks"]:
        place = found[look["frame"] // 2, int(look["source"] == "memory"), "ifog".index(look["gate"])]
        assert place[2 * look["row"] + look["column"]] == place.max()
    assert (out / "relations.png").read_bytes().startswith(b"\x89PNG")
    before = (out / "relations.csv").read_bytes()
    assert main([*command, "--position", "0.1,0.9"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--position", "0,1", "--overwrite"]) == 0  # the same cell of the grid, the same numbers
    assert (out / "relations.csv").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["relations.csv", "relations.json", "relations.png"]


def test_trained_and_dot_product(clip: Path, tmp_path: Path) -> None:
    model = create_model("relational_two_branch", backbone="resnet50v2", width=2, normalize="count")
    weights = tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    out = tmp_path / "out"
    command = ["relations", str(clip), "--out", str(out), "--frames", "2", "--weights", str(weights), *SMALL]
    assert main([*command, "--model-option", "normalize=count"]) == 0
    assert json.loads((out / "relations.json").read_text())["weights"] == str(weights)
    values = np.array([float(row["weight"]) for row in rows_of(out)])
    assert values.min() < 0 < values.max()  # raw scores have both signs
    assert not values.reshape(2, 2, 4, 4)[0, 1].any()


def test_positions_are_shares_of_the_picture_or_cells_of_the_grid() -> None:
    for position, cell in (
        ((0.0, 0.0), (0, 0)),
        ((0.3, 0.7), (2, 2)),
        ((1.0, 0.0), (0, 6)),
        ((0.0, 1.0), (3, 0)),  # the far edges belong to the last cells
        ((6, 3), (3, 6)),
    ):
        assert _cell(position, rows=4, columns=7) == cell
    for outside in ((7, 0), (0, 4)):
        with pytest.raises(UserError, match="a column from 0 to 6 and a row from 0 to 3"):
            _cell(outside, rows=4, columns=7)


def test_spread() -> None:
    assert looked_at([[[1.0, 0], [0, 0]], [[0.25, 0.25], [-0.25, 0.25]], [[0, 0], [0, 0]]]).tolist() == [1, 4, 0]


def test_picture_of_wrong_arrays(tmp_path: Path) -> None:
    frames, weights = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 2, 4, 2, 2))
    with pytest.raises(ValueError, match="weights: expected"):
        plot_relations(tmp_path / "a.png", frames, weights[:1], (0, 0), labels=["a", "b"])
    with pytest.raises(ValueError, match="cell: expected"):
        plot_relations(tmp_path / "a.png", frames, weights, (0, 2), labels=["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--position", "0.5"], "--position: expected X,Y"),
        (["--position", "0.5,1.5"], "--position: expected X,Y"),
        (["--position", "nan,0.5"], "--position: expected X,Y"),
        (["--position", "7,0"], "a column from 0 to 1"),
        (["--frames", "0"], "--frames"),
        (["--size", "8"], "--size"),
        (["--model", "rcn_resnet18", "--model-option", "layers=[1,1,1,1]"], "--model"),
        (["--model", "tsn_resnet50v2", "--model-option", "depth=50"], "--model"),
        (["--model-option", "in_channels=20"], "cannot take these frames"),
        (["--model-option", "branches=local"], "no Relational LSTM"),
        (["--weights", "/nonexistent.pt"], "nonexistent"),
        (["--device", "nonsense"], "--device"),
    ],
)
def test_bad_options(
    clip: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["relations", str(clip), "--out", str(tmp_path / "out"), "--frames", "2", *SMALL, *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relations", str(tmp_path / "no.mp4"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
