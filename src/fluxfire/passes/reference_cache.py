"""ReferenceCache: compute the reference tokens at some steps, and reuse their KV in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from math import inf, prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import AttentionModule, Pipeline
from fluxfire.errors import FluxfireError
from fluxfire.kernels.float8 import E4M3, to_float8
from fluxfire.kernels.heads import Pair
from fluxfire.kontext.attention import (
    REFERENCE_KWARG,
    Float8AttnProcessor,
    ReferenceAttnProcessor,
    ReferenceKV,
    is_flux_processor,
)
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import CacheWrapper, check_for_other_caches
from fluxfire.passes.shared.distance import relative_distance
from fluxfire.passes.shared.processors import ProcessorSwap
from fluxfire.passes.shared.step_settings import check_whole_number, sorted_steps, step_window
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Generation, Live, Refresh
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of
from fluxfire.text import human_bytes

_ROUNDING = 1e-6  # tolerance for sigmas whose difference is `spacing` up to rounding


@dataclass(frozen=True)
class ReferenceCache:
    """Recomputes the reference's tokens at chosen steps only.

    The reference picture is the same at every step. Its tokens still change in the blocks, because
    they attend to the text and the noise tokens, and because the sigma (the noise level) modulates
    them. At a *refresh* step the blocks compute all tokens, and each block stores the keys and
    values of the reference tokens. The steps between compute the text and noise tokens only, which
    attend to the stored keys and values. For an edit to 1024 × 1024 that is 4608 of 8704 tokens.
    Lossy, unless every step is a refresh.

    Each branch of true CFG has its own KV cache, and so does every sample of a batch. If only some
    samples of a batch need a refresh, the blocks compute all tokens of all samples. The other
    samples still attend to their stored keys and values, as they would alone. A refresh may fall on
    a hit of `FirstBlockCache`, which skips blocks. Then those blocks refresh at the next step at
    which they run. A call without a reference is not changed. The cache is empty before and after
    each generation.

    The cache has two tensors of (reference tokens, width) for each block, sample and branch: 2.67
    GiB for FLUX's 57 blocks and 4096 tokens in bfloat16. It takes half of that with
    `in_float8=True` or behind `Attention("fa3-fp8")`, and twice as much with `predict="linear"`.

    Measured on an H100 (docs, "Passes"): a computed step of `faithful` 274 → 277 ms, a step that
    reuses 150 ms. It is in no preset: on Spark, at equal computed work, plain with fewer steps is
    11 to 21 dB nearer to the plain picture (docs, "Keeping the reference image").

    Attributes:
        spacing: refresh when the sigma, which falls from 1 to 0, has fallen by this much since the
            last refresh. At 0 every step is a refresh, whatever else is set, and every bit is kept.
            Above 1 only the first step, `warmup_steps`, `tail_steps` and `drift` cause a refresh.
        warmup_steps: how many first steps are always refreshes. The very first always is.
        tail_steps: how many last steps are always refreshes.
        drift: also refresh a sample if the first block's residual on the reference tokens has
            changed by more than this since the last refresh (mean absolute difference over mean
            absolute value). To measure it, every step computes the first block in full. None
            measures nothing.
        schedule: exactly these steps (counted from 0) are refreshes, whatever the other settings
            say. It is for timing with random weights. Stored as a sorted tuple.
        predict: what the steps between refreshes attend to. `"hold"`: the keys and values of the
            last refresh. `"linear"`: the line through the last two refreshes, extended to the
            step's sigma; this keeps two sets of keys and values, in twice the memory.
        in_float8: store keys and values in float8 (e4m3), scaled by sample and head, in half the
            memory.

    Raises:
        TypeError: `spacing` is not a number.
        ValueError: a number is below 0, a count or a step is not a whole number, `schedule` lacks
            step 0, or `predict` is not one of these names.
    """

    spacing: float = 0.2
    _: KW_ONLY
    warmup_steps: int = 0
    tail_steps: int = 0
    drift: float | None = None
    schedule: Iterable[int] | None = None
    predict: Literal["hold", "linear"] = "hold"
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
            check_whole_number(name, getattr(self, name), 0)
        if self.drift is not None and not (isinstance(self.drift, float | int) and self.drift >= 0):
            raise ValueError(f"drift={self.drift!r}; it must be a number, 0 or more, or None")
        if self.predict not in {"hold", "linear"}:
            raise ValueError(f"predict={self.predict!r}; it must be 'hold' or 'linear'")
        if self.schedule is not None:
            steps = sorted_steps("schedule", self.schedule)
            if not steps or steps[0] != 0:
                raise ValueError(
                    f"schedule={steps!r}; it must have step 0, because the cache is empty then"
                )
            object.__setattr__(self, "schedule", steps)

    @property
    def exactness(self) -> Exactness:
        """Bitwise if every step is a refresh, else lossy."""
        return "bitwise" if self.spacing == 0 and self.schedule is None else "lossy"

    def off(self) -> ReferenceCache:
        """Return a copy whose steps are all refreshes and that caches nothing."""
        return replace(self, spacing=0, schedule=None)

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse other caches, and attention processors without support for a reference KV."""
        yield from check_for_other_caches(target)
        processors = [
            a.processor for a in model_of(target.pipe).attentions(target.pipe.transformer)
        ]
        if strange := {type(p).__name__ for p in processors if not is_flux_processor(p)}:
            yield Finding(
                "error",
                f"the transformer's attention runs through {', '.join(sorted(strange))}, which "
                f"cannot keep the reference's keys and values",
                "leave ReferenceCache out",
            )
        if "context-parallel" in target.traits:
            yield Finding(
                "error",
                "several processes share each edit, and each has the keys and values of a part of "
                "the tokens only",
                "leave one of them out; FirstBlockCache works on several processes",
            )

    def apply(self, tx: Transaction) -> Change:
        """Install processors with a reference KV, and wrap the run through the blocks."""
        attentions = model_of(tx.pipe).attentions(tx.pipe.transformer)
        swap = ProcessorSwap(tx.pipe.transformer, ReferenceAttnProcessor)
        tx.on_undo(swap.restore)
        swap.prepare()
        tx.listen(swap)
        wrapper = ReferenceWrapper(tx.live(self), tx.pipe)
        tx.wrap_blocks(wrapper)
        tx.listen(wrapper)
        tx.report_facts(wrapper.facts)
        return Change(len(attentions), "attentions keep the reference")


