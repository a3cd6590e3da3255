"""FlashAttention-3's forward pass (package `fa3-fwd`), in the inputs' dtype or in float8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.operator import operator


def _fake_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    return query.new_empty(query.shape)


@operator(fake=_fake_attention)
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention. On a CPU this is torch's scaled dot-product attention.

    Args:
        query: (batch, query tokens, heads, head width), bfloat16 or float16.
        key: (batch, key tokens, heads, head width).
        value: (batch, key tokens, heads, head width).

    Returns:
        (batch, query tokens, heads, head width).
    """
    return _fa3_forward(query, key, value) if query.is_cuda else _torch_attention(query, key, value)


def _fake_float8_attention(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,  # noqa: ARG001
    q_scale: Tensor,  # noqa: ARG001
    k_scale: Tensor,  # noqa: ARG001
    v_scale: Tensor,  # noqa: ARG001
    dtype: torch.dtype,
) -> Tensor:
    return query.new_empty(query.shape, dtype=dtype)


@operator(fake=_fake_float8_attention)
def float8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Compute attention on quantized inputs.

    The kernel also rounds the softmax probabilities to float8. The CPU emulation does not.

    Args:
        query: (batch, query tokens, heads, head width), float8.
        key: (batch, key tokens, heads, head width), float8.
        value: (batch, key tokens, heads, head width), float8.
        q_scale: (1,), float32: the dequantization factor of the query.
        k_scale: (1,), float32: the dequantization factor of the key.
        v_scale: (batch, heads), float32: the dequantization factors of the value.
        dtype: dtype of the result; the kernel itself returns bfloat16.

    Returns:
        (batch, query tokens, heads, head width).
    """
    if query.is_cuda:
        scales = [s.expand(v_scale.shape).contiguous() for s in (q_scale, k_scale, v_scale)]
        return _fa3_forward(query, key, value, scales).to(dtype)
    by_head = v_scale[:, None, :, None]
    q, k, v = query.float() * q_scale, key.float() * k_scale, value.float() * by_head
    return _torch_attention(q, k, v).to(dtype)


def _fa3_forward(
    query: Tensor, key: Tensor, value: Tensor, scales: Sequence[Tensor | None] = (None,) * 3
) -> Tensor:
    """Call the package's operator directly: its Python function costs the host 0.15 ms more a call.

    The many unused arguments serve paged KV caches, variable-length sequences and windows.
    """
    import fa3_fwd._C  # noqa: F401 - registers the operator

    unused = (None,) * 17  # paged KV cache, variable lengths, rotary embedding, left padding
    window, chunk, softcap, interleaved, metadata, splits = (-1, -1), 0, 0.0, True, None, 1
    out: Tensor = torch.ops.fa3_fwd.fwd(
        query, key, value, *unused, *scales, query.shape[-1] ** -0.5, False, *window, chunk,
        softcap, interleaved, metadata, splits, None, 0,
    )[0]  # fmt: skip
    return out


def _torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
