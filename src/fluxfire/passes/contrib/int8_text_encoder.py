"""Int8TextEncoder: T5's weights in int8."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import own_class
from fluxfire.errors import FluxfireError
from fluxfire.kernels.int8 import int8_weight_linear, quantize_int8
from fluxfire.passes.shared.host_weights import HostWeights, computing_device
from fluxfire.passes.shared.streaming import OWNER, Streaming, is_owned_by_another
from fluxfire.protocol import Change, Exactness, Finding, Stage, Target
from fluxfire.runtime.freshness import Watch
from fluxfire.runtime.generation import Listener
from fluxfire.runtime.transaction import Transaction
from fluxfire.supported import model_of
from fluxfire.weights import StoredLinear, StoredWeight


@dataclass(frozen=True, kw_only=True)
class Int8TextEncoder:
    """Keeps the linear layers of T5 in int8: 4.6 GiB in place of 9.1.

    A weight has one scale for each output channel. Each call casts the weight to the plain dtype
    and multiplies in that, so activations are not rounded, and every GPU can do it. It saves
    memory, not time. CLIP takes 0.2 GiB and stays as it is.

    The original weights stay in host memory; `restore` brings them back bit for bit. If they
    change, the pass quantizes them again before the next generation.

    Not measured yet.
    """

    name: ClassVar[str] = "int8-text-encoder"
    stage: ClassVar[Stage] = "weights"
    slot: ClassVar[str | None] = "text-quantization"
    exactness: ClassVar[Exactness] = "lossy"

    def check(self, target: Target) -> Iterator[Finding]:
        """Refuse an encoder that is quantized or moved by something else."""
        encoder = _largest(target.pipe)
        if encoder is None:
            yield Finding("info", "the pipeline has no text encoder")
            return
        if is_owned_by_another(encoder, target.pipe):
            yield Finding(
                "error",
                "a pass on another pipeline that shares the text encoder decides where it lies",
                "restore that pipeline first",
            )
        if modules.is_moved(encoder):
            yield Finding(
                "error",
                "offloading moves the text encoder's weights",
                "use Placement() in place of offloading",
            )
        if any(isinstance(part, StoredLinear) for part in encoder.modules()):
            yield Finding("info", "the checkpoint has the text encoder in int8 already")
        elif any(map(modules.is_quantized, encoder.parameters())):
            yield Finding("error", "the text encoder is quantized already", "leave it out")
        if any(map(modules.has_adapter, encoder.modules())):
            yield Finding("info", "layers of the text encoder with an adapter are not quantized")

    def apply(self, tx: Transaction) -> Change:
        """Quantize layer by layer, so that at most one layer is in memory twice."""
        encoder = _largest(tx.pipe)
        linears = [] if encoder is None else list(dict.fromkeys(_linears(encoder)))
        if encoder is None or not linears:
            return Change(0, "linear layers of T5 in int8")
        tx.setattr(encoder, OWNER, weakref.ref(tx.pipe))
        host = HostWeights.of(tx, encoder)
        freed = 0
        for linear in linears:
            tx.setattr(linear, "stored", _store(linear, computing_device(linear, encoder)))
            tx.set_class(linear, _StoredLinear)
            freed += host.offload(linear)
        tx.listen(_Watch(host, linears))
        gained = sum(linear.stored.nbytes for linear in linears)
        return Change(len(linears), "linear layers of T5 in int8", gained - freed, freed)


def _largest(pipe: Any) -> nn.Module | None:
    """Return the text encoder with the most parameters."""
    encoders = model_of(pipe).text_encoders(pipe)
    return max(encoders, key=lambda e: sum(p.numel() for p in e.parameters()), default=None)


def _linears(encoder: nn.Module) -> Iterator[Any]:
    """Yield plain linear layers, also those that `Placement` streams; none below an adapter."""
    adapted = {
        id(part) for m in encoder.modules() if modules.has_adapter(m) for part in m.modules()
    }
    for module in encoder.modules():
        plain = own_class(module) is nn.Linear and not modules.is_hooked(module)
        if plain and id(module) not in adapted:
            yield module


def _store(linear: nn.Linear, device: torch.device) -> StoredWeight:
    """Quantize a layer's weight on a device, and keep the result beside the weight.

    If `Placement` left the weight in host memory, the result waits there for its place, too.
    """
    weight = linear.weight
    with modules.matching_inference_mode(weight), torch.no_grad():
        data, scale = quantize_int8(weight.detach().to(device))
        return StoredWeight(data.to(weight.device), scale.to(weight.device))


class _StoredLinear(Streaming, nn.Linear):
    """A linear layer that multiplies by its weight in int8, wherever that lies."""

    of_ours = ("stored",)
    stored: StoredWeight

    @override
    def streamed(self) -> Sequence[Tensor]:
        return (self.stored.data, self.stored.scale)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., width)."""
        return int8_weight_linear(input, *self.stored.tensors(input), self.bias)


class _Watch(Listener):
    """Quantizes again before a generation if the original weights have changed."""

    def __init__(self, host: HostWeights, linears: list[Any]) -> None:
        self.host, self._linears = host, linears
        self._watch = Watch(linears, apart_from=("stored",))

    @override
    def prepare(self) -> None:
        """Quantize changed weights again.

        Raises:
            FluxfireError: a layer was replaced, or something else moves the weights.
        """
        if any(own_class(linear) is not nn.Linear for linear in self._linears) or any(
            linear.weight.is_meta for linear in self._linears
        ):
            raise FluxfireError(
                "layers of the text encoder were changed or offloaded after Int8TextEncoder "
                "quantized them; call restore(pipe), then optimize(pipe, …) with the same passes"
            )
        self.host.prepare()
        if self._watch.changed():
            for linear in self._linears:
                device = computing_device(linear, self.host.model)
                linear.stored.quantize(linear.weight, device)
            self._watch.accept()
