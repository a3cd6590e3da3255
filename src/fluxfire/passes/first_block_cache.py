"""FirstBlockCache: skip the blocks after the first if the first block's output barely changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from typing_extensions import override

from fluxfire.diffusers_types import Pipeline
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import CacheWrapper, check_for_other_caches
from fluxfire.passes.shared.distance import mean_abs, relative_distance
from fluxfire.passes.shared.schedule import Schedule, normalise
from fluxfire.passes.shared.step_settings import check_whole_number, step_window
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Decision, Live
from fluxfire.runtime.transaction import Transaction

Distance = Literal["all", "noise"]
Prediction = Literal["hold", "linear", "damped"]
_POINTS: dict[str, int] = {"hold": 1, "linear": 2, "damped": 3}
"""How many computed steps each prediction needs."""


@dataclass(frozen=True)
class FirstBlockCache:
    """Skips the blocks after the first where the first one's output has barely changed.

    Every step runs the first block. `distance` compares what that block adds to the image
    tokens with what it added at the last computed step: mean absolute difference over mean
    absolute value. Below `threshold` the step is a *hit*. A hit skips all other blocks and
    predicts what they would have added from the last computed steps. Lossy, unless nothing hits.

    The defaults are careful, because the first steps decide the picture: they compute the first
    8 and the last 2 of 28 steps, and at least every third step between. That computes 16 to 28
    steps of 28. The nearest published figure for the real model is cache-dit's F1B0 at these
    settings, which holds the last value instead. It computed 16 of 28 steps of one Kontext edit at
    1024 x 1024. Its picture had 38.2 dB to the plain one, and 28.5 dB inside the edited region (we
    measured the pictures that cache-dit publishes). We measured no quality on the real model.

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
        schedule: which steps hit (counted from 0), in place of the threshold and the counts above.
            `Schedule(28, {9: 0.3, ...})` names the steps to skip in generations of 28 steps and
            the distance below which each may hit; `fluxfire.calibrate` makes one. Several are for
            several lengths; generations of other lengths follow the threshold. Plain numbers hit in
            generations of any length at any distance, to time random weights. Stored as a tuple.
        distance: `"all"` compares all image tokens, as other libraries do. `"noise"` compares
            the tokens of the new picture alone, without the reference's. `"all"` becomes
            `"noise"` from the first step at which another cache leaves the reference out.
        predict: `"hold"` adds what the blocks added last. `"linear"` extends the line through
            the last two computed steps to this step's sigma. `"damped"` multiplies that line's
            slope by 0 to 1, by how well the line before it predicted the last computed step; so it
            lies between the other two.

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: a number is too low, a count or a step is not a whole number, two schedules are
            for one length, or `distance` or `predict` is not one of these names.
    """

    threshold: float = 0.12
    _: KW_ONLY
    warmup_steps: int = 8
    tail_steps: int = 2
    of_steps: int | None = 28
    max_consecutive_hits: int | None = 2
    schedule: Iterable[int] | Schedule | Iterable[Schedule] | None = None
    distance: Distance = "all"
    predict: Prediction = "damped"

    name: ClassVar[str] = "first-block-cache"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "block-cache"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset(
        {
            "threshold",
            "warmup_steps",
            "tail_steps",
            "of_steps",
            "max_consecutive_hits",
            "schedule",
            "distance",
            "predict",
        }
    )

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, float | int):
            raise TypeError(f"threshold={self.threshold!r}; it must be a number")
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold!r}; it must be 0 or more")
        for name, least, none_means in (
            ("warmup_steps", 0, ""),
            ("tail_steps", 0, ""),
            ("of_steps", 1, "plain counts"),
            ("max_consecutive_hits", 1, "no limit"),
        ):
            check_whole_number(name, getattr(self, name), least, none_means=none_means)
        for name, known in (("distance", ("all", "noise")), ("predict", tuple(_POINTS))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        if self.schedule is not None:
            schedule = normalise(self.schedule)
            first = schedule[0] if schedule else 1
            if isinstance(first, int) and first < 1:
                raise ValueError(
                    f"schedule={schedule!r}; step {first} cannot hit, since no step was computed "
                    f"before it; steps are counted from 0, so the first step that can hit is 1"
                )
            object.__setattr__(self, "schedule", schedule)

    @property
    def exactness(self) -> Exactness:
        """Bitwise if nothing can hit, else lossy."""
        never = self.threshold == 0 and self.schedule is None
        return "bitwise" if never or self.schedule == () else "lossy"

    def off(self) -> FirstBlockCache:
        """Return a copy whose steps never hit and are never measured."""
        return replace(self, schedule=())

    def limits(self, steps: int) -> dict[int, float | None] | None:
        """Return the limit of each step that the schedule skips; None if the threshold decides.

        Args:
            steps: how many steps the generation has.
        """
        if self.schedule is None:
            return None
        entries = cast("tuple[int, ...] | tuple[Schedule, ...]", self.schedule)
        if not any(isinstance(entry, Schedule) for entry in entries):
            return dict.fromkeys(cast("tuple[int, ...]", entries))
        for schedule in cast("tuple[Schedule, ...]", entries):
            if schedule.steps == steps:
                return schedule.by_step
        return None

    def may_hit(self, steps: int) -> range:
        """Return the steps that are neither warm-up nor tail.

        Args:
            steps: how many steps the generation has.
        """
        warmup, tail = (self._scale(n, steps) for n in (self.warmup_steps, self.tail_steps))
        return step_window(steps, warmup=warmup, tail=tail)

    def most_hits(self, steps: int) -> int:
        """Return the largest possible number of hits, whatever the distances are.

        Args:
            steps: how many steps the generation has.

        Example: 28 steps with the defaults leave steps 8 to 25. Two hits, one computed step, two
        hits and so on make 12 hits of these 18 steps.
        """
        if (limits := self.limits(steps)) is not None:
            return sum(step < steps for step in limits)
        candidates, cap = len(self.may_hit(steps)), self.max_consecutive_hits
        if self.threshold == 0:
            return 0
        return candidates if cap is None else candidates - candidates // (cap + 1)

    def _scale(self, count: int, steps: int) -> int:
        """Scale a count of steps to the length of a generation, rounded up."""
        return count if self.of_steps is None else -(-count * steps // self.of_steps)

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse a pipeline that already has another cache."""
        yield from check_for_other_caches(target)

    def apply(self, tx: Transaction) -> Change:
        """Wrap the run through the blocks, and listen to the generations."""
        wrapper = _FirstBlockWrapper(tx.live(self), tx.pipe)
        tx.wrap_blocks(wrapper)
        tx.listen(wrapper)
        return Change(1, "run through the blocks cached")


