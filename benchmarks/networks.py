"""Whole networks: ``python -m benchmarks.networks OUT.json [--device cpu] [--quick]``.

Training steps and inference of RCN against I3D and (2+1)D on the clips of paper 1 (RGB, 112 x 112), inference of
FASTER32 against its expensive and cheap networks alone (paper 4, 256 frames of 224 x 224), and of SRTG against the
network without it (paper 3). Random weights and clips, bf16, channels last; medians of the calls in a second.
Inference is what ``fuse_for_inference`` makes, where it has something to fuse. Writes after every network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rcu_ops
from rcu_ops.bench import machine

Measured = dict[str, Any]


def seconds(call: Callable[[], Any], device: torch.device, most: float) -> float:
    """Median of single calls by the wall clock, each waited for, after two that are not timed."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(2):
        once()
    samples, end = [once()], time.perf_counter() + most
    while time.perf_counter() < end and len(samples) < 50:
        samples.append(once())
    return statistics.median(samples)


def clip(device: torch.device, dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def inference(model: nn.Module, frames: torch.Tensor, most: float) -> float:
    model = model.eval().to(frames.device, frames.dtype)
    with contextlib.suppress(TypeError, ValueError):  # nothing in it to fuse
        model = rcu_ops.fuse_for_inference(model)
    with torch.inference_mode():
        return seconds(lambda: model(frames), frames.device, most)


def training(model: nn.Module, frames: torch.Tensor, most: float) -> float:
    """Forward, backward and SGD under autocast to the frames' dtype, weights in fp32."""
    model = model.train().to(frames.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    clips = frames.float()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(frames.device.type, frames.dtype):
            scores = model(clips)
        scores.float().square().mean().backward()
        optimizer.step()

    return seconds(step, frames.device, most)


def measurements(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names and what measures each."""
    most, dtype = (0.2, torch.bfloat16) if quick else (1.0, torch.bfloat16)
    depths, n = ((18,), 1) if device.type == "cpu" else ((18, 34, 50), 8)
    side = 64 if device.type == "cpu" else 112
    for depth in depths:
        for kind in ("rcn", "i3d", "r2plus1d"):
            if kind == "r2plus1d" and depth == 50:
                continue  # paper 1 has none; that of paper 4 is another network
            name = f"{kind}_resnet{depth}"

            def make(name: str = name) -> nn.Module:
                return rcu_ops.create_model(name, num_classes=400)

            yield (
                f"{name} inference N1 T64 {side}x{side}",
                lambda make=make: inference(make(), clip(device, dtype, 1, 3, 64, side, side), most),
            )
            if not (quick and depth > 18):
                yield (
                    f"{name} training step N{n} T16 {side}x{side}",
                    lambda make=make: training(make(), clip(device, dtype, n, 3, 16, side, side), most),
                )
    if device.type == "cpu":
        return
    for cheap, words in ((0, "all expensive"), (1, "1:1"), (7, "1:7"), (-1, "all cheap")):
        yield (
            f"faster32, {words}, inference N1 256 frames 224x224",
            lambda cheap=cheap: inference(
                rcu_ops.create_model("faster32", num_classes=101, pattern=cheap),
                clip(device, dtype, 1, 3, 256, 224, 224),
                most,
            ),
        )
    for name in ("r3d_resnet34", "srtg_r3d_resnet34"):
        yield (
            f"{name} inference N4 T16 224x224",
            lambda name=name: inference(
                rcu_ops.create_model(name, num_classes=400), clip(device, dtype, 4, 3, 16, 224, 224), most
            ),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer calls, and training of the smallest networks only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    record: Measured = {"machine": machine.describe(device), "seconds": {}}
    for name, measure in measurements(device, arguments.quick):
        try:
            record["seconds"][name] = measure()
            print(f"{name}: {1e3 * record['seconds'][name]:.2f} ms", flush=True)
        except Exception as error:  # the other networks are measured all the same
            record["seconds"][name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name}: {record['seconds'][name]}", flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
