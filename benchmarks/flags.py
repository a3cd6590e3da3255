"""What each of the article's compiler flags does to a step, one at a time and together.

python benchmarks/flags.py --full --out benchmarks/results/flags.json    # needs a GPU
python benchmarks/flags.py --tiny --out /tmp/flags.json                  # a minute on a CPU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from PIL import Image

import full_or_tiny
from fluxfire.bench import Contender, Example, controls
from fluxfire.passes import Compile, MemoryLayout
from fluxfire.text import human_seconds, table

FLAGS: dict[str, dict[str, bool]] = {
    "shape_padding": {"shape_padding": True},  # inductor's default: no difference expected
    "epilogue_fusion off": {"epilogue_fusion": False},
    "coordinate_descent_tuning": {"coordinate_descent_tuning": True},
    "coordinate_descent_check_all_directions": {
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    },
}

AS_MATRIX = {"conv_1x1_as_mm": True}
MODE: Final = "max-autotune-no-cudagraphs"


def contenders() -> Iterator[Contender]:
    """Compile by blocks, then with each flag, each mode, and all; convolutions are the VAE's."""
    yield from controls()
    for name, options in FLAGS.items():
        yield Contender(name, (Compile(options=options),), "alone")
    yield Contender(MODE, (Compile(mode=MODE),), "alone")
    yield Contender("with the VAE", (Compile(vae=True),))
    yield Contender("conv_1x1_as_mm", (Compile(vae=True, options=AS_MATRIX),), "alone")
    yield Contender("channels-last", (MemoryLayout(), Compile(vae=True)), "alone")
    every = {k: v for options in (*FLAGS.values(), AS_MATRIX) for k, v in options.items()}
    yield Contender("everything", (MemoryLayout(), Compile(vae=True, mode=MODE, options=every)))


def main() -> None:
    """Measure every flag; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()

    side = full_or_tiny.side(full=arguments.full)
    workload = full_or_tiny.edit(side, arguments.steps, full=arguments.full)
    example = Example(full_or_tiny.INSTRUCTION, Image.new("RGB", (side, side), "olive"))
    rows = full_or_tiny.contest("flags", contenders(), [workload], example, arguments)
    lines = [
        (r["contender"], r["error"] or human_seconds(r["step"]["median"]),
         "" if r["error"] else human_seconds(r["phases"]["decoding"]["median"]),
         "" if r["error"] else human_seconds(r["first_seconds"][0]))
        for r in rows
    ]  # fmt: skip
    print(table(("compile with", "a step", "decoding", "first run"), lines))


if __name__ == "__main__":
    main()
