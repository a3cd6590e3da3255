"""Kontext pipelines with random weights, built without downloads.

They run the real code on the real architecture, so time and memory are realistic. Their pictures
are noise, and say nothing about quality.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel

from fluxfire import modules
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.kontext import components, tokenizers

_KINDS = {"edit": FluxKontextPipeline, "inpaint": FluxKontextInpaintPipeline}


def tiny_kontext(
    kind: str = "edit",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    double_blocks: int = 2,
    single_blocks: int = 3,
    heads: int = 3,
) -> DiffusersPipeline:
    """Build a Kontext pipeline that edits a picture in milliseconds on a CPU.

    Its VAE halves the size once, so a 32-by-32 picture has 64 tokens. Pass `height`, `width`,
    `max_area=height * width` and `_auto_resize=False`, or the pipeline enlarges the picture.

    Args:
        kind: `"edit"` (`FluxKontextPipeline`) or `"inpaint"` (`FluxKontextInpaintPipeline`).
        seed: seed of the weights; the global random state is not changed.
        dtype: dtype of all weights.
        device: device of all weights.
        double_blocks: number of two-stream blocks.
        single_blocks: number of one-stream blocks.
        heads: number of attention heads, each 16 wide.

    Returns:
        The pipeline in evaluation mode, without a progress bar.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=40,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=32,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
        pipe = _assemble(
            kind,
            transformer,
            vae,
            clip={"hidden_size": 24, "intermediate_size": 48, "layers": 2, "heads": 4},
            t5={"d_model": 40, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        )
    modules.move_and_cast(pipe, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def full_kontext(
    kind: str = "edit",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
) -> DiffusersPipeline:
    """Build a Kontext pipeline of FLUX.1 Kontext [dev]'s own sizes (31 GiB in bfloat16).

    Args:
        kind: as in `tiny_kontext`.
        seed: seed of the weights; the global random state is not changed.
        dtype: dtype in which all weights are created.
        device: device on which the weights are created; a GPU takes about ten seconds.

    Returns:
        The pipeline in evaluation mode.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            transformer = FluxTransformer2DModel(guidance_embeds=True)
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
                sample_size=1024,
                shift_factor=0.1159,
                scaling_factor=0.3611,
            )
            return _assemble(
                kind,
                transformer,
                vae,
                clip={"hidden_size": 768, "intermediate_size": 3072, "layers": 12, "heads": 12},
                t5={
                    "d_model": 4096,
                    "d_kv": 64,
                    "d_ff": 10240,
                    "num_layers": 24,
                    "num_heads": 64,
                    "feed_forward_proj": "gated-gelu",
                },
            )
    finally:
        torch.set_default_dtype(before)


def _assemble(
    kind: str,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    clip: dict[str, Any],
    t5: dict[str, Any],
) -> DiffusersPipeline:
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}; it must be one of {', '.join(_KINDS)}")
    tokenizer, tokenizer_2 = tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    text_encoder = components.clip_text_model(tokenizer, **clip)
    text_encoder_2 = T5EncoderModel(T5Config(vocab_size=len(tokenizer_2), **t5))
    for model in (transformer, vae, text_encoder, text_encoder_2):
        model.eval()
    return _KINDS[kind](
        scheduler=components.scheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
