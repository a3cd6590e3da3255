"""Finds out whether modules have changed, so that values derived from them are out of date.

Between two generations a user may do anything to a model: merge a LoRA, load a state dict, set a
hook, replace a layer, change a setting. A step callback may do so even during a generation. Values
that a pass derived from the model before (quantized weights, cached encodings) are then wrong. A
`Watch` finds out.

A `Watch` compares three things:

- *Structure*: the modules, their classes, settings and hooks.
- *Tensors*: which tensors there are, their layout in memory, and torch's counter of in-place
  changes.
- *Numbers*: PEFT merges a LoRA by a write through `.data`, which does not count as an in-place
  change. So a `Watch` reads at least 32768 words of each tensor (32 words if the tensor is pinned
  in host memory), and keeps their checksum.

It reads tensors up to 128 KiB completely. Of a larger matrix it reads some numbers of every row and
of every column. So it can miss a write through `.data` to a few single numbers of a larger tensor,
or to a part of a pinned tensor. It does not report weights that only moved to another device, as
offloading moves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fluxfire.edits.override import Override
from fluxfire.kernels import checksum
from fluxfire.modules import change_count, has_global_hooks, submodules

__all__ = ["Structure", "Watch", "has_foreign_hooks", "is_patched", "numeric_settings"]

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}  # every module has them
_COMPARED_BY_VALUE = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_MISSING = object()
_VERSION = attrgetter("_version")  # torch's counter of in-place changes; it has no public name
_COMPUTE_FUNCTIONS = (
    "scaled_dot_product_attention",
    "linear",
    "conv2d",
    "softmax",
    "layer_norm",
    "group_norm",
    "rms_norm",
    "gelu",
    "silu",
    "embedding",
    "interpolate",
    "pad",
)
_OFFLOADING = frozenset({"_hf_hook", "_diffusers_hook"})  # attributes of modules with such hooks


class Watch:
    """Remembers the state of some modules, and finds out whether it has changed.

    It keeps neither the modules nor their weights alive.

    Args:
        modules: the modules to watch, with all their submodules.
        apart_from: names of attributes and submodules to ignore.
    """

    def __init__(self, modules: Iterable[nn.Module], apart_from: Iterable[str] = ()) -> None:
        self._roots = [weakref.ref(module) for module in modules]
        self._ignored = _MODULE_ATTRIBUTES.union(apart_from)
        self._latest, self._sums = _Snapshot(), checksum.Sums()
        self._seen, self._is_accepted = self._latest, True
        # How to read a module's attributes, by the module's id.
        self._readers: dict[int, _Reader] = {}
        self.changed()
        self.accept()

    def changed(self) -> bool:
        """Whether anything has changed since the last `accept`. Waits for the device.

        Without an `accept`, the first call compares with the state at construction.
        """
        if self._is_accepted and self._look().equals(self._latest):
            return False
        self._is_accepted = False
        self._readers.clear()  # the names of attributes may have changed, too
        self._seen = self._look()
        return True

    def accept(self) -> None:
        """Take the state of the last `changed` as the one to compare with.

        Call it after the pass has dealt with the change. An interrupt or a lack of memory may come
        in between; then the change must still show at the next look.
        """
        self._latest, self._is_accepted = self._seen, True

    def _look(self) -> _Snapshot:
        snapshot = _Snapshot()
        modules: list[Any] = [module for ref in self._roots if (module := ref()) is not None]
        while modules:
            self._add_submodules(modules)
            self._read_modules(modules, snapshot)
            modules, snapshot.modules = snapshot.modules, []
        snapshot.read_tensors(self._sums)
        return snapshot

    def _add_submodules(self, modules: list[Any]) -> None:
        ignored = self._ignored
        for module in modules:  # the loop also visits the modules that it appends
            if children := module.__dict__["_modules"]:
                modules += [c for n, c in children.items() if c is not None and n not in ignored]

    def _read_modules(self, modules: list[Any], snapshot: _Snapshot) -> None:
        """Add modules to a snapshot, without their submodules.

        FLUX's text encoders have 900 modules, so each line is one loop of C or one comprehension.
        """
        owns = [module.__dict__ for module in modules]
        classes: list[Any] = list(map(type, modules))
        snapshot.objects += [*map(weakref.ref, modules), *classes]
        snapshot.objects += [cls.forward for cls in dict.fromkeys(classes)]
        known = list(map(self._readers.get, map(id, modules)))
        if [reader and reader.size for reader in known] != list(map(len, owns)):
            made = {
                id(m): _Reader.of(own, self._ignored) for m, own in zip(modules, owns, strict=True)
            }
            self._readers.update(made)
        pairs = [(self._readers[id(m)], own) for m, own in zip(modules, owns, strict=True)]
        try:
            snapshot.values += [reader.read_plain(own) for reader, own in pairs]
        except KeyError:  # a name is missing that was there before
            snapshot.values.append(_MISSING)
        for own, names in [(own, reader.others) for reader, own in pairs if reader.others]:
            for name in names:
                snapshot.add(own.get(name, _MISSING))
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for hooks in [hooks for own in owns if (hooks := own[kind])]:
                snapshot.add(hooks)
        for kind in ("_parameters", "_buffers"):
            of_modules = [tensors for own in owns if (tensors := own[kind])]
            snapshot.tensors += [t for tensors in of_modules for t in tensors.values()]


class _Reader(NamedTuple):
    """Reads the attributes of one module that a `Watch` compares.

    A `Watch` creates a new reader if the number of attributes differs. If names differ but not
    their number, a name is missing, and that is a change.

    Attributes:
        size: number of all attributes of the module.
        read_plain: reads the attributes that were plain values such as numbers. If one becomes
            another kind of value, it differs, and that is a change, too.
        others: names of the other attributes.
    """

    size: int
    read_plain: Callable[[dict[str, Any]], object]
    others: list[str]

    @classmethod
    def of(cls, own: dict[str, Any], ignored: frozenset[str]) -> _Reader:
        """Create the reader for a module with these attributes, ignored ones included."""
        names = [name for name in own if name not in ignored]
        plain = [name for name in names if _is_plain(own[name])]
        others = [name for name in names if not _is_plain(own[name])]
        # Every module has the attribute `training`, so there is a name to read.
        return cls(len(own), itemgetter("training", *plain), others)


class Structure:
    """Finds out whether modules, their hooks or their settings changed. Reads no numbers.

    It compares the tree of modules, their classes, their hooks, their attributes, and the classes
    of their parameters. It does not look inside objects: if a processor's settings change, the
    processor is still the same. A `Watch` looks inside, and takes three times as long.

    A pass asks it before each generation, and repeats its own checks of the modules only if the
    answer is yes. It keeps neither the modules nor their tensors alive.

    Args:
        modules: the modules to compare, with all their submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = [weakref.ref(module) for module in modules]
        self._latest: _State | None = None
        self._seen: _State | None = None

    def changed(self) -> bool:
        """Whether anything has changed since the last `accept`. True before the first one."""
        # FLUX has 1300 modules, so each line below is one loop of C or one comprehension.
        parts = submodules(*(module for ref in self._roots if (module := ref()) is not None))
        owns = [part.__dict__ for part in parts]
        parameters = [own["_parameters"] for own in owns]
        kinds: list[object] = [
            has_global_hooks(),
            *map(weakref.ref, parts),
            *map(type, parts),
            *map(len, owns),
            *map(len, parameters),
            *[type(p) for of_one in parameters if of_one for p in of_one.values()],
            *[len(own["_forward_hooks"]) for own in owns],
            *[len(own["_forward_pre_hooks"]) for own in owns],
        ]
        if self._latest is not None and kinds == self._latest.kinds:
            try:
                if _State.of(kinds, self._latest.readers, owns).equals(self._latest):
                    self._seen = self._latest
                    return False
            except (KeyError, RuntimeError):  # no attribute of that name, or a tensor in its place
                pass
        readers = [_Reader.of(own, _MODULE_ATTRIBUTES) for own in owns]
        self._seen = _State.of(kinds, readers, owns)
        return True

    def accept(self) -> None:
        """Take the state of the last `changed` as the one to compare with; see `Watch.accept`."""
        self._latest = self._seen


