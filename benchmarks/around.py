"""What surrounds the denoising loop, when one picture is edited by one prompt after another.

python benchmarks/around.py --full --out benchmarks/results/around.json    # needs a GPU
python benchmarks/around.py --tiny --out /tmp/around.json                  # a minute on a CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from fluxfire.bench import Contender, Example, Workload, keeping, measure, stamp
from fluxfire.loading import load
from fluxfire.passes import Compile, EncodingCache
from fluxfire.text import human_seconds, table

CONTENDERS = (
    Contender("eager", role="control"),
    Contender("EncodingCache", (EncodingCache(),)),
    Contender("EncodingCache, VAE compiled", (EncodingCache(), Compile(vae=True))),
    Contender(
        "EncodingCache, VAE and text encoders compiled",
        (EncodingCache(), Compile(vae=True, text_encoders=True)),
    ),
)
PROMPTS = ("make it night", "make it snow", "paint the wall red", "remove the chair", "add a cat")


def main() -> None:
    """Edit one picture by several prompts; only the first has the picture to encode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="FLUX.1 Kontext's sizes, random weights")
    size.add_argument("--tiny", action="store_true", help="a tiny pipeline, for trying this out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    pipe = load("random-full" if arguments.full else "random-tiny")
    pipe.set_progress_bar_config(disable=True)
    side = 1024 if arguments.full else 64
    workload = Workload(
        name=f"edit {side}, 2 steps",
        size=(side, side),
        steps=2,
        auto_resize=arguments.full,
        text_tokens=512 if arguments.full else 32,
    )
    picture = Image.effect_noise((side, side), 60).convert("RGB")
    result: dict[str, Any] = {"benchmark": "around", **stamp(), "rows": []}
    rows = measure(
        pipe, CONTENDERS, [workload], [Example(prompt, picture) for prompt in PROMPTS], rounds=1,
        on_rows=keeping(result, arguments.out), on_edit=lambda said: print(said, flush=True),
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.error:
            lines.append((row.contender.name, row.error[:120], "", "", "", ""))
            continue
        later = row.edits[1:]
        spent = {n: median(e.phases.get(n, 0) for e in later) for n in later[0].phases}
        outside = median(e.seconds - e.phases["denoising"] for e in later)
        names = ("text encoding", "reference encoding", "decoding", "the rest")
        told = (human_seconds(spent.get(n, 0)) for n in names)
        lines.append((row.contender.name, human_seconds(outside), *told))
    head = ("", "outside the loop", "text", "reference", "decoding", "the rest")
    print(table(head, lines))


if __name__ == "__main__":
    main()
