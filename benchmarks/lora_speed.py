"""A step with a LoRA, folded or not, and what exchanging one costs.

python benchmarks/lora_speed.py --full --out benchmarks/results/lora_speed.json  # needs a GPU
python benchmarks/lora_speed.py --tiny --out /tmp/lora_speed.json                # a minute on a CPU
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import LoraConfig

import fluxfire
import full_or_tiny
from fluxfire import presets
from fluxfire.bench import save_result, stamp
from fluxfire.bench.timing import time_call
from fluxfire.passes import Float8, FoldedLora
from fluxfire.protocol import Pass
from fluxfire.reporting.compile_counts import count_compilations
from fluxfire.text import human_seconds, table

RANK = 16
LAYERS = [
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
    "net.0.proj", "net.2", "proj_mlp",
]  # fmt: skip
FAITHFUL = presets.faithful
STACKS: dict[str, tuple[Pass, ...]] = {
    "eager": (),
    "faithful": FAITHFUL,
    "folded-lora + faithful": tuple(fluxfire.order([FoldedLora(), *FAITHFUL])),
    "float8 + faithful": tuple(fluxfire.order([Float8(), *FAITHFUL])),
}


def load_lora(pipe: Any, name: str, seed: int) -> None:
    """Load a LoRA of random numbers on all projections, outputs and MLPs of the blocks."""
    single = [
        f"single_transformer_blocks.{i}.proj_out"
        for i in range(len(pipe.transformer.single_transformer_blocks))
    ]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*LAYERS, *single])
    pipe.transformer.add_adapter(config, adapter_name=name)
    generator = torch.Generator(pipe.device).manual_seed(seed)
    for where, weight in pipe.transformer.named_parameters():
        if f".{name}." in where:  # lora_B begins with zeros
            made = torch.randn(weight.shape, generator=generator, device=pipe.device) * 0.01
            weight.data = made.to(weight)


class Editor:
    """Edits with one pipeline, and measures.

    Attributes:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any, call: dict[str, Any], steps: int) -> None:
        self.pipe, self._call, self._steps = pipe, call, steps

    def seconds(self, steps: int | None = None, **call: Any) -> float:
        """Edit once; return the seconds."""
        call = {**self._call, "num_inference_steps": steps or self._steps, **call}
        _, seconds = time_call(partial(self.pipe, **call))
        return seconds

    def step(self, rounds: int) -> dict[str, Any]:
        """Time a step: the difference of two lengths of edits, over the difference in steps."""
        few = 2
        taken = []
        for _ in range(rounds):
            longer, shorter = self.seconds(), self.seconds(few)
            taken.append((longer - shorter) / (self._steps - few))
        return {"median": median(taken), "seconds": taken}

    def first(self, do: Callable[[], object], **call: Any) -> dict[str, Any]:
        """Do something, then edit; say what the first edit takes beyond the second."""
        _, doing = time_call(do)
        with count_compilations() as counted:
            first = self.seconds(2, **call)
        again = self.seconds(2, **call)
        return {
            "doing": doing, "first": first, "second": again, "beyond": first - again,
            "compilations": counted.compiles,
        }  # fmt: skip


def measure(name: str, passes: tuple[Pass, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one list of passes: without a LoRA, with one, and exchanging it."""
    torch.compiler.reset()
    pipe = full_or_tiny.pipeline(full=arguments.full)
    side = full_or_tiny.side(full=arguments.full)
    example = full_or_tiny.noise(side)
    size = {} if arguments.full else {"height": side, "width": side, "max_area": side * side}
    call = {
        "image": example.picture, "prompt": example.instruction, "output_type": "latent",
        "max_sequence_length": 512 if arguments.full else 32, "_auto_resize": arguments.full,
        **size,
    }  # fmt: skip
    fluxfire.optimize(pipe, passes)
    editor = Editor(pipe, call, arguments.steps)
    row: dict[str, Any] = {"name": name}
    editor.seconds(2)
    editor.seconds(2)
    row["without"] = editor.step(arguments.rounds)
    row["loaded"] = editor.first(lambda: load_lora(pipe, "one", 1))
    row["with"] = editor.step(arguments.rounds)
    row["scaled"] = editor.first(lambda: pipe.set_adapters(["one"], [0.5]))
    row["scale of a call"] = editor.first(lambda: None, joint_attention_kwargs={"scale": 0.7})
    editor.seconds(2)

    def exchange() -> None:
        pipe.delete_adapters("one")
        load_lora(pipe, "two", 2)

    row["exchanged"] = editor.first(exchange)
    row["unloaded"] = editor.first(pipe.unload_lora_weights)
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    fluxfire.restore(pipe)
    return row


def main() -> None:
    """Measure every stack; rows are saved after each."""
    parser = full_or_tiny.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=list(STACKS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "lora_speed", **stamp(), "rank": RANK, "layers": LAYERS,
        "steps": arguments.steps, "rows": rows,
    }  # fmt: skip
    for name, passes in STACKS.items():
        if arguments.only and name not in arguments.only:
            continue
        rows.append(measure(name, passes, arguments))
        save_result(result, arguments.out)
        print(rows[-1], flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    events = ("loaded", "scaled", "scale of a call", "exchanged", "unloaded")
    lines = [
        (
            row["name"],
            human_seconds(row["without"]["median"]),
            human_seconds(row["with"]["median"]),
            *(f"{row[e]['beyond']:.2f} s, {row[e]['compilations']}" for e in events),
        )
        for row in rows
    ]
    print(table(("stack", "a step", "with a LoRA", *events), lines))


if __name__ == "__main__":
    main()
