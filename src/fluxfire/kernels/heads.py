"""RMS norm and rotary embedding of query and key heads, and the concatenation of the streams."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfire.kernels.float8 import E4M3, to_float8
from fluxfire.kernels.segments import block_size, with_equal_strides

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class Stream(NamedTuple):
    """Projections of one stream (text or image), and its norm weights.

    Attributes:
        projected: query, key and value, each (batch, tokens, heads · head width); they may be
            slices of one wider tensor.
        weights: weights of the query's and the key's RMS norm, each (head width,).
    """

    projected: Triple
    weights: Pair


def joint_heads(
    streams: Sequence[Stream],
    rotary: Pair,
    eps: float,
    *,
    scales: Triple | None = None,
    cached: Pair | None = None,
    cached_scales: Pair | None = None,
) -> Triple:
    """Norm and rotate the queries and keys of each stream, and concatenate the streams.

    Args:
        streams: text and image; or one stream that holds both, text first.
        rotary: cosine and sine, each (tokens, head width), float32. Every number stands twice,
            since two neighbouring channels are rotated together.
        eps: added to the mean square.
        scales: divisors for float8 output: query (1,), key (1,), value (batch, heads), float32;
            None for output in the streams' dtype.
        cached: keys and values of earlier tokens, already normed and rotated, appended behind
            the streams' tokens: (batch, cached tokens, heads, head width).
        cached_scales: dequantization factors of `cached`, (batch, heads), float32, if `cached`
            is in float8 and the output is not.

    Returns:
        Query (batch, tokens, heads, head width); key and value (batch, tokens + cached tokens,
        heads, head width). All are in float8 if `scales` are given.
    """
    if rotary[0].is_cuda:
        return _joint_heads_cuda(streams, rotary, eps, scales, cached, cached_scales)
    width, first = rotary[0].shape[-1], 0
    joined: list[Triple] = []
    for (query, key, value), weights in streams:
        cos, sin = (x[first : first + query.shape[1]] for x in rotary)
        q, k = (
            _norm_and_rotate(x, w, cos, sin, eps)
            for x, w in zip((query, key), weights, strict=True)
        )
        joined.append((q, k, in_heads(value, width)))
        first += query.shape[1]
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*joined, strict=True))
    if scales is not None:
        q, k, v = (_divide_by_scale(x, s) for x, s in zip((q, k, v), scales, strict=True))
    if cached is not None:
        if cached_scales is not None:
            key, value = (
                dequantize(x, s, k.dtype) for x, s in zip(cached, cached_scales, strict=True)
            )
            cached = key, value
        k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), cached, strict=True))
    return q, k, v


def _joint_heads_cuda(
    streams: Sequence[Stream],
    rotary: Pair,
    eps: float,
    scales: Triple | None,
    cached: Pair | None,
    cached_scales: Pair | None,
) -> Triple:
    from fluxfire.kernels.triton_kernels import put_rows, rotate_heads

    cos, sin = (x.contiguous() for x in rotary)
    like, width = streams[0].projected[0], cos.shape[-1]
    tokens = sum(stream.projected[0].shape[1] for stream in streams)
    more = 0 if cached is None else cached[0].shape[1]
    dtype = like.dtype if scales is None else E4M3
    heads = like.shape[-1] // width

    def room(tokens: int) -> Tensor:
        return like.new_empty(like.shape[0], tokens, heads, width, dtype=dtype)

    q, k = room(tokens), room(tokens + more)
    copied = len(streams) > 1 or cached is not None or scales is not None
    v = room(tokens + more) if copied else in_heads(streams[0].projected[2], width)
    together = gcd(heads, 8)  # 8 bfloat16 heads of width 128: 16 bytes for each of 128 threads
    first = 0
    for projected, weights in streams:
        query, key, value = (
            with_equal_strides(*projected)
            if copied
            else (*with_equal_strides(*projected[:2]), projected[2])
        )
        rotate_heads[query.shape[1], heads // together, query.shape[0]](
            query, key, value, *weights, cos, sin, q, k, v, *(scales or [cos] * 3),
            query.stride(0), query.stride(1), q.stride(0), k.stride(0), q.stride(1), first, heads,
            EPS=eps, WIDTH=width, HEADS=together, COPY_VALUE=copied, TO_FLOAT8=scales is not None,
            num_warps=4,
        )  # fmt: skip
        first += query.shape[1]
    if cached is not None:
        key, value = (x.contiguous() for x in cached)
        put_rows[more, key.shape[0]](
            key, value, *(cached_scales or (cos, cos)), k, v, key.stride(0), k.stride(0), tokens,
            HEADS=heads, WIDTH=width, BLOCK=block_size(heads * width),
            SCALED=cached_scales is not None, num_warps=4,
        )  # fmt: skip
    return q, k, v


def in_heads(x: Tensor, width: int) -> Tensor:
    """View (batch, tokens, heads · width) as (batch, tokens, heads, width)."""
    return x.view(*x.shape[:-1], -1, width)


def dequantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply float8 (batch, tokens, heads, head width) by its scales (batch, heads)."""
    return (x.float() * scale[:, None, :, None]).to(dtype)


def _norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Compute the kernel's norm and rotation in torch: (batch, tokens, heads, head width)."""
    heads = in_heads(x, cos.shape[-1]).float()
    normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    even, odd = normed[..., ::2], normed[..., 1::2]
    swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
    rotated: Tensor = normed * cos[:, None].float() + swapped * sin[:, None].float()
    return rotated.to(x.dtype)


def _divide_by_scale(x: Tensor, scale: Tensor) -> Tensor:
    return to_float8(x, scale[:, None, :, None] if scale.dim() > 1 else scale)
