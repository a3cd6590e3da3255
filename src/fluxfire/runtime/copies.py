"""Copies of an optimized pipeline and of its models are plain.

What a pass did to the original is undone on a copy, edit by edit. `copy.deepcopy` keeps the copy of
each object by the object's id, so each edit finds what it is to be undone on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fluxfire import modules
from fluxfire.edits.log import AttributeEdit, Memo, PartialMemo
from fluxfire.edits.override import Override
from fluxfire.errors import FluxfireError
from fluxfire.runtime.record import Record

__all__ = ["copier", "deep_copy", "shallow_copy"]


def deep_copy(pipe: Any, plain: type, record: Record, memo: Memo) -> Any:
    """Copy a pipeline with its models.

    Args:
        pipe: an optimized pipeline.
        plain: its class before that.
        record: what was done to it.
        memo: as `copy.deepcopy` hands it on.

    Returns:
        A plain pipeline.

    Raises:
        FluxfireError: a pass let go of what a plain one would need.
    """
    _refuse_irreversible(record)
    twin: Any = object.__new__(plain)
    memo[id(pipe)] = twin
    undoing = id(record) in memo  # on a copy of one model: an inverse came across the pipeline
    memo[id(record)] = record  # tells its models that they need not undo anything themselves
    vars(twin).update(copy.deepcopy(vars(pipe), memo))
    if not undoing:
        _undo(record, memo)
    return twin


def shallow_copy(pipe: Any, plain: type, record: Record) -> Any:
    """Copy a pipeline that shares its models: they stay as the passes left them.

    Returns:
        A pipeline without passes of its own.
    """
    twin: Any = object.__new__(plain)
    vars(twin).update(vars(pipe))
    for transaction in reversed(record.transactions):
        for edit in transaction.newest_first():
            if isinstance(edit, AttributeEdit | Override) and edit.obj is pipe:
                edit.on(twin).undo()
    return twin


def copier(component: Any, pipe: Any, record: Record) -> list[Override]:
    """Make the overrides by which copies of one of a pipeline's models are plain."""
    original, owner = weakref.ref(component), weakref.ref(pipe)

    def deep(plain: Callable[[Memo], Any], memo: Memo) -> Any:
        if id(record) in memo:
            return plain(memo)
        _refuse_irreversible(record)
        twin = plain(memo)
        pipe = owner()
        copied = PartialMemo(memo, _parts(pipe), pipe)
        copied[id(record)] = record
        _undo(record, copied)
        return twin

    def reduced(*_: Any) -> Any:
        return _itself, (copy.deepcopy(original()),)

    return [
        Override(component, "__deepcopy__", deep),
        Override(component, "__reduce_ex__", reduced),
    ]


def _undo(record: Record, memo: Memo) -> None:
    with torch.inference_mode(mode=False), torch.no_grad():
        for transaction in reversed(record.transactions):
            transaction.undo_on_copies(memo)


def _parts(pipe: Any) -> dict[int, Any]:
    """Return what a pipeline's models consist of, by id; nothing once it is gone."""
    parts: list[Any] = []
    for _, component in modules.components(pipe) if pipe is not None else ():
        parts += [*component.modules(), *component.parameters(), *component.buffers()]
    return {id(part): part for part in parts}


def _refuse_irreversible(record: Record) -> None:
    if gone := record.irreversible:
        raise FluxfireError(
            f"a copy would be of the plain pipeline, and {'; '.join(gone)}. "
            f"Load the pipeline again instead of copying it"
        )


def _itself(thing: Any) -> Any:
    return thing
