"""Stores finished pictures, and signs links to them.

Links expire, and a sweep deletes old pictures. A sweep deletes only files with names from
`fresh_name`, because a folder or bucket may contain other files.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from fluxfire.errors import FluxfireError
from fluxfire.serve.decoding import MEDIA_TYPES, Format
from fluxfire.serve.errors import RefusedError
from fluxfire.text import extra_hint

SHORTEST_SECRET = 16
"""Fewest bytes of the secret that signs links."""
_LONGEST_LINK = 7 * 24 * 3600  # seconds; S3 signs no link for longer
_NAME = re.compile(r"\d{8}-[0-9a-f]{32}\.(png|jpg|webp)", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_PARTIAL_PREFIX = ".fluxfire-"  # of files that are not complete yet


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


def open_storage(
    where: str, *, secret: bytes, retention_seconds: float, link_seconds: float
) -> Storage:
    """Open the storage that an option names.

    Args:
        where: a folder, or "s3://bucket/prefix"; append "?endpoint=https://…&region=auto" for
            another store than Amazon's.
        secret: signs links to a folder.
        retention_seconds: how long the store keeps pictures.
        link_seconds: how long a link is valid; at most the retention time.

    Raises:
        StorageError: the kind of storage is unknown, or its settings are invalid.
    """
    if not where.startswith("s3://"):
        if not where or "://" in where:
            raise StorageError(
                f"pictures cannot be stored in {where.partition('?')[0]!r}; give a folder, or "
                "s3://bucket/prefix"
            )
        return LocalStorage(
            Path(where).expanduser(),
            secret=secret,
            retention_seconds=retention_seconds,
            link_seconds=link_seconds,
        )
    parts = urlsplit(where)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(options.keys() - {"endpoint", "region"})
    if unknown or parts.fragment:
        raise StorageError(
            f"the storage s3://{parts.netloc.rpartition('@')[2]} has unknown options: "
            f"{', '.join(unknown) or '#'}; the options are endpoint and region"
        )
    return S3Storage(
        parts.netloc,
        parts.path.strip("/"),
        endpoint=options.get("endpoint"),
        region=options.get("region"),
        retention_seconds=retention_seconds,
        link_seconds=link_seconds,
    )


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
        self._link_seconds = _link_lifetime(link_seconds or retention_seconds, retention_seconds)
        self._clock = clock

    def check(self) -> None:
        """Create the folder, and a temporary file in it. See `Storage.check`."""
        with self._convert_errors("use"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(b"fluxfire")

    def put(self, name: str, data: bytes, media_type: str) -> None:  # noqa: ARG002 - the name has it
        """Write a temporary file, and rename it when it is complete. See `Storage.put`."""
        _check_name(name)
        with self._convert_errors("store a picture in"), contextlib.ExitStack() as undo:
            number, part = tempfile.mkstemp(dir=self._folder, prefix=_PARTIAL_PREFIX)
            undo.callback(Path(part).unlink, missing_ok=True)
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(self._folder / name)

    def url(self, name: str) -> str:
        """Sign a link for `read`. See `Storage.url`."""
        _check_name(name)
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
        _check_name(name)
        if expires <= self._clock():
            raise LinkRefusedError("the link has expired", status=410, code="link-expired")
        with self._convert_errors("read a picture in"):
            try:
                data = (self._folder / name).read_bytes()
            except FileNotFoundError:
                raise LinkRefusedError(
                    "the picture is no longer kept", status=404, code="file-gone"
                ) from None
        suffix = name.rpartition(".")[2]
        return data, next(kind for key, kind in MEDIA_TYPES.items() if key.lower() == suffix)

    def sweep(self, now: float | None = None) -> int:
        """Delete old pictures, and incomplete files of a crash. See `Storage.sweep`."""
        oldest = (self._clock() if now is None else now) - self._retention
        deleted = 0
        with self._convert_errors("sweep"), os.scandir(self._folder) as entries:
            for entry in entries:
                whole = _NAME.fullmatch(entry.name) is not None
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


class S3Storage:
    """Stores pictures in a bucket of Amazon S3, or of any store with the same protocol.

    boto3 finds the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the
    machine's role. A link that was signed with a role's temporary credentials expires with them.

    Args:
        bucket: name of the bucket, which must exist.
        prefix: prefix of all names in the bucket, like a folder.
        endpoint: the store's URL, if the store is not Amazon's.
        region: the bucket's region; "auto" for Cloudflare R2.
        retention_seconds: how long the bucket keeps pictures.
        link_seconds: how long a link is valid; at most the retention time and seven days.
        timeout_seconds: time limit for each response.
        attempts: total number of attempts if the network or the store fails.

    Raises:
        StorageError: a setting is invalid, or boto3 is not installed.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        retention_seconds: float,
        link_seconds: float,
        timeout_seconds: float = 20,
        attempts: int = 4,
    ) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise StorageError(f"storing pictures in S3 needs boto3; {extra_hint('s3')}") from error
        if _BUCKET.fullmatch(bucket) is None:
            raise StorageError(
                f"{bucket.rpartition('@')[2]!r} is not a bucket's name; write s3://bucket/prefix, "
                "with credentials in the environment, not in it"
            )
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._retention = retention_seconds
        self._link_seconds = min(_link_lifetime(link_seconds, retention_seconds), _LONGEST_LINK)
        config = Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=min(5, timeout_seconds),
            read_timeout=timeout_seconds,
            # Other stores seldom use bucket names as host names.
            s3={"addressing_style": "path" if endpoint else "auto"},
            # Some stores do not support the checksums that newer versions of boto3 add by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self._convert_errors("use"):
            # A new session, because creating the default session is not thread-safe.
            self._client: Any = boto3.session.Session().client(
                "s3", endpoint_url=endpoint, region_name=region, config=config
            )

    def check(self) -> None:
        """Try to list, store and delete. See `Storage.check`."""
        with self._convert_errors("use"):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            key = self._prefix + fresh_name("PNG")
            self._client.put_object(Bucket=self._bucket, Key=key, Body=b"")
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def put(self, name: str, data: bytes, media_type: str) -> None:
        """Store an object with its media type. See `Storage.put`."""
        _check_name(name)
        with self._convert_errors("store a picture in"):
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + name, Body=data, ContentType=media_type
            )

    def url(self, name: str) -> str:
        """Presign a GET, without a request to the store. See `Storage.url`."""
        _check_name(name)
        with self._convert_errors("sign a link to"):
            link = self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._bucket, "Key": self._prefix + name},
                ExpiresIn=int(self._link_seconds),
            )
        return str(link)

    def sweep(self, now: float | None = None) -> int:
        """Delete old objects, page by page. See `Storage.sweep`."""
        oldest = (time.time() if now is None else now) - self._retention
        deleted = 0
        with self._convert_errors("sweep"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for entry in page.get("Contents", ()):
                    name = entry["Key"].removeprefix(self._prefix)
                    if _NAME.fullmatch(name) and entry["LastModified"].timestamp() <= oldest:
                        # One by one, because a request for many needs a checksum that some
                        # stores do not support.
                        self._client.delete_object(Bucket=self._bucket, Key=entry["Key"])
                        deleted += 1
        return deleted

    @contextmanager
    def _convert_errors(self, action: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        place = f"s3://{self._bucket}/{self._prefix}"
        try:
            yield
        except NoCredentialsError as error:
            raise StorageError(
                f"cannot {action} {place}: there are no credentials; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from error
        except (BotoCoreError, ClientError, ValueError) as error:
            raise StorageError(
                f"cannot {action} {place}: {error}; check the bucket, the endpoint, the region and "
                "what the credentials may do"
            ) from error


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise StorageError(f"{name[:100]!r} is not a picture's name here; `fresh_name` makes them")


def _link_lifetime(link_seconds: float, retention_seconds: float) -> float:
    """Return how long links are valid: at most as long as the store keeps their pictures."""
    if not (link_seconds >= 1 and retention_seconds >= 1):
        raise StorageError(
            f"pictures kept for {retention_seconds:g} seconds with links for {link_seconds:g}: "
            "both need one second or more"
        )
    return min(link_seconds, retention_seconds)
