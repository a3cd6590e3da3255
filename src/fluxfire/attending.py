"""Flux's attention between its projections: norms, rotation, and the kernel that attends."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor
from typing_extensions import override

from fluxfire.kernels import in_heads, joined_heads, rotated_heads
from fluxfire.kernels.float8 import LARGEST, Rows
from fluxfire.kernels.float8_attention import (
    float8_attention,
    joined_heads_float8,
    rotated_heads_float8,
)

Rotary = tuple[Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


class Float8AttnProcessor(FluxAttnProcessor):  # type: ignore[misc]
    """Attends in float8.

    Attributes:
        query_scale: (1,), float32: what a query in float8 is multiplied by.
        key_scale: (1,), float32: likewise.
    """

    query_scale: Tensor
    key_scale: Tensor

    def scales(self, device: torch.device) -> Pair:
        """Return both on a device: under offloading they were computed elsewhere."""
        return self.query_scale.to(device), self.key_scale.to(device)

    @override
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | Pair:
        """Attend as diffusers' processor does; with a mask or without rotation, by that."""
        if image_rotary_emb is None or attention_mask is not None or torch.is_grad_enabled():
            plain: Tensor | Pair = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return plain
        if encoder_hidden_states is None:
            return attend(attn, heads(projections(attn), hidden_states), image_rotary_emb)
        text, image = attend_jointly(attn, encoder_hidden_states, hidden_states, image_rotary_emb)
        return image, text


def attend(attention: Any, of_all: list[Tensor], rotary: Rotary) -> Tensor:
    """Attend over one stream.

    Args:
        attention: the module.
        of_all: query, key and value, each (batch, tokens, heads · head width).
        rotary: cosine and sine, each (tokens, head width).

    Returns:
        (batch, tokens, heads · head width), not yet projected.
    """
    query, key, value = of_all
    norms, eps = (attention.norm_q.weight, attention.norm_k.weight), attention.norm_q.eps
    processor = attention.processor
    if isinstance(processor, Float8AttnProcessor):
        scales = (*processor.scales(query.device), _value_scale(attention, value))
        made = rotated_heads_float8(query, key, value, *norms, *rotary, list(scales), eps)
        out: Tensor = float8_attention(*made, *scales, query.dtype).flatten(2, 3)
        return out
    query, key = rotated_heads(query, key, *norms, *rotary, eps)
    return _dispatched(processor, query, key, in_heads(value, attention.head_dim))


def attend_jointly(
    attention: Any, text: Tensor | Rows, image: Tensor | Rows, rotary: Rotary
) -> Pair:
    """Attend over text and image together.

    Args:
        attention: the module.
        text: (batch, text tokens, width), normed; perhaps in float8.
        image: (batch, image tokens, width), normed; perhaps in float8.
        rotary: cosine and sine, each (text tokens + image tokens, head width).

    Returns:
        Text and image, projected.
    """
    of_text, of_image = (
        heads(projections(attention, added=True), text),
        heads(projections(attention), image),
    )
    norms = [attention.norm_q.weight, attention.norm_k.weight]
    added_norms = [attention.norm_added_q.weight, attention.norm_added_k.weight]
    processor, eps, tokens = attention.processor, attention.norm_q.eps, of_text[0].shape[1]
    if isinstance(processor, Float8AttnProcessor):
        largest = torch.maximum(*(_value_scale(attention, x[2]) for x in (of_text, of_image)))
        scales = (*processor.scales(largest.device), largest)
        made = joined_heads_float8(
            of_image, of_text, norms, added_norms, *rotary, list(scales), eps
        )
        attended = float8_attention(*made, *scales, of_image[0].dtype).flatten(2, 3)
    else:
        joint = joined_heads(of_image, of_text, norms, added_norms, *rotary, eps)
        attended = _dispatched(processor, *joint)
    out = attention.to_out[1](attention.to_out[0](attended[:, tokens:]))
    return attention.to_add_out(attended[:, :tokens]), out


def projections(attention: Any, *, added: bool = False) -> list[Any]:
    """Return what makes queries, keys and values, of the text if `added`: one layer or three."""
    if attention.fused_projections:
        return [attention.to_added_qkv if added else attention.to_qkv]
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    return [getattr(attention, name) for name in names]


def heads(layers: list[Any], x: Tensor | Rows) -> list[Tensor]:
    """Return query, key and value, each (batch, tokens, heads · head width)."""
    made = [layer(x) for layer in layers]
    return list(made[0].chunk(3, dim=-1)) if len(made) == 1 else made


def bound(weights: list[Tensor], width: int) -> Tensor:
    """Return the scale of queries or keys: (1,), float32.

    After its RMS norm a head of some width has a length of at most the width's root times
    the largest weight, and turning keeps it: so no number of it can be larger.
    """
    largest = torch.stack([w.detach().float().abs().max() for w in weights]).max()
    scale: Tensor = largest * width**0.5 / LARGEST
    return scale.reshape(1)


def _value_scale(attention: Any, value: Tensor) -> Tensor:
    """Measure the scale of values, which nothing bounds: (batch, heads), float32."""
    largest = in_heads(value, attention.head_dim).abs().amax(dim=(1, 3)).float()
    scale: Tensor = (largest / LARGEST).clamp(min=1e-12)
    return scale


def _dispatched(processor: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by diffusers' dispatch: (batch, tokens, heads, head width) to (…, width)."""
    backend = processor._attention_backend  # noqa: SLF001 - where diffusers keeps it
    out: Tensor = dispatch_attention_fn(query, key, value, backend=backend).flatten(2, 3)
    return out