@dataclass(eq=False)
class _ReferenceState:
    """The reference KV cache of one branch ("cond" or "uncond").

    `requested_at` and `extracted_at` differ after a refresh step at which another cache skipped
    blocks: the refresh was requested, but these blocks did not run. They refresh when they run
    next.

    Attributes:
        kv: the keys and values, by block.
        extracted_at: by block, and for each sample: the step whose keys and values are stored.
        older: the keys and values of the refresh before, by block. Only to predict.
        older_at: by block, and for each sample: the step of `older`; None before the second
            refresh.
        requested_at: for each sample, the last step at which a refresh was requested.
        dtype: of the image tokens.
        steps: of the generation.
        first_residual: (batch, reference tokens, width): the first block's residual on the
            reference tokens at each sample's last refresh. Only with `drift`.
        decided_step: the step of the last decision.
        refresh: for each sample, that decision: whether the step is a refresh.
    """

    kv: dict[int, ReferenceKV] = field(default_factory=dict)
    extracted_at: dict[int, list[int]] = field(default_factory=dict)
    older: dict[int, ReferenceKV] = field(default_factory=dict)
    older_at: dict[int, list[int | None]] = field(default_factory=dict)
    requested_at: list[int] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    steps: int = 0
    first_residual: Tensor | None = None
    decided_step: int = -1
    refresh: list[bool] = field(default_factory=list)


