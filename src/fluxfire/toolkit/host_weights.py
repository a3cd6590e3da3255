"""Weights that wait in host memory while something else computes in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from fluxfire import kontext
from fluxfire.errors import FluxfireError
from fluxfire.generation import Listener

_Module: Any = nn.Module  # these of its methods have no types


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
            weight = linear.weight
            if not weight.is_meta:
                empty = torch.empty_like(weight, device="meta")
                linear.weight = nn.Parameter(empty, requires_grad=False)
            if not isinstance(linear, Emptied):
                cls: Any = type(linear)
                linear.__class__ = _emptied(cls)

    def _send(self, linear: Any) -> int:
        weight = linear.weight
        if isinstance(linear, Emptied):
            return 0
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


class Emptied(_Module):  # type: ignore[misc]
    """A layer that let go of its weight, while something else computes in its place."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `.to()` with what there is; of the weight, the dtype."""
        weight = self._parameters["weight"]
        if weight is None or not weight.is_meta:
            return super()._apply(fn, recurse)
        try:
            self._parameters["weight"] = None
            super()._apply(fn, recurse)
        finally:
            dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            self._parameters["weight"] = nn.Parameter(weight.data.to(dtype), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refuse to save what is not there.

        Raises:
            FluxfireError: the weight is gone.
        """
        if self._parameters["weight"].is_meta:
            raise FluxfireError(
                f"{prefix}weight was let go of (originals='drop'), so there is nothing to save; "
                f"save the pipeline before optimize(), or keep the weights (originals='host')"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local: Any, *rest: Any) -> None:
        """Take a weight in, which torch would otherwise drop without a word."""
        weight = self._parameters["weight"]
        given = state_dict.get(f"{prefix}weight")
        if given is not None and weight is not None and weight.is_meta:
            made = torch.empty_like(weight, device="cpu")
            self._parameters["weight"] = nn.Parameter(made, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, local, *rest)


@cache
def _emptied(cls: type) -> type:
    return type(cls.__name__, (Emptied, cls), {})
