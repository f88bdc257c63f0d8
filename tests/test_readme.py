"""The README's Python runs, one piece after the other, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_in_the_readme_runs() -> None:
    pieces = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    features = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()
    cnn = nn.Sequential(*features, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))
    names: dict[str, Any] = {"my_3d_cnn": cnn}
    assert len(pieces) == 2
    for piece in pieces:
        exec(compile(piece, str(README), "exec"), names)
    assert names["scores"].shape == (1, 400, 1)
    clip = torch.randn(1, 3, 4, 16, 16)
    torch.testing.assert_close(names["fast"](clip), names["causal"](clip))
