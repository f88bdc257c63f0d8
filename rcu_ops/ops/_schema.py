"""The operator library ``rcu_ops`` of torch.library: schemas live in Python, binaries only add kernels.

Every op module defines its schemas here first; :func:`rcu_ops.ops` then loads the binary and gives each operator that
has no compiled kernel for a device its reference implementation, so that exported programs and compiled graphs run
everywhere.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from rcu_ops import _library

library = torch.library.Library("rcu_ops", "DEF")
_reference_kernels: dict[str, Callable[..., Any]] = {}
_cuda_kernels: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Define one operator.

    Args:
        schema: "name(arguments) -> returns".
        fake: shapes, dtypes and strides of the results, for meta tensors, compile and export.
        reference: the same signature in plain PyTorch, run where no compiled kernel is present.
        cuda: the same signature, a CUDA kernel that comes from Python instead of the binary (Triton), or None.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"rcu_ops::{name}", fake, lib=library)
    _reference_kernels[name] = reference
    if cuda is not None:
        _cuda_kernels[name] = cuda


def names() -> list[str]:
    """Every operator of the library ``rcu_ops``, backward passes and those of Triton included."""
    return list(_reference_kernels)


def load_kernels() -> None:
    """Load the binary; where it brings no kernel, the reference implementation becomes the operator's kernel."""
    _library.load()
    _library.record_compiled_kernels(list(_reference_kernels))
    for name, reference in _reference_kernels.items():
        for key in ("CPU", "CUDA"):
            if not _library.has_kernel(name, key):
                library.impl(name, _cuda_kernels.get(name, reference) if key == "CUDA" else reference, key)


def flop_formula(operator: str, formula: Callable[..., int]) -> None:
    """Register a FLOP count (2 per multiply-add) for torch.utils.flop_counter, without importing that module.

    Importing it would import Triton, so the registration waits until somebody else imports it.

    Args:
        operator: name in the ``rcu_ops`` namespace.
        formula: takes the shapes of the operator's arguments (other arguments as they are) and ``out_shape``.
    """

    def register(module: ModuleType) -> None:
        module.register_flop_formula(getattr(torch.ops.rcu_ops, operator))(formula)

    _when_imported("torch.utils.flop_counter", register)


_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}


def _when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        action(sys.modules[name])
        return
    _waiting.setdefault(name, []).append(action)
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the real loader run and calls the waiting actions after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        actions = _waiting.pop(fullname)
        if not _waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_then_act(module: ModuleType) -> None:
                exec_module(module)
                for action in actions:
                    action(module)

            spec.loader.exec_module = exec_then_act  # type: ignore[method-assign]
        return spec
