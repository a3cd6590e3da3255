"""What an edit takes on a smaller card: seconds, memory, and bytes over the bus.

An allocator's limit imitates the card's memory, not its speed: the memory is what counts here, and
the seconds are those of the GPU that this runs on. Each case is a process of its own.

python benchmarks/low_memory.py --full --out benchmarks/results/low_memory.json     # needs a GPU
python benchmarks/low_memory.py --tiny --out /tmp/low_memory.json                   # on a CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fluxfire
import full_or_tiny
from fluxfire import presets
from fluxfire.bench import save_result, stamp
from fluxfire.bench.timing import time_call
from fluxfire.passes import Float8, Int8, Int8TextEncoder, ModulationTable, Placement
from fluxfire.text import table

GIB = 2**30
WIDE = (1360, 768)
LOW_MEMORY = (Placement(), Int8(), Int8TextEncoder(), ModulationTable(host=True))
PROMPTS = (full_or_tiny.INSTRUCTION, "remove the person on the left, keep everything else")


def resident(pipe: Any) -> None:
    """Float8 with the whole pipeline on the GPU: what the others are compared with."""
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    fluxfire.optimize(pipe, fluxfire.order([Float8(), *presets.faithful]))


def eight_bits(pipe: Any) -> None:
    """All that saves memory, T5 in float8 too."""
    fluxfire.optimize(pipe, fluxfire.order([*LOW_MEMORY, *presets.faithful]))


def as_little_as_needed(pipe: Any) -> None:
    """`faithful`, and what `memory="auto"` adds to it."""
    fluxfire.optimize(pipe, "faithful", memory="auto")


def model_offload(pipe: Any) -> None:
    """Offload whole models, as diffusers does."""
    pipe.enable_model_cpu_offload()


def group_offload(pipe: Any) -> None:
    """Offload groups of layers, as diffusers does, with transfers beside the work."""
    pipe.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True
    )


def sequential_offload(pipe: Any) -> None:
    """Offload each layer, as accelerate does."""
    pipe.enable_sequential_cpu_offload()


WAYS: dict[str, Callable[[Any], None]] = {
    way.__name__: way
    for way in (
        resident, eight_bits, as_little_as_needed, model_offload, group_offload, sequential_offload,
    )
}  # fmt: skip
CASES: list[tuple[str, float | None]] = [
    ("resident", None),
    ("eight_bits", 23.5),
    ("eight_bits", 15.5),
    ("eight_bits", 11.5),
    ("as_little_as_needed", 23.5),
    ("as_little_as_needed", 15.5),
    ("group_offload", 15.5),
    ("group_offload", 11.5),
    ("model_offload", 23.5),
    ("sequential_offload", 11.5),
]
"""What to run, and under which limit in GiB."""


def host_pipeline(*, full: bool) -> Any:
    """Return random weights in host memory, made on the GPU, which is faster."""
    pipe = full_or_tiny.pipeline(full=full)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to("cpu")
    gc.collect()
    return pipe


def bytes_to_device(do: Callable[[], object]) -> int | None:
    """Return how many bytes a call copies from the host to the device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        do()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    copies = (e for e in events if "HtoD" in e.get("name", "") and "args" in e)
    return sum(int(e["args"].get("bytes", 0)) for e in copies)


def run_one(way: str, limit: float | None, steps: int, *, full: bool) -> dict[str, Any]:
    """Run one case in this process."""
    pipe = host_pipeline(full=full)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if limit is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(limit * GIB / total)
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    WAYS[way](pipe)
    row: dict[str, Any] = {"preparing": time.perf_counter() - began}
    example = full_or_tiny.noise(full_or_tiny.side(full=full))
    few = 2
    sides = {} if full else {"height": 64, "width": 64, "max_area": 64 * 64}

    def edit(prompt: str, count: int, **size: int) -> Any:
        return pipe(
            image=example.picture, prompt=prompt, num_inference_steps=count, output_type="pt",
            max_sequence_length=512 if full else 32, _auto_resize=full, **(size or sides),
        )  # fmt: skip

    _, row["first"] = time_call(lambda: edit(PROMPTS[0], few))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    edits = {
        name: time_call(lambda p=prompt: edit(p, steps))[1]  # type: ignore[misc]
        for name, prompt in zip(("known prompt", "new prompt"), PROMPTS, strict=True)
    }
    taken = []
    for _ in range(2):
        short = time_call(lambda: edit(PROMPTS[1], few))[1]
        long = time_call(lambda: edit(PROMPTS[1], steps))[1]
        taken.append((long - short) / (steps - few))
    row |= {"edits": edits, "step": median(taken), "steps": taken}
    row["bytes_to_device"] = bytes_to_device(lambda: edit(PROMPTS[0], few))
    if full and way == "eight_bits":
        wide = {"width": WIDE[0], "height": WIDE[1], "max_area": WIDE[0] * WIDE[1]}
        row["wide"] = time_call(lambda: edit(PROMPTS[0], few, **wide))[1]
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    row["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    row["facts"] = {p.name: dict(p.facts) for p in fluxfire.report(pipe).passes if p.facts}
    return row


def run_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the cases one after another, each in a process of its own."""
    for way, limit in CASES:
        if arguments.only and f"{way} {limit}" not in arguments.only:
            continue
        steps = 4 if way == "sequential_offload" else arguments.steps
        command = [
            sys.executable, __file__, "--full" if arguments.full else "--tiny", "--out", "-",
            "--one", way, str(limit or 0), "--steps", str(steps),
        ]  # fmt: skip
        row: dict[str, Any] = {"way": way, "limit_gib": limit}
        try:
            done = subprocess.run(  # noqa: S603 - this script itself
                command, capture_output=True, text=True, check=False, timeout=arguments.seconds,
                env=dict(os.environ),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield {**row, "error": f"it took longer than {arguments.seconds} s"}
            continue
        if done.returncode == 0:
            yield {**row, **json.loads(done.stdout.splitlines()[-1])}
        else:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            yield {**row, "error": lines[-1][:300]}


def main() -> None:
    """Run every case; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--only", nargs="*", help='cases such as "eight_bits 15.5"')
    parser.add_argument("--seconds", type=int, default=150, help="limit of a case")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "GIB"), help="run this case here")
    arguments = parser.parse_args()
    if arguments.one:
        way, limit = arguments.one
        row = run_one(way, float(limit) or None, arguments.steps, full=arguments.full)
        print(json.dumps(row))
        return
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "low_memory", **stamp(), "steps": arguments.steps, "rows": rows}
    for row in run_all(arguments):
        rows.append(row)
        save_result(result, arguments.out)
        print(row, flush=True)
    lines = [
        (
            row["way"], row["limit_gib"] or "none", row.get("error")
            or f"{row['step'] * 1000:.0f} ms a step, new prompt {row['edits']['new prompt']:.1f} s",
            f"{row.get('peak_gib', 0):.1f} GiB",
        )
        for row in rows
    ]  # fmt: skip
    print(table(("way", "limit, GiB", "edit", "peak"), lines))


if __name__ == "__main__":
    main()