class _State(NamedTuple):
    """What a `Structure` compares.

    Attributes:
        kinds: the modules, and classes and numbers of what they have.
        readers: how to read each module's attributes.
        plain: the attributes that are plain values.
        others: the other attributes.
    """

    kinds: list[object]
    readers: list[_Reader]
    plain: list[object]
    others: _Snapshot

    @classmethod
    def of(cls, kinds: list[object], readers: list[_Reader], owns: list[dict[str, Any]]) -> _State:
        """Read the attributes of modules.

        Raises:
            KeyError: an attribute is missing that a reader should read.
        """
        pairs = list(zip(readers, owns, strict=True))
        plain = [reader.read_plain(own) for reader, own in pairs]
        others = _Snapshot()
        for own, names in [(own, reader.others) for reader, own in pairs if reader.others]:
            for name in names:
                others.add(own[name], depth=0)
        others.values += map(id, others.tensors)
        others.tensors = []
        return cls(kinds, readers, plain, others)

    def equals(self, other: _State) -> bool:
        """Whether another state is the same, except for `kinds`.

        Raises:
            RuntimeError: an attribute is now a tensor; it has no one truth value.
        """
        return self.plain == other.plain and self.others.equals(other.others)


def _is_plain(value: object) -> bool:
    """Whether a value is a number, text, or the like, or a tuple of such values."""
    kind = type(value)
    if kind is tuple:
        items: Any = value
        return _COMPARED_BY_VALUE.issuperset(map(type, items))
    return kind in _COMPARED_BY_VALUE


