"""Weights that wait in host memory while something else computes in their place."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.errors import FluxfireError
from fluxfire.runtime.generation import Listener

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
                with modules.as_made(weight):
                    weight.data = weight.data.to(self.device)

    def drop(self) -> None:
        """Let go of them: what is left has a shape and no numbers."""
        for linear in self.linears:
            if not isinstance(linear.weight, Gone):
                linear.weight = Gone.like(linear.weight, linear)
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
        with modules.as_made(weight):
            weight.data = weight.data.cpu().pin_memory()
        return int(weight.nbytes)


class Gone(nn.Parameter):
    """A weight that was let go of: it has a shape, a dtype, and no numbers.

    Torch takes writes to a tensor without numbers, such as that of a LoRA merged, without a word.
    This refuses them, and all else that would need numbers.

    Attributes:
        layer: whose weight it was, weakly.
    """

    layer: weakref.ref[nn.Module]

    @classmethod
    def like(cls, weight: Tensor, layer: nn.Module, dtype: torch.dtype | None = None) -> Gone:
        """Make one in a weight's place."""
        empty = torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
        made: Gone = Tensor._make_subclass(cls, empty, False)  # noqa: SLF001
        made.layer = weakref.ref(layer)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Say that it is gone."""
        return f"Gone(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Tell what is still known.

        Raises:
            FluxfireError: numbers are asked for, or given.
        """
        name = getattr(getattr(func, "__self__", None), "__name__", "")  # of a property
        tells = func.__name__ == "__get__" and name not in _OF_NUMBERS
        clears = func.__name__ == "requires_grad_" or name in ("requires_grad", "grad")
        if not (tells or func.__name__ in _KNOWN or (clears and args[1:] in ((False,), (None,)))):
            raise FluxfireError(
                "a weight that Float8(originals='drop') let go of was read or written (is a LoRA "
                "fused, are weights edited or offloaded?); do that before optimize(), or keep them "
                "(originals='host')"
            )
        function: Any = super().__torch_function__  # untyped
        return function(func, types, args, kwargs or {})


_OF_NUMBERS = {"data", "T", "mT", "H", "mH", "real", "imag", "__cuda_array_interface__"}
_KNOWN = {
    "size", "dim", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex",
    "is_contiguous", "is_inference", "storage_offset", "__len__", "__hash__",
}  # fmt: skip


class Emptied(_Module):  # type: ignore[misc]
    """A layer that let go of its weight, while something else computes in its place."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `.to()` with what there is; of the weight, the dtype."""
        weight = self._parameters["weight"]
        if not isinstance(weight, Gone):
            return super()._apply(fn, recurse)
        try:
            self._parameters["weight"] = None
            super()._apply(fn, recurse)
        finally:
            dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            self._parameters["weight"] = Gone.like(weight, self, dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refuse to save what is not there.

        Raises:
            FluxfireError: the weight is gone.
        """
        if isinstance(self._parameters["weight"], Gone):
            raise FluxfireError(
                f"{prefix}weight was let go of (originals='drop'), so there is nothing to save; "
                f"save the pipeline before optimize(), or keep the weights (originals='host')"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local: Any, *rest: Any) -> None:
        """Take a weight in, which torch would otherwise drop without a word."""
        weight = self._parameters["weight"]
        given = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Gone) and given is not None and given.shape == weight.shape:
            made = torch.empty(weight.shape, dtype=weight.dtype)
            self._parameters["weight"] = nn.Parameter(made, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, local, *rest)


@cache
def _emptied(cls: type) -> type:
    return type(cls.__name__, (Emptied, cls), {})
