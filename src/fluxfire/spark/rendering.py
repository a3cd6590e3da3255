"""Draws scenes: the ground, the things with their shadows, then the light or weather."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fluxfire.spark import grounds, things
from fluxfire.spark.noise import Chance
from fluxfire.spark.scenes import LOOKS, SLOTS, Scenes

_SHADOW, _SHADOW_AT = 0.40, (0.035, 0.055)


def render(scenes: Scenes, shorter: int = 128, *, opacity: Tensor | None = None) -> Tensor:
    """Draw scenes.

    Args:
        scenes: N scenes; their device renders.
        shorter: number of pixels of the shorter side.
        opacity: (N, SLOTS), how opaque the things are, for pictures that are wrong on purpose.

    Returns:
        (N, 3, height, width) float32 in [0, 1].
    """
    x, y = _seen_from_camera(scenes, shorter)
    picture = grounds.draw(scenes.ground, scenes.seed, x, y)
    sprites = things.pictures().to(picture.device)
    seen = scenes.present.float() if opacity is None else scenes.present * opacity
    for slot in range(SLOTS):
        rows = (seen[:, slot] > 0).nonzero()[:, 0]
        if not len(rows):
            continue
        some = scenes.take(rows)
        sprite = things.painted(
            sprites[some.thing[:, slot]], some.tint[:, slot], some.shade[:, slot]
        )
        at = x[rows], y[rows]
        drawn = _placed(sprite, some, slot, *at, (0.0, 0.0))
        shadow = _placed(sprite[:, 4:], some, slot, *at, _SHADOW_AT)
        much = seen[rows, slot][:, None, None, None]
        below = picture[rows] * (1 - _SHADOW * much * shadow)
        picture[rows] = below * (1 - much * drawn[:, 3:4]) + much * drawn[:, :3]
    return look(picture, scenes.look, scenes.weather, x, y)


def coverage(scenes: Scenes, slot: int, shorter: int = 128) -> Tensor:
    """Return the opacity of one slot's thing, present or not: (N, 1, height, width)."""
    x, y = _seen_from_camera(scenes, shorter)
    sprite = things.pictures().to(x.device)[scenes.thing[:, slot], 3:4]
    return _placed(sprite, scenes, slot, x, y, (0.0, 0.0))


def _seen_from_camera(scenes: Scenes, shorter: int) -> tuple[Tensor, Tensor]:
    """Return which points of the scenes the pixels' centres show: (N, 1, W), (N, H, 1)."""
    width, height = (round(side * shorter) for side in scenes.extent)
    x, y = grounds.centres(width, height, scenes.x.device)
    right, down, wider = scenes.camera[:, :, None, None].unbind(1)
    middle = scenes.extent[0] / 2, scenes.extent[1] / 2
    return x + (x - middle[0]) * wider + right, y + (y - middle[1]) * wider + down


def _placed(
    sprite: Tensor, scenes: Scenes, slot: int, x: Tensor, y: Tensor, shift: tuple[float, float]
) -> Tensor:
    """Turn, scale and move sprites of (N, C, S, S) to where their things are: (N, C, H, W)."""

    def of(name: str) -> Tensor:
        value: Tensor = getattr(scenes, name)[:, slot, None, None]
        return value

    size, turn = of("size"), of("turn")
    dx, dy = x - of("x") - shift[0] * size / 0.4, y - of("y") - shift[1] * size / 0.4
    u = (dx * turn.cos() + dy * turn.sin()) * 2 / size
    v = (dy * turn.cos() - dx * turn.sin()) * 2 / size
    u = torch.where(of("flip"), -u, u)
    return functional.grid_sample(sprite, torch.stack([u, v], -1), align_corners=False)


