"""The article's claims, one by one, with what was measured here: a table for the docs.

Each row's figure comes from a committed result; a result that is not there yet says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fluxfire.bench import load_result

RESULTS = Path(__file__).parent / "results"
MISSING = "Not yet measured."
Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim of the article.

    Attributes:
        said: what it says.
        found: reads what was measured, in words.
        on: on which workload.
        command: what repeats it.
    """

    said: str
    found: Callable[[], str]
    on: str
    command: str


def table() -> str:
    """Lay all claims out in Markdown."""
    lines = ["| The article says | Measured here | On | Again |", "| --- | --- | --- | --- |"]
    for claim in CLAIMS:
        try:
            found = claim.found()
        except (FileNotFoundError, StopIteration):
            found = MISSING
        lines.append(f"| {claim.said} | {found} | {claim.on} | `{claim.command}` |")
    return "\n".join(lines)


def _row(file: str, name: str, workload: str | None = None) -> Row:
    """Find a contender's row.

    Raises:
        StopIteration: it was not measured.
        FileNotFoundError: nothing of its result was.
    """
    rows = load_result(RESULTS / file)["rows"]
    return next(
        r for r in rows
        if name == (r.get("contender") or r.get("stack")) and not r.get("error")
        and workload in (None, r["workload"]["name"])
    )  # fmt: skip


def _edit(name: str, workload: str, file: str = "article.json") -> str:
    eager, row = _row(file, "eager", workload), _row(file, name, workload)
    base, now = eager["edit"]["median"], row["edit"]["median"]
    return f"{base:.2f} → {now:.2f} s ({base / now:.2f}×)"


def _whole() -> str:
    """The article's settings where they were run, and `faithful`; both compute every step."""
    loads = {
        "as its data ran, text-to-image 1024²": "text-to-image 1024, 20 steps",
        "a true 512²": "text-to-image 512, 20 steps",
        "an edit to 1024²": "edit 1024, 20 steps",
        "an edit to 512²": "edit 512, 20 steps",
    }
    article = "article, by blocks"
    told = []
    for said, workload in loads.items():
        stacks = {
            "`faithful`": ("edits.json", "faithful"),
            "its settings": ("article.json", article),
        }
        found = []
        for name, (file, stack) in stacks.items():
            with suppress(StopIteration):
                found.append(f"{name} {_edit(stack, workload, file)}")
        told.append(f"{said}: {', '.join(found)}")
    return (
        f"all steps computed: {'; '.join(told)}. Its cache skips steps; so does "
        f"`num_inference_steps=9`, which is {20 / 9:.1f}× of the loop by itself"
    )


def _hit() -> str:
    row = _row("edits.json", "faithful and cache, Spark's hits", "edit 1024, 20 steps")
    hit, step = row["hit_step"]["median"], row["step"]["median"]
    return (
        f"it caches no attention, but what all blocks after the first add. A hit takes "
        f"{hit * 1e3:.0f} ms where a computed step takes {step * 1e3:.0f} ({hit / step:.1%})"
    )


def _caches(steps: int, threshold: float) -> Row:
    wanted = {
        "kind": "edit", "steps": steps, "threshold": threshold, "distance": "all",
        "predict": "hold",
    }  # fmt: skip
    rows = load_result(RESULTS / "caches.json")["rows"]
    return next(r for r in rows if all(r[k] == v for k, v in wanted.items()))


def _hits() -> str:
    found = []
    for steps in (20, 28):
        shares = "/".join(f"{_caches(steps, t)['hits']:.0%}" for t in (0.05, 0.12, 0.25))
        found.append(f"{shares} at {steps} steps")
    return " and ".join(found)


def _loss() -> str:
    rows = {row["contender"]: row for row in load_result(RESULTS / "frontier.json")["rows"]}
    row = rows["para-attn 0.12"]
    beside = row["beside_fewer_steps"]
    plain = rows[beside["contender"]]["quality"]["eager"]["psnr"]
    near = row["quality"]["eager"]["psnr"]
    return (
        f"the cache is lossy: PSNR to the uncached picture {near['mean']:.1f} dB on average, "
        f"{near['worst']:.1f} at worst, on Spark. Plain with {beside['steps']} steps, as "
        f"much work, has {plain['mean']:.1f} and {plain['worst']:.1f}. Each pass declares itself "
        f"bitwise, close or lossy"
    )


