"""Where finished pictures are kept, and the links to them.

Links are signed and expire, and a sweep deletes what is older than it should be. A sweep
touches only names as `fresh_name` makes them: a folder or bucket may hold other things.
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
from fluxfire.serve.refusing import Refused
from fluxfire.text import extra_hint

SHORTEST_SECRET = 16
"""Bytes of the secret that links are signed with."""
_LONGEST_LINK = 7 * 24 * 3600  # seconds; S3 signs none for longer
_NAME = re.compile(r"\d{8}-[0-9a-f]{32}\.(png|jpg|webp)", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_PART = ".fluxfire-"  # how files begin that are still being written


class StorageError(FluxfireError):
    """Pictures cannot be stored, found or deleted there; the message says what to do."""


class LinkRefused(Refused):
    """A link's signature is wrong (403), it has expired (410), or its picture is gone (404)."""


class Storage(Protocol):
    """Keeps pictures for some time. Its methods block, and threads may share it."""

    def check(self) -> None:
        """Find out whether pictures can be stored, and deleted, at all.

        Raises:
            StorageError: they cannot.
        """
        ...

    def put(self, name: str, data: bytes, media_type: str) -> None:
        """Store a picture: all of it, or nothing.

        Args:
            name: as `fresh_name` gave it.
            data: the file's bytes.
            media_type: what they are, such as image/png.

        Raises:
            StorageError: it could not be stored, or the name is not such a one.
        """
        ...

    def url(self, name: str) -> str:
        """Sign a link to a picture. Whether it is there is not looked at."""
        ...

    def sweep(self, now: float | None = None) -> int:
        """Delete what has been kept for as long as it should.

        Args:
            now: the time, in seconds since 1970; by default what the clock says.

        Returns:
            How many pictures were deleted.

        Raises:
            StorageError: they could not be listed or deleted.
        """
        ...


def fresh_name(format: Format) -> str:  # noqa: A002 - the API's own word
    """Make a name that nobody can guess, after the day: 20250131-(32 hexadecimal digits).png."""
    return f"{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(16)}.{format.lower()}"


