"""ParaAttention: para-attn's own first-block cache, running on current diffusers versions."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fluxfire.diffusers_types import Pipeline
from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import CacheWrapper, check_for_other_caches
from fluxfire.passes.shared.step_settings import check_whole_number
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Decision, Live
from fluxfire.runtime.transaction import Transaction
from fluxfire.text import extra_hint

_ONE_AT_A_TIME = threading.Lock()
"""para-attn stores its current context in a module variable, so only one pipeline may use it."""


@dataclass(frozen=True)
class ParaAttention:
    """Runs para-attn's own caching code: the same decisions, TaylorSeer and pixels.

    para-attn 0.3.38 itself crashes on every diffusers version that has Kontext, because its loop
    over the single blocks still passes one tensor. It also patches the pipeline's class, so it
    caches every pipeline of that class, and it cannot be undone. This pass runs its caching code
    around the blocks of this pipeline only.

    True CFG calls the transformer twice a step. Here each branch has its own para-attn context,
    which replaces para-attn's alternating cache. para-attn's skip-layer guidance is not supported.
    As in para-attn, a batch has one decision for all samples; `FirstBlockCache` decides for each.
    Measured on an H100 (docs, "Passes"): a computed step of `faithful` 274 → 274 ms, a hit 8 ms.

    Needs the extra `fluxfire[para-attn]`. para-attn's licence forbids offering it to others as a
    hosted or managed service. `FirstBlockCache(predict="hold")` gives the same hits and pixels
    without it, except for TaylorSeer.

    Attributes:
        threshold: para-attn's `residual_diff_threshold`; at 0 nothing hits.
        alter_threshold: the threshold of the unconditional branch; None means `threshold`.
        warmup_steps: how many first steps are always computed.
        downsample_factor: compare only every n-th channel.
        taylorseer: predict the blocks' residual with para-attn's TaylorSeer.
        derivatives: the highest order of TaylorSeer's derivatives.

    Raises:
        ValueError: a number is too low, or a count is not a whole number.
    """

    threshold: float = 0.12
    _: KW_ONLY
    alter_threshold: float | None = None
    warmup_steps: int = 0
    downsample_factor: int = 1
    taylorseer: bool = False
    derivatives: int = 2

    name: ClassVar[str] = "para-attention"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "block-cache"
    provides: ClassVar[frozenset[Trait]] = frozenset({"wraps-blocks"})
    tunable: ClassVar[frozenset[str]] = frozenset(
        {
            "threshold",
            "alter_threshold",
            "warmup_steps",
            "downsample_factor",
            "taylorseer",
            "derivatives",
        }
    )

    def __post_init__(self) -> None:
        for name in ("threshold", "alter_threshold"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value!r}; it must be 0 or more")
        for name, least in (("warmup_steps", 0), ("downsample_factor", 1), ("derivatives", 1)):
            check_whole_number(name, getattr(self, name), least)

    @property
    def exactness(self) -> Exactness:
        """Bitwise if nothing can hit, else lossy."""
        never = self.threshold == 0 and not self.alter_threshold
        return "bitwise" if never else "lossy"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse to run without para-attn, and a pipeline that already has another cache."""
        if importlib.util.find_spec("para_attn") is None:
            yield Finding(
                "error",
                "para-attn is not installed",
                f"{extra_hint('para-attn')} (its licence bars hosted services), or use "
                'FirstBlockCache, which needs nothing, and with predict="hold" gives the same',
            )
        yield from check_for_other_caches(target)
        if "context-parallel" in target.traits:
            yield Finding(
                "error",
                "several processes share each edit, and para-attn lets each decide for itself "
                "whether to skip the blocks",
                "use FirstBlockCache, with which they agree",
            )

    def apply(self, tx: Transaction) -> Change:
        """Wrap the run through the blocks, and listen to the generations."""
        wrapper = _ParaAttentionWrapper(tx.live(self), tx.pipe)
        tx.wrap_blocks(wrapper)
        tx.listen(wrapper)
        return Change(1, "run through the blocks cached by para-attn")

    def context(self, branch: str) -> Any:
        """Create para-attn's context for one branch of one generation."""
        from para_attn.first_block_cache.utils import create_cache_context

        threshold = self.threshold
        if branch != "cond" and self.alter_threshold is not None:
            threshold = self.alter_threshold
        return create_cache_context(
            residual_diff_threshold=threshold,
            warmup_steps=self.warmup_steps,
            downsample_factor=self.downsample_factor,
            enable_taylorseer=self.taylorseer,
            taylorseer_kwargs={"n_derivatives": self.derivatives},
        )


class _ParaAttentionWrapper(CacheWrapper[ParaAttention]):
    """Holds para-attn's contexts for one generation, and runs its code."""

    def __init__(self, live: Live[ParaAttention], pipe: Pipeline) -> None:
        super().__init__(live, pipe)
        self._contexts: dict[tuple[str, int], Any] = {}

    def forget(self) -> None:
        """Drop all contexts."""
        self._contexts.clear()

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Let para-attn run or skip the blocks."""
        from para_attn.first_block_cache import utils

        key = call.branch, blocks.start  # an outer wrapper may run the blocks in several parts
        if key not in self._contexts:
            self._contexts[key] = self.settings.context(call.branch)
        cached = _blocks_class()(run, streams, blocks)
        with _ONE_AT_A_TIME, utils.cache_context(self._contexts[key]):
            image, text = cached(streams.image, streams.text)
        if blocks.start == 0:
            hit = not cached.computed
            self.record(Decision(call.step, call.branch, (hit,) * len(image)))
        return replace(streams, image=image, text=text)


@functools.cache
def _blocks_class() -> type:
    """Return a subclass of para-attn's cached blocks that calls our `run` instead of modules.

    The class is created once. Every class is a reference cycle, so a class created for each call
    would keep that call's tensors alive until the garbage collector runs.
    """
    from para_attn.first_block_cache.utils import CachedTransformerBlocks

    class Blocks(CachedTransformerBlocks):  # type: ignore[misc] # para-attn is untyped
        def __init__(self, run: Run, streams: Streams, blocks: range) -> None:
            super().__init__([functools.partial(_run_blocks, run, streams, blocks[:1])])
            self.rest = functools.partial(_run_blocks, run, streams, blocks[1:])
            self.computed = False

        def call_remaining_transformer_blocks(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor
        ) -> tuple[Tensor, ...]:
            """Run the blocks after the first, as para-attn does, with diffusers' new signatures."""
            self.computed = True
            image, text = self.rest(hidden_states, encoder_hidden_states)
            return image, text, image - hidden_states, text - encoder_hidden_states

    return Blocks


def _run_blocks(
    run: Run, streams: Streams, blocks: range, image: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    out = run(replace(streams, image=image, text=text), blocks)
    return out.image, out.text
