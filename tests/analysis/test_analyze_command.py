from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from rcu_ops.analysis import early_accuracy, recurrent_spectra
from rcu_ops.cli import main
from rcu_ops.report import integer_ticks, replacing, write_csv

pytest.importorskip("matplotlib")
from matplotlib.image import imread

VIDEOS, CLASSES = 12, 6


@pytest.fixture
def files(tmp_path):
    """Scores of two models, labels of both kinds, class names and weights."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, VIDEOS)
    for model, gain in (("rcn", 1.0), ("i3d", 0.5)):
        scores = {}
        for video, label in enumerate(labels):
            length = 4 + 3 * video
            array = rng.normal(size=(CLASSES, length)).astype(np.float32)
            array[label] += gain * np.linspace(0, 3, length)
            scores[f"v{video}"] = array
        np.savez(tmp_path / f"{model}.npz", **scores)
    rows = [f"v{video},{label}" for video, label in enumerate(labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["video,label", *rows]) + "\n")
    spans = [f"v{video},{label},{video % 3},{4 + 2 * video}" for video, label in enumerate(labels)]
    (tmp_path / "dense.csv").write_text("\n".join(["video,class,start,end", *spans]) + "\n")
    (tmp_path / "classes.txt").write_text("\n".join(f"action {k}" for k in range(CLASSES)) + "\n")
    torch.manual_seed(0)
    state = {f"layer{i}.weight_hh": torch.eye(8) + 0.1 * torch.randn(8, 8) for i in range(5)}
    torch.save(state | {"fc.weight": torch.zeros(3, 3)}, tmp_path / "weights.pth")
    return tmp_path


def _commands(files):
    models = [f"RCN={files / 'rcn.npz'}", f"I3D={files / 'i3d.npz'}"]
    labels = ["--labels", str(files / "labels.csv")]
    return {
        "accuracy": [*models, *labels],
        "early": [*models, *labels],
        "segments": [*models, *labels, "--sliding", "I3D"],
        "map": [*models, "--labels", str(files / "dense.csv"), "--classes", str(files / "classes.txt")],
        "spectrum": [str(files / "weights.pth")],
    }


def _table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("analysis", ["accuracy", "early", "segments", "map", "spectrum"])
def test_numbers_and_picture(files, analysis, capsys):
    out = files / "out"
    assert main(["analyze", analysis, *_commands(files)[analysis], "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"wrote {out / analysis}.png" in printed.err
    assert len(printed.out.splitlines()) >= 2
    table = _table(out / f"{analysis}.csv")
    assert table
    assert all(None not in row and None not in row.values() for row in table)
    image = imread(out / f"{analysis}.png")[..., :3]
    assert min(image.shape[:2]) >= 250
    # Not blank, and drawn in colour: white paper, with something between 0.3 % and half of it covered.
    drawn = (image < 0.95).any(axis=-1)
    assert 0.003 < drawn.mean() < 0.5
    assert (image.max(axis=-1) - image.min(axis=-1) > 0.3).sum() > 100
    # Nothing is cut off: a white margin all round.
    edges = np.concatenate([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]])
    assert not edges.any()
    leftovers = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert leftovers == []


@pytest.mark.parametrize("analysis", ["accuracy", "early", "segments", "map"])
def test_what_is_printed_is_what_is_written(files, analysis, capsys, monkeypatch):
    monkeypatch.setattr("rcu_ops.analysis.command._picture", lambda draw, table: None)
    assert main(["analyze", analysis, *_commands(files)[analysis], "--out", str(files)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = _table(files / f"{analysis}.csv")
    if analysis == "accuracy":
        shares = ("clip_top1", "clip_top5", "video_top1", "video_top5")
        written = [
            [row["model"], *(f"{100 * float(row[name]):.1f}" for name in shares), row["clips"], row["videos"]]
            for row in rows
        ]
    elif analysis == "map":
        known = [row for row in rows if row["average_precision"]]
        means = [row for row in known if row["class"] == "mean"]
        written = [
            [
                mean["model"],
                mean["every"],
                f"{100 * float(mean['average_precision']):.2f}",
                str(sum((row["model"], row["every"]) == (mean["model"], mean["every"]) for row in known) - 1),
                mean["frames"],
                str(VIDEOS),
            ]
            for mean in means
        ]
        assert [row[:2] for row in written] == [["RCN", "1"], ["RCN", "8"], ["I3D", "1"], ["I3D", "8"]]
    else:
        steps, sign = 10, "" if analysis == "early" else "+"
        name = "accuracy" if analysis == "early" else "relative_accuracy"
        models = [[format(100 * float(row[name]), f"{sign}.1f") for row in part] for part in (rows[:10], rows[10:])]
        first = [str(10 * step if analysis == "early" else step) for step in range(1, steps + 1)]
        written = [list(row) for row in zip(first, *models, strict=True)]
    assert printed == written


def test_early_numbers_round_trip(files):
    assert main(["analyze", "early", *_commands(files)["early"], "--steps", "4", "--out", str(files)]) == 0
    labels = np.array([int(row["label"]) for row in _table(files / "labels.csv")])
    table = _table(files / "early.csv")
    for model in ("RCN", "I3D"):
        with np.load(files / f"{model.lower()}.npz") as archive:
            expected = early_accuracy([archive[f"v{v}"] for v in range(VIDEOS)], labels, steps=4)
        rows = [row for row in table if row["model"] == model]
        assert [float(row["accuracy"]) for row in rows] == expected.tolist()
        assert [float(row["observed_fraction"]) for row in rows] == [0.25, 0.5, 0.75, 1.0]
        assert {row["videos"] for row in rows} == {str(VIDEOS)}


def test_spectrum_numbers_round_trip(files):
    assert main(["analyze", "spectrum", str(files / "weights.pth"), "--out", str(files)]) == 0
    spectra = recurrent_spectra(torch.load(files / "weights.pth", weights_only=True))
    table = _table(files / "spectrum.csv")
    assert [row["name"] for row in table] == [f"layer{i}" for i in range(5)]
    for row, s in zip(table, spectra, strict=True):
        assert float(row["eigenvalue_modulus_mean"]) == s.modulus.mean()
        assert float(row["diagonal_std"]) == s.diagonal_std
    values = _table(files / "eigenvalues.csv")
    assert len(values) == 5 * 8
    assert complex(float(values[0]["real"]), float(values[0]["imaginary"])) == spectra[0].eigenvalues[0]


def test_segments_name_their_input(files):
    models = [f"RCN:unrolled={files / 'rcn.npz'}", f"RCN:sliding={files / 'i3d.npz'}", str(files / "i3d.npz")]
    command = ["analyze", "segments", *models, "--labels", str(files / "labels.csv"), "--out", str(files)]
    assert main(command) == 0
    named = dict.fromkeys((row["model"], row["input"]) for row in _table(files / "segments.csv"))
    assert list(named) == [("RCN", "unrolled"), ("RCN", "sliding"), ("i3d", "unrolled")]
    first = [row for row in _table(files / "segments.csv") if row["segment"] == "1"]
    assert {float(row["relative_accuracy"]) for row in first} == {0.0}
    assert {row["short_videos"] for row in first} == {"2"}


def test_map_without_a_positive_frame(files, capsys):
    (files / "dense.csv").write_text("video,class,start,end\n" + "".join(f"v{v},1,1,2\n" for v in range(VIDEOS)))
    assert main(["analyze", "map", *_commands(files)["map"], "--every", "2", "--out", str(files)]) == 2
    error = capsys.readouterr().err
    assert "rcn.npz: labels: expected at least one positive frame" in error
    assert error.count("\n") == 1
    assert not (files / "map.csv").exists()


def test_map_lists_classes_and_the_mean(files, capsys):
    (files / "dense.csv").write_text("video,class,start,end\n" + "".join(f"v{v},{v % 5},0,3\n" for v in range(VIDEOS)))
    assert main(["analyze", "map", *_commands(files)["map"], "--every", "2", "1", "--out", str(files)]) == 0
    assert "leaves out classes without positive frames: action 5" in capsys.readouterr().err
    table = [row for row in _table(files / "map.csv") if row["model"] == "RCN" and row["every"] == "2"]
    assert [row["class"] for row in table] == [*map(str, range(CLASSES)), "mean"]
    assert table[5]["name"] == "action 5"
    assert table[5]["average_precision"] == ""
    known = [float(row["average_precision"]) for row in table[:5]]
    assert float(table[-1]["average_precision"]) == pytest.approx(sum(known) / 5)


def test_labelled_videos_without_scores_are_mentioned(files, capsys):
    with (files / "labels.csv").open("a") as file:
        file.write("unseen,0\n")
    assert main(["analyze", "accuracy", *_commands(files)["accuracy"], "--out", str(files)]) == 0
    assert "note: labelled, but without scores and left out: 'unseen'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["early", "{}/missing.npz", "--labels", "{}/labels.csv"], "missing.npz: no such file or folder"),
        (["early", "{}/rcn.npz", "--labels", "{}/missing.csv"], "missing.csv: cannot be read as CSV"),
        (["early", "{}/rcn.npz", "--labels", "{}/labels.csv", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["early", "{}/rcn.npz", "{}/rcn.npz", "--labels", "{}/labels.csv"], "two models are named 'rcn'"),
        (["segments", "{}/rcn.npz", "--labels", "{}/labels.csv", "--sliding", "I3D"], "--sliding I3D: no such model"),
        (["segments", "{}/rcn.npz", "--labels", "{}/labels.csv", "--segments", "0"], "--segments: expected at least 1"),
        (["map", "{}/rcn.npz", "--labels", "{}/dense.csv", "--every", "0"], "--every: expected at least 1, got 0"),
        (["map", "{}/rcn.npz", "--labels", "{}/dense.csv", "--fps", "0"], "--fps: expected a number above 0"),
        (["map", "{}/rcn.npz", "--labels", "{}/labels.csv"], "labels.csv: expected a header line"),
        (["spectrum", "{}/missing.pth"], "missing.pth: no such file"),
        (["spectrum", "{}/rcn.npz"], "rcn.npz is not a readable file of weights: it is cut off, or a zip archive"),
        (["early", "{}/rcn.npz", "--labels", "{}/labels.csv", "--out", "{}/labels.csv/x"], "cannot write the results"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, arguments, message, capsys):
    arguments = [argument.format(files) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(files / "out")]
    assert main(["analyze", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rcu-ops: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (files / "out").exists()


def test_weights_that_are_not_square_are_named(files, capsys):
    torch.save({"cell.weight_hh": torch.zeros(8, 2)}, files / "lstm.pth")
    assert main(["analyze", "spectrum", str(files / "lstm.pth"), "--out", str(files)]) == 2
    assert "lstm.pth: cell: expected a square matrix [C, C], got shape [8, 2]" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_still_written(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["analyze", "spectrum", str(files / "weights.pth"), "--out", str(files)]) == 2
    assert "the picture needs matplotlib" in capsys.readouterr().err
    assert len(_table(files / "spectrum.csv")) == 5


def test_what_the_stream_command_writes_is_understood(tmp_path, capsys):
    pytest.importorskip("av")
    out = tmp_path / "clip"
    assert main(["stream", "--max-frames", "3", "--size", "32", "--out", str(out)]) == 0
    (tmp_path / "labels.csv").write_text("video,label\nclip,0\n")
    capsys.readouterr()
    command = ["analyze", "accuracy", str(out / "scores.jsonl"), "--labels", str(tmp_path / "labels.csv")]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (row,) = _table(tmp_path / "accuracy.csv")
    assert (row["model"], row["clips"], row["videos"]) == ("clip", "3", "1")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, ("a",), [(1,)])

    def rows():
        yield (2,)
        raise RuntimeError("broke half-way")

    with pytest.raises(RuntimeError, match="broke half-way"):
        write_csv(path, ("a",), rows())
    assert path.read_text() == "a\n1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_written_files_have_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with replacing(tmp_path / "table.csv") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "table.csv").stat().st_mode == plain.stat().st_mode


def test_ticks_are_thinned():
    assert integer_ticks(3) == [1, 2, 3]
    assert integer_ticks(33) == list(range(1, 34, 2))


def test_analysis_loads_no_kernels_models_or_pictures():
    # rcu_ops itself brings the operators; analysis adds neither networks nor a plotting library.
    code = (
        "import sys; import rcu_ops.analysis.command, rcu_ops.analysis.scores_io\n"
        "bad = [m for m in sys.modules if m.startswith(('matplotlib', 'rcu_ops.nn', 'rcu_ops.models'))]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
