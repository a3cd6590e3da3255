"""`fluxfire demo`: the same edits plain, with passes, and plain with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

from PIL import Image, ImageDraw

from fluxfire.bench.contenders import EAGER, Contender
from fluxfire.bench.examples import Example
from fluxfire.bench.measuring import measure
from fluxfire.bench.rows import Row
from fluxfire.bench.tables import format_decibels, remarks
from fluxfire.bench.trials import FewerStepsComparison
from fluxfire.bench.workload import Workload
from fluxfire.diffusers_types import DiffusersPipeline
from fluxfire.errors import BenchError
from fluxfire.pictures import AMPLIFIED, draw_difference
from fluxfire.protocol import Pass
from fluxfire.text import count_of, human_seconds, settings_line, spell_non_defaults, table

_MARGIN, _CAPTION, _HEAD = 4, 16, 20


@dataclass(frozen=True)
class Demo:
    """The same edits plain and with passes. Prints as a table, with settings and a verdict.

    Attributes:
        examples: the edited examples.
        plain: row of the plain pipeline.
        optimized: row of the pipeline with passes; the plain row without passes.
        fewer: row of plain with as many steps as the passes computed; None if they computed all.
        notes: remarks on the measurement, such as a busy machine.
    """

    examples: Sequence[Example]
    plain: Row
    optimized: Row
    fewer: Row | None = None
    notes: Sequence[str] = ()

    @property
    def rows(self) -> list[tuple[str, Row]]:
        """The rows with their names, plain first."""
        found = [("plain", self.plain)]
        if self.fewer is not None:
            found.append((self.fewer.contender.name, self.fewer))
        if self.optimized is not self.plain:
            found.append((self.optimized.contender.name, self.optimized))
        return found

    def __str__(self) -> str:
        head = (
            "",
            "an edit",
            "speed",
            "first run (2 steps)",
            "steps computed",
            "PSNR to plain, dB: mean (worst)",
            "inside the edit",
            "edits right",
        )
        settings = settings_line(map(spell_non_defaults, self.optimized.contender.passes))
        body = table(head, [(name, *self._cells(row)) for name, row in self.rows])
        return "\n".join([body, *settings, *self._verdict(), *(f"note: {n}" for n in self.notes)])

    def _cells(self, row: Row) -> tuple[str, ...]:
        seconds = median(e.seconds for e in row.edits)
        computed = row.steps - mean(e.work.skipped for e in row.edits)
        right = [one for one in row.right if one is not None]
        return (
            human_seconds(seconds),
            f"{median(e.seconds for e in self.plain.edits) / seconds:.2f}x",
            human_seconds(row.first[0].seconds),
            f"{computed:.4g} of {row.steps}",
            *(self._format_similarity(row, measure) for measure in ("psnr", "edited")),
            f"{sum(right)} of {len(right)}" if right else "-",
        )

    def _format_similarity(self, row: Row, measure: str) -> str:
        """Format how similar a row's pictures are to the plain ones."""
        similarities = row.quality[EAGER].similarities
        values = [v for one in similarities if (v := getattr(one, measure)) is not None]
        if row is self.plain or not values:
            return "-"
        return f"{format_decibels(mean(values))} ({format_decibels(min(values))})"

    def _verdict(self) -> Iterator[str]:
        """Say whether the passes beat plain with as many steps as the passes computed."""
        if self.fewer is None:
            return
        # Both are compared with the same list at all steps, so that compiling cancels out.
        reference = self.optimized.twin or EAGER
        gap = self.optimized.quality[reference].minus(self.fewer.quality[reference])
        steps = self.fewer.steps
        if self.optimized.contender.may_skip:
            yield self._explain_work(steps)
        if gap is None:
            yield f"One example does not tell whether this beats num_inference_steps={steps}."
            return
        near = mean(one.psnr for one in self.fewer.quality[reference].similarities)
        yield f"At equal computed work {FewerStepsComparison(steps, near, gap)}."

    def _explain_work(self, fewer: int) -> str:
        """Say how the steps computed lead to the number of steps that plain gets."""
        edits, name = self.optimized.edits, self.optimized.contender.name
        work, skipped = (mean(getattr(e.work, of) for e in edits) for of in ("steps", "skipped"))
        done = f"{name} did the work of {work:.1f} steps"
        if skipped:
            full = self.optimized.steps - skipped
            done += (
                f": it computed {full:.4g} of {self.optimized.steps}, and a skipped step still "
                f"runs its first block or more"
            )
        return f"{done}. Rounded up, plain gets {count_of(fewer, 'step')}."

    def grid(self) -> Image.Image:
        """Draw a strip for each edit: reference, one picture per row, difference, target."""
        wide = max(i.width for i in self.plain.pictures.values())
        high = max(i.height for i in self.plain.pictures.values())
        names = ["reference", *(name for name, _ in self.rows), f"difference x {AMPLIFIED}"]
        if any(e.target for e in self.examples):
            names.append("target")
        across, down = wide + _MARGIN, high + _MARGIN + _CAPTION
        size = (across * len(names) + _MARGIN, down * len(self.examples) + _HEAD)
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)
        for column, name in enumerate(names):
            pen.text((column * across + _MARGIN, _MARGIN), name, fill="black")
        for row, example in enumerate(self.examples):
            top = _HEAD + row * down
            for column, picture in enumerate(self._pictures(row)):
                sheet.paste(picture, (column * across + _MARGIN, top))
            pen.text((_MARGIN, top + high + 1), example.instruction, fill="black")
        return sheet

    def _pictures(self, number: int) -> list[Image.Image]:
        plain, example = self.plain.pictures[number], self.examples[number]
        source = example.picture or plain
        made = [row.pictures[number] for _, row in self.rows]
        pictures = [source.resize(plain.size), *made]
        pictures.append(draw_difference(plain, self.optimized.pictures[number]))
        return pictures + ([example.target] if example.target else [])


def run(
    pipe: DiffusersPipeline,
    passes: Sequence[Pass],
    examples: Sequence[Example],
    *,
    steps: int,
    seed: int,
    on_edit: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Make every edit plain, with passes, and plain with as many steps as the passes computed.

    The pipeline is plain again afterwards.

    Raises:
        BenchError: an edit failed.
    """
    name = " + ".join(p.name for p in passes)
    contenders = [Contender(EAGER, (), "control")]
    contenders += [Contender(name, tuple(passes))] if passes else []
    load = Workload.for_pipeline(pipe, steps=steps)
    rows = measure(
        pipe,
        contenders,
        [load],
        examples,
        rounds=1,
        seed=seed,
        keep=len(examples),
        repeated=1,  # all of them would take as long as all of plain
        on_edit=on_edit,
    )
    for row in rows:
        if row.error is not None:
            raise BenchError(f"{row.contender.name}: {row.error}")
    optimized = next(row for row in rows if row.contender.name == (name or EAGER))
    notes = list(remarks([row.to_dict() for row in rows]))
    return Demo(examples, rows[0], optimized, optimized.fewer_steps_row, notes)
