"""Inspects torch modules, whatever the architecture: are they quantized, offloaded, hooked?

The answers are *traits*. A pass refuses a pipeline because of a trait, never because of the name of
another pass. This module reads attributes of the modules of diffusers 0.35 to 0.42 and of
accelerate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from fluxfire.configured import Trait
from fluxfire.diffusers_types import Pipeline
from fluxfire.edits.override import CALL_SLOT, Override

SWAPPED: frozenset[Trait] = frozenset({"sequential-offload", "group-offload", "layerwise-casting"})
"""Traits of pipelines that swap the weights of each layer while they run."""
FOREIGN_CACHE = (
    "another library's cache (ParaAttention or cache-dit) is on the transformer",
    "take it off first (cache_dit.disable_cache(pipe)), or reload the pipeline",
)
"""Message and remedy for the trait `foreign-cache`."""


def components(pipe: Pipeline) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over names and components of a pipeline, for components that are torch modules."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            yield name, component


def child(module: object, name: str) -> nn.Module | None:
    """Return a submodule, or None, in a fifth of the time of `getattr`."""
    found: nn.Module | None = module.__dict__["_modules"].get(name)
    return found


def parameter(module: object, name: str) -> nn.Parameter | None:
    """Return a parameter, or None, in a fifth of the time of `getattr`.

    A layer with an adapter has no parameter of its own, but a property of that name.
    """
    own: dict[str, nn.Parameter | None] = module.__dict__["_parameters"]
    found: nn.Parameter | None = own[name] if name in own else getattr(module, name, None)
    return found


def move_and_cast(pipe: Pipeline, *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move and cast every component, without the needless warnings of diffusers' `to`."""
    for _, module in components(pipe):
        nn.Module.to(module, device=device, dtype=dtype)


def optimizable_components(pipe: Pipeline) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over names and components that passes work on: the transformer, and a VAE if any."""
    for name, component in components(pipe):
        if name in ("transformer", "vae"):
            yield name, component


def traits(pipe: Pipeline) -> frozenset[Trait]:
    """Return the traits of a pipeline's transformer and VAE.

    Returns:
        Any of `quantized`, `lora`, `ip-adapter`, `compiled`, `fused-qkv`, `native-cache`,
        `foreign-cache`, `model-offload`, `sequential-offload`, `group-offload`,
        `layerwise-casting`, `context-parallel`.
    """
    found: set[Trait] = set()
    for _, component in optimizable_components(pipe):
        for module in component.modules():
            found.update(module_traits(module))
    transformer = pipe.transformer
    found |= cache_traits(transformer)
    if getattr(transformer, "encoder_hid_proj", None) is not None:
        found.add("ip-adapter")
    if runs_on_several_gpus(transformer):
        found.add("context-parallel")
    return frozenset(found)


def is_moved(component: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers place a component's weights while it runs."""
    for part in submodules(component):
        own = part.__dict__
        if "_hf_hook" in own:
            return True
        if "_diffusers_hook" in own and not SWAPPED.isdisjoint(module_traits(part)):
            return True
    return False


def swapping_traits(component: nn.Module) -> frozenset[Trait]:
    """Return the traits in `SWAPPED` that a component has now; they can come at any time."""
    owns = ((module, module.__dict__) for module in submodules(component))
    hooked = [module for module, own in owns if "_hf_hook" in own or "_diffusers_hook" in own]
    return SWAPPED.intersection(trait for module in hooked for trait in module_traits(module))


def submodules(*roots: nn.Module) -> list[nn.Module]:
    """List modules and all their submodules, in a fraction of the time of `Module.modules()`.

    If one module stands in two places, the list has it twice.
    """
    found: list[nn.Module | None] = list(roots)
    for part in found:  # the loop also visits the modules that it appends
        if part is not None and (children := part.__dict__["_modules"]):
            found += children.values()
    return [part for part in found if part is not None]


def cache_traits(transformer: object) -> set[Trait]:
    """Return the traits of caches on a transformer: `native-cache`, `foreign-cache`."""
    found: set[Trait] = set()
    if getattr(transformer, "is_cache_enabled", False):
        found.add("native-cache")
    if getattr(transformer, "_is_cached", False):  # ParaAttention and cache-dit set it
        found.add("foreign-cache")
    return found


