"""Checksums of many tensors by some of their numbers, in one kernel.

Each tensor is taken for a row of 32-bit words, cut into as many pieces as there are samples. One
word of each piece counts, at a place that changes from piece to piece, so that hardly a column of a
matrix goes unread. A tensor with fewer words than samples is read whole.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 32768
"""Words read of a tensor, or one for each of its rows if it has more."""
HOST_SAMPLES = 64
"""Words read of a pinned tensor in host memory: each travels over the bus on its own."""
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_MIX = 0x9E3779B97F4A7C1


def of(tensors: Sequence[Tensor]) -> list[int]:
    """Return what tells each of these tensors from another. Waits for their devices.

    The same numbers have the same checksum on every device, but where they are pinned.

    Args:
        tensors: any. Those without plain numbers of their own (on the meta device, or a subclass
            of tensor) all have the checksum 0.
    """
    sums = [0] * len(tensors)
    by_kernel: dict[torch.device, list[int]] = defaultdict(list)
    gpu = _on_cuda() and importlib.util.find_spec("triton") is not None
    for index, tensor in enumerate(tensors):
        if tensor.is_meta or type(tensor) not in _PLAIN:
            continue
        words = gpu and tensor.nbytes % 4 == 0 and _is_dense(tensor)
        if words and tensor.is_cuda:
            by_kernel[tensor.device].append(index)
        elif words and tensor.is_pinned():  # a GPU reads it sooner than the host can sample it
            by_kernel[torch.device("cuda", torch.cuda.current_device())].append(index)
        else:
            sums[index] = _of_one(tensor)
    for device, indices in by_kernel.items():
        made = _of_many([tensors[index] for index in indices], device)
        for index, of_one in zip(indices, made, strict=True):
            sums[index] = of_one
    return sums


def samples(tensor: Tensor) -> int:
    """Return how many words of a tensor are read."""
    rows = len(tensor) if tensor.ndim else 1
    pinned = not tensor.is_cuda and _on_cuda() and tensor.is_pinned()
    return min(tensor.nbytes // 4, HOST_SAMPLES if pinned else max(SAMPLES, rows))


def _of_many(tensors: list[Tensor], device: torch.device) -> list[int]:
    import triton

    from fluxfire.kernels.triton_kernels import sample_sums

    table = [(t.data_ptr(), t.nbytes // 4, samples(t)) for t in tensors]
    with torch.cuda.device(device):
        on_device = torch.tensor(table, dtype=torch.int64).to(device)
        sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
        most, block = max(count for *_, count in table), 1024
        sample_sums[(len(tensors), triton.cdiv(most, block))](
            on_device, sums, MIX=_MIX, BLOCK=block
        )
        made: list[int] = sums.tolist()
    return made


def _of_one(tensor: Tensor) -> int:
    """Return the checksum of one tensor, by torch."""
    plain = tensor.detach()
    if not _is_dense(plain):
        plain = plain.contiguous()
    row = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())
    if row.nbytes % 4 == row.storage_offset() * row.itemsize % 4 == 0:
        words = row.view(torch.int32)
    else:
        words = row.view(torch.uint8)
    rows = len(tensor) if tensor.ndim else 1
    places, weights = _places(len(words), min(len(words), max(SAMPLES, rows)), words.device)
    return int((words[places].long() * weights).sum())


@lru_cache(maxsize=64)
def _places(words: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where to read, (count,), and what each word is multiplied by."""
    i = torch.arange(count, device=device)
    start, end = i * words // max(count, 1), (i + 1) * words // max(count, 1)
    jump = (i * _MIX >> 33) & 0x3FFFFFFF
    return start + jump % (end - start).clamp(min=1), i * _MIX | 1


def _on_cuda() -> bool:
    started: Any = torch.cuda.is_initialized  # untyped
    return bool(started())


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie side by side, in whichever order (as channels last do)."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.is_contiguous() or size == tensor.numel()
