"""A pass to start from: it leaves one block of the transformer out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from fluxfire.extend import (
    Call,
    Change,
    Exactness,
    Finding,
    Run,
    Stage,
    Streams,
    Target,
    Trait,
    Transaction,
)


@dataclass(frozen=True, kw_only=True)
class NewPass:
    """Leaves one block of the transformer out, except at the first steps.

    Attributes:
        block: which one, counted from 0.
        from_step: the first step at which it is left out, counted from 0.
    """

    block: int = 1
    from_step: int = 1

    name: ClassVar[str] = "new-pass"
    stage: ClassVar[Stage] = "blocks"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "lossy"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse a block that is not there."""
        transformer = target.pipe.transformer
        blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
        if not 0 <= self.block < blocks:
            yield Finding(
                "error", f"there is no block {self.block}", f"choose one from 0 to {blocks - 1}"
            )

    def apply(self, tx: Transaction) -> Change:
        """Put a wrapper around the run through the blocks. `restore` takes it off again."""
        tx.wrap_blocks(self._run_others)
        return Change(1, "blocks left out")

    def _run_others(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run the blocks before the one that is left out, then those after it."""
        if call.step < self.from_step:
            return run(streams, blocks)
        streams = run(streams, range(blocks.start, min(self.block, blocks.stop)))
        return run(streams, range(max(self.block + 1, blocks.start), blocks.stop))
