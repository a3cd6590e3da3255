"""QKVFusion: one matrix product for query, key and value."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from torch import nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.diffusers_types import AttentionModule, Pipeline
from fluxfire.edits.stand_in import StandIn
from fluxfire.passes.shared.adapters import base_of
from fluxfire.passes.shared.fused_projection import install_products
from fluxfire.passes.shared.parameters import change_storage
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target, Trait
from fluxfire.runtime.freshness import Structure
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

_FUSED_COUNT = 3  # projections that share one storage


@dataclass(frozen=True, kw_only=True)
class QKVFusion:
    """Computes the query, key and value of each attention in one matrix product.

    diffusers' own `fuse_qkv_projections` keeps the separate weights in addition to the fused copy
    (4.0 GiB for FLUX in bf16), and a LoRA silently loses its effect. This pass makes the three
    parameters row views of the fused weight. Memory and state-dict keys stay the same, and
    `save_pretrained` works. Moving or casting the model copies the parameters one by one; then the
    pass fuses them again.

    Measured on an H100 (docs, "Passes"): no gain, a step of `faithful` 274 → 274 ms. Without
    compilation it is slower, since the strided slices cost more than the larger product saves. So
    it is in the preset `article` only.

    If a projection is not a plain `nn.Linear` (it has a LoRA or a hook, or offloading swaps its
    weight), the pass calls the three projections one by one. So their result is that of the plain
    pipeline, whether the LoRA or hook came before or after the pass. It does the same while
    gradients are on.

    Attributes:
        transformer: fuse the transformer's attentions.
        vae: fuse the VAE's attentions (one in the encoder, one in the decoder).

    Raises:
        ValueError: both are False, so that nothing is fused.
    """

    transformer: bool = True
    vae: bool = True

    name: ClassVar[str] = "qkv-fusion"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "close"

    def __post_init__(self) -> None:
        if not (self.transformer or self.vae):
            raise ValueError("QKVFusion(transformer=False, vae=False) has nothing to fuse")

    @property
    def provides(self) -> frozenset[Trait]:
        """The transformer's attentions are fused; nothing reads the fusion of the VAE's."""
        return frozenset({"fused-qkv"} if self.transformer else ())

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse weights that cannot become views, and attentions that are fused already."""
        if "fused-qkv" in target.traits:
            yield Finding(
                "error",
                "the projections are fused already, by fuse_qkv_projections()",
                "call unfuse_qkv_projections() first",
            )
        moved = target.traits & modules.SWAPPED
        if moved:
            yield Finding(
                "error",
                f"offloading swaps weights module by module while the pipeline runs "
                f"({', '.join(sorted(moved))}), which would separate the fused weights",
                "use enable_model_cpu_offload() or none",
            )
        model = model_of(target.pipe)
        for attention in self._attentions(target.pipe):
            for _, names in model.projections(attention):
                linears: list[Any] = [base_of(getattr(attention, n)) for n in names]
                if any(modules.is_quantized(linear.weight) for linear in linears):
                    yield Finding(
                        "error",
                        f"the weights of {', '.join(names)} are quantized "
                        f"({type(linears[0].weight.data).__name__}, {linears[0].weight.dtype})",
                        "put QKVFusion before quantization, or leave it out",
                    )
                    return
        # An earlier pass may keep the plain weights only to restore them, and use quantized ones.
        if self.transformer and "quantized" in target.traits - modules.traits(target.pipe):
            yield Finding(
                "error",
                "an earlier pass quantized the weights, and QKVFusion would fuse the plain weights",
                "leave QKVFusion out",
            )
        if "lora" in target.traits:
            yield Finding("info", "projections with a LoRA are not fused")

    def apply(self, tx: Transaction) -> Change:
        """Fuse the projections of every self-attention into one shared storage."""
        model = model_of(tx.pipe)
        fused: list[FusedProjection] = []
        for attention in self._attentions(tx.pipe):
            projections = [
                FusedProjection(attention, *group) for group in model.projections(attention)
            ]
            for projection in projections:
                tx.on_undo(projection.separate)
                if projection.fusible:
                    projection.share()
            if isinstance(attention, Attention):
                tx.setattr(attention, "to_qkv", projections[0])
                tx.set_class(attention.processor, FusedVaeProcessor)
            else:
                install_products(tx, attention, {p.attribute: p for p in projections})
            fused += projections
        tx.listen(_FusionUpdater(tx.pipe, fused))
        shared = sum(projection.shared for projection in fused)
        return Change(shared, "query-key-value triples fused, storage shared")

    def _attentions(self, pipe: Pipeline) -> Iterator[AttentionModule]:
        """Yield the attentions that can be fused."""
        from diffusers.models.attention import AttentionModuleMixin

        if self.transformer:
            for module in pipe.transformer.modules():
                if isinstance(module, AttentionModuleMixin) and hasattr(module, "to_q"):
                    yield module
        if self.vae and pipe.vae is not None:
            for module in pipe.vae.modules():
                if not isinstance(module, Attention) or module.is_cross_attention:
                    continue
                if type(module.processor) is AttnProcessor2_0:
                    yield module


