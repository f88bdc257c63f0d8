"""This process among those that ``torchrun`` starts; alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rcu_ops.cli_errors import UserError

__all__ = ["Processes", "distributed", "pick_device"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Place of this process: ``rank`` of ``count``, computing on ``device``."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, in order of rank, on every process; anything that pickles."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over all processes (in place)."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def distributed(device: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, for the time of the block.

    Args:
        device: "auto" (a GPU of its own for every process where there are GPUs, else the CPU), "cpu", "cuda", "cuda:1".

    Raises:
        UserError: the device cannot be used.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, pick_device(device))
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{local}"
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, chosen)
        # The first process keeps the store through which the others find each other: it must not leave before them.
        # Not after an error, which may be this process's alone: the others would not come.
        dist.barrier(device_ids=[chosen.index] if chosen.type == "cuda" else None)
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one. UserError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device
