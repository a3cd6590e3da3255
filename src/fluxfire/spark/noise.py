"""Noise that depends on seeds alone: the same on every device, up to rounding.

A table of 65,536 random numbers serves everything. A seed gives many places in the table, and a
cell (i, j) of a pattern reads the number at a distance from its pattern's place.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_SIZE = 1 << 16
_ROW, _COLUMN, _OTHER = 40503, 30011, 9973
"""Steps in the table between neighbours; odd, so that a pattern repeats only after 200 cells."""
_DRAWS = 512
_MASK = 0xFFFFFFFF


@cache
def _table(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(20261127)
    return torch.rand(_SIZE, generator=generator).to(device)


def _scrambled(value: Tensor) -> Tensor:
    """Scramble int64 of 32 bits."""
    value = (value ^ (value >> 16)) * 0x45D9F3B & _MASK
    value = (value ^ (value >> 16)) * 0x45D9F3B & _MASK
    return value ^ (value >> 16)


def lookup(table: Tensor, place: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return the number of each cell (i, j), in [0, 1)."""
    return table[(place + i * _ROW + j * _COLUMN) & (_SIZE - 1)]


def smooth(table: Tensor, place: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return noise in [-1, 1] with one bump a unit at points (x, y).

    Args:
        table: the random numbers.
        place: (N, 1, 1) int64, each pattern's place in the table.
        x: (N, H, W).
        y: (N, H, W).
    """
    x, y = x + (place >> 16 & 0xFF) / 256, y + (place >> 24 & 0xFF) / 256
    left, top = x.floor(), y.floor()
    fx, fy = x - left, y - top
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    i, j = left.long(), top.long()
    upper = torch.lerp(lookup(table, place, i, j), lookup(table, place, i + 1, j), fx)
    lower = torch.lerp(lookup(table, place, i, j + 1), lookup(table, place, i + 1, j + 1), fx)
    return torch.lerp(upper, lower, fy) * 2 - 1


def scattered(table: Tensor, place: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Look for scattered points, one a cell, around (x, y); see `Chance.voronoi`."""
    best = torch.full_like(x, 9.0)
    second, number = best, torch.zeros_like(x)
    i, j = x.floor().long(), y.floor().long()
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            a, b = i + di, j + dj
            px = a + 0.1 + 0.8 * lookup(table, place, a, b)
            py = b + 0.1 + 0.8 * lookup(table, place + _OTHER, a, b)
            far = ((px - x).square() + (py - y).square()).sqrt()
            nearer = far < best
            second = torch.where(nearer, best, torch.minimum(second, far))
            number = torch.where(nearer, lookup(table, place + 2 * _OTHER, a, b), number)
            best = torch.where(nearer, far, best)
    return best, second, number


class Chance:
    """Random fields and numbers of N pictures, each from its own seed."""

    def __init__(self, seed: Tensor) -> None:
        """Prepare the draws.

        Args:
            seed: (N,) int64.
        """
        draws = torch.arange(_DRAWS, device=seed.device)
        self._places = _scrambled((_scrambled(seed & _MASK)[:, None] + draws * 0x9E3779B1) & _MASK)
        self._table = _table(seed.device)
        self._device = seed.device
        self._drawn = 0

    def _place(self) -> Tensor:
        self._drawn += 1
        return self._places[:, self._drawn, None, None]

    def number(self, low: float, high: float) -> Tensor:
        """Draw one number for each picture: (N, 1, 1)."""
        return low + (high - low) / (_MASK + 1) * self._place().float()

    def pick(self, colours: list[tuple[float, float, float]], spread: float = 0.0) -> Tensor:
        """Draw one of some colours, and vary it: (N, 3, 1, 1)."""
        table = torch.tensor(colours, device=self._device)
        which = self._place()[:, 0, 0] % len(colours)
        vary = torch.cat([self.number(-spread, spread) for _ in range(3)], 1)[..., None]
        return table[which][:, :, None, None] + vary

    def cells(self, i: Tensor, j: Tensor, *, which: int = 0) -> Tensor:
        """Return a number in [0, 1) for each cell (i, j), int64 of (N, H, W)."""
        return lookup(self._table, self._places[:, _DRAWS - 1 - which, None, None], i, j)

    def noise(self, x: Tensor, y: Tensor) -> Tensor:
        """Smooth noise in [-1, 1] with one bump a unit, at the points (x, y) of (N, H, W)."""
        return smooth(self._table, self._place(), x, y)

    def clouds(self, x: Tensor, y: Tensor, octaves: int = 5, fall: float = 0.5) -> Tensor:
        """Sum noise of ever finer bumps: about [-1, 1]."""
        total, weight, size = torch.zeros_like(x), 0.0, 1.0
        for _ in range(octaves):
            total = total + size * self.noise(x, y)
            weight += size
            x, y, size = 2.03 * x, 2.03 * y, size * fall
        return total / weight * 1.6

    def voronoi(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look for scattered points, one in each cell of a unit.

        Returns:
            The distances to the nearest point and to the second nearest, and a number in [0, 1)
            that belongs to the nearest: (N, H, W) each.
        """
        return scattered(self._table, self._place(), x, y)
