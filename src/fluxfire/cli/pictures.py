"""What the commands that edit share: pictures, their sizes, and prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fluxfire.cli.options import UsageError, note

_LONGEST_SIDE = 4096
_READ_ONLY = {"BUFR", "GRIB", "HDF5", "WMF"}  # Pillow announces writers that always fail


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


def note_limits(prompt: str, picture: Any) -> None:
    """Print what Spark cannot do for somebody's own picture.

    Args:
        prompt: the instruction for Spark.
        picture: the picture, as Pillow's.
    """
    from fluxfire import spark

    width, height = spark.SparkPipeline.reference_size(*picture.size)
    size = "" if (width, height) == picture.size else f" (yours is resized to {width}x{height})"
    note(
        f"note: Spark is a tiny model that knows only drawn scenes of shapes, at about "
        f"128x128{size}; of a photograph it makes nonsense"
    )
    if foreign := spark.unknown(prompt):
        note(
            f"note: Spark never learned {', '.join(map(repr, foreign))}, so the result "
            f'means little; it knows instructions such as "make the red circle blue"'
        )
