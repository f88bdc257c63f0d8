"""The cost of a network: counts, time shares, table, JSON, picture, command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rcu_ops import Streamer, cost, fuse_for_inference
from rcu_ops.cli import main
from rcu_ops.models import create_model
from rcu_ops.nn import RecurrentConv3d, RelationalLSTM, make_aggregator
from rcu_ops.streaming import state_bytes
from tests.networks import small_model


def test_counts_of_rcn18() -> None:
    with torch.device("meta"):
        model = create_model("rcn_resnet18").eval()
    assert cost.count_parameters(model) == 12_778_448
    macs = cost.count_macs(model, (1, 3, 16, 112, 112))
    assert set(macs) == set(cost.KINDS)
    assert macs["head"] == 16 * 512 * 400
    shortcuts = sum(16 * c * 2 * c * size**2 for c, size in ((64, 28), (128, 14), (256, 7)))
    stem = 16 * 49 * 3 * 64 * 56**2
    blocks = 16 * 9 * sum(3 * c * c * s * s for c, s in ((128, 28), (256, 14), (512, 7)))
    blocks += 16 * 9 * (4 * 64 * 64 * 56**2 + sum(c * 2 * c * s * s for c, s in ((64, 28), (128, 14), (256, 7))))
    assert macs["convolution"] == stem + blocks + shortcuts
    assert macs["recurrence"] > 0
    assert macs["other"] == macs["normalisation and activation"] == 0


def test_state_bytes_are_those_of_a_stream() -> None:
    model = small_model("rcn_resnet18")
    with torch.no_grad():
        _, state = Streamer(model)(torch.randn(2, 3, 1, 32, 32))
    assert cost.stream_state_bytes(model, (2, 3, 9, 32, 32)) == state_bytes(state)
    assert cost.stream_state_bytes(small_model("i3d_resnet18"), (1, 3, 8, 32, 32)) is None


@pytest.mark.parametrize("fused", [False, True])
def test_time_shares(fused: bool) -> None:
    model = small_model("rcn_resnet18_mean_gated")
    steps: list[float] = []
    form = fuse_for_inference(model) if fused else model
    milliseconds, shares = cost.measure_time(form, (1, 3, 4, 32, 32), seconds=0.05, on_step=steps.append)
    assert milliseconds > 0
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["convolution"] > 0
    assert shares["recurrence"] > 0
    assert shares["head"] > 0
    assert fused or shares["normalisation and activation"] > 0
    assert steps[-1] == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in form.modules())


def test_networks_that_do_not_stream_are_measured_by_clip() -> None:
    found = cost.measure_cost(small_model("i3d_resnet18"), (1, 3, 8, 32, 32), seconds=0.05)
    assert not found.causal
    assert found.state_bytes is None
    assert found.time_by_kind["recurrence"] == 0
    assert "in clips of 8" in cost.format_cost(found)


def test_any_module() -> None:
    model = nn.Sequential(RecurrentConv3d(3, 4, 3), nn.ReLU()).eval()
    found = cost.measure_cost(model, (1, 3, 2, 8, 8), seconds=0.01)
    assert found.parameters == 3 * 4 * 9 + 16
    assert found.gmac_by_kind["convolution"] == pytest.approx(2 * 36 * 108 / 1e9)
    assert found.model == "Sequential"


def test_products_of_layers_with_a_state_are_their_recurrence() -> None:
    """Linear maps within a Relational LSTM or an SRTG's LSTM too, as in the shares of time."""
    options = {"backbone": "resnet50v2", "width": 2}
    macs = cost.count_macs(create_model("relational_two_branch", num_classes=5, **options).eval(), (1, 3, 4, 64, 64))
    positions, channels, hidden = 4, 64, 32
    maps = 4 * positions * (16 * channels * hidden + 8 * hidden * hidden)
    attention = 4 * 2 * 4 * 2 * positions * positions * hidden
    assert macs["recurrence"] == maps + attention + positions * hidden * channels  # the 1x1 after the last step alone
    assert macs["other"] == 0
    assert macs["head"] == 5 * 2 * channels
    gated = create_model("srtg_r3d_resnet34", num_classes=5, width=2).eval()
    macs = cost.count_macs(gated, (1, 3, 8, 32, 32))
    assert macs["other"] == 0
    assert macs["recurrence"] > 0


