"""ParaAttention: para-attn's own first-block cache, made to run on today's diffusers."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from fluxfire.model import Call, Run, Streams
from fluxfire.passes.shared.block_cache import CacheEngine, obstacles
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.generation import Decision, Live
from fluxfire.runtime.transaction import Transaction
from fluxfire.text import extra_hint

_ONE_AT_A_TIME = threading.Lock()
"""para-attn keeps its current context in a module: no two pipelines may be inside at once."""


@dataclass(frozen=True)
class ParaAttention:
    """Runs para-attn's own code between our blocks: its decisions, its TaylorSeer, its pixels.

    On every diffusers that has Kontext para-attn 0.3.38 crashes (its loop over the single blocks
    still passes one tensor); it patches the pipeline's class, so that every other pipeline of
    the class is cached too, and it cannot be undone. Here its caching runs where ours does,
    on this pipeline alone. Where true CFG calls the transformer twice a step, each branch has
    a context of its own, which is what its alternating cache is for. Its skip-layer guidance
    is not carried over, and a batch has one decision for all its samples, as in para-attn;
    `FirstBlockCache` decides for each. Measured on an H100 (docs, "Passes"): a computed step of
    `faithful` 274 → 274 ms, a hit 8 ms.

    Needs the extra `fluxfire[para-attn]`. Its licence forbids offering it to others as a
    hosted or managed service; `FirstBlockCache(predict="hold")` gives the same hits and pixels
    without it, TaylorSeer apart.

    Attributes:
        threshold: para-attn's `residual_diff_threshold`; at 0 nothing hits.
        alter_threshold: that of the unconditional branch; None for the same.
        warmup_steps: first steps that are always computed.
        downsample_factor: compare only every n-th channel.
        taylorseer: predict what is added by para-attn's TaylorSeer.
        derivatives: TaylorSeer's highest order.

    Raises:
        ValueError: a setting is too low, or not of its type.
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
            "threshold", "alter_threshold", "warmup_steps", "downsample_factor", "taylorseer",
            "derivatives",
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        least = {
            "threshold": 0, "alter_threshold": 0, "warmup_steps": 0, "downsample_factor": 1,
            "derivatives": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name}={value!r}; it must be {low} or more")

    @property
    def exactness(self) -> Exactness:
        """Bitwise if nothing can hit, else lossy."""
        never = self.threshold == 0 and not self.alter_threshold
        return "bitwise" if never else "lossy"

    def check(self, target: Target) -> Iterator[Finding]:
        """Look for para-attn, and refuse a pipeline that another cache works on already."""
        if importlib.util.find_spec("para_attn") is None:
            yield Finding(
                "error",
                "para-attn is not installed",
                f"{extra_hint('para-attn')} (its licence bars hosted services), or use "
                'FirstBlockCache, which needs nothing, and with predict="hold" gives the same',
            )
        yield from obstacles(target)

    def apply(self, tx: Transaction) -> Change:
        """Wrap the run through the blocks, and hear where generations begin and end."""
        engine = _Engine(tx.live(self), tx.pipe)
        tx.wrap_blocks(engine)
        tx.listen(engine)
        return Change(1, "run through the blocks cached by para-attn")

    def context(self, branch: str) -> Any:
        """Make para-attn's context for one branch of one generation."""
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


class _Engine(CacheEngine[ParaAttention]):
    """Holds para-attn's contexts for one generation, and runs its code."""

    def __init__(self, live: Live[ParaAttention], pipe: Any) -> None:
        super().__init__(live, pipe)
        self._contexts: dict[tuple[str, int], Any] = {}

    def forget(self) -> None:
        """Drop everything that was remembered."""
        self._contexts.clear()

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Have para-attn run the blocks or leave them out."""
        from para_attn.first_block_cache import utils

        key = call.branch, blocks.start  # an outer wrapper may run the stack in parts
        if key not in self._contexts:
            self._contexts[key] = self.settings.context(call.branch)
        cached = _blocks_class()(run, streams, blocks)
        with _ONE_AT_A_TIME, utils.cache_context(self._contexts[key]):
            image, text = cached(streams.image, streams.text)
        if blocks.start == 0:
            hit = not cached.computed
            self.note(Decision(call.step, call.branch, (hit,) * len(image)))
        return replace(streams, image=image, text=text)


@functools.cache
def _blocks_class() -> type:
    """Make para-attn's module of cached blocks, over our run instead of modules; only once.

    A class is a reference cycle: made anew for each call, it would keep that call's tensors
    until the garbage collector comes by.
    """
    from para_attn.first_block_cache.utils import CachedTransformerBlocks

    class Blocks(CachedTransformerBlocks):  # type: ignore[misc] # para-attn is untyped
        def __init__(self, run: Run, streams: Streams, blocks: range) -> None:
            super().__init__([functools.partial(_through, run, streams, blocks[:1])])
            self.rest = functools.partial(_through, run, streams, blocks[1:])
            self.computed = False

        def call_remaining_transformer_blocks(
            self, hidden_states: Tensor, encoder_hidden_states: Tensor
        ) -> tuple[Tensor, ...]:
            """Run all blocks but the first: what para-attn does, for today's signatures."""
            self.computed = True
            image, text = self.rest(hidden_states, encoder_hidden_states)
            return image, text, image - hidden_states, text - encoder_hidden_states

    return Blocks


def _through(
    run: Run, streams: Streams, blocks: range, image: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    out = run(replace(streams, image=image, text=text), blocks)
    return out.image, out.text
