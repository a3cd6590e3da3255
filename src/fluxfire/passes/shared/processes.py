"""Processes that share an edit: the connections between them, and what they say to each other."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.errors import FluxfireError
from fluxfire.model import Call

CONNECT_AGAIN = (
    "call restore(pipe) and then optimize(pipe, ...) in every process, or start all of them anew"
)


@dataclass(eq=False)
class Processes:
    """The processes that share an edit, and the connections between them.

    Attributes:
        data: exchanges the blocks' tensors. None once it is closed.
        control: exchanges what the processes say to each other, on the CPU; None once it is closed.
        rank: this process's number.
        count: the number of processes.
        timeout: how long an exchange waits, in seconds.
    """

    data: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    rank: int
    count: int
    timeout: float

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        """Return this object: connections cannot be copied."""
        return self

    def close(self) -> None:
        """Close the connections, so that nobody waits for this process."""
        groups, self.data, self.control = (self.data, self.control), None, None
        for group in groups:
            if group is not None and dist.is_initialized():
                with suppress(ValueError, AssertionError, RuntimeError):  # it is gone already
                    dist.destroy_process_group(group)

    def say(self, message: Tensor) -> Tensor:
        """Give the others a message, and return those of all: (processes, numbers).

        Raises:
            FluxfireError: another process is gone, or does not answer in time.
        """
        said = [torch.empty_like(message) for _ in range(self.count)]
        try:
            dist.all_gather(said, message, group=self.control)
        except RuntimeError as error:
            self.close()
            raise FluxfireError(
                f"another process ended, or did not come within {self.timeout:g} seconds "
                f"(ContextParallel(timeout_seconds={self.timeout:g})); {CONNECT_AGAIN}"
            ) from error
        return torch.stack(said)

    def agree(self, numbers: Tensor) -> Tensor:
        """Return the largest of all processes' numbers, on the CPU; see `Call.agree`."""
        return self.say(numbers.detach().cpu()).amax(0)


@contextmanager
def connected(timeout: float) -> Iterator[Processes]:
    """Make process groups with a time limit of their own; at the end of the block, close them."""
    limit = timedelta(seconds=timeout)
    groups = Processes(None, None, dist.get_rank(), dist.get_world_size(), timeout)
    try:
        # Connecting has the same time limit as all that follows. But one process may come much
        # later than another, which loaded its weights sooner. So they meet first, without it.
        meeting = dist.new_group(backend="gloo")
        dist.barrier(meeting)
        dist.destroy_process_group(meeting)
        # Every process makes the same groups in the same order, so torch gives them equal names.
        groups.control = dist.new_group(backend="gloo", timeout=limit)
        # For both kinds of device: an earlier pass may have placed the pipeline on either.
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        groups.data = dist.new_group(backend=backend, timeout=limit)
        # If a later edit fails, this process closes them: not while another still connects.
        dist.barrier(groups.control)
        yield groups
    finally:
        groups.close()


class State(IntEnum):
    """What a process does now, as it tells the others."""

    STEP = 1
    END = 2
    FAILED = 3


_OF_GLOO = ("gloo", "pair closure", "closed by peer", "reset by peer", "Broken pipe")
"""Words of gloo's errors. Which of them comes depends on who notices first."""


