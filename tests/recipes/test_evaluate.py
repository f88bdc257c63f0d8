from __future__ import annotations

import copy
import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

import rcu_ops
from rcu_ops.analysis import scores_io
from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.recipes import command, get_recipe
from rcu_ops.recipes.evaluate import evaluate
from rcu_ops.recipes.lists import LabelledVideo, VideoList
from rcu_ops.recipes.metrics import accuracy_over, mean_average_precision
from rcu_ops.recipes.scoring import VideoResult
from rcu_ops.video import VideoError, read_frames
from rcu_ops.video.transform import FrameTransform
from tests.recipes.motion import FRAMES, VIDEOS
from tests.tolerance import assert_close_to_reference

RECIPE = dataclasses.replace(get_recipe("kinetics_resnet18"), classes=3)
DENSE = dataclasses.replace(RECIPE, loss="bce", classes=2)


def _summary(out):
    return json.loads((out / "summary.json").read_text())


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Scores [classes, outputs] of four videos with labels 0, 1, 2, 2, and what follows from them by hand:
#   a: first choices 0, 0, mean 0         label 0: both clips right, video right
#   b: first choices 1, 0, mean (4, 3, 0) label 1: one clip right, video wrong
#   c: first choices 0, 2, mean (1, 0, 3) label 2: one clip right, video right
#   d: cannot be read
SCORES = {
    "a": [[2, 3], [0, 1], [1, 0]],
    "b": [[1, 7], [6, 0], [0, 0]],
    "c": [[2, 0], [0, 0], [1, 5]],
}
LIST = VideoList("list.csv", tuple(LabelledVideo(n, n, label) for n, label in zip("abcd", (0, 1, 2, 2), strict=True)))


class Scorer:
    """Hands out fixed scores; counts its calls; ``d`` is broken, and ``stop`` is interrupted."""

    def __init__(self, stop=None, mode="clips"):
        self.calls = []
        self.stop = stop
        self.mode = mode

    def __call__(self, source):
        self.calls.append(source)
        if source == self.stop:
            raise KeyboardInterrupt
        if source not in SCORES:
            raise VideoError(f"{source}: no such file")
        scores = np.array(SCORES[source], dtype=np.float32)
        return VideoResult(
            {self.mode: scores}, np.arange(scores.shape[1]) / 25, "broke at frame 2: cut" if source == "c" else None
        )


def test_numbers_by_hand(tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(Scorer(), LIST, RECIPE, ["clips"], out, {}, ("run", "jump", "swim")) == 3
    summary = _summary(out)
    accuracy = summary["accuracy"]["clips"]
    assert accuracy == {
        "clip_top1": 4 / 6,
        "clip_top5": 1.0,
        "video_top1": 2 / 3,
        "video_top5": 1.0,
        "num_clips": 6,
        "num_videos": 3,
    }
    assert summary["unusable"] == [{"video": "d", "reason": "d: no such file"}]
    assert summary["broken"] == [{"video": "c", "reason": "broke at frame 2: cut"}]
    assert summary["videos"] == 3
    assert _rows(out / "videos.csv") == [
        {"video": "a", "label": "run", "clips": "run"},
        {"video": "b", "label": "jump", "clips": "run"},
        {"video": "c", "label": "swim", "clips": "swim"},
    ]
    printed = capsys.readouterr()
    assert "video top-1 66.67 %, top-5 100.00 %; clip top-1 66.67 %" in printed.out
    assert "videos that could not be used: 1 of 4: 'd'" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        "labels.csv",
        "scores_clips.npz",
        "settings.json",
        "summary.json",
        "videos.csv",
    ]


def test_the_files_are_what_analyze_reads(tmp_path, capsys):
    out = tmp_path / "out"
    evaluate(Scorer(mode="unrolled"), LIST, RECIPE, ["unrolled"], out, {})
    read = scores_io.read_scores(out / "scores_unrolled.npz")
    assert {name: video.scores.tolist() for name, video in read.videos.items()} == SCORES
    assert scores_io.read_video_labels(out / "labels.csv", 3) == {"a": 0, "b": 1, "c": 2}
    common = ["--labels", str(out / "labels.csv"), "--out", str(tmp_path / "figures")]
    for kind in ("accuracy", "early", "segments"):
        assert main(["analyze", kind, str(out / "scores_unrolled.npz"), *common]) == 0
    (row,) = _rows(tmp_path / "figures" / "accuracy.csv")
    assert float(row["video_top1"]) == _summary(out)["accuracy"]["unrolled"]["video_top1"]
    # Observed half of two frames is one frame: a right, b right, c wrong.
    early = _rows(tmp_path / "figures" / "early.csv")
    assert [float(row["accuracy"]) for row in early] == [2 / 3] * 5 + [2 / 3] * 5
    capsys.readouterr()


