"""Training on stored features: windows, learning, exact resumption, scores for fusion, sweeps, errors."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rcu_ops.cli import main
from rcu_ops.features.files import select_steps, write_features
from rcu_ops.features.training import FeatureTraining, FeatureVideos, Windows
from rcu_ops.models import create_model
from rcu_ops.recipes.lists import read_list
from rcu_ops.video.sample import strided_clips

SIZE = 8
NAMES = ("rising", "falling")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes whose clips are the same in opposite order, of two sizes (8, and 4 in pca_4); lists of names."""
    folder = tmp_path_factory.mktemp("features")
    random = np.random.default_rng()
    for part, count in (("train", 24), ("test", 10)):
        rows = []
        for number in range(count):
            ramp = np.linspace(-1, 1, int(random.integers(5, 12)))[:, None]
            values = ramp * np.ones(SIZE) * (1 if number % 2 == 0 else -1) + 0.1 * random.standard_normal((1, SIZE))
            name = f"{part}/v{number}.mp4"
            for target in (folder, folder / "pca_4"):
                kept = values[:, : 4 if target != folder else SIZE].astype(np.float32)
                write_features(target / f"{name}.{'npy' if number % 3 else 'safetensors'}", kept)
            rows.append(f"{name},{NAMES[number % 2]}")
        (folder / f"{part}.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder


def command(toy: Path, out: Path, *more: object) -> list[str]:
    lists = ["--list", toy / "train.csv", "--test", toy / "test.csv", "--labels", toy / "names.txt"]
    small = ["--steps", 30, "--batch", 8, "--time-steps", 6, "--lr", 0.01, "--device", "cpu"]
    return list(map(str, ["features-train", toy, *lists, *small, "--out", out, *more]))


def videos(toy: Path) -> FeatureVideos:
    return FeatureVideos(toy, read_list(toy / "train.csv", 2, NAMES))


@pytest.mark.parametrize(("clips", "length", "stride"), [(11, 4, 1), (11, 4, 3), (6, 6, 2), (3, 5, 1)])
def test_windows_are_strided_clips_within_the_video(clips: int, length: int, stride: int) -> None:
    found = Windows(length, stride)(clips)
    assert found.tolist() == strided_clips(clips, min(length, clips), stride).tolist()
    assert found.max() < clips
    assert all(row == list(range(row[0], row[0] + min(length, clips))) for row in found.tolist())


def test_every_window_has_its_turn(toy: Path) -> None:
    examples, windows = videos(toy), Windows(4, 2)
    whole = np.load(toy / "train/v1.mp4.npy")
    count = len(windows(len(whole)))
    wanted = [select_steps(whole[rows], 3) for rows in windows(len(whole))]
    for turn in range(2 * count):
        assert np.array_equal(examples.sequence(1, 3, windows, turn), wanted[turn % count])
    assert np.array_equal(examples.sequence(1, 3), select_steps(whole, 3))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_learns_the_order_of_clips(toy: Path, tmp_path: Path, cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    augment = ("--augment", "stride", "--window", "5") if cell == "gru" else ()
    assert main(command(toy, tmp_path / "run", "--cell", cell, *augment)) == 0
    assert "top-1 100.00 %" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert float(rows[-1]["loss"]) < 0.2 * float(rows[0]["loss"])
    assert {row["lr"] for row in rows} == {"0.01"}
    assert float(rows[-1]["accuracy"]) > 0.75
    model = create_model("res_lstm", num_classes=2, input_size=SIZE, cell=cell)
    weights = load_file(tmp_path / "run/weights.safetensors")
    assert weights["rnn.layers.0.weight_ih_l0"].shape == ({"lstm": 4, "gru": 3, "rnn": 1}[cell] * SIZE, SIZE)
    model.load_state_dict(weights)
    test = FeatureVideos(toy, read_list(toy / "test.csv", 2, NAMES))
    scores = np.load(tmp_path / "run/scores.npz")
    assert scores.files == [f"test/v{number}.mp4" for number in range(10)]
    with torch.no_grad():
        for place, name in enumerate(scores.files):
            said = model(torch.from_numpy(test.sequence(place, 6))[None]).softmax(1)[0]
            torch.testing.assert_close(torch.from_numpy(scores[name][:, 0]), said)
    both = [str(tmp_path / "run/scores.npz")] * 2
    fused = ["fuse", f"a={both[0]}", f"b={both[1]}", "--labels", str(tmp_path / "run/labels.csv")]
    assert main([*fused, "--out", str(tmp_path / "fused.npz")]) == 0
    assert "100.0" in capsys.readouterr().out


def test_resumes_exactly(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = ("--augment", "stride", "--window", "4", "--window-stride", "2")
    assert main(command(toy, tmp_path / "whole", *windows)) == 0
    take = FeatureTraining._take

    def stopping(training: FeatureTraining) -> tuple[float, float]:
        training._save_every = 4
        if training.step == 14:
            raise KeyboardInterrupt
        return take(training)

    monkeypatch.setattr(FeatureTraining, "_take", stopping)
    assert main(command(toy, tmp_path / "parts", *windows)) == 130
    monkeypatch.setattr(FeatureTraining, "_take", take)
    steps = []
    monkeypatch.setattr(FeatureTraining, "_take", lambda training: (steps.append(training.step), take(training))[1])
    assert main(command(toy, tmp_path / "parts", *windows)) == 0
    assert steps == list(range(12, 30))
    for name in ("weights.safetensors", "metrics.csv", "scores.npz"):
        held = [(tmp_path / run / name).read_bytes() for run in ("whole", "parts")]
        assert held[0] == held[1], name


def test_another_run_is_refused(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(toy, tmp_path, "--steps", 2)) == 0
    for more, what in (((), "depth"), (("--augment", "stride"), "windows")):
        assert main(command(toy, tmp_path, "--steps", 2, *more, *(("--depth", 1) if not more else ()))) == 2
        assert f"another {what}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sweep", "more", "sizes"),
    [
        ("depth=1,3", (), {(n, network): (8, 8) for n in (1, 3) for network in ("residual", "plain")}),
        ("hidden=4,8", (), {(n, network): (n, n) for n in (4, 8) for network in ("residual", "plain")}),
        ("hidden=4,16", ("--no-residual",), {(4, "plain"): (8, 4), (16, "plain"): (8, 16)}),
    ],
)
def test_sweep(
    toy: Path, tmp_path: Path, sweep: str, more: tuple[str, ...], sizes: dict[tuple[int, str], tuple[int, int]]
) -> None:
    pytest.importorskip("matplotlib")
    kind = sweep.partition("=")[0]
    assert main(command(toy, tmp_path, "--sweep", sweep, *more)) == 0
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert list(rows[0]) == [kind, "network", "parameters", "loss", "top1", "top5"]
    assert [(int(row[kind]), row["network"]) for row in rows] == list(sizes)
    for row, ((value, network), (features, hidden)) in zip(rows, sizes.items(), strict=True):
        weights = load_file(tmp_path / f"{kind}_{value}_{network}/weights.safetensors")
        assert weights["rnn.layers.0.weight_ih_l0"].shape == (4 * hidden, features)
        assert sum(w.numel() for w in weights.values()) == int(row["parameters"])
        scores = np.load(tmp_path / f"{kind}_{value}_{network}/scores.npz")
        right = [scores[name][:, 0].argmax() == number % 2 for number, name in enumerate(scores.files)]
        assert float(row["top1"]) == np.mean(right)
        *_, last = csv.DictReader((tmp_path / f"{kind}_{value}_{network}/metrics.csv").open())
        assert row["loss"] == last["loss"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_videos_without_features_are_left_out_and_named(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.csv").write_text((toy / "train.csv").read_text() + "lost.mp4,rising\n")
    assert main([*command(toy, tmp_path / "run", "--steps", 1), "--list", str(tmp_path / "some.csv")]) == 3
    assert "'lost.mp4'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--hidden", 4), "--hidden: a residual stack adds outputs to inputs"),
        (("--depth", 6), "--depth: expected 1 to 5"),
        (("--depth", 0), "--depth: expected at least 1"),
        (("--lr", "nan"), "--lr: expected a number above 0"),
        (("--window", 3), "--augment stride"),
        (("--sweep", "width=3"), "--sweep: expected hidden=N,N,..."),
        (("--sweep", "depth=1,6"), "--depth: expected 1 to 5"),
        (("--sweep", "hidden=5"), "--no-residual needs none"),
        (("--sweep", "hidden=4", "--hidden", 4), "--sweep hidden"),
        (("--test-features", "/nowhere"), "no such folder"),
        (("--list", "/nowhere.csv"), "cannot be read"),
    ],
)
def test_errors(
    toy: Path, tmp_path: Path, more: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(toy, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_features_that_do_not_fit(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    good = np.ones((3, SIZE), np.float32)
    (tmp_path / "list.csv").write_text("u.mp4,0\nv.mp4,1\n")
    write_features(tmp_path / "a/u.mp4.npy", good)
    for content, message in (
        (good[:, :5], "expected features of size 8"),
        (good * np.float32("nan"), "NaN or infinity"),
        (None, "cannot be read as features"),
    ):
        target = tmp_path / "a/v.mp4.npy"
        target.write_bytes(b"no array") if content is None else write_features(target, content)
        lists = ["--list", str(tmp_path / "list.csv"), "--steps", "1", "--device", "cpu"]
        assert main(["features-train", str(tmp_path / "a"), *lists, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    write_features(tmp_path / "a/v.mp4.npy", good)
    for name in ("u", "v"):
        write_features(tmp_path / f"b/{name}.mp4.npy", good)
    for name, crops in (("a", 1), ("b", 10)):
        (tmp_path / name / "settings.json").write_text(f'{{"crops": {crops}, "format": "{name}"}}')
    two = ["--test", str(tmp_path / "list.csv"), "--test-features", str(tmp_path / "b")]
    assert main(["features-train", str(tmp_path / "a"), *lists, *two, "--out", str(tmp_path / "run")]) == 2
    assert "another crops than" in capsys.readouterr().err


def test_from_videos_with_ten_crops_and_components(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from tests.video.clips import write_clip

    network = ["--model", "rcn_resnet18", "--model-option", "width=2", "--clip-length", "4", "--step", "2"]
    network += ["--size", "16", "--device", "cpu"]
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for number in range(2):
            write_clip(tmp_path / part / f"{number}.mp4", 10)
        (tmp_path / f"{part}.csv").write_text("0.mp4,0\n1.mp4,1\n")
    components = str(tmp_path / "f_train_10/pca_3.safetensors")
    for part, crops, pca in (("train", "10", "3"), ("test", "10", components), ("test", "1", components)):
        out = str(tmp_path / f"f_{part}_{crops}")
        assert main(["features", str(tmp_path / part), *network, "--crops", crops, "--pca", pca, "--out", out]) == 0
    common = ["features-train", str(tmp_path / "f_train_10/pca_3"), "--list", str(tmp_path / "train.csv"), "--classes"]
    common += ["2", "--test", str(tmp_path / "test.csv"), "--steps", "1", "--device", "cpu"]
    for crops, code in (("10", 0), ("1", 2)):
        test = str(tmp_path / f"f_test_{crops}/pca_3")
        assert main([*common, "--test-features", test, "--out", str(tmp_path / f"run_{crops}")]) == code
    assert "made with another crops than" in capsys.readouterr().err
    assert np.load(tmp_path / "run_10/scores.npz").files == ["0.mp4", "1.mp4"]
