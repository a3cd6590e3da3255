"""Components of a Kontext pipeline that are the same at every model size."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def clip_text_model(
    tokenizer: CLIPTokenizer, *, hidden_size: int, intermediate_size: int, layers: int, heads: int
) -> CLIPTextModel:
    """Build a CLIP text encoder with random weights.

    Args:
        tokenizer: the tokenizer, for the vocabulary's size and the special tokens.
        hidden_size: width of a token, and of the pooled text embedding.
        intermediate_size: width inside the MLPs.
        layers: number of layers.
        heads: number of attention heads in each layer.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=hidden_size,
        )
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler with the settings of FLUX.1 [dev]."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15
    )
