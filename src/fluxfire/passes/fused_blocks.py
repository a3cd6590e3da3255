"""FusedBlocks: Flux's blocks with all that is between their matrix products in few kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from diffusers.models.activations import GELU
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn
from fluxfire.kernels import gated_add, linear_gelu, modulated_norm, two_products
from fluxfire.kernels.float8 import Rows, gelu_float8, modulated_norm_float8
from fluxfire.kontext import DoubleBlock, SingleBlock
from fluxfire.kontext.attention import (
    Kept,
    attend,
    attend_jointly,
    attends_as_flux,
    head_norms,
    heads,
    projections,
)
from fluxfire.kontext.modulation import modulations
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

Rotary = tuple[Tensor, Tensor]
Pair = tuple[Tensor, Tensor]

_ASIDE = "_fluxfire_aside"


@dataclass(frozen=True, kw_only=True)
class FusedBlocks:
    """Runs each block as its matrix products, its attention, and a kernel for what is between.

    A layer norm and its modulation are one kernel; so are the norm and rotation of queries and
    keys, which also puts text beside image; so is each gated residual. GELU is computed in the
    product before it. A single block reads text and image where they are, and its output
    projection runs as two products, the second adding to the first, so that attention and MLP
    are not copied side by side.

    Measured on an H100 (docs, "Passes"): a step of `faithful` 293 → 274 ms; alone, not compiled,
    379 → 277 ms. Less than the kernels' own times promise: that GPU runs at its limit of power, and
    clocks lower where less waiting for memory lets it compute more.

    The kernels are Triton's on CUDA. Elsewhere the same arithmetic runs in torch, no faster than
    diffusers' own.

    A block runs as diffusers' own does while gradients are on, under autocast, in float16 (whose
    overflow diffusers clips), with an attention processor or attention arguments other than plain
    Flux's, and without rotary embeddings. It does so, too, where a hook is on any of its layers or
    one of its small parts is not Flux's any more, since the kernels read past them. A layer that is
    more than a plain `nn.Linear` (it carries a LoRA, it is quantized) is called as it is.
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
                f"weights are swapped layer by layer while the pipeline runs "
                f"({', '.join(sorted(swapped))}), and the kernels read several layers at once",
                "use enable_model_cpu_offload() or none",
            )
        on_gpu = transformer.device.type == "cuda" or "model-offload" in target.traits
        if on_gpu and importlib.util.find_spec("triton") is None:
            yield Finding("error", "the kernels for CUDA need triton", "pip install triton")

    def apply(self, tx: Transaction) -> Change:
        """Turn every block into an instance of a subclass with another forward."""
        blocks = model_of(tx.pipe).blocks(tx.pipe.transformer)
        look = _Look(blocks)
        tx.on_undo(look.forget)
        look.prepare()
        for block in blocks:
            tx.set_class(block, _FUSED[type(block)])
        tx.listen(look)
        return Change(len(blocks), "blocks run with fused kernels")


class _FusedBlock(StandIn, nn.Module):
    """What both kinds of block begin with."""

    attn: Any

    @override
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Pair:
        """Run the block; shapes as in diffusers, text and image returned in this order."""
        rotary = image_rotary_emb
        if rotary is not None and _fusible(self, hidden_states, joint_attention_kwargs):
            kept = (joint_attention_kwargs or {}).get("reference")
            return self.fused(encoder_hidden_states, hidden_states, temb, rotary, kept)
        plain: Pair = super().forward(
            hidden_states, encoder_hidden_states, temb, rotary, joint_attention_kwargs
        )
        return plain

    def fused(
        self, text: Tensor, image: Tensor, temb: Tensor, rotary: Rotary, kept: Kept | None
    ) -> Pair:
        """Run the block by its kernels; likewise."""
        raise NotImplementedError


class FusedDoubleBlock(_FusedBlock, DoubleBlock):  # type: ignore[misc]
    """A two-stream block."""

    @override
    def fused(
        self, text: Tensor, image: Tensor, temb: Tensor, rotary: Rotary, kept: Kept | None
    ) -> Pair:
        attn = self.attn
        text_mods = modulations(self.norm1_context, temb).chunk(6, dim=1)
        image_mods = modulations(self.norm1, temb).chunk(6, dim=1)
        added_text, added_image = attend_jointly(
            attn,
            _norm(None, text, text_mods, self.norm1_context.norm, projections(attn, added=True)),
            _norm(None, image, image_mods, self.norm1.norm, projections(attn)),
            rotary,
            kept,
        )
        return (
            _residuals(text, added_text, text_mods[2:], self.norm2_context, self.ff_context),
            _residuals(image, added_image, image_mods[2:], self.norm2, self.ff),
        )


