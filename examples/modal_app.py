"""The service on Modal, scaled from no container to several.

    pip install "fluxfire[serve]" "modal>=1.2"
    modal run examples/modal_app.py::prepare    # weights and compiled artifacts, once
    modal deploy examples/modal_app.py

An example to copy and change: this file is all of it, and no part of the package imports it.

Modal imports this file twice: where you deploy it, and in every container. The app hands the
environment variables that you chose there on to the containers, so that both see the same.

A container's web server is the one that `fluxfire serve` runs: it imports no torch, and spawns a
worker that owns the GPU. A memory snapshot is taken before the worker is there, so it spares what
the server imports, and no more. With `FLUXFIRE_GPU_SNAPSHOT=1` the worker is started, loaded and
warm before, and the snapshot holds its memory, the GPU's too: an alpha feature of Modal's.

Nothing here was ever deployed: the tests build the app with Modal's own package, and run what runs
without Modal.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import modal

from fluxfire.errors import FluxfireError

NAME = "fluxfire"
GPU = "H100!"  # the mark keeps Modal from giving an H200, for which nothing was compiled
CORES = 4.0
MEMORY_MIB = 65536  # the weights pass through it on their way to the GPU
PYTHON = "3.12"
FOLDER = Path("/data")
KEYS_FILE = Path.home() / "fluxfire-keys"
HUB_SECRET, STORAGE_SECRET = "huggingface", "fluxfire-storage"
STARTUP_SECONDS = 900
REQUEST_SECONDS = 600
PREPARE_SECONDS = 3600
EXTRAS = ("serve", "s3", "cli")
CEILINGS = {"torch": "<2.14", "diffusers": "<1", "transformers": "<6"}
"""What the image stays below, where fluxfire itself only says what it needs at least."""
SECRET = "fluxfire"  # noqa: S105 - its name
KEYS = "FLUXFIRE_KEYS"
ARTIFACTS = "kontext.megacache"
SIZES = ((1024, 1024), (1024, 768), (768, 1024))
_READY_POLL = 0.2  # seconds
_OK = 200

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Web: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


class DeploymentError(FluxfireError):
    """The service cannot be deployed, or not be started, as it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What can be chosen, each by the environment variable `FLUXFIRE_` and its name in capitals.

    Attributes:
        model: what `fluxfire.loading.load` takes.
        preset: a preset's name, or a file that `fluxfire tune` wrote. None is the server's own
            default: `faithful`, unless a request asks for a lossy quality.
        storage: where pictures are stored, as the server's own option; None sends them back.
        max_queue: requests that wait in one container.
        max_batch: requests that are edited together.
        max_containers: how many there are at most, each with a GPU of its own.
        scaledown_seconds: without a request, after which a container is switched off.
        gpu_snapshot: whether the worker is part of the memory snapshot (1 or 0).
    """

    model: str = "black-forest-labs/FLUX.1-Kontext-dev"
    preset: str | None = None
    storage: str | None = None
    max_queue: int = 32
    max_batch: int = 1
    max_containers: int = 4
    scaledown_seconds: int = 60
    gpu_snapshot: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Deployment:
        """Read what was chosen.

        Args:
            environ: environment variables; one that is missing or empty means the default.

        Raises:
            DeploymentError: a number is none, or is below 1.
        """
        given = {f.name: environ.get(_variable(f.name), "") for f in fields(cls)}
        return cls(**{name: _parsed(name, text) for name, text in given.items() if text})

    def variables(self) -> dict[str, str]:
        """Write what was chosen as environment variables, which `read` reads back."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            _variable(name): str(int(value) if isinstance(value, bool) else value)
            for name, value in told.items()
            if value is not None
        }


def settings_arguments(
    chosen: Deployment, keys_file: Path, passes: Path | None = None
) -> dict[str, Any]:
    """Return the keyword arguments of the server's `Settings`.

    Args:
        chosen: what was chosen.
        keys_file: hashed API keys; on the open internet there is no service without.
        passes: a file that `warm` saved, to be used instead of the preset by name.
    """
    return {
        "model": chosen.model,
        "preset": chosen.preset if passes is None else str(passes),
        "keys_file": keys_file,
        "storage": chosen.storage,
        "max_queue": chosen.max_queue,
        "max_batch": chosen.max_batch,
    }


def write_keys(environ: Mapping[str, str], file: Path) -> Path:
    """Put the hashed keys, which come as a secret, where the server reads them.

    Args:
        environ: environment variables.
        file: what to write; only its owner can read it.

    Returns:
        The file.

    Raises:
        DeploymentError: there are no keys.
    """
    keys = environ.get(KEYS, "").strip()
    if not keys:
        raise DeploymentError(
            f"the secret {SECRET!r} has no {KEYS}, and the service is not started without keys; "
            f"set {KEYS} to what the file of hashed keys holds"
        )
    file.unlink(missing_ok=True)
    file.touch(mode=0o600)
    file.write_text(keys + "\n", encoding="utf-8")
    return file


