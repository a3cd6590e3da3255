"""Row-wise int8 quantization, and matrix products with such rows.

A row's scale is its largest magnitude divided by 127. The numbers between two steps of the scale
are rounded: of a normally distributed row by 0.8% on average, where float8 (e4m3) rounds by 2.6%.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

INT8_MAX = 127
_FEWEST_ROWS = 17
"""The fewest rows that `torch._int_mm` takes on a GPU."""


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (…, rows, width) row by row: int8 data, and float32 scales (…, rows, 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / INT8_MAX).clamp(min=1e-12)
    return (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Round the input's rows to int8, and compute `x · weightᵀ + bias`.

    On a GPU the product is one of int8 numbers, summed in int32; elsewhere one in float32.

    Args:
        x: (batch, tokens, width).
        weight: (width out, width), int8.
        weight_scale: (width out, 1), float32.
        bias: (width out,), or None.
        dtype: dtype of the result.

    Returns:
        (batch, tokens, width out).
    """
    data, scale = quantize_int8(x)
    rows = data.flatten(0, -2)
    if data.is_cuda and rows.shape[0] >= _FEWEST_ROWS:
        summed = torch._int_mm(rows, weight.t())  # noqa: SLF001 - torch has no public name for it
        made = summed.float() * scale.flatten(0, -2) * weight_scale.view(-1)
    else:
        made = F.linear(rows.float() * scale.flatten(0, -2), weight.float() * weight_scale)
    made = made if bias is None else made + bias.float()
    return made.to(dtype).view(*x.shape[:-1], weight.shape[0])


def int8_weight_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute `x · weightᵀ + bias` with an int8 weight, in the dtype of `x`.

    It rounds no activation: it casts the weight, and scales the result's columns. In float16 it
    scales the weight instead, since 127 · x could exceed float16's range.

    Args:
        x: (batch, tokens, width).
        weight: (width out, width), int8.
        weight_scale: (width out, 1), float32.
        bias: (width out,), or None.

    Returns:
        (batch, tokens, width out).
    """
    dense = weight.to(x.dtype)
    if x.dtype is torch.float16:
        return F.linear(x, (dense * weight_scale).to(x.dtype), bias)
    made = F.linear(x, dense) * weight_scale.view(-1)
    return (made if bias is None else made + bias).to(x.dtype)
