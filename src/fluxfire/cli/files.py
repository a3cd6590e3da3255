"""Checks of the files that a command writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from fluxfire.cli.console import UsageError

_READ_ONLY = {"BUFR", "GRIB", "HDF5", "WMF"}  # Pillow announces writers that always fail


def check_output(path: Path, *, inputs: Sequence[str | Path | None], overwrite: bool) -> None:
    """Check that a file can be written, before the work begins.

    Args:
        path: the file to write.
        inputs: files that the command reads; it never writes over them.
        overwrite: whether the file may exist already.

    Raises:
        UsageError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if any(source is not None and _is_same_file(path, Path(source)) for source in inputs):
        raise UsageError(f"cannot write {path}: it is an input of this command; name another file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; name another file, or add --overwrite")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: permission denied")


def check_picture_format(path: Path) -> None:
    """Check that a file's suffix is a picture format that can be written.

    Raises:
        UsageError: it is none.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE or kind in _READ_ONLY:
        suffix = path.suffix or "no suffix"
        raise UsageError(f"cannot write {path}: {suffix} is no picture format, such as .png")


def free_path(name: str) -> Path:
    """Return the first free path of `out.png`, `out-2.png`, `out-3.png` and so on."""
    path = Path(name)
    numbered = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


def _is_same_file(path: Path, other: Path) -> bool:
    """Whether two paths lead to one file, also through links."""
    try:
        return path.samefile(other)
    except OSError:  # one of them does not exist
        return False
