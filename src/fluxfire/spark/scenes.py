"""What a picture of Spark's shows: things on a ground, in a light or a weather.

Lengths are fractions of a picture's shorter side; x and y are from its top left corner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fluxfire.spark.grounds import GROUNDS
from fluxfire.spark.things import THINGS, TINTS, distinct

LOOKS = ("day", "night", "evening", "fog", "rain", "snowfall", "grey")
SLOTS = 4
"""At most three things, and a place for one that an edit adds."""
SIZES = (0.30, 0.46)
"""Smallest and largest side of a thing."""


SHAKE = (0.012, 0.012, 0.01)
"""How far a camera may move between a picture and its edit: right, down, and wider.

FLUX.1 Kontext moves and zooms a picture a little when it edits it. So every pixel of an edit is
uncertain at first, and not only what the instruction names.
"""


@dataclass(frozen=True, slots=True)
class Scenes:
    """N scenes of one aspect ratio.

    Attributes:
        extent: (width, height) of the pictures; the shorter is 1.
        thing: (N, SLOTS) int64, an index into THINGS.
        tint: (N, SLOTS) int64, see TINTS.
        shade: (N, SLOTS) float32, which shade of the tint.
        x, y: (N, SLOTS) float32, the centre.
        size: (N, SLOTS) float32, the side of the square that holds the thing.
        turn: (N, SLOTS) float32, radians.
        flip: (N, SLOTS) bool, whether it is mirrored.
        present: (N, SLOTS) bool.
        ground: (N,) int64, an index into GROUNDS.
        seed: (N,) int64, which of the grounds of this kind.
        look: (N,) int64, an index into LOOKS.
        weather: (N,) int64, the seed of the look.
        camera: (N, 3) float32: how far the camera has moved to the right and down, and how much
            wider it sees, as a fraction. Pictures show the scene from there.
    """

    extent: tuple[float, float]
    thing: Tensor
    tint: Tensor
    shade: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    turn: Tensor
    flip: Tensor
    present: Tensor
    ground: Tensor
    seed: Tensor
    look: Tensor
    weather: Tensor
    camera: Tensor

    def __len__(self) -> int:
        return len(self.ground)

    def tensors(self) -> dict[str, Tensor]:
        """Return every field except the extent, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extent"}

    def take(self, index: Tensor | slice) -> Scenes:
        """Return some of the scenes."""
        return self.having(**{name: t[index] for name, t in self.tensors().items()})

    def to(self, device: torch.device | str) -> Scenes:
        """Move all tensors to a device."""
        return self.having(**{name: t.to(device) for name, t in self.tensors().items()})

    def having(self, **values: Any) -> Scenes:
        """Return the scenes with other tensors in some fields."""
        return replace(self, **values)

    def put(self, slot: Tensor, **values: Any) -> Scenes:
        """Change one thing of every scene.

        Args:
            slot: (N,) int64, the thing's slot.
            values: new values by field, each (N,) or a number.
        """
        rows = torch.arange(len(self))
        changed: dict[str, Tensor] = {}
        for name, value in values.items():
            changed[name] = getattr(self, name).clone()
            changed[name][rows, slot] = torch.as_tensor(value, dtype=changed[name].dtype)
        return self.having(**changed)

    def of(self, name: str, slot: Tensor) -> Tensor:
        """Return a field of one thing of every scene: (N,)."""
        value: Tensor = getattr(self, name)[torch.arange(len(self)), slot]
        return value

    def orderly(self) -> Tensor:
        """Whether all things are inside the picture and hide little of each other: (N,) bool."""
        width, height = self.extent
        margin = 0.45 * self.size
        inside = (self.x >= margin) & (self.x <= width - margin)
        inside &= (self.y >= margin) & (self.y <= height - margin)
        apart = torch.maximum(
            (self.x[:, :, None] - self.x[:, None]).abs(),
            (self.y[:, :, None] - self.y[:, None]).abs(),
        )
        reach = (self.size[:, :, None] + self.size[:, None]) / 2
        both = self.present[:, :, None] & self.present[:, None]
        both &= ~torch.eye(SLOTS, dtype=torch.bool, device=both.device)
        clear = (apart >= 0.85 * reach) | ~both
        return (inside | ~self.present).all(1) & clear.flatten(1).all(1)


