"""How the operators walk over the segments of a joint sequence."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def segments(image: Tensor, text: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Yield each segment, its rows contiguous, and its first row in the joint sequence."""
    first = 0
    for x in (text, image):
        if x is not None:
            yield (x if x.stride(-1) == 1 else x.contiguous()), first
            first += x.shape[1]


def block_of(width: int) -> int:
    """Return the power of two that holds a row."""
    return 1 << (width - 1).bit_length()
