"""The command `megacache`: inspect or verify a file of compiled artifacts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fluxfire.cli.console import UsageError, say
from fluxfire.cli.options import Commands, add_check, add_command
from fluxfire.errors import FluxfireError
from fluxfire.text import human_seconds, table

if TYPE_CHECKING:  # so that the command line answers before torch is loaded
    from fluxfire.passes.shared.artifact_file import Payload


def add(commands: Commands) -> None:
    """Add `megacache`."""
    parser = add_command(
        commands, "megacache", examine, "inspect or verify a file of compiled artifacts",
        example="fluxfire megacache verify kontext.megacache",
    )  # fmt: skip
    parser.add_argument(
        "action", choices=("inspect", "verify"),
        help="inspect prints what the file holds; verify says whether this machine can use it",
    )  # fmt: skip
    parser.add_argument("path", type=Path, help="the file")
    add_check(parser, _check_path)


def _check_path(arguments: argparse.Namespace) -> None:
    try:
        arguments.path.open("rb").close()
    except OSError as error:
        raise UsageError(f"cannot read {arguments.path}: {error.strerror}") from None


def examine(arguments: argparse.Namespace) -> int:
    """Print what the file holds, and whether it can be used; 1 means that `verify` failed."""
    from fluxfire.passes.mega_cache import machine
    from fluxfire.passes.shared import artifact_file

    path: Path = arguments.path
    try:
        if arguments.action == "inspect":  # also for a file that fluxfire would not use
            for number, payload in enumerate(artifact_file.peek(path)):
                say(table((f"payload {number}", ""), _facts(payload).items()) + "\n")
        payloads = artifact_file.read(path, artifact_file.signing_key())
    except OSError as error:
        raise FluxfireError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise FluxfireError(f"cannot read {path}: it is larger than memory") from None
    except artifact_file.ArchiveError as error:
        raise FluxfireError(f"fluxfire would not use {path}: {error}") from None
    here = machine()
    fitting = sum(here.items() <= p.fingerprint.items() for p in payloads)
    trust = "signed" if artifact_file.signing_key() else "only you can write it"
    say(f"{path} is intact, and {trust}; {fitting} of {len(payloads)} payloads fit this machine")
    return 0 if fitting or arguments.action == "inspect" else 1


def _facts(payload: Payload) -> dict[str, object]:
    return {
        "made": payload.made,
        "bytes": len(payload.blob),
        "artifacts": len(payload.keys),
        "compiled in": human_seconds(payload.seconds),
        "tokens (noise+reference+text)": ", ".join(payload.sizes),
        **payload.fingerprint,
    }
