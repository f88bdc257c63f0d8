"""Tables and pictures of measurements, written whole or not at all, in one plain style.

Pictures are drawn on a bare ``Figure`` with the Agg canvas: no pyplot, hence no display and no global state.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#5d3a9b",
    "#4d4d4d",
    "#b3a200",
    "#882255",
    "#a6d854",
    "#c2a5cf",
)
"""Colours that stay apart for colour-blind eyes and in grey print."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
GREY = "#999999"
INK = "#333333"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on leaving the block, and vanishes if the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: Any, indent: int = 1) -> None:
    """Write ``content`` as JSON, names in any script as they are.

    What Linux allows as a file's name and UTF-8 does not is escaped, and is the same name when it is read back.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a comma-separated table; floats are written so that reading them back gives the same float.

    Names of files that are no UTF-8 are written as they are, byte by byte.
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def new_figure(width: float = 6.4, height: float = 4.2, **subplots: Any) -> tuple[Figure, Any]:
    """A figure and its axes (``subplots`` as for ``Figure.subplots``) in the house style."""
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.05), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(**subplots)
    for one in [axes] if isinstance(axes, Axes) else axes.flat:
        tidy(one)
    return figure, axes


def tidy(axes: Axes) -> None:
    """Light grid, no box, small dark labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=GREY, labelcolor=INK)
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)


def series(index: int) -> dict[str, Any]:
    """Line style of the ``index``-th series: own colour and marker."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def integer_ticks(count: int, at_most: int = 20) -> list[int]:
    """Ticks 1..count, thinned by a whole step so that no more than ``at_most`` labels stand side by side."""
    return list(range(1, count + 1, -(-count // at_most)))


def legend(axes: Axes, entries: int) -> None:
    """A frameless legend where it hides least; above the plot when there are many entries."""
    if entries <= 4:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    else:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure as PNG at 150 dots per inch.

    Names of files and classes may stand in it as they are: a ``$`` begins no formula, and letters that the font lacks
    are drawn as boxes, as is what is no letter at all.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # The labels of logarithmic axes are formulas, which matplotlib writes when it draws.
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
        if not text.get_text().isprintable():  # bytes of a file's name that are no UTF-8, among others
            text.set_text(text.get_text().encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(temporary, format="png", dpi=150)
