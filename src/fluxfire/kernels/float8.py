"""Row-wise float8 (e4m3) quantization, and matrix products of quantized rows.

A row's scale is its largest magnitude divided by 448, the largest e4m3 number, so no number is
clipped. On a GPU the kernel that produces a row also quantizes it, while the row is in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.modulated import modulated_norm
from fluxfire.kernels.segments import block_size, contiguous_rows, segments, with_equal_strides

E4M3 = torch.float8_e4m3fn
E4M3_MAX: float = torch.finfo(E4M3).max


class QuantizedRows(NamedTuple):
    """A tensor in float8 with one scale for each row (token).

    Attributes:
        data: (batch, tokens, width), float8.
        scale: (batch, tokens, 1), float32: the factors that dequantize the data.
    """

    data: Tensor
    scale: Tensor


def float8_scale(largest: Tensor) -> Tensor:
    """Return the scale that maps this largest magnitude to e4m3's largest number, in float32."""
    return (largest / E4M3_MAX).clamp(min=1e-12)


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Divide by a scale, clamp to e4m3's range and round to float8."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def modulated_norm_float8(
    image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `modulated_norm` and quantize its rows: (data, scale) as in `QuantizedRows`."""
    if image.is_cuda:
        return _modulated_norm_float8_cuda(image, text, shift, scale, eps)
    return _quantize(modulated_norm(image, text, shift, scale, eps).float())


def _modulated_norm_float8_cuda(
    image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from fluxfire.kernels.triton_kernels import norm_rows_float8

    shift, scale = with_equal_strides(shift, scale)
    tokens, width = image.shape[1] + (0 if text is None else text.shape[1]), image.shape[2]
    data, scales = _empty_rows(image, tokens, width)
    for x, first in segments(image, text):
        norm_rows_float8[x.shape[1], x.shape[0]](
            x, shift, scale, data, scales, x.stride(0), x.stride(1), shift.stride(0), tokens,
            first, EPS=eps, WIDTH=width, BLOCK=block_size(width), num_warps=4,
        )  # fmt: skip
    return data, scales


def gelu_float8(beside: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GELU (tanh approximation) and quantize the rows.

    Args:
        beside: (batch, tokens, other width), concatenated before GELU's output; or None.
        x: (batch, tokens, width).

    Returns:
        (data, scale) as in `QuantizedRows`, of width `other width + width`.
    """
    if x.is_cuda:
        return _rows_float8_cuda(beside, x, gelu=True)
    made = F.gelu(x.float(), approximate="tanh")
    return _quantize(made if beside is None else torch.cat([beside.float(), made], dim=-1))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (batch, tokens, width) row by row: (data, scale) as in `QuantizedRows`."""
    if x.is_cuda:
        return _rows_float8_cuda(None, x, gelu=False)
    return _quantize(x.float())


def float8_linear(
    rows: QuantizedRows,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `rows · weightᵀ + bias`: on a GPU with `torch._scaled_mm`, elsewhere in float32.

    Args:
        rows: the quantized input.
        weight: (width out, width), float8.
        weight_scale: (width out, 1), float32.
        bias: (width out,), or None.
        dtype: dtype of the result.

    Returns:
        (batch, tokens, width out).
    """
    shape = (*rows.data.shape[:-1], weight.shape[0])
    if not rows.data.is_cuda:
        made = F.linear(rows.data.float() * rows.scale, weight.float() * weight_scale)
        return (made if bias is None else made + bias.float()).to(dtype)
    within = None if dtype is torch.float32 else bias  # cuBLAS adds no bias to a float32 result
    made = torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it yet
        rows.data.flatten(0, -2), weight.t(), rows.scale.flatten(0, -2), weight_scale.t(),
        bias=within, out_dtype=dtype, use_fast_accum=True,
    )  # fmt: skip
    if bias is not None and within is None:
        made = made + bias
    return made.view(shape)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (width out, width) row by row: float8 data, and float32 scales (width out, 1)."""
    return _quantize(weight.float())


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = float8_scale(x.abs().amax(-1, keepdim=True))
    return to_float8(x, scale), scale


def _rows_float8_cuda(beside: Tensor | None, x: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    from fluxfire.kernels.triton_kernels import rows_float8

    x = contiguous_rows(x)
    left = x if beside is None else contiguous_rows(beside)
    before = 0 if beside is None else left.shape[2]
    data, scale = _empty_rows(x, x.shape[1], before + x.shape[2])
    rows_float8[x.shape[1], x.shape[0]](
        left, x, data, scale, left.stride(0), left.stride(1), x.stride(0), x.stride(1),
        BESIDE=before, WIDTH=x.shape[2], BLOCK=block_size(before + x.shape[2]), GELU=gelu,
        num_warps=8 if before + x.shape[2] > 4096 else 4,  # noqa: PLR2004
    )  # fmt: skip
    return data, scale


def _empty_rows(like: Tensor, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    batch = like.shape[0]
    return (
        like.new_empty(batch, tokens, width, dtype=E4M3),
        like.new_empty(batch, tokens, 1, dtype=torch.float32),
    )
