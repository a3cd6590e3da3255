"""Flux's attention processors: norms, rotary embedding, the attention kernel, and reference KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.kernels import in_heads, joint_heads
from fluxfire.kernels.exchange import Shards
from fluxfire.kernels.flash_attention import flash_attention, float8_attention
from fluxfire.kernels.float8 import E4M3, E4M3_MAX, QuantizedRows, float8_scale, to_float8
from fluxfire.kernels.heads import Pair, Stream, Triple, dequantize
from fluxfire.kontext.pipeline import KONTEXT, BlockAttention, PlainProcessor

REFERENCE_KWARG = "reference"
"""Key of a block's `ReferenceKV` among the attention arguments (`joint_attention_kwargs`).

diffusers passes an argument on to a processor by the parameter's name, so the parameter of
`ReferenceAttnProcessor.__call__` must have this name too.
"""


class ReferenceKV(NamedTuple):
    """One block's KV cache of the reference tokens, passed as an attention argument.

    The modes have the names that diffusers gives them for FLUX.2. "Extract": the image stream
    contains the reference tokens, and attention stores their keys and values here. "Cached": the
    image stream ends before the reference tokens, and attention reads their keys and values here.

    Attributes:
        key: (batch, reference tokens, heads, head width), after norm and rotary embedding.
        value: (batch, reference tokens, heads, head width).
        key_scale: (batch, heads), float32: scales of the keys, used if the keys are in float8 and
            attention is not.
        value_scale: (batch, heads), float32: scales of the values, used if these are in float8.
        extract: True for the mode "extract", False for "cached".
        refresh_mask: (batch or 1, reference tokens or 1), in the mode "extract": where it is False,
            the cached keys and values stay, and attention uses them in place of the new ones. None
            stores all new ones.
        predicted: keys and values to attend to in place of the cached ones, in the dtype that
            attention computes in; None for the cached ones.
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor
    value_scale: Tensor
    extract: bool
    refresh_mask: Tensor | None = None
    predicted: Pair | None = None

    def dequantization_scales(self, dtype: torch.dtype) -> Pair | None:
        """Return the factors that convert keys and values to a dtype; None if none is needed."""
        if self.predicted is not None or self.key.dtype == dtype:
            return None
        return self.key_scale, self.value_scale

    @property
    def attended(self) -> Pair:
        """The keys and values to attend to, before they are converted."""
        return self.predicted or (self.key, self.value)

    def attended_in(self, dtype: torch.dtype) -> Pair:
        """Return the keys and values to attend to, in a dtype."""
        scales, (key, value) = self.dequantization_scales(dtype), self.attended
        if scales is None:
            return key, value
        return dequantize(key, scales[0], dtype), dequantize(value, scales[1], dtype)


class ReferenceAttnProcessor(StandIn, PlainProcessor):  # type: ignore[misc]
    """Attends exactly as diffusers' processor does, bit for bit, and supports a reference KV.

    Attributes:
        shards: how several processes share the tokens; None if this process has all of them.
    """

    shards: Shards | None = None

    @override
    def __call__(
        self,
        attn: BlockAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Pair | None = None,
        reference: ReferenceKV | None = None,
    ) -> Tensor | Pair:
        """Compute attention.

        Args:
            attn: the attention module.
            hidden_states: (batch, tokens, width): image tokens; in a single block, text and image.
            encoder_hidden_states: (batch, text tokens, width), or None in a single block.
            attention_mask: as in diffusers.
            image_rotary_emb: cosine and sine, each (tokens, head width).
            reference: the block's reference KV, or None without a reference cache. The parameter's
                name is `REFERENCE_KWARG`.

        Returns:
            As in diffusers. Double block: image and text, each after its output projection. Single
            block: text and image in one tensor, without output projection.
        """
        rotary = image_rotary_emb
        device = hidden_states.device.type
        use_plain = modules.computes_derivatives() or torch.is_autocast_enabled(device)
        if rotary is None or attention_mask is not None or use_plain:
            plain: Tensor | Pair = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary
            )
            return plain
        return self._attend(attn, hidden_states, encoder_hidden_states, rotary, reference)

    def _attend(
        self,
        attn: BlockAttention,
        image: Tensor,
        text: Tensor | None,
        rotary: Pair,
        reference: ReferenceKV | None,
    ) -> Tensor | Pair:
        if reference is None and self.shards is None:
            plain: Tensor | Pair = super().__call__(attn, image, text, None, rotary)
            return plain
        streams = [_project_and_norm(attn, image)]
        if text is not None:
            streams.insert(0, _project_and_norm(attn, text, added=True))
        parts = zip(*streams, strict=True)
        query, key, value = (torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in parts)
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        if reference is not None and reference.extract:
            key, value = _store_reference(key, value, reference)
        elif reference is not None:
            cached_key, cached_value = reference.attended_in(key.dtype)
            key = torch.cat([key, cached_key], dim=1)
            value = torch.cat([value, cached_value], dim=1)
        attended = _run_kernel(self, query, key, value)
        if text is None:
            return attended
        text, image = _project_out(attn, attended, text.shape[1])
        return image, text


