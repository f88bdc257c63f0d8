from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rcu_ops
from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.models import registry
from rcu_ops.recipes import checkpoint as checkpoints
from rcu_ops.recipes import get_recipe
from rcu_ops.recipes import train as module
from rcu_ops.recipes.checkpoint import load_checkpoint, read_settings
from rcu_ops.recipes.dataset import ClipDataset, ClipSampler, mix_seed
from rcu_ops.recipes.lists import read_list
from rcu_ops.recipes.signals import signals_received
from rcu_ops.recipes.train import ClipLoss
from tests.recipes.motion import TINY, VIDEOS
from tests.tolerance import assert_close_to_reference


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _weights(out):
    return load_checkpoint(out / "checkpoint.pt")["model"]


def _assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_loss_falls_where_only_motion_tells_the_classes_apart(tiny, tmp_path, capsys):
    options = ("--iterations", "40", "--batch", "8", "--lr", "0.02", "--log-every", "10", "--save-every", "40")
    assert tiny(tmp_path, *options, "--model-option", "width=8") == 0
    rows = _rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.6 * losses[0]
    assert float(rows[-1]["top1"]) > 0.75
    assert (tmp_path / "loss.png").stat().st_size > 0
    out = capsys.readouterr().out
    assert "40 steps done" in out
    assert "note: untrained; the paper starts from ImageNet weights" in out


KILLED = """
import os, signal, sys
from rcu_ops.cli import main
from rcu_ops.recipes import train
take_step = train.Training._take_step

def die(self, batches, stop):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)  # two steps after the checkpoint
    return take_step(self, batches, stop)

train.Training._take_step = die
main(sys.argv[1:])
"""


def test_a_killed_run_resumes_to_the_same_weights(tiny, motion, tmp_path):
    options = ("--iterations", "7", "--save-every", "3", "--log-every", "2", "--milestones", "4", "--seed", "3")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    dropout = ("--model-option", "dropout=0.5")  # random numbers of torch's own generator
    assert tiny(whole, *options, *dropout) == 0
    command = [
        *("train", "--recipe", "kinetics_resnet18", "--train", str(motion / "list.csv")),
        *("--labels", str(motion / "labels.txt"), "--out", str(killed), *TINY, *options, *dropout),
    ]  # fmt: skip
    # Sums are taken in the same order on the same number of threads only.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", KILLED, *command], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert load_checkpoint(killed / "checkpoint.pt")["step"] == 3
    torch.manual_seed(123)  # whatever the resuming process has drawn before
    assert tiny(killed, *options, *dropout, "--resume") == 0
    _assert_same(_weights(killed), _weights(whole))
    first, second = (load_checkpoint(out / "checkpoint.pt")["optimizer"]["state"] for out in (whole, killed))
    assert all(torch.equal(first[key]["momentum_buffer"], second[key]["momentum_buffer"]) for key in first)
    columns = ("step", "lr", "loss", "top1")
    assert [[row[c] for c in columns] for row in _rows(killed / "metrics.csv")] == [
        [row[c] for c in columns] for row in _rows(whole / "metrics.csv")
    ]
    leftovers = [path.name for path in killed.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_the_seed_decides_everything(tiny, tmp_path):
    options = ("--iterations", "2")
    assert tiny(tmp_path / "a", *options) == tiny(tmp_path / "b", *options) == 0
    assert tiny(tmp_path / "c", *options, "--seed", "1") == 0
    _assert_same(_weights(tmp_path / "a"), _weights(tmp_path / "b"))
    different = _weights(tmp_path / "c")
    assert any(not torch.equal(tensor, different[name]) for name, tensor in _weights(tmp_path / "a").items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tiny, tmp_path, monkeypatch, capsys, number):
    gradients = module.Training._gradients

    def interrupted(self, batches, stop):
        if self.step == 1:
            signal.raise_signal(number)
        return gradients(self, batches, stop)

    monkeypatch.setattr(module.Training, "_gradients", interrupted)
    before = signal.getsignal(number)
    options = ("--iterations", "5", "--save-every", "100")
    # The signal arrives within step 1, after it was asked whether to stop; the answer is at the end of step 2.
    assert tiny(tmp_path, *options) == 128 + number
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert "stopped at step 3 of 5; --resume goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert tiny(tmp_path, *options, "--resume") == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    forward = ClipLoss.forward

    def overflow(self, frames, target):
        loss, correct = forward(self, frames, target)
        self.calls = getattr(self, "calls", 0) + 1
        return (loss * float("nan") if self.calls == 4 else loss), correct

    monkeypatch.setattr(ClipLoss, "forward", overflow)
    assert tiny(tmp_path, "--iterations", "9", "--save-every", "2") == 1
    error = capsys.readouterr().err
    assert "rcu-ops: error: the loss is nan at step 3; the checkpoint of step 2 is kept; a lower --lr may help" in error
    held = load_checkpoint(tmp_path / "checkpoint.pt")
    assert held["step"] == 2
    assert all(tensor.isfinite().all() for tensor in held["model"].values())
    assert not (tmp_path / "weights.safetensors").exists()


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path, monkeypatch, capsys):
    forward = ClipLoss.forward

    def steep(self, frames, target):
        loss, correct = forward(self, frames, target)
        self.calls = getattr(self, "calls", 0) + 1
        return (loss * 1e30 if self.calls == 3 else loss), correct  # finite, but no weight survives its gradient

    monkeypatch.setattr(ClipLoss, "forward", steep)
    assert tiny(tmp_path, "--iterations", "4", "--save-every", "1", "--milestones", "2", "--lr-factor", "1e30") == 1
    error = capsys.readouterr().err
    assert "the network holds values that are not finite after step 3; the checkpoint of step 2 is kept" in error
    held = load_checkpoint(tmp_path / "checkpoint.pt")
    assert held["step"] == 2
    assert all(tensor.isfinite().all() for tensor in held["model"].values())


