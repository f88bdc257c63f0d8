from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

from rcu_ops.video.draw import LEADING, WARNING, ScorePanel, blend_rectangle, draw_text, text_width
from rcu_ops.video.timeline import ScoreHistory, plot_timeline
from tests.video.clips import picture


def ink(image):
    return np.argwhere(image.max(axis=-1) > 100)


def test_text_stands_on_its_baseline_whatever_it_says():
    for size in (11, 14, 17, 22):
        for text in ("x", "xx_", "x(", "xÅ", "x|"):
            image = np.zeros((60, 200, 3), dtype=np.uint8)
            draw_text(image, text, 5, 40, size)
            first = ink(image[:, : 5 + text_width("x", size)])
            assert first[:, 0].max() == 39, (size, text)
            assert first[:, 1].min() >= 5


def test_text_ends_where_its_width_says():
    image = np.zeros((40, 300, 3), dtype=np.uint8)
    draw_text(image, "juggling balls", 10, 30, 16)
    assert 0 <= 10 + text_width("juggling balls", 16) - 1 - ink(image)[:, 1].max() <= 1


def test_text_outside_the_picture_is_cut_off():
    whole = np.zeros((200, 400, 3), dtype=np.uint8)
    draw_text(whole, "overhanging", 120, 100, 14)
    for x, baseline in ((-20, 20), (90, 20), (5, 3), (5, 45), (500, 20), (5, -50)):
        image = np.zeros((40, 100, 3), dtype=np.uint8)
        draw_text(image, "overhanging", x, baseline, 14)
        y0, x0 = 100 - baseline, 120 - x
        window = np.zeros_like(image)
        part = whole[max(0, y0) : max(0, y0 + 40), max(0, x0) : max(0, x0 + 100)]
        window[: part.shape[0], : part.shape[1]] = part
        assert np.array_equal(image, window), (x, baseline)
    assert text_width("", 14) == 0


def test_rectangles_are_antialiased_and_clipped():
    image = np.zeros((4, 10, 3), dtype=np.uint8)
    blend_rectangle(image, 2.5, 1, 5.25, 3, (200, 100, 0))
    assert image[1, :, 0].tolist() == [0, 0, 100, 200, 200, 50, 0, 0, 0, 0]
    assert image[0].max() == image[3].max() == 0
    blend_rectangle(image, -5, -5, 50, 50, (8, 8, 8))
    assert (image == 8).all()
    blend_rectangle(image, 20, 0, 30, 4, (99, 99, 99))
    assert (image == 8).all()
    blend_rectangle(image, 0, 0, 10, 4, (108, 108, 108), opacity=0.5)
    assert np.abs(image.astype(int) - 58).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(50, 50), (47, 63), (240, 426), (568, 320), (1080, 1920), (2160, 3840)])
def test_panels_have_even_sides_in_bounds(height, width):
    panel = ScorePanel(height, width, rows=5, title="rcn_resnet18", warning="untrained network")
    assert panel.height % 2 == panel.width % 2 == 0
    assert 320 <= panel.width <= 1280
    frame = panel.draw(picture(3, height, width), time_seconds=1.5, index=3, scores=[("a", 0.5)])
    assert frame.shape == (panel.height, panel.width, 3)
    assert np.abs(frame[5:40].astype(int) - picture(3)[0, 0]).max() <= 1
    # A later picture of another size is fitted in.
    assert panel.draw(picture(3, 30, 90), time_seconds=1.6, index=4, scores=[]).shape == frame.shape


def test_bars_are_as_long_as_the_scores_say():
    panel = ScorePanel(240, 320, rows=2, title="")

    def leading_pixels(score):
        scores = [("long class name that must be cut off", score), ("b", 0.0)]
        frame = panel.draw(picture(0, 240, 320), time_seconds=0, index=0, scores=scores)
        return int((np.abs(frame.astype(int) - LEADING).max(axis=-1) < 8).sum())

    empty, half, full, beyond = (leading_pixels(score) for score in (0.0, 0.5, 1.0, 1.5))
    assert empty == 0
    assert full == beyond
    assert half == pytest.approx(full / 2, rel=0.02)


