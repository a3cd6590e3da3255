"""Noise that depends on seeds alone: the same on every device, up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LATTICE = 64
_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_MASK = 0xFFFFFFFF


def hashed(*keys: Tensor | int) -> Tensor:
    """Return a uniform float32 in [0, 1) for each combination of int64 keys, broadcast."""
    state: Tensor | int = 0x2545F491
    for i, key in enumerate(keys):
        state = (state ^ (key * _PRIMES[i % 3])) & _MASK
        state = (state ^ (state >> 15)) * 0x2C1B3C6D & _MASK
        state = (state ^ (state >> 12)) * 0x297A2D39 & _MASK
        state = state ^ (state >> 15)
    assert isinstance(state, Tensor)
    return (state & 0xFFFFFF).float() / 0x1000000


class Chance:
    """Random fields and numbers of N pictures, each from its own seed.

    Attributes:
        seed: (N,) int64.
    """

    def __init__(self, seed: Tensor) -> None:
        self.seed = seed
        self._drawn = 0

    def number(self, low: float, high: float) -> Tensor:
        """Draw one number for each picture: (N, 1, 1)."""
        self._drawn += 1
        return low + (high - low) * hashed(self.seed, self._drawn)[:, None, None]

    def pick(self, colours: list[tuple[float, float, float]], spread: float = 0.0) -> Tensor:
        """Draw one of some colours, and vary it: (N, 3, 1, 1)."""
        table = torch.tensor(colours, device=self.seed.device)
        which = (self.number(0, 1)[:, 0, 0] * len(colours)).long()
        vary = torch.cat([self.number(-spread, spread) for _ in range(3)], 1)[..., None]
        return table[which][:, :, None, None] + vary

    def cells(self, i: Tensor, j: Tensor, *, which: int = 0) -> Tensor:
        """Return a number in [0, 1) for each cell (i, j), int64 of (N, H, W)."""
        return hashed(self.seed[:, None, None], i, j, self._drawn * 101 + which)

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Smooth noise in [-1, 1] with one bump a unit, at the points (x, y) of (N, H, W)."""
        self._drawn += 1
        nodes = torch.arange(_LATTICE, device=x.device)
        values = hashed(self.seed[:, None, None], self._drawn, nodes[:, None], nodes) * 2 - 1
        values = functional.pad(values[:, None], (0, 1, 0, 1), mode="circular")
        x, y = x + self.number(0, 37), y + self.number(0, 37)
        fx, fy = x - x.floor(), y - y.floor()
        at = torch.stack(
            [
                x.floor() % _LATTICE + fx * fx * (3 - 2 * fx),
                y.floor() % _LATTICE + fy * fy * (3 - 2 * fy),
            ],
            -1,
        )
        return functional.grid_sample(values, at * (2 / _LATTICE) - 1, align_corners=True)[:, 0]

    def clouds(self, x: Tensor, y: Tensor, octaves: int = 5, fall: float = 0.5) -> Tensor:
        """Sum noise of ever finer bumps: about [-1, 1]."""
        total, weight, size = torch.zeros_like(x), 0.0, 1.0
        for _ in range(octaves):
            total = total + size * self.noise(x, y)
            weight += size
            x, y, size = 2.03 * x, 2.03 * y, size * fall
        return total / weight * 1.6

    def voronoi(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances to the nearest and second nearest of scattered points; a number for the nearest."""
        self._drawn += 1
        best = torch.full_like(x, 9.0)
        second, number = best.clone(), torch.zeros_like(x)
        i, j = x.floor().long(), y.floor().long()
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                a, b = i + di, j + dj
                px = a + 0.1 + 0.8 * self.cells(a, b)
                py = b + 0.1 + 0.8 * self.cells(a, b, which=1)
                far = torch.hypot(px - x, py - y)
                nearer = far < best
                second = torch.where(nearer, best, torch.minimum(second, far))
                number = torch.where(nearer, self.cells(a, b, which=2), number)
                best = torch.where(nearer, far, best)
        return best, second, number
