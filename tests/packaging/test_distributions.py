"""What is in a wheel and in a source distribution, and what an installed and an editable rcu_ops can import."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from rcu_ops._version import __version__
from tests.packaging.conftest import ROOT, call_backend, clean_environment, copy_source_tree

import rcu_ops_build  # isort: skip

pytestmark = pytest.mark.timeout(900)  # what is not compiled yet is compiled here, maybe on a busy machine

DIST_INFO = f"rcu_ops-{__version__}.dist-info"


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


def python_files() -> set[str]:
    """Every Python file of the source tree, under the name it must have once installed."""
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rcu_ops").rglob("*.py")}
    kernels = {f"rcu_ops/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    return package | kernels


def needs_compiler() -> None:
    if sys.platform != "linux" or isinstance(reason := rcu_ops_build.find_compiler(), str):
        pytest.skip(reason if sys.platform == "linux" else "kernels are compiled on Linux only")


@pytest.fixture(scope="module")
def pure_wheel(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without compiled parts, from a tree that holds leftovers of earlier builds."""
    for leftover in ("build/lib/rcu_ops/leftover.py", "rcu_ops/librcu_ops.so", "rcu_ops/_native.abi0.so"):
        path = source_tree / leftover
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (source_tree / "rcu_ops" / "_build_record.json").write_text('{"kind": "leftover"}')
    return call_backend(source_tree, "build_wheel", tmp_path_factory.mktemp("pure"), RCU_OPS_BUILD="none")


@pytest.fixture(scope="module")
def cpu_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree to compile in: the tests that use it share the compiled objects."""
    needs_compiler()
    return copy_source_tree(tmp_path_factory.mktemp("cpu-source") / "rcu-ops")


@pytest.fixture(scope="module")
def cpu_wheel(cpu_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with the CPU kernels."""
    return call_backend(cpu_tree, "build_wheel", tmp_path_factory.mktemp("cpu"), RCU_OPS_BUILD="cpu")


