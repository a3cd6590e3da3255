"""The command `megacache`: look at a file of compiled artifacts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fluxfire.cli.options import Commands, UsageError, add_command, say
from fluxfire.text import human_seconds, table


def add(commands: Commands) -> None:
    """Add `megacache`.

    Args:
        commands: the commands there are already.
    """
    parser = add_command(commands, "megacache", look, "look at a file of compiled artifacts")
    parser.add_argument("action", choices=("inspect", "verify"))
    parser.add_argument("path", type=Path)


def look(arguments: argparse.Namespace) -> int:
    """Show what a file holds, and say whether it would be used.

    Args:
        arguments: the command's.

    Returns:
        The exit status: 1 if nothing in a file to verify fits this machine.

    Raises:
        UsageError: if the file cannot be read, or would not be used.
    """
    from fluxfire.passes.mega_cache import machine
    from fluxfire.passes.shared import artifact_file

    path: Path = arguments.path
    try:
        if arguments.action == "inspect":  # also of a file that would not be used
            for number, payload in enumerate(artifact_file.peek(path)):
                say(table((f"payload {number}", ""), _facts(payload).items()) + "\n")
        payloads = artifact_file.read(path, artifact_file.signing_key())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise UsageError(f"cannot read {path}: it is larger than memory") from None
    except artifact_file.ArchiveError as error:
        raise UsageError(f"{path} would not be used: {error}") from None
    here = machine()
    fitting = sum(here.items() <= p.fingerprint.items() for p in payloads)
    signed = "signed" if artifact_file.signing_key() else "nobody else can write it"
    say(f"{path} is intact, and {signed}; {fitting} of {len(payloads)} payloads fit this machine")
    return 0 if fitting or arguments.action == "inspect" else 1


def _facts(payload: Any) -> dict[str, object]:
    return {
        "made": payload.made,
        "bytes": len(payload.blob),
        "artifacts": len(payload.keys),
        "compiled in": human_seconds(payload.seconds),
        "tokens (noise+reference+text)": ", ".join(payload.sizes),
        **payload.fingerprint,
    }
