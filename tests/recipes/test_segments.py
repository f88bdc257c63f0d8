"""Recipes of segment networks: one frame per segment, crops averaged, moving statistics, cross-modality weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rcu_ops.cli import main
from rcu_ops.models import create_model, load_weights, resnet_v2
from rcu_ops.nn import set_batch_norm_mode, streaming_obstacles
from rcu_ops.nn.batch_norm import MovingBatchNorm3d
from rcu_ops.recipes.config import Recipe, get_recipe
from rcu_ops.recipes.dataset import ClipDataset, ClipKey
from rcu_ops.recipes.lists import LabelledVideo
from rcu_ops.recipes.scoring import VideoScorer
from rcu_ops.video.sample import segment_positions
from tests.video.clips import recognise, write_clip


def recipe(**changes: object) -> Recipe:
    small = {"frames": 3, "crop": 32, "scales": (36, 36), "eval_scale": 40, "eval_clips": 2}
    return dataclasses.replace(get_recipe("ucf101_tsn_rgb"), **{**small, **changes})


def test_training_takes_one_frame_of_every_segment(tmp_path: Path) -> None:
    video = LabelledVideo("v", write_clip(tmp_path / "v.mp4", 18), 1)
    drawn = set()
    for epoch in range(12):
        frames = ClipDataset([video], recipe(), seed=0)[ClipKey(epoch, 0)].frames
        assert frames.shape == (3, 32, 32, 3)
        shown = [recognise(frame.numpy()) for frame in frames]
        assert all(6 * s <= index < 6 * s + 6 for s, index in enumerate(shown))
        drawn.add(tuple(shown))
    assert len(drawn) > 6
    fixed = ClipDataset([video], recipe(jitter=False), seed=0)[ClipKey(0, 0)].frames
    assert [recognise(frame.numpy()) for frame in fixed] == segment_positions(18, 3)[0].tolist()


@pytest.mark.parametrize("multi_scale", [False, True])
def test_windows_have_several_sizes_in_multi_scale_training(tmp_path: Path, multi_scale: bool) -> None:
    # Grey rises by 3 a pixel to the right and not downwards: how far it rises in a clip is the window's width.
    ramp = np.broadcast_to((3 * np.arange(64) + 20).astype(np.uint8)[None, :, None], (48, 64, 3))
    video = LabelledVideo("v", write_clip(tmp_path / "v.mp4", 3, images=[ramp] * 3), 1)
    data = ClipDataset([video], recipe(scales=(48, 48), flip=0.0, multi_scale=multi_scale), seed=0)
    widths = set()
    for epoch in range(24):
        frames = data[ClipKey(epoch, 0)].frames
        assert frames.shape == (3, 32, 32, 3)
        row = frames[0, 16, :, 0].double()
        widths.add(round(float(row[26:].mean() - row[:6].mean()) / 3 * 31 / 26 / 4))  # in fours
    if multi_scale:  # 1000, 875, 750 and 660 thousandths of 48
        assert len(widths) > 2 and min(widths) >= 7 and max(widths) <= 12
    else:
        assert widths == {8}


class Corner(nn.Module):
    """A network whose scores are the grey of the picture's top left pixel in every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clip: Tensor) -> Tensor:
        return clip[:, 0, :, 0, 0] * self.scale


@pytest.mark.parametrize("crops", [1, 5, 10])
def test_scores_are_means_over_crops_at_the_positions(tmp_path: Path, crops: int) -> None:
    from rcu_ops.recipes.dataset import evaluation_crops, network_input
    from rcu_ops.video import read_frames

    clip = write_clip(tmp_path / "v.mp4", 18)
    chosen = recipe(eval_crops=crops)
    scores = VideoScorer(Corner().eval(), chosen, ("clips",))(str(clip)).scores["clips"]
    indices = segment_positions(18, 3, positions=2)
    pictures = read_frames(clip, range(18))
    for column, row in enumerate(indices.tolist()):
        frames = torch.stack([evaluation_crops(pictures[index], chosen) for index in row], 1)
        assert frames.shape == (crops, 3, 32, 32, 3)
        expected = Corner()(network_input(frames)).mean(0)
        torch.testing.assert_close(torch.from_numpy(scores[:, column]), expected.detach())


