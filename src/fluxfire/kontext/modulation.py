"""The modulations (shift, scale, gate) of Flux's adaptive layer norms."""

from __future__ import annotations

from typing import TypeAlias

from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor
from torch.func import functional_call

ModulatedNorm: TypeAlias = AdaLayerNormZero | AdaLayerNormZeroSingle
"""A norm of a double block, or of a single block."""
COLUMNS = "_fluxfire_columns"
"""Attribute of a norm that reads a table: its columns (start, stop) in the block's table row."""


def modulations(norm: ModulatedNorm, temb: Tensor) -> Tensor:
    """Return a norm's modulations, computed or read from a table row.

    Args:
        norm: the norm.
        temb: (batch, width), the embedding of time step, guidance and pooled text; or table rows
            (batch, modulations of all norms of the block), see `ModulationTable`.

    Returns:
        (batch, 6 · width): shift, scale and gate of the attention, then of the MLP; or
        (batch, 3 · width): shift, scale and gate of a single block.
    """
    columns = getattr(norm, COLUMNS, None)
    if columns is not None and temb.shape[-1] != norm.linear.weight.shape[1]:
        start, stop = columns
        return temb[:, start:stop]
    linear, x = norm.linear, norm.silu(temb)
    made: Tensor
    if linear.bias is None or linear.weight.device == linear.bias.device:
        made = linear(x)
        return made
    # ModulationTable(host=True) keeps the weight in host memory, and the bias on the device. PEFT
    # creates a LoRA where the weight is.
    away = {n: p for n, p in linear.named_parameters() if p.device != x.device}
    lent = {name: p.to(x.device, non_blocking=True) for name, p in away.items()}
    made = functional_call(linear, lent, (x,))
    return made