def _compile() -> str:
    eager = _row("passes.json", "eager")["step"]["median"]
    row = _row("passes.json", "Compile alone")["step"]["median"]
    return f"a step {eager * 1e3:.0f} → {row * 1e3:.0f} ms ({eager / row:.2f}×), by blocks"


def _flags() -> str:
    base = _row("flags.json", "compile only")["step"]["median"]
    rows = load_result(RESULTS / "flags.json")["rows"]
    told = [
        f"{r['contender']} {base / r['step']['median'] - 1:+.1%}"
        for r in rows
        if r["role"] == "alone" and not r.get("error") and r["contender"] != "compile only"
    ]
    return f"speed of a step beside compiling without the flag: {', '.join(told)}"


def _channels_last() -> str:
    eager = _row("passes.json", "eager")
    row = _row("passes.json", "MemoryLayout alone")
    steps = [r["step"]["median"] * 1e3 for r in (eager, row)]
    edits = [r["edit"]["median"] for r in (eager, row)]
    return (
        f"nothing: a step {steps[0]:.0f} → {steps[1]:.0f} ms, an edit {edits[0]:.2f} → "
        f"{edits[1]:.2f} s, peak {eager['peak_gib']:.1f} → {row['peak_gib']:.1f} GiB"
    )


def _qkv() -> str:
    eager, row = _row("passes.json", "eager"), _row("passes.json", "QKVFusion alone")
    steps = [r["step"]["median"] * 1e3 for r in (eager, row)]
    return (
        f"nothing: a step {steps[0]:.0f} → {steps[1]:.0f} ms; {row['apply_gib']:+.2f} GiB, since "
        f"the fused weights share storage"
    )


def _symfloat() -> str:
    result = load_result(RESULTS / "symfloat.json")
    version = result["environment"]["packages"]["torch"]
    return f"real, on torch {version}: without the pass {result['without']}; with it, it compiles"


def _cold() -> str:
    result = load_result(RESULTS / "cold.json")
    told = []
    for row in result["rows"]:
        first = row["sizes"][0]
        told.append(
            f"{row['start']}: first run {first['seconds']:.1f} s, of which compiling "
            f"{first['compile_seconds']:.1f} ({first['hits']} of "
            f"{first['hits'] + first['misses']} graphs found)"
        )
    size = result["rows"][-1]["mega_cache"].get("file_bytes")
    return "; ".join(told) + (f"; {size / 2**20:.1f} MiB" if size else "")


def _literal() -> str:
    result = load_result(RESULTS / "literal.json")
    if result["finished"]:
        return f"{result['seconds']:.0f} s"
    return f"not finished after {result['limit_seconds']:.0f} s, and stopped"


def _memory() -> str:
    workload = "edit 1024, 20 steps"
    eager, row = (_row("article.json", name, workload) for name in ("eager", "article, by blocks"))
    return (
        f"peak {eager['peak_gib']:.1f} → {row['peak_gib']:.1f} GiB allocated; the transformer's "
        f"weights alone are 22.2 in bfloat16"
    )


def _energy() -> str:
    eager = _row("bench.json", "eager")
    rows = [
        r
        for r in load_result(RESULTS / "bench.json")["rows"]
        if r.get("weights_gb_per_second") and not r["hits"]
    ]
    best = min(rows, key=lambda r: r["joules"])
    return "; ".join(
        f"{row['contender']}: busy {row['utilisation']:.0%}, {row['joules']:.0f} J an edit, at "
        f"least {row['weights_gb_per_second']:.0f} GB/s of weights read (counted)"
        for row in (eager, best)
    )


def _ladder() -> str:
    rows = [r for r in load_result(RESULTS / "bench.json")["rows"] if not r.get("error")]
    base = next(r for r in rows if r["contender"] == "eager")["edit"]["median"]
    told = [
        f"{r['contender']} {base / r['edit']['median']:.2f}×"
        for r in rows
        if r["role"] in ("control", "alone") and r["contender"] != "eager" and not r["hits"]
    ]
    return f"{', '.join(told)}; a cache gains what it skips, and loses quality for it"


def _warmups() -> str:
    row = _row("warming.json", "faithful")
    seconds = row["edit"]["seconds"][:10]
    rest = mean(seconds[1:])
    return f"{seconds[0]:.1f} s, then {rest:.2f} s on average over the next {len(seconds) - 1}"


