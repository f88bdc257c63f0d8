"""Which CUDA C++ kernels have been seen to run correctly on a GPU, and where that is written down.

A variant whose ``evidence`` is None is experimental: ``auto`` does not take it unless RCU_OPS_EXPERIMENTAL=1 is in the
environment; ``use_backend("cuda")`` does. The doctor lists such variants, and ``benchmarks/results/UNVERIFIED.md`` is
this package's output::

    python -m rcu_ops.ops._evidence > benchmarks/results/UNVERIFIED.md
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from rcu_ops.ops import _registry, _selftest


@dataclass(frozen=True)
class Variant:
    """One way in which a CUDA kernel file runs an operator.

    Attributes:
        operator: the operator family, which is the kernel file's name.
        name: the variant's name, unique within the operator.
        covers: which arguments it is for.
        architectures: the oldest architecture it runs on, ``sm_80`` or ``sm_90a``.
        evidence: a file under benchmarks/results that records a correct run on a GPU, or None.
    """

    operator: str
    name: str
    covers: str
    architectures: str
    evidence: str | None = None


VARIANTS: tuple[Variant, ...] = (
    Variant("recurrent_conv", "plain scan", "any number of channels, dtype and strides; forward and backward", "sm_80"),
    Variant("recurrent_conv", "fp32 scan", "fp32 with 8 to 128 channels, where there are many columns", "sm_80"),
    Variant("recurrent_conv", "tile scan", "bf16 and fp16 with up to 128 channels, on the matrix unit", "sm_80"),
    Variant("recurrent_conv", "wide scan", "bf16 and fp16 with 129 to 256 channels, on the matrix unit", "sm_80"),
    Variant("recurrent_conv", "hopper scan", "the same by warpgroups, where there are many columns", "sm_90a"),
    Variant("recurrent_conv", "step", "one frame after a state; bf16 and fp16 with more than 256 channels", "sm_80"),
    Variant("recurrent_conv", "step by words", "the same where channels are contiguous, in words of 16 bytes", "sm_80"),
    Variant("recurrent_conv", "chunked", "long clips of few positions, by the library's products; not fp64", "sm_80"),
    Variant("recurrent_conv", "matrix weight gradient", "bf16 and fp16 with any number of channels", "sm_80"),
    Variant("recurrent_conv", "plain weight gradient", "any number of channels, dtype and strides", "sm_80"),
    Variant("recurrent_conv_batch_norm", "norm passes", "any shapes, dtype and strides; forward and backward", "sm_80"),
    Variant("fast_gru", "fused passes", "everything between the library's products; any sizes and dtype", "sm_80"),
    Variant("fast_gru", "columns", "few channels, not fp64: a block takes columns through all steps", "sm_80"),
    Variant("fast_gru", "columns backward", "the same, all steps' gradients but for the weights'", "sm_80"),
    Variant("fast_gru", "one launch", "bf16 and fp16, up to 64 columns per step, weights in shared memory", "sm_80"),
    Variant("fast_gru", "one launch in clusters", "forward, many channels: blocks share the weights' inputs", "sm_90a"),
    Variant("fast_gru", "one launch backward", "the same, all steps' gradients but for the weights'", "sm_80"),
    Variant("cycle_consistency", "query rows", "any shapes, dtype, strides and masks; forward and backward", "sm_80"),
    Variant("nonlocal_gates", "plain rows", "any sizes, dtype, strides and masks; forward and backward", "sm_80"),
    Variant("nonlocal_gates", "tile", "bf16 and fp16, forward, up to 256 keys, on the matrix unit", "sm_80"),
    Variant("nonlocal_gates", "tile gradients", "tile, gradients: up to 256 queries and keys", "sm_80"),
    Variant("nonlocal_gates", "between products", "fp32 and bf16, wide heads: weights, and a step's cells", "sm_80"),
    Variant("nonlocal_gates", "cluster", "tile, where few samples leave multiprocessors idle", "sm_90a"),
    Variant("cycle_consistency", "product tiles", "fp32, bf16, fp16 from 33 frames on, forward, matrix unit", "sm_80"),
    Variant("cycle_consistency", "short cycle", "fp32, bf16 and fp16 cycles of at most 32 frames, read once", "sm_80"),
    Variant("cycle_consistency", "short cycle in clusters", "the same of 512 channels on: blocks share them", "sm_90a"),
    Variant("srtg", "gate pass", "any shapes, dtype and strides; forward and backward", "sm_80"),
)

KERNELS: dict[str, tuple[str, ...]] = {
    "plain scan": ("plain_scan",),
    "fp32 scan": ("fp32_scan",),
    "tile scan": ("tile_scan",),
    "wide scan": ("wide_scan",),
    "hopper scan": ("hopper_scan",),
    "step": ("step_scan", "plain_step_scan"),
    "step by words": ("step_words", "plain_step_words"),
    "chunked": (),  # the library's
    "matrix weight gradient": ("matrix_weight_grad", "sum_splits"),
    "plain weight gradient": ("weight_grad_partial", "sum_splits"),
    "norm passes": ("norm_pass", "norm_packs", "norm_finish"),
    "fused passes": ("fast_gru_pass",),
    "columns": ("fast_gru_column_steps",),
    "columns backward": ("fast_gru_column_steps_backward",),
    "one launch": ("fast_gru_steps",),
    "one launch in clusters": ("fast_gru_cluster_steps",),
    "one launch backward": ("fast_gru_steps_backward",),
    "query rows": ("align_query", "key_gradient", "measure", "gate_of"),
    "plain rows": ("plain_relate", "plain_query_gradient", "plain_key_gradient"),
    "tile": ("tile_relate",),
    "tile gradients": ("tile_gradient",),
    "between products": ("map_weights", "map_gradients", "update_cells"),
    "cluster": ("cluster_relate",),
    "product tiles": ("align_tile", "survey", "split_frames"),
    "short cycle": ("align_short_kernel",),
    "short cycle in clusters": ("align_short_cluster",),
    "gate pass": ("gate_pass", "gate_packs"),
}
"""By a variant's name its ``__global__`` functions: a file is evidence for it when tests that passed launched each."""

