"""Scenes: two to four flat shapes on a ground, many at a time, as plain tensors.

Lengths are in units of a picture's shorter side, so that a scene can be drawn at any size.
Later shapes lie on top of earlier ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.95, 0.82, 0.05),
    "green": (0.12, 0.62, 0.20),
    "cyan": (0.15, 0.82, 0.85),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.52, 0.12, 0.68),
    "pink": (0.98, 0.52, 0.78),
}
PALETTE = torch.tensor(list(COLOURS.values()))
PATTERNS = ("plain", "gradient", "stripes", "checks", "dots")
STYLES = ("none", "outline", "night", "blur")
SLOTS = 5
"""At most four shapes, and one slot for a shape that an edit adds."""
CANONICAL_SIZE = 0.15
"""The size of an added shape; instructions name no size."""

STEP, SIZE_STEP, TURN_STEP = 1 / 16, 0.03, torch.pi / 12
"""Steps between the possible centres, sizes and angles of shapes. At 128 pixels a centre's step
is one pixel of the VAE's latents. So a moved shape has the same latents at another place, and a
small model can copy them instead of resampling them."""

_WHITE, _GREY, _BLACK = (0.95, 0.95, 0.95), (0.60, 0.60, 0.60), (0.08, 0.08, 0.08)
_BROWN, _NAVY = (0.40, 0.27, 0.18), (0.08, 0.12, 0.32)
_TONES = torch.tensor([_WHITE, _GREY, _BLACK, _BROWN, _NAVY])
_MIDDLE = 0.5
_PALE, _DARK = (0.78, 0.78, 0.78), (0.40, 0.40, 0.40)


@dataclass(frozen=True, slots=True)
class Ground:
    """A ground with a name for instructions."""

    pattern: str
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    period: float = 0.25
    turn: float = 0.0


GROUNDS = {
    "white": Ground("plain", (_WHITE, _WHITE)),
    "grey": Ground("plain", (_GREY, _GREY)),
    "black": Ground("plain", (_BLACK, _BLACK)),
    "brown": Ground("plain", (_BROWN, _BROWN)),
    "navy": Ground("plain", (_NAVY, _NAVY)),
    "foggy": Ground("gradient", (_WHITE, _GREY)),
    "shady": Ground("gradient", (_GREY, _BLACK)),
    "dusky": Ground("gradient", (_NAVY, _BROWN)),
    "striped": Ground("stripes", (_WHITE, _PALE)),
    "checked": Ground("checks", (_PALE, _GREY)),
    "dotted": Ground("dots", (_DARK, _GREY)),
}


@dataclass(frozen=True, slots=True)
class Scenes:
    """N scenes of one aspect ratio.

    Attributes:
        extent: (width, height) of the pictures; the shorter is 1.
        shape: (N, SLOTS) int64, an index into SHAPES.
        colour: (N, SLOTS) int64, an index into COLOURS.
        tint: (N, SLOTS, 3) float32, the exact colour in [0, 1].
        x, y: (N, SLOTS) float32, the centre.
        size: (N, SLOTS) float32, the distance from the centre to the farthest point.
        angle: (N, SLOTS) float32, radians.
        present: (N, SLOTS) bool.
        pattern: (N,) int64, an index into PATTERNS.
        tones: (N, 2, 3) float32, the ground's two colours.
        period: (N,) float32, the period of a repeating pattern.
        turn: (N,) float32, the pattern's direction in radians.
        phase: (N, 2) float32, the pattern's shift in periods.
        style: (N,) int64, an index into STYLES.
    """

    extent: tuple[float, float]
    shape: Tensor
    colour: Tensor
    tint: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    angle: Tensor
    present: Tensor
    pattern: Tensor
    tones: Tensor
    period: Tensor
    turn: Tensor
    phase: Tensor
    style: Tensor

    def __len__(self) -> int:
        return len(self.style)

    def tensors(self) -> dict[str, Tensor]:
        """Return every field except the extent, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extent"}

    def take(self, index: Tensor | slice) -> Scenes:
        """Return some of the scenes."""
        return self._with({name: t[index] for name, t in self.tensors().items()})

    def to(self, device: torch.device | str) -> Scenes:
        """Move all tensors to a device."""
        return self._with({name: t.to(device) for name, t in self.tensors().items()})

    def put(self, slot: Tensor, **values: Any) -> Scenes:
        """Change one shape of every scene.

        Args:
            slot: (N,) int64, the shape's slot.
            values: new values by field, each (N,) (tint: (N, 3)) or a number.
        """
        rows = torch.arange(len(self))
        changed: dict[str, Tensor] = {}
        for name, value in values.items():
            changed[name] = getattr(self, name).clone()
            changed[name][rows, slot] = torch.as_tensor(value, dtype=changed[name].dtype)
        return self._with(changed)

    def _with(self, tensors: dict[str, Any]) -> Scenes:
        return replace(self, **tensors)

    def of(self, name: str, slot: Tensor) -> Tensor:
        """Return a field of one shape of every scene: (N,) or (N, 3)."""
        value: Tensor = getattr(self, name)[torch.arange(len(self)), slot]
        return value

    def on(self, ground: Tensor) -> Scenes:
        """Put every scene on a named ground: (N,) int64, an index into GROUNDS."""
        named = list(GROUNDS.values())
        return replace(
            self,
            pattern=torch.tensor([PATTERNS.index(g.pattern) for g in named])[ground],
            tones=torch.tensor([g.tones for g in named])[ground],
            period=torch.tensor([g.period for g in named])[ground],
            turn=torch.tensor([g.turn for g in named])[ground],
            phase=torch.zeros(len(self), 2),
        )

    def orderly(self) -> Tensor:
        """Whether all shapes are inside, overlap little and have an allowed size: (N,) bool."""
        width, height = self.extent
        margin = 0.8 * self.size
        inside = (self.x >= margin) & (self.x <= width - margin)
        inside &= (self.y >= margin) & (self.y <= height - margin)
        inside &= (self.size >= _SMALLEST) & (self.size <= _LARGEST)
        apart = torch.hypot(
            self.x[:, :, None] - self.x[:, None], self.y[:, :, None] - self.y[:, None]
        )
        reach = self.size[:, :, None] + self.size[:, None]
        both = self.present[:, :, None] & self.present[:, None]
        both &= ~torch.eye(SLOTS, dtype=torch.bool)
        return (inside | ~self.present).all(1) & ((apart >= 0.75 * reach) | ~both).flatten(1).all(1)


