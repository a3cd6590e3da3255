"""Fingerprints: a pipeline's structure, and torch's global state, as flat comparable data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch
from torch import nn

from fluxfire import modules
from fluxfire.diffusers_types import DiffusersPipeline, Pipeline

# Dynamo replaces these attributes of torch.nn.Module permanently at the first compilation.
_DYNAMOS_OWN = ("__init__", "__setstate__", "___needs_generation_tag_patch")
_COPYREGS_OWN = ("__slotnames__",)  # copyreg sets it on a class when an instance is copied
_LOADED = "if loaded: "
# Environment variables that pytest and torch's compiler set.
_OTHERS_VARIABLES = (
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
)

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def fingerprint(pipe: DiffusersPipeline) -> dict[str, object]:
    """Describe everything about a pipeline that `restore` must give back.

    It has the components, the modules and their order, instance dictionaries, the weights' shapes,
    strides and storage, state-dict keys, attributes of all classes involved, compiler settings,
    backend flags, torch's and inductor's functions, and the process's environment variables. Take
    it after one call of the pipeline: the first call of a diffusers pipeline adds hooks.
    """
    return dict(_entries(pipe))


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Describe the differences between two fingerprints.

    Entries of a torch module that was imported in between are no difference.
    """
    if before == after:
        return []
    found = []
    for key in [*before, *(k for k in after if k not in before)]:
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if old != new and not (old == "absent" and key.startswith(_LOADED)):
            found.append(f"{key}: {old} became {new}")
    return found


def _entries(pipe: Pipeline) -> Iterator[tuple[str, object]]:
    classes: dict[type, None] = dict.fromkeys(type(pipe).__mro__)
    yield from _own("pipe", pipe)
    for component_name, component in modules.components(pipe):
        yield f"{component_name} state-dict keys", tuple(component.state_dict())
        for name, module in component.named_modules():
            where = f"{component_name}.{name}".rstrip(".")
            yield from _own(where, module)
            classes.update(dict.fromkeys(type(module).__mro__))
            for kind in ("_parameters", "_buffers"):
                for key, tensor in vars(module)[kind].items():
                    yield f"{where}.{key}", _tensor(tensor)
    for name, component in pipe.components.items():
        if component is not None and not isinstance(component, nn.Module):
            yield f"{name}: class", id(type(component))
            yield (
                f"{name}: attributes",
                tuple(vars(component)),
            )  # names only: a scheduler's values change
            classes.update(dict.fromkeys(type(component).__mro__))
    for cls in classes:
        for attribute, value in vars(cls).items():
            if attribute not in (*_DYNAMOS_OWN, *_COPYREGS_OWN):
                yield f"class {cls.__qualname__}.{attribute}", id(value)
    yield from _environment()
    yield from _functions()
    yield from _settings()


def _own(where: str, obj: object) -> Iterator[tuple[str, object]]:
    """Describe an object's class and its instance dictionary, including the order."""
    yield f"{where}: class", id(type(obj))
    yield f"{where}: order of attributes", tuple(vars(obj))
    for name, value in vars(obj).items():
        yield f"{where}: attribute {name}", _value(value)


def _value(value: object) -> object:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, dict):
        keys = tuple(map(str, value))
        return (type(value).__name__, keys if any(map(_is_module, value.values())) else len(keys))
    if isinstance(value, list | tuple | set | frozenset):
        return (type(value).__name__, len(value))
    if callable(value) or isinstance(value, nn.Module):
        return (type(value).__name__, id(value))
    return type(value).__name__


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _tensor(tensor: torch.Tensor | None) -> object:
    if tensor is None:
        return None
    storage = tensor.untyped_storage()
    return (
        tuple(tensor.shape),
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.device,
        storage.nbytes(),
        tensor.is_inference(),
        tensor.requires_grad,
    )


def _environment() -> Iterator[tuple[str, object]]:
    for name, value in os.environ.items():
        if name not in _OTHERS_VARIABLES:
            yield f"environment: {name}", value


def _functions() -> Iterator[tuple[str, object]]:
    """Describe global functions that a pass could have replaced."""
    for name in ("torch", "torch.nn.functional", "torch._inductor.fx_passes.post_grad"):
        module = sys.modules.get(name)
        for attribute, value in vars(module).items() if module else ():
            if callable(value):
                yield f"{_LOADED}{name}.{attribute}", id(value)


def _settings() -> Iterator[tuple[str, object]]:
    """Describe torch's global settings that a pass could have changed."""
    yield "default dtype", torch.get_default_dtype()
    yield "grad enabled", torch.is_grad_enabled()
    yield "matmul precision", torch.get_float32_matmul_precision()
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    yield "cudnn", (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark)
    matmul = torch.backends.cuda.matmul
    yield "cuda matmul", (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_tf32)
    for name in ("torch._inductor.config", "torch._dynamo.config", "torch._functorch.config"):
        if name in sys.modules:
            for key, value in sys.modules[name].get_config_copy().items():
                # Equal sets may list their elements in another order.
                ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
                yield f"{_LOADED}{name}.{key}", repr(ordered)
    if (callbacks := sys.modules.get("torch._dynamo.callback")) is not None:
        handler = callbacks.callback_handler
        counts = (len(handler.start_callbacks), len(handler.end_callbacks))
        yield f"{_LOADED}dynamo callbacks", counts
