"""The command `serve`: an editing service over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from fluxfire.cli import catalog, serve_options
from fluxfire.cli.console import note, say, usage_errors
from fluxfire.cli.options import Commands, add_check, add_command
from fluxfire.errors import FluxfireError
from fluxfire.loading import SPARK, model_folder
from fluxfire.planning import recipes
from fluxfire.text import extra_hint


def add(commands: Commands) -> None:
    """Add `serve`."""
    parser = add_command(
        commands, "serve", serve, "run an HTTP editing service, with a page to try it on",
        example="fluxfire serve --model black-forest-labs/FLUX.1-Kontext-dev",
    )  # fmt: skip
    serve_options.add(parser)
    add_check(parser, _check_arguments)


def serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the service."""
    if arguments.new_key is not None:
        _print_new_key(arguments.new_key)
        return 0
    try:
        from fluxfire.serve import create_app
        from fluxfire.serve.server import Server, bind_socket
        from fluxfire.serve.sources import read_settings
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
        settings = read_settings(serve_options.given(arguments), arguments.config)
        _check_names(settings.model, settings.preset, settings.passes)
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


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Check the names on the command line, before the service's own libraries are needed."""
    given = serve_options.given(arguments)
    with usage_errors():
        _check_names(given.get("model", SPARK), given.get("preset"), given.get("passes"))


def _check_names(model: str, preset: str | None, passes: str | None) -> None:
    """Refuse names that mean nothing, before anything is loaded."""
    model_folder(model)
    if passes is not None:
        catalog.check_passes(passes)
    elif preset is not None and preset.endswith(".json"):
        recipes.read_entries(Path(preset))
    elif preset is not None:
        catalog.check_preset(preset)


def _print_new_key(name: str) -> None:
    from fluxfire.serve.keys import new_key

    with usage_errors():
        key, line = new_key(name)
    say(line)
    note(f"the key (fluxfire will not show it again): {key}")
    if sys.stdout.isatty():
        note("append the line above to the file that --keys names")
