"""Makes copies of an optimized pipeline, and of its models, plain.

A copy starts as a copy of the optimized object. Then each edit is undone on the copy.
`copy.deepcopy` keeps a memo of the copy of each object, and an edit finds the copies there.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fluxfire import modules
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline
from fluxfire.edits.log import AttributeEdit, Memo, PartialMemo
from fluxfire.edits.override import Override
from fluxfire.errors import FluxfireError
from fluxfire.runtime.record import Record

__all__ = ["copy_overrides", "deep_copy", "shallow_copy"]


def deep_copy(pipe: Pipeline, plain: type, record: Record, memo: Memo) -> DiffusersPipeline:
    """Copy a pipeline with its models.

    Args:
        pipe: an optimized pipeline.
        plain: the pipeline's plain class.
        record: the edits made to the pipeline.
        memo: the memo of `copy.deepcopy`.

    Returns:
        A plain pipeline.

    Raises:
        FluxfireError: the edits are irreversible, so the copy could not be plain.
    """
    _refuse_irreversible(record)
    twin: Any = object.__new__(plain)
    memo[id(pipe)] = twin
    # The record in the memo means that an outer call will undo the edits; this call must not undo
    # them too. There is an outer call if somebody copies a single model, and an inverse that
    # fluxfire must call on the copy is bound to this pipeline.
    is_inner = id(record) in memo
    memo[id(record)] = record
    vars(twin).update(copy.deepcopy(vars(pipe), memo))
    if not is_inner:
        _undo_on_copies(record, memo)
    return twin


def shallow_copy(pipe: Pipeline, plain: type, record: Record) -> DiffusersPipeline:
    """Copy a pipeline without its models.

    The copy shares the models, so passes' changes of the models stay. This undoes only edits of the
    pipeline object itself on the copy.

    Returns:
        A pipeline of the plain class.
    """
    twin: Any = object.__new__(plain)
    vars(twin).update(vars(pipe))
    for transaction in reversed(record.transactions):
        for edit in transaction.newest_first():
            if isinstance(edit, AttributeEdit | Override) and edit.obj is pipe:
                edit.for_object(twin).undo()
    return twin


def copy_overrides(component: nn.Module, pipe: Pipeline, record: Record) -> list[Override]:
    """Create the overrides that make deep copies and pickles of one model plain.

    Args:
        component: the model.
        pipe: the optimized pipeline that the model is a component of.
        record: the edits made to the pipeline.
    """
    component_ref, pipe_ref = weakref.ref(component), weakref.ref(pipe)

    def deepcopy(plain: Callable[[Memo], Any], memo: Memo) -> Any:
        if id(record) in memo:  # another call undoes the edits; see `deep_copy`
            return plain(memo)
        _refuse_irreversible(record)
        twin = plain(memo)
        pipe = pipe_ref()
        partial_memo = PartialMemo(memo, _model_parts(pipe), pipe)
        partial_memo[id(record)] = record
        _undo_on_copies(record, partial_memo)
        return twin

    def reduce_ex(*_: Any) -> Any:
        return _identity, (copy.deepcopy(component_ref()),)

    return [
        Override(component, "__deepcopy__", deepcopy),
        Override(component, "__reduce_ex__", reduce_ex),
    ]


def _undo_on_copies(record: Record, memo: Memo) -> None:
    with torch.inference_mode(mode=False), torch.no_grad():
        for transaction in reversed(record.transactions):
            transaction.undo_on_copies(memo)


def _model_parts(pipe: Pipeline | None) -> dict[int, Any]:
    """Return the modules, parameters and buffers of a pipeline's models, by id.

    Args:
        pipe: the pipeline; None if it is deleted, which gives an empty dictionary.
    """
    parts: list[Any] = []
    for _, component in modules.components(pipe) if pipe is not None else ():
        parts += [*component.modules(), *component.parameters(), *component.buffers()]
    return {id(part): part for part in parts}


def _refuse_irreversible(record: Record) -> None:
    if reasons := record.irreversible:
        raise FluxfireError(
            f"a copy would be of the plain pipeline, which is impossible: {'; '.join(reasons)}. "
            f"Load the pipeline again instead of copying it"
        )


def _identity(thing: Any) -> Any:
    return thing
