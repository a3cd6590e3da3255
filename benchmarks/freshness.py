"""What it costs to look whether weights changed, what such a look sees, and that nothing grows.

python benchmarks/freshness.py --full --out benchmarks/results/freshness.json    # needs a GPU
python benchmarks/freshness.py --tiny --out /tmp/freshness.json                  # a minute on a CPU
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fluxfire
import full_or_tiny
from fluxfire import presets
from fluxfire.bench import stamp
from fluxfire.passes import (
    Attention,
    EncodingCache,
    Float8,
    FusedBlocks,
    MemoryLayout,
    ModulationTable,
    QKVFusion,
    ReferenceCache,
)
from fluxfire.protocol import Pass
from fluxfire.runtime.conductor import conductor_of
from fluxfire.runtime.freshness import Watch
from fluxfire.testing import edit, tiny_kontext
from fluxfire.text import table

LOOKS = 21
CYCLES = 50
PREPARED: tuple[tuple[str, tuple[Pass, ...]], ...] = (
    ("FusedBlocks", (FusedBlocks(),)),
    ("QKVFusion", (QKVFusion(),)),
    ("ModulationTable(host=True)", (ModulationTable(host=True),)),
    ("Attention('fa3-fp8')", (Attention("fa3-fp8"),)),
    ("ReferenceCache", (ReferenceCache(),)),
    ("Float8", (Float8(),)),
    ("faithful", presets.faithful),
)


def milliseconds(call: Callable[[], object]) -> dict[str, float]:
    """Time a call on the host's clock, the device's work included: median and spread."""
    took = []
    for _ in range(LOOKS):
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        took.append(1e3 * (time.perf_counter() - began))
    took = sorted(took[1:])
    return {"median": median(took), "least": took[0], "most": took[-1]}


def look_costs(pipe: Any) -> dict[str, dict[str, float]]:
    """Time a look at each encoder, and what each pass does before a generation."""
    costs = {}
    for name in ("text_encoder", "text_encoder_2", "vae"):
        watch = Watch([pipe.components[name]])
        costs[f"EncodingCache: {name}"] = milliseconds(watch.changed)
    for name, passes in PREPARED:
        plan = fluxfire.plan(pipe, passes)
        if not plan.ok:
            print(name, plan.complaints(), flush=True)
            continue
        with fluxfire.optimized(pipe, passes):
            conductor: Any = conductor_of(pipe)
            conductor.prepare()
            costs[f"{name}: before a generation"] = milliseconds(conductor.prepare)
        print(name, costs[f"{name}: before a generation"], flush=True)
    return costs


def encoding(pipe: Any, side: int) -> dict[str, dict[str, float]]:
    """Time encoding a prompt and a picture: plain, and with `EncodingCache`, which knows both."""
    vae = pipe.vae
    picture = torch.randn(1, 3, side, side, device=vae.device, dtype=vae.dtype)

    @torch.no_grad()
    def encode() -> None:
        pipe.encode_prompt("make it a snowy winter evening", max_sequence_length=512)
        vae.encode(picture)

    with fluxfire.optimized(pipe, [EncodingCache()]):
        encode()
        known = milliseconds(encode)
    return {"plain": milliseconds(encode), "known": known}


def seen(pipe: Any) -> dict[str, bool]:
    """Say which writes through `.data`, past torch's counter, a look sees, by where weights are."""
    result = {}
    block = pipe.transformer.single_transformer_blocks[-1]
    on_device = {
        "a matrix of T5 on the device": pipe.text_encoder_2.encoder.block[1].layer[1].layer_norm,
        "a matrix of the transformer on the device": block.proj_mlp,
    }
    on_device["a matrix of T5 on the device"] = next(
        part
        for part in pipe.text_encoder_2.encoder.block[1].modules()
        if isinstance(part, torch.nn.Linear)
    )
    for where, linear in on_device.items():
        for how, write in WRITES.items():
            watch = Watch([linear])
            write(linear.weight)
            result[f"{how}, {where}"] = watch.changed()
    with fluxfire.optimized(pipe, [Float8()]):
        for how, write in WRITES.items():
            watch = Watch(part for part in block.modules() if isinstance(part, torch.nn.Linear))
            write(block.proj_mlp.weight)
            result[f"{how}, a matrix that Float8 keeps in host memory"] = watch.changed()
    return result


