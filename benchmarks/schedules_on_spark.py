"""Which steps to skip on Spark: thresholds, published masks, and schedules, beside fewer steps.

    python benchmarks/schedules_on_spark.py -n 256 --batch 128 --calibrating 24 --eight-bits \
        --out benchmarks/results/schedules_on_spark.json
    python benchmarks/schedules_on_spark.py -n 4 --calibrating 4 --computed 14 --out /tmp/s.json

First `fluxfire.calibrate` finds schedules on edits of the training split. Then every method makes
the same held-out edits with the same noise. Plain with as many steps as a method computes stands
beside it. A method with eight bits has two such rows, because its steps are cheaper too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from typing_extensions import override

import fluxfire
import kontext_schedule
from fluxfire import presets, spark
from fluxfire.bench import Example, save_result, stamp
from fluxfire.bench.intervals import bootstrap
from fluxfire.bench.quality import similarity
from fluxfire.bench.work import equal_steps
from fluxfire.extend import Change, Transaction
from fluxfire.model import Call, Run, Streams
from fluxfire.passes import FirstBlockCache, Float8
from fluxfire.passes.first_block_cache import _BranchState, _FirstBlockWrapper
from fluxfire.passes.shared.distance import relative_distance
from fluxfire.protocol import Pass
from fluxfire.spark.scoring import Score
from fluxfire.text import table

STEPS = 28
BLOCKS = 12  # of Spark
EIGHT_BITS = 0.72
"""Seconds of an H100's step with `Float8`, beside one without (199 and 275 ms)."""
PUBLISHED = {
    "MagCache's mask for Kontext": "CCCCCC.C..CC....C....C..C.CC",
    "RegionE's velocity mask for Kontext": "CCCCCCC.C.CC.C.C.......C..CC",
}
"""Masks that follow from constants which others fitted to the real Kontext."""
PUBLIC = ((8, 2, 18), (8, 3, 16), (8, 3, 14), (6, 2, 16), (6, 2, 14), (6, 3, 16), (6, 3, 14))
"""Schedules from public statistics: warm-up steps, most skips in a row, computed steps."""
OTHER_PREDICTIONS = (16, 13)
"""Computed steps of the calibrated schedules that are also held, and extended undamped."""
FREE: dict[str, Any] = {"warmup_steps": 0, "tail_steps": 0, "max_consecutive_hits": None}


@dataclass(frozen=True)
class TeaCache(FirstBlockCache):
    """TeaCache's rule: it estimates the output's change from that of the first block's input.

    The estimates of the steps since the last computed one add up, and a step hits while their sum
    is below the threshold. The polynomial is fitted to Spark, as its authors fit one to a model.

    Attributes:
        polynomial: coefficients, the highest power first.
    """

    polynomial: tuple[float, ...] = ()

    name: ClassVar[str] = "tea-cache"

    @override
    def apply(self, tx: Transaction) -> Change:
        wrapper = _TeaCacheWrapper(tx.live(self), tx.pipe)
        tx.wrap_blocks(wrapper)
        tx.listen(wrapper)
        return Change(1, "run through the blocks cached")


class _TeaCacheWrapper(_FirstBlockWrapper):
    """Measures the modulated input of the first block, from step to step."""

    _input: Tensor | None = None
    _sums: tuple[float, ...] = ()

    @override
    def forget(self) -> None:
        super().forget()
        self._input = None

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        seen: list[Tensor] = []
        block: Any = self._pipe.transformer.transformer_blocks[0]
        hook = block.norm1.register_forward_hook(lambda *made: seen.append(made[-1][0]))
        self._seen = seen
        try:
            return super().__call__(run, streams, blocks, call)
        finally:
            hook.remove()

    @override
    def _distances(self, state: _BranchState, residual: Tensor, call: Call) -> list[float] | None:
        settings: Any = self.settings
        assert self._input is not None  # noqa: S101 - `_decide` sets it at the first step
        own, before = self._seen[0], self._input
        self._input = own
        changes = relative_distance(own, before, None).tolist()
        estimates = np.polyval(settings.polynomial, np.array(changes)).tolist()
        before_that = self._sums or (0.0,) * len(estimates)
        self._sums = tuple(
            (0.0 if hits == 0 else total) + abs(estimate)
            for total, estimate, hits in zip(
                before_that, estimates, state.consecutive_hits, strict=True
            )
        )
        return list(self._sums)

    @override
    def _decide(self, state: _BranchState, before: Tensor, after: Tensor, call: Call) -> list[bool]:
        if state.first_residual is None:
            self._input, self._sums = self._seen[0], ()
        return super()._decide(state, before, after, call)


