"""The error that refuses a request."""

from __future__ import annotations

from fluxfire.errors import FluxfireError
from fluxfire.serve.wire import Failed

_STATUS = {"out-of-memory": 507, "edit-refused": 422, "edit-failed": 500}


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


def stopping_error() -> RefusedError:
    """Return the error of a request that comes too late."""
    return RefusedError("the service is stopping", status=503, code="stopping")


def no_pipeline_error(why: str) -> RefusedError:
    """Return the error of a request that no worker can make.

    Args:
        why: why no worker can run.
    """
    return RefusedError(f"the service has no pipeline: {why}", status=503, code="failed")


def failed_error(failure: Failed) -> RefusedError:
    """Return the error of a request whose batch failed."""
    where = "; the service's log says where" if failure.details else ""
    return RefusedError(
        f"the edit failed: {failure.message}{where}",
        status=_STATUS[failure.reason],
        code=failure.reason,
    )