def requirements(needed: Iterable[str]) -> tuple[str, ...]:
    """Select what a container installs of what fluxfire's own metadata says that it needs.

    Args:
        needed: requirements, with markers.

    Returns:
        Requirements without markers, capped by `CEILINGS`, sorted.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    found = set()
    for one in map(Requirement, needed):
        if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in EXTRAS):
            continue
        one.specifier &= SpecifierSet(CEILINGS.get(one.name, ""))
        one.marker = None
        found.add(str(one))
    return tuple(sorted(found))


def _variable(name: str) -> str:
    return f"FLUXFIRE_{name.upper()}"


def _parsed(name: str, text: str) -> Any:
    default = getattr(Deployment, name)
    if not isinstance(default, int):
        return text
    least = 0 if isinstance(default, bool) else 1
    if not text.isdecimal() or int(text) < least:
        raise DeploymentError(f"{_variable(name)}={text!r}; it must be a number, {least} or more")
    return type(default)(int(text))


def recipe(folder: Path, preset: str | None) -> Path:
    """Return the file that has the passes of a preset, with the artifacts' own.

    Args:
        folder: where `warm` saves.
        preset: a preset's name, or a file that `fluxfire tune` wrote; None for a server's default.
    """
    return folder / (f"passes-{Path(preset).stem}.json" if preset else "passes.json")


def warm(
    folder: Path,
    model: str,
    preset: str | None,
    *,
    sizes: Iterable[tuple[int, int]] = SIZES,
    **call: Any,
) -> str:
    """Load a model, optimize it, warm it up, and save what a container can take over.

    In the folder are then the compiled artifacts (`kontext.megacache`) and, in `recipe`'s file,
    the passes with which they are found.

    Args:
        folder: where to save.
        model: what `fluxfire.loading.load` takes.
        preset: a preset's name, or a file that `fluxfire tune` wrote; None for a server's default.
        sizes: output sizes to compile for.
        **call: further arguments of the pipeline's call, as for `fluxfire.warmup`.

    Returns:
        The report.
    """
    import fluxfire
    from fluxfire import loading
    from fluxfire.passes import MegaCache
    from fluxfire.planning import recipes
    from fluxfire.planning.resolve import preset_or_file
    from fluxfire.serve.quality_levels import default_passes

    folder.mkdir(parents=True, exist_ok=True)
    named = preset_or_file(preset) if preset else ()  # a wrong name, before a model is loaded
    pipe = loading.load(model)
    wanted = named if preset else default_passes(pipe.device.type)
    others = [p for p in wanted if p.name != MegaCache.name]
    passes = fluxfire.order([*others, MegaCache(folder / ARTIFACTS)])
    fluxfire.optimize(pipe, passes)
    fluxfire.warmup(pipe, sizes=list(sizes), **call)
    recipes.write(passes, recipe(folder, preset))
    return str(fluxfire.report(pipe))


class Started:
    """A web application that is started before its server asks for it.

    Modal starts one when a container is ready for requests; a worker that takes a minute to load
    is better started before, and waited for.
    """

    def __init__(self, web: Web) -> None:
        self._web = web
        self._state: dict[str, Any] = {}
        self._asked: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._lifespan: asyncio.Future[None] | None = None

    async def start(self, seconds: float) -> None:
        """Start it, and wait until it is ready.

        Args:
            seconds: how long at most.

        Raises:
            DeploymentError: it cannot be started, or is not ready in time.
        """
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        running = self._web(scope, self._asked.get, self._answers.put)
        self._lifespan = asyncio.ensure_future(running)
        status = None
        try:
            async with asyncio.timeout(seconds):
                await self._ask("startup")
                # Nothing in an ASGI application tells when it gets ready.
                while (status := await self._status("/ready")) != _OK:
                    if await self._status("/health") != _OK:
                        raise DeploymentError("the service cannot work; its log says why")
                    await asyncio.sleep(_READY_POLL)
        except TimeoutError:
            self._lifespan.cancel()
            raise DeploymentError(
                f"the service was not ready after {seconds:g} s (the last answer of /ready: "
                f"{status}); its log says what it waits for"
            ) from None

    async def stop(self) -> None:
        """Stop it, once its server is gone."""
        if self._lifespan is not None and not self._lifespan.done():
            await self._ask("shutdown")
            await self._lifespan

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; to be started again, say that it was."""
        if scope["type"] != "lifespan":
            await self._web(
                {**scope, "state": {**scope.get("state", {}), **self._state}}, receive, send
            )
            return
        for what in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{what}.complete"})

    async def _ask(self, what: str) -> None:
        """Send an event, and wait for its answer."""
        await self._asked.put({"type": f"lifespan.{what}"})
        answer = await self._answers.get()
        if answer["type"] != f"lifespan.{what}.complete":
            raise DeploymentError(f"{what} failed: {answer.get('message') or 'no reason is given'}")

    async def _status(self, path: str) -> int:
        """Get a path of the application, within this process, and return the answer's status."""
        scope: Message = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": b"", "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 80), "state": self._state,
        }  # fmt: skip
        statuses: list[int] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await self._web(scope, receive, send)
        return statuses[0]


