"""From projections to what attention takes: RMS norm and rotary embedding, streams joined."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfire.kernels.float8 import FLOAT8, in_float8
from fluxfire.kernels.segments import alike, block_of

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class Stream(NamedTuple):
    """A stream's projections, and the weights of its norms.

    Attributes:
        projected: query, key and value, each (batch, tokens, heads · head width); their rows
            may be parts of longer ones.
        weights: of the norms of query and key, each (head width,).
    """

    projected: Triple
    weights: Pair


def joint_heads(
    streams: Sequence[Stream],
    rotary: Pair,
    eps: float,
    *,
    scales: Triple | None = None,
    kept: Pair | None = None,
    kept_scales: Pair | None = None,
) -> Triple:
    """Norm and rotate each stream's queries and keys, and put the streams side by side.

    Args:
        streams: text, then image; or one that has both.
        rotary: cosine and sine, each (tokens, head width), float32, each number twice:
            neighbours turn together.
        eps: added to the mean square.
        scales: for float8: what to divide query and key by, (1,) each, and the value,
            (batch, heads); float32.
        kept: keys and values of further tokens as they are, to stand behind the streams':
            (batch, more tokens, heads, head width).
        kept_scales: what to multiply these by, (batch, heads), float32, where they are in float8
            and the streams are not.

    Returns:
        Query, (batch, tokens, heads, head width), and key and value, of `kept`'s tokens, too. In
        float8 with scales.
    """
    if rotary[0].is_cuda:
        return _joint_heads_cuda(streams, rotary, eps, scales, kept, kept_scales)
    width, first = rotary[0].shape[-1], 0
    joined: list[Triple] = []
    for (query, key, value), weights in streams:
        cos, sin = (x[first : first + query.shape[1]] for x in rotary)
        q, k = (_rotated(x, w, cos, sin, eps) for x, w in zip((query, key), weights, strict=True))
        joined.append((q, k, in_heads(value, width)))
        first += query.shape[1]
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*joined, strict=True))
    if scales is not None:
        q, k, v = (_scaled(x, s) for x, s in zip((q, k, v), scales, strict=True))
    if kept is not None:
        if kept_scales is not None:
            key, value = (
                dequantized(x, s, k.dtype) for x, s in zip(kept, kept_scales, strict=True)
            )
            kept = key, value
        k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), kept, strict=True))
    return q, k, v


def _joint_heads_cuda(
    streams: Sequence[Stream], rotary: Pair, eps: float, scales: Triple | None,
    kept: Pair | None, kept_scales: Pair | None,
) -> Triple:  # fmt: skip
    from fluxfire.kernels.triton_kernels import put_rows, rotate_heads

    cos, sin = (x.contiguous() for x in rotary)
    like, width = streams[0].projected[0], cos.shape[-1]
    tokens = sum(stream.projected[0].shape[1] for stream in streams)
    more = 0 if kept is None else kept[0].shape[1]
    dtype = like.dtype if scales is None else FLOAT8
    heads = like.shape[-1] // width

    def room(tokens: int) -> Tensor:
        return like.new_empty(like.shape[0], tokens, heads, width, dtype=dtype)

    q, k = room(tokens), room(tokens + more)
    copied = len(streams) > 1 or kept is not None or scales is not None
    v = room(tokens + more) if copied else in_heads(streams[0].projected[2], width)
    together = gcd(heads, 8)  # of 128 in bfloat16: 16 bytes for each of four warps' threads
    first = 0
    for projected, weights in streams:
        query, key, value = alike(*projected) if copied else (*alike(*projected[:2]), projected[2])
        rotate_heads[query.shape[1], heads // together, query.shape[0]](
            query, key, value, *weights, cos, sin, q, k, v, *(scales or [cos] * 3),
            query.stride(0), query.stride(1), q.stride(0), k.stride(0), q.stride(1), first, heads,
            EPS=eps, WIDTH=width, HEADS=together, COPY_VALUE=copied, FLOAT8=scales is not None,
            num_warps=4,
        )  # fmt: skip
        first += query.shape[1]
    if kept is not None:
        key, value = (x.contiguous() for x in kept)
        put_rows[more, key.shape[0]](
            key, value, *(kept_scales or (cos, cos)), k, v, key.stride(0), k.stride(0), tokens,
            HEADS=heads, WIDTH=width, BLOCK=block_of(heads * width),
            SCALED=kept_scales is not None, num_warps=4,
        )  # fmt: skip
    return q, k, v


def in_heads(x: Tensor, width: int) -> Tensor:
    """View (batch, tokens, heads · width) as (batch, tokens, heads, width)."""
    return x.view(*x.shape[:-1], -1, width)


def dequantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply (batch, tokens, heads, head width), float8, by (batch, heads)."""
    return (x.float() * scale[:, None, :, None]).to(dtype)


def _rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """The same in torch: (batch, tokens, heads, head width)."""
    heads = in_heads(x, cos.shape[-1]).float()
    normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    even, odd = normed[..., ::2], normed[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    rotated: Tensor = normed * cos[:, None].float() + turned * sin[:, None].float()
    return rotated.to(x.dtype)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return in_float8(x, scale[:, None, :, None] if scale.dim() > 1 else scale)
