"""Fused kernels for the operations between the matrix products of Flux's blocks.

On CUDA each function launches a Triton kernel. On other devices it runs the same arithmetic in
torch, and the tests compare the kernels with that arithmetic. A compiled graph contains the Triton
kernels directly and launches them without Python. As operators of `torch.library`, called 400
times a step, they kept the host busy for longer than a GPU needs for a small picture's step. All
functions compute in float32 and round once, where eager torch rounds after every operation. They
have no gradients.
"""

from __future__ import annotations

from fluxfire.kernels.heads import in_heads, joint_heads
from fluxfire.kernels.modulated import gated_add, modulated_norm
from fluxfire.kernels.products import linear_gelu, two_products

__all__ = [
    "gated_add",
    "in_heads",
    "joint_heads",
    "linear_gelu",
    "modulated_norm",
    "two_products",
]
