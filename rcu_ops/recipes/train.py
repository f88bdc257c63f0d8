"""The training loop: one process or many, and the same weights whether or not it was interrupted.

Everything random follows from (seed, step, process) and is drawn anew at every step: clips from their sampler
(:mod:`rcu_ops.recipes.dataset`), dropout from torch's generators, which are seeded at the start of the step. A
checkpoint therefore needs no generator's state, and a resumed run takes the very steps that the interrupted one would
have taken.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcu_ops.analysis.scores_io import list_names
from rcu_ops.cli_errors import UserError
from rcu_ops.nn import set_batch_norm_mode
from rcu_ops.progress import Progress, format_duration
from rcu_ops.recipes.checkpoint import RunSettings, save_checkpoint, save_weights
from rcu_ops.recipes.dataset import ClipBatch, ClipDataset, ClipSampler, load_clips, mix_seed, network_input
from rcu_ops.recipes.distributed import Processes
from rcu_ops.recipes.lists import VideoList
from rcu_ops.recipes.metrics import accuracy_over, mean_average_precision, video_mean_average_precision
from rcu_ops.recipes.scoring import VideoScorer
from rcu_ops.recipes.signals import signals_received
from rcu_ops.report import write_csv
from rcu_ops.video import VideoError

__all__ = ["CHECKPOINT", "EXIT_NOT_FINITE", "ClipLoss", "TrainOptions", "Training", "remove_results"]

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.safetensors"
BEST = "best.safetensors"

EXIT_NOT_FINITE, EXIT_INCOMPLETE = 1, 3

# mAP@8 is what validation of dense labels looks at: neighbouring frames say the same at an eighth of the cost.
_VALIDATION_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train, as far as the result does not depend on it (but for rounding, and batch statistics per part).

    Attributes:
        out: folder for all results.
        seed: of everything random.
        workers: processes that decode video, per training process; 0 decodes in the training process.
        accumulate: parts in which a process takes its share of a batch, one after the other.
        autocast: dtype for ``torch.autocast``, or None; with float16 the loss is scaled.
        sync_batch_norm: batch statistics over all processes (GPUs only).
        log_every, save_every, validate_every: steps between rows of metrics, checkpoints and validations.
    """

    out: Path
    seed: int = 0
    workers: int = 0
    accumulate: int = 1
    autocast: torch.dtype | None = None
    sync_batch_norm: bool = False
    log_every: int = 50
    save_every: int = 1000
    validate_every: int = 1000


