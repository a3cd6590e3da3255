"""Idempotency keys: the same key with the same request gets the same job."""

from __future__ import annotations

import hashlib
import re

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import StoredJob
from fluxfire.serve.request_body import SentRequest

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def check_key(key: str | None) -> None:
    """Refuse a key that is too long, or has a space or another character than ASCII's.

    Raises:
        RefusedError: it has one.
    """
    if key is not None and _KEY.fullmatch(key) is None:
        raise RefusedError(
            "Idempotency-Key must have 1 to 255 characters of ASCII, without spaces",
            status=422,
            code="invalid-request",
        )


def fingerprint_of(sent: SentRequest) -> str:
    """Return a hash of a request and its picture."""
    digest = hashlib.sha256(sent.request.model_dump_json(exclude_none=True).encode())
    digest.update(b"\0" + (sent.file or b""))
    return digest.hexdigest()


def same_job(known: StoredJob, fingerprint: str) -> str:
    """Return the id of the job that came with this key before.

    Args:
        known: that job.
        fingerprint: of the request that comes now.

    Raises:
        RefusedError: that job came from another request.
    """
    if known.fingerprint != fingerprint:
        raise RefusedError(
            "this Idempotency-Key came with another request before; give each request a key of "
            "its own",
            status=422,
            code="idempotency-key-reused",
        )
    return known.id
