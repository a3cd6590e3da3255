"""What torch compiles while something runs in this thread, as torch's own artifacts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fluxfire.reporting.compile_counts import hearing

Key = tuple[str, str]
"""How torch finds an artifact: its kind, and a hash of all that went into it."""


@dataclass(eq=False)
class Recording:
    """What was recorded; there when the block is left.

    Attributes:
        blob: for `torch.compiler.load_cache_artifacts`; empty if nothing was compiled.
        keys: by what torch finds what is in it.
        problem: why nothing could be packed; None if all went well.
    """

    blob: bytes = b""
    keys: frozenset[Key] = frozenset()
    problem: str | None = None


class _Fresh:
    """torch's recorder, swapped for a fresh one while any thread is recording.

    torch has one for the process, and swapping it is not for threads: so those that record
    at the same time share a fresh one, and the last to leave puts the old one back.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _inside: ClassVar[int] = 0
    _swapped: ClassVar[ExitStack] = ExitStack()

    def __enter__(self) -> None:
        from torch.compiler._cache import CacheArtifactManager

        with _Fresh._lock:
            if _Fresh._inside == 0:
                _Fresh._swapped.enter_context(CacheArtifactManager.with_fresh_cache())
            _Fresh._inside += 1

    def __exit__(self, *_: object) -> None:
        with _Fresh._lock:
            _Fresh._inside -= 1
            if _Fresh._inside == 0:
                _Fresh._swapped.close()


@contextmanager
def recording() -> Iterator[Recording]:
    """Record what is compiled in this thread, apart from all that was compiled before.

    What is recorded between compilations, as autotuning is, may be another recording
    thread's; what another thread compiles is left out.
    """
    recorded = Recording()
    thread = threading.get_ident()
    foreign: set[int] = set()
    began: list[int] = []

    def started(_: Any) -> None:
        began.append(_count())

    def ended(_: Any) -> None:
        if began and threading.get_ident() != thread:
            foreign.update(range(began[-1], _count()))

    with _Fresh():
        try:
            with hearing(started, ended):
                yield recorded
        finally:
            try:
                recorded.blob, recorded.keys = _packed(foreign)
            except Exception as error:  # noqa: BLE001 - what ran is worth more than its record
                recorded.problem = repr(error)


def _count() -> int:
    from torch.compiler._cache import CacheArtifactManager

    return len(CacheArtifactManager._seen_artifacts)  # noqa: SLF001 - its only list


def _packed(foreign: set[int]) -> tuple[bytes, frozenset[Key]]:
    """Pack what the recorder saw as `save_cache_artifacts` does, which would empty it."""
    from torch.compiler import _cache
    from torch.utils._appending_byte_serializer import AppendingByteSerializer

    if _count() == len(foreign):
        return b"", frozenset()
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:  # nobody records meanwhile
        seen = list(_cache.CacheArtifactManager._seen_artifacts)  # noqa: SLF001
    mine = [artifact for number, artifact in enumerate(seen) if number not in foreign]
    by_kind: dict[str, list[Any]] = {}
    for artifact in mine:
        by_kind.setdefault(artifact.type(), []).append(artifact)
    write = _cache._serialize_single_cache  # noqa: SLF001
    serializer = AppendingByteSerializer(serialize_fn=write)
    serializer.extend(by_kind.items())
    return serializer.to_bytes(), frozenset((a.type(), a.key) for a in mine)


def give_to_torch(blob: bytes) -> frozenset[Key]:
    """Load a blob into torch's caches on disk, and return by what torch finds it.

    Raises:
        ValueError: torch cannot read it.
        Exception: whatever unpickling it raises, and what a full disk does.
    """
    loaded = torch.compiler.load_cache_artifacts(blob)
    if loaded is None:  # torch's answer to damage, beside a log
        raise ValueError("torch cannot read it")
    return frozenset((kind, key) for kind, keys in loaded.artifacts.items() for key in keys)
