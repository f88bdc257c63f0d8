"""Streamer.export: a program of one chunk equals the streamer, saved and loaded, for other batches and lengths."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from rcu_ops import Streamer, fuse_for_inference
from rcu_ops.models import VideoResNet
from rcu_ops.nn import NonLocalBlock, RecurrentConv3d, RelationalLSTM
from tests.networks import calibrated


def fused_network() -> nn.Module:
    """A causal network as it is deployed, one block per stage."""
    return fuse_for_inference(calibrated(VideoResNet(layers=(1, 1, 1, 1), num_classes=8, width=4, conv="rcn")))


def mean_layers() -> nn.Module:
    """Layers whose first frame is another computation than the rest: a reset shows."""
    return nn.Sequential(*(RecurrentConv3d(i, o, 3, padding=1, update="mean") for i, o in ((3, 6), (6, 5))))


def walking_layers() -> nn.Module:
    """Layers that go from frame to frame in Python."""
    first = RecurrentConv3d(3, 8, 3, padding=1)
    return nn.Sequential(first, RelationalLSTM(8), NonLocalBlock(8, memory=3))


def saved_and_loaded(streamer: Streamer, *example: object, any_length: bool = False) -> nn.Module:
    """The program of a call like the example's, by way of a file."""
    file = io.BytesIO()
    torch.export.save(streamer.export(*example, any_length=any_length), file)  # type: ignore[arg-type]
    file.seek(0)
    return torch.export.load(file).module()


def assert_same_chunk(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    torch.testing.assert_close(got[1], expected[1])


@torch.no_grad()
def test_a_network_of_any_batch_and_length() -> None:
    streamer = Streamer(fused_network().double())
    example = torch.rand(1, 3, 1, 16, 16, dtype=torch.float64)
    start = saved_and_loaded(streamer, example, any_length=True)
    step = saved_and_loaded(streamer, example, streamer(example)[1], any_length=True)
    for n, lengths in ((1, (1, 1, 1)), (2, (3, 2, 1)), (4, (1, 4, 2))):
        clip = torch.rand(n, 3, sum(lengths), 16, 16, dtype=torch.float64)
        first, *others = clip.split(lengths, dim=2)
        got, expected = start(first), streamer(first)
        assert_same_chunk(got, expected)
        for frames in others:
            got, expected = step(frames, got[1]), streamer(frames, expected[1])
            assert_same_chunk(got, expected)


@torch.no_grad()
def test_resets() -> None:
    streamer = Streamer(mean_layers().double().eval())
    example = torch.rand(1, 3, 2, 5, 7, dtype=torch.float64)
    state = streamer(example)[1]
    step = saved_and_loaded(streamer, example, state, torch.tensor([False]))
    for reset in ([False, False, False], [True, False, True], [True, True, True]):
        frames = torch.rand(3, 3, 2, 5, 7, dtype=torch.float64)
        state = streamer(torch.rand_like(frames))[1]
        mask = torch.tensor(reset)
        assert_same_chunk(step(frames, state, mask), streamer(frames, state, mask))
    everything = step(frames, {key: torch.full_like(value, 7) for key, value in state.items()}, mask)
    assert_same_chunk(everything, streamer(frames))


@torch.no_grad()
def test_layers_that_go_from_frame_to_frame() -> None:
    streamer = Streamer(walking_layers().double().eval())
    example = torch.rand(1, 3, 2, 4, 4, dtype=torch.float64)
    state = streamer(example)[1]
    step = saved_and_loaded(streamer, example, state)
    frames = torch.rand(3, 3, 2, 4, 4, dtype=torch.float64)
    state = streamer(torch.rand_like(frames))[1]
    assert_same_chunk(step(frames, state), streamer(frames, state))
    with pytest.raises(Exception, match="t as dynamic but your code specialized it"):
        streamer.export(example, any_length=True)


@torch.no_grad()
def test_a_trailing_window() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double().eval()
    streamer = Streamer(model, window=4)
    frames = torch.rand(3, 3, 2, 5, 5, dtype=torch.float64)
    state = streamer(frames)[1]
    step = saved_and_loaded(streamer, frames[:1], {key: value[:1] for key, value in state.items()})
    assert_same_chunk(step(frames, state), streamer(frames, state))
    with pytest.raises(ValueError, match="any_length: a program with a window takes as many frames as the example"):
        streamer.export(frames, any_length=True)


def test_wrong_examples_are_told_as_a_call_tells_them() -> None:
    streamer = Streamer(mean_layers().eval())
    frames = torch.rand(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="frames: expected \\[N,C,t,H,W\\]"):
        streamer.export(frames[0])
    with pytest.raises(ValueError, match="state: holds 2 streams, but frames are"):
        streamer.export(frames[:1], streamer(frames)[1])
    with pytest.raises(ValueError, match="reset: expected a bool tensor"):
        streamer.export(frames, streamer(frames)[1], torch.zeros(2))
    streamer.model.train()
    with pytest.raises(ValueError, match="expected evaluation mode"):
        streamer.export(frames)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_ahead_of_time(tmp_path) -> None:
    streamer = Streamer(fuse_for_inference(mean_layers().eval()))
    example = torch.rand(1, 3, 1, 5, 7)
    program = streamer.export(example, streamer(example)[1], any_length=True)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    step = torch._inductor.aoti_load_package(path)
    frames = torch.rand(2, 3, 3, 5, 7)
    state = streamer(torch.rand_like(frames))[1]
    assert_same_chunk(step(frames, state), streamer(frames, state))
