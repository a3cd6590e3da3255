"""How long the article's own whole-model autotuning takes to compile, up to a limit.

python benchmarks/article_literal.py --limit 300 --out benchmarks/results/literal.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

import fluxfire
from edits import uncached
from fluxfire.bench import Example, Workload, save_result, stamp
from fluxfire.loading import RANDOM, load
from fluxfire.passes import Compile

# One graph of the whole model holds no cache.
LITERAL = [
    replace(p, region="transformer", vae=True, fullgraph=False) if isinstance(p, Compile) else p
    for p in uncached(fluxfire.presets.article)
]


def main() -> None:
    """Compile in a process of its own, and stop it at the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, required=True, help="seconds")
    parser.add_argument("--model", choices=RANDOM, default="random-full")
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Queue()
    work = (arguments.model, arguments.side, ready, done)
    process = spawn.Process(target=_edit_twice, args=work, daemon=True)
    process.start()
    ready.wait()
    began = time.perf_counter()
    process.join(arguments.limit)
    seconds = time.perf_counter() - began
    finished = not process.is_alive()
    process.kill()
    result: dict[str, Any] = {
        "benchmark": "article_literal",
        **stamp(),
        "passes": [repr(p) for p in LITERAL],
        "limit_seconds": arguments.limit,
        "finished": finished,
        "seconds": seconds,
        "generations": done.get() if finished and process.exitcode == 0 else None,
    }
    save_result(result, arguments.out)
    print(f"finished: {finished}, after {seconds:.0f} s")


def _edit_twice(model: str, side: int, ready: Any, done: Any) -> None:
    pipe = fluxfire.optimize(load(model), LITERAL)
    example = Example("make it a snowy winter evening", Image.new("RGB", (side, side), "olive"))
    resize = model == "random-full"
    load_ = Workload(name="edit", size=(side, side), steps=2, auto_resize=resize)
    ready.set()
    for _ in range(2):
        load_.run(pipe, example)
    done.put(fluxfire.report(pipe).to_dict()["generations"])


if __name__ == "__main__":
    main()
