"""FirstBlockCache: leave out all blocks but the first where the first says little changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fluxfire.blocks import Run, Streams
from fluxfire.generation import Decision, Live
from fluxfire.kontext import Call
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.toolkit.block_cache import CacheEngine, obstacles
from fluxfire.transaction import Transaction

Measured = Literal["all", "noise"]
Prediction = Literal["hold", "linear", "quadratic"]
_POINTS: dict[str, int] = {"hold": 1, "linear": 2, "quadratic": 3}


@dataclass(frozen=True)
class FirstBlockCache:
    """Reuses what the blocks after the first added in an earlier step.

    Every step runs the first block. If what that block adds to the image tokens differs
    from what it added at the last step that was computed in full by less than `threshold`
    (mean absolute difference over mean absolute value), the step is a *hit*: what the other
    blocks added then is added again. Lossy, unless nothing hits.

    Conditional and unconditional calls of true CFG have a memory each, and so has every
    sample of a batch: a sample hits where it would alone. A batch that hits in part is
    computed whole and selected from, so that shapes never change. Nothing is remembered
    beyond a generation. Measured on an H100 (docs, "Passes"): a computed step of `faithful`
    274 → 273 ms, a hit 6 ms.

    The idea is ParaAttention's (https://github.com/chengzeyi/ParaAttention) after TeaCache
    (https://arxiv.org/abs/2411.19108); this is another implementation, whose `hold` gives the same
    hits and pixels as ParaAttention 0.3.38, diffusers' FirstBlockCache and cache-dit's F1B0
    (`tests/passes/test_cache_oracles.py`). In bfloat16 they round the distance to 8 bits, where
    this one sums in float32: a distance that close to the threshold may fall on the other side.

    Attributes:
        threshold: hit below this distance; at 0 nothing hits and every bit is kept.
        warmup_steps: first steps that are always computed. The very first always is.
        tail_steps: last steps that are always computed.
        max_consecutive_hits: a sample is computed after this many hits in a row.
        schedule: exactly the steps (from 0) that hit, whatever the distance: for timing,
            where weights are random. Kept as a sorted tuple.
        distance: `"all"` compares all image tokens, as others do; `"noise"` those of the
            picture being made, without the reference's; so does the first, from the first step on
            whose reference another cache leaves out.
        predict: `"hold"` adds what was added last; `"linear"` extends the line through the
            last two computed steps to this step's noise level; `"quadratic"` the parabola
            through the last three.

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: a number is too low, or `distance` or `predict` is no such name.
    """

    threshold: float = 0.12
    _: KW_ONLY
    warmup_steps: int = 0
    tail_steps: int = 0
    max_consecutive_hits: int | None = None
    schedule: Iterable[int] | None = None
    distance: Measured = "all"
    predict: Prediction = "linear"

    name: ClassVar[str] = "first-block-cache"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "block-cache"
    provides: ClassVar[frozenset[str]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset(
        {
            "threshold", "warmup_steps", "tail_steps", "max_consecutive_hits", "schedule",
            "distance", "predict",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, float | int):
            raise TypeError(f"threshold={self.threshold!r}; it must be a number")
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r}; it must be 0 or more")
        for name in ("warmup_steps", "tail_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}; it must be 0 or more")
        if self.max_consecutive_hits is not None and self.max_consecutive_hits < 1:
            raise ValueError(
                f"max_consecutive_hits={self.max_consecutive_hits!r}; it must be 1 or more, "
                f"or None for no limit"
            )
        for name, known in (("distance", ("all", "noise")), ("predict", tuple(_POINTS))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        if self.schedule is not None:
            steps = tuple(sorted(set(self.schedule)))
            if steps and steps[0] < 1:
                raise ValueError(
                    f"schedule={steps!r}; step {steps[0]} cannot hit, since nothing was computed "
                    f"before it: steps count from 0, and the first must be computed"
                )
            object.__setattr__(self, "schedule", steps)

    @property
    def exactness(self) -> Exactness:
        """Bitwise if nothing can hit, else lossy."""
        never = self.threshold == 0 and self.schedule is None
        return "bitwise" if never or self.schedule == () else "lossy"

    def off(self) -> FirstBlockCache:
        """Return the same with settings by which nothing hits, and nothing is measured."""
        return replace(self, schedule=())

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse a pipeline that another cache works on already."""
        yield from obstacles(target)

    def apply(self, tx: Transaction) -> Change:
        """Wrap the run through the blocks, and hear where generations begin and end."""
        engine = _Engine(tx.live(self), tx.pipe)
        tx.wrap_blocks(engine)
        tx.listen(engine)
        return Change(1, "run through the blocks cached")


@dataclass(eq=False)
class _Memory:
    """What one branch remembers of its last computed steps.

    Attributes:
        first: (batch, measured tokens, width): what the first block added.
        size: (batch,): its mean absolute value.
        rests: what the blocks after it added to the noise tokens; by the block they begin
            with, since an outer wrapper may run the stack in parts.
        streak: for each sample, hits since it was last computed.
    """

    first: Tensor | None = None
    size: Tensor | None = None
    rests: dict[int, _Trend] = field(default_factory=dict)
    streak: list[int] = field(default_factory=list)

    def limit(self, added: Tensor) -> Tensor:
        """Go on with the noise tokens alone, once the reference's are missing in a step."""
        assert self.first is not None  # noqa: S101 - the caller looked
        tokens = min(added.shape[1], self.first.shape[1])
        if tokens < self.first.shape[1]:
            self.first = self.first[:, :tokens]
            self.size = _mean_abs(self.first)
        return added[:, :tokens]


@dataclass(eq=False)
class _Trend:
    """The last computed values of each sample, with their noise levels: the newest first.

    Attributes:
        values: (batch, noise tokens, width) each.
        levels: (batch,) each.
        known: for each sample, how many of them are its own.
    """

    values: list[Tensor]
    levels: list[Tensor]
    known: list[int]

    def take(self, value: Tensor, level: Tensor, hits: list[bool], *, keep: int) -> None:
        """Remember a newly computed value of the samples that did not hit."""
        held = _mask(hits, value) if any(hits) else None
        self.values = _shifted(self.values, value, keep, held)
        self.levels = _shifted(self.levels, level, keep, None if held is None else held[:, 0, 0])
        self.known = [
            n if hit else min(keep, n + 1) for n, hit in zip(self.known, hits, strict=True)
        ]

    def at(self, level: Tensor) -> Tensor:
        """Predict the value at a noise level, (batch,), by Newton's divided differences.

        Differences are taken before they are scaled, which in bfloat16 loses less than
        weighing the values themselves.
        """
        value, *older = self.values
        if not older:
            return value
        x0, x1, *rest = self.levels
        first = value - older[0]
        along = self._where_known(1, (level - x0) / _apart(x0, x1))
        predicted = value if along is None else value + first * _over(along, value)
        if rest:
            x2 = rest[0]
            bend = (level - x0) * (level - x1) / (_apart(x0, x2) * _apart(x0, x1))
            if (bend_known := self._where_known(2, bend)) is not None:
                by = _over(_apart(x0, x1) / _apart(x1, x2), value)
                second = first - (older[0] - older[1]) * by
                predicted = predicted + second * _over(bend_known, value)
        return predicted

    def _where_known(self, needed: int, factor: Tensor) -> Tensor | None:
        """Zero the factor of samples of which too few values are known; None if it is of all.

        Only a mixed batch has to say which. To bring that to the GPU waits for it, which made
        a hit of an edit to 1024² take 8 ms instead of 6, on an H100.
        """
        known = [n > needed for n in self.known]
        if all(known):
            return factor
        return factor * factor.new_tensor(known) if any(known) else None


class _Engine(CacheEngine[FirstBlockCache]):
    """Decides, remembers and forgets."""

    def __init__(self, live: Live[FirstBlockCache], pipe: Any) -> None:
        super().__init__(live, pipe)
        self._memories: dict[str, _Memory] = {}
        self._hits: list[bool] = []

    @override
    def rehearsed(self, settings: FirstBlockCache) -> FirstBlockCache:
        """Hit nothing: a hit would leave out what is to be compiled."""
        return replace(settings, schedule=())

    @override
    def forget(self) -> None:
        """Drop everything that was remembered."""
        self._memories.clear()

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run the first block, then the rest or its memory."""
        memory = self._memories.setdefault(call.branch, _Memory())
        if blocks.start == 0:
            before = streams.image
            streams = run(streams, blocks[:1])
            self._hits = self._decide(memory, before, streams.image, call)
            blocks = blocks[1:]
        return self._rest(memory, run, streams, blocks, call) if blocks else streams

    def _decide(self, memory: _Memory, before: Tensor, after: Tensor, call: Call) -> list[bool]:
        """Say which samples hit, and take note."""
        tokens = call.tokens.noise if self.settings.distance == "noise" else after.shape[1]
        added = after[:, :tokens] - before[:, :tokens]
        batch = len(added)
        if memory.first is not None:
            added = memory.limit(added)
        if memory.first is None or memory.first.shape != added.shape:
            memory.rests.clear()
            memory.streak = [0] * batch
            hits, distances = [False] * batch, None
        else:
            distances = self._distances(memory, added)
            hits = [
                self._hit(call, streak, distances[i] if distances else None)
                for i, streak in enumerate(memory.streak)
            ]
        memory.streak = [n + 1 if hit else 0 for n, hit in zip(memory.streak, hits, strict=True)]
        if not all(hits):
            size = _mean_abs(added)
            held = None if not any(hits) else _mask(hits, added)
            memory.first = added if held is None else _select(held, memory.first, added)
            memory.size = size if held is None else _select(held[:, 0, 0], memory.size, size)
        self.note(Decision(call.step, call.branch, tuple(hits), tuple(distances or ())))
        return hits

    def _distances(self, memory: _Memory, added: Tensor) -> list[float] | None:
        """Measure each sample, which waits for the device; a schedule needs no measure."""
        if self.settings.schedule is not None:
            return None
        assert memory.first is not None  # noqa: S101 - something was computed
        assert memory.size is not None  # noqa: S101 - with it
        distance = _mean_abs(added - memory.first) / memory.size
        found: list[float] = distance.tolist()
        return found

    def _hit(self, call: Call, streak: int, distance: float | None) -> bool:
        settings = self.settings
        if settings.schedule is not None:
            return call.step in settings.schedule
        if not settings.warmup_steps <= call.step < call.steps - settings.tail_steps:
            return False
        if settings.max_consecutive_hits is not None and streak >= settings.max_consecutive_hits:
            return False
        return distance is not None and distance < settings.threshold

    def _rest(
        self, memory: _Memory, run: Run, streams: Streams, blocks: range, call: Call
    ) -> Streams:
        """Run the rest of the blocks, or add what they added, or both and select."""
        noise, trend = call.tokens.noise, memory.rests.get(blocks.start)
        before = streams.image[:, :noise]
        level = call.level.to(before.device).expand(len(before))
        predicted = before + trend.at(level) if trend is not None and any(self._hits) else None
        if predicted is not None and all(self._hits):
            return replace(streams, image=_joined(predicted, streams.image))
        streams = run(streams, blocks)
        computed = streams.image[:, :noise]
        keep = _POINTS[self.settings.predict]
        if trend is None:
            known = [1] * len(computed)
            memory.rests[blocks.start] = _Trend([computed - before], [level], known)
            return streams
        trend.take(computed - before, level, self._hits, keep=keep)
        if predicted is None:
            return streams
        image = _select(_mask(self._hits, computed), predicted, computed)
        return replace(streams, image=_joined(image, streams.image))


def _shifted(old: list[Tensor], new: Tensor, keep: int, held: Tensor | None) -> list[Tensor]:
    """Put a new value first, but for the samples held, which keep theirs."""
    shifted = [new, *old][:keep]
    if held is None:
        return shifted
    old = old + [old[-1]] * (len(shifted) - len(old))
    return [_select(held, *pair) for pair in zip(old, shifted, strict=True)]


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """The difference of two levels, never 0."""
    run = one - other
    return run.where(run != 0, 1)


def _over(factor: Tensor, value: Tensor) -> Tensor:
    return factor[:, None, None].to(value.dtype)


def _joined(noise: Tensor, image: Tensor) -> Tensor:
    """Put noise tokens before the reference tokens of an image stream."""
    if noise.shape[1] == image.shape[1]:
        return noise
    return torch.cat([noise, image[:, noise.shape[1] :]], dim=1)


def _mean_abs(values: Tensor) -> Tensor:
    """Mean absolute value of each sample, summed in float32: (batch,)."""
    return values.abs().mean((1, 2), dtype=torch.float32)


def _mask(hits: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(hits, device=like.device)[:, None, None]


def _select(held: Tensor, old: Tensor | None, new: Tensor) -> Tensor:
    """Take the old value where a sample hit, the new one elsewhere."""
    assert old is not None  # noqa: S101 - a hit has a memory
    return torch.where(held, old, new)