def is_from_a_group(error: BaseException) -> bool:
    """Whether torch.distributed raised an error. That of gloo has no class of its own."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(words in str(error) for words in _OF_GLOO)
    )


_COLUMNS = 16
_NAMES = ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance")
_DIGEST = 1 + _COLUMNS * (len(_NAMES) + 1)
_TOLERANCE = 0.02
"""How far two digests may be apart. GPUs of one kind compute the same bits, others round apart."""


def message(state: State, call: Call | None = None, inputs: Tensor | None = None) -> Tensor:
    """Return what a process says about itself: (numbers,), float64.

    Args:
        state: whether it begins a step, has ended, or failed.
        call: the step.
        inputs: the digest of its inputs, with the first step.
    """
    where = [0] * len(_PLACES)
    if call is not None:
        tokens, branch = call.tokens, zlib.crc32(call.branch.encode())
        where = [call.step, call.steps, branch, tokens.noise, tokens.reference, tokens.text]
    said = torch.tensor([state, *where], dtype=torch.float64)
    return torch.cat(
        [said, torch.zeros(_DIGEST, dtype=torch.float64) if inputs is None else inputs]
    )


def digest(passes: Sequence[str], inputs: Mapping[str, Any], times: Tensor) -> Tensor:
    """Return a digest of what a generation begins with: (numbers,), float64.

    Digests are near to each other if the inputs are. A checksum of bits would differ between two
    kinds of GPU, whose encoders round differently.

    Args:
        passes: the names of the applied passes.
        inputs: keyword arguments of the transformer's first call.
        times: the scheduler's time steps.
    """
    names = torch.tensor([zlib.crc32(", ".join(passes).encode())], dtype=torch.float64)
    given = [inputs.get(name) for name in _NAMES]
    return torch.cat([names, *[_project(x) for x in (*given, times)]])


def _project(x: Tensor | None) -> Tensor:
    """Project a tensor onto a few fixed directions, relative to its norm: (_COLUMNS,), float64.

    The distance of two projections is about the relative distance of the tensors. The last number
    is the norm.
    """
    if x is None:
        return torch.zeros(_COLUMNS, dtype=torch.float64)
    flat = x.detach().float().flatten()
    signs = torch.arange(len(flat), device=flat.device)
    # Pseudo-random signs by a multiplicative hash, the same on every device.
    signs = ((signs * 2654435761 >> 13) ^ (signs * 40503 >> 7)) & 1
    signed = flat * (signs * 2 - 1)
    padded = F.pad(signed, (0, -len(flat) % (_COLUMNS - 1)))
    norm = flat.norm().clamp(min=1e-12)
    projected = padded.view(-1, _COLUMNS - 1).sum(0) / norm
    return torch.cat([projected, norm.log()[None]]).double().cpu()


def difference(said: Tensor) -> str | None:
    """Describe how what the processes said differs; None if they go on together."""
    states = said[:, 0].tolist()
    failed = [rank for rank, state in enumerate(states) if state == State.FAILED]
    if failed:
        return (
            f"process {failed[0]} left this generation with an exception, which that process "
            f"shows; the others cannot go on without it"
        )
    if len(set(states)) > 1:
        ended = states.index(State.END)
        return (
            f"process {ended} ended this generation earlier than others (another number of "
            f"steps, or somebody interrupted it); the processes must be stopped at the same step"
        )
    for column, what in enumerate(_PLACES, 1):
        values = said[:, column].tolist()
        if len(set(values)) > 1:
            shown = "" if what == "branch" else f": {', '.join(f'{v:g}' for v in values)}"
            return f"the processes differ in their {what}{shown}; {_SAME}"
    passes, digests = said[:, 1 + len(_PLACES)], said[:, 2 + len(_PLACES) :]
    if len(set(passes.tolist())) > 1:
        return f"the processes have other passes applied; {_SAME}"
    parts = digests.view(len(said), -1, _COLUMNS)
    apart = (parts - parts[:1]).norm(dim=2).amax(0)
    for distance, what in zip(apart.tolist(), _INPUTS, strict=True):
        if not distance <= _TOLERANCE:
            return f"the processes got another {what}; {_SAME}"
    return None


_PLACES = (
    "step",
    "number of steps",
    "branch",
    "number of picture tokens",
    "number of reference tokens",
    "number of text tokens",
)
_INPUTS = (
    "seed or reference picture (give each a generator with the same seed)",
    "prompt",
    "prompt",
    "guidance scale",
    "time steps",
)
_SAME = "all processes must make the same calls with the same arguments"
