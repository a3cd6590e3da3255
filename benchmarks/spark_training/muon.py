"""Muon: an optimizer that makes each matrix's update orthogonal.

From "Muon: an optimizer for hidden layers" (Jordan and others, 2024), with the scale of "Muon is
scalable for LLM training" (2025), so that one learning rate serves it and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon:
    """Updates float32 matrices in place; matrices of one shape together."""

    def __init__(
        self, matrices: Sequence[Tensor], *, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        self._momentum, self._decay = momentum, decay
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._groups = list(by_shape.values())
        self._moments = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self._groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix by its gradient."""
        for group, moment in zip(self._groups, self._moments, strict=True):
            gradient = torch.stack([m.grad for m in group if m.grad is not None])
            moment.lerp_(gradient, 1 - self._momentum)
            update = _orthogonal(gradient.lerp(moment, self._momentum))
            rows, columns = group[0].shape
            scale = 0.2 * max(rows, columns) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self._decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate * scale)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Move the singular values of (N, rows, columns) near 1, by five steps of Newton and Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out
