"""A second device on a machine that has none: torch's rules about devices, without a device.

Inside the block, `.to(DEVICE)` makes tensors that say they are on another device. An operation
whose tensors are on different devices raises, as torch raises. The numbers stay on the CPU, so a
picture has the CPU's bits. Kernels for a real device, streams and the amount of memory need a GPU.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fluxfire.kernels import checksum

DEVICE = torch.device("xpu", 0)
_TAKES_BOTH = {
    "copy_", "__set__", "__getitem__", "__setitem__", "_has_compatible_shallow_copy_type",
    "__deepcopy__",
}  # fmt: skip


def _is_device(given):
    return isinstance(given, str | torch.device)


def _is_ours(device):
    return torch.device(device).type == DEVICE.type


class OtherDevice(TorchFunctionMode):
    """The block in which there is another device."""

    def __init__(self):
        super().__init__()
        # The memory on the other device, by address. Holding it keeps addresses from being reused.
        self._there = {}

    def __enter__(self):
        checksum._places.cache_clear()  # it keeps tensors by device, also those of other blocks
        return super().__enter__()

    def is_there(self, tensor):
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._there

    def put(self, tensor):
        """Say from now on that a tensor's memory is on the other device."""
        storage = tensor.untyped_storage()
        if not tensor.is_meta:
            self._there[storage._cdata] = storage
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read(func, *args)
        if name == "pin_memory":
            return args[0]
        if name == "is_pinned":
            return False
        if name in ("to", "cpu"):
            return self._move(func, *args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        placed = {self.is_there(x) for x in tensors if x.dim() and x.numel() and not x.is_meta}
        if len(placed) > 1 and name not in _TAKES_BOTH:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found at least two "
                f"devices, {DEVICE} and cpu!"
            )
        goes = any(map(self.is_there, tensors[:1] if name in _TAKES_BOTH else tensors))
        if kwargs.get("device") is not None:
            goes = _is_ours(kwargs["device"])
            kwargs["device"] = "cpu" if goes else kwargs["device"]
        made = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, self.put, made) if goes else made

    def _read(self, func, tensor, *rest):
        """Read a property of a tensor."""
        name = getattr(func.__self__, "__name__", "")
        if self.is_there(tensor) and name in ("device", "is_cpu"):
            return DEVICE if name == "device" else False
        return func(tensor, *rest)

    def _move(self, func, tensor, *args, **kwargs):
        """Call `to` or `cpu`. Between devices it copies, as torch does."""
        was = self.is_there(tensor)
        goes = was and func.__name__ != "cpu"
        if args and isinstance(args[0], torch.Tensor):
            like, *rest = args
            args = DEVICE if self.is_there(like) else like.device, like.dtype, *rest
        for given in filter(_is_device, (*args, kwargs.get("device"))):
            goes = _is_ours(given)
        hide = lambda given: "cpu" if _is_device(given) and _is_ours(given) else given  # noqa: E731
        made = func(tensor, *map(hide, args), **{k: hide(v) for k, v in kwargs.items()})
        if was != goes and made is tensor:
            made = tensor.clone()
        return self.put(made) if goes else made
