"""The two-branch network: branches, places, streams, numbers, full graphs."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from rcu_ops import Streamer
from rcu_ops.models import RelationalTwoBranch, create_model, resnet_v2
from rcu_ops.nn import FoldedRelationalLSTM, RelationalLSTM, fuse_for_inference
from tests.networks import calibrated


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50-v2 with one unit in conv2 … conv4: the same code, a fraction of the time. conv5 stays whole."""
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 1, 3))


def small(**options: object) -> RelationalTwoBranch:
    model = create_model("relational_two_branch", num_classes=8, backbone="resnet50v2", width=2, **options)
    return calibrated(model, frames=2, size=64).double()


@pytest.mark.parametrize("branches", ["both", "local", "nonlocal"])
@pytest.mark.parametrize("insert_after", [1, 2, 3])
def test_branches_and_places(branches: str, insert_after: int) -> None:
    model = small(branches=branches, insert_after=insert_after)
    clip = torch.randn(2, 3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        x = model.trunk(clip)
        features = []
        if branches != "nonlocal":
            assert len(model.local.units) == 3 - insert_after
            features.append(torch.stack([model.local(x[:, :, t : t + 1])[..., 0] for t in range(3)]).mean(0))
        if branches != "local":
            features.append(model.relational(model.lstm(x))[..., -1])
        expected = model.head(torch.cat(features, 1))
        torch.testing.assert_close(model(clip), expected)
        torch.testing.assert_close(model.frame_scores(clip)[..., -1], expected)
    assert len(model.trunk.layer4) == insert_after
    assert sum(isinstance(m, RelationalLSTM) for m in model.modules()) == (branches != "local")


def test_streams() -> None:
    model = small()
    clip = torch.randn(2, 3, 5, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        streamer, state, parts = Streamer(model), None, []
        for chunk in clip.split([1, 3, 1], 2):
            scores, state = streamer(chunk, state)
            parts.append(scores)
        whole = model.frame_scores(clip)
        torch.testing.assert_close(torch.cat(parts, 2), whole)
        torch.testing.assert_close(whole[..., -1], model(clip))


def test_fused_with_folded_relations() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse_for_inference(model, fold_relations=True)
    assert isinstance(fused.lstm, FoldedRelationalLSTM)
    assert type(fuse_for_inference(model).lstm) is RelationalLSTM
    clip = torch.randn(2, 3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused.frame_scores(clip), model.frame_scores(clip))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="fold_relations: the model has no RelationalLSTM"):
        fuse_for_inference(small(branches="local"), fold_relations=True)
    with pytest.raises(ValueError, match=r"fold_relations: lstm: module: .* the bias of phi"):
        fuse_for_inference(small(normalize="count", bias=True), fold_relations=True)


def test_trains() -> None:
    model = small(in_channels=20).train()
    model(torch.randn(2, 20, 3, 64, 64, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_numbers() -> None:
    with torch.device("meta"):
        model = create_model("relational_two_branch").eval()
    assert len(model.trunk.layer3) == 23
    gates = model.lstm.weight_x.numel() + model.lstm.weight_h.numel()
    assert (round(gates / 1e6, 2), round(model.lstm.conv.weight.numel() / 1e6, 2)) == (41.94, 2.10)
    # The backbone, a second conv5_3 and last normalisation, the Relational LSTM, and the classifier of both features.
    branch = sum(parameter.numel() for parameter in model.relational.parameters())
    lstm = sum(parameter.numel() for parameter in model.lstm.parameters())
    head = 4096 * 101 + 101
    assert sum(parameter.numel() for parameter in model.parameters()) == 42_492_480 + branch + lstm + head
    assert model(torch.empty(1, 3, 8, 224, 224, device="meta")).shape == (1, 101)


def test_initialisation() -> None:
    model = create_model("relational_two_branch", backbone="resnet50v2", width=16)
    weight = model.relational.units[0].conv2.weight
    fan = weight[0].numel() + weight[:, 0].numel()
    assert weight.abs().max() <= (6 / fan) ** 0.5  # Xavier, uniform
    assert model.local.units[0].conv2.weight.abs().max() > (6 / fan) ** 0.5  # He, normal


def test_full_graph_and_export() -> None:
    torch.compiler.reset()
    model = small()
    clip = torch.randn(2, 3, 2, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(clip)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(clip), expected)
        # The number of segments is that of the example: the steps of the recurrence are written out.
        program = export(model, (clip,), dynamic_shapes=({0: Dim("N", min=1, max=64)},))
        other = torch.randn(3, 3, 2, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize(
    ("option", "value"), [("backbone", "resnet18"), ("branches", "none"), ("insert_after", 4), ("num_classes", 0)]
)
def test_bad_arguments(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        create_model("relational_two_branch", **{option: value})
