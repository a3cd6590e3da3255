"""Settings of a service."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from fluxfire.errors import FluxfireError
from fluxfire.text import read_bytes

_HOUR, _DAY = 3600.0, 86400.0
_LARGEST_PORT = 65535
_MULTIPLE, _LONGEST_SIDE = 16, 4096
_DURATIONS = (
    "retention_seconds",
    "link_seconds",
    "job_seconds",
    "head_seconds",
    "request_seconds",
    "fetch_seconds",
    "drain_seconds",
    "hang_seconds",
)
_COUNTS = (
    "max_queue",
    "max_queue_per_key",
    "max_batch",
    "max_bytes",
    "max_pixels",
    "max_jobs",
)
_SMALL = ("spark", "random-tiny")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a service. All have a default.

    Attributes:
        model: as in `fluxfire run --model`: spark, a folder, a hub id, random-tiny or random-full.
        preset: a preset's name, or a file that `fluxfire tune` or `calibrate` wrote. None means
            `faithful`, and each request may ask for `balanced` or `fast`, which are lossy. A CPU
            compiles nothing.
        passes: names of passes in order, separated by commas, or none; instead of a preset.
        memory: how much GPU memory the pipeline may need, such as `16GiB`, or `auto`: adds the
            passes for it, as `optimize(pipe, memory=…)`. With None the whole pipeline is on the
            GPU.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        keys_file: file of keys; `fluxfire serve --new-key` prints its lines of name and hash.
            Without it the service serves everybody, and `host` must be a loopback address.
        image_hosts: allowed hosts of `image_url`, such as `images.example.org`, `*.example.org`
            or `http://images.example.org:8080`; none by default.
        origins: other sites whose pages may send requests, such as `https://example.org`; none by
            default (CORS).
        public_url: the service's address as clients see it, such as
            `https://example.org/fluxfire`. Links to stored pictures begin with it. With None, links
            to a folder's pictures are paths, such as `/files/…`.
        storage: a folder, or `s3://bucket/prefix?endpoint=…&region=…`: answers then contain links.
            With None they contain the pictures themselves.
        secret: signs links to a folder. None creates a random secret at each start, so a restart
            makes earlier links invalid.
        jobs_file: file of the database of jobs, so that jobs survive a restart. With None they end
            with the process.
        webhook_hosts: allowed hosts of `webhook_url`, written as in `image_hosts`; none by default.
        webhook_secret: signs webhooks: `whsec_` and 24 to 64 bytes in base64.
        retention_seconds: how long the service keeps stored pictures.
        link_seconds: how long a link to a stored picture is valid.
        max_queue: most requests in the queue.
        max_queue_per_key: most requests of one key in the queue; None for half of the queue.
        max_batch: batch size. None means 4 for a small model, and 1 for a large one, where a single
            picture keeps a GPU busy.
        max_bytes: most bytes of an uploaded or fetched picture.
        max_pixels: most pixels of an uploaded or fetched picture.
        max_jobs: most jobs of one key that the service keeps, including finished ones.
        job_seconds: how long the service keeps a finished job, its answer and its idempotency key.
        head_seconds: how long a connection may be open without a request.
        request_seconds: time limit of a request.
        fetch_seconds: time limit for fetching an `image_url`.
        drain_seconds: seconds to finish requests on shutdown.
        hang_seconds: the service replaces a worker whose process is silent for this long, or whose
            batch is: one of a kind that it has made before, or that nobody waits for any more. A
            worker may compile for a new kind for longer.
        log_format: text, or json with an object on each line.
        warm_up: sizes (width, height) of the warm-up runs before the service is ready; None for the
            model's own.

    Raises:
        FluxfireError: the constructor got an invalid setting, or the service would serve other
            machines without keys.
    """

    model: str = "spark"
    preset: str | None = None
    passes: str | None = None
    memory: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys_file: Path | None = None
    image_hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    public_url: str | None = None
    storage: str | None = None
    secret: str | None = None
    jobs_file: Path | None = None
    webhook_hosts: tuple[str, ...] = ()
    webhook_secret: str | None = None
    retention_seconds: float = _DAY
    link_seconds: float = _HOUR
    max_queue: int = 32
    max_queue_per_key: int | None = None
    max_batch: int | None = None
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_jobs: int = 256
    job_seconds: float = _HOUR
    head_seconds: float = 20.0
    request_seconds: float = 300.0
    fetch_seconds: float = 20.0
    drain_seconds: float = 60.0
    hang_seconds: float = 60.0
    log_format: Literal["text", "json"] = "text"
    warm_up: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if (given := getattr(self, name)) is not None and given < 1:
                raise FluxfireError(f"{name}={getattr(self, name)!r}; it must be 1 or more")
        for name in _DURATIONS:
            if not getattr(self, name) > 0:
                raise FluxfireError(f"{name}={getattr(self, name)!r}; it must be above 0")
        if not 0 <= self.port <= _LARGEST_PORT:
            raise FluxfireError(f"port={self.port!r}; it must be from 0 to {_LARGEST_PORT}")
        if self.preset is not None and self.passes is not None:
            raise FluxfireError("preset and passes exclude each other; give one of them")
        _check_memory(self.memory)
        if self.log_format not in ("text", "json"):
            raise FluxfireError(f"log_format={self.log_format!r}; it must be text or json")
        for size in self.warm_up or ():
            _check_size(size)
        if self.public_url is not None:
            _check_public_url(self.public_url)
        for origin in self.origins:
            _check_origin(origin)
        if self.keys_file is None and not self.on_loopback:
            raise FluxfireError(
                f"{self.host} can be reached from other machines, so the service needs keys: make "
                f"one with fluxfire serve --new-key NAME, and give the file as --keys; or listen "
                f"on 127.0.0.1"
            )

    @property
    def at_once(self) -> int:
        """The batch size."""
        return self.max_batch or (4 if self.model in _SMALL else 1)

    @property
    def queue_per_key(self) -> int:
        """Most requests of one key in the queue."""
        return self.max_queue_per_key or -(-self.max_queue // 2)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check_memory(memory: str | None) -> None:
    if memory is not None and memory != "auto":
        try:
            read_bytes(memory)
        except ValueError as error:
            raise FluxfireError(f"memory: {error}, or auto") from None


def _check_size(size: tuple[int, int]) -> None:
    """Refuse a size that the pipeline would refuse only after it is loaded."""
    if len(size) != 2 or any(  # noqa: PLR2004 - a width and a height
        side < _MULTIPLE or side % _MULTIPLE or side > _LONGEST_SIDE for side in size
    ):
        raise FluxfireError(
            f"warm_up has the size {'x'.join(map(str, size))}; it must be a width and a height, "
            f"both multiples of {_MULTIPLE} up to {_LONGEST_SIDE}"
        )


def _check_public_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise FluxfireError(
            f"public_url={url!r}; write the address that clients use, such as "
            f"https://example.org/fluxfire"
        )


def _check_origin(origin: str) -> None:
    """Refuse an origin that no browser sends, so that it would never match."""
    if origin == "*":
        raise FluxfireError("origins='*' would allow every site; name the sites")
    parts = urlsplit(origin)
    if origin != f"{parts.scheme}://{parts.netloc}" or parts.scheme not in ("http", "https"):
        raise FluxfireError(
            f"origins has {origin!r}; write a site as https://example.org, without a path or a "
            f"slash at the end"
        )
