"""FoldedLora: a LoRA computed once into the weights, not again in every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import own_class
from fluxfire.model import Model
from fluxfire.passes.shared.adapters import (
    AdaptersOff,
    FoldedAdapter,
    FoldedLinear,
    base_of,
    folded_weight,
    move_adapters_to_weights,
    why_not_foldable,
)
from fluxfire.passes.shared.folding import Folder
from fluxfire.passes.shared.fused_projection import FusedAttention
from fluxfire.passes.shared.host_weights import HostWeights
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Structure
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of

_MOVED = modules.SWAPPED | {"model-offload"}


@dataclass(frozen=True)
class FoldedLora:
    """Computes with `weight + scaling · B · A`, where PEFT adds `scaling · B · (A · x)` each time.

    A LoRA costs two small products and three passes over the activations in each layer. It also
    hides the plain layer from the kernels of `FusedBlocks`. This pass adds the LoRA to the weights
    once, in float32, and rounds the sum to the weights' dtype. The steps are then as fast as
    without a LoRA.

    PEFT's layers stay where they are, with the original weights. Call `load_lora_weights`,
    `set_adapters`, `disable_lora`, `fuse_lora`, `unload_lora_weights`, or pass
    `joint_attention_kwargs={"scale": 0.8}`, before `optimize` or at any time later. The next
    generation folds again; if a step callback made the change, the next step does.
    `save_pretrained` writes the original weights, and `restore` gives them back bit for bit.

    On a GPU the folded weights take the place of the originals. The originals and the adapters wait
    in pinned host memory, where torch rounds each block of memory up to a power of two.

    The pass folds LoRAs on the blocks' projections, outputs and MLPs. PEFT still computes:

    - adapters on modulations, embeddings and text encoders
    - DoRA, LoKr and other kinds, and a LoRA with biases
    - layers with hooks
    - all adapters while offloading moves the weights
    - with `QKVFusion`, the LoRA of the projections and of `to_add_out`
    - layers that `Float8` quantizes: it folds the LoRA into its own weights

    The report counts what is folded and what is left to PEFT.

    Gradients reach the adapters. To train them on a GPU, apply the pass before the optimizer's
    first step: it moves the adapters, and an optimizer's state does not follow.

    A folded weight is rounded once more than a plain one, as after `fuse_lora`. For many adapters
    that change with every request, folding may cost more than it saves.

    Measured on an H100, rank 16 (docs, "Use LoRA, offloading and IP-Adapter"): a step of
    `faithful` 277 → 284 ms, and 320 without this pass. The first edit with another LoRA takes 1.6 s
    longer, and compiles nothing.

    Several LoRAs at once, and other sizes of pictures: Not measured yet.
    """

    name: ClassVar[str] = "folded-lora"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "close"

    def check(self, target: Target) -> Iterator[Finding]:
        """Say where the pass will fold nothing."""
        if moved := target.traits & _MOVED:
            kinds = ", ".join(sorted(moved))
            yield Finding("info", f"no LoRA is folded while offloading moves weights ({kinds})")

    def apply(self, tx: Transaction) -> Change:
        """Fold before each generation, when all passes are in place."""
        transformer: Any = tx.pipe.transformer
        folds = _Folds(HostWeights.of(tx))
        tx.on_undo(folds.unfold)
        folder = _Folder(transformer, model_of(tx.pipe), folds)
        tx.listen(folder)
        tx.report_facts(folder.facts)
        return Change(len(list(folder.places())), "layers ready for a LoRA")


@dataclass(eq=False)
class _Folds:
    """The folded layers, and how to give them back.

    Attributes:
        host: keeps the original weights.
        off: PEFT's layers above the folded ones.
        bases: the folded layers.
    """

    host: HostWeights
    off: AdaptersOff = field(default_factory=AdaptersOff)
    bases: list[nn.Linear] = field(default_factory=list)

    def fold(self, layers: Sequence[nn.Module], scale: float) -> None:
        """Fold these layers of PEFT's, and give all others back."""
        self.keep(layers)
        wanted: list[Any] = [base_of(layer) for layer in layers]
        self.bases = wanted  # first, so that an interrupt leaves none unknown
        for layer, base in zip(layers, wanted, strict=True):
            self._fold(layer, base, scale)
        self.off.switch_off(layers)
        move_adapters_to_weights(self.host.model)

    def _fold(self, layer: nn.Module, base: Any, scale: float) -> None:
        weight = base.weight
        device = weight.device if base.bias is None else base.bias.device
        if base.bias is None and isinstance(base, FoldedLinear):
            device = base.folded.device
        with modules.matching_inference_mode(weight), torch.no_grad():
            made = folded_weight(layer, scale, device).to(weight.dtype)
            if not isinstance(base, FoldedLinear):
                same = made.data_ptr() == weight.data_ptr()
                base.folded = made.clone() if same else made
                base.__class__ = FoldedLinear
            elif base.folded.dtype == made.dtype and base.folded.device == made.device:
                base.folded.copy_(made)  # at the same address, which a compiled graph may keep
            else:
                base.folded = made
        if all(one is not base for one in self.host.linears):
            self.host.offload(base)

    def keep(self, layers: Sequence[nn.Module]) -> None:
        """Give the layers back that are below none of these layers of PEFT's."""
        wanted = {id(base_of(layer)) for layer in layers}
        for base in [base for base in self.bases if id(base) not in wanted]:
            self._unfold(base)
        self.bases = [base for base in self.bases if id(base) in wanted]

    def _unfold(self, base: nn.Linear) -> None:
        if isinstance(base, FoldedLinear):
            base.__class__ = own_class(base)
        vars(base).pop("folded", None)
        # `torch.func.functional_call` lends a weight for one call; the own one is still away.
        if isinstance(base._parameters.get("weight"), nn.Parameter):  # noqa: SLF001 - no property
            self.host.release(base)

    def unfold(self) -> None:
        """Give all layers their own class and weights back."""
        for base in self.bases:
            self._unfold(base)
        self.bases = []
        self.off.switch_on()


