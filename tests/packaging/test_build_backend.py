"""What the build decides: requirements, compilers, CUDA, forced choices, and that nothing goes wrong in silence."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.packaging.conftest import ROOT

import rcu_ops_backend  # isort: skip
import rcu_ops_build as build  # isort: skip

Program = Callable[[str, str], Path]

NVCC = """
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  *-dryrun*) echo "#\\$ TOP={top}" >&2 ;;
esac
"""


GCC = """
case "$*" in
  *-dumpversion*) echo {release} ;;
  *) printf '{name}\\nCopyright (C) 2026 Free Software Foundation, Inc.\\n' ;;
esac
"""


@pytest.fixture
def cxx(program: Program) -> str:
    """A PATH with a C++ compiler and nothing else."""
    return str(program("cxx/c++", GCC.format(name="c++ (made up) 99.1", release="99")).parent)


@pytest.fixture
def toolkit(program: Program, tmp_path: Path) -> Path:
    """A CUDA toolkit."""
    program("toolkit/bin/nvcc", NVCC.format(top=tmp_path / "toolkit"))
    return tmp_path / "toolkit"


@pytest.fixture(autouse=True)
def no_default_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "CUDA_DEFAULT_HOME", tmp_path / "nowhere")


@pytest.fixture
def cuda_tree(tmp_path: Path) -> Path:
    """A source tree with one CUDA kernel."""
    path = tmp_path / "tree" / "csrc" / "cuda" / "kernel.cu"
    path.parent.mkdir(parents=True)
    path.touch()
    return tmp_path / "tree"


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")


@pytest.mark.parametrize(("bits", "flags"), [(None, []), ("64", []), ("32", ["-DRCU_OPS_OFFSETS_32"])])
def test_bits_of_offsets(bits: str | None, flags: list[str]) -> None:
    assert build.offset_flags({} if bits is None else {"RCU_OPS_OFFSETS": bits}) == flags
    with pytest.raises(SystemExit, match="RCU_OPS_OFFSETS: expected 64 or 32, got '16'"):
        build.offset_flags({"RCU_OPS_OFFSETS": "16"})


# ----------------------------------------------------------------------------------------------------- other processors


def compiler_for_vectors() -> build.Compiler:
    found = build.find_compiler()
    if not isinstance(found, build.Compiler):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("source", [name for name in build.library_sources() if re.search(r"_(avx|amx)", name)])
def test_an_instruction_sets_file_is_empty_on_other_processors(source: str) -> None:
    compiler = compiler_for_vectors()
    # No word about the processor, and no header.
    preprocess = [*compiler.command, "-E", "-P", "-undef", "-nostdinc", source]
    result = subprocess.run(preprocess, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_portable_kernels_multiply_and_add_in_one_instruction_where_there_is_one(tmp_path: Path) -> None:
    source = tmp_path / "multiply.cpp"
    source.write_text(
        "typedef float V __attribute__((vector_size(16)));\n"
        "void f(V* acc, const V* a, const V* b, int n) { for (int i = 0; i < n; ++i) acc[0] = a[i] * b[i] + acc[0]; }\n"
    )
    compiler = compiler_for_vectors()
    processor = ["-mfma"] if platform.machine() == "x86_64" else []
    command = [*compiler.command, *build.PORTABLE_FLAGS, *processor, "-S", "-o", "-", str(source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "vfmadd" in text or "fmla" in text


# ----------------------------------------------------------------------------------------------------- forced choices


@pytest.mark.parametrize("value", ["gpu", "1", "cpu,cuda"])
def test_unknown_choice_is_an_error(value: str) -> None:
    with pytest.raises(SystemExit, match=rf"RCU_OPS_BUILD: expected cuda, cpu, none or auto, got '{value}'"):
        build.make_plan({"RCU_OPS_BUILD": value})


@pytest.mark.parametrize("value", ["cpu", "cuda"])
@linux_only
def test_forced_choice_without_compiler_is_an_error(value: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"RCU_OPS_BUILD={value}: no C\+\+ compiler: none of c\+\+"):
        build.make_plan({"RCU_OPS_BUILD": value, "PATH": str(tmp_path)})


@linux_only
def test_forced_cuda_without_nvcc_is_an_error(cxx: str, cuda_tree: Path) -> None:
    with pytest.raises(SystemExit, match="RCU_OPS_BUILD=cuda: no CUDA compiler: nvcc is not on PATH"):
        build.make_plan({"RCU_OPS_BUILD": "cuda", "PATH": cxx}, cuda_tree)


@linux_only
def test_forced_cuda_without_kernels_is_an_error(cxx: str, toolkit: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="RCU_OPS_BUILD=cuda: this source tree has no CUDA kernels"):
        build.make_plan({"RCU_OPS_BUILD": "cuda", "PATH": cxx, "CUDA_HOME": str(toolkit)}, tmp_path / "empty")


def test_none_looks_for_nothing() -> None:
    plan = build.make_plan({"RCU_OPS_BUILD": "none", "CXX": "does-not-exist", "CUDA_HOME": "/does/not/exist"})
    assert (plan.kind, plan.compiler, plan.cuda) == ("none", None, None)
    assert plan.missing == ("RCU_OPS_BUILD=none asked for no compiled part",)


@linux_only
def test_forced_cpu_ignores_cuda(cxx: str, toolkit: Path, cuda_tree: Path) -> None:
    plan = build.make_plan({"RCU_OPS_BUILD": "cpu", "PATH": cxx, "CUDA_HOME": str(toolkit)}, cuda_tree)
    assert (plan.kind, plan.cuda, plan.architectures) == ("cpu", None, ())


# ------------------------------------------------------------------------------------------------------------ compilers


@linux_only
def test_no_compiler_installs_without_compiled_parts_and_says_so(tmp_path: Path) -> None:
    plan = build.make_plan({"PATH": str(tmp_path)})
    assert plan.kind == "none"
    assert "no C++ compiler: none of c++, g++ is on PATH and CXX is not set" in build.describe(plan)
    assert build.make_record(plan)["reason"] == plan.missing[0]


@linux_only
def test_compiler_named_by_cxx_that_is_not_there(cxx: str) -> None:
    plan = build.make_plan({"PATH": cxx, "CXX": "/does/not/exist/c++"})
    assert plan.kind == "none"
    assert plan.missing == ("no C++ compiler: CXX='/does/not/exist/c++' was not found",)


@linux_only
@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('echo "Debian clang version 14.0.6"', "Debian clang version 14.0.6"),
        (GCC.format(name="", release="10"), "GCC 10"),
    ],
)
def test_compiler_that_cannot_compile_the_kernels_is_none(program: Program, body: str, name: str) -> None:
    path = program("other/c++", body).parent
    plan = build.make_plan({"PATH": str(path)})
    assert plan.kind == "none"
    assert plan.missing == (f"no C++ compiler that serves: c++ is {name}, and GCC 11 or later is needed",)
    with pytest.raises(SystemExit, match=r"RCU_OPS_BUILD=cpu: no C\+\+ compiler that serves: c\+\+ is "):
        build.make_plan({"RCU_OPS_BUILD": "cpu", "PATH": str(path)})
    program("other/g++", GCC.format(name="g++ (made up) 99.1", release="99"))
    compiler = build.make_plan({"RCU_OPS_BUILD": "cpu", "PATH": str(path)}).compiler
    assert compiler == build.Compiler(("g++",), "g++ (made up) 99.1")


@linux_only
def test_broken_compiler_is_an_error(program: Program) -> None:
    path = program("broken/c++", "echo no >&2; exit 3").parent
    with pytest.raises(SystemExit, match=r"the C\+\+ compiler c\+\+ does not run"):
        build.make_plan({"PATH": str(path)})


@linux_only
def test_missing_python_headers_leave_out_the_native_module_alone(cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_python_headers", lambda: None)
    plan = build.make_plan({"RCU_OPS_BUILD": "cpu", "PATH": cxx})
    assert plan.kind == "cpu"
    assert not plan.native
    assert "Python.h" in plan.missing[0]


# ----------------------------------------------------------------------------------------------------------------- CUDA


@linux_only
def test_nvcc_makes_a_cuda_build(cxx: str, toolkit: Path, cuda_tree: Path) -> None:
    plan = build.make_plan({"PATH": os.pathsep.join([cxx, str(toolkit / "bin")])}, cuda_tree)
    assert plan.kind == "cuda"
    assert plan.cuda == build.Cuda(toolkit.resolve(), "12.8")
    assert plan.architectures == ("sm_80", "sm_90a", "compute_90")
    assert plan.missing == ()


def test_wrapper_script_is_resolved_to_its_toolkit(program: Program, toolkit: Path) -> None:
    wrapper = program("wrapper/nvcc", f'exec "{toolkit}/bin/nvcc" "$@"')
    assert build.find_cuda({"PATH": str(wrapper.parent)}) == build.Cuda(toolkit.resolve(), "12.8")


def test_cuda_home_wins_over_path(program: Program, toolkit: Path, tmp_path: Path) -> None:
    program("other/bin/nvcc", NVCC.format(top=tmp_path / "other"))
    found = build.find_cuda({"PATH": str(tmp_path / "other" / "bin"), "CUDA_HOME": str(toolkit)})
    assert found == build.Cuda(toolkit, "12.8")


def test_cuda_home_without_nvcc_is_not_passed_over(toolkit: Path, tmp_path: Path) -> None:
    found = build.find_cuda({"PATH": str(toolkit / "bin"), "CUDA_HOME": str(tmp_path / "gone")})
    assert isinstance(found, str)
    assert "has no bin/nvcc" in found


def test_old_toolkit_is_refused(program: Program, tmp_path: Path) -> None:
    program("old/bin/nvcc", 'echo "Cuda compilation tools, release 11.4, V11.4.1"')
    found = build.find_cuda({"CUDA_HOME": str(tmp_path / "old")})
    assert found == "no CUDA compiler: nvcc is release 11.4, at least 12.0 is needed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("sm_80", "sm_90a", "compute_90")),
        ("8.0", ("sm_80",)),
        ("8.0;9.0a", ("sm_80", "sm_90a")),
        ("8.0, 9.0+PTX", ("sm_80", "sm_90", "compute_90")),
        ("7.0 7.5 8.6 10.0a", ("sm_86", "sm_100a")),
        ("Ampere;Hopper", ("sm_80", "sm_86", "compute_86", "sm_90", "compute_90")),
        ("8.0;8.0", ("sm_80",)),
    ],
)
def test_architectures(text: str, expected: tuple[str, ...]) -> None:
    assert build.find_architectures({"TORCH_CUDA_ARCH_LIST": text}) == expected


@pytest.mark.parametrize(
    ("source", "architectures", "expected"),
    [
        (
            "csrc/cuda/stores.cu",
            build.DEFAULT_ARCHITECTURES,
            ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[sm_90,compute_90]", "SM90A", "EACH_ARCHITECTURE"],
        ),
        ("csrc/cuda/op.cu", build.DEFAULT_ARCHITECTURES, ["arch=compute_80,code=[sm_80,sm_90,compute_80]", "SM90A"]),
        ("csrc/cuda/op_sm90.cu", build.DEFAULT_ARCHITECTURES, ["arch=compute_90a,code=sm_90a", "SM90A"]),
        ("csrc/cuda/op_sm90.cu", ("sm_80", "sm_90"), ["arch=compute_80,code=[sm_80,sm_90]"]),
        ("csrc/cuda/op.cu", ("sm_100a", "sm_86"), ["arch=compute_86,code=[sm_100,sm_86]"]),
        ("csrc/cuda/op.cu", ("sm_86", "sm_120", "compute_120"), ["arch=compute_86,code=[sm_86,sm_120,compute_86]"]),
    ],
)
def test_architecture_flags(tmp_path, source: str, architectures: tuple[str, ...], expected: list[str]) -> None:
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    includes = '#include "cuda/device/matrix_store.h"\n' if "stores" in source else ""
    (tmp_path / source).write_text('#include "cuda/device/matrix_copy.h"\n' + includes)
    wanted = [f"-gencode={part}" if part.startswith("arch") else f"-DRCU_OPS_{part}" for part in expected]
    assert build.architecture_flags(source, architectures, tmp_path) == wanted


@pytest.mark.parametrize("text", ["native", "all", "sm_90", "9", "8.0+ptx"])
def test_unreadable_architecture_is_an_error(text: str) -> None:
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected entries like"):
        build.find_architectures({"TORCH_CUDA_ARCH_LIST": text})


@linux_only
def test_only_unsupported_architectures(cxx: str, toolkit: Path, cuda_tree: Path) -> None:
    environment = {"PATH": cxx, "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "7.0;7.5"}
    plan = build.make_plan(environment, cuda_tree)
    assert plan.kind == "cpu"
    assert "names no architecture the kernels support" in plan.missing[-1]
    with pytest.raises(SystemExit, match=r"RCU_OPS_BUILD=cuda: TORCH_CUDA_ARCH_LIST='7\.0;7\.5' names no architecture"):
        build.make_plan({**environment, "RCU_OPS_BUILD": "cuda"}, cuda_tree)


# --------------------------------------------------------------------------------------------------------- requirements


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which setuptools and torch are installed."""

    def set_versions(*, setuptools: str | None, torch: str | None) -> None:
        def version(name: str) -> str:
            assert name == "setuptools"
            if setuptools is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return setuptools

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(build, "find_torch", lambda: None if torch is None else build.Torch(Path("torch"), torch))

    return set_versions