def describe(chosen: Deployment | None = None) -> dict[str, object]:
    """Say what is deployed, from the constants that the app is built with.

    Args:
        chosen: what was chosen; by default, as this process was told.
    """
    chosen = chosen or CHOSEN
    return {
        "GPU": GPU,
        "CPU cores": CORES,
        "memory, MiB": MEMORY_MIB,
        "Python": PYTHON,
        "model": chosen.model,
        "preset": chosen.preset or "faithful; balanced or fast where a request asks",
        "volume": f"{NAME} at {FOLDER}",
        "secrets": ", ".join(_secrets(chosen)),
        "containers at least": 0,
        "containers at most": chosen.max_containers,
        "scale-down window, s": chosen.scaledown_seconds,
        "requests at once, at most": _most_inputs(chosen),
        "requests at once, before another container starts": chosen.max_batch,
        "startup within, s": STARTUP_SECONDS,
        "memory snapshot": "on",
        "GPU snapshot": "on" if chosen.gpu_snapshot else "off",
        "API keys": "always",
    }


def _secrets(chosen: Deployment) -> dict[str, list[str]]:
    """Name the secrets, and the variables that each must have."""
    needed = {SECRET: [KEYS, "FLUXFIRE_MEGACACHE_KEY"], HUB_SECRET: ["HF_TOKEN"]}
    if chosen.storage is not None:
        needed[STORAGE_SECRET] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    return needed


def _most_inputs(chosen: Deployment) -> int:
    """Let in what the queue takes and what is edited; the rest waits outside, or elsewhere."""
    return chosen.max_queue + chosen.max_batch


def _image() -> modal.Image:
    """Describe the image: Debian with a C compiler, which inductor needs, and the package."""
    needed = importlib.metadata.requires(NAME) or () if modal.is_local() else ()
    return (
        modal.Image.debian_slim(python_version=PYTHON)
        .pip_install(*requirements(needed))
        # Weights, pages and schemas lie beside the code; by default only *.py would come along.
        .add_local_python_source("fluxfire", ignore=["**/__pycache__", "**/*.pyc"])
    )


CHOSEN = Deployment.read(os.environ)
VOLUME = modal.Volume.from_name(NAME, create_if_missing=True)
_SHARED: dict[str, Any] = {
    "image": _image(),
    "gpu": GPU,
    "cpu": CORES,
    "memory": MEMORY_MIB,
    "volumes": {str(FOLDER): VOLUME},
    "secrets": [modal.Secret.from_name(n, required_keys=k) for n, k in _secrets(CHOSEN).items()],
    "env": {**CHOSEN.variables(), "HF_HOME": str(FOLDER / "huggingface")},
    "include_source": True,  # this file; the image has the package
}
app = modal.App(NAME)


@app.function(timeout=PREPARE_SECONDS, **_SHARED)
def prepare() -> str:
    """Download the weights and compile, into the volume."""
    told = warm(FOLDER, CHOSEN.model, CHOSEN.preset)
    VOLUME.commit()
    return told


@app.cls(
    min_containers=0,
    max_containers=CHOSEN.max_containers,
    scaledown_window=CHOSEN.scaledown_seconds,
    timeout=REQUEST_SECONDS,
    startup_timeout=STARTUP_SECONDS,
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True} if CHOSEN.gpu_snapshot else None,
    **_SHARED,
)
@modal.concurrent(max_inputs=_most_inputs(CHOSEN), target_inputs=CHOSEN.max_batch)
class Editor:
    """What a container runs."""

    @modal.enter(snap=True)
    def imports(self) -> None:
        """Import what the server needs; nothing secret is read yet."""
        importlib.import_module("fluxfire.serve.app")

    @modal.enter(snap=CHOSEN.gpu_snapshot)
    async def start(self) -> None:
        """Start the server's worker, and wait for it."""
        from fluxfire.serve.app import create_app
        from fluxfire.serve.settings import Settings

        keys = write_keys(os.environ, KEYS_FILE)
        found = recipe(FOLDER, CHOSEN.preset)
        arguments = settings_arguments(CHOSEN, keys, found if found.is_file() else None)
        self._started = Started(create_app(Settings(**arguments)))
        await self._started.start(STARTUP_SECONDS)

    @modal.asgi_app()
    def web(self) -> Started:
        """Return the application."""
        return self._started

    @modal.exit()
    async def stop(self) -> None:
        """Stop the worker."""
        await self._started.stop()
