"""Build of rcu-ops: see pyproject.toml for the metadata and build_backend/ for how kernels are compiled."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import rcu_ops_build  # noqa: E402
import rcu_ops_commands  # noqa: E402

plan = rcu_ops_build.make_plan()

# triton_kernels/ is a room of its own in the source tree, and a part of rcu_ops when installed: as a top-level package
# its name belongs to the Triton project.
triton = ["rcu_ops.triton_kernels", *(f"rcu_ops.triton_kernels.{name}" for name in find_packages("triton_kernels"))]

setup(
    packages=[*find_packages(include=["rcu_ops", "rcu_ops.*"]), *triton],
    package_dir={"rcu_ops.triton_kernels": "triton_kernels"},
    ext_modules=rcu_ops_commands.extensions(plan),
    cmdclass=rcu_ops_commands.commands(plan),
)
