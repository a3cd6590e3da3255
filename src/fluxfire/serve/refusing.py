"""What a request can be refused with."""

from __future__ import annotations

from fluxfire.errors import FluxfireError


class Refused(FluxfireError):  # noqa: N818 - it is the request that is at fault
    """The request asks for what the server does not do; the message says why.

    Attributes:
        status: the HTTP status to answer with.
        code: the reason as a short word for programs, such as "image-too-large".
    """

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
