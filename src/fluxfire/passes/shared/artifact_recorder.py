"""Records what torch compiles in this thread, as torch's own cache artifacts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fluxfire.reporting.compile_counts import on_compilation

Key = tuple[str, str]
"""How torch looks an artifact up: its kind, and a hash of everything that it depends on."""


@dataclass(eq=False)
class Recording:
    """The artifacts of one `recording` block; filled when the block ends.

    Attributes:
        blob: input for `torch.compiler.load_cache_artifacts`; empty if nothing was compiled.
        keys: torch's keys of the artifacts in the blob.
        problem: why the artifacts could not be packed; None if they were.
    """

    blob: bytes = b""
    keys: frozenset[Key] = frozenset()
    problem: str | None = None


class _FreshRecorder:
    """Replaces torch's recorder with an empty one while any thread is recording.

    torch has one recorder for the process, and swapping it is not thread-safe. So threads that
    record at the same time share one empty recorder, and the last of them puts the old one back.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _inside: ClassVar[int] = 0
    _swapped: ClassVar[ExitStack] = ExitStack()

    def __enter__(self) -> None:
        from torch.compiler._cache import CacheArtifactManager

        with _FreshRecorder._lock:
            if _FreshRecorder._inside == 0:
                _FreshRecorder._swapped.enter_context(CacheArtifactManager.with_fresh_cache())
            _FreshRecorder._inside += 1

    def __exit__(self, *_: object) -> None:
        with _FreshRecorder._lock:
            _FreshRecorder._inside -= 1
            if _FreshRecorder._inside == 0:
                _FreshRecorder._swapped.close()


@contextmanager
def recording() -> Iterator[Recording]:
    """Record the artifacts that this thread compiles inside the block.

    Artifacts that another thread compiles are left out. Artifacts that torch records between
    compilations, such as autotuning results, may come from another recording thread.
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

    with _FreshRecorder():
        try:
            with on_compilation(started, ended):
                yield recorded
        finally:
            try:
                recorded.blob, recorded.keys = _packed(foreign)
            except Exception as error:  # noqa: BLE001 - a failed recording must not fail the edit
                recorded.problem = repr(error)


def _count() -> int:
    from torch.compiler._cache import CacheArtifactManager

    return len(CacheArtifactManager._seen_artifacts)  # noqa: SLF001 - torch has no public list


def _packed(foreign: set[int]) -> tuple[bytes, frozenset[Key]]:
    """Pack the recorded artifacts like `save_cache_artifacts`, which would clear the recorder."""
    from torch.compiler import _cache
    from torch.utils._appending_byte_serializer import AppendingByteSerializer

    if _count() == len(foreign):
        return b"", frozenset()
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:  # so that no thread adds artifacts in the meantime
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
    """Load a blob into torch's caches on disk, and return the keys of its artifacts.

    Raises:
        ValueError: torch cannot read the blob.
        Exception: unpickling the blob failed, or writing to the disk did.
    """
    loaded = torch.compiler.load_cache_artifacts(blob)
    if loaded is None:  # torch logs a damaged blob, and returns None
        raise ValueError("torch cannot read it")
    return frozenset((kind, key) for kind, keys in loaded.artifacts.items() for key in keys)
