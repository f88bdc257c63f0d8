"""Recipes of Charades: trimmed actions in training, windows scored one by one, mAP of videos with several labels."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.models import resnet_v2
from rcu_ops.recipes.config import Recipe, assumptions, get_recipe
from rcu_ops.recipes.dataset import ClipDataset, ClipKey
from rcu_ops.recipes.evaluate import evaluate
from rcu_ops.recipes.lists import read_list
from rcu_ops.recipes.scoring import VideoScorer
from rcu_ops.video.sample import segment_positions
from tests.video.clips import recognise, shade, write_clip

# Frames are 0.04 s apart: an action over frames 3 to 8, one over 6 to 11, one that no frame is within, one too late.
ACTIONS = "path,start,end,label\nv.mp4,0.12,0.36,1\nv.mp4,0.24,0.48,0\nv.mp4,0.41,0.43,1\nv.mp4,2,3,1\nnone.mp4,,,\n"


def recipe(**changes: object) -> Recipe:
    small = {"frames": 2, "crop": 32, "scales": (36, 36), "eval_scale": 36, "eval_clips": 1, "eval_crops": 1}
    return dataclasses.replace(get_recipe("charades_relational_rgb"), **{**small, "classes": 2, **changes})


def test_recipe_is_the_papers() -> None:
    for name, model in (("relational", "relational_two_branch"), ("tsn", "tsn_resnet101v2")):
        chosen = get_recipe(f"charades_{name}_rgb")
        paper = {"model": model, "classes": 157, "input": "rgb", "eval_windows": (10, 256), "eval_clips": 4}
        for field, value in {**paper, "eval_crops": 5, "frames": 8, "trimmed": True}.items():
            assert getattr(chosen, field) == value, field
            assert field not in assumptions(chosen.name), field
        assert chosen.loss == "cross_entropy" and "loss" in assumptions(chosen.name)


def test_actions_are_trimmed_clips(tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", 18)
    (tmp_path / "list.csv").write_text(ACTIONS)
    videos = read_list(tmp_path / "list.csv", 2, dense=True).actions().videos
    assert [(video.label, video.span) for video in videos[:2]] == [(1, (0.12, 0.36)), (0, (0.24, 0.48))]
    single, several = (ClipDataset(videos, recipe(loss=loss), seed=0) for loss in ("cross_entropy", "bce"))
    seen = set()
    for epoch in range(12):
        for place, first, label in ((0, 3, 1), (1, 6, 0)):
            clip = single[ClipKey(epoch, place)]
            shown = [recognise(frame.numpy()) for frame in clip.frames]
            assert first <= shown[0] < first + 3 <= shown[1] < first + 6
            assert clip.target.dtype == torch.int64 and clip.target == label
            both = several[ClipKey(epoch, place)]
            assert torch.equal(both.frames, clip.frames)
            present = {1} if shown[1] < 6 else {0} if shown[0] >= 9 else {0, 1}
            assert both.target.tolist() == [float(index in present) for index in range(2)]
            seen.add((place, tuple(sorted(present))))
    assert seen >= {(0, (0, 1)), (1, (0, 1))}
    late = single[ClipKey(0, 2)]  # neither of the last two actions has a frame; the next one of the list that has
    assert [place for place, _ in late.problems] == [2, 3] and late.target == 1
    assert "no frame from 0.41 to 0.43 seconds" in late.problems[0][1]


class Grey(nn.Module):
    """A network whose scores are the mean grey of a clip and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clip: Tensor) -> Tensor:
        grey = clip.mean((1, 2, 3, 4)) * self.scale
        return torch.stack([grey, -grey], 1)


