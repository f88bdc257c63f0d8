"""``rcu-ops stream``: run a causal video network over a file, a webcam or a network stream, frame by frame."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rcu_ops.cli_errors import UserError
from rcu_ops.model_arguments import load_model_weights, make_model, one_line, parse_model_options
from rcu_ops.ops._registry import BackendError
from rcu_ops.progress import Progress
from rcu_ops.report import replacing, write_json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from rcu_ops.video import Frame, VideoReader

__all__ = ["add_parser", "run"]

UNTRAINED = "untrained network"
RECURRENCE_UNTRAINED = "recurrent weights untrained"
OUTPUT_NAMES = ("scores.jsonl", "annotated.mp4", "timeline.png", "summary.json")

EXIT_INTERRUPTED = 130
EXIT_BROKEN = 3
EXIT_NOT_FINITE = 1

_MODEL = "rcn_resnet18"
_WARM_UP_FRAMES = 2
_LATENCIES_KEPT = 1 << 20  # of the last frames: days of webcam must not fill the memory
_TABLE_SECONDS = 1.0

_DESCRIPTION = """\
Run a causal video network frame by frame over SOURCE: a file, a webcam (webcam:0, /dev/video0) or a stream's address
(rtsp://..., http://...). Without SOURCE a short sample clip is made and streamed. Without --weights the network is
untrained, and every output says so; its recurrent layers then average instead of adding up, which would grow for ever.
Weights of `rcu-ops train` bring their network, its options and the class names along.

Networks of clips (faster16, faster32) run a clip when its last frame has come, expensive and cheap ones by turns; their
score of the video so far is the prediction after the last whole clip, and the frames before the first have none. What
has been computed so far is shown with it.

The score of the video so far is the softmax of the mean of all per-frame scores up to that moment. A frame's short side
is scaled to --size and its centre is cropped.

Exit codes: 0 done; 1 the scores overflowed; 2 bad arguments or a source that cannot be read; 3 the source broke
half-way (all results up to there are kept); 130 interrupted (results are kept).
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``stream``."""
    parser = subparsers.add_parser(
        "stream",
        help="run a causal network over a video, frame by frame",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="file, webcam:0, or address of a stream")
    parser.add_argument("--model", help=f"a causal model (default: that of --weights, else {_MODEL})")
    parser.add_argument("--weights", metavar="FILE", help="file or URL of trained weights")
    parser.add_argument("--weights-sha256", metavar="HEX", help="digest that the file of --weights must have")
    parser.add_argument("--labels", metavar="FILE", help="text file with one class name per line; sets the class count")
    parser.add_argument("--out", metavar="DIR", help=f"write {', '.join(OUTPUT_NAMES)} here")
    parser.add_argument("--overwrite", action="store_true", help="replace results of an earlier run in --out")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--size", type=int, help="side of the network's input (default: 112; faster16, faster32: 224)")
    parser.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the network, such as pattern=3; may repeat",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="run a network that is not causal on the last N frames, anew for every one",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take one frame in N (default: all)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N frames given to the network")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="keep up with the clock: drop frames rather than lag, and say how many (a file plays at its own speed)",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes shown (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Stream ``args.source``.

    Returns:
        0 done; 3 the source broke half-way; 1 the scores stopped being finite; 130 interrupted.

    Raises:
        UserError: bad arguments, a source that cannot be read, weights that do not fit.
    """
    for name, least in (("size", 8), ("window", 1), ("every", 1), ("max_frames", 1), ("top", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if args.weights_sha256 is not None and args.weights is None:
        raise UserError("--weights-sha256: there are no --weights to check")
    out = _check_out(args.out, args.overwrite)
    labels = None if args.labels is None else _read_labels(Path(args.labels))

    from rcu_ops.video import BrokenVideoError, VideoError, open_video
    from rcu_ops.video.draw import require_matplotlib

    with ExitStack() as stack:
        try:
            if out is not None:
                require_matplotlib()
            source = args.source
            if source is None:
                source = _make_sample(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcu-ops-"))))
            reader = stack.enter_context(open_video(source, every=args.every))
        except VideoError as error:
            raise UserError(str(error)) from error
        network = _Network(args, labels)
        title = (
            "sample clip" if args.source is None else (reader.name if "://" in reader.name else Path(reader.name).name)
        )
        print(f"{title}: {_describe_video(reader)}")
        print(network.describe(), flush=True)
        network.warm_up()
        interrupt = stack.enter_context(_DeferredInterrupt())
        session = _Session(args, network, reader, title, out, interrupt)
        try:
            session.stream()
            status, code, problem = "complete", 0, ""
        except BrokenVideoError as error:
            status, code = "broken", EXIT_BROKEN
            problem = f"{error}; {session.kept()}"
        except _NotFiniteError as error:
            status, code = "not finite", EXIT_NOT_FINITE
            problem = f"{error}; {session.kept()}"
        except KeyboardInterrupt:
            status, code = "interrupted", EXIT_INTERRUPTED
            problem = f"interrupted; {session.kept()}"
        except BaseException as error:
            session.discard(error)
            raise _as_user_error(error, out) from error
        try:
            with interrupt.deferred():
                session.finish(status, problem)
        except (VideoError, OSError) as error:
            raise _as_user_error(error, out) from error
        if problem:
            print(f"rcu-ops: {'' if status == 'interrupted' else 'error: '}{problem}", file=sys.stderr)
        return code


class _NotFiniteError(Exception):
    """The network's scores hold an infinity or NaN."""


class _DeferredInterrupt:
    """Ctrl-C between frames, never within one, so that all outputs hold the same frames; a second one is immediate."""

    def __init__(self) -> None:
        self._busy = self._pending = False
        self._previous: Any = None

    def __enter__(self) -> _DeferredInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold an interrupt back until the block has ended."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, *_: object) -> None:
        if self._busy and not self._pending:
            self._pending = True
        else:
            raise KeyboardInterrupt


class _Network:
    """The model of the command line as a function from one picture to its scores, with its state."""

    def __init__(self, args: argparse.Namespace, labels: list[str] | None) -> None:
        import torch

        import rcu_ops
        from rcu_ops.cost_patterns import clip_costs
        from rcu_ops.models import Faster
        from rcu_ops.recipes.checkpoint import stored_options, stored_settings
        from rcu_ops.recipes.distributed import pick_device
        from rcu_ops.video.transform import FrameTransform

        # Weights that say what they were trained as: which update a recurrence has does not show in their shapes.
        stored = stored_settings(args.weights, args.weights_sha256)
        self.name: str = args.model or (_MODEL if stored is None else stored.recipe.model)
        classes = 400
        if stored is not None and stored.recipe.model == self.name:
            classes = stored.recipe.classes
            labels = list(stored.names) if labels is None and stored.names is not None else labels
        self.dtype_name: str = args.dtype
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
        self.device = pick_device(args.device)
        classes = classes if labels is None else len(labels)
        self.labels = [f"class {index}" for index in range(classes)] if labels is None else labels
        self.weights = "untrained" if args.weights is None else str(args.weights)
        self.weights_sha256: str | None = "untrained"
        self.warning = UNTRAINED
        given = parse_model_options(args.model_option, classes="is set by --labels")
        options = {**stored_options(stored, self.name), **given}
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # an untrained network should at least say the same twice
            model = make_model(self.name, num_classes=classes, **options)
        if args.weights is None:
            bound_growth(model)
        else:
            report = load_model_weights(
                model, args.weights, args.weights_sha256, hint="--labels sets it, one line for each class"
            )
            whole = args.weights_sha256 if len(args.weights_sha256 or "") == 64 else None
            self.weights_sha256 = _sha256(args.weights) if os.path.isfile(args.weights) else whole
            # An image network's weights say nothing about the recurrent ones.
            self.warning = RECURRENCE_UNTRAINED if any("weight_hh" in name for name in report.kept) else ""
        try:
            model = rcu_ops.fuse_for_inference(model.eval().to(self.device)).to(self.dtype)
            self._clips = model if isinstance(model, Faster) else None
            if self._clips is not None and args.window is not None:
                raise UserError(f"--window: {self.name} takes clips of its own length")
            self.window: int | None = args.window
            self._streamer = None if self._clips is not None else rcu_ops.Streamer(model, window=args.window)
            self.size = int(args.size or getattr(self._clips, "size", 112))
            self._costs = None
            if self._clips is not None:
                self._costs = clip_costs(self._clips, self._clips.clip_length, self.size)
        except ValueError as error:
            hint = "; --window N runs it on the last N frames" if "frame by frame" in str(error) else ""
            raise UserError(f"--model {self.name}: {one_line(str(error)).removeprefix('model: ')}{hint}") from error
        self.warm_up_seconds = 0.0
        self._transform = FrameTransform(self.size, dtype=self.dtype, device=self.device)
        self._state: Any = None
        self._latest: np.ndarray | None = None
        self.clips = 0

    @property
    def clip_length(self) -> int | None:
        """Frames of a clip, for networks of clips; None for networks of frames."""
        return None if self._clips is None else self._clips.clip_length

    @property
    def gmac(self) -> float | None:
        """What the clips so far cost, in 1e9 multiply-accumulates; None for networks of frames."""
        if self._costs is None or self._clips is None:
            return None
        pattern = -1 if self._clips.pattern[0] == 0 else self._clips.pattern[1]
        return self._costs.total(pattern, self.clips) if self.clips else 0.0

    def cost_so_far(self) -> dict[str, Any]:
        """``clips`` and ``gmac`` for networks of clips; nothing for networks of frames."""
        return {} if self.gmac is None else {"clips": self.clips, "gmac": round(self.gmac, 3)}

    def describe(self) -> str:
        """One line: what runs, in what, on what."""
        if self.weights == "untrained":
            state = f"{UNTRAINED}: its scores mean nothing"
        else:
            state = f"weights {self.weights}" + (f", {self.warning}" if self.warning else "")
        return (
            f"{self.name} ({state}), {len(self.labels)} classes, {self.size}x{self.size}, "
            + (f"window of {_counted(self.window, 'frame')}, " if self.window else "")
            + f"{self.dtype_name} on {_device_name(self.device)}"
        )

    def warm_up(self) -> None:
        """Run a few empty frames and forget them, so that start-up costs are not taken for latency."""
        import numpy as np

        if self._clips is not None:  # a clip is too much to run for nothing
            return
        start = time.perf_counter()
        try:
            for _ in range(_WARM_UP_FRAMES):
                self(np.zeros((self.size, self.size, 3), dtype=np.uint8))
        except BackendError:
            raise
        except ValueError as error:  # not a network of pictures, or not of this size
            raise UserError(f"--model {self.name}: {one_line(str(error))}") from error
        self._state = None
        self.warm_up_seconds = time.perf_counter() - start

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        """Scores [classes] (float64) of the next frame, given as uint8 RGB [H, W, 3].

        For networks of clips the prediction after the last whole clip; None before the first one.
        """
        import torch

        with torch.inference_mode():
            run = self._clips.stream if self._clips is not None else self._streamer
            assert run is not None
            scores, self._state = run(self._transform(image)[None], self._state)
            if scores.shape[2]:
                self.clips += 1
                self._latest = scores[0, :, -1].double().cpu().numpy()
            return self._latest

    @property
    def state_bytes(self) -> int:
        """Bytes of the state carried from frame to frame."""
        from rcu_ops.streaming import state_bytes

        return 0 if self._state is None else int(state_bytes(self._state))


@dataclass(frozen=True)
class _Result:
    """What one frame gave: scores, and the probabilities of the video so far and of the frame alone.

    ``instant`` and ``frame_leading`` are None for networks of clips, which say nothing of a frame alone.
    """

    frame: Frame
    scores: np.ndarray
    running: np.ndarray
    instant: np.ndarray | None
    leading: list[tuple[int, float]]
    frame_leading: tuple[int, float] | None


class _Session:
    """One run over one source: the loop, its measurements and its outputs."""

    def __init__(
        self,
        args: argparse.Namespace,
        network: _Network,
        reader: VideoReader,
        title: str,
        out: Path | None,
        interrupt: _DeferredInterrupt,
    ) -> None:
        self._args = args
        self._network = network
        self._reader = reader
        self._title = title
        self._interrupt = interrupt
        self._top = min(args.top, len(network.labels))
        self.frames = 0
        self.dropped = 0
        self._latencies = _Recent(_LATENCIES_KEPT)
        self._lags = _Recent(_LATENCIES_KEPT)
        self._seconds = 0.0
        self._total: np.ndarray | None = None
        self._last: _Result | None = None
        self._out = out
        self._files: _OutputFiles | None = None
        self._table = _Table(network) if out is None else None

    def stream(self) -> None:
        """Run until the source ends, breaks (raises) or ``--max-frames`` is reached."""
        if self._out is not None:
            self._files = _OutputFiles(self._out, self._network, self._reader, self._title, self._top)
        start = time.perf_counter()
        try:
            with ExitStack() as stack:
                bar = stack.enter_context(Progress(self._expected_frames(), label=self._title, unit="frames"))
                for frame in self._paced(stack):
                    with self._interrupt.deferred():
                        self._take(frame, bar)
                    if self.frames == self._args.max_frames:
                        break
        finally:
            self._seconds = time.perf_counter() - start
        if self.frames and self._last is None:
            raise UserError(
                f"{self._title}: {_counted(self.frames, 'frame')}, fewer than the {self._network.clip_length} of "
                f"one clip of {self._network.name}"
            )

    def _paced(self, stack: ExitStack) -> Iterator[Frame]:
        if not self._args.realtime:
            yield from self._reader
            return
        from rcu_ops.video.realtime import RealtimeFrames

        frames = stack.enter_context(RealtimeFrames(self._reader, paced=not self._reader.live))
        for frame in frames:
            self.dropped = frames.dropped
            yield frame
            self._lags.append(time.perf_counter() - frames.due)
        self.dropped = frames.dropped

    def _take(self, frame: Frame, bar: Progress) -> None:
        import numpy as np

        image = frame.image
        start = time.perf_counter()
        scores = self._network(image)
        self._latencies.append(time.perf_counter() - start)
        if scores is None:
            self.frames += 1
            progress = f"first clip: {self.frames} of {self._network.clip_length} frames"
            if self._files is not None:
                self._files.write_unscored(frame, image, progress)
            bar.update(note=progress)
            return
        if not np.isfinite(scores).all():
            raise _NotFiniteError(
                f"the scores of frame {frame.index} are not finite in {self._network.dtype_name}"
                + ("; try --dtype bf16 or fp32" if self._network.dtype_name == "fp16" else "")
            )
        self.frames += 1
        instant = frame_leading = None
        if self._network.clip_length is not None:  # the prediction is that of the video so far already
            running = _softmax(scores)
        else:
            self._total = scores if self._total is None else self._total + scores
            running, instant = _softmax(self._total / self.frames), _softmax(scores)
            best = int(np.argmax(instant))
            frame_leading = (best, float(instant[best]))
        leading = [(int(c), float(running[c])) for c in np.argsort(-running, kind="stable")[: self._top]]
        result = _Result(frame, scores, running, instant, leading, frame_leading)
        self._last = result
        if self._files is not None:
            self._files.write(result, image)
        if self._table is not None:
            self._table.show(result, bar)
        name, score = self._network.labels[leading[0][0]], leading[0][1]
        dropped = f"{self.dropped} dropped  " if self._args.realtime else ""
        gmac = self._network.gmac
        cost = "" if gmac is None else f"  {self._network.clips} clips, {gmac:.1f} GMAC"
        bar.update(note=f"{dropped}{name} {100 * score:.1f} %{cost}")

    def finish(self, status: str, problem: str) -> None:
        """Put all outputs in place and print the summary."""
        if self._last is None:
            self.discard(UserError("no frame"))
            return
        summary = self._summary(status, problem)
        if self._table is not None:
            self._table.end(self._last)
        if self._files is not None:
            self._files.finish(summary, self._last)
        for line in self._report(summary):
            print(line)
        sys.stdout.flush()

    def kept(self) -> str:
        """How many frames have results, for a message about why there are no more."""
        return f"the results of {_counted(self.frames, 'frame')} are kept"

    def discard(self, error: BaseException) -> None:
        """Throw all outputs away because of ``error``."""
        if self._files is not None:
            self._files.discard(error)

    def _expected_frames(self) -> int | None:
        limit, count = self._args.max_frames, self._reader.frame_count
        if self._args.realtime or count is None:
            # How many frames will be dropped is not known beforehand.
            return None if self._args.realtime else limit
        expected = math.ceil(count / self._args.every)
        return expected if limit is None else min(expected, limit)

    def _summary(self, status: str, problem: str) -> dict[str, Any]:
        assert self._last is not None
        network, reader = self._network, self._reader
        summary: dict[str, Any] = {
            "status": status,
            "problem": problem or None,
            "untrained": network.weights == "untrained",
            "warning": network.warning or None,
            "model": network.name,
            "weights": network.weights,
            "weights_sha256": network.weights_sha256,
            "classes": len(network.labels),
            "source": self._title if self._args.source is None else reader.name,
            "video": {
                "width": reader.width,
                "height": reader.height,
                "codec": reader.codec,
                "pixel_format": reader.pixel_format,
                "rotation": reader.rotation,
                "frame_rate": reader.frame_rate,
                "live": reader.live,
                "stream_index": reader.stream_index,
                "frames_read": reader.frames_read,
                "repaired_times": reader.repaired_times,
                "damaged_packets": reader.damaged_packets,
            },
            "size": network.size,
            "window": network.window,
            "every": self._args.every,
            "realtime": self._args.realtime,
            "dtype": network.dtype_name,
            "device": str(network.device),
            "device_name": _device_name(network.device),
            "frames": self.frames,
            "dropped_frames": self.dropped,
            "seconds": round(self._seconds, 3),
            "frames_per_second": round(self.frames / self._seconds, 2),
            "warm_up_seconds": round(network.warm_up_seconds, 3),
            "latency_ms": self._latencies.milliseconds(),
            "lag_ms": self._lags.milliseconds() if self._args.realtime else None,
            "state_bytes": network.state_bytes,
            **network.cost_so_far(),
            "top": [_class_entry(network.labels, c, score) for c, score in self._last.leading],
            "versions": _versions(),
        }
        return summary

    def _report(self, summary: dict[str, Any]) -> Iterator[str]:
        latency = summary["latency_ms"]
        line = (
            f"{_counted(summary['frames'], 'frame')} in {summary['seconds']:.1f} s, "
            f"{summary['frames_per_second']:.1f} frames/s; "
            f"latency p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms; "
            f"state {_human_bytes(summary['state_bytes'])}; {_counted(summary['dropped_frames'], 'frame')} dropped"
        )
        if summary.get("clips"):
            line += f"; {_counted(summary['clips'], 'clip')}, {summary['gmac']:.1f} GMAC"
        if self._args.realtime:
            line += f"; behind the clock p50 {summary['lag_ms']['p50']:.1f} ms, p99 {summary['lag_ms']['p99']:.1f} ms"
        yield line
        top = ", ".join(f"{entry['label']} {100 * entry['score']:.1f} %" for entry in summary["top"])
        yield f"video: {top}" + (f" ({self._network.warning})" if self._network.warning else "")
        if self._out is not None:
            yield f"wrote {', '.join(OUTPUT_NAMES)} to {self._out}"


class _OutputFiles:
    """The four files of ``--out``: written under temporary names, renamed when whole."""

    def __init__(self, out: Path, network: _Network, reader: VideoReader, title: str, top: int) -> None:
        from rcu_ops.video.draw import ScorePanel
        from rcu_ops.video.timeline import ScoreHistory
        from rcu_ops.video.write import VideoWriter

        self._out = out
        self._network = network
        self._title = title
        self._top = top
        self._history = ScoreHistory()
        self._panel = ScorePanel(
            reader.height, reader.width, rows=min(top, 8), title=network.name, warning=network.warning
        )
        self._created = not out.exists()
        self._scores_file = replacing(out / "scores.jsonl")
        # A line is flushed when it is complete: whatever happens to the process, the lines so far are on disk.
        self._scores: TextIO = self._scores_file.__enter__().open("w", encoding="utf-8", buffering=1)
        try:
            self._video = VideoWriter(
                out / "annotated.mp4", self._panel.height, self._panel.width, frame_rate=reader.frame_rate or 25.0
            )
        except BaseException as error:
            self._drop_scores(error)
            raise

    def write_unscored(self, frame: Frame, image: np.ndarray, note: str) -> None:
        """Add a frame that has no scores yet to the video alone; ``note`` says why there are none."""
        picture = self._panel.draw(image, time_seconds=frame.time_seconds, index=frame.index, scores=(), note=note)
        self._video.write(picture, frame.time_seconds)

    def write(self, result: _Result, image: np.ndarray) -> None:
        """Add one frame to all of them."""
        import numpy as np

        labels = self._network.labels
        frame = result.frame
        line: dict[str, Any] = {
            "index": frame.index,
            "time": round(frame.time_seconds, 6),
            "top": [_class_entry(labels, c, score) for c, score in result.leading],
        }
        if result.frame_leading is not None:
            line["frame_top"] = _class_entry(labels, *result.frame_leading)
        line |= {
            "scores": [float(f"{score:.6g}") for score in result.scores],
            "untrained": self._network.weights == "untrained",
            **self._network.cost_so_far(),
        }
        self._scores.write(json.dumps(line) + "\n")
        beside = np.array([self._network.gmac]) if result.instant is None else result.instant
        self._history.append(frame.time_seconds, result.running, beside)
        rows = [(labels[c], score) for c, score in result.leading]
        picture = self._panel.draw(image, time_seconds=frame.time_seconds, index=frame.index, scores=rows)
        self._video.write(picture, frame.time_seconds)

    def finish(self, summary: dict[str, Any], last: _Result) -> None:
        """Close and rename everything; the summary comes last."""
        from rcu_ops.video.timeline import plot_timeline

        network = self._network
        try:
            self._scores.close()
            self._scores_file.__exit__(None, None, None)
            self._video.close()
            plot_timeline(
                self._out / "timeline.png",
                self._history,
                network.labels,
                title=f"{network.name} on {self._title}",
                subtitle=f"{_counted(summary['frames'], 'frame')}, {network.size}x{network.size}, "
                f"{network.dtype_name} on {network.device}, {summary['frames_per_second']:.1f} frames/s"
                + (f"; {summary['status']}" if summary["status"] != "complete" else ""),
                warning=network.warning,
                top=self._top,
                cost=last.instant is None,
            )
            summary = {**summary, "annotated_codec": self._video.codec}
            write_json(self._out / "summary.json", summary, indent=2)
        except BaseException as error:
            self.discard(error)
            raise

    def discard(self, error: BaseException) -> None:
        """Remove what is unfinished because of ``error``, and the folder if it was made here and is empty."""
        self._video.discard()
        self._drop_scores(error)

    def _drop_scores(self, error: BaseException) -> None:
        if not self._scores.closed:
            with suppress(OSError):  # of a full disk, once more
                self._scores.close()
            self._scores_file.__exit__(type(error), error, None)
        if self._created and not any(self._out.iterdir()):
            self._out.rmdir()


class _Table:
    """The leading class of the video so far and of the frame, a line a second, on stdout."""

    def __init__(self, network: _Network) -> None:
        self._network = network
        self._labels = network.labels
        self._next = 0.0
        self._shown: int | None = None
        beside = f"{'this frame':<34} " if network.gmac is None else f"{'cost so far':<25} "
        self._heading = f"{'time':>10} {'frame':>8}   {'video so far':<34} {beside}{network.warning}".rstrip()

    def show(self, result: _Result, bar: Progress) -> None:
        now = time.perf_counter()
        if now < self._next:
            return
        if self._shown is None:
            bar.write(self._heading)
        bar.write(self._line(result))
        self._shown = result.frame.index
        self._next = now + _TABLE_SECONDS

    def end(self, last: _Result) -> None:
        """The last frame always has its line."""
        if self._shown != last.frame.index:
            print(self._line(last))

    def _line(self, result: _Result) -> str:
        gmac = self._network.gmac
        cost = "" if gmac is None else f"{self._network.clips:5d} clips {gmac:9.1f} GMAC"
        shown = [result.leading[0]] + ([] if result.frame_leading is None else [result.frame_leading])
        cells = [f"{self._name(c):<24} {100 * p:6.1f} %  " for c, p in shown]
        return f"{result.frame.time_seconds:8.2f} s {result.frame.index:8d}   {' '.join(cells)}{cost}".rstrip()

    def _name(self, index: int) -> str:
        name = self._labels[index]
        return name if len(name) <= 24 else name[:23] + "…"


class _Recent:
    """Durations of the last ``limit`` frames."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values = array("d")
        self._oldest = 0

    def append(self, seconds: float) -> None:
        if len(self._values) < self._limit:
            self._values.append(seconds)
        else:
            self._values[self._oldest] = seconds
            self._oldest = (self._oldest + 1) % self._limit

    def milliseconds(self) -> dict[str, float]:
        """Median, 99th percentile, mean and maximum."""
        import numpy as np

        values = np.asarray(self._values) * 1e3
        if values.size == 0:
            return {"p50": 0.0, "p99": 0.0, "mean": 0.0, "max": 0.0}
        p50, p99 = np.percentile(values, [50, 99])
        found = {"p50": p50, "p99": p99, "mean": values.mean(), "max": values.max()}
        return {name: round(float(value), 3) for name, value in found.items()}


def _as_user_error(error: BaseException, out: Path | None) -> BaseException:
    """What a failure to write the outputs is called on the command line; every other error is left as it is."""
    from rcu_ops.video import VideoError

    if isinstance(error, VideoError):
        return UserError(str(error))
    if isinstance(error, OSError) and out is not None and not isinstance(error, BrokenPipeError):
        return UserError(f"{out}: cannot be written: {error.strerror or error}")
    return error


def _check_out(out: str | None, overwrite: bool) -> Path | None:
    if out is None:
        return None
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out: {path} is a file; expected a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--out: {path} is not empty; give another folder, or --overwrite to replace its results")
    return path


def _read_labels(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    labels = [line.strip() for line in lines]
    for number, label in enumerate(labels, start=1):
        if not label:
            what = "the file is empty" if len(labels) == 1 else f"line {number} is empty"
            raise UserError(f"--labels: {path}: {what}; expected one class name per line")
    return labels


def _make_sample(folder: Path) -> Path:
    from rcu_ops.video.synthetic import write_sample_clip

    path = folder / "sample.mp4"
    write_sample_clip(path)
    return path


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_counted(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)


def bound_growth(model: nn.Module) -> None:
    """Let the recurrent layers of an untrained network average (h + x) / 2 instead of adding up.

    Untrained recurrent weights are the identity, so that the sums of every layer grow with time, and over the layers
    with a high power of it: 16-bit floats overflow within ten frames.
    """
    from rcu_ops.nn import RecurrentConv3d

    for module in model.modules():
        if isinstance(module, RecurrentConv3d):
            module.update = "mean"


def _softmax(scores: np.ndarray) -> np.ndarray:
    import numpy as np

    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _class_entry(labels: list[str], index: int, score: float) -> dict[str, Any]:
    return {"class": index, "label": labels[index], "score": round(score, 6)}


def _describe_video(reader: VideoReader) -> str:
    parts = [f"{reader.width}x{reader.height}", reader.codec]
    if reader.frame_rate:
        parts.append(f"{reader.frame_rate:.4g} frames/s")
    if reader.duration_seconds:
        parts.append(f"{reader.duration_seconds:.1f} s")
    if reader.rotation:
        parts.append(f"turned by {reader.rotation} degrees")
    if reader.live:
        parts.append("live")
    return ", ".join(parts)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _human_bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _versions() -> dict[str, str]:
    import torch

    from rcu_ops._version import __version__
    from rcu_ops.video.decode import require_av

    av = require_av()
    return {
        "rcu_ops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
        "libavcodec": ".".join(str(part) for part in av.library_versions["libavcodec"]),
        "platform": platform.platform(),
    }
