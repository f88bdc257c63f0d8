"""PEP 517 / PEP 660 backend of rcu-ops: setuptools, with requirements asked for only when they are missing.

A frontend that isolates the build (pip's default) hides the target environment and installs what the project requires
into a scratch environment. For a PyTorch extension that means a second torch of several gigabytes, and no build at all
without a network, although the torch to build against is installed. So ``[build-system] requires`` is empty, and this
backend

1. puts the target environment's site-packages back on ``sys.path``, behind the scratch environment's (the interpreter
   is still the target's own, so its prefixes tell where they are), and
2. asks for torch and setuptools only if they cannot be found there.

What it builds against is then the user's own torch where there is one. Where a torch has to be fetched, or the frontend
builds in an environment of its own (``python -m build``, uv), the result still loads under the user's torch, because
the compiled library uses PyTorch's stable ABI alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import site
import sys
from pathlib import Path
from typing import Any

import rcu_ops_build

# 77: the first setuptools that understands the license expression in pyproject.toml; it also needs no separate `wheel`
# package.
SETUPTOOLS_MINIMUM = (77, 0, 3)


def target_site_packages() -> list[str]:
    """Return the site-packages directories of the interpreter's environment, hidden by isolation or not."""
    directories = list(site.getsitepackages())
    if sys.prefix == sys.base_prefix:  # outside a virtual environment, packages may be installed for the user alone
        directories.append(site.getusersitepackages())
    return [directory for directory in directories if Path(directory).is_dir()]


def expose_target_environment() -> None:
    """Append the target environment's site-packages, and what their ``.pth`` files name, to ``sys.path``."""
    for directory in target_site_packages():
        if directory not in sys.path:
            site.addsitedir(directory)


def _installed_setuptools() -> tuple[int, ...] | None:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def missing_requirements(*, compile_kernels: bool) -> list[str]:
    """Return the requirements that a build needs and that neither the scratch nor the target environment has.

    Args:
        compile_kernels: whether the build compiles anything, and so needs a torch to compile against.
    """
    requirements = []
    if (_installed_setuptools() or ()) < SETUPTOOLS_MINIMUM:
        requirements.append("setuptools>=" + ".".join(map(str, SETUPTOOLS_MINIMUM)))
    if compile_kernels:
        torch = rcu_ops_build.find_torch()
        if torch is None or torch.release < rcu_ops_build.TORCH_MINIMUM:
            requirements.append("torch>=" + ".".join(map(str, rcu_ops_build.TORCH_MINIMUM)))
    return requirements


def _requirements_to_compile() -> list[str]:
    rcu_ops_build.require_writable()
    expose_target_environment()
    plan = rcu_ops_build.make_plan()
    return missing_requirements(compile_kernels=plan.kind != "none")


def _setuptools() -> Any:
    """Return ``setuptools.build_meta``, imported late: it may be there only since the hooks asked for it."""
    expose_target_environment()
    if missing := missing_requirements(compile_kernels=False):
        raise SystemExit(f"error: building rcu-ops needs {missing[0]}; install it, or let pip isolate the build")
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """PEP 517 hook: what building a wheel needs and the environment lacks."""
    return _requirements_to_compile()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """PEP 660 hook: what an editable install needs and the environment lacks."""
    return _requirements_to_compile()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """PEP 517 hook: what building a source distribution needs and the environment lacks."""
    expose_target_environment()
    return missing_requirements(compile_kernels=False)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    """PEP 517 hook."""
    return str(_setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    """PEP 660 hook."""
    return str(_setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 517 hook."""
    rcu_ops_build.require_writable()  # pip may not have asked for requirements
    return str(_setuptools().build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 660 hook."""
    rcu_ops_build.require_writable()  # pip may not have asked for requirements
    return str(_setuptools().build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """PEP 517 hook."""
    return str(_setuptools().build_sdist(sdist_directory, config_settings))