class FusedProjection(nn.Module):
    """The fused layer that diffusers calls as `attn.to_qkv` or `attn.to_added_qkv`.

    It holds the fused weight and bias, and the attention that owns the projections. They are not
    registered as submodule, parameter or buffer: the module tree must not contain a cycle, and
    torch would move and save the fused weight a second time.

    Attributes:
        names: names of the projections in the attention.
        attribute: name of this layer in the attention.
        weight: (3 · inner width, width), or None while each projection has its own storage.
        bias: (3 · inner width,), or None.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self, attention: AttentionModule, attribute: str, names: tuple[str, str, str]
    ) -> None:
        super().__init__()
        self.names = names
        self.attribute = attribute
        self._attention = (attention,)
        self._looks = isinstance(attention, Attention)  # the VAE's; the transformer has 114
        self.weight = self.bias = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project (batch, tokens, width) to (batch, tokens, 3 · inner width)."""
        q, k, v = self._projections()
        plain = type(q) is type(k) is type(v) is nn.Linear
        # Another pipeline, or a user, may call the VAE without a generation that looks first.
        if self._looks and plain and not torch.compiler.is_compiling():
            plain = self.fusible and self.shared
        if self.weight is None or not plain or modules.computes_derivatives():
            return torch.cat([q(hidden_states), k(hidden_states), v(hidden_states)], dim=-1)
        return F.linear(hidden_states, self.weight, self.bias)

    @property
    def fusible(self) -> bool:
        """Whether all projections are plain linear layers, and the attention calls this layer."""
        called = modules.child(self._attention[0], self.attribute)
        projections = self._projections()
        if not (called is None or called is self) or not all(map(_is_plain, projections)):
            return False
        q, k, v = (modules.parameter(projection, "bias") is None for projection in projections)
        return q == k == v

    def share(self) -> None:
        """Copy the projections' weights into one storage, and make them views of it."""
        linears = self.linears
        with modules.matching_inference_mode(linears[0].weight), torch.no_grad():
            self.weight = torch.cat([m.weight for m in linears])
            has_bias = linears[0].bias is not None
            self.bias = torch.cat([m.bias for m in linears]) if has_bias else None
            for fused, parameters in self._parts(linears):
                for parameter, view in zip(parameters, fused.chunk(3), strict=True):
                    parameter.data = view

    @property
    def shared(self) -> bool:
        """Whether the weights of the projections still are views of the fused weight."""
        linears = self.linears
        for name, fused in (("weight", self.weight), ("bias", self.bias)):
            parts = [modules.parameter(linear, name) for linear in linears]
            if fused is None:
                if name == "weight" or any(part is not None for part in parts):
                    return False
                continue
            size, start = fused.nbytes // _FUSED_COUNT, fused.data_ptr()
            for index, part in enumerate(parts):
                if part is None or part.data_ptr() != start + index * size or part.nbytes != size:
                    return False
                if part.dtype is not fused.dtype or not part.is_contiguous():
                    return False
        return True

    def separate(self) -> None:
        """Give each projection its own storage again.

        Offloading stores the weights elsewhere. When offloading is removed, it puts slices of the
        shared storage back. So this checks each weight's storage, not `self.weight`.
        """
        for linear in self.linears:
            for name in ("weight", "bias"):
                change_storage(linear, name, _own_storage)
        self.weight = self.bias = None

    def _projections(self) -> list[nn.Module]:
        found: list[Any] = [modules.child(self._attention[0], name) for name in self.names]
        return found

    @property
    def linears(self) -> list[nn.Linear]:
        """The projections, below a PEFT adapter if there is one."""
        found: list[Any] = [base_of(projection) for projection in self._projections()]
        return found

    def _parts(self, linears: list[nn.Linear]) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        if self.weight is not None:
            yield self.weight, [m.weight for m in linears]
        if self.bias is not None:
            yield self.bias, [m.bias for m in linears]

    def _apply(self, *_: Any, **__: Any) -> Any:
        """Fuse again after `.to()`, which has just moved the projections (registered earlier)."""
        if self.weight is not None and not self.shared:
            self.share()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the shared storage; a copy calls its projections one by one."""
        return {**super().__getstate__(), "weight": None, "bias": None}  # type: ignore[no-untyped-call]


class FusedVaeProcessor(StandIn, AttnProcessor2_0):  # type: ignore[misc]
    """Attends like diffusers' processor, with the fused projection if there is one."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute attention.

        The arguments have diffusers' names, because `Attention.forward` passes on only arguments in
        this signature, and drops the others with a warning.
        """
        run: Any = super().__call__
        plain = encoder_hidden_states is not None
        if not plain and isinstance(getattr(attn, "to_qkv", None), FusedProjection):
            run = functools.partial(FusedAttnProcessor2_0.__call__, self)
        return run(  # type: ignore[no-any-return]
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
        )


class _FusionUpdater(Listener):
    """Fuses replaced weights again (a merged LoRA, a loaded state dict), before each generation."""

    def __init__(self, pipe: Pipeline, fused: list[FusedProjection]) -> None:
        self._pipe, self._fused = pipe, fused
        components = (component for _, component in modules.optimizable_components(pipe))
        self._structure = Structure(components)
        self._linears: list[nn.Linear] = []
        self._storages: list[object] = []

    @override
    def prepare(self) -> None:
        """Check every projection: separate it if it is not fusible, else fuse it."""
        if not self._structure.changed() and self._read_storages() == self._storages:
            return
        offloaded: set[nn.Module] = set()
        for _, component in modules.optimizable_components(self._pipe):
            # Block-wise offloading puts no hook on a projection.
            if modules.swapping_traits(component):
                offloaded.update(component.modules())
        for projection in self._fused:
            if projection in offloaded or not projection.fusible:
                projection.separate()
            elif not projection.shared:
                projection.share()
        self._linears = [linear for projection in self._fused for linear in projection.linears]
        self._storages = self._read_storages()
        self._structure.accept()

    def _read_storages(self) -> list[object]:
        """Read the weights' addresses, layouts and dtypes, which show whether storage is shared."""
        found = [p for m in self._linears for p in m.__dict__["_parameters"].values()]
        parameters = [p for p in found if type(p) is nn.Parameter]
        return [
            *map(torch.Tensor.data_ptr, parameters),
            *map(torch.Tensor.is_contiguous, parameters),
            *map(torch.Tensor.size, parameters),
            *[parameter.dtype for parameter in parameters],
        ]


def _own_storage(part: torch.Tensor) -> torch.Tensor:
    shares = part.untyped_storage().nbytes() == _FUSED_COUNT * part.nbytes
    return part.clone() if shares else part


def _is_plain(projection: nn.Module) -> bool:
    """Whether a projection is a plain linear layer: no hooks, weight present, not quantized."""
    if type(projection) is not nn.Linear or modules.is_hooked(projection):
        return False
    weight = modules.parameter(projection, "weight")
    return weight is not None and not weight.is_meta and not modules.is_quantized(weight)