@pytest.mark.parametrize(
    ("setuptools", "torch_version", "expected"),
    [
        ("84.2.1", "2.13.0+cpu", []),
        ("77.0.3", "2.11.0a0+git1234", []),
        (None, "2.13.0+cpu", ["setuptools>=77.0.3"]),
        ("65.5.0", "2.13.0+cpu", ["setuptools>=77.0.3"]),
        ("84.2.1", None, ["torch>=2.11"]),
        ("84.2.1", "2.10.1+cu128", ["torch>=2.11"]),
        (None, None, ["setuptools>=77.0.3", "torch>=2.11"]),
    ],
)
@pytest.mark.parametrize("hook", ["wheel", "editable"])
@linux_only
def test_requirements_are_asked_for_only_when_missing(
    hook: str,
    setuptools: str | None,
    torch_version: str | None,
    expected: list[str],
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    cxx: str,
) -> None:
    installed(setuptools=setuptools, torch=torch_version)
    monkeypatch.setenv("PATH", cxx)
    monkeypatch.setenv("RCU_OPS_BUILD", "cpu")
    monkeypatch.delenv("CXX", raising=False)
    assert getattr(rcu_ops_backend, f"get_requires_for_build_{hook}")() == expected


def test_torch_is_not_fetched_to_compile_nothing(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(setuptools=None, torch=None)
    monkeypatch.setenv("RCU_OPS_BUILD", "none")
    assert rcu_ops_backend.get_requires_for_build_wheel() == ["setuptools>=77.0.3"]
    monkeypatch.setenv("RCU_OPS_BUILD", "auto")
    assert rcu_ops_backend.get_requires_for_build_sdist() == ["setuptools>=77.0.3"]


def test_forced_choice_fails_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("RCU_OPS_BUILD", "cpu")
    with pytest.raises(SystemExit, match="RCU_OPS_BUILD=cpu"):
        rcu_ops_backend.get_requires_for_build_wheel()


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "build_wheel", "build_editable"])
@pytest.mark.parametrize("built", [False, True])
def test_a_read_only_source_tree_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hook: str, built: bool
) -> None:
    place = tmp_path / "build" if built else tmp_path
    place.mkdir(exist_ok=True)
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (place, os.W_OK))
    monkeypatch.setattr(build.require_writable, "__defaults__", (tmp_path,))
    arguments = [] if hook.startswith("get") else ["unused"]
    with pytest.raises(build.BuildError, match=f"{place} cannot be written to, .*copy the source tree first"):
        getattr(rcu_ops_backend, hook)(*arguments)


