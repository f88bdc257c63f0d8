"""Streamer(graph=True): capture once per shape, replay on fixed buffers, fall back with a reason. Without a GPU.

The graph here is a function that is called again and writes its results into the memory of the first time: what a CUDA
graph does, as far as the code around it can tell.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rcu_ops import Streamer, fuse_for_inference
from rcu_ops.stream_graph import ChunkGraphs
from tests.networks import small_model
from tests.test_streaming import stream


class Replayed:
    """A capture on the CPU. ``calls`` counts recordings and replays; ``error`` is raised instead of recording."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = {"warm_up": 0, "record": 0, "replay": 0}
        self.error = error

    def why_not(self, device: torch.device) -> str | None:
        return None

    def warm_up(self, function: Callable[[], Any], device: torch.device) -> None:
        self.calls["warm_up"] += 1
        function()

    def record(self, function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        self.calls["record"] += 1
        if self.error is not None:
            raise self.error
        scores, written = function()

        def replay() -> None:
            self.calls["replay"] += 1
            scores_now, written_now = function()
            scores.copy_(scores_now)
            for key, value in written_now.items():
                written[key].copy_(value)

        # A capture computes nothing: whoever reads before the first replay reads what was in that memory.
        for value in (scores, *written.values()):
            value.fill_(torch.nan)
        return (scores, written), replay


def graphed(model: torch.nn.Module, capture: Replayed | None = None, most: int = 16) -> tuple[Streamer, Replayed]:
    streamer, capture = Streamer(model, graph=True), capture or Replayed()
    streamer._graphs = ChunkGraphs(streamer._run, [*model.parameters(), *model.buffers()], capture, most)
    return streamer, capture


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return fuse_for_inference(small_model("rcn_resnet18_mean_gated", dtype=torch.float64))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_replays_equal_the_plain_streamer(model, inference_mode) -> None:
    clip = torch.randn(2, 3, 7, 32, 32, dtype=torch.float64)
    streamer, capture = graphed(model)
    with torch.inference_mode(inference_mode), torch.no_grad():
        for chunks in ([1] * 7, [2, 1, 2, 2]):
            got, state = stream(streamer, clip, chunks)
            want, want_state = stream(Streamer(model), clip, chunks)
            assert torch.equal(got, want)
            assert all(torch.equal(state[key], want_state[key]) for key in want_state)
    # One frame and two, each at a stream's start and within a stream.
    assert capture.calls == {"warm_up": 4, "record": 4, "replay": 11}
    report = streamer.graph_report()
    assert "float64 [2, 3, 1, 32, 32] within a stream, 7 times" in report
    assert "without" not in report


def test_frames_of_any_strides(model) -> None:
    frame = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64).expand(2, 3, 2, 32, 32)
    streamer, _ = graphed(model)
    with torch.no_grad():
        assert torch.equal(streamer(frame)[0], Streamer(model)(frame)[0])


def test_states_belong_to_the_caller(model) -> None:
    """Streams fork: no replay changes what an earlier one has handed out, nor what it is given."""
    first, second = torch.randn(2, 2, 3, 1, 32, 32, dtype=torch.float64)
    streamer, _ = graphed(model)
    with torch.no_grad():
        scores, state = streamer(first)
        kept, kept_scores = copy.deepcopy(state), scores.clone()
        one, later = streamer(second, state)
        streamer(first, later)
        streamer(first)
        again, _ = streamer(second, state)
    assert torch.equal(scores, kept_scores) and torch.equal(one, again)
    assert all(torch.equal(kept[key], state[key]) for key in kept)
    tensors = [value for value in (*state.values(), *later.values()) if value.numel()]
    assert len({value.data_ptr() for value in tensors}) == len(tensors)


def test_resets(model) -> None:
    clip = torch.randn(2, 3, 1, 32, 32, dtype=torch.float64)
    streamer, capture = graphed(model)
    plain = Streamer(model)
    with torch.no_grad():
        _, state = streamer(clip)
        for reset in (torch.tensor([True, False]), torch.tensor([False, True])):  # one graph serves any mask
            got, want = streamer(clip, state, reset)[0], plain(clip, state, reset)[0]
            assert torch.equal(got, want)
    assert capture.calls["record"] == 2
    assert "with resets, 2 times" in streamer.graph_report()


def test_weights_changed_in_place_are_seen_and_moved_ones_captured_again() -> None:
    model = small_model("rcn_resnet18", dtype=torch.float64)
    clip = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64)
    streamer, capture = graphed(model)
    with torch.no_grad():
        before = streamer(clip)[0]
        model.head.conv.bias.add_(1)
        torch.testing.assert_close(streamer(clip)[0], before + 1)
        assert capture.calls["record"] == 1
        model.head.conv.bias.data = model.head.conv.bias - 1  # other memory
        torch.testing.assert_close(streamer(clip)[0], before)
    assert capture.calls["record"] == 2


def test_on_the_cpu_it_falls_back_and_says_so(model) -> None:
    clip = torch.randn(1, 3, 2, 32, 32, dtype=torch.float64)
    streamer = Streamer(model, graph=True)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="without a CUDA graph: the frames are on cpu"):
            scores, state = streamer(clip)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            streamer(clip, state)
        assert torch.equal(scores, Streamer(model)(clip)[0])
    assert streamer.graph_report() == "run without a CUDA graph: 2 chunks, because the frames are on cpu"
    assert Streamer(model).graph_report() == "made with graph=False"


def test_a_failed_capture_falls_back_and_is_not_tried_again(model) -> None:
    clip = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64)
    error = RuntimeError("operation not permitted when stream is capturing\nmore lines")
    streamer, capture = graphed(model, Replayed(error))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="its capture failed: RuntimeError: operation not permitted"):
            scores, _ = streamer(clip)
        streamer(clip)
        assert torch.equal(scores, Streamer(model)(clip)[0])
    assert capture.calls["record"] == 1
    assert "2 chunks, because its capture failed" in streamer.graph_report()


def test_too_many_shapes_fall_back(model) -> None:
    clip = torch.randn(1, 3, 6, 32, 32, dtype=torch.float64)
    streamer, capture = graphed(model, most=2)
    with torch.no_grad():
        for frames in (1, 2):
            streamer(clip[:, :, :frames])
        with pytest.warns(UserWarning, match="2 other chunk shapes have graphs already"):
            scores, _ = streamer(clip[:, :, :3])
        assert torch.equal(scores, Streamer(model)(clip[:, :, :3])[0])
        streamer(clip[:, :, 3:4])
    assert capture.calls["record"] == 2 and capture.calls["replay"] == 3


def test_what_a_chunk_raises_is_raised(model) -> None:
    streamer, capture = graphed(model)
    clip = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        _, state = streamer(clip)
        with pytest.raises(ValueError, match="a stream keeps one batch size and one frame size"):
            streamer(clip, {**state, "stem.conv": state["stem.conv"][:, :2]})
    assert capture.calls["record"] == 1


def test_arithmetic_is_part_of_the_shape() -> None:
    """A graph holds the kernels that were chosen when it was captured."""
    model = small_model("rcn_resnet18")
    clip: Tensor = torch.randn(1, 3, 1, 32, 32)
    streamer, capture = graphed(model)
    with torch.no_grad():
        plain = streamer(clip)[0]
        with torch.autocast("cpu", torch.bfloat16):
            cast = streamer(clip)[0]
        assert torch.equal(streamer(clip)[0], plain)
    assert cast.dtype == torch.bfloat16 and capture.calls["record"] == 2
