"""Text, rectangles and the score panel drawn into uint8 RGB pictures.

Letters are rasterised by matplotlib's font engine (``pip install 'rcu-ops[plot]'``), which needs no display; everything
else is numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rcu_ops.video.decode import VideoError

__all__ = ["ScorePanel", "blend_rectangle", "draw_text", "require_matplotlib", "text_width"]

Colour = tuple[int, int, int]

BACKGROUND: Colour = (18, 20, 26)
TEXT: Colour = (232, 234, 240)
FAINT: Colour = (150, 156, 170)
TRACK: Colour = (44, 48, 60)
LEADING: Colour = (64, 156, 255)
OTHERS: Colour = (92, 104, 130)
WARNING: Colour = (255, 184, 76)

_NARROWEST, _LONGEST = 320, 1280


def require_matplotlib() -> ModuleType:
    """The ``matplotlib`` package, or a :class:`VideoError` that says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise VideoError(f"pictures need matplotlib (pip install 'rcu-ops[plot]'): {error}") from error
    return matplotlib


class _Face(NamedTuple):
    """A font of one size, and how many rows of a line lie above the baseline."""

    font: Any
    ascent: int


@lru_cache(maxsize=8)
def _face(size: int, bold: bool) -> _Face:
    require_matplotlib()
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    name = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    font = FT2Font(font_manager.findfont(name))
    font.set_size(size, 72)
    stands_on_baseline = _line_mask(font, "x")
    return _Face(font, int(np.flatnonzero(stands_on_baseline.max(axis=1) > 127)[-1]) + 1)


