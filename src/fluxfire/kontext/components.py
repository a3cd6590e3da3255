"""Parts of a Kontext pipeline that are FLUX's own at every size."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel


def clip_text_model(
    tokenizer: Any, *, hidden_size: int, intermediate_size: int, layers: int, heads: int
) -> CLIPTextModel:
    """Build CLIP's text encoder with fresh weights, for a tokenizer's vocabulary.

    Args:
        tokenizer: whose tokens it reads.
        hidden_size: of each token, and of the pooled text.
        intermediate_size: within its MLPs.
        layers: how many.
        heads: of each attention.
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
