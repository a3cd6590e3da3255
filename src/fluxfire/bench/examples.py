"""What to edit: pictures with instructions, and where it is known, what is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


def held_out(n: int, *, first: int = 0) -> list[Example]:
    """Return edits that Spark's training never showed.

    Args:
        n: how many.
        first: how many to pass over; those before it and from it on have none in common.
    """
    drawn = spark.examples(split="test", n=first + n)[first:]
    return [Example(e.instruction, e.source, e.check, e.target) for e in drawn]


def read(path: Path) -> list[Example]:
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


def divide(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Divide examples in two without order: every so-many-th goes to the first part.

    Args:
        examples: at least two.
        share: of the first part; each part gets one example at least.
    """
    n = len(examples)
    wanted = min(max(round(n * share), 1), n - 1)
    chosen = {round(i * n / wanted) for i in range(wanted)}
    first = [e for i, e in enumerate(examples) if i in chosen]
    return first, [e for i, e in enumerate(examples) if i not in chosen]
