"""FLUX.1 Kontext's answers to `fluxfire.model.Model`.

Everything here was read off diffusers 0.35 to 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline, FluxTransformer2DModel
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
from fluxfire.model import Model, Run, Streams, Tokens
from fluxfire.text import with_article

__all__ = [
    "KONTEXT",
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

    def refusal(self, pipe: Any) -> str | None:
        """Refuse another transformer, and weights without data."""
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
            weights = component.named_parameters()  # a subclass keeps its numbers in its own way
            on_meta = next((n for n, p in weights if p.is_meta and type(p) is nn.Parameter), None)
            if on_meta is not None and not any("_hf_hook" in vars(m) for m in component.modules()):
                return (
                    f"the {name}'s weights are on the meta device ({on_meta} has no data); "
                    f"load them before optimizing"
                )
        return None

    def blocks(self, transformer: Any) -> list[nn.Module]:
        """Return the blocks: double, then single."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def attentions(self, transformer: Any) -> list[Any]:
        """Return the blocks' attentions, in the same order."""
        of_blocks: list[Any] = self.blocks(transformer)
        return [block.attn for block in of_blocks]

    def linears(self, block: Any) -> list[tuple[Any, str]]:
        """Return the attention's projections, then the MLP's."""
        attention = block.attn
        names = (*_QKV[1], *_TEXT_QKV[1], "to_add_out")
        places: list[tuple[Any, str]] = [(attention, name) for name in names]
        if getattr(attention, "to_out", None) is not None:
            places.append((attention.to_out, "0"))
        if hasattr(block, "ff"):
            places += [(mlp.net[0], "proj") for mlp in (block.ff, block.ff_context)]
            places += [(mlp.net, "2") for mlp in (block.ff, block.ff_context)]
        else:
            places += [(block, "proj_mlp"), (block, "proj_out")]
        return [(owner, name) for owner, name in places if getattr(owner, name, None) is not None]

    def projections(self, attention: Any) -> list[tuple[str, tuple[str, str, str]]]:
        """Return the image's, and the text's where it has some of its own."""
        apart = getattr(attention, _TEXT_QKV[1][0], None) is not None
        return [_QKV, _TEXT_QKV] if apart else [_QKV]

    def modulated_norms(self, block: Any) -> list[Any]:
        """Return two norms of a double block, image first; one of a single block."""
        names = ("norm1", "norm1_context") if hasattr(block, "norm1") else ("norm",)
        return [getattr(block, name) for name in names]

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """Return CLIP and T5, as far as the pipeline has them."""
        return [e for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None]

    def sigma(self, pipe: Any) -> torch.Tensor:
        """Return the scheduler's time step in [0, 1], in full precision."""
        sigma: torch.Tensor = pipe.current_timestep.float() / 1000
        return sigma

    def identity(self, inputs: dict[str, Any]) -> object | None:
        """Return the image's position ids: a pipeline makes them once for all its steps."""
        if not {"img_ids", "txt_ids", "timestep"} <= inputs.keys():
            return None
        identity: object = inputs["img_ids"]
        return identity

    def tokens(self, inputs: dict[str, Any]) -> Tokens:
        """Count tokens from the position ids, (tokens, 3).

        The first column of the image's is 0 for noise and 1 for the reference.
        """
        img_ids, txt_ids = inputs["img_ids"], inputs["txt_ids"]
        noise = int((img_ids[..., 0] == 0).sum())
        return Tokens(noise, img_ids.shape[-2] - noise, txt_ids.shape[-2])

    def runner(self, transformer: Any, inputs: dict[str, Any]) -> Run:
        """Return a function that does exactly what diffusers' own loops do.

        ControlNet residuals are taken out of `inputs` (the model would spread them over the
        mounted stack, and so get them wrong) and added here, after the same blocks.
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
    def mount(self, transformer: Any, stack: Callable[[Streams], Streams]) -> Iterator[None]:
        """Shadow the two lists of blocks: one holds the whole stack, the other is empty.

        diffusers' own forward does the rest, so embeddings and output projection stay the
        library's. No module is replaced.
        """

        # The argument names are diffusers'; gradient checkpointing passes them by position.
        def run_all(
            hidden_states: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            temb: torch.Tensor,
            image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            streams = Streams(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
            out = stack(streams)
            return out.text, out.image

        own = vars(transformer)  # past Module.__setattr__, which would drop the real lists
        try:
            own[_LISTS[0]] = [run_all]
            own[_LISTS[1]] = []
            yield
        finally:
            self.unmount(transformer)

    def unmount(self, transformer: Any) -> None:
        """Take the shadows off the lists of blocks."""
        for name in _LISTS:
            vars(transformer).pop(name, None)

    def reference_size(self, pipe: Any, width: int, height: int) -> tuple[int, int]:
        """Return the one of Kontext's preferred sizes, all about a megapixel, nearest in shape.

        A pipeline of another size says so by a method of this name.
        """
        if (own := getattr(pipe, "reference_size", None)) is not None:
            size: tuple[int, int] = own(width, height)
            return size
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        _, w, h = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        return w // 16 * 16, h // 16 * 16

    def exact_size(self, width: int, height: int) -> dict[str, int]:
        """Give `max_area`, without which Kontext rescales to about a megapixel."""
        return {"width": width, "height": height, "max_area": width * height}

    def size_multiple(self, pipe: Any) -> int:
        """Return the side of a token, in pixels: 2 by 2 latents."""
        multiple: int = pipe.vae_scale_factor * 2
        return multiple

    def is_tiny(self, pipe: Any) -> bool:
        """Whether a latent covers fewer than FLUX's 8 by 8 pixels."""
        flux = 8
        return bool(pipe.vae_scale_factor < flux)


KONTEXT: Model = Kontext()


def _residuals(transformer: Any, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Say which ControlNet residual follows which block."""
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