@pytest.mark.parametrize(
    ("kind", "products"),
    [  # of two samples of three clips, two of which are steps, with four positions
        ("concat", 2 * 2 * 4 * 2 * 64),
        ("lstm", 2 * 2 * 8 * 64),
        ("gru", 2 * (3 + 2) * 3 * 64),
        ("fast_gru", 2 * 2 * 4 * (2 * 4 * 8 + 2 * 8 * 2 + 2 * 64)),
    ],
)
def test_an_aggregator_is_a_recurrence_and_a_head(kind: str, products: int) -> None:
    with torch.device("meta"):
        aggregator = make_aggregator(kind, 8, 5).eval()
    macs = cost.count_macs(aggregator, (2, 3, 8, 1, 2, 2))
    assert macs["head"] == 2 * 3 * 8 * 5
    assert macs["convolution" if kind == "concat" else "recurrence"] == products
    assert sum(macs.values()) == macs["head"] + products


def test_a_layer_on_its_own_costs_what_it_costs_within_a_network() -> None:
    with torch.device("meta"):
        layer = RelationalLSTM(8, 6).eval()
        network = nn.Sequential(layer, nn.ReLU()).eval()
    alone = cost.count_macs(layer, (1, 8, 3, 4, 4))
    assert alone == cost.count_macs(network, (1, 8, 3, 4, 4))
    assert alone["recurrence"] > 0
    assert alone["other"] == 0


def test_networks_of_features(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "res_lstm", "--classes", "51", "--time", "--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "features              N = 1, 25 clips, 1024 numbers each" in out
    assert "parameters            16,845,824" in out
    assert "time per clip" in out
    model = create_model("res_lstm", num_classes=3, input_size=8, num_layers=3).eval()
    found = cost.measure_cost(model, (2, 5, 8), seconds=0.05)
    assert found.gmac_by_kind["recurrence"] == pytest.approx(2 * 5 * 3 * 4 * 2 * 8 * 8 / 1e9)
    assert found.state_bytes == 2 * 2 * 3 * 8 * 4
    assert found.time_by_kind["recurrence"] > 0.3
    assert main(["cost", "res_lstm", "--size", "32"]) == 2
    assert "input_size=F" in capsys.readouterr().err


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["cost", "rcn_resnet18", "--json", str(tmp_path / "new" / "folder" / "c.json")]) == 0
    out = capsys.readouterr().out
    assert "12,778,448" in out
    assert "time per frame" not in out
    written = json.loads((tmp_path / "new" / "folder" / "c.json").read_text())
    assert written["parameters"] == 12_778_448
    assert written["milliseconds_per_frame"] is None
    assert written["causal"] is True
    assert main(["cost", "r3d_resnet50", "--frames", "8", "--size", "224", "--model-option", "stem_pool=false"]) == 0
    assert "109.34 GMAC" in capsys.readouterr().out  # without the option 29.46


def test_command_with_time_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--time", "--fused", "--seconds", "0.1", "--size", "32", "--frames", "2", "--dtype", "bfloat16"]
    assert main(["cost", "rcn_resnet18", *options, "--plot", str(tmp_path / "c.png")]) == 0
    out = capsys.readouterr().out
    assert "rcn_resnet18 (fused)" in out
    assert "ms streamed (bfloat16, cpu)" in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_network.py").write_text("from torch import nn\ndef make(): return nn.Conv3d(3, 4, 1)\nword = 3\n")
    monkeypatch.chdir(tmp_path)
    assert main(["cost", "own_network:make"]) == 0
    assert "parameters            16" in capsys.readouterr().out
    for name in ("own_network:nothing", "own_network:word", "no_such_module:make", "rcn_resnet19", "torch.nn:ReLU"):
        assert main(["cost", name]) == 2
        assert capsys.readouterr().err.startswith("rcu-ops: error: MODEL")
    (tmp_path / "own_network2.py").write_text("def make(): return 3\n")
    assert main(["cost", "own_network2:make"]) == 2
    assert "not an nn.Module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "0"], "--frames: expected at least 1, got 0"),
        (["--fused"], "--fused"),
        (["--model-option", "stem=1"], "MODEL rcn_resnet18: it has no argument 'stem'"),
        (["--time", "--seconds", "0"], "--seconds"),
        (["--time", "--device", "nonsense"], "--device nonsense"),
        (["--json", "/dev/null/c.json"], "--json: /dev/null cannot be made: "),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "rcn_resnet18", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