@pytest.mark.parametrize("mode", ["batch", "moving", "frozen"])
def test_batch_norm_modes(mode: str) -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)).double()
    norm, names = model[1], list(model.state_dict())
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 1, 2)
    before = norm.running_mean.clone(), norm.running_var.clone()
    set_batch_norm_mode(model, mode, 0.01)
    assert list(model.state_dict()) == names
    x = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    inner = model[0](x)
    y = model.train()(x)
    (model(x) + y).sum().backward()  # called twice in one graph
    if mode == "batch":
        assert type(norm) is nn.BatchNorm3d
        torch.testing.assert_close(y.mean((0, 2, 3, 4)), torch.zeros(4, dtype=torch.float64))
        return
    assert isinstance(norm, MovingBatchNorm3d)
    assert not streaming_obstacles(model)
    rate = 0.01 if mode == "moving" else 0.0
    mean, var = inner.mean((0, 2, 3, 4)), inner.transpose(0, 1).flatten(1).var(1)
    first = [old + rate * (new - old) for old, new in zip(before, (mean, var), strict=True)]
    expected = (inner - first[0].view(-1, 1, 1, 1)) / (first[1].view(-1, 1, 1, 1) + norm.eps).sqrt()
    torch.testing.assert_close(y, expected)
    second = [old + rate * (new - old) for old, new in zip(first, (mean, var), strict=True)]
    torch.testing.assert_close(norm.running_mean, second[0].detach())
    torch.testing.assert_close(norm.running_var, second[1].detach())
    plain = nn.BatchNorm3d(4).double()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm.eval()(inner), plain.eval()(inner))


def test_batch_norm_modes_can_be_left() -> None:
    x = torch.randn(3, 2, 1, 4, 4)
    plain, other = nn.BatchNorm3d(2, momentum=0.3), nn.BatchNorm3d(2, momentum=0.3)
    for mode in ("moving", "frozen", "moving", "batch"):
        set_batch_norm_mode(other, mode)
    assert type(other) is nn.BatchNorm3d
    assert torch.equal(other(x), plain(x))
    for key, value in plain.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (0, 2, 1, 4, 4)], ids=str)
def test_moving_statistics_survive_what_has_no_variance(shape: tuple[int, ...]) -> None:
    norm = set_batch_norm_mode(nn.BatchNorm3d(2), "moving")
    assert norm.train()(torch.randn(shape)).isfinite().all()
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()


def test_batch_norm_mode_errors() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        set_batch_norm_mode(nn.BatchNorm3d(2), "off")
    with pytest.raises(ValueError, match="momentum"):
        set_batch_norm_mode(nn.BatchNorm3d(2), "moving", 0.0)


def test_cross_modality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 1, 3))
    rgb, flow = (create_model("tsn_resnet50v2", width=2, num_classes=3, in_channels=c) for c in (3, 20))
    torch.save(rgb.state_dict(), tmp_path / "rgb.pt")
    with pytest.raises(
        ValueError, match=r"shape: trunk.conv.weight expected \[2, 20, 1, 7, 7\], got \[2, 3, 1, 7, 7\]"
    ):
        load_weights(flow, tmp_path / "rgb.pt")
    load_weights(flow, tmp_path / "rgb.pt", cross_modality=True)
    mean = rgb.trunk.conv.weight.mean(1)
    assert all(torch.equal(flow.trunk.conv.weight[:, channel], mean) for channel in range(20))
    assert torch.equal(flow.trunk.layer4[0].conv2.weight, rgb.trunk.layer4[0].conv2.weight)
    # A constant input gives both networks' first layers the same output, but for the number of channels.
    wide = create_model("tsn_resnet50v2", width=4, num_classes=3)
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(wide, tmp_path / "rgb.pt", cross_modality=True)


def test_train_and_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, tiny: training by segments with moving statistics, then positions and crops averaged."""
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 1, 3))
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", 9)
    (tmp_path / "list.csv").write_text("path,label\na.mp4,0\nb.mp4,1\n")
    out = tmp_path / "run"
    sizes = [
        "--frames",
        "2",
        "--crop",
        "32",
        "--scales",
        "36,36",
        "--eval-scale",
        "36",
        "--batch",
        "2",
        "--classes",
        "2",
    ]
    network = ["--model-option", "backbone=resnet50v2", "--model-option", "width=2", "--device", "cpu"]
    common = ["--recipe", "ucf101_relational_rgb", *sizes, *network]
    common += ["--train", str(tmp_path / "list.csv"), "--out", str(out), "--workers", "0"]
    assert main(["train", *common, "--iterations", "2", "--milestones", "1"]) == 0
    scored = ["--weights", str(out / "weights.safetensors"), "--videos", str(tmp_path / "list.csv"), "--device", "cpu"]
    assert main(["evaluate", *scored, "--modes", "clips", "--out", str(tmp_path / "scores")]) == 0
    with np.load(tmp_path / "scores" / "scores_clips.npz") as scores:
        assert scores["a.mp4"].shape == (2, 4)
