"""The video ResNet: Table 1's sizes, parameter counts, costs, options, names."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rcu_ops
from rcu_ops.models import VideoResNet, create_model, list_models, register_model, registry
from rcu_ops.models.resnet import Conv2Plus1d, matched_mid_planes
from rcu_ops.nn import FeatureGate, FrameConv3d, RecurrentConv3d
from tests.networks import assert_same, eager_frame_scores, small_model

PARAMETERS = {"rcn_resnet18": 12_778_448, "i3d_resnet18": 33_371_472, "r2plus1d_resnet18": 33_383_797}


def on_meta(name: str, **options: object) -> VideoResNet:
    with torch.device("meta"):
        model = create_model(name, **options)
    assert isinstance(model, VideoResNet)
    return model.eval()


def gmac(model: nn.Module, *shape: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_at_400_classes(name: str) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == PARAMETERS[name]


def test_gmac_of_i3d() -> None:
    assert round(gmac(on_meta("i3d_resnet18"), 1, 3, 16, 112, 112), 2) == 40.70


SRTG_CLIP = (1, 3, 8, 224, 224)

# GMAC of the papers' networks (PAPERS: SRTG's own clip without a stem pool, FASTER's with one).
GMAC = [
    ("r3d_resnet34", {}, SRTG_CLIP, 150.756),
    ("r3d_resnet50", {"stem_pool": False}, SRTG_CLIP, 109.344),
    ("srtg_r3d_resnet34", {}, SRTG_CLIP, 150.787),
    ("srtg_r3d_resnet50", {}, SRTG_CLIP, 109.839),
    ("r2d_resnet26", {}, (1, 3, 8, 224, 224), 3.167),
    ("r2d_resnet26", {}, (1, 3, 16, 224, 224), 6.333),
    ("r2d_resnet26", {}, (1, 3, 32, 224, 224), 12.666),
    ("r2plus1d_resnet50", {}, (1, 3, 8, 224, 224), 29.980),
    ("r2plus1d_resnet50", {}, (1, 3, 16, 224, 224), 59.960),
    ("r2plus1d_resnet50", {}, (1, 3, 32, 224, 224), 119.919),
    ("r3d_resnet50", {}, (8, 3, 32, 224, 224), 942.73),
]


@pytest.mark.parametrize(("name", "options", "shape", "expected"), GMAC)
def test_gmac_of_the_papers(name: str, options: dict, shape: tuple[int, ...], expected: float) -> None:
    assert gmac(on_meta(name, **options), *shape) == pytest.approx(
        expected, rel=1e-3 if not name.startswith("srtg") else 1e-5
    )


def test_backbones_of_faster() -> None:
    """Table 1: filters, planes within (2+1)D, and features [2048, L/8, 7, 7] from every backbone."""
    clip = torch.empty(2, 3, 16, 224, 224, device="meta")
    for name in ("r2d_resnet26", "r2plus1d_resnet50", "r3d_resnet50"):
        assert on_meta(name).features(clip).shape == (2, 2048, 2, 7, 7)
    pairs = [m for m in on_meta("r2plus1d_resnet50").modules() if isinstance(m, Conv2Plus1d)]
    assert [m.spatial.out_channels for m in pairs] == [45] + [144] * 3 + [288] * 4 + [576] * 6 + [1152] * 3
    stem = on_meta("r2d_resnet26").stem
    assert (stem.conv.kernel_size, stem.conv.stride) == ((8, 7, 7), (8, 2, 2))
    assert stem(clip).shape == (2, 64, 2, 56, 56)
    assert not on_meta("r2d_resnet26").causal


def test_gmac_of_rcn_is_that_of_a_2d_resnet_and_its_recurrences() -> None:
    model = on_meta("rcn_resnet18")
    planes = {"stem": (1, 64, 56), "layer1": (4, 64, 56), "layer2": (4, 128, 28), "layer3": (4, 256, 14)}
    planes["layer4"] = (4, 512, 7)
    recurrence = sum(15 * layers * c * c * size * size for layers, c, size in planes.values())
    framewise = on_meta("rcn_resnet18", recurrent_layers="none")
    frames = gmac(framewise, 1, 3, 16, 112, 112)
    total = gmac(model, 1, 3, 16, 112, 112)
    assert total - frames == pytest.approx(recurrence / 1e9, rel=1e-9)  # the first frame has no state to multiply


@pytest.mark.parametrize(
    ("name", "frames"),
    [("rcn_resnet18", [16] * 5), ("i3d_resnet18", [16, 16, 8, 4, 2]), ("r2plus1d_resnet18", [16, 16, 8, 4, 2]),
     ("i3d_resnet18_dense", [16] * 5)],
)  # fmt: skip
def test_output_sizes_of_table_1(name: str, frames: list[int]) -> None:
    model = on_meta(name)
    shapes = []
    for stage in (model.stem, model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape)))
    clip = torch.empty(2, 3, 16, 112, 112, device="meta")
    assert model.frame_scores(clip).shape == (2, 400, frames[-1])
    planes, sizes = [64, 64, 128, 256, 512], [56, 56, 28, 14, 7]
    assert shapes == [(2, c, t, s, s) for c, t, s in zip(planes, frames, sizes, strict=True)]
    assert model.features(clip).shape == shapes[-1]
    assert model(clip).shape == (2, 400)


@pytest.mark.parametrize(
    "name",
    ["rcn_resnet34", "i3d_resnet34", "r2plus1d_resnet34", "rcn_resnet50", "i3d_resnet50", "r2plus1d_resnet50",
     "r3d_resnet101", "r2d_resnet26"],
)  # fmt: skip
def test_deeper_networks(name: str) -> None:
    model = on_meta(name)
    depth = int(name.partition("resnet")[2])
    layers = [m for m in model.modules() if isinstance(m, (RecurrentConv3d, nn.Conv3d, Conv2Plus1d))]
    inside = [m for pair in model.modules() if isinstance(pair, Conv2Plus1d) for m in (pair.spatial, pair.temporal)]
    shortcuts = [block.downsample[0] for stage in stages(model) for block in stage if block.downsample is not None]
    assert len(layers) - len(inside) - len(shortcuts) == depth
    recurrent = sum(isinstance(m, RecurrentConv3d) for m in model.modules())
    assert recurrent == (0 if not name.startswith("rcn") else 33 if depth == 34 else 17)
    assert model.features(torch.empty(1, 3, 8, 64, 64, device="meta")).shape[1] == (512 if depth == 34 else 2048)


def stages(model: VideoResNet) -> list[nn.Module]:
    return [model.layer1, model.layer2, model.layer3, model.layer4]


def test_every_3d_convolution_of_i3d_is_recurrent_in_rcn() -> None:
    rcn, i3d = dict(on_meta("rcn_resnet50").named_modules()), dict(on_meta("i3d_resnet50").named_modules())
    three_d = {name for name, m in i3d.items() if isinstance(m, nn.Conv3d) and m.kernel_size[0] > 1}
    assert three_d == {name for name, m in rcn.items() if isinstance(m, RecurrentConv3d)}
    assert all(m.kernel_size == (1, 1, 1) for name, m in rcn.items() if isinstance(m, FrameConv3d))
    assert all(i3d[name].kernel_size[0] == 3 for name in three_d)
    assert all(m.bias is None for m in rcn.values() if isinstance(m, RecurrentConv3d))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["rcn_resnet18", "rcn_resnet34", "rcn_resnet18_last_four", "rcn_resnet18_random"])
def test_rcn_against_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    model = small_model(name, dtype=dtype)
    clip = torch.randn(2, 3, 4, 33, 31).to(dtype)  # odd sizes too
    exact = eager_frame_scores(copy.deepcopy(model).double(), clip.double())
    with torch.no_grad():
        assert_same(model.frame_scores(clip), exact, eager_frame_scores(model, clip))


def test_matched_mid_planes() -> None:
    assert [matched_mid_planes(c, c, 3, 3) for c in (64, 128, 256, 512)] == [144, 288, 576, 1152]
    assert matched_mid_planes(3, 64, 7, 3) == 83
    stem = on_meta("r2plus1d_resnet18").stem.conv
    assert (stem.spatial.out_channels, stem.temporal.kernel_size) == (83, (3, 1, 1))
    own = on_meta("r2plus1d_resnet18", stem_mid_planes=45).stem.conv
    assert own.spatial.out_channels == 45


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (("last", 4), ["layer3.5.conv2", "layer4.0.conv2", "layer4.1.conv2", "layer4.2.conv2"]),
        (("spaced", 4), ["layer1.2.conv2", "layer2.3.conv2", "layer3.3.conv2", "layer4.2.conv2"]),
        (("every", 8), ["layer2.3.conv2", "layer4.1.conv2"]),
        (lambda name, _: name == "stem.conv", ["stem.conv"]),
        ("none", []),
    ],
    ids=["last", "spaced", "every", "predicate", "none"],
)
def test_recurrent_layers(choice: object, expected: list[str]) -> None:
    model = on_meta("rcn_resnet50", recurrent_layers=choice)
    assert [name for name, m in model.named_modules() if isinstance(m, RecurrentConv3d)] == expected
    rest = [m for m in model.modules() if isinstance(m, FrameConv3d) and m.kernel_size[1] > 1]
    assert len(rest) == 17 - len(expected)


@pytest.mark.parametrize(("name", "causal"), [("rcn_resnet18", True), ("i3d_resnet50", False)])
def test_gating(name: str, causal: bool) -> None:
    model = on_meta(name, gating=True)
    gates = [m for m in model.modules() if isinstance(m, FeatureGate)]
    assert len(gates) == sum(len(stage) for stage in stages(model))
    assert {gate.causal for gate in gates} == {causal}
    model(torch.empty(1, 3, 8, 32, 32, device="meta"))


def test_stem_pool_and_channels() -> None:
    model = on_meta("rcn_resnet18", stem_pool=True, in_channels=20)
    assert model.stem(torch.empty(1, 20, 4, 112, 112, device="meta")).shape == (1, 64, 4, 28, 28)
    pool, x = create_model("r2d_resnet26", width=2).stem.pool, torch.randn(2, 3, 4, 9, 12)
    for t in range(4):
        assert torch.equal(pool(x)[:, :, t], nn.functional.max_pool2d(x[:, :, t], 3, 2, 1))
    with torch.device("meta"):
        models = {name: create_model(name) for name in list_models("*_resnet*")}
    pooled = {name for name, model in models.items() if isinstance(model, VideoResNet) and model.stem.pool is not None}
    assert pooled == {"r2d_resnet26", "r2plus1d_resnet50", "r3d_resnet50"}


def test_clip_score_is_the_mean_of_the_frames() -> None:
    model = small_model("rcn_resnet18")
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(clip), model.frame_scores(clip).mean(2))


@pytest.mark.parametrize("memory_format", [torch.channels_last_3d, torch.contiguous_format], ids=str)
def test_memory_formats(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = create_model("rcn_resnet18", width=4, num_classes=3, memory_format=memory_format).eval().double()
    seen = []
    model.layer1.register_forward_hook(lambda module, arguments, output: seen.append(output))
    clip = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
    scores = model(clip)
    if memory_format == torch.channels_last_3d:
        assert seen[0].is_contiguous(memory_format=torch.channels_last_3d)
        assert model.stem.conv.weight_xh.is_contiguous(memory_format=torch.channels_last_3d)
    torch.manual_seed(0)
    other = create_model("rcn_resnet18", width=4, num_classes=3).eval().double()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(scores, other(clip.contiguous(memory_format=torch.channels_last_3d)))


def test_initialisation() -> None:
    model = create_model("rcn_resnet18", num_classes=7)
    assert torch.equal(model.layer4[1].conv2.weight_hh, torch.eye(512))
    deviation = model.layer4[1].conv2.weight_xh.std().item()
    assert abs(deviation / (2 / (9 * 512)) ** 0.5 - 1) < 0.02
    assert abs(model.head.conv.weight.std().item() / 0.01 - 1) < 0.1
    assert not model.head.conv.bias.any()
    for name in ("i3d_resnet18", "r2plus1d_resnet18", "r2d_resnet26"):
        others = create_model(name, width=16)
        for layer in (m for m in others.modules() if isinstance(m, nn.Conv3d) and m is not others.head.conv):
            fan_out = layer.weight[:, 0].numel()
            near = 5 / (2 * layer.weight.numel()) ** 0.5  # five standard errors
            assert abs(layer.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < near
    random = create_model("rcn_resnet18", hidden_init="random", width=16)
    assert not torch.equal(random.stem.conv.weight_hh, torch.eye(16))


def test_dropout_acts_in_training_only() -> None:
    model = small_model("rcn_resnet18")
    model.head.dropout.p = 0.5
    x = torch.randn(1, 32, 2, 2, 2)
    assert torch.equal(model.head(x), model.head(x))
    model.head.train()
    assert not torch.equal(model.head(x), model.head(x))


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    model = small_model("rcn_resnet18", dtype=torch.float64)
    clip = torch.randn(1, 3, 3, 32, 32, dtype=torch.float64)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(clip).sum(), parameters)
    saved = torch.autograd.grad(checkpoint(model, clip, use_reentrant=False).sum(), parameters)
    for a, b in zip(plain, saved, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", list_models("*_resnet*"))
def test_every_model_runs_and_is_copied(name: str) -> None:
    model = create_model(name, num_classes=3, width=4)
    clip = torch.randn(2, 3, 8, 32, 32)
    model.train()(clip).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    other = create_model(name, num_classes=3, width=4).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(clip), model(clip))
        assert torch.equal(copy.deepcopy(model)(clip), model(clip))


def test_whole_models_are_saved() -> None:
    model, file = small_model("rcn_resnet18"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    clip = torch.randn(1, 3, 2, 32, 32)
    assert torch.equal(loaded(clip), model(clip))
    assert loaded.memory_format == torch.channels_last_3d


@pytest.mark.parametrize("name", ["rcn_resnet18", "r2plus1d_resnet18"])
def test_gradients_sample_by_sample(name: str) -> None:
    """torch.vmap's tensors have no channels-last layout."""
    model = small_model(name, dtype=torch.float64)
    weights = {key: value.detach() for key, value in model.named_parameters()}
    clips = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)

    def loss(weights: dict[str, torch.Tensor], clip: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (clip[None],)).square().mean()

    together = torch.vmap(torch.func.grad(loss), (None, 0))(weights, clips)
    for index, clip in enumerate(clips):
        model.zero_grad()
        model(clip[None]).square().mean().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(together[key][index], parameter.grad)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("block", "plain"),
        ("conv", "c3d"),
        ("layers", (2, 2, 2)),
        ("layers", (2, 0, 2, 2)),
        ("temporal_strides", (1, 2, 2, 2)),
        ("temporal_strides", (1, 1)),
        ("temporal_kernel", 2),
        ("stem_frames", 8),
        ("num_classes", 0),
        ("width", 0),
        ("width", "8"),
        ("in_channels", 0),
        ("recurrent_layers", ("last", 18)),
        ("memory_format", torch.channels_last),
        ("update", "max"),
        ("hidden_init", "zeros"),
    ],
)
def test_bad_arguments(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument), torch.device("meta"):
        VideoResNet(**{argument: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"srtg": "final", "srtg_window": 0}, "^srtg_window: "),
        ({"srtg": "final", "srtg_fusion": "sum"}, "^srtg_fusion: "),
        ({"nonlocal_after": ("layer1.0",), "nonlocal_memory": -1}, "^nonlocal_memory: "),
        ({"nonlocal_after": ("layer1.0",), "nonlocal_kind": "cosine"}, "^nonlocal_kind: "),
        ({"srtg_gate": False}, "^srtg_gate: changes nothing without srtg"),
        ({"srtg_window": 3}, "^srtg_window: changes nothing without srtg"),
        ({"nonlocal_after": ("layer1.0", "layer4.2")}, r"^nonlocal_after: expected names of blocks .*\['layer4.2'\]"),
        ({"nonlocal_memory": 2}, "^nonlocal_memory: changes nothing without nonlocal_after"),
    ],
    ids=str,
)
def test_errors_of_layers_name_the_networks_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_model("rcn_resnet18", width=2, **options)