def test_old_setuptools_without_isolation_is_an_error(installed: Callable[..., None]) -> None:
    installed(setuptools="65.5.0", torch="2.13.0")
    with pytest.raises(SystemExit, match=r"building rcu-ops needs setuptools>=77\.0\.3"):
        rcu_ops_backend.build_wheel("unused")


@pytest.mark.parametrize(("version", "found"), [(None, "has none"), ("2.10.0", r"has 2\.10\.0")])
def test_compiling_without_a_usable_torch_is_an_error(
    version: str | None, found: str, installed: Callable[..., None]
) -> None:
    installed(setuptools=None, torch=version)
    with pytest.raises(SystemExit, match=rf"needs torch >= 2\.11, and this environment {found}: install it first"):
        build.require_torch()


def test_torch_is_found_without_importing_it() -> None:
    found = build.find_torch()
    assert found is not None
    assert found.version == torch.__version__
    assert found.path == Path(torch.__file__).parent


# ------------------------------------------------------------------------------------------------------------ compiling


def test_files_of_an_instruction_set_include_headers_before_their_target() -> None:
    """A header read after the target pragma would bring functions for that instruction set under names of all."""
    sets = [path for path in (build.ROOT / "csrc/cpu").glob("*.cpp") if "#pragma GCC target" in path.read_text()]
    assert len(sets) > 5

    def included(path: Path, start: int = 0) -> set[str]:
        found = set(re.findall(r"#include (\S+)", path.read_text()[start:]))
        return found.union(*(included(path.with_name(name.strip('"'))) for name in found if name.startswith('"')))

    for path in sets:
        text = path.read_text()
        before = text.partition("#pragma GCC target")[0]
        assert re.findall(r"#include (\S+)", before) == ['"kernels.h"'], path
        after = included(path, len(before))
        assert not [name for name in after if name.startswith("<")], path
        assert not [name for name in after if "#pragma once" in path.with_name(name.strip('"')).read_text()], path


