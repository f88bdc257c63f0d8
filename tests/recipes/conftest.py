"""The tiny videos as files, and a tiny network trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcu_ops.cli import main
from tests.recipes.motion import RATE, TINY, VIDEOS, write_video


@pytest.fixture(scope="session")
def motion(tmp_path_factory):
    """A folder with the videos, list.csv, labels.txt and dense.csv (class "up" throughout, "down" in the middle)."""
    folder = tmp_path_factory.mktemp("motion")
    rows, dense = ["path,label"], ["path,start,end,label"]
    for index in range(VIDEOS):
        name = "down" if index % 2 else "up"
        write_video(folder / f"{name}_{index}.mp4", 1 if index % 2 else -1, index)
        rows.append(f"{name}_{index}.mp4,{name}")
        dense += [f"{name}_{index}.mp4,0,9,up", f"{name}_{index}.mp4,{4 / RATE},{8 / RATE},down"]
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    (folder / "dense.csv").write_text("\n".join(dense) + "\n")
    (folder / "labels.txt").write_text("up\ndown\n")
    return folder


@pytest.fixture
def tiny(motion):
    """``tiny(out, *options)`` trains the tiny network on the tiny videos and returns the exit code."""

    def run(out: Path, *options: str, recipe: str = "kinetics_resnet18", videos: Path | None = None) -> int:
        chosen = videos or motion / ("dense.csv" if recipe.startswith("multithumos") else "list.csv")
        return main([
            *("train", "--recipe", recipe, "--train", str(chosen), "--labels", str(motion / "labels.txt")),
            *("--model", "rcn_resnet18", "--out", str(out), *TINY, *options),
        ])  # fmt: skip

    return run


@pytest.fixture(scope="session")
def trained(motion, tmp_path_factory):
    """Weights of two training steps."""
    out = tmp_path_factory.mktemp("trained")
    code = main([
        *("train", "--recipe", "kinetics_resnet18", "--train", str(motion / "list.csv")),
        *("--labels", str(motion / "labels.txt"), "--out", str(out), *TINY, "--iterations", "2"),
    ])  # fmt: skip
    assert code == 0
    return out / "weights.safetensors"
