"""What torch.compile did while something ran: graphs, breaks, cache hits, seconds."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Compilations:
    """Counted over one stretch of time.

    Attributes:
        compiles: how often code was traced.
        recompiles: how many of these were for code that had been compiled before.
        graph_breaks: places where a graph was cut in two.
        hits: graphs whose compiled form was found in torch's caches.
        misses: graphs that had to be compiled.
        trace_seconds: tracing Python into graphs, and guards.
        compile_seconds: turning graphs into code, or finding that code in a cache.
    """

    compiles: int = 0
    recompiles: int = 0
    graph_breaks: int = 0
    hits: int = 0
    misses: int = 0
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0

    def add(self, other: Compilations) -> None:
        """Count another stretch of time in."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@contextmanager
def compilations() -> Iterator[Compilations]:
    """Count what this thread compiles; the counts are there when the block is left.

    Breaks, hits and seconds are torch's counts for the process: another thread's
    compilations at the same time are among them.
    """
    counted = Compilations()
    if not _loaded():
        yield counted
        return
    thread = threading.get_ident()
    ids: list[str] = []

    def started(args: Any) -> None:
        if threading.get_ident() == thread:
            ids.append(str(args.compile_id))

    before = _counters()
    try:
        with hearing(started):
            yield counted
    finally:
        # Never below zero: someone may have cleared torch's counters in between.
        spent = {name: max(0, value - before[name]) for name, value in _counters().items()}
        counted.compiles = len(ids)
        counted.recompiles = sum(map(_is_recompile, ids))
        counted.graph_breaks = int(spent["breaks"])
        counted.hits = int(spent["hits"])
        counted.misses = int(spent["graphs"] - spent["hits"])
        counted.trace_seconds = float(spent["all"] - spent["compile"])
        counted.compile_seconds = float(spent["compile"])


@contextmanager
def hearing(
    began: Callable[[Any], None], ended: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Be called, with dynamo's arguments, where compilations begin and where they end."""
    if not _loaded():
        yield
        return
    from torch._dynamo.callback import callback_handler

    try:
        callback_handler.register_start_callback(began)
        if ended is not None:
            callback_handler.register_end_callback(ended)
        yield
    finally:  # torch.compiler.reset() in between has removed them
        with suppress(ValueError):
            callback_handler.remove_start_callback(began)
        if ended is not None:
            with suppress(ValueError):
                callback_handler.remove_end_callback(ended)


def _loaded() -> bool:
    """Whether anything can compile; importing dynamo to find out would cost seconds."""
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
    """Dynamo numbers compilations "frame/attempt"; a later attempt is a recompilation."""
    numbers = re.search(r"(\d+)/(\d+)", compile_id)
    return numbers is not None and numbers[2] != "0"