class _Folder(Folder):
    """Folds before each generation what somebody loaded, changed or took off since the last."""

    ignored = ("folded",)

    def __init__(self, transformer: Any, model: Model, folds: _Folds) -> None:
        self._transformer, self._model, self._folds = transformer, model, folds
        self._structure = Structure([transformer])
        self._left = 0

    def places(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield the owner and the layer of everything that the pass can fold, each layer once."""
        seen: set[int] = set()
        for block in self._model.blocks(self._transformer):
            for owner, name in self._model.linears(block):
                layer = getattr(owner, name)
                if id(layer) not in seen:
                    seen.add(id(layer))
                    yield owner, layer

    @override
    def prepare(self) -> None:
        """Fold where the adapters, the weights below or the layers have changed."""
        restructured = self._structure.changed()
        if restructured:
            layers, self._left = self._find()
            self.take(layers)
            self._folds.keep(layers)
        self._folds.host.prepare()  # after that, since offloading may have taken weights away
        self.fold_if_changed()
        if restructured:
            self._structure.changed()  # folding changes classes
            self._structure.accept()

    @override
    def fold(self, layers: Sequence[nn.Module], scale: float) -> None:
        """Fold into the weights of the layers below."""
        self._folds.fold(layers, scale)

    def facts(self) -> dict[str, object]:
        """Report how many adapters are folded, and how many PEFT computes."""
        return {"folded": len(self.layers), "left to PEFT": self._left}

    def _find(self) -> tuple[list[nn.Module], int]:
        """Return the layers to fold, and the number of other layers with an adapter."""
        parts = modules.submodules(self._transformer)
        adapted = sum(map(modules.has_adapter, dict.fromkeys(parts)))
        traits = {trait for part in parts for trait in modules.module_traits(part)}
        if not adapted or traits & _MOVED:
            return [], adapted
        # A layer below an adapter may stand elsewhere too, without the adapter.
        times = Counter(map(id, parts))
        found = [
            layer
            for owner, layer in self.places()
            if self._is_mine(owner, layer) and times[id(layer)] == times[id(base_of(layer))]
        ]
        return found, adapted - len(found)

    def _is_mine(self, owner: nn.Module, layer: nn.Module) -> bool:
        """Whether a layer has a LoRA that this pass can fold, and no other pass computes it."""
        if not modules.has_adapter(layer) or why_not_foldable(layer) is not None:
            return False
        if isinstance(layer, FoldedAdapter):
            return any(layer is one for one in self._folds.off.layers)
        return type(base_of(layer)) in (nn.Linear, FoldedLinear) and not isinstance(
            owner, FusedAttention
        )
