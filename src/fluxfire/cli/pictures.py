"""What the commands that edit share: pictures, their sizes, and prompts."""

from __future__ import annotations

import argparse
import os
import struct
from pathlib import Path
from typing import Any

from fluxfire.cli.options import UsageError, note

_TINY_SIZE = (128, 128)
_LONGEST_SIDE = 4096
_READ_ONLY = {"BUFR", "GRIB", "HDF5", "WMF"}  # Pillow announces writers that always fail


def open_picture(name: str) -> Any:
    """Read a picture, upright and in RGB.

    Args:
        name: its file.

    Returns:
        The Pillow image.

    Raises:
        UsageError: if it cannot be read, in words.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(name) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        raise UsageError(f"{name} is not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot read {name}: {reason}") from None


def writable(name: str) -> Path:
    """Check that a picture can be written, before time is spent on making it.

    Args:
        name: the file to write.

    Returns:
        Its path.

    Raises:
        UsageError: if it cannot be written, or its suffix is no picture format.
    """
    from PIL import Image

    path = Path(name)
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {name}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {name}: it is a folder")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE or kind in _READ_ONLY:
        raise UsageError(f"cannot write {name}: {path.suffix or 'no suffix'} is no picture format")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {name}: permission denied")
    return path


def check_size(width: int, height: int) -> None:
    """Check that a picture of this size can be generated.

    Args:
        width: in pixels.
        height: in pixels.

    Raises:
        UsageError: if it cannot.
    """
    if any(n == 0 or n % 16 for n in (width, height)):
        raise UsageError(f"size {width}x{height}: both sides must be positive multiples of 16")
    if max(width, height) > _LONGEST_SIDE:
        raise UsageError(f"size {width}x{height}: no side can be longer than {_LONGEST_SIDE}")


def sizes(pipe: Any, size: tuple[int, int] | None, picture: Any) -> dict[str, Any]:
    """Say at which size to generate, and give the picture.

    Args:
        pipe: the pipeline.
        size: width and height asked for; None for those that suit the picture.
        picture: the picture to edit.

    Returns:
        Keyword arguments for the pipeline's call.
    """
    from fluxfire import kontext

    extra: dict[str, Any] = {}
    if kontext.is_tiny(pipe):  # a megapixel of its small patches would take minutes
        width, height = size or _TINY_SIZE
        picture = picture.resize((width, height))
        extra["_auto_resize"] = False
    else:
        width, height = size or kontext.reference_size(pipe, *picture.size)
    return {
        "image": picture,
        "width": width,
        "height": height,
        "max_area": width * height,
        **extra,
    }


def check_pair(arguments: argparse.Namespace) -> None:
    """Check that `--image` and `--prompt` are given both, or neither.

    Args:
        arguments: parsed by a parser with both.

    Raises:
        UsageError: if one of them is missing.
    """
    if (arguments.image is None) != (arguments.prompt is None):
        raise UsageError("--image and --prompt go together: give both, or neither")


def note_foreign_words(prompt: str) -> None:
    """Print a note if a prompt has words that Spark never learned.

    Args:
        prompt: the instruction for Spark.
    """
    from fluxfire import spark

    if foreign := spark.unknown(prompt):
        note(
            f"note: Spark never learned {', '.join(map(repr, foreign))}, so its answer means "
            f'little; it knows requests such as "make the red circle blue" (shapes on plain '
            f"grounds), not photographs"
        )
