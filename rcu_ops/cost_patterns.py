"""What FASTER costs by pattern of expensive and cheap clips and by clip length: Table 4 of its paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from rcu_ops.models.faster import Faster

CLIP_LENGTHS = (8, 16, 32)


@dataclass(frozen=True)
class ClipCosts:
    """GMAC for one clip of ``clip_length`` frames: of either network, and of one step of the aggregator."""

    clip_length: int
    expensive: float
    cheap: float
    step: float

    def total(self, pattern: int, clips: int) -> float:
        """GMAC of a video of ``clips`` clips in the pattern 1:``pattern`` (-1: all cheap), with ``clips - 1`` steps."""
        expensive = 0 if pattern < 0 else -(-clips // (1 + pattern))
        return expensive * self.expensive + (clips - expensive) * self.cheap + (clips - 1) * self.step

    def average(self, expensive: bool, clips: int) -> float:
        """GMAC of averaging the scores of ``clips`` clips, all from one of the networks."""
        return clips * (self.expensive if expensive else self.cheap)


def clip_costs(model: Faster, clip_length: int, size: int | None = None) -> ClipCosts:
    """Count one clip of each kind and one step on ``meta``; ``size``: side of the frames (default: the model's)."""
    import copy

    import torch

    side = size or model.size
    on_meta = copy.deepcopy(model).to("meta").eval()
    clip = torch.empty(1, 3, clip_length, side, side, device="meta", dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        features = on_meta.expensive.features(clip)  # type: ignore[operator]
        classes = on_meta.aggregator.num_classes
        one = features if on_meta.aggregator.takes == "features" else clip.new_empty(1, classes)
        state = on_meta.aggregator.step(one)[1]
        return ClipCosts(
            clip_length,
            _gmac(on_meta.expensive, clip),
            _gmac(on_meta.cheap, clip),
            _gmac(on_meta.aggregator, one.unsqueeze(1), state),
        )


def _gmac(module: nn.Module, *arguments: Any) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(*arguments)
    return counter.get_total_flops() / 2e9


def per_clip_rounded(total: float, clips: int) -> float:
    """A total as Table 4 prints it: the cost per clip, rounded to 0.1, times the number of clips."""
    return round(clips * round(total / clips, 1), 1)


def table(model: Faster, size: int | None = None) -> dict[int, dict[int, float]]:
    """GMAC ``{pattern: {clip length: total}}`` for every pattern with at least one expensive clip in full turns."""
    from rcu_ops.models.faster import PATTERNS

    costs = {length: clip_costs(model, length, size) for length in CLIP_LENGTHS}
    rows: dict[int, dict[int, float]] = {}
    for pattern in PATTERNS:
        for length, cost in costs.items():
            clips = model.frames // length
            if clips % (1 + pattern) == 0:
                rows.setdefault(pattern, {})[length] = cost.total(pattern, clips)
    return rows


def format_table(model: Faster, rows: dict[int, dict[int, float]]) -> str:
    """The table that the command prints, in GMAC (the paper's GFLOPs), with the model's own setting marked."""
    heading = "".join(f"{f'{length} frames x {model.frames // length}':>18}" for length in CLIP_LENGTHS)
    lines = [f"{'expensive : cheap':<20}{heading}"]
    for pattern, totals in rows.items():
        cells = ""
        for length in CLIP_LENGTHS:
            mark = "*" if (1, pattern) == model.pattern and length == model.clip_length else " "
            cells += f"{totals[length]:>17.1f}{mark}" if length in totals else f"{'':>18}"
        lines.append(f"{'all expensive' if pattern == 0 else f'1:{pattern}':<20}{cells}".rstrip())
    return "\n".join(lines)
