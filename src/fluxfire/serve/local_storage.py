"""Stores pictures in a folder, and signs links that this service itself answers."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from fluxfire.serve.decoding import media_type_of
from fluxfire.serve.storage import (
    NAME,
    LinkRefusedError,
    StorageError,
    check_name,
    gone_error,
    link_lifetime,
)

SHORTEST_SECRET = 16
"""Fewest bytes of the secret that signs links."""
_PARTIAL_PREFIX = ".fluxfire-"  # of files that are not complete yet


class LocalStorage:
    """Stores pictures in a folder; the server itself serves them.

    Args:
        folder: the folder; `check` creates it if it is missing.
        secret: signs links. Servers that share a folder must share it.
        retention_seconds: how long the folder keeps pictures.
        link_seconds: how long a link is valid; by default and at most the retention time.
        clock: returns the time, in seconds since 1970.

    Raises:
        StorageError: the secret is too short, or a time is not positive.
    """

    def __init__(
        self,
        folder: Path,
        *,
        secret: bytes,
        retention_seconds: float,
        link_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if len(secret) < SHORTEST_SECRET:
            raise StorageError(
                f"the secret that signs links needs {SHORTEST_SECRET} bytes or more, and this one "
                f"has {len(secret)}; make one with `openssl rand -hex 32`"
            )
        self._folder = folder
        self._secret = secret
        self._retention = retention_seconds
        self._link_seconds = link_lifetime(link_seconds or retention_seconds, retention_seconds)
        self._clock = clock

    def check(self) -> None:
        """Create the folder, and a temporary file in it. See `Storage.check`."""
        with self._convert_errors("use"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(b"fluxfire")

    def put(self, name: str, data: bytes, media_type: str) -> None:  # noqa: ARG002 - the name has it
        """Write a temporary file, and rename it when it is complete. See `Storage.put`."""
        check_name(name)
        with self._convert_errors("store a picture in"), contextlib.ExitStack() as undo:
            number, part = tempfile.mkstemp(dir=self._folder, prefix=_PARTIAL_PREFIX)
            undo.callback(Path(part).unlink, missing_ok=True)
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(self._folder / name)

    def get(self, name: str) -> bytes:
        """Read a file. See `Storage.get`."""
        check_name(name)
        with self._convert_errors("read a picture in"):
            try:
                return (self._folder / name).read_bytes()
            except FileNotFoundError:
                raise gone_error() from None

    def url(self, name: str) -> str:
        """Sign a link for `read`. See `Storage.url`."""
        check_name(name)
        expires = int(self._clock() + self._link_seconds)
        query = urlencode({"expires": expires, "signature": self._signature(name, expires)})
        return f"/files/{name}?{query}"

    def read(self, name: str, expires: int, signature: str) -> tuple[bytes, str]:
        """Read the picture of a link.

        Args:
            name: the link's name.
            expires: the link's expiry, in seconds since 1970.
            signature: the link's signature.

        Returns:
            The file's bytes and their media type.

        Raises:
            LinkRefusedError: the signature is wrong, the link expired, or its picture is deleted.
            StorageError: the file cannot be read.
        """
        signed = self._signature(name, expires).encode()
        if not hmac.compare_digest(signed, signature.encode("utf-8", "replace")):
            raise LinkRefusedError(
                "the link's signature is wrong; use the link just as it was given",
                status=403,
                code="link-invalid",
            )
        check_name(name)
        if expires <= self._clock():
            raise LinkRefusedError("the link has expired", status=410, code="link-expired")
        data = self.get(name)
        return data, media_type_of(name)

    def sweep(self, now: float | None = None) -> int:
        """Delete old pictures, and incomplete files of a crash. See `Storage.sweep`."""
        oldest = (self._clock() if now is None else now) - self._retention
        deleted = 0
        with self._convert_errors("sweep"), os.scandir(self._folder) as entries:
            for entry in entries:
                whole = NAME.fullmatch(entry.name) is not None
                if not (whole or entry.name.startswith(_PARTIAL_PREFIX)):
                    continue
                # Another server may sweep the same folder.
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode) and facts.st_mtime <= oldest:
                        Path(entry.path).unlink()
                        deleted += whole
        return deleted

    def _signature(self, name: str, expires: int) -> str:
        # The first line separates this use of the secret from any other use.
        text = f"fluxfire-file\n{expires}\n{name}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    @contextmanager
    def _convert_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(
                f"cannot {action} the folder {self._folder}: {reason}; give the server a "
                "writable folder with free space"
            ) from error
