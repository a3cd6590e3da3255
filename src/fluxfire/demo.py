"""`fluxfire demo`: the same edits plain and with passes, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
from PIL import Image, ImageChops, ImageDraw

from fluxfire import api
from fluxfire.protocol import Pass
from fluxfire.spark import checking
from fluxfire.spark.scoring import psnr
from fluxfire.spark.tasks import Example, examples
from fluxfire.text import human_seconds, table

_AMPLIFIED = 8
_COLUMNS = ("reference", "plain", "optimized", f"difference x {_AMPLIFIED}", "target")
_MARGIN, _CAPTION, _HEAD = 4, 16, 20


@dataclass(frozen=True)
class Task:
    """One edit to make.

    Attributes:
        source: the picture to edit.
        instruction: what to do to it.
        example: knows the target and checks results; None for a picture of one's own.
    """

    source: Image.Image
    instruction: str
    example: Example | None = None


@dataclass
class Turn:
    """The edits of one turn: plain, or with passes.

    Attributes:
        name: how the table calls it.
        first: seconds of a first edit, which compiles what needs compiling.
        images: the results.
        seconds: of each edit.
        hits: share of each edit's steps that a cache left out; empty without one.
    """

    name: str
    first: float = 0.0
    images: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Demo:
    """What came of it. Prints as a table."""

    tasks: Sequence[Task]
    plain: Turn
    optimized: Turn

    def __str__(self) -> str:
        rows = [self._row(turn) for turn in (self.plain, self.optimized)]
        head = (
            "", "an edit", "speed", "first edit", "steps left out", "PSNR to plain, dB (worst)",
            "edits right",
        )  # fmt: skip
        return table(head, rows)

    def _row(self, turn: Turn) -> tuple[str, ...]:
        seconds = median(turn.seconds)
        close = "-"
        if turn is not self.plain:
            pairs = zip(turn.images, self.plain.images, strict=True)
            values = [psnr(*map(checking.as_tensor, pair)) for pair in pairs]
            close = f"{mean(values):.1f} ({min(values):.1f})"
        examples = [task.example for task in self.tasks]
        known = [(e, i) for e, i in zip(examples, turn.images, strict=True) if e is not None]
        return (
            turn.name,
            human_seconds(seconds),
            f"{median(self.plain.seconds) / seconds:.2f}x",
            human_seconds(turn.first),
            f"{mean(turn.hits):.0%}" if turn.hits else "-",
            close,
            f"{sum(e.check(i) for e, i in known)} of {len(known)}" if known else "-",
        )

    def grid(self) -> Image.Image:
        """Draw one row for each edit: reference, plain, optimized, difference, target."""
        wide = max(i.width for i in self.plain.images)
        high = max(i.height for i in self.plain.images)
        columns = _COLUMNS if any(t.example for t in self.tasks) else _COLUMNS[:-1]
        across, down = wide + _MARGIN, high + _MARGIN + _CAPTION
        size = (across * len(columns) + _MARGIN, down * len(self.tasks) + _HEAD)
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        for column, name in enumerate(columns):
            pen.text((column * across + _MARGIN, _MARGIN), name, fill="black")
        for row, task in enumerate(self.tasks):
            top = _HEAD + row * down
            for column, picture in enumerate(self._pictures(row)):
                sheet.paste(picture, (column * across + _MARGIN, top))
            pen.text((_MARGIN, top + high + 1), task.instruction, fill="black")
        return sheet

    def _pictures(self, row: int) -> list[Image.Image]:
        plain, optimized = self.plain.images[row], self.optimized.images[row]
        task = self.tasks[row]
        difference = ImageChops.difference(plain, optimized)
        difference = difference.point([min(255, _AMPLIFIED * v) for v in range(256)] * 3)
        pictures = [task.source.resize(plain.size), plain, optimized, difference]
        return pictures + ([task.example.target] if task.example else [])


def held_out(n: int) -> list[Task]:
    """Take n edits that Spark's training never showed."""
    return [Task(e.source, e.instruction, e) for e in examples(split="test", n=n)]


def run(pipe: Any, passes: Sequence[Pass], tasks: Sequence[Task], *, steps: int, seed: int) -> Demo:
    """Make every edit plain and with passes; the pipeline is plain again at the end."""
    plain = _turn("plain", pipe, tasks, steps, seed)
    with api.optimized(pipe, list(passes)):
        name = " + ".join(p.name for p in passes) or "no passes"
        optimized = _turn(name, pipe, tasks, steps, seed)
    return Demo(tasks, plain, optimized)


def _turn(name: str, pipe: Any, tasks: Sequence[Task], steps: int, seed: int) -> Turn:
    turn = Turn(name)
    _, turn.first = _edit(pipe, tasks[0], 2, seed)
    for number, task in enumerate(tasks):
        image, seconds = _edit(pipe, task, steps, seed + number)
        turn.images.append(image)
        turn.seconds.append(seconds)
        runs = api.report(pipe).runs
        if runs and runs[-1].hit_rate is not None:
            turn.hits.append(runs[-1].hit_rate)
    return turn


def _edit(pipe: Any, task: Task, steps: int, seed: int) -> tuple[Image.Image, float]:
    began = time.perf_counter()
    image = pipe(
        image=task.source,
        prompt=task.instruction,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return image, time.perf_counter() - began
