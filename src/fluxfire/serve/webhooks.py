"""Announces the end of jobs to the URLs that clients gave, in the form of Standard Webhooks.

See https://www.standardwebhooks.com; receivers can check the signature with its libraries.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable

from fluxfire.errors import FluxfireError
from fluxfire.serve import fetching
from fluxfire.serve.allowed_hosts import FetchRefusedError, check_url
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import JobStore, StoredJob
from fluxfire.serve.settings import Settings

Post = Callable[[str, bytes, dict[str, str]], Awaitable[int]]
BodyOf = Callable[[StoredJob], bytes]
PAUSES = (5.0, 30.0, 180.0, 900.0, 3600.0)
"""Seconds between the tries of a webhook. After the last try it is given up."""
_PREFIX = "whsec_"
_KEY_BYTES = range(24, 65)  # as Standard Webhooks asks for
_LOOK_SECONDS = 1.0
_GOOD, _GONE = range(200, 300), 410
_log = logging.getLogger(__name__)


def read_secret(text: str) -> bytes:
    """Return the key that signs webhooks.

    Args:
        text: `whsec_` and the key in base64.

    Raises:
        FluxfireError: the text has another form.
    """
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not text.startswith(_PREFIX) or len(key) not in _KEY_BYTES:
        raise FluxfireError(
            f"webhook_secret must be {_PREFIX} and {_KEY_BYTES.start} to {_KEY_BYTES.stop - 1} "
            f'bytes in base64; make one with echo "{_PREFIX}$(openssl rand -base64 32)"'
        )
    return key


def signed_headers(key: bytes, name: str, now: int, body: bytes) -> dict[str, str]:
    """Return the headers that a webhook needs.

    Args:
        key: from `read_secret`.
        name: the message's id; it is the same for each try.
        now: the time, in seconds since 1970.
        body: what is posted.
    """
    digest = hmac.new(key, f"{name}.{now}.".encode() + body, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "webhook-id": name,
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


class Webhooks:
    """Posts the webhooks that are due, one after another."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        *,
        on_end: Callable[[str], None] = lambda outcome: None,  # noqa: ARG005
        post: Post | None = None,
    ) -> None:
        """Create them.

        Args:
            settings: the service's.
            store: the jobs.
            on_end: callback with "delivered" or "given-up".
            post: posts a body with headers to a URL, and returns the status; by default over HTTP.
        """
        self._key = read_secret(settings.webhook_secret) if settings.webhook_secret else b""
        self._settings, self._store = settings, store
        self._on_end, self._post = on_end, post or self._post_over_http

    def check(self, url: str) -> None:
        """Refuse a URL to which nothing would be posted.

        Raises:
            RefusedError: the service has no webhooks, or the URL is malformed or not allowed.
        """
        if not self._key or not self._settings.webhook_hosts:
            raise RefusedError(
                "this service posts no webhooks; leave webhook_url out, or have the server's "
                "operator set webhook_secret and webhook_hosts",
                status=403,
                code="webhook-not-allowed",
            )
        try:
            check_url(url, self._settings.webhook_hosts)
        except FetchRefusedError as refusal:
            raise RefusedError(
                "webhook_url cannot be used: it needs https:// and a host that the server's "
                "operator allows for webhooks",
                status=refusal.status,
                code="webhook-not-allowed",
            ) from None

    async def run(self, body_of: BodyOf) -> None:
        """Post what is due, again and again, until cancelled.

        Args:
            body_of: returns what is posted for a job.
        """
        while True:
            try:
                await self.post_due(body_of, time.time())
            except FluxfireError:
                _log.exception("webhooks")
            await asyncio.sleep(_LOOK_SECONDS)

    async def post_due(self, body_of: BodyOf, now: float) -> None:
        """Post what is due, all at the same time.

        Args:
            body_of: returns what is posted for a job.
            now: the time, in seconds since 1970.
        """
        due = await asyncio.to_thread(self._store.due_webhooks, now)
        await asyncio.gather(*(self._try(job, body_of, now) for job in due))

    async def _try(self, job: StoredJob, body_of: BodyOf, now: float) -> None:
        url = job.webhook_url or ""
        body = await asyncio.to_thread(body_of, job)
        headers = signed_headers(self._key, job.id, int(now), body)
        try:
            status = await self._post(url, body, headers)
            what = f"the answer's status is {status}"
        except FetchRefusedError as refusal:
            status, what = 0, str(refusal)
        if status in _GOOD:
            due, outcome = None, "delivered"
        elif status == _GONE or job.webhook_tries >= len(PAUSES):
            due, outcome = None, "given-up"
        else:
            due, outcome = now + PAUSES[job.webhook_tries], "tried again later"
        if status not in _GOOD:
            _log.warning("the webhook of job %s failed, %s: %s", job.id, outcome, what)
        await asyncio.to_thread(self._store.set_webhook, job.id, job.webhook_tries + 1, due)
        if due is None:
            self._on_end(outcome)

    async def _post_over_http(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        hosts, seconds = self._settings.webhook_hosts, self._settings.fetch_seconds
        return await fetching.post(url, body, headers, allowed=hosts, seconds=seconds)
