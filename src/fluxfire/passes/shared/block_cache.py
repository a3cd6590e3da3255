"""What all caches between the blocks share: a generation's length of memory, and obstacles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

from typing_extensions import override

from fluxfire import modules
from fluxfire.errors import FluxfireError
from fluxfire.model import Call
from fluxfire.protocol import Finding, Target
from fluxfire.runtime.generation import Decision, Generation, Listener, Live

P = TypeVar("P")
_OTHERS = {
    "native-cache": (
        "diffusers' own cache is enabled on the transformer",
        "call pipe.transformer.disable_cache() first",
    ),
    "foreign-cache": modules.FOREIGN_CACHE,
}


class CacheEngine(Listener, Generic[P]):
    """Holds one set of settings, and what it remembers, for the length of a generation.

    Attributes:
        settings: those that the generation began with; in a warm-up run, others.
    """

    def __init__(self, live: Live[P], pipe: Any) -> None:
        self._live, self._pipe = live, pipe
        self._generation: Generation | None = None
        self._stamp: list[object] | None = None
        self.settings = live.settings

    def forget(self) -> None:
        """Drop everything that was remembered."""

    def warmup_settings(self, settings: P) -> P:
        """Return settings by which two steps compile all that later steps will use."""
        return settings

    def note(self, decision: Decision) -> None:
        """Take down what was decided for one call of the transformer."""
        if self._generation is not None:
            self._generation.decisions.append(decision)

    @override
    def on_step(self, call: Call) -> AbstractContextManager[object]:
        """Forget where a callback changed weights, or a LoRA's scale, since the last call."""
        if self._generation is not None and self._generation.calls_back:
            stamp = list(_stamp(self._pipe.transformer))
            if self._stamp not in (None, stamp):
                self.forget()
            self._stamp = stamp
        return super().on_step(call)

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Begin with nothing remembered, and leave nothing, also after an exception.

        Raises:
            FluxfireError: another cache was put onto the transformer after `optimize`.
        """
        present = modules.cache_traits(self._pipe.transformer)
        for why, remedy in (of for trait, of in _OTHERS.items() if trait in present):
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


def _stamp(transformer: Any) -> Iterator[object]:
    """Tell a transformer's weights and adapters from others, in a fraction of a millisecond."""
    for weight in transformer.parameters():
        yield id(weight)
        yield -1 if weight.is_inference() else weight._version  # noqa: SLF001
    for part in transformer.modules():
        if (scaling := getattr(part, "scaling", None)) and hasattr(part, "lora_A"):
            yield tuple(scaling.items())
            yield tuple(part.active_adapters)
            yield part.disable_adapters


def obstacles(target: Target) -> Iterator[Finding]:
    """Find what no cache can live with: another library's cache, or prefetching hooks."""
    if "group-offload" in target.traits:
        yield Finding(
            "error",
            "group offloading prefetches blocks from the ones before them, which a hit leaves out",
            "use enable_model_cpu_offload() instead, or leave the cache out",
        )
    for trait, (why, remedy) in _OTHERS.items():
        if trait in target.traits:
            yield Finding("error", why, remedy)
