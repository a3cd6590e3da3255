"""The command `serve`: an editing service over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from fluxfire.cli.console import note, say, usage_errors
from fluxfire.cli.options import Commands, add_command, add_model, add_passes
from fluxfire.cli.values import port, positive_number, size
from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings
from fluxfire.text import extra_hint


def add(commands: Commands) -> None:
    """Add `serve`."""
    parser = add_command(
        commands, "serve", serve, "run an HTTP editing service, with a page to try it on",
        example="fluxfire serve --model black-forest-labs/FLUX.1-Kontext-dev",
    )  # fmt: skip
    add_model(parser)
    add_passes(parser, default="faithful; a request may ask for balanced or fast")
    parser.add_argument(
        "--host", default=Settings.host, help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=port, default=Settings.port,
        help="port to listen on; 0 for any free port (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keys", type=Path, metavar="FILE",
        help="file of API keys (required unless --host is a loopback address)",
    )  # fmt: skip
    parser.add_argument("--new-key", metavar="NAME", help="make an API key, print it, and exit")
    parser.add_argument(
        "--image-host", action="append", default=[], metavar="HOST",
        help="host that a request's image_url may name, such as *.example.org (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--origin", action="append", default=[], metavar="URL",
        help="allowed CORS origin (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="PLACE",
        help="store results in a folder or in s3://bucket/prefix?endpoint=…, and answer with "
        "links (FLUXFIRE_SECRET in the environment signs a folder's links)",
    )  # fmt: skip
    parser.add_argument(
        "--max-queue", type=positive_number, default=Settings.max_queue, metavar="N",
        help="most requests that may wait (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-batch", type=positive_number, metavar="N",
        help="most pictures to make at once (default: 4 with a small model, else 1)",
    )  # fmt: skip
    parser.add_argument(
        "--drain", type=positive_number, default=Settings.drain_seconds, metavar="SECONDS",
        help="seconds to finish requests on shutdown (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default=Settings.log_format,
        help="how a line of the log is written (default: %(default)s)",
    )
    parser.add_argument(
        "--warm-up", type=size, action="append", metavar="WIDTHxHEIGHT",
        help="size to run before the service is ready (repeatable)",
    )  # fmt: skip


def serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the service."""
    if arguments.new_key is not None:
        _print_new_key(arguments.new_key)
        return 0
    try:
        from fluxfire.serve import create_app
        from fluxfire.serve.server import Server, bind_socket
        from fluxfire.serve.wire import Facts
    except ImportError as error:
        raise FluxfireError(f"{error.name} is missing: {extra_hint('serve')}") from error
    troubles: list[str] = []

    def end(why: str) -> None:
        troubles.append(why)
        server.should_exit = True

    def announce(facts: Facts) -> None:
        passes = ", ".join(facts.passes) or "no passes"
        text = f"ready: {settings.model} on {facts.device} with {passes}; quality {facts.level}"
        if others := [level for level in facts.levels if level != facts.level]:
            text += f", unless a request asks for {' or '.join(others)}"
        with contextlib.suppress(OSError):  # the terminal may be gone
            note(text)

    with usage_errors():
        settings = _settings(arguments)
        app = create_app(settings, on_ready=announce, on_trouble=end)
    server = Server(app, settings.drain_seconds)
    with bind_socket(settings) as listener:
        address, number = listener.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        note(f"loading {settings.model}; the page is at http://{host}:{number}")
        server.run([listener])
    if troubles:
        raise FluxfireError(troubles[0])
    return 0


def _print_new_key(name: str) -> None:
    from fluxfire.serve.keys import new_key

    with usage_errors():
        key, line = new_key(name)
    say(line)
    note(f"the key (fluxfire will not show it again): {key}")
    if sys.stdout.isatty():
        note("append the line above to the file that --keys names")


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
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
        log_format=arguments.log_format,
        warm_up=tuple(arguments.warm_up) if arguments.warm_up else None,
    )