class ClipLoss(nn.Module):
    """A network and its loss in one module, so that data-parallel wrappers see every use of the parameters.

    Args:
        model: clip [N, 3, T, H, W] -> [N, K]; with ``dense`` it needs ``frame_scores`` -> [N, K, T].
        dense: the loss per frame instead of per clip.
        autocast: a dtype, or None.
    """

    def __init__(self, model: nn.Module, dense: bool, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.dense = dense
        self.autocast = autocast

    def forward(self, frames: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures uint8 [N, T, H, W, 3] and targets to the mean loss and the number of clips classified rightly.

        The loss is taken in float32: cross entropy for class indices, binary cross entropy for classes present, with
        which no clip counts as right.

        Raises:
            UserError: dense targets, and a network that does not give one score vector per frame.
        """
        clip = network_input(frames)
        precision = nullcontext() if self.autocast is None else torch.autocast(clip.device.type, self.autocast)
        with precision:
            scores = self.model.frame_scores(clip) if self.dense else self.model(clip)  # type: ignore[operator]
        scores = scores.float()
        if not target.is_floating_point():
            return F.cross_entropy(scores, target), (scores.detach().argmax(1) == target).sum()
        if scores.shape != target.shape:
            raise UserError(
                f"--model: dense labels need one score vector per frame, {list(target.shape)}, got "
                f"{list(scores.shape)} "
                "(I3D and (2+1)D networks: --model-option dense=true)"
            )
        return F.binary_cross_entropy_with_logits(scores, target), torch.zeros((), device=scores.device)


class _NotFiniteError(Exception):
    """The loss or the network holds an infinity or NaN."""


class Training:
    """One run.

    Args:
        model: the network, on this process's device.
        settings: its recipe and how it was made.
        videos: to train on.
        options: see :class:`TrainOptions`.
        processes: this process among how many.
        validation: videos to validate on, or None.

    Raises:
        UserError: the batch cannot be divided among processes and parts; synchronised batch normalisation without GPUs.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RunSettings,
        videos: VideoList,
        options: TrainOptions,
        processes: Processes,
        validation: VideoList | None = None,
    ) -> None:
        recipe = settings.recipe
        set_batch_norm_mode(model, recipe.batch_norm, recipe.batch_norm_momentum)
        if options.sync_batch_norm:
            if processes.device.type != "cuda":
                raise UserError("--sync-bn: synchronised batch normalisation needs GPUs")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model
        self.step = 0
        self._settings = settings
        self._recipe = recipe
        self._videos = videos
        self._options = options
        self._processes = processes
        self._validation = validation
        self._loss: nn.Module = ClipLoss(model, recipe.dense, options.autocast)
        if processes.count > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self._loss = DistributedDataParallel(self._loss, device_ids=devices)
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=options.autocast == torch.float16)
        self._rows: list[list[float]] = []
        self._validations: list[list[float]] = []
        self._running = [0.0, 0.0, 0.0]  # loss, right clips and steps since the last row
        self._best: float | None = None
        self._broken: dict[str, str] = {}
        self._saved_step: int | None = None
        self._bar: Progress | None = None
        self._row_began = 0.0
        try:
            self._sampler()
        except ValueError as error:
            raise UserError(f"--{error}") from error

    # Checkpoints

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on where a checkpoint of this run was written.

        Raises:
            UserError: it was trained on another list of videos, or with another seed.
        """
        if checkpoint["list"] != self._videos.digest:
            raise UserError(f"--resume: {self._videos.source} is not the list of videos that the run was started with")
        if checkpoint["seed"] != self._options.seed:
            raise UserError(f"--resume: the run was started with --seed {checkpoint['seed']}, got {self._options.seed}")
        self.model.load_state_dict(checkpoint["model"])
        self._optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(checkpoint["scaler"])
        self.step = self._saved_step = checkpoint["step"]
        self._rows = checkpoint["rows"]
        self._validations = checkpoint["validations"]
        self._running = checkpoint["running"]
        self._best = checkpoint["best"]
        self._broken = checkpoint["broken"]

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        tensors = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise _NotFiniteError(f"the network holds values that are not finite after step {self.step}")
        if self._processes.first:
            save_checkpoint(
                self._options.out / CHECKPOINT,
                {
                    "settings": self._settings.as_dict(),
                    "list": self._videos.digest,
                    "seed": self._options.seed,
                    "step": self.step,
                    "model": self.model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "scaler": self._scaler.state_dict(),
                    "rows": self._rows,
                    "validations": self._validations,
                    "running": self._running,
                    "best": self._best,
                    "broken": self._broken,
                },
            )
            self._draw()
        self._saved_step = self.step

    # The loop

    def run(self) -> int:
        """Train to the recipe's last step.

        An interrupt or termination signal is answered after the current step, with a checkpoint.

        Returns:
            0 done; 1 the loss stopped being finite (the last good checkpoint is kept); 3 done by one process,
            but some videos could not be used, in whole or in part; 128 + the signal's number.

        Raises:
            UserError: no video can be used; the GPU's memory is not enough.
        """
        recipe, start = self._recipe, self.step
        began = time.monotonic()
        problem, code = "", 0
        with ExitStack() as stack:
            stopped = stack.enter_context(signals_received())
            if self._processes.first:
                bar = Progress(recipe.iterations - start, label=recipe.name, unit="steps")
                self._bar = stack.enter_context(bar)
            try:
                self._train(stopped)
                if self.step < recipe.iterations:
                    problem = f"stopped at step {self.step} of {recipe.iterations}; --resume goes on from there"
                    code = 128 + stopped[0] if stopped else 128 + signal.SIGTERM
            except _NotFiniteError as error:
                kept = f"the checkpoint of step {self._saved_step} is kept" if self._saved_step else "nothing was saved"
                problem, code = f"{error}; {kept}; a lower --lr may help", EXIT_NOT_FINITE
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the GPU's memory is not enough for {self._sampler().part_size} clips at once; --accumulate N "
                    "splits a batch into N parts"
                ) from error
        broken = {name: reason for found in self._processes.gather(self._broken) for name, reason in found.items()}
        if self._processes.first:
            self._finish(broken, problem, code, self.step - start, time.monotonic() - began)
        alone = self._processes.count == 1  # torchrun takes any other code than 0 for a crash
        return EXIT_INCOMPLETE if broken and code == 0 and alone else code

    def _sampler(self) -> ClipSampler:
        return ClipSampler(
            len(self._videos.videos),
            self._recipe.batch,
            self._options.seed,
            start=self.step,
            stop=self._recipe.iterations,
            rank=self._processes.rank,
            processes=self._processes.count,
            parts=self._options.accumulate,
            multigrid=self._recipe if self._recipe.multigrid else None,
        )

    def _batches(self) -> Generator[ClipBatch, None, None]:
        batches = load_clips(
            ClipDataset(self._videos.videos, self._recipe, self._options.seed),
            self._sampler(),
            workers=self._options.workers,
            pin_memory=self._processes.device.type == "cuda",
        )
        for batch in batches:
            for place, reason in batch.problems:
                self._warn(self._videos.videos[place].name, reason)
            if batch.frames is None:
                first = next(iter(self._broken.values()))
                raise UserError(
                    f"{self._videos.source}: not one of its {len(self._videos.videos)} videos can be used: {first}"
                )
            yield batch

    def _warn(self, name: str, reason: str) -> None:
        """Report a video that cannot be used, in whole or in part, when it is first met."""
        if name in self._broken:
            return
        self._broken[name] = reason
        line = f"rcu-ops: warning: {reason if name in reason else f'{name}: {reason}'}"
        if self._bar is not None:
            self._bar.write(line, stream=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _train(self, stopped: Sequence[int]) -> None:
        self._loss.train()
        self._row_began = time.monotonic()
        with closing(self._batches()) as batches:
            while self.step < self._recipe.iterations:
                if self._take_step(batches, bool(stopped)):
                    return

    def _take_step(self, batches: Iterator[ClipBatch], stop: bool) -> bool:
        """One step and what is due after it; True if a process has been told to stop."""
        recipe, options = self._recipe, self._options
        torch.manual_seed(mix_seed(options.seed, self.step, self._processes.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        loss, correct, stop = self._gradients(batches, stop)
        if not math.isfinite(loss):
            raise _NotFiniteError(f"the loss is {loss} at step {self.step}")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.step += 1
        self._running = [old + new for old, new in zip(self._running, (loss, correct, 1.0), strict=True)]
        last = self.step == recipe.iterations
        if self.step % options.log_every == 0 or last:
            self._log()
        if self._validation is not None and (self.step % options.validate_every == 0 or last):
            self._validate(self._validation)
        if self.step % options.save_every == 0 or last or stop:
            self._save()
        if self._bar is not None:
            self._bar.update(note=f"loss {loss:.4f}")
        return stop

    def _gradients(self, batches: Iterator[ClipBatch], stop: bool) -> tuple[float, float, bool]:
        """One step's gradients; the mean loss and right clips over all processes, and whether any is to stop."""
        parts, device = self._options.accumulate, self._processes.device
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        sums[2] = float(stop)
        for part in range(parts):
            batch = next(batches)
            assert batch.frames is not None
            frames = batch.frames.to(device, non_blocking=True)
            target = batch.target.to(device, non_blocking=True)
            with ExitStack() as stack:
                if isinstance(self._loss, DistributedDataParallel) and part < parts - 1:
                    stack.enter_context(self._loss.no_sync())
                loss, correct = self._loss(frames, target)
                self._scaler.scale(loss / parts).backward()
            sums[0] += loss.detach() / parts
            sums[1] += correct
        loss_sum, correct_sum, signals = self._processes.sum(sums).tolist()
        return loss_sum / self._processes.count, correct_sum, signals > 0

    # Results

    def _log(self) -> None:
        loss, correct, steps = self._running
        self._running = [0.0, 0.0, 0.0]
        now = time.monotonic()
        clips = self._clips_since(self.step - round(steps))
        row = [self.step, self._recipe.learning_rate(self.step - 1), loss / steps, clips / (now - self._row_began)]
        self._rows.append(row if self._recipe.loss == "bce" else [*row, correct / clips])
        self._row_began = now
        if self._processes.first:
            header = ["step", "lr", "loss", "clips_per_second", *([] if self._recipe.loss == "bce" else ["top1"])]
            write_csv(self._options.out / "metrics.csv", header, self._rows)

    def _clips_since(self, step: int) -> int:
        return self._recipe.clips_before(self.step) - self._recipe.clips_before(step)

    def _validate(self, videos: VideoList) -> None:
        dense, trimmed = self._recipe.dense, self._recipe.trimmed
        mode = "sliding" if dense else "clips"
        self._loss.eval()
        scorer = VideoScorer(self.model, self._recipe, (mode,), autocast=self._options.autocast)
        own: list[tuple[Any, Any]] = []
        for video in videos.videos[self._processes.rank :: self._processes.count]:
            try:
                result = scorer(str(video.path))
            except VideoError as error:
                self._warn(video.name, str(error))
                continue
            scores = result.scores[mode]
            if dense:
                self._check_dense(scores.shape[1], len(result.times))
                present = video.present(result.times, self._recipe.classes)
                own.append((scores[:, ::_VALIDATION_EVERY], present[:, ::_VALIDATION_EVERY]))
            else:
                own.append((scores, video.present_anywhere(self._recipe.classes) if trimmed else video.label))
        self._loss.train()
        found = [pair for some in self._processes.gather(own) for pair in some]
        if not found:
            raise UserError(f"{videos.source}: not one of its {len(videos.videos)} videos can be used")
        self._take_validation(found)

    def _take_validation(self, found: list[tuple[Any, Any]]) -> None:
        if self._recipe.intervals:
            scores, present = [pair[0] for pair in found], [pair[1] for pair in found]
            if self._recipe.dense:
                precision = mean_average_precision(scores, present, 1)
            else:
                precision = video_mean_average_precision(scores, present)
            score = float("nan") if precision is None else precision
            header: tuple[str, ...] = ("step", self._map_name(), "videos")
            self._validations.append([self.step, score, len(found)])
        else:
            report = accuracy_over(found)
            score = report.video_top1
            header = ("step", "video_top1", "video_top5", "clip_top1", "clip_top5", "videos")
            self._validations.append(
                [self.step, score, report.video_top5, report.clip_top1, report.clip_top5, report.num_videos]
            )
        best = not math.isnan(score) and (self._best is None or score > self._best)
        if best:
            self._best = score
        if self._processes.first:
            write_csv(self._options.out / "validation.csv", header, self._validations)
            if best:
                save_weights(self._options.out / BEST, self.model, self._settings)
            assert self._bar is not None
            self._bar.write(f"step {self.step}: validation {header[1]} {100 * score:.2f} % of {len(found)} videos")

    def _map_name(self) -> str:
        return f"map@{_VALIDATION_EVERY}" if self._recipe.dense else "map"

    @staticmethod
    def _check_dense(outputs: int, frames: int) -> None:
        if outputs != frames:
            raise UserError(
                f"dense labels need one score vector per frame, the network gives {outputs} for {frames} frames "
                "(I3D and (2+1)D networks: --model-option dense=true)"
            )

    def _draw(self) -> None:
        if not self._rows:
            return
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return
        from rcu_ops.report import GREY, new_figure, save_figure, series

        validated = bool(self._validations)
        figure, axes = new_figure(height=5.6 if validated else 4.2, nrows=2 if validated else 1, sharex=True)
        upper, *lower = axes if validated else [axes]
        lines = [(upper, self._rows, 2, 0, "loss")]
        if validated:
            shown = self._map_name().replace("map", "mAP") if self._recipe.intervals else "video top-1"
            name = f"validation {shown} (%)"
            lines.append((lower[0], self._validations, 1, 1, name))
        for panel, rows, column, colour, label in lines:
            style = {**series(colour), "marker": "o" if len(rows) < 30 else ""}
            panel.plot([row[0] for row in rows], [(100 if colour else 1) * row[column] for row in rows], **style)
            panel.set_ylabel(label)
            for milestone in self._recipe.milestones:
                if milestone <= self.step:
                    panel.axvline(milestone, color=GREY, linewidth=0.8, linestyle=":")
        (lower[0] if validated else upper).set_xlabel("step")
        save_figure(figure, self._options.out / "loss.png")

    def _finish(self, broken: Mapping[str, str], problem: str, code: int, steps: int, seconds: float) -> None:
        out = self._options.out
        if code == 0:
            save_weights(out / WEIGHTS, self.model, self._settings)
        if broken:
            write_csv(out / "broken_videos.csv", ("video", "reason"), sorted(broken.items()))
            print(
                f"rcu-ops: warning: videos that could not be used, in whole or in part: {len(broken)} (listed in "
                f"{out / 'broken_videos.csv'}): {list_names(sorted(broken))}",
                file=sys.stderr,
            )
        if problem:
            prefix = "error: " if code == EXIT_NOT_FINITE else ""
            print(f"rcu-ops: {prefix}{problem}", file=sys.stderr)
        else:
            rate = f", {self._clips_since(self.step - steps) / seconds:.1f} clips/s" if steps else ""
            loss = f"; loss {self._rows[-1][2]:.4f}" if self._rows else ""
            print(f"{self.step} steps done, {steps} of them now in {format_duration(seconds)}{rate}{loss}")
            print(f"wrote {WEIGHTS}, {CHECKPOINT}, metrics.csv to {out}")


def remove_results(out: Path) -> None:
    """Remove what an earlier run wrote to ``out``, and nothing else."""
    for name in (CHECKPOINT, WEIGHTS, BEST, "metrics.csv", "validation.csv", "broken_videos.csv", "loss.png"):
        (out / name).unlink(missing_ok=True)
