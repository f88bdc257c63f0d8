"""Features of clips: which frames, which layer, files that survive a kill, PCA, the command."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rcu_ops.cli import main
from rcu_ops.cli_errors import UserError
from rcu_ops.features.extract import FeatureExtractor, feature_layer
from rcu_ops.features.files import FeaturePart, feature_files, read_features, select_steps, write_features
from rcu_ops.features.pca import PCA, fit_pca, load_pca, save_pca
from rcu_ops.models import create_model
from rcu_ops.video.sample import spread_over, strided_clips
from tests.video.clips import recognise, write_clip

pytest.importorskip("av")

TINY = ("--model", "rcn_resnet18", "--model-option", "width=2", "--clip-length", "4", "--step", "2", "--size", "16")


class Shades(nn.Module):
    """A network that puts out the grey of every frame of its clip, so that features say which frames they saw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.keep = nn.Identity()
        self.unused = nn.Identity()
        self.pair = nn.Identity()
        self.state = nn.Identity()

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        self.pair(clip.mean((1, 3, 4)).mean())
        shades = clip.mean((1, 3, 4)) * self.scale
        self.state((shades, shades + 1))
        return self.keep(shades)


def seen(features: torch.Tensor) -> list[list[int]]:
    """Which pictures the features [n,T] of ``Shades`` come from."""
    from rcu_ops.video.transform import IMAGENET_MEAN, IMAGENET_STD

    scale = np.mean([1 / s for s in IMAGENET_STD])
    shift = np.mean([m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])
    return [[recognise(np.asarray(255 * (v + shift) / scale)) for v in row] for row in features.tolist()]


