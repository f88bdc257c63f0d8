"""FASTER: scheduling, equality of all its forms, its costs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from rcu_ops import cost_patterns, fuse_for_inference
from rcu_ops.cli import main
from rcu_ops.models import Faster, VideoResNet, create_model
from rcu_ops.nn import AGGREGATORS, make_aggregator
from rcu_ops.streaming import detach_state, load_state, save_state, state_bytes
from tests.networks import assert_same, calibrated

TABLE_4 = {
    0: {8: 982.4, 16: 980.2, 32: 979.2},
    1: {8: 553.6, 16: 552.0, 32: 550.4},
    3: {8: 339.2, 16: 337.6, 32: 336.0},
    7: {8: 230.4, 16: 230.4, 32: 228.8},
    15: {8: 176.0, 16: 176.0},
    31: {8: 150.4},
}
"""The paper's total GFLOPs by cheap clips per expensive one and clip length."""


def small(aggregator: str = "fast_gru", pattern: tuple[int, int] = (1, 1), classes: int = 32) -> Faster:
    common = {"num_classes": classes, "width": 4, "stem_pool": True}
    expensive = VideoResNet("bottleneck", (1, 1, 1, 1), "r2plus1d", temporal_strides=(1, 2, 2, 2), **common)
    cheap = VideoResNet("bottleneck", (1, 1, 1, 1), "2d", stem_frames=8, **common)
    for network in (expensive, cheap):
        calibrated(network, frames=8, size=32)
    model = Faster(expensive, cheap, make_aggregator(aggregator, 128, classes), pattern, 8)
    for module in model.aggregator.modules():  # statistics other than 0 and 1
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return model.eval()


def one_after_the_other(model: Faster, frames: Tensor) -> Tensor:
    """Scores [N,classes,K] by steps of one clip."""
    state, scores = None, []
    for k, clip in enumerate(frames.split(8, dim=2)):
        network = model.expensive if model.pattern[0] and k % (1 + model.pattern[1]) == 0 else model.cheap
        x = network.features(clip) if model.aggregator.takes == "features" else network(clip)
        score, state = model.aggregator.step(x, state)
        scores.append(score)
    return torch.stack(scores, dim=2)


def test_schedule() -> None:
    model = small(pattern=(1, 3))
    assert [k for k in range(9) if model.is_expensive(k)] == [0, 4, 8]
    assert all(small(pattern=(1, 0)).is_expensive(k) for k in range(5))
    assert not any(small(pattern=(0, 1)).is_expensive(k) for k in range(5))
    ran: list[tuple[str, int]] = []
    for name in ("expensive", "cheap"):
        network = getattr(model, name)
        plain = network.features
        network.features = lambda clip, name=name, plain=plain: (ran.append((name, clip.shape[0])), plain(clip))[1]
    model(torch.randn(2, 3, 48, 32, 32))
    assert ran == [("expensive", 4), ("cheap", 8)]  # 2 of 6 clips of 2 samples, each network in one batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", [(1, 1), (1, 2), (1, 0), (0, 1)])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_step_stream_and_forward_are_one(aggregator: str, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    model = small(aggregator, pattern).to(dtype)
    frames = torch.randn(2, 3, 32, 32, 32).to(dtype)
    with torch.no_grad():
        exact = one_after_the_other(copy.deepcopy(model).double(), frames.double())
        eager = one_after_the_other(model, frames)
        scores = model.clip_scores(frames)
        assert_same(scores, exact, eager)
        assert torch.equal(model(frames), scores[:, :, -1])
        for chunks in ([1] * 32, [5, 11, 16], [32]):
            state, parts = None, []
            for chunk in frames.split(chunks, dim=2):
                part, state = model.stream(chunk, state)
                parts.append(part)
            assert_same(torch.cat(parts, 2), exact, eager)
    assert state is not None
    assert state["#frames"].tolist() == [32, 32]


def test_state_does_not_grow_and_travels(tmp_path: Path) -> None:
    model = small()
    sizes, state = [], None
    frames = torch.randn(1, 3, 40, 32, 32)
    with torch.no_grad():
        for k in range(5):
            _, state = model.stream(frames[:, :, 8 * k : 8 * k + 8], state)
            sizes.append(state_bytes(state))
        assert len(set(sizes)) == 1
        _, half = model.stream(frames[:, :, :3], state)
        save_state(detach_state(half), tmp_path / "state.safetensors")
        resumed, _ = model.stream(frames[:, :, 3:8], load_state(tmp_path / "state.safetensors"))
        expected, _ = model.stream(frames[:, :, :8], state)
        assert torch.equal(resumed, expected)
        with pytest.raises(ValueError, match="state"):
            model.stream(frames[:, :, :8, :16], half)
        for wrong in ({}, {"o": half["o"]}, {key: half[key] for key in ("#frames", "#pending")}):
            with pytest.raises(ValueError, match="state: "):
                model.stream(frames[:, :, :8], wrong)
        for nothing in (frames[:, :, :0], frames[0]):
            with pytest.raises(ValueError, match=r"frames: expected \[N,3,t,H,W\] with t >= 1, got"):
                model.stream(nothing)
        with pytest.raises(ValueError, match=r"clips: expected \[N,K,3,L,H,W\] with L = 8, got \[1, 1, 3, 4, 32, 32\]"):
            model.clip_inputs(frames[:, None, :, :4])
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train().stream(frames)


def test_average_is_that_of_the_clips_scores() -> None:
    model = small("average")
    frames = torch.randn(2, 3, 24, 32, 32)
    with torch.no_grad():
        networks = (model.expensive, model.cheap, model.expensive)
        singles = [n(clip) for n, clip in zip(networks, frames.split(8, 2), strict=True)]
        torch.testing.assert_close(model(frames), torch.stack(singles).mean(0))


