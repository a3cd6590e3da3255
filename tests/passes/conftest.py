from __future__ import annotations

import pytest


@pytest.fixture
def para_attn(monkeypatch):
    """ParaAttention with its loop over single blocks brought up to today's diffusers."""
    utils = pytest.importorskip("para_attn.first_block_cache.utils")
    from para_attn.first_block_cache.diffusers_adapters.flux import apply_cache_on_pipe

    def remaining(self, hidden_states, encoder_hidden_states, *args, **kwargs):
        image, text = hidden_states, encoder_hidden_states
        for block in (*self.transformer_blocks[1:], *self.single_transformer_blocks):
            text, image = block(image, text, *args, **kwargs)
        return image, text, image - hidden_states, text - encoder_hidden_states

    monkeypatch.setattr(
        utils.CachedTransformerBlocks, "call_remaining_transformer_blocks", remaining
    )
    return apply_cache_on_pipe
