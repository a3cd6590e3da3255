"""Passes made for the tests: each uses one way of editing a pipeline."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

from fluxfire import Change
from fluxfire.runtime.generation import Listener


@dataclass(frozen=True, kw_only=True)
class Fake:
    """A pass that is only data, for the rules of lists."""

    name: str = "fake"
    stage: str = "weights"
    slot: str | None = None
    exactness: str = "bitwise"

    def check(self, target):
        return ()

    def apply(self, tx):
        return Change(0, "things")


@dataclass(frozen=True, kw_only=True)
class Bare:
    """Does nothing and keeps every promise; the others say where they differ."""

    name: ClassVar[str] = "bare"
    stage: ClassVar[str] = "weights"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[str] = "bitwise"

    def check(self, target):
        return ()

    def apply(self, tx):
        return Change(0, "things")


@dataclass(frozen=True, kw_only=True)
class ScaleTemb(Bare):
    """Lossy on purpose: changes an attribute, a weight in place, and a dictionary's order."""

    name: ClassVar[str] = "scale-temb"
    stage: ClassVar[str] = "weights"
    exactness: ClassVar[str] = "lossy"

    def apply(self, tx):
        bias = tx.pipe.transformer.proj_out.bias
        old = bias.data
        tx.on_undo(lambda: setattr(bias, "data", old))
        bias.data = old + 1
        tx.setattr(tx.pipe.transformer, "new_attribute", "x")
        tx.setattr(tx.pipe.transformer, "gradient_checkpointing", True)
        tx.setattr(tx.pipe.transformer, "gradient_checkpointing", False)
        return Change(2, "attributes and a bias set")


@dataclass(frozen=True, kw_only=True)
class SkipBlock(Bare):
    """Skips one block of the transformer."""

    index: int = 1

    name: ClassVar[str] = "skip-block"
    stage: ClassVar[str] = "blocks"
    exactness: ClassVar[str] = "lossy"
    provides: ClassVar[frozenset[str]] = frozenset({"wraps-blocks"})

    def apply(self, tx):
        def skip(run, streams, blocks, call):
            before = range(blocks.start, min(self.index, blocks.stop))
            after = range(max(self.index + 1, blocks.start), blocks.stop)
            return run(run(streams, before), after)

        tx.wrap_blocks(skip)
        return Change(1, "blocks skipped")


@dataclass(frozen=True, kw_only=True)
class HalfTheTokens(Bare):
    """Runs the blocks on the noise tokens and the text alone; the reference stays as it was."""

    name: ClassVar[str] = "half-the-tokens"
    stage: ClassVar[str] = "caching"
    slot: ClassVar[str | None] = "block-cache"
    exactness: ClassVar[str] = "lossy"
    provides: ClassVar[frozenset[str]] = frozenset({"wraps-blocks"})

    def apply(self, tx):
        import torch

        def half(run, streams, blocks, call):
            noise, text = call.tokens.noise, call.tokens.text
            part = replace(
                streams,
                image=streams.image[:, :noise],
                rotary=tuple(r[: text + noise] for r in streams.rotary),
            )
            out = run(part, blocks)
            image = torch.cat([out.image, streams.image[:, noise:]], dim=1)
            return replace(streams, image=image, text=out.text)

        tx.wrap_blocks(half)
        return Change(1, "runs halved")


class Tally(Listener):
    """Counts what begins and what ends."""

    def __init__(self):
        self.open = 0
        self.calls = []
        self.ended = 0

    @contextmanager
    def on_generation(self, generation):
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1
            self.ended += 1

    def on_step(self, call):
        self.calls.append(call)
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Listen(Bare):
    """Listens to generations, and enters a context manager for as long as it is applied."""

    name: ClassVar[str] = "listen"
    stage: ClassVar[str] = "environment"
    exactness: ClassVar[str] = "bitwise"
    entered: ClassVar[list[int]] = []
    tallies: ClassVar[list[Tally]] = []

    def apply(self, tx):
        @contextmanager
        def inside():
            self.entered.append(1)
            yield
            self.entered.pop()

        tx.enter(inside())
        tally = Tally()
        self.tallies.append(tally)
        tx.listen(tally)
        return Change(1, "listeners added")
