"""What passes that should change little, or round to eight bits, do to Spark's held-out edits.

Plain with fewer steps stands beside them: as many steps as the H100 makes in the time that eight
bits take.

python benchmarks/passes_on_spark.py -n 480 --batch 96 --out benchmarks/results/passes_on_spark.json
python benchmarks/passes_on_spark.py -n 12 --dtype float32 --out /tmp/passes.json    # on a CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import fluxfire
from fluxfire import spark
from fluxfire.bench import compare, save_result, stamp
from fluxfire.passes import Attention, Float8, FusedBlocks, Int8, Int8TextEncoder, ModulationTable
from fluxfire.protocol import Pass
from fluxfire.text import table

EXACT = (FusedBlocks(), ModulationTable())
STACKS: dict[str, tuple[Pass, ...]] = {
    "plain": (),
    "FusedBlocks": (FusedBlocks(),),
    "ModulationTable": (ModulationTable(),),
    "Float8": (Float8(),),
    "Int8": (Int8(),),
    "Int8, weights alone": (Int8(activations="plain"),),
    "Int8TextEncoder": (Int8TextEncoder(),),
    "Int8 + Int8TextEncoder": (Int8(), Int8TextEncoder()),
    "Float8 + exact passes": (Float8(), *EXACT),
    "float8 attention": (Attention("fa3-fp8"),),
    "Float8 + float8 attention + exact passes": (Float8(), Attention("fa3-fp8"), *EXACT),
}


FEWER = (21, 18)
"""An H100 step takes 199 ms with Float8, 176 with float8 attention too, and 275 without."""


def main() -> None:
    """Score every stack beside the plain pipeline in the same dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=480, help="held-out edits")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="*", help="stacks to measure; plain is always measured")
    arguments = parser.parse_args()

    pipe = spark.load(dtype=getattr(torch, arguments.dtype))
    edits = spark.examples(split="test", n=arguments.n)
    told = {"examples": arguments.n, "steps": arguments.steps, "dtype": arguments.dtype}
    rows: list[dict[str, Any]] = []
    plain = None
    listed = [(name, passes, arguments.steps) for name, passes in STACKS.items()]
    listed += [(f"plain, {n} steps", (), n) for n in FEWER]
    only = arguments.only
    for name, passes, steps in listed:
        if only is not None and name not in ("plain", *only):
            continue
        row: dict[str, Any] = {"stack": name, "passes": [repr(p) for p in passes]}
        try:
            with fluxfire.optimized(pipe, passes):
                made = spark.score(pipe, edits, steps=steps, batch=arguments.batch)
        except Exception as error:  # noqa: BLE001 - the others go on
            rows.append({**row, "error": f"{type(error).__name__}: {error}"})
            continue
        plain = plain or made
        near = compare([m.image for m in made], [p.image for p in plain]).to_dict()
        rows.append(
            {
                **row,
                "error": None,
                "success": mean(m.passed for m in made),
                "psnr": near["psnr"],
                "ssim": near["ssim"],
                "flip": near["flip"],
            }
        )
        save_result(
            {"benchmark": "passes_on_spark", **stamp(), **told, "rows": rows}, arguments.out
        )
    lines = [
        (r["stack"], r["error"][:90], "", "")
        if r["error"]
        else (
            r["stack"],
            f"{r['success']:.1%}",
            f"{r['psnr']['mean']:.1f}",
            f"{r['psnr']['worst']:.1f}",
        )
        for r in rows
    ]
    print(table(("", "success", "PSNR to plain", "its worst"), lines))


if __name__ == "__main__":
    main()