def test_one_target_for_files_that_are_compiled_together() -> None:
    """Templates are instantiated at the end of them all, for the last target."""
    groups = [group for group in build.compiled_together(build.library_sources()) if len(group) > 1]
    assert len(groups) > 4
    for group in groups:
        texts = [(build.ROOT / source).read_text() for source in group]
        assert len({tuple(re.findall(r"#pragma GCC target.*", text)) for text in texts}) == 1, group


# Stands in for a compiler and a linker: copies the source to the output, writes the dependency file, counts its calls.
FAKE_COMPILER = """
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do
  case "$1" in
    -c) source="$2"; shift ;;
    -o) output="$2"; shift ;;
    -MF) dependencies="$2"; shift ;;
  esac
  shift
done
echo "made" > "$output"
if [ -n "$dependencies" ]; then echo "$output: $source {header}" > "$dependencies"; fi
"""


def test_only_what_changed_is_compiled_again(program: Program, tmp_path: Path) -> None:
    source, header, log = tmp_path / "a.cpp", tmp_path / "a header.h", tmp_path / "log"
    source.touch()
    header.touch()
    compiler = program("c++", FAKE_COMPILER.format(log=log, header=str(header).replace(" ", "\\\\ ")))
    output = tmp_path / "out" / "a.so"

    def compile_with(*flags: str) -> int:
        """Build, and return how many files were compiled for it."""
        log.unlink(missing_ok=True)
        job = build._job(str(source), [str(compiler), *flags], tmp_path / "objects", "key")
        build.build({output: build.Target((job,), (str(compiler), "-shared"))}, os.environ)
        return sum(" -c " in f" {line}" for line in log.read_text().splitlines())

    assert compile_with() == 1
    assert output.read_text() == "made\n"
    assert compile_with() == 0
    assert compile_with("-O1") == 1
    assert compile_with() == 0
    time.sleep(0.01)
    header.touch()
    assert compile_with() == 1
    header.unlink()
    assert compile_with() == 1
    assert sorted(path.suffix for path in (tmp_path / "objects").iterdir()) == [".d", ".d", ".o", ".o"]