def module_traits(module: nn.Module) -> Iterator[Trait]:
    """Return the traits of one module, without the traits of its submodules."""
    own = vars(module)
    if is_compiled(module):
        yield "compiled"
    if own.get("fused_projections") and _is_fused(module):
        yield "fused-qkv"
    if has_adapter(module):
        yield "lora"
    # An int8 checkpoint's layers are no foreign quantization: `Int8` takes them as they are.
    if not hasattr(module, "streamed") and any(
        is_quantized(p) for p in own["_parameters"].values() if p is not None
    ):
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


def _is_fused(attention: nn.Module) -> bool:
    """Whether an attention with `fused_projections` set really runs a fused projection.

    diffusers' `unfuse_qkv_projections` resets only the processor of a VAE's attention; the fused
    layers stay, unused. And a copy of a pipeline that fluxfire optimized keeps a `to_qkv` without
    weight.
    """
    unused = isinstance(attention, Attention) and "Fused" not in type(attention.processor).__name__
    return not unused and getattr(attention.to_qkv, "weight", None) is not None


def runs_on_several_gpus(part: object) -> bool:
    """Whether diffusers' `enable_parallelism` split a transformer, or an attention's processor."""
    return getattr(part, "_parallel_config", None) is not None


def computes_derivatives() -> bool:
    """Whether torch records operations for derivatives: of gradients, or of `torch.func.jvp`.

    torch differentiates its own operations, but not a kernel, a cached value or a weight in float8.
    Training of consistency and mean-flow models calls `torch.func.jvp`, mostly under `no_grad`.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0  # noqa: SLF001 - no public name


def change_count(tensor: torch.Tensor) -> int:
    """Return torch's counter of in-place changes; -1 for an inference tensor, which has none."""
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - no public name


def has_adapter(module: object) -> bool:
    """Whether a module is a layer with one of PEFT's adapters: LoRA, LoHa, LoKr and others."""
    return hasattr(type(module), "adapter_layer_names")


def is_compiled(module: object) -> bool:
    """Whether a user compiled a module, by `module.compile()` or by replacing its `forward`."""
    own = vars(module)
    for call in (own.get(CALL_SLOT), own.get("forward")):
        inner: Any = call
        while isinstance(inner, Override):  # an override of fluxfire may hide the compiled function
            inner = inner.inner
        if hasattr(inner, "_torchdynamo_orig_callable"):
            return True
    return False


def has_global_hooks() -> bool:
    """Whether torch has forward hooks for all modules of the process."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)  # noqa: SLF001


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module runs more than the `forward` of its class.

    Accelerate and diffusers replace the instance's `forward` to run their hooks.
    """
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        # The same as `has_global_hooks`, but inline: passes check a thousand modules.
        or torch_module._global_forward_hooks  # noqa: SLF001
        or torch_module._global_forward_pre_hooks  # noqa: SLF001
    )


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a parameter holds quantized data: a tensor subclass, or not floating point."""
    plain = type(weight.data) is torch.Tensor and type(weight) is nn.Parameter
    return not plain or not weight.is_floating_point()


def matching_inference_mode(weight: torch.Tensor) -> AbstractContextManager[None]:
    """Turn inference mode on inside the block if a weight is an inference tensor, else off.

    Where torch turns inference mode off, it turns gradients on. So `torch.no_grad()` must follow.

    Weights that were created under `torch.inference_mode` are inference tensors. A layer that has
    both inference tensors and normal ones cannot run.
    """
    return torch.inference_mode(mode=weight.is_inference())


def usable_bytes(device: torch.device) -> float:
    """Return how many bytes of a device this process may use, with those that it uses already.

    Other processes and `torch.cuda.set_per_process_memory_fraction` leave that much. Infinite for a
    device that is no CUDA device.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return float("inf")
    free, total = torch.cuda.mem_get_info(device)
    read_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    fraction = 1.0 if read_fraction is None else float(read_fraction(device))
    return min(free + torch.cuda.memory_reserved(device), total * fraction)


def storage_bytes(pipe: Pipeline) -> int:
    """Count the bytes of a pipeline's weights and buffers. Counts a shared storage once."""
    seen: dict[int, int] = {}
    for _, component in components(pipe):
        for tensor in (*component.parameters(), *component.buffers()):
            if tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
