"""RMS norm and rotary embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from fluxfire.kernels.segments import alike


def rotated_heads(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMS norm over each head, then the rotation.

    Args:
        query: (batch, tokens, heads · head width); its rows may be parts of longer ones.
        key: of the shape and strides of the query.
        q_weight: (head width,), of the norm.
        k_weight: (head width,).
        cos: (tokens, head width), float32, each number twice: neighbours turn together.
        sin: likewise.
        eps: added to the mean square.

    Returns:
        Query and key, each (batch, tokens, heads, head width), contiguous.
    """
    if query.is_cuda:
        return _rotated_heads_cuda(query, key, q_weight, k_weight, cos, sin, eps)
    return (
        _rotated(query, q_weight, cos, sin, eps).contiguous(),
        _rotated(key, k_weight, cos, sin, eps).contiguous(),
    )


def _rotated_heads_cuda(
    query: Tensor, key: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k = (room(query, query.shape[1], cos) for _ in range(2))
    launch((query, key, key), (q_weight, k_weight), cos, sin, eps, (q, k, k), copy=False)
    return q, k


def joined_heads(
    image: list[Tensor], text: list[Tensor], image_weights: list[Tensor],
    text_weights: list[Tensor], cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rotated_heads` for two streams, put side by side, and their values with them.

    Args:
        image: query, key and value of the image, each (batch, tokens, heads · head width).
        text: those of the text.
        image_weights: of the norms of the image's query and key, each (head width,).
        text_weights: of the text's.
        cos: (text tokens + image tokens, head width), float32, text first.
        sin: likewise.
        eps: added to the mean square.

    Returns:
        Query, key and value, each (batch, text tokens + image tokens, heads, head width).
    """
    if cos.is_cuda:
        return _joined_heads_cuda(image, text, image_weights, text_weights, cos, sin, eps)
    tokens = text[0].shape[1]
    joined = [
        torch.cat(
            [
                _rotated(text[i], text_weights[i], cos[:tokens], sin[:tokens], eps),
                _rotated(image[i], image_weights[i], cos[tokens:], sin[tokens:], eps),
            ],
            dim=1,
        )
        for i in range(2)
    ]
    value = in_heads(torch.cat([text[2], image[2]], dim=1), cos.shape[-1])
    return joined[0], joined[1], value


def _joined_heads_cuda(
    image: list[Tensor], text: list[Tensor], image_weights: list[Tensor],
    text_weights: list[Tensor], cos: Tensor, sin: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = text[0].shape[1]
    q, k, v = (room(image[0], tokens + image[0].shape[1], cos) for _ in range(3))
    for stream, weights, first in ((text, text_weights, 0), (image, image_weights, tokens)):
        launch(
            (stream[0], stream[1], stream[2]), (weights[0], weights[1]), cos, sin, eps, (q, k, v),
            first=first,
        )  # fmt: skip
    return q, k, v


def launch(
    inputs: tuple[Tensor, ...], weights: tuple[Tensor, Tensor], cos: Tensor,
    sin: Tensor, eps: float, outputs: tuple[Tensor, Tensor, Tensor], *, first: int = 0,
    copy: bool = True, scales: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """Run the Triton kernel on one stream.

    Args:
        inputs: query, key and value.
        weights: of the norms of query and key.
        cos: (joint tokens, head width), float32.
        sin: likewise.
        eps: added to the mean square.
        outputs: query, key and value, each (batch, joint tokens, heads, head width).
        first: the stream's first row in the joint sequence.
        copy: write the value, too.
        scales: to divide by for float8: of query and key (1,), of the value (batch, heads).
    """
    from fluxfire.kernels.triton_kernels import rotate_heads

    inputs = alike(*inputs)
    query, out = inputs[0], outputs[0]
    heads, width = out.shape[2:]
    together = gcd(heads, 8)  # of 128 in bfloat16: 16 bytes for each of four warps' threads
    rotate_heads[query.shape[1], heads // together, query.shape[0]](
        *inputs, *weights, cos.contiguous(), sin.contiguous(), *outputs, *(scales or [cos] * 3),
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), first,
        heads, eps, WIDTH=width, HEADS=together, COPY_VALUE=copy, FLOAT8=scales is not None,
        num_warps=4,
    )  # fmt: skip


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The same in torch: (batch, tokens, heads, head width)."""
    heads = in_heads(x, cos.shape[-1]).float()
    normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    even, odd = normed[..., ::2], normed[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    rotated: Tensor = normed * cos[:, None].float() + turned * sin[:, None].float()
    return rotated.to(x.dtype)


def in_heads(x: Tensor, width: int) -> Tensor:
    """View (batch, tokens, heads · width) as (batch, tokens, heads, width)."""
    return x.view(*x.shape[:-1], -1, width)


def room(like: Tensor, tokens: int, cos: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make (batch, tokens, heads, head width), unwritten; of another dtype if asked."""
    width = cos.shape[-1]
    shape = (like.shape[0], tokens, like.shape[-1] // width, width)
    return like.new_empty(shape, dtype=dtype or like.dtype)
