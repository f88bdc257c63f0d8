from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rcu_ops.analysis.scores_io import (
    DenseLabels,
    VideoScores,
    check_same_videos,
    labels_for,
    list_names,
    read_class_names,
    read_scores,
    read_state_dict,
    read_video_labels,
)
from rcu_ops.cli_errors import UserError


def write_jsonl(path, scores, frames=None, rate=10.0):
    """Scores [K, T] in the format of ``rcu-ops stream``."""
    frames = range(scores.shape[1]) if frames is None else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for frame, row in zip(frames, scores.T.tolist(), strict=True):
            file.write(json.dumps({"index": frame, "time": frame / rate, "scores": row}) + "\n")


def test_jsonl_keeps_numbers_frames_and_times(tmp_path):
    scores = np.random.default_rng(0).normal(size=(3, 4))
    write_jsonl(tmp_path / "clip" / "scores.jsonl", scores, frames=[0, 2, 3, 9])
    loaded = read_scores(tmp_path / "clip" / "scores.jsonl")
    assert list(loaded.videos) == ["clip"]
    assert loaded.num_classes == 3
    video = loaded.videos["clip"]
    assert (video.scores == scores).all()
    assert video.frames.tolist() == [0, 2, 3, 9]
    assert video.times.tolist() == [0.0, 0.2, 0.3, 0.9]


def test_a_folder_holds_one_video_per_file(tmp_path):
    write_jsonl(tmp_path / "a" / "scores.jsonl", np.zeros((2, 3)))
    write_jsonl(tmp_path / "deep" / "b" / "scores.jsonl", np.ones((2, 5)))
    write_jsonl(tmp_path / "c.jsonl", np.ones((2, 1)))
    assert {name: v.scores.shape for name, v in read_scores(tmp_path).videos.items()} == {
        "a": (2, 3),
        "b": (2, 5),
        "c": (2, 1),
    }
    # A stream that is still running writes under a hidden name.
    write_jsonl(tmp_path / "d" / ".scores.partial-1.jsonl", np.ones((2, 1)))
    assert len(read_scores(tmp_path).videos) == 3
    write_jsonl(tmp_path / "other" / "a" / "scores.jsonl", np.zeros((2, 3)))
    with pytest.raises(UserError, match="a second file for the video 'a'"):
        read_scores(tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays(tmp_path, suffix):
    path = tmp_path / f"scores{suffix}"
    arrays = {"one": np.arange(6.0).reshape(2, 3), "two": np.ones((2, 1), dtype=np.float32)}
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    videos = read_scores(path).videos
    assert set(videos) == set(arrays)
    assert all((videos[name].scores == array).all() for name, array in arrays.items())
    assert videos["one"].frames.tolist() == [0, 1, 2]
    probabilities = read_scores(path, softmax=True).videos["one"].scores
    assert probabilities.sum(axis=0) == pytest.approx(np.ones(3))
    assert probabilities[1] / probabilities[0] == pytest.approx(np.exp(3.0 * np.ones(3)))


def test_bfloat16_safetensors(tmp_path):
    save_file({"one": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "s.safetensors")
    assert read_scores(tmp_path / "s.safetensors").videos["one"].scores.dtype == np.float32


def _record(**changes):
    return json.dumps({"index": 1, "time": 0.1, "scores": [0.0, 1.0]} | changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        (_record(scores=[]), "line 2: expected a list of numbers under 'scores'"),
        (_record(scores=["a", "b"]), "line 2: expected a list of numbers under 'scores'"),
        (_record(scores=[1.0]), "line 2: expected 2 scores as in the lines before, got 1"),
        (_record(index=None), "line 2: expected a frame number under 'index', got None"),
        (_record(index=True), "line 2: expected a frame number under 'index', got True"),
        (_record(index=0), "line 2: expected a frame number above 0, got 0"),
        (_record(time="now"), "line 2: expected seconds under 'time', got 'now'"),
        (_record(scores=[float("nan"), 0.0]), "scores hold NaN or infinity"),
    ],
)
def test_faults_in_a_jsonl_file_are_named_by_line(tmp_path, line, message):
    path = tmp_path / "clip.jsonl"
    path.write_text(_record(index=0) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_scores(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_frames_without_time_have_no_times(tmp_path):
    path = tmp_path / "clip.jsonl"
    path.write_text(_record(index=0, time=None) + "\n\n" + _record() + "\n")
    assert read_scores(path).videos["clip"].times is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "no such file"),
        ("empty.jsonl", b"", "no frame in this file"),
        ("binary.jsonl", b"\xff\xfe\x00", "cannot be read as text"),
        ("broken.npz", b"nonsense", "cannot be read"),
        ("broken.safetensors", b"nonsense", "is not a readable safetensors file: it is cut off"),
        ("scores.txt", b"1 2 3", "expected .jsonl, .npz, .safetensors or a folder"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_scores(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no video in this file"),
        ({"a": np.zeros(3)}, r"video 'a': expected scores of shape \[K, T\].*got \[3\]"),
        ({"a": np.float64(3)}, r"video 'a': expected scores of shape \[K, T\].*got \[\]"),
        ({"a": np.zeros((2, 0))}, r"video 'a': expected scores of shape \[K, T\]"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((3, 2))}, "video 'b': expected 2 classes as in the others, got 3"),
        ({"a": np.full((2, 2), "x")}, "video 'a': expected real numbers"),
        ({"a": np.full((2, 2), np.inf)}, "video 'a': scores hold NaN or infinity"),
        ({"a": np.array([{}])}, "cannot be read"),
    ],
)
def test_unusable_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_scores(tmp_path / "s.npz")


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"no \.jsonl file"):
        read_scores(tmp_path)