def open_storage(
    where: str, *, secret: bytes, retention_seconds: float, link_seconds: float
) -> Storage:
    """Open the storage that an option names.

    Args:
        where: a folder, or "s3://bucket/prefix", to which "?endpoint=https://…&region=auto"
            may be added for other stores than Amazon's.
        secret: what a folder's links are signed with.
        retention_seconds: how long pictures are kept.
        link_seconds: how long a link to one is good; never longer than that.

    Raises:
        StorageError: there is no such kind of storage, or its settings make no sense.
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
            f"the storage s3://{parts.netloc.rpartition('@')[2]} has options that are not known: "
            f"{', '.join(unknown) or '#'}; there are endpoint and region"
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
    """Keeps pictures in a folder, for the server itself to serve.

    Args:
        folder: where; it is made by `check` if it is missing.
        secret: what links are signed with; servers that share a folder share it.
        retention_seconds: how long pictures are kept.
        link_seconds: how long links are good; by default, and at most, as long as that.
        clock: tells the time, in seconds since 1970.

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
                f"links are signed with a secret of {SHORTEST_SECRET} bytes or more, and this one "
                f"has {len(secret)}; make one with `openssl rand -hex 32`"
            )
        self._folder = folder
        self._secret = secret
        self._retention = retention_seconds
        self._link_seconds = _lifetime(link_seconds or retention_seconds, retention_seconds)
        self._clock = clock

    def check(self) -> None:
        """Make the folder, and a file in it. See `Storage.check`."""
        with self._explained("use"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as probe:
                probe.write(b"fluxfire")

    def put(self, name: str, data: bytes, media_type: str) -> None:  # noqa: ARG002 - the name tells
        """Write a file under another name, and rename it once it is whole. See `Storage.put`."""
        _check_name(name)
        with self._explained("store a picture in"), contextlib.ExitStack() as undo:
            number, part = tempfile.mkstemp(dir=self._folder, prefix=_PART)
            undo.callback(Path(part).unlink, missing_ok=True)
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(self._folder / name)

    def url(self, name: str) -> str:
        """Sign a link that `read` understands. See `Storage.url`."""
        _check_name(name)
        expires = int(self._clock() + self._link_seconds)
        query = urlencode({"expires": expires, "signature": self._signature(name, expires)})
        return f"/files/{name}?{query}"

    def read(self, name: str, expires: int, signature: str) -> tuple[bytes, str]:
        """Read the picture that a link is about.

        Args:
            name: the link's name.
            expires: what the link says.
            signature: what the link says.

        Returns:
            The file's bytes and their media type.

        Raises:
            LinkRefused: the link was not signed here, has expired, or its picture is gone.
            StorageError: the file cannot be read.
        """
        signed = self._signature(name, expires).encode()
        if not hmac.compare_digest(signed, signature.encode("utf-8", "replace")):
            raise LinkRefused(
                "the link's signature is wrong; use the link just as it was given",
                status=403,
                code="link-invalid",
            )
        _check_name(name)
        if expires <= self._clock():
            raise LinkRefused("the link has expired", status=410, code="link-expired")
        with self._explained("read a picture in"):
            try:
                data = (self._folder / name).read_bytes()
            except FileNotFoundError:
                raise LinkRefused(
                    "the picture is no longer kept", status=404, code="file-gone"
                ) from None
        suffix = name.rpartition(".")[2]
        return data, next(kind for key, kind in MEDIA_TYPES.items() if key.lower() == suffix)

    def sweep(self, now: float | None = None) -> int:
        """Delete old pictures, and what a crash left unfinished. See `Storage.sweep`."""
        oldest = (self._clock() if now is None else now) - self._retention
        deleted = 0
        with self._explained("sweep"), os.scandir(self._folder) as entries:
            for entry in entries:
                whole = _NAME.fullmatch(entry.name) is not None
                if not (whole or entry.name.startswith(_PART)):
                    continue
                # Another server may sweep the same folder.
                with contextlib.suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(facts.st_mode) and facts.st_mtime <= oldest:
                        Path(entry.path).unlink()
                        deleted += whole
        return deleted

    def _signature(self, name: str, expires: int) -> str:
        # The first word keeps it apart from all else that the secret may be used for.
        text = f"fluxfire-file\n{expires}\n{name}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    @contextmanager
    def _explained(self, deed: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(
                f"cannot {deed} the folder {self._folder}: {reason}; give the server a folder "
                "that it may write to, with room in it"
            ) from error


class S3Storage:
    """Keeps pictures in a bucket of Amazon S3, or of any store that speaks its protocol.

    Credentials come from where boto3 looks for them: AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, a profile, or the machine's role. A link signed with a role's passing
    credentials ends with them.

    Args:
        bucket: its name; it must exist.
        prefix: what stands before every name in it, as a folder would.
        endpoint: the store's URL, where it is not Amazon's.
        region: where the bucket is; "auto" for Cloudflare R2.
        retention_seconds: how long pictures are kept.
        link_seconds: how long links are good; at most as long as that, and seven days.
        timeout_seconds: how long to wait for each answer.
        attempts: how often to try, in all, where the network or the store fails.

    Raises:
        StorageError: a setting makes no sense, or boto3 is not installed.
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
        self._link_seconds = min(_lifetime(link_seconds, retention_seconds), _LONGEST_LINK)
        config = Config(
            signature_version="s3v4",
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=min(5, timeout_seconds),
            read_timeout=timeout_seconds,
            # Elsewhere buckets are seldom names of hosts.
            s3={"addressing_style": "path" if endpoint else "auto"},
            # Not all stores know the checksums that newer versions of boto3 add by themselves.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self._explained("use"):
            # A session of its own, since threads may not share the default one's making.
            self._client: Any = boto3.session.Session().client(
                "s3", endpoint_url=endpoint, region_name=region, config=config
            )

    def check(self) -> None:
        """List, store and delete, since that is what will be done. See `Storage.check`."""
        with self._explained("use"):
            self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            key = self._prefix + fresh_name("PNG")
            self._client.put_object(Bucket=self._bucket, Key=key, Body=b"")
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def put(self, name: str, data: bytes, media_type: str) -> None:
        """Store an object with its media type. See `Storage.put`."""
        _check_name(name)
        with self._explained("store a picture in"):
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + name, Body=data, ContentType=media_type
            )

    def url(self, name: str) -> str:
        """Presign a GET, without asking the store. See `Storage.url`."""
        _check_name(name)
        with self._explained("sign a link to"):
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
        with self._explained("sweep"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for entry in page.get("Contents", ()):
                    name = entry["Key"].removeprefix(self._prefix)
                    if _NAME.fullmatch(name) and entry["LastModified"].timestamp() <= oldest:
                        # One by one: for many at once boto3 sends a checksum that some
                        # stores do not know, and none that they do.
                        self._client.delete_object(Bucket=self._bucket, Key=entry["Key"])
                        deleted += 1
        return deleted

    @contextmanager
    def _explained(self, deed: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        place = f"s3://{self._bucket}/{self._prefix}"
        try:
            yield
        except NoCredentialsError as error:
            raise StorageError(
                f"cannot {deed} {place}: there are no credentials; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            ) from error
        except (BotoCoreError, ClientError, ValueError) as error:
            raise StorageError(
                f"cannot {deed} {place}: {error}; check the bucket, the endpoint, the region and "
                "what the credentials may do"
            ) from error


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise StorageError(f"{name[:100]!r} is not a picture's name here; `fresh_name` makes them")


def _lifetime(link_seconds: float, retention_seconds: float) -> float:
    """Give how long links are good, which is no longer than what they are about is there."""
    if not (link_seconds >= 1 and retention_seconds >= 1):
        raise StorageError(
            f"pictures kept for {retention_seconds:g} seconds with links for {link_seconds:g}: "
            "both need one second or more"
        )
    return min(link_seconds, retention_seconds)
