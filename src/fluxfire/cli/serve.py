"""The command `serve`: an editing service over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from fluxfire.cli.options import Commands, UsageError, add_command, add_model, add_passes, note, say
from fluxfire.cli.values import positive, size, whole
from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings
from fluxfire.text import extra_hint


def add(commands: Commands) -> None:
    """Add `serve`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(commands, "serve", serve, "edit pictures for others, over HTTP")
    add_model(parser)
    add_passes(parser, default="faithful, where requests may ask for balanced or fast")
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
        if sys.stdout.isatty():
            note("append the line above to the file that --keys names")
        return 0
    try:
        from fluxfire.serve import create_app
        from fluxfire.serve.server import Server, listening
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
        said = f"ready: {settings.model} on {facts.device} with {passes}; quality {facts.level}"
        if others := [level for level in facts.levels if level != facts.level]:
            said += f", unless a request asks for {' or '.join(others)}"
        with contextlib.suppress(OSError):  # nobody may read it any more
            note(said)

    app = create_app(settings, on_ready=tell, on_trouble=end)
    server = Server(app, settings.drain_seconds)
    with listening(settings) as listener:
        address, port = listener.getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{port}"
        note(f"loading {settings.model}; the page at {url} opens meanwhile")
        server.run([listener])
    if troubles:
        raise FluxfireError(troubles[0])
    return 0