def look(picture: Tensor, which: Tensor, seed: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Put pictures in another light or weather.

    Args:
        picture: (N, 3, height, width).
        which: (N,) int64, an index into LOOKS.
        seed: (N,) int64, which of the lights or weathers of this kind.
        x: (N, 1, width) or (1, 1, width), where the pixels' centres are.
        y: (N, height, 1) or (1, height, 1), likewise.
    """
    out = picture.clone()
    everywhere = picture[:, 0].shape
    for name in LOOKS[1:]:
        rows = (which == LOOKS.index(name)).nonzero()[:, 0]
        if len(rows):
            at = x.expand(everywhere)[rows], y.expand(everywhere)[rows]
            out[rows] = _CHANGES[name](picture[rows], Chance(seed[rows]), *at).clamp(0, 1)
    return out


def _colour(picture: Tensor, *rgb: float) -> Tensor:
    return torch.tensor(rgb, device=picture.device)[:, None, None]


def _night(picture: Tensor, chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    strong = chance.number(0.75, 1.0)[:, None]
    far = torch.hypot(x - chance.number(0.1, 0.9), y - chance.number(0.0, 0.5))
    moon = torch.exp(-far * 3)[:, None] * chance.number(0.1, 0.35)[:, None]
    dark = picture * (_colour(picture, 0.22, 0.27, 0.46) + moon) + _colour(picture, 0.0, 0.01, 0.05)
    return picture + (dark - picture) * strong


def _evening(picture: Tensor, chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    side = chance.number(-1, 1)
    glow = (0.55 + side * (x - 0.5) - 0.5 * (y - 0.5) + 0.15 * chance.clouds(x, y, 3)).clamp(0, 1)
    warm = picture * _colour(picture, 1.02, 0.74, 0.50)
    strong = chance.number(0.22, 0.42)[:, None]
    return warm * 0.86 + _colour(picture, 1.0, 0.50, 0.16) * glow[:, None] * strong


def _fog(picture: Tensor, chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    bank = chance.clouds(x * 1.6, y * 3.2, 5, 0.6)
    thick = (chance.number(0.48, 0.66) + 0.28 * bank).clamp(0.1, 0.9)[:, None]
    grey = chance.number(0.74, 0.90)[:, None] + _colour(picture, -0.01, 0.0, 0.02)
    return picture * (1 - thick) + grey * thick


def _rain(picture: Tensor, chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    dull = 0.62 * (0.55 * picture + 0.45 * things.luma(picture)) + _colour(picture, 0.0, 0.02, 0.05)
    slant = chance.number(-0.35, 0.35)
    for fine, strong in ((55.0, 0.55), (85.0, 0.40)):
        u = (x + slant * y) * fine
        column = u.floor().long()
        number = chance.cells(column, torch.zeros_like(column))
        v = y * (2.4 + 2 * number) + number * 19
        row = v.floor().long()
        there = chance.cells(column, row, which=1) < 0.2
        streak = there * (1 - (v - row)) * (1 - (u - column - 0.5).abs() * 2)
        dull = dull + strong * streak[:, None]
    return dull


def _snowfall(picture: Tensor, chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    pale = 0.72 * (0.7 * picture + 0.3 * things.luma(picture)) + _colour(picture, 0.15, 0.165, 0.19)
    for scale, size in ((8.0, 0.15), (13.0, 0.15), (22.0, 0.17)):
        near, _, number = chance.voronoi(x * scale, y * scale)
        flake = ((size * (0.6 + 0.8 * number) - near) / 0.1 + 0.5).clamp(0, 1) * (number < 0.4)
        pale = pale + (0.98 - pale) * flake[:, None] * 0.95
    return pale


def _grey(picture: Tensor, chance: Chance, *_: Tensor) -> Tensor:
    strong = chance.number(0.9, 1.12)[:, None]
    return ((things.luma(picture) - 0.5) * strong + 0.5).expand_as(picture)


_CHANGES: dict[str, Callable[[Tensor, Chance, Tensor, Tensor], Tensor]] = {
    "night": _night,
    "evening": _evening,
    "fog": _fog,
    "rain": _rain,
    "snowfall": _snowfall,
    "grey": _grey,
}


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian, with replicated borders.

    Args:
        picture: (N, C, height, width).
        sigma: the Gaussian's standard deviation in pixels.
    """
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=picture.device, dtype=picture.dtype)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(picture.shape[1], 1, -1)
    padded = functional.pad(picture, [reach] * 4, mode="replicate")
    rows = functional.conv2d(padded, weights[:, :, None, :], groups=picture.shape[1])
    return functional.conv2d(rows, weights[..., None], groups=picture.shape[1])