@dataclass(eq=False)
class _BranchState:
    """The cache of one branch ("cond" or "uncond").

    A residual is what blocks add to the image tokens: their output minus their input.

    Attributes:
        first_residual: (batch, compared tokens, width): the first block's residual at each
            sample's last computed step.
        first_size: (batch,): mean absolute value of `first_residual`.
        rest_residuals: residuals of the blocks after the first, on the noise tokens. The key is
            the block at which a run of blocks starts, since an outer wrapper may run the blocks
            in several parts.
        consecutive_hits: for each sample, the number of hits since its last computed step.
    """

    first_residual: Tensor | None = None
    first_size: Tensor | None = None
    rest_residuals: dict[int, _ResidualHistory] = field(default_factory=dict)
    consecutive_hits: list[int] = field(default_factory=list)

    def match_tokens(self, residual: Tensor) -> Tensor:
        """Cut cached and new residual to their common tokens.

        ReferenceCache runs the noise tokens alone at some steps. From the first of these steps on,
        the distance compares the noise tokens alone.
        """
        assert self.first_residual is not None  # noqa: S101 - the caller checks it
        tokens = min(residual.shape[1], self.first_residual.shape[1])
        if tokens < self.first_residual.shape[1]:
            self.first_residual = self.first_residual[:, :tokens]
            self.first_size = mean_abs(self.first_residual)
        return residual[:, :tokens]


