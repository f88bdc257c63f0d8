from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("av")
pytest.importorskip("matplotlib")

import rcu_ops
from rcu_ops.cli import main
from rcu_ops.models import VideoResNet, registry
from rcu_ops.nn import RecurrentConv3d
from rcu_ops.recipes.checkpoint import RunSettings, save_weights
from rcu_ops.recipes.config import get_recipe
from rcu_ops.report import write_csv
from rcu_ops.stream_command import OUTPUT_NAMES
from rcu_ops.video import open_video
from rcu_ops.video.transform import FrameTransform
from tests.networks import small_model
from tests.video.clips import damage, write_audio, write_clip

MODEL = "one_layer"
SMALL = ["--size", "32"]
LABELS = ["juggling", "wrestling", "cooking"]


class OneLayer(nn.Module):
    """The smallest causal network: what is under test here is the command around it."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = RecurrentConv3d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm3d(8)
        self.head = RecurrentConv3d(8, num_classes, 1)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).relu().mean((3, 4), keepdim=True))[..., 0, 0]


@pytest.fixture(autouse=True)
def small_and_single_threaded(monkeypatch):
    monkeypatch.setitem(registry._BUILDERS, MODEL, OneLayer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip.mp4", 12)


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n")
    return path


def stream(*arguments):
    model = [] if "--model" in arguments else ["--model", MODEL]
    return main(["stream", *map(str, arguments), *model, *SMALL])


def lines_of(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def trained_weights(path, name=MODEL):
    """Weights as a training run would leave them: other than those of a fresh network."""
    model = rcu_ops.create_model(name, num_classes=len(LABELS))
    torch.save(model.state_dict(), path)
    return model.eval()


def softmax(scores):
    return torch.tensor(scores, dtype=torch.float64).softmax(-1).numpy()


def test_all_outputs(tmp_path, clip, labels, capsys):
    out = tmp_path / "out"
    assert stream(clip, "--labels", labels, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(OUTPUT_NAMES)

    lines = lines_of(out)
    assert [line["index"] for line in lines] == list(range(12))
    assert np.allclose([line["time"] for line in lines], 0.04 * np.arange(12))
    scores = np.array([line["scores"] for line in lines])
    assert scores.shape == (12, 3)
    for n, line in enumerate(lines):
        running, instant = softmax(scores[: n + 1].mean(axis=0)), softmax(scores[n])
        ranked = np.argsort(-running, kind="stable")
        assert [entry["class"] for entry in line["top"]] == ranked.tolist()
        assert [entry["label"] for entry in line["top"]] == [LABELS[c] for c in ranked]
        assert np.allclose([entry["score"] for entry in line["top"]], running[ranked], atol=1e-5)
        assert line["frame_top"]["class"] == instant.argmax()
        assert line["frame_top"]["score"] == pytest.approx(instant.max(), abs=1e-5)

    summary = summary_of(out)
    assert summary["status"] == "complete"
    assert (summary["frames"], summary["dropped_frames"], summary["classes"]) == (12, 0, 3)
    assert (summary["model"], summary["dtype"], summary["size"]) == (MODEL, "fp32", 32)
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p99"] <= summary["latency_ms"]["max"]
    assert summary["frames_per_second"] > 0
    assert summary["state_bytes"] > 0
    assert summary["top"] == lines[-1]["top"]
    assert summary["versions"]["torch"] == torch.__version__

    with open_video(out / "annotated.mp4") as reader:
        frames = list(reader)
    assert np.allclose([frame.time_seconds for frame in frames], 0.04 * np.arange(12), atol=1e-3)
    assert frames[0].image.shape[1] == 320
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")

    text = capsys.readouterr().out
    assert "12 frames in" in text
    assert "frames/s; latency p50" in text
    assert "0 frames dropped" in text


def test_scores_are_those_of_the_whole_clip(tmp_path, clip, labels):
    model = trained_weights(tmp_path / "weights.pt", "rcn_resnet18")
    out = tmp_path / "out"
    weights = ["--model", "rcn_resnet18", "--weights", tmp_path / "weights.pt"]
    assert stream(clip, "--labels", labels, *weights, "--out", out) == 0
    assert_scores_of_the_whole_clip(lines_of(out), model, clip)


def assert_scores_of_the_whole_clip(lines, model, clip):
    transform = FrameTransform(32)
    with open_video(clip) as reader:
        frames = torch.cat([transform(frame.image) for frame in reader], dim=1)[None]
    with torch.inference_mode():
        whole = model.float().frame_scores(frames)[0].T.double()
        exact = model.double().frame_scores(frames.double())[0].T
    streamed = torch.tensor([line["scores"] for line in lines], dtype=torch.float64)
    # Six digits are written; on top of them, what eager PyTorch itself is off by.
    tolerance = 2 * (whole - exact).abs().max() + exact.abs().max() * 1e-5
    assert (streamed - exact).abs().max() <= tolerance


class WholeClip(OneLayer):
    """Of a clip one vector of scores, as networks have that are not causal."""

    def forward(self, x):
        return super().forward(x)[..., -1]


def test_window(tmp_path, clip, labels, capsys, monkeypatch):
    monkeypatch.setitem(registry._BUILDERS, "whole_clip", WholeClip)
    model = trained_weights(tmp_path / "weights.pt", "whole_clip")
    weights = ["--model", "whole_clip", "--labels", labels, "--weights", tmp_path / "weights.pt"]
    assert stream(clip, *weights, "--window", 3, "--out", tmp_path / "out") == 0
    with open_video(clip) as reader:
        frames = torch.cat([FrameTransform(32)(frame.image) for frame in reader], dim=1)[None]
    with torch.inference_mode():
        want = torch.stack([model(frames[:, :, t - 3 : t])[0] for t in (3, 12)])
    lines = lines_of(tmp_path / "out")
    assert torch.allclose(torch.tensor([lines[2]["scores"], lines[11]["scores"]]), want, rtol=1e-4, atol=1e-5)
    assert summary_of(tmp_path / "out")["window"] == 3
    assert "window of 3 frames" in capsys.readouterr().out


def test_an_untrained_network_says_so_everywhere(tmp_path, clip, capsys):
    out = tmp_path / "out"
    assert stream(clip, "--out", out) == 0
    assert "untrained network" in capsys.readouterr().out
    assert all(line["untrained"] is True for line in lines_of(out))
    summary = summary_of(out)
    assert summary["untrained"] is True
    assert summary["weights"] == summary["weights_sha256"] == "untrained"
    assert summary["warning"] == "untrained network"
    assert summary["classes"] == 400
    assert stream(clip) == 0
    text = capsys.readouterr().out
    assert text.count("untrained network") >= 3


def test_a_trained_network_does_not(tmp_path, clip, labels, capsys):
    weights = tmp_path / "weights.pt"
    trained_weights(weights)
    out = tmp_path / "out"
    assert stream(clip, "--labels", labels, "--weights", weights, "--out", out) == 0
    assert "untrained" not in capsys.readouterr().out
    assert not any(line["untrained"] for line in lines_of(out))
    summary = summary_of(out)
    assert (summary["untrained"], summary["warning"]) == (False, None)
    assert summary["weights"] == str(weights)
    assert summary["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_the_same_untrained_network_every_time(tmp_path, clip):
    torch.manual_seed(1)
    assert stream(clip, "--out", tmp_path / "a") == 0
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert stream(clip, "--out", tmp_path / "b") == 0
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_say_what_they_were_trained_as(tmp_path, clip, monkeypatch):
    """The update of a recurrence does not show in the shapes of its weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    recipe = dataclasses.replace(get_recipe("kinetics_resnet34"), classes=len(LABELS))
    model = small_model("rcn_resnet34", classes=len(LABELS))
    settings = RunSettings(recipe, {"update": "mean", "width": 4}, tuple(LABELS))
    save_weights(tmp_path / "weights.safetensors", model, settings)
    file = tmp_path / "weights.safetensors"
    cases = ("mean", file, []), ("mean", file.as_uri(), []), ("sum", file, ["--model-option", "update=sum"])
    for number, (update, weights, more) in enumerate(cases):
        out = tmp_path / str(number)
        arguments = ["stream", clip, "--weights", weights, *SMALL, "--out", out, *more]
        assert main([str(argument) for argument in arguments]) == 0
        for module in model.modules():
            if isinstance(module, RecurrentConv3d):
                module.update = update
        assert summary_of(out)["model"] == "rcn_resnet34"
        lines = lines_of(out)
        assert {entry["label"] for entry in lines[0]["top"]} == set(LABELS)
        assert_scores_of_the_whole_clip(lines, model, clip)


