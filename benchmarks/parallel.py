"""One edit on several GPUs: steps, whole edits, efficiency, and the share of communication.

torchrun --nproc-per-node 2 benchmarks/parallel.py --full --out benchmarks/results/parallel_2.json
torchrun --nproc-per-node 2 benchmarks/parallel.py --tiny --out /tmp/parallel.json   # on a CPU

Every process runs every stack, those for one GPU too, at the same time as the others; the first
process writes what it measured. A step is the difference of two edits that differ in their number
of steps.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import fluxfire
import full_or_tiny
from fluxfire import presets
from fluxfire.bench import Example, Sample, Workload, save_result, stamp
from fluxfire.bench.timing import time_call
from fluxfire.kontext.random_weights import tiny_kontext
from fluxfire.passes import Attention, Compile, ContextParallel, Float8
from fluxfire.protocol import Pass
from fluxfire.text import human_seconds, table

_COMMUNICATION = ("nccl", "gloo:", "c10d")
FLOAT8 = (Float8(), Attention("fa3-fp8"))
Stacks = dict[str, tuple[Pass, ...]]
EXACT: Stacks = {"eager": (), "compiled by blocks": (Compile(),), "faithful": presets.faithful}
LOSSY: Stacks = {"float8": (*FLOAT8, *presets.faithful), "balanced": presets.balanced}
ONE: Stacks = {f"{name}, one GPU": passes for name, passes in {**EXACT, **LOSSY}.items()}
SHARED: Stacks = {
    f"{name}, {kind}": (*passes, ContextParallel(kind))
    for name, passes in {**EXACT, **LOSSY}.items()
    for kind in ("ulysses", "ring")
    if (name, kind) not in {("balanced", "ring"), ("compiled by blocks", "ring")}
}
DIFFUSERS = "diffusers' Ulysses, compiled by blocks"


def main() -> None:
    """Measure every stack at every size; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    names = [*ONE, *SHARED, DIFFUSERS]
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--sides", type=int, nargs="*", help="of the output, in pixels")
    parser.add_argument("--steps", type=int, nargs=2, default=(4, 28), help="of the two edits")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rank, count = _join(full=arguments.full)

    # Eight heads, since 2, 4 or 8 processes can share them.
    pipe = full_or_tiny.pipeline(full=True) if arguments.full else tiny_kontext(heads=8)
    sides = arguments.sides or ([1024, 512] if arguments.full else [64, 48])
    result: dict[str, Any] = {"benchmark": "parallel", **stamp(), "processes": count, "rows": []}
    stacks: Stacks = {**ONE, **SHARED}
    for name in filter(arguments.only.__contains__, names):  # diffusers' comes last
        passes = _without_compilation(stacks.get(name, ()), full=arguments.full)
        for row in _measure(pipe, name, passes, sides, arguments):
            result["rows"].append(row)
            if rank == 0:
                print(f"{name}, {row['side']}: {row['error'] or row['step']}", flush=True)
                save_result(_with_efficiency(result), arguments.out)
    if rank == 0:
        print(_summary(result["rows"]))
    dist.destroy_process_group()


def _join(*, full: bool) -> tuple[int, int]:
    """Meet the other processes, and take this process's GPU."""
    if full:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if full else "gloo")
    warnings.filterwarnings("ignore", message=".*emulated without a GPU")
    return dist.get_rank(), dist.get_world_size()


def _without_compilation(passes: Sequence[Pass], *, full: bool) -> list[Pass]:
    """Return the passes in order; on a CPU without those that compile for minutes."""
    kept = [p for p in passes if full or p.stage not in ("compile", "artifacts")]
    return fluxfire.order(kept)


