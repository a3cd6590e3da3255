"""The HTTP application: routes, keys and lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import fluxfire
from fluxfire.serve.engine import Engine
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.fetching import read_allow_list
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.keys import Keys
from fluxfire.serve.logs import RequestLogMiddleware
from fluxfire.serve.loopback_only import LoopbackOnlyMiddleware
from fluxfire.serve.max_body_size import MaxBodySizeMiddleware
from fluxfire.serve.metrics import Metrics, MetricsMiddleware
from fluxfire.serve.problems import add_handlers, problems
from fluxfire.serve.request_body import SentRequest, race, read_request, wait_for_disconnect
from fluxfire.serve.schema import (
    About,
    EditAnswer,
    EditRequest,
    Health,
    JobAnswer,
    Quality,
    form_schema,
)
from fluxfire.serve.service import Service
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import LocalStorage, Storage, StorageError, open_storage
from fluxfire.serve.wire import STEPS, Facts

T = TypeVar("T")
_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"style.css": "text/css", "app.js": "text/javascript", "scene.png": "image/png"}
_CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob: https:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_SWEEP_INTERVAL = 600.0  # seconds between deletions of old pictures

_bearer = HTTPBearer(auto_error=False, description="An API key, if the service needs one.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False)
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": EditRequest.model_json_schema()},
            "multipart/form-data": {"schema": form_schema()},
        },
    }
}


def create_app(
    settings: Settings,
    *,
    on_ready: Callable[[Facts], None] = lambda facts: None,  # noqa: ARG005
    on_trouble: Callable[[str], None] = lambda why: None,  # noqa: ARG005
) -> FastAPI:
    """Create the application. Its worker starts and stops with it.

    Args:
        settings: the service's settings.
        on_ready: callback with the pipeline's facts, whenever a worker has loaded it.
        on_trouble: callback with the reason, if no worker can load the pipeline.

    Raises:
        FluxfireError: the keys, the allow-list or the storage cannot be used.
    """
    keys = Keys.read(settings.keys_file) if settings.keys_file else None
    read_allow_list(settings.image_hosts)
    storage = None
    if settings.storage is not None:
        storage = open_storage(
            settings.storage,
            secret=(settings.secret or secrets.token_hex(32)).encode(),
            retention_seconds=settings.retention_seconds,
            link_seconds=settings.link_seconds,
        )
        storage.check()
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = Engine(
            settings,
            on_batch=metrics.count_batch,
            on_ready=on_ready,
            on_restart=metrics.count_restart,
            on_trouble=on_trouble,
        )
        engine.start()
        service = Service(settings, engine, storage, metrics.count_edit, metrics.count_failure)
        app.state.engine, app.state.service, app.state.jobs = engine, service, Jobs(service)
        sweeper = asyncio.create_task(_sweep(storage)) if storage else None
        try:
            yield
            await engine.drain(settings.drain_seconds)
        finally:
            if sweeper is not None:
                sweeper.cancel()
            await app.state.jobs.close()
            service.close()
            engine.close()
            # A process that ended leaves nobody to kill a worker that hangs.
            await engine.until_worker_ended()

    app = FastAPIOffline(  # so that /docs works without internet access
        redoc_url=None,
        redirect_slashes=False,  # the redirection would go to whatever Host the client names
        title="fluxfire",
        version=fluxfire.__version__,
        summary="Edits pictures by instruction.",
        lifespan=lifespan,
    )
    app.state.settings, app.state.keys = settings, keys
    app.state.metrics, app.state.storage = metrics, storage
    _add_routes(app)
    add_handlers(app)
    app.add_middleware(MaxBodySizeMiddleware, most=_largest_body(settings))
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key"],
        )
    if keys is None:
        app.add_middleware(LoopbackOnlyMiddleware, host=settings.host, origins=settings.origins)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    app.add_middleware(RequestLogMiddleware)
    return app


async def key_owner(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> str | None:
    """Return the name of the request's key; None if the service has no keys.

    Raises:
        RefusedError: the service has keys, and the request has none or a wrong one.
    """
    keys: Keys | None = request.app.state.keys
    if keys is None:
        return None
    key = bearer.credentials if bearer else header or ""
    name = keys.owner(key)
    if name is None and key:
        raise RefusedError("this key is unknown", status=401, code="key-unknown")
    if name is None:
        raise RefusedError(
            "this service needs a key: send it as Authorization: Bearer KEY, or X-API-Key",
            status=401,
            code="key-wanted",
        )
    return name


Owner = Annotated[str | None, Depends(key_owner)]


def _add_routes(app: FastAPI) -> None:  # noqa: C901 - a list of routes
    settings: Settings = app.state.settings

    def engine() -> Engine:
        running: Engine = app.state.engine
        return running

    async def sent(request: Request) -> SentRequest:
        body = read_request(request, settings.request_seconds)
        return await race(body, engine().until_stopping())

    @app.post(
        "/inference",
        response_model=EditAnswer,
        openapi_extra=_BODY,
        responses=problems(401, 408, 413, 415, 422, 424, 429, 503, 504, 507),
        summary="Edit a picture, and wait for the result",
    )
    async def inference(request: Request, owner: Owner) -> Response:
        edited = app.state.service.edit(await sent(request), owner=owner)
        return await _json(
            await race(edited, wait_for_disconnect(request), engine().until_closed())
        )

    @app.post(
        "/jobs",
        response_model=JobAnswer,
        status_code=202,
        openapi_extra=_BODY,
        responses=problems(401, 408, 413, 415, 422, 429, 503, 507),
        summary="Begin an edit",
    )
    async def begin_job(request: Request, owner: Owner) -> JobAnswer:
        job = app.state.jobs.begin(await sent(request), owner)
        shown: JobAnswer = job.shown(engine())
        return shown

    known = problems(401, 404, 422)

    @app.get("/jobs/{job_id}", response_model=JobAnswer, responses=known, summary="See a job")
    async def see_job(job_id: str, owner: Owner) -> Response:
        return await _json(app.state.jobs.find(job_id, owner).shown(engine()))

    @app.delete("/jobs/{job_id}", response_model=JobAnswer, responses=known, summary="Cancel a job")
    async def cancel_job(job_id: str, owner: Owner) -> JobAnswer:
        job = app.state.jobs.find(job_id, owner)
        await app.state.jobs.cancel(job)
        shown: JobAnswer = job.shown(engine())
        return shown

    @app.get(
        "/jobs/{job_id}/events",
        responses=known,
        response_class=StreamingResponse,
        summary="Follow a job by server-sent events",
    )
    async def follow_job(job_id: str, owner: Owner) -> StreamingResponse:
        job = app.state.jobs.find(job_id, owner)

        async def events() -> AsyncIterator[str]:
            async for shown in app.state.jobs.watch(job):
                if shown is None:
                    yield ": still here\n\n"  # else a proxy would close a silent connection
                    continue
                text = await asyncio.to_thread(shown.model_dump_json)
                yield f"event: {shown.status}\ndata: {text}\n\n"

        quiet = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=quiet)

    @app.get(
        "/files/{name}",
        responses=problems(404, 410, 422, 503),
        summary="A picture, by its signed link",
    )
    async def stored(name: str, expires: int, signature: str) -> Response:
        storage = app.state.storage
        if not isinstance(storage, LocalStorage):
            raise RefusedError(
                "this service stores no pictures in a folder", status=404, code="file-gone"
            )
        data, kind = await asyncio.to_thread(storage.read, name, expires, signature)
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private"}
        return Response(data, media_type=kind, headers=headers)

    @app.get("/about", response_model=About, responses=problems(401), summary="The service")
    async def about(_owner: Owner) -> About:
        facts = engine().facts
        return About(
            model=settings.model,
            version=fluxfire.__version__,
            state=engine().state,
            trouble=engine().trouble,
            device=facts.device if facts else None,
            passes=list(facts.passes) if facts else [],
            qualities=[Quality(name=n, about=a) for n, a in facts.levels.items()] if facts else [],
            quality=facts.level if facts else None,
            key_required=app.state.keys is not None,
            max_pixels=settings.max_pixels,
            max_bytes=settings.max_bytes,
            default_steps=STEPS,
        )

    unwell = {
        **problems(),
        503: {"model": Health, "description": "The service is not alive, or not ready."},
    }

    @app.head("/health", include_in_schema=False)
    @app.get(
        "/health", response_model=Health, responses=unwell, summary="Whether the service is alive"
    )
    async def health(response: Response) -> Health:
        state, facts = engine().state, engine().facts
        response.status_code = 503 if state == "failed" else 200
        return Health(
            status="ok" if state == "ready" else state,
            gpu_available=facts is not None and facts.device.startswith("cuda"),
            message="there is no pipeline; /about and the log say why"
            if engine().trouble
            else None,
        )

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready",
        response_model=Health,
        responses=unwell,
        summary="Whether the pipeline is ready",
    )
    async def ready(response: Response) -> Health:
        answer = await health(response)
        response.status_code = 200 if answer.status == "ok" else 503
        return answer

    @app.get(
        "/metrics",
        response_class=Response,
        responses=problems(401),
        summary="Counters, for Prometheus",
    )
    async def metrics(_owner: Owner) -> Response:
        text = app.state.metrics.text(engine())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        headers = {"Content-Security-Policy": _CONTENT_POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(_PAGE / "index.html", media_type="text/html", headers=headers)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in _PAGE_FILES:
            raise HTTPException(404)
        return FileResponse(_PAGE / name, media_type=_PAGE_FILES[name])


async def _json(answer: EditAnswer | JobAnswer) -> Response:
    """Serialize an answer in a thread, because its pictures may have megabytes."""
    text = await asyncio.to_thread(answer.model_dump_json)
    return Response(text, media_type="application/json")


async def _sweep(storage: Storage) -> None:
    """Delete old pictures every ten minutes."""
    while True:
        try:
            deleted = await asyncio.to_thread(storage.sweep)
            if deleted:
                _log.info("deleted %d stored pictures", deleted)
        except StorageError as error:
            _log.warning("%s", error)
        await asyncio.sleep(_SWEEP_INTERVAL)


def _largest_body(settings: Settings) -> int:
    """Return the size limit of a body in bytes: a picture in base64, and 1 MiB of other fields."""
    return 4 * -(-settings.max_bytes // 3) + 2**20