def test_weights_of_an_image_network_leave_the_recurrence_untrained(tmp_path, clip, capsys):
    """Every output says so: such scores are no evidence of anything."""
    image_network = VideoResNet("basic", (2, 2, 2, 2), "2d", 3, width=4).state_dict()
    names = (("stem.conv", "conv1"), ("stem.bn", "bn1"), ("head.conv", "fc"))
    weights = {}
    for name, value in image_network.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        weights[name] = value.flatten(1) if name == "fc.weight" else value.squeeze(2) if value.dim() == 5 else value
    torch.save(weights, tmp_path / "resnet18.pth")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    arguments = ["--model", "rcn_resnet18", "--model-option", "width=4", "--weights", tmp_path / "resnet18.pth"]
    arguments += ["--labels", tmp_path / "labels.txt", "--max-frames", "2"]
    assert stream(clip, *arguments, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert f"weights {tmp_path / 'resnet18.pth'}, recurrent weights untrained" in text
    assert text.count("recurrent weights untrained") == 2  # and with the leading classes
    summary = summary_of(tmp_path / "out")
    assert (summary["untrained"], summary["warning"]) == (False, "recurrent weights untrained")


@pytest.mark.parametrize(("room", "file"), [(1000, ""), (5000, "/annotated.mp4")])
def test_a_full_disk(tmp_path, clip, labels, capsys, room, file):
    """The scores do not fit, or they do and the video does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        code = stream(clip, "--labels", labels, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert capsys.readouterr().err == f"rcu-ops: error: {tmp_path / 'out'}{file}: cannot be written: File too large\n"
    left = [path.name for path in tmp_path.glob("out/*")]
    assert left == (["scores.jsonl"] if file else [])
    assert (tmp_path / "out").exists() is bool(left)


def test_without_a_source_a_sample_is_streamed(capsys):
    assert main(["stream", "--size", "16", "--max-frames", "5", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sample clip: 320x240, h264, 25 frames/s")
    assert "rcn_resnet18 (untrained network" in text
    assert "5 frames in" in text
    assert "video so far" in text
    assert "0.16 s        4   class" in text


def test_every_and_max_frames(tmp_path, clip):
    assert stream(clip, "--every", 3, "--max-frames", 3, "--out", tmp_path / "out") == 0
    assert [line["index"] for line in lines_of(tmp_path / "out")] == [0, 3, 6]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dtypes(tmp_path, clip, dtype):
    assert stream(clip, "--dtype", dtype, "--max-frames", 4, "--out", tmp_path / "out") == 0
    assert summary_of(tmp_path / "out")["dtype"] == dtype
    assert np.isfinite([line["scores"] for line in lines_of(tmp_path / "out")]).all()


def test_top(tmp_path, clip, labels):
    assert stream(clip, "--labels", labels, "--top", 2, "--max-frames", 1, "--out", tmp_path / "a") == 0
    assert len(lines_of(tmp_path / "a")[0]["top"]) == 2
    assert stream(clip, "--labels", labels, "--top", 50, "--max-frames", 1, "--out", tmp_path / "b") == 0
    assert len(lines_of(tmp_path / "b")[0]["top"]) == 3


def test_the_table_shows_the_scores(tmp_path, clip, labels, capsys):
    """The last frame's line and the summary's say what scores.jsonl says."""
    names = ["juggling with five burning torches", "wrestling", "cooking"]
    labels.write_text("\n".join(names))
    trained_weights(tmp_path / "weights.pt")
    arguments = [clip, "--labels", labels, "--weights", tmp_path / "weights.pt", "--top", "2"]
    assert stream(*arguments, "--out", tmp_path / "out") == 0
    last = lines_of(tmp_path / "out")[-1]
    capsys.readouterr()
    assert stream(*arguments) == 0
    *_, shown, _, video = capsys.readouterr().out.splitlines()

    def cell(entry, name):
        return f"{name} {100 * entry['score']:.1f} %"

    short = {names[0]: "juggling with five burn…"}
    cells = [cell(entry, short.get(entry["label"], entry["label"])) for entry in (last["top"][0], last["frame_top"])]
    assert " ".join(shown.split()) == " ".join(["0.44 s 11", *cells])
    assert video == "video: " + ", ".join(cell(entry, entry["label"]) for entry in last["top"])


def test_realtime_drops_rather_than_lags(tmp_path, monkeypatch, capsys):
    from rcu_ops import stream_command

    path = write_clip(tmp_path / "long.mp4", times=[20 * n for n in range(60)])
    step = stream_command._Network.__call__

    def slow(network, image):
        time.sleep(0.08)
        return step(network, image)

    monkeypatch.setattr(stream_command._Network, "__call__", slow)
    assert stream(path, "--realtime", "--out", tmp_path / "out") == 0
    summary = summary_of(tmp_path / "out")
    indices = [line["index"] for line in lines_of(tmp_path / "out")]
    assert summary["dropped_frames"] > 0
    assert summary["frames"] + summary["dropped_frames"] == 60
    assert indices == sorted(set(indices))
    assert indices[-1] == 59
    # All of it at 0.08 s a frame would take almost five seconds.
    assert summary["seconds"] < 4
    assert summary["lag_ms"]["p50"] >= 80
    text = capsys.readouterr().out
    assert f"{summary['dropped_frames']} frames dropped" in text
    assert "behind the clock p50" in text


def test_realtime_paces_a_file_by_its_time_stamps(tmp_path):
    path = write_clip(tmp_path / "slow.mp4", times=[0, 300, 600])
    assert stream(path, "--realtime", "--out", tmp_path / "out") == 0
    summary = summary_of(tmp_path / "out")
    assert (summary["frames"], summary["dropped_frames"]) == (3, 0)
    assert summary["seconds"] >= 0.6


def test_times_are_those_of_the_last_frames():
    from rcu_ops.stream_command import _Recent

    recent = _Recent(4)
    assert set(recent.milliseconds().values()) == {0.0}
    for seconds, expected in (
        (9.0, {"p50": 9000, "p99": 9000, "mean": 9000, "max": 9000}),
        (1.0, {"p50": 5000, "p99": 8920, "mean": 5000, "max": 9000}),
        (2.0, None),
        (3.0, {"p50": 2500, "p99": 8820, "mean": 3750, "max": 9000}),
        (4.0, {"p50": 2500, "p99": 3970, "mean": 2500, "max": 4000}),  # the first has gone
        (5.0, {"p50": 3500, "p99": 4970, "mean": 3500, "max": 5000}),
        (6.0, None),
        (7.0, None),
        (0.0, {"p50": 5500, "p99": 6970, "mean": 4500, "max": 7000}),  # all places have been taken twice
    ):
        recent.append(seconds)
        assert expected is None or recent.milliseconds() == pytest.approx(expected)


# What cannot be used: exit 2, one line, nothing left behind


def fails(capsys, *arguments):
    capsys.readouterr()
    assert stream(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rcu-ops: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_sources_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("text")
    sound = write_audio(tmp_path / "sound.m4a")
    out = tmp_path / "out"
    for source, complaint in {
        tmp_path / "missing.mp4": "no such file",
        tmp_path / "empty.mp4": "the file is empty",
        tmp_path / "text.mp4": "not a video file",
        sound: "sound but no video",
        "webcam:97": "no such webcam",
    }.items():
        assert complaint in fails(capsys, source, "--out", out)
        assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--every", "0"], "--every: expected at least 1, got 0"),
        (["--max-frames", "0"], "--max-frames: expected at least 1, got 0"),
        (["--top", "-1"], "--top: expected at least 1, got -1"),
        (["--device", "nonsense"], "--device: nonsense cannot be used"),
        (["--device", "cuda:97"], "--device: cuda:97 cannot be used"),
        (["--model", "rcn_resnet19"], "error: --model: there is no model named 'rcn_resnet19'"),
        (["--model", "i3d_resnet18"], "error: --model i3d_resnet18: cannot run frame by frame"),
        (["--model", "res_lstm"], "error: --model res_lstm: x: expected [N,T,F]"),
        (["--model", "rcn_resnet18", "--model-option", "x=1"], "error: --model rcn_resnet18: it has no argument 'x'"),
        (
            ["--model", "rcn_resnet18", "--model-option", "width=0"],
            "--model rcn_resnet18: width: expected a whole number",
        ),
        (["--model", "rcn_resnet18", "--model-option", "layers=3"], "one of its arguments has a value of another kind"),
        (["--model-option", "num_classes=3"], "--model-option: num_classes is set by --labels"),
        (["--model-option", "x"], "--model-option: expected NAME=VALUE, got 'x'"),
        (["--weights", "/nowhere/weights.pt"], "error: --weights: there is no file /nowhere/weights.pt"),
        (["--weights-sha256", "0" * 64], "--weights-sha256: there are no --weights"),
        (["--labels", "/nowhere/labels.txt"], "--labels: /nowhere/labels.txt cannot be read"),
    ],
)
def test_arguments_that_cannot_be_used(tmp_path, clip, capsys, arguments, complaint):
    out = tmp_path / "out"
    error = fails(capsys, clip, *arguments, "--out", out)
    assert complaint in error
    assert len(error) < 600
    assert not out.exists()


def test_a_backend_that_cannot_run(tmp_path, clip, capsys):
    with rcu_ops.use_backend("cuda"):
        assert "backend 'cuda' cannot run recurrent_conv" in fails(capsys, clip, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit(tmp_path, clip, capsys):
    trained_weights(tmp_path / "weights.pt")
    file = ["--weights", tmp_path / "weights.pt"]
    assert "is of 3 classes, the network of 400; --labels sets it" in fails(capsys, clip, *file)
    assert "does not fit the model" in fails(capsys, clip, *file, "--model", "rcn_resnet18")
    assert "error: --weights-sha256: expected 0000" in fails(capsys, clip, *file, "--weights-sha256", "0" * 64)


@pytest.mark.filterwarnings("error")
def test_any_name_may_stand_in_the_pictures(tmp_path, clip, labels):
    labels.write_text("$^ \\x$\n影片\n😀\n", encoding="utf-8")
    odd = clip.rename(tmp_path / "ä$^b$ $\\x$ 影片.mp4")
    assert stream(odd, "--labels", labels, "--out", tmp_path / "out") == 0
    assert {entry["label"] for entry in summary_of(tmp_path / "out")["top"]} == {"$^ \\x$", "影片", "😀"}


def test_names_that_the_terminal_cannot_show(tmp_path, clip, labels):
    """Neither a file's name that is no UTF-8 nor an output that takes ASCII alone costs a run its results."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    clip.rename(odd)
    labels.write_text("影片\nключ\n", encoding="utf-8")
    arguments = [odd, "--labels", labels, "--model", MODEL, *SMALL, "--out", tmp_path / "out"]
    with (tmp_path / "printed").open("w", encoding="ascii") as printed, contextlib.redirect_stdout(printed):
        assert main(["stream", *map(str, arguments)]) == 0
    assert "\\u5f71\\u7247" in (tmp_path / "printed").read_text()
    assert summary_of(tmp_path / "out")["source"] == odd
    write_csv(tmp_path / "index.csv", ("video",), [(odd,)])
    assert b"caf\xe9" in (tmp_path / "index.csv").read_bytes()


def test_labels_that_cannot_be_used(tmp_path, clip, capsys):
    labels = tmp_path / "labels.txt"
    for text, complaint in {"": "the file is empty", "a\n\nb\n": "line 2 is empty"}.items():
        labels.write_text(text)
        assert complaint in fails(capsys, clip, "--labels", labels)
    labels.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in fails(capsys, clip, "--labels", labels)


def test_labels_of_any_script(tmp_path, clip):
    labels = tmp_path / "labels.txt"
    labels.write_text("﻿Tanzen (Paar)\r\nключ\r\na\u2028b\r\n", encoding="utf-8")
    assert stream(clip, "--labels", labels, "--max-frames", 2, "--out", tmp_path / "out") == 0
    assert {entry["label"] for entry in lines_of(tmp_path / "out")[0]["top"]} == {"Tanzen (Paar)", "ключ", "a\u2028b"}


def test_a_folder_with_something_in_it(tmp_path, clip, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert stream(clip, "--max-frames", 1, "--out", out) == 0
    before = (out / "scores.jsonl").read_bytes()
    assert "is not empty; give another folder, or --overwrite" in fails(capsys, clip, "--out", out)
    assert (out / "scores.jsonl").read_bytes() == before
    (out / "mine.txt").write_text("keep")
    assert stream(clip, "--max-frames", 2, "--out", out, "--overwrite") == 0
    assert len(lines_of(out)) == 2
    assert sorted(path.name for path in out.iterdir()) == sorted([*OUTPUT_NAMES, "mine.txt"])
    assert "is a file; expected a folder" in fails(capsys, clip, "--out", clip)


def test_a_place_that_cannot_be_written(clip, capsys):
    assert "cannot be written" in fails(capsys, clip, "--out", "/proc/nowhere/out")


# What ends half-way: results up to there are kept


def assert_whole(out, frames, status):
    """All four files are there, finished, and hold so many frames."""
    assert sorted(path.name for path in out.iterdir()) == sorted(OUTPUT_NAMES)
    assert [line["index"] for line in lines_of(out)] == list(range(frames))
    with open_video(out / "annotated.mp4") as reader:
        assert len(list(reader)) == frames
    summary = summary_of(out)
    assert (summary["frames"], summary["status"]) == (frames, status)
    return summary


def breaking_clip(path):
    """Twelve frames 0.15 s apart, of which the eighth is damaged."""
    write_clip(path, options={"bf": "0", "g": "4"}, times=[150 * n for n in range(12)])
    damage(path, 7)
    return path


def test_a_source_that_breaks(tmp_path, capsys):
    path = breaking_clip(tmp_path / "clip.mp4")
    out = tmp_path / "out"
    assert stream(path, "--out", out) == 3
    summary = assert_whole(out, 7, "broken")
    assert "broke at frame 7" in summary["problem"]
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"rcu-ops: error: {path}: broke at frame 7 (after 0.900 s): ")
    assert error.endswith("the results of 7 frames are kept")


def test_a_source_that_breaks_in_real_time(tmp_path, capsys):
    out = tmp_path / "out"
    assert stream(breaking_clip(tmp_path / "clip.mp4"), "--realtime", "--out", out) == 3
    summary = summary_of(out)
    assert summary["status"] == "broken"
    assert summary["frames"] + summary["dropped_frames"] == 7
    assert [line["index"] for line in lines_of(out)][-1] == 6
    assert "broke at frame 7" in capsys.readouterr().err


def test_scores_that_overflow(tmp_path, clip, monkeypatch, capsys):
    from rcu_ops import stream_command

    step = stream_command._Network.__call__
    calls = iter(range(1000))

    def overflowing(network, image):
        return step(network, image) * (np.inf if next(calls) == 2 + 5 else 1)  # after two frames of warm-up

    monkeypatch.setattr(stream_command._Network, "__call__", overflowing)
    assert stream(clip, "--dtype", "fp16", "--out", tmp_path / "out") == 1
    assert_whole(tmp_path / "out", 5, "not finite")
    assert "the scores of frame 5 are not finite in fp16; try --dtype bf16 or fp32" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="interrupts as POSIX has them")
