"""Rows in float8 (e4m3), each with a scale of its own, and products of them.

A row is divided by its largest magnitude over 448, the largest number of e4m3, so nothing is
clipped. The operators quantize where the row is made, while it still is in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.modulated import modulated_norm
from fluxfire.kernels.segments import alike, block_of, in_rows, segments

FLOAT8 = torch.float8_e4m3fn
LARGEST: float = torch.finfo(FLOAT8).max


class Rows(NamedTuple):
    """Quantized rows.

    Attributes:
        data: (batch, tokens, width), float8.
        scale: (batch, tokens, 1), float32: what to multiply the data by.
    """

    data: Tensor
    scale: Tensor


def scale_for(largest: Tensor) -> Tensor:
    """Return what to divide float32 numbers by whose largest magnitude is this one, for float8."""
    return (largest / LARGEST).clamp(min=1e-12)


def in_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale and round to float8; what is beyond its largest number is cut off."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8)


def modulated_norm_float8(
    image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`modulated_norm`, its rows in float8: (data, scale) as in `Rows`."""
    if image.is_cuda:
        return _modulated_norm_float8_cuda(image, text, shift, scale, eps)
    return _quantized(modulated_norm(image, text, shift, scale, eps).float())


def _modulated_norm_float8_cuda(
    image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from fluxfire.kernels.triton_kernels import norm_rows_float8

    shift, scale = alike(shift, scale)
    tokens, width = image.shape[1] + (0 if text is None else text.shape[1]), image.shape[2]
    data, scales = _empty(image, tokens, width)
    for x, first in segments(image, text):
        norm_rows_float8[x.shape[1], x.shape[0]](
            x, shift, scale, data, scales, x.stride(0), x.stride(1), shift.stride(0), tokens,
            first, EPS=eps, WIDTH=width, BLOCK=block_of(width), num_warps=4,
        )  # fmt: skip
    return data, scales


def gelu_float8(beside: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU by its tanh formula, its rows in float8.

    Args:
        beside: (batch, tokens, width of its own), put before each row as it is; or None.
        x: (batch, tokens, width).

    Returns:
        (data, scale) as in `Rows`, as wide as both.
    """
    if x.is_cuda:
        return _rows_float8_cuda(beside, x, gelu=True)
    made = F.gelu(x.float(), approximate="tanh")
    return _quantized(made if beside is None else torch.cat([beside.float(), made], dim=-1))


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (batch, tokens, width) row by row: (data, scale) as in `Rows`."""
    if x.is_cuda:
        return _rows_float8_cuda(None, x, gelu=False)
    return _quantized(x.float())


def float8_linear(
    rows: Rows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`rows · weightᵀ + bias`; on a GPU by `torch._scaled_mm`, elsewhere in float32.

    Args:
        rows: what to multiply.
        weight: (width out, width), float8.
        weight_scale: (width out, 1), float32.
        bias: (width out,), or None.
        dtype: of the result.

    Returns:
        (batch, tokens, width out).
    """
    shape = (*rows.data.shape[:-1], weight.shape[0])
    if not rows.data.is_cuda:
        made = F.linear(rows.data.float() * rows.scale, weight.float() * weight_scale)
        return (made if bias is None else made + bias.float()).to(dtype)
    within = None if dtype is torch.float32 else bias  # cuBLAS adds none to float32
    made = torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it yet
        rows.data.flatten(0, -2), weight.t(), rows.scale.flatten(0, -2), weight_scale.t(),
        bias=within, out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip
    if bias is not None and within is None:
        made = made + bias
    return made.view(shape)


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (width out, width) row by row: (float8, float32 scales of (width out, 1))."""
    return _quantized(weight.float())


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale_for(x.abs().amax(-1, keepdim=True))
    return in_float8(x, scale), scale


def _rows_float8_cuda(beside: Tensor | None, x: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    from fluxfire.kernels.triton_kernels import rows_float8

    x = in_rows(x)
    left = x if beside is None else in_rows(beside)
    before = 0 if beside is None else left.shape[2]
    data, scale = _empty(x, x.shape[1], before + x.shape[2])
    rows_float8[x.shape[1], x.shape[0]](
        left, x, data, scale, left.stride(0), left.stride(1), x.stride(0), x.stride(1),
        BESIDE=before, WIDTH=x.shape[2], BLOCK=block_of(before + x.shape[2]), GELU=gelu,
        num_warps=8 if before + x.shape[2] > 4096 else 4,  # noqa: PLR2004
    )  # fmt: skip
    return data, scale


def _empty(like: Tensor, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    batch = like.shape[0]
    return (
        like.new_empty(batch, tokens, width, dtype=FLOAT8),
        like.new_empty(batch, tokens, 1, dtype=torch.float32),
    )
