"""FusedBlocks: Flux's blocks with few fused kernels between their matrix products."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.kernels import gated_add, linear_gelu, modulated_norm, two_products
from fluxfire.kernels.float8 import QuantizedRows, gelu_float8, modulated_norm_float8
from fluxfire.kontext import BlockAttention, DoubleBlock, SingleBlock
from fluxfire.kontext.attention import (
    REFERENCE_KWARG,
    ReferenceKV,
    attend,
    attend_jointly,
    has_plain_head_norms,
    is_flux_processor,
    projections,
    query_key_value,
)
from fluxfire.kontext.modulation import ModulatedNorm, modulations
from fluxfire.passes.shared.adapters import dense
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Structure, is_patched
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

Rotary = tuple[Tensor, Tensor]
Pair = tuple[Tensor, Tensor]

_MLP_PARTS = 3
_FALLS_BACK = "_fluxfire_aside"


@dataclass(frozen=True, kw_only=True)
class FusedBlocks:
    """Fuses the operations between the matrix products of each block into few kernels.

    One kernel computes a layer norm with its modulation. One computes the norm and rotary embedding
    of queries and keys, and concatenates text and image. One computes a gated residual. The product
    before a GELU also computes the GELU. A single block needs no concatenation of text and image.
    Its output projection runs as two products, where the second adds to the first, so attention and
    MLP need no concatenation either.

    Measured on an H100 (docs, "Passes"): a step of `faithful` 293 → 274 ms; alone, not compiled,
    379 → 277 ms. The kernels' own times promise more. But that GPU runs at its power limit: when it
    waits less for memory it computes more, and lowers its clock.

    The kernels are written in Triton for CUDA. On other devices the same arithmetic runs in torch,
    no faster than diffusers' own.

    A block falls back to diffusers' own forward while gradients are on, under autocast, in float16
    (where diffusers clips overflows), and without rotary embeddings. It also falls back with an
    attention processor or attention arguments that Flux itself does not use, if any layer has a
    hook, or if somebody replaced a norm or an activation, since the kernels do not call these
    modules. A layer that is not a plain `nn.Linear` is called as it is: it has a LoRA that
    `FoldedLora` did not fold, or it is quantized.
    """

    name: ClassVar[str] = "fused-blocks"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = "block-forward"
    exactness: ClassVar[Exactness] = "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse blocks that are not diffusers' own, and a GPU without Triton."""
        transformer = target.pipe.transformer
        blocks = model_of(target.pipe).blocks(transformer)
        strange = {type(block).__name__ for block in blocks if type(block) not in _FUSED}
        if strange:
            yield Finding(
                "error",
                f"the transformer has blocks of another kind: {', '.join(sorted(strange))}",
                "leave FusedBlocks out",
            )
        if swapped := target.traits & modules.SWAPPED:
            yield Finding(
                "error",
                f"offloading moves weights layer by layer while the pipeline runs "
                f"({', '.join(sorted(swapped))}), and the kernels read several layers at once",
                "use enable_model_cpu_offload() or none",
            )
        if target.on_gpu and importlib.util.find_spec("triton") is None:
            yield Finding("error", "the kernels for CUDA need triton", "pip install triton")

    def apply(self, tx: Transaction) -> Change:
        """Turn every block into an instance of a subclass with a fused forward."""
        # One block may stand in two places.
        blocks = list(dict.fromkeys(model_of(tx.pipe).blocks(tx.pipe.transformer)))
        checker = _FallbackChecker(blocks)
        tx.on_undo(checker.clear)
        checker.prepare()
        for block in blocks:
            tx.set_class(block, _FUSED[type(block)])
        tx.listen(checker)
        return Change(len(blocks), "blocks run with fused kernels")


