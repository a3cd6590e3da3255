"""Computing the edited region alone, its surroundings predicted: beside fewer steps, on Spark.

    python benchmarks/regions_on_spark.py -n 96 --out benchmarks/results/regions_on_spark.json
    python benchmarks/regions_on_spark.py -n 2 --only "skip, 16 computed" --out /tmp/regions.json

At a full step the blocks compute all tokens. The predicted clean picture, x - sigma v, is compared
with the reference. Where they differ lies the edit. At the steps between, the blocks compute the
text and the edited tokens alone. These attend to keys and values of the other tokens, which are
held or extended along the line through the last two full steps. What the blocks add to the unedited
tokens is held or extended likewise.

The pass here runs one sample at a time. It shows what the idea does to pictures. An edit that
changes nearly everything has no region, and runs as plain. So only the other edits count here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

import fluxfire
from fluxfire import presets, spark
from fluxfire.bench import compare, save_result, stamp
from fluxfire.bench.intervals import bootstrap
from fluxfire.bench.work import equal_steps
from fluxfire.extend import Change, Transaction
from fluxfire.kontext.attention import REFERENCE_KWARG, ReferenceAttnProcessor, ReferenceKV
from fluxfire.model import Call, Run, Streams
from fluxfire.passes import FirstBlockCache
from fluxfire.passes.shared.processors import ProcessorSwap
from fluxfire.protocol import Exactness, Pass, Stage
from fluxfire.runtime.generation import Generation, Listener
from fluxfire.supported import model_of
from fluxfire.text import table

STEPS = 28
BLOCKS = 12  # of Spark
Prediction = Literal["hold", "half", "linear"]
SLOPE: Mapping[str, float] = {"hold": 0.0, "half": 0.5, "linear": 1.0}
"""How much of the line's slope a prediction takes."""
_POINTS = 2


@dataclass(frozen=True)
class Regions:
    """Computes the edited region alone at most steps.

    Attributes:
        full: the steps that compute all tokens. The mask is made anew at each.
        threshold: a token is edited if the mean absolute difference of its latents is above this.
        predict: what the unedited tokens' keys, values and residuals do between full steps.
        most: a larger share of edited tokens makes every step a full one.
    """

    full: tuple[int, ...]
    _: KW_ONLY
    threshold: float = 0.4
    predict: Prediction = "linear"
    most: float = 0.75

    name: ClassVar[str] = "regions"
    stage: ClassVar[Stage] = "caching"
    slot: ClassVar[str | None] = "reference"
    exactness: ClassVar[Exactness] = "lossy"

    def off(self) -> Regions:
        """Return a copy whose steps are all full."""
        return replace(self, full=tuple(range(1000)))

    def check(self, target: object) -> tuple[()]:  # noqa: ARG002
        """Find nothing wrong."""
        return ()

    def apply(self, tx: Transaction) -> Change:
        """Install processors that attend to kept keys and values, and wrap the blocks."""
        swap = ProcessorSwap(tx.pipe.transformer, ReferenceAttnProcessor)
        tx.on_undo(swap.restore)
        swap.prepare()
        tx.listen(swap)
        wrapper = _RegionWrapper(self, tx.pipe)
        tx.wrap_blocks(wrapper)
        tx.listen(wrapper)
        tx.report_facts(lambda: {"work": wrapper.work})
        return Change(1, "run through the blocks")


@dataclass(eq=False)
class _FullStep:
    """What one full step leaves.

    Attributes:
        step: its number.
        sigma: its noise level.
        keys: (1, image tokens, heads, head width) of each block.
        values: likewise.
        residuals: (1, noise tokens, width): what a run of blocks added, by the first block's index.
    """

    step: int
    sigma: float
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)


