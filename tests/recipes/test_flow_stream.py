"""The temporal stream: snippets of stored flow in training and evaluation, its recipes, and what it starts from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rcu_ops.cli import main
from rcu_ops.models import create_model, load_weights, resnet_v2
from rcu_ops.recipes.config import MODEL_OPTIONS, Recipe, get_recipe
from rcu_ops.recipes.dataset import ClipDataset, ClipKey, evaluation_crops, network_input
from rcu_ops.recipes.lists import LabelledVideo
from rcu_ops.recipes.scoring import VideoScorer
from rcu_ops.video import VideoError
from rcu_ops.video.flow import flow_pictures, flow_stacks, mirror, mirror_pictures, open_flow, scale_pictures
from rcu_ops.video.sample import segment_positions

TINY = [
    *("--frames", "2", "--crop", "32", "--scales", "36,36", "--eval-scale", "36", "--batch", "2", "--classes", "2"),
    *("--eval-clips", "2", "--flow-length", "3", "--model-option", "width=2"),
    *("--device", "cpu"),
]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 1, 3))


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 12 fields; field f of the first one is f everywhere in x and 200 + f in y."""
    folder = tmp_path_factory.mktemp("flow")
    numbers = np.arange(12, dtype=np.uint8)
    fields = np.stack([numbers, 200 + numbers], 1)[:, :, None, None]
    np.save(folder / "a.npy", np.ascontiguousarray(np.broadcast_to(fields, (12, 2, 40, 44))))
    np.save(folder / "b.npy", np.random.default_rng(0).integers(0, 256, (12, 2, 40, 44), dtype=np.uint8))
    (folder / "list.csv").write_text("path,label\na.npy,0\nb.npy,1\n")
    return folder


def recipe(**changes: object) -> Recipe:
    small = {"frames": 3, "crop": 32, "scales": (40, 40), "eval_scale": 40, "eval_clips": 2, "flow_length": 3}
    return dataclasses.replace(get_recipe("ucf101_tsn_flow"), **{**small, **changes})


@pytest.mark.parametrize("flipped", [0.0, 1.0])
def test_training_takes_snippets_of_neighbouring_fields(flow: Path, flipped: float) -> None:
    video = LabelledVideo("a", flow / "a.npy", 1)
    drawn = set()
    for epoch in range(8):
        frames = ClipDataset([video], recipe(flip=flipped), seed=0)[ClipKey(epoch, 0)].frames
        assert frames is not None and frames.shape == (3, 32, 32, 6)
        x, y = frames[..., ::2], frames[..., 1::2]
        starts = (255 - x if flipped else x)[:, 0, 0, 0].tolist()  # mirrored, what goes right goes left
        for s, start in enumerate(starts):
            assert s * 10 // 3 <= start < (s + 1) * 10 // 3
            assert (y[s] - 200 - start == torch.arange(3)).all()
        drawn.add(tuple(starts))
    assert len(drawn) > 3


def test_pictures_are_the_stacks() -> None:
    fields = np.random.default_rng(1).integers(0, 256, (9, 2, 4, 5), dtype=np.uint8)
    starts = torch.tensor([0, 7])
    pictures, stacks = flow_pictures(fields, starts, 3), flow_stacks(fields, starts, 3)
    assert torch.equal(network_input(pictures[None])[0], stacks)
    torch.testing.assert_close(network_input(mirror_pictures(pictures)[None])[0], mirror(stacks), rtol=0, atol=1e-6)


