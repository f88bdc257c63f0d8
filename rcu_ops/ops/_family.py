"""Registered operators that belong together, and the backends of the public functions made of them.

A :class:`Family` defines its operators once per kind of kernel: under their own names, which the binary's kernels
serve, and under names with a suffix for kernels from Python (Triton). All tensors of its operators have the batch
first, where no other vmap rule is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcu_ops import _library
from rcu_ops.ops import _checks, _evidence, _schema, _selftest, _transforms, _triton
from rcu_ops.ops._registry import Backend, Overtaken


@dataclass(frozen=True)
class Definition:
    """One operator.

    Attributes:
        signature: "(arguments) -> returns".
        fake: shapes, dtypes and strides of the results.
        reference: the operator in plain PyTorch.
        flops: its FLOP formula (2 per multiply-add), or None: it multiplies nothing that PyTorch's counter would count.
        backward: ``(family, ctx, *grads)`` to the arguments' gradients; None: nothing of it is differentiable.
        setup_context: ``(ctx, inputs, output)``.
        vmap: from the registered operator to its vmap rule; None: the mapped dimension joins the batch.
    """

    signature: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    flops: Callable[..., int] | None = None
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    vmap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


class Family:
    """Defines the operators and makes them differentiable, mappable and counted; ``family[name]`` calls one.

    Args:
        definitions: by name.
        suffix: after the operators' names.
        cuda: per operator a Python function that is its CUDA kernel.
    """

    def __init__(
        self, definitions: dict[str, Definition], suffix: str = "", cuda: dict[str, Callable[..., Any]] | None = None
    ) -> None:
        self._operators: dict[str, Callable[..., Any]] = {}
        self._functions: dict[str, type[torch.autograd.Function]] = {}
        self._calls: dict[str, Callable[..., Any]] = {}
        for name, definition in definitions.items():
            full = f"{name}{suffix}"
            _schema.define(
                f"{full}{definition.signature}",
                fake=definition.fake,
                reference=definition.reference,
                cuda=(cuda or {}).get(name),
            )
            operator = self._operators[name] = getattr(torch.ops.rcu_ops, full)
            if definition.flops is not None:
                _schema.flop_formula(full, definition.flops)
            rule = (definition.vmap or _fold_into_batch)(operator)
            torch.library.register_vmap(f"rcu_ops::{full}", rule, lib=_schema.library)
            if definition.backward is not None:
                self._differentiable(name, full, definition, rule)
            self._calls[name] = functools.partial(_transforms.call, operator, function=self._functions.get(name))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._calls[name]

    def _differentiable(self, name: str, full: str, definition: Definition, rule: Callable[..., Any]) -> None:
        operator, of_definition = self._operators[name], definition.backward
        setup: Any = definition.setup_context
        assert of_definition is not None and setup is not None

        gradients = functools.partial(of_definition, self)
        torch.library.register_autograd(f"rcu_ops::{full}", gradients, setup_context=setup, lib=_schema.library)

        # For torch.func.grad and its kin, which gradients registered with torch.library do not serve.
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return operator(*args)

            backward = staticmethod(gradients)
            setup_context = staticmethod(setup)
            vmap = staticmethod(rule)

        self._functions[name] = Function


def _fold_into_batch(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule where every tensor has the batch first: the mapped dimension joins the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size

        def folded(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            mapped = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            return mapped.flatten(0, 1)

        results = operator(*(folded(a, d) for a, d in zip(args, in_dims, strict=True)))
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, results.shape[0] // size)), 0
        return tuple(r.unflatten(0, (size, r.shape[0] // size)) for r in results), (0,) * len(results)

    return rule


def transpose_of(function: Callable[..., Any], count: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an operator that is itself a backward: from cotangents to gradients of its first tensors.

    Args:
        function: the operator's reference, differentiable.
        count: how many leading arguments are differentiable tensors.
    """

    def gradients(args: tuple[Any, ...], cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        vjp: Any = torch.func.vjp
        results, pull = vjp(lambda *leading: function(*leading, *args[count:]), *args[:count])
        given = tuple(torch.zeros_like(r) if c is None else c for r, c in zip(results, cotangents, strict=True))
        return (*pull(given), *(None for _ in args[count:]))

    return gradients


_NARROW = torch.float16, torch.bfloat16


def autocast_to_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, 16-bit tensors as fp32, as torch's own rules do for distances, softmax and losses."""
    for tensor in tensors:  # no generator: calls of a few microseconds notice what it costs
        if tensor.dtype in _NARROW and _checks.autocasts(tensors[0]):
            return tuple(t.float() if t.dtype in _NARROW else t for t in tensors)
    return tensors


def kernels_of(file: str, names: dict[str, str]) -> dict[str, Callable[..., Any]]:
    """Per operator the Triton function of ``rcu_ops.triton_kernels.<file>`` that runs it, imported when called."""

    def runs(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(_triton.kernels(file), name)(*args)

    return {operator: runs(name) for operator, name in names.items()}


def backends(
    file: str,
    operators: tuple[str, ...],
    run: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    triton: Callable[..., Any] | None = None,
    why_not_triton: Callable[..., str | None] | None = None,
    cpu_plan: Callable[..., str] | None = None,
    cuda_plan: Callable[..., str] | None = None,
    triton_plan: Callable[..., str] | None = None,
    triton_overtaken: Overtaken | None = None,
) -> tuple[Backend, ...]:
    """The backends of a public function whose first argument is a tensor, in the order of ``auto``.

    Args:
        file: of the CUDA kernels, as in :data:`rcu_ops.ops._evidence.VARIANTS`.
        operators: registered operators that ``run`` calls.
        run: with the binary's kernels.
        reference: in plain PyTorch.
        triton: with the Triton kernels, or None when there are none.
        why_not_triton: a reason that the arguments themselves give, or None.
        cpu_plan, cuda_plan, triton_plan: how the kernels would run the arguments.
        triton_overtaken: where ``auto`` prefers the reference to the Triton kernels.
    """

    def why_not_binary(key: str) -> str | None:
        for operator in operators:  # no generator: a small step of a stream notices what this costs
            if not _library.has_kernel(operator, key):
                return _library.load_error() or f"the library was built without this {key} kernel"
        return None

    def why_not_cpu(x: Tensor, *_: Any) -> str | None:
        if x.is_cpu:
            return why_not_binary("CPU")
        return None if x.is_meta else f"x is on {x.device}"

    def why_not_cuda(x: Tensor, *_: Any) -> str | None:
        if x.device.type != "cuda":
            return f"x is on {x.device}"
        return why_not_binary("CUDA") or _evidence.why_not(file, x.device, x.dtype)

    def why_not_its_triton(x: Tensor, *rest: Any) -> str | None:
        if x.device.type != "cuda":
            return f"x is on {x.device}"
        if not _triton.PRESENT:
            return "the package triton is not installed"
        if x.dtype == torch.float64:
            return "x is float64, and the Triton kernels compute in float32"
        reason = None if why_not_triton is None else why_not_triton(x, *rest)
        return reason or _triton.why_not_device(x.device) or _selftest.why_not(f"{file}/triton", x.device, x.dtype)

    def run_reference(x: Tensor, *rest: Any) -> Any:
        # A tracer would see the reference's many small operations. Where no binary holds the operators' kernels, the
        # operators themselves run the reference, so a traced graph may as well hold the operators.
        missing = any(not _library.has_kernel(operator, x.device.type.upper()) for operator in operators)
        return run(x, *rest) if torch.compiler.is_compiling() and missing else reference(x, *rest)

    found = [Backend("cuda", run, why_not_cuda, cuda_plan, _evidence.experimental(file))]
    if triton is not None:
        found.append(Backend("triton", triton, why_not_its_triton, triton_plan, overtaken=triton_overtaken))
    return (
        *found,
        Backend("cpu", run, why_not_cpu, cpu_plan),
        Backend("reference", run_reference, lambda *_: None),
    )
