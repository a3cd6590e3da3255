"""Everything that is FLUX.1 Kontext, and nothing else.

The rest of fluxfire asks `KONTEXT`, a `fluxfire.model.Model`. Passes that rewrite FLUX.1's own
blocks and processors name them by the classes here.
"""

from __future__ import annotations

from fluxfire.kontext.pipeline import (
    KONTEXT,
    DoubleBlock,
    IPAdapterProcessor,
    PlainProcessor,
    SingleBlock,
)

__all__ = ["KONTEXT", "DoubleBlock", "IPAdapterProcessor", "PlainProcessor", "SingleBlock"]
