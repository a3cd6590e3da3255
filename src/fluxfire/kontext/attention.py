"""Flux's attention between its projections: norms, rotation, and the kernel that attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from typing_extensions import override

from fluxfire.edits.stand_in import StandIn
from fluxfire.kernels import in_heads, joint_heads
from fluxfire.kernels.flash_attention import flash_attention, float8_attention
from fluxfire.kernels.float8 import FLOAT8, LARGEST, Rows, in_float8, scale_for
from fluxfire.kernels.heads import Pair, Stream, Triple, dequantized
from fluxfire.kontext.pipeline import KONTEXT, PlainProcessor


class Kept(NamedTuple):
    """What one block keeps of the reference between steps; an attention argument.

    Attributes:
        key: (batch, reference tokens, heads, head width), normed and rotated.
        value: likewise.
        key_scale: (batch, heads), float32: of the keys, where these are in float8 and attention
            is not.
        value_scale: (batch, heads), float32: of the values, where they are in float8.
        fresh: whether the stream has the reference's tokens, to be kept; else it ends before
            them, and attends to these.
        due: (batch or 1, reference tokens or 1), whether to keep the new ones; None if all.
            Where not, the old ones are attended to.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor
    value_scale: Tensor
    fresh: bool
    due: Tensor | None = None

    def scales(self, dtype: torch.dtype) -> Pair | None:
        """Return what to multiply keys and values by to have them in a dtype, if anything."""
        return None if self.key.dtype == dtype else (self.key_scale, self.value_scale)


class KeepingAttnProcessor(StandIn, PlainProcessor):  # type: ignore[misc]
    """Attends as diffusers' processor does, bit for bit, and can keep the reference."""

    @override
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Pair | None = None,
        reference: Kept | None = None,
    ) -> Tensor | Pair:
        """Attend.

        Args:
            attn: the module.
            hidden_states: (batch, tokens, width): of the image; in a single block, of both.
            encoder_hidden_states: (batch, text tokens, width), or None.
            attention_mask: as in diffusers.
            image_rotary_emb: cosine and sine, each (tokens, head width).
            reference: what to keep, or to attend to.

        Returns:
            As diffusers: image and text, projected; of a single block both, unprojected.
        """
        rotary = image_rotary_emb
        device = hidden_states.device.type
        plainly = torch.is_grad_enabled() or torch.is_autocast_enabled(device)
        if rotary is None or attention_mask is not None or plainly:
            plain: Tensor | Pair = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary
            )
            return plain
        return self._attend(attn, hidden_states, encoder_hidden_states, rotary, reference)

    def _attend(
        self, attn: Any, image: Tensor, text: Tensor | None, rotary: Pair, kept: Kept | None
    ) -> Tensor | Pair:
        if kept is None:
            plain: Tensor | Pair = super().__call__(attn, image, text, None, rotary)
            return plain
        streams = [_normed(attn, image)]
        if text is not None:
            streams.insert(0, _normed(attn, text, added=True))
        parts = zip(*streams, strict=True)
        query, key, value = (torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in parts)
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        if kept.fresh:
            key, value = _keep(key, value, kept)
        else:
            old_key, old_value = _as_kept(kept, key.dtype)
            key, value = torch.cat([key, old_key], dim=1), torch.cat([value, old_value], dim=1)
        attended = _dispatched(self, query, key, value)
        if text is None:
            return attended
        text, image = _projected(attn, attended, text.shape[1])
        return image, text


class KernelAttnProcessor(KeepingAttnProcessor):
    """Attends by fluxfire's kernels for norm and rotation, and one of its own for the rest."""

    @override
    def _attend(
        self, attn: Any, image: Tensor, text: Tensor | None, rotary: Pair, kept: Kept | None
    ) -> Tensor | Pair:
        if text is None:
            return attend(attn, heads(projections(attn), image), rotary, kept)
        text, image = attend_jointly(attn, text, image, rotary, kept)
        return image, text


class FlashAttnProcessor(KernelAttnProcessor):
    """Attends by FlashAttention-3."""


class Float8AttnProcessor(KernelAttnProcessor):
    """Attends in float8, by the `HeadScales` that the attention has under the name `SCALES`."""


