"""Renders scenes from signed distances to each shape's edge, with one pixel of smoothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fluxfire.spark.scenes import PATTERNS, SHAPES, STYLES, Scenes

_STROKE = 0.03
_NIGHT = torch.tensor([0.38, 0.42, 0.60]), torch.tensor([0.0, 0.0, 0.05])
_BLUR = 0.022


def render(scenes: Scenes, shorter: int = 128) -> Tensor:
    """Draw scenes.

    Args:
        scenes: N scenes; their device renders.
        shorter: number of pixels of the shorter side.

    Returns:
        (N, 3, height, width) float32 in [0, 1].
    """
    width, height = (round(side * shorter) for side in scenes.extent)
    device = scenes.style.device
    xs = (torch.arange(width, device=device) + 0.5) / shorter
    ys = (torch.arange(height, device=device) + 0.5) / shorter
    picture = _ground(scenes, xs[None, None, :], ys[None, :, None], shorter)
    outline = (scenes.style == STYLES.index("outline"))[:, None, None]
    for slot in range(scenes.shape.shape[1]):
        distance = _distance(scenes, slot, xs, ys)
        distance = torch.where(outline, distance.abs() - _STROKE / 2, distance)
        cover = (0.5 - distance * shorter).clamp(0, 1) * scenes.present[:, slot, None, None]
        picture = picture.lerp(scenes.tint[:, slot, :, None, None], cover[:, None])
    return _apply_style(picture, scenes.style, shorter)


def _ground(scenes: Scenes, x: Tensor, y: Tensor, shorter: int) -> Tensor:
    """Mix the ground's two tones: (N, 3, H, W)."""
    cos, sin = (f(scenes.turn)[:, None, None] for f in (torch.cos, torch.sin))
    period = scenes.period[:, None, None]
    shift = scenes.phase[:, :, None, None]
    u = (x * cos + y * sin) / period + shift[:, 0]
    v = (y * cos - x * sin) / period + shift[:, 1]
    sharp = period * shorter / math.pi  # makes a wave's zero crossing one pixel wide
    wave_u, wave_v = (torch.sin(2 * math.pi * w) * sharp / 2 for w in (u, v))
    dots = 0.3 - torch.hypot(u - u.round(), v - v.round())
    mixes = {
        "plain": torch.zeros_like(u),
        "gradient": (y / scenes.extent[1]).expand_as(u),
        "stripes": (0.5 + wave_u).clamp(0, 1),
        "checks": (0.5 + wave_u.clamp(-1, 1) * wave_v.clamp(-1, 1) / 2).clamp(0, 1),
        "dots": (0.5 + dots * period * shorter).clamp(0, 1),
    }
    stacked = torch.stack([mixes[name] for name in PATTERNS], 1)
    mix = stacked[torch.arange(len(scenes), device=x.device), scenes.pattern][:, None]
    first, second = (scenes.tones[:, i, :, None, None] for i in (0, 1))
    return first.lerp(second, mix)


def _distance(scenes: Scenes, slot: int, xs: Tensor, ys: Tensor) -> Tensor:
    """Signed distance to the edge of one slot's shape, negative inside: (N, H, W)."""
    angle = scenes.angle[:, slot, None, None]
    dx = xs[None, None, :] - scenes.x[:, slot, None, None]
    dy = ys[None, :, None] - scenes.y[:, slot, None, None]
    x = dx * angle.cos() + dy * angle.sin()
    y = dy * angle.cos() - dx * angle.sin()
    size = scenes.size[:, slot, None, None]
    far = torch.hypot(x, y)
    across, along = x.abs(), y.abs()
    half, arm = 0.75 * size, 0.32 * size
    distances = {
        "circle": far - 0.9 * size,
        "square": torch.maximum(across, along) - half,
        "triangle": torch.maximum(y - size / 2, across * math.cos(math.pi / 6) - y / 2 - size / 2),
        "star": _star(x, y, far, size),
        "ring": (far - 0.72 * size).abs() - 0.24 * size,
        "cross": torch.minimum(
            torch.maximum(across - 0.95 * size, along - arm),
            torch.maximum(along - 0.95 * size, across - arm),
        ),
    }
    stacked = torch.stack([distances[name] for name in SHAPES], 1)
    return stacked[torch.arange(len(scenes), device=xs.device), scenes.shape[:, slot]]


def _star(x: Tensor, y: Tensor, far: Tensor, size: Tensor) -> Tensor:
    """Return the signed distance to a five-pointed star, by folding the plane to one edge."""
    fifth = 2 * math.pi / 5
    folded = ((torch.atan2(x, -y) + fifth / 2) % fifth - fifth / 2).abs()
    # The edge runs from the point (size, 0) to the notch, at an angle of half a fifth.
    notch = 0.45
    ex, ey = notch * math.cos(fifth / 2) - 1, notch * math.sin(fifth / 2)
    length = math.hypot(ex, ey)
    return (ey * (far * folded.cos() - size) - ex * far * folded.sin()) / length


def _apply_style(picture: Tensor, style: Tensor, shorter: int) -> Tensor:
    gain, lift = (t.to(picture.device)[:, None, None] for t in _NIGHT)
    night = picture * gain + lift
    picture = torch.where((style == STYLES.index("night"))[:, None, None, None], night, picture)
    blurred = style == STYLES.index("blur")
    if blurred.any():
        picture = picture.clone()
        picture[blurred] = blur(picture[blurred], _BLUR * shorter)
    return picture.clamp(0, 1)


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
