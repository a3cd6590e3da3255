"""Pictures: read from files, and set beside each other."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from fluxfire.errors import PictureError

SMALLEST = 16
"""Pixels of a side that a Kontext pipeline needs: it works on patches of 16."""
AMPLIFIED = 8
"""How many times stronger differences are drawn."""


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture, upright and in RGB, what is transparent white.

    Raises:
        PictureError: it cannot be read, or is too small to edit; the message says why.
    """
    try:
        with Image.open(path) as file:
            picture = opaque(ImageOps.exif_transpose(file))
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


def opaque(picture: Image.Image) -> Image.Image:
    """Bring a picture to RGB; what is transparent becomes white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), above).convert("RGB")


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Draw how two pictures of one size differ, `AMPLIFIED` times as strong."""
    table = [min(255, AMPLIFIED * value) for value in range(256)]
    return ImageChops.difference(one, other).point(table * len(one.getbands()))
