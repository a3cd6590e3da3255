"""Counts what torch.compile does during a block: graphs, breaks, cache hits, seconds."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class CompileCounts:
    """What torch.compile did during some period.

    Attributes:
        compiles: number of compilations; each compilation traces code.
        recompiles: number of compilations of code that torch had compiled before.
        graph_breaks: number of places where torch split a graph in two.
        hits: number of graphs whose compiled code was in torch's caches.
        misses: number of graphs that torch had to compile.
        trace_seconds: time for tracing Python into graphs, guards included.
        compile_seconds: time for compiling graphs, or for finding their code in a cache.
    """

    compiles: int = 0
    recompiles: int = 0
    graph_breaks: int = 0
    hits: int = 0
    misses: int = 0
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0

    def add(self, other: CompileCounts) -> None:
        """Add the counts of another period."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@contextmanager
def count_compilations() -> Iterator[CompileCounts]:
    """Count what this thread compiles inside the block.

    Compiles and recompiles count this thread only. Breaks, hits, misses and seconds count the whole
    process, because torch does.

    Yields:
        The counts. They are zero until the block ends.
    """
    counts = CompileCounts()
    if not _dynamo_is_loaded():
        yield counts
        return
    thread = threading.get_ident()
    ids: list[str] = []

    def note_start(args: Any) -> None:
        if threading.get_ident() == thread:
            ids.append(str(args.compile_id))

    before = _counters()
    try:
        with on_compilation(note_start):
            yield counts
    finally:
        # Somebody may have cleared torch's counters inside the block; the result would be negative.
        spent = {name: max(0, value - before[name]) for name, value in _counters().items()}
        counts.compiles = len(ids)
        counts.recompiles = sum(map(_is_recompile, ids))
        counts.graph_breaks = int(spent["breaks"])
        counts.hits = int(spent["hits"])
        counts.misses = int(spent["graphs"] - spent["hits"])
        counts.trace_seconds = float(spent["all"] - spent["compile"])
        counts.compile_seconds = float(spent["compile"])


@contextmanager
def on_compilation(
    begin: Callable[[Any], None], end: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Call functions at each compilation inside the block, in any thread.

    Args:
        begin: called when a compilation begins, with dynamo's `CallbackArgs`.
        end: called when a compilation ends, with the same arguments.
    """
    if not _dynamo_is_loaded():
        yield
        return
    from torch._dynamo.callback import callback_handler

    try:
        callback_handler.register_start_callback(begin)
        if end is not None:
            callback_handler.register_end_callback(end)
        yield
    finally:
        # torch.compiler.reset() inside the block removes the callbacks, and removing them again
        # raises ValueError.
        with suppress(ValueError):
            callback_handler.remove_start_callback(begin)
        if end is not None:
            with suppress(ValueError):
                callback_handler.remove_end_callback(end)


def _dynamo_is_loaded() -> bool:
    """Whether dynamo is imported. If not, nothing is compiled, and importing it costs seconds."""
    return "torch._dynamo" in sys.modules


def _counters() -> dict[str, float]:
    from torch._dynamo.utils import compilation_time_metrics, counters

    return {
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["aot_autograd"]["total"],
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "all": sum(compilation_time_metrics.get("_compile.compile_inner", ())),
        "compile": sum(compilation_time_metrics.get("OutputGraph.call_user_compiler", ())),
    }


def _is_recompile(compile_id: str) -> bool:
    """Whether dynamo's id "frame/attempt" has an attempt after the first, which is 0."""
    numbers = re.search(r"(\d+)/(\d+)", compile_id)
    return numbers is not None and numbers[2] != "0"
