"""The setuptools commands of the build: what ``rcu_ops_build`` compiles goes where setuptools expects extensions."""

from __future__ import annotations

import shutil
from pathlib import Path

import rcu_ops_build
from rcu_ops_build import LIBRARY, RECORD, ROOT, Plan
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

LIBRARY_EXTENSION = "rcu_ops." + LIBRARY.removesuffix(".so")
NATIVE_EXTENSION = "rcu_ops._native"


def extensions(plan: Plan) -> list[Extension]:
    """Return what the plan compiles. An empty list makes a wheel that is honestly tagged as pure Python."""
    if plan.kind == "none":
        return []
    cuda = rcu_ops_build.cuda_sources() if plan.kind == "cuda" else []
    found = [Extension(LIBRARY_EXTENSION, [*rcu_ops_build.library_sources(), *cuda])]
    if plan.native:
        found.append(Extension(NATIVE_EXTENSION, rcu_ops_build.native_sources()))
    return found


def commands(plan: Plan) -> dict[str, type]:
    """Return setuptools commands that carry out ``plan``."""

    class BuildPython(build_py):
        """Adds the record of the build, and starts from an empty directory."""

        def run(self) -> None:
            if plan.kind == "none":  # otherwise BuildExtensions runs, and says what it does
                rcu_ops_build.say(rcu_ops_build.describe(plan))
            if self.editable_mode:
                _remove_compiled_except(plan)
                rcu_ops_build.write_record(plan, ROOT / "rcu_ops" / RECORD)
            else:
                directory = Path(self.build_lib) / "rcu_ops"
                # setuptools never removes files of earlier builds from here, and packs all it finds.
                shutil.rmtree(directory, ignore_errors=True)
                rcu_ops_build.write_record(plan, directory / RECORD)
            super().run()

    class BuildExtensions(build_ext):
        """Compiles with ``rcu_ops_build``: several files at once without ninja, CUDA beside a torch without CUDA."""

        def get_ext_filename(self, fullname: str) -> str:
            # The library is no Python module: no Python version in its name.
            if fullname.split(".")[-1] == LIBRARY.removesuffix(".so"):
                return str(Path(*fullname.split(".")[:-1], LIBRARY))
            return str(super().get_ext_filename(fullname))

        def build_extensions(self) -> None:
            rcu_ops_build.say(rcu_ops_build.describe(plan))
            torch = rcu_ops_build.require_torch()
            objects = ROOT / "build" / "objects"
            make = {LIBRARY_EXTENSION: rcu_ops_build.library_target, NATIVE_EXTENSION: rcu_ops_build.native_target}
            rcu_ops_build.build(
                {Path(self.get_ext_fullpath(ext.name)): make[ext.name](plan, torch, objects) for ext in self.extensions}
            )

        def run(self) -> None:
            super().run()
            if self.inplace:  # `python setup.py build_ext --inplace` runs no build_py
                rcu_ops_build.write_record(plan, ROOT / "rcu_ops" / RECORD)

    class SourceDistribution(sdist):
        """Carries the commit, since a source distribution has no git history to ask."""

        def make_release_tree(self, base_dir: str, files: list[str]) -> None:
            super().make_release_tree(base_dir, files)
            commit = Path(base_dir) / rcu_ops_build.COMMIT_FILE
            commit.unlink(missing_ok=True)
            commit.write_text(rcu_ops_build.read_commit() + "\n", encoding="utf-8")

    return {"build_py": BuildPython, "build_ext": BuildExtensions, "sdist": SourceDistribution}


def _remove_compiled_except(plan: Plan) -> None:
    """Remove what an earlier build left in the source tree and this one does not replace: it would be loaded."""
    stale = [] if plan.kind != "none" else [ROOT / "rcu_ops" / LIBRARY]
    if not plan.native:
        stale += (ROOT / "rcu_ops").glob("_native.*.so")
    for path in stale:
        path.unlink(missing_ok=True)
