"""The blocks' linear layers with eight-bit weights, in any format: for `Float8` and `Int8`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import AttentionModule, Transformer
from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.errors import FluxfireError
from fluxfire.kernels.float8 import QuantizedRows
from fluxfire.model import Model
from fluxfire.passes.shared.adapters import (
    AdaptersOff,
    adapter_gradients,
    base_of,
    folded_weight,
    move_adapters_to_weights,
    why_not_foldable,
)
from fluxfire.passes.shared.folding import Folder
from fluxfire.passes.shared.fused_projection import install_products
from fluxfire.passes.shared.host_weights import MOVED_ELSEWHERE, HostWeights, computing_device
from fluxfire.protocol import Change, Finding, Target
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of
from fluxfire.weights import DroppedWeight, StoredLinear

Originals = Literal["host", "drop"]
ORIGINALS: tuple[Originals, ...] = get_args(Originals)
_APPLY_AGAIN = "call restore(pipe), then optimize(pipe, …) with the same passes"
_TAKE_BACK = "take that change back, because originals='drop' let go of the original weights"

Input: TypeAlias = Tensor | QuantizedRows
Multiply: TypeAlias = Callable[[Input, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""Multiplies an input by (weight, scale, bias), and returns a result of a dtype."""


@dataclass(frozen=True)
class Format:
    """How eight-bit weights are stored, and how a product uses them.

    Attributes:
        dtype: of the stored weights.
        quantize: returns a weight's data, and a float32 scale for each output channel.
        linear: the product.
        takes_float8: whether the product takes `QuantizedRows`, too.
    """

    dtype: torch.dtype
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    linear: Multiply
    takes_float8: bool = False

    def quantized(
        self, layer: nn.Module, scale: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's weight with its adapters, quantized, and its scales.

        The weight of an eight-bit checkpoint in this format is taken as it is.

        Args:
            layer: a linear layer, or PEFT's layer around one.
            scale: a factor for all adapters.
            device: where to quantize.
        """
        if isinstance(layer, StoredLinear) and layer.stored.data.dtype is self.dtype:
            return layer.stored.data.to(device), layer.stored.scale.to(device)
        return self.quantize(folded_weight(layer, scale, device))


def check_originals(originals: str) -> None:
    """Raise a ValueError for a setting `originals` that there is not."""
    if originals not in ORIGINALS:
        raise ValueError(f"originals={originals!r}; it must be one of {', '.join(ORIGINALS)}")


def check(target: Target, owner: str, originals: Originals) -> Iterator[Finding]:
    """Refuse weights that are fused, offloaded or quantized, and odd widths.

    Args:
        target: what the pass checks.
        owner: the pass's class.
        originals: its setting.
    """
    model, transformer = model_of(target.pipe), target.pipe.transformer
    for trait, why, remedy in (
        ("fused-qkv", "the projections are fused already", f"leave the fusion out: {owner} fuses"),
        ("quantized", "the weights are quantized already", "use one quantization"),
    ):
        if trait in target.traits:
            yield Finding("error", why, remedy, trait=trait)
    if moved := target.traits & (modules.SWAPPED | {"model-offload"}):
        yield Finding(
            "error",
            f"offloading moves the weights while the pipeline runs ({', '.join(sorted(moved))})",
            f"{owner} halves them, and Placement() places the rest: take the offloading off",
        )
    if "lora" in target.traits and (why := _left(model, transformer, originals)):
        yield Finding("info", f"layers with an adapter are not quantized where {why}")
    found = _linears(model, transformer, below_adapters=originals == "host")
    widths = {n for *_, linear in found for n in linear.weight.shape}
    if odd := sorted(n for n in widths if n % 16):
        yield Finding(
            "error",
            f"eight-bit products need widths that are multiples of 16, and layers have {odd}",
            f"leave {owner} out",
        )


def _left(model: Model, transformer: Transformer, originals: Originals) -> str:
    """Return why layers with an adapter are not quantized; empty if all are."""
    if originals == "drop":
        return "originals='drop' would lose the weights that a LoRA adds to"
    layers = [
        getattr(*place) for block in model.blocks(transformer) for place in model.linears(block)
    ]
    found = (why_not_foldable(layer) for layer in layers if modules.has_adapter(layer))
    return "; or where ".join(dict.fromkeys(why for why in found if why))


def install(tx: Transaction, format_: Format, owner: str, originals: Originals) -> Change:
    """Quantize layer by layer, so that at most one layer is in memory twice.

    Args:
        tx: the transaction of the pass.
        format_: the format of the weights.
        owner: the pass's class.
        originals: its setting.
    """
    transformer, freed = tx.pipe.transformer, 0
    model = model_of(tx.pipe)
    off = AdaptersOff()
    tx.on_undo(off.switch_on)
    host = HostWeights.of(tx)
    keeps = originals == "host"

    def product_of(linears: list[nn.Linear]) -> QuantizedProduct:
        return QuantizedProduct(linears, computing_device(linears[0], host.model), format_)

    # A block may stand twice.
    layers = list(dict.fromkeys(_linears(model, transformer, below_adapters=keeps)))
    plain = {linear for *_, linear in layers}
    products: list[QuantizedProduct] = []
    stacked: list[nn.Linear] = []
    fused: list[tuple[object, str, nn.Module]] = []
    for attention in dict.fromkeys(model.attentions(transformer)):
        if (groups := _stackable(model, attention, plain)) is None:
            continue
        made: dict[str, nn.Module] = {}
        for stack, parts in groups:
            products.append(product_of(parts))
            made[stack] = products[-1]
            stacked += parts
            fused.append((attention, stack, products[-1]))
            freed += sum(map(host.offload, parts))
        install_products(tx, attention, made)
    alone = plain.difference(stacked)
    for linear in (linear for *_, linear in layers if linear in alone):
        products.append(product_of([linear]))
        tx.setattr(linear, "product", products[-1])
        tx.set_class(linear, _quantized_class(own_class(linear)))
        freed += host.offload(linear)
    move_adapters_to_weights(host.model)
    watch = _WeightWatch(tx, fused, layers, stacked, products, host, off, owner, drop=not keeps)
    tx.listen(watch)
    gained = sum(product.nbytes for product in products)
    what = f"linear layers in {owner.lower()}"
    return Change(len(layers), what, gained - freed, host_bytes=freed)


class QuantizedProduct(nn.Module):
    """A matrix product with the eight-bit weights of one layer, or of several concatenated layers.

    Attributes:
        format: how the weights are stored.
        weight: (width out, width), in the format's dtype.
        scale: (width out, 1), float32.
        bias: (width out,), or None.
        dtype: dtype of the results.
        linears: the original layers; a tuple, so that they are no submodules.
        layers: what stands in their places: the same, or PEFT's layers around them.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linears: list[nn.Linear], device: torch.device, format_: Format) -> None:
        super().__init__()
        self.format = format_
        self.linears = tuple(linears)
        self.layers: tuple[nn.Module, ...] = self.linears
        for name in ("weight", "scale", "bias"):
            self.register_buffer(name, None, persistent=False)
        self.quantize(device)

    def quantize(
        self, device: torch.device, layers: Sequence[nn.Module] = (), scale: float = 1.0
    ) -> None:
        """Quantize the layers' current weights on a device.

        Args:
            device: where the product will be computed.
            layers: PEFT's layers around the own ones, whose adapters are added to the weights; an
                own layer where there is no adapter. By default there is none.
            scale: a factor for all adapters.
        """
        self.layers = tuple(layers) or self.linears
        with modules.matching_inference_mode(self.linears[0].weight), torch.no_grad():
            made = [self.format.quantized(layer, scale, device) for layer in self.layers]
            self.weight = torch.cat([w for w, _ in made])
            self.scale = torch.cat([s for _, s in made])
        self.copy_biases(device)
        self.dtype = self.linears[0].weight.dtype

    def copy_biases(self, device: torch.device) -> None:
        """Copy the layers' current biases to a device."""
        with modules.matching_inference_mode(self.weight):
            if all(layer.bias is None for layer in self.linears):
                self.bias = None
                return
            biases = [
                layer.weight.new_zeros(len(layer.weight), device=device)
                if layer.bias is None
                else layer.bias.detach().to(device)
                for layer in self.linears
            ]
            self.bias = torch.cat(biases)

    @property
    def takes_float8(self) -> bool:
        """Whether the input may be in float8 already."""
        return self.format.takes_float8

    @property
    def widths(self) -> list[int]:
        """Width out of each layer."""
        return [len(layer.weight) for layer in self.linears]

    def dequantized(self, like: Tensor) -> Tensor:
        """Return the rounded weight in another tensor's dtype: (width out, width)."""
        return self.weight.to(like.dtype) * self.scale.to(like.dtype)

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """Multiply (batch, tokens, width), which may be quantized already.

        The gradients are those of the product without rounding. Under autocast the result has
        autocast's dtype, like a linear layer's result.
        """
        if isinstance(x, QuantizedRows):
            return self.multiply(x, self.dtype)
        device, dtype = x.device.type, self.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return self._multiply_tensor(x.to(dtype), dtype)
        return self._multiply_tensor(x, dtype)

    def _multiply_tensor(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not modules.computes_derivatives():
            return self.multiply(x, dtype)
        apply: Any = _WithGradients.apply
        made: Tensor = apply(
            self,
            dtype,
            x,
            *(_unless_dropped(layer.weight) for layer in self.linears),
            *(layer.bias for layer in self.linears if layer.bias is not None),
        )
        if len(self.linears) > 1:  # nobody calls PEFT's layers in the place of these
            parts = [adapter_gradients(layer, x).to(made) for layer in self.layers]
            made = made + torch.cat(parts, dim=-1)
        return made

    def multiply(self, x: Tensor | QuantizedRows, dtype: torch.dtype) -> Tensor:
        """Multiply without derivatives; return (batch, tokens, width out)."""
        return self.format.linear(x, self.weight, self.scale, self.bias, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ARG002 - torch's signature
        """Apply `.to()`: the device applies to all buffers, the dtype to bias and results."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        self.dtype = like.dtype
        self.weight, self.scale = self.weight.to(like.device), self.scale.to(like.device)
        self.bias = None if self.bias is None else self.bias.to(like)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the weight as plain bytes: torch 2.13 cannot unpickle float8."""
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state["_buffers"] = {**state["_buffers"], "weight": self.weight.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight = self.weight.view(self.format.dtype)


def _unless_dropped(weight: Tensor) -> Tensor | None:
    """Return a weight, or None for a dropped one, which has no derivative."""
    return None if isinstance(weight, DroppedWeight) else weight


class _WithGradients(torch.autograd.Function):
    """The product with straight-through derivatives: rounding counts as the identity.

    The derivatives by the input use the rounded weight, so no full-precision weight is stored.
    """

    @staticmethod
    def forward(product: QuantizedProduct, dtype: torch.dtype, x: Tensor, *_: Any) -> Tensor:
        """Multiply (batch, tokens, width). The layers' weights follow, then the biases.

        The parameters are arguments only so that autograd asks for their derivatives.
        """
        return product.multiply(x.detach(), dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Save what the derivatives need."""
        product, _, x, *parameters = inputs
        ctx.product, ctx.like = product, [p is not None and (p.device, p.dtype) for p in parameters]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of the input, the weights and the biases."""
        (grad,), product = grads, ctx.product
        (x,) = ctx.saved_tensors
        by_layer = grad.split(product.widths, dim=-1)
        with_bias = [
            g
            for g, linear in zip(by_layer, product.linears, strict=True)
            if linear.bias is not None
        ]
        parts = zip(ctx.like, (*by_layer, *with_bias), strict=True)
        parameter_grads: list[Tensor | None] = []
        for index, (like, part) in enumerate(parts):
            if not ctx.needs_input_grad[3 + index]:
                parameter_grads.append(None)
                continue
            rows = part.flatten(0, -2)
            is_weight = index < len(product.widths)
            full = rows.t() @ x.flatten(0, -2).to(rows) if is_weight else rows.sum(0)
            parameter_grads.append(full.to(*like))
        input_grad = grad @ product.dequantized(grad) if ctx.needs_input_grad[2] else None
        return None, None, input_grad, *parameter_grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the result's tangent, from the tangents of input, weights and biases."""
        product, (_, _, of_x, *of_parameters) = ctx.product, tangents
        (x,) = ctx.saved_tensors
        made = x.new_zeros(*x.shape[:-1], sum(product.widths))
        if of_x is not None:
            made = made + of_x @ product.dequantized(of_x).t()
        of_biases = iter(of_parameters[len(product.linears) :])
        parts = []
        for linear, of_weight in zip(product.linears, of_parameters, strict=False):
            of_bias = None if linear.bias is None else next(of_biases)
            part = x.new_zeros(*x.shape[:-1], len(linear.weight))
            part = part if of_weight is None else part + x @ of_weight.to(x).t()
            parts.append(part if of_bias is None else part + of_bias.to(x))
        return (made + torch.cat(parts, dim=-1)).to(product.dtype)


class QuantizedLinear(StandIn, nn.Linear):
    """A linear layer that calls a `QuantizedProduct`; its weight is in host memory or dropped."""

    of_ours = ("product",)
    product: QuantizedProduct

    @property
    def takes_float8(self) -> bool:
        """Whether the input may be in float8 already."""
        return self.product.takes_float8

    @override
    def forward(self, input: Tensor | QuantizedRows) -> Tensor:
        """Multiply (batch, tokens, width), which may be quantized already."""
        out: Tensor = self.product(input)
        return out


@cache
def _quantized_class(plain: type) -> type:
    """Return `QuantizedLinear`, or for the layer of an eight-bit checkpoint both classes in one."""
    if plain is nn.Linear:
        return QuantizedLinear
    return type(QuantizedLinear.__name__, (QuantizedLinear, plain), {})


@dataclass(eq=False)
class _WeightWatch(Folder):
    """Checks the layers before each generation, since the user may change them at any time.

    Attributes:
        tx: the transaction of the pass.
        fused: the fused products: (attention, name of the attribute, product).
        places: the quantized layers: (owner, name of the attribute, layer).
        stacked: the layers that a fused product computes.
        products: all products.
        host: keeps the original weights.
        off: PEFT's layers around quantized ones.
        owner: the pass's class, for messages.
        drop: whether to free the original weights.
    """

    tx: Transaction
    fused: list[tuple[object, str, nn.Module]]
    places: list[tuple[nn.Module, str, nn.Linear]]
    stacked: list[nn.Linear]
    products: list[QuantizedProduct]
    host: HostWeights
    off: AdaptersOff
    owner: str
    drop: bool
    ignored = ("product",)

    def __post_init__(self) -> None:
        self.take(self._current_layers())
        if not self._adapted():  # else the first generation quantizes with the adapters
            self.accept()

    @override
    def prepare(self) -> None:
        """Quantize changed weights again; with `originals="drop"`, free the original ones.

        Raises:
            FluxfireError: a layer was replaced, or got an adapter that cannot be folded; or a fused
                layer got a hook, for example from layer-by-layer offloading, which nothing would
                call.
        """
        self._refuse_replaced_or_hooked_layers()
        self.host.prepare()
        self.take(self._current_layers())
        self.fold_if_changed()
        if self.drop:
            self._drop_originals()

    @override
    def fold(self, layers: Sequence[nn.Module], scale: float) -> None:
        """Quantize the weights with the adapters."""
        by_linear = {base_of(layer): layer for layer in layers}
        for product in self.products:
            _quantize_again(product, [by_linear[one] for one in product.linears], scale)
        self.off.switch_off(self._adapted())

    def _current_layers(self) -> list[nn.Module]:
        """Return what stands in each layer's place now: the layer itself, or PEFT's around it."""
        found: dict[nn.Linear, Any] = {}
        for owner, name, layer in self.places:
            now = modules.child(owner, name)
            if found.setdefault(layer, now) is not now:
                raise FluxfireError(
                    f"{self._path(owner)}.{name} stands in two places of the transformer, and has "
                    f"an adapter in one of them alone; give both the adapter, or leave "
                    f"{self.owner} out"
                )
        return list(found.values())

    def _adapted(self) -> list[nn.Module]:
        return [layer for layer in self.layers if modules.has_adapter(layer)]

    def _refuse_replaced_or_hooked_layers(self) -> None:
        for owner, name, layer in (*self.fused, *self.places):
            now = modules.child(owner, name)
            if now is layer:
                continue
            why = (
                f"was replaced after {self.owner} quantized it (by another layer, or by a fused "
                f"one?)"
            )
            if now is not None and modules.has_adapter(now) and base_of(now) is layer:
                reason = self._why_not_foldable(now)
                if reason is None:
                    continue
                why = f"has an adapter that {self.owner}'s weights cannot hold: {reason}"
            raise FluxfireError(
                f"{self._path(owner)}.{name} {why}; "
                + (_TAKE_BACK if self._is_dropped() else _APPLY_AGAIN)
            )
        for linear in self.stacked:
            if modules.is_hooked(linear):
                raise FluxfireError(
                    f"{self._path(linear)} has a hook that came after {self.owner} (offloading was "
                    f"enabled?), and the fused product would not call that hook; "
                    + (_TAKE_BACK if self._is_dropped() else f"take it off, or {_APPLY_AGAIN}")
                )

    def _why_not_foldable(self, layer: nn.Module) -> str | None:
        if self.drop:
            return "originals='drop' lets go of the weight that a LoRA adds to"
        return why_not_foldable(layer)

    def _is_dropped(self) -> bool:
        linears = (linear for product in self.products for linear in product.linears)
        return any(isinstance(linear.weight, DroppedWeight) for linear in linears)

    def _path(self, module: object) -> str:
        """Return a module's path in the transformer; its class, if it is there no more."""
        transformer: Any = self.tx.pipe.transformer
        paths = (str(path) for path, one in transformer.named_modules() if one is module)
        return next(paths, own_class(module).__name__)

    def _drop_originals(self) -> None:
        linears = [linear for product in self.products for linear in product.linears]
        if not all(isinstance(linear.weight, nn.Parameter) for linear in linears):
            return  # `torch.func.functional_call` lends the layers other weights, for this call
        if any(not isinstance(linear.weight, DroppedWeight) for linear in linears):
            self.tx.mark_irreversible(
                f"{self.owner}(originals='drop') let go of the original weights"
            )
            self.host.drop()
            self.accept()  # the drop itself needs no new quantization


def _quantize_again(product: QuantizedProduct, layers: Sequence[nn.Module], scale: float) -> None:
    """Quantize a product's weights again. If they were dropped, only the biases can have changed.

    Args:
        product: the product.
        layers: what stands in the place of each of its layers: the layer, or PEFT's around it.
        scale: a factor for all adapters.

    Raises:
        FluxfireError: some weights were dropped and others were not, or belong to another layer; or
            offloading has taken the weights away.
    """
    weights = [linear.weight for linear in product.linears]
    stored = any(isinstance(linear, StoredLinear) for linear in product.linears)
    if stored or not any(isinstance(weight, DroppedWeight) for weight in weights):
        if not stored and any(weight.is_meta for weight in weights) and not product.weight.is_meta:
            raise FluxfireError(MOVED_ELSEWHERE)
        product.quantize(product.weight.device, layers, scale)
        return
    own = (isinstance(x.weight, DroppedWeight) and x.weight.layer() is x for x in product.linears)
    if product.weight.is_meta or not all(own):
        raise FluxfireError(
            "some of the weights that originals='drop' let go of were loaded again, and "
            "others that share a product with them were not; load all weights of the transformer"
        )
    product.copy_biases(product.weight.device)


def _stackable(
    model: Model, attention: AttentionModule, plain: set[nn.Linear]
) -> list[tuple[str, list[nn.Linear]]] | None:
    """Return the projections to fuse, for the image and for the text.

    Returns:
        (name of the fused product, layers) for each group. None if a layer is not plain, since
        diffusers calls either all fused products or none.
    """
    groups: list[tuple[str, list[nn.Linear]]] = []
    for stack, names in model.projections(attention):
        parts: list[Any] = [base_of(getattr(attention, name)) for name in names]
        groups.append((stack, parts))
    return groups if all(plain.issuperset(parts) for _, parts in groups) else None


def _linears(
    model: Model, transformer: Transformer, *, below_adapters: bool
) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield the plain linear layers to quantize: (owner, name of the attribute, layer).

    Args:
        model: the architecture.
        transformer: the transformer.
        below_adapters: whether to yield the layer below a LoRA that can be folded.
    """
    for block in model.blocks(transformer):
        for owner, name in model.linears(block):
            linear: Any = getattr(owner, name)
            if below_adapters and modules.has_adapter(linear) and why_not_foldable(linear) is None:
                linear = base_of(linear)
            if type(linear) in (nn.Linear, StoredLinear) and not modules.is_hooked(linear):
                yield owner, name, linear
