"""Reads requests: fields in JSON or a form, from clients that may disconnect."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import Any, Never, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from fluxfire.serve.errors import RefusedError
from fluxfire.serve.problems import describe_errors
from fluxfire.serve.schema import EditRequest

T = TypeVar("T")
_LONGEST_NAME, _MOST_NAMED = 40, 5
_MOST_PARTS = 20_000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_CLIENT_CLOSED = 499  # nginx's status for a client that closed the connection


@dataclass
class SentRequest:
    """A client's request.

    Attributes:
        request: the fields.
        file: the picture's file, if the client uploaded one.
    """

    request: EditRequest
    file: bytes | None = None

    def forget_picture(self) -> None:
        """Drop the encoded picture, because it may be large and the wait in the queue long."""
        self.file = self.request.image = self.request.image_url = None


async def read_request(
    request: Request, seconds: float, model: type[EditRequest] = EditRequest
) -> SentRequest:
    """Read a request, in JSON or as a form.

    Args:
        request: the HTTP request.
        seconds: time limit for its body.
        model: the fields that it may have.

    Raises:
        RefusedError: the body has another format or a wrong field, or did not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(seconds):
            if kind == "multipart/form-data":
                return await _read_form(request, model)
            if kind == "application/json":
                # Not request.body(): starlette would keep those bytes until the response.
                body = b"".join([part async for part in request.stream()])
                return SentRequest(await asyncio.to_thread(_parse_json, body, model))
    except TimeoutError:
        raise RefusedError(
            f"the body did not arrive within {seconds:g} s", status=408, code="body-late"
        ) from None
    except ClientDisconnect:
        raise RefusedError(
            "the client has gone", status=_CLIENT_CLOSED, code="client-gone"
        ) from None
    raise RefusedError(
        f"the body is {kind or 'of no Content-Type'}; send application/json or multipart/form-data",
        status=415,
        code="body-format-unsupported",
    )


def _parse_json(body: bytes, model: type[EditRequest]) -> EditRequest:
    # Parsing holds the interpreter lock, and millions of small parts would take seconds. A picture
    # in base64 has no comma or quote, and the longest prompts have fewer than this limit.
    if body.count(b",") + body.count(b'"') > _MOST_PARTS:
        raise RefusedError("the body has too many parts", status=400, code="not-json")
    try:
        fields = json.loads(body, object_pairs_hook=_build_object)
    except (ValueError, RecursionError):
        raise RefusedError("the body is not JSON", status=400, code="not-json") from None
    return _validate(fields, model)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; of two equal keys, json itself would keep the last."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _sent_twice_error(name)
        fields[name] = value
    return fields


def _validate(fields: Any, model: type[EditRequest]) -> EditRequest:
    """Validate the fields; unknown names are refused first."""
    known = model.model_fields
    if isinstance(fields, dict) and (unknown := [name for name in fields if name not in known]):
        named = ", ".join(_shorten(name) for name in unknown[:_MOST_NAMED])
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        raise RefusedError(
            f"unknown fields: {named}{more}; the fields are {', '.join(known)}",
            status=422,
            code="invalid-request",
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise RefusedError(describe_errors(errors), status=422, code="invalid-request") from None


def _shorten(name: str) -> str:
    # JSON allows lone surrogates, but a response in UTF-8 does not.
    return name[:_LONGEST_NAME].encode(errors="replace").decode()


def _sent_twice_error(name: str) -> RefusedError:
    return RefusedError(
        f"the field {_shorten(name)} was sent twice", status=422, code="invalid-request"
    )


class _FormParser(MultiPartParser):
    """Parses a form, and refuses it without its closing boundary.

    Starlette's parser drops a part that was cut, so an edit would lose its picture.
    """

    def __init__(self, request: Request) -> None:
        # No limit for a field: MaxBodySizeMiddleware limits the whole body.
        super().__init__(
            request.headers,
            self._until_closed(request.stream()),
            max_files=1,
            max_fields=30,
            max_part_size=2**63,
        )
        self._closed = False

    def on_end(self) -> None:
        """Note the closing boundary; an epilogue may follow."""
        self._closed = True

    async def _until_closed(self, body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for part in body:
            yield part
        # Raised here, where the parser deletes its temporary files on an error.
        if not self._closed:
            raise RefusedError(
                "the form has no closing boundary, so its end is missing; send it again, whole",
                status=400,
                code="form-cut",
            )


async def _read_form(request: Request, model: type[EditRequest]) -> SentRequest:
    try:
        form = await _FormParser(request).parse()
    except MultiPartException as error:
        raise RefusedError(error.message, status=400, code="bad-request") from None
    except OSError as error:  # The parser keeps large pictures in temporary files.
        if error.errno not in _NO_SPACE:
            raise
        raise RefusedError(
            "the server's disk has no space for the picture; try again later, or send it in JSON",
            status=507,
            code="disk-full",
        ) from None
    try:
        fields, file = await _read_fields(form)
        return SentRequest(_validate(fields, model), file)
    finally:
        await form.close()


async def _read_fields(form: FormData) -> tuple[dict[str, Any], bytes | None]:
    """Return the fields and the picture of a form; empty fields count as missing."""
    fields, file = {}, None
    for name, value in form.multi_items():
        if name in fields or (name == "image" and file is not None):
            raise _sent_twice_error(name)
        if not isinstance(value, UploadFile):
            if value:
                fields[name] = value
        elif name != "image":
            raise RefusedError(
                f"{_shorten(name)} was sent as a file; send the picture in the field image",
                status=422,
                code="invalid-request",
            )
        elif (
            data := await value.read()
        ) or value.filename:  # an empty file without a name means that none was chosen
            file = data
    return fields, file


async def race(work: Awaitable[T], *against: Awaitable[Never]) -> T:
    """Await work, and cancel it when another awaitable raises first.

    Args:
        work: the work.
        against: awaitables that never return; each may raise an error that stops the work.

    Returns:
        The result of the work.

    Raises:
        RefusedError: the error of the first of `against` that raised.
    """
    tasks = [asyncio.ensure_future(each) for each in (work, *against)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        return next(task for task in tasks[1:] if task.done()).result()
    finally:
        while tasks:  # an error holds this frame, so this frame must not hold the error
            tasks.pop().cancel()


async def wait_for_disconnect(request: Request) -> Never:
    """Wait until the client disconnects.

    Args:
        request: the client's request, whose body has been read.

    Raises:
        RefusedError: always, when the client has disconnected.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise RefusedError("the client has gone", status=_CLIENT_CLOSED, code="client-gone")