def test_an_interrupt(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", times=[100 * n for n in range(600)])
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "rcu_ops", "stream", path, "--realtime", "--out", out, *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while sum(len(file.read_text().splitlines()) for file in out.glob(".scores*")) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    summary = summary_of(out)
    assert summary["status"] == "interrupted"
    assert sorted(file.name for file in out.iterdir()) == sorted(OUTPUT_NAMES)
    assert len(lines_of(out)) == summary["frames"] >= 3
    with open_video(out / "annotated.mp4") as reader:
        assert len(list(reader)) == summary["frames"]
    assert f"interrupted; the results of {summary['frames']} frames are kept" in error
    assert "Traceback" not in error


def test_a_failure_leaves_nothing_behind(tmp_path, clip, monkeypatch):
    from rcu_ops.video.draw import ScorePanel

    calls = iter(range(100))
    draw = ScorePanel.draw

    def failing(panel, image, **arguments):
        if next(calls) == 3:
            raise RuntimeError("a fault of our own")
        return draw(panel, image, **arguments)

    monkeypatch.setattr(ScorePanel, "draw", failing)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        stream(clip, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_it_needs_is_named_when_missing(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'rcu-ops[plot]'" in fails(capsys, clip, "--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'rcu-ops[video]'" in fails(capsys, clip)


def test_an_interrupt_waits_for_the_frame_and_a_second_one_does_not():
    from rcu_ops.stream_command import _DeferredInterrupt

    steps = []
    before = signal.getsignal(signal.SIGINT)  # a shell ignores it for what it runs in the background
    with _DeferredInterrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("the frame is finished")
        with pytest.raises(KeyboardInterrupt), interrupt.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            steps.append("not reached")
    assert steps == ["the frame is finished"]
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_of_the_main_thread_interrupts_are_left_alone():
    from rcu_ops.stream_command import _DeferredInterrupt

    before, steps = signal.getsignal(signal.SIGINT), []

    def work():
        with _DeferredInterrupt() as interrupt, interrupt.deferred():
            steps.append(signal.getsignal(signal.SIGINT) is before)
        steps.append("left")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert steps == [True, "left"]


# ---- networks of clips ----------------------------------------------------------------------------------------------

CLIPS = [
    *("--model", "faster16", "--model-option", "width=4", "--model-option", "clip_length=8"),
    *("--model-option", "pattern=1"),
]


def test_networks_of_clips(tmp_path, labels, capsys):
    out = tmp_path / "out"
    path = write_clip(tmp_path / "clip.mp4", 27)
    assert stream(path, *CLIPS, "--labels", labels, "--out", out) == 0
    lines, summary = lines_of(out), summary_of(out)
    assert [line["index"] for line in lines] == list(range(7, 27))  # from the first clip's last frame on
    assert [line["clips"] for line in lines] == [1] * 8 + [2] * 8 + [3] * 4
    assert (summary["clips"], summary["frames"]) == (3, 27)
    with open_video(out / "annotated.mp4") as annotated:
        assert sum(1 for _ in annotated) == 27  # those before the first prediction, too
    assert lines[0]["gmac"] < lines[8]["gmac"] < lines[-1]["gmac"] == summary["gmac"]
    assert all("frame_top" not in line for line in lines)  # nothing is said of a frame alone
    assert "3 clips" in capsys.readouterr().out
    # The same clips by hand.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = rcu_ops.create_model("faster16", num_classes=3, width=4, clip_length=8, pattern=1).eval()
    transform = FrameTransform(32)
    with open_video(path) as reader:
        frames = torch.cat([transform(frame.image) for frame in reader], dim=1)[None]
    with torch.no_grad():
        expected = model.clip_scores(frames[:, :, :24])[0]
    got = np.asarray([lines[k]["scores"] for k in (0, 8, 16)]).T
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert summary["state_bytes"] < 4 * 3 * 8 * 32 * 32 + 4 * 128 * 16 + 64  # at most a clip and the aggregator's state


def test_the_table_of_clips_shows_their_cost(tmp_path, capsys):
    assert stream(write_clip(tmp_path / "clip.mp4", 17), *CLIPS) == 0
    lines = capsys.readouterr().out.splitlines()
    (heading,) = (line for line in lines if "video so far" in line)
    assert "cost so far" in heading and "this frame" not in heading
    assert any(line.endswith("GMAC") and "2 clips" in line and line.count("%") == 1 for line in lines)


def test_video_shorter_than_a_clip(tmp_path, capsys):
    out = tmp_path / "out"
    assert stream(write_clip(tmp_path / "clip.mp4", 5), *CLIPS, "--out", out) == 2
    assert "5 frames, fewer than the 8 of one clip" in capsys.readouterr().err
    assert not out.exists()
