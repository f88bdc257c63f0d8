"""Multigrid training: equal work at every step, every clip in its turn, and exact resumption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rcu_ops.recipes.config import LONG_CYCLE, Recipe, get_recipe
from rcu_ops.recipes.dataset import ClipDataset, ClipKey, ClipSampler
from rcu_ops.recipes.lists import read_list


def small(**changes: object) -> Recipe:
    values = {"frames": 4, "crop": 32, "scales": (32, 36), "eval_scale": 32, "batch": 2, "milestones": (4, 8, 13)}
    return dataclasses.replace(get_recipe("hacs_srtg"), **{**values, **changes})


def test_recipes_are_the_papers() -> None:
    for name, classes in (("hacs", 200), ("kinetics700", 700), ("moments", 339), ("ucf101", 101), ("hmdb51", 51)):
        recipe = get_recipe(f"{name}_srtg")
        assert (recipe.classes, recipe.frames, recipe.crop, recipe.batch) == (classes, 16, 224, 32)
        assert (recipe.lr, recipe.lr_factor, recipe.weight_decay, recipe.multigrid) == (0.1, 0.5, 1e-6, True)
        rates = [recipe.learning_rate(step) for step in (0, *recipe.milestones)]
        assert rates == [0.1, 0.05, 0.025, 0.0125]  # halved at each part of the cycle
    shapes = {get_recipe("hacs_srtg").grid(step)[:4] for step in range(0, 120_000, 9_999)}
    assert shapes <= {
        (32 * a * b, 16 // a, a, {1: 224, 2: 158, 4: 112}[b]) for a in (1, 2, 4) for b in (1, 2, 4)
    }  # fmt: skip


def test_every_step_is_as_much_work() -> None:
    recipe = small(frames=16, crop=224, scales=(256, 320), eval_scale=256)
    seen = set()
    for step in range(20):
        grid = recipe.grid(step)
        work = grid.batch * grid.frames * grid.crop**2
        assert work == pytest.approx(2 * 16 * 224**2, rel=0.01)  # 224 / sqrt(2) is no whole number
        assert grid.frames * grid.period == 16
        assert grid.crop <= grid.scales[0] <= grid.scales[1]
        seen.add((grid.frames, grid.crop))
    assert {frames for frames, _ in seen} == {16 // shorter for shorter, _ in LONG_CYCLE}
    assert {crop for _, crop in seen} == {224, 158, 112}
    base = dataclasses.replace(recipe, multigrid=False)
    assert base.grid(3)[:2] == (2, 16)
    with pytest.raises(ValueError, match="multigrid: expected sampling=clip and frames in fours"):
        small(frames=6)
    with pytest.raises(ValueError, match="multigrid: expected sampling=clip and frames in fours, got 'segments' and 4"):
        small(sampling="segments")


@pytest.mark.parametrize("milestones", [(), (1,), (4, 8, 13), (5, 6, 7, 8, 9)])
def test_clips_are_counted_as_they_are_taken(milestones: tuple[int, ...]) -> None:
    recipe = small(milestones=milestones)
    total = 0
    for step in range(20):
        assert recipe.clips_before(step) == total
        total += recipe.grid(step).batch


def test_processes_and_parts_share_what_one_takes() -> None:
    recipe = small(batch=4)

    def keys(start: int = 0, **options: int) -> list[ClipKey]:
        sampler = ClipSampler(7, 4, 3, start=start, stop=10, multigrid=recipe, **options)
        return [key for part in sampler for key in part]

    whole = keys()
    assert len(whole) == recipe.clips_before(10)
    assert [(key.epoch, key.place) for key in whole[:7]] != [(key.epoch, key.place) for key in whole[7:14]]
    for start in range(0, len(whole) - 7, 7):  # every pass has all videos
        assert sorted(key.place for key in whole[start : start + 7]) == list(range(7))
    assert keys(6) == whole[recipe.clips_before(6) :]
    assert keys(parts=2) == whole
    shared = [keys(rank=rank, processes=2) for rank in range(2)]
    assert sorted(shared[0] + shared[1]) == sorted(whole)
    assert {key.step for key in whole} == set(range(10))


def test_clips_have_the_shapes(motion: Path) -> None:
    recipe = small(classes=2)
    videos = read_list(motion / "list.csv", 2, ("up", "down")).videos
    data = ClipDataset(videos, recipe, seed=0)
    for step in (0, 1, 4, 8, 13, 15):
        frames, grid = data[ClipKey(0, 1, step)].frames, recipe.grid(step)
        assert frames is not None and frames.shape == (grid.frames, grid.crop, grid.crop, 3)


def test_resumed_exactly(motion: Path, tmp_path: Path, tiny) -> None:
    options = ["--multigrid", "--batch", "1", "--milestones", "1,3", "--save-every", "2"]
    assert tiny(tmp_path / "whole", *options, "--iterations", "4") == 0
    assert tiny(tmp_path / "parts", *options, "--iterations", "2") == 0
    assert tiny(tmp_path / "parts", *options, "--iterations", "4", "--resume") == 0
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)
