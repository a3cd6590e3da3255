"""Runs `fluxfire serve` in a process of its own, for the benchmarks of the service."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

PATIENCE = 600.0
"""Seconds that a start or an answer may take."""


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service, ready; yields its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fluxfire", "serve", "--model", model, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for as long as the service
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log)  # noqa: S603
    try:
        for _ in range(int(PATIENCE)):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                    break
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(f"the service ended before it was ready: {log.read()[-2000:]}")
            time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def body(
    prompt: str, picture: Image.Image | None, steps: int, quality: str, seed: int
) -> dict[str, Any]:
    """Return the fields of a request, in JSON."""
    fields = {"prompt": prompt, "steps": steps, "quality": quality, "seed": seed}
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        fields["image"] = base64.b64encode(file.getvalue()).decode()
    return fields


def pixels(answer: dict[str, Any]) -> list[np.ndarray]:
    """Return the pictures of an answer."""
    found = []
    for image in answer["images"]:
        data = base64.b64decode(image["data_url"].partition(",")[2])
        found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16))
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the least and the most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def resident(pid: int) -> int:
    """Return the resident bytes of a process; 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def children(pid: int, kind: str) -> list[int]:
    """Return the children of a server whose command line has a word.

    Args:
        pid: the server.
        kind: "spawn_main" for workers, "decoding_process" for what decodes large pictures.
    """
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            if kind.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found