def _measure(
    pipe: Any,
    name: str,
    passes: Sequence[Pass],
    sides: Sequence[int],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each size; after an error, rows that say it."""
    left = list(sides)
    try:
        with _applied(pipe, name, passes, full=arguments.full):
            for side in sides:
                row = {**_row(name, passes, side), **_times(pipe, side, passes, arguments)}
                left.remove(side)
                yield row
    except Exception as error:  # noqa: BLE001 - the other stacks go on
        for side in left:
            yield {**_row(name, passes, side), "error": f"{type(error).__name__}: {error}"}


def _row(name: str, passes: Sequence[Pass], side: int) -> dict[str, Any]:
    shares = name == DIFFUSERS or any(p.name == ContextParallel.name for p in passes)
    return {
        "stack": name,
        "passes": [repr(p) for p in passes],
        "side": side,
        "processes": dist.get_world_size() if shares else 1,
        "step": None,
        "edit": None,
        "communication": None,
        "error": "",
    }


@contextmanager
def _applied(pipe: Any, name: str, passes: Sequence[Pass], *, full: bool) -> Iterator[None]:
    """Apply the passes, or diffusers' own parallelism, which stays: nothing undoes it."""
    if name != DIFFUSERS:
        with fluxfire.optimized(pipe, passes):
            yield
        return
    from diffusers import ContextParallelConfig

    if not full:
        raise RuntimeError("diffusers splits a transformer over GPUs only")
    config = ContextParallelConfig(ulysses_degree=dist.get_world_size())
    pipe.transformer.enable_parallelism(config=config)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    yield


def _times(
    pipe: Any, side: int, passes: Sequence[Pass], arguments: argparse.Namespace
) -> dict[str, Any]:
    fewer, more = arguments.steps
    work = full_or_tiny.edit(side, more, full=arguments.full)
    example = full_or_tiny.noise(side)
    work.run(pipe, example, steps=fewer)  # compiles
    work.run(pipe, example, steps=fewer)
    edits = {steps: _edits(pipe, work, example, steps, arguments.rounds) for steps in (fewer, more)}
    step = (edits[more].median - edits[fewer].median) / (more - fewer)
    # A cache skips other steps of a short edit than of a long one.
    skips = any(p.slot == "block-cache" for p in passes)
    spent = _profile(pipe, replace(work, steps=fewer), example, full=arguments.full)
    return {
        "step": None if skips else step,
        "edit": edits[more].to_dict(),
        "communication": spent,
    }


def _edits(pipe: Any, work: Workload, example: Example, steps: int, rounds: int) -> Sample:
    def run() -> object:
        return work.run(pipe, example, steps=steps)

    return Sample.of(time_call(run)[1] for _ in range(rounds))


def _profile(pipe: Any, work: Workload, example: Example, *, full: bool) -> dict[str, float]:
    """Return milliseconds of a step: kernels that communicate, and all kernels.

    A kernel that waits for another process counts as communication.
    """
    activity = ProfilerActivity.CUDA if full else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work.run(pipe, example)
    events = profiler.key_averages()
    spent = {e.key: e.self_device_time_total if full else e.self_cpu_time_total for e in events}
    told = {n: us for n, us in spent.items() if any(part in n.lower() for part in _COMMUNICATION)}
    per_step = 1e3 * work.steps
    return {"ms": sum(told.values()) / per_step, "of_ms": sum(spent.values()) / per_step}


def _with_efficiency(result: dict[str, Any]) -> dict[str, Any]:
    """Add to each shared stack what share of the GPUs' time it uses as well as one GPU does."""
    rows = result["rows"]
    one = {(r["stack"].removesuffix(", one GPU"), r["side"]): r for r in rows}
    for row in rows:
        stack = row["stack"].rsplit(", ", 1)[0]
        stack = "compiled by blocks" if row["stack"] == DIFFUSERS else stack
        alone = one.get((stack, row["side"]))
        if row["error"] or row["processes"] == 1 or not alone or alone["error"]:
            continue
        steps = (alone["step"], row["step"])
        if None in steps:
            steps = (alone["edit"]["median"], row["edit"]["median"])
        row["speedup"] = steps[0] / steps[1]
        row["efficiency"] = row["speedup"] / row["processes"]
    return result


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["error"]:
            lines.append((row["stack"], row["side"], row["error"][:80], "", "", "", ""))
            continue
        told, of_all = row["communication"]["ms"], row["communication"]["of_ms"]
        lines.append(
            (
                row["stack"],
                row["side"],
                human_seconds(row["step"]) if row["step"] else "",
                human_seconds(row["edit"]["median"]),
                f"{row['speedup']:.2f}x" if "speedup" in row else "",
                f"{row['efficiency']:.0%}" if "efficiency" in row else "",
                f"{told / of_all:.0%}" if row["processes"] > 1 and of_all else "",
            )
        )
    head = ("stack", "side", "a step", "an edit", "to one GPU", "efficiency", "communication")
    return table(head, lines)


if __name__ == "__main__":
    main()
