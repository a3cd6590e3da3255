"""Common base of the caches that skip blocks: state for one generation, and checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline, Transformer
from fluxfire.errors import FluxfireError
from fluxfire.model import Call
from fluxfire.protocol import Finding, Target
from fluxfire.runtime.generation import Decision, Generation, Listener, Live

P = TypeVar("P")
_OTHER_CACHES = {
    "native-cache": (
        "diffusers' own cache is enabled on the transformer",
        "call pipe.transformer.disable_cache() first",
    ),
    "foreign-cache": modules.FOREIGN_CACHE,
}


class CacheWrapper(Listener, Generic[P]):
    """Base of the wrappers around the run through the blocks.

    A wrapper has one set of settings for a whole generation, and drops its cached tensors when the
    generation ends.

    Attributes:
        settings: the settings at the generation's start. In a warm-up run, `warmup_settings`.
    """

    def __init__(self, live: Live[P], pipe: Pipeline) -> None:
        self._live, self._pipe = live, pipe
        self._generation: Generation | None = None
        self._stamp: list[object] | None = None
        self.settings = live.settings

    def forget(self) -> None:
        """Drop all cached tensors."""

    def warmup_settings(self, settings: P) -> P:
        """Return settings for a two-step warm-up run that compiles every graph used later."""
        return settings

    def record(self, decision: Decision) -> None:
        """Add the decision for one call of the transformer to the generation's records."""
        if self._generation is not None:
            self._generation.decisions.append(decision)

    @override
    def on_step(self, call: Call) -> AbstractContextManager[object]:
        """Drop the cached tensors if a step callback changed weights or a LoRA's scale."""
        if self._generation is not None and self._generation.calls_back:
            stamp = list(_weights_stamp(self._pipe.transformer))
            if self._stamp not in (None, stamp):
                self.forget()
            self._stamp = stamp
        return super().on_step(call)

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Start with an empty cache, and leave an empty cache, even after an exception.

        Raises:
            FluxfireError: another cache was put onto the transformer after `optimize`.
        """
        present = modules.cache_traits(self._pipe.transformer)
        for trait, (why, remedy) in _OTHER_CACHES.items():
            if trait in present:
                raise FluxfireError(
                    f"{why}, since optimize(); two caches cannot work together: {remedy}"
                )
        self.settings, self._generation = self._live.settings, generation
        if generation.warmup:
            self.settings = self.warmup_settings(self.settings)
        self.forget()
        try:
            yield
        finally:
            self._generation = self._stamp = None
            self.forget()


def _weights_stamp(transformer: Transformer) -> Iterator[object]:
    """Yield values that change if weights or LoRA settings do; takes less than a millisecond."""
    for weight in transformer.parameters():
        yield id(weight)
        yield modules.change_count(weight)
    part: Any  # PEFT's layers have more attributes than a module
    for part in transformer.modules():
        if (scaling := getattr(part, "scaling", None)) and modules.has_adapter(part):
            yield tuple(scaling.items())
            yield tuple(part.active_adapters)
            yield part.disable_adapters


def check_for_other_caches(target: Target) -> Iterator[Finding]:
    """Yield errors for pipelines where no cache works: another cache, or prefetching hooks."""
    if "group-offload" in target.traits:
        yield Finding(
            "error",
            "group offloading prefetches blocks while earlier blocks run, and a hit skips those",
            "use enable_model_cpu_offload() instead, or leave the cache out",
        )
    for trait, (why, remedy) in _OTHER_CACHES.items():
        if trait in target.traits:
            yield Finding("error", why, remedy)
