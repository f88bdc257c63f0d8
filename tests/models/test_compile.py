"""Every model under torch.compile and torch.export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.export import Dim, export

from rcu_ops.models import VideoResNet, create_model, list_models
from rcu_ops.nn import fuse_for_inference
from tests.networks import calibrated
from tests.tolerance import assert_close_to_reference

FAMILIES = {
    "rcn": {"conv": "rcn"},
    "rcn_bottleneck": {
        "conv": "rcn",
        "block": "bottleneck",
        "recurrent_layers": ("last", 3),
        "update": "mean",
        "gating": True,
    },
    "i3d": {"conv": "i3d", "temporal_strides": (1, 2, 2, 2), "gating": True},
    "r2plus1d": {"conv": "r2plus1d", "temporal_strides": (1, 2, 2, 2)},
    "srtg": {"conv": "i3d", "temporal_strides": (1, 2, 2, 2), "srtg": "final"},
    "srtg_causal": {"conv": "rcn", "block": "bottleneck", "update": "mean", "srtg": "mid", "srtg_window": 3},
}


def shallow(family: str) -> VideoResNet:
    """A network of the family with one block per stage: the same code, a fraction of the tracing time."""
    model = VideoResNet(**{"layers": (1, 1, 1, 1), "num_classes": 64, "width": 4, **FAMILIES[family]})
    model = calibrated(model, frames=8)
    assert isinstance(model, VideoResNet)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_compile_with_gradients(family: str) -> None:
    torch.compiler.reset()
    model = shallow(family).double()
    clip = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    scores, expected = compiled(clip), model(clip)
    torch.testing.assert_close(scores, expected)
    for a, b in zip(
        torch.autograd.grad(scores.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_inductor(fused: bool) -> None:
    torch.compiler.reset()
    model = shallow("rcn")
    clip = torch.randn(2, 3, 4, 16, 16)
    form = fuse_for_inference(model) if fused else model
    compiled = torch.compile(form, fullgraph=True)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(clip.double())
        assert_close_to_reference(compiled(clip), exact, model(clip), by_sample=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_with_any_batch_and_length(family: str) -> None:
    model = shallow(family).double()
    clip = torch.randn(2, 3, 16, 32, 32, dtype=torch.float64)
    # torch.export takes a dimension of 1 for a constant: after I3D's temporal strides that is a clip of up to 8 frames.
    length = Dim("T", min=1 if model.causal else 9, max=4096)
    with torch.no_grad():
        program = export(model, (clip,), dynamic_shapes=({0: Dim("N", min=1, max=1024), 2: length},))
        for shape in ((2, 3, 16, 32, 32), (3, 3, 21, 32, 32), (1, 3, 10, 32, 32)):
            other = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(program.module()(other), model(other))


def test_export_of_a_fused_model() -> None:
    model = fuse_for_inference(shallow("rcn").double())
    clip = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        shapes = ({0: Dim("N", min=1, max=64), 2: Dim("T", min=1, max=64)},)
        program = export(model, (clip,), dynamic_shapes=shapes)
        other = torch.randn(1, 3, 7, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("rcn_*"))
def test_every_causal_name_compiles(name: str) -> None:
    torch.compiler.reset()
    model = create_model(name, num_classes=3, width=4).eval().to("meta")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert compiled(torch.empty(1, 3, 8, 32, 32, device="meta")).shape == (1, 3)
