"""What the operators ask the planners of ``rcu_ops._native`` for their words with."""

from __future__ import annotations

import torch

from rcu_ops import _library

#: Said in place of a plan. The kernels plan for themselves and need no such module.
NO_WORDS = "the planner's words need the module rcu_ops._native, which was not built for this Python"


def gpu_limits(device: torch.device) -> dict[str, int]:
    """The planners' arguments that describe a CUDA device."""
    gpu = torch.cuda.get_device_properties(device)
    return {
        "architecture": 10 * gpu.major + gpu.minor,
        "multiprocessors": gpu.multi_processor_count,
        "shared_bytes": getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block),
    }


def holds_sm90a() -> bool:
    """Whether the library was built with code for sm_90a."""
    return "sm_90a" in (_library.build_record().get("architectures") or ())
