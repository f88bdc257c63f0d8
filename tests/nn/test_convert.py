"""convert_to_recurrent: 3D CNNs as causal recurrent networks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from rcu_ops.models import create_model
from rcu_ops.nn import FrameClassifier, FrameConv3d, RecurrentConv3d, choose_layers, convert_to_recurrent
from rcu_ops.streaming import Streamer


class C3DLike(nn.Module):
    """Convolutions, temporal pools and a perceptron on flattened features, written as C3D is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 4, 3, padding=1)
        self.pool1 = nn.MaxPool3d((1, 2, 2))
        self.conv2 = nn.Conv3d(4, 6, 3, padding=1)
        self.pool2 = nn.MaxPool3d(2)
        self.conv3 = nn.Conv3d(6, 6, (3, 3, 3), (2, 1, 1), 1, bias=False)
        self.pool3 = nn.AvgPool3d(2, stride=(2, 2, 2))
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(6 * 2 * 2, 8)
        self.fc2 = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.pool3(self.relu(self.conv3(x)))
        return self.fc2(self.relu(self.fc1(self.flatten(x))))


class PooledHead(nn.Module):
    """A residual network in the manner of torchvision's video models: global pool, functional flatten, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv3d(3, 4, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(4), nn.ReLU(inplace=True)
        )
        self.conv = nn.Sequential(nn.Conv3d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm3d(8))
        self.shortcut = nn.Conv3d(4, 8, 1, 2)
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.avgpool(F.relu(self.conv(x) + self.shortcut(x))).flatten(1))


def test_c3d_like_frame_by_frame() -> None:
    model = C3DLike().double().eval()
    converted = convert_to_recurrent(model)
    assert isinstance(converted, FrameClassifier)
    clip = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)

    states: dict[str, Tensor] = {}

    def recurrent(conv: nn.Conv3d, name: str, x: Tensor) -> Tensor:
        y = F.conv2d(x, conv.weight.sum(2), conv.bias, padding=1)
        states[name] = states.get(name, 0) + y
        return states[name].relu()

    expected = []
    for t in range(4):
        x = F.max_pool2d(recurrent(model.conv1, "1", clip[:, :, t]), 2)
        x = F.max_pool2d(recurrent(model.conv2, "2", x), 2)
        x = F.avg_pool2d(recurrent(model.conv3, "3", x), 2)
        expected.append(model.fc2(model.fc1(x.flatten(1)).relu()))
    torch.testing.assert_close(converted.frame_scores(clip), torch.stack(expected, 2))
    torch.testing.assert_close(converted(clip), torch.stack(expected, 2).mean(2))


@pytest.mark.parametrize("build", [C3DLike, PooledHead])
def test_converted_networks_stream_and_are_causal(build: type[nn.Module]) -> None:
    model = convert_to_recurrent(build().double()).eval()
    clip = torch.randn(2, 3, 5, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = model.frame_scores(clip)
        first, state = Streamer(model)(clip[:, :, :2])
        second, _ = Streamer(model)(clip[:, :, 2:], state)
        torch.testing.assert_close(torch.cat([first, second], 2), whole)
        changed = clip.clone()
        changed[:, :, 3:] = torch.nan
        assert torch.equal(model.frame_scores(changed)[:, :, :3], whole[:, :, :3])


def test_still_clip_starts_as_the_3d_network_goes_on() -> None:
    """Taps are summed: on a still clip frame 0 sees what the 3D convolution sees away from the clip's ends."""
    conv = nn.Conv3d(3, 4, 3, padding=(0, 1, 1)).double()
    converted = convert_to_recurrent(conv)
    assert isinstance(converted, RecurrentConv3d)
    still = torch.randn(1, 3, 1, 6, 6, dtype=torch.float64).expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(converted(still)[:, :, :1], conv(still))
    frames = convert_to_recurrent(conv, "none")
    assert type(frames) is FrameConv3d
    assert convert_to_recurrent(nn.Conv3d(3, 4, 3, padding="same"), "none").padding == "same"
    assert convert_to_recurrent(nn.Conv3d(3, 4, 1, padding=(1, 0, 0))).padding == (0, 0, 0)
    torch.testing.assert_close(frames(still), conv(still).expand(-1, -1, 3, -1, -1))