@pytest.mark.parametrize(
    ("frames", "length", "step", "stride"), [(18, 4, 2, 1), (17, 4, 3, 2), (16, 2, 5, 1), (3, 4, 2, 1), (9, 8, 4, 1)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_clips_are_the_strided_ones(
    tmp_path: Path, frames: int, length: int, step: int, stride: int, batch: int
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames)
    options = {"clip_length": length, "step": step, "stride": stride, "size": 32, "scale": 36, "batch": batch}
    extractor = FeatureExtractor(Shades().eval(), "keep", **options)
    found = list(extractor(str(clip)))
    assert all(len(some) <= batch for some in found)
    expected = strided_clips(frames, length, step, stride=stride).tolist()
    assert seen(torch.cat(found)) == expected
    for skip in range(1, len(expected) + 1):
        rest = list(extractor(str(clip), skip=skip))
        assert seen(torch.cat(rest)) == expected[skip:] if rest else skip == len(expected)


def test_crops_are_averaged(tmp_path: Path) -> None:
    images = [np.full((40, 60, 3), 100, np.uint8) for _ in range(4)]
    for image in images:
        image[:, :20] = 200
    clip = write_clip(tmp_path / "clip.mkv", 4, images=images, height=40, width=60, codec="ffv1", pixel_format="bgr0")
    centre, corners, mirrored = (
        next(FeatureExtractor(Shades().eval(), "keep", clip_length=4, size=20, scale=40, crops=crops)(str(clip)))
        for crops in (1, 5, 10)
    )
    torch.testing.assert_close(corners, mirrored)
    # Two of the five crops lie in the bright stripe, which the centre does not see.
    bright = next(FeatureExtractor(Shades().eval(), "keep", clip_length=4, size=40, scale=40)(str(clip)))
    assert corners.shape == centre.shape == (1, 4)
    assert (corners - centre).mean() > 0
    assert not torch.allclose(bright, centre)


def test_a_layer_by_name_is_what_the_network_computes(tmp_path: Path) -> None:
    from rcu_ops.recipes.dataset import network_input
    from rcu_ops.video import read_frames
    from rcu_ops.video.transform import center_crop, resize_short_side

    clip = write_clip(tmp_path / "clip.mp4", 6)
    model = create_model("rcn_resnet18", width=2, num_classes=5).eval()
    pictures = torch.from_numpy(read_frames(clip, range(4)))
    clip_input = network_input(center_crop(resize_short_side(pictures, 18), 16)[None])
    with torch.no_grad():
        wanted = {
            "layer4": model.features(clip_input).mean((2, 3, 4)),
            "stem": model.stem(clip_input).mean((2, 3, 4)),
            "head": model.frame_scores(clip_input).mean(2),
        }
    for layer, expected in wanted.items():
        found = next(FeatureExtractor(model, layer, clip_length=4, step=4, size=16, scale=18)(str(clip)))
        torch.testing.assert_close(found, expected)
    pair = Shades().eval()  # a layer such as an LSTM puts out a pair, of which the feature is the first
    pair.keep.register_forward_hook(lambda module, arguments, output: (output, output + 1))
    pair.register_forward_hook(lambda module, arguments, output: output[0])
    plain, first = (FeatureExtractor(m, "keep", clip_length=4, size=16, scale=18) for m in (Shades().eval(), pair))
    assert torch.equal(next(first(str(clip))), next(plain(str(clip))))
    assert feature_layer(model, None)[0] == "layer4"
    assert feature_layer(create_model("c3d", width=1, hidden=4), None)[0] == "relu6"


def test_of_a_layer_with_a_state_its_output_is_kept() -> None:
    clips = [torch.randint(256, (4, 1, 16, 16, 3), dtype=torch.uint8) for _ in range(2)]
    output, pair = (FeatureExtractor(Shades(), name, size=16, scale=16)._run(clips) for name in ("keep", "state"))
    assert torch.equal(pair, output)


def test_layers_that_cannot_be_kept() -> None:
    model = create_model("rcn_resnet18", width=2)
    with pytest.raises(ValueError, match=r"layer: VideoResNet has no layer 'layer5'; there are layer\d"):
        feature_layer(model, "layer5")
    frames = [torch.zeros(4, 1, 16, 16, 3, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="unused does not run"):
        FeatureExtractor(Shades(), "unused", size=16, scale=16)._run(frames)
    with pytest.raises(ValueError, match=r"expected pair to put out .* got \[\]"):
        FeatureExtractor(Shades(), "pair", size=16, scale=16)._run(frames)
    endless = Shades()
    nn.init.constant_(endless.scale, float("inf"))
    with torch.inference_mode(), pytest.raises(ValueError, match="layer: the output of keep is not finite"):
        FeatureExtractor(endless, "keep", size=16, scale=16)._run(frames)
    for options in ({"step": 0}, {"scale": 100}, {"crops": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FeatureExtractor(Shades(), "keep", **options)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_a_video_of_one_clip_has_features_and_one_of_none_has_not(tmp_path: Path, suffix: str) -> None:
    for shape in ((1, 3), (4, 1)):
        write_features(tmp_path / f"a{suffix}", np.ones(shape, np.float32))
        assert read_features(tmp_path / f"a{suffix}").shape == shape
    for wrong in (np.ones((0, 3), np.float32), np.ones(3, np.float32), np.ones((2, 3), np.int64)):
        write_features(tmp_path / f"a{suffix}", wrong)
        with pytest.raises(UserError, match=r"expected features \[K,F\], got"):
            read_features(tmp_path / f"a{suffix}")


class Payload:
    """What an array file from elsewhere could hold: unpickling it runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_reading_features_runs_no_code(tmp_path: Path) -> None:
    held = np.empty((1, 1), dtype=object)
    held[0, 0] = Payload(tmp_path / "ran")
    np.save(tmp_path / "a.npy", held, allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy: cannot be read as features"):
        read_features(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()


def test_rows_survive_a_cut(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    part = FeaturePart(tmp_path / "deep" / "a.part")
    part.append(rows[:2])
    part.append(rows[2:4])
    path = tmp_path / "deep" / "a.part"
    with path.open("ab") as file:
        file.write(rows[4:].tobytes()[:7])
    again = FeaturePart(path)
    assert again.rows == 4
    again.append(rows[4:])
    assert np.array_equal(again.read(), rows)
    with pytest.raises(UserError, match="holds features of size 3, got 2"):
        again.append(rows[:, :2])
    path.write_bytes(b"something else entirely")
    with pytest.raises(UserError, match="not a file of features under way"):
        FeaturePart(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_files(tmp_path: Path, suffix: str) -> None:
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / f"a.mp4{suffix}"
    write_features(path, features)
    assert np.array_equal(read_features(path), features)
    (tmp_path / "pca_2").mkdir()
    write_features(tmp_path / "pca_2" / path.name, features)
    assert feature_files(tmp_path) == [path]
    for steps in (1, 2, 4, 9):
        assert np.array_equal(select_steps(features, steps), features[spread_over(4, steps).numpy()])
    for wrong, what in ((features[0], r"float32 \[3\]"), (features.astype(int), "int64"), (features[:0], r"\[0, 3\]")):
        write_features(path, wrong)
        with pytest.raises(UserError, match=rf"a.mp4{suffix}: expected features \[K,F\], got .*{what}"):
            read_features(path)
    path.write_bytes(b"nothing")
    why = {".npy": ": cannot be read as features", ".safetensors": " is not a readable safetensors file: it is cut off"}
    with pytest.raises(UserError, match=f"a.mp4{suffix}{why[suffix]}"):
        read_features(path)


def test_pca_in_batches_is_that_of_all_rows() -> None:
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(1)
    data = (generator.normal(size=(90, 3)) * [9, 4, 2]) @ generator.normal(size=(3, 8)) + generator.normal(size=8)
    pca = fit_pca(iter(np.array_split(data.astype(np.float32), [1, 2, 9, 30, 88])), 3)
    centred = data - data.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs((pca.components * axes[:3]).sum(1)), 1, rtol=1e-4)
    np.testing.assert_allclose(pca.explained, (singular**2 / (singular**2).sum())[:3], rtol=1e-3)
    np.testing.assert_allclose(fit_pca([data.astype(np.float32)], 1).explained, pca.explained[:1], rtol=1e-3)
    reduced = pca(data.astype(np.float32))
    np.testing.assert_allclose(reduced @ pca.components + pca.mean, data, atol=1e-3)


def test_pca_errors_and_file(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    few = np.zeros((3, 8), np.float32)
    with pytest.raises(UserError, match="4 components need at least as many clips"):
        fit_pca([few], 4)
    with pytest.raises(UserError, match="no features"):
        fit_pca([], 4)
    pca = PCA(np.zeros(4, np.float32), np.eye(2, 4, dtype=np.float32), np.ones(2, np.float32))
    save_pca(tmp_path / "p.safetensors", pca)
    assert np.array_equal(load_pca(tmp_path / "p.safetensors").components, pca.components)
    with pytest.raises(ValueError, match=r"expected \[K,4\], got \[3, 8\]"):
        pca(few)
    with pytest.raises(UserError, match="cannot be read"):
        load_pca(tmp_path / "none.safetensors")
    write_features(tmp_path / "f.safetensors", few)
    with pytest.raises(UserError, match=r"f\.safetensors: holds no principal components: there is no 'mean' in it"):
        load_pca(tmp_path / "f.safetensors")
    with pytest.raises(UserError, match=r"p\.safetensors: holds no features: there is no 'features' in it"):
        read_features(tmp_path / "p.safetensors")
    save_pca(tmp_path / "p.safetensors", PCA(np.zeros(3, np.float32), pca.components, pca.explained))
    with pytest.raises(UserError, match="its components and mean do not fit each other"):
        load_pca(tmp_path / "p.safetensors")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    write_clip(folder / "a.mp4", 12)
    write_clip(folder / "deep" / "a.mkv", 9)
    (folder / "bad.mp4").write_bytes(b"this is no video")
    (folder / "notes.txt").write_text("neither is this")
    return folder


def features(*arguments: object) -> int:
    return main(["features", *map(str, arguments)])


def index(out: Path) -> dict[str, dict[str, str]]:
    with (out / "index.csv").open() as file:
        return {row["video"]: row for row in csv.DictReader(file)}


def test_command(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert features(videos, "--out", out, *TINY) == 3  # one video cannot be used
    error = capsys.readouterr().err
    assert "bad.mp4" in error.splitlines()[-1]
    assert "note: the network is untrained (--weights)" in error
    assert {name: int(row["clips"]) for name, row in index(out).items()} == {"a.mp4": 5, "deep/a.mkv": 3}
    assert read_features(out / "deep" / "a.mkv.safetensors").shape == (3, 16)
    before = (out / "a.mp4.safetensors").stat().st_mtime_ns
    (out / "deep" / "a.mkv.safetensors").unlink()
    (videos / "bad.mp4").unlink()
    assert features(videos, "--out", out, *TINY) == 0
    assert "1 of 2 videos were done already" in capsys.readouterr().out
    assert (out / "a.mp4.safetensors").stat().st_mtime_ns == before
    assert len(index(out)) == 2
    # Another layer is another run.
    assert features(videos, "--out", out, *TINY, "--layer", "stem") == 2
    assert "holds features with another layer" in capsys.readouterr().err
    assert features(videos, "--out", out, *TINY, "--layer", "stem", "--format", "npy", "--overwrite") == 0
    assert read_features(out / "a.mp4.npy").shape == (5, 2)
    assert not (out / "a.mp4.safetensors").exists()


def test_command_with_pca(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out, other = tmp_path / "out", tmp_path / "other"
    (videos / "bad.mp4").unlink()
    assert features(videos, "--out", out, *TINY, "--pca", "2") == 0
    assert "% of the variance" in capsys.readouterr().out
    pca = load_pca(out / "pca_2.safetensors")
    whole, reduced = (read_features(out / place / "a.mp4.safetensors") for place in ("", "pca_2"))
    assert np.array_equal(reduced, pca(whole))
    assert features(videos / "a.mp4", "--out", other, *TINY, "--pca", out / "pca_2.safetensors") == 0
    assert np.array_equal(read_features(other / "pca_2" / "a.mp4.safetensors"), reduced)
    assert features(videos / "a.mp4", "--out", other, *TINY, "--pca", "100") == 2
    assert "100 components need at least as many clips" in capsys.readouterr().err
    (out / "mine.safetensors.txt").touch()
    assert features(videos, "--out", out, *TINY, "--overwrite") == 0  # without components: those of before are gone
    names = ["a.mp4.safetensors", "deep", "index.csv", "mine.safetensors.txt", "settings.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_a_video_that_breaks_gives_its_good_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rcu_ops.video import BrokenVideoError, open_video
    from tests.recipes.motion import write_video

    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    write_clip(folder / "a.mp4", 9)
    write_video(tmp_path / "whole.mp4", 1, 3, count=40)
    content = (tmp_path / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: int(0.8 * len(content))])
    with open_video(folder / "cut.mp4") as reader, pytest.raises(BrokenVideoError) as caught:
        list(reader)
    usable = caught.value.frame_index
    rows = []
    for turn in range(3):  # the file is not opened again, and all the same not forgotten
        assert features(folder, "--out", out, *TINY) == 3
        said = capsys.readouterr()
        assert said.err.splitlines()[-1].startswith(f"  cut.mp4: broke at frame {usable}: ")
        assert ("2 of 2 videos were done already" in said.out) == (turn > 0)
        rows.append(index(out))
        if turn == 1:  # as a kill leaves it
            with (out / "faults.jsonl").open("a") as file:
                file.write('{"video": "a.mp4", "fau')
    assert rows[0] == rows[1] == rows[2]
    assert (rows[0]["a.mp4"]["fault"], rows[0]["a.mp4"]["clips"]) == ("", "3")
    assert rows[0]["cut.mp4"]["fault"].startswith(f"broke at frame {usable}: ")
    assert int(rows[0]["cut.mp4"]["clips"]) == len(strided_clips(usable, 4, 2))


def test_weights_say_how_their_network_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rcu_ops.recipes import get_recipe
    from rcu_ops.recipes.checkpoint import RunSettings, save_weights

    clip, out = write_clip(tmp_path / "a.mp4", 9), tmp_path / "out"
    model = create_model("rcn_resnet18", num_classes=3, width=2, update="mean").eval()
    recipe = dataclasses.replace(get_recipe("kinetics_resnet18"), classes=3)
    save_weights(tmp_path / "own.safetensors", model, RunSettings(recipe, {"width": 2, "update": "mean"}))
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    expected = next(FeatureExtractor(model, None, clip_length=4, step=2, size=16, scale=18)(str(clip)))
    plain = ("--weights", tmp_path / "plain.pt", "--model-option", "update=mean")
    for more in (("--weights", tmp_path / "own.safetensors"), (*plain, "--classes", "3")):
        assert features(clip, "--out", out, *TINY, *more, "--overwrite") == 0
        assert "untrained" not in capsys.readouterr().err
        assert np.array_equal(read_features(out / "a.mp4.safetensors"), expected.numpy())
    assert features(clip, "--out", out, *TINY, *plain, "--overwrite") == 2
    assert "is of 3 classes, the network of 400; --classes sets it" in capsys.readouterr().err
    assert read_features(out / "a.mp4.safetensors").shape == (3, 16)  # nothing is removed for what cannot run


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle of a video: nothing that was computed is computed again, nothing is lost."""
    folder, whole, killed = tmp_path / "videos", tmp_path / "whole", tmp_path / "killed"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name, 120)
    options = [*TINY, "--batch", "1"]
    assert features(folder, "--out", whole, *options) == 0
    command = [sys.executable, "-m", "rcu_ops.cli", "features", str(folder), "--out", str(killed), *options]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    part = killed / "a.mp4.safetensors.part"
    deadline = time.monotonic() + 120
    while not (part.is_file() and part.stat().st_size > 10 * 64):
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = FeaturePart(part)
    assert rows.rows >= 9
    kept = rows.read()
    assert features(folder, "--out", killed, *options) == 0
    for name in ("a.mp4", "b.mp4"):
        assert np.array_equal(*(read_features(out / f"{name}.safetensors") for out in (whole, killed)))
    assert np.array_equal(read_features(killed / "a.mp4.safetensors")[: len(kept)], kept)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "rcn_resnet8"], "--model: there is no model"),
        (["--layer", "nothing"], "--layer: VideoResNet has no layer 'nothing'"),
        (["--crops", "4"], "--crops: expected one of 1, 5, 10, got 4"),
        (["--step", "0"], "--step: expected at least 1"),
        (["--pca", "0"], "--pca: expected at least 1, got 0"),
        (["--pca", "none.safetensors"], "cannot be read as principal components"),
        (["--model", "res_lstm", "--model-option", "num_layers=1"], "--model"),
        (["--weights", "none.pt"], "--weights: there is no file none.pt"),
        (["--model-option", "x"], "--model-option: expected NAME=VALUE"),
        (["--model", "c3d"], "--model: it cannot take clips of this length and size: C3D: expected a clip"),
        (["--layer", "head.dropout", "--model-option", "in_channels=4"], "--model: it cannot take clips of this"),
    ],
)
def test_bad_options(options: list[str], message: str, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert features(videos, "--out", videos / "out", *TINY, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (videos / "out").exists()


def test_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert features(tmp_path / "none.mp4", "--out", tmp_path / "out", *TINY) == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert features(tmp_path / "empty", "--out", tmp_path / "out", *TINY) == 2
    assert "no video in this folder" in capsys.readouterr().err
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert features(tmp_path / "bad.mp4", "--out", tmp_path / "out", *TINY) == 2
    assert "not one of its videos can be used" in capsys.readouterr().err
