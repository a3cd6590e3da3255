"""How long `fluxfire.calibrate` takes at the full size.

python benchmarks/calibrating.py --full --out benchmarks/results/calibrating.json  # needs a GPU
python benchmarks/calibrating.py --tiny --out /tmp/calibrating.json                # a CPU

Weights are random, so the schedule means nothing, but every edit takes its real time.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import fluxfire
import full_or_tiny
from fluxfire import presets
from fluxfire.bench import save_result, stamp
from fluxfire.text import human_seconds, table

EXAMPLES = 16


def main() -> None:
    """Calibrate once; save the seconds of each part."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--side", type=int, default=1024, help="of the output, in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--computed", type=int, nargs="+", default=[16])
    arguments = parser.parse_args()

    side = arguments.side if arguments.full else full_or_tiny.side(full=False)
    load = full_or_tiny.edit(side, arguments.steps, full=arguments.full)
    example = full_or_tiny.noise(side)
    examples = [replace(example, instruction=f"edit {i}") for i in range(EXAMPLES)]
    pipe = full_or_tiny.pipeline(full=arguments.full)
    said: list[tuple[str, float]] = []

    def note_edit(what: str) -> None:
        said.append((what.partition(",")[0], time.perf_counter()))
        print(what, flush=True)

    began = time.perf_counter()
    found = fluxfire.calibrate(
        pipe,
        examples,
        passes=presets.faithful if arguments.full else (),
        computed=arguments.computed,
        workload=load,
        on_edit=note_edit,
    )
    ended = time.perf_counter()
    taken: defaultdict[str, float] = defaultdict(float)
    for (what, start), (_, end) in pairwise([*said, ("", ended)]):
        taken[what.partition(" of ")[0].rstrip(" 0123456789")] += end - start
    result: dict[str, Any] = {
        "benchmark": "calibrating", **stamp(), "examples": EXAMPLES, "seconds": ended - began,
        "parts": dict(taken), "edits": dict(Counter(what for what, _ in said)),
        "calibrated": found.to_dict(),
    }  # fmt: skip
    save_result(result, arguments.out)
    print(found)
    rows = [(part, human_seconds(seconds)) for part, seconds in taken.items()]
    print(table(("part", "time"), [*rows, ("all", human_seconds(ended - began))]))


if __name__ == "__main__":
    main()
