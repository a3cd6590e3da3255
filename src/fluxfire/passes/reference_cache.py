"""ReferenceCache: compute the reference at some steps, and attend to what it was in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from math import inf, prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fluxfire.errors import FluxfireError
from fluxfire.kernels.float8 import FLOAT8
from fluxfire.kontext.attention import (
    Float8AttnProcessor,
    KeepingAttnProcessor,
    Kept,
    attends_as_flux,
)
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import CacheEngine, obstacles
from fluxfire.passes.shared.processors import Processors
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Generation, Live, Refresh
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of
from fluxfire.text import human_bytes

_ROUNDING = 1e-6  # of noise levels that are multiples of the spacing


@dataclass(frozen=True)
class ReferenceCache:
    """Recomputes the reference's tokens at chosen steps only.

    A reference is the same picture at every step, but its tokens see the noise level, the text
    and the picture in the making, so what the blocks make of them changes. At a *refresh* all
    tokens are computed, and each block keeps the reference's keys and values; at the steps in
    between only text and noise are, and attend to those kept. Of 8704 tokens of an edit to
    1024 × 1024 that leaves 4608. Lossy, unless every step is a refresh.

    Conditional and unconditional calls of true CFG keep their own, and so does every sample of a
    batch. Where some samples of a batch are due and others not, all are computed, and those not
    due still attend to what they kept, as they would alone. A refresh that falls on a hit of
    `FirstBlockCache` is made up for at the next step that some sample of the batch computes. A
    call without a reference passes straight through. Nothing is kept beyond a generation.

    It keeps two tensors of (reference tokens, width) for each block, sample and branch: 2.67 GiB
    for FLUX's 57 blocks and 4096 tokens in bfloat16, half of that with `in_float8=True` or behind
    `Attention("fa3-fp8")`.

    Measured on an H100 (docs, "Passes"): a computed step of `faithful` 274 → 277 ms, a step that
    reuses 150 ms. It is in no preset: on Spark, at equal computed work, plain with fewer steps
    keeps 5 to 18 dB more (docs, "The reference, once in a while").

    Attributes:
        spacing: refresh where the noise level, which falls from 1 to 0, has fallen by this much
            since the last refresh; at 0 every step is one, whatever else is set, and every bit is
            kept; above 1 only `drift`, first and last steps ask for more than the very first.
        warmup_steps: first steps that all are refreshes. The very first always is.
        tail_steps: last steps that all are.
        drift: refresh a sample before its time, too, if what the first block adds to the
            reference has changed by more than this since the last refresh (mean absolute
            difference over mean absolute value). The first block is computed in full for it.
        schedule: exactly the steps (from 0) that are refreshes, whatever the other settings say:
            for timing, where weights are random. Kept as a sorted tuple.
        in_float8: keep keys and values in float8 (e4m3), scaled by sample and head: half the
            memory.

    Raises:
        TypeError: `spacing` is not a number.
        ValueError: a setting is below 0 or not whole, or `schedule` is without step 0.
    """

    spacing: float = 0.2
    _: KW_ONLY
    warmup_steps: int = 0
    tail_steps: int = 0
    drift: float | None = None
    schedule: Iterable[int] | None = None
    in_float8: bool = False

    name: ClassVar[str] = "reference-cache"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "reference"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset(
        {"spacing", "warmup_steps", "tail_steps", "drift", "schedule"}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.spacing, float | int):
            raise TypeError(f"spacing={self.spacing!r}; it must be a number")
        if not self.spacing >= 0:
            raise ValueError(f"spacing={self.spacing!r}; it must be 0 or more")
        for name in ("warmup_steps", "tail_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or steps < 0:
                raise ValueError(f"{name}={steps!r}; it must be a whole number, 0 or more")
        if self.drift is not None and not (isinstance(self.drift, float | int) and self.drift >= 0):
            raise ValueError(f"drift={self.drift!r}; it must be a number, 0 or more, or None")
        if self.schedule is not None:
            steps = tuple(sorted(set(self.schedule)))
            if not steps or steps[0] != 0:
                raise ValueError(
                    f"schedule={steps!r}; it must have step 0, before which nothing is kept"
                )
            object.__setattr__(self, "schedule", steps)

    @property
    def exactness(self) -> Exactness:
        """Bitwise if every step is a refresh, else lossy."""
        return "bitwise" if self.spacing == 0 and self.schedule is None else "lossy"

    def off(self) -> ReferenceCache:
        """Return the same with settings by which every step is a refresh, and nothing is kept."""
        return replace(self, spacing=0, schedule=None)

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse other caches, and attention processors that cannot keep the reference."""
        yield from obstacles(target)
        processors = [
            a.processor for a in model_of(target.pipe).attentions(target.pipe.transformer)
        ]
        if strange := {type(p).__name__ for p in processors if not attends_as_flux(p)}:
            yield Finding(
                "error",
                f"the transformer's attention runs through {', '.join(sorted(strange))}, which "
                f"cannot keep the reference's keys and values",
                "leave ReferenceCache out",
            )
        if any(getattr(p, "_parallel_config", None) is not None for p in processors):
            yield Finding(
                "error",
                "attention is spread over several GPUs, which share the tokens among them",
                "leave ReferenceCache out",
            )

    def apply(self, tx: Transaction) -> Change:
        """Have attentions keep the reference, and wrap the run through the blocks."""
        attentions = model_of(tx.pipe).attentions(tx.pipe.transformer)
        processors = Processors(tx.pipe.transformer, KeepingAttnProcessor)
        tx.on_undo(processors.give_back)
        processors.prepare()
        tx.listen(processors)
        engine = ReferenceEngine(tx.live(self), tx.pipe)
        tx.wrap_blocks(engine)
        tx.listen(engine)
        tx.report_facts(engine.facts)
        return Change(len(attentions), "attentions keep the reference")