def test_the_old_model_is_untouched() -> None:
    model = PooledHead()
    before, structure = copy.deepcopy(model.state_dict()), repr(model)
    converted = convert_to_recurrent(model)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert repr(model) == structure
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_i3d_resnet_becomes_the_rcn() -> None:
    i3d = create_model("i3d_resnet18", num_classes=3, width=4).eval()
    converted = convert_to_recurrent(i3d, update="mean").double()
    rcn = create_model("rcn_resnet18", num_classes=3, width=4, update="mean").eval().double()
    weights = {}
    for name, value in i3d.double().state_dict().items():
        recurrent = name.replace(".weight", ".weight_xh")
        if name.endswith(".weight") and recurrent in rcn.state_dict():
            weights[recurrent] = value.sum(2, keepdim=True)
        else:
            weights[name] = value
    missing, unexpected = rcn.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("weight_hh") for name in missing)
    clip = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(converted.frame_scores(clip), rcn.frame_scores(clip))


def kinds(model: nn.Module) -> list[bool]:
    """Whether each convolution with an extent in space is recurrent, in order."""
    return [
        isinstance(module, RecurrentConv3d)
        for module in model.modules()
        if isinstance(module, (RecurrentConv3d, nn.Conv3d)) and max(module.kernel_size) > 1
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", [True, True, True]),
        ("none", [False, False, False]),
        (("last", 2), [False, True, True]),
        (("every", 2), [False, True, False]),
        (("spaced", 1), [False, False, True]),
        (lambda name, module: name == "conv1", [True, False, False]),
    ],
    ids=["all", "none", "last", "every", "spaced", "predicate"],
)
def test_choice_of_layers(choice: object, expected: list[bool]) -> None:
    converted = convert_to_recurrent(C3DLike(), choice)
    assert kinds(converted) == expected
    assert all(not isinstance(m, nn.Conv3d) or m.kernel_size[0] == 1 for m in converted.modules())


def test_spaced_layers_are_regular_and_end_with_the_last() -> None:
    layers = [(str(i), nn.Identity()) for i in range(17)]
    assert [i for i, taken in enumerate(choose_layers(layers, ("spaced", 4))) if taken] == [3, 7, 11, 16]
    for count in range(1, 18):
        assert sum(choose_layers(layers, ("spaced", count))) == count


@pytest.mark.parametrize(
    "choice", ["some", ("last", 1, 1), ("last", 4), ("last", 0), ("first", 1), ("every", 1.5), ("last", True), 3]
)
def test_bad_choices(choice: object) -> None:
    with pytest.raises(ValueError, match="layers"):
        convert_to_recurrent(C3DLike(), choice)


def test_factorised_networks_recur_in_their_temporal_half() -> None:
    converted = convert_to_recurrent(create_model("r2plus1d_resnet18", num_classes=3, width=8))
    assert isinstance(converted.stem.conv.temporal, RecurrentConv3d)
    assert type(converted.stem.conv.spatial) is FrameConv3d
    assert converted.stem.conv.temporal.kernel_size == (1, 1, 1)


def test_2d_networks_recur_in_their_spatial_convolutions() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(4, 4, 1))
    converted = convert_to_recurrent(model)
    assert isinstance(converted[0], RecurrentConv3d)
    assert type(converted[1]) is nn.Conv3d
    assert torch.equal(converted[1].weight, model[1].weight)


def test_shared_layers_stay_shared_and_settings_stay() -> None:
    conv = nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate", groups=2).half()
    conv.requires_grad_(False)
    model = nn.Sequential(conv, nn.ReLU(), conv).eval()
    converted = convert_to_recurrent(model)
    assert converted[0] is converted[2]
    layer = converted[0]
    assert (layer.padding_mode, layer.groups, layer.weight_xh.dtype) == ("replicate", 2, torch.float16)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer.training