def _line_mask(font: Any, text: str) -> np.ndarray:
    """Coverage 0..255 [h, w] of a line of text; h is the same for every text. Boxes stand for letters it lacks."""
    text = "".join(letter if font.get_char_index(ord(letter)) else "□" for letter in text)
    font.set_text(text, 0.0)
    width = -(-font.get_width_height()[0] // 64)
    # The bitmap is as high as its letters, give or take a rounded row: tall and deep letters after the text, cut off
    # again, give every line the same height and baseline.
    font.set_text(text + "    Åj_|", 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    return np.array(font.get_image(), dtype=np.uint8)[:, :width]


@lru_cache(maxsize=2048)
def _letters(text: str, size: int, bold: bool) -> np.ndarray:
    return _line_mask(_face(size, bold).font, text)


def text_width(text: str, size: int, *, bold: bool = False) -> int:
    """Width of a line of text in pixels."""
    return _letters(text, size, bold).shape[1] if text else 0


def draw_text(
    image: np.ndarray, text: str, x: int, baseline: int, size: int, colour: Colour = TEXT, *, bold: bool = False
) -> None:
    """Draw a line of text into ``image`` [H, W, 3], in place; what falls outside the picture is cut off.

    Args:
        x: column of the left edge.
        baseline: row that the letters stand on.
        size: of the font, in pixels per em.
    """
    if not text:
        return
    mask = _letters(text, size, bold)
    top = baseline - _face(size, bold).ascent
    height, width = mask.shape
    y0, y1 = max(0, top), min(image.shape[0], top + height)
    x0, x1 = max(0, x), min(image.shape[1], x + width)
    if y0 >= y1 or x0 >= x1:
        return
    cover = mask[y0 - top : y1 - top, x0 - x : x1 - x, None].astype(np.uint16)
    _blend(image[y0:y1, x0:x1], cover, colour)


def blend_rectangle(
    image: np.ndarray, x0: float, y0: int, x1: float, y1: int, colour: Colour, opacity: float = 1.0
) -> None:
    """Fill columns [x0, x1) and rows [y0, y1) of ``image`` [H, W, 3], in place; fractional columns are antialiased."""
    columns = np.arange(image.shape[1])
    cover = np.clip(np.minimum(columns + 1, x1) - np.maximum(columns, x0), 0.0, 1.0)
    inside = np.flatnonzero(cover)
    if inside.size == 0:
        return
    first, last = inside[0], inside[-1] + 1
    weights = np.round(cover[None, first:last, None] * (255 * opacity)).astype(np.uint16)
    _blend(image[max(0, y0) : max(0, y1), first:last], weights, colour)


def _blend(region: np.ndarray, cover: np.ndarray, colour: Colour) -> None:
    mixed = region * (255 - cover) + cover * np.asarray(colour, dtype=np.uint16)
    region[...] = ((mixed + 127) // 255).astype(np.uint8)


class ScorePanel:
    """A picture with the leading classes below it, as bars: the frames of an annotated video.

    All frames have one size, decided by the first picture: pictures narrower than 320 pixels are enlarged, sides
    longer than 1280 are reduced, later pictures of another size are fitted to it.

    Args:
        height, width: of the first picture.
        rows: number of classes shown.
        title: said on the right of the header.
        warning: said in the header in a warning colour, bold ("untrained network"); empty for nothing.

    Attributes:
        height, width: of the annotated frames; both even.
    """

    def __init__(self, height: int, width: int, *, rows: int, title: str, warning: str = "") -> None:
        scale = min(max(1.0, _NARROWEST / width), _LONGEST / max(height, width))
        self.width = max(2, round(width * scale / 2) * 2)
        self._picture_height = max(1, round(height * scale))
        self._size = max(11, min(22, round(self.width / 30)))
        self._line = round(self._size * 1.65)
        self._margin = round(self._size * 0.8)
        self._rows = rows
        self._title = title
        self._warning = warning
        panel = 2 * self._margin + self._line * (rows + 1 + bool(warning))
        self.height = (self._picture_height + panel + 1) // 2 * 2

    def draw(
        self, image: np.ndarray, *, time_seconds: float, index: int, scores: Sequence[tuple[str, float]], note: str = ""
    ) -> np.ndarray:
        """The annotated frame, uint8 RGB [height, width, 3].

        Args:
            image: uint8 RGB [H, W, 3].
            time_seconds, index: of the frame.
            scores: label and probability of the leading classes, best first; as many as there are rows are shown.
            note: said where the first class would stand, for frames that have no scores.
        """
        canvas = np.empty((self.height, self.width, 3), dtype=np.uint8)
        canvas[...] = BACKGROUND
        canvas[: self._picture_height] = _fitted(image, self._picture_height, self.width)
        size, margin = self._size, self._margin
        left, right = margin, self.width - margin
        baseline = self._picture_height + margin + size

        clock = f"{time_seconds:.2f} s   frame {index}"
        draw_text(canvas, clock, left, baseline, size, FAINT)
        room = right - left - text_width(clock, size) - margin
        title = _shortened(self._title, room, size)
        draw_text(canvas, title, right - text_width(title, size), baseline, size, FAINT)
        if self._warning:
            baseline += self._line
            warning = _shortened(self._warning, right - left, size, bold=True)
            draw_text(canvas, warning, left, baseline, size, WARNING, bold=True)

        if note and not scores:
            baseline += self._line
            draw_text(canvas, _shortened(note, right - left, size), left, baseline, size, FAINT)

        number_width = text_width("100.0 %", size)
        bar_left = left + round((right - left) * 0.42)
        bar_right = right - number_width - margin
        for rank, (label, score) in enumerate(scores[: self._rows]):
            baseline += self._line
            leading = rank == 0
            ink = TEXT if leading else FAINT
            draw_text(canvas, _shortened(label, bar_left - left - margin, size), left, baseline, size, ink)
            top, bottom = baseline - round(size * 0.66), baseline - round(size * 0.04)
            blend_rectangle(canvas, bar_left, top, bar_right, bottom, TRACK)
            filled = bar_left + (bar_right - bar_left) * min(max(score, 0.0), 1.0)
            blend_rectangle(canvas, bar_left, top, filled, bottom, LEADING if leading else OTHERS)
            number = f"{100 * score:.1f} %"
            draw_text(canvas, number, right - text_width(number, size), baseline, size, ink)
        return canvas


def _shortened(text: str, room: int, size: int, *, bold: bool = False) -> str:
    """``text``, or as much of its start as fits into ``room`` pixels with an ellipsis."""
    if text_width(text, size, bold=bold) <= room:
        return text
    keep = len(text)
    while keep > 0 and text_width(text[:keep].rstrip() + "…", size, bold=bold) > room:
        keep -= 1
    return text[:keep].rstrip() + "…" if keep else ""


def _fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    scaled = F.interpolate(picture, size=(height, width), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
