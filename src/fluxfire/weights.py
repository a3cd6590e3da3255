"""Linear layers without their plain weight: a pass dropped it, or a file has it in int8."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from fluxfire import modules
from fluxfire.errors import FluxfireError
from fluxfire.kernels.int8 import int8_weight_linear, quantize_int8

_DROPPED = (
    "a weight that Float8(originals='drop') let go of was read or written (is a LoRA fused, are "
    "weights edited or offloaded?); do that before optimize(), or keep them (originals='host')"
)
_IN_INT8 = (
    "a weight that this checkpoint holds in int8 alone was read or written (is a LoRA fused, are "
    "weights edited?); do that with the original checkpoint, and call fluxfire.quantize again"
)
_Module: Any = nn.Module  # torch leaves the overridden methods untyped


class DroppedWeight(nn.Parameter):
    """A weight whose memory was freed: it has a shape and a dtype, but no data.

    Torch silently accepts writes to a tensor without data, for example when a LoRA is merged. This
    class raises instead, for writes and for every other operation that needs the data.

    Attributes:
        layer: weak reference to the layer that owned the weight.
        why: the error that a use of the data raises.
    """

    layer: weakref.ref[nn.Module]
    why: str

    @classmethod
    def like(
        cls,
        weight: Tensor,
        layer: nn.Module,
        dtype: torch.dtype | None = None,
        why: str = _DROPPED,
    ) -> DroppedWeight:
        """Create the placeholder of a weight."""
        empty = torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
        made: DroppedWeight = Tensor._make_subclass(cls, empty, False)  # noqa: SLF001
        made.layer, made.why = weakref.ref(layer), why
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Show shape and dtype; there is no data to show."""
        return f"DroppedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Allow operations on metadata (shape, dtype, strides).

        Raises:
            FluxfireError: the operation reads or writes the data.
        """
        name = getattr(getattr(func, "__self__", None), "__name__", "")  # the property's name
        reads_metadata = func.__name__ == "__get__" and name not in _DATA_PROPERTIES
        reads_metadata = reads_metadata or func.__name__ in _METADATA_METHODS
        clears = func.__name__ == "requires_grad_" or name in ("requires_grad", "grad")
        if not (reads_metadata or (clears and args[1:] in ((False,), (None,)))):
            ours = next((x for x in args if isinstance(x, DroppedWeight)), None)
            raise FluxfireError(_DROPPED if ours is None else ours.why)
        function: Any = super().__torch_function__  # untyped
        return function(func, types, args, kwargs or {})


_DATA_PROPERTIES = {"data", "T", "mT", "H", "mH", "real", "imag", "__cuda_array_interface__"}
_METADATA_METHODS = {
    "size",
    "dim",
    "numel",
    "nelement",
    "stride",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "is_inference",
    "storage_offset",
    "__len__",
    "__hash__",
}


class LayerWithoutWeight(_Module):  # type: ignore[misc]
    """A layer with a `DroppedWeight`, while a pass computes its product from a substitute."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply `.to()` to the other parameters; the dropped weight only takes the dtype."""
        weight = self._parameters["weight"]
        if not isinstance(weight, DroppedWeight):
            return super()._apply(fn, recurse)
        try:
            self._parameters["weight"] = None
            super()._apply(fn, recurse)
        finally:
            dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            self._parameters["weight"] = type(weight).like(weight, self, dtype, weight.why)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refuse to save a weight that was dropped.

        Raises:
            FluxfireError: the weight was dropped.
        """
        if isinstance(self._parameters["weight"], DroppedWeight):
            raise FluxfireError(
                f"{prefix}weight was let go of (originals='drop'), so there is nothing to save; "
                f"save the pipeline before optimize(), or keep the weights (originals='host')"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local: Any, *rest: Any) -> None:
        """Load a weight in the dropped one's place; torch would silently ignore it."""
        weight = self._parameters["weight"]
        given = state_dict.get(f"{prefix}weight")
        if isinstance(weight, DroppedWeight) and given is not None and given.shape == weight.shape:
            made = torch.empty(weight.shape, dtype=weight.dtype)
            self._parameters["weight"] = nn.Parameter(made, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, local, *rest)


@cache
def class_without_weight(cls: type) -> type:
    """Return a layer's class with `LayerWithoutWeight` in front."""
    return type(cls.__name__, (LayerWithoutWeight, cls), {})


