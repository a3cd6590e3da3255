"""The command `quantize`: write an int8 checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from fluxfire.cli.console import UsageError, note, say
from fluxfire.cli.options import Commands, add_check, add_command
from fluxfire.text import human_bytes

_NOTABLE = 2 * 2**30  # bytes between two lines of progress


def add(commands: Commands) -> None:
    """Add `quantize`."""
    parser = add_command(
        commands, "quantize", quantize, "write a checkpoint in int8, half the size",
        example="fluxfire quantize ./kontext ./kontext-int8",
    )  # fmt: skip
    parser.add_argument("model", help="a folder that save_pretrained wrote, or a hub id")
    parser.add_argument("folder", type=Path, help="the new folder; it must not exist")
    add_check(parser, _check_folder)


def _check_folder(arguments: argparse.Namespace) -> None:
    if arguments.folder.exists():
        raise UsageError(f"{arguments.folder} exists already; name another folder")


def quantize(arguments: argparse.Namespace) -> int:
    """Write the checkpoint, and say how large it is."""
    from fluxfire import loading

    shown: dict[str, int] = {}

    def show(part: str, done: int, total: int) -> None:
        if done - shown.get(part, -_NOTABLE) >= _NOTABLE or done == total:
            shown[part] = done
            note(f"{part}: {_size(done)} of {_size(total)}")

    size = loading.quantize(arguments.model, arguments.folder, progress=show)
    say(f"wrote {arguments.folder}: {_size(size)}; load it with fluxfire.load or --model")
    return 0


def _size(count: int) -> str:
    return human_bytes(count).lstrip("+")
