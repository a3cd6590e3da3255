"""Checksums of many tensors from a sample of their numbers, in one kernel.

The checksum reads a tensor as a sequence of 32-bit words in memory order. It cuts the sequence into
as many pieces as there are samples, and reads one word of each piece. Every row of a matrix has the
same number of whole pieces, so every row is sampled. The position within the piece moves by a prime
from row to row, so every column is sampled too, unless a row has more words than the matrix has
samples. A tensor with fewer words than samples is read completely.

Each word is multiplied by an odd, well-mixed hash of its position. So a single change always
changes the sum, and the changes that happen to a model's weights do not cancel out.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfire.errors import FluxfireError

SAMPLES = 32768
"""The checksum reads at least this many words of a larger tensor, the same number in each row."""
HOST_SAMPLES = 32
"""Words read of a pinned tensor in host memory: each needs its own transfer over the bus. Also of
a tensor that `read_lightly` marks."""
MIX = (0x9E3779B97F4A7C1, 0x3F58476D1CE4E5B9)
"""Multipliers of the hash that turns a position into the factor of its word."""
STEP = 2654435761
"""A prime: how far the position within a piece moves from row to row."""
_KIND = attrgetter("dtype", "shape")
_ENOUGH_ROWS = 256  # with fewer rows, too few positions within a piece would be sampled


_LIGHTLY = "_fluxfire_reads_lightly"


def read_lightly(tensor: Tensor, lightly: bool) -> None:
    """Read only `HOST_SAMPLES` words of a tensor from now on, or as many as of others again.

    A weight in host memory may be a checkpoint's file, mapped into memory. Reading words of all its
    pages would read the whole file from the disk.
    """
    if lightly:
        setattr(tensor, _LIGHTLY, True)
    elif hasattr(tensor, _LIGHTLY):
        delattr(tensor, _LIGHTLY)


class Plan(NamedTuple):
    """Which words of a tensor the checksum reads.

    Attributes:
        words: number of words in the tensor.
        read: number of words read.
        of_row: number of pieces in a row.
    """

    words: int
    read: int
    of_row: int


class Sums:
    """Repeated checksums of the same tensors.

    The object holds no reference to the tensors. It reuses the sampling plan while the tensors'
    addresses and layouts stay the same. At FLUX's sizes the plan takes most of the host's time.
    """

    def __init__(self) -> None:
        self._places: list[object] = []
        self._by_kernel: list[tuple[torch.device, list[int], Tensor, int]] = []
        self._by_torch: list[int] = []

    def of(self, tensors: Sequence[Tensor]) -> list[object]:
        """Return values that identify the tensors' contents. Waits for their devices.

        The addresses do not count; shape, strides and dtype do. The same numbers have the same
        checksum on every device, except in pinned memory or after `read_lightly`.

        Args:
            tensors: any tensors. A tensor without accessible data (on the meta device, or of a
                subclass that stores its numbers elsewhere) has the checksum 0.
        """
        kinds = list(map(_KIND, tensors))
        strides: list[object]
        try:  # in loops of C, as FLUX's encoders have 660 tensors
            strides = list(map(Tensor.stride, tensors))
            addresses = list(map(Tensor.data_ptr, tensors))
        except (RuntimeError, FluxfireError):  # no strides, or numbers elsewhere or dropped
            strides = [t.stride() if t.layout is torch.strided else None for t in tensors]
            addresses = list(map(_address, tensors))
        places = [*kinds, *strides, *addresses]
        if places != self._places:
            self._plan_reads(tensors)
            self._places = places
        sums = [0] * len(tensors)
        for index in self._by_torch:
            sums[index] = _checksum_by_torch(tensors[index])
        for device, indices, table, most in self._by_kernel:
            made = _checksums_by_kernel(device, table, most)
            for index, of_one in zip(indices, made, strict=True):
                sums[index] = of_one
        return [*kinds, *strides, *sums]

    def _plan_reads(self, tensors: Sequence[Tensor]) -> None:
        by_device: dict[torch.device, list[int]] = defaultdict(list)
        self._by_torch, self._by_kernel = [], []
        gpu = _cuda_is_initialized() and importlib.util.find_spec("triton") is not None
        for index, tensor in enumerate(tensors):
            if tensor.is_meta or tensor.layout is not torch.strided:
                continue
            if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                continue
            words = gpu and tensor.nbytes % 4 == tensor.data_ptr() % 4 == 0 and is_dense(tensor)
            if words and tensor.is_cuda:
                by_device[tensor.device].append(index)
            elif words and tensor.is_pinned():  # a GPU reads pinned memory faster than the host
                by_device[torch.device("cuda", torch.cuda.current_device())].append(index)
            else:
                self._by_torch.append(index)
        for device, indices in by_device.items():
            plans = [(tensors[index].data_ptr(), *plan(tensors[index])) for index in indices]
            table = torch.tensor(plans, dtype=torch.int64).to(device)
            most = max(read for _, _, read, _ in plans)
            self._by_kernel.append((device, indices, table, most))


def of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the checksum of each tensor once, without a reusable plan; see `Sums.of`."""
    made: Any = Sums().of(tensors)[-len(tensors) :] if tensors else []
    return list(made)