def test_adaptive_pools_pool_frames() -> None:
    """Those to one value in time collapse it; the others keep the frames that there are."""
    pools = nn.AdaptiveAvgPool3d(1), nn.AdaptiveAvgPool3d(2), nn.AdaptiveMaxPool3d((2, 3, 1), return_indices=True)
    collapsing, two, best = (convert_to_recurrent(pool) for pool in pools)
    assert isinstance(collapsing, FrameClassifier)
    one = collapsing.network
    x = torch.randn(2, 4, 3, 6, 6)
    torch.testing.assert_close(one(x), x.mean((3, 4)).transpose(1, 2).reshape(6, 4, 1, 1, 1))
    torch.testing.assert_close(two(x), nn.AdaptiveAvgPool3d((None, 2, 2))(x))
    values, indices = best(x)
    assert values.shape == indices.shape == (2, 4, 3, 3, 1)


class Changed(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.flatten, self.change = nn.Conv3d(3, 4, 3, padding=1), nn.Flatten(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.flatten(self.conv(x)))


@pytest.mark.parametrize("change", [lambda scores: scores[::2], lambda scores: scores.sum(1)])
def test_scores_that_are_not_one_row_per_frame_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"network: expected one row of scores per frame, \[8,K\]"):
        convert_to_recurrent(Changed(change))(torch.randn(2, 3, 4, 5, 5))


class SamePool(nn.MaxPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1, 0, 1)))


class SameConv(nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1, 1, 1)))


class HalfPool(nn.AdaptiveAvgPool3d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LSTM(4, 4, bidirectional=True), "bidirectional"),
        (nn.GRU(4, 4, bidirectional=True), "bidirectional"),
        (nn.RNN(4, 4, bidirectional=True), "bidirectional"),
        (nn.MultiheadAttention(4, 1), "attends"),
        (nn.InstanceNorm3d(4), "over time"),
        (nn.GroupNorm(2, 4), "over time"),
        (nn.ConvTranspose3d(4, 4, 3), "over time"),
        (nn.ConvTranspose3d(4, 4, 1, (2, 1, 1)), "over time"),
        (nn.LPPool3d(2, 2), "per-frame"),
        (nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 3)), "parametrized"),
        (prune.random_unstructured(nn.Conv3d(4, 4, 3), "weight", 0.5), "made by a hook"),
        (nn.LazyConv3d(4, 3), "not known yet"),
        (SamePool(2, 2), "SamePool has a forward of its own"),
        (SameConv(4, 4, 3), "SameConv has a forward of its own"),
        (HalfPool(1), "HalfPool has a forward of its own"),
        (HalfPool((1, 1, 1)), "HalfPool has a forward of its own"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_causal_is_named(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ModuleDict({"inner": layer}))
    with pytest.raises(ValueError, match=rf"1\.inner .*{reason}"):
        convert_to_recurrent(model)


def test_layers_with_a_forward_of_their_own_stay_where_they_treat_frames_alone() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3), SameConv(4, 4, 1), SamePool((1, 2, 2)), HalfPool((None, 1, 1)))
    assert [type(layer) for layer in convert_to_recurrent(model)] == [RecurrentConv3d, SameConv, SamePool, HalfPool]


def test_unidirectional_rnns_stay() -> None:
    model = nn.ModuleList([nn.Conv3d(3, 4, 3), nn.LSTM(4, 4)])
    assert isinstance(convert_to_recurrent(model)[1], nn.LSTM)


def test_layers_that_do_not_reach_over_time_stay() -> None:
    model = nn.Sequential(nn.Flatten(1, 2), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert repr(convert_to_recurrent(model)) == repr(model)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="model"):
        convert_to_recurrent("i3d_resnet18")