def test_dense() -> None:
    assert on_meta("i3d_resnet50", dense=True).frame_scores(torch.empty(1, 3, 9, 32, 32, device="meta")).shape[2] == 9
    with pytest.raises(ValueError, match="dense"):
        on_meta("i3d_resnet50", dense=True, temporal_strides=(1, 1, 1, 2))


def test_names() -> None:
    assert list_models() == sorted(list_models())
    assert list_models("rcn_*") == ["rcn_resnet18", "rcn_resnet34", "rcn_resnet50"]
    assert rcu_ops.list_models("i3d_*_dense") == [f"i3d_resnet{depth}_dense" for depth in (18, 34, 50)]
    assert list_models("nothing") == []
    with pytest.raises(ValueError, match=r"did you mean rcn_resnet18"):
        rcu_ops.create_model("rcn_resnet8")
    with pytest.raises(ValueError, match=r"expected one of .*rcn_resnet50"):
        create_model("zzz")
    with pytest.raises(TypeError, match="wings"):
        create_model("rcn_resnet18", wings=2)


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @register_model("own")
    def own(planes: int = 2) -> nn.Module:
        return nn.Conv3d(3, planes, 1)

    assert create_model("own", planes=4).out_channels == 4
    assert "own" in list_models()
    with pytest.raises(ValueError, match="'own' already"):
        register_model("own")(own)
