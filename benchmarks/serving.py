"""The service on loopback: what it adds to the pipeline, and throughput.

`serve_load.py` measures it under load.

python benchmarks/serving.py --parts overhead --out benchmarks/results/serving.json
python benchmarks/serving.py --model random-full --parts throughput --steps 28 \
    --out benchmarks/results/serving_h100.json                                   # needs a GPU
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx

# As the command line sets it: threads that spin while they wait slow a shared CPU down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from PIL import Image

import fluxfire
from fluxfire.bench import held_out, save_result, stamp
from fluxfire.kontext import KONTEXT
from fluxfire.loading import load
from fluxfire.serve.quality_levels import default_passes
from served import PATIENCE, body, server, spread

PARTS = ("overhead", "throughput")
_INSTRUCTION = "make it a snowy winter evening"


def main() -> None:
    """Measure the parts asked for; what is known is saved after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="spark")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["overhead"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=1024, help="of a picture, for throughput")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    result: dict[str, Any] = {"benchmark": "serving", **stamp(), "model": arguments.model}
    result["cores"] = os.cpu_count()
    for part in arguments.parts:
        if part == "overhead":
            result[part] = overhead(arguments.model, arguments.steps)
        else:
            result[part] = throughput(arguments.model, arguments.steps, arguments.side)
        save_result(result, arguments.out)
        print(part, result[part], flush=True)


def overhead(model: str, steps: int, runs: int = 60) -> dict[str, Any]:
    """Seconds of one edit after the other: by the pipeline itself, and by the service."""
    examples = held_out(runs)
    with _bare(model) as edit:
        bare = [
            _seconds(lambda e=e: edit(e.picture, e.instruction, steps))
            for e in [*examples[:5], *examples]
        ][5:]
    with server(model) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as client:
        served, inside = [], []
        for example in examples:
            asked = body(example.instruction, example.picture, steps, "faithful", 0)
            began = time.perf_counter()
            answer = client.post("/inference", json=asked).raise_for_status().json()
            served.append(time.perf_counter() - began)
            inside.append(answer["inference_time"])
    beside = [whole - part for whole, part in zip(served, inside, strict=True)]
    return {
        "steps": steps,
        "bare": spread(bare),
        "served": spread(served),
        "in_the_pipeline": spread(inside),
        "beside_it": spread(beside),
    }


def throughput(model: str, steps: int, side: int, runs: int = 8) -> dict[str, Any]:
    """Pictures a minute: by the pipeline one after the other, and by the service kept busy.

    The pipeline goes before the service and after it: a GPU that grows warm slows down.
    """
    picture = Image.effect_noise((side, side), 60).convert("RGB")
    asked: dict[str, Any] = {"width": side, "height": side}
    asked |= body(_INSTRUCTION, picture, steps, "faithful", 0)
    before = _bare_rate(model, picture, steps, runs)
    with server(model, "--max-batch", "1", "--warm-up", f"{side}x{side}") as (url, _):
        served, inside = asyncio.run(_busy(url, asked, runs))
    after = _bare_rate(model, picture, steps, runs)
    return {
        "steps": steps,
        "side": side,
        "runs": runs,
        "bare": [before, after],
        "served": served,
        "share": served / fmean([before, after]),
        "in_the_pipeline": inside,
    }


def _bare_rate(model: str, picture: Image.Image, steps: int, runs: int) -> float:
    """Pictures a second of the pipeline by itself."""
    call = KONTEXT.exact_size(*picture.size)
    with _bare(model) as edit:

        def make(n: int) -> None:
            for _ in range(n):
                edit(picture, _INSTRUCTION, steps, **call)

        make(2)  # compiles
        return runs / _seconds(lambda: make(runs))


async def _busy(url: str, asked: dict[str, Any], runs: int) -> tuple[float, float]:
    """Keep the service busy with two clients.

    Returns:
        Pictures a second, and the share of the time that the pipeline worked.
    """
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
        left = iter(range(runs))
        inside: list[float] = []

        async def client() -> None:
            for _ in left:
                answer = (await http.post("/inference", json=asked)).raise_for_status().json()
                inside.append(answer["inference_time"])

        (await http.post("/inference", json=asked)).raise_for_status()
        began = time.perf_counter()
        await asyncio.gather(client(), client())
        took = time.perf_counter() - began
        return runs / took, sum(inside) / took


@contextlib.contextmanager
def _bare(model: str) -> Iterator[Callable[..., None]]:
    """Load the pipeline as the service does; what is yielded edits with it."""
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    fluxfire.optimize(pipe, default_passes(pipe.device.type))

    def edit(picture: Image.Image, prompt: str, steps: int, **call: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        pipe(image=picture, prompt=prompt, num_inference_steps=steps, generator=generator, **call)

    yield edit
    pipe.to("meta")  # whoever still holds it, its memory is free
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
