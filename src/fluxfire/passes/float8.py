"""Float8: the blocks' matrix products in eight bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import kontext
from fluxfire.errors import FluxfireError
from fluxfire.generation import Listener
from fluxfire.kernels.float8 import FLOAT8, Rows, float8_linear, float8_rows, quantised_weight
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.toolkit.host_weights import HostWeights
from fluxfire.transaction import Transaction

Originals = Literal["host", "drop"]
_ORIGINALS = ("host", "drop")
_CAPABLE = (8, 9)


@dataclass(frozen=True)
class Float8:
    """Multiplies in float8 (e4m3) what the blocks multiply: projections, outputs and MLPs.

    Weights are scaled by output channel, once; what is multiplied with them by token, as it
    comes. Query, key and value are one product. What is small or sensitive stays as it is: all
    outside the blocks (embeddings, output), the modulations, norms and attention itself. Behind
    `FusedBlocks` the kernels that make a product's input also quantise it.

    Measured on an H100 (docs, "Passes"): a step of `faithful` 274 → 200 ms, and the edit's peak of
    memory 33.5 → 25.5 GiB. Beside torchao's float8, and with `Attention("fa3-fp8")`: docs, "To the
    floor".

    Others report LPIPS 0.02 to 0.09 for eight bits on FLUX.1-dev and FLUX.2, beside 0.123 for plain
    with about 16 of 28 steps of Kontext (docs, "What others measured on the real model"). Nobody
    published this kind of rounding on Kontext, and we measured none, so no preset holds it. On
    Spark plain with 21 steps, which take as long on an H100, keeps 6 dB more.

    Needs compute capability 8.9 (H100, RTX 40) or higher on a GPU.

    A layer that carries a LoRA or a hook keeps its weights. A LoRA loaded afterwards is refused by
    name at the next generation, and so is a hook that the stacked products would not call. On a
    CPU the arithmetic is emulated, for quality's sake, and slow.

    Attributes:
        originals: `"host"` keeps the original weights in host memory, for `restore` to bring back
            bit for bit and for `save_pretrained`; `"drop"` lets go of them, and `restore` refuses.

    Raises:
        ValueError: `originals` is neither.
    """

    originals: Originals = "host"
    _: KW_ONLY

    name: ClassVar[str] = "float8"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = "quantisation"
    exactness: ClassVar[Exactness] = "lossy"
    provides: ClassVar[frozenset[str]] = frozenset({"quantised"})

    def __post_init__(self) -> None:
        if self.originals not in _ORIGINALS:
            raise ValueError(
                f"originals={self.originals!r}; it must be one of {', '.join(_ORIGINALS)}"
            )

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse devices without float8, and weights that are fused, moved or quantised."""
        transformer, environment = target.pipe.transformer, target.environment
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
            ("quantised", "the weights are quantised already", "use one quantisation"),
        ):
            if trait in target.traits:
                yield Finding("error", why, remedy, trait=trait)
        if moved := target.traits & (kontext.SWAPPED | {"model-offload"}):
            yield Finding(
                "error",
                f"the weights are moved while the pipeline runs ({', '.join(sorted(moved))})",
                "float8 halves them: take the offloading off",
            )
        if "lora" in target.traits:
            yield Finding("info", "layers that carry a LoRA keep their weights")
        widths = {n for *_, linear in _linears(transformer) for n in linear.weight.shape}
        if odd := sorted(n for n in widths if n % 16):
            yield Finding("error", f"widths must be multiples of 16, and there are {odd}")

    def apply(self, tx: Transaction) -> Change:
        """Quantise layer by layer, so that no more than one is there twice."""
        transformer = tx.pipe.transformer
        host = HostWeights()
        tx.on_undo(host.bring_back)
        layers = list(_linears(transformer))
        plain = {linear for *_, linear in layers}
        stacked: list[tuple[str, Any]] = []
        gained = freed = 0
        for attention in kontext.attentions(transformer):
            if (groups := _stackable(attention, plain)) is None:
                continue
            for stack, names, parts in groups:
                product = Float8Product(parts)
                stacked += zip(names, parts, strict=True)
                tx.setattr(attention, stack, product)
                gained += product.nbytes
                freed += sum(map(host.take, parts))
            tx.setattr(attention, "fused_projections", True)
        alone = plain - {linear for _, linear in stacked}
        for linear in (linear for *_, linear in layers if linear in alone):
            product = Float8Product([linear])
            tx.set_class(linear, Float8Linear)
            tx.setattr(linear, "product", product)
            gained += product.nbytes
            freed += host.take(linear)
        tx.listen(_Watch(tx, layers, stacked, host, drop=self.originals == "drop"))
        tx.listen(host)
        return Change(len(layers), "linear layers in float8", gained - freed, host_bytes=freed)


