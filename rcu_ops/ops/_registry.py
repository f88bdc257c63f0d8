"""Which backend runs an operator, and why each other one does not.

An operator lists its backends; each backend has one predicate, ``why_not``, that returns None or the reason as a
sentence. The same predicate serves ``auto`` (take the first backend without a reason), an explicit choice (raise with
the reason) and :func:`explain` (print every reason). A backend that can run, but was measured slower than a later one
for some arguments, says so by ``overtaken``, which ``auto`` alone asks.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")

WhyNot = Callable[..., str | None]


class BackendError(ValueError):
    """The backend that was asked for cannot run an operator, or none can. The message says why."""


@dataclass(frozen=True)
class Overtaken:
    """Where ``auto`` leaves CUDA tensors that a backend can run to a later one that was measured faster.

    Attributes:
        where: for which arguments, in words, for the doctor.
        why: takes the backend's arguments; None, or who is faster, as a sentence.
    """

    where: str
    why: WhyNot


@dataclass(frozen=True)
class Backend:
    """One way to run an operator.

    Attributes:
        name: one of :data:`BACKENDS` except "auto".
        run: takes the operator's checked arguments.
        why_not: takes the same arguments; None if ``run`` can take them, else the reason.
        plan: optional; takes the same arguments and says in one line how it would run them.
        experimental: variants without committed evidence of a correct run on any GPU.
        overtaken: optional; where ``auto`` prefers a later backend to this one.
    """

    name: str
    run: Callable[..., Any]
    why_not: WhyNot
    plan: Callable[..., str] | None = None
    experimental: tuple[str, ...] = ()
    overtaken: Overtaken | None = None

    def why_passed(self, args: tuple[Any, ...]) -> str | None:
        """Why ``auto`` prefers a later backend, whether or not this one can run."""
        return None if self.overtaken is None or _device_of(args) != "cuda" else self.overtaken.why(*args)


_GPU_BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Operator:
    """An operator and its backends.

    Attributes:
        name: the public function's name.
        backends: in the order in which ``auto`` tries them.
        check: takes the public function's arguments, raises on wrong ones, returns the backends' arguments.
        probe: from a device to small arguments for ``run``, for the doctor.
    """

    name: str
    backends: tuple[Backend, ...]
    check: Callable[..., tuple[Any, ...]]
    probe: Callable[[str], tuple[Any, ...]]

    def backend(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        return Backend(name, _never, lambda *_: f"{self.name} has no {name} kernel")

    def select(self, *args: Any) -> Backend:
        """The backend that runs these (checked) arguments. Raises BackendError when an explicit choice cannot."""
        # Few calls on the way of "auto": after a kernel has gone through megabytes, every function is fetched again.
        if _choice.name != "auto":
            wanted = current_backend()
            backend = self.backend(wanted)
            reason = backend.why_not(*args)
            if reason is not None:
                raise BackendError(f"backend {wanted!r} cannot run {self.name}: {reason}")
            return backend
        on_cpu = isinstance(args[0], Tensor) and args[0].is_cpu
        preferred = False
        for backend in self.backends:
            if on_cpu and backend.name in _GPU_BACKENDS:  # wording its reason costs a frame of a stream microseconds
                continue
            if backend.overtaken is not None and backend.why_passed(args) is not None:
                preferred = True
            elif backend.why_not(*args) is None:
                if backend.name == "reference" and not preferred and _device_of(args) == "cuda":
                    self._warn_slow(args)
                return backend
        raise BackendError(f"no backend can run {self.name}:\n{self.explain(*args)}")

    def explain(self, *args: Any) -> Explanation:
        """Every backend's verdict on these (checked) arguments."""
        wanted = current_backend()
        reasons: dict[str, str | None] = {}
        for name in BACKENDS[1:]:
            backend = self.backend(name)
            reasons[name] = (backend.why_passed(args) if wanted == "auto" else None) or backend.why_not(*args)
        if wanted == "auto":
            chosen = next((b.name for b in self.backends if reasons[b.name] is None), None)
        else:
            chosen = wanted if reasons[wanted] is None else None
        plan = self.backend(chosen).plan if chosen else None
        return Explanation(self.name, wanted, chosen, reasons, plan(*args) if plan else None)

    def _warn_slow(self, args: tuple[Any, ...]) -> None:
        if self.name not in _warned and not torch.compiler.is_compiling():
            _warned.add(self.name)
            reasons = "; ".join(
                f"{b.name}: {reason}" for b in self.backends if (reason := b.why_not(*args)) is not None
            )
            warnings.warn(f"{self.name} runs on the slow reference backend for CUDA tensors ({reasons})", stacklevel=4)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns; ``str()`` of it is meant to be read.

    Attributes:
        operator: the operator's name.
        requested: the current choice, "auto" or a backend.
        backend: the backend that would run, or None if the requested one cannot.
        reasons: per backend None (it can run) or why not; under "auto" also which one is faster.
        plan: how the chosen backend would run it, if it says so.
    """

    operator: str
    requested: str
    backend: str | None
    reasons: dict[str, str | None] = field(default_factory=dict)
    plan: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend or 'nothing'} runs (requested: {self.requested})"]
        if self.plan:
            lines.append(f"  plan: {self.plan}")
        for name, reason in self.reasons.items():
            if name != self.backend:
                lines.append(f"  not {name}: {reason or passed_over(self.requested)}")
        return "\n".join(lines)


def settled(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where a tracer leaves the sizes open, which the answer must not narrow down."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd will ask for gradients of any of them."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # no generator: calls of a few microseconds notice what it costs
            if tensor.requires_grad:
                return True
    return False


def passed_over(requested: str) -> str:
    """Why a backend that could run does not."""
    return "a backend before it was taken" if requested == "auto" else "another one was asked for"


def _never(*_: Any) -> Any:
    raise AssertionError("a backend that does not exist was run")


def _device_of(args: tuple[Any, ...]) -> str:
    return next(a.device.type for a in args if isinstance(a, Tensor))


OPERATORS: dict[str, Operator] = {}
_warned: set[str] = set()


def register(operator: Operator) -> Operator:
    """Add an operator to the registry, for :func:`explain` and the doctor."""
    OPERATORS[operator.name] = operator
    return operator


def _checked_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Choice:
    """The process-wide choice. A plain attribute, so that torch.compile can guard on it."""

    def __init__(self) -> None:
        self.name = os.environ.get("RCU_OPS_BACKEND", "auto")  # unchecked: importing the package does not fail


_choice = _Choice()


class use_backend:  # lower case like torch.no_grad, which it is used like
    """Choose all operators' backend: ``use_backend("cpu")`` from now on; ``with use_backend("cpu"):`` for a block.

    The choice is one per process, not per thread; the environment variable RCU_OPS_BACKEND sets its first value,
    which is checked when the first operator is called.
    CUDA tensors try cuda, triton, reference under "auto"; CPU tensors cpu, reference. An explicit choice that cannot
    run raises a BackendError (a ValueError) that says why when the operator is called. A program of torch.export or
    torch.compile keeps the backend it was made with; made with "reference", those of recurrent_conv and fast_gru have
    the number of frames or clips of their example, since the loop over them is written out.

    Args:
        name: "auto", "cuda", "triton", "cpu" or "reference". Anything else raises ValueError.
    """

    def __init__(self, name: str) -> None:
        self._before = _choice.name
        _choice.name = _checked_name(name, "use_backend")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choice.name = self._before


def current_backend() -> str:
    """The current choice: "auto" or the name given to :class:`use_backend` or RCU_OPS_BACKEND.

    Raises:
        BackendError: RCU_OPS_BACKEND is no backend's name.
    """
    return _checked_name(_choice.name, "RCU_OPS_BACKEND")


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run ``rcu_ops.<operator>(*args, **kwargs)``, and why each other one would not.

    Raises:
        ValueError: unknown operator, or arguments the operator itself would refuse.
        TypeError: arguments that it does not have, or too few.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(sorted(OPERATORS))}, got {operator!r}")
    entry = OPERATORS[operator]
    signature = inspect.signature(entry.check)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{operator}: {error}; its arguments are ({', '.join(signature.parameters)})") from None
    return entry.explain(*entry.check(*args, **kwargs))
