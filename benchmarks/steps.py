"""A step, as passes are added that compute the same with less work, or in eight bits.

python benchmarks/steps.py --full --out benchmarks/results/steps.json    # needs a GPU
python benchmarks/steps.py --tiny --out /tmp/steps.json                  # a minute on a CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfire.bench import Contender, Example, Workload, controls, keeping, measure, stamp
from fluxfire.bench.rivals import installed
from fluxfire.loading import load
from fluxfire.passes import Attention, Compile, Float8, FusedBlocks, ModulationTable, QKVFusion
from fluxfire.text import human_seconds, table

FUSED = (FusedBlocks(), ModulationTable(), Compile())
ON_HOST = (FusedBlocks(), ModulationTable(host=True), Compile())
CONTENDERS = [
    *controls(),
    Contender("QKVFusion + Compile", (QKVFusion(), Compile())),
    Contender("FusedBlocks", (FusedBlocks(),)),
    Contender("FusedBlocks + Compile", (FusedBlocks(), Compile())),
    Contender("ModulationTable + Compile", (ModulationTable(), Compile())),
    Contender("all exact passes", (QKVFusion(), *FUSED)),
    Contender("Float8 + Compile", (Float8(), Compile())),
    Contender("Float8 + exact passes", (Float8(), *FUSED)),
    Contender("Float8 + float8 attention + exact passes", (Float8(), Attention("fa3-fp8"), *FUSED)),
    Contender("Float8 + exact passes, modulations on the host", (Float8(), *ON_HOST)),
    *(c for c in installed() if c.name.startswith("torchao")),
]


def main() -> None:
    """Measure every stack; rows are saved after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_true", help="FLUX.1 Kontext's sizes, random weights")
    size.add_argument("--tiny", action="store_true", help="a tiny pipeline, for trying this out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", type=int, nargs="*", help="of the output, in pixels")
    arguments = parser.parse_args()

    pipe = load("random-full" if arguments.full else "random-tiny")
    pipe.set_progress_bar_config(disable=True)
    sides = arguments.side or ([1024] if arguments.full else [64])
    workloads = [
        Workload(
            name=f"edit {side}, {arguments.steps} steps",
            size=(side, side),
            steps=arguments.steps,
            auto_resize=arguments.full,
            text_tokens=512 if arguments.full else 32,
        )
        for side in sides
    ]
    picture = Image.effect_noise((sides[0], sides[0]), 60).convert("RGB")
    wanted = [c for c in CONTENDERS if not arguments.only or c.name in arguments.only]
    result: dict[str, Any] = {"benchmark": "steps", **stamp(), "rows": []}
    rows = measure(
        pipe, wanted, workloads, [Example("make it a snowy winter evening", picture)],
        rounds=arguments.rounds, on_rows=keeping(result, arguments.out),
        on_edit=lambda said: print(said, flush=True),
    )  # fmt: skip
    eager = {r.workload.name: r for r in rows if r.contender.name == "eager"}
    lines = []
    for row in (r.to_dict() for r in rows):
        if row["error"]:
            lines.append((row["contender"], row["error"][:120], "", "", "", "", ""))
            continue
        base = eager[row["workload"]["name"]].to_dict()["step"]["median"]
        near = row["quality"].get("eager", {}).get("psnr", {})
        lines.append(
            (
                row["contender"],
                human_seconds(row["step"]["median"]),
                f"{base / row['step']['median']:.3f}x",
                human_seconds(row["first_seconds"][0]),
                f"{row['apply_gib']:+.2f}",
                f"{row['peak_gib']:.1f}",
                f"{near.get('mean', 0):.1f}",
            )
        )
    head = ("stack", "a step", "", "first run", "GiB", "peak", "PSNR to eager")
    print(table(head, lines))


if __name__ == "__main__":
    main()