MEASURED_ON = {"nvidia-h200": (9, 0)}
"""By folder of evidence the compute capability of its GPU."""

#: RCU_OPS_EXPERIMENTAL=1 when the package was imported.
EXPERIMENTAL = os.environ.get("RCU_OPS_EXPERIMENTAL") == "1"


def unverified(operator: str | None = None) -> tuple[Variant, ...]:
    """The variants without evidence, of one operator or of all."""
    return tuple(v for v in VARIANTS if v.evidence is None and operator in (None, v.operator))


def experimental(operator: str) -> tuple[str, ...]:
    """Their names."""
    return tuple(v.name for v in unverified(operator))


def why_not(
    operator: str, device: torch.device | None = None, dtype: torch.dtype | None = None, test: str | None = None
) -> str | None:
    """Why the operator's CUDA kernels are not taken without being asked for, or None when they may be.

    Args:
        operator: the family, as in :data:`VARIANTS`.
        device, dtype: of the tensors. Where the evidence comes from another architecture, the kernels have to pass
            their self-test there first. None: any.
        test: the self-test's name, without its backend, where that is not the family's.
    """
    if EXPERIMENTAL or _registry.current_backend() == "cuda":
        return None
    if names := experimental(operator):
        return (
            f"no run on a GPU has been recorded for {', '.join(names)}: RCU_OPS_EXPERIMENTAL=1 in the environment or "
            'use_backend("cuda") takes the kernels all the same'
        )
    if device is None or dtype is None or _capability(device) in (None, *_proven_on(operator)):
        return None
    name = f"{test}/cuda" if test is not None and _selftest.known(f"{test}/cuda") else f"{operator}/cuda"
    # Nothing is more exact than fp64 for its kernels to be held against: those of fp32 answer for them.
    return _selftest.why_not(name, device, torch.float32 if dtype == torch.float64 else dtype)


def _proven_on(operator: str) -> set[tuple[int, int]]:
    """The compute capabilities on which all of the operator's variants ran."""
    places = [{MEASURED_ON[v.evidence.partition("/")[0]]} for v in VARIANTS if v.operator == operator and v.evidence]
    return set.intersection(*places) if places else set()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """None where there is no GPU: tensors on one are then a tracer's, for a machine that nobody knows."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


# A tracer sees a constant, as of the self-test's verdict.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def render() -> str:
    """The text of benchmarks/results/UNVERIFIED.md."""
    lines = [
        "# CUDA kernels that no GPU has confirmed",
        "",
        "Written by `python -m rcu_ops.ops._evidence`. `auto` does not take these variants unless",
        'RCU_OPS_EXPERIMENTAL=1; `use_backend("cuda")` does. What there is for them: they compile for every',
        "architecture in the build without spilling registers (`tests/ops/test_cuda_compile.py`), and the same source,",
        "executed thread by thread on a CPU, keeps the tolerance rule and is clean under address, undefined-behaviour",
        "and race checks (`tests/cuda_host/`). An earlier state of most of them ran on an H200:",
        "`nvidia-h200/LOG.md` says what that found and what was changed since.",
        "",
    ]
    missing = unverified()
    if not missing:
        return "\n".join([*lines[:2], "None: there is a recorded run for every variant.", ""])
    lines += ["| operator | variant | for | from |", "| --- | --- | --- | --- |"]
    lines += [f"| {v.operator} | {v.name} | {v.covers} | {v.architectures} |" for v in missing]
    return "\n".join([*lines, ""])
