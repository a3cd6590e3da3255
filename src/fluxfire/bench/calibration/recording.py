"""Records what the blocks of plain edits add, as inner products: enough to price any schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.distance import relative_distance
from fluxfire.protocol import Change, Exactness, Stage, Trait
from fluxfire.runtime.generation import Generation, Listener, Live
from fluxfire.runtime.transaction import Transaction

_TOKENS = 1024
"""Most tokens of a picture that a trace looks at.

They estimate a mean over all of them to about 1%, and keep the memory of an edit at full size below
0.4 GB.
"""


@dataclass(frozen=True, eq=False)
class Trace:
    """What the blocks added at each step of one plain edit.

    A residual is what the blocks after the first add to the noise tokens. The squared error of any
    line through residuals, damped or not, follows from their inner products alone.

    Attributes:
        sigmas: (steps + 1,) float64: the noise level of each step, and 0 at the end.
        products: (steps, steps) float64: mean of residual i times residual j, over tokens and
            channels.
        distances: (steps, steps) float64: [i, j] is `FirstBlockCache`'s distance at step i if j is
            the last computed step; 0 where j is not earlier.
    """

    sigmas: Tensor
    products: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Recorder:
    """A pass that changes nothing and records a trace of each generation, sample and branch.

    Attributes:
        traces: the records, in order. A generation that ends early leaves none.
        active: whether it records; `fluxfire.using` switches it.
    """

    traces: list[Trace] = field(default_factory=list, compare=False, repr=False)
    active: bool = True

    name: ClassVar[str] = "recorder"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "bitwise"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset({"active", "traces"})

    def off(self) -> Recorder:
        """Return a copy that records nothing."""
        return replace(self, active=False)

    def check(self, target: object) -> tuple[()]:  # noqa: ARG002
        """Find nothing wrong."""
        return ()

    def apply(self, tx: Transaction) -> Change:
        """Wrap the run through the blocks, and listen to the generations."""
        wrapper = _RecordingWrapper(tx.live(self))
        tx.wrap_blocks(wrapper)
        tx.listen(wrapper)
        return Change(1, "run through the blocks recorded")


@dataclass(eq=False)
class _Branch:
    """The steps of one branch so far; each list has one entry a step."""

    steps: int
    firsts: list[Tensor] = field(default_factory=list)
    rests: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    distances: list[Tensor] = field(default_factory=list)

    def add(self, first: Tensor, rest: Tensor, sigma: Tensor) -> None:
        """Add a step: residuals of the first block and of the others, (batch, tokens, width)."""
        own = rest.double()
        self.firsts.append(first)
        self.rests.append(rest)
        self.sigmas.append(sigma)
        self.products.append(torch.stack([(own * r).mean((1, 2)) for r in self.rests], -1))
        earlier = [relative_distance(first, f) for f in self.firsts]
        self.distances.append(torch.stack(earlier, -1))

    def traces(self) -> Iterator[Trace]:
        """Return a trace for each sample."""
        sigmas = torch.stack([s.double() for s in self.sigmas]).cpu()
        sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        products, distances = _square(self.products), _square(self.distances)
        for sample in range(products.shape[0]):
            lower = products[sample]
            yield Trace(sigmas, lower + lower.tril(-1).mT, distances[sample])


class _RecordingWrapper(Listener):
    def __init__(self, live: Live[Recorder]) -> None:
        self._live = live
        self._branches: dict[str, _Branch] | None = None

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Record one generation; a warm-up run leaves no trace."""
        recorder = self._live.settings
        branches: dict[str, _Branch] | None = None
        if recorder.active and not generation.warmup:
            branches = {}
        self._branches = branches
        try:
            yield
            for branch in (branches or {}).values():
                if len(branch.rests) == branch.steps:
                    recorder.traces.extend(branch.traces())
        finally:
            if self._branches is branches:  # after an interrupt this may run late
                self._branches = None

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run the first block and then the others, and record what they add."""
        if self._branches is None:
            return run(streams, blocks)
        before, noise = streams.image, call.tokens.noise
        every = torch.linspace(0, noise - 1, min(noise, _TOKENS), device=before.device).long()
        streams = run(streams, blocks[:1])
        middle = streams.image
        streams = run(streams, blocks[1:])
        after = streams.image
        branch = self._branches.setdefault(call.branch, _Branch(call.steps))
        branch.add(
            middle[:, every] - before[:, every], after[:, every] - middle[:, every], call.sigma
        )
        return streams


def _square(rows: list[Tensor]) -> Tensor:
    """Make lower triangles, (batch, steps, steps), of rows (batch, 1), (batch, 2) ..."""
    n = len(rows)
    padded = [functional.pad(row, (0, n - row.shape[1])) for row in rows]
    return torch.stack(padded, 1).cpu().double()
