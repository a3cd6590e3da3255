"""Everything specific to FLUX.1 Kontext.

The rest of fluxfire uses `KONTEXT`, a `fluxfire.model.Model`. Passes that replace FLUX.1's own
blocks and processors import diffusers' classes from here.
"""

from __future__ import annotations

from fluxfire.kontext.pipeline import (
    KONTEXT,
    BlockAttention,
    DoubleBlock,
    IPAdapterProcessor,
    PlainProcessor,
    SingleBlock,
)

__all__ = [
    "KONTEXT",
    "BlockAttention",
    "DoubleBlock",
    "IPAdapterProcessor",
    "PlainProcessor",
    "SingleBlock",
]
