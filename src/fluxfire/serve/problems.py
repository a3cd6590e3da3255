"""Errors, which are all answered alike: {"error": {"code": …, "message": …}}."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fluxfire.serve.refusing import Refused
from fluxfire.serve.schema import ProblemAnswer
from fluxfire.serve.storage import StorageError

_log = logging.getLogger(__name__)
_UNAUTHORIZED, _INVALID, _TOO_MANY, _UNAVAILABLE = 401, 422, 429, 503
_MOST_TOLD = 10
_PROBLEMS = {
    400: "The picture is damaged, or the request is none.",
    401: "A key is wanted.",
    403: "The picture's host is not allowed, or the request comes from elsewhere.",
    404: "There is nothing of this name.",
    408: "The body did not come.",
    410: "The link has expired.",
    413: "The body or the picture is too large.",
    415: "The body or the picture is of a format not taken.",
    422: "A field is wrong, or the quality is not offered.",
    424: "The picture could not be fetched.",
    429: "The queue is full: Retry-After says when to try again.",
    500: "Something failed.",
    503: "The service starts, stops, or has no pipeline or no store.",
    504: "It took too long.",
    507: "The GPU has too little memory for it.",
}
_ANYWHERE = (400, 403, 500)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors that a route can answer with.

    Args:
        statuses: those beside the ones that any route can.
    """
    return {
        status: {"model": ProblemAnswer, "description": _PROBLEMS[status]}
        for status in sorted({*_ANYWHERE, *statuses})
    }


def add_handlers(app: FastAPI) -> None:
    """Have all errors of an application answered alike.

    Args:
        app: the application.
    """

    def refused(request: Request, error: Any) -> JSONResponse:
        headers = {}
        if error.status == _TOO_MANY:
            headers["Retry-After"] = str(request.app.state.engine.retry_after())
        if error.status == _UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return problem(error.status, error.code, str(error), headers)

    def not_stored(_request: Request, error: Any) -> JSONResponse:
        _log.error("storage: %s", error)
        return problem(_UNAVAILABLE, "storage", "the picture could not be stored")

    def invalid(_request: Request, error: Any) -> JSONResponse:
        return problem(_INVALID, "invalid-request", said(error.errors()))

    def http(_request: Request, error: Any) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        return problem(error.status_code, code, str(error.detail), error.headers)

    def failed(_request: Request, _error: Any) -> JSONResponse:
        return problem(500, "internal", "something went wrong; the server's log says what")

    for kind, handler in (
        (Refused, refused),
        (StorageError, not_stored),
        (RequestValidationError, invalid),
        (HTTPException, http),
        (Exception, failed),
    ):
        app.add_exception_handler(kind, handler)


def said(errors: Sequence[Any]) -> str:
    """Say in a sentence which fields are wrong; what was sent is not repeated.

    Args:
        errors: as pydantic lists them; of many the first are told.
    """
    told = []
    for error in errors[:_MOST_TOLD]:
        places = [str(part) for part in error["loc"] if part not in {"body", "query", "path"}]
        told.append(f"{'.'.join(places) or 'the body'}: {error['msg']}")
    return "; ".join(told)


def problem(status: int, code: str, message: str, headers: Any = None) -> JSONResponse:
    """Make the answer that tells a problem.

    Args:
        status: of HTTP.
        code: the reason as a short word.
        message: the reason in a sentence.
        headers: further ones.
    """
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)
