"""Every pass in company: the preset `faithful`, with one pass more or one less.

python benchmarks/each_pass.py --full --out benchmarks/results/passes_in_company.json  # needs a GPU
python benchmarks/each_pass.py --tiny --out /tmp/passes_in_company.json  # a minute on a CPU
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fluxfire
import full_or_tiny
from fluxfire import presets
from fluxfire.bench import Contender, controls
from fluxfire.passes import (
    Attention,
    EncodingCache,
    FirstBlockCache,
    Float8,
    MegaCache,
    MemoryLayout,
    ModulationTable,
    ParaAttention,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.protocol import Pass
from fluxfire.text import human_seconds, table

# The caches on a schedule: what they decide on random weights means nothing.
ADDED: dict[str, Pass] = {
    "qkv-fusion": QKVFusion(),
    "memory-layout": MemoryLayout(),
    "modulation-table": ModulationTable(),
    "modulation-table on the host": ModulationTable(host=True),
    "float8": Float8(),
    "attention": Attention(),
    "attention fa3-fp8": Attention("fa3-fp8"),
    "encoding-cache": EncodingCache(),
    "first-block-cache": FirstBlockCache(schedule=range(2, 64, 2)),
    "para-attention": ParaAttention(threshold=1e9, warmup_steps=4),
    "reference-cache": ReferenceCache(schedule=range(0, 64, 2)),
}


def added(folder: Path) -> dict[str, Pass]:
    """Return what is not in `faithful`, by name.

    Args:
        folder: where compiled artifacts may be kept.
    """
    return {**ADDED, "mega-cache": MegaCache(path=folder / "artifacts.megacache")}


def contenders(folder: Path) -> list[Contender]:
    """List eager, `faithful`, and `faithful` with a pass more or less.

    Args:
        folder: where compiled artifacts may be kept.
    """
    made = [controls()[0], Contender("faithful", presets.faithful)]
    for pass_ in presets.faithful:
        less = tuple(p for p in presets.faithful if p is not pass_)
        made.append(Contender(f"without {pass_.name}", less))
    for name, pass_ in added(folder).items():
        more = fluxfire.order([*presets.faithful, pass_])
        made.append(Contender(f"with {name}", tuple(more)))
    return made


def main() -> None:
    """Measure every contender; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--only", nargs="*", help="contenders by name")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()

    side = full_or_tiny.side(full=arguments.full)
    workload = full_or_tiny.edit(side, arguments.steps, full=arguments.full)
    with tempfile.TemporaryDirectory() as folder:
        rows = full_or_tiny.contest(
            "passes", contenders(Path(folder)), [workload], full_or_tiny.noise(side), arguments
        )
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["contender"], row["error"][:150], *[""] * 5))
            continue
        kinds = (row[kind] for kind in ("step", "reuse_step", "hit_step"))
        lines.append(
            (
                row["contender"],
                *(human_seconds(took["median"]) if took else "-" for took in kinds),
                human_seconds(row["edit"]["median"]),
                f"{row['apply_gib']:+.2f}",
                f"{row['peak_gib']:.1f}",
            )
        )
    print(table(("contender", "a step", "reuse", "hit", "edit", "GiB", "peak"), lines))


if __name__ == "__main__":
    main()
