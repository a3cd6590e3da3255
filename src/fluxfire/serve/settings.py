"""What a service is told when it starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fluxfire.errors import FluxfireError

_HOUR, _DAY = 3600.0, 86400.0
_LARGEST_PORT = 65535
_DURATIONS = (
    "retention_seconds", "link_seconds", "job_seconds", "request_seconds", "fetch_seconds",
    "drain_seconds", "hang_seconds",
)  # fmt: skip
_SMALL = ("spark", "random-tiny")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a service; all have a default.

    Attributes:
        model: as `fluxfire run --model`: spark, a folder, a hub id, random-tiny or random-full.
        preset: a preset's name, or a file that `fluxfire tune` wrote. None means `faithful`, and
            lets each request ask for `balanced` or `fast`, which are lossy; a CPU compiles nothing.
        passes: names of passes in order, separated by commas, or none; instead of a preset.
        host: address to listen on.
        port: port to listen on; 0 for any.
        keys_file: lines of a name and the hash of a key, as `fluxfire serve --new-key` makes them.
            Without one everybody is served, which only an address of this machine allows.
        image_hosts: hosts that `image_url` may name, such as `images.example.org`, `*.example.org`
            or `http://images.example.org:8080`; none by default.
        origins: other sites whose pages may ask, as `https://example.org`; none by default.
        storage: a folder, or `s3://bucket/prefix?endpoint=…&region=…`: answers then hold links.
            None: answers hold the pictures themselves.
        secret: what links to a folder are signed with. None makes one that a restart forgets.
        retention_seconds: how long stored pictures are kept.
        link_seconds: how long a link to a stored picture is good.
        max_queue: how many requests may wait.
        max_batch: how many pictures are made at once. None means 4 for a small model, and 1 for a
            large one, of which a single picture keeps a GPU busy.
        max_bytes: of a picture sent or fetched.
        max_pixels: of a picture sent or fetched.
        max_jobs: how many jobs are known at once, finished ones included.
        job_seconds: how long a finished job is known, with its pictures.
        request_seconds: how long a request may take before it is given up.
        fetch_seconds: how long fetching an `image_url` may take.
        drain_seconds: how long requests may go on when the service is told to stop.
        hang_seconds: how long the worker may say nothing of what nobody waits for any more, before
            it is taken to hang, and replaced. Compiling for a size that is new is silent, too.
        warm_up: sizes (width, height) to run before the service is ready; None for the model's own.

    Raises:
        FluxfireError: when made: a setting makes no sense, or would serve strangers without keys.
    """

    model: str = "spark"
    preset: str | None = None
    passes: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys_file: Path | None = None
    image_hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    storage: str | None = None
    secret: str | None = None
    retention_seconds: float = _DAY
    link_seconds: float = _HOUR
    max_queue: int = 32
    max_batch: int | None = None
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_jobs: int = 64
    job_seconds: float = 600.0
    request_seconds: float = 300.0
    fetch_seconds: float = 20.0
    drain_seconds: float = 60.0
    hang_seconds: float = 120.0
    warm_up: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_batch", "max_bytes", "max_pixels", "max_jobs"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise FluxfireError(f"{name}={getattr(self, name)!r}; it must be 1 or more")
        for name in _DURATIONS:
            if not getattr(self, name) > 0:
                raise FluxfireError(f"{name}={getattr(self, name)!r}; it must be above 0")
        if not 0 <= self.port <= _LARGEST_PORT:
            raise FluxfireError(f"port={self.port!r}; it must be from 0 to {_LARGEST_PORT}")
        if self.preset is not None and self.passes is not None:
            raise FluxfireError("preset and passes exclude each other; give one of them")
        for origin in self.origins:
            _check_origin(origin)
        if self.keys_file is None and not self.on_loopback:
            raise FluxfireError(
                f"{self.host} can be reached from other machines, so the service needs keys: make "
                f"one by fluxfire serve --new-key NAME, and give the file as --keys; or listen "
                f"on 127.0.0.1"
            )

    @property
    def at_once(self) -> int:
        """How many pictures are made at once."""
        return self.max_batch or (4 if self.model in _SMALL else 1)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check_origin(origin: str) -> None:
    """Refuse what no browser sends as an origin, and would never match."""
    if origin == "*":
        raise FluxfireError("origins='*' would let any page ask; name the sites")
    parts = urlsplit(origin)
    if origin != f"{parts.scheme}://{parts.netloc}" or parts.scheme not in ("http", "https"):
        raise FluxfireError(
            f"origins has {origin!r}; write a site as https://example.org, without a path or a "
            f"slash at the end"
        )