def test_models_must_be_run_on_the_same_videos(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), y=np.zeros((2, 3)))
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 3)))
    np.savez(tmp_path / "c.npz", x=np.zeros((3, 3)), y=np.zeros((3, 3)))
    a, b, c = (read_scores(tmp_path / f"{n}.npz") for n in "abc")
    check_same_videos(a, a)
    with pytest.raises(UserError, match=r"b\.npz: no scores for 'y', which .*a\.npz has"):
        check_same_videos(a, b)
    with pytest.raises(UserError, match=r"b\.npz: no scores for 'y', which .*a\.npz has"):
        check_same_videos(b, a)
    with pytest.raises(UserError, match=r"c\.npz: expected 2 classes.*got 3"):
        check_same_videos(a, c)


def test_video_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("\ufefflabel, video\n1, a\n wave ,b\n")
    assert read_video_labels(path, 3, ["jump", "run", "wave"]) == {"a": 1, "b": 2}
    np.savez(tmp_path / "s.npz", b=np.zeros((3, 1)), a=np.zeros((3, 1)))
    scores = read_scores(tmp_path / "s.npz")
    assert labels_for(scores, {"a": 1, "b": 2, "c": 0}).tolist() == [2, 1]
    with pytest.raises(UserError, match="no label for 'b'"):
        labels_for(scores, {"a": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header line with video,label, got nothing"),
        ("a,1\n", "expected a header line with video,label, got a,1"),
        ("video,label\na\n", "line 2: expected 2 columns"),
        ("video,label\na,1\na,1\n", "line 3: a second label for the video 'a'"),
        ("video,label\na,3\n", "line 2: expected a class index from 0 to 2, got 3"),
        ("video,label\na,-1\n", "line 2: expected a class index, got '-1'"),
        ("video,label\na,run\n", "line 2: expected a class index, got 'run'"),
    ],
)
def test_faults_in_a_label_file_are_named_by_line(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_video_labels(path, 3)


def test_class_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("jump\n\nrun \n")
    assert read_class_names(path, 2) == ["jump", "run"]
    with pytest.raises(UserError, match="expected 3 class names, one per score, got 2"):
        read_class_names(path, 3)
    path.write_text("jump\njump\n")
    with pytest.raises(UserError, match="'jump' stands there more than once"):
        read_class_names(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="no class name"):
        read_class_names(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_class_names(tmp_path / "missing")


def _video(frames, times=None, num_classes=3):
    return VideoScores(np.zeros((num_classes, len(frames))), np.asarray(frames), times)


def test_dense_labels_in_frames(tmp_path):
    path = tmp_path / "dense.csv"
    path.write_text("video,class,start,end\na,0,0,2\na,0,1,3\na,2,3,9\nb,,,\n")
    labels = DenseLabels(path, 3)
    assert labels.videos == ["a", "b"]
    assert labels.for_video("a", _video(range(5))).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1],
    ]
    assert labels.for_video("a", _video([0, 3, 8, 9])).astype(int)[2].tolist() == [0, 1, 1, 0]
    assert not labels.for_video("b", _video(range(5))).any()


