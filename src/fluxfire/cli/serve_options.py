"""The options of `serve`: one for each setting, except secrets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fluxfire.cli import catalog
from fluxfire.cli.values import memory, port, positive_decimal, positive_number, size
from fluxfire.loading import KONTEXT, RANDOM, SPARK
from fluxfire.serve.settings import Settings

_OTHER_NAMES = {"keys_file": "keys", "image_hosts": "image-host", "origins": "origin",
                "webhook_hosts": "webhook-host", "drain_seconds": "drain"}  # fmt: skip
"""Settings whose option has a shorter name."""
_TUPLES = ("image_hosts", "origins", "webhook_hosts", "warm_up")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options. One that the user leaves out is not in the parsed arguments."""
    parser.description = (
        "Run an HTTP editing service, with a page to try it on. Each setting can also stand in the "
        "file of --config, or in the environment: max_queue as FLUXFIRE_MAX_QUEUE. The command "
        "line wins over the environment, and the environment over the file. Secrets have no "
        "option: FLUXFIRE_SECRET signs links, and FLUXFIRE_WEBHOOK_SECRET signs webhooks."
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of settings, such as max_queue = 8"
    )
    parser.add_argument("--new-key", metavar="NAME", help="make an API key, print it, and exit")
    _add_model(_Group(parser, "what it serves"))
    _add_clients(_Group(parser, "whom it serves"))
    _add_places(_Group(parser, "what it keeps"))
    _add_limits(_Group(parser, "limits"))
    _add_times(_Group(parser, "times, in seconds"))


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line names."""
    names = {field.name for field in fields(Settings)}
    found = {name: value for name, value in vars(arguments).items() if name in names}
    return {name: tuple(v) if name in _TUPLES else v for name, v in found.items()}


class _Group:
    """A group of options."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def add(
        self, setting: str, about: str, *, default: str = "", **options: Any
    ) -> argparse.Action:
        """Add the option of a setting.

        Args:
            setting: the setting's name.
            about: its help.
            default: what the help calls the default; the setting's own if it is empty.
            **options: further arguments of `add_argument`.
        """
        usual = getattr(Settings, setting)
        shown = default or (f"{usual:g}" if isinstance(usual, float) else usual)
        option = _OTHER_NAMES.get(setting, setting.replace("_", "-"))
        if shown not in (None, ()):
            about += f" (default: {shown})"
        return self._group.add_argument(
            f"--{option}", dest=setting, default=argparse.SUPPRESS, help=about, **options
        )


def _add_model(group: _Group) -> None:
    model = group.add(
        "model",
        f"{SPARK} (a tiny model for pictures of emoji), a folder, a hub id such as {KONTEXT}, "
        f"{' or '.join(RANDOM)}",
    )
    _complete(model, lambda: [SPARK, *RANDOM, KONTEXT])
    preset = group.add(
        "preset",
        "faithful (nothing lossy), balanced or fast (both skip steps: lossy), article, or a file "
        "from fluxfire tune or calibrate",
        default="faithful; a request may ask for balanced or fast",
    )
    _complete(preset, catalog.presets)
    group.add("passes", "names in order, separated by commas, or none; instead of a preset")
    group.add(
        "memory",
        "fit into this much GPU memory, such as 16GiB, or auto: adds the passes for it",
        type=memory,
        metavar="SIZE",
    )
    group.add(
        "warm_up",
        "size to run before the service is ready (repeatable)",
        type=size,
        action="append",
        metavar="WIDTHxHEIGHT",
    )


def _add_clients(group: _Group) -> None:
    group.add("host", "address to listen on")
    group.add("port", "port to listen on; 0 for any free port", type=port)
    group.add(
        "public_url",
        "the service's address as clients see it: links to stored pictures begin with it",
        metavar="URL",
    )
    group.add(
        "keys_file",
        "file of API keys (required unless --host is a loopback address)",
        type=Path,
        metavar="FILE",
    )
    group.add("origins", "allowed CORS origin (repeatable)", action="append", metavar="URL")
    group.add(
        "image_hosts",
        "host that a request's image_url may name, such as *.example.org (repeatable)",
        action="append",
        metavar="HOST",
    )
    group.add(
        "webhook_hosts",
        "host that a job's webhook_url may name (repeatable)",
        action="append",
        metavar="HOST",
    )


def _add_places(group: _Group) -> None:
    group.add(
        "storage",
        "store results in a folder or in s3://bucket/prefix?endpoint=…, and answer with links",
        metavar="PLACE",
    )
    group.add(
        "jobs_file",
        "keep jobs in this file, so that they survive a restart",
        type=Path,
        metavar="FILE",
    )
    group.add("log_format", "how a line of the log is written", choices=("text", "json"))


def _add_limits(group: _Group) -> None:
    for setting, about, default in (
        ("max_queue", "most requests that may wait", ""),
        ("max_queue_per_key", "most requests of one key that may wait", "half of them"),
        ("max_batch", "most pictures to make at once", "4 with a small model, else 1"),
        ("max_jobs", "most jobs of one key to keep, including finished ones", ""),
        ("max_bytes", "most bytes of a picture that a client sends", ""),
        ("max_pixels", "most pixels of a picture that a client sends", ""),
    ):
        group.add(setting, about, default=default, type=positive_number, metavar="N")


def _add_times(group: _Group) -> None:
    for setting, about in (
        ("request_seconds", "time limit of a request"),
        ("fetch_seconds", "time limit for an image_url or a webhook"),
        ("head_seconds", "how long a connection may be open without a request"),
        ("hang_seconds", "silence of the worker after which it is replaced"),
        ("drain_seconds", "time to finish requests on shutdown"),
        ("job_seconds", "how long a finished job and its idempotency key are kept"),
        ("retention_seconds", "how long a stored picture is kept"),
        ("link_seconds", "how long a link to a stored picture is valid"),
    ):
        group.add(setting, about, type=positive_decimal, metavar="S")


def _complete(option: argparse.Action, names: Callable[[], Iterable[str]]) -> None:
    option.completer = lambda **_: list(names())  # type: ignore[attr-defined]