@dataclass(eq=False)
class _Memory:
    """What one branch keeps.

    Attributes:
        kept: of each block.
        taken: of each block and sample, the step at which it was kept.
        first: (batch, reference tokens, width): what the first block added at the last refresh.
        step: which step was decided last.
        due: of each sample, whether that step is a refresh.
        wanted: of each sample, the last step that was one. Blocks that another cache left out
            then kept nothing, and make up for it.
    """

    kept: dict[int, Kept] = field(default_factory=dict)
    taken: dict[int, list[int]] = field(default_factory=dict)
    first: Tensor | None = None
    step: int = -1
    due: list[bool] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)


class ReferenceEngine(CacheEngine[ReferenceCache]):
    """Decides, keeps and forgets, for one pipeline."""

    def __init__(self, live: Live[ReferenceCache], pipe: Any) -> None:
        super().__init__(live, pipe)
        self._memories: dict[str, _Memory] = {}
        self._attentions: list[Any] = []
        self._levels: list[float] = []
        self._refreshed = self._reused = self._bytes = 0

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Begin and end with nothing kept.

        Raises:
            FluxfireError: attention processors were replaced.
        """
        model = model_of(self._pipe)
        self._attentions = model.attentions(self._pipe.transformer)  # hidden while the stack runs
        for attention in self._attentions:
            if not isinstance(attention.processor, KeepingAttnProcessor):
                raise FluxfireError(
                    f"an attention processor was replaced after ReferenceCache was applied, by "
                    f"{type(attention.processor).__name__} (an IP-adapter was loaded?), which "
                    f"cannot keep the reference; restore(pipe), and optimize(pipe) without it"
                )
        with super().on_generation(generation):
            yield

    @override
    def warmup_settings(self, settings: ReferenceCache) -> ReferenceCache:
        """Refresh, then reuse; with a drift that never comes where one has graphs of its own."""
        if settings.exactness == "bitwise":
            return settings
        if settings.drift is None or settings.schedule is not None:
            return replace(settings, schedule=(0,))
        return replace(settings, spacing=inf, drift=inf, warmup_steps=0, tail_steps=0)

    @override
    def forget(self) -> None:
        """Drop everything that was kept."""
        self._memories.clear()
        self._levels = []

    def facts(self) -> dict[str, object]:
        """Tell the report how often the reference was due, and what one branch keeps.

        One that falls on hits of another cache counts at each step until it is made up for.
        """
        return {
            "refreshed": self._refreshed,
            "reused": self._reused,
            "kept_bytes": self._bytes,
        }

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run all tokens, or those before the reference's."""
        if not self._applies(streams, call):
            return run(streams, blocks)
        memory = self._memories.setdefault(call.branch, _Memory())
        if not memory.kept:
            self._make_room(memory, streams.image, call.tokens.reference)
        if memory.step != call.step:
            memory.step, memory.due = call.step, self._by_time(memory, call, len(streams.image))
            if self._measures and blocks.start == 0:
                before = streams.image
                streams = self._refresh(memory, run, streams, blocks[:1], None)
                drifts = self._by_drift(memory, (streams.image - before)[:, call.tokens.noise :])
                blocks = blocks[1:]
            else:
                drifts = []
            if not memory.wanted:
                memory.wanted = [call.step] * len(memory.due)
            memory.wanted = [
                call.step if due else before
                for due, before in zip(memory.due, memory.wanted, strict=True)
            ]
            self._note(memory, call, drifts)
        if any(memory.due):
            # With a drift one kind of graph does for all batches, whoever is due.
            one_kind = not self._measures or len(memory.due) == 1
            mixed = None if one_kind and all(memory.due) else memory.due
            return self._refresh(memory, run, streams, blocks, mixed)
        return self._reuse(memory, run, streams, blocks, call)

    @property
    def _measures(self) -> bool:
        return self.settings.drift is not None and self.settings.schedule is None

    def _applies(self, streams: Streams, call: Call) -> bool:
        """Whether there is a reference to keep, and nothing else has a say in attention."""
        if call.tokens.reference == 0 or self.settings.exactness == "bitwise":
            return False
        if torch.is_grad_enabled() or streams.attention_kwargs:
            return False
        if torch.is_autocast_enabled(streams.image.device.type):
            return False
        memory = self._memories.get(call.branch)
        cut = streams.image.shape[1] == call.tokens.noise  # by ourselves, earlier in this step
        return not cut or (memory is not None and memory.step == call.step)

    def _by_time(self, memory: _Memory, call: Call, batch: int) -> list[bool]:
        """Say which samples are due whatever they look like."""
        settings = self.settings
        if len(memory.taken) < len(self._attentions):
            return [True] * batch
        oldest = [min(taken) for taken in zip(*memory.taken.values(), strict=True)]
        missed = [taken < wanted for taken, wanted in zip(oldest, memory.wanted, strict=True)]
        if settings.schedule is not None:
            planned = [call.step in settings.schedule] * batch
        elif not settings.warmup_steps <= call.step < call.steps - settings.tail_steps:
            planned = [True] * batch
        else:
            now, fallen = self._level(call.step, call.steps), settings.spacing - _ROUNDING
            planned = [self._level(taken, call.steps) - now >= fallen for taken in oldest]
        return [one or other for one, other in zip(planned, missed, strict=True)]

    def _level(self, step: int, steps: int) -> float:
        """Return a step's noise level; the first time in a generation waits for all of them.

        A scheduler that does not keep its time steps is taken to step evenly.
        """
        if not self._levels:
            planned = self._pipe.scheduler.timesteps[-steps:].tolist()
            even = [1000 * (1 - i / steps) for i in range(steps)]
            self._levels = [t / 1000 for t in (planned if len(planned) == steps else even)]
        return self._levels[min(step, steps - 1)]

    def _by_drift(self, memory: _Memory, added: Tensor) -> list[float]:
        """Have samples be due whose reference changed; return by how much, which waits."""
        assert self.settings.drift is not None  # noqa: S101 - the caller looked
        drifts: list[float] = []
        if memory.first is not None:
            apart, size = (added - memory.first).abs(), memory.first.abs()
            means = [x.mean((1, 2), dtype=torch.float32) for x in (apart, size)]
            drifts = (means[0] / means[1]).tolist()
            memory.due = [
                due or drift > self.settings.drift
                for due, drift in zip(memory.due, drifts, strict=True)
            ]
        if memory.first is None or all(memory.due):
            memory.first = added
        elif any(memory.due):
            due = torch.tensor(memory.due, device=added.device)[:, None, None]
            memory.first = torch.where(due, added, memory.first)
        return drifts

    def _note(self, memory: _Memory, call: Call, drifts: list[float]) -> None:
        self._refreshed += sum(memory.due)
        self._reused += len(memory.due) - sum(memory.due)
        if self._generation is not None:
            self._generation.refreshes.append(
                Refresh(call.step, call.branch, tuple(memory.due), tuple(drifts))
            )

    def _refresh(
        self, memory: _Memory, run: Run, streams: Streams, blocks: range, due: list[bool] | None
    ) -> Streams:
        """Run all tokens, and keep the reference of the samples that are due; None if all."""
        mask = None if due is None else torch.tensor(due, device=streams.image.device)[:, None]
        batch = len(streams.image)

        def arguments(index: int) -> dict[str, Any]:
            before = memory.taken.get(index, [memory.step] * batch)
            memory.taken[index] = [
                memory.step if due is None or due[sample] else before[sample]
                for sample in range(batch)
            ]
            return {"reference": memory.kept[index]._replace(due=mask)}

        out = run(replace(streams, arguments=arguments), blocks)
        return replace(out, arguments=streams.arguments)

    def _reuse(
        self, memory: _Memory, run: Run, streams: Streams, blocks: range, call: Call
    ) -> Streams:
        """Run the tokens before the reference's."""
        tokens = streams.text.shape[1] + call.tokens.noise
        cos, sin = streams.rotary

        def arguments(index: int) -> dict[str, Any]:
            return {"reference": memory.kept[index]._replace(fresh=False)}

        cut = replace(
            streams,
            image=streams.image[:, : call.tokens.noise],
            rotary=(cos[:tokens], sin[:tokens]),
            arguments=arguments,
        )
        out = run(cut, blocks)
        return replace(out, rotary=streams.rotary, arguments=streams.arguments)

    def _make_room(self, memory: _Memory, image: Tensor, tokens: int) -> None:
        """Make room for what every block keeps.

        Raises:
            FluxfireError: the GPU has too little memory left.
        """
        shapes = [(len(image), tokens, a.heads, a.head_dim) for a in self._attentions]
        dtypes = [
            FLOAT8
            if self.settings.in_float8 or isinstance(a.processor, Float8AttnProcessor)
            else image.dtype
            for a in self._attentions
        ]
        self._bytes = sum(
            2 * prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        _check_memory(image.device, self._bytes, tokens)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            key, value = (image.new_empty(shape, dtype=dtype) for _ in range(2))
            of_key, of_value = (
                image.new_ones(shape[0], shape[2], dtype=torch.float32) for _ in range(2)
            )
            memory.kept[index] = Kept(key, value, of_key, of_value, fresh=True)


def _check_memory(device: torch.device, needed: int, tokens: int) -> None:
    """Raise a FluxfireError where a GPU cannot hold what is to be kept."""
    if device.type != "cuda":
        return
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = torch.cuda.mem_get_info(device)[0] + unused
    if needed > left:
        raise FluxfireError(
            f"ReferenceCache would keep {human_bytes(needed).lstrip('+')} for {tokens} tokens of "
            f"the reference, and the GPU has {human_bytes(left).lstrip('+')} left; use a smaller "
            f"reference or batch, in_float8=True for half of it, or leave ReferenceCache out"
        )
