"""Stores pictures in a bucket of S3, or of a store with the same protocol."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fluxfire.serve.storage import (
    NAME,
    StorageError,
    check_name,
    fresh_name,
    gone_error,
    link_lifetime,
)
from fluxfire.text import extra_hint

_LONGEST_LINK = 7 * 24 * 3600  # seconds; S3 signs no link for longer
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)


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
        self._link_seconds = min(link_lifetime(link_seconds, retention_seconds), _LONGEST_LINK)
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
        check_name(name)
        with self._convert_errors("store a picture in"):
            self._client.put_object(
                Bucket=self._bucket, Key=self._prefix + name, Body=data, ContentType=media_type
            )

    def get(self, name: str) -> bytes:
        """Read an object. See `Storage.get`."""
        check_name(name)
        with self._convert_errors("read a picture in"):
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)
                data: bytes = found["Body"].read()
            except self._client.exceptions.NoSuchKey:
                raise gone_error() from None
        return data

    def url(self, name: str) -> str:
        """Presign a GET, without a request to the store. See `Storage.url`."""
        check_name(name)
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
                    if NAME.fullmatch(name) and entry["LastModified"].timestamp() <= oldest:
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
