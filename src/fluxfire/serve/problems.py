"""Errors, which are all answered alike: {"error": {"code": …, "message": …}}."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemAnswer, "description": about}
    for status, about in {
        400: "The picture is damaged, or the body is none.",
        401: "A key is wanted.",
        403: "The picture's host is not allowed.",
        404: "There is nothing of this name.",
        408: "The body did not come.",
        413: "The body or the picture is too large.",
        415: "The body or the picture is of a format not taken.",
        422: "A field is wrong, or the quality is not offered.",
        424: "The picture could not be fetched.",
        429: "The queue is full: Retry-After says when to try again.",
        500: "The edit failed.",
        503: "The service starts, stops, or has no pipeline.",
        504: "It took too long.",
        507: "The GPU has too little memory for it.",
    }.items()
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
        return _problem(error.status, error.code, str(error), headers)

    def not_stored(_request: Request, error: Any) -> JSONResponse:
        _log.error("storage: %s", error)
        return _problem(_UNAVAILABLE, "storage", "the picture could not be stored")

    def invalid(_request: Request, error: Any) -> JSONResponse:
        return _problem(_INVALID, "invalid-request", said(error.errors()))

    def http(_request: Request, error: Any) -> JSONResponse:
        code = str(error.detail).lower().replace(" ", "-")
        return _problem(error.status_code, code, str(error.detail), error.headers)

    def failed(_request: Request, _error: Any) -> JSONResponse:
        return _problem(500, "internal", "something went wrong; the server's log says what")

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
        errors: as pydantic lists them.
    """
    told = []
    for error in errors:
        places = [str(part) for part in error["loc"] if part not in {"body", "query", "path"}]
        unknown = error["type"] == "extra_forbidden"
        message = "there is no such field; /docs lists them" if unknown else error["msg"]
        told.append(f"{'.'.join(places) or 'the body'}: {message}")
    return "; ".join(told)


def _problem(status: int, code: str, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)
