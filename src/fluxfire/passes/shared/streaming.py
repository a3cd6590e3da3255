"""Linear layers whose weights may lie in host memory: each call copies them to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fluxfire import modules
from fluxfire.edits.stand_in import StandIn
from fluxfire.weights import StoredLinear, beside

OWNER = "_fluxfire_places"
"""The attribute of a model whose weights a pass places or stores: a weak reference to the pipeline
that carries the pass."""


def is_owned_by_another(model: nn.Module, pipe: object) -> bool:
    """Whether a pass on another living pipeline decides where a model's weights lie."""
    owner = vars(model).get(OWNER, lambda: None)()
    return owner is not None and owner is not pipe


class Streaming(StandIn):
    """A layer that works wherever its large tensors lie.

    `Placement` decides where they lie, and moves them with `place`.
    """

    def streamed(self) -> Sequence[Tensor]:
        """Return the tensors that a call copies to the input's device if they lie elsewhere."""
        raise NotImplementedError


class StreamedLinear(Streaming, nn.Linear):
    """A linear layer that copies its weight to the input's device for each call."""

    @override
    def streamed(self) -> Sequence[Tensor]:
        return (self.weight,)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., width). The result's bits are those of a layer on the input's device."""
        return functional.linear(input, beside(self.weight, input), self.bias)


def streamed(layer: nn.Module) -> Sequence[Tensor]:
    """Return the tensors that a layer copies to its input's device; none of a plain layer."""
    return layer.streamed() if isinstance(layer, Streaming | StoredLinear) else ()


def place(tensor: Tensor, device: torch.device, *, pin: bool = False) -> None:
    """Move a tensor's data in place, so that everybody who holds the tensor still does.

    Args:
        tensor: a parameter or a buffer.
        device: where to.
        pin: pin it if it lies in host memory. A GPU copies from pinned memory about three times as
            fast. torch rounds each pinned tensor up to a power of two bytes.
    """
    with modules.matching_inference_mode(tensor), torch.no_grad():
        data = tensor.data if tensor.device == device else tensor.data.to(device)
        if pin and data.is_cpu and not data.is_pinned():
            data = data.pin_memory()
        tensor.data = data
