"""Fusion algebra, and `rcu-ops fuse` on files of scores and folders of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rcu_ops.analysis.fusion import fuse, softmax, video_scores
from rcu_ops.cli import main
from rcu_ops.features.files import read_features, write_features

numbers = arrays(np.float64, (3, 4), elements=st.floats(-100, 100))


@given(numbers, numbers, numbers)
def test_algebra(a, b, c):
    np.testing.assert_array_equal(fuse([a, b], "sum"), a + b)
    np.testing.assert_array_equal(fuse([a, b], "product"), a * b)
    np.testing.assert_array_equal(fuse([a, b], "weighted", [1.5, 1]), 1.5 * a + b)
    for how in ("sum", "product"):
        np.testing.assert_array_equal(fuse([a, b], how), fuse([b, a], how))
        np.testing.assert_allclose(fuse([a, b, c], how), fuse([fuse([a, b], how), c], how))
    np.testing.assert_array_equal(fuse([a, np.zeros_like(a)], "sum"), a)
    np.testing.assert_array_equal(fuse([a, np.ones_like(a)], "product"), a)
    np.testing.assert_array_equal(fuse([a, b], "weighted", [1, 1]), fuse([a, b], "sum"))


def test_late_product_is_not_renormalised():
    a, b = softmax([2.0, 1.0, 0.0]), softmax([0.0, 3.0, 1.0])
    product = fuse([a, b], "product")
    assert product.sum() < 1
    np.testing.assert_allclose(product / product.sum(), softmax([2.0, 4.0, 1.0]))
    np.testing.assert_array_equal(video_scores(torch.tensor([[1.0, 3.0], [0.0, 0.0]])), [2, 0])


@pytest.mark.parametrize(
    ("streams", "how", "weights", "message"),
    [
        ([[1.0]], "sum", None, "streams: expected two or more"),
        ([[1.0], [1.0, 2.0]], "sum", None, r"streams\[1\]: expected \[1\] as in streams\[0\], got \[2\]"),
        ([[1.0], [1.0]], "mean", None, "how: expected one of sum, product, weighted, got 'mean'"),
        ([[1.0], [1.0]], "weighted", None, "weights: expected one per stream"),
        ([[1.0], [1.0]], "sum", [1, 2], "weights: expected none"),
        ([[1.0], [1.0]], "weighted", [1], "weights: expected 2 finite numbers"),
    ],
)
def test_bad_fusion(streams, how, weights, message):
    with pytest.raises(ValueError, match=message):
        fuse(streams, how, weights)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two streams that are wrong about different videos, and labels."""
    rgb = {"v0": [[3.0, 1.0], [0.0, 0.0]], "v1": [[2.0, 2.0], [1.0, 1.0]], "v2": [[0.0], [1.0]]}
    flow = {"v0": [[0.0], [1.0]], "v1": [[0.0], [4.0]], "v2": [[1.0], [5.0]]}
    for name, scores in (("rgb", rgb), ("flow", flow)):
        np.savez(tmp_path / f"{name}.npz", **{video: np.array(values) for video, values in scores.items()})
    (tmp_path / "labels.csv").write_text("video,label\nv0,0\nv1,1\nv2,1\n")
    return tmp_path


def run(*arguments: object) -> int:
    return main(["fuse", *map(str, arguments)])


def test_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "new" / "folder" / "fused.npz"
    streams = (files / "rgb.npz", files / "flow.npz")
    assert run(*streams, "--how", "product", "--softmax", "--labels", files / "labels.csv", "--out", out) == 0
    table = capsys.readouterr().out.splitlines()
    numbers = [line.split()[-3:] for line in table[1:]]
    assert numbers == [["66.7", "100.0", "3"], ["66.7", "100.0", "3"], ["100.0", "100.0", "3"]]
    with np.load(out) as fused:
        expected = softmax([2.0, 0.0]) * softmax([0.0, 1.0])
        np.testing.assert_allclose(fused["v0"], expected[:, None])
    assert run(*streams, "--how", "weighted", "--weights", "1.5,1", "--out", out) == 0
    with np.load(out) as fused:
        np.testing.assert_allclose(fused["v1"][:, 0], [3.0, 5.5])
    assert main(["analyze", "accuracy", str(out), "--labels", str(files / "labels.csv"), "--out", str(files)]) == 0


