"""The service on loopback: what it adds to the pipeline, a thousand mixed requests, throughput.

python benchmarks/serving.py --parts overhead mixed --out benchmarks/results/serving.json
python benchmarks/serving.py --parts overhead mixed -n 40 --out /tmp/serving.json    # a try
python benchmarks/serving.py --model random-full --parts throughput --steps 28 \
    --out benchmarks/results/serving_h100.json                                   # needs a GPU
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gc
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import httpx
import numpy as np

# As the command line sets it: threads that spin while they wait slow a shared CPU down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from PIL import Image

import fluxfire
from fluxfire.bench import held_out, save_result, stamp
from fluxfire.kontext import KONTEXT
from fluxfire.loading import load
from fluxfire.serve.quality_levels import default_passes

PARTS = ("overhead", "mixed", "throughput")
TOLERANCE = 3
"""Grey levels that a pixel may differ by between a batch and a run alone."""
_CLIENTS = 8
_MALFORMED, _HUNG_UP = 0.02, 0.02
_PATIENCE = 600.0
_INSTRUCTION = "make it a snowy winter evening"


def main() -> None:
    """Measure the parts asked for; what is known is saved after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="spark")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["overhead", "mixed"])
    parser.add_argument("-n", type=int, default=1000, help="mixed requests")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=1024, help="of a picture, for throughput")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    result: dict[str, Any] = {"benchmark": "serving", **stamp(), "model": arguments.model}
    result["cores"] = os.cpu_count()
    for part in arguments.parts:
        if part == "overhead":
            result[part] = overhead(arguments.model, arguments.steps)
        elif part == "mixed":
            result[part] = asyncio.run(mixed(arguments.model, arguments.n))
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
    with _server(model) as (url, _), httpx.Client(base_url=url, timeout=_PATIENCE) as client:
        served, inside = [], []
        for example in examples:
            body = _body(example.instruction, example.picture, steps, "faithful", 0)
            began = time.perf_counter()
            answer = client.post("/inference", json=body).raise_for_status().json()
            served.append(time.perf_counter() - began)
            inside.append(answer["inference_time"])
    beside = [whole - part for whole, part in zip(served, inside, strict=True)]
    return {
        "steps": steps,
        "bare": _spread(bare),
        "served": _spread(served),
        "in_the_pipeline": _spread(inside),
        "beside_it": _spread(beside),
    }


def throughput(model: str, steps: int, side: int, runs: int = 8) -> dict[str, Any]:
    """Pictures a minute: by the pipeline one after the other, and by the service kept busy.

    The pipeline goes before the service and after it: a GPU that grows warm slows down.
    """
    picture = Image.effect_noise((side, side), 60).convert("RGB")
    body = {"width": side, "height": side}
    body |= _body(_INSTRUCTION, picture, steps, "faithful", 0)
    before = _bare_rate(model, picture, steps, runs)
    with _server(model, "--max-batch", "1", "--warm-up", f"{side}x{side}") as (url, _):
        served, inside = asyncio.run(_busy(url, body, runs))
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


async def mixed(model: str, n: int) -> dict[str, Any]:
    """Many requests of all kinds: some are wrong, some hang up, and the worker is killed once."""
    rng = random.Random(0)  # noqa: S311 - which request comes when
    asks = _asks(model)
    expected = _alone(model, asks)
    told: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[dict[str, int]] = []
    with _server(model, "--max-queue", "64") as (url, process):
        numbers = iter(range(n))
        killed = n // 2

        async def client(http: httpx.AsyncClient) -> None:
            for number in numbers:
                if number in {n // 10, n - 1}:
                    memory.append(_memory(process.pid))
                if number == killed:
                    os.kill(_children(process.pid)[0], signal.SIGKILL)
                dice = rng.random()
                if dice < _MALFORMED:
                    told[await _malformed(http, rng)] += 1
                elif dice < _MALFORMED + _HUNG_UP:
                    told[await _hang_up(http, rng.choice(asks))] += 1
                else:
                    ask = rng.randrange(len(asks))
                    told[await _right(http, asks[ask], expected[ask], wrong)] += 1

        began = time.perf_counter()
        async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE) as http:
            await asyncio.gather(*(client(http) for _ in range(_CLIENTS)))
            seconds = time.perf_counter() - began
            counted = (await http.get("/metrics")).text
    deaths = re.search(r"^fluxfire_worker_restarts_total (\S+)", counted, re.MULTILINE)
    return {
        "requests": n,
        "clients": _CLIENTS,
        "seconds": seconds,
        "answers": dict(told),
        "wrong": wrong,
        "tolerance": TOLERANCE,
        "memory": memory,
        "worker_deaths": float(deaths[1]) if deaths else None,
    }