class KernelAttnProcessor(ReferenceAttnProcessor):
    """Uses fluxfire's norm and rotary kernels; a subclass chooses the attention kernel."""

    @override
    def _attend(
        self,
        attn: BlockAttention,
        image: Tensor,
        text: Tensor | None,
        rotary: Pair,
        reference: ReferenceKV | None,
    ) -> Tensor | Pair:
        if text is None:
            return attend(attn, query_key_value(projections(attn), image), rotary, reference)
        text, image = attend_jointly(attn, text, image, rotary, reference)
        return image, text


class FlashAttnProcessor(KernelAttnProcessor):
    """Computes attention with FlashAttention-3."""


class Float8AttnProcessor(KernelAttnProcessor):
    """Computes attention with FlashAttention-3 in float8.

    The attention module has its `QueryKeyScales` in the attribute `SCALES_ATTRIBUTE`.
    """


SCALES_ATTRIBUTE = "_fluxfire_scales"


@dataclass(eq=False)
class QueryKeyScales:
    """Fixed dequantization factors of an attention's float8 queries and keys.

    Attributes:
        query: (1,), float32.
        key: (1,), float32.
    """

    query: Tensor
    key: Tensor


def is_flux_processor(processor: object) -> bool:
    """Whether a processor is diffusers' own for Flux, or fluxfire's with the same result."""
    return type(processor) is PlainProcessor or isinstance(processor, ReferenceAttnProcessor)


def attend(
    attention: BlockAttention, qkv: list[Tensor], rotary: Pair, reference: ReferenceKV | None = None
) -> Tensor:
    """Compute the attention of a single block.

    Args:
        attention: the attention module.
        qkv: query, key and value, each (batch, tokens, heads · head width).
        rotary: cosine and sine, each (tokens, head width).
        reference: the block's reference KV, or None.

    Returns:
        (batch, tokens, heads · head width), without output projection.
    """
    return _attend(attention, [_make_stream(attention, qkv)], rotary, reference)


def attend_jointly(
    attention: BlockAttention,
    text: Tensor | QuantizedRows,
    image: Tensor | QuantizedRows,
    rotary: Pair,
    reference: ReferenceKV | None = None,
) -> Pair:
    """Compute the joint attention of a double block.

    Args:
        attention: the attention module.
        text: (batch, text tokens, width) after the norm, quantized or not.
        image: (batch, image tokens, width) after the norm, quantized or not.
        rotary: cosine and sine, each (text tokens + image tokens, head width).
        reference: the block's reference KV, or None.

    Returns:
        Text and image, each after its output projection.
    """
    of_text = query_key_value(projections(attention, added=True), text)
    of_image = query_key_value(projections(attention), image)
    streams = [_make_stream(attention, of_text, added=True), _make_stream(attention, of_image)]
    attended = _attend(attention, streams, rotary, reference)
    return _project_out(attention, attended, of_text[0].shape[1])


def projections(attention: BlockAttention, *, added: bool = False) -> list[nn.Module]:
    """Return the projections to query, key and value: one fused layer, or three.

    Args:
        attention: the attention module.
        added: the text's projections (`add_q_proj`, …) instead of the image's.
    """
    if attention.fused_projections:
        return [attention.to_added_qkv if added else attention.to_qkv]
    # Dynamo of torch 2.11 and older cannot trace a list that is indexed by a bool.
    _, names = KONTEXT.projections(attention)[1 if added else 0]
    return [getattr(attention, name) for name in names]


