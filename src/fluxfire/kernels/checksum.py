"""Checksums of many tensors by some of their numbers, in one kernel.

Each tensor is taken for a row of 32-bit words as they lie in memory, cut into as many pieces as
there are samples; one word of each piece counts. Every row of a matrix has the same number of whole
pieces, so none goes unread. From row to row the place within a piece moves on by a prime, so no
column goes unread either, unless it has more words than the matrix has samples. A tensor with fewer
words than samples is read whole.

A word is multiplied by an odd number of its place, mixed well: a single change always changes the
sum, and changes that a model's weights go through do not cancel out.
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

SAMPLES = 32768
"""Words read of a tensor at least, if it has as many: as many of each of its rows."""
HOST_SAMPLES = 32
"""Words read of a pinned tensor in host memory: each travels over the bus on its own."""
MIX = (0x9E3779B97F4A7C1, 0x3F58476D1CE4E5B9)
"""What mixes a place into what its word is multiplied by."""
STEP = 2654435761
"""By how much the place within a piece moves on from row to row: a prime."""
_LOOKS = attrgetter("dtype", "shape", "device", "layout")
_ENOUGH_ROWS = 256  # for the places within their pieces to be many


class Plan(NamedTuple):
    """What is read of a tensor.

    Attributes:
        words: how many it has.
        read: how many are read.
        of_row: how many pieces a row has.
    """

    words: int
    read: int
    of_row: int


class Sums:
    """Checksums of the same tensors, time and again.

    It keeps none of them. What it worked out of their places it uses again where these are the
    same: at FLUX's sizes that is most of the time that the host spends.
    """

    def __init__(self) -> None:
        self._places: list[object] = []
        self._by_kernel: list[tuple[torch.device, list[int], Tensor, int]] = []
        self._elsewhere: list[int] = []

    def of(self, tensors: Sequence[Tensor]) -> list[object]:
        """Return what tells these tensors from others. Waits for their devices.

        Where they lie does not count, but how (shape, strides, dtype). The same numbers have the
        same checksum on every device, but where they are pinned.

        Args:
            tensors: any. Those without numbers at hand (on the meta device, or of a kind that keeps
                them elsewhere) all have the checksum 0.
        """
        looks = list(map(_LOOKS, tensors))
        if all(layout is torch.strided for *_, layout in looks):
            strides: list[object] = list(map(Tensor.stride, tensors))
        else:
            strides = [t.stride() if t.layout is torch.strided else None for t in tensors]
        places = [*looks, *strides, *map(_address, tensors)]
        if places != self._places:
            self._work_out(tensors)
            self._places = places
        sums = [0] * len(tensors)
        for index in self._elsewhere:
            sums[index] = _of_one(tensors[index])
        for device, indices, table, most in self._by_kernel:
            made = _by_kernel(device, table, most)
            for index, of_one in zip(indices, made, strict=True):
                sums[index] = of_one
        return [look[:2] for look in looks] + strides + sums

    def _work_out(self, tensors: Sequence[Tensor]) -> None:
        by_device: dict[torch.device, list[int]] = defaultdict(list)
        self._elsewhere, self._by_kernel = [], []
        gpu = _on_cuda() and importlib.util.find_spec("triton") is not None
        for index, tensor in enumerate(tensors):
            if tensor.is_meta or tensor.layout is not torch.strided:
                continue
            if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                continue
            words = gpu and tensor.nbytes % 4 == tensor.data_ptr() % 4 == 0 and is_dense(tensor)
            if words and tensor.is_cuda:
                by_device[tensor.device].append(index)
            elif words and tensor.is_pinned():  # a GPU reads it sooner than the host samples it
                by_device[torch.device("cuda", torch.cuda.current_device())].append(index)
            else:
                self._elsewhere.append(index)
        for device, indices in by_device.items():
            plans = [(tensors[index].data_ptr(), *plan(tensors[index])) for index in indices]
            table = torch.tensor(plans, dtype=torch.int64).to(device)
            most = max(read for _, _, read, _ in plans)
            self._by_kernel.append((device, indices, table, most))


def of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the checksum of each of these tensors, looked at once; see `Sums.of`."""
    made: Any = Sums().of(tensors)[-len(tensors) :] if tensors else []
    return list(made)


def plan(tensor: Tensor) -> Plan:
    """Return how many words of a tensor are read, and of how many there are."""
    planned = _planned(tensor.shape, tensor.stride(), tensor.itemsize)
    if not tensor.is_cuda and _on_cuda() and tensor.is_pinned():
        return Plan(planned.words, min(planned.words, HOST_SAMPLES), 1)
    return planned


@lru_cache(maxsize=1024)
def _planned(shape: torch.Size, strides: tuple[int, ...], itemsize: int) -> Plan:
    size = prod(shape) * itemsize
    words = size // 4 if size % 4 == 0 else size  # what does not come to words is read by bytes
    sizes = sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1)
    rows = 1  # the outer dimensions, in the order of memory
    for _, n in reversed(sizes[1:] or sizes):
        if rows >= _ENOUGH_ROWS:
            break
        rows *= n
    of_row = -(-SAMPLES // rows)
    return Plan(words, min(words, rows * of_row), of_row)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie side by side, in whichever order (as channels last do)."""
    return tensor.is_contiguous() or _dense(tensor.shape, tensor.stride())


@lru_cache(maxsize=1024)
def _dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) == prod(shape)


def _by_kernel(device: torch.device, table: Tensor, most: int) -> list[int]:
    """Return the checksums of tensors: `table` has a row for each, as `sample_sums` reads it."""
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


def _of_one(tensor: Tensor) -> int:
    """Return the checksum of one tensor, by torch."""
    plain = tensor.detach().as_subclass(Tensor)
    if not is_dense(plain):
        plain = plain.contiguous()
    if plain.data_ptr() % 4 or plain.storage_offset() * plain.itemsize % 4 or plain.is_conj():
        plain = plain.clone()  # words begin where a number does
    row = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())
    words = row.view(torch.int32 if row.nbytes % 4 == 0 else torch.uint8)
    places, factors = _places(plan(plain), words.device)
    return int((words[places].long() * factors).sum())


@lru_cache(maxsize=64)
def _places(of: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where to read, (count,), and what each word is multiplied by."""
    i = torch.arange(of.read, device=device)
    start, end = i * of.words // max(of.read, 1), (i + 1) * of.words // max(of.read, 1)
    places = start + i // of.of_row * STEP % (end - start).clamp(min=1)
    mixed = i * MIX[0]
    mixed = (mixed ^ mixed >> 29) * MIX[1]
    return places, mixed ^ mixed >> 32 | 1


def _address(tensor: Tensor) -> int:
    try:
        return 0 if tensor.is_meta else tensor.data_ptr()
    except RuntimeError:  # a kind that keeps its numbers elsewhere
        return 0


def _on_cuda() -> bool:
    started: Any = torch.cuda.is_initialized  # untyped
    return bool(started())