def test_compile_error_is_loud_and_leaves_nothing(program: Program, tmp_path: Path) -> None:
    compiler = program("c++", 'echo "a.cpp:1: error: no such thing"; exit 1')
    job = build._job("a.cpp", [str(compiler)], tmp_path / "objects", "key")
    with pytest.raises(SystemExit, match="RCU_OPS_BUILD=none") as failure:
        build.build({tmp_path / "out" / "a.so": build.Target((job,), (str(compiler),))}, os.environ)
    assert "a.cpp:1: error: no such thing" in str(failure.value)
    assert not list((tmp_path / "objects").iterdir())
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- record


def test_record_is_reproducible_and_names_no_place(cxx: str, toolkit: Path, cuda_tree: Path) -> None:
    plan = build.make_plan({"PATH": cxx, "CUDA_HOME": str(toolkit)}, cuda_tree)
    record = build.make_record(plan, ROOT)
    assert build.make_record(plan, ROOT) == record
    text = json.dumps(record)
    for place in (ROOT, toolkit, cxx, Path.home(), sys.prefix, torch.__path__[0]):
        assert str(place) not in text
    assert record["architectures"] == ["sm_80", "sm_90a", "compute_90"]
    assert record["cuda"] == "12.8"
    assert record["compiler"] == "c++ (made up) 99.1"
    assert record["torch"] == torch.__version__


def test_record_is_written_whole(tmp_path: Path) -> None:
    plan = build.make_plan({"RCU_OPS_BUILD": "none"})
    build.write_record(plan, tmp_path / "rcu_ops" / "record.json")
    assert json.loads((tmp_path / "rcu_ops" / "record.json").read_text()) == build.make_record(plan)
    assert [path.name for path in (tmp_path / "rcu_ops").iterdir()] == ["record.json"]


def test_commit_without_git(tmp_path: Path) -> None:
    assert build.read_commit(tmp_path) == "unknown"
    (tmp_path / build.COMMIT_FILE).parent.mkdir()
    (tmp_path / build.COMMIT_FILE).write_text("0123abcd\n")
    assert build.read_commit(tmp_path) == "0123abcd"


def test_source_digest_follows_the_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    source = tmp_path / "csrc" / "cpu" / "a.cpp"
    source.write_text("int a;")
    before = build.hash_sources(tmp_path)
    source.write_text("int b;")
    assert build.hash_sources(tmp_path) != before
    source.write_text("int a;")
    assert build.hash_sources(tmp_path) == before