def join(parts: Sequence[Scenes]) -> Scenes:
    """Concatenate scenes of one aspect ratio."""
    names = parts[0].tensors()
    return parts[0].having(**{n: torch.cat([p.tensors()[n] for p in parts]) for n in names})


class Dice:
    """Seeded random numbers, drawn on the CPU so that every machine gets the same ones."""

    def __init__(self, *seed: int | str) -> None:
        digest = hashlib.blake2b(repr(seed).encode(), digest_size=7).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw float32 from [low, high)."""
        return low + (high - low) * torch.rand(shape, generator=self._generator)

    def below(self, top: int, *shape: int) -> Tensor:
        """Draw int64 from [0, top)."""
        return torch.randint(top, shape, generator=self._generator)

    def order(self, n: int, top: int) -> Tensor:
        """Draw n permutations of range(top): (n, top) int64."""
        return torch.rand(n, top, generator=self._generator).argsort(1)

    def some(self, n: int, top: int, k: int) -> Tensor:
        """Draw k different numbers of range(top) for each of n rows: (n, k) int64."""
        return torch.rand(n, top, generator=self._generator).topk(k, dim=1).indices

    def which(self, allowed: Tensor) -> Tensor:
        """Draw the index of a True column in each row: (N, K) bool to (N,) int64."""
        return (torch.rand(allowed.shape, generator=self._generator) * allowed).argmax(1)


_SEEDS = 2**31
_COUNTS = torch.tensor([1, 1, 2, 2, 2, 3, 3])
_TINTED = 0.12
_IN_ANOTHER_LOOK = 0.12


def poses(n: int, extent: tuple[float, float], dice: Dice) -> dict[str, Tensor]:
    """Draw places, sizes and turns for every slot of n scenes."""
    return {
        "x": dice.uniform(0.15, extent[0] - 0.15, n, SLOTS),
        "y": dice.uniform(0.18, extent[1] - 0.15, n, SLOTS),
        "size": dice.uniform(*SIZES, n, SLOTS),
        "turn": dice.uniform(-0.3, 0.3, n, SLOTS),
        "flip": dice.below(2, n, SLOTS) == 1,
        "shade": dice.uniform(-1, 1, n, SLOTS),
    }


def draw(n: int, extent: tuple[float, float], dice: Dice) -> Scenes:
    """Draw n scenes of one to three things, all of different kinds; some may not be orderly."""
    thing = dice.some(n, len(THINGS), SLOTS)
    tint = 1 + dice.below(len(TINTS), n, SLOTS)
    tinted = (dice.uniform(0, 1, n, SLOTS) < _TINTED) & distinct()[thing, tint]
    changed = dice.uniform(0, 1, n) < _IN_ANOTHER_LOOK
    count = _COUNTS[dice.below(len(_COUNTS), n)]
    return Scenes(
        extent=extent,
        thing=thing,
        tint=torch.where(tinted, tint, 0),
        present=torch.arange(SLOTS) < count[:, None],
        ground=dice.below(len(GROUNDS), n),
        seed=dice.below(_SEEDS, n),
        look=torch.where(changed, 1 + dice.below(len(LOOKS) - 1, n), 0),
        weather=dice.below(_SEEDS, n),
        camera=torch.zeros(n, 3),
        **poses(n, extent, dice),
    )


def shaken(scenes: Scenes, dice: Dice) -> Scenes:
    """Return the scenes as a camera sees them that has moved a little, by at most 1.5 pixels."""
    moved = dice.uniform(-1, 1, len(scenes), 3) * torch.tensor(SHAKE)
    return scenes.having(camera=moved)


def new_seeds(n: int, dice: Dice) -> Tensor:
    """Draw n seeds for grounds or looks."""
    return dice.below(_SEEDS, n)
