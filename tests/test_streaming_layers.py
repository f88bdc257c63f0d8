"""Layers with a state, and networks that are no recurrent ResNet, in every dtype: chunks equal the clip.

:mod:`tests.test_streaming` does the same with recurrent ResNets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rcu_ops import Streamer, create_model
from rcu_ops.nn import (
    AGGREGATORS,
    SRTG,
    FeatureGate,
    NonLocalBlock,
    RecurrentConv3d,
    RelationalLSTM,
    ResidualRNN,
    make_aggregator,
)
from rcu_ops.streaming import FRAMES_KEY, SIZE_KEY
from tests.networks import assert_same, calibrated

C = 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "recurrent_conv": lambda: RecurrentConv3d(C, C, 3, padding=1),
    "recurrent_conv_mean": lambda: RecurrentConv3d(C, C, 3, padding=1, update="mean", hidden_init="random"),
    "feature_gate": lambda: FeatureGate(C, causal=True),
    "relational_lstm": lambda: RelationalLSTM(C),
    "relational_lstm_count": lambda: RelationalLSTM(C, 12, 8, normalize="count", bias=True, norm=False, project=False),
    "nonlocal_gaussian": lambda: NonLocalBlock(C, memory=2),
    "nonlocal_dot": lambda: NonLocalBlock(C, memory=3, kind="dot"),
    "nonlocal_alone": lambda: NonLocalBlock(C, memory=0),
    "srtg": lambda: SRTG(C, gate=False),
    "srtg_add": lambda: SRTG(C, gate=False, fusion="add"),
    "srtg_window": lambda: SRTG(C, window=3),
    **{kind: lambda kind=kind: _FramesAsClips(kind) for kind in AGGREGATORS},
}


class _FramesAsClips(nn.Module):
    """An aggregator over features [N,C,T,H,W], every frame of which is a clip; for scores their mean over positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.aggregator = make_aggregator(kind, C, C)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,T,H,W] -> [N,C,T]."""
        clips = x.transpose(1, 2).unsqueeze(3)
        scores, _ = self.aggregator(clips if self.aggregator.takes == "features" else clips.mean((3, 4, 5)))
        return scores.transpose(1, 2)


def in_chunks(streamer: Streamer, x: Tensor, chunks: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    parts, state = [], None
    for frames in x.split(chunks, dim=2):
        part, state = streamer(frames, state)
        parts.append(part)
    assert state is not None
    return torch.cat(parts, 2), state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_chunks_equal_the_clip(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        if not parameter.any():  # a new block's normalisation, which would hide all of it
            nn.init.normal_(parameter, 0.0, 0.5)
    layer = layer.eval().to(dtype)
    x = torch.randn(2, C, 7, 5, 4).to(dtype)
    with torch.no_grad():
        exact, whole = copy.deepcopy(layer).double()(x.double()), layer(x)
        streamer = Streamer(layer)
        for chunks in ([1] * 7, [3, 4]):
            got, state = in_chunks(streamer, x, chunks)
            assert got.dtype == dtype
            assert_same(got, exact, whole)
        # A sample that starts anew takes nothing of its past, NaN included, and its neighbour all of its own.
        spoilt = {key: value.clone() for key, value in state.items()}
        for key in spoilt.keys() - {FRAMES_KEY, SIZE_KEY}:
            spoilt[key][0] = torch.nan
        again, _ = streamer(x[:, :, :3], spoilt, torch.tensor([True, False]))
        assert torch.equal(again[0], streamer(x[:, :, :3])[0][0])
        assert torch.equal(again[1], streamer(x[:, :, :3], state)[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relational_two_branch", {"backbone": "resnet50v2"}),
        ("tsn_resnet50v2", {}),
        ("rcn_resnet18", {"nonlocal_after": ("layer2.1", "layer3.0"), "nonlocal_memory": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_networks_chunks_equal_the_clip(name: str, options: dict[str, object], dtype: torch.dtype) -> None:
    model = create_model(name, num_classes=64, width=4, **options)
    for module in model.modules():
        if isinstance(module, NonLocalBlock):
            nn.init.normal_(module.bn.weight)
    model = calibrated(model, frames=3).to(dtype)
    clip = torch.randn(2, 3, 4, 32, 32).to(dtype)
    with torch.no_grad():
        exact, whole = copy.deepcopy(model).double().frame_scores(clip.double()), model.frame_scores(clip)
        for chunks in ([1] * 4, [3, 1]):
            assert_same(in_chunks(Streamer(model), clip, chunks)[0], exact, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*AGGREGATORS, "lstm stack", "gru stack", "rnn stack"])
def test_steps_over_features_equal_the_sequence(kind: str, dtype: torch.dtype) -> None:
    if kind.endswith("stack"):
        layer: nn.Module = ResidualRNN(C, num_layers=3, cell=kind.split()[0])
        shape: tuple[int, ...] = (2, 6, C)
    else:
        layer = make_aggregator(kind, C, 32)
        shape = (2, 6, 32) if kind == "average" else (2, 6, C, 2, 3, 3)
    layer = layer.to(dtype).eval()
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        exact, whole = copy.deepcopy(layer).double()(x.double())[0], layer(x)[0]
        outputs, state = [], None
        for x_k in x.unbind(1):
            output, state = layer.step(x_k, state)
            outputs.append(output)
        first, state = layer(x[:, :2])
        second, _ = layer(x[:, 2:], state)
    for got in (torch.stack(outputs, 1), torch.cat([first, second], 1)):
        assert got.dtype == dtype
        assert_same(got, exact, whole)
