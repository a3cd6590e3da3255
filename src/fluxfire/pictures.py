"""Pictures: read from files, and set beside each other."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from fluxfire.errors import PictureError

AMPLIFIED = 8
"""How many times stronger differences are drawn."""


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture, upright and in RGB.

    Raises:
        PictureError: it cannot be read; the message says why.
    """
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"cannot read {path}: {reason}") from None


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Draw how two pictures of one size differ, `AMPLIFIED` times as strong."""
    table = [min(255, AMPLIFIED * value) for value in range(256)]
    return ImageChops.difference(one, other).point(table * len(one.getbands()))
