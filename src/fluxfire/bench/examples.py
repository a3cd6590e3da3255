"""What to edit: pictures with instructions, and where it is known, what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fluxfire import spark
from fluxfire.errors import ExampleError, PictureError
from fluxfire.pictures import read_picture


@dataclass(frozen=True)
class Example:
    """One edit to make.

    Attributes:
        instruction: what to do.
        picture: what to do it to; None makes a picture from words alone.
        check: tells whether a result is right; None where no program can.
        target: the exact result, where there is one to show.
    """

    instruction: str
    picture: Image.Image | None = None
    check: Callable[[Image.Image], bool] | None = None
    target: Image.Image | None = None

    def right(self, picture: Image.Image) -> bool | None:
        """Whether a result is right; None where no program can tell, as of another size."""
        if self.check is None or (self.target is not None and picture.size != self.target.size):
            return None
        return self.check(picture)


def held_out(n: int, *, first: int = 0) -> list[Example]:
    """Return edits that Spark's training never showed.

    Args:
        n: how many.
        first: how many to pass over; those before it and from it on have none in common.
    """
    drawn = spark.examples(split="test", n=first + n)[first:]
    return [Example(e.instruction, e.source, e.check, e.target) for e in drawn]


def read_examples(path: Path) -> list[Example]:
    """Read a file of examples: JSON lines such as `{"image": "cat.jpg", "prompt": "…"}`.

    Args:
        path: the file. Images are looked for beside it; a line without one asks for a
            picture from words alone.

    Raises:
        ExampleError: naming the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExampleError(f"cannot read examples from {path}: {error}") from None
    found = [
        _example(line, path.parent, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ExampleError(f"{path} holds no examples; write one JSON object in each line")
    return found


def _example(line: str, folder: Path, where: str) -> Example:
    usage = 'write {"image": "picture.png", "prompt": "the instruction"}'
    try:
        facts = json.loads(line)
    except json.JSONDecodeError as error:
        raise ExampleError(f"{where} is not JSON ({error}); {usage}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("prompt"), str):
        raise ExampleError(f"{where} has no prompt; {usage}")
    if unknown := sorted(facts.keys() - {"image", "prompt"}):
        raise ExampleError(f"{where} says {', '.join(unknown)}, which means nothing here; {usage}")
    name = facts.get("image")
    if name is None:
        return Example(facts["prompt"])
    if not isinstance(name, str):
        raise ExampleError(f"{where}: the image is {name!r}, not a file's name; {usage}")
    try:
        return Example(facts["prompt"], read_picture(folder / name))
    except PictureError as error:
        raise ExampleError(f"{where}: {error}") from None
