"""What Flux's blocks compute between their matrix products, each in one kernel.

Each function launches a Triton kernel on CUDA; elsewhere it is the same arithmetic in torch, which
also is what the kernels are tested against. A compiled graph takes the kernels in as they are, and
launches them without Python in between: as operators of `torch.library`, called 400 times a step,
they kept the host busy for longer than a GPU needs for a small picture's step. All reckon in
float32 and round once, where eager torch rounds after each of its steps. They have no gradients.
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