class _Snapshot:
    """The state of the modules at one time.

    Attributes:
        values: what to compare by value.
        objects: what to compare by identity, as weak references. The id of an object would not do:
            after the object is deleted, a new object may get the same id.
        tensors: the tensors, and None where a module has none; empty after `read_tensors`.
        modules: modules found in other places than `_modules`, such as a plain list. The walk must
            visit them, too.
        opened: ids of objects whose attributes are in the snapshot. T5's layers share one
            configuration, which need be opened only once.
    """

    def __init__(self) -> None:
        self.values: list[object] = []
        self.objects: list[object] = []
        self.tensors: list[Any] = []
        self.modules: list[nn.Module] = []
        self.opened: set[int] = set()

    def add(self, value: Any, depth: int = 1) -> None:
        """Add the value of an attribute.

        Args:
            value: the value. A container adds its items.
            depth: how many levels of attributes to add if the value is an object. With 1, it adds
                the object's attributes, but not the attributes of these.
        """
        if _is_plain(value):
            self.values.append(value)
        elif isinstance(value, dict):
            self.values += len(value), *value
            for item in value.values():
                self.add(item, depth)
        elif isinstance(value, list | tuple | set | frozenset):
            self.values += type(value), len(value)
            for item in value:
                self.add(item, depth)
        elif isinstance(value, Tensor):
            self.tensors.append(value)
        else:
            try:
                self.objects.append(weakref.ref(value))
            except TypeError:
                self.values.append(id(value))
            if depth and id(value) not in self.opened:
                self.opened.add(id(value))
                if isinstance(value, nn.Module):
                    self.modules.append(value)
                if not issubclass(type(value), nn.Module | type):
                    for item in getattr(value, "__dict__", {}).values():
                        self.add(item, depth - 1)

    def read_tensors(self, sums: checksum.Sums) -> None:
        """Add identities, counters and checksums of the tensors, and drop the tensors."""
        # Identity by id, not by weak reference: torch refuses to swap a tensor that has weak
        # references, and moving a torchao tensor swaps it. If a new tensor gets the id of a deleted
        # one, its checksum differs.
        self.tensors = [tensor for tensor in self.tensors if tensor is not None]
        self.values += map(id, self.tensors)
        try:  # one C loop, because FLUX's text encoders have 660 tensors
            self.values += map(_VERSION, self.tensors)
        except RuntimeError:  # an inference tensor has no counter
            self.values += map(change_count, self.tensors)
        self.values += sums.of(self.tensors)
        self.tensors = []

    def equals(self, other: _Snapshot) -> bool:
        """Whether another snapshot has the same content."""
        same_length = len(self.objects) == len(other.objects)
        if not same_length or not all(map(is_, self.objects, other.objects)):
            return False
        return self.values == other.values


def has_foreign_hooks(
    module: nn.Module, apart_from: Iterable[str] = (), *, submodules: bool = True
) -> bool:
    """Whether code outside fluxfire sees or changes what a module computes.

    Such code is in forward hooks, or in functions that replace a method of the instance. Hooks of
    offloading (accelerate's and diffusers') do not count: they only move weights, and a `Watch`
    sees a change of weights.

    Args:
        module: the module.
        apart_from: names of methods to ignore.
        submodules: whether to look at all its submodules, too.
    """
    if has_global_hooks():
        return True
    ignored = _MODULE_ATTRIBUTES.union(apart_from)
    for part in module.modules() if submodules else (module,):
        own = vars(part)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return True
        for name in own.keys() - ignored:
            is_offloading = name == "forward" and not _OFFLOADING.isdisjoint(own)
            if not is_offloading and is_patched(part, name):
                return True
    return False


def is_patched(owner: object, name: str) -> bool:
    """Whether an attribute of an object hides a method of its class, and is not fluxfire's.

    Args:
        owner: the object.
        name: name of one of its own attributes.
    """
    return callable(getattr(type(owner), name, None)) and _is_foreign(vars(owner)[name])


def numeric_settings(device: torch.device) -> tuple[object, ...]:
    """Return the global settings of torch that influence what modules compute on a device.

    They decide on precision, kernels and rounding. Compare two results with `==`.
    """
    backends: Any = torch.backends
    sdp, cudnn, onednn = backends.cuda, backends.cudnn, backends.mkldnn
    matmul = sdp.matmul
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        # Not their older names such as allow_tf32, which raise if a user set the newer ones.
        *(backend.fp32_precision for backend in (backends, matmul, cudnn, cudnn.conv)),
        *(backend.fp32_precision for backend in (onednn, onednn.matmul, onednn.conv)),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        sdp.preferred_blas_library(),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        *(onednn.enabled, onednn.deterministic),
        *(sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled()),
        *(sdp.cudnn_sdp_enabled(), sdp.fp16_bf16_reduction_math_sdp_allowed()),
        # A user may replace torch's functions, or intercept all of them with a mode.
        *(getattr(functional, name) for name in _COMPUTE_FUNCTIONS),
        *_get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
        *_get_current_dispatch_mode_stack(),
    )


def _is_foreign(function: Any) -> bool:
    """Whether a function, or one that fluxfire's overrides of it call, is not fluxfire's."""
    while isinstance(function, Override):
        function = function.inner
    return function is not None
