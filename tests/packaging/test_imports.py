"""Importing rcu_ops is light: no GPU is touched, and no Triton, video, plotting or network library is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.packaging.conftest import ROOT, clean_environment

# What `import torch` itself loads is torch's business: only what comes on top of it counts.
SCRIPT = """
import json, sys
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a GPU was asked for at import")

for name in ("_cuda_init", "_cuda_getDeviceCount"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, refuse)
for name in ("is_available", "device_count", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, refuse)

before = set(sys.modules)
exec(sys.argv[1])
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"loaded": sorted(loaded), "cuda": torch.cuda.is_initialized()}))
"""
HEAVY = {"triton", "av", "cv2", "matplotlib", "torchvision", "torchcodec", "pytest", "pybind11", "PIL"}


@pytest.mark.parametrize(
    "statement",
    [
        "import rcu_ops",
        "import rcu_ops.nn",
        "import rcu_ops.models",
        "import rcu_ops.streaming",
        "import rcu_ops.video",
        "import rcu_ops.analysis",
        "from rcu_ops.cli import build_parser; build_parser()",
    ],
)
def test_import_is_light(statement: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, statement], cwd=ROOT, env=clean_environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert "rcu_ops" in report["loaded"]
    assert not HEAVY & set(report["loaded"])
    assert report["cuda"] is False
