"""Confusion matrices by category, their difference, the change per class, and the picture of the best classes."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from rcu_ops.analysis.confusion import (
    Confusion,
    category_accuracy,
    category_order,
    confusion,
    per_class_change,
)
from rcu_ops.analysis.top5 import best_classes
from rcu_ops.cli import main

LABELS = [0, 0, 1, 1, 2]


def one_hot(choices):
    return [np.eye(4)[choice][:, None] for choice in choices]


def test_counts():
    found = confusion(one_hot([0, 1, 1, 1, 3]), LABELS)
    assert found.counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert found.rates.tolist() == [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(found.recall, [0.5, 1, 0, np.nan])
    # The mean over outputs decides, and ties go to the lower class.
    assert confusion([np.array([[0.0, 3.0], [2.0, 0.0]])], [1]).counts.tolist() == [[0, 0], [1, 0]]
    assert confusion([np.zeros((2, 3))], [1]).counts.tolist() == [[0, 0], [1, 0]]


def test_categories():
    categories = ["sport", "music", "sport", "music"]
    assert category_order(categories) == [0, 2, 1, 3]
    found = category_accuracy(confusion(one_hot([0, 1, 1, 1, 3]), LABELS), categories)
    assert found == {"sport": (1 / 3, 3), "music": (1.0, 2)}


def test_change():
    before, after = (confusion(one_hot(choices), LABELS) for choices in ([0, 1, 1, 1, 3], [0, 0, 1, 0, 2]))
    np.testing.assert_array_equal(per_class_change(before, after), [0.5, -0.5, 1, np.nan])
    with pytest.raises(ValueError, match="same number of videos"):
        per_class_change(before, Confusion(2 * after.counts))


def test_best_classes():
    best = best_classes(np.log([0.1, 0.4, 0.2, 0.2, 0.05, 0.05]))
    assert [index for index, _ in best] == [1, 2, 3, 0, 4]
    assert best[0][1] == pytest.approx(0.4)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, choices in (("a", [0, 1, 1, 1, 3]), ("b", [0, 0, 1, 0, 2])):
        np.savez(tmp_path / f"{name}.npz", **{f"v{i}": scores for i, scores in enumerate(one_hot(choices))})
    rows = "\n".join(f"v{index},{label}" for index, label in enumerate(LABELS))
    (tmp_path / "labels.csv").write_text(f"video,label\n{rows}\n")
    (tmp_path / "classes.txt").write_text("run\nplay\njump\ndrum\n")
    (tmp_path / "categories.csv").write_text("class,category\nrun,sport\nplay,music\njump,sport\ndrum,music\n")
    return tmp_path


def analyze(files: Path, kind: str, *options: object) -> int:
    scores = [files / "a.npz", files / "b.npz"]
    common = ["--labels", files / "labels.csv", "--classes", files / "classes.txt", "--out", files / "out"]
    return main(["analyze", kind, *map(str, [*scores, *common, *options])])


def test_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert analyze(files, "confusion", "--categories", files / "categories.csv") == 0
    assert "b against a: 2 classes better, 1 worse, of 4" in capsys.readouterr().out
    with (files / "out" / "confusion_a.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["run", "jump", "play", "drum"]
    assert rows[1] == ["run", "1", "0", "1", "0"]
    with (files / "out" / "categories.csv").open() as file:
        found = {row["category"]: float(row["b"]) for row in csv.DictReader(file)}
    assert found == {"sport": 1.0, "music": 0.5}
    with (files / "out" / "change_b.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "a", "b", "change"]
    assert {row[0]: [float(value) for value in row[1:]] for row in rows[1:4]} == {
        "run": [0.5, 1, 0.5],
        "jump": [0, 1, 1],
        "play": [1, 0.5, -0.5],
    }
    assert [row[0] for row in rows[1:]] == ["run", "jump", "play", "drum"]  # by category
    from matplotlib.image import imread

    red = {}
    for name in ("confusion_a", "confusion_b", "difference_b", "change_b"):
        image = imread(files / "out" / f"{name}.png")
        red[name] = int((image[..., 0] - image[..., 2] > 0.3).sum())
    assert red["confusion_a"] == red["confusion_b"] == 0
    assert red["difference_b"] > 100  # what became rarer has a colour of its own


def test_top5_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert analyze(files, "top5", "--show", "v1", "v4", "--videos", files) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:3] == ["v1", "run", "a"]
    assert "note: no picture" in captured.err
    assert (files / "out" / "top5.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("confusion", ["--top", "0"], "--top: expected at least 1"),
        ("confusion", ["--categories", "labels.csv"], "labels.csv"),
        ("top5", ["--show", "v9"], "--show v9: no such video"),
        ("top5", ["--softmax"], "--softmax"),
    ],
)
def test_bad_options(files, kind, options, message, capsys) -> None:
    assert analyze(files, kind, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_categories_need_every_class(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "categories.csv").write_text("class,category\nrun,sport\nplay,music\n")
    assert analyze(files, "confusion", "--categories", files / "categories.csv") == 2
    assert "no category for 'jump', 'drum'" in capsys.readouterr().err
