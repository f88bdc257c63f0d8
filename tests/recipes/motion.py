"""Tiny videos of two classes that differ in the direction of motion only, and options for a tiny network."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rcu_ops.video.write import VideoWriter

FRAMES, HEIGHT, WIDTH, RATE = 14, 40, 44, 25.0
VIDEOS = 8

# What makes a recipe small enough for a test; the network has every part of the real one.
TINY = [
    *("--frames", "4", "--crop", "32", "--scales", "32,36", "--eval-scale", "32", "--eval-clips", "3", "--batch", "4"),
    *("--model-option", "width=4", "--model-option", "layers=[1,1,1,1]", "--model-option", "update=mean"),
    *("--workers", "0", "--device", "cpu"),
]


def pictures(direction: int, seed: int, count: int = FRAMES):
    """Horizontal stripes that move down (1) or up (-1); colour and place at the start say nothing about the class."""
    generator = np.random.default_rng(seed)
    start, colour = generator.uniform(0, 16), generator.uniform(120, 255, 3)
    rows = np.arange(HEIGHT) + 0.5
    for time in range(count):
        shade = 0.5 + 0.5 * np.sin(2 * np.pi * (rows - 2 * direction * time + start) / 16)
        picture = np.broadcast_to(shade[:, None, None] * colour, (HEIGHT, WIDTH, 3))
        yield np.round(picture).astype(np.uint8)


def write_video(path: Path, direction: int, seed: int, count: int = FRAMES) -> None:
    with VideoWriter(path, HEIGHT, WIDTH, frame_rate=RATE) as writer:
        for index, picture in enumerate(pictures(direction, seed, count)):
            writer.write(picture, index / RATE)