class Float8Product(nn.Module):
    """A product with the weights of one layer, or of several whose outputs stand side by side.

    Attributes:
        weight: (width out, width), float8.
        scale: (width out, 1), float32.
        bias: (width out,), or None.
    """

    takes_float8 = True
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        with kontext.as_made(linears[0].weight):
            made = [quantised_weight(linear.weight.detach()) for linear in linears]
            biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
            self.register_buffer("weight", torch.cat([w for w, _ in made]), persistent=False)
            self.register_buffer("scale", torch.cat([s for _, s in made]), persistent=False)
            bias = torch.cat(biases) if biases else None
            self.register_buffer("bias", bias, persistent=False)
        self.dtype = linears[0].weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor | Rows) -> Tensor:
        """Multiply (batch, tokens, width), quantised already or to be quantised."""
        rows = x if isinstance(x, Rows) else Rows(*float8_rows(x))
        return float8_linear(rows, self.weight, self.scale, self.bias, self.dtype)

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


class Float8Linear(nn.Linear):
    """A linear layer whose product is another's; its own weight waits in host memory."""

    takes_float8 = True
    product: Float8Product

    @override
    def forward(self, x: Tensor | Rows) -> Tensor:
        """Multiply (batch, tokens, width), quantised already or to be quantised."""
        out: Tensor = self.product(x)
        return out


class _Watch(Listener):
    """Looks at the layers before each generation, since anything may be done in between."""

    def __init__(
        self,
        tx: Transaction,
        layers: list[tuple[Any, str, Any]],
        stacked: list[tuple[str, Any]],
        host: HostWeights,
        *,
        drop: bool,
    ) -> None:
        self._tx, self._layers, self._stacked = tx, layers, stacked
        self._host, self._drop = host, drop

    @override
    def prepare(self) -> None:
        """Refuse layers put in the place of ours; let go of weights that are to be dropped.

        Raises:
            FluxfireError: a layer was replaced, as loading a LoRA does; or one that is not called
                has a hook, as offloading layer by layer puts it.
        """
        for owner, name, linear in self._layers:
            if getattr(owner, name) is not linear:
                raise FluxfireError(
                    f"{name} of {type(owner).__name__} was replaced after Float8 quantised it "
                    f"(a LoRA was loaded?); restore(pipe), load it, and optimize(pipe) again"
                )
        for name, linear in self._stacked:
            if kontext.is_hooked(linear):
                raise FluxfireError(
                    f"{name} has a hook that came after Float8 (offloading was enabled?), which "
                    f"its product with others would not call; take it off, or restore(pipe)"
                )
        if self._drop and self._host.linears:
            self._tx.mark_irreversible("Float8(originals='drop') let go of the original weights")
            self._host.drop()


def _stackable(
    attention: Any, plain: set[Any]
) -> list[tuple[str, tuple[str, ...], list[Any]]] | None:
    """Return the projections to stack: (name of the product, names, layers), text's beside image's.

    None unless all of them are plain: diffusers knows only of all fused, or none.
    """
    groups: list[tuple[str, tuple[str, ...], list[Any]]] = []
    for stack, names in (("to_qkv", kontext.QKV), ("to_added_qkv", kontext.ADDED_QKV)):
        parts = [getattr(attention, name, None) for name in names]
        if any(parts):
            groups.append((stack, names, parts))
    return groups if all(plain.issuperset(parts) for *_, parts in groups) else None


def _linears(transformer: Any) -> Iterator[tuple[Any, str, Any]]:
    """Iterate over the plain linear layers to quantise: (owner, its attribute's name, layer)."""
    block: Any
    for block in kontext.blocks(transformer):
        names = (*kontext.QKV, *kontext.ADDED_QKV, "to_add_out")
        places: list[tuple[Any, str]] = [(block.attn, name) for name in names]
        if getattr(block.attn, "to_out", None) is not None:
            places.append((block.attn.to_out, "0"))
        if hasattr(block, "ff"):
            places += [(mlp.net[0], "proj") for mlp in (block.ff, block.ff_context)]
            places += [(mlp.net, "2") for mlp in (block.ff, block.ff_context)]
        else:
            places += [(block, "proj_mlp"), (block, "proj_out")]
        for owner, name in places:
            linear = getattr(owner, name, None)
            if type(linear) is nn.Linear and not kontext.is_hooked(linear):
                yield owner, name, linear