def test_the_warning_is_in_the_picture():
    def warning_pixels(warning):
        panel = ScorePanel(240, 320, rows=1, title="m", warning=warning)
        frame = panel.draw(picture(0, 240, 320), time_seconds=0, index=0, scores=[("a", 0.1)])
        return int((np.abs(frame.astype(int) - WARNING).max(axis=-1) < 40).sum())

    assert warning_pixels("") == 0
    assert warning_pixels("untrained network") > 200


def test_a_frame_without_scores_says_why():
    panel = ScorePanel(120, 400, rows=3, title="net")
    options = {"time_seconds": 0.5, "index": 12, "scores": ()}
    bare = panel.draw(picture(0, 120, 400), **options)
    said = panel.draw(picture(0, 120, 400), **options, note="first clip: 13 of 32 frames")
    assert bare.shape == said.shape
    rows, columns = np.nonzero((bare != said).any(axis=-1))
    assert rows.min() > 120 and columns.max() < 400
    with_scores = {**options, "scores": [("juggling", 0.4)]}
    assert np.array_equal(
        panel.draw(picture(0, 120, 400), **with_scores, note="first clip: 13 of 32 frames"),
        panel.draw(picture(0, 120, 400), **with_scores),
    )


def test_history_is_bounded_and_evenly_spread():
    history = ScoreHistory(limit=64)
    for index in range(1000):
        history.append(index / 10, np.full(3, index), np.full(3, -index))
        assert len(history) <= 64
    times, running, instant = history.arrays()
    assert len(times) >= 32
    assert times[0] == 0.0
    assert times[-1] > 95
    assert len(set(np.diff(times).round(6))) == 1
    assert np.allclose(running[:, 0], times * 10)
    assert np.allclose(instant, -running)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_timeline(tmp_path, count):
    history = ScoreHistory()
    for index in range(count):
        history.append(index / 25, np.array([0.7, 0.2, 0.1]), np.array([0.6, 0.3, 0.1]))
    path = tmp_path / "timeline.png"
    plot_timeline(path, history, ["a" * 60, "b", "c"], title="model on clip", warning="untrained network")
    picture = imread(path)
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    # The warning's box is in its top right corner, and only there when there is a warning.
    corner = picture[: picture.shape[0] // 8, -picture.shape[1] // 6 :, :3]
    assert (np.abs(corner - np.array([0xFF, 0xE3, 0xB0]) / 255).max(axis=-1) < 0.02).sum() > 1000
    plot_timeline(path, history, ["a", "b", "c"], title="model on clip")
    corner = imread(path)[: picture.shape[0] // 8, -picture.shape[1] // 6 :, :3]
    assert (corner == 1).all()
    assert list(tmp_path.iterdir()) == [path]


def test_timeline_of_a_network_of_clips_shows_its_cost_below(tmp_path):
    history = ScoreHistory()
    for index in range(50):
        history.append(index / 25, np.array([0.7, 0.2, 0.1]), np.array([3.0 + index // 10]))
    path = tmp_path / "timeline.png"
    plot_timeline(path, history, ["a", "b", "c"], title="model on clip", cost=True)
    picture = imread(path)[..., :3]
    colour = np.abs(picture - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.1  # of the leading class
    grey = np.abs(picture - np.array([0x99, 0x99, 0x99]) / 255).max(axis=-1) < 0.02
    half, plot = picture.shape[0] * 6 // 10, slice(picture.shape[1] // 8, picture.shape[1] * 7 // 10)
    assert colour[:half, plot].any() and not colour[half:, plot].any()
    assert grey[half:, plot].any(axis=1).sum() > grey[:half, plot].any(axis=1).sum()
