"""Whole edits and their steps: eager, `faithful`, and the article's settings by blocks.

python benchmarks/edits.py --full --out benchmarks/results/edits.json    # needs a GPU
python benchmarks/edits.py --tiny --out /tmp/edits.json                  # seconds on a CPU
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

import full_or_tiny
from fluxfire import presets
from fluxfire.bench import Contender, Example, Workload, load_result, measure, row_saver, stamp
from fluxfire.bench.schedules import most_frequent_steps
from fluxfire.passes import Compile, FirstBlockCache, MemoryLayout, QKVFusion
from fluxfire.text import human_seconds, table

FULL = [
    Workload(name=f"edit {side}, {steps} steps", size=(side, side), steps=steps, text_tokens=512)
    for side in (1024, 512)
    for steps in (28, 20)
]
FULL += [
    Workload(
        name=f"text-to-image {side}, 20 steps",
        size=(side, side),
        steps=20,
        text_tokens=512,
        reference=False,
    )
    for side in (1024, 512)
]
TINY = [
    replace(w, size=(w.size[0] // 16, w.size[1] // 16), auto_resize=False, text_tokens=32)
    for w in FULL
    if w.size
]
INSTRUCTION = "make it a snowy winter evening"


def uncached(preset: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a preset without its caches, and with the transformer alone compiled."""
    return tuple(
        replace(p, vae=False) if isinstance(p, Compile) else p
        for p in preset
        if p.stage not in ("caching", "artifacts")
    )


def cached(preset: tuple[Any, ...], cache: FirstBlockCache) -> tuple[Any, ...]:
    """Return a preset with a cache before its compilation."""
    return (*preset[:-1], cache, preset[-1])


ALTERNATE = FirstBlockCache(schedule=range(2, 28, 2))
"""Hits every other step: 9 of 20, 13 of 28."""
AS_SPARK = FirstBlockCache(0.12, warmup_steps=0, tail_steps=0, max_consecutive_hits=None)
"""Told to hit as many steps as Spark's edits do at this threshold (`caches.json`)."""
STACKS = {
    "eager": (),
    "faithful": presets.faithful,
    "article, by blocks": uncached(presets.article),
    "faithful and cache, no hits": cached(presets.faithful, FirstBlockCache(0)),
    "faithful and cache, alternate hits": cached(presets.faithful, ALTERNATE),
    "faithful and cache, Spark's hits": cached(presets.faithful, AS_SPARK),
    "article, by blocks, and cache, alternate hits": cached(uncached(presets.article), ALTERNATE),
    "article, by blocks, and cache, Spark's hits": cached(uncached(presets.article), AS_SPARK),
    "QKVFusion alone": (QKVFusion(),),
    "MemoryLayout alone": (MemoryLayout(),),
    "Compile alone": (Compile(),),
    "QKVFusion + Compile": (QKVFusion(), Compile()),
}


def as_spark(workload: Workload) -> FirstBlockCache:
    """Return a schedule of as many hits as Spark's own edits, or pictures, have on average.

    They are the steps that most of these hit.
    """
    rows = load_result(Path(__file__).parent / "results" / "caches.json")["rows"]
    wanted = {
        "kind": "edit" if workload.reference else "from words",
        "steps": workload.steps,
        "threshold": AS_SPARK.threshold,
        "distance": AS_SPARK.distance,
        "predict": AS_SPARK.predict,
    }
    (row,) = (row for row in rows if all(row[k] == v for k, v in wanted.items()))
    return replace(AS_SPARK, schedule=most_frequent_steps(row["hits_by_step"]))


def main() -> None:
    """Run the benchmark; rows are saved after each edit."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--picture", help="the picture to edit (default: a plain one)")
    parser.add_argument("--stacks", nargs="*", choices=STACKS, default=list(STACKS))
    parser.add_argument("--workloads", nargs="*", choices=[w.name for w in FULL])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--curve", action="store_true", help="the first ten edits, nothing before them"
    )
    arguments = parser.parse_args()

    pipe = full_or_tiny.pipeline(full=arguments.full)
    picture = _picture(arguments.picture, full_or_tiny.side(full=arguments.full))
    examples = [Example(INSTRUCTION, picture)] * (10 if arguments.curve else 1)
    result: dict[str, Any] = {"benchmark": "edits", **stamp(), "rows": []}

    workloads = FULL if arguments.full else TINY
    if arguments.workloads:
        workloads = [w for w in workloads if w.name in arguments.workloads]
    contenders = [_contender(name, workloads) for name in arguments.stacks]
    measure(
        pipe, contenders, workloads, examples, rounds=arguments.rounds, fewer_steps=False,
        warmups=0 if arguments.curve else 1, on_edit=lambda said: print(said, flush=True),
        on_rows=row_saver(result, arguments.out),
    )  # fmt: skip
    print(_summary(result["rows"]))


def _contender(name: str, workloads: list[Workload]) -> Contender:
    passes = STACKS[name]
    settings = {load.name: as_spark(load) for load in workloads} if AS_SPARK in passes else {}
    return Contender(name, passes, settings=settings)


def _picture(name: str | None, side: int) -> Image.Image:
    picture = Image.open(name) if name else Image.new("RGB", (side, side), "olive")
    return picture.convert("RGB").resize((side, side))


def _summary(rows: list[dict[str, Any]]) -> str:
    eager = {r["workload"]["name"]: r for r in rows if r["contender"] == "eager"}
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["contender"], row["workload"]["name"], row["error"], *[""] * 5))
            continue
        base = eager.get(row["workload"]["name"], row)
        lines.append(
            (
                row["contender"],
                row["workload"]["name"],
                human_seconds(row["step"]["median"]),
                f"{base['step']['median'] / row['step']['median']:.3f}x",
                human_seconds(row["edit"]["median"]),
                f"{base['edit']['median'] / row['edit']['median']:.3f}x",
                human_seconds((row["first_seconds"] or row["edit"]["seconds"])[0]),
                f"{row['apply_gib']:+.2f}",
            )
        )
    head = ("stack", "workload", "a step", "", "the edit", "", "first run", "GiB")
    return table(head, lines)


if __name__ == "__main__":
    main()