def query_key_value(layers: list[nn.Module], x: Tensor | QuantizedRows) -> list[Tensor]:
    """Project to query, key and value, each (batch, tokens, heads · head width)."""
    made = [layer(x) for layer in layers]
    return list(made[0].chunk(3, dim=-1)) if len(made) == 1 else made


def has_plain_head_norms(attention: BlockAttention) -> bool:
    """Whether the head norms are RMS norms that a kernel may compute from their weights alone."""
    norms = head_norms(attention)
    for norm in norms:
        if type(norm) not in _RMS_NORMS and own_class(norm) not in _RMS_NORMS:
            return False
        weight, bias = modules.parameter(norm, "weight"), modules.parameter(norm, "bias")
        if weight is None or bias is not None or modules.is_hooked(norm):
            return False
    # `torch.nn.RMSNorm` without `eps` takes that of the dtype, which a kernel does not know.
    return len({norm.eps for norm in norms}) == 1 and norms[0].eps is not None


_RMS_NORMS = (RMSNorm, nn.RMSNorm)


def head_norms(attention: BlockAttention) -> list[RMSNorm | nn.RMSNorm]:
    """Return an attention's query and key norms, and the text's own norms if it has any."""
    names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norms: list[RMSNorm | nn.RMSNorm | None] = [modules.child(attention, n) for n in names]
    return [norm for norm in norms if norm is not None]


def query_key_scale(weights: list[Tensor], width: int) -> Tensor:
    """Return a float8 scale that fits all queries, or all keys: (1,), float32.

    After the RMS norm, a head of width w has an L2 norm of at most √w · max|weight|. The rotary
    embedding keeps that norm. So no number of the head is larger.

    Args:
        weights: the weights of the norms, each (head width,).
        width: the head width.
    """
    largest = torch.stack([w.detach().float().abs().max() for w in weights]).max()
    scale: Tensor = largest * width**0.5 / E4M3_MAX
    return scale.reshape(1)


def _attend(
    attention: BlockAttention, streams: list[Stream], rotary: Pair, reference: ReferenceKV | None
) -> Tensor:
    """Compute attention over the concatenated streams: (batch, tokens, heads · head width)."""
    processor, eps = attention.processor, attention.norm_q.eps
    scales = None
    if isinstance(processor, Float8AttnProcessor):
        scales = _float8_scales(
            getattr(attention, SCALES_ATTRIBUTE), streams, attention.head_dim, reference,
            processor.shards,
        )  # fmt: skip
    dtype = streams[0].projected[0].dtype
    cached = cached_scales = None
    if reference is not None and not reference.extract:
        cached = reference.attended
        cached_scales = reference.dequantization_scales(E4M3 if scales else dtype)
    query, key, value = joint_heads(
        streams, rotary, eps, scales=scales, cached=cached, cached_scales=cached_scales
    )
    if reference is not None and reference.extract:
        key, value = _store_reference(key, value, reference)
    if scales is None:
        return _run_kernel(processor, query, key, value)
    shards, of_heads = processor.shards, scales
    if shards is None:
        out: Tensor = float8_attention(query, key, value, *scales, dtype)
    else:
        of_value = scales[2][:, shards.heads(query.shape[2])].contiguous()
        of_heads = *scales[:2], of_value
        out = shards.attend(
            query, key, value, lambda q, k, v: float8_attention(q, k, v, *of_heads, dtype)
        )
    return out.flatten(2, 3)


def _store_reference(key: Tensor, value: Tensor, reference: ReferenceKV) -> Pair:
    """Store the reference's new keys and values in the cache, and return the joint ones to use.

    Example with `refresh_mask` [[True], [False]]: sample 0's new keys go into the cache, and its
    attention uses them. Sample 1's new keys are dropped. Its cached keys stay in the cache, and
    replace the new ones in the joint keys. So sample 1 attends to the same keys as if it ran alone.
    """
    tokens = reference.key.shape[1]
    joint = []
    masked = reference.refresh_mask is not None
    attended = reference.attended_in(key.dtype) if masked else reference.attended
    for x, old, cached, scale in (
        (key, attended[0], reference.key, reference.key_scale),
        (value, attended[1], reference.value, reference.value_scale),
    ):
        new, quantizes = x[:, -tokens:], cached.dtype != x.dtype
        stored, new_scale = _quantize_heads(new) if quantizes else (new, scale)
        if reference.refresh_mask is not None:
            refresh = reference.refresh_mask[..., None, None]
            joint.append(torch.cat([x[:, :-tokens], _where(refresh, new, old)], dim=1))
            stored = _where(refresh, stored, cached)
            if quantizes:
                new_scale = torch.where(reference.refresh_mask, new_scale, scale)
        else:
            joint.append(x)
        cached.copy_(stored)
        if quantizes:
            scale.copy_(new_scale)
    return joint[0], joint[1]


