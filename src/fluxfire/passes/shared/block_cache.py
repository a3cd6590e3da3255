"""Common base of the caches that skip blocks: state for one generation, and checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import Pipeline
from fluxfire.errors import FluxfireError
from fluxfire.model import Call
from fluxfire.protocol import Finding, Target
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Decision, Generation, Listener, Live

if TYPE_CHECKING:
    from torch import nn

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
        self._watch: Watch | None = None
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
        """Drop the cached tensors if somebody changed the transformer since the last step.

        The first step creates the watch: what has changed before does not matter to the cache.
        """
        if self._generation is not None and self._generation.may_change:
            if self._watch is None:
                self._watch = Watch([cast("nn.Module", self._pipe.transformer)])
            elif self._watch.changed():
                self.forget()
                self._watch.accept()
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
            # After an interrupt this block may end late, during another generation.
            if self._generation is generation:
                self._generation = self._watch = None
                self.forget()


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