class ReferenceWrapper(CacheWrapper[ReferenceCache]):
    """Decides for each sample whether a step is a refresh, and runs the blocks accordingly.

    Example: 2 samples, 3 steps with the sigmas 1.0, 0.9 and 0.85, `spacing=0.2`, `drift=0.1`.

    - Step 0: nothing is stored, so both samples refresh. The blocks compute all tokens, and each
      block stores the reference's keys and values of both samples.
    - Step 1: the sigma has fallen by 0.1 only, so `spacing` asks for no refresh. The first block
      computes all tokens to measure the drift: 0.15 for sample A, 0.03 for B. So A refreshes and B
      does not. The blocks compute all tokens of both, so that shapes stay the same. They store A's
      new keys and values. B's new ones are dropped, and B attends to step 0's.
    - Step 2: since A's refresh the sigma has fallen by 0.05, since B's by 0.15, and both drifts are
      small. No sample refreshes: after the first block, only text and noise tokens are computed.
      A attends to step 1's keys and values, B to step 0's.

    If FirstBlockCache had skipped blocks at step 1, these would still store step 0's keys and
    values of A. Then A would refresh at step 2, because its last request (step 1) is later.
    """

    def __init__(self, live: Live[ReferenceCache], pipe: Pipeline) -> None:
        super().__init__(live, pipe)
        self._states: dict[str, _ReferenceState] = {}
        self._attentions: list[AttentionModule] = []
        self._sigmas: list[float] = []
        self._refreshed = self._reused = self._bytes = 0

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Start and end with an empty cache.

        Raises:
            FluxfireError: somebody replaced attention processors.
        """
        model = model_of(self._pipe)
        # Listed here, because the transformer's blocks are hidden while they run.
        self._attentions = model.attentions(self._pipe.transformer)
        for attention in self._attentions:
            if not isinstance(attention.processor, ReferenceAttnProcessor):
                raise FluxfireError(
                    f"an attention processor was replaced after ReferenceCache was applied, by "
                    f"{type(attention.processor).__name__} (an IP-adapter was loaded?), which "
                    f"cannot keep the reference; restore(pipe), and optimize(pipe) without it"
                )
        with super().on_generation(generation):
            yield

    @override
    def warmup_settings(self, settings: ReferenceCache) -> ReferenceCache:
        """Return settings that refresh at step 0 and reuse at step 1."""
        if settings.exactness == "bitwise":
            return settings
        if settings.drift is None or settings.schedule is not None:
            return replace(settings, schedule=(0,))
        # Measuring a drift has graphs of its own. An infinite drift measures, and never refreshes.
        return replace(settings, spacing=inf, drift=inf, warmup_steps=0, tail_steps=0)

    @override
    def forget(self) -> None:
        """Drop all cached tensors."""
        self._states.clear()
        self._sigmas = []

    def facts(self) -> dict[str, object]:
        """Report how many samples were refreshed or reused, and the bytes of one branch's cache.

        A refresh that another cache prevents is counted again at each step until it happens.
        """
        return {
            "refreshed": self._refreshed,
            "reused": self._reused,
            "kept_bytes": self._bytes,
        }

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run the blocks on all tokens, or on text and noise tokens only."""
        if not self._applies(streams, call):
            return run(streams, blocks)
        state = self._states.setdefault(call.branch, _ReferenceState())
        if not state.kv:
            self._allocate(state, streams.image, call.tokens.reference)
        if state.decided_step != call.step:  # an outer wrapper may run the blocks in several parts
            state.decided_step, state.steps = call.step, call.steps
            state.refresh = self._refresh_by_sigma(state, call, len(streams.image))
            drifts: list[float] = []
            if self._measures_drift and blocks.start == 0:
                before = streams.image
                streams = self._refresh(state, run, streams, blocks[:1], None)
                residual = (streams.image - before)[:, call.tokens.noise :]
                drifts = self._refresh_by_drift(state, residual)
                blocks = blocks[1:]
            last = state.requested_at or [call.step] * len(state.refresh)
            state.requested_at = [
                call.step if refresh else step
                for refresh, step in zip(state.refresh, last, strict=True)
            ]
            self._record_refresh(state, call, drifts)
        if any(state.refresh):
            # A refresh with a mask has graphs of its own. With a drift a batch always has a mask,
            # even if all samples refresh: a warm-up run cannot know which samples will refresh.
            maskless = all(state.refresh) and (not self._measures_drift or len(state.refresh) == 1)
            refresh = None if maskless else state.refresh
            return self._refresh(state, run, streams, blocks, refresh)
        return self._reuse(state, run, streams, blocks, call)

    @property
    def _measures_drift(self) -> bool:
        return self.settings.drift is not None and self.settings.schedule is None

    def _applies(self, streams: Streams, call: Call) -> bool:
        """Whether the call has a reference to cache, and attention runs without extra arguments."""
        if call.tokens.reference == 0 or self.settings.exactness == "bitwise":
            return False
        if modules.computes_derivatives() or streams.attention_kwargs:
            return False
        if torch.is_autocast_enabled(streams.image.device.type):
            return False
        state = self._states.get(call.branch)
        # The stream may lack the reference tokens. Then either `_reuse` cut them earlier in this
        # step, or somebody else did, and there is nothing to cache.
        cut = streams.image.shape[1] == call.tokens.noise
        return not cut or (state is not None and state.decided_step == call.step)

    def _refresh_by_sigma(self, state: _ReferenceState, call: Call, batch: int) -> list[bool]:
        """Return which samples refresh for other reasons than drift."""
        settings = self.settings
        if len(state.extracted_at) < len(self._attentions):
            return [True] * batch  # some block has stored nothing yet
        oldest = [min(steps) for steps in zip(*state.extracted_at.values(), strict=True)]
        missed = [done < asked for done, asked in zip(oldest, state.requested_at, strict=True)]
        window = step_window(call.steps, warmup=settings.warmup_steps, tail=settings.tail_steps)
        if settings.schedule is not None:
            planned = [call.step in settings.schedule] * batch
        elif call.step not in window:
            planned = [True] * batch
        else:
            now, spacing = self._sigma(call.step, call.steps), settings.spacing - _ROUNDING
            planned = [self._sigma(done, call.steps) - now >= spacing for done in oldest]
        return [one or other for one, other in zip(planned, missed, strict=True)]

    def _sigma(self, step: int, steps: int) -> float:
        """Return a step's sigma. The first call of a generation waits for the device.

        Some schedulers do not keep their time steps. For these, this assumes evenly spaced sigmas.
        """
        if not self._sigmas:
            planned = self._pipe.scheduler.timesteps[-steps:].tolist()
            even = [1000 * (1 - i / steps) for i in range(steps)]
            self._sigmas = [t / 1000 for t in (planned if len(planned) == steps else even)]
        return self._sigmas[min(step, steps - 1)]

    def _refresh_by_drift(self, state: _ReferenceState, residual: Tensor) -> list[float]:
        """Let samples refresh whose drift is too large. Waits for the device.

        Returns:
            The drift of each sample; empty at the first step.
        """
        assert self.settings.drift is not None  # noqa: S101 - the caller checks it
        drifts: list[float] = []
        if state.first_residual is not None:
            drifts = relative_distance(residual, state.first_residual).tolist()
            state.refresh = [
                refresh or drift > self.settings.drift
                for refresh, drift in zip(state.refresh, drifts, strict=True)
            ]
        if state.first_residual is None or all(state.refresh):
            state.first_residual = residual
        elif any(state.refresh):
            refresh = torch.tensor(state.refresh, device=residual.device)[:, None, None]
            state.first_residual = torch.where(refresh, residual, state.first_residual)
        return drifts

    def _record_refresh(self, state: _ReferenceState, call: Call, drifts: list[float]) -> None:
        self._refreshed += sum(state.refresh)
        self._reused += len(state.refresh) - sum(state.refresh)
        if self._generation is not None:
            self._generation.refreshes.append(
                Refresh(call.step, call.branch, tuple(state.refresh), tuple(drifts))
            )

    def _refresh(
        self,
        state: _ReferenceState,
        run: Run,
        streams: Streams,
        blocks: range,
        refresh: list[bool] | None,
    ) -> Streams:
        """Run the blocks on all tokens, and store the reference's keys and values.

        Args:
            state: the branch's cache.
            run: runs blocks.
            streams: the blocks' input, with the reference tokens.
            blocks: which blocks to run.
            refresh: for each sample, whether to store its new keys and values; None for all.
        """
        device, batch = streams.image.device, len(streams.image)
        mask = None if refresh is None else torch.tensor(refresh, device=device)[:, None]

        def arguments(index: int) -> dict[str, Any]:
            now = state.decided_step
            predicted = None if mask is None else self._predict(state, index)
            if self.settings.predict == "linear":
                _keep_older(state, index, refresh)
            before = state.extracted_at.get(index, [now] * batch)
            state.extracted_at[index] = [
                now if refresh is None or refresh[sample] else before[sample]
                for sample in range(batch)
            ]
            kv = state.kv[index]._replace(refresh_mask=mask, predicted=predicted)
            return {REFERENCE_KWARG: kv}

        out = run(replace(streams, arguments=arguments), blocks)
        return replace(out, arguments=streams.arguments)

    def _reuse(
        self, state: _ReferenceState, run: Run, streams: Streams, blocks: range, call: Call
    ) -> Streams:
        """Run the blocks on text and noise tokens, which attend to the stored keys and values."""
        tokens = streams.text.shape[1] + call.tokens.noise
        cos, sin = streams.rotary

        def arguments(index: int) -> dict[str, Any]:
            predicted = self._predict(state, index)
            kv = state.kv[index]._replace(extract=False, predicted=predicted)
            return {REFERENCE_KWARG: kv}

        cut = replace(
            streams,
            image=streams.image[:, : call.tokens.noise],
            rotary=(cos[:tokens], sin[:tokens]),
            arguments=arguments,
        )
        out = run(cut, blocks)
        return replace(out, rotary=streams.rotary, arguments=streams.arguments)

    def _predict(self, state: _ReferenceState, index: int) -> Pair | None:
        """Extend the line through a block's last two refreshes to the step's sigma.

        Example: sigma 0.9 at the refresh before, 0.8 at the last, 0.75 now. The keys changed from
        k1 to k0 while the sigma fell by 0.1, and it fell by 0.05 since. So the prediction is k0 +
        0.5 (k0 - k1). Before the second refresh it is k0.

        Returns:
            Keys and values in the dtype that attention computes in; None to use the cached ones.
        """
        if self.settings.predict == "hold":
            return None
        kv, older = state.kv[index], state.older[index]
        reach = [  # empty at the first refresh, when a block has stored nothing yet
            0.0 if before is None else self._reach(state, last, before)
            for last, before in zip(
                state.extracted_at.get(index, ()), state.older_at[index], strict=False
            )
        ]
        factor: float | Tensor = max(reach, default=0.0)
        if len(set(reach)) > 1:
            factor = torch.tensor(reach, device=kv.key.device)[:, None, None, None]
        dtype = torch.float32 if kv.key.dtype is E4M3 else kv.key.dtype
        key, value = kv.attended_in(dtype)
        if any(reach):
            old_key, old_value = older.attended_in(dtype)
            key, value = key + factor * (key - old_key), value + factor * (value - old_value)
        if isinstance(self._attentions[index].processor, Float8AttnProcessor):
            key_scale, value_scale = (s[:, None, :, None] for s in (kv.key_scale, kv.value_scale))
            return to_float8(key, key_scale), to_float8(value, value_scale)
        return key.to(state.dtype), value.to(state.dtype)

    def _reach(self, state: _ReferenceState, last: int, before: int) -> float:
        """Return how far the sigma has fallen since a refresh, as a share of its fall before."""
        now, at, earlier = (self._sigma(s, state.steps) for s in (state.decided_step, last, before))
        return (at - now) / (earlier - at) if earlier > at else 0.0

    def _allocate(self, state: _ReferenceState, image: Tensor, tokens: int) -> None:
        """Allocate the keys and values of every block.

        Raises:
            FluxfireError: the GPU has too little free memory.
        """
        state.dtype = image.dtype
        shapes = [(len(image), tokens, a.heads, a.head_dim) for a in self._attentions]
        dtypes = [
            E4M3
            if self.settings.in_float8 or isinstance(a.processor, Float8AttnProcessor)
            else image.dtype
            for a in self._attentions
        ]
        sets = 2 if self.settings.predict == "linear" else 1
        self._bytes = sets * sum(
            2 * prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        _check_memory(image.device, self._bytes, tokens)
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            key, value = (image.new_empty(shape, dtype=dtype) for _ in range(2))
            key_scale, value_scale = (
                image.new_ones(shape[0], shape[2], dtype=torch.float32) for _ in range(2)
            )
            state.kv[index] = ReferenceKV(key, value, key_scale, value_scale, extract=True)
            if sets > 1:
                kv = state.kv[index]
                state.older[index] = kv._replace(  # zeros, since 0 times garbage may be NaN
                    key=torch.zeros_like(key), value=torch.zeros_like(value),
                    key_scale=torch.ones_like(key_scale), value_scale=torch.ones_like(value_scale),
                )  # fmt: skip
                state.older_at[index] = [None] * len(image)


def _keep_older(state: _ReferenceState, index: int, refresh: list[bool] | None) -> None:
    """Copy a block's keys and values to the older set, for the samples that refresh now."""
    if index not in state.extracted_at:
        return
    kv, older, last = state.kv[index], state.older[index], state.extracted_at[index]
    for sample, step in enumerate(last):
        if step != state.decided_step and (refresh is None or refresh[sample]):
            for new, old in zip(kv[:4], older[:4], strict=True):
                old[sample].copy_(new[sample])
            state.older_at[index][sample] = step


def _check_memory(device: torch.device, needed: int, tokens: int) -> None:
    """Raise a FluxfireError if the GPU lacks memory for the cache."""
    if device.type != "cuda":
        return
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    if needed > free:
        raise FluxfireError(
            f"ReferenceCache would keep {human_bytes(needed).lstrip('+')} for {tokens} tokens of "
            f"the reference, and the GPU has {human_bytes(free).lstrip('+')} left; use a smaller "
            f"reference or batch, set in_float8=True to halve that, or leave ReferenceCache out"
        )
