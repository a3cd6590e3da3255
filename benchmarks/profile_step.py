"""Where the time of one denoising step goes: every kernel, with its milliseconds and calls.

python benchmarks/profile_step.py --out benchmarks/results/profile.json
python benchmarks/profile_step.py --model random-tiny --side 64 --out /tmp/profile.json
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import fluxfire
from fluxfire import presets
from fluxfire.bench import Example, Workload, save_result, stamp
from fluxfire.extend import Change, Finding, Target, Transaction
from fluxfire.loading import RANDOM, load
from fluxfire.model import Call
from fluxfire.passes import (
    Attention,
    Compile,
    FirstBlockCache,
    Float8,
    FusedBlocks,
    ModulationTable,
    QKVFusion,
)
from fluxfire.protocol import Exactness, Pass, Stage
from fluxfire.runtime.generation import Listener


@dataclass(frozen=True, kw_only=True)
class ProfileStep(Listener):
    """Profiles one step of every generation: a pass, applied like any other."""

    profiler: profile = field(repr=False)
    step: int

    name: ClassVar[str] = "profile-step"
    stage: ClassVar[Stage] = "environment"
    slot: ClassVar[str | None] = None
    exactness: ClassVar[Exactness] = "bitwise"

    def check(self, target: Target) -> tuple[Finding, ...]:  # noqa: ARG002
        """Find nothing."""
        return ()

    def apply(self, tx: Transaction) -> Change:
        """Listen."""
        tx.listen(self)
        return Change(1, "profilers attached")

    def around(self, call: Call) -> AbstractContextManager[object]:
        """Profile a step after the first, which may compile."""
        return self.profiler if call.step == self.step else nullcontext()


STEPS = 4
_BLOCKS = (FusedBlocks(), ModulationTable(), Compile())
STACKS: dict[str, tuple[Pass, ...]] = {
    "faithful": presets.faithful,
    "fused": (QKVFusion(), *_BLOCKS),
    "float8": (Float8(), *_BLOCKS),
    "float8 attention": (Float8(), Attention("fa3-fp8"), *_BLOCKS),
    "hit": (*presets.faithful[:-1], FirstBlockCache(schedule=(STEPS - 1,)), Compile()),
}


def main() -> None:
    """Edit in four steps and profile the last, which is a cache's hit where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RANDOM, default="random-full")
    parser.add_argument("--stack", choices=STACKS, default="faithful")
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    pipe = load(arguments.model)
    side, resize = arguments.side, arguments.model == "random-full"
    work = Workload(name="edit", size=(side, side), steps=STEPS, auto_resize=resize)
    picture = Image.new("RGB", (side, side), "olive")
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[activity])
    with fluxfire.optimized(
        pipe, [ProfileStep(profiler=profiler, step=STEPS - 1), *STACKS[arguments.stack]]
    ):
        work.run(pipe, Example("make it a snowy winter evening", picture))
    save_result(
        {
            "benchmark": "profile",
            **stamp(),
            "passes": [repr(p) for p in STACKS[arguments.stack]],
            "kernels": _kernels(profiler, on_gpu),
        },
        arguments.out,
    )


def _kernels(profiler: profile, on_gpu: bool) -> list[dict[str, Any]]:
    """List kernels, the costliest first."""
    rows = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            rows.append({"name": event.key, "ms": spent / 1e3, "calls": event.count})
    return sorted(rows, key=lambda row: -row["ms"])


if __name__ == "__main__":
    main()
