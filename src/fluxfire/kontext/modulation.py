"""The modulations of Flux's adaptive layer norms: six vectors, or three, for each sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.func import functional_call

COLUMNS = "_fluxfire_columns"
"""On a norm whose modulations come from a table: its part of what a block gets for `temb`."""


def modulations(norm: Any, temb: Tensor) -> Tensor:
    """Return a norm's modulations, computed or looked up.

    Args:
        norm: diffusers' `AdaLayerNormZero` or `AdaLayerNormZeroSingle`.
        temb: (batch, width), the embedding of time step, guidance and pooled text; or rows of a
            table, (batch, the modulations of all norms of the block).

    Returns:
        (batch, 6 · width) or (batch, 3 · width): shift, scale and gate, of the attention first.
    """
    columns = getattr(norm, COLUMNS, None)
    if columns is not None and temb.shape[-1] != norm.linear.in_features:
        start, stop = columns
        return temb[:, start:stop]
    linear, x = norm.linear, norm.silu(temb)
    made: Tensor
    if linear.bias is None or linear.weight.device == linear.bias.device:
        made = linear(x)
        return made
    weight = linear.weight.to(x.device, non_blocking=True)  # it alone waits in host memory
    name = "base_layer.weight" if hasattr(linear, "base_layer") else "weight"  # under a LoRA
    made = functional_call(linear, {name: weight}, (x,))
    return made
