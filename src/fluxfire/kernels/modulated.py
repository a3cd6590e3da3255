"""Layer norm with modulation, and the gated residual, over text and image together."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.segments import block_size, contiguous_rows, segments, with_equal_strides


def modulated_norm(
    image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """Compute `layer_norm(x) · (1 + scale) + shift`; the layer norm has no weights.

    Args:
        image: (batch, image tokens, width).
        text: (batch, text tokens, width), or None.
        shift: (batch, width).
        scale: (batch, width).
        eps: added to the variance.

    Returns:
        (batch, text tokens + image tokens, width), text first.
    """
    if image.is_cuda:
        return _modulated_norm_cuda(image, text, shift, scale, eps)
    joint = image if text is None else torch.cat([text, image], dim=1)
    normed = F.layer_norm(joint.float(), joint.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None].float()) + shift[:, None].float()).to(image.dtype)


def _modulated_norm_cuda(
    image: Tensor, text: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    from fluxfire.kernels.triton_kernels import norm_rows

    shift, scale = with_equal_strides(shift, scale)
    out = _empty_joint(image, text)
    width = image.shape[-1]
    for x, first in segments(image, text):
        norm_rows[x.shape[1], x.shape[0]](
            x, shift, scale, out, x.stride(0), x.stride(1), shift.stride(0), out.stride(0),
            out.stride(1), first, EPS=eps, WIDTH=width, BLOCK=block_size(width), num_warps=4,
        )  # fmt: skip
    return out


def gated_add(image: Tensor, text: Tensor | None, gate: Tensor, add: Tensor) -> Tensor:
    """Add `gate · add` to the image, or to text and image concatenated.

    Args:
        image: (batch, image tokens, width).
        text: (batch, text tokens, width), or None.
        gate: (batch, width).
        add: (batch, text tokens + image tokens, width), text first.

    Returns:
        (batch, text tokens + image tokens, width), text first.
    """
    if image.is_cuda:
        return _gated_add_cuda(image, text, gate, add)
    joint = image if text is None else torch.cat([text, image], dim=1)
    return (joint.float() + gate[:, None].float() * add.float()).to(image.dtype)


def _gated_add_cuda(image: Tensor, text: Tensor | None, gate: Tensor, add: Tensor) -> Tensor:
    from fluxfire.kernels.triton_kernels import add_gated

    gate, add = contiguous_rows(gate), contiguous_rows(add)
    out = _empty_joint(image, text)
    width = image.shape[-1]
    for x, first in segments(image, text):
        add_gated[x.shape[1], x.shape[0]](
            x, gate, add, out, x.stride(0), x.stride(1), gate.stride(0), add.stride(0),
            add.stride(1), out.stride(0), out.stride(1), first, WIDTH=width,
            BLOCK=block_size(width), num_warps=4,
        )  # fmt: skip
    return out


def _empty_joint(image: Tensor, text: Tensor | None) -> Tensor:
    tokens = image.shape[1] + (0 if text is None else text.shape[1])
    return image.new_empty(image.shape[0], tokens, image.shape[2])
