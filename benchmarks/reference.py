"""The reference computed once in a while: its steps, and whole edits with Spark's schedules.

python benchmarks/reference.py --full --out benchmarks/results/reference.json    # needs a GPU
python benchmarks/reference.py --tiny --out /tmp/reference.json                  # on a CPU
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import full_or_tiny
from fluxfire import presets
from fluxfire.bench import Contender, Example, Row, Workload, measure, row_saver, stamp
from fluxfire.bench.schedules import schedule_contender
from fluxfire.passes import (
    Attention,
    Compile,
    Float8,
    FusedBlocks,
    ReferenceCache,
)
from fluxfire.protocol import Pass
from fluxfire.text import human_seconds, table

EXACT: tuple[Pass, ...] = (FusedBlocks(), Attention("fa3"))
EIGHT_BITS: tuple[Pass, ...] = (Float8(), FusedBlocks(), Attention("fa3"))
EIGHT_BITS_ALL: tuple[Pass, ...] = (Float8(), FusedBlocks(), Attention("fa3-fp8"))
ALTERNATE = ReferenceCache(schedule=range(0, 28, 4))
BOTH = presets.balanced[-2]


def stack(*passes: Pass) -> tuple[Pass, ...]:
    """Return passes with the blocks compiled behind them."""
    return (*passes, Compile())


STACKS = {
    "eager": (),
    "faithful": presets.faithful,
    "faithful, FlashAttention-3": stack(*EXACT),
    "reuse": stack(FusedBlocks(), ALTERNATE),
    "reuse, FlashAttention-3": stack(*EXACT, ALTERNATE),
    "reuse, Float8": stack(*EIGHT_BITS, ALTERNATE),
    "reuse, Float8, float8 attention": stack(*EIGHT_BITS_ALL, ALTERNATE),
    "balanced's cache and reuse": stack(FusedBlocks(), BOTH, ALTERNATE),
}


def main() -> None:
    """Measure every stack on both sizes; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=list(STACKS), default=list(STACKS))
    parser.add_argument("--side", type=int, nargs="*", default=[1024, 512])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=1, help="whole edits of each stack")
    arguments = parser.parse_args()

    pipe = full_or_tiny.pipeline(full=arguments.full)
    result: dict[str, Any] = {"benchmark": "reference", **stamp(), "rows": []}
    rows: list[Row] = []
    for side in arguments.side:
        load = _workload(side, arguments.steps or {1024: 28}.get(side, 20), full=arguments.full)
        contenders = [_contender(name, load.steps) for name in arguments.only]
        picture = Image.effect_noise(load.size or (side, side), 60).convert("RGB")
        rows += measure(
            pipe, contenders, [load], [Example("make it a snowy winter evening", picture)],
            rounds=arguments.rounds, on_edit=lambda said: print(said, flush=True),
            on_rows=_keeping(result, rows, arguments.out), fewer_steps=False,
        )  # fmt: skip
    print(_summary([row.to_dict() for row in rows]))


def _keeping(
    result: dict[str, Any], before: list[Row], path: Path
) -> Callable[[Sequence[Row]], None]:
    """Keep rows behind those of the sizes before."""
    keep = row_saver(result, path)
    return lambda rows: keep([*before, *rows])


def _workload(side: int, steps: int, *, full: bool) -> Workload:
    return full_or_tiny.edit(side if full else side // 16, steps, full=full)


def _contender(name: str, steps: int) -> Contender:
    return schedule_contender(Contender(name, STACKS[name]), steps)


def _summary(rows: list[dict[str, Any]]) -> str:
    eager = {r["workload"]["name"]: r for r in rows if r["contender"] == "eager"}
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["contender"], row["error"][:120], *[""] * 6))
            continue
        base = eager.get(row["workload"]["name"], row)
        cells = []
        for kind in ("step", "reuse_step", "hit_step"):
            took = row[kind]
            faster = f" ({base['step']['median'] / took['median']:.2f}x)" if took else ""
            cells.append(human_seconds(took["median"]) + faster if took else "-")
        whole = row["edit"]["median"]
        lines.append(
            (
                row["contender"], row["workload"]["name"], *cells,
                f"{row['reuses']:.0f} + {row['hits']:.0f}",
                f"{human_seconds(whole)} ({base['edit']['median'] / whole:.2f}x)",
                f"{row['peak_gib']:.1f}",
            )
        )  # fmt: skip
    head = ("stack", "workload", "computed", "reuse", "hit", "reuses + hits", "edit", "peak GiB")
    return table(head, lines)


if __name__ == "__main__":
    main()
