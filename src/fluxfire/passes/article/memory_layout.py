"""MemoryLayout: channels-last convolution weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline
from fluxfire.passes.shared.parameters import change_storage
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.transaction import Transaction

_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """Stores the weights of 2-D convolutions channels-last.

    FLUX's transformer has no 4-D weight, so nothing changes there. The VAE's convolutions become
    slower. Measured on an H100 (docs, "Passes"): decoding 93 → 145 ms. The pass exists because the
    article that fluxfire started from uses it. It is in the preset `article` only.
    """

    name: ClassVar[str] = "memory-layout"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse offloading that would undo the layout, and remark if there are no 4-D weights."""
        if "sequential-offload" in target.traits or "group-offload" in target.traits:
            yield Finding(
                "error",
                "offloading moves the weights module by module while the pipeline runs, "
                "which would undo the layout",
                "use enable_model_cpu_offload() or none",
            )
        if not list(_convolutions(target.pipe)):
            yield Finding("info", "no component has 4-D weights; nothing to do")

    def apply(self, tx: Transaction) -> Change:
        """Make every 4-D weight channels-last; `restore` brings the old strides back."""
        count = 0
        for module, name, weight in _convolutions(tx.pipe):
            if weight.is_contiguous(memory_format=torch.channels_last):
                continue
            old = partial(_with_strides, weight.stride())
            tx.on_undo(partial(change_storage, module, name, old))
            with modules.matching_inference_mode(weight):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            count += 1
        return Change(count, "convolution weights made channels-last")


def _convolutions(pipe: Pipeline) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the 4-D weights: (module, name in the module, weight)."""
    for _, component in modules.components(pipe):
        for module in component.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == _DIMENSIONS and not modules.is_quantized(weight):
                    yield module, name, weight


def _with_strides(strides: tuple[int, ...], weight: Tensor) -> Tensor:
    """Return a weight with other strides, on its current device and in its current dtype."""
    if weight.stride() == strides:
        return weight
    copy = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
    return copy.copy_(weight)
