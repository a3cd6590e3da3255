"""Opens the store that a setting names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from fluxfire.serve.local_storage import LocalStorage
from fluxfire.serve.s3_storage import S3Storage
from fluxfire.serve.storage import Storage, StorageError


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
