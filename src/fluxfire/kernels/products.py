"""Matrix products fused with the operation that follows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from fluxfire.kernels.operator import operator


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `gelu(x · weightᵀ + bias)`, tanh approximation; on CUDA in the product's epilogue.

    Args:
        x: (batch, tokens, width).
        weight: (width out, width).
        bias: (width out,).

    Returns:
        (batch, tokens, width out).
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    rows = x.flatten(0, -2)
    out = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)  # noqa: SLF001 - cuBLASLt's
    return out.view(*x.shape[:-1], -1)


def _fake_two_products(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@operator(fake=_fake_two_products)
def two_products(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `[x, y] · weightᵀ + bias` without concatenating `x` and `y`.

    The second product adds to the first in place. This is an operator because compiled torch code
    would copy the intermediate sum. The sum is rounded to the dtype twice, in one product once.

    Args:
        x: (batch, tokens, width of x).
        y: (batch, tokens, width of y).
        weight: (width out, width of x + width of y).
        bias: (width out,).

    Returns:
        (batch, tokens, width out).
    """
    width = x.shape[-1]
    x, y, shape = x.flatten(0, -2), y.flatten(0, -2), (*x.shape[:-1], -1)
    out = torch.addmm(bias, x, weight[:, :width].t())
    return out.addmm_(y, weight[:, width:].t()).view(shape)