def fit_polynomial(pipe: Any, examples: Sequence[Any]) -> tuple[float, ...]:
    """Fit the change of the transformer's output to that of its modulated input, in power 4."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        norm = pipe.transformer.transformer_blocks[0].norm1
        for module, keep in (
            (norm, lambda *made: inputs.append(made[-1][0].float())),
            (pipe.transformer, lambda *made: outputs.append(made[-1][0].float())),
        ):
            hooks.callback(module.register_forward_hook(keep).remove)
        spark.score(pipe, examples, steps=STEPS, batch=len(examples))
    pairs = [
        [relative_distance(b, a, None).cpu().numpy() for a, b in pairwise(made)]
        for made in (inputs, outputs)
    ]
    x, y = (np.concatenate(part) for part in pairs)
    return tuple(np.polyfit(x, y, 4).tolist())


def skipped(mask: str) -> list[int]:
    """Return the steps that a mask of C and . skips."""
    return [i for i, sign in enumerate(mask) if sign == "."]


def cache_of(schedule: Any, predict: str = "damped") -> FirstBlockCache:
    """Return a cache that follows a schedule and nothing else."""
    return FirstBlockCache(schedule=schedule, distance="noise", predict=predict)  # type: ignore[arg-type]


def methods(calibrated: Any, polynomial: tuple[float, ...]) -> Iterator[tuple[str, Pass]]:
    """List the caches, by name."""
    for name in ("balanced", "fast"):
        for cache in presets.named(name):
            if isinstance(cache, FirstBlockCache):
                yield name, cache
    for one in calibrated.found:
        yield f"calibrated, {one.computed} computed", one.cache
    for warmup, cap, computed in PUBLIC:
        known = kontext_schedule.schedules(STEPS, warmup=warmup, tail=2, cap=cap)
        yield (
            f"published statistics, {warmup} + 2, cap {cap}, {computed} computed",
            cache_of(known[computed]),
        )
    careful: dict[str, Any] = {"warmup_steps": 8, "tail_steps": 2, "max_consecutive_hits": 2}
    bolder: dict[str, Any] = {"warmup_steps": 6, "tail_steps": 2, "max_consecutive_hits": 3}
    for predict in ("damped", "linear", "hold"):
        settings: dict[str, Any] = {"predict": predict}
        yield (
            f"threshold 0.12, 8 + 2, cap 2, {predict}",
            FirstBlockCache(0.12, **careful, **settings),
        )
        yield (
            f"threshold 0.15, 6 + 2, cap 3, {predict}",
            FirstBlockCache(0.15, **bolder, **settings),
        )
        for name, mask in PUBLISHED.items():
            yield f"{name}, {predict}", cache_of(skipped(mask), predict)
    for threshold in (0.1, 0.2, 0.3):
        yield (
            f"TeaCache's rule {threshold}",
            TeaCache(threshold, predict="hold", polynomial=polynomial, **FREE),
        )
    for one in calibrated.found:
        for predict in ("linear", "hold") if one.computed in OTHER_PREDICTIONS else ():
            schedule = list(one.schedule.by_step)
            yield (
                f"calibrated, {one.computed} computed, {predict}",
                cache_of(schedule, predict),
            )


@dataclass(frozen=True)
class Measured:
    """The pictures of one method.

    Attributes:
        scores: of each edit.
        work: mean work of an edit in full steps.
    """

    scores: list[Score]
    work: float


class Bench:
    """Makes the held-out edits with each method, and compares the pictures.

    Attributes:
        rows: the results so far.
    """

    def __init__(self, pipe: Any, edits: Sequence[Any], batch: int) -> None:
        self._pipe, self._edits, self._batch = pipe, edits, batch
        self._fewer: dict[int, list[Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self._plain = self._make((), STEPS).scores

    def method(self, name: str, passes: tuple[Pass, ...]) -> None:
        """Measure a list of passes beside plain with as much work."""
        made = self._make(passes, STEPS)
        near = self._similarities(made.scores)
        row = self._add(name, made, near)
        row["passes"] = [repr(p) for p in passes]
        cheaper = any(isinstance(p, Float8) for p in passes)
        for label, cost in (("steps", 1.0), *([("seconds", EIGHT_BITS)] if cheaper else [])):
            steps = equal_steps(made.work, cost)
            if steps >= STEPS:
                continue
            beside = self._fewer_steps(steps)
            gains = [a.psnr - b.psnr for a, b in zip(near, beside, strict=True)]
            interval = bootstrap(gains)
            row[f"beside as many {label}"] = {
                "steps": steps,
                "worst": min(a.psnr for a in near) - min(b.psnr for b in beside),
                "worst of an edit": min(gains),
                **(asdict(interval) if interval else {"mean": fmean(gains)}),
            }
        print(_line(row), flush=True)

    def _make(self, passes: tuple[Pass, ...], steps: int) -> Measured:
        with fluxfire.optimized(self._pipe, passes):
            scores, hits = [], 0
            for first in range(0, len(self._edits), self._batch):
                some = self._edits[first : first + self._batch]
                scores += spark.score(self._pipe, some, steps=steps, seed=first, batch=self._batch)
                hits += sum(sum(d.hits) for d in fluxfire.report(self._pipe).runs[-1].decisions)
        return Measured(scores, steps - hits / len(self._edits) * (1 - 1 / BLOCKS))

    def _fewer_steps(self, steps: int) -> list[Any]:
        """Return the similarities of plain with fewer steps, measured once."""
        if steps not in self._fewer:
            made = self._make((), steps)
            self._fewer[steps] = self._similarities(made.scores)
            print(_line(self._add(f"plain, {steps} steps", made, self._fewer[steps])), flush=True)
        return self._fewer[steps]

    def _similarities(self, scores: list[Score]) -> list[Any]:
        return [
            similarity(made.image, plain.image, (), edit.source)
            for made, plain, edit in zip(scores, self._plain, self._edits, strict=True)
        ]

    def _add(self, name: str, made: Measured, near: list[Any]) -> dict[str, Any]:
        values = [one.psnr for one in near]
        inside = [one.edited for one in near if one.edited is not None]
        kinds = dict.fromkeys(s.kind for s in self._plain)
        interval = bootstrap(values)
        row = {
            "name": name,
            "work": made.work,
            "psnr": {
                "worst": min(values),
                "twentieth": sorted(values)[len(values) // 20],
                **(asdict(interval) if interval else {"mean": fmean(values)}),
            },
            "inside": fmean(inside) if inside else None,
            "kinds": {
                kind: fmean(v for v, s in zip(values, self._plain, strict=True) if s.kind == kind)
                for kind in kinds
            },
            "success": fmean(s.passed for s in made.scores),
            "each": [round(v, 2) for v in values],
        }
        self.rows.append(row)
        return row


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    gain = row.get("beside as many seconds") or row.get("beside as many steps")
    told = ""
    if gain and "low" in gain:
        told = "{mean:+.1f} [{low:+.1f}, {high:+.1f}], worst {worst:+.1f}".format(**gain)
    return (
        row["name"],
        f"{row['work']:.1f}",
        f"{row['psnr']['mean']:.1f}",
        f"{row['psnr']['worst']:.1f}",
        "-" if row["inside"] is None else f"{row['inside']:.1f}",
        f"{row['success']:.0%}",
        told,
    )


def main() -> None:
    """Calibrate, and then measure every method; rows are saved after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=256, help="held-out edits")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calibrating", type=int, default=32, help="edits to calibrate with")
    parser.add_argument("--computed", type=int, nargs="*", default=[18, 16, 14, 13, 12])
    parser.add_argument("--eight-bits", action="store_true", help="measure Float8 too (a GPU)")
    parser.add_argument("--only", nargs="*", help="parts of the names of what to measure")
    arguments = parser.parse_args()

    pipe = spark.load()
    own = spark.examples(split="train", n=arguments.calibrating)
    calibrated = fluxfire.calibrate(
        pipe,
        [Example(e.instruction, e.source, e.check, e.target) for e in own],
        computed=arguments.computed,
    )
    print(calibrated, flush=True)
    polynomial = fit_polynomial(pipe, own[: min(16, len(own))])
    result: dict[str, Any] = {
        "benchmark": "schedules_on_spark",
        **stamp(),
        "examples": arguments.n,
        "steps": STEPS,
        "calibrated": calibrated.to_dict(),
        "polynomial": polynomial,
    }
    bench = Bench(pipe, spark.examples(split="test", n=arguments.n), arguments.batch)
    result["success"] = fmean(s.passed for s in bench._plain)  # noqa: SLF001 - of this file
    result["rows"] = bench.rows
    listed: list[tuple[str, tuple[Pass, ...]]] = [
        (name, (cache,)) for name, cache in methods(calibrated, polynomial)
    ]
    if arguments.eight_bits:
        listed += [
            ("Float8", (Float8(),)),
            *(
                (f"Float8, {name}", (Float8(), *caches))
                for name, caches in listed
                if name in ("balanced", "fast")
            ),
        ]
    if arguments.only:
        listed = [one for one in listed if any(part in one[0] for part in arguments.only)]
    for name, passes in listed:
        try:
            bench.method(name, passes)
        except Exception as error:  # noqa: BLE001 - the others go on
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        save_result(result, arguments.out)
    head = ("method", "work", "PSNR", "worst", "inside", "right", "beside fewer steps")
    print(table(head, [_line(row) for row in bench.rows]))


if __name__ == "__main__":
    main()
