"""Float8: the blocks' matrix products in eight bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn, own_class
from fluxfire.errors import FluxfireError
from fluxfire.kernels.float8 import FLOAT8, Rows, float8_linear, float8_rows, quantized_weight
from fluxfire.model import Model
from fluxfire.passes.shared.fused_projection import put_products
from fluxfire.passes.shared.host_weights import Gone, HostWeights
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

Originals = Literal["host", "drop"]
_ORIGINALS = ("host", "drop")
_CAPABLE = (8, 9)


@dataclass(frozen=True)
class Float8:
    """Multiplies in float8 (e4m3) what the blocks multiply: projections, outputs and MLPs.

    Weights are scaled by output channel, once; what is multiplied with them by token, as it
    comes. Query, key and value are one product. What is small or sensitive stays as it is: all
    outside the blocks (embeddings, output), the modulations, norms and attention itself. Behind
    `FusedBlocks` the kernels that make a product's input also quantize it.

    Measured on an H100 (docs, "Passes"): a step of `faithful` 274 → 200 ms, and the edit's peak of
    memory 33.5 → 25.5 GiB. Beside torchao's float8, and with `Attention("fa3-fp8")`: docs, "To the
    floor".

    Others report LPIPS 0.02 to 0.09 for eight bits on FLUX.1-dev and FLUX.2, beside 0.123 for plain
    with about 16 of 28 steps of Kontext (docs, "What others measured on the real model"). Nobody
    published this kind of rounding on Kontext, and we measured none, so no preset holds it. On
    Spark plain with 21 steps, which take as long on an H100, keeps 6 dB more.

    Needs compute capability 8.9 (H100, RTX 40) or higher on a GPU.

    A layer that carries a LoRA or a hook keeps its weights. A LoRA loaded afterwards is refused by
    name at the next step, and so is a hook that the stacked products would not call. Weights that
    changed (a LoRA was fused, a state dict loaded) are quantized anew before the next step, also
    where a step callback changed them. Gradients pass through: those of the product without
    rounding. On a CPU the arithmetic is emulated, for quality's sake, and slow.

    Attributes:
        originals: `"host"` keeps the original weights in host memory, for `restore` to bring back
            bit for bit and for `save_pretrained`; `"drop"` lets go of them. Then `restore` refuses,
            and so does whatever else would need them: saving, copying, fusing a LoRA.

    Raises:
        ValueError: `originals` is neither.
    """

    originals: Originals = "host"
    _: KW_ONLY

    name: ClassVar[str] = "float8"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = "quantization"
    exactness: ClassVar[Exactness] = "lossy"
    provides: ClassVar[frozenset[Trait]] = frozenset({"quantized"})

    def __post_init__(self) -> None:
        if self.originals not in _ORIGINALS:
            raise ValueError(
                f"originals={self.originals!r}; it must be one of {', '.join(_ORIGINALS)}"
            )

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse devices without float8, and weights that are fused, moved or quantized."""
        transformer, environment = target.pipe.transformer, target.environment
        model = model_of(target.pipe)
        if transformer.device.type != "cuda":
            yield Finding("warning", "float8 is emulated without a GPU: slower, for quality's sake")
        elif environment.capability is not None and environment.capability < _CAPABLE:
            had = ".".join(map(str, environment.capability))
            yield Finding(
                "error",
                f"{environment.gpu} has compute capability {had}, and float8 products need 8.9",
                "leave Float8 out",
            )
        for trait, why, remedy in (
            (
                "fused-qkv",
                "the projections are fused already",
                "leave the fusion out: Float8 fuses",
            ),
            ("quantized", "the weights are quantized already", "use one quantization"),
        ):
            if trait in target.traits:
                yield Finding("error", why, remedy, trait=trait)
        if moved := target.traits & (modules.SWAPPED | {"model-offload"}):
            yield Finding(
                "error",
                f"the weights are moved while the pipeline runs ({', '.join(sorted(moved))})",
                "float8 halves them: take the offloading off",
            )
        if "lora" in target.traits:
            yield Finding("info", "layers that carry a LoRA keep their weights")
        widths = {n for *_, linear in _linears(model, transformer) for n in linear.weight.shape}
        if odd := sorted(n for n in widths if n % 16):
            yield Finding("error", f"widths must be multiples of 16, and there are {odd}")

    def apply(self, tx: Transaction) -> Change:
        """Quantize layer by layer, so that no more than one is there twice."""
        transformer, freed = tx.pipe.transformer, 0
        model = model_of(tx.pipe)
        host = HostWeights()
        tx.on_undo(host.bring_back)
        layers = list(_linears(model, transformer))
        plain = {linear for *_, linear in layers}
        products: list[Float8Product] = []
        stacked: list[tuple[str, Any]] = []
        places: list[tuple[Any, str, Any]] = []
        for attention in model.attentions(transformer):
            if (groups := _stackable(model, attention, plain)) is None:
                continue
            made: dict[str, nn.Module] = {}
            for stack, names, parts in groups:
                products.append(Float8Product(parts))
                made[stack] = products[-1]
                stacked += zip(names, parts, strict=True)
                places.append((attention, stack, products[-1]))
                freed += sum(map(host.take, parts))
            put_products(tx, attention, made)
        alone = plain - {linear for _, linear in stacked}
        for linear in (linear for *_, linear in layers if linear in alone):
            products.append(Float8Product([linear]))
            tx.setattr(linear, "product", products[-1])
            tx.set_class(linear, Float8Linear)
            freed += host.take(linear)
        places += layers
        watch = _Watch(tx, places, stacked, products, host, drop=self.originals == "drop")
        tx.listen(watch)
        tx.listen(host)
        gained = sum(product.nbytes for product in products)
        return Change(len(layers), "linear layers in float8", gained - freed, host_bytes=freed)


