"""The papers' training settings by name.

What a paper says is in its entry of :data:`RECIPES`; what it does not say is a default of :class:`Recipe` or of the
entry that :func:`assumptions` names, so that nobody takes it for the paper's.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LOSSES = ("cross_entropy", "bce")
SAMPLINGS = ("clip", "segments")
INPUTS = ("rgb", "flow")
BATCH_NORMS = ("batch", "moving", "frozen")
SCHEDULES = ("steps", "cosine")


def _setting(text: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": text})


LONG_CYCLE = ((4, 2), (2, 2), (2, 1), (1, 1))
"""By how much a clip of multigrid training is shorter, and its area smaller, between two milestones."""

SHORT_CYCLE = (4, 2, 1)
"""By how much its area is smaller at one step after the other, if the long cycle does not make it smaller already."""


class Grid(NamedTuple):
    """What a step trains on: clips, their frames and the distance of these, the side of the crop, the scales before."""

    batch: int
    frames: int
    period: int
    crop: int
    scales: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what is trained on and how; every field is an option of ``rcu-ops train``.

    ``loss="cross_entropy"`` compares the mean score of a clip with the one label of its video; ``"bce"`` (binary cross
    entropy) compares the scores of every frame with the classes present in it, averaged over frames and classes.

    With ``trimmed`` every labelled interval is a training clip of its own: ``"cross_entropy"`` compares its mean score
    with the interval's label, ``"bce"`` with all classes present in its frames. In evaluation a video has all its
    labels, and every class the greatest score of its outputs.

    Raises:
        ValueError: a value out of its range, naming the field.
    """

    name: str
    model: str = _setting("network, one of rcu_ops.list_models()")
    classes: int = _setting("number of classes")
    loss: str = _setting("cross_entropy (one label per clip) or bce (dense labels per frame)")
    frames: int = _setting("frames in a clip")
    batch: int = _setting("clips in one step, over all processes and accumulated parts")
    lr: float = _setting("initial learning rate; it does not follow --batch")
    milestones: tuple[int, ...] = _setting("steps after which the learning rate is multiplied by lr-factor")
    iterations: int = _setting("steps in all")
    schedule: str = _setting("steps (lr-factor at the milestones) or cosine (to 0 at the last step)", "steps")
    lr_factor: float = _setting("factor at every milestone", 0.1)
    momentum: float = _setting("of SGD", 0.9)
    weight_decay: float = _setting("of SGD, on all parameters", 1e-4)
    period: int = _setting("distance in frames between neighbouring frames of a clip", 1)
    crop: int = _setting("side in pixels of what the network sees", 112)
    scales: tuple[int, int] = _setting("range of the short side in pixels before the random crop", (128, 160))
    flip: float = _setting("probability of mirroring a training clip", 0.5)
    jitter: bool = _setting("start training clips at a random frame (otherwise they are centred)", True)
    eval_scale: int = _setting("short side in pixels before the centre crop of evaluation", 128)
    eval_clips: int = _setting("regularly spaced clips (or positions in the segments) per video in evaluation", 10)
    eval_windows: tuple[int, int] = _setting(
        "with sampling=segments: regularly spaced windows of a video that are scored one by one, and frames of each "
        "(0: the whole video)",
        (1, 0),
    )
    eval_crops: int = _setting("crops of every clip in evaluation, averaged: 1, 5 or 10", 1)
    sampling: str = _setting("clip (neighbouring frames) or segments (one frame of each of `frames` segments)", "clip")
    input: str = _setting("rgb (videos) or flow (.npy files of rcu-ops flow, with sampling=segments)", "rgb")
    flow_length: int = _setting("neighbouring flow fields of a snippet", 10)
    trimmed: bool = _setting("train on every labelled interval by itself; evaluate videos with several labels", False)
    multigrid: bool = _setting(
        "smaller clips in larger batches: shapes change with every step and milestone, the work of a step does not",
        False,
    )
    multi_scale: bool = _setting("crop windows of random size at corners and centre instead of random places", False)
    batch_norm: str = _setting("batch, moving (normalise by moving statistics, updated slowly) or frozen", "batch")
    batch_norm_momentum: float = _setting("how fast batch-norm=moving updates the statistics", 0.001)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("sampling", SAMPLINGS),
            ("input", INPUTS),
            ("batch_norm", BATCH_NORMS),
            ("eval_crops", (1, 5, 10)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        if self.sampling == "segments" and self.dense:
            raise ValueError("sampling: dense labels need neighbouring frames (clip), got 'segments'")
        if self.input == "flow" and self.sampling != "segments":
            raise ValueError(f"input: flow comes in snippets of segments (sampling=segments), got {self.sampling!r}")
        if self.trimmed and self.input == "flow":
            raise ValueError("trimmed: intervals in seconds need videos (input=rgb), got 'flow'")
        windows, length = self.eval_windows if len(self.eval_windows) == 2 else (0, 0)
        if windows < 1 or length < 0 or (length == 0 and windows > 1):
            raise ValueError(f"eval_windows: expected a number from 1 and frames of each, got {self.eval_windows}")
        if length and self.sampling != "segments":
            raise ValueError(f"eval_windows: expected 1,0 with sampling={self.sampling}, got {self.eval_windows}")
        if self.multigrid and (self.sampling != "clip" or self.frames % LONG_CYCLE[0][0]):
            raise ValueError(
                f"multigrid: expected sampling=clip and frames in fours, got {self.sampling!r} and {self.frames}"
            )
        if not 0 < self.batch_norm_momentum <= 1:
            raise ValueError(f"batch_norm_momentum: expected a number above 0, to 1, got {self.batch_norm_momentum}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected {' or '.join(LOSSES)}, got {self.loss!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected {' or '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("classes", "frames", "batch", "iterations", "period", "crop", "eval_clips", "flow_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("lr", "lr_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("momentum", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay: expected a number from 0, got {self.weight_decay}")
        if any(step < 1 for step in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: expected rising steps from 1, got {self.milestones}")
        if len(self.scales) != 2 or not self.crop <= self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales: expected two numbers, rising, from the crop {self.crop} on, got {self.scales}")
        if self.eval_scale < self.crop:
            raise ValueError(f"eval_scale: expected at least the crop {self.crop}, got {self.eval_scale}")

    @property
    def dense(self) -> bool:
        """Whether labels belong to frames instead of videos."""
        return self.loss == "bce" and not self.trimmed

    @property
    def intervals(self) -> bool:
        """Whether lists of videos have labelled intervals."""
        return self.dense or self.trimmed

    def grid(self, step: int) -> Grid:
        """What a step, counted from 0, trains on.

        With ``multigrid`` (Wu et al., "A Multigrid Method for Efficiently Training Video Models") clips are shorter and
        smaller by :data:`LONG_CYCLE`, whose next entry begins at every milestone, and smaller by :data:`SHORT_CYCLE`,
        whose next entry begins at every step. The batch grows by as much. Frames are further apart and scales smaller
        in the same proportion, so that a clip shows as much of the video.
        """
        if not self.multigrid:
            return Grid(self.batch, self.frames, self.period, self.crop, self.scales)
        shorter, smaller = LONG_CYCLE[sum(milestone <= step for milestone in self.milestones) % len(LONG_CYCLE)]
        smaller = max(smaller, SHORT_CYCLE[step % len(SHORT_CYCLE)])
        crop, low, high = (max(1, round(side / math.sqrt(smaller))) for side in (self.crop, *self.scales))
        scales = (max(crop, low), max(crop, high))
        return Grid(self.batch * shorter * smaller, self.frames // shorter, self.period * shorter, crop, scales)

    def clips_before(self, step: int) -> int:
        """Clips that the steps before ``step`` take, over all processes."""
        if not self.multigrid:
            return step * self.batch
        bounds = [0, *(milestone for milestone in self.milestones if milestone < step), step]
        period = len(SHORT_CYCLE)
        clips = 0
        for first, last in itertools.pairwise(bounds):
            # From `first` on batches repeat after `period` steps.
            batches = [self.grid(first + phase).batch for phase in range(min(period, last - first))]
            whole, rest = divmod(last - first, period)
            clips += whole * sum(batches) + sum(batches[:rest])
        return clips

    @property
    def snippet(self) -> int:
        """Neighbouring frames (or fields) that a segment gives."""
        return self.flow_length if self.input == "flow" else 1

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        With steps divided once per milestone that lies behind it; with cosine
        ``lr (1 + cos(pi step / iterations)) / 2``.
        """
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * step / self.iterations)) / 2
        return self.lr * self.lr_factor ** sum(milestone <= step for milestone in self.milestones)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values (lists for tuples), for files."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that :meth:`as_dict` was called on.

        Settings that came later have their defaults. ValueError for unknown settings, and missing ones without default.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        needed = {item.name for item in dataclasses.fields(cls) if item.default is dataclasses.MISSING}
        unknown, missing = set(values) - known, needed - set(values)
        if unknown or missing:
            raise ValueError(
                f"recipe: expected the settings of this version, got unknown {sorted(unknown) or 'none'} and missing "
                f"{sorted(missing) or 'none'}"
            )
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields)


_KINETICS: dict[str, Any] = {
    "classes": 400,
    "loss": "cross_entropy",
    "milestones": (250_000, 350_000),
    "iterations": 400_000,
}

# Relational Long Short-Term Memory, §5.2.
_RELATIONAL: dict[str, Any] = {
    "loss": "cross_entropy",
    "frames": 8,
    "batch": 24,
    "lr": 0.0005,
    "weight_decay": 5e-4,
    "crop": 224,
    "scales": (256, 256),
    "eval_scale": 256,
    "eval_clips": 4,
    "eval_crops": 5,
    "sampling": "segments",
    "multi_scale": True,
    "batch_norm": "moving",
}


def _relational(classes: int, videos: int, stream: str) -> dict[str, Any]:
    """A stream's settings on a data set with that many training videos in its first split."""
    drops, epochs = ((35, 45), 50) if stream == "rgb" else ((45, 55), 60)
    steps = [round(epoch * videos / _RELATIONAL["batch"]) for epoch in (*drops, epochs)]
    return {
        **_RELATIONAL,
        "classes": classes,
        "input": stream,
        "milestones": tuple(steps[:2]),
        "iterations": steps[2],
    }


# Relational Long Short-Term Memory, §5.6: 7,985 of the 9,848 videos, which have 66,500 actions together.
_CHARADES: dict[str, Any] = {
    **_relational(157, round(66_500 * 7_985 / 9_848), "rgb"),
    "trimmed": True,
    "eval_windows": (10, 256),
}

# Learn to Cycle, §4.2: 16 frames, multigrid training, from HACS to all other data sets. One long cycle of equal parts.
_SRTG: dict[str, Any] = {
    "loss": "cross_entropy",
    "frames": 16,
    "batch": 32,
    "lr": 0.1,
    "lr_factor": 0.5,
    "weight_decay": 1e-6,
    "crop": 224,
    "scales": (256, 320),
    "eval_scale": 256,
    "multigrid": True,
}


_SRTG_DATA = (
    ("hacs", 200, 120_000),
    ("kinetics700", 700, 120_000),
    ("moments", 339, 120_000),
    ("ucf101", 101, 12_000),
    ("hmdb51", 51, 6_000),
)


def _srtg(classes: int, iterations: int) -> dict[str, Any]:
    parts = len(LONG_CYCLE)
    milestones = tuple(iterations * part // parts for part in range(1, parts))
    return {**_SRTG, "classes": classes, "iterations": iterations, "milestones": milestones}


# FASTER, section 4: the clip-level networks, trained from scratch by themselves.
_FASTER: dict[str, Any] = {
    "classes": 400,
    "loss": "cross_entropy",
    "frames": 32,
    "crop": 224,
    "scales": (256, 320),
    "eval_scale": 256,
    "eval_clips": 8,
    "schedule": "cosine",
    "batch": 64,
    "lr": 0.01,
    "milestones": (),
    "iterations": 168_750,
}

# Recurrent Convolutions for Causal 3D CNNs, §5.1 (Kinetics), §5.3 (32 frames) and §5.4 (MultiTHUMOS).
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="kinetics_resnet18", model="rcn_resnet18", frames=8, batch=64, lr=0.01, **_KINETICS),
        Recipe(name="kinetics_resnet34", model="rcn_resnet34", frames=16, batch=32, lr=0.005, **_KINETICS),
        Recipe(name="kinetics_resnet50", model="rcn_resnet50", frames=8, batch=32, lr=0.005, **_KINETICS),
        Recipe(name="kinetics_resnet50_32frames", model="rcn_resnet50", frames=32, batch=8, lr=0.00125, **_KINETICS),
        Recipe(
            name="multithumos_resnet50",
            model="rcn_resnet50",
            classes=65,
            loss="bce",
            frames=16,
            period=4,
            batch=16,
            lr=0.001,
            milestones=(14_000,),
            iterations=20_000,
        ),
        *(
            Recipe(name=f"{data}_{name}_{stream}", model=model, **_relational(classes, videos, stream))
            for data, classes, videos in (("ucf101", 101, 9537), ("hmdb51", 51, 3570))
            for name, model in (("relational", "relational_two_branch"), ("tsn", "tsn_resnet101v2"))
            for stream in INPUTS
        ),
        Recipe(name="charades_relational_rgb", model="relational_two_branch", **_CHARADES),
        Recipe(name="charades_tsn_rgb", model="tsn_resnet101v2", **_CHARADES),
        *(
            Recipe(name=f"{data}_srtg", model="srtg_r3d_resnet50", **_srtg(classes, iterations))
            for data, classes, iterations in _SRTG_DATA
        ),
        Recipe(name="faster_r2plus1d_resnet50", model="r2plus1d_resnet50", **_FASTER),
        Recipe(name="faster_r2d_resnet26", model="r2d_resnet26", **_FASTER),
    )
}

_RCN_ASSUMED: dict[str, str] = {
    "momentum": "the usual SGD momentum",
    "weight_decay": "the usual value for ResNets",
    "crop": "the input of the paper's Table 1; that of training is not given",
    "scales": "the usual short sides for crops of 112",
    "eval_scale": "the lower of the training scales",
}
_KINETICS_ASSUMED = {**_RCN_ASSUMED, "period": "neighbouring frames; the paper gives a period for MultiTHUMOS only"}
_FASTER_ASSUMED: dict[str, str] = {
    "batch": "that of the R(2+1)D paper, whose procedure this one follows, on fewer GPUs",
    "lr": "that of the R(2+1)D paper",
    "iterations": "its 45 epochs over 240,000 videos",
    "momentum": "the usual SGD momentum",
    "weight_decay": "the usual value for ResNets",
    "flip": "usual in training on Kinetics",
    "eval_scale": "the lower of the training scales",
}
_SEGMENTS_ASSUMED: dict[str, str] = {"scales": "the short side of the segment networks' training pictures"}

_TSN_ASSUMED: dict[str, str] = {
    **_SEGMENTS_ASSUMED,
    **dict.fromkeys(("lr", "milestones", "iterations", "batch"), "those of the two-branch network"),
}

_CHARADES_ASSUMED: dict[str, str] = {
    "loss": "the paper names none; a trimmed clip has one label",
    **dict.fromkeys(
        ("milestones", "iterations"),
        "the paper's epochs of spatial streams, over the training videos' share of actions",
    ),
}

_SRTG_ASSUMED: dict[str, str] = {
    "iterations": "the paper gives none",
    "milestones": "one long cycle of four equal parts, at which the rate is halved as the batch is",
    "momentum": "the usual SGD momentum",
    "scales": "the usual short sides for crops of 224",
    "eval_scale": "the lower of the training scales",
    "period": "neighbouring frames where clips have all 16",
    "flip": "usual in training on these data sets",
}


def _segment_recipes(network: str, *streams: str) -> list[str]:
    return [f"{data}_{network}_{stream}" for data in ("ucf101", "hmdb51") for stream in streams or INPUTS]


_ASSUMED: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("faster_r2plus1d_resnet50", "faster_r2d_resnet26"), _FASTER_ASSUMED),
    "kinetics_resnet18": _KINETICS_ASSUMED,
    "kinetics_resnet34": _KINETICS_ASSUMED,
    "kinetics_resnet50": _KINETICS_ASSUMED,
    "kinetics_resnet50_32frames": {
        **_KINETICS_ASSUMED,
        "lr": "proportional to the batch, as 0.01 is for 64 and 0.005 for 32",
    },
    **dict.fromkeys(_segment_recipes("relational"), _SEGMENTS_ASSUMED),
    **dict.fromkeys(_segment_recipes("tsn"), _TSN_ASSUMED),
    "charades_relational_rgb": {**_SEGMENTS_ASSUMED, **_CHARADES_ASSUMED},
    "charades_tsn_rgb": {**_TSN_ASSUMED, **_CHARADES_ASSUMED},
    **dict.fromkeys([f"{data}_srtg" for data, *_ in _SRTG_DATA], _SRTG_ASSUMED),
    "multithumos_resnet50": {**_RCN_ASSUMED, "lr_factor": "the paper says that the rate is dropped, not how far"},
}