class _FusedBlock(StandIn, nn.Module):
    """Base of both kinds of block: runs `fused`, or falls back to diffusers' forward."""

    attn: BlockAttention

    @override
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Pair:
        """Run the block. Shapes are those of diffusers; returns text, then image."""
        rotary = image_rotary_emb
        if rotary is not None and _can_fuse(self, hidden_states, joint_attention_kwargs):
            reference = (joint_attention_kwargs or {}).get(REFERENCE_KWARG)
            return self.fused(encoder_hidden_states, hidden_states, temb, rotary, reference)
        plain: Pair = super().forward(
            hidden_states, encoder_hidden_states, temb, rotary, joint_attention_kwargs
        )
        return plain

    def fused(
        self,
        text: Tensor,
        image: Tensor,
        temb: Tensor,
        rotary: Rotary,
        reference: ReferenceKV | None,
    ) -> Pair:
        """Run the block with fused kernels; returns text, then image."""
        raise NotImplementedError


class FusedDoubleBlock(_FusedBlock, DoubleBlock):  # type: ignore[misc]
    """A two-stream block."""

    norm1: ModulatedNorm
    norm1_context: ModulatedNorm
    norm2: nn.LayerNorm
    norm2_context: nn.LayerNorm
    ff: FeedForward
    ff_context: FeedForward

    @override
    def fused(
        self,
        text: Tensor,
        image: Tensor,
        temb: Tensor,
        rotary: Rotary,
        reference: ReferenceKV | None,
    ) -> Pair:
        attn = self.attn
        text_mods = modulations(self.norm1_context, temb).chunk(6, dim=1)
        image_mods = modulations(self.norm1, temb).chunk(6, dim=1)
        added_text, added_image = attend_jointly(
            attn,
            _norm(None, text, text_mods, self.norm1_context.norm, projections(attn, added=True)),
            _norm(None, image, image_mods, self.norm1.norm, projections(attn)),
            rotary,
            reference,
        )
        return (
            _residuals(text, added_text, text_mods[2:], self.norm2_context, self.ff_context),
            _residuals(image, added_image, image_mods[2:], self.norm2, self.ff),
        )


class FusedSingleBlock(_FusedBlock, SingleBlock):  # type: ignore[misc]
    """A one-stream block."""

    norm: ModulatedNorm
    proj_mlp: nn.Module
    proj_out: nn.Module

    @override
    def fused(
        self,
        text: Tensor,
        image: Tensor,
        temb: Tensor,
        rotary: Rotary,
        reference: ReferenceKV | None,
    ) -> Pair:
        attn = self.attn
        mods = modulations(self.norm, temb).chunk(3, dim=1)
        into = projections(attn)
        x = _norm(text, image, mods, self.norm.norm, [*into, self.proj_mlp])
        attended = attend(attn, query_key_value(into, x), rotary, reference)
        add = _mlp(self.proj_mlp, self.proj_out, x, beside=attended)
        joint = gated_add(image, text, mods[2], add)
        return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


_FUSED = {DoubleBlock: FusedDoubleBlock, SingleBlock: FusedSingleBlock}


class _FallbackChecker(Listener):
    """Marks the blocks that must fall back, before each generation.

    The user may add hooks or replace parts of a block at any time.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks
        self._structure = Structure(blocks)

    @override
    def prepare(self) -> None:
        """Mark blocks with a hook on a submodule, and blocks whose norms or GELUs were replaced."""
        if not self._structure.changed():
            return
        for block in self._blocks:
            hooked = any(map(modules.is_hooked, modules.submodules(block)[1:]))
            setattr(block, _FALLS_BACK, hooked or not _has_flux_parts(block))
        self._structure.accept()

    def clear(self) -> None:
        """Remove the marks."""
        for block in self._blocks:
            vars(block).pop(_FALLS_BACK, None)


def _has_flux_parts(block: DoubleBlock | SingleBlock) -> bool:
    """Whether the modules that the kernels replace are Flux's own, and compute the same."""
    double = hasattr(block, "ff")
    names = ("norm1", "norm1_context") if double else ("norm",)
    norms: list[ModulatedNorm] = [getattr(block, name) for name in names]
    return (
        _is(block.attn, BlockAttention)
        and has_plain_head_norms(block.attn)
        and all(_is(norm, AdaLayerNormZero if double else AdaLayerNormZeroSingle) for norm in norms)
        and all(_is_plain_layer_norm(norm.norm) for norm in norms)
        and (
            all(_is_plain_layer_norm(norm) for norm in (block.norm2, block.norm2_context))
            and all(map(_is_plain_mlp, (block.ff, block.ff_context)))
            if double
            else _is(block.act_mlp, nn.GELU) and block.act_mlp.approximate == "tanh"
        )
    )


