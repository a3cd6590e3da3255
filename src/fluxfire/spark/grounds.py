"""The grounds behind the things: landscapes and surfaces, drawn by program from seeds.

Each kind has one function. It gets the pixels' coordinates, x and y of (N, H, W), where the shorter
side of a picture is 1, and returns (N, 3, H, W). Numbers for one picture are (N, 1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluxfire.spark.noise import Chance

Colour = tuple[float, float, float]


def centres(width: int, height: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return where the pixels' centres are, where the shorter side is 1: (1, 1, W), (1, H, 1)."""
    x, y = ((torch.arange(n, device=device) + 0.5) / min(width, height) for n in (width, height))
    return x[None, None, :], y[None, :, None]


def draw(kind: Tensor, seed: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draw grounds.

    Args:
        kind: (N,) int64, an index into GROUNDS.
        seed: (N,) int64; the same kind and seed give the same ground.
        x: (N, 1, width) or (1, 1, width), where the pixels' centres are; the shorter side of a
            picture is 1.
        y: (N, height, 1) or (1, height, 1), likewise.

    Returns:
        (N, 3, height, width) float32 in [0, 1].
    """
    height, width = y.shape[1], x.shape[2]
    out = torch.empty(len(seed), 3, height, width, device=seed.device)
    y = y + 1 - height / min(width, height)  # the bottom of every picture is 1
    for i, ground in enumerate(GROUNDS.values()):
        rows = (kind == i).nonzero()[:, 0]
        if len(rows):
            at = [c.expand(len(seed), height, width)[rows] for c in (x, y)]
            out[rows] = ground(Chance(seed[rows]), *at)
    return out.clamp(0, 1)


def _mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Blend colours of (N, 3, H, W) by a share of (N, H, W)."""
    return first + (second - first) * share.clamp(0, 1)[:, None]


def _step(value: Tensor, width: float) -> Tensor:
    """Go from 0 to 1 around 0, smoothly, within a width."""
    share = (value / width + 0.5).clamp(0, 1)
    return share * share * (3 - 2 * share)


def _lit(colour: Tensor, light: Tensor) -> Tensor:
    """Multiply colours of (N, 3, H, W) by a brightness of (N, H, W)."""
    return colour * light[:, None]


def _air(chance: Chance, x: Tensor, y: Tensor, cover: float = 0.0) -> Tensor:
    """A sky by day with clouds; `cover` moves the share of clouds."""
    top = chance.pick([(0.20, 0.45, 0.85), (0.30, 0.58, 0.92), (0.16, 0.36, 0.72)], 0.04)
    low = chance.pick([(0.72, 0.86, 0.97), (0.85, 0.91, 0.96), (0.62, 0.80, 0.95)], 0.03)
    sky = _mix(top.expand(-1, -1, *x.shape[1:]), low, y)
    size = chance.number(2.0, 3.6)
    flat = 1 + 0.8 * y
    u, v = x * size, y * size * flat
    thick = chance.clouds(u, v, 6, 0.55)
    sun = chance.noise(u * 1.7, v * 1.7 + 0.3)
    share = _step(thick - chance.number(-0.1, 0.45) + cover, 0.5)
    shade = (0.98 - 0.22 * (thick - 0.2 * sun).clamp(0, 1)).clamp(0, 1)
    white = torch.stack([shade, shade, 0.02 + shade], 1)
    return _mix(sky, white, share)


def _sky(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    return _air(chance, x, y, 0.15)


def _hills(chance: Chance, x: Tensor, rough: float, octaves: int = 5) -> Tensor:
    """The height of a chain of hills along x: (N, H, W), about [-1, 1]."""
    return chance.clouds(x * rough, torch.zeros_like(x), octaves, 0.5)


def _depth(y: Tensor, horizon: Tensor) -> Tensor:
    """Distance of the ground's points from the viewer, 1 at the bottom of the picture."""
    return (1.02 - horizon) / (y - horizon).clamp_min(0.02)


def _sea(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    horizon = chance.number(0.22, 0.42)
    depth = _depth(y, horizon)
    u, v = (x - 0.5) * depth * 5, depth * 14
    swell = chance.clouds(u, v, 4, 0.62)
    ripple = chance.clouds(x * 20, y * 60, 3, 0.6)
    deep = chance.pick([(0.02, 0.22, 0.38), (0.03, 0.30, 0.42), (0.05, 0.18, 0.32)], 0.03)
    light = chance.pick([(0.20, 0.55, 0.65), (0.30, 0.60, 0.75)], 0.04)
    near = (1 / depth).clamp(0, 1)
    water = _mix(deep.expand(-1, -1, *x.shape[1:]), light, 0.45 + 0.5 * swell + 0.25 * ripple)
    foam = _step(swell + 0.5 * ripple - 0.62, 0.25) * (0.3 + 0.7 * near)
    water = _mix(water, torch.ones_like(water) * 0.95, foam)
    water = _mix(water, light * 1.1, 0.7 * (1 - near * 2.5).clamp(0, 1))
    return _mix(_air(chance, x, y / horizon.clamp_min(0.1) * 0.7), water, _step(y - horizon, 0.012))


def _beach(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    sea = _sea(chance, x, y)
    slope, shore = chance.number(-0.25, 0.25), chance.number(0.52, 0.66)
    edge = shore + slope * (x - 0.5) + 0.035 * chance.clouds(x * 4, y * 2, 4)
    sand = chance.pick([(0.90, 0.78, 0.56), (0.86, 0.72, 0.52), (0.95, 0.86, 0.68)], 0.03)
    grain = chance.noise(x * 90, y * 90) + chance.noise(x * 50, y * 50)
    dune = chance.clouds(x * 5, y * 11, 5, 0.6)
    beach = _lit(sand, 0.95 + 0.16 * dune + 0.06 * grain)
    beach = _lit(beach, 1 - 0.35 * _step(0.07 - (y - edge), 0.08))  # the wet sand
    foam = torch.exp(-(((y - edge) / 0.018) ** 2)) * (0.7 + 0.6 * chance.clouds(x * 25, y * 25, 3))
    return _mix(_mix(sea, beach, _step(y - edge, 0.02)), torch.ones_like(sea), foam)


def _blades(chance: Chance, x: Tensor, y: Tensor, depth: Tensor) -> Tensor:
    """The brightness of standing grass."""
    bend = 0.6 * chance.noise(x * 6, y * 6)
    near = chance.noise(x * 70 + bend * 8, y * 16) + chance.noise(x * 45 - bend * 6, y * 11)
    far = chance.clouds((x - 0.5) * depth * 9, depth * 9, 4, 0.6)
    return 0.45 * near * (1.5 / depth).clamp(0, 1) + 0.6 * far


def _meadow(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    horizon = chance.number(0.28, 0.45) - 0.03 * _hills(chance, x, 2.0, 4)
    depth = _depth(y, horizon)
    green = chance.pick([(0.30, 0.55, 0.14), (0.40, 0.62, 0.20), (0.22, 0.45, 0.12)], 0.04)
    grass = _lit(green, 0.85 + 0.42 * _blades(chance, x, y, depth))
    grass = grass + 0.12 * (1 - 1 / depth.clamp_min(1))[:, None]
    trees = 0.05 + 0.035 * chance.clouds(x * 14, torch.zeros_like(x), 4, 0.6)
    wood = _lit(green * 0.55, 0.8 + 0.5 * chance.clouds(x * 30, y * 30, 3))
    behind = _mix(_air(chance, x, y), wood, _step(y - horizon + trees, 0.015))
    return _mix(behind, grass, _step(y - horizon, 0.012))


def _flowers(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    out = _meadow(chance, x, y)
    horizon = chance.number(0.44, 0.5)
    colours: list[Colour] = [
        (0.92, 0.20, 0.22), (0.95, 0.80, 0.15), (0.80, 0.35, 0.80), (0.98, 0.97, 0.95),
        (0.35, 0.40, 0.90), (0.98, 0.55, 0.72),
    ]  # fmt: skip
    first, second = chance.pick(colours, 0.03), chance.pick(colours, 0.03)
    for scale in (16.0, 12.0, 8.0):
        near, _, number = chance.voronoi(x * scale, y * scale * 1.25)
        size = (0.14 + 0.24 * number) * (0.35 + 0.65 * _step(y - horizon - 0.2, 0.5))
        petal = torch.where((number * 57 % 1 < 0.5)[:, None], first, second)
        shade = _lit(petal, 0.75 + 0.35 * (near / size).clamp(0, 1))
        share = _step(size - near, 0.1) * (number > 0.3) * _step(y - horizon, 0.05)
        out = _mix(out, shade, share)
        heart = _step(0.07 - near, 0.05) * (number > 0.3) * _step(y - horizon, 0.05)
        out = _mix(out, torch.tensor([0.95, 0.75, 0.1], device=x.device)[:, None, None], heart)
    return out


def _forest(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    green = chance.pick([(0.16, 0.36, 0.12), (0.24, 0.42, 0.14), (0.12, 0.30, 0.16)], 0.03)
    glow = chance.pick([(0.75, 0.85, 0.55), (0.85, 0.88, 0.70), (0.60, 0.78, 0.55)], 0.04)
    leaves = chance.clouds(x * 9, y * 9, 5, 0.75)
    out = _mix(green.expand(-1, -1, *x.shape[1:]), glow, 0.35 + 0.5 * leaves)
    floor = chance.number(0.68, 0.82)
    for layer, count in enumerate((13.0, 8.0, 5.0)):
        lean = 0.03 * chance.noise(x * 2, y * 3)
        u = (x + lean) * count
        cell = u.floor().long()
        number = chance.cells(cell, torch.zeros_like(cell), which=layer)
        middle = 0.3 + 0.4 * chance.cells(cell, torch.zeros_like(cell), which=layer + 7)
        wide = (0.09 + 0.12 * number) * (number > 0.25)
        from_middle = (u - cell - middle) / wide.clamp_min(1e-3)
        bark = 0.75 + 0.35 * chance.clouds(x * 60, y * 9, 3, 0.7) - 0.25 * from_middle
        tint = chance.pick([(0.26, 0.19, 0.13), (0.34, 0.26, 0.20), (0.20, 0.17, 0.14)], 0.02)
        haze = (2 - layer) * 0.22
        trunk = _lit(tint, bark) * (1 - haze) + glow * 0.6 * haze
        until = floor + 0.03 * layer + 0.02 * number
        share = _step(1 - from_middle.abs(), 0.25) * (wide > 0) * _step(until - y, 0.02)
        out = _mix(out, trunk, share)
    ground = chance.clouds(x * 10, y * 26, 5, 0.7)
    earth = _mix(
        green * 0.7, chance.pick([(0.42, 0.32, 0.18), (0.30, 0.36, 0.14)], 0.03), 0.5 + ground
    )
    return _mix(out, _lit(earth, 0.9 + 0.45 * ground), _step(y - floor - 0.02 * leaves, 0.06))


def _desert(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    top = chance.pick([(0.35, 0.60, 0.90), (0.50, 0.70, 0.90), (0.90, 0.75, 0.55)], 0.03)
    low = chance.pick([(0.95, 0.88, 0.75), (0.98, 0.80, 0.60)], 0.03)
    out = _mix(top.expand(-1, -1, *x.shape[1:]), low, y * 1.8)
    sand = chance.pick([(0.86, 0.60, 0.34), (0.90, 0.70, 0.45), (0.80, 0.50, 0.30)], 0.03)
    for layer in range(4):
        line = 0.30 + 0.17 * layer + chance.number(-0.04, 0.04)
        dune = _hills(chance, x + 0.2 * layer, 1.3, 3)
        crest = line - (0.05 + 0.03 * layer) * dune
        side = chance.noise(x * 2.2 + y * 1.5, y * 1.2)
        ripple = torch.sin((y - crest) * (220 - 36 * layer) + 6 * chance.noise(x * 5, y * 5))
        light = 0.78 + 0.06 * layer + 0.22 * _step(side, 0.35) - 0.3 * (y - crest).clamp(0, 0.4)
        light = light + 0.045 * ripple + 0.03 * chance.noise(x * 80, y * 80)
        out = _mix(out, _lit(sand, light), _step(y - crest, 0.012))
    return out


def _mountains(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    out = _air(chance, x, y * 1.2)
    rock = chance.pick([(0.38, 0.40, 0.48), (0.42, 0.36, 0.34), (0.30, 0.34, 0.40)], 0.03)
    for layer, line in enumerate((0.42, 0.60, 0.80)):
        ridge = 1 - chance.clouds(x * (2.2 + layer), torch.zeros_like(x), 6, 0.55).abs() * 1.8
        crest = line + chance.number(-0.04, 0.04) - (0.2 - 0.03 * layer) * ridge
        fold = chance.clouds(x * 9 + 3 * (y - crest), (y - crest) * 7, 5, 0.65)
        slope = 0.72 + 0.42 * fold
        stone = _lit(rock, slope)
        high = crest + 0.10 + 0.06 * fold - (y - 0)
        snow = _step(high, 0.05) * (1.0 if layer < 2 else 0.0)
        if layer == 2:  # wooded hills in front
            tree = chance.clouds(x * 26, y * 20, 4, 0.7)
            stone = _lit(
                chance.pick([(0.18, 0.34, 0.20), (0.26, 0.38, 0.20)], 0.03), 0.8 + 0.55 * tree
            )
        colour = _mix(
            stone,
            torch.tensor([0.93, 0.95, 0.99], device=x.device)[:, None, None]
            * slope[:, None].clamp(0.65, 1),
            snow,
        )
        haze = (0.30, 0.12, 0.0)[layer]
        colour = (
            colour * (1 - haze)
            + haze * torch.tensor([0.7, 0.8, 0.92], device=x.device)[:, None, None]
        )
        out = _mix(out, colour, _step(y - crest, 0.012))
    return out


def _snow(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    horizon = chance.number(0.32, 0.46) - 0.03 * _hills(chance, x, 1.6, 4)
    out = _air(chance, x, y, 0.1) * 0.9 + 0.08
    for layer in range(3):  # firs along the horizon
        count = 9.0 + 5 * layer
        cell = (x * count).floor().long()
        number = chance.cells(cell, torch.zeros_like(cell), which=layer)
        tall = (0.08 + 0.14 * number) * (1 - 0.2 * layer) * (number > 0.2)
        up = (horizon - y + 0.01) / tall.clamp_min(1e-3)
        jag = 0.75 + 0.5 * (up * 7 % 1)
        inside = (x * count - cell - 0.5).abs() < 0.45 * (1 - up) * jag
        fir = _lit(
            chance.pick([(0.14, 0.24, 0.20), (0.20, 0.30, 0.30)], 0.02),
            1 + 0.5 * chance.noise(x * 60, y * 60),
        )
        fir = _mix(
            fir, torch.full_like(fir, 0.92), _step(chance.noise(x * 40, y * 40) - 0.25, 0.3) * 0.8
        )
        out = _mix(out, fir, (inside & (up > 0) & (tall > 0)).float())
    drift = chance.clouds(x * 4, y * 9, 5, 0.6)
    grain = chance.noise(x * 70, y * 80)
    light = 0.90 + 0.10 * drift + 0.035 * grain
    shade = torch.stack([light - 0.05, light - 0.01, light + 0.05], 1)
    return _mix(out, shade, _step(y - horizon, 0.015))


def _night(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    deep = chance.pick([(0.02, 0.02, 0.08), (0.03, 0.05, 0.14), (0.06, 0.02, 0.12)], 0.01)
    tilt = chance.number(-1.0, 1.0)
    band = torch.exp(-(((y - 0.5 + tilt * (x - 0.5) - chance.number(-0.2, 0.2)) / 0.25) ** 2))
    mist = chance.clouds(x * 3, y * 3, 6, 0.6)
    glow = chance.pick([(0.35, 0.30, 0.60), (0.20, 0.40, 0.55), (0.60, 0.28, 0.45)], 0.05)
    out = _mix(deep.expand(-1, -1, *x.shape[1:]), glow, band * (0.45 + 0.6 * mist))
    for scale, bright in ((14.0, 1.0), (26.0, 0.75), (44.0, 0.55)):
        near, _, number = chance.voronoi(x * scale, y * scale)
        size = 0.05 + 0.16 * (number * 31 % 1) ** 3
        spark = torch.exp(-((near / size) ** 2)) * bright * (number > 0.35)
        warm = torch.stack([0.85 + 0.15 * number, 0.9 + 0 * number, 1.05 - 0.25 * number], 1)
        out = out + warm * spark[:, None]
    return out


def _wood(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    upright = chance.number(0, 1) < 0.5
    along, across = torch.where(upright, y, x), torch.where(upright, x, y)
    count = chance.number(3.0, 6.0)
    cell = (across * count).floor().long()
    number = chance.cells(cell, torch.zeros_like(cell))
    u, v = along * 2.2 + number * 29, across * count
    warp = chance.clouds(u * 0.9, v * 1.6 + number * 11, 3)
    ring = torch.sin((v * 7 + 5.5 * warp + number * 40) * 2.2)
    fibre = chance.noise(along * 9 + number * 17, across * 110)
    tint = chance.pick(
        [(0.62, 0.42, 0.24), (0.72, 0.54, 0.34), (0.45, 0.29, 0.18), (0.78, 0.68, 0.54)], 0.03
    )
    light = 0.92 + 0.10 * ring + 0.10 * fibre + 0.22 * (number - 0.5)
    gap = (v - cell - 0.5).abs()
    return _lit(tint, light * (1 - 0.7 * _step(gap - 0.485, 0.03)))


def _bricks(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    high = chance.number(7.0, 11.0)
    row = (y * high).floor().long()
    u = x * high * 0.42 + 0.5 * (row % 2)
    cell = u.floor().long()
    number = chance.cells(cell, row)
    rough = chance.clouds(x * 22, y * 22, 4, 0.75)
    tint = chance.pick(
        [(0.62, 0.27, 0.19), (0.70, 0.38, 0.27), (0.52, 0.24, 0.20), (0.72, 0.60, 0.48)], 0.03
    )
    brick = _lit(tint, 0.78 + 0.36 * number + 0.22 * rough)
    edge = torch.minimum(0.5 - (u - cell - 0.5).abs(), (0.5 - (y * high - row - 0.5).abs()) / 2.2)
    joint = _lit(
        chance.pick([(0.72, 0.69, 0.64), (0.55, 0.52, 0.50), (0.82, 0.80, 0.76)], 0.03),
        0.9 + 0.2 * rough,
    )
    return _mix(joint, brick, _step(edge - 0.045 - 0.02 * rough, 0.04))


def _stones(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    size = chance.number(5.0, 9.0)
    bend = 0.25 * chance.noise(x * 3, y * 3)
    near, second, number = chance.voronoi(x * size + bend, y * size * 1.15 + bend)
    rough = chance.clouds(x * 28, y * 28, 4, 0.8)
    tint = chance.pick([(0.55, 0.54, 0.52), (0.62, 0.56, 0.48), (0.44, 0.46, 0.50)], 0.03)
    light = 0.72 + 0.35 * number + 0.16 * rough - 0.35 * near
    gap = _lit(
        chance.pick([(0.22, 0.20, 0.17), (0.26, 0.32, 0.16), (0.36, 0.32, 0.28)], 0.02),
        0.9 + 0.4 * rough,
    )
    return _mix(gap, _lit(tint, light), _step(second - near - 0.12, 0.14))


def _leaves(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    colours: list[Colour] = [
        (0.80, 0.35, 0.08),
        (0.88, 0.60, 0.12),
        (0.62, 0.18, 0.10),
        (0.55, 0.38, 0.16),
    ]
    earth = chance.pick([(0.25, 0.16, 0.10), (0.32, 0.22, 0.12)], 0.02)
    out = _lit(earth, 0.9 + 0.5 * chance.clouds(x * 20, y * 20, 4))
    for scale in (5.0, 5.6, 6.3, 7.0, 7.9, 9.0):
        near, _, number = chance.voronoi(x * scale, y * scale)
        jag = 0.14 * chance.noise(x * scale * 5, y * scale * 5)
        tint = torch.tensor(colours, device=x.device)[(number * 4).long()].movedim(-1, 1)
        vein = chance.noise(x * scale * 6 + number * 50, y * scale * 2)
        leaf = _lit(tint, 0.78 + 0.5 * (number * 13 % 1) * 0.6 + 0.22 * vein + 0.25 * near)
        there = number * 91 % 1 < 0.7
        rim = _step(0.34 - near + jag, 0.05) * there
        shadow = _step(0.40 - near + jag, 0.2) * there
        out = _mix(_lit(out, 1 - 0.5 * shadow), leaf, rim)
    return out


def _water(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    light = chance.pick([(0.25, 0.72, 0.82), (0.15, 0.60, 0.80), (0.20, 0.70, 0.68)], 0.04)
    deep = chance.pick([(0.02, 0.22, 0.42), (0.02, 0.28, 0.38), (0.03, 0.16, 0.36)], 0.02)
    out = _mix(
        light.expand(-1, -1, *x.shape[1:]), deep, y * 0.9 + 0.1 * chance.clouds(x * 3, y * 3, 4)
    )
    rays = chance.clouds(x * 5 + y * chance.number(-2, 2), y * 0.5, 4, 0.6)
    out = out + 0.28 * (rays.clamp(0, 1) * (1 - y).clamp(0, 1))[:, None]
    floor = 0.78 - 0.05 * _hills(chance, x, 2.0, 4)
    bend = 0.5 * chance.clouds(x * 4, y * 6, 3)
    near, second, _ = chance.voronoi(x * 7 + bend, y * 12 + bend)
    caustic = _step(0.16 - (second - near), 0.2)
    sand = chance.pick([(0.55, 0.62, 0.50), (0.45, 0.58, 0.55)], 0.03)
    bottom = _lit(sand, 0.62 + 0.4 * caustic + 0.12 * chance.noise(x * 70, y * 70))
    out = _mix(out, bottom, _step(y - floor, 0.03))
    for scale in (9.0, 15.0):
        far, _, number = chance.voronoi(x * scale, y * scale)
        ring = torch.exp(-(((far - 0.10 - 0.10 * number) / 0.045) ** 2)) * (number < 0.2)
        out = out + 0.5 * ring[:, None]
    return out


def _city(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    out = _mix(
        _air(chance, x, y),
        chance.pick([(0.95, 0.80, 0.62), (0.85, 0.88, 0.92)], 0.03).expand(-1, -1, *x.shape[1:]),
        y * 0.8,
    )
    for layer, count in enumerate((11.0, 8.0, 5.5)):
        u = x * count + chance.number(0, 1)
        cell = u.floor().long()
        number = chance.cells(cell, torch.zeros_like(cell), which=layer)
        other = chance.cells(cell, torch.ones_like(cell), which=layer)
        roof = 0.30 + 0.16 * layer + 0.22 * number
        haze = (0.55, 0.28, 0.0)[layer]
        tint = chance.pick(
            [(0.45, 0.46, 0.52), (0.55, 0.42, 0.36), (0.36, 0.42, 0.50), (0.66, 0.62, 0.56)], 0.04
        )
        wall = _lit(tint, 0.62 + 0.6 * other + 0.05 * chance.noise(x * 50, y * 50))
        columns = 3.0 + (other * 3).floor()
        wx, wy = (u - cell) * columns, y * (22 + 8 * (number * 7 % 1))
        window = ((wx % 1 - 0.5).abs() < 0.28) & ((wy % 1 - 0.5).abs() < 0.3)
        lit = chance.cells(wx.floor().long() + 8 * cell, wy.floor().long(), which=layer + 9)
        glass = torch.where(
            (lit > 0.7)[:, None],
            torch.tensor([0.98, 0.88, 0.55], device=x.device)[:, None, None],
            (torch.tensor([0.22, 0.30, 0.40], device=x.device) * 1.0)[:, None, None],
        )
        wall = torch.where(window[:, None], glass * 0.9 + wall * 0.1, wall)
        wall = (
            wall * (1 - haze)
            + haze * torch.tensor([0.82, 0.85, 0.90], device=x.device)[:, None, None]
        )
        side = 0.5 - (u - cell - 0.5).abs()
        out = _mix(out, wall, ((y > roof) & (side > 0.02 + 0.06 * other)).float())
    road = _lit(
        torch.tensor([0.36, 0.36, 0.38], device=x.device)[None, :, None, None],
        0.95 + 0.16 * chance.clouds(x * 40, y * 60, 3),
    )
    return _mix(out, road, _step(y - chance.number(0.86, 0.93), 0.01))


def _marble(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    base = chance.pick(
        [(0.93, 0.92, 0.90), (0.20, 0.22, 0.25), (0.72, 0.80, 0.76), (0.86, 0.74, 0.68)], 0.02
    )
    vein = chance.pick([(0.45, 0.45, 0.48), (0.60, 0.48, 0.30), (0.30, 0.38, 0.36)], 0.03)
    turn = chance.number(0, math.pi)
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    warp = chance.clouds(u * 3, v * 3, 6, 0.6)
    out = _lit(base.expand(-1, -1, *x.shape[1:]), 0.97 + 0.10 * chance.clouds(x * 4, y * 4, 5, 0.7))
    for scale, strong in ((3.0, 0.85), (7.0, 0.5)):
        line = torch.sin((u * scale + warp * 2.2) * math.pi).abs()
        out = _mix(
            out, vein, strong * torch.exp(-line * 9) * (0.4 + chance.clouds(u * 6, v * 6, 3).abs())
        )
    return out


def _sunset(chance: Chance, x: Tensor, y: Tensor) -> Tensor:
    top = chance.pick([(0.22, 0.20, 0.45), (0.40, 0.22, 0.42), (0.20, 0.32, 0.55)], 0.03)
    low = chance.pick([(0.99, 0.58, 0.22), (0.98, 0.45, 0.30), (0.99, 0.72, 0.38)], 0.03)
    horizon = chance.number(0.62, 0.74)
    sky = _mix(top.expand(-1, -1, *x.shape[1:]), low, y / horizon)
    bar = chance.clouds(x * 2.5, y * 9, 6, 0.6)
    sky = _mix(sky, low * 0.6 + 0.38, _step(bar - 0.1, 0.35) * 0.7)
    sky = _mix(sky, top * 0.8, _step(-bar - 0.25, 0.3) * 0.6)
    sx, sy = chance.number(0.15, 0.85), horizon - chance.number(0.02, 0.16)
    far = torch.hypot(x - sx, y - sy)
    sky = (
        sky
        + torch.tensor([0.5, 0.32, 0.1], device=x.device)[:, None, None]
        * torch.exp(-far * 6)[:, None]
    )
    sky = _mix(
        sky,
        torch.tensor([1.0, 0.95, 0.75], device=x.device)[:, None, None],
        _step(chance.number(0.05, 0.09) - far, 0.012),
    )
    depth = _depth(y, horizon)
    wave = chance.clouds((x - 0.5) * depth * 6, depth * 16, 4, 0.65) + 0.5 * chance.noise(
        x * 14, y * 70
    )
    water = _mix(top * 0.5, low * 0.9, 0.25 + 0.55 * wave)
    path = torch.exp(-(((x - sx) / 0.10) ** 2)) * (0.5 + 0.9 * wave)
    water = _mix(water, torch.tensor([1.0, 0.85, 0.5], device=x.device)[:, None, None], path)
    return _mix(sky, water, _step(y - horizon, 0.01))


GROUNDS: dict[str, Callable[[Chance, Tensor, Tensor], Tensor]] = {
    "sky": _sky,
    "sea": _sea,
    "beach": _beach,
    "meadow": _meadow,
    "field of flowers": _flowers,
    "forest": _forest,
    "desert": _desert,
    "mountains": _mountains,
    "snow": _snow,
    "stars": _night,
    "wooden floor": _wood,
    "brick wall": _bricks,
    "stones": _stones,
    "autumn leaves": _leaves,
    "water": _water,
    "city": _city,
    "marble": _marble,
    "sunset": _sunset,
}
"""The function of each kind of ground, by its noun."""
