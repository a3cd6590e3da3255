"""Several processes that train together, one for each GPU, started by `torchrun`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Workers:
    """This process and how many there are.

    Attributes:
        rank: this process's number, from 0.
        count: how many processes train together.
        device: where this one computes.
    """

    rank: int
    count: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this process writes logs and files."""
        return self.rank == 0

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
            tensor /= self.count

    def agree(self, value: float) -> float:
        """Return the first process's value."""
        if self.count == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.broadcast(shared, 0)
        return float(shared)


def join() -> Workers:
    """Join the processes that `torchrun` started; without it there is one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    if count > 1:
        distributed.init_process_group("nccl" if cuda else "gloo")
    return Workers(rank, count, device)


def sixteen_bits(device: str) -> torch.autocast:
    """Return a context in which a GPU computes in bfloat16.

    A CPU computes in float32: one without units for bfloat16 takes minutes for a batch.
    """
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")
