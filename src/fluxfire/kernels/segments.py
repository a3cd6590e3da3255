"""Layout helpers of the kernels: the text and image segments of a joint sequence."""

from __future__ import annotations

from torch import Tensor


def segments(image: Tensor, text: Tensor | None) -> list[tuple[Tensor, int]]:
    """Return text and image with contiguous rows, each with its first row in the joint sequence."""
    if text is None:
        return [(contiguous_rows(image), 0)]
    return [(contiguous_rows(text), 0), (contiguous_rows(image), text.shape[1])]


def contiguous_rows(x: Tensor) -> Tensor:
    """Return the tensor, copied if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_equal_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors with equal strides and a contiguous last axis, copied if necessary."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and all(x.stride() == strides for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def block_size(width: int) -> int:
    """Return the smallest power of two that is at least `width`."""
    return 1 << (width - 1).bit_length()
