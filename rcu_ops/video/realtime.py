"""Frames at the pace of the clock: the newest one is there to take, those nobody took in time are dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

from rcu_ops.video.decode import Frame

__all__ = ["RealtimeFrames"]


class RealtimeFrames(Iterator[Frame]):
    """Reads ``frames`` in a thread of its own and hands out only the newest that is due.

    The slot holds one frame. A frame that becomes due while the previous one still waits replaces it, and the previous
    one counts as dropped. The last frame is always handed out, and an error of the source is raised after it.

    Args:
        frames: what to read, in the order of their time stamps.
        paced: True waits until a frame's time stamp before offering it (a file); False offers it as soon as it is
            read (a live source has its own pace).

    Attributes:
        dropped: frames replaced before anybody took them.
        due: ``time.perf_counter()`` at which the frame handed out last was due.
    """

    def __init__(self, frames: Iterable[Frame], *, paced: bool) -> None:
        self.dropped = 0
        self.due = 0.0
        self._frames = frames
        self._paced = paced
        self._slot: tuple[Frame, float] | None = None
        self._error: BaseException | None = None
        self._ended = False
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="rcu-ops-reader", daemon=True)
        self._started = False

    def __enter__(self) -> RealtimeFrames:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> RealtimeFrames:
        return self

    def __next__(self) -> Frame:
        if not self._started:
            self._started = True
            self._thread.start()
        with self._change:
            while self._slot is None and not self._ended:
                # A bound on the wait lets an interrupt from the keyboard through on every platform.
                self._change.wait(0.5)
            if self._slot is not None:
                (frame, self.due), self._slot = self._slot, None
                return frame
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self, timeout: float | None = None) -> bool:
        """Stop reading and wait for the thread; False when it is still in a read after ``timeout`` seconds."""
        self._stop.set()
        if self._started:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def _read(self) -> None:
        start: float | None = None
        try:
            for frame in self._frames:
                now = time.perf_counter()
                if start is None:
                    start = now - frame.time_seconds
                due = start + frame.time_seconds if self._paced else now
                if (self._paced and self._stop.wait(max(0.0, due - now))) or self._stop.is_set():
                    return
                with self._change:
                    self.dropped += self._slot is not None
                    self._slot = (frame, due)
                    self._change.notify()
        except BaseException as error:
            self._error = error
        finally:
            with self._change:
                self._ended = True
                self._change.notify()
