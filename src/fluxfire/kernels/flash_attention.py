"""FlashAttention-3's forward, from the package `fa3-fwd`, in the inputs' dtype or in float8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.operator import operator


def _like_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    return query.new_empty(query.shape)


@operator(fake=_like_query)
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend; on a CPU by torch's own attention.

    Args:
        query: (batch, tokens, heads, head width), bfloat16 or float16.
        key: (batch, perhaps other tokens, heads, head width).
        value: likewise.

    Returns:
        Of the query's shape.
    """
    return _flash(query, key, value) if query.is_cuda else _attended(query, key, value)


def _of_dtype(
    query: Tensor, key: Tensor, value: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor,  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return query.new_empty(query.shape, dtype=dtype)


@operator(fake=_of_dtype)
def float8_attention(
    query: Tensor, key: Tensor, value: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Attend.

    The kernel also rounds the weights of its sum to float8, which the arithmetic for a CPU
    does not.

    Args:
        query: (batch, tokens, heads, head width), float8.
        key: (batch, perhaps other tokens, heads, head width), float8.
        value: likewise.
        q_scale: (1,), float32: what to multiply the query by.
        k_scale: (1,), float32.
        v_scale: (batch, heads), float32.
        dtype: of the result; the kernel's is bfloat16.

    Returns:
        (batch, tokens, heads, head width).
    """
    if query.is_cuda:
        scales = [s.expand(v_scale.shape).contiguous() for s in (q_scale, k_scale, v_scale)]
        return _flash(query, key, value, scales).to(dtype)
    by_head = v_scale[:, None, :, None]
    q, k, v = query.float() * q_scale, key.float() * k_scale, value.float() * by_head
    return _attended(q, k, v).to(dtype)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scales: Sequence[Tensor | None] = (None,) * 3
) -> Tensor:
    """Call the package's own operator: its Python around that took 0.15 ms a call of the host's.

    Its arguments are those of a key-value cache, of sequences of many lengths and of windows,
    none of which is used.
    """
    import fa3_fwd._C  # noqa: F401 - registers the operator

    unused = (None,) * 17
    window, chunk, softcap, interleaved, metadata, splits = (-1, -1), 0, 0.0, True, None, 1
    out: Tensor = torch.ops.fa3_fwd.fwd(
        query, key, value, *unused, *scales, query.shape[-1] ** -0.5, False, *window, chunk,
        softcap, interleaved, metadata, splits, None, 0,
    )[0]  # fmt: skip
    return out


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