def plan(tensor: Tensor) -> Plan:
    """Return how many words a tensor has, and how many of them the checksum reads."""
    planned = _plan(tensor.shape, tensor.stride(), tensor.itemsize)
    if hasattr(tensor, _LIGHTLY) or (
        not tensor.is_cuda and _cuda_is_initialized() and tensor.is_pinned()
    ):
        return Plan(planned.words, min(planned.words, HOST_SAMPLES), 1)
    return planned


@lru_cache(maxsize=1024)
def _plan(shape: torch.Size, strides: tuple[int, ...], itemsize: int) -> Plan:
    size = prod(shape) * itemsize
    words = size // 4 if size % 4 == 0 else size  # sizes that are no multiple of 4 go by bytes
    sizes = sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1)
    rows = 1  # product of the outer dimensions, in memory order
    for _, n in reversed(sizes[1:] or sizes):
        if rows >= _ENOUGH_ROWS:
            break
        rows *= n
    of_row = -(-SAMPLES // rows)
    return Plan(words, min(words, rows * of_row), of_row)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's memory has no gaps, in any dimension order (such as channels-last)."""
    return tensor.is_contiguous() or _fills_its_span(tensor.shape, tensor.stride())


@lru_cache(maxsize=1024)
def _fills_its_span(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) == prod(shape)


def _checksums_by_kernel(device: torch.device, table: Tensor, most: int) -> list[int]:
    """Return one checksum for each row of `table`; `sample_sums` documents the rows."""
    import triton

    from fluxfire.kernels.triton_kernels import sample_sums

    block = 1024
    with torch.cuda.device(device):
        sums = torch.zeros(len(table), dtype=torch.int64, device=device)
        sample_sums[(len(table), triton.cdiv(most, block))](
            table, sums, MIX=MIX[0], MIX_AGAIN=MIX[1], STEP=STEP, BLOCK=block
        )
        made: list[int] = sums.tolist()
    return made


def _checksum_by_torch(tensor: Tensor) -> int:
    """Return the checksum of one tensor, computed by torch operations."""
    plain = tensor.detach().as_subclass(Tensor)
    if not is_dense(plain):
        plain = plain.contiguous()
    if plain.data_ptr() % 4 or plain.storage_offset() * plain.itemsize % 4 or plain.is_conj():
        plain = plain.clone()  # a view as 32-bit words needs aligned data
    row = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())
    words = row.view(torch.int32 if row.nbytes % 4 == 0 else torch.uint8)
    places, factors = _places(plan(plain), words.device)
    return int((words[places].long() * factors).sum())


@lru_cache(maxsize=64)
def _places(of: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions to read and the factor of each word, (words read,) each."""
    i = torch.arange(of.read, device=device)
    start, end = i * of.words // max(of.read, 1), (i + 1) * of.words // max(of.read, 1)
    places = start + i // of.of_row * STEP % (end - start).clamp(min=1)
    mixed = i * MIX[0]
    mixed = (mixed ^ mixed >> 29) * MIX[1]
    return places, mixed ^ mixed >> 32 | 1


def _address(tensor: Tensor) -> int:
    try:
        return 0 if tensor.is_meta else tensor.data_ptr()
    except RuntimeError:  # a subclass that stores its numbers elsewhere
        return 0


def _cuda_is_initialized() -> bool:
    started: Any = torch.cuda.is_initialized  # untyped
    return bool(started())
