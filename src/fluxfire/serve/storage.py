"""Stores finished pictures, and signs links to them.

Links expire, and a sweep deletes old pictures. A sweep deletes only files with names from
`fresh_name`, because a folder or bucket may contain other files. `stores.py` opens a store.
"""

from __future__ import annotations

import re
import secrets
from datetime import UTC, datetime
from typing import Protocol

from fluxfire.errors import FluxfireError
from fluxfire.serve.decoding import Format
from fluxfire.serve.errors import RefusedError

NAME = re.compile(r"\d{8}-[0-9a-f]{32}\.(png|jpg|webp)", re.ASCII)
"""What names a picture here."""


class StorageError(FluxfireError):
    """The store cannot save, find or delete pictures; the message says what to do."""


class LinkRefusedError(RefusedError):
    """A link has a wrong signature (403), has expired (410), or its picture is deleted (404)."""


class Storage(Protocol):
    """Stores pictures for some time. Its methods block, and threads may share it."""

    def check(self) -> None:
        """Check that the store can save and delete pictures.

        Raises:
            StorageError: it cannot.
        """
        ...

    def put(self, name: str, data: bytes, media_type: str) -> None:
        """Store a picture completely, or not at all.

        Args:
            name: a name from `fresh_name`.
            data: the file's bytes.
            media_type: their media type, such as image/png.

        Raises:
            StorageError: the picture could not be stored, or the name is not from `fresh_name`.
        """
        ...

    def get(self, name: str) -> bytes:
        """Read a picture.

        Raises:
            LinkRefusedError: the picture is deleted.
            StorageError: the picture could not be read, or the name is not from `fresh_name`.
        """
        ...

    def url(self, name: str) -> str:
        """Sign a link to a picture, without checking that the picture exists."""
        ...

    def sweep(self, now: float | None = None) -> int:
        """Delete pictures that are older than the retention time.

        Args:
            now: the time, in seconds since 1970; the clock's time by default.

        Returns:
            The number of deleted pictures.

        Raises:
            StorageError: the pictures could not be listed or deleted.
        """
        ...


def fresh_name(format: Format) -> str:  # noqa: A002 - the API's own word
    """Create a name that nobody can guess: today's date, as 20250131-(32 hex digits).png."""
    return f"{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(16)}.{format.lower()}"


def check_name(name: str) -> None:
    """Refuse a name that is not from `fresh_name`."""
    if NAME.fullmatch(name) is None:
        raise StorageError(f"{name[:100]!r} is not a picture's name here; `fresh_name` makes them")


def link_lifetime(link_seconds: float, retention_seconds: float) -> float:
    """Return how long links are valid: at most as long as the store keeps their pictures."""
    if not (link_seconds >= 1 and retention_seconds >= 1):
        raise StorageError(
            f"pictures kept for {retention_seconds:g} seconds with links for {link_seconds:g}: "
            "both need one second or more"
        )
    return min(link_seconds, retention_seconds)


def gone_error() -> LinkRefusedError:
    """Return the error for a picture that is deleted."""
    return LinkRefusedError("the picture is no longer kept", status=404, code="file-gone")
