"""Everything that the author of a pass imports.

    from fluxfire.extend import Change, Finding, Target, Transaction

`fluxfire.testing.check_pass` then says whether a pass keeps its promises.
"""

from __future__ import annotations

from fluxfire.configured import Configured, Stage, Trait
from fluxfire.diffusers_types import AttentionModule, Pipeline, Transformer
from fluxfire.edits.stand_in import StandIn
from fluxfire.model import Call, Model, Run, Streams, Tokens
from fluxfire.protocol import Change, Exactness, Finding, Pass, Target
from fluxfire.runtime.blocks import BlockWrapper
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Decision, Generation, Listener, Live, Refresh
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

__all__ = [
    "AttentionModule",
    "BlockWrapper",
    "Call",
    "Change",
    "Configured",
    "Decision",
    "Exactness",
    "Finding",
    "Generation",
    "Listener",
    "Live",
    "Model",
    "Pass",
    "Pipeline",
    "Refresh",
    "Run",
    "Stage",
    "StandIn",
    "Streams",
    "Target",
    "Tokens",
    "Trait",
    "Transaction",
    "Transformer",
    "Watch",
    "model_of",
]