def _quantize_heads(x: Tensor) -> Pair:
    """Quantize (batch, tokens, heads, head width) to float8, with scales (batch, heads)."""
    scale = float8_scale(x.abs().amax(dim=(1, 3)).float())
    return to_float8(x, scale[:, None, :, None]), scale


def _where(mask: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Compute `torch.where`, also for float8, which torch's own does not support."""
    if one.dtype is E4M3:
        selected = torch.where(mask, one.view(torch.uint8), other.view(torch.uint8))
        return selected.view(E4M3)
    return torch.where(mask, one, other)


def _float8_scales(
    fixed: QueryKeyScales,
    streams: list[Stream],
    width: int,
    reference: ReferenceKV | None,
    shards: Shards | None,
) -> Triple:
    """Return the divisors that quantize query, key and value.

    Query and key scales are fixed, since norms bound queries and keys. Values have no such bound,
    so this measures their scale. Cached values are in float8 already. So in the mode "cached" the
    new values use the cached scale, which clamps them to its range.
    """
    device = streams[0].projected[0].device  # with offloading, `fixed` may be on another device
    of_heads = fixed.query.to(device), fixed.key.to(device)
    if reference is not None and not reference.extract:
        return *of_heads, reference.value_scale
    largest = [in_heads(s.projected[2], width).abs().amax(dim=(1, 3)).float() for s in streams]
    of_all = torch.stack(largest).amax(0)
    scale = float8_scale(of_all if shards is None else shards.largest(of_all))
    if reference is not None:
        if reference.refresh_mask is not None:
            scale = torch.where(reference.refresh_mask, scale, reference.value_scale)
        reference.value_scale.copy_(scale)
    return *of_heads, scale


def _make_stream(attention: BlockAttention, qkv: list[Tensor], *, added: bool = False) -> Stream:
    norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
    query, key, value = qkv
    of_query, of_key = (getattr(attention, name).weight for name in norms)
    return Stream((query, key, value), (of_query, of_key))


def _project_and_norm(attention: BlockAttention, x: Tensor, *, added: bool = False) -> Triple:
    """Project and norm by the modules themselves: 3 x (batch, tokens, heads, head width)."""
    norms = ("norm_added_q", "norm_added_k") if added else ("norm_q", "norm_k")
    made = query_key_value(projections(attention, added=added), x)
    query, key, value = (in_heads(of, attention.head_dim) for of in made)
    return getattr(attention, norms[0])(query), getattr(attention, norms[1])(key), value


def _run_kernel(processor: PlainProcessor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run the processor's kernel on (batch, tokens, heads, head width): (batch, tokens, width)."""
    shards = getattr(processor, "shards", None)
    if shards is None:
        return _kernel(processor, query, key, value).flatten(2, 3)
    out: Tensor = shards.attend(query, key, value, lambda q, k, v: _kernel(processor, q, k, v))
    return out.flatten(2, 3)


def _kernel(processor: PlainProcessor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if isinstance(processor, FlashAttnProcessor):
        return flash_attention(query, key, value)  # type: ignore[no-any-return]
    backend = processor._attention_backend  # noqa: SLF001 - set_attention_backend() stores it here
    return dispatch_attention_fn(query, key, value, backend=backend)  # type: ignore[no-any-return]


def _project_out(attention: BlockAttention, attended: Tensor, text_tokens: int) -> Pair:
    """Split the joint result, and apply the output projections to text and image."""
    image = attention.to_out[1](attention.to_out[0](attended[:, text_tokens:]))
    return attention.to_add_out(attended[:, :text_tokens]), image
