"""LoRA adapters that a pass folds into the weight of the layer below.

PEFT replaces a linear layer by one of its own, which calls the old layer and adds
`scaling · B · A · x`. That costs two small products and three passes over the activations for each
layer, and hides the plain layer from kernels and quantization. A pass can compute
`weight + scaling · B · A` once instead. PEFT's layer stays in its place, so `set_adapters`,
`unload_lora_weights` and all else find it; only its `forward` changes, to the layer below alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.errors import FluxfireError
from fluxfire.weights import StoredLinear

__all__ = [
    "AdaptersOff",
    "FoldedAdapter",
    "FoldedLinear",
    "adapter_gradients",
    "base_of",
    "call_scale",
    "dense",
    "folded_weight",
    "move_adapters_to_weights",
    "read_scalings",
    "why_not_foldable",
]

_FOLDABLE = ("peft.tuners.lora.layer", "Linear")


class _Adapter(NamedTuple):
    """One active LoRA of a layer: A is (rank, width), B is (width out, rank)."""

    a: nn.Linear
    b: nn.Linear
    scaling: float


def base_of(layer: nn.Module) -> nn.Module:
    """Return the layer below PEFT's adapters; a layer without an adapter is its own base."""
    base: Any = layer
    while modules.has_adapter(base):
        base = base.base_layer
    return base  # type: ignore[no-any-return]


