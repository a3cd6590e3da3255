"""Requests as they come: fields in JSON or a form, from clients that may hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Never, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect

from fluxfire.serve.problems import said
from fluxfire.serve.refusing import Refused
from fluxfire.serve.schema import EditRequest

T = TypeVar("T")
_LONGEST_NAME, _MOST_NAMED = 40, 5
_MOST_PARTS = 20_000
_GONE = 499  # what nginx calls a client that has gone


@dataclass
class Sent:
    """What a client sent.

    Attributes:
        request: the fields.
        file: the picture, where it came as a file.
    """

    request: EditRequest
    file: bytes | None = None

    def forget_picture(self) -> None:
        """Let go of the picture as it was sent, which may be large, and the wait long."""
        self.file = self.request.image = self.request.image_url = None


async def read(request: Request, seconds: float) -> Sent:
    """Read a request, in JSON or as a form.

    Args:
        request: as it came.
        seconds: how long its body may take to come.

    Raises:
        Refused: it is neither, has a field that is wrong, or did not come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(seconds):
            if kind == "multipart/form-data":
                # Fields may be as long as the body, whose length is limited where it comes in.
                async with request.form(max_files=1, max_fields=30, max_part_size=2**63) as form:
                    fields, file = await _form(form)
                    return Sent(_validated(fields), file)
            if kind == "application/json":
                # Not request.body(), which would be kept until the answer.
                body = b"".join([part async for part in request.stream()])
                return Sent(await asyncio.to_thread(_from_json, body))
    except TimeoutError:
        raise Refused(
            f"the body did not come within {seconds:g} s", status=408, code="body-late"
        ) from None
    except ClientDisconnect:
        raise Refused("the client has gone", status=_GONE, code="client-gone") from None
    raise Refused(
        f"the body is {kind or 'of no Content-Type'}; send application/json or multipart/form-data",
        status=415, code="body-format-unsupported",
    )  # fmt: skip


def _from_json(body: bytes) -> EditRequest:
    # Parsing lets no other thread run: millions of small parts would take seconds. A picture in
    # base64 has neither comma nor quote, and the longest prompts no more than these.
    if body.count(b",") + body.count(b'"') > _MOST_PARTS:
        raise Refused("the body is no request: it has too many parts", status=400, code="not-json")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON", status=400, code="not-json") from None
    return _validated(fields)


def _validated(fields: Any) -> EditRequest:
    """Check all fields; those that are none are told without looking at the rest."""
    known = EditRequest.model_fields
    if isinstance(fields, dict) and (unknown := [name for name in fields if name not in known]):
        named = ", ".join(name[:_LONGEST_NAME] for name in unknown[:_MOST_NAMED])
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        raise Refused(
            f"{named}{more}: there is no such field; there are {', '.join(known)}",
            status=422, code="invalid-request",
        )  # fmt: skip
    try:
        return EditRequest.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise Refused(said(errors), status=422, code="invalid-request") from None


async def _form(form: FormData) -> tuple[dict[str, Any], bytes | None]:
    """Take fields and the picture out of a form; empty fields count as not given."""
    fields, file = {}, None
    for name, value in form.multi_items():
        if name in fields or (name == "image" and file is not None):
            raise Refused(f"{name} came twice", status=422, code="invalid-request")
        if not isinstance(value, UploadFile):
            if value:
                fields[name] = value
        elif name != "image":
            raise Refused(
                f"{name} came as a file; the picture goes into the field image",
                status=422, code="invalid-request",
            )  # fmt: skip
        elif (data := await value.read()) or value.filename:  # without both, none was chosen
            file = data
    return fields, file


async def unless(work: Awaitable[T], *against: Awaitable[Never]) -> T:
    """Do work, and stop once something against it is heard.

    Args:
        work: what to do.
        against: each raises why the work is to stop, or goes on for ever.

    Raises:
        Refused: what one of `against` raised.
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
        while tasks:  # an error holds this frame, which must not hold the error
            tasks.pop().cancel()


async def gone(request: Request) -> Never:
    """Wait until the client has gone.

    Args:
        request: the client's, its body read.

    Raises:
        Refused: it has gone.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise Refused("the client has gone", status=_GONE, code="client-gone")