class StoredWeight(nn.Module):
    """The int8 weight of one linear layer.

    Attributes:
        data: (width out, width), int8.
        scale: (width out, 1), float32: the factor of each output channel.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.eval()

    def quantize(self, weight: Tensor, device: torch.device) -> None:
        """Take another weight: quantize it on a device, and keep the result where it was."""
        with modules.matching_inference_mode(weight), torch.no_grad():
            data, scale = quantize_int8(weight.detach().to(device))
            # In place, since `Placement` moves these tensors.
            self.data.copy_(data)
            self.scale.copy_(scale)

    @property
    def nbytes(self) -> int:
        """Size of both tensors in bytes."""
        return self.data.nbytes + self.scale.nbytes

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return data and scale on another tensor's device: themselves, or copies."""
        return beside(self.data, like), beside(self.scale, like)

    def dequantized(self, device: torch.device) -> Tensor:
        """Return the weight in float32: (width out, width)."""
        return self.data.to(device).float() * self.scale.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: ARG002 - torch's signature
        """Apply `.to()`: the device alone, since the dtype is the point."""
        device = fn(torch.empty(0, device=self.data.device)).device
        self.data, self.scale = self.data.to(device), self.scale.to(device)
        return self


def beside(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, or a copy of it on another tensor's device."""
    return tensor if tensor.device == like.device else tensor.to(like.device, non_blocking=True)


class _NowhereWeight(DroppedWeight):
    """The placeholder of a weight that exists in int8 alone."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the layer computes, since PEFT creates a LoRA where the weight is."""
        layer: Any = self.layer()
        if layer is None:
            return torch.device("meta")
        like: Tensor = layer.stored.data if layer.bias is None else layer.bias
        return like.device

    def __deepcopy__(self, memo: dict[int, Any]) -> DroppedWeight:
        """Copy the shape and the dtype; the layer's copy takes the copy over."""
        made = memo.setdefault(id(self), _nowhere(self.shape, self.dtype, self.why))
        return cast("DroppedWeight", made)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the shape and the dtype."""
        return _nowhere, (tuple(self.shape), self.dtype, self.why)


def _nowhere(shape: Sequence[int], dtype: torch.dtype, why: str) -> DroppedWeight:
    """Create a placeholder whose layer is not known yet."""
    empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
    made = _NowhereWeight.like(empty, nn.Identity(), why=why)
    made.layer = _no_layer  # type: ignore[assignment]
    return made


def _no_layer() -> None:
    return None


class StoredLinear(LayerWithoutWeight, nn.Linear):
    """A linear layer of an int8 checkpoint. Its plain weight exists nowhere.

    It casts the int8 weight for each product. The weight may lie on another device than the
    input: then each call copies it.
    """

    stored: StoredWeight

    @classmethod
    def of(
        cls, data: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> StoredLinear:
        """Create a layer from tensors of a file.

        Args:
            data: (width out, width), int8.
            scale: (width out, 1), float32.
            bias: (width out,), or None.
            dtype: dtype of the bias and of the weight that the layer stands for.
        """
        width_out, width = data.shape
        made = cls(width, width_out, bias=False, device="meta", dtype=dtype)
        made.weight = _NowhereWeight.like(made.weight, made, why=_IN_INT8)
        if bias is not None:
            made.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        made.stored = StoredWeight(data, scale)
        return made.eval()

    def streamed(self) -> Sequence[Tensor]:
        """Return the tensors that a call copies to the input's device if they lie elsewhere."""
        return self.stored.data, self.stored.scale

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., width)."""
        return int8_weight_linear(input, *self.stored.tensors(input), self.bias)

    def _save_to_state_dict(self, _destination: Any, prefix: str, _keep_vars: bool) -> None:
        """Refuse to save: diffusers could not load the file."""
        raise FluxfireError(
            f"{prefix}weight exists in int8 alone, which diffusers cannot load; copy the "
            f"checkpoint's folder instead of saving the pipeline"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local: Any, *rest: Any) -> None:
        """Quantize a weight that is loaded, and load a bias as it is."""
        name, weight = f"{prefix}weight", self._parameters["weight"]
        assert weight is not None  # noqa: S101 - it is a placeholder
        given = state_dict.get(name)
        others = {key: tensor for key, tensor in state_dict.items() if key != name}
        try:
            self._parameters["weight"] = None
            _Module._load_from_state_dict(self, others, prefix, local, *rest)  # noqa: SLF001
        finally:
            self._parameters["weight"] = weight
        strict, missing, _, errors = rest
        if given is None:
            missing += [name] if strict else []
        elif given.shape != weight.shape:
            errors.append(f"{name} has shape {tuple(given.shape)}, not {tuple(weight.shape)}")
        else:
            self.stored.quantize(given, self.stored.data.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled layer; its placeholder belongs to it."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        cast("DroppedWeight", self.weight).layer = weakref.ref(self)
