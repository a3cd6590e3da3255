"""FLUX.1 Kontext's implementation of `fluxfire.model.Model`.

It relies on details of diffusers, checked for versions 0.35 to 0.42.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention as BlockAttention
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor as PlainProcessor,
)
from diffusers.models.transformers.transformer_flux import (
    FluxIPAdapterAttnProcessor as IPAdapterProcessor,
)
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock as SingleBlock,
)
from diffusers.models.transformers.transformer_flux import (
    FluxTransformerBlock as DoubleBlock,
)
from torch import nn

from fluxfire import modules
from fluxfire.diffusers_types import AttentionModule, Pipeline
from fluxfire.errors import FluxfireError
from fluxfire.model import Model, Run, Streams, Tokens
from fluxfire.text import with_article

__all__ = [
    "KONTEXT",
    "BlockAttention",
    "DoubleBlock",
    "IPAdapterProcessor",
    "Kontext",
    "PlainProcessor",
    "SingleBlock",
]

_QKV = ("to_qkv", ("to_q", "to_k", "to_v"))
_TEXT_QKV = ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
_LISTS = ("transformer_blocks", "single_transformer_blocks")


class Kontext:
    """FLUX.1 Kontext, editing and inpainting."""

    pipelines: tuple[type, ...] = (FluxKontextPipeline, FluxKontextInpaintPipeline)

    def refusal(self, pipe: Pipeline) -> str | None:
        """Return why a pipeline is refused: another transformer, or weights without data."""
        transformer = pipe.transformer
        if not isinstance(transformer, FluxTransformer2DModel):
            hint = ""
            if hasattr(transformer, "_orig_mod"):
                hint = "; it was wrapped by torch.compile: pass the plain model and add Compile()"
            return (
                f"pipe.transformer is {with_article(type(transformer).__name__)}, "
                f"not a FluxTransformer2DModel{hint}"
            )
        for name, component in modules.components(pipe):
            # Only plain parameters: a subclass may store its data elsewhere.
            weights = component.named_parameters()
            on_meta = next((n for n, p in weights if p.is_meta and type(p) is nn.Parameter), None)
            if on_meta is not None and not any("_hf_hook" in vars(m) for m in component.modules()):
                return (
                    f"the {name}'s weights are on the meta device ({on_meta} has no data); "
                    f"load them before optimizing"
                )
        return None

    def blocks(self, transformer: FluxTransformer2DModel) -> list[nn.Module]:
        """Return the double blocks, then the single blocks."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def attentions(self, transformer: FluxTransformer2DModel) -> list[BlockAttention]:
        """Return the attention of each block, in the blocks' order."""
        blocks: list[DoubleBlock | SingleBlock] = self.blocks(transformer)
        return [block.attn for block in blocks]

    def linears(self, block: DoubleBlock | SingleBlock) -> list[tuple[nn.Module, str]]:
        """Return the attention's projections, then the MLP's."""
        attention = block.attn
        names = (*_QKV[1], *_TEXT_QKV[1], "to_add_out")
        places: list[tuple[nn.Module, str]] = [(attention, name) for name in names]
        if getattr(attention, "to_out", None) is not None:
            places.append((attention.to_out, "0"))
        if hasattr(block, "ff"):
            places += [(mlp.net[0], "proj") for mlp in (block.ff, block.ff_context)]
            places += [(mlp.net, "2") for mlp in (block.ff, block.ff_context)]
        else:
            places += [(block, "proj_mlp"), (block, "proj_out")]
        return [(owner, name) for owner, name in places if getattr(owner, name, None) is not None]

    def projections(self, attention: AttentionModule) -> list[tuple[str, tuple[str, str, str]]]:
        """Return the image's projections, and the text's if it has its own (in double blocks)."""
        has_text = getattr(attention, _TEXT_QKV[1][0], None) is not None
        return [_QKV, _TEXT_QKV] if has_text else [_QKV]

    def modulated_norms(self, block: DoubleBlock | SingleBlock) -> list[nn.Module]:
        """Return a double block's two norms, image first, or a single block's one norm."""
        names = ("norm1", "norm1_context") if hasattr(block, "norm1") else ("norm",)
        return [getattr(block, name) for name in names]

    def text_encoders(self, pipe: Pipeline) -> list[nn.Module]:
        """Return CLIP and T5, if the pipeline has them."""
        return [e for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None]

    def sigma(self, pipe: Pipeline) -> torch.Tensor:
        """Return the scheduler's time step divided by 1000, in float32."""
        sigma: torch.Tensor = pipe.current_timestep.float() / 1000
        return sigma

    def identity(self, inputs: dict[str, Any]) -> object | None:
        """Return the image's position ids: a pipeline creates one object for all its steps."""
        if not {"img_ids", "txt_ids", "timestep"} <= inputs.keys():
            return None
        identity: object = inputs["img_ids"]
        return identity

    def tokens(self, inputs: dict[str, Any]) -> Tokens:
        """Count tokens from the position ids, (tokens, 3).

        The first column of the image's ids is 0 for noise tokens and 1 for reference tokens.
        """
        img_ids, txt_ids = inputs["img_ids"], inputs["txt_ids"]
        noise = int((img_ids[..., 0] == 0).sum())
        return Tokens(noise, img_ids.shape[-2] - noise, txt_ids.shape[-2])

    def runner(self, transformer: FluxTransformer2DModel, inputs: dict[str, Any]) -> Run:
        """Return a function that runs blocks exactly like diffusers' own loops.

        It removes ControlNet residuals from `inputs`, and adds them after the same blocks as
        diffusers. diffusers itself would distribute them over the mounted stack, which is one
        "block", and so add them at the wrong places.
        """
        blocks = self.blocks(transformer)
        residuals = _residuals(transformer, inputs)

        def run(streams: Streams, which: range) -> Streams:
            image, text, tembs = streams.image, streams.text, streams.temb_by_block
            for index in which:
                arguments = streams.attention_kwargs
                if streams.arguments is not None:
                    arguments = {**(arguments or {}), **streams.arguments(index)}
                text, image = blocks[index](
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=streams.temb if tembs is None else tembs[index],
                    image_rotary_emb=streams.rotary,
                    joint_attention_kwargs=arguments,
                )
                if index in residuals:
                    image = image + residuals[index][:, : image.shape[1]]
            return replace(streams, image=image, text=text)

        return run

    @contextmanager
    def mount(
        self, transformer: FluxTransformer2DModel, stack: Callable[[Streams], Streams]
    ) -> Iterator[None]:
        """Shadow the two lists of blocks: diffusers' forward finds the stack, others the blocks.

        diffusers' own forward still computes the embeddings and the output projection. No module is
        replaced.
        """
        own = vars(transformer)  # Module.__setattr__ would remove the real lists
        mine = _shadows(transformer, stack)
        try:
            own.update(zip(_LISTS, mine, strict=True))
            yield
        finally:
            # After an interrupt this block may end late, when another call has mounted its stack.
            for name, shadow in zip(_LISTS, mine, strict=True):
                if own.get(name) is shadow:
                    del own[name]
        if any(shadow.read_by_others for shadow in mine) and not mine[0].read_by_forward:
            raise FluxfireError(_FOREIGN_FORWARD)

    def unmount(self, transformer: FluxTransformer2DModel) -> None:
        """Remove the shadows of the lists of blocks."""
        for name in _LISTS:
            vars(transformer).pop(name, None)

    def reference_size(self, pipe: Pipeline, width: int, height: int) -> tuple[int, int]:
        """Return Kontext's preferred size (about a megapixel) with the nearest aspect ratio.

        A pipeline with other sizes, such as Spark, has its own method of this name.
        """
        if (own := getattr(pipe, "reference_size", None)) is not None:
            size: tuple[int, int] = own(width, height)
            return size
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        # Kontext cuts the picture to whole tokens before it looks at the aspect ratio.
        multiple = self.size_multiple(pipe)
        width, height = (max(side // multiple, 1) for side in (width, height))
        _, w, h = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return w // multiple * multiple, h // multiple * multiple

    def exact_size(self, width: int, height: int) -> dict[str, int]:
        """Return width, height and `max_area`; without it Kontext rescales to a megapixel."""
        return {"width": width, "height": height, "max_area": width * height}

    def size_multiple(self, pipe: Pipeline) -> int:
        """Return the side of a token in pixels; a token covers 2 by 2 latents."""
        multiple: int = pipe.vae_scale_factor * 2
        return multiple

    def is_tiny(self, pipe: Pipeline) -> bool:
        """Whether a megapixel is too much for it: a latent covers fewer than FLUX's 8 by 8 pixels.

        A pipeline with sizes of its own, such as Spark, never makes a megapixel.
        """
        flux = 8
        return bool(pipe.vae_scale_factor < flux) and not hasattr(pipe, "reference_size")


KONTEXT: Model = Kontext()


def _shadows(
    transformer: FluxTransformer2DModel, stack: Callable[[Streams], Streams]
) -> tuple[_ShadowList, _ShadowList]:
    double, single = (getattr(transformer, name) for name in _LISTS)
    return _ShadowList(double, [_AllBlocks(stack)]), _ShadowList(single, [])


class _ShadowList:
    """Takes the place of a list of blocks during one call of the transformer.

    diffusers' own forward iterates over what it should run. Everybody else, such as a hook that
    changes the blocks from step to step, finds the blocks themselves. Another library's forward
    finds them, too, and so runs them past the stack; `mount` raises an error then.

    Attributes:
        read_by_forward: whether diffusers' forward has iterated over the list.
        read_by_others: whether anybody else has read the list.
    """

    def __init__(self, blocks: nn.ModuleList, for_forward: list[_AllBlocks]) -> None:
        self._blocks, self._for_forward = blocks, for_forward
        self.read_by_forward = self.read_by_others = False

    def __iter__(self) -> Iterator[Any]:
        caller = sys._getframe(1)  # noqa: SLF001
        if caller.f_code is _FORWARD or caller.f_globals.get("__name__") == _CACHE_DIT_FORWARD:
            self.read_by_forward = True
            return iter(self._for_forward)
        self.read_by_others = True
        return iter(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        self.read_by_others = True
        return self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks, name)


class _AllBlocks:
    """Takes the place of the blocks in diffusers' forward, and runs all of them."""

    def __init__(self, stack: Callable[[Streams], Streams]) -> None:
        self._stack = stack

    # The argument names are diffusers'; gradient checkpointing passes them by position.
    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the blocks; arguments and result as of a block."""
        streams = Streams(
            hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )
        out = self._stack(streams)
        return out.text, out.image


_FORWARD = inspect.unwrap(FluxTransformer2DModel.forward).__code__
_CACHE_DIT_FORWARD = "cache_dit.caching.patch_functors.functor_flux"
"""cache-dit leaves its copy of diffusers' forward behind when its cache is disabled."""
_FOREIGN_FORWARD = (
    "the transformer has a forward of its own (PuLID, TeaCache, a skipped layer?), which runs the "
    "blocks itself; restore(pipe), and leave out the passes that wrap blocks (FirstBlockCache, "
    "ReferenceCache, ModulationTable)"
)


def _residuals(
    transformer: FluxTransformer2DModel, inputs: dict[str, Any]
) -> dict[int, torch.Tensor]:
    """Return the ControlNet residual to add after each block, by the block's index."""
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    repeat = inputs.pop("controlnet_blocks_repeat", False)
    found = {}
    for name, first, count, cycle in (
        ("controlnet_block_samples", 0, double, repeat),
        ("controlnet_single_block_samples", double, single, False),
    ):
        samples = inputs.pop(name, None)
        if samples is not None:
            interval = ceil(count / len(samples))
            for i in range(count):
                found[first + i] = samples[i % len(samples) if cycle else i // interval]
    return found