@pytest.fixture(scope="module")
def source_distribution(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, from a tree that holds compiled files."""
    (source_tree / "rcu_ops" / "librcu_ops.so").touch()
    return call_backend(source_tree, "build_sdist", tmp_path_factory.mktemp("sdist"))


# --------------------------------------------------------------------------------------------------------------- wheels


def test_pure_wheel_holds_the_package_and_nothing_else(pure_wheel: Path) -> None:
    names = names_in(pure_wheel)
    metadata = {name for name in names if name.startswith(f"{DIST_INFO}/")}
    assert names - metadata == python_files() | {"rcu_ops/py.typed", "rcu_ops/_build_record.json"}
    assert {f"{DIST_INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")} <= metadata
    assert f"{DIST_INFO}/licenses/LICENSE" in metadata


def test_triton_kernels_is_no_top_level_package(pure_wheel: Path) -> None:
    names = names_in(pure_wheel)
    assert {name.split("/")[0] for name in names} == {"rcu_ops", DIST_INFO}
    assert "rcu_ops/triton_kernels/__init__.py" in names
    assert read(pure_wheel, f"{DIST_INFO}/top_level.txt").split() == ["rcu_ops"]


def test_pure_wheel_says_that_it_is_pure(pure_wheel: Path) -> None:
    assert pure_wheel.name == f"rcu_ops-{__version__}-py3-none-any.whl"
    record = json.loads(read(pure_wheel, "rcu_ops/_build_record.json"))
    assert record["kind"] == "none"
    assert record["reason"] == "RCU_OPS_BUILD=none asked for no compiled part"
    assert (record["library"], record["native"], record["torch"]) == (False, False, None)


def test_compiled_wheel(cpu_wheel: Path) -> None:
    native = "rcu_ops/_native" + str(sysconfig.get_config_var("EXT_SUFFIX"))
    record = json.loads(read(cpu_wheel, "rcu_ops/_build_record.json"))
    expected = {"rcu_ops/librcu_ops.so"} | ({native} if record["native"] else set())
    names = {name for name in names_in(cpu_wheel) if not name.startswith(f"{DIST_INFO}/")}
    assert names == python_files() | {"rcu_ops/py.typed", "rcu_ops/_build_record.json"} | expected
    assert record["kind"] == "cpu"
    assert record["library"]
    assert record["architectures"] == []
    # The native module is for one Python and one platform, and the name must say so.
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert cpu_wheel.name == f"rcu_ops-{__version__}-{tag}-{tag}-{platform}.whl"
    assert "Root-Is-Purelib: false" in read(cpu_wheel, f"{DIST_INFO}/WHEEL")


def test_metadata(pure_wheel: Path) -> None:
    metadata = Parser().parsestr(read(pure_wheel, f"{DIST_INFO}/METADATA"))
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {"all", "bench", "features", "flow", "plot", "test", "video"}
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">")[0] for line in always} == {"torch", "triton", "numpy", "safetensors"}
    assert "rcu-ops = rcu_ops.cli:main" in read(pure_wheel, f"{DIST_INFO}/entry_points.txt")


# -------------------------------------------------------------------------------------------------- source distribution


def test_source_distribution_can_be_built_and_tested_from(source_distribution: Path) -> None:
    with tarfile.open(source_distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        commit = archive.extractfile(f"rcu_ops-{__version__}/{rcu_ops_build.COMMIT_FILE}")
        assert commit is not None
        assert commit.read().decode().strip()
    needed = ["setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"]
    for folder, pattern in [
        ("rcu_ops", "*.py"),
        ("triton_kernels", "*.py"),
        ("build_backend", "*.py"),
        ("csrc", "*.*"),
        ("tests", "*.py"),
        ("benchmarks", "*.md"),  # tests hold the README's table and the list of kernels against them
        ("benchmarks", "*.json"),
    ]:
        needed += [
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        ]
    assert not set(needed) - names
    unwanted = (".so", ".pyc", ".o", "_build_record.json")
    assert not [name for name in names if name.endswith(unwanted) or name.split("/")[0] in (".git", "build", "dist")]


def test_wheel_from_source_distribution_equals_wheel_from_tree(
    source_distribution: Path, pure_wheel: Path, tmp_path: Path
) -> None:
    shutil.unpack_archive(source_distribution, tmp_path)
    tree = tmp_path / f"rcu_ops-{__version__}"
    wheel = call_backend(tree, "build_wheel", tmp_path / "out", RCU_OPS_BUILD="none")
    assert wheel.name == pure_wheel.name
    assert names_in(wheel) == names_in(pure_wheel)


# ------------------------------------------------------------------------------------------------------------- installs

PROBE = """
import importlib.util, json, rcu_ops, rcu_ops.triton_kernels
from rcu_ops import _library
native = _library.native()
print(json.dumps({
    "package": rcu_ops.__file__,
    "kernels": rcu_ops.triton_kernels.__file__,
    "record": _library.build_record(),
    "load_error": _library.load_error(),
    "native": native and native.build_info(),
}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of a new virtual environment that has this one's packages, so that nothing needs a network."""
    # Not by importing it: setuptools then leaves this process the old distutils, and Inductor fails.
    if not any(importlib.metadata.distributions(name="pip")):
        pytest.skip("pip is not installed")
    venv.create(tmp_path / "venv", with_pip=False)  # this environment's pip installs into it
    python = tmp_path / "venv" / "bin" / "python"
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(subprocess.run([python, "-c", command], capture_output=True, text=True).stdout.strip())
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "outer.pth").write_text("\n".join(sorted(own)) + "\n")
    return python


def install(python: Path, *arguments: str, **variables: str) -> str:
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    command = [*pip, "install", "-v", "--no-index", "--no-deps", "--no-cache-dir", *arguments]
    result = subprocess.run(command, env=clean_environment(**variables), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def probe(python: Path, directory: Path) -> dict[str, object]:
    command = [python, "-c", PROBE]
    result = subprocess.run(command, cwd=directory, env=clean_environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return report


def test_editable_install_with_isolation_and_without_network(environment: Path, cpu_tree: Path, tmp_path: Path) -> None:
    tree = cpu_tree
    output = install(environment, "-e", str(tree), RCU_OPS_BUILD="cpu")
    assert "rcu-ops: compiling CPU kernels" in output
    # From anywhere, and from the repository's root, where the source tree comes before what is installed.
    for directory in (tmp_path, tree):
        report = probe(environment, directory)
        assert Path(str(report["package"])) == tree / "rcu_ops" / "__init__.py"
        assert Path(str(report["kernels"])) == tree / "triton_kernels" / "__init__.py"
        assert report["load_error"] is None
        assert report["record"]["kind"] == "cpu"  # type: ignore[index]
        if report["record"]["native"]:  # type: ignore[index]
            assert report["native"]["kind"] == "cpu"  # type: ignore[index]
            assert report["native"]["version"] == __version__  # type: ignore[index]

    # Installing again without kernels must not leave the old ones to be loaded.
    output = install(environment, "-e", str(tree), RCU_OPS_BUILD="none")
    assert "rcu-ops: missing: RCU_OPS_BUILD=none asked for no compiled part" in output
    assert not list((tree / "rcu_ops").glob("*.so"))
    report = probe(environment, tmp_path)
    assert report["record"]["kind"] == "none"  # type: ignore[index]
    assert "RCU_OPS_BUILD=none asked for no compiled part" in str(report["load_error"])


def test_install_without_isolation(environment: Path, tmp_path: Path) -> None:
    tree = copy_source_tree(tmp_path / "tree")
    install(environment, "--no-build-isolation", str(tree), RCU_OPS_BUILD="none")
    report = probe(environment, tmp_path)
    assert Path(str(report["package"])).is_relative_to(tmp_path / "venv")
    assert Path(str(report["kernels"])).parent == Path(str(report["package"])).parent / "triton_kernels"
    command = [environment.with_name("rcu-ops"), "--version"]
    result = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, f"rcu-ops {__version__}"), result.stderr