def test_map_of_windows_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Windows of 4 frames; a's start at frames 0, 4, 8, those of b and c (constant) at 0, 2, 4.
    write_clip(tmp_path / "a.mp4", 12)
    for name, index in (("b", 7), ("c", 8)):
        picture = np.full((48, 64, 3), shade(index), np.uint8)
        write_clip(tmp_path / f"{name}.mp4", images=[picture] * 8, times=range(0, 320, 40))
    (tmp_path / "list.csv").write_text("a.mp4,0,1,0\nb.mp4,0,1,0\nb.mp4,0,0.1,1\nb.mp4,0.2,1,1\nc.mp4,,,\n")
    chosen = recipe(eval_windows=(3, 4), eval_clips=2)
    scorer = VideoScorer(Grey().eval(), chosen, ("clips",))
    grey = scorer(str(tmp_path / "a.mp4")).scores["clips"]
    assert grey.shape == (2, 3)
    # Positions 0 and 1 of segments of two frames: means of all four frames, 4 shades apart from window to window.
    assert segment_positions(4, 2, positions=2).tolist() == [[0, 2], [1, 3]]
    np.testing.assert_allclose(np.diff(grey[0]), (grey[0, 2] - grey[0, 0]) / 2, rtol=0.02)

    videos = read_list(tmp_path / "list.csv", 2, dense=True)
    assert evaluate(scorer, videos, chosen, ["clips"], tmp_path / "out", {}) == 0
    # Class 0, in a and b: the greatest scores are the shades 9.5, 7 and 8: a, c, b. (By the mean c, b, a.)
    # Class 1, in b alone: the greatest of the negatives are -1.5, -7 and -8: a, b, c.
    by_class = (1 + 2 / 3) / 2, 1 / 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["video_map"]["clips"] == pytest.approx(sum(by_class) / 2, rel=1e-12)
    assert "mAP 66.67 % of the greatest scores (3 videos)" in capsys.readouterr().out
    assert (tmp_path / "out" / "labels.csv").read_text().split() == [
        "video,label", "a.mp4,0", "b.mp4,0", "b.mp4,1", "c.mp4,"
    ]  # fmt: skip
    files = [str(tmp_path / "out" / "scores_clips.npz"), "--labels", str(tmp_path / "out" / "labels.csv")]
    assert main(["analyze", "video-map", *files, "--out", str(tmp_path)]) == 0
    with (tmp_path / "video_map.csv").open(newline="") as file:
        assert [float(row["average_precision"]) for row in csv.DictReader(file)] == pytest.approx(by_class)
    short = VideoScorer(Grey().eval(), recipe(eval_windows=(3, 64)), ("clips",))(str(tmp_path / "b.mp4"))
    assert np.ptp(short.scores["clips"][0]) == 0


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_train_and_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 1, 3))
    write_clip(tmp_path / "v.mp4", 18)
    write_clip(tmp_path / "none.mp4", 9)
    (tmp_path / "list.csv").write_text(ACTIONS)
    sizes = ["--frames", "2", "--crop", "32", "--scales", "36,36", "--eval-scale", "36", "--batch", "2"]
    network = ["--model-option", "backbone=resnet50v2", "--model-option", "width=2", "--device", "cpu"]
    lists = ["--train", str(tmp_path / "list.csv"), "--val", str(tmp_path / "list.csv"), "--workers", "0"]
    run = ["train", "--recipe", "charades_relational_rgb", *sizes, *network, *lists, "--out", str(tmp_path / "run")]
    windows = ["--eval-windows", "2,6", "--eval-clips", "2", "--classes", "2", "--loss", loss]
    assert main([*run, *windows, "--iterations", "3", "--milestones", "2", "--val-every", "3"]) == 3  # not all actions
    with (tmp_path / "run" / "validation.csv").open(newline="") as file:
        (validation,) = csv.DictReader(file)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert ("top1" in row) == (loss == "cross_entropy") and 0 < float(row["loss"]) < 10
    assert "no frame from" in capsys.readouterr().err
    scored = ["--weights", str(tmp_path / "run" / "weights.safetensors"), "--videos", str(tmp_path / "list.csv")]
    assert main(["evaluate", *scored, "--device", "cpu", "--out", str(tmp_path / "scores")]) == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    with np.load(tmp_path / "scores" / "scores_clips.npz") as arrays:
        scores = {name: arrays[name] for name in ("v.mp4", "none.mp4")}
    assert scores["v.mp4"].shape == (2, 2)
    # Both classes are in the first of two videos: its precision is 1 before the other one, and 1/2 behind it.
    expected = np.where(scores["v.mp4"].max(1) > scores["none.mp4"].max(1), 1.0, 0.5).mean()
    assert summary["video_map"] == {"clips": pytest.approx(expected)}
    assert float(validation["map"]) == pytest.approx(expected) and validation["videos"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-windows", "2"], "--eval-windows: expected a number from 1 and frames of each, got (2,)"),
        (["--eval-windows", "2,0"], "--eval-windows: expected a number from 1 and frames of each, got (2, 0)"),
        (["--sampling", "clip"], "--eval-windows: expected 1,0 with sampling=clip, got (10, 256)"),
        (["--input", "flow"], "--trimmed: intervals in seconds need videos (input=rgb), got 'flow'"),
        (["--no-trimmed", "--loss", "bce"], "--sampling: dense labels need neighbouring frames (clip)"),
        (["--train", "list.csv", "--out", "out"], "list.csv: expected labelled intervals to train on"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("a.mp4,,,\n")
    show = [] if "--train" in options else ["--show"]
    assert main(["train", "--recipe", "charades_relational_rgb", *show, *options, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcu-ops: error: ") and message in error and error.count("\n") == 1
    with pytest.raises(UserError, match="in this list has any"):
        read_list(tmp_path / "list.csv", 2, dense=True).actions()
