"""InductorPatch: prevent an inductor crash on symbolic numbers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from typing_extensions import override

from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.runtime.transaction import Transaction


@dataclass(frozen=True, kw_only=True)
class InductorPatch:
    """Guards inductor's `same_meta` against values that are not tensors.

    When inductor cleans up a graph, it compares the metadata of two nodes, and calls `.size()` on
    both. With dynamic shapes a node can be a number (SymFloat, SymInt), and compilation crashes.
    torch 2.13 fixed this (pytorch #181752). The pass tries the call on the running torch, and does
    nothing if it does not crash.

    The patched function is global to the process, so the patch is active only while this pipeline
    generates. It replaces the crash by the answer "not the same". So every graph that compiled
    before still compiles in the same way. Measured on an H100 (docs, "Passes"): a step of
    `faithful` 277 → 274 ms, which is noise, since the patch does not run in a step.

    Trigger on torch 2.7 to 2.12:
    `torch.compile(lambda x, s: torch.pow(x.shape[0] * 0.5, x.abs()) * s, dynamic=True)`.
    """

    name: ClassVar[str] = "inductor-patch"
    stage: ClassVar[Stage] = "environment"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "bitwise"

    def check(self, target: Target) -> Iterator[Finding]:
        """Remark if the running torch does not need the patch."""
        if not needed():
            version = target.environment.packages["torch"]
            yield Finding("info", f"not needed on torch {version}, which guards same_meta itself")

    def apply(self, tx: Transaction) -> Change:
        """Activate the patch during this pipeline's generations, if it is needed."""
        if not needed():
            return Change(0, "functions of inductor guarded")
        tx.listen(_Guarded())
        return Change(1, "function of inductor guarded while generating")


def needed() -> bool:
    """Whether the running torch's `same_meta` fails on a value that is not a tensor."""
    from torch._inductor.fx_passes import post_grad

    same_meta = getattr(post_grad, "same_meta", None)
    if same_meta is None:
        return False
    if hasattr(same_meta, "__wrapped__"):  # another pipeline's patch is active now
        return True
    number = SimpleNamespace(meta={"val": 0.5})
    try:
        same_meta(number, number)
    except AttributeError:
        return True
    return False


class _Guarded(Listener):
    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        with guarded():
            yield


_lock = threading.Lock()
_depth = 0
_plain: Callable[..., Any] | None = None


@contextmanager
def guarded() -> Iterator[None]:
    """Activate the patch. Nested and concurrent blocks share it; the last one to end removes it."""
    from torch._inductor.fx_passes import post_grad

    global _depth, _plain  # noqa: PLW0603 - the process has one patch, with a use count
    with _lock:
        if _depth == 0:
            plain = _plain = post_grad.same_meta

            @functools.wraps(plain)
            def same_meta(node1: Any, node2: Any) -> Any:
                values = (node1.meta.get("val"), node2.meta.get("val"))
                return all(isinstance(v, torch.Tensor) for v in values) and plain(node1, node2)

            post_grad.same_meta = same_meta
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _plain is not None:
                post_grad.same_meta = _plain
                _plain = None
