"""The error that refuses a request."""

from __future__ import annotations

from fluxfire.errors import FluxfireError


class RefusedError(FluxfireError):
    """The service refuses a request; the message says why.

    Attributes:
        status: the HTTP status of the response.
        code: the reason as a short word for programs, such as "image-too-large".
        retry_after: in how many seconds the client may try again, if that is known.
    """

    def __init__(
        self, message: str, *, status: int, code: str, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
