"""The error that refuses a request."""

from __future__ import annotations

from fluxfire.errors import FluxfireError


class RefusedError(FluxfireError):
    """The service refuses a request; the message says why.

    Attributes:
        status: the HTTP status of the response.
        code: the reason as a short word for programs, such as "image-too-large".
    """

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