class _RegionWrapper(Listener):
    """Runs the blocks on all tokens, or on the text and the edited ones.

    Attributes:
        work: full steps' worth of tokens of the generation so far, summed over blocks.
    """

    def __init__(self, settings: Regions, pipe: Any) -> None:
        self._settings, self._pipe = settings, pipe
        self.work = 0.0
        self._forget()

    def _forget(self) -> None:
        self._history: list[_FullStep] = []
        self._edited: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}

    @override
    @contextmanager
    def on_generation(self, generation: Generation) -> Iterator[None]:
        """Watch what goes into the transformer, and what comes out."""
        self._forget()
        self.work = 0.0
        hooks = [
            self._pipe.transformer.register_forward_pre_hook(self._note_input, with_kwargs=True),
            self._pipe.transformer.register_forward_hook(self._note_output),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._forget()

    def _note_input(self, *called: Any) -> None:
        *_, keywords = called
        self._inputs = {name: keywords[name] for name in ("hidden_states", "img_ids")}

    def _note_output(self, *called: Any) -> None:
        """After a full step, find out which tokens are edited."""
        *_, output = called
        if not self._history or self._history[-1].step != self._step:
            return
        tokens, velocity = self._inputs["hidden_states"], output[0][:, : self._noise]
        latents, reference = tokens[:, : self._noise], tokens[:, self._noise :]
        clean = latents - self._history[-1].sigma * velocity
        apart = (clean - reference).abs().mean(-1)[0]
        rows, columns = self._inputs["img_ids"][: self._noise, 1:].long().unbind(-1)
        grid = apart.new_zeros(int(rows.max()) + 1, int(columns.max()) + 1)
        grid[rows, columns] = (apart > self._settings.threshold).to(grid.dtype)
        wider = functional.max_pool2d(grid[None, None], 3, 1, 1)[0, 0]
        edited = wider[rows, columns] > 0
        few = 0 < int(edited.sum()) <= self._settings.most * self._noise
        self._edited = edited.nonzero()[:, 0] if few else None

    def __call__(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        """Run the blocks."""
        if len(streams.image) != 1:
            raise ValueError("this benchmark's regions are for one sample at a time")
        self._step, self._noise = call.step, call.tokens.noise
        share = len(blocks) / BLOCKS
        if call.step in self._settings.full or self._edited is None:
            self.work += share
            return self._run_whole(run, streams, blocks, call)
        everything = streams.text.shape[1] + streams.image.shape[1]
        self.work += share * (streams.text.shape[1] + len(self._edited)) / everything
        return self._run_region(run, streams, blocks, call, self._edited)

    def _run_whole(self, run: Run, streams: Streams, blocks: range, call: Call) -> Streams:
        if not self._history or self._history[-1].step != call.step:
            self._history = [*self._history, _FullStep(call.step, float(call.sigma))][-_POINTS:]
        now, image = self._history[-1], streams.image
        heads, width = self._heads()
        scale = image.new_ones(1, heads)

        def arguments(index: int) -> dict[str, Any]:
            key, value = (image.new_empty(1, image.shape[1], heads, width) for _ in range(2))
            now.keys[index], now.values[index] = key, value
            return {REFERENCE_KWARG: ReferenceKV(key, value, scale, scale, extract=True)}

        out = run(replace(streams, arguments=arguments), blocks)
        noise = call.tokens.noise
        now.residuals[blocks.start] = out.image[:, :noise] - image[:, :noise]
        return replace(out, arguments=streams.arguments)

    def _run_region(
        self, run: Run, streams: Streams, blocks: range, call: Call, edited: Tensor
    ) -> Streams:
        noise, text = call.tokens.noise, streams.text.shape[1]
        chosen = torch.zeros(streams.image.shape[1], dtype=torch.bool, device=edited.device)
        chosen[edited] = True
        kept = (~chosen).nonzero()[:, 0]
        cos, sin = streams.rotary
        scale = streams.image.new_ones(1, self._heads()[0])
        slope = SLOPE[self._settings.predict] * self._reach(call)

        def arguments(index: int) -> dict[str, Any]:
            key = _extend([s.keys[index][:, kept] for s in self._history], slope)
            value = _extend([s.values[index][:, kept] for s in self._history], slope)
            return {REFERENCE_KWARG: ReferenceKV(key, value, scale, scale, extract=False)}

        def chosen_rows(x: Tensor) -> Tensor:
            return torch.cat([x[:text], x[text:][edited]])

        cut = replace(
            streams,
            image=streams.image[:, edited],
            rotary=(chosen_rows(cos), chosen_rows(sin)),
            arguments=arguments,
        )
        out = run(cut, blocks)
        added = _extend([s.residuals[blocks.start] for s in self._history], slope)
        image = streams.image.clone()
        image[:, :noise] += added
        image[:, edited] = out.image
        return replace(out, image=image, rotary=streams.rotary, arguments=streams.arguments)

    def _reach(self, call: Call) -> float:
        """Return how far sigma fell since the last full step, as a share of its fall before."""
        if len(self._history) < _POINTS:
            return 0.0
        before, last = self._history
        return (last.sigma - float(call.sigma)) / (before.sigma - last.sigma)

    def _heads(self) -> tuple[int, int]:
        (attention, *_) = model_of(self._pipe).attentions(self._pipe.transformer)
        return attention.heads, attention.head_dim


def _extend(points: Sequence[Tensor], slope: float) -> Tensor:
    """Extend the line through the last two points; one point is held."""
    if len(points) == 1 or slope == 0:
        return points[-1]
    before, last = points
    return last + slope * (last - before)


def every(warmup: int, distance: int, tail: int = 1) -> tuple[int, ...]:
    """Return full steps: a warm-up, then one in `distance`, then the last ones."""
    return tuple(
        k
        for k in range(STEPS)
        if k < warmup or (k - warmup + 1) % distance == 0 or k >= STEPS - tail
    )


def ways() -> dict[str, tuple[Pass, ...]]:
    """List what to measure, by name."""
    (balanced,) = (p for p in presets.balanced if isinstance(p, FirstBlockCache))
    (fast,) = (p for p in presets.fast if isinstance(p, FirstBlockCache))
    found: dict[str, tuple[Pass, ...]] = {"balanced": (balanced,), "fast": (fast,)}
    for distance in (3, 4, 6):
        full = every(6, distance)
        skipped = [k for k in range(6, STEPS, 2) if k not in full and k - 1 not in full[6:]]
        cache = FirstBlockCache(schedule=skipped, distance="noise", predict="damped")
        name = f"regions, 6 and one in {distance} full, every 2nd of the others skipped"
        found[name] = (cache, Regions(full))
    for warmup, distance in ((6, 5), (6, 4), (6, 3), (6, 2), (8, 2)):
        full = every(warmup, distance)
        for predict in ("linear", "half", "hold"):
            name = f"regions, {warmup} and one in {distance} full, {predict}"
            found[name] = (Regions(full, predict=predict),)
    for threshold in (0.2, 0.6):
        found[f"regions, 6 and one in 3 full, linear, threshold {threshold}"] = (
            Regions(every(6, 3), threshold=threshold),
        )
    for name, cache in (("balanced", balanced), ("fast", fast)):
        limits = cache.limits(STEPS) or {}
        computed = tuple(k for k in range(STEPS) if k not in limits)
        found[f"regions at the steps that {name} skips, linear"] = (Regions(computed),)
    return found


def main() -> None:
    """Measure every way, and plain with as much work; rows are saved after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=96, help="held-out edits")
    parser.add_argument("--only", nargs="*", help="parts of the names of what to measure")
    arguments = parser.parse_args()

    pipe = spark.load(dtype=torch.float32)
    edits = local(pipe, spark.examples(split="test", n=arguments.n))
    bench = _Bench(pipe, edits)
    result: dict[str, Any] = {
        "benchmark": "regions_on_spark", **stamp(), "tried": arguments.n,
        "examples": len(edits), "steps": STEPS, "rows": bench.rows,
    }  # fmt: skip
    for name, passes in ways().items():
        if not arguments.only or any(part in name for part in arguments.only):
            bench.measure(name, passes)
            save_result(result, arguments.out)
    print(table(_HEAD, [_line(row) for row in bench.rows]))


def local(pipe: Any, edits: Sequence[Any]) -> list[Any]:
    """Return the edits that leave most tokens as they are, so that a region is worth computing."""
    few = 20.0  # steps of work; 28 if everything changes, and 16 if next to nothing does
    found = []
    with fluxfire.optimized(pipe, [Regions(every(6, 3))]):
        for edit in edits:
            spark.score(pipe, [edit], steps=STEPS)
            if _region_work(pipe) < few:
                found.append(edit)
    return found


def _region_work(pipe: Any) -> float:
    (facts,) = (p.facts for p in fluxfire.report(pipe).passes if p.name == "regions")
    return float(str(facts["work"]))


class _Bench:
    """Makes edits one at a time, and compares them with plain's.

    Attributes:
        rows: the results so far.
    """

    def __init__(self, pipe: Any, edits: Sequence[Any]) -> None:
        self._pipe, self._edits = pipe, edits
        self._plain = [self._edit(i) for i in range(len(edits))]
        self._fewer: dict[int, list[float]] = {}
        self.rows: list[dict[str, Any]] = []

    def measure(self, name: str, passes: tuple[Pass, ...]) -> None:
        """Measure a list of passes beside plain with as much work."""
        work: list[float] = []
        with fluxfire.optimized(self._pipe, passes):
            pictures = [self._edit(i, passes=passes, work=work) for i in range(len(self._edits))]
        near = self._similarities(pictures)
        row: dict[str, Any] = {
            "name": name,
            "passes": [repr(p) for p in passes],
            "work": fmean(work),
            "works": [round(w, 2) for w in work],
            "psnr": _summary(near),
            "each": near,
            "kinds": self._by_kind(near),
        }
        steps = equal_steps(row["work"])
        if steps < STEPS:
            beside = self._fewer_steps(steps)
            gains = [a - b for a, b in zip(near, beside, strict=True)]
            row["beside as many steps"] = {
                "steps": steps, **_summary(gains), "psnr": _summary(beside),
                "kinds": self._by_kind(beside),
            }  # fmt: skip
        self.rows.append(row)
        print(_line(row), flush=True)

    def _fewer_steps(self, steps: int) -> list[float]:
        if steps not in self._fewer:
            made = [self._edit(i, steps=steps) for i in range(len(self._edits))]
            self._fewer[steps] = self._similarities(made)
        return self._fewer[steps]

    def _edit(
        self,
        i: int,
        *,
        steps: int = STEPS,
        passes: tuple[Pass, ...] = (),
        work: list[float] | None = None,
    ) -> Any:
        (made,) = spark.score(self._pipe, self._edits[i : i + 1], steps=steps, seed=i)
        if work is not None:
            work.append(self._work(passes))
        return made.image

    def _work(self, passes: tuple[Pass, ...]) -> float:
        """Return the work of the last edit, in full steps."""
        if any(isinstance(p, Regions) for p in passes):
            return _region_work(self._pipe)
        kinds = fluxfire.report(self._pipe).runs[-1].step_kinds
        return sum(1.0 if kind == "computed" else 1 / BLOCKS for kind in kinds)

    def _similarities(self, pictures: Sequence[Any]) -> list[float]:
        each = compare(list(pictures), self._plain).to_dict()["each"]
        return [round(one["psnr"], 2) for one in each]

    def _by_kind(self, values: Sequence[float]) -> dict[str, float]:
        kinds = [edit.kind for edit in self._edits]
        return {
            kind: fmean(v for v, k in zip(values, kinds, strict=True) if k == kind)
            for kind in dict.fromkeys(kinds)
        }


def _summary(values: Sequence[float]) -> dict[str, float]:
    interval = bootstrap(values)
    told = asdict(interval) if interval else {"mean": fmean(values)}
    return {**told, "worst": min(values)}


_HEAD = ("method", "work", "PSNR", "worst", "plain steps", "their PSNR", "worst", "difference")


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    own, beside = row["psnr"], row.get("beside as many steps")
    told = (row["name"], f"{row['work']:.1f}", f"{own['mean']:.1f}", f"{own['worst']:.1f}")
    if beside is None:
        return (*told, "-", "-", "-", "-")
    plain = beside["psnr"]
    gain = f"{beside['mean']:+.1f}"
    if "low" in beside:
        gain += f" [{beside['low']:+.1f}, {beside['high']:+.1f}]"
    return (*told, f"{beside['steps']}", f"{plain['mean']:.1f}", f"{plain['worst']:.1f}", gain)


if __name__ == "__main__":
    main()
