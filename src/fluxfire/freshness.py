"""Whether modules still are what somebody prepared from: the one place that knows.

Between two generations anything may be done to a model: a LoRA merged, a state dict loaded, a hook
set, a layer replaced, a setting changed. What was derived from the model before that (quantized
weights, kept encodings) must not be used any more. A `Watch` says so.

It compares three things. *Structure*: which modules there are, their classes, settings and hooks.
*Tensors*: which there are, and torch's counter of in-place changes. *Numbers*: a
write through `.data`, as PEFT merges a LoRA, moves no counter, so a `Watch` reads up to 32768 words
of each tensor (64 of one that is pinned in host memory) and keeps their checksum.

Tensors up to 128 KiB are read whole; of a larger matrix, every row and nearly every column. What
can escape is a write through `.data` to a few single numbers of a larger one. Weights that only moved,
as offloading moves them, are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fluxfire.kernels import checksum

__all__ = ["Watch", "heard_by_others", "rounding"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_BY_VALUE = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})


class Watch:
    """Remembers what some modules were like, and says whether they still are.

    It keeps none of them alive, nor any of their weights.

    Args:
        modules: what to look at, with all below them.
        apart_from: names of attributes that do not count.
    """

    def __init__(self, modules: Iterable[nn.Module], apart_from: Iterable[str] = ()) -> None:
        self._roots = [weakref.ref(module) for module in modules]
        self._left_out = _OF_EVERY_MODULE.union(apart_from)
        self._names: dict[int, tuple[int, list[str]]] = {}
        self._seen: list[Hashable] = []
        self.changed()

    def changed(self) -> bool:
        """Whether anything is other than at the last look. Waits for the device."""
        seen: list[Hashable] = []
        tensors: list[Tensor] = []
        stack: list[Any] = [module for ref in self._roots if (module := ref()) is not None]
        for root in stack:  # transformers' configurations can be changed in place
            config = vars(root).get("config")
            seen += map(_by_value, getattr(config, "__dict__", {}).values())
        while stack:  # 900 modules of FLUX's encoders at each look: so no generators here
            module = stack.pop()
            own = module.__dict__
            seen += id(module), id(type(module))
            for name in self._settings(module, own):
                seen.append(_by_value(own.get(name)))
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                seen += map(id, own["_forward_hooks"].values())
                seen += map(id, own["_forward_pre_hooks"].values())
            for kind in ("_parameters", "_buffers"):
                if held := own[kind]:
                    tensors += [tensor for tensor in held.values() if tensor is not None]
            if children := own["_modules"]:
                stack += [child for child in children.values() if child is not None]
        for tensor in tensors:
            seen += id(tensor), _version(tensor), tensor.dtype
        seen += checksum.of(tensors)
        if seen == self._seen:
            return False
        self._seen = seen
        self._names.clear()
        return True

    def _settings(self, module: nn.Module, own: dict[str, Any]) -> list[str]:
        """Return which attributes a module has beside those of every module."""
        known = self._names.get(id(module))
        if known is None or known[0] != len(own):
            names = [name for name in own if name not in self._left_out]
            known = self._names[id(module)] = len(own), names
        return known[1]


def heard_by_others(module: nn.Module) -> bool:
    """Whether somebody hears of what a module computes, or changes it; moving weights is neither.

    Offloading's hooks (accelerate's and diffusers') are not meant: what they do to weights a
    `Watch` sees.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:  # noqa: SLF001
        return True
    for part in module.modules():
        own = vars(part)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return True
        if "forward" in own and not {"_hf_hook", "_diffusers_hook"} & own.keys():
            return True
    return False


def rounding(device: torch.device) -> Hashable:
    """Return torch's settings that decide how a device rounds."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kernels: Any = torch.backends.cuda
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
        (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32),
        (cudnn.enabled, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()),
        (kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled()),
        (kernels.math_sdp_enabled(), kernels.cudnn_sdp_enabled()),
    )


def _by_value(value: object) -> Hashable:
    return value if type(value) in _BY_VALUE else id(value)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version  # noqa: SLF001 - torch's only counter of in-place changes
    except RuntimeError:  # an inference tensor has none
        return -1