def test_frozen_backbones() -> None:
    model = small().freeze_backbones().train()
    assert not model.expensive.training
    assert not model.cheap.training
    assert model.aggregator.training
    model(torch.randn(1, 3, 16, 32, 32)).sum().backward()
    assert all(p.grad is None for network in (model.expensive, model.cheap) for p in network.parameters())
    assert all(p.grad is not None for p in model.aggregator.parameters())


def test_fused() -> None:
    model = small()
    frames = torch.randn(1, 3, 16, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(frames.double())
        assert_same(fuse_for_inference(model)(frames), exact, model(frames))


def test_compile() -> None:
    torch.compiler.reset()
    model = small("fast_gru", (1, 2)).double()
    frames = torch.randn(1, 3, 24, 32, 32, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(frames), model(frames))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(frames).sum(), model.expensive.stem.bn.weight),
        torch.autograd.grad(model(frames).sum(), model.expensive.stem.bn.weight),
    )


def test_export_with_any_batch() -> None:
    model = small().double()
    frames = torch.randn(2, 3, 16, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        program = export(model, (frames,), dynamic_shapes=({0: Dim("N", min=1, max=64)},))
        for n in (1, 3):
            other = torch.randn(n, 3, 16, 32, 32, dtype=torch.float64)
            torch.testing.assert_close(program.module()(other), model(other))


def test_names_options_and_errors() -> None:
    with torch.device("meta"):
        for name, length, pattern in (("faster16", 16, (1, 7)), ("faster32", 32, (1, 1))):
            model = create_model(name, num_classes=5)
            assert (model.clip_length, model.pattern) == (length, pattern)
            assert model(torch.empty(1, 3, 256, 64, 64)).shape == (1, 5)
            assert model.aggregator.weight_ux.shape == (1024, 2048)
        tied = create_model("faster16", aggregator_options={"tie_candidate": True}, expensive="r3d_resnet50", width=8)
        assert tied.aggregator.weight_vo is None
        assert create_model("faster32", pattern=-1, width=8).pattern == (0, 1)
        for options, message in (
            ({"aggregator": "sum"}, "aggregator"),
            ({"expensive": "r3d_resnet34"}, "as many channels"),
            ({"pattern": -1, "width": 8, "clip_length": 0}, "clip_length"),
            ({"pattern": -2}, "pattern: expected x >= 0"),
            ({"cheap": "tsn_resnet50v2", "width": 8}, "tsn_resnet50v2: expected a video ResNet"),
            ({"aggregator_options": {"reduction": 3}}, "reduction"),
        ):
            with pytest.raises(ValueError, match=message):
                create_model("faster32", **options)
        with pytest.raises(ValueError, match="a multiple of 32"):
            create_model("faster32", width=8)(torch.empty(1, 3, 40, 32, 32))
    for pattern in ((2, 1), (0, 2), (1, -1), (1,)):
        with pytest.raises(ValueError, match="pattern"):
            small(pattern=pattern)


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[int, dict[int, float]]:
    with torch.device("meta"):
        return cost_patterns.table(create_model("faster32"))


def test_table_4(rows: dict[int, dict[int, float]]) -> None:
    printed = {
        (pattern, length): cost_patterns.per_clip_rounded(total, 256 // length)
        for pattern, totals in rows.items()
        for length, total in totals.items()
    }
    paper = {(pattern, length): total for pattern, totals in TABLE_4.items() for length, total in totals.items()}
    assert printed.keys() == paper.keys()
    assert len(paper) == 15
    # The paper's 980.2 for all-expensive at 16 frames is 16 clips of 61.2625 GFLOPs: no one-digit cost per clip.
    assert {cell for cell in paper if printed[cell] != pytest.approx(paper[cell])} == {(0, 16)}


def test_cost_of_a_step_and_totals() -> None:
    with torch.device("meta"):
        model = create_model("faster32")
        costs = {length: cost_patterns.clip_costs(model, length) for length in (8, 16, 32)}
        r3d = cost_patterns.clip_costs(create_model("faster32", expensive="r3d_resnet50"), 32)
    steps = {8: 0.719, 16: 1.439, 32: 2.877}
    for length, cost in costs.items():
        classifier = 2048 * 400 / 1e9  # of every prediction
        assert cost.step - classifier == pytest.approx(steps[length], rel=1e-3)
    assert costs[32].total(1, 8) == pytest.approx(550.5, rel=1e-3)
    assert r3d.total(1, 8) == pytest.approx(542.17, rel=1e-3)
    assert costs[32].total(-1, 8) == pytest.approx(8 * 12.666 + 7 * 2.877, rel=1e-3)
    assert costs[8].average(True, 32) == pytest.approx(959.3, rel=1e-3)
    assert costs[32].average(False, 8) == pytest.approx(101.3, rel=1e-3)
    # An incomplete last turn has its expensive clip all the same.
    assert costs[8].total(7, 9) == pytest.approx(2 * costs[8].expensive + 7 * costs[8].cheap + 8 * costs[8].step)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["cost", "faster32", "--json", str(tmp_path / "cost.json")]) == 0
    out = capsys.readouterr().out
    assert "256 frames, 224 x 224" in out
    assert next(line for line in out.splitlines() if line.startswith("1:1 ")).endswith("550.5*")
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["gmac"] == pytest.approx(550.5, rel=1e-3)
    assert set(written["gmac_by_pattern"]) == {"0", "1", "3", "7", "15", "31"}
    assert main(["cost", "faster32", "--frames", "40"]) == 2
    assert "multiple of 32" in capsys.readouterr().err
