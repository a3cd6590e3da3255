"""`fluxfire demo`: the same edits plain and with passes, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from PIL import Image, ImageDraw

from fluxfire.bench.contenders import EAGER, Contender
from fluxfire.bench.examples import Example
from fluxfire.bench.measuring import Row, measure
from fluxfire.bench.tables import decibels
from fluxfire.bench.workload import Workload
from fluxfire.errors import BenchError
from fluxfire.pictures import AMPLIFIED, difference
from fluxfire.protocol import Pass
from fluxfire.text import human_seconds, own_settings, settings_line, table

_COLUMNS = ("reference", "plain", "optimized", f"difference x {AMPLIFIED}", "target")
_MARGIN, _CAPTION, _HEAD = 4, 16, 20


@dataclass(frozen=True)
class Demo:
    """What came of it. Prints as a table, and settings that are not the defaults."""

    examples: Sequence[Example]
    plain: Row
    optimized: Row

    def __str__(self) -> str:
        rows = [("plain", *self._cells(self.plain))]
        if self.optimized is not self.plain:
            rows.append((self.optimized.contender.name, *self._cells(self.optimized)))
        head = (
            "", "an edit", "speed", "first run (2 steps)", "steps left out",
            "PSNR to plain, dB (worst)", "edits right",
        )  # fmt: skip
        told = settings_line(map(own_settings, self.optimized.contender.passes))
        return "\n".join([table(head, rows), *told])

    def _cells(self, row: Row) -> tuple[str, ...]:
        seconds = median(e.seconds for e in row.edits)
        near = [one.psnr for one in row.quality[EAGER].likenesses]
        left_out = [e.hit_rate for e in row.edits if e.hit_rate is not None]
        right = [one for one in row.right if one is not None]
        return (
            human_seconds(seconds),
            f"{median(e.seconds for e in self.plain.edits) / seconds:.2f}x",
            human_seconds(row.first[0].seconds),
            f"{mean(left_out):.0%}" if left_out else "-",
            "-" if row is self.plain else f"{decibels(mean(near))} ({decibels(min(near))})",
            f"{sum(right)} of {len(right)}" if right else "-",
        )

    def grid(self) -> Image.Image:
        """Draw one row for each edit: reference, plain, optimized, difference, target."""
        wide = max(i.width for i in self.plain.pictures.values())
        high = max(i.height for i in self.plain.pictures.values())
        columns = _COLUMNS if any(e.target for e in self.examples) else _COLUMNS[:-1]
        across, down = wide + _MARGIN, high + _MARGIN + _CAPTION
        size = (across * len(columns) + _MARGIN, down * len(self.examples) + _HEAD)
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        for column, name in enumerate(columns):
            pen.text((column * across + _MARGIN, _MARGIN), name, fill="black")
        for row, example in enumerate(self.examples):
            top = _HEAD + row * down
            for column, picture in enumerate(self._pictures(row)):
                sheet.paste(picture, (column * across + _MARGIN, top))
            pen.text((_MARGIN, top + high + 1), example.instruction, fill="black")
        return sheet

    def _pictures(self, row: int) -> list[Image.Image]:
        plain, optimized = self.plain.pictures[row], self.optimized.pictures[row]
        example = self.examples[row]
        source = example.picture or plain
        pictures = [source.resize(plain.size), plain, optimized, difference(plain, optimized)]
        return pictures + ([example.target] if example.target else [])


def run(
    pipe: Any,
    passes: Sequence[Pass],
    examples: Sequence[Example],
    *,
    steps: int,
    seed: int,
    on_edit: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Make every edit plain and with passes; the pipeline is plain again at the end.

    Raises:
        BenchError: an edit failed.
    """
    name = " + ".join(p.name for p in passes)
    contenders = [Contender(EAGER, (), "control")]
    contenders += [Contender(name, tuple(passes))] if passes else []
    load = Workload.usual(pipe, steps=steps)
    rows = measure(
        pipe, contenders, [load], examples, rounds=1, seed=seed, keep=len(examples),
        on_edit=on_edit,
    )  # fmt: skip
    for row in rows:
        if row.error is not None:
            raise BenchError(f"{row.contender.name}: {row.error}")
    return Demo(examples, rows[0], rows[-1])