def test_dense_labels_in_seconds(tmp_path):
    path = tmp_path / "dense.csv"
    path.write_text("video,class,start_s,end_s\na,1,0.5,1.5\n")
    video = _video(range(4), times=np.array([0.0, 0.5, 1.0, 1.5]))
    assert DenseLabels(path, 3).for_video("a", video)[1].tolist() == [False, True, True, False]
    # A given frame rate overrides the time stamps.
    assert DenseLabels(path, 3, fps=1.0).for_video("a", video)[1].tolist() == [False, True, False, False]
    with pytest.raises(UserError, match="the scores of 'a' have no times: give --fps"):
        DenseLabels(path, 3).for_video("a", _video(range(4)))


class Payload:
    """What an array file from elsewhere could hold: unpickling it runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_scores_runs_no_code(tmp_path):
    held = np.empty((2, 3), dtype=object)
    held[0, 0] = Payload(tmp_path / "ran")
    np.savez(tmp_path / "s.npz", v=held)
    with pytest.raises(UserError, match=r"s\.npz: cannot be read"):
        read_scores(tmp_path / "s.npz")
    assert not (tmp_path / "ran").exists()


def test_dense_labels_as_arrays(tmp_path):
    path = tmp_path / "dense.npz"
    np.savez(path, a=np.eye(3, 5), wrong=np.full((3, 5), 2), small=np.zeros((3, 2)))
    labels = DenseLabels(path, 3)
    assert labels.for_video("a", _video([0, 2, 4])).astype(int).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(UserError, match="video 'wrong': expected only 0 and 1"):
        labels.for_video("wrong", _video([0]))
    with pytest.raises(UserError, match=r"video 'small': expected shape \[3, 5 or more\], got \[3, 2\]"):
        labels.for_video("small", _video([4]))
    assert labels.for_video("small", _video([0, 1])).shape == (3, 2)
    with pytest.raises(UserError, match=r"expected shape \[3, 3 or more\], got \[3, 2\]"):
        labels.for_video("small", _video([0, 2]))  # one frame too few


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,class\n", "video,class,start,end or video,class,start_s,end_s"),
        ("video,class,start,end\na,0,2,2\n", "line 2: expected the start before the end, got 2 and 2"),
        ("video,class,start,end\na,0,1.5,2\n", "line 2: expected a frame number, got '1.5'"),
        ("video,class,start,end\na,0,-1,2\n", "line 2: expected a frame number, got '-1'"),
        ("video,class,start_s,end_s\na,0,x,2\n", "line 2: expected seconds, got 'x'"),
        ("video,class,start_s,end_s\na,0,0,inf\n", "line 2: expected seconds, got 'inf'"),
        ("video,class,start,end\na,5,0,2\n", "line 2: expected a class index from 0 to 2, got 5"),
    ],
)
def test_faults_in_dense_labels(tmp_path, text, message):
    path = tmp_path / "dense.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        DenseLabels(path, 3)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_state_dicts(tmp_path, wrapper):
    state = {"b.weight_hh": torch.eye(2), "a.weight_hh": torch.eye(3)}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    assert list(read_state_dict(tmp_path / "w.pth")) == ["b.weight_hh", "a.weight_hh"]


def test_safetensors_weights_come_in_network_order(tmp_path):
    names = ["stem.weight_hh", "layer2.weight_hh", "layer10.weight_hh"]
    save_file({name: torch.eye(2) for name in names}, tmp_path / "w.safetensors")
    assert list(read_state_dict(tmp_path / "w.safetensors")) == names


class _Custom:
    pass


def test_unusable_weights(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / "missing.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(UserError, match=r"is not a readable (safetensors file|file of weights): ") as error:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth holds no state dict"):
        read_state_dict(tmp_path / "list.pth")
    # A pickled object could run code on loading: it is not loaded.
    torch.save(_Custom(), tmp_path / "object.pth")
    with pytest.raises(UserError, match=r"object\.pth is not a readable .*: it holds other objects than tensors"):
        read_state_dict(tmp_path / "object.pth")


def test_long_lists_of_names_are_cut():
    assert list_names(["a", "b"]) == "'a', 'b'"
    assert list_names([f"v{i}" for i in range(8)], at_most=2) == "'v0', 'v1' and 6 more"