class FusedSingleBlock(_FusedBlock, SingleBlock):  # type: ignore[misc]
    """A one-stream block."""

    @override
    def fused(
        self, text: Tensor, image: Tensor, temb: Tensor, rotary: Rotary, kept: Kept | None
    ) -> Pair:
        attn = self.attn
        mods = modulations(self.norm, temb).chunk(3, dim=1)
        into = projections(attn)
        x = _norm(text, image, mods, self.norm.norm, [*into, self.proj_mlp])
        attended = attend(attn, heads(into, x), rotary, kept)
        add = _mlp(self.proj_mlp, self.proj_out, x, beside=attended)
        joint = gated_add(image, text, mods[2], add)
        return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


_FUSED = {DoubleBlock: FusedDoubleBlock, SingleBlock: FusedSingleBlock}


class _Look(Listener):
    """Looks at the blocks before each generation, since anything may be done in between."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks

    @override
    def prepare(self) -> None:
        """Mark the blocks that have any, and those that compute something else by now."""
        for block in self._blocks:
            hooked = any(map(modules.is_hooked, modules.parts(block)[1:]))
            setattr(block, _ASIDE, hooked or not _is_usual(block))

    def forget(self) -> None:
        """Take the marks off again."""
        for block in self._blocks:
            vars(block).pop(_ASIDE, None)


def _is_usual(block: Any) -> bool:
    """Whether a block's small parts, which the kernels stand for, are those of Flux."""
    norms = head_norms(block.attn)
    if hasattr(block, "ff"):
        mlps = (block.ff, block.ff_context)
        gelus = [mlp.net[0] for mlp in mlps]
        drops = any(mlp.net[1].training and mlp.net[1].p for mlp in mlps)
        plain = all(type(gelu) is GELU for gelu in gelus)
    else:
        gelus, drops = [block.act_mlp], False
        plain = type(block.act_mlp) is nn.GELU
    approximate = {getattr(gelu, "approximate", None) for gelu in gelus}
    return plain and approximate == {"tanh"} and not drops and len({n.eps for n in norms}) == 1


def _fusible(block: Any, x: Tensor, arguments: dict[str, Any] | None) -> bool:
    """Whether a block's call is the plain case that the kernels compute."""
    processor = block.attn.processor
    return (
        not set(arguments or ()) - {"reference"}
        and not getattr(block, _ASIDE)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype is not torch.float16
        and attends_as_flux(processor)
        and getattr(processor, "_parallel_config", None) is None
    )


def _norm(
    text: Tensor | None, image: Tensor, mods: Sequence[Tensor], norm: Any, into: Sequence[Any]
) -> Tensor | Rows:
    """Norm and modulate, in the form that all the products it goes into take."""
    shift, scale, *_ = mods
    if all(map(_takes_float8, into)):
        return Rows(*modulated_norm_float8(image, text, shift, scale, norm.eps))
    normed: Tensor = modulated_norm(image, text, shift, scale, norm.eps)
    return normed


def _residuals(x: Tensor, add: Tensor, mods: Sequence[Tensor], norm: Any, mlp: Any) -> Tensor:
    """Add what attention gave, and what the MLP then gives."""
    gate, shift, scale, mlp_gate = mods
    x = gated_add(x, None, gate, add)
    proj_in, proj_out = mlp.net[0].proj, mlp.net[2]
    normed = _norm(None, x, (shift, scale), norm, [proj_in])
    done: Tensor = gated_add(x, None, mlp_gate, _mlp(proj_in, proj_out, normed))
    return done


def _mlp(proj_in: Any, proj_out: Any, x: Tensor | Rows, beside: Tensor | None = None) -> Tensor:
    """Two products and the GELU between them; `beside` goes into the second one, too."""
    done: Tensor
    if _takes_float8(proj_out):
        done = proj_out(Rows(*gelu_float8(beside, proj_in(x))))
        return done
    if _is_plain(proj_in) and isinstance(x, Tensor):
        hidden = linear_gelu(x, proj_in.weight, proj_in.bias)
    else:
        hidden = F.gelu(proj_in(x), approximate="tanh")
    if beside is not None and _is_plain(proj_out):
        done = two_products(beside, hidden, proj_out.weight, proj_out.bias)
    else:
        done = proj_out(hidden if beside is None else torch.cat([beside, hidden], dim=2))
    return done


def _is_plain(layer: Any) -> bool:
    """Whether calling a layer means nothing but its product, by a weight of plain numbers."""
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    return plain and layer.bias is not None


def _takes_float8(layer: Any) -> bool:
    return bool(getattr(layer, "takes_float8", False))
