"""Whole edits, picture to picture, with their steps: eager and with passes, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from fluxfire import api
from fluxfire.bench.timing import Sample, repeat
from fluxfire.protocol import Pass
from fluxfire.statistics import RunStatistics

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One kind of edit.

    Attributes:
        name: how results call it.
        width: output width in pixels, exactly.
        height: output height in pixels, exactly.
        steps: denoising steps.
        auto_resize: let Kontext resize the reference to about a megapixel, as it does by
            default, whatever the output's size.
        text_tokens: length to which the prompt is padded.
        reference: edit the picture; False makes one from words alone.
    """

    name: str
    width: int
    height: int
    steps: int
    auto_resize: bool = True
    text_tokens: int = 512
    reference: bool = True

    def run(self, pipe: Any, picture: Image.Image, *, seed: int = 42) -> Any:
        """Edit the picture once."""
        return pipe(
            image=picture if self.reference else None,
            prompt="make it a snowy winter evening",
            width=self.width,
            height=self.height,
            max_area=self.width * self.height,
            num_inference_steps=self.steps,
            max_sequence_length=self.text_tokens,
            generator=torch.Generator().manual_seed(seed),
            _auto_resize=self.auto_resize,
        ).images[0]


def measure_edits(
    pipe: Any,
    stacks: Mapping[str, Sequence[Pass]],
    workloads: Iterable[Workload],
    picture: Image.Image,
    *,
    rounds: int = 2,
    settings: Mapping[str, Mapping[str, Pass]] | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure every stack of passes on every workload, on one pipeline, in turn.

    The stacks take turns for some rounds, since a GPU grows slower as it grows warm; each
    round makes one whole edit of each workload, after one of two steps that compiles what
    is needed. Between turns torch's compiler is reset, as in a fresh process, though its
    cache on disk makes every round's compilation after the first a short one.

    Args:
        pipe: a plain pipeline; it is plain again at the end, also after an exception.
        stacks: passes by the name that results use; an empty stack is plain eager.
        workloads: what to run.
        picture: the picture to edit.
        rounds: whole edits per row; the steps of all are pooled.
        settings: by stack and workload, a cache's run-time settings for it (as `using` takes).
        on_rows: is handed the rows so far after each edit, so that a crash loses little.

    Returns:
        A row for each stack and workload: seconds of the whole edit and of a step (of a
        step that a cache left out, too), what applying and first running cost, memory, and
        compilations.
    """
    loads = list(workloads)
    rows: dict[tuple[str, str], _Row] = {}
    for _ in range(rounds):
        for name, passes in stacks.items():
            with _optimized(pipe, passes) as applied:
                for load in loads:
                    row = rows.setdefault((name, load.name), _Row(name, passes, load, applied))
                    row.settings = (settings or {}).get(name, {}).get(load.name)
                    with api.using(pipe, row.settings) if row.settings else nullcontext():
                        row.measure(pipe, picture)
                    on_rows([row.to_dict() for row in rows.values()])
    return [row.to_dict() for row in rows.values()]


@contextmanager
def _optimized(pipe: Any, passes: Sequence[Pass]) -> Iterator[dict[str, float]]:
    """Apply a stack and say what that cost; an empty one still counts steps."""
    torch.compiler.reset()
    before = _memory()
    _forget_peak()
    began = time.perf_counter()
    with api.optimized(pipe, list(passes)):
        yield {
            "apply_seconds": time.perf_counter() - began,
            "apply_gib": _memory() - before,
            "apply_peak_gib": _peak() - before,
        }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Row:
    """One stack on one workload, over the rounds."""

    stack: str
    passes: Sequence[Pass]
    load: Workload
    applied: dict[str, float]
    settings: Pass | None = None
    first: list[RunStatistics] = field(default_factory=list)
    runs: list[RunStatistics] = field(default_factory=list)
    edits: list[float] = field(default_factory=list)
    peak: float = 0.0

    def measure(self, pipe: Any, picture: Image.Image) -> None:
        """Make one short edit that compiles, and one that counts."""
        replace(self.load, steps=2).run(pipe, picture)
        self.first.append(api.report(pipe).runs[-1])
        _forget_peak()
        self.edits += repeat(lambda: self.load.run(pipe, picture), warmups=0, repeats=1).seconds
        self.runs.append(api.report(pipe).runs[-1])
        self.peak = max(self.peak, _peak())

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        hits = [s for r in self.runs for s in _steps(r, hit=True)]
        return {
            "stack": self.stack,
            "passes": [repr(p) for p in self.passes],
            "settings": repr(self.settings) if self.settings else None,
            **self.applied,
            "workload": asdict(self.load),
            "first_seconds": [r.seconds for r in self.first],
            "first_compiles": self.first[0].compiles,
            "compiles": sum(r.compiles for r in self.runs),
            "graph_breaks": sum(r.graph_breaks for r in (*self.first, *self.runs)),
            "edit": Sample.of(self.edits).to_dict(),
            "step": Sample.of(s for r in self.runs for s in _steps(r, hit=False)).to_dict(),
            "hit_step": Sample.of(hits).to_dict() if hits else None,
            "hits": len(hits) / len(self.runs),
            "peak_gib": self.peak,
        }


def _steps(run: RunStatistics, *, hit: bool) -> Iterator[float]:
    """Seconds of the steps that were hits of a cache, or of those that were computed."""
    hits = {d.step for d in run.decisions if all(d.hits)}
    hits -= {d.step for d in run.decisions if not all(d.hits)}
    yield from (s for i, s in enumerate(run.step_seconds) if (i in hits) == hit)


def _memory() -> float:
    return torch.cuda.memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / _GIB if torch.cuda.is_available() else 0.0


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