@dataclass(eq=False)
class _ResidualHistory:
    """Residuals of the last computed steps with their sigmas, the newest first.

    A sample that hits adds nothing, so two samples of a batch may have residuals of different steps
    at the same position.

    Attributes:
        residuals: (batch, noise tokens, width) each.
        sigmas: (batch,) each: the sigma at which the residual was computed.
        counts: for each sample, how many of the residuals were computed for it. A sample that hit
            may have fewer than the list has; the other entries repeat its oldest one.
    """

    residuals: list[Tensor]
    sigmas: list[Tensor]
    counts: list[int]

    def add(self, residual: Tensor, sigma: Tensor, hits: list[bool], *, keep: int) -> None:
        """Add a computed residual for every sample that did not hit, and keep the newest."""
        hit = _sample_mask(hits, residual) if any(hits) else None
        self.residuals = _push(self.residuals, residual, keep, hit)
        self.sigmas = _push(self.sigmas, sigma, keep, None if hit is None else hit[:, 0, 0])
        self.counts = [
            n if hit else min(keep, n + 1) for n, hit in zip(self.counts, hits, strict=True)
        ]

    def predict(self, sigma: Tensor) -> Tensor:
        """Predict the residual at a sigma, (batch,).

        One residual is held. Two give a line in sigma. Three give the line through the last two,
        damped. The code subtracts residuals before it scales the difference: in bfloat16 that
        rounds less than a weighted sum of the residuals.
        """
        r0, *older = self.residuals
        if not older:
            return r0
        s0, s1 = self.sigmas[:2]
        reach = self._if_known(2, (sigma - s0) / _nonzero_difference(s0, s1), otherwise=0.0)
        slope = (r0 - older[0]) * _per_sample(reach * self._damping(), r0)
        return r0 + slope

    def _damping(self) -> Tensor | float:
        """Return the share of the slope that each sample keeps, (batch,), from 0 to 1.

        The line through the residuals before the last predicted a change, and another came. The
        share is the regression of what came on what the line predicted.

        Example: the line predicted that two channels change by 2 and 0. They changed by 1 and 1.
        The share is (1 · 2 + 1 · 0) / (2² + 0²) = 0.5.
        """
        if len(self.residuals) < _POINTS["damped"]:
            return 1.0
        (r0, r1, r2), (s0, s1, s2) = self.residuals, self.sigmas
        # In float32, because float16 overflows at the square of 256.
        came, before = (r0 - r1).float(), (r1 - r2).float()
        reach = (s0 - s1) / _nonzero_difference(s1, s2)
        share = (came * before).sum((1, 2)) / (reach * before.square().sum((1, 2)))
        # A residual that did not change says nothing: 0 / 0 keeps the line.
        return self._if_known(3, share.nan_to_num(1.0).clamp(0, 1), otherwise=1.0)

    def _if_known(self, points: int, factor: Tensor, *, otherwise: float) -> Tensor:
        """Replace the factor, (batch,), of samples with fewer residuals than `points`.

        A mixed batch needs a mask. Copying a mask to the GPU waits for the GPU. On an H100, that
        made a hit of an edit to 1024² take 8 ms instead of 6. So other batches use no mask.
        """
        known = [n >= points for n in self.counts]
        if all(known):
            return factor
        return factor.where(torch.tensor(known, device=factor.device), otherwise)


