"""The command `serve`: an editing service over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import time
from pathlib import Path

from fluxfire.cli.options import Commands, UsageError, add_command, add_model, add_passes, note, say
from fluxfire.cli.values import positive, size, whole
from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings
from fluxfire.text import extra_hint

_LAST_WORDS = 5  # seconds to write the last answers, at least
_GLANCE = 0.1  # seconds between looks whether to stop at once
_PROBES = {"/health", "/ready", "/metrics"}


def add(commands: Commands) -> None:
    """Add `serve`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(commands, "serve", serve, "edit pictures for others, over HTTP")
    add_model(parser)
    add_passes(parser, default="balanced, which is lossy; on a CPU its cache alone")
    parser.add_argument("--host", default=Settings.host, help="default: %(default)s")
    parser.add_argument("--port", type=whole, default=Settings.port, help="default: %(default)s")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="whom to serve; wanted beyond this machine"
    )
    parser.add_argument("--new-key", metavar="NAME", help="make a key, print it, and end")
    parser.add_argument(
        "--image-host", action="append", default=[], metavar="HOST",
        help="a host that image_url may name, such as *.example.org; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--origin", action="append", default=[], metavar="URL",
        help="another site whose pages may ask; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="WHERE",
        help="a folder, or s3://bucket/prefix?endpoint=…: answers then hold links "
        "(a folder's are signed with FLUXFIRE_SECRET of the environment)",
    )  # fmt: skip
    parser.add_argument(
        "--max-queue", type=positive, default=Settings.max_queue, help="default: %(default)s"
    )
    parser.add_argument(
        "--max-batch", type=positive, help="pictures at once (default: 4 of a small model, else 1)"
    )
    parser.add_argument(
        "--drain", type=positive, default=Settings.drain_seconds, metavar="SECONDS",
        help="how long requests may go on when it is told to stop (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--warm-up", type=size, action="append", metavar="WIDTHxHEIGHT",
        help="a size to run before requests are taken; may be given again",
    )  # fmt: skip


def serve(arguments: argparse.Namespace) -> int:
    """Serve until told to stop.

    Args:
        arguments: the command's.

    Returns:
        The exit status.

    Raises:
        UsageError: if the extra is not installed.
        FluxfireError: if a setting cannot be used, or the address is taken.
    """
    if arguments.new_key is not None:
        from fluxfire.serve.keys import new_key

        key, line = new_key(arguments.new_key)
        say(line)
        note(f"the key, which is told only now: {key}")
        note("append the line above to the file that --keys names")
        return 0
    try:
        import uvicorn

        from fluxfire.serve import create_app
        from fluxfire.serve.wire import Facts
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: {extra_hint('serve')}") from error
    settings = Settings(
        model=arguments.model,
        preset=arguments.preset,
        passes=arguments.passes,
        host=arguments.host,
        port=arguments.port,
        keys_file=arguments.keys,
        image_hosts=tuple(arguments.image_host),
        origins=tuple(arguments.origin),
        storage=arguments.storage,
        secret=os.environ.get("FLUXFIRE_SECRET"),
        max_queue=arguments.max_queue,
        max_batch=arguments.max_batch,
        drain_seconds=arguments.drain,
        warm_up=tuple(arguments.warm_up) if arguments.warm_up else None,
    )
    troubles: list[str] = []

    def end(why: str) -> None:
        troubles.append(why)
        server.should_exit = True

    def tell(facts: Facts) -> None:
        passes = ", ".join(facts.passes) or "no passes"
        note(f"ready: {settings.model} on {facts.device} with {passes}; quality {facts.level}")

    app = create_app(settings, on_ready=tell, on_trouble=end)

    class Server(uvicorn.Server):
        """One that lets the engine answer what it took, before connections are closed."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            began, engine = time.monotonic(), app.state.engine
            draining = asyncio.create_task(engine.drain(settings.drain_seconds))
            while not draining.done() and not self.force_exit:
                await asyncio.wait({draining}, timeout=_GLANCE)
            if self.force_exit:  # told a second time
                engine.close()
            await draining
            left = settings.drain_seconds - (time.monotonic() - began)
            self.config.timeout_graceful_shutdown = max(_LAST_WORDS, round(left))
            await super().shutdown(sockets)
            if self.force_exit:  # which uvicorn takes for a reason to leave all as it is
                await self.lifespan.shutdown()

    server = Server(uvicorn.Config(app))
    logging.getLogger("uvicorn.access").addFilter(_is_no_probe)
    with _listening(settings) as listener:
        address, port = listener.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{port}"
        note(f"loading {settings.model}; the page at {url} opens meanwhile")
        server.run(sockets=[listener])
    if troubles:
        raise FluxfireError(troubles[0])
    return 0


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Whether a line of the access log is worth one: probes come every few seconds."""
    path = record.args[2] if isinstance(record.args, tuple) else ""
    return str(path).partition("?")[0] not in _PROBES


def _listening(settings: Settings) -> socket.socket:
    """Take the address before a model is loaded for nothing.

    Raises:
        FluxfireError: it is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Asyncio turns Nagle's algorithm, which delays answers by 40 ms, off where TCP is named.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise FluxfireError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}; "
            f"give another --port or --host"
        ) from error
    return listener
