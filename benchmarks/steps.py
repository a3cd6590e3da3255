"""A step, as passes are added that compute the same with less work, or in eight bits.

python benchmarks/steps.py --full --out benchmarks/results/steps.json    # needs a GPU
python benchmarks/steps.py --tiny --out /tmp/steps.json                  # a minute on a CPU
"""

from __future__ import annotations

import full_or_tiny
from fluxfire.bench import Contender, controls
from fluxfire.bench.baselines import choose, missing
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
    *(choose(["torchao"]) if missing("torchao") is None else ()),
]


def main() -> None:
    """Measure every stack; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=[c.name for c in CONTENDERS])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", type=int, nargs="*", help="of the output, in pixels")
    arguments = parser.parse_args()

    sides = arguments.side or [full_or_tiny.side(full=arguments.full)]
    workloads = [full_or_tiny.edit(side, arguments.steps, full=arguments.full) for side in sides]
    rows = full_or_tiny.contest(
        "steps", CONTENDERS, workloads, full_or_tiny.noise(sides[0]), arguments,
        rounds=arguments.rounds,
    )  # fmt: skip
    eager = {r["workload"]["name"]: r for r in rows if r["contender"] == "eager"}
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["contender"], row["error"][:120], "", "", "", "", ""))
            continue
        base = eager[row["workload"]["name"]]["step"]["median"]
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
