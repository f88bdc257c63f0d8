from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import rcu_ops
from rcu_ops.recipes import get_recipe
from rcu_ops.recipes import scoring as module
from rcu_ops.recipes.scoring import VideoScorer
from rcu_ops.video import BrokenVideoError, VideoError, open_video
from rcu_ops.video.transform import center_crop, normalize, resize_short_side
from tests.recipes.motion import FRAMES, write_video
from tests.tolerance import assert_close_to_reference

RECIPE = dataclasses.replace(
    get_recipe("kinetics_resnet18"), classes=3, frames=4, crop=24, scales=(24, 36), eval_scale=30, eval_clips=3
)


def _source(path, recipe=RECIPE):
    """The whole video as the network's input [3, T, crop, crop], and the times of its frames."""
    with open_video(path) as reader:
        frames = list(reader)
    pictures = torch.from_numpy(np.stack([frame.image for frame in frames]))
    pictures = center_crop(resize_short_side(pictures, recipe.eval_scale), recipe.crop)
    return normalize(pictures.contiguous()), np.array([frame.time_seconds for frame in frames])


@pytest.fixture
def video(motion):
    return str(motion / "down_1.mp4")


class Pixel(nn.Module):
    """One picture element of every frame: scores that are exact, whatever the order of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv3d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3).view(3, 3, 1, 1, 1))

    def frame_scores(self, clip):
        return self.head(clip[:, :, :, 12:13, 12:13]).flatten(2)

    def forward(self, clip):
        return self.frame_scores(clip).amax(2)


class RunningSum(nn.Module):
    """The running sum of that element: its scores tell where a window began."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = rcu_ops.nn.RecurrentConv3d(3, 3, 1)
        with torch.no_grad():
            self.unit.weight_xh.copy_(torch.eye(3).view(3, 3, 1, 1, 1))

    def frame_scores(self, clip):
        return self.unit(clip[:, :, :, 12:13, 12:13]).flatten(2)

    def forward(self, clip):
        return self.frame_scores(clip).amax(2)


def _running(elements, order):
    """Running sums [3, len(order)] of elements [3, T] taken in ``order``."""
    sums = [elements[:, order[0]]]
    for index in order[1:]:
        sums.append(sums[-1] + elements[:, index])
    return torch.stack(sums, 1)


@pytest.fixture
def pixel():
    return Pixel().eval()


