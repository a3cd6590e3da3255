"""What each of the article's compiler flags does to a step, one at a time and together.

python benchmarks/flags.py --full --out benchmarks/results/flags.json    # needs a GPU
python benchmarks/flags.py --tiny --out /tmp/flags.json                  # a minute on a CPU
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from PIL import Image

from fluxfire.bench import Contender, Example, Workload, controls, keeping, measure, stamp
from fluxfire.loading import load
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="FLUX.1 Kontext's sizes, random weights")
    size.add_argument("--tiny", action="store_true", help="a tiny pipeline, for trying this out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names of contenders")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()

    pipe = load("random-full" if arguments.full else "random-tiny")
    pipe.set_progress_bar_config(disable=True)
    side = 1024 if arguments.full else 64
    workload = Workload(
        name=f"edit {side}, {arguments.steps} steps",
        size=(side, side),
        steps=arguments.steps,
        auto_resize=arguments.full,
        text_tokens=512 if arguments.full else 32,
    )
    result: dict[str, Any] = {"benchmark": "flags", **stamp(), "rows": []}

    wanted = [c for c in contenders() if not arguments.only or c.name in arguments.only]
    example = Example("make it a snowy winter evening", Image.new("RGB", (side, side), "olive"))
    measure(
        pipe, wanted, [workload], [example], rounds=1, on_rows=keeping(result, arguments.out),
        on_edit=lambda said: print(said, flush=True),
    )  # fmt: skip
    lines = [
        (r["contender"], r["error"] or human_seconds(r["step"]["median"]),
         "" if r["error"] else human_seconds(r["phases"]["decoding"]["median"]),
         "" if r["error"] else human_seconds(r["first_seconds"][0]))
        for r in result["rows"]
    ]  # fmt: skip
    print(table(("compile with", "a step", "decoding", "first run"), lines))


if __name__ == "__main__":
    main()