async def _right(
    http: httpx.AsyncClient, ask: dict[str, Any], expected: np.ndarray, wrong: list[str]
) -> str:
    """Ask for an edit, and compare it with the same made alone; a full queue is asked again."""
    while True:
        if ask.get("form"):
            fields = {k: str(v) for k, v in ask["body"].items() if k != "image"}
            file = {"image": ("a.png", base64.b64decode(ask["body"]["image"]), "image/png")}
            response = await http.post("/inference", data=fields, files=file)
        else:
            response = await http.post("/inference", json=ask["body"])
        if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            break
        await asyncio.sleep(float(response.headers["retry-after"]))
    if response.status_code != httpx.codes.OK:
        wrong.append(f"{response.status_code}: {response.text[:200]}")
        return "lost"
    data = response.json()["images"][0]["data_url"].partition(",")[2]
    made = _pixels(Image.open(io.BytesIO(base64.b64decode(data))))
    if made.shape != expected.shape or np.abs(made - expected).max() > TOLERANCE:
        wrong.append(f"another picture than alone: {ask['body']['prompt']}")
        return "mixed up"
    return "right"


async def _malformed(http: httpx.AsyncClient, rng: random.Random) -> str:
    """Ask for nonsense; an error that names it is the right answer."""
    content, expected = rng.choice(
        [
            (b"{", 400),
            (b'{"prompt": ""}', 422),
            (b'{"prompt": "x", "steps": 999}', 422),
            (b'{"prompt": "x", "image": "bm90IGEgcGljdHVyZQ=="}', 415),
            (b'{"prompt": "x", "image_url": "http://127.0.0.1/secret"}', 403),
        ]
    )
    headers = {"content-type": "application/json"}
    response = await http.post("/inference", content=content, headers=headers)
    fine = response.status_code == expected and "message" in response.json()["error"]
    return "refused" if fine else f"refused wrongly: {response.status_code}"


async def _hang_up(http: httpx.AsyncClient, ask: dict[str, Any]) -> str:
    """Ask, and go before the answer can be there."""
    with contextlib.suppress(httpx.TimeoutException):
        await http.post("/inference", json=ask["body"], timeout=httpx.Timeout(5, read=0.02))
        return "too quick to hang up"
    return "hung up"


async def _busy(url: str, body: dict[str, Any], runs: int) -> tuple[float, float]:
    """Keep the service busy with two clients.

    Returns:
        Pictures a second, and the share of the time that the pipeline worked.
    """
    async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE) as http:
        left = iter(range(runs))
        inside: list[float] = []

        async def client() -> None:
            for _ in left:
                answer = (await http.post("/inference", json=body)).raise_for_status().json()
                inside.append(answer["inference_time"])

        (await http.post("/inference", json=body)).raise_for_status()
        began = time.perf_counter()
        await asyncio.gather(client(), client())
        took = time.perf_counter() - began
        return runs / took, sum(inside) / took


def _asks(model: str) -> list[dict[str, Any]]:
    """Requests of many kinds, of which some can be made at once."""
    found = []
    for number, example in enumerate(held_out(40)):
        picture = None if number % 7 == 0 and model == "spark" else example.picture
        level = ("faithful", "balanced", "fast")[number % 3]
        steps = 2 + (number // 3) % 3
        body = _body(example.instruction, picture, steps, level, number)
        found.append({"body": body, "form": picture is not None and number % 2 == 0})
    return found


def _alone(model: str, asks: list[dict[str, Any]]) -> list[np.ndarray]:
    """Make each by itself, through the service, before the others come."""
    expected = []
    with _server(model) as (url, _), httpx.Client(base_url=url, timeout=_PATIENCE) as http:
        for ask in asks:
            answer = http.post("/inference", json=ask["body"]).raise_for_status().json()
            data = answer["images"][0]["data_url"].partition(",")[2]
            expected.append(_pixels(Image.open(io.BytesIO(base64.b64decode(data)))))
    return expected


def _body(
    prompt: str, picture: Image.Image | None, steps: int, quality: str, seed: int
) -> dict[str, Any]:
    body = {"prompt": prompt, "steps": steps, "quality": quality, "seed": seed}
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        body["image"] = base64.b64encode(file.getvalue()).decode()
    return body


@contextlib.contextmanager
def _server(model: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service in a process of its own, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fluxfire", "serve", "--model", model, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for as long as the service
    process = subprocess.Popen([*command, *options], stdout=log, stderr=log)  # noqa: S603
    try:
        for _ in range(int(_PATIENCE)):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                    break
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(f"the service ended before it was ready: {log.read()[-2000:]}")
            time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


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


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), dtype=np.int16)


def _memory(pid: int) -> dict[str, int]:
    """Resident bytes of the server, and of its worker."""
    worker = _children(pid)
    return {"server": _resident(pid), "worker": _resident(worker[0]) if worker else 0}


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    """Worker processes, without Python's own helper that minds their resources."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


if __name__ == "__main__":
    main()
