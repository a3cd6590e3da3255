"""The presets at the full size: a step, a whole edit, and the same list at fewer steps.

python benchmarks/presets.py --full --side 1024 --out benchmarks/results/presets.json  # a GPU
python benchmarks/presets.py --tiny --out /tmp/presets.json                            # a CPU

Weights are random, so a cache follows the schedule that its settings give Spark's edits.
"""

from __future__ import annotations

from typing import Any

import full_or_tiny
from fluxfire import order, presets
from fluxfire.bench import Contender, controls, measure, row_saver, stamp, tables
from fluxfire.bench.schedules import schedule_contender
from fluxfire.passes import Attention, Float8

CONTENDERS = [
    controls()[0],
    Contender("faithful", presets.faithful),
    Contender("faithful, FlashAttention-3", tuple(order([*presets.faithful, Attention("fa3")]))),
    Contender("faithful, Float8", tuple(order([*presets.faithful, Float8()]))),
    Contender("balanced", presets.balanced),
    Contender("fast", presets.fast),
]


def main() -> None:
    """Measure every list; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--side", type=int, default=1024, help="of the output, in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    side = arguments.side if arguments.full else full_or_tiny.side(full=False)
    load = full_or_tiny.edit(side, arguments.steps, full=arguments.full)
    wanted = [c for c in CONTENDERS if not arguments.only or c.name in arguments.only]
    result: dict[str, Any] = {"benchmark": "presets", **stamp(), "notes": [], "rows": []}
    measure(
        full_or_tiny.pipeline(full=arguments.full),
        [schedule_contender(c, load.steps) for c in wanted],
        [load], [full_or_tiny.noise(side)], rounds=arguments.rounds,
        on_rows=row_saver(result, arguments.out), on_edit=lambda said: print(said, flush=True),
    )  # fmt: skip
    print(tables.as_text(result))


if __name__ == "__main__":
    main()
