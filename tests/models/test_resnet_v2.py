"""ResNet-v2, the temporal segment network on it, and C3D: sizes, numbers, and the same written out in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from rcu_ops import Streamer
from rcu_ops.models import C3D, TemporalSegmentNetwork, create_model, resnet_v2
from tests.networks import assert_same, calibrated


def gmac(model: nn.Module, *shape: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() / 2e9


def small_tsn(depth: int = 50, **options: object) -> TemporalSegmentNetwork:
    model = create_model(f"tsn_resnet{depth}v2", num_classes=64, width=4, **options)
    return calibrated(model, frames=2, size=64)


def eager_scores(model: TemporalSegmentNetwork, clip: Tensor) -> Tensor:
    """[N,K,T] by 2D convolutions over each frame, from the state dict alone."""
    weights = model.state_dict()

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"][:, :, 0], weights.get(f"{name}.bias"), stride, padding)

    def act(name: str, x: Tensor) -> Tensor:
        mean, var, gamma, beta = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, eps=1e-5))

    scores = []
    for t in range(clip.shape[2]):
        x = F.max_pool2d(conv("trunk.conv", clip[:, :, t], 2, 3), 3, 2, 1)
        for stage in range(1, 5):
            unit = 0
            while f"trunk.layer{stage}.{unit}.conv1.weight" in weights:
                name = f"trunk.layer{stage}.{unit}"
                stride = 2 if stage > 1 and unit == 0 else 1
                y = act(f"{name}.bn1", x)
                shortcut = conv(f"{name}.shortcut", y, stride) if f"{name}.shortcut.weight" in weights else x
                y = conv(f"{name}.conv2", act(f"{name}.bn2", conv(f"{name}.conv1", y)), stride, 1)
                x = shortcut + conv(f"{name}.conv3", act(f"{name}.bn3", y))
                unit += 1
        scores.append(conv("head.conv", act("bn", x).mean((2, 3), keepdim=True)).flatten(1))
    return torch.stack(scores, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_plain_pytorch(dtype: torch.dtype) -> None:
    model = small_tsn().to(dtype)
    clip = torch.randn(2, 3, 2, 64, 64).to(dtype)
    exact = eager_scores(copy.deepcopy(model).double(), clip.double())
    with torch.no_grad():
        assert_same(model.frame_scores(clip), exact, eager_scores(model, clip))
        torch.testing.assert_close(model(clip), model.frame_scores(clip).mean(2))


@pytest.mark.parametrize(("depth", "units"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_sizes_of_table_1(depth: int, units: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = create_model(f"tsn_resnet{depth}v2").eval()
    shapes: list[tuple[int, ...]] = []
    trunk = model.trunk
    for stage in (trunk.conv, trunk.pool, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        stage.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.empty(1, 3, 8, 224, 224, device="meta")).shape == (1, 101)
    planes, sizes = (64, 64, 256, 512, 1024, 2048), (112, 56, 56, 28, 14, 7)
    assert shapes == [(c, 8, s, s) for c, s in zip(planes, sizes, strict=True)]
    assert tuple(len(stage) for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)) == units
    # What a ResNet of this depth costs at 224x224: 4.1 and 7.8 GMAC (the v2 shortcuts and strides included).
    assert gmac(model, 1, 3, 1, 224, 224) == pytest.approx({50: 4.09, 101: 7.80}[depth], abs=0.02)
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head"))
    assert backbone == {50: 23_500_352, 101: 42_492_480}[depth]


def test_streams_frame_by_frame() -> None:
    model = small_tsn().double()
    clip = torch.randn(1, 3, 3, 64, 64, dtype=torch.float64)
    streamer, state, scores = Streamer(model), None, []
    with torch.inference_mode():
        for t in range(3):
            frame, state = streamer(clip[:, :, t : t + 1], state)
            scores.append(frame)
        torch.testing.assert_close(torch.cat(scores, 2), model.frame_scores(clip))


def test_flow_stream_compile_and_export(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, (1, 1, 2, 3))  # the same code, a fraction of the tracing time
    model = small_tsn(in_channels=20).double()
    clip = torch.randn(2, 20, 2, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(clip)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(clip), expected)
        shapes = ({0: Dim("N", min=1, max=64), 2: Dim("T", min=1, max=64)},)
        program = export(model, (clip,), dynamic_shapes=shapes)
        other = torch.randn(1, 20, 5, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(program.module()(other), model(other))


def test_c3d_numbers() -> None:
    with torch.device("meta"):
        model = create_model("c3d")
    assert isinstance(model, C3D)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted - sum(parameter.numel() for parameter in model.head.parameters()) == 77_995_776
    clip = torch.empty(2, 3, 16, 112, 112, device="meta")
    assert model(clip).shape == (2, 487)
    assert model.features(clip).shape == (2, 4096)
    assert gmac(model, 1, 3, 16, 112, 112) == pytest.approx(38.5, abs=0.1)


def test_c3d_runs_and_refuses() -> None:
    model = create_model("c3d", num_classes=3, width=1, hidden=8)
    clip = torch.randn(2, 3, 16, 112, 112)
    model(clip).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.features(clip).clamp(min=0), model.features(clip))
        assert torch.equal(model(clip), model(clip))
    with pytest.raises(ValueError, match=r"C3D: expected a clip \[N,3,16,112,112\], got \[1, 3, 8, 112, 112\]"):
        model(torch.zeros(1, 3, 8, 112, 112))
    for option in ("num_classes", "width", "hidden", "in_channels"):
        with pytest.raises(ValueError, match=option):
            create_model("c3d", **{option: 0})


@pytest.mark.parametrize(("option", "value"), [("depth", 34), ("num_classes", 0), ("width", 0), ("in_channels", 0)])
def test_bad_arguments(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=option):
        TemporalSegmentNetwork(**{option: value})
