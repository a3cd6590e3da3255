"""MemoryLayout: channels-last convolution weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fluxfire import modules
from fluxfire.passes.shared.parameters import change_storage
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.transaction import Transaction

_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """Stores the weights of 2-D convolutions channels-last.

    FLUX's transformer has no 4-D weight, so nothing changes there. The VAE's convolutions
    do change, for the worse. Measured on an H100 (docs, "Passes"): decoding 93 → 145 ms. It is
    here because the article that fluxfire grew from uses it, and is in no other preset.
    """

    name: ClassVar[str] = "memory-layout"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse weights that cannot be laid out anew, and say when there are none."""
        if "sequential-offload" in target.traits or "group-offload" in target.traits:
            yield Finding(
                "error",
                "the weights are moved module by module while the pipeline runs, "
                "which would undo the layout",
                "use enable_model_cpu_offload() or none",
            )
        if not list(_convolutions(target.pipe)):
            yield Finding("info", "no component has 4-D weights; nothing to do")

    def apply(self, tx: Transaction) -> Change:
        """Lay out every 4-D weight that is not channels-last yet; strides are restored."""
        count = 0
        for module, name, weight in _convolutions(tx.pipe):
            if weight.is_contiguous(memory_format=torch.channels_last):
                continue
            tx.on_undo(partial(change_storage, module, name, partial(_laid_out, weight.stride())))
            with modules.as_made(weight):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            count += 1
        return Change(count, "convolution weights made channels-last")


def _convolutions(pipe: object) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Iterate over the 4-D weights: (module, name in it, weight)."""
    for _, component in modules.components(pipe):
        for module in component.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == _DIMENSIONS and not modules.is_quantized(weight):
                    yield module, name, weight


def _laid_out(strides: tuple[int, ...], old: Tensor) -> Tensor:
    """Give a weight the strides it had, wherever and in whichever dtype it is now."""
    if old.stride() == strides:
        return old
    made = torch.empty_strided(old.shape, strides, dtype=old.dtype, device=old.device)
    return made.copy_(old)
