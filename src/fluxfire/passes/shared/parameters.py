"""Access to a parameter's data, also where offloading stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fluxfire import modules

__all__ = ["change_storage"]


def change_storage(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter's storage with the result of `change`; the numbers stay the same.

    Offloading layer by layer leaves a parameter without data and stores the data elsewhere; that
    copy is changed too. A parameter that was quantized in the meantime is not changed.

    Args:
        module: the module that owns the parameter.
        name: the parameter's name in the module.
        change: takes a tensor, and returns it or another tensor with the same numbers.
    """
    weight = module._parameters.get(name)  # noqa: SLF001 - a replacement layer may lack it
    if weight is None or modules.is_quantized(weight):
        return
    with torch.no_grad(), modules.matching_inference_mode(weight):
        old = weight.data
        if (changed := change(old)) is not old:
            weight.data = changed
        for holder, key in _offloaded_copies(module, name):
            holder[key] = change(holder[key])


def _offloaded_copies(module: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """Yield each place where accelerate stores a parameter's data: a mapping, and the key in it."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook has several
        holder, key = getattr(one, "weights_map", None), name
        while (inner := getattr(holder, "dataset", None)) is not None:
            holder, key = inner, getattr(holder, "prefix", "") + key
        held = getattr(holder, "state_dict", holder)  # data on disk is not changed
        if isinstance(held, dict) and key in held:
            yield held, key
