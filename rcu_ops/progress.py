"""A small progress bar on stderr, used by every command that can take more than two seconds.

On a terminal it is one line, redrawn in place. Elsewhere (a log file, a pipe) it is a plain line now and then: the
first after two seconds, the gaps growing from there, so that a long run does not fill the log. With
``RCU_OPS_PROGRESS=0`` in the environment nothing is written.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TextIO, TypeVar

__all__ = ["Progress", "format_duration", "track"]

Item = TypeVar("Item")

_BLOCKS = " ▏▎▍▌▋▊▉█"
_REDRAW_SECONDS = 0.1
_FIRST_LINE_SECONDS = 2.0
_LONGEST_GAP_SECONDS = 60.0
_RATE_WINDOW_SECONDS = 5.0


def format_duration(seconds: float) -> str:
    """``seconds`` as a clock reads it: ``0:07``, ``12:30``, ``3:05:09``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """Counts units of work and shows how far it is, how fast it goes and how long it will take.

    Args:
        total: units in all; None when unknown (no bar and no remaining time then).
        label: what is being done, put first on the line.
        unit: what is counted, in the plural ("frames").
        stream: where to write; ``sys.stderr`` unless told.
        clock: a monotonic clock in seconds, replaced in tests.

    Example::

        with Progress(total=300, label="clip.mp4", unit="frames") as bar:
            for frame in frames:
                ...
                bar.update(note="juggling 0.41")
    """

    def __init__(
        self,
        total: int | None = None,
        label: str = "",
        unit: str = "steps",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total if total is None or total > 0 else None
        self.label = label
        self.unit = unit
        self.count = 0
        self._note = ""
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._enabled = os.environ.get("RCU_OPS_PROGRESS", "1") != "0"
        self._live = self._enabled and _is_terminal(self._stream)
        self._unicode = _can_encode(self._stream, _BLOCKS + "─")
        self._start = clock()
        self._next = self._start + (0.0 if self._live else _FIRST_LINE_SECONDS)
        self._shown_count: int | None = None
        self._recent: deque[tuple[float, int]] = deque([(self._start, 0)])

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was made."""
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units per second over the last few seconds; 0.0 before the first unit.

        Where one update took longer than that, as the last frame of a clip does, it says nothing about the others,
        and the average since the start is given.
        """
        (then, before), now = self._recent[0], self._clock()
        if len(self._recent) == 2 and now - then > _RATE_WINDOW_SECONDS:
            then, before = self._start, 0
        return (self.count - before) / (now - then) if now > then else 0.0

    def update(self, steps: int = 1, note: str | None = None) -> None:
        """Count ``steps`` more units; ``note`` is shown at the end of the line from now on."""
        self.count += steps
        if note is not None:
            self._note = note
        now = self._clock()
        self._recent.append((now, self.count))
        while len(self._recent) > 2 and now - self._recent[0][0] > _RATE_WINDOW_SECONDS:
            self._recent.popleft()
        if self._enabled and now >= self._next:
            self._show(now)

    def write(self, line: str, stream: TextIO | None = None) -> None:
        """Print ``line`` (to stdout unless told otherwise) without smearing the bar over it."""
        if self._live and self._shown_count is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        print(line, file=sys.stdout if stream is None else stream, flush=True)
        if self._live and self._shown_count is not None:
            self._show(self._clock())

    def close(self) -> None:
        """Show the final count; the bar writes nothing afterwards."""
        if self._enabled and (self._live or (self._shown_count is not None and self._shown_count != self.count)):
            # The whole run's average is what the last line should say, not the last few seconds'.
            self._recent = deque([(self._start, 0)])
            self._show(self._clock())
            if self._live:
                self._stream.write("\n")
                self._stream.flush()
        self._enabled = self._live = False

    def _show(self, now: float) -> None:
        if self._live:
            width = max(20, shutil.get_terminal_size().columns - 1)
            self._stream.write("\r\x1b[K" + self._line(width))
            self._next = now + _REDRAW_SECONDS
        else:
            self._stream.write(self._line(None) + "\n")
            self._next = now + min(max(_FIRST_LINE_SECONDS, (now - self._start) / 2), _LONGEST_GAP_SECONDS)
        self._stream.flush()
        self._shown_count = self.count

    def _line(self, width: int | None) -> str:
        seconds = self.elapsed
        parts = [self.label] if self.label else []
        if self.total is None:
            parts.append(f"{self.count} {self.unit}")
        else:
            parts.append(f"{100 * min(1.0, self.count / self.total):3.0f} %")
            if width is not None:
                parts.append(self._bar(min(1.0, self.count / self.total)))
            parts.append(f"{self.count}/{self.total} {self.unit}")
        rate = self.rate
        if rate > 0:
            parts.append(f"{rate:.1f} {self.unit}/s" if rate < 1000 else f"{rate:.0f} {self.unit}/s")
        parts.append(format_duration(seconds))
        if self.total is not None and 0 < self.count < self.total and seconds > 0:
            parts.append(f"{format_duration((self.total - self.count) * seconds / self.count)} left")
        if self._note:
            parts.append(self._note)
        line = "  ".join(parts)
        return line if width is None or len(line) <= width else line[: width - 1] + ("…" if self._unicode else ".")

    def _bar(self, fraction: float, cells: int = 20) -> str:
        if not self._unicode:
            return "[" + ("#" * int(fraction * cells)).ljust(cells, ".") + "]"
        eighths = int(fraction * cells * 8)
        full, part = divmod(eighths, 8)
        return ("█" * full + (_BLOCKS[part] if part else "")).ljust(cells, "─")


def track(items: Iterable[Item], total: int | None = None, label: str = "", unit: str = "steps") -> Iterator[Item]:
    """Yield from ``items`` with a progress bar; ``total`` defaults to ``len(items)`` where there is one."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(total, label, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
