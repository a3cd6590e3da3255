"""Matrix products that end in something more."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor
from torch.library import custom_op


@custom_op("fluxfire::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x · weightᵀ + bias)`, by its tanh formula; on CUDA in the product's own epilogue.

    Args:
        x: (batch, tokens, width).
        weight: (width out, width).
        bias: (width out,).

    Returns:
        (batch, tokens, width out).
    """
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_kernel("cuda")
def _linear_gelu_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)  # noqa: SLF001 - cuBLASLt's
    return out.view(*x.shape[:-1], -1)


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@custom_op("fluxfire::two_products", mutates_args=())
def two_products(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[x, y] · weightᵀ + bias` without putting `x` and `y` side by side.

    The sum is rounded to the dtype once more than in one product.

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


@two_products.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])
