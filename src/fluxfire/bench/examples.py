"""Examples: pictures with instructions, and a check of the result where possible."""

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
        instruction: the prompt.
        picture: the picture to edit; None for text to image.
        check: returns whether a result is correct; None if no program can check it.
        target: the exact result, if it is known.
    """

    instruction: str
    picture: Image.Image | None = None
    check: Callable[[Image.Image], bool] | None = None
    target: Image.Image | None = None

    def right(self, picture: Image.Image) -> bool | None:
        """Whether a result is correct; None if no program can check it, or at another size."""
        if self.check is None or (self.target is not None and picture.size != self.target.size):
            return None
        return self.check(picture)


def held_out(n: int, *, first: int = 0) -> list[Example]:
    """Return edits that are not in Spark's training data.

    Args:
        n: number of edits.
        first: number of edits to skip. Edits before and after it are disjoint.
    """
    drawn = spark.examples(split="test", n=first + n)[first:]
    return [Example(e.instruction, e.source, e.check, e.target) for e in drawn]


def read_examples(path: Path) -> list[Example]:
    """Read a file of examples: JSON lines such as `{"image": "cat.jpg", "prompt": "…"}`.

    Args:
        path: the file. Image paths are relative to its folder. A line without an image is text to
            image.

    Raises:
        ExampleError: a line cannot be used; the message names the line.
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
        raise ExampleError(f"{path} has no examples; write one JSON object in each line")
    return found


def _example(line: str, folder: Path, where: str) -> Example:
    usage = 'write {"image": "picture.png", "prompt": "the instruction"}'
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ExampleError(f"{where} is not JSON ({error}); {usage}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ExampleError(f"{where} has no prompt; {usage}")
    if unknown := sorted(fields.keys() - {"image", "prompt"}):
        raise ExampleError(f"{where} has unknown keys: {', '.join(unknown)}; {usage}")
    name = fields.get("image")
    if name is None:
        return Example(fields["prompt"])
    if not isinstance(name, str):
        raise ExampleError(f"{where}: the image is {name!r}, not a file's name; {usage}")
    try:
        return Example(fields["prompt"], read_picture(folder / name))
    except PictureError as error:
        raise ExampleError(f"{where}: {error}") from None
