"""What goes stale when the reference is not computed: schedules and ways, on Spark's edits.

python benchmarks/reference_on_spark.py -n 96 --out benchmarks/results/reference_on_spark.json

Some ways are tried here that the pass does not have. They are emulated: everything is computed, and
then put aside, which shows what a way does to pictures, and not what it would save.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

import fluxfire
from fluxfire import spark
from fluxfire.bench import compare, save_result, stamp
from fluxfire.bench.work import work_of_steps
from fluxfire.extend import Change, Transaction
from fluxfire.kontext import KONTEXT
from fluxfire.kontext.attention import REFERENCE_KWARG, ReferenceAttnProcessor, ReferenceKV
from fluxfire.model import Call, Run, Streams
from fluxfire.passes import FirstBlockCache, ReferenceCache
from fluxfire.passes.reference_cache import ReferenceWrapper
from fluxfire.protocol import Pass
from fluxfire.reporting.statistics import RunStatistics
from fluxfire.text import table

STEPS = 28
BLOCKS = 12  # of Spark


@dataclass(frozen=True)
class Way(ReferenceCache):
    """A way of the reference cache that is tried here only.

    Attributes:
        early: between refreshes, compute the reference in this many first blocks, every
            `often` steps.
        often: see `early`.
        share: between refreshes, compute this share of the reference's tokens, drawn anew at
            each step.
        outputs: between refreshes, compute all of the reference but its attention, which is
            that of the last refresh.
    """

    early: int = 0
    often: int = 2
    share: float = 0.0
    outputs: bool = False

    name: ClassVar[str] = "reference-way"

    @override
    def apply(self, tx: Transaction) -> Change:
        """As the pass, with a wrapper that has these ways."""
        change = super().apply(tx)
        (wrapper,) = tx.find_listeners(ReferenceWrapper)
        wrapper.__class__ = _Tried
        if self.outputs:
            for attention in KONTEXT.attentions(tx.pipe.transformer):
                tx.set_class(attention.processor, _KeepingOutputs)
        return change


class _Tried(ReferenceWrapper):
    """Does between refreshes what the pass does not."""

    @override
    def _reuse(self, state: Any, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        way: Any = self.settings
        if way.early and call.step % way.often == 0:
            middle = min(blocks.stop, way.early)
            before = {index: list(steps) for index, steps in state.extracted_at.items()}
            streams = self._refresh(state, run, streams, range(blocks.start, middle), None)
            state.extracted_at = before  # the late blocks are as stale as they were
            return super()._reuse(state, run, streams, range(middle, blocks.stop), call)
        if way.share or way.outputs:
            return self._emulate(state, run, streams, blocks, call)
        return super()._reuse(state, run, streams, blocks, call)

    def _emulate(
        self, state: Any, run: Run, streams: Streams, blocks: range, call: Call
    ) -> Streams:
        tokens = call.tokens.reference
        generator = torch.Generator().manual_seed(call.step)
        drawn = torch.rand(1, tokens, generator=generator) < self.settings.share  # type: ignore[attr-defined]
        mask = drawn.to(streams.image.device)
        if self.settings.outputs:  # type: ignore[attr-defined]
            mask = torch.ones_like(mask)

        def arguments(index: int) -> dict[str, Any]:
            return {REFERENCE_KWARG: state.kv[index]._replace(refresh_mask=mask)}

        return run(replace(streams, arguments=arguments), blocks)


class _KeepingOutputs(ReferenceAttnProcessor):
    """Gives the reference what its attention was at the last refresh, and keys and values anew."""

    @override
    def _attend(
        self,
        attn: Any,
        image: Tensor,
        text: Tensor | None,
        rotary: Any,
        reference: ReferenceKV | None,
    ) -> Any:
        made = super()._attend(attn, image, text, rotary, reference)
        if reference is None or not reference.extract:
            return made
        out = made[0] if isinstance(made, tuple) else made
        tokens = reference.key.shape[1]
        if reference.refresh_mask is None:
            self.outputs = out[:, -tokens:].clone()
        else:
            out[:, -tokens:] = self.outputs
        return made


def ways() -> dict[str, tuple[Pass, ...]]:
    """Name every list that is tried."""
    spaced = {f"spacing {s}": (ReferenceCache(s),) for s in (0.05, 0.1, 0.15, 0.2, 0.33, 0.5, 1)}
    chosen = {
        "every 4 steps, and the last": (*range(0, STEPS, 4), 27),
        "first 4, then every 3, and the last": (*range(4), *range(6, STEPS, 3), 26),
    }
    linear = {
        f"{name}{'' if predict == 'hold' else ', linear'}": (
            ReferenceCache(schedule=schedule, predict=predict),
        )
        for name, schedule in chosen.items()
        for predict in ("hold", "linear")
    }
    even = {
        f"every {n} steps": (ReferenceCache(schedule=range(0, STEPS, n)),) for n in (2, 3, 4, 6, 8)
    }
    ends = {
        "first 4, then every 8": (ReferenceCache(schedule=[0, 1, 2, 3, 11, 19, 27]),),
        "every 8, then last 4": (ReferenceCache(schedule=[0, 8, 16, 24, 25, 26, 27]),),
    }
    drift = {f"drift {d}": (ReferenceCache(1, drift=d),) for d in (0.05, 0.1, 0.15, 0.2, 0.3)}
    tried = {
        "spacing 0.33, first of 12 blocks at every 2nd": (Way(0.33, early=1),),
        "spacing 0.33, first 4 of 12 blocks at every 2nd": (Way(0.33, early=4),),
        "spacing 0.33, first 6 of 12 blocks at every 2nd": (Way(0.33, early=6),),
        "spacing 0.33, a tenth of the tokens": (Way(0.33, share=0.1),),
        "spacing 0.33, a quarter of the tokens": (Way(0.33, share=0.25),),
        "spacing 0.33, all but its attention": (Way(0.33, outputs=True),),
    }
    cache = FirstBlockCache(
        0.22, predict="damped", warmup_steps=0, tail_steps=0, max_consecutive_hits=None
    )
    both = {
        "first-block 0.22": (cache,),
        "first-block 0.22, spacing 0.2": (cache, ReferenceCache(0.2)),
        "first-block 0.22, spacing 0.5": (cache, ReferenceCache(0.5)),
    }
    return {"plain": (), **spaced, **linear, **even, **ends, **drift, **tried, **both}


FEWER = (24, 22, 20, 19, 18, 16, 12)
"""Plain with fewer steps, which every way must beat at as much work."""


def main() -> None:
    """Score every way beside the plain pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=96, help="held-out edits")
    parser.add_argument("--batch", type=int, default=16)
    names = [*ways(), *(f"plain, {n} steps" for n in FEWER)]
    parser.add_argument("--only", nargs="*", choices=names)
    arguments = parser.parse_args()

    pipe = spark.load(dtype=torch.float32)
    edits = spark.examples(split="test", n=arguments.n)
    rows: list[dict[str, Any]] = []
    plain = None
    listed = [(name, passes, STEPS) for name, passes in ways().items()]
    listed += [(f"plain, {n} steps", (), n) for n in FEWER]
    for name, passes, steps in listed:
        if plain and arguments.only and name not in arguments.only:
            continue
        with fluxfire.optimized(pipe, passes):
            made = spark.score(pipe, edits, steps=steps, batch=arguments.batch)
            runs = fluxfire.report(pipe).runs
        plain = plain or made
        near = compare([m.image for m in made], [p.image for p in plain]).to_dict()
        due = [d for r in runs for refresh in r.refreshes for d in refresh.due]
        rows.append(
            {
                "way": name,
                "passes": [repr(p) for p in passes],
                "refreshes": STEPS * mean(due) if due else float(steps),
                "work": _work(passes, runs, steps),
                "success": mean(m.passed for m in made),
                "psnr": {**near["psnr"], "fifth": _fifth([e["psnr"] for e in near["each"]])},
                "ssim": near["ssim"],
            }
        )
        told = {"examples": arguments.n, "steps": STEPS, "dtype": "float32"}
        result = {"benchmark": "reference_on_spark", **stamp(), **told, "rows": rows}
        save_result(result, arguments.out)
        print(_line(rows[-1]), flush=True)
    print(table(("way", "refreshes", "right", "PSNR", "worst"), map(_line, rows)))


def _work(passes: Sequence[Pass], runs: Sequence[RunStatistics], steps: int) -> float | None:
    """Return the computed work in full steps; None for a way that also computes parts of steps."""
    if any(isinstance(p, Way) for p in passes):
        return None
    if not passes:
        return float(steps)
    samples = ((run, sample) for run in runs for sample in range(_batch(run)))
    return mean(
        work_of_steps(run.kinds_of(sample), run.tokens, BLOCKS).steps for run, sample in samples
    )


def _batch(run: RunStatistics) -> int:
    """Return how many samples a generation had."""
    noted = [*(r.due for r in run.refreshes), *(d.hits for d in run.decisions)]
    return len(noted[0])


def _fifth(psnrs: list[float]) -> float:
    """Return the PSNR that 95 of 100 pictures reach."""
    return sorted(psnrs)[len(psnrs) // 20]


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    psnr = row["psnr"]
    return (
        row["way"],
        f"{row['refreshes']:.1f}",
        f"{row['success']:.1%}",
        f"{psnr['mean']:.1f}",
        f"{psnr['worst']:.1f}",
    )


if __name__ == "__main__":
    main()
