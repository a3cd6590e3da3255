"""Attention in float8 (e4m3), by FlashAttention-3's forward, and heads made in float8 for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.float8 import FLOAT8, LARGEST
from fluxfire.kernels.operator import operator
from fluxfire.kernels.rotated import in_heads, joined_heads, launch, room, rotated_heads


def rotated_heads_float8(
    query: Tensor, key: Tensor, value: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, scales: list[Tensor], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rotated_heads`, and the values with them, all in float8.

    They are divided by `scales`: of query and key (1,), of the value (batch, heads), float32.
    """
    if query.is_cuda:
        return _rotated_heads_float8_cuda(
            query, key, value, q_weight, k_weight, cos, sin, scales, eps
        )
    q, k = rotated_heads(query, key, q_weight, k_weight, cos, sin, eps)
    return _scaled(q, k, in_heads(value, cos.shape[-1]), scales)


def _rotated_heads_float8_cuda(
    query: Tensor, key: Tensor, value: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, scales: list[Tensor], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = _empty(query, query.shape[1], cos)
    launch((query, key, value), (q_weight, k_weight), cos, sin, eps, (q, k, v), scales=scales)
    return q, k, v


def joined_heads_float8(
    image: list[Tensor], text: list[Tensor], image_weights: list[Tensor],
    text_weights: list[Tensor], cos: Tensor, sin: Tensor, scales: list[Tensor], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`joined_heads` in float8; `scales` as in `rotated_heads_float8`."""
    if cos.is_cuda:
        return _joined_heads_float8_cuda(
            image, text, image_weights, text_weights, cos, sin, scales, eps
        )
    q, k, v = joined_heads(image, text, image_weights, text_weights, cos, sin, eps)
    return _scaled(q, k, v, scales)


def _joined_heads_float8_cuda(
    image: list[Tensor], text: list[Tensor], image_weights: list[Tensor],
    text_weights: list[Tensor], cos: Tensor, sin: Tensor, scales: list[Tensor], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = text[0].shape[1]
    out = _empty(image[0], tokens + image[0].shape[1], cos)
    for stream, weights, first in ((text, text_weights, 0), (image, image_weights, tokens)):
        launch(
            (stream[0], stream[1], stream[2]), (weights[0], weights[1]), cos, sin, eps, out,
            first=first, scales=scales,
        )  # fmt: skip
    return out


def _attended(
    query: Tensor, key: Tensor, value: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor,  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty_like(query, dtype=dtype)


@operator(fake=_attended)
def float8_attention(
    query: Tensor, key: Tensor, value: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Attend.

    The kernel also rounds the weights of its sum to float8, which the arithmetic for a CPU
    does not.

    Args:
        query: (batch, tokens, heads, head width), float8.
        key: likewise.
        value: likewise.
        q_scale: (1,), float32: what to multiply the query by.
        k_scale: (1,), float32.
        v_scale: (batch, heads), float32.
        dtype: of the result; the kernel's is bfloat16.

    Returns:
        (batch, tokens, heads, head width).
    """
    if query.is_cuda:
        return _float8_attention_cuda(query, key, value, q_scale, k_scale, v_scale, dtype)
    q, k, v = (
        query.float() * q_scale,
        key.float() * k_scale,
        value.float() * v_scale[:, None, :, None],
    )
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))  # type: ignore[arg-type]
    return out.transpose(1, 2).to(dtype).contiguous()


def _float8_attention_cuda(
    query: Tensor, key: Tensor, value: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from fa3_fwd_interface import flash_attn_func

    shape = v_scale.shape
    out = flash_attn_func(
        query, key, value, q_descale=q_scale.expand(shape).contiguous(),
        k_descale=k_scale.expand(shape).contiguous(), v_descale=v_scale,
    )  # fmt: skip
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made.to(dtype)


def _scaled(q: Tensor, k: Tensor, v: Tensor, scales: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    by = (scales[0], scales[1], scales[2][:, None, :, None])
    q8, k8, v8 = (
        (x.float() / s).clamp(-LARGEST, LARGEST).to(FLOAT8).contiguous()
        for x, s in zip((q, k, v), by, strict=True)
    )
    return q8, k8, v8


def _empty(like: Tensor, tokens: int, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (room(like, tokens, cos, FLOAT8) for _ in range(3))
    return q, k, v
