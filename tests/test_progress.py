from __future__ import annotations

import io
import re

import pytest

from rcu_ops.progress import Progress, format_duration, track


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("RCU_OPS_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def run(stream, count, seconds, total=None, **options):
    clock = Clock()
    with Progress(total, "clip.mp4", "frames", stream=stream, clock=clock, **options) as bar:
        for _ in range(count):
            clock.now += seconds
            bar.update()
    return stream.getvalue()


def test_durations():
    assert [format_duration(s) for s in (0, 7.4, 59.6, 750, 11109)] == ["0:00", "0:07", "1:00", "12:30", "3:05:09"]


def test_a_terminal_gets_one_line_redrawn_in_place():
    text = run(Terminal(), 50, 0.2, total=50)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    drawn = text.rstrip().split("\r\x1b[K")
    assert all(len(line) < 100 for line in drawn)
    assert re.search(r"clip\.mp4   50 %  █{10}─{10}  25/50 frames  5\.0 frames/s  0:05  0:05 left", text)
    assert "100 %" in drawn[-1]
    assert "left" not in drawn[-1]


def test_a_terminal_is_not_redrawn_more_often_than_the_eye_sees():
    assert run(Terminal(), 1000, 0.001, total=1000).count("\r") <= 12


def test_a_line_is_cut_to_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = run(Terminal(), 5, 0.2, total=5)
    assert all(len(line) <= 29 for line in text.rstrip().split("\r\x1b[K"))


def test_a_log_gets_a_few_plain_lines():
    text = run(io.StringIO(), 3600, 1.0, total=3600)
    lines = text.splitlines()
    assert 5 < len(lines) < 80
    assert "\r" not in text
    assert "\x1b" not in text
    assert lines[0].startswith("clip.mp4    0 %  2/3600 frames  1.0 frames/s  0:02  59:58 left")
    assert "3600/3600" in lines[-1]
    assert sum("3600/3600" in line for line in lines) == 1


def test_one_slow_unit_does_not_speak_for_the_others():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, "clip.mp4", "frames", stream=stream, clock=clock) as bar:
        for seconds in [0.01] * 31 + [9.69]:  # a network of clips works when the clip is whole
            clock.now += seconds
            bar.update()
        assert bar.rate == pytest.approx(3.2)
        clock.now += 0.01
        bar.update()
        clock.now += 4.99
        bar.update()
        assert bar.rate == pytest.approx(2 / 5)  # over the last seconds again
    assert "32/100 frames  3.2 frames/s  0:10" in stream.getvalue()


def test_short_work_leaves_a_log_alone():
    assert run(io.StringIO(), 10, 0.1, total=10) == ""


def test_an_unknown_total_has_no_bar_and_no_remaining_time():
    text = run(Terminal(), 10, 0.5)
    assert "%" not in text
    assert "left" not in text
    assert "10 frames  2.0 frames/s  0:05" in text


def test_silence_by_environment(monkeypatch):
    monkeypatch.setenv("RCU_OPS_PROGRESS", "0")
    assert run(Terminal(), 50, 1.0, total=50) == ""


def test_the_rate_is_recent_and_the_last_line_is_the_average():
    clock, stream = Clock(), Terminal()
    with Progress(None, unit="frames", stream=stream, clock=clock) as bar:
        for _ in range(100):
            clock.now += 0.1
            bar.update()
        for _ in range(20):
            clock.now += 1.0
            bar.update()
        assert bar.rate == pytest.approx(1.0, rel=0.2)
    assert "120 frames  4.0 frames/s  0:30" in stream.getvalue().splitlines()[-1]


def test_writing_a_line_does_not_smear_the_bar(capsys):
    clock, stream = Clock(), Terminal()
    with Progress(10, stream=stream, clock=clock) as bar:
        bar.update(note="a note")
        before = stream.getvalue()
        bar.write("a result")
        after = stream.getvalue()[len(before) :]
    assert capsys.readouterr().out == "a result\n"
    assert after.startswith("\r\x1b[K")
    assert "a note" in after


def test_plain_letters_where_blocks_cannot_be_written():
    stream = Terminal()
    stream.encoding = "ascii"
    text = run(stream, 4, 0.2, total=8)
    text.encode("ascii")
    assert "[##########..........]" in text


def test_track(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    assert list(track(iter(range(5)), unit="clips")) == list(range(5))
    assert "5 clips" in stream.getvalue()
    assert list(track([1, 2], unit="clips")) == [1, 2]
    assert "2/2 clips" in stream.getvalue()
