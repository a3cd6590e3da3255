"""Result files in JSON, with their time, commit and environment."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxfire.bench.rows import Row
from fluxfire.environment import environment
from fluxfire.text import write_atomically


def stamp() -> dict[str, Any]:
    """Return the time, commit and environment of a measurement.

    The commit comes from git, or from FLUXFIRE_COMMIT if the code runs outside its checkout.
    """
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": os.environ.get("FLUXFIRE_COMMIT") or _commit(),
        "environment": environment().to_dict(),
    }


def save_result(result: dict[str, Any], path: Path) -> None:
    """Write a result and replace the file atomically, so that a crash leaves no partial file."""
    write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def row_saver(result: dict[str, Any], path: Path) -> Callable[[Sequence[Row]], None]:
    """Return an `on_rows` callback for `measure` that puts the rows into a result and saves it."""

    def save_rows(rows: Sequence[Row]) -> None:
        result["rows"] = [row.to_dict() for row in rows]
        save_result(result, path)

    return save_rows


def load_result(path: Path) -> dict[str, Any]:
    """Read a result."""
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _commit() -> str | None:
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        for command in (
            ["ls-files", "--error-unmatch", here.name],  # else the repository is another project's
            ["describe", "--always", "--dirty", "--abbrev=12"],
        ):
            done = subprocess.run([*git, *command], capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
