"""fluxfire's own passes, as the tests that every pass must pass try them.

They come from the registry, so that a new pass comes under these tests by itself.
"""

from __future__ import annotations

from fluxfire.passes import Attention, FirstBlockCache, Placement, QKVFusion, ReferenceCache
from fluxfire.planning import registry

SETTINGS = {
    "attention": [Attention(), Attention("_native_math"), Attention("fa3-fp8")],
    "first-block-cache": [
        FirstBlockCache(),
        FirstBlockCache(0),
        FirstBlockCache(schedule=[1], predict="linear"),
    ],
    "placement": [Placement(tiling=False)],  # tiles need a larger picture than these tests make
    "qkv-fusion": [QKVFusion(), QKVFusion(vae=False), QKVFusion(transformer=False)],
    "reference-cache": [ReferenceCache(2.0), ReferenceCache(0)],
}
"""Instances by the pass's name, where the default settings do not show all that it does."""

ELSEWHERE = {
    "compile": "tests/test_conformance.py",  # takes minutes
    "context-parallel": "tests/passes/test_context_parallel.py",  # needs several processes
    "mega-cache": "tests/passes/test_mega_cache.py",  # writes files, and needs compiled graphs
    "para-attention": "tests/passes/test_para_attention.py",  # needs another package
}
"""Passes that are left out here, by name, and the file that tries them."""


def own_passes():
    """Return the instances of `SETTINGS`; of other passes, one with the default settings."""
    classes = {n: cls for n, cls in registry.built_in().items() if n not in ELSEWHERE}
    return [pass_ for n, cls in classes.items() for pass_ in SETTINGS.get(n) or [cls()]]
