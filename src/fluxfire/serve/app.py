"""The HTTP application: routes, keys and lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import fluxfire
from fluxfire.errors import FluxfireError
from fluxfire.loading import model_folder
from fluxfire.serve import tracing
from fluxfire.serve.allowed_hosts import read_allow_list
from fluxfire.serve.authentication import Owner
from fluxfire.serve.edit_routes import add_edit_routes, picture_file
from fluxfire.serve.engine import Engine
from fluxfire.serve.errors import RefusedError
from fluxfire.serve.job_store import JobStore
from fluxfire.serve.jobs import Jobs
from fluxfire.serve.keys import Keys
from fluxfire.serve.local_storage import LocalStorage
from fluxfire.serve.logs import RequestLogMiddleware
from fluxfire.serve.loopback_only import LoopbackOnlyMiddleware
from fluxfire.serve.max_body_size import MaxBodySizeMiddleware
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.problems import add_handlers, problems
from fluxfire.serve.schema import About, Health, Quality
from fluxfire.serve.service import Service
from fluxfire.serve.settings import Settings
from fluxfire.serve.storage import Storage, StorageError, fresh_name
from fluxfire.serve.stores import open_storage
from fluxfire.serve.webhooks import Webhooks, read_secret
from fluxfire.serve.wire import STEPS, Facts

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "page"
_KINDS = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".webp": "image/webp",
}
_PAGE_FILES = {file.name: _KINDS[file.suffix] for file in _PAGE.iterdir() if file.suffix in _KINDS}
_SWEEP_INTERVAL = 600.0  # seconds between deletions of old pictures


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
        FluxfireError: the model, the keys, an allow-list, the storage, the file of jobs or the
            webhooks' secret cannot be used.
    """
    model_folder(settings.model)
    keys = Keys.read(settings.keys_file) if settings.keys_file else None
    for hosts in (settings.image_hosts, settings.webhook_hosts):
        read_allow_list(hosts)
    storage = _open_storage(settings)
    if settings.webhook_secret is not None:
        read_secret(settings.webhook_secret)
    if settings.jobs_file is not None:
        JobStore(settings.jobs_file).close()
    metrics = Metrics()
    tracing.configure()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        store = JobStore(settings.jobs_file)
        engine = Engine(
            settings,
            on_batch=metrics.count_batch,
            on_ready=on_ready,
            on_restart=metrics.count_restart,
            on_trouble=on_trouble,
            queue_of=lambda owner: (
                (keys and keys.limits(owner).max_queue) or settings.queue_per_key
            ),
        )
        engine.start()
        service = Service(settings, engine, storage, metrics.count_edit, metrics.count_failure)
        webhooks = Webhooks(settings, store, on_end=metrics.count_webhook)
        jobs = Jobs(service, store, webhooks, keys)
        app.state.engine, app.state.service, app.state.jobs = engine, service, jobs
        background = [
            asyncio.create_task(task)
            for task in (
                _sweep(storage, jobs, metrics),
                service.store_watch.watch(),
                jobs.resume(),
                jobs.suspend(),
                webhooks.run(jobs.webhook_body),
            )
        ]
        try:
            yield
            await engine.drain(settings.drain_seconds)
        finally:
            for task in background:
                task.cancel()
            await jobs.close()
            service.close()
            engine.close()
            # A process that ended leaves nobody to kill a worker that hangs.
            await engine.until_worker_ended()
            await asyncio.gather(*background, return_exceptions=True)
            store.close()
            await asyncio.to_thread(tracing.flush)

    app = FastAPIOffline(  # so that /docs works without internet access
        redoc_url=None,
        redirect_slashes=False,  # the redirection would go to whatever Host the client names
        title="fluxfire",
        version=fluxfire.__version__,
        summary="Edits pictures by instruction.",
        lifespan=lifespan,
        # New versions of FastAPI record requests themselves; older ones ignore this.
        telemetry={"tracing": False},
    )
    # Behind a proxy that strips a prefix, /docs needs it to find the description.
    app.root_path = urlsplit(settings.public_url or "").path.rstrip("/")
    app.state.settings, app.state.keys = settings, keys
    app.state.metrics, app.state.storage = metrics, storage
    app.state.content_policy = _content_policy(storage)
    add_edit_routes(app)
    _add_routes(app)
    _add_probes(app)
    add_handlers(app)
    app.add_middleware(MaxBodySizeMiddleware, most=_largest_body(settings))
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-API-Key"],
        )
    if keys is None:
        app.add_middleware(LoopbackOnlyMiddleware, host=settings.host, origins=settings.origins)
    app.add_middleware(RequestLogMiddleware, on_end=metrics.count_response)
    return app


def _open_storage(settings: Settings) -> Storage | None:
    if settings.storage is None:
        return None
    storage = open_storage(
        settings.storage,
        secret=(settings.secret or secrets.token_hex(32)).encode(),
        retention_seconds=settings.retention_seconds,
        link_seconds=settings.link_seconds,
    )
    storage.check()
    return storage


def _add_routes(app: FastAPI) -> None:
    settings: Settings = app.state.settings

    def engine() -> Engine:
        running: Engine = app.state.engine
        return running

    @app.head("/files/{name}", include_in_schema=False)
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
        reading = asyncio.to_thread(storage.read, name, expires, signature)
        return await picture_file(app, reading, name)

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

    @app.get(
        "/metrics",
        response_class=Response,
        responses=problems(401),
        summary="Counters, for Prometheus",
    )
    async def metrics(_owner: Owner) -> Response:
        text = app.state.metrics.text(engine(), stores=not app.state.service.store_watch.failed)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        headers = {
            "Content-Security-Policy": app.state.content_policy,
            "X-Content-Type-Options": "nosniff",
        }
        return FileResponse(_PAGE / "index.html", media_type="text/html", headers=headers)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> FileResponse:
        if name not in _PAGE_FILES:
            raise HTTPException(404)
        return FileResponse(_PAGE / name, media_type=_PAGE_FILES[name])


def _add_probes(app: FastAPI) -> None:
    def engine() -> Engine:
        running: Engine = app.state.engine
        return running

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
        if answer.status == "ok" and app.state.service.store_watch.failed:
            answer.status, answer.message = "no-store", "the store takes no pictures"
        response.status_code = 200 if answer.status == "ok" else 503
        return answer


async def _sweep(storage: Storage | None, jobs: Jobs, metrics: Metrics) -> None:
    """Delete old pictures and jobs every ten minutes."""
    while True:
        with contextlib.suppress(FluxfireError):  # the next request tells and logs it
            await jobs.forget_old()
        try:
            deleted = await asyncio.to_thread(storage.sweep) if storage else 0
            if deleted:
                _log.info("deleted %d stored pictures", deleted)
        except StorageError as error:
            metrics.count_store_failure("sweep")
            _log.warning("%s", error)
        await asyncio.sleep(_SWEEP_INTERVAL)


def _largest_body(settings: Settings) -> int:
    """Return the size limit of a body in bytes: a picture in base64, and 1 MiB of other fields."""
    return 4 * -(-settings.max_bytes // 3) + 2**20


def _content_policy(storage: Storage | None) -> str:
    """Return what the page may load: its own files, and pictures from the store's address.

    It reads stored pictures by way of the service, and shows by their links what it cannot read.
    """
    parts = urlsplit(storage.url(fresh_name("PNG"))) if storage else urlsplit("")
    store = f" {parts.scheme}://{parts.netloc}" if parts.netloc else ""
    return (
        f"default-src 'self'; img-src 'self' data: blob: https:{store}; style-src 'self'; "
        "script-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'self'"
    )