@pytest.mark.parametrize("period", [1, 2, 3, 5])  # 14 frames: blocks of 4, 8, 12 and 20 frames, whole and cut
def test_per_frame_networks_see_every_frame_once_in_order(video, pixel, period):
    clip, times = _source(video)
    elements = clip[:, :, 12, 12]
    assert len({tuple(column) for column in elements.T.tolist()}) > FRAMES // 2
    result = VideoScorer(pixel, dataclasses.replace(RECIPE, period=period), ("unrolled", "sliding", "clips"))(video)
    assert list(result.scores) == ["unrolled", "sliding", "clips"]
    assert result.fault is None
    np.testing.assert_array_equal(result.times, times)
    np.testing.assert_array_equal(result.scores["unrolled"], elements)
    np.testing.assert_array_equal(result.scores["sliding"], elements)
    starts = [i * max(0, FRAMES - (3 * period + 1)) // 2 for i in range(3)]
    chosen = [[min(start + j * period, FRAMES - 1) for j in range(4)] for start in starts]
    expected = torch.stack([elements[:, indices].amax(1) for indices in chosen], 1)
    np.testing.assert_array_equal(result.scores["clips"], expected)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_unrolled_remembers_and_windows_start_anew(video, period):
    clip, _ = _source(video)
    elements = clip[:, :, 12, 12]
    scorer = VideoScorer(RunningSum().eval(), dataclasses.replace(RECIPE, period=period), ("unrolled", "sliding"))
    assert scorer.causal
    result = scorer(video)
    unrolled, sliding = torch.zeros(3, FRAMES), torch.zeros(3, FRAMES)
    for phase in range(period):
        order = list(range(phase, FRAMES, period))
        unrolled[:, order] = _running(elements, order)
    size = 4 * period
    begins = list(range(0, FRAMES - size + 1, size))
    done = begins[-1] + size
    for begin in [*begins, FRAMES - size]:  # the last window reaches back, and only its new frames count
        for phase in range(period):
            order = list(range(begin + phase, begin + size, period))
            new = [place for place, frame in enumerate(order) if begin in begins or frame >= done]
            sliding[:, [order[place] for place in new]] = _running(elements, order)[:, new]
    np.testing.assert_array_equal(result.scores["unrolled"], unrolled)
    np.testing.assert_array_equal(result.scores["sliding"], sliding)


def test_videos_shorter_than_a_window_repeat_their_last_frame(tmp_path):
    path = tmp_path / "short.mp4"
    write_video(path, 1, 0, count=3)
    elements = _source(path)[0][:, :, 12, 12]
    result = VideoScorer(RunningSum().eval(), dataclasses.replace(RECIPE, period=2), module.MODES)(str(path))
    by_frame = torch.stack([elements[:, 0], elements[:, 1], elements[:, 0] + elements[:, 2]], 1)
    np.testing.assert_array_equal(result.scores["sliding"], by_frame)
    np.testing.assert_array_equal(result.scores["unrolled"], by_frame)
    clip = _running(elements, [0, 2, 2, 2]).amax(1, keepdim=True)
    np.testing.assert_array_equal(result.scores["clips"], clip.expand(3, 3))


@pytest.mark.parametrize("period", [1, 2])
def test_the_real_network_streams_what_one_pass_gives(video, period):
    model = rcu_ops.create_model("rcn_resnet18", num_classes=3, width=8, layers=(1, 1, 1, 1), update="mean").eval()
    for module_ in model.modules():  # statistics and scores that are not trivial
        if isinstance(module_, nn.BatchNorm3d):
            nn.init.uniform_(module_.running_mean, -0.1, 0.1)
            nn.init.uniform_(module_.running_var, 0.5, 2)
    nn.init.normal_(model.head.conv.weight)
    clip, _ = _source(video)
    result = VideoScorer(
        rcu_ops.fuse_for_inference(model), dataclasses.replace(RECIPE, period=period), ("unrolled", "clips")
    )(video)
    with torch.no_grad(), rcu_ops.use_backend("reference"):
        eager, exact = (torch.empty(3, FRAMES, dtype=dtype) for dtype in (torch.float32, torch.float64))
        for phase in range(period):
            part = clip[None, :, phase::period]
            eager[:, phase::period] = model.frame_scores(part)[0]
        model.double()
        for phase in range(period):
            exact[:, phase::period] = model.frame_scores(clip[None, :, phase::period].double())[0]
    assert_close_to_reference(torch.from_numpy(result.scores["unrolled"]), exact, eager)


def test_networks_with_temporal_strides(video):
    model = rcu_ops.create_model("i3d_resnet18", num_classes=3, width=4, layers=(1, 1, 1, 1)).eval()
    recipe = dataclasses.replace(RECIPE, frames=8)
    scorer = VideoScorer(model, recipe, module.MODES, batch=1)
    assert not scorer.causal
    result = scorer(video)
    clip, _ = _source(video, recipe)
    with torch.no_grad():
        windows = [model(clip[None, :, start : start + 8])[0] for start in (0, FRAMES - 8)]
        whole = model.frame_scores(clip[None])[0]
        clips = [model(clip[None, :, start : start + 8])[0] for start in (0, 3, 6)]
    assert whole.shape == (3, 2)
    np.testing.assert_array_equal(result.scores["sliding"], torch.stack(windows, 1).numpy())
    np.testing.assert_array_equal(result.scores["unrolled"], whole.numpy())
    np.testing.assert_array_equal(result.scores["clips"], torch.stack(clips, 1).numpy())


def test_dense_i3d_gives_a_score_for_every_frame(video):
    model = rcu_ops.create_model("i3d_resnet18", num_classes=3, width=4, layers=(1, 1, 1, 1), dense=True).eval()
    result = VideoScorer(model, dataclasses.replace(RECIPE, period=3), ("sliding", "unrolled"))(video)
    assert result.scores["sliding"].shape == result.scores["unrolled"].shape == (3, FRAMES)


@pytest.mark.parametrize("announced", [None, 5, 100])
def test_clips_do_not_trust_the_container(video, pixel, monkeypatch, announced):
    expected = VideoScorer(pixel, RECIPE, ("clips",))(video).scores["clips"]

    def open_misleading(source):
        reader = open_video(source)
        reader.frame_count = announced
        return reader

    monkeypatch.setattr(module, "open_video", open_misleading)
    got = VideoScorer(pixel, RECIPE, ("clips", "unrolled"))(video)
    np.testing.assert_array_equal(got.scores["clips"], expected)
    assert got.scores["unrolled"].shape == (3, FRAMES)


def test_batches_of_clips_do_not_matter(video, pixel):
    one, many = (VideoScorer(pixel, RECIPE, ("clips",), batch=batch)(video).scores["clips"] for batch in (1, 8))
    np.testing.assert_array_equal(one, many)


def test_a_video_that_breaks_is_scored_up_to_there(tmp_path, pixel):
    write_video(tmp_path / "whole.mp4", 1, 3, count=40)
    content = (tmp_path / "whole.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: int(0.8 * len(content))])
    with open_video(cut) as reader, pytest.raises(BrokenVideoError) as caught:
        list(reader)
    usable = caught.value.frame_index
    result = VideoScorer(pixel, RECIPE, module.MODES)(str(cut))
    assert result.scores["unrolled"].shape == result.scores["sliding"].shape == (3, usable)
    assert result.scores["clips"].shape == (3, 3)
    assert len(result.times) == usable
    assert result.fault.startswith(f"broke at frame {usable}: ")


def test_what_cannot_be_scored(tmp_path, pixel, video):
    with pytest.raises(VideoError, match="no such file"):
        VideoScorer(pixel, RECIPE, ("clips",))(str(tmp_path / "gone.mp4"))
    for modes in ((), ("clips", "frames")):
        with pytest.raises(ValueError, match="modes: expected some of clips, sliding, unrolled"):
            VideoScorer(pixel, RECIPE, modes)
    with pytest.raises(ValueError, match="modes: unrolled needs per-frame scores, which Sequential does not give"):
        VideoScorer(nn.Sequential(nn.Conv3d(3, 3, 1)), RECIPE, ("unrolled",))
