"""The service on Modal, scaled from no container to several.

    modal run -m fluxfire.serve.modal_app::prepare    # weights and compiled artifacts, once
    modal deploy -m fluxfire.serve.modal_app

Modal imports this module twice: where it is deployed, and in every container. What was chosen by
environment variables there is handed on to the containers, so that both see the same.

A container's web server is the one that `fluxfire serve` runs: it imports no torch, and spawns a
worker that owns the GPU. A memory snapshot is taken before the worker is there, so it spares what
the server imports, and no more. With `FLUXFIRE_GPU_SNAPSHOT=1` the worker is started, loaded and
warm before, and the snapshot holds its memory, the GPU's too: an alpha feature of Modal's.

Nothing here was ever deployed: the tests build the app with Modal's own package, and run what runs
without Modal.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import modal

from fluxfire.serve.deployment import (
    KEYS,
    SECRET,
    Deployment,
    requirements,
    settings_arguments,
    write_keys,
)
from fluxfire.serve.prestart import Started
from fluxfire.serve.prewarm import recipe, warm

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
    """Describe the image: Debian with a C compiler, which inductor needs, and our own source."""
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
    "include_source": False,  # the image has it
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
