"""How the kernels walk over the segments of a joint sequence."""

from __future__ import annotations

from torch import Tensor


def segments(image: Tensor, text: Tensor | None) -> list[tuple[Tensor, int]]:
    """Return each segment, its rows contiguous, and its first row in the joint sequence."""
    if text is None:
        return [(in_rows(image), 0)]
    return [(in_rows(text), 0), (in_rows(image), text.shape[1])]


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous: this one if it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of equal strides, their last axis contiguous: these if they are."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(x.stride() == strides for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def block_of(width: int) -> int:
    """Return the power of two that holds a row."""
    return 1 << (width - 1).bit_length()
