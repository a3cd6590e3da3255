"""Results as JSON files that say where they come from."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxfire.environment import environment
from fluxfire.text import write_whole


def stamp() -> dict[str, Any]:
    """Say when, where and with which code a result was measured.

    The commit is git's, or FLUXFIRE_COMMIT's where the code runs outside its checkout.
    """
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": os.environ.get("FLUXFIRE_COMMIT") or _commit(),
        "environment": environment().to_dict(),
    }


def save_result(result: dict[str, Any], path: Path) -> None:
    """Write a result, replacing the file in one step so that a crash leaves no half."""
    write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def keeping(result: dict[str, Any], path: Path) -> Callable[[Sequence[Any]], None]:
    """Make what `measure` hands its rows to: they go into the result, and that into its file."""

    def keep(rows: Sequence[Any]) -> None:
        result["rows"] = [row.to_dict() for row in rows]
        save_result(result, path)

    return keep


def load_result(path: Path) -> dict[str, Any]:
    """Read a result."""
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _commit() -> str | None:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        for command in (["ls-files", "--error-unmatch", here.name],  # or it is somebody else's
                        ["describe", "--always", "--dirty", "--abbrev=12"]):  # fmt: skip
            done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
