"""What a FLUX.1 Kontext pipeline is: its parts, its tokens, its traits.

Everything here was read off diffusers 0.35 to 0.42; nothing here changes a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from fluxfire.override import CALL_SLOT, Override
from fluxfire.text import with_article

PIPELINES = (FluxKontextPipeline, FluxKontextInpaintPipeline)
SWAPPED = frozenset({"sequential-offload", "group-offload", "layerwise-casting"})
"""Traits of pipelines whose weights are swapped layer by layer while they run."""
FOREIGN_CACHE = (
    "another library's cache (ParaAttention or cache-dit) is on the transformer",
    "take it off first (cache_dit.disable_cache(pipe)), or reload the pipeline",
)
"""Why the trait `foreign-cache` is in the way, and what to do about it."""
QKV = ("to_q", "to_k", "to_v")
"""What makes an attention's queries, keys and values; fused, diffusers calls it `to_qkv`."""
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
"""The same for the text's stream, where that is apart; fused, `to_added_qkv`."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many tokens of each kind a transformer call carries.

    The image stream is `noise` tokens followed by `reference` tokens; only the noise
    tokens of the output are used. The text stream has `text` tokens.
    """

    noise: int
    reference: int
    text: int

    @classmethod
    def from_ids(cls, img_ids: torch.Tensor, txt_ids: torch.Tensor) -> Tokens:
        """Count tokens from the position ids.

        Args:
            img_ids: (image tokens, 3); the first column is 0 for noise, 1 for reference.
            txt_ids: (text tokens, 3).
        """
        noise = int((img_ids[..., 0] == 0).sum())  # waits for the device, once a generation
        return cls(noise, img_ids.shape[-2] - noise, txt_ids.shape[-2])


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the transformer within a generation.

    Attributes:
        step: denoising step, counted from 0.
        steps: how many steps the generation plans.
        branch: `"cond"`, or `"uncond"` for the second call of a step under true CFG.
        timestep: (batch,), in [0, 1]; a tensor, so that it can enter compiled code. In the
            latents' dtype: bfloat16 rounds it by up to a step's length.
        level: the same noise level in float32, a tensor of no dimensions.
        tokens: how many tokens of each kind.
    """

    step: int
    steps: int
    branch: str
    timestep: torch.Tensor
    level: torch.Tensor
    tokens: Tokens


def unsupported(pipe: object) -> str | None:
    """Say why fluxfire cannot work on this object at all, or None if it can."""
    if not isinstance(pipe, PIPELINES):
        names = " and ".join(p.__name__ for p in PIPELINES)
        return f"fluxfire works on {names}, not on {type(pipe).__name__}"
    transformer = pipe.transformer
    if not isinstance(transformer, FluxTransformer2DModel):
        hint = ""
        if hasattr(transformer, "_orig_mod"):
            hint = "; it was wrapped by torch.compile: pass the plain model and add Compile()"
        return (
            f"pipe.transformer is {with_article(type(transformer).__name__)}, "
            f"not a FluxTransformer2DModel{hint}"
        )
    for name, component in modules(pipe):
        weights = component.named_parameters()  # a subclass keeps its numbers in its own way
        on_meta = next((n for n, p in weights if p.is_meta and type(p) is nn.Parameter), None)
        if on_meta is not None and not any("_hf_hook" in vars(m) for m in component.modules()):
            return (
                f"the {name}'s weights are on the meta device ({on_meta} has no data); "
                f"load them before optimizing"
            )
    return None


def modules(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the pipeline's components that hold weights, by name."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            yield name, component


def place(pipe: Any, *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move and cast every component; diffusers' own `to` warns where there is no cause."""
    for _, module in modules(pipe):
        nn.Module.to(module, device=device, dtype=dtype)


def optimizable(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the components that passes work on: the transformer, and the VAE if any."""
    for name, component in modules(pipe):
        if name in ("transformer", "vae"):
            yield name, component


def blocks(transformer: Any) -> list[nn.Module]:
    """Return the transformer's blocks in the order they run: double, then single."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def attentions(transformer: Any) -> list[Any]:
    """Return the blocks' attentions, in the same order."""
    of_blocks: list[Any] = blocks(transformer)
    return [block.attn for block in of_blocks]


def is_tiny(pipe: Any) -> bool:
    """Whether a pipeline's latents are finer than FLUX's, as those of test pipelines are."""
    flux = 8  # pixels of a side for one latent
    return bool(pipe.vae_scale_factor < flux)


def reference_size(pipe: Any, width: int, height: int) -> tuple[int, int]:
    """Return the size (width, height) to which a pipeline resizes a reference by default.

    Kontext takes the one of its preferred sizes, all about a megapixel, whose shape is
    nearest; a pipeline of another size says so by a method of this name.
    """
    if (own := getattr(pipe, "reference_size", None)) is not None:
        size: tuple[int, int] = own(width, height)
        return size
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    _, w, h = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return w // 16 * 16, h // 16 * 16


def exact_size(width: int, height: int) -> dict[str, int]:
    """Return the call's arguments for an output of exactly this size, in pixels.

    Without `max_area` Kontext rescales the size asked for to about a megapixel.
    """
    return {"width": width, "height": height, "max_area": width * height}


def traits(pipe: Any) -> frozenset[str]:
    """Find out what is already true of a pipeline's transformer and VAE.

    Returns:
        Any of `quantised`, `lora`, `ip-adapter`, `compiled`, `fused-qkv`, `native-cache`,
        `foreign-cache`, `model-offload`, `sequential-offload`, `group-offload`,
        `layerwise-casting`.
    """
    found: set[str] = set()
    for _, component in optimizable(pipe):
        for module in component.modules():
            found.update(module_traits(module))
    transformer = pipe.transformer
    found |= cache_traits(transformer)
    if getattr(transformer, "encoder_hid_proj", None) is not None:
        found.add("ip-adapter")
    return frozenset(found)


def swapped(component: nn.Module) -> frozenset[str]:
    """Find out which of the traits `SWAPPED` a component has now: they may come at any time."""
    hooked = (m for m in parts(component) if "_hf_hook" in vars(m) or "_diffusers_hook" in vars(m))
    return SWAPPED.intersection(trait for module in hooked for trait in module_traits(module))


def parts(module: nn.Module) -> list[nn.Module]:
    """List a module and all below it, in a fraction of the time that `modules()` takes."""
    found = [module]
    for part in found:  # it grows meanwhile
        if children := part.__dict__["_modules"]:
            found += [child for child in children.values() if child is not None]
    return found


def cache_traits(transformer: Any) -> set[str]:
    """Find out whose caches are on a transformer: `native-cache`, `foreign-cache`."""
    found = set()
    if getattr(transformer, "is_cache_enabled", False):
        found.add("native-cache")
    if getattr(transformer, "_is_cached", False):  # ParaAttention's mark, and cache-dit's
        found.add("foreign-cache")
    return found


def module_traits(module: nn.Module) -> Iterator[str]:
    """Find out what is true of one module, its children aside: some of what `traits` lists."""
    own = vars(module)
    if is_compiled(module):
        yield "compiled"
    if own.get("fused_projections") and _is_fused(module):
        yield "fused-qkv"
    if hasattr(module, "lora_A"):
        yield "lora"
    if any(is_quantised(p) for p in own["_parameters"].values() if p is not None):
        yield "quantised"
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


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a parameter holds quantised data: a tensor subclass, or not floating point."""
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
    for _, component in modules(pipe):
        for tensor in (*component.parameters(), *component.buffers()):
            if tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
