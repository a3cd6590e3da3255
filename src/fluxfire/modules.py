"""What is true of a pipeline's modules, whatever the architecture: quantized, offloaded, hooked.

A pass refuses by these *traits*, never by the name of another pass. Everything here was read off
diffusers 0.35 to 0.42 and accelerate; nothing here changes a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from fluxfire.configured import Trait
from fluxfire.edits.override import CALL_SLOT, Override

SWAPPED: frozenset[Trait] = frozenset({"sequential-offload", "group-offload", "layerwise-casting"})
"""Traits of pipelines whose weights are swapped layer by layer while they run."""
FOREIGN_CACHE = (
    "another library's cache (ParaAttention or cache-dit) is on the transformer",
    "take it off first (cache_dit.disable_cache(pipe)), or reload the pipeline",
)
"""Why the trait `foreign-cache` is in the way, and what to do about it."""


def components(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the pipeline's components that hold weights, by name."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            yield name, component


def place(pipe: Any, *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move and cast every component; diffusers' own `to` warns where there is no cause."""
    for _, module in components(pipe):
        nn.Module.to(module, device=device, dtype=dtype)


def optimizable(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the components that passes work on: the transformer, and the VAE if any."""
    for name, component in components(pipe):
        if name in ("transformer", "vae"):
            yield name, component


def traits(pipe: Any) -> frozenset[Trait]:
    """Find out what is already true of a pipeline's transformer and VAE.

    Returns:
        Any of `quantized`, `lora`, `ip-adapter`, `compiled`, `fused-qkv`, `native-cache`,
        `foreign-cache`, `model-offload`, `sequential-offload`, `group-offload`,
        `layerwise-casting`, `context-parallel`.
    """
    found: set[Trait] = set()
    for _, component in optimizable(pipe):
        for module in component.modules():
            found.update(module_traits(module))
    transformer = pipe.transformer
    found |= cache_traits(transformer)
    if getattr(transformer, "encoder_hid_proj", None) is not None:
        found.add("ip-adapter")
    if getattr(transformer, "_parallel_config", None) is not None:  # enable_parallelism()
        found.add("context-parallel")
    return frozenset(found)


def swapped(component: nn.Module) -> frozenset[Trait]:
    """Find out which of the traits `SWAPPED` a component has now: they may come at any time."""
    hooked = (m for m in parts(component) if "_hf_hook" in vars(m) or "_diffusers_hook" in vars(m))
    return SWAPPED.intersection(trait for module in hooked for trait in module_traits(module))


def parts(module: nn.Module) -> list[nn.Module]:
    """List a module and all below it, in a fraction of the time that `Module.modules()` takes."""
    found = [module]
    for part in found:  # it grows meanwhile
        if children := part.__dict__["_modules"]:
            found += [child for child in children.values() if child is not None]
    return found


def cache_traits(transformer: Any) -> set[Trait]:
    """Find out whose caches are on a transformer: `native-cache`, `foreign-cache`."""
    found: set[Trait] = set()
    if getattr(transformer, "is_cache_enabled", False):
        found.add("native-cache")
    if getattr(transformer, "_is_cached", False):  # ParaAttention's mark, and cache-dit's
        found.add("foreign-cache")
    return found


def module_traits(module: nn.Module) -> Iterator[Trait]:
    """Find out what is true of one module, its children aside: some of what `traits` lists."""
    own = vars(module)
    if is_compiled(module):
        yield "compiled"
    if own.get("fused_projections") and _is_fused(module):
        yield "fused-qkv"
    if hasattr(module, "lora_A"):
        yield "lora"
    if any(is_quantized(p) for p in own["_parameters"].values() if p is not None):
        yield "quantized"
    if (hook := own.get("_hf_hook")) is not None:  # accelerate
        if getattr(hook, "offload", False):
            yield "sequential-offload"
        elif type(hook).__name__ == "CpuOffload":
            yield "model-offload"
    if (registry := own.get("_diffusers_hook")) is not None:
        names = set(registry.hooks)
        if any("group_offloading" in n for n in names):
            yield "group-offload"
        if any("layerwise_casting" in n for n in names):
            yield "layerwise-casting"


def _is_fused(attention: Any) -> bool:
    """Whether an attention that says so runs a fused projection.

    diffusers' `unfuse_qkv_projections` leaves a VAE's fused linears behind, and takes only
    the processor back; a copy of a pipeline that fluxfire optimized keeps an empty one.
    """
    unused = isinstance(attention, Attention) and "Fused" not in type(attention.processor).__name__
    return not unused and getattr(attention.to_qkv, "weight", None) is not None


def is_compiled(module: nn.Module) -> bool:
    """Whether somebody called `compile` on a module: what an override may stand before."""
    call: Any = vars(module).get(CALL_SLOT)
    while isinstance(call, Override):
        call = call.inner
    return hasattr(call, "_torchdynamo_orig_callable")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module is more than its class's forward.

    Accelerate and diffusers put their hooks into a `forward` of the instance.
    """
    own = vars(module)
    return "forward" in own or bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter holds quantized data: a tensor subclass, or not floating point."""
    plain = type(weight.data) is torch.Tensor and type(weight) is nn.Parameter
    return not plain or not weight.is_floating_point()


def as_made(weight: torch.Tensor) -> AbstractContextManager[None]:
    """Make tensors of the kind that a weight is: an inference tensor, or a normal one.

    Weights built under `torch.inference_mode` are the former; a layer with both cannot run.
    """
    return torch.inference_mode(mode=weight.is_inference())


def storage_bytes(pipe: Any) -> int:
    """Count the bytes of the pipeline's weights and buffers, shared storage once."""
    seen: dict[int, int] = {}
    for _, component in components(pipe):
        for tensor in (*component.parameters(), *component.buffers()):
            if tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