def _merged(weight: torch.Tensor) -> None:
    """Add a LoRA of rank 4, as PEFT does; in bfloat16 most numbers do not even change."""
    up = torch.randn(weight.shape[0], 4, device=weight.device, dtype=weight.dtype)
    down = torch.randn(4, weight.shape[1], device=weight.device, dtype=weight.dtype)
    weight.data += (up @ down) * 1e-5


def _row(weight: torch.Tensor) -> None:
    weight.data[weight.shape[0] // 3] *= 1.5


def _column(weight: torch.Tensor) -> None:
    weight.data[:, weight.shape[1] // 3] *= 1.5


def _number(weight: torch.Tensor) -> None:
    weight.data[weight.shape[0] // 3, weight.shape[1] // 3] += 1


WRITES = {"a LoRA merged": _merged, "a row": _row, "a column": _column, "one number": _number}


def requantized(pipe: Any) -> float:
    """Return the seconds that quantizing anew takes, after a state dict was loaded."""
    with fluxfire.optimized(pipe, [Float8()]):
        conductor: Any = conductor_of(pipe)
        conductor.prepare()
        with torch.no_grad():
            pipe.transformer.single_transformer_blocks[0].proj_out.weight.mul_(1.01)
        _wait()
        began = time.perf_counter()
        conductor.prepare()
        _wait()
        return time.perf_counter() - began


def growth(device: str) -> dict[str, list[int]]:
    """Return the bytes allocated after each tenth of many rounds, for each pass, tiny."""
    found = {}
    for name, passes in (
        *PREPARED[:-1],
        ("MemoryLayout", (MemoryLayout(),)),
        ("EncodingCache", (EncodingCache(),)),
    ):
        pipe: Any = tiny_kontext(dtype=torch.bfloat16).to(device)
        if not fluxfire.plan(pipe, passes).ok:
            continue
        allocated = []
        for cycle in range(CYCLES):
            with fluxfire.optimized(pipe, passes):
                edit(pipe, steps=1)
            if cycle % (CYCLES // 10) == CYCLES // 10 - 1:
                gc.collect()
                allocated.append(_allocated())
        found[f"{name}: optimize, edit, restore"] = allocated
        fluxfire.optimize(pipe, passes)
        allocated = []
        for cycle in range(CYCLES):
            edit(pipe, steps=1, prompt=f"edit number {cycle % 7}")
            if cycle % (CYCLES // 10) == CYCLES // 10 - 1:
                gc.collect()
                allocated.append(_allocated())
        found[f"{name}: edits"] = allocated
        fluxfire.restore(pipe)
    exchanged = []
    for cycle in range(20):
        pipe = fluxfire.optimize(
            tiny_kontext(seed=cycle, dtype=torch.bfloat16).to(device), [Float8(), EncodingCache()]
        )
        edit(pipe, steps=1)
        gc.collect()
        exchanged.append(_allocated())
    found["20 pipelines, one after another"] = exchanged
    return found


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, keep."""
    parser = full_or_tiny.parser(__doc__)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "freshness", **stamp()}

    def keep() -> None:
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")

    result["allocated"] = growth("cuda" if arguments.full else "cpu")
    keep()
    pipe = full_or_tiny.pipeline(full=arguments.full)
    result["milliseconds"] = look_costs(pipe)
    keep()
    result["encoding"] = encoding(pipe, full_or_tiny.side(full=arguments.full))
    result["seen"] = seen(pipe)
    result["requantize_seconds"] = requantized(pipe)
    keep()
    rows = [
        (name, *(f"{took[k]:.2f}" for k in ("median", "least", "most")))
        for name, took in result["milliseconds"].items()
    ]
    print(table(("a look, ms", "median", "least", "most"), rows))
    print(
        table(("a write through .data", "seen"), [(k, str(v)) for k, v in result["seen"].items()])
    )
    print("encoding", result["encoding"])
    print(f"quantizing anew: {result['requantize_seconds']:.2f} s")
    for name, allocated in result["allocated"].items():
        print(f"{name}: {allocated}")


if __name__ == "__main__":
    main()
