"""``rcu-ops align`` on real pictures: the shift and the speed it finds, its files, its errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rcu_ops.analysis import align_maps
from rcu_ops.cli import main
from rcu_ops.video.synthetic import write_sample_clip

pytest.importorskip("matplotlib")

SMALL = ["--size", "48", "--device", "cpu", "--model-option", "width=16"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("align") / "clip.mp4"
    # Half a period, so that no picture comes twice.
    write_sample_clip(path, frame_count=60, height=96, width=128)
    return path


def found(out: Path) -> dict:
    return json.loads((out / "alignment.json").read_text())


@pytest.mark.parametrize("shift", [3, 6])
def test_shift_is_recovered(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: int) -> None:
    out = tmp_path / "out"
    options = ["--shift", str(shift), "--frames", "16", "--every", "2"]
    assert main(["align", str(clip), *options, *SMALL, "--out", str(out)]) == 0
    result = found(out)
    assert result["speed"] == pytest.approx(1)
    assert result["offset"] == pytest.approx(-shift)
    assert f"frame t of A is frame t - {shift} of B" in capsys.readouterr().out
    # A's frames that B has are found exactly, but for B's first ones, whose recurrence has no past.
    assert result["index_ab"][shift + 4 :] == list(range(4, 16 - shift))
    assert result["consistent_a"] > 0.4
    assert result["b"]["frames"] == [number + 2 * shift for number in result["a"]["frames"]]
    assert {path.name for path in out.iterdir()} == {
        "alignment.json", "alignment.npz", "alignment.png", "distances.png",
    }  # fmt: skip
    with np.load(out / "alignment.npz") as arrays:
        a, b = arrays["embeddings_a"], arrays["embeddings_b"]
        direct = np.square(a[:, None].astype(np.float64) - b[None]).sum(-1)
        np.testing.assert_allclose(arrays["distances"], direct, rtol=1e-3, atol=1e-5 * direct.max())
        assert arrays["distances"].mean() == pytest.approx(1, rel=1e-6)
        assert arrays["index_ab"].tolist() == result["index_ab"]
    for name in ("alignment.png", "distances.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_slowed_copy_is_recovered(clip: Path, tmp_path: Path) -> None:
    options = ["--slow", "2", "--frames", "16", "--every", "2", "--model-option", "recurrent_layers=none"]
    assert main(["align", str(clip), *options, *SMALL, "--out", str(tmp_path)]) == 0
    result = found(tmp_path)
    assert (result["speed"], result["offset"]) == (pytest.approx(2), pytest.approx(0))
    assert result["index_ab"][:8] == [2 * t for t in range(8)]  # of two equal frames the first
    assert main(["align", str(clip), *options, *SMALL, "--out", str(tmp_path)]) == 2  # without --overwrite


def test_two_frames_have_room_for_the_words_around_them(clip: Path, tmp_path: Path) -> None:
    assert main(["align", str(clip), "--shift", "0", "--frames", "2", *SMALL, "--out", str(tmp_path)]) == 0
    width = int.from_bytes((tmp_path / "alignment.png").read_bytes()[16:20], "big")  # of a PNG's header
    assert width >= 900


def test_two_videos_and_networks_with_strides(clip: Path, tmp_path: Path) -> None:
    options = ["--frames", "9", "--size", "32", "--model", "srtg_r3d_resnet34", "--model-option", "width=4"]
    slow = tmp_path / "slow.mp4"  # the same pictures at another rate
    write_sample_clip(slow, frame_count=60, frame_rate=10, height=96, width=128)
    out = tmp_path / "out"
    assert main(["align", str(clip), str(slow), *options, "--device", "cpu", "--out", str(out)]) == 0
    result = found(out)
    assert (result["a"]["name"], result["b"]["name"]) == ("clip.mp4", "slow.mp4")
    numbers = result["a"]["frames"]
    assert result["b"]["frames"] == numbers and len(numbers) == 9
    for video, rate in (("a", 25), ("b", 10)):
        assert result[video]["seconds"] == pytest.approx([number / rate for number in numbers], abs=1e-4)
    assert result["index_ab"] == result["index_ba"] == list(range(9))
    assert result["every_frame_at_its_own_place"] is True
    assert result["model"] == "srtg_r3d_resnet34"


def test_maps() -> None:
    alignment = align_maps([0, 0, 1, 2, 3], [1, 2, 3, 4])
    assert alignment.cycle_error_a.tolist() == [1, 0, 0, 0, 0]
    assert alignment.cycle_error_b.tolist() == [0, 0, 0, 0]
    assert (alignment.speed, alignment.offset) == (1, -1)
    lost = align_maps([1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0])
    assert lost.speed is None
    assert lost.consistent_a.tolist() == [True] + [False] * 8
    assert lost.consistent_b.tolist() == [False, True, False]
    for maps in (([], []), ([0, 3], [0, 1]), ([0, -1], [0, 1])):
        with pytest.raises(ValueError, match="index_"):
            align_maps(*maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "two videos, or one with --shift or --slow"),
        (["--shift", "2", "--frames", "1"], "--frames: expected at least 2, got 1"),
        (["--shift", "90"], "--shift"),
        (["--slow", "1"], "--slow"),
        (["--shift", "2", "--temperature", "0"], "--temperature"),
        (["--shift", "2", "--model", "rcn_resnet8"], "did you mean"),
        (["--shift", "2", "--model", "res_lstm"], "--model"),
        (["--shift", "2", "--device", "nonsense"], "--device"),
        (["--shift", "2", "--weights", "/nonexistent.pt"], "nonexistent"),
        (["--shift", "2", "--model-option", "width"], "--model-option"),
    ],
)
def test_bad_options(
    clip: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", str(clip), *options, "--size", "32", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(tmp_path / "no.mp4"), "--shift", "1", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
