"""Whether modules still are what somebody prepared from: the one place that knows.

Between two generations anything may be done to a model, and by a step callback also during one: a
LoRA merged, a state dict loaded, a hook set, a layer replaced, a setting changed. What was derived
from the model before that (quantized weights, kept encodings) must not be used any more. A `Watch`
says so.

It compares three things. *Structure*: which modules there are, their classes, settings and hooks.
*Tensors*: which there are, how they lie in memory, and torch's counter of in-place changes.
*Numbers*: a write through `.data`, as PEFT merges a LoRA, moves no counter, so a `Watch` reads at
least 32768 words of each tensor (32 of one that is pinned in host memory) and keeps their checksum.

Tensors up to 128 KiB are read whole; of a larger matrix, some of every row and of every column.
What can escape is a write through `.data` to a few single numbers of a larger one, or to a part of
one that is pinned. Weights that only moved, as offloading moves them, are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fluxfire.edits.override import Override
from fluxfire.kernels import checksum

__all__ = ["Watch", "anybody_hears", "heard_by_others", "rounding"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_BY_VALUE = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_GONE = object()
_VERSION = attrgetter("_version")  # torch's only counter of in-place changes
_OFFLOADING = frozenset({"_hf_hook", "_diffusers_hook"})


class Watch:
    """Remembers what some modules were like, and says whether they still are.

    It keeps none of them alive, nor any of their weights.

    Args:
        modules: what to look at, with all below them.
        apart_from: names of attributes and submodules that do not count.
    """

    def __init__(self, modules: Iterable[nn.Module], apart_from: Iterable[str] = ()) -> None:
        self._roots = [weakref.ref(module) for module in modules]
        self._left_out = _OF_EVERY_MODULE.union(apart_from)
        self._seen, self._sums = _Look(), checksum.Sums()
        self._names: dict[int, tuple[int, list[str]]] = {}  # to look for, by the module's id
        self.changed()

    def changed(self) -> bool:
        """Whether anything is other than at the last look. Waits for the device."""
        look, left_out = _Look(), self._left_out
        note, things, names = look.values.append, look.things, self._names
        stack: list[Any] = [module for ref in self._roots if (module := ref()) is not None]
        while stack:  # 900 modules of FLUX's encoders at each look: so no generators here
            module = stack.pop()
            own = module.__dict__
            things += weakref.ref(module), weakref.ref(type(module))
            known = names.get(id(module))
            if known is None or known[0] != len(own):
                wanted = [name for name in own if name not in left_out]
                known = names[id(module)] = len(own), wanted
            for name in known[1]:
                value = own.get(name, _GONE)
                if type(value) in _BY_VALUE:
                    note(value)
                else:
                    look.take(value)
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                look.take(own["_forward_hooks"])
                look.take(own["_forward_pre_hooks"])
            for kind in ("_parameters", "_buffers"):
                if held := own[kind]:
                    look.tensors += [tensor for tensor in held.values() if tensor is not None]
            if children := own["_modules"]:
                stack += [c for n, c in children.items() if c is not None and n not in left_out]
        look.read(self._sums)
        if look.same_as(self._seen):
            return False
        self._seen = look
        self._names.clear()
        return True


class _Look:
    """What one look saw.

    Attributes:
        values: what is compared by value.
        things: what is compared by identity, weakly: the id of what is gone may be given anew.
        tensors: those seen; none once their numbers are read.
        opened: ids of the objects whose settings it noted: T5's layers share one configuration.
    """

    def __init__(self) -> None:
        self.values: list[object] = []
        self.things: list[object] = []
        self.tensors: list[Tensor] = []
        self.opened: set[int] = set()

    def take(self, value: Any, depth: int = 1) -> None:
        """Take note of a setting: of an object's own settings, too, of those of these no more."""
        kind = type(value)
        if kind in _BY_VALUE or (kind is tuple and _BY_VALUE.issuperset(map(type, value))):
            self.values.append(value)
        elif isinstance(value, dict):
            self.values += len(value), *value
            for item in value.values():
                self.take(item, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            self.values += type(value), len(value)
            for item in value:
                self.take(item, depth)
        elif isinstance(value, Tensor):
            self.tensors.append(value)
        else:
            try:
                self.things.append(weakref.ref(value))
            except TypeError:
                self.values.append(id(value))
            if depth and id(value) not in self.opened:
                self.opened.add(id(value))
                if not issubclass(type(value), nn.Module | type):
                    for item in getattr(value, "__dict__", {}).values():
                        self.take(item, depth - 1)

    def read(self, sums: checksum.Sums) -> None:
        """Read the tensors' numbers, and let go of them."""
        self.things += map(weakref.ref, self.tensors)
        try:  # in one go: FLUX's encoders have 660
            self.values += map(_VERSION, self.tensors)
        except RuntimeError:
            self.values += map(_version, self.tensors)
        self.values += sums.of(self.tensors)
        self.tensors = []

    def same_as(self, other: _Look) -> bool:
        """Whether another look saw the same."""
        if len(self.things) != len(other.things) or not all(map(is_, self.things, other.things)):
            return False
        return self.values == other.values


def heard_by_others(module: nn.Module, apart_from: Iterable[str] = ()) -> bool:
    """Whether somebody hears of what a module computes, or changes it; moving weights is neither.

    By hooks, or by a function in the place of a method. What fluxfire put there is not meant, nor
    are the hooks of offloading (accelerate's and diffusers'): what they do to weights a `Watch`
    sees.

    Args:
        module: with all below it.
        apart_from: names of methods that do not count.
    """
    if anybody_hears():
        return True
    left_out = _OF_EVERY_MODULE.union(apart_from)
    for part in module.modules():
        own = vars(part)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return True
        for name in own.keys() - left_out:
            moves = name == "forward" and not _OFFLOADING.isdisjoint(own)
            if not moves and _is_others(own[name]) and callable(getattr(type(part), name, None)):
                return True
    return False


def anybody_hears() -> bool:
    """Whether torch has hooks on every module of the process."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)  # noqa: SLF001


def rounding(device: torch.device) -> tuple[object, ...]:
    """Return torch's settings that decide how a device rounds."""
    backends: Any = torch.backends
    sdp, cudnn, onednn = backends.cuda, backends.cudnn, backends.mkldnn
    matmul = sdp.matmul
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        # The older names of these settings raise where somebody used the newer ones.
        *(of.fp32_precision for of in (backends, matmul, cudnn, cudnn.conv)),
        *(of.fp32_precision for of in (onednn, onednn.matmul, onednn.conv)),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        sdp.preferred_blas_library(),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        *(onednn.enabled, onednn.deterministic),
        *(sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled()),
        *(sdp.cudnn_sdp_enabled(), sdp.fp16_bf16_reduction_math_sdp_allowed()),
    )


def _is_others(function: Any) -> bool:
    while isinstance(function, Override):
        function = function.inner
    return function is not None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