class Corner(nn.Module):
    """Scores: the top left value of every snippet's first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clip: Tensor) -> Tensor:
        return clip[:, 0, :, 0, 0] * self.scale


@pytest.mark.parametrize("crops", [1, 5, 10])
def test_scores_are_means_over_crops_at_the_positions(flow: Path, crops: int) -> None:
    chosen = recipe(eval_crops=crops)
    scores = VideoScorer(Corner().eval(), chosen, ("clips",))(str(flow / "b.npy")).scores["clips"]
    fields = open_flow(flow / "b.npy")
    for column, row in enumerate(segment_positions(12, 3, snippet=3, positions=2)):
        pictures = flow_pictures(fields, row, 3)
        corners = {1: [(4, 6)], 5: [(0, 0), (0, 12), (8, 0), (8, 12), (4, 6)]}[min(crops, 5)]
        values = [scale_pictures(pictures[:, y, x, 0]) for y, x in corners]
        if crops == 10:  # the mirror image's left edge is the crop's right one
            values += [scale_pictures(255 - pictures[:, y, x + 31, 0]) for y, x in corners]
        torch.testing.assert_close(torch.from_numpy(scores[:, column]), torch.stack(values).mean(0))
    assert evaluation_crops(pictures[0].numpy(), chosen).shape == (crops, 32, 32, 6)
    with pytest.raises(ValueError, match="flow has snippets of segments only"):
        VideoScorer(Corner().eval(), chosen, ("sliding",))


def test_recipes_are_the_papers() -> None:
    for name, videos in (("ucf101_relational_flow", 9537), ("hmdb51_relational_flow", 3570)):
        temporal = get_recipe(name)
        steps = [round(videos * epochs / 24) for epochs in (45, 55, 60)]
        assert [*temporal.milestones, temporal.iterations] == steps
        assert (temporal.lr, temporal.batch_norm, temporal.batch_norm_momentum) == (0.0005, "moving", 0.001)
        assert MODEL_OPTIONS[name] == {"in_channels": 20, "dropout": 0.7}
    with pytest.raises(ValueError, match="input: flow comes in snippets"):
        recipe(sampling="clip")


def test_starts_from_the_segment_network(tmp_path: Path) -> None:
    tsn = create_model("tsn_resnet50v2", width=2, num_classes=3, in_channels=20)
    torch.save(tsn.state_dict(), tmp_path / "tsn.pt")
    options = {"backbone": "resnet50v2", "width": 2, "num_classes": 3, "in_channels": 20}
    model = create_model("relational_two_branch", **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(model, tmp_path / "tsn.pt")  # a classifier of both branches is not in it
    report = load_weights(model, tmp_path / "tsn.pt", skip_head=True)
    assert torch.equal(model.local.units[0].conv2.weight, tsn.trunk.layer4[2].conv2.weight)
    assert torch.equal(model.trunk.layer4[1].conv2.weight, tsn.trunk.layer4[1].conv2.weight)
    assert torch.equal(model.local.bn.weight, tsn.bn.weight)
    assert all(name.startswith(("lstm.", "relational.", "head.")) for name in report.kept)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.kept)
    assert {name.split(".")[0] for name in report.skipped} == {"head"}
    alone = create_model("relational_two_branch", branches="nonlocal", **options)
    skipped = load_weights(alone, tmp_path / "tsn.pt", skip_head=True).skipped
    assert {".".join(name.split(".")[:3]) for name in skipped if name.startswith("trunk")} == {"trunk.layer4.2"}


def test_train_and_evaluate(flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, tiny: from the spatial network's weights by cross-modality, trained and scored on flow."""
    options = ["--recipe", "ucf101_relational_flow", "--model-option", "backbone=resnet50v2", *TINY]
    rgb = create_model("relational_two_branch", backbone="resnet50v2", width=2, num_classes=2)
    torch.save(rgb.state_dict(), tmp_path / "rgb.pt")
    out = tmp_path / "run"
    train = ["train", *options, "--train", str(flow / "list.csv"), "--out", str(out), "--workers", "0"]
    weights = ["--weights", str(tmp_path / "rgb.pt"), "--cross-modality"]
    assert main([*train, *weights, "--iterations", "2", "--milestones", "1"]) == 0
    scored = ["--weights", str(out / "weights.safetensors"), "--videos", str(flow / "list.csv"), "--device", "cpu"]
    assert main(["evaluate", *scored, "--out", str(tmp_path / "scores")]) == 0
    with np.load(tmp_path / "scores" / "scores_clips.npz") as scores:
        assert scores["a.npy"].shape == (2, 2)
    assert main(["evaluate", *scored, "--modes", "unrolled", "--out", str(tmp_path / "others")]) == 2
    assert "snippets of segments only" in capsys.readouterr().err
    assert main(["evaluate", *scored, "--flow-length", "2", "--out", str(tmp_path / "others")]) == 2
    assert "2 fields are 4 channels, but the network's in_channels is 6" in capsys.readouterr().err
    scored[1] = str(tmp_path / "none.safetensors")
    assert main(["evaluate", *scored, "--out", str(tmp_path / "others")]) == 2
    assert f"--weights: there is no file {scored[1]}" in capsys.readouterr().err


def test_files_that_are_no_flow(flow: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "floats.npy", np.zeros((3, 2, 4, 4)))
    np.save(tmp_path / "none.npy", np.zeros((0, 2, 4, 4), np.uint8))
    for name in ("text", "floats", "none", "missing"):
        with pytest.raises(VideoError, match=name):
            open_flow(tmp_path / f"{name}.npy")