def _list_with(motion, folder, *extra):
    rows = [f"{motion / line}" for line in (motion / "list.csv").read_text().splitlines()[1:]]
    path = folder / "mixed.csv"
    path.write_text("\n".join([*extra, *rows]) + "\n")
    return path


def test_a_broken_video_does_not_stop_training(tiny, motion, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    mixed = _list_with(motion, tmp_path, "text.mp4,up", "gone.mp4,down")
    out = tmp_path / "out"
    assert tiny(out, "--iterations", "6", "--val", str(mixed), videos=mixed) == 3
    error = capsys.readouterr().err
    assert error.count("text.mp4: ") == 1  # once when it is met; the list at the end names it without a reason
    assert "could not be used, in whole or in part: 2 " in error
    rows = _rows(out / "broken_videos.csv")
    assert [row["video"] for row in rows] == ["gone.mp4", "text.mp4"]
    assert "no such file" in rows[0]["reason"]
    assert int(_rows(out / "metrics.csv")[-1]["step"]) == 6
    assert int(_rows(out / "validation.csv")[-1]["videos"]) == VIDEOS


def test_a_list_of_broken_videos_is_an_error(tiny, tmp_path, capsys):
    path = tmp_path / "list.csv"
    path.write_text("a.mp4,up\nb.mp4,down\n")
    assert tiny(tmp_path / "out", videos=path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"rcu-ops: error: {path}: not one of its 2 videos can be used: ")
    assert "no such file" in last


def test_a_validation_list_of_broken_videos_is_an_error(tiny, tmp_path, capsys):
    path = tmp_path / "val.csv"
    path.write_text("a.mp4,up\n")
    assert tiny(tmp_path / "out", "--iterations", "1", "--val", str(path)) == 2
    assert f"{path}: not one of its 1 videos can be used" in capsys.readouterr().err


def test_validation_is_evaluation(tiny, motion, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--iterations", "2", "--val", str(motion / "list.csv"), "--save-every", "1")
    assert tiny(out, *options) == 0
    rows = _rows(out / "validation.csv")
    assert [row["step"] for row in rows] == ["1", "2"]
    assert "step 2: validation video_top1" in capsys.readouterr().out
    code = main([
        *("evaluate", "--weights", str(out / "weights.safetensors"), "--videos", str(motion / "list.csv")),
        *("--out", str(tmp_path / "eval"), "--modes", "clips", "--device", "cpu"),
    ])  # fmt: skip
    assert code == 0
    accuracy = json.loads((tmp_path / "eval" / "summary.json").read_text())["accuracy"]["clips"]
    for name in ("video_top1", "video_top5", "clip_top1", "clip_top5"):
        assert float(rows[-1][name]) == accuracy[name]
    assert int(rows[-1]["videos"]) == VIDEOS
    best = max(rows, key=lambda row: float(row["video_top1"]))
    assert load_checkpoint(out / "checkpoint.pt")["best"] == float(best["video_top1"])
    assert read_settings(out / "best.safetensors").recipe.frames == 4


def test_the_best_weights_are_those_of_the_greatest_score(tiny, motion, tmp_path, monkeypatch):
    held, scores = [], [0.25, 0.75, 0.5, 0.75, 0.6]
    accuracy = module.accuracy_over

    def graded(found):
        return dataclasses.replace(accuracy(found), video_top1=scores[len(held)])

    def validated(self, found):
        take_validation(self, found)
        held.append({name: value.clone() for name, value in self.model.state_dict().items()})

    take_validation = module.Training._take_validation
    monkeypatch.setattr(module, "accuracy_over", graded)
    monkeypatch.setattr(module.Training, "_take_validation", validated)
    (tmp_path / "val.csv").write_text(f"{motion / 'up_0.mp4'},up\n")
    options = ("--val", str(tmp_path / "val.csv"), "--batch", "1", "--eval-clips", "1", "--save-every", "1")
    for iterations in ("3", "5"):  # and what was the best stays so when the run is resumed
        assert tiny(tmp_path, *options, "--iterations", iterations, "--resume") == 0
        _assert_same(load_file(tmp_path / "best.safetensors"), held[1])
    assert [float(row["video_top1"]) for row in _rows(tmp_path / "validation.csv")] == scores


def test_dense_labels_train_and_validate_per_frame(tiny, motion, tmp_path):
    options = ("--iterations", "2", "--val", str(motion / "dense.csv"))
    assert tiny(tmp_path, *options, recipe="multithumos_resnet50") == 0
    (row,) = _rows(tmp_path / "metrics.csv")
    assert "top1" not in row
    assert 0.3 < float(row["loss"]) < 1.5
    (row,) = _rows(tmp_path / "validation.csv")
    assert 0 < float(row["map@8"]) <= 1


def test_dense_labels_need_a_score_for_every_frame(tiny, tmp_path, capsys):
    options = ("--model", "i3d_resnet18", "--model-option", "update=sum", "--iterations", "1", "--frames", "8")
    strided = [*options, "--model-option", "temporal_strides=[1,2,1,1]"]
    assert tiny(tmp_path, *strided, recipe="multithumos_resnet50") == 2
    assert "dense labels need one score vector per frame, [4, 2, 8], got [4, 2, 4]" in capsys.readouterr().err


class FrameMeans(nn.Module):
    """A causal network without batch statistics: one linear map of every frame's mean colour."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Conv3d(3, num_classes, 1)

    def frame_scores(self, clip):
        return self.head(clip.mean((3, 4), keepdim=True)).flatten(2)

    def forward(self, clip):
        return self.frame_scores(clip).mean(2)


@pytest.mark.parametrize("dense", [False, True])
def test_clip_loss_is_the_textbook_loss(dense):
    model = FrameMeans(5).double()
    frames = torch.randint(256, (3, 4, 6, 7, 3), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    clip = ((frames.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    scores = model.frame_scores(clip)
    if dense:
        target = (torch.rand(3, 5, 4) < 0.3).double()
        p = torch.sigmoid(scores)
        exact = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
        right = 0
    else:
        target = torch.randint(5, (3,))
        clip_scores = scores.mean(2)
        exact = -(clip_scores.log_softmax(1)[torch.arange(3), target]).mean()
        right = int((clip_scores.argmax(1) == target).sum())
    single = model.float()
    loss, correct = ClipLoss(single, dense)(frames, target.float() if dense else target)
    function = nn.functional.binary_cross_entropy_with_logits if dense else nn.functional.cross_entropy
    eager_scores = single.frame_scores(clip.float()) if dense else single(clip.float())
    eager = function(eager_scores, target.float() if dense else target)
    assert_close_to_reference(loss.detach(), exact.detach(), eager.detach())
    assert int(correct) == right


DISTRIBUTED = """
import sys
from rcu_ops.cli import main
from tests.recipes.test_train import frame_means_model
with frame_means_model():
    sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def frame_means_model():
    """The network under a name, for the time of the block."""
    registry.register_model("frame_means")(FrameMeans)
    try:
        yield
    finally:
        del registry._BUILDERS["frame_means"]


def test_processes_and_parts_share_a_batch(motion, tmp_path):
    """Without batch statistics, one process, one with two parts, and two with two each differ by rounding only."""
    options = [
        *("train", "--recipe", "kinetics_resnet18", "--model", "frame_means", "--train", str(motion / "list.csv")),
        *("--val", str(motion / "list.csv"), "--labels", str(motion / "labels.txt")),
        *(*TINY[: TINY.index("--model-option")], "--workers", "0", "--device", "cpu", "--iterations", "4"),
        *("--lr", "0.1"),
    ]  # fmt: skip
    with frame_means_model():
        assert main([*options, "--out", str(tmp_path / "one")]) == 0
        assert main([*options, "--out", str(tmp_path / "parts"), "--accumulate", "2"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun sets them
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, *options, "--accumulate", "2", "--out", str(tmp_path / "two")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "4 steps done" in said[0]
    assert "steps done" not in said[1]
    one, parts, two = (_weights(tmp_path / name) for name in ("one", "parts", "two"))
    start = _initial_frame_means()
    for name in one:
        exact = _four_steps_exactly(motion, name)
        assert (one[name] - start[name]).abs().max() > 0
        for other in (parts, two):
            assert_close_to_reference(other[name], exact, one[name], name)
    tables = [_rows(tmp_path / name / "validation.csv") for name in ("one", "parts", "two")]
    assert tables[0] == tables[1] == tables[2]
    (first, *others) = (_rows(tmp_path / name / "metrics.csv")[-1] for name in ("one", "parts", "two"))
    for other in others:
        assert float(other["loss"]) == pytest.approx(float(first["loss"]), rel=1e-5)
        assert other["top1"] == first["top1"]


def _four_steps_exactly(motion, name):
    """The same four steps in double precision, written out."""
    recipe = dataclasses.replace(
        get_recipe("kinetics_resnet18"), classes=2, frames=4, crop=32, scales=(32, 36), eval_scale=32, batch=4, lr=0.1
    )
    videos = read_list(motion / "list.csv", 2, ("up", "down")).videos
    data = ClipDataset(videos, recipe, seed=0)
    model = FrameMeans(2)
    model.load_state_dict(_initial_frame_means())
    model.double()
    velocity = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
    for keys in ClipSampler(len(videos), 4, 0, start=0, stop=4):
        clips = [data[key] for key in keys]
        frames = torch.stack([clip.frames for clip in clips]).double() / 255
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
        std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
        scores = model(((frames - mean) / std).permute(0, 4, 1, 2, 3))
        loss = nn.functional.cross_entropy(scores, torch.stack([clip.target for clip in clips]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (key, weight), gradient in zip(model.named_parameters(), gradients, strict=True):
                velocity[key] = recipe.momentum * velocity[key] + gradient + recipe.weight_decay * weight
                weight -= recipe.lr * velocity[key]
    return model.state_dict()[name]


def _initial_frame_means():
    torch.manual_seed(mix_seed(0))
    return FrameMeans(2).state_dict()


def test_weights_say_what_they_are_and_start_another_run(tiny, tmp_path, trained):
    settings = read_settings(trained)
    assert settings.recipe.name == "kinetics_resnet18"
    assert settings.names == ("up", "down")
    assert settings.model_options == {"width": 4, "layers": [1, 1, 1, 1], "update": "mean"}
    model = rcu_ops.create_model(settings.recipe.model, num_classes=2, **settings.model_options)
    for source in (trained, trained.with_name("checkpoint.pt")):
        report = rcu_ops.load_weights(model, source)
        assert report.kept == report.skipped == []
        assert read_settings(source) == settings
    assert read_settings(tmp_path / "missing.pt") is None
    out = tmp_path / "out"
    # So small a rate that the weights stay where they started.
    assert tiny(out, "--iterations", "1", "--lr", "1e-30", "--weights", str(trained)) == 0
    given, kept = _weights(trained.parent), _weights(out)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(given[name], kept[name]) for name in parameters)


def test_the_head_of_other_classes_is_left_out_when_asked(tiny, motion, trained, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("left\nup\ndown\n")
    options = ("--iterations", "1", "--lr", "1e-30", "--weights", str(trained), "--labels", str(names))
    assert tiny(tmp_path / "out", *options) == 2
    assert "--skip-head leaves the classifier of another number of classes out" in capsys.readouterr().err
    assert tiny(tmp_path / "out", *options, "--skip-head") == 0
    given, kept = _weights(trained.parent), _weights(tmp_path / "out")
    assert kept["head.conv.weight"].shape[0] == 3
    assert torch.equal(kept["layer1.0.conv1.weight_hh"], given["layer1.0.conv1.weight_hh"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0.5"], "--lr: the run to resume has 0.01, got 0.5"),
        (["--crop", "24"], "--crop: the run to resume has 32, got 24"),
        (["--seed", "4"], "--resume: the run was started with --seed 0, got 4"),
        (["--model-option", "width=6"], "--model-option: the run to resume has width=4, got 6"),
        (["--classes", "3"], "--classes: the run to resume has 2, got 3"),
    ],
)
def test_a_run_resumes_as_it_was_started(tiny, trained, options, message, capsys):
    assert tiny(trained.parent, "--resume", *options) == 2
    assert message in capsys.readouterr().err


def test_further_steps_leave_those_taken_as_they_were(tiny, tmp_path, capsys):
    steps, cosine = tmp_path / "steps", tmp_path / "cosine"
    assert tiny(steps, "--batch", "1", "--iterations", "3", "--milestones", "1,4") == 0
    assert tiny(cosine, "--batch", "1", "--iterations", "2", "--schedule", "cosine") == 0
    for out, options, message in (
        (steps, ("--iterations", "2"), "--iterations: the run to resume has taken 3 steps, got 2"),
        (steps, ("--milestones", "2,4"), "--milestones: the run to resume has passed (1,), got (2,) before its step 3"),
        (steps, ("--milestones", "1,2"), "--milestones: the run to resume has passed (1,), got (1, 2) before"),
        (cosine, ("--iterations", "3"), "--iterations: with schedule=cosine the rates of the steps taken follow from"),
    ):
        assert tiny(out, "--batch", "1", "--resume", *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    more = ("--iterations", "4", "--milestones", "1,3", "--log-every", "1")
    assert tiny(steps, "--batch", "1", "--resume", *more) == 0
    assert [float(row["lr"]) for row in _rows(steps / "metrics.csv")] == pytest.approx([1e-3, 1e-4])


def test_a_run_resumes_on_its_own_list_and_recipe(tiny, motion, trained, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("down\nup\n")
    assert tiny(trained.parent, "--resume", "--labels", str(tmp_path / "names.txt")) == 2
    assert "names.txt holds other names than the run to resume has" in capsys.readouterr().err
    assert tiny(trained.parent, "--resume", videos=_list_with(motion, tmp_path)) == 2
    assert "is not the list of videos that the run was started with" in capsys.readouterr().err
    assert tiny(trained.parent, "--resume", recipe="kinetics_resnet34") == 2
    assert "--recipe: the run to resume has kinetics_resnet18, got kinetics_resnet34" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_written_over(tiny, tmp_path, capsys):
    assert tiny(tmp_path, "--iterations", "1", "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert tiny(tmp_path, "--iterations", "1") == 2
    assert "--resume goes on with it, --overwrite replaces it" in capsys.readouterr().err
    (tmp_path / "validation.csv").write_text("of the run before\n")
    assert tiny(tmp_path, "--iterations", "2", "--overwrite") == 0
    assert not (tmp_path / "validation.csv").exists()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "rcn_resnet19"], "--model: there is no model named 'rcn_resnet19'"),
        (["--model-option", "wide=3"], "--model rcn_resnet18: "),
        (["--model-option", "3"], "--model-option: expected NAME=VALUE, got '3'"),
        (["--model-option", "num_classes=3"], "num_classes is set by --classes"),
        (["--classes", "3"], "--classes: 3, but there are 2 class names"),
        (["--batch", "5", "--accumulate", "2"], "--batch: expected a multiple of processes x accumulated parts"),
        (["--device", "nonsense"], "--device: nonsense cannot be used"),
        (["--weights", "gone.pth"], "--weights: there is no file gone.pth"),
        (["--sync-bn"], "--sync-bn: synchronised batch normalisation needs GPUs"),
        (["--train", "gone.csv"], "gone.csv: cannot be read: No such file or directory"),
        (["--workers", "-1"], "--workers: expected at least 0, got -1"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, options, message, capsys):
    assert tiny(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcu-ops: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_settings_of_another_version_are_refused(tiny, trained, tmp_path, capsys):
    held = load_checkpoint(trained.with_name("checkpoint.pt"))
    held["settings"]["recipe"]["warmup"] = 3
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", held)
    metadata = {checkpoints._METADATA_KEY: json.dumps(held["settings"])}
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors", metadata=metadata)
    for path in (tmp_path / "checkpoint.pt", tmp_path / "weights.safetensors"):
        with pytest.raises(UserError, match=rf"{path.name}: recipe: expected the settings of this version.*'warmup'"):
            read_settings(path)
    assert tiny(tmp_path, "--resume") == 2
    assert "--resume: recipe: expected the settings of this version, got unknown ['warmup']" in capsys.readouterr().err


def test_files_that_were_cut_off(tiny, trained, tmp_path, capsys):
    for name in ("checkpoint.pt", "weights.safetensors"):
        content = trained.with_name(name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert read_settings(tmp_path / name) is None
        with pytest.raises(ValueError, match=f"{name} is not a readable"):
            rcu_ops.load_weights(FrameMeans(2), tmp_path / name)
    assert tiny(tmp_path, "--resume") == 2
    assert "checkpoint.pt: this is not a training checkpoint of this version" in capsys.readouterr().err


def test_memory_that_is_not_enough_names_the_way_out(tiny, tmp_path, monkeypatch, capsys):
    def full(self, frames, target):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ClipLoss, "forward", full)
    assert tiny(tmp_path, "--accumulate", "2") == 2
    error = capsys.readouterr().err
    assert "the GPU's memory is not enough for 2 clips at once; --accumulate N splits a batch into N parts" in error


def test_a_second_signal_is_answered_as_before():
    answered = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: answered.append(number))
    try:
        with signals_received() as received:
            signal.raise_signal(signal.SIGTERM)
            assert (received[:], answered) == ([signal.SIGTERM], [])
            signal.raise_signal(signal.SIGTERM)
            assert answered == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert answered == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_are_left_alone_by_other_threads():
    def train():
        with signals_received() as received:
            found.append((received, signal.getsignal(signal.SIGINT)))

    found = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [([], signal.getsignal(signal.SIGINT))]


def test_a_file_that_is_no_checkpoint_is_refused(tiny, tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    assert tiny(tmp_path, "--resume") == 2
    assert "checkpoint.pt: this is not a training checkpoint of this version" in capsys.readouterr().err


class Rogue:
    """What makes a file as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    made = tmp_path / "made"
    torch.save({"format": checkpoints._FORMAT, "settings": Rogue(made)}, tmp_path / "checkpoint.pt")
    assert read_settings(tmp_path / "checkpoint.pt") is None
    with pytest.raises(UserError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="it holds other objects than tensors"):
        rcu_ops.load_weights(FrameMeans(2), tmp_path / "checkpoint.pt")
    assert not made.exists()


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"step": 1})

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_and_resumes(tiny, tmp_path, precision):
    options = ("--iterations", "2", "--save-every", "1", "--autocast", precision)
    assert tiny(tmp_path, *options) == 0
    held = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(tensor.dtype != torch.bfloat16 for tensor in held["model"].values())
    assert bool(held["scaler"]) == (precision == "fp16")
    assert tiny(tmp_path, *options[2:], "--iterations", "3", "--resume") == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_the_parser_of_all_commands_loads_nothing_heavy():
    code = (
        "import sys; from rcu_ops.cli import build_parser; build_parser(); "
        "print([m for m in ('av', 'matplotlib', 'rcu_ops.models', 'rcu_ops.recipes.train') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
