"""Spark's components: a small FLUX.1 Kontext, built from diffusers' classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from fluxfire.kontext import components, tokenizers
from fluxfire.spark import language

WIDTH = 256
_HEAD = 64
_TEXT = 128
_SHIFT = 1.15


def parts(*, seed: int = 0) -> dict[str, Any]:
    """Build every component with random weights, for a Kontext pipeline's constructor.

    The transformer sees a picture of 128 x 128 as 256 tokens: the VAE divides each side by four
    and the patches divide it by two. (FLUX's VAE divides it by eight.)

    Args:
        seed: seed of the weights; the global random state does not change.
    """
    words = language.words()
    tokenizer = tokenizers.clip_tokenizer(words)
    tokenizer_2 = tokenizers.t5_tokenizer(words, lower=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "transformer": _transformer(),
            "vae": _vae(),
            "text_encoder": _clip(tokenizer),
            "text_encoder_2": _t5(len(tokenizer_2)),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "scheduler": _scheduler(),
        }


def _transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=3,
        num_single_layers=9,
        attention_head_dim=_HEAD,
        num_attention_heads=WIDTH // _HEAD,
        joint_attention_dim=_TEXT,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 28, 28),
        guidance_embeds=True,
    ).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=128,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return components.clip_text_model(
        tokenizer, hidden_size=64, intermediate_size=128, layers=2, heads=2
    ).eval()


def _t5(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=_TEXT,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
        )
    ).eval()


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build FLUX's scheduler, with the shift of 1024 x 1024 at every size.

    So 28 steps have the noise levels that the real model's have.
    """
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=_SHIFT, max_shift=_SHIFT
    )
