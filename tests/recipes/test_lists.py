from __future__ import annotations

import numpy as np
import pytest

from rcu_ops.cli_errors import UserError
from rcu_ops.recipes.lists import read_list

NAMES = ("jump", "run", "swim")


def _write(folder, text):
    path = folder / "list.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_by_index_and_name_with_and_without_header(tmp_path):
    plain = read_list(_write(tmp_path, "a.mp4,0\nsub/b.mp4, swim \n\n"), 3, NAMES)
    assert [(video.name, video.label) for video in plain.videos] == [("a.mp4", 0), ("sub/b.mp4", 2)]
    assert plain.videos[1].path == tmp_path / "sub" / "b.mp4"
    titled = read_list(_write(tmp_path, "\ufefflabel,length,path\n0,3.5,a.mp4\n2,1.0,sub/b.mp4\n"), 3)
    assert titled.videos == plain.videos
    assert titled.digest == plain.digest


def test_absolute_paths_stay(tmp_path):
    assert read_list(_write(tmp_path, "/data/a.mp4,1\n"), 2).videos[0].path.as_posix() == "/data/a.mp4"


def test_quoted_paths_may_hold_commas(tmp_path):
    assert read_list(_write(tmp_path, '"a, b.mp4",1\n'), 2).videos[0].name == "a, b.mp4"
    spaced = read_list(_write(tmp_path, 'label, path\n1, "a, b.mp4"\n'), 2).videos[0]
    assert (spaced.name, spaced.label) == ("a, b.mp4", 1)


def test_a_name_that_is_a_number_is_a_name(tmp_path):
    assert read_list(_write(tmp_path, "a.mp4,1\n"), 2, ("1", "0")).videos[0].label == 0


def test_dense_labels_at_their_times(tmp_path):
    text = "path,start,end,label\na.mp4,0.5,1.5,run\nb.mp4,,,\na.mp4,1,2,0\na.mp4,3,4,run\n"
    first, second = read_list(_write(tmp_path, text), 3, NAMES, dense=True).videos
    assert first.intervals == ((1, 0.5, 1.5), (0, 1.0, 2.0), (1, 3.0, 4.0))
    times = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.5])
    expected = [[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(first.present(times, 3), np.array(expected, dtype=bool))
    assert second.intervals == ()
    assert not second.present(times, 3).any()


def test_digest_follows_the_content(tmp_path):
    digest = read_list(_write(tmp_path, "a.mp4,0\nb.mp4,1\n"), 2).digest
    assert read_list(_write(tmp_path, "b.mp4,1\na.mp4,0\n"), 2).digest != digest
    assert read_list(_write(tmp_path, "a.mp4,0\nb.mp4,0\n"), 2).digest != digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no video in this list"),
        ("path,label\n", "no video in this list"),
        ("path,class\na.mp4,0\n", "expected the columns path,label, got path,class"),
        ("path,start,end,label\na.mp4,0,1,0\n", "has dense labels"),
        ("a.mp4,0\nb.mp4\n", r"line 2: expected 2 columns \(path,label\), got 1"),
        ("a.mp4,0\nb.mp4,1,x\n", r"line 2: expected 2 columns \(path,label\), got 3"),
        ("a.mp4,0\n\nb.mp4,3\n", "line 3: expected a class index from 0 to 2 or a name of the labels file, got '3'"),
        ("a.mp4,-1\n", "line 1: expected a class index from 0 to 2"),
        ("a.mp4,fly\n", "line 1: .* got 'fly'"),
        ("a.mp4,\n", "line 1: .* got ''"),
        ("path,label\n,0\n", "line 2: the path is empty"),
        ("a.mp4,0\nb.mp4,0\na.mp4,1\n", "line 3: 'a.mp4' is listed already, in line 1"),
    ],
)
def test_faults_of_lists(tmp_path, text, message):
    with pytest.raises(UserError, match=f"list.csv.*{message}"):
        read_list(_write(tmp_path, text), 3, NAMES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,x,2,0", "line 2: expected seconds from 0, got 'x'"),
        ("a.mp4,-1,2,0", "line 2: expected seconds from 0, got '-1'"),
        ("a.mp4,nan,2,0", "line 2: expected seconds from 0, got 'nan'"),
        ("a.mp4,0,inf,0", "line 2: expected seconds from 0, got 'inf'"),
        ("a.mp4,2,2,0", "line 2: expected the start before the end, got 2 and 2"),
        ("a.mp4,0,1,", "line 2: expected a class index from 0 to 2, got ''"),
        ("a.mp4,1,,", "line 2: expected seconds from 0, got ''"),
        ("a.mp4,,1,", "line 2: expected seconds from 0, got ''"),
        ("a.mp4,,,1", "line 2: expected seconds from 0, got ''"),
        ("a.mp4,0", r"line 2: expected 4 columns \(path,start,end,label\), got 2"),
    ],
)
def test_faults_of_dense_lists(tmp_path, row, message):
    with pytest.raises(UserError, match=f"list.csv.*{message}"):
        read_list(_write(tmp_path, f"path,start,end,label\n{row}\n"), 3, dense=True)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"missing.csv: cannot be read: No such file"):
        read_list(tmp_path / "missing.csv", 3)
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00a,0\n")
    with pytest.raises(UserError, match=r"list.csv: cannot be read as CSV"):
        read_list(tmp_path / "list.csv", 3)