SCALES = "_fluxfire_scales"


@dataclass(eq=False)
class HeadScales:
    """What an attention's queries and keys in float8 are multiplied by.

    Attributes:
        query: (1,), float32.
        key: (1,), float32.
    """

    query: Tensor
    key: Tensor


def attends_as_flux(processor: Any) -> bool:
    """Whether an attention processor computes what diffusers' own for Flux does, or is that one."""
    return type(processor) is PlainProcessor or isinstance(processor, KeepingAttnProcessor)


def attend(attention: Any, of_all: list[Tensor], rotary: Pair, kept: Kept | None = None) -> Tensor:
    """Attend over one stream.

    Args:
        attention: the module.
        of_all: query, key and value, each (batch, tokens, heads · head width).
        rotary: cosine and sine, each (tokens, head width).
        kept: what to keep of the reference, or to attend to.

    Returns:
        (batch, tokens, heads · head width), not yet projected.
    """
    return _attend(attention, [_stream(attention, of_all)], rotary, kept)


def attend_jointly(
    attention: Any, text: Tensor | Rows, image: Tensor | Rows, rotary: Pair,
    kept: Kept | None = None,
) -> Pair:  # fmt: skip
    """Attend over text and image together.

    Args:
        attention: the module.
        text: (batch, text tokens, width), normed; perhaps in float8.
        image: (batch, image tokens, width), normed; perhaps in float8.
        rotary: cosine and sine, each (text tokens + image tokens, head width).
        kept: what to keep of the reference, or to attend to.

    Returns:
        Text and image, projected.
    """
    of_text = heads(projections(attention, added=True), text)
    of_image = heads(projections(attention), image)
    streams = [_stream(attention, of_text, added=True), _stream(attention, of_image)]
    attended = _attend(attention, streams, rotary, kept)
    return _projected(attention, attended, of_text[0].shape[1])


def projections(attention: Any, *, added: bool = False) -> list[Any]:
    """Return what makes queries, keys and values, of the text if `added`: one layer or three."""
    if attention.fused_projections:
        return [attention.to_added_qkv if added else attention.to_qkv]
    _, names = KONTEXT.projections(attention)[added]
    return [getattr(attention, name) for name in names]


def heads(layers: list[Any], x: Tensor | Rows) -> list[Tensor]:
    """Return query, key and value, each (batch, tokens, heads · head width)."""
    made = [layer(x) for layer in layers]
    return list(made[0].chunk(3, dim=-1)) if len(made) == 1 else made


def head_norms(attention: Any) -> list[Any]:
    """Return the norms of an attention's queries and keys, the text's where that is apart."""
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return [norm for name in names if (norm := getattr(attention, name, None)) is not None]


def bound(weights: list[Tensor], width: int) -> Tensor:
    """Return the scale of queries or keys: (1,), float32.

    After its RMS norm a head of some width has a length of at most the width's root times
    the largest weight, and turning keeps it: so no number of it can be larger.
    """
    largest = torch.stack([w.detach().float().abs().max() for w in weights]).max()
    scale: Tensor = largest * width**0.5 / LARGEST
    return scale.reshape(1)


def _attend(attention: Any, streams: list[Stream], rotary: Pair, kept: Kept | None) -> Tensor:
    """Attend over streams side by side: (batch, tokens, heads · head width)."""
    processor, eps = attention.processor, attention.norm_q.eps
    old = None if kept is None or kept.fresh else (kept.key, kept.value)
    scales = None
    if isinstance(processor, Float8AttnProcessor):
        scales = _scales(getattr(attention, SCALES), streams, attention.head_dim, kept)
    dtype = streams[0].projected[0].dtype
    kept_scales = kept.scales(FLOAT8 if scales else dtype) if old and kept else None
    query, key, value = joint_heads(
        streams, rotary, eps, scales=scales, kept=old, kept_scales=kept_scales
    )
    if kept is not None and kept.fresh:
        key, value = _keep(key, value, kept)
    if scales is None:
        return _dispatched(processor, query, key, value)
    out: Tensor = float8_attention(query, key, value, *scales, dtype).flatten(2, 3)
    return out


