"""Weights that wait in host memory while something else computes in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from fluxfire import kontext
from fluxfire.errors import FluxfireError
from fluxfire.generation import Listener


@dataclass(eq=False)
class HostWeights(Listener):
    """Keeps the weights of some layers in host memory, pinned.

    The parameters stay where they are in the model: a state dict has them as ever. On a CPU there
    is nothing to send.

    Attributes:
        linears: whose weights.
        device: where they came from; None while none did.
    """

    linears: list[Any] = field(default_factory=list)
    device: torch.device | None = None

    def take(self, linear: Any) -> int:
        """Send one layer's weight away, too.

        Returns:
            The bytes that this freed on the device.
        """
        self.linears.append(linear)
        return self._send(linear)

    @override
    def prepare(self) -> None:
        """Send away those that `.to(device)` brought back.

        Raises:
            FluxfireError: offloading layer by layer has them.
        """
        for linear in self.linears:
            self._send(linear)

    def bring_back(self) -> None:
        """Bring them to where they came from: the same bits."""
        for weight in (linear.weight for linear in self.linears):
            if self.device is not None and weight.device != self.device:
                with kontext.as_made(weight):
                    weight.data = weight.data.to(self.device)

    def drop(self) -> None:
        """Let go of them: what is left has a shape and no numbers."""
        for linear in self.linears:
            linear.weight = nn.Parameter(
                torch.empty_like(linear.weight, device="meta"), requires_grad=False
            )
        self.linears.clear()

    def _send(self, linear: Any) -> int:
        weight = linear.weight
        if weight.is_meta:
            raise FluxfireError(
                "weights that fluxfire keeps in host memory are moved by something else, too "
                "(offloading was enabled?); take that off, or restore(pipe) before it"
            )
        if weight.device.type == "cpu":
            return 0
        self.device = weight.device
        with kontext.as_made(weight):
            weight.data = weight.data.cpu().pin_memory()
        return int(weight.nbytes)
