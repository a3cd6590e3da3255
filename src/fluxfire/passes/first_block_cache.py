"""FirstBlockCache: leave out all blocks but the first where the first says little changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import CacheEngine, obstacles
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Decision, Live
from fluxfire.runtime.transaction import Transaction

Measured = Literal["all", "noise"]
Prediction = Literal["hold", "linear", "quadratic"]
_POINTS: dict[str, int] = {"hold": 1, "linear": 2, "quadratic": 3}


@dataclass(frozen=True)
class FirstBlockCache:
    """Skips the blocks after the first where the first one's output has barely changed.

    Every step runs the first block. `distance` compares what that block adds to the image
    tokens with what it added at the last computed step: mean absolute difference over mean
    absolute value. Below `threshold` the step is a *hit*. A hit skips all other blocks and
    predicts what they would have added from the last computed steps. Lossy, unless nothing hits.

    The defaults are careful, because the first steps decide the picture: they compute the first
    8 and the last 2 of 28 steps, and at least every third step between. That computes 16 to 28
    steps of 28. Nearest published figure for the real model: cache-dit's F1B0 at these settings,
    but holding the last value, computed 16 of 28 steps of one Kontext edit at 1024 x 1024. Its
    picture had 38.2 dB to the plain one, and 28.5 dB inside the edited region (measured by us on
    the pictures that cache-dit publishes). We measured no quality on the real model.

    Each branch of true CFG has its own memory, and so does every sample of a batch: a sample hits
    where it would hit alone. A batch in which only some samples hit is computed whole, so shapes
    never change. The cache is empty before and after each generation. Measured on an H100 (docs,
    "Passes"): a computed step of `faithful` 274 → 273 ms, a hit 6 ms.

    The idea is ParaAttention's (https://github.com/chengzeyi/ParaAttention) after TeaCache
    (https://arxiv.org/abs/2411.19108); this is another implementation. With `predict="hold"`,
    `warmup_steps=0`, `tail_steps=0` and `max_consecutive_hits=None` it gives the same hits and
    pixels as ParaAttention 0.3.38, diffusers' FirstBlockCache and cache-dit's F1B0
    (`tests/passes/test_cache_oracles.py`). In bfloat16 they round the distance to 8 bits. This
    one sums in float32, so a distance very close to the threshold may fall on the other side.

    Attributes:
        threshold: hit below this distance; at 0 nothing hits and every bit is kept.
        warmup_steps: how many first steps are always computed. The very first always is.
        tail_steps: how many last steps are always computed.
        of_steps: the number of steps that `warmup_steps` and `tail_steps` are meant for. A
            generation of another length scales both, rounded up: 8 of 28 become 6 of 20 and
            15 of 50. None takes both as plain counts.
        max_consecutive_hits: compute a step after this many hits in a row; None for no limit.
        schedule: exactly the steps (from 0) that hit, whatever the distance and the other
            limits. For timing, where weights are random. Kept as a sorted tuple.
        distance: `"all"` compares all image tokens, as other libraries do. `"noise"` compares
            the tokens of the new picture alone, without the reference's. `"all"` becomes
            `"noise"` from the first step at which another cache leaves the reference out.
        predict: `"hold"` adds what the blocks added last; `"linear"` extends the line through
            the last two computed steps to this step's sigma; `"quadratic"` extends the parabola
            through the last three. Published results favour `"linear"` for short skips and show
            `"quadratic"` behind it.

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: a number is too low, or `distance` or `predict` is no such name.
    """

    threshold: float = 0.12
    _: KW_ONLY
    warmup_steps: int = 8
    tail_steps: int = 2
    of_steps: int | None = 28
    max_consecutive_hits: int | None = 2
    schedule: Iterable[int] | None = None
    distance: Measured = "all"
    predict: Prediction = "linear"

    name: ClassVar[str] = "first-block-cache"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "block-cache"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset(
        {
            "threshold", "warmup_steps", "tail_steps", "of_steps", "max_consecutive_hits",
            "schedule", "distance", "predict",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, float | int):
            raise TypeError(f"threshold={self.threshold!r}; it must be a number")
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r}; it must be 0 or more")
        for name, least, without in (
            ("warmup_steps", 0, ""),
            ("tail_steps", 0, ""),
            ("of_steps", 1, ", or None for plain counts"),
            ("max_consecutive_hits", 1, ", or None for no limit"),
        ):
            value = getattr(self, name)
            if value is None and without:
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name}={value!r}; it must be a whole number, {least} or more{without}"
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

    def may_hit(self, steps: int) -> range:
        """Return the steps that are neither warm-up nor tail.

        Args:
            steps: how many steps the generation has.
        """
        warmup, tail = (self._scaled(n, steps) for n in (self.warmup_steps, self.tail_steps))
        return range(max(1, warmup), max(1, warmup, steps - tail))

    def most_hits(self, steps: int) -> int:
        """Return how many steps can hit at the most, whatever the distances.

        Args:
            steps: how many steps the generation has.

        Example: 28 steps with the defaults leave steps 8 to 25. Two hits, one computed step, two
        hits and so on make 12 hits of these 18 steps.
        """
        if self.schedule is not None:
            return sum(step < steps for step in self.schedule)
        among, cap = len(self.may_hit(steps)), self.max_consecutive_hits
        if self.threshold == 0:
            return 0
        return among if cap is None else among - among // (cap + 1)

    def _scaled(self, count: int, steps: int) -> int:
        """Scale a count of steps to the length of a generation, rounded up."""
        return count if self.of_steps is None else -(-count * steps // self.of_steps)

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
    def warmup_settings(self, settings: FirstBlockCache) -> FirstBlockCache:
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
        if call.step not in settings.may_hit(call.steps):
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
        level = call.sigma.to(before.device).expand(len(before))
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