def dense(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the weight and bias with which a layer computes, for a kernel that multiplies itself.

    Returns:
        (width out, width) and (width out,); None for a layer without a bias, or one that computes
        something else: it has a LoRA that is not folded, or is quantized.
    """
    if isinstance(layer, FoldedAdapter):
        layer = layer.base_layer
    if type(layer) is FoldedLinear:
        weight: Tensor = layer.folded
    elif type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
        weight = layer.weight
    else:
        return None
    return None if layer.bias is None else (weight, layer.bias)


def call_scale(inputs: Mapping[str, Any]) -> float:
    """Return the factor for all adapters that a transformer call asks for.

    Args:
        inputs: keyword arguments of the call. diffusers reads `joint_attention_kwargs["scale"]`.
    """
    return float((inputs.get("joint_attention_kwargs") or {}).get("scale", 1.0))


def read_scalings(layers: Iterable[Any]) -> list[str]:
    """Read the scalings of all adapters of some layers, but for their last digits.

    For a call with a scale, diffusers multiplies the scalings by it and then divides:
    2 · 0.3 / 0.3 is 2.0000000000000004. That is no other scaling, and needs no other weights.
    """
    adapted = [layer for layer in layers if modules.has_adapter(layer)]
    return [f"{name} {float(s):.9e}" for layer in adapted for name, s in layer.scaling.items()]


def why_not_foldable(layer: Any) -> str | None:
    """Return the reason why a layer with adapters cannot be folded; None if it can.

    Only a LoRA without variants is `weight + scaling · B · A`. DoRA, LoKr and others compute
    something else.
    """
    cls = own_class(layer)
    if (cls.__module__, cls.__name__) != _FOLDABLE:
        return f"its adapter is not a plain LoRA ({cls.__module__}.{cls.__name__})"
    if own_class(base := layer.base_layer) not in (nn.Linear, StoredLinear):
        return f"the layer below the adapter is a {own_class(base).__name__}"
    if own_class(base) is nn.Linear and modules.is_quantized(base.weight):
        return "the layer below the adapter is quantized"
    if any(map(modules.is_hooked, modules.submodules(layer))):
        return "the adapter or the layer below has a hook (offloading was enabled?)"
    if layer.merged and layer.disable_adapters:
        return "the adapter is merged and switched off at the same time"
    return next(filter(None, (_why_not_adapter(layer, n) for n in layer.active_adapters)), None)


def _why_not_adapter(layer: Any, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"adapter {name!r} is a variant ({type(layer.lora_variant[name]).__name__})"
    if layer.lora_bias.get(name):
        return f"adapter {name!r} has a bias"
    dropout: Any = layer.lora_dropout[name] if name in layer.lora_A else None
    if dropout is not None and dropout.training and getattr(dropout, "p", 0):
        return f"adapter {name!r} has dropout, in training mode"
    return None


def _active(layer: Any) -> Iterator[_Adapter]:
    """Yield the adapters that PEFT would add; none if they are merged or switched off."""
    if layer.merged or layer.disable_adapters:
        return
    for name in layer.active_adapters:
        if name in layer.lora_A:
            yield _Adapter(layer.lora_A[name], layer.lora_B[name], float(layer.scaling[name]))


def folded_weight(layer: nn.Module, scale: float, device: torch.device) -> Tensor:
    """Return a layer's weight with its adapters: (width out, width).

    Args:
        layer: a linear layer, or PEFT's layer around one.
        scale: the call's factor for all adapters.
        device: where to compute it.

    Returns:
        The weight itself, moved to the device, if no adapter is active; else the sum in float32.
    """
    below: Any = base_of(layer)
    adapters = list(_active(layer)) if modules.has_adapter(layer) else []
    with torch.no_grad():
        base: Tensor
        if isinstance(below, StoredLinear):
            base = below.stored.dequantized(device)
        else:
            base = below.weight.detach().to(device, non_blocking=True)
        if not adapters:
            return base
        total = base.to(torch.float32, copy=True)
        for a, b, scaling in adapters:
            left, right = (p.weight.detach().to(device, torch.float32) for p in (b, a))
            total.addmm_(left, right, alpha=scaling * scale)
    return total


def adapter_gradients(layer: Any, x: Tensor) -> Tensor:
    """Return a tensor of zeros whose backward pass gives a layer's adapters their gradients.

    The folded weight is a constant, so the adapters' own branch must give them. Its input is
    detached: the folded product has given the input its gradient already.

    Args:
        layer: a linear layer, or PEFT's layer around one.
        x: the layer's input: (batch, tokens, width).

    Returns:
        (batch, tokens, width out).
    """
    made = x.new_zeros(*x.shape[:-1], len(base_of(layer).weight))  # type: ignore[arg-type]
    for a, b, scaling in _active(layer) if modules.has_adapter(layer) else ():
        down = functional.linear(x.detach(), a.weight.to(x))
        added = functional.linear(down, b.weight.to(x)) * scaling
        made = made + (added - added.detach())
    return made


class FoldedAdapter(StandIn):
    """PEFT's layer, while the layer below it computes with the folded weight."""

    base_layer: nn.Module

    @property
    def takes_float8(self) -> bool:
        """Whether the layer below takes quantized rows."""
        return bool(getattr(self.base_layer, "takes_float8", False))

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Call the layer below.

        Raises:
            FluxfireError: the call has arguments of PEFT, such as `adapter_names`, which chooses an
                adapter for each sample.
        """
        if args or kwargs:
            given = ", ".join(kwargs) or f"{len(args)} more"
            raise FluxfireError(
                f"a layer with a folded LoRA was called with other arguments than its input "
                f"({given}); restore(pipe) first, or load the LoRA into another pipeline"
            )
        made: Tensor = self.base_layer(x)
        return (
            made + adapter_gradients(self, x).to(made) if modules.computes_derivatives() else made
        )


class FoldedLinear(StandIn, nn.Linear):
    """The layer below an adapter, which multiplies by the folded weight.

    Attributes:
        folded: (width out, width): the weight with its adapters, in the weight's dtype.
    """

    of_ours = ("folded",)
    folded: Tensor

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Multiply (batch, tokens, width) by the folded weight."""
        made = functional.linear(input, self.folded, self.bias)
        if modules.computes_derivatives() and self.weight.requires_grad:
            # The original weight gets the folded one's gradient: they differ by a constant.
            plain = functional.linear(input.detach(), self.weight.to(input.device))
            made = made + (plain - plain.detach()).to(made)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply `.to()` to the folded weight, too."""
        self.folded, weight = fn(self.folded), self._parameters["weight"]
        if weight is None or weight.device == self.folded.device or self.folded.is_meta:
            made: Any = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return made
        # The original is in host memory, and stays there: on the device it would stand beside the
        # folded weight.
        try:
            self._parameters["weight"] = None
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        if weight.dtype != self.folded.dtype:
            with modules.matching_inference_mode(weight):
                moved = weight.data.to(self.folded.dtype)
                weight.data = moved.pin_memory() if weight.is_pinned() else moved
        return self


@functools.cache
def _folded_class(cls: type) -> type:
    return type(cls.__name__, (FoldedAdapter, cls), {})


@dataclass(eq=False)
class AdaptersOff:
    """Turns PEFT's layers into `FoldedAdapter`s, and back.

    Attributes:
        layers: PEFT's layers that are `FoldedAdapter`s now.
    """

    layers: list[nn.Module] = field(default_factory=list)

    def switch_off(self, layers: Iterable[nn.Module]) -> None:
        """Make these the layers that are off, and switch the others on again."""
        wanted = list(layers)
        kept = set(map(id, wanted))
        gone = [layer for layer in self.layers if id(layer) not in kept]
        self.layers = [*gone, *wanted]  # first, so that an interrupt leaves none unknown
        _switch_on(gone)
        for layer in wanted:
            if not isinstance(layer, FoldedAdapter):
                cls: Any = type(layer)
                layer.__class__ = _folded_class(cls)
        self.layers = wanted

    def switch_on(self) -> None:
        """Give all layers their own class back."""
        _switch_on(self.layers)
        self.layers = []


def _switch_on(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        if isinstance(layer, FoldedAdapter):
            layer.__class__ = own_class(layer)


def move_adapters_to_weights(model: nn.Module) -> None:
    """Move every adapter of a model to the device of the weight below it.

    PEFT needs both in one place: `fuse_lora` adds the one to the other, and a call multiplies by
    both. PEFT creates an adapter where the weight is. So after a pass has moved weights to host
    memory, or back, the adapters have to follow, whenever somebody loaded them.
    """
    for module in dict.fromkeys(modules.submodules(model)):
        if modules.has_adapter(module):
            _move_adapters(module)


def _move_adapters(layer: nn.Module) -> None:
    """Move a layer's adapters to the device of the weight below: pinned, where that is pinned.

    Checksums of unpinned memory are read by the CPU, which takes a tenth of a second for FLUX.
    """
    below: Any = base_of(layer)
    weight = getattr(below, "weight", None)
    if weight is None or weight.is_meta:
        return
    own = set(map(id, below.parameters()))
    for parameter in layer.parameters():
        if id(parameter) in own or parameter.is_meta or parameter.device == weight.device:
            continue
        with modules.matching_inference_mode(parameter):
            moved = parameter.data.to(weight.device)
            parameter.data = moved.pin_memory() if weight.is_pinned() else moved
    scalings: dict[str, Any] = vars(layer).get("scaling", {})
    for name, scaling in scalings.items():  # hot-swapping makes them tensors
        if isinstance(scaling, Tensor) and scaling.device != weight.device:
            scalings[name] = scaling.to(weight.device)