STARTING_WEIGHTS: Mapping[str, str] = {
    **dict.fromkeys(
        ("kinetics_resnet18", "kinetics_resnet34", "kinetics_resnet50", "kinetics_resnet50_32frames"),
        "ImageNet weights of a 2D ResNet of the same depth",
    ),
    **dict.fromkeys(
        [
            *(name for network in ("relational", "tsn") for name in _segment_recipes(network, "rgb")),
            "charades_relational_rgb",
            "charades_tsn_rgb",
        ],
        "ImageNet weights of a ResNet-101-v2",
    ),
    **dict.fromkeys(
        [name for network in ("relational", "tsn") for name in _segment_recipes(network, "flow")],
        "the network trained on RGB (--cross-modality), or TSN's flow network",
    ),
    "multithumos_resnet50": "the network trained on Kinetics",
    "hacs_srtg": "random weights",
    **dict.fromkeys([f"{data}_srtg" for data, *_ in _SRTG_DATA[1:]], "the network trained on HACS (with --skip-head)"),
    **dict.fromkeys(("faster_r2plus1d_resnet50", "faster_r2d_resnet26"), "random weights"),
}
"""What the paper starts each recipe from (``--weights``)."""

MODEL_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    name: {"in_channels": 20, "dropout": 0.7}
    for network in ("relational", "tsn")
    for name in _segment_recipes(network, "flow")
}
"""Arguments of a recipe's network that are not its defaults."""

LATE_FUSION: Mapping[str, tuple[float, float]] = {"ucf101": (0.45, 0.55), "hmdb51": (0.33, 0.67)}
"""Weights of the spatial and the temporal stream, before the softmax, by data set (Table 7 of the Relational LSTM)."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; similar names are listed.
    """
    if name not in RECIPES:
        similar = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(RECIPES)}"
        raise ValueError(f"recipe: there is no recipe named {name!r}; {hint}")
    return RECIPES[name]


def assumptions(name: str) -> Mapping[str, str]:
    """The fields of a recipe that its paper does not give, each with the reason for its value."""
    return _ASSUMED[get_recipe(name).name]
