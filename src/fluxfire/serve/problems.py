"""Error responses. All have the form {"error": {"code": …, "message": …}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import JobStoreError
from fluxfire.serve.schema import ProblemAnswer
from fluxfire.serve.storage import StorageError

_log = logging.getLogger(__name__)
_UNAUTHORIZED, _INVALID, _TOO_MANY, _UNAVAILABLE = 401, 422, 429, 503
_MOST_ERRORS = 10
_PROBLEMS = {
    400: "The picture is damaged, or the request is malformed.",
    401: "The key is missing or unknown.",
    403: "The picture's host is not allowed, or the request comes from another machine or site.",
    404: "Nothing has this name.",
    408: "The body did not arrive in time.",
    410: "The link has expired.",
    413: "The body or the picture is too large.",
    415: "The service does not support the format of the body or of the picture.",
    422: "A field is wrong, or the quality is not offered.",
    424: "The service could not fetch the picture.",
    429: "The queue is full, or a quota is used: Retry-After says when to try again.",
    500: "The service failed.",
    503: "The service is starting or stopping, or its pipeline, store or database does not work.",
    504: "The request took too long.",
    507: "The GPU has too little memory for the request, or the disk too little room.",
}
_ANYWHERE = (400, 403, 500)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors that a route can answer with.

    Args:
        statuses: its HTTP statuses beside 400, 403 and 500, which every route can answer.
    """
    return {
        status: {"model": ProblemAnswer, "description": _PROBLEMS[status]}
        for status in sorted({*_ANYWHERE, *statuses})
    }


def add_handlers(app: FastAPI) -> None:
    """Make an application answer every error as a problem.

    Args:
        app: the application.
    """

    def refused(request: Request, error: Any) -> JSONResponse:
        headers = {}
        if error.status == _TOO_MANY:
            seconds = error.retry_after or request.app.state.engine.retry_after()
            headers["Retry-After"] = str(seconds)
        if error.status == _UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return problem_response(error.status, error.code, str(error), headers)

    def not_stored(_request: Request, error: object) -> JSONResponse:
        _log.error("storage: %s", error)
        return problem_response(_UNAVAILABLE, "storage", "the picture could not be stored")

    def not_kept(_request: Request, error: object) -> JSONResponse:
        _log.error("%s", error)
        return problem_response(
            _UNAVAILABLE, "jobs", "the service could not read or keep its jobs; try again later"
        )

    def invalid(_request: Request, error: Any) -> JSONResponse:
        return problem_response(_INVALID, "invalid-request", describe_errors(error.errors()))

    def http(_request: Request, error: Any) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        return problem_response(error.status_code, code, str(error.detail), error.headers)

    def failed(_request: Request, _error: object) -> JSONResponse:
        return problem_response(500, "internal", "the service failed; its log says why")

    for kind, handler in (
        (RefusedError, refused),
        (StorageError, not_stored),
        (JobStoreError, not_kept),
        (RequestValidationError, invalid),
        (HTTPException, http),
        (Exception, failed),
    ):
        app.add_exception_handler(kind, handler)


def describe_errors(errors: Sequence[Any]) -> str:
    """Describe in a sentence which fields are wrong, without repeating their values.

    Args:
        errors: from pydantic; the sentence names the first ten.
    """
    sentences = []
    for error in errors[:_MOST_ERRORS]:
        places = [str(part) for part in error["loc"] if part not in {"body", "query", "path"}]
        said = error["msg"].removeprefix("Value error, ")  # pydantic's words before ours
        sentences.append(f"{'.'.join(places) or 'the body'}: {said}")
    return "; ".join(sentences)


def problem_response(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the response that describes a problem.

    Args:
        status: the HTTP status.
        code: the reason as a short word.
        message: the reason in a sentence.
        headers: additional headers.
    """
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)