class Float8Product(nn.Module):
    """A product with the weights of one layer, or of several whose outputs stand side by side.

    Attributes:
        weight: (width out, width), float8.
        scale: (width out, 1), float32.
        bias: (width out,), or None.
        dtype: of its results.
        linears: the layers, outside the module tree.
    """

    takes_float8 = True
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        self.linears = tuple(linears)
        for name in ("weight", "scale", "bias"):
            self.register_buffer(name, None, persistent=False)
        self.quantize(linears[0].weight.device)

    def quantize(self, device: torch.device) -> None:
        """Quantize the layers' weights as they are now, on a device."""
        with modules.as_made(self.linears[0].weight):
            made = [quantized_weight(x.weight.detach().to(device)) for x in self.linears]
            self.weight = torch.cat([w for w, _ in made])
            self.scale = torch.cat([s for _, s in made])
        self.take_biases(device)
        self.dtype = self.linears[0].weight.dtype

    def take_biases(self, device: torch.device) -> None:
        """Take the layers' biases as they are now, to a device."""
        with modules.as_made(self.weight):
            biases = [x.bias.detach().to(device) for x in self.linears if x.bias is not None]
            self.bias = torch.cat(biases) if biases else None

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor | Rows) -> Tensor:
        """Multiply (batch, tokens, width), quantized already or to be quantized.

        With gradients on, they are those of the same product without rounding. Under autocast the
        result has autocast's dtype, as a linear layer's has.
        """
        if isinstance(x, Rows):
            return self.multiply(x, self.dtype)
        device, dtype = x.device.type, self.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return self._multiply_tensor(x.to(dtype), dtype)
        return self._multiply_tensor(x, dtype)

    def _multiply_tensor(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not torch.is_grad_enabled():
            return self.multiply(Rows(*float8_rows(x)), dtype)
        apply: Any = _WithGradients.apply
        made: Tensor = apply(
            self, dtype, x, *(layer.weight for layer in self.linears),
            *(layer.bias for layer in self.linears if layer.bias is not None),
        )  # fmt: skip
        return made

    def multiply(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Multiply quantized rows; return (batch, tokens, width out)."""
        return float8_linear(rows, self.weight, self.scale, self.bias, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ARG002 - torch's signature
        """Follow `.to()`: to a device as it is; a cast is one of the results."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        self.dtype = like.dtype
        self.weight, self.scale = self.weight.to(like.device), self.scale.to(like.device)
        self.bias = None if self.bias is None else self.bias.to(like)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Hand the weight on as plain bytes: torch 2.13 cannot unpickle float8."""
        state = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        state["_buffers"] = {**state["_buffers"], "weight": self.weight.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight = self.weight.view(FLOAT8)


class _WithGradients(torch.autograd.Function):
    """The float8 product, whose gradients pass through rounding as if there were none.

    The weight in eight bits is all that it needs for its input's gradient, so none in full is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, product: Float8Product, dtype: torch.dtype, x: Tensor, *of: Any
    ) -> Tensor:
        """Multiply (batch, tokens, width); `of` are the layers' weights, then their biases."""
        ctx.product, ctx.own = product, of
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None)
        return product.multiply(Rows(*float8_rows(x.detach())), dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of the input, the weights and the biases."""
        (grad,), product = grads, ctx.product
        weight = product.weight.to(grad.dtype) * product.scale.to(grad.dtype)
        widths = [layer.weight.shape[0] for layer in product.linears]
        (x,) = ctx.saved_tensors
        by_layer = grad.split(widths, dim=-1)
        with_bias = [
            g for g, of in zip(by_layer, product.linears, strict=True) if of.bias is not None
        ]
        made: list[Tensor | None] = []
        for index, (own, part) in enumerate(zip(ctx.own, (*by_layer, *with_bias), strict=True)):
            if not ctx.needs_input_grad[3 + index]:
                made.append(None)
                continue
            rows = part.flatten(0, -2)
            full = rows.t() @ x.flatten(0, -2).to(rows) if index < len(widths) else rows.sum(0)
            made.append(full.to(own))
        of_input = grad @ weight if ctx.needs_input_grad[2] else None
        return None, None, of_input, *made


class Float8Linear(StandIn, nn.Linear):
    """A linear layer whose product is another's; its own weight waits in host memory."""

    takes_float8 = True
    product: Float8Product

    @override
    def forward(self, input: Tensor | Rows) -> Tensor:
        """Multiply (batch, tokens, width), quantized already or to be quantized."""
        out: Tensor = self.product(input)
        return out


class _Watch(Listener):
    """Looks at the layers before each generation, since anything may be done in between."""

    def __init__(
        self,
        tx: Transaction,
        places: list[tuple[Any, str, Any]],
        stacked: list[tuple[str, Any]],
        products: list[Float8Product],
        host: HostWeights,
        *,
        drop: bool,
    ) -> None:
        self._tx, self._places, self._stacked = tx, places, stacked
        self._products, self._host, self._drop = products, host, drop
        self._watch = Watch(
            (x for product in products for x in product.linears), apart_from=("product",)
        )

    @override
    def prepare(self) -> None:
        """Quantize weights that changed; let go of those that are to be dropped.

        Raises:
            FluxfireError: a layer was replaced, as loading a LoRA does; or one that is not called
                has a hook, as offloading layer by layer puts it.
        """
        self._refuse_what_is_not_called()
        if self._watch.changed():
            for product in self._products:
                _quantize(product)
        if self._drop:
            self._let_go()

    def _refuse_what_is_not_called(self) -> None:
        for owner, name, layer in self._places:
            if getattr(owner, name, None) is not layer:
                raise FluxfireError(
                    f"{name} of {own_class(owner).__name__} was replaced after Float8 quantized it "
                    f"(a LoRA was loaded, or projections were fused?); restore(pipe), do that, and "
                    f"optimize(pipe) again"
                )
        for name, linear in self._stacked:
            if modules.is_hooked(linear):
                raise FluxfireError(
                    f"{name} has a hook that came after Float8 (offloading was enabled?), which "
                    f"its product with others would not call; take it off, or restore(pipe)"
                )

    def _let_go(self) -> None:
        with_numbers = [x for product in self._products for x in product.linears]
        if any(not isinstance(linear.weight, Gone) for linear in with_numbers):
            self._tx.mark_irreversible("Float8(originals='drop') let go of the original weights")
            self._host.drop()
            self._watch.changed()


def _quantize(product: Float8Product) -> None:
    """Quantize a product's weights anew; of weights that are gone, only biases can have changed.

    Raises:
        FluxfireError: some of them are gone, or are another layer's.
    """
    weights = [linear.weight for linear in product.linears]
    if not any(isinstance(weight, Gone) for weight in weights):
        product.quantize(product.weight.device)
        return
    own = (isinstance(x.weight, Gone) and x.weight.layer() is x for x in product.linears)
    if product.weight.is_meta or not all(own):
        raise FluxfireError(
            "some of the weights that Float8(originals='drop') let go of were loaded again, "
            "and others that share a product with them were not; load all of them"
        )
    product.take_biases(product.weight.device)


def _stackable(
    model: Model, attention: Any, plain: set[Any]
) -> list[tuple[str, tuple[str, ...], list[Any]]] | None:
    """Return the projections to stack: (name of the product, names, layers), text's beside image's.

    None unless all of them are plain: diffusers knows only of all fused, or none.
    """
    groups: list[tuple[str, tuple[str, ...], list[Any]]] = []
    for stack, names in model.projections(attention):
        groups.append((stack, names, [getattr(attention, name) for name in names]))
    return groups if all(plain.issuperset(parts) for *_, parts in groups) else None


def _linears(model: Model, transformer: Any) -> Iterator[tuple[Any, str, Any]]:
    """Iterate over the plain linear layers to quantize: (owner, its attribute's name, layer)."""
    for block in model.blocks(transformer):
        for owner, name in model.linears(block):
            linear = getattr(owner, name)
            if type(linear) is nn.Linear and not modules.is_hooked(linear):
                yield owner, name, linear
