"""The routes that edit: at once, or as a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import StreamingResponse

from fluxfire.serve.authentication import Owner
from fluxfire.serve.decoding import MEDIA_TYPES
from fluxfire.serve.engine import Engine
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.problems import problems
from fluxfire.serve.request_body import SentRequest, race, read_request, wait_for_disconnect
from fluxfire.serve.schema import EditAnswer, EditRequest, JobAnswer, JobRequest, form_schema
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import StorageError

IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Your own name for this request. The same key with the same request gets the "
        "same job or answer again; with another request it is refused."
    ),
]


def add_edit_routes(app: FastAPI) -> None:  # noqa: C901 - a list of routes
    """Add `/inference` and `/jobs` to an application."""
    settings: Settings = app.state.settings

    def engine() -> Engine:
        running: Engine = app.state.engine
        return running

    def jobs() -> Jobs:
        kept: Jobs = app.state.jobs
        return kept

    async def sent(request: Request, model: type[EditRequest]) -> SentRequest:
        body = read_request(request, settings.request_seconds, model)
        return await race(body, engine().until_stopping())

    @app.post(
        "/inference",
        response_model=EditAnswer,
        openapi_extra=_body(EditRequest),
        responses=problems(401, 408, 413, 415, 422, 424, 429, 503, 504, 507),
        summary="Edit a picture, and wait for the result",
    )
    async def inference(
        request: Request, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> Response:
        asked = await sent(request, EditRequest)
        if idempotency_key is None:
            slot = await jobs().reserve(asked, owner)
            edited = app.state.service.edit(asked, slot)
            return await _json(
                await race(edited, wait_for_disconnect(request), engine().until_closed())
            )
        # A job, so that the edit goes on when the client hangs up and asks again.
        name = await jobs().begin(asked, owner, idempotency_key)
        text = await race(
            jobs().result(name, owner), wait_for_disconnect(request), engine().until_closed()
        )
        return Response(text, media_type="application/json")

    @app.post(
        "/jobs",
        response_model=JobAnswer,
        status_code=202,
        openapi_extra=_body(JobRequest),
        responses=problems(401, 408, 413, 415, 422, 429, 503, 507),
        summary="Begin an edit",
    )
    async def begin_job(
        request: Request, owner: Owner, idempotency_key: IdempotencyKey = None
    ) -> JobAnswer:
        asked = await sent(request, JobRequest)
        return await jobs().show(await jobs().begin(asked, owner, idempotency_key), owner)

    known = problems(401, 404, 422, 503)

    @app.get("/jobs/{job_id}", response_model=JobAnswer, responses=known, summary="See a job")
    async def see_job(job_id: str, owner: Owner) -> Response:
        return await _json(await jobs().show(job_id, owner))

    @app.get(
        "/jobs/{job_id}/images/{number}",
        responses={**known, 200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}}},
        response_class=Response,
        summary="A picture of a job, as a file",
    )
    async def see_image(
        job_id: str, number: Annotated[int, PathParameter(ge=0)], owner: Owner
    ) -> Response:
        # Most buckets let no page read their pictures, so the service passes them on.
        image = await jobs().image(job_id, number, owner)
        return await picture_file(app, app.state.service.read(image), image.filename)

    @app.delete("/jobs/{job_id}", response_model=JobAnswer, responses=known, summary="Cancel a job")
    async def cancel_job(job_id: str, owner: Owner) -> JobAnswer:
        return await jobs().cancel(job_id, owner)

    @app.get(
        "/jobs/{job_id}/events",
        responses=known,
        response_class=StreamingResponse,
        summary="Follow a job by server-sent events",
    )
    async def follow_job(job_id: str, owner: Owner) -> StreamingResponse:
        await jobs().show(job_id, owner)  # refuses an unknown job before the response begins

        async def events() -> AsyncIterator[str]:
            async for shown in jobs().watch(job_id, owner):
                if shown is None:
                    yield ": still here\n\n"  # else a proxy would close a silent connection
                    continue
                text = await asyncio.to_thread(shown.model_dump_json)
                yield f"event: {shown.status}\ndata: {text}\n\n"

        quiet = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=quiet)


async def picture_file(
    app: FastAPI, reading: Awaitable[tuple[bytes, str]], filename: str
) -> Response:
    """Answer with a stored picture as a file.

    Args:
        app: the app, which counts failures of the store.
        reading: gives the picture's bytes and media type.
        filename: what a browser calls the file.
    """
    try:
        data, kind = await reading
    except StorageError:
        app.state.metrics.count_store_failure("read")
        raise
    headers = {
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private",
        "Content-Disposition": f'inline; filename="{filename}"',
    }
    return Response(data, media_type=kind, headers=headers)


def _body(model: type[EditRequest]) -> dict[str, Any]:
    """Describe a request's body for OpenAPI."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": model.model_json_schema()},
                "multipart/form-data": {"schema": form_schema(model)},
            },
        }
    }


async def _json(answer: EditAnswer | JobAnswer) -> Response:
    """Serialize an answer in a thread, because its pictures may have megabytes."""
    text = await asyncio.to_thread(answer.model_dump_json)
    return Response(text, media_type="application/json")
