"""What all caches between the blocks have to look at. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator

from fluxfire.protocol import Finding, Target


def obstacles(target: Target) -> Iterator[Finding]:
    """Find what no cache can live with: another library's cache, or prefetching hooks."""
    if "group-offload" in target.traits:
        yield Finding(
            "error",
            "group offloading prefetches blocks from the ones before them, which a hit leaves out",
            "use enable_model_cpu_offload() instead, or leave the cache out",
        )
    if "native-cache" in target.traits:
        yield Finding(
            "error",
            "diffusers' own cache is enabled on the transformer",
            "call pipe.transformer.disable_cache() first",
        )
    if "foreign-cache" in target.traits:
        yield Finding(
            "error",
            "another library's cache (ParaAttention or cache-dit) is on the transformer",
            "take it off first (cache_dit.disable_cache(pipe)), or reload the pipeline",
        )