def _is(module: object, cls: type) -> bool:
    """Whether a module is of exactly a class; a subclass may compute something else."""
    if not isinstance(module, nn.Module) or own_class(module) is not cls:
        return False
    return not any(is_patched(module, name) for name in vars(module))


def _is_plain_layer_norm(norm: nn.Module) -> bool:
    return _is(norm, nn.LayerNorm) and norm.weight is None and norm.bias is None


def _is_plain_mlp(mlp: Any) -> bool:
    """Whether an MLP is a product with GELU, dropout that drops nothing, and a product."""
    if not _is(mlp, FeedForward) or len(mlp.net) != _MLP_PARTS:
        return False
    gelu, dropout, _ = mlp.net
    drops = dropout.training and getattr(dropout, "p", 1)
    return _is(gelu, GELU) and gelu.approximate == "tanh" and _is(dropout, nn.Dropout) and not drops


def _can_fuse(block: _FusedBlock, x: Tensor, arguments: dict[str, Any] | None) -> bool:
    """Whether the kernels support this call of a block."""
    processor = block.attn.processor
    return (
        not set(arguments or ()) - {REFERENCE_KWARG}
        and not getattr(block, _FALLS_BACK)
        and not modules.computes_derivatives()
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype in (torch.bfloat16, torch.float32)
        and is_flux_processor(processor)
        and not modules.runs_on_several_gpus(processor)
    )


def _norm(
    text: Tensor | None,
    image: Tensor,
    mods: Sequence[Tensor],
    norm: nn.LayerNorm,
    into: Sequence[nn.Module],
) -> Tensor | QuantizedRows:
    """Norm and modulate; the result is in float8 if all layers in `into` take float8."""
    shift, scale, *_ = mods
    if all(map(_takes_float8, into)):
        return QuantizedRows(*modulated_norm_float8(image, text, shift, scale, norm.eps))
    normed: Tensor = modulated_norm(image, text, shift, scale, norm.eps)
    return normed


def _residuals(
    x: Tensor, add: Tensor, mods: Sequence[Tensor], norm: nn.LayerNorm, mlp: FeedForward
) -> Tensor:
    """Add the attention's output `add`, then the MLP's output, each with its gate."""
    gate, shift, scale, mlp_gate = mods
    x = gated_add(x, None, gate, add)
    proj_in, proj_out = mlp.net[0].proj, mlp.net[2]
    normed = _norm(None, x, (shift, scale), norm, [proj_in])
    done: Tensor = gated_add(x, None, mlp_gate, _mlp(proj_in, proj_out, normed))
    return done


def _mlp(
    proj_in: nn.Module,
    proj_out: nn.Module,
    x: Tensor | QuantizedRows,
    beside: Tensor | None = None,
) -> Tensor:
    """Compute both products of an MLP and the GELU between them.

    Args:
        proj_in: the first layer.
        proj_out: the second layer.
        x: (batch, tokens, width), quantized or not.
        beside: (batch, tokens, other width), concatenated before the GELU's output as input of the
            second layer; or None.
    """
    done: Tensor
    if _takes_float8(proj_out):
        done = proj_out(QuantizedRows(*gelu_float8(beside, proj_in(x))))
        return done
    if (into := dense(proj_in)) is not None and isinstance(x, Tensor):
        hidden = linear_gelu(x, *into)
    else:
        hidden = F.gelu(proj_in(x), approximate="tanh")
    if beside is not None and (out := dense(proj_out)) is not None:
        done = two_products(beside, hidden, *out)
    else:
        done = proj_out(hidden if beside is None else torch.cat([beside, hidden], dim=2))
    return done


def _takes_float8(layer: object) -> bool:
    return bool(getattr(layer, "takes_float8", False))