class _FirstBlockWrapper(CacheWrapper[FirstBlockCache]):
    """Decides for each sample whether it hits, and runs or skips the blocks after the first.

    Example: 2 samples, 3 steps, threshold 0.12, `warmup_steps=0`, `tail_steps=0`.

    - Step 0: the cache is empty, so neither sample hits. All blocks run. For both samples, the
      cache stores the residual of the first block, and the residual of the other blocks.
    - Step 1: the first block runs. Its residual has distance 0.05 from step 0's for sample A, and
      0.30 for B. A hits and B does not. All blocks run for the whole batch, so that shapes stay the
      same. A's result is thrown away. Instead, A gets its input plus step 0's residual of the other
      blocks, as if it ran alone. B gets the computed result, and only B's residuals enter the
      cache.
    - Step 2: A is compared with step 0 (distance 0.10) and B with step 1 (0.08). Both hit, so no
      block after the first runs. A has one residual and repeats it. B has two, and
      `predict="linear"` extends the line through them.
    """

    def __init__(self, live: Live[FirstBlockCache], pipe: Pipeline) -> None:
        super().__init__(live, pipe)
        self._states: dict[str, _BranchState] = {}
        self._hits: list[bool] = []  # of the current call; its later parts follow the first part

    @override
    def warmup_settings(self, settings: FirstBlockCache) -> FirstBlockCache:
        """Return settings without hits: a hit would skip the blocks that need compiling."""
        return replace(settings, schedule=())

    @override
    def forget(self) -> None:
        """Drop all cached tensors."""
        self._states.clear()

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run the first block and decide; then run the other blocks, or predict their residual."""
        state = self._states.setdefault(call.branch, _BranchState())
        if blocks.start == 0:
            before = streams.image
            streams = run(streams, blocks[:1])
            self._hits = self._decide(state, before, streams.image, call)
            blocks = blocks[1:]
        return self._run_rest(state, run, streams, blocks, call) if blocks else streams

    def _decide(self, state: _BranchState, before: Tensor, after: Tensor, call: Call) -> list[bool]:
        """Return which samples hit, store the first residual of the others, record the decision."""
        tokens = call.tokens.noise if self.settings.distance == "noise" else after.shape[1]
        residual = after[:, :tokens] - before[:, :tokens]
        batch = len(residual)
        if state.first_residual is not None:
            residual = state.match_tokens(residual)
        if state.first_residual is None or state.first_residual.shape != residual.shape:
            state.rest_residuals.clear()
            state.consecutive_hits = [0] * batch
            hits, distances = [False] * batch, None
        else:
            distances = self._distances(state, residual, call)
            hits = [
                self._is_hit(call, consecutive, distances[i] if distances else None)
                for i, consecutive in enumerate(state.consecutive_hits)
            ]
        state.consecutive_hits = [
            n + 1 if hit else 0 for n, hit in zip(state.consecutive_hits, hits, strict=True)
        ]
        if not all(hits):
            size, first = mean_abs(residual), residual
            if any(hits):
                hit = _sample_mask(hits, residual)
                first = _select(hit, state.first_residual, residual)
                size = _select(hit[:, 0, 0], state.first_size, size)
            state.first_residual, state.first_size = first, size
        self.record(Decision(call.step, call.branch, tuple(hits), tuple(distances or ())))
        return hits

    def _distances(self, state: _BranchState, residual: Tensor, call: Call) -> list[float] | None:
        """Measure the distance of each sample, which waits for the device.

        Returns:
            None where a schedule decides without it: at steps that it computes, and at those
            without a limit.
        """
        limits = self.settings.limits(call.steps)
        if limits is not None and limits.get(call.step) is None:
            return None
        assert state.first_residual is not None  # noqa: S101 - the caller checks it
        distances = relative_distance(residual, state.first_residual, state.first_size)
        found: list[float] = call.agree(distances).tolist()
        return found

    def _is_hit(self, call: Call, consecutive: int, distance: float | None) -> bool:
        settings = self.settings
        limits = settings.limits(call.steps)
        if limits is not None:
            limit = limits.get(call.step)
            within = limit is None or (distance is not None and distance < limit)
            return call.step in limits and within
        if call.step not in settings.may_hit(call.steps):
            return False
        cap = settings.max_consecutive_hits
        if cap is not None and consecutive >= cap:
            return False
        return distance is not None and distance < settings.threshold

    def _run_rest(
        self, state: _BranchState, run: Run, streams: Streams, blocks: range, call: Call
    ) -> Streams:
        """Run the blocks after the first, or predict their residual.

        In a mixed batch this does both, and selects for each sample.
        """
        noise, history = call.tokens.noise, state.rest_residuals.get(blocks.start)
        before = streams.image[:, :noise]
        sigma = call.sigma.to(before.device).expand(len(before))
        predicted = None
        if history is not None and any(self._hits):
            predicted = before + history.predict(sigma)
        if predicted is not None and all(self._hits):
            return replace(streams, image=_replace_noise(streams.image, predicted))
        streams = run(streams, blocks)
        computed = streams.image[:, :noise]
        keep = _POINTS[self.settings.predict]
        if history is None:
            counts = [1] * len(computed)
            state.rest_residuals[blocks.start] = _ResidualHistory(
                [computed - before], [sigma], counts
            )
            return streams
        history.add(computed - before, sigma, self._hits, keep=keep)
        if predicted is None:
            return streams
        image = _select(_sample_mask(self._hits, computed), predicted, computed)
        return replace(streams, image=_replace_noise(streams.image, image))


def _push(old: list[Tensor], new: Tensor, keep: int, hit: Tensor | None) -> list[Tensor]:
    """Put a new value first and drop the oldest; samples that hit keep their old values."""
    pushed = [new, *old][:keep]
    if hit is None:
        return pushed
    old = old + [old[-1]] * (len(pushed) - len(old))
    return [_select(hit, *pair) for pair in zip(old, pushed, strict=True)]


def _nonzero_difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the difference of two sigmas, with 1 in place of 0.

    A difference is 0 where a sample's entry repeats its oldest one. Dividing by it would give NaN.
    """
    difference = one - other
    return difference.where(difference != 0, 1)


def _per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """Shape a factor (batch,) for (batch, tokens, width), in the dtype of `like`."""
    return factor[:, None, None].to(like.dtype)


def _replace_noise(image: Tensor, noise: Tensor) -> Tensor:
    """Replace the noise tokens of an image stream; the reference tokens behind them stay."""
    if noise.shape[1] == image.shape[1]:
        return noise
    return torch.cat([noise, image[:, noise.shape[1] :]], dim=1)


def _sample_mask(hits: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(hits, device=like.device)[:, None, None]


def _select(hit: Tensor, old: Tensor | None, new: Tensor) -> Tensor:
    """Return the old value for samples that hit, and the new one for the others."""
    assert old is not None  # noqa: S101 - a sample can only hit with a cached value
    return torch.where(hit, old, new)