def test_dense_numbers_by_hand(tmp_path, capsys):
    # Class 0 is present in frames 0 and 3; ranked by score (4, 3, 2, 1 of frames 1, 0, 3, 2) the precision at its
    # frames is 1/2 and 2/3. Class 1 is present in frame 2 only, which is ranked first. Frame 0 alone for mAP@8.
    videos = VideoList("dense.csv", (LabelledVideo("v", "v", None, ((0, 0.0, 0.04), (0, 0.12, 9.0), (1, 0.08, 0.12))),))
    scores = np.array([[3, 4, 1, 2], [0, 1, 5, 0]], dtype=np.float32)
    times = np.array([0.0, 0.04, 0.08, 0.12])
    out = tmp_path / "out"

    def score(source):
        return VideoResult({"sliding": scores}, times, None)

    assert evaluate(score, videos, DENSE, ["sliding"], out, {}) == 0
    every_frame = (0.5 * (1 / 2 + 2 / 3) + 1.0) / 2
    assert _summary(out)["map"]["sliding"] == {"1": pytest.approx(every_frame, rel=1e-12), "8": 1.0}
    assert "accuracy" not in _summary(out)
    assert "mAP@1 79.17 %, mAP@8 100.00 %" in capsys.readouterr().out
    np.testing.assert_array_equal(
        scores_io.read_arrays(out / "labels.npz")["v"], np.array([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=bool)
    )
    analyzed = ["analyze", "map", str(out / "scores_sliding.npz"), "--labels", str(out / "labels.npz")]
    assert main([*analyzed, "--out", str(tmp_path / "figures")]) == 0
    means = [row for row in _rows(tmp_path / "figures" / "map.csv") if row["class"] == "mean"]
    assert [float(row["average_precision"]) for row in means] == list(_summary(out)["map"]["sliding"].values())


def test_map_without_any_positive_frame_is_none():
    scores, present = [np.zeros((2, 9), dtype=np.float32)], np.zeros((2, 9), dtype=bool)
    assert mean_average_precision(scores, [present], 1) is None
    present[0, 3] = True
    assert mean_average_precision(scores, [present], 1) == pytest.approx(1 / 9)
    assert mean_average_precision(scores, [present], 8) is None


def test_accuracy_over_many_videos_is_accuracy_of_all():
    generator = np.random.default_rng(0)
    videos = [generator.normal(size=(7, count)).astype(np.float32) for count in (1, 3, 49, 7)]
    labels = [0, 3, 6, 2]
    assert accuracy_over(zip(videos, labels, strict=True)) == rcu_ops.analysis.accuracy_report(videos, labels)


def test_dense_scores_must_be_per_frame(tmp_path):
    videos = VideoList("dense.csv", (LabelledVideo("v", "v"),))

    def score(source):
        return VideoResult({"sliding": np.zeros((2, 3), dtype=np.float32)}, np.arange(6.0), None)

    with pytest.raises(UserError, match="one score vector per frame, the network gives 3 for 6 frames"):
        evaluate(score, videos, DENSE, ["sliding"], tmp_path / "out", {})


def test_clips_of_dense_labels_are_scores_without_map(tmp_path):
    videos = VideoList("dense.csv", (LabelledVideo("v", "v", None, ((0, 0.0, 0.1),)),))
    clips, frames = np.ones((2, 3), dtype=np.float32), np.ones((2, 6), dtype=np.float32)

    def score(source):
        return VideoResult({"clips": clips, "sliding": frames}, np.arange(6.0), None)

    assert evaluate(score, videos, DENSE, ["clips", "sliding"], tmp_path, {}) == 0
    assert list(_summary(tmp_path)["map"]) == ["sliding"]
    assert scores_io.read_arrays(tmp_path / "scores_clips.npz")["v"].shape == (2, 3)


def test_an_interrupted_evaluation_goes_on(tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    first = Scorer(stop="c")
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, LIST, RECIPE, ["clips"], out, {"weights": "x"})
    assert first.calls == ["a", "b", "c"]
    assert not (out / "summary.json").exists()
    assert "2 videos are left" in capsys.readouterr().err
    second = Scorer()
    assert evaluate(second, LIST, RECIPE, ["clips"], out, {"weights": "x"}) == 3
    assert second.calls == ["c", "d"]
    assert "2 of 4 videos were done already" in capsys.readouterr().out
    evaluate(Scorer(), LIST, RECIPE, ["clips"], whole, {"weights": "x"})
    for name in ("scores_clips.npz", "labels.csv", "videos.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {**_summary(out), "seconds": 0} == {**_summary(whole), "seconds": 0}
    third = Scorer()
    assert evaluate(third, LIST, RECIPE, ["clips"], out, {"weights": "x"}) == 3
    assert third.calls == []
    assert "holds this evaluation already" in capsys.readouterr().out


def test_a_folder_holds_one_evaluation(tmp_path):
    evaluate(Scorer(), LIST, RECIPE, ["clips"], tmp_path, {"weights": "x", "crop": 112})
    with pytest.raises(UserError, match="holds an evaluation with another crop and weights; give another folder"):
        evaluate(Scorer(), LIST, RECIPE, ["clips"], tmp_path, {"weights": "y", "crop": 96})
    shorter = VideoList("list.csv", LIST.videos[:2])
    with pytest.raises(UserError, match="holds an evaluation with another list;"):
        evaluate(Scorer(), shorter, RECIPE, ["clips"], tmp_path, {"weights": "x", "crop": 112})


def test_not_one_usable_video_is_an_error(tmp_path):
    videos = VideoList("list.csv", (LabelledVideo("x", "x", 0), LabelledVideo("y", "y", 1)))
    with pytest.raises(UserError, match=r"list.csv: not one of its 2 videos can be used: x: no such file"):
        evaluate(Scorer(), videos, RECIPE, ["clips"], tmp_path, {})


def test_scores_that_are_not_finite_do_not_count(tmp_path):
    def score(source):
        values = np.full((3, 2), np.inf if source == "b" else 1.0, dtype=np.float32)
        return VideoResult({"clips": values}, np.arange(2.0), None)

    videos = VideoList("list.csv", LIST.videos[:2])
    assert evaluate(score, videos, RECIPE, ["clips"], tmp_path, {}) == 3
    assert _summary(tmp_path)["unusable"] == [{"video": "b", "reason": "b: the network's clips scores are not finite"}]


def _run(motion, trained, out, *options):
    return main([
        *("evaluate", "--weights", str(trained), "--videos", str(motion / "list.csv"), "--out", str(out)),
        *("--device", "cpu", *options),
    ])  # fmt: skip


def test_the_command_gives_the_accuracy_of_the_network(motion, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert _run(motion, trained, out) == 0
    summary = _summary(out)
    assert set(summary["accuracy"]) == {"clips", "unrolled"}
    assert summary["accuracy"]["clips"]["num_clips"] == 3 * VIDEOS
    assert summary["accuracy"]["unrolled"]["num_clips"] == FRAMES * VIDEOS
    assert summary["accuracy"]["unrolled"]["num_videos"] == VIDEOS
    # The same numbers from the pieces: whole videos through the network as it was trained.
    model = rcu_ops.create_model("rcn_resnet18", num_classes=2, width=4, layers=(1, 1, 1, 1), update="mean").eval()
    rcu_ops.load_weights(model, trained)
    exact = copy.deepcopy(model).double()
    transform = FrameTransform(32)
    stored = scores_io.read_scores(out / "scores_unrolled.npz").videos
    right = 0
    for row in _rows(motion / "list.csv"):
        clip = transform(read_frames(motion / row["path"], range(FRAMES)))[None]
        with torch.no_grad():
            scores = model.frame_scores(clip)[0]
        assert stored[row["path"]].scores.shape == (2, FRAMES)
        with torch.no_grad(), rcu_ops.use_backend("reference"):
            eager, exact_scores = model.frame_scores(clip)[0], exact.frame_scores(clip.double())[0]
        assert_close_to_reference(torch.from_numpy(stored[row["path"]].scores), exact_scores, eager, row["path"])
        right += int(scores.mean(1).argmax() == ("up", "down").index(row["label"]))
    assert summary["accuracy"]["unrolled"]["video_top1"] == right / VIDEOS
    assert _rows(out / "videos.csv")[1]["label"] == "down"
    assert _run(motion, trained, out, "--modes", "clips") == 2
    assert "holds an evaluation with another modes" in capsys.readouterr().err
    assert _run(motion, trained, out, "--modes", "clips", "--overwrite") == 0
    assert set(_summary(out)["accuracy"]) == {"clips"}
    assert not (out / "scores_unrolled.npz").exists()


def test_overwrite_replaces_evaluations_alone(motion, trained, tmp_path):
    (tmp_path / "parts").mkdir()
    mine = [tmp_path / name for name in ("scores_mine.npz", "notes.txt", "parts/of_mine.npz")]
    for path in mine:
        path.touch()
    command._remove_evaluation(tmp_path)  # there is none, so nothing is one's
    assert all(path.is_file() for path in mine)
    assert _run(motion, trained, tmp_path / "out", "--modes", "clips") == 0
    (tmp_path / "out" / "notes.txt").touch()
    assert _run(motion, trained, tmp_path / "out", "--modes", "sliding", "--overwrite") == 0
    names = ["labels.csv", "notes.txt", "scores_sliding.npz", "settings.json", "summary.json", "videos.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_the_command_on_dense_labels(motion, tiny, tmp_path):
    assert tiny(tmp_path / "run", "--iterations", "1", recipe="multithumos_resnet50") == 0
    out = tmp_path / "out"
    code = main([
        *("evaluate", "--weights", str(tmp_path / "run" / "checkpoint.pt"), "--videos", str(motion / "dense.csv")),
        *("--out", str(out), "--device", "cpu"),
    ])  # fmt: skip
    assert code == 0
    assert set(_summary(out)["map"]) == {"sliding", "unrolled"}
    labels = scores_io.read_arrays(out / "labels.npz")
    expected = np.zeros((2, FRAMES), dtype=bool)
    expected[0] = True
    expected[1, 4:8] = True
    assert len(labels) == VIDEOS
    for array in labels.values():
        np.testing.assert_array_equal(array, expected)
    assert _summary(out)["settings"]["period"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_command_in_mixed_precision(motion, trained, tmp_path, precision):
    out = tmp_path / precision
    assert _run(motion, trained, out, "--autocast", precision, "--modes", "clips,sliding,unrolled") == 0
    scores = scores_io.read_scores(out / "scores_unrolled.npz").videos
    assert all(video.scores.dtype == np.float32 for video in scores.values())


def test_one_bad_video_does_not_stop_the_command(motion, trained, tmp_path, capsys):
    rows = [str(motion / line) for line in (motion / "list.csv").read_text().splitlines()[1:4]]
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    (tmp_path / "list.csv").write_text("\n".join(["text.mp4,up", *rows]) + "\n")
    out = tmp_path / "out"
    assert main(["evaluate", "--weights", str(trained), "--videos", str(tmp_path / "list.csv"), "--out", str(out)]) == 3
    assert [entry["video"] for entry in _summary(out)["unusable"]] == ["text.mp4"]
    assert _summary(out)["videos"] == 3
    names = list(scores_io.read_scores(out / "scores_clips.npz").videos)
    assert names == [row.split(",")[0] for row in rows]  # absolute paths are names too
    assert "text.mp4" in capsys.readouterr().err


def test_weights_of_unknown_origin_need_a_recipe(motion, trained, tmp_path, capsys):
    plain = tmp_path / "plain.pt"
    torch.save(torch.load(trained.with_name("checkpoint.pt"), weights_only=True)["model"], plain)
    out = tmp_path / "out"
    assert _run(motion, plain, out) == 2
    assert "--recipe is missing" in capsys.readouterr().err
    options = [
        *("--recipe", "kinetics_resnet18", "--labels", str(motion / "labels.txt"), "--frames", "4", "--crop", "32"),
        *("--eval-scale", "32", "--eval-clips", "3", "--model-option", "width=4", "--model-option", "update=mean"),
    ]  # fmt: skip
    assert _run(motion, plain, out, *options) == 2
    assert "plain.pt does not fit the model" in capsys.readouterr().err
    assert _run(motion, plain, out, *options, "--model-option", "layers=[1,1,1,1]") == 0
    assert _run(motion, trained, tmp_path / "known") == 0
    assert (out / "scores_clips.npz").read_bytes() == (tmp_path / "known" / "scores_clips.npz").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "frames"], "modes: expected some of clips, sliding, unrolled, got frames"),
        (["--clip-batch", "0"], "--clip-batch: expected at least 1, got 0"),
        (["--crop", "64"], "--eval-scale: expected at least the crop 64, got 32"),
        (["--recipe", "kinetics"], "--recipe: there is no recipe named 'kinetics'"),
        (["--videos", "gone.csv"], "gone.csv: cannot be read: No such file or directory"),
        (["--weights", "gone.pt", "--recipe", "kinetics_resnet34"], "got 'up'"),
        (["--weights", "gone.pt"], "--weights: there is no file gone.pt"),
    ],
)
def test_bad_input_is_one_line(motion, trained, tmp_path, options, message, capsys):
    assert _run(motion, trained, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcu-ops: error: ")
    assert message in error
    assert error.count("\n") == 1