_SMALLEST, _LARGEST = 0.075, 0.27


def join(parts: Sequence[Scenes]) -> Scenes:
    """Concatenate scenes of one aspect ratio."""
    together = {name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()}
    return parts[0]._with(together)  # noqa: SLF001


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

    def which(self, allowed: Tensor) -> Tensor:
        """Draw the index of a True column in each row: (N, K) bool to (N,) int64."""
        return (torch.rand(allowed.shape, generator=self._generator) * allowed).argmax(1)


def draw(n: int, extent: tuple[float, float], dice: Dice) -> Scenes:
    """Draw n scenes; some may not be orderly.

    No two shapes of a scene (nor the free slot's) have both kind and colour in common, so
    that "the red circle" is unique.
    """
    pairs = dice.order(n, len(SHAPES) * len(COLOURS))[:, :SLOTS]
    colour = pairs % len(COLOURS)
    count = torch.tensor([2, 3, 3, 4, 4, 4])[
        dice.below(6, n)
    ]  # more often many, because crowded scenes are rejected more often
    pattern = torch.tensor([0, 0, 1, 1, 2, 3, 4])[dice.below(7, n)]
    tone = dice.below(len(_TONES), n)
    other = (tone + 1 + dice.below(len(_TONES) - 1, n)) % len(_TONES)
    first = _TONES[tone]
    lighter = torch.where(first.mean(1) < _MIDDLE, 1.0, -1.0) * dice.uniform(0.10, 0.20, n)
    second = torch.where(
        (pattern == PATTERNS.index("gradient"))[:, None],
        _TONES[other],
        first + lighter[:, None],
    )
    second = torch.where((pattern == PATTERNS.index("plain"))[:, None], first, second)
    jitter = dice.uniform(-0.03, 0.03, n, 1, 3)
    return Scenes(
        extent=extent,
        shape=pairs // len(COLOURS),
        colour=colour,
        tint=(PALETTE[colour] + dice.uniform(-0.04, 0.04, n, SLOTS, 3)).clamp(0, 1),
        x=_round_to(dice.uniform(0.08, extent[0] - 0.08, n, SLOTS), STEP),
        y=_round_to(dice.uniform(0.08, extent[1] - 0.08, n, SLOTS), STEP),
        size=_round_to(dice.uniform(0.105, 0.225, n, SLOTS), SIZE_STEP),
        angle=_round_to(dice.uniform(-torch.pi, torch.pi, n, SLOTS), TURN_STEP),
        present=torch.arange(SLOTS) < count[:, None],
        pattern=pattern,
        tones=(torch.stack([first, second], 1) + jitter).clamp(0, 1),
        period=dice.uniform(0.2, 0.35, n),
        turn=dice.uniform(-torch.pi, torch.pi, n),
        phase=dice.uniform(0, 1, n, 2),
        style=torch.zeros(n, dtype=torch.int64),
    )


def _round_to(value: Tensor, step: float) -> Tensor:
    return (value / step).round() * step