def _keep(key: Tensor, value: Tensor, kept: Kept) -> Pair:
    """Keep the reference's keys and values; of samples not due, bring back the old ones."""
    tokens = kept.key.shape[1]
    joint = []
    for x, old, scale in (
        (key, kept.key, kept.key_scale),
        (value, kept.value, kept.value_scale),
    ):
        new, rounds = x[:, -tokens:], old.dtype != x.dtype
        stored, new_scale = _quantized(new) if rounds else (new, scale)
        if kept.due is not None:
            due = kept.due[..., None, None]
            was = dequantized(old, scale, x.dtype) if rounds else old
            joint.append(torch.cat([x[:, :-tokens], _chosen(due, new, was)], dim=1))
            stored = _chosen(due, stored, old)
            new_scale = torch.where(kept.due, new_scale, scale) if rounds else scale
        else:
            joint.append(x)
        old.copy_(stored)
        if rounds:
            scale.copy_(new_scale)
    return joint[0], joint[1]


def _as_kept(kept: Kept, dtype: torch.dtype) -> Pair:
    """Return what was kept in a dtype."""
    scales = kept.scales(dtype)
    if scales is None:
        return kept.key, kept.value
    return dequantized(kept.key, scales[0], dtype), dequantized(kept.value, scales[1], dtype)


def _quantized(x: Tensor) -> Pair:
    """Quantize (batch, tokens, heads, head width) by sample and head: with (batch, heads)."""
    scale = scale_for(x.abs().amax(dim=(1, 3)).float())
    return in_float8(x, scale[:, None, :, None]), scale


def _chosen(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Choose among numbers: those in float8, as torch cannot, as bytes."""
    if one.dtype is FLOAT8:
        chosen = torch.where(mask, one.view(torch.uint8), other.view(torch.uint8))
        return chosen.view(FLOAT8)
    return torch.where(mask, one, other)


def _scales(fixed: HeadScales, streams: list[Stream], width: int, kept: Kept | None) -> Triple:
    """What query, key and value are divided by for float8; nothing bounds the last.

    Values kept are in float8 already: so new ones share their scale, and are cut off at it.
    """
    device = streams[0].projected[0].device  # under offloading the first two were made elsewhere
    of_heads = fixed.query.to(device), fixed.key.to(device)
    if kept is not None and not kept.fresh:
        return *of_heads, kept.value_scale
    largest = [in_heads(s.projected[2], width).abs().amax(dim=(1, 3)).float() for s in streams]
    scale = scale_for(torch.stack(largest).amax(0))
    if kept is not None:
        if kept.due is not None:
            scale = torch.where(kept.due, scale, kept.value_scale)
        kept.value_scale.copy_(scale)
    return *of_heads, scale


def _stream(attention: Any, of_all: list[Tensor], *, added: bool = False) -> Stream:
    norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
    query, key, value = of_all
    of_query, of_key = (getattr(attention, name).weight for name in norms)
    return Stream((query, key, value), (of_query, of_key))


def _normed(attention: Any, x: Tensor, *, added: bool = False) -> Triple:
    """Project and norm by the modules themselves: (batch, tokens, heads, head width) each."""
    norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
    made = heads(projections(attention, added=added), x)
    query, key, value = (in_heads(of, attention.head_dim) for of in made)
    return getattr(attention, norms[0])(query), getattr(attention, norms[1])(key), value


def _dispatched(processor: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by its kernel: (batch, tokens, heads, head width) to (batch, tokens, width)."""
    if isinstance(processor, FlashAttnProcessor):
        return flash_attention(query, key, value).flatten(2, 3)  # type: ignore[no-any-return]
    backend = processor._attention_backend  # noqa: SLF001 - where diffusers keeps it
    out: Tensor = dispatch_attention_fn(query, key, value, backend=backend).flatten(2, 3)
    return out


def _projected(attention: Any, attended: Tensor, text_tokens: int) -> Pair:
    """Take text and image apart and project them."""
    image = attention.to_out[1](attention.to_out[0](attended[:, text_tokens:]))
    return attention.to_add_out(attended[:, :text_tokens]), image
