"""What surrounds the denoising loop, when one picture is edited by one prompt after another.

python benchmarks/around.py --full --out benchmarks/results/around.json    # needs a GPU
python benchmarks/around.py --tiny --out /tmp/around.json                  # a minute on a CPU
"""

from __future__ import annotations

from statistics import median
from typing import Any

from PIL import Image

import full_or_tiny
from fluxfire.bench import Contender, Example, measure, row_saver, stamp
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
    parser = full_or_tiny.parser(__doc__)
    arguments = parser.parse_args()

    pipe = full_or_tiny.pipeline(full=arguments.full)
    side = full_or_tiny.side(full=arguments.full)
    workload = full_or_tiny.edit(side, 2, full=arguments.full)
    picture = Image.effect_noise((side, side), 60).convert("RGB")
    result: dict[str, Any] = {"benchmark": "around", **stamp(), "rows": []}
    rows = measure(
        pipe, CONTENDERS, [workload], [Example(prompt, picture) for prompt in PROMPTS], rounds=1,
        on_rows=row_saver(result, arguments.out), on_edit=lambda said: print(said, flush=True),
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
