"""How far a tensor is from a cached one, for each sample of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_abs(values: Tensor) -> Tensor:
    """Return the mean absolute value of each sample: (batch, tokens, width) to (batch,).

    The sum is in float32, since bfloat16 would round it to 8 bits.
    """
    return values.abs().mean((1, 2), dtype=torch.float32)


def relative_distance(new: Tensor, cached: Tensor, cached_size: Tensor | None = None) -> Tensor:
    """Return `mean_abs(new - cached) / mean_abs(cached)` of each sample: (batch,), float32.

    Args:
        new: (batch, tokens, width).
        cached: (batch, tokens, width).
        cached_size: (batch,): `mean_abs(cached)`, if it is known already.
    """
    return mean_abs(new - cached) / (mean_abs(cached) if cached_size is None else cached_size)