def test_streams_of_one_file_name_have_their_folders(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `rcu-ops evaluate` leaves them, and the command's own help names them."""
    paths = []
    for name in ("rgb", "flow"):
        paths.append(files / name / "scores_clips.npz")
        paths[-1].parent.mkdir()
        (files / f"{name}.npz").rename(paths[-1])
    out = files / "fused.npz"
    arguments = [str(path) for path in paths] + ["--how", "weighted", "--weights", "2,1", "--out", str(out)]
    assert main(["fuse", *arguments, "--labels", str(files / "labels.csv")]) == 0
    assert "\nrgb " in (text := capsys.readouterr().out) and "\nflow " in text
    with np.load(paths[0]) as rgb, np.load(paths[1]) as flow, np.load(out) as fused:
        for video in fused.files:
            expected = 2 * rgb[video].mean(1) + flow[video].mean(1)
            np.testing.assert_allclose(fused[video][:, 0], expected, rtol=1e-6)


def test_a_product_with_external_scores(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(files / "idt.npz", v0=np.array([[0.9], [0.2]]), v1=np.array([[0.1], [0.8]]), v2=np.array([[0.5], [0.5]]))
    out = files / "fused.npz"
    assert run(files / "rgb.npz", files / "idt.npz", "--softmax", "rgb", "--out", out) == 0
    with np.load(out) as fused:
        np.testing.assert_allclose(fused["v0"][:, 0], softmax([2.0, 0.0]) * [0.9, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--how", "weighted"], "--weights: expected one per stream"),
        (["--weights", "a,b"], "--weights: expected numbers"),
        (["--softmax", "idt"], "--softmax idt: no such stream among rgb, flow"),
        (["--out", "x.csv"], "--out: expected a name that ends with .npz"),
    ],
)
def test_bad_options(files: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files / "rgb.npz", files / "flow.npz", "--out", files / "f.npz", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_streams_that_do_not_fit(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(files / "other.npz", v0=np.array([[-1.0], [2.0]]))
    assert run(files / "rgb.npz", files / "other.npz", "--out", files / "f.npz") == 2
    assert "no scores for 'v1', 'v2'" in capsys.readouterr().err
    np.savez(files / "negative.npz", **{video: np.array([[-1.0], [2.0]]) for video in ("v0", "v1", "v2")})
    assert run(files / "rgb.npz", files / "negative.npz", "--out", files / "f.npz") == 2
    assert "a product needs scores from 0 on" in capsys.readouterr().err
    assert run(files / "rgb.npz", "--out", files / "f.npz") == 2
    assert "two or more" in capsys.readouterr().err


def test_mid_fusion_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = {name: np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) for name in ("rgb", "flow")}
    for name, values in features.items():
        write_features(tmp_path / name / "deep" / "v.mp4.safetensors", values)
    folders = (tmp_path / "rgb", tmp_path / "flow")
    assert run(*folders, "--features", "--how", "sum", "--out", tmp_path / "mid") == 0
    fused = read_features(tmp_path / "mid" / "deep" / "v.mp4.safetensors")
    np.testing.assert_allclose(fused, features["rgb"] + features["flow"], rtol=1e-6)
    for options in (["--labels", tmp_path / "labels.csv"], ["--softmax"]):
        assert run(*folders, "--features", "--out", tmp_path / "refused", *options) == 2
        assert "features have neither probabilities nor labels" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    write_features(tmp_path / "flow" / "w.mp4.safetensors", features["flow"])
    assert run(*folders, "--features", "--out", tmp_path / "mid") == 2
    assert "expected features of the same videos" in capsys.readouterr().err
    write_features(tmp_path / "rgb" / "w.mp4.safetensors", features["rgb"][:2])
    assert run(*folders, "--features", "--out", tmp_path / "mid") == 2
    assert "differ in clips or size" in capsys.readouterr().err


def test_streams_are_matched_by_file_names_where_paths_differ(tmp_path: Path, capsys) -> None:
    rgb = {"videos/b.mp4": [[3.0], [1.0]], "/far/a.mkv": [[0.0], [2.0]]}
    flow = {"flow/a.npy": [[1.0], [4.0]], "flow/b.npy": [[-2.0], [2.0]]}
    for name, videos in (("rgb", rgb), ("flow", flow)):
        np.savez(tmp_path / f"{name}.npz", **{video: np.array(scores) for video, scores in videos.items()})
    (tmp_path / "labels.csv").write_text("video,label\nvideos/b.mp4,0\n/far/a.mkv,1\n")
    out = tmp_path / "fused.npz"
    arguments = ["--how", "weighted", "--weights", "0.45,0.55", "--labels", f"{tmp_path}/labels.csv", "--out", f"{out}"]
    assert main(["fuse", f"{tmp_path}/rgb.npz", f"{tmp_path}/flow.npz", *arguments]) == 0
    with np.load(out) as fused:
        assert set(fused.files) == set(rgb)
        np.testing.assert_allclose(fused["videos/b.mp4"], [[0.45 * 3 - 0.55 * 2], [0.45 + 0.55 * 2]])
        np.testing.assert_allclose(fused["/far/a.mkv"], [[0.55], [0.45 * 2 + 0.55 * 4]])
    assert "by their file names" in capsys.readouterr().err
    for odd in ({"flow/a.npy": [[1.0], [2.0]]}, {"x/a.npy": [[1.0], [2.0]], "y/a.npy": [[1.0], [2.0]]}):
        np.savez(tmp_path / "flow.npz", **{video: np.array(scores) for video, scores in odd.items()})
        assert main(["fuse", f"{tmp_path}/rgb.npz", f"{tmp_path}/flow.npz", *arguments]) == 2
        assert "no scores for" in capsys.readouterr().err
