"""Reads pictures from files, and draws differences between pictures."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from fluxfire.errors import PictureError

SMALLEST = 16
"""Minimum side in pixels: a Kontext pipeline works on patches of 16 × 16 pixels."""
AMPLIFIED = 8
"""Factor by which `draw_difference` amplifies differences."""


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as RGB.

    Rotates it as its EXIF data says. Transparent pixels become white.

    Raises:
        PictureError: the file cannot be read, or the picture is too small to edit.
    """
    try:
        with Image.open(path) as file:
            picture = flatten_to_rgb(ImageOps.exif_transpose(file))
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"cannot read {path}: {reason}") from None
    if min(picture.size) < SMALLEST:
        raise PictureError(
            f"{path} has {picture.width}x{picture.height} pixels; a side needs {SMALLEST} or more"
        )
    return picture


def flatten_to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB, on a white background if it has transparency."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    foreground = picture.convert("RGBA")
    background = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(background, foreground).convert("RGB")


def draw_difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Draw the absolute difference of two pictures of the same size, amplified by `AMPLIFIED`."""
    table = [min(255, AMPLIFIED * value) for value in range(256)]
    return ImageChops.difference(one, other).point(table * len(one.getbands()))
