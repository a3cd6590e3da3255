"""Requests as they come: fields in JSON or a form, from clients that may hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from fluxfire.serve.problems import said
from fluxfire.serve.refusing import Refused
from fluxfire.serve.schema import EditRequest

T = TypeVar("T")
_GONE = 499  # what nginx calls a client that has gone


async def read(request: Request) -> tuple[EditRequest, bytes | None]:
    """Read a request, in JSON or as a form.

    Args:
        request: as it came.

    Returns:
        Its fields, and the picture if it came as a file.

    Raises:
        Refused: it is neither, or has a field that is wrong.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    file = None
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=30, max_part_size=2**20) as form:
            fields, file = await _form(form)
    elif kind == "application/json" or not kind:
        try:
            fields = await asyncio.to_thread(json.loads, await request.body())
        except (ValueError, RecursionError):
            raise Refused("the body is not JSON", status=400, code="not-json") from None
    else:
        raise Refused(
            f"the body is {kind!r}; send application/json or multipart/form-data",
            status=415, code="body-format-unsupported",
        )  # fmt: skip
    try:
        return EditRequest.model_validate(fields), file
    except ValidationError as error:
        raise Refused(said(error.errors()), status=422, code="invalid-request") from None


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
        elif data := await value.read():
            file = data
    return fields, file


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Do work for a client, and stop where it has gone.

    Args:
        request: the client's, its body read.
        work: what to do.

    Raises:
        Refused: it has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise Refused("the client has gone", status=_GONE, code="client-gone")
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
