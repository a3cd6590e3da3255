"""A pass that skips the last blocks of the transformer in late steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from fluxfire.extend import (
    Call,
    Change,
    Exactness,
    Finding,
    Generation,
    Listener,
    Live,
    Run,
    Stage,
    Streams,
    Target,
    Trait,
    Transaction,
)


@dataclass(frozen=True, kw_only=True)
class SkipTail:
    """Skips the last blocks of the transformer in the last part of the steps.

    Attributes:
        blocks: how many blocks to skip.
        from_fraction: where skipping begins, as a fraction of the steps.

    Raises:
        ValueError: a setting is out of its range.
    """

    blocks: int = 1
    from_fraction: float = 0.5

    name: ClassVar[str] = "skip-tail"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "block-cache"
    exactness: ClassVar[Exactness] = "lossy"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset({"from_fraction"})

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}; at least one must be skipped")
        if not 0 <= self.from_fraction <= 1:
            raise ValueError(f"from_fraction={self.from_fraction}; it must be from 0 to 1")

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse to skip more blocks than there are."""
        single = len(target.pipe.transformer.single_transformer_blocks)
        if self.blocks > single:
            yield Finding(
                "error",
                f"blocks={self.blocks}, but there are {single} single blocks",
                f"choose at most {single}",
            )

    def apply(self, tx: Transaction) -> Change:
        """Wrap the run through the blocks."""
        transformer = tx.pipe.transformer
        total = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
        skipper = _Skipper(tx.live(self), total - self.blocks)
        tx.wrap_blocks(skipper)
        tx.listen(skipper)
        return Change(self.blocks, "blocks skipped at late steps")


class _Skipper(Listener):
    """Runs in the place of all blocks, and reads the settings when a generation begins."""

    def __init__(self, live: Live[SkipTail], keep: int) -> None:
        self.live = live
        self.keep = keep
        self.from_fraction = live.settings.from_fraction

    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        self.from_fraction = self.live.settings.from_fraction
        yield

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        if call.step < self.from_fraction * call.steps:
            return run(streams, blocks)
        return run(streams, range(blocks.start, min(blocks.stop, self.keep)))