def _served() -> str:
    added = load_result(RESULTS / "serving.json")["overhead"]["beside_it"]["median"]
    busy = load_result(RESULTS / "serving_h100.json")["throughput"]
    return (
        f"a request costs {added * 1e3:.0f} ms beside the pipeline; kept busy, "
        f"{busy['served'] * 60:.2f} edits of {busy['steps']} steps a minute, {busy['share']:.1%} "
        "of what the pipeline makes alone"
    )


def _modal() -> str:
    rows = load_result(RESULTS / "cold.json")["rows"]
    row = next(row for row in rows if row["start"] == "with artifacts")
    spent = sum(row["phases"][name] for name in ("imports", "weights", "optimize"))
    first = row["sizes"][0]["seconds"]
    return f"never deployed from here; a start with artifacts took {spent + first:.0f} s"


_EDITS = "python benchmarks/edits.py --full --out edits.json"
_CACHES = "python benchmarks/caches.py --out caches.json"
_PASSES = (
    "python benchmarks/edits.py --full --stacks eager 'QKVFusion alone' 'MemoryLayout alone' "
    "'Compile alone' --workloads 'edit 1024, 20 steps' --out passes.json"
)
_BENCH = (
    "fluxfire bench --random-full --size 1024x1024 -n 1 --passes "
    "qkv-fusion,first-block-cache,compile --out bench.json"
)
_H100 = "H100, random weights, 20 steps"

CLAIMS = (
    Claim("2.63× (8.2 → 3.1 s), “512 × 512”, 20 steps, seed 42", _whole, _H100, _EDITS),
    Claim("ParaAttention caching saves 57% at threshold 0.12", _hit, f"{_H100}, edit 1024", _EDITS),
    Claim("15 / 70 / 90% hits at 0.05 / 0.12 / 0.25", _hits, "Spark, as it decides",
          _CACHES),
    Claim("0% quality loss", _loss, "Spark, 28 steps, threshold 0.12",
          "python benchmarks/frontier.py -n 24 --out frontier.json"),
    Claim("torch.compile 1.54×", _compile, f"{_H100}, edit 1024", _PASSES),
    Claim("its flags add 15, 20, 8 and 25%", _flags, "H100, random weights, edit 1024",
          "python benchmarks/flags.py --full --out flags.json"),
    Claim("max-autotune of the whole model, in reasonable time", _literal, "H100, random weights",
          "python benchmarks/article_literal.py --out literal.json"),
    Claim("channels-last: +45% bandwidth, −30% memory, 1.18×", _channels_last,
          f"{_H100}, edit 1024", _PASSES),
    Claim("QKV fusion: 60% better", _qkv, f"{_H100}, edit 1024", _PASSES),
    Claim("45% × 35% × 15% make 2.63×", _ladder, "H100, random weights, edit 1024", _BENCH),
    Claim("SymFloat crash with a dynamic batch", _symfloat, "H100",
          "python benchmarks/symfloat.py --out symfloat.json"),
    Claim("mega-cache: 45 → 5 s, 2.1 GB, 99.8% of kernels reused", _cold,
          "H100, fresh processes, empty compiler caches",
          "python benchmarks/cold_start.py --full --folder /tmp/kontext --out cold.json"),
    Claim("cold start 75 → 32 s", _cold, "H100, fresh processes",
          "python benchmarks/cold_start.py --full --folder /tmp/kontext --out cold.json"),
    Claim("seconds of the first ten images", _warmups, "H100, random weights, edit 512, `faithful`",
          "python benchmarks/edits.py --full --curve --stacks faithful --workloads "
          "'edit 512, 20 steps' --out warming.json"),
    Claim("VRAM 18.2 → 12.8 GB (−29.7%)", _memory, f"{_H100}, edit 1024", _EDITS),
    Claim("GPU utilisation 78 → 94%, 234 → 341 GB/s, images per watt", _energy,
          "H100, random weights, edit 1024", _BENCH),
    Claim("FastAPI: 3.97 s end to end, 15 images a minute", _served,
          "Spark on loopback; H100, edits 1024, nothing left out",
          "python benchmarks/serving.py --model random-full --parts throughput --steps 28 "
          "--out serving_h100.json"),
    Claim("Modal: 0 → N, < 5 s cold start, R2", _modal, "H100, fresh process, local disk",
          "python benchmarks/cold_start.py --full --folder /tmp/kontext --out cold.json"),
)  # fmt: skip
