"""The service under load: a thousand mixed requests, a worker that dies, one that hangs.

python benchmarks/serve_load.py --out benchmarks/results/serve_load.json
python benchmarks/serve_load.py -n 100 --large 4 --out /tmp/serve_load.json    # a try

It runs `fluxfire serve` with three keys, and checks what the service promises. It ends with status
1 if one of these is not so. Linux only: it reads memory from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

# As the command line sets it: threads that spin while they wait slow a shared CPU down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
from PIL import Image

from fluxfire.bench import held_out, save_result, stamp
from fluxfire.serve.keys import new_key
from served import PATIENCE, body, children, pixels, resident, server, spread

TOLERANCE = 1
"""Grey levels that a pixel may differ by between a batch and a run alone."""
CLIENTS = {"ann": 4, "bob": 2, "cid": 2}
"""Clients of each key. A fair service serves the keys alike while all of them wait."""
_AT_ONCE = 3  # requests that a client has sent and not been answered
_MALFORMED = _CANCELLED = 0.02
_LARGE = (8000, 6250)
_LARGE_AT_ONCE = 4
_MIB = 2**20
_LOOK_SECONDS = 0.05
_JUST_BEFORE = 0.02  # a batch's requests begin together, but are known to begin one by one
_LIMITS = {
    "lost": 0,
    "mixed_up": 0,
    "below_fair_share": 0.10,
    "seconds_until_not_ready": 15.0,
    "mib_after_large_pictures": 200.0,
    "overhead_ms_p50": 15.0,
}
"""The most that each figure may be."""


@dataclass
class Load:
    """What is sent, and what becomes of it.

    Attributes:
        url: the service.
        pid: its process.
        keys: each key, by its owner's name.
        asks: requests, of which each may be sent many times.
        expected: their pictures, made alone.
        told: how many requests ended how.
        wrong: what went wrong, in words.
        served: key, work, and seconds when it began to wait and to run, of each finished edit.
        beside: seconds that the server itself spent on each finished edit.
        until_not_ready: seconds from the hang until `/ready` said so.
        until_ready: seconds from the hang until the service was ready again.
    """

    url: str
    pid: int
    keys: dict[str, str]
    asks: list[dict[str, Any]]
    expected: list[list[np.ndarray]] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    served: list[tuple[str, int, float, float]] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    until_not_ready: float | None = None
    until_ready: float | None = None

    def client(self, owner: str) -> httpx.AsyncClient:
        """Return a client that sends a key."""
        headers = {"Authorization": f"Bearer {self.keys[owner]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE)


def main() -> int:
    """Run everything once, save it, and tell which promises hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="spark")
    parser.add_argument("-n", type=int, default=1000, help="mixed requests")
    parser.add_argument("--alone", type=int, default=100, help="edits one after the other")
    parser.add_argument("--large", type=int, default=20, help="pictures of 50 megapixels")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    result: dict[str, Any] = {"benchmark": "serve_load", **stamp(), "model": arguments.model}
    result |= {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        made = {owner: new_key(owner) for owner in CLIENTS}
        file = Path(folder, "keys")
        file.write_text("".join(f"{line}\n" for _, line in made.values()))
        options = ("--keys", str(file), "--max-queue", "64", "--max-jobs", "1000")
        with server(arguments.model, *options) as (url, process):
            at_start = resident(process.pid)
            keys = {owner: key for owner, (key, _) in made.items()}
            load = Load(url, process.pid, keys, _asks(arguments.model))
            result["alone"] = asyncio.run(alone(load, arguments.alone))
            print("alone", result["alone"], flush=True)
            result["mixed"] = asyncio.run(mixed(load, arguments.n))
            print("mixed", result["mixed"], flush=True)
            result["large"] = asyncio.run(large(load, arguments.large, at_start))
            print("large", result["large"], flush=True)
    result["checks"] = _checks(result)
    save_result(result, arguments.out)
    for name, check in result["checks"].items():
        print("holds " if check["holds"] else "BROKEN", name, check)
    return 0 if all(check["holds"] for check in result["checks"].values()) else 1


async def alone(load: Load, runs: int) -> dict[str, Any]:
    """Send one request after the other: first each of those to come, then edits to time."""
    beside, inside = [], []
    async with load.client("ann") as http:
        for ask in load.asks:
            answer = (await http.post("/inference", json=ask["body"])).raise_for_status()
            load.expected.append(pixels(answer.json()))
        for example in held_out(runs):
            asked = body(example.instruction, example.picture, 2, "faithful", 0)
            began = time.perf_counter()
            answer = (await http.post("/inference", json=asked)).raise_for_status()
            took = time.perf_counter() - began
            inside.append(answer.json()["inference_time"])
            beside.append(took - inside[-1])
    return {"runs": runs, "in_the_worker": spread(inside), "beside_it": spread(beside)}


async def mixed(load: Load, n: int) -> dict[str, Any]:
    """Send many requests of all kinds; a worker dies at a third of them, one hangs at two."""
    rng = random.Random(0)  # noqa: S311 - which request comes when
    numbers = rng.sample(range(n), round(n * (_MALFORMED + _CANCELLED)))
    malformed = set(numbers[: round(n * _MALFORMED)])
    cancelled = set(numbers) - malformed
    owners = [owner for owner, clients in CLIENTS.items() for _ in range(clients)]
    sent = 0
    hang: asyncio.Task[None] | None = None

    async def stream(owner: str, http: httpx.AsyncClient, mine: Iterator[int]) -> None:
        """Send one request after the other; a client runs several of these."""
        nonlocal sent, hang
        for number in mine:
            if sent == n // 3:
                os.kill(children(load.pid, "spawn_main")[0], signal.SIGKILL)
            if sent == 2 * n // 3:
                hang = asyncio.create_task(_hang(load))
            sent += 1
            if number in malformed:
                await _malformed(load, http, rng)
            elif number in cancelled:
                await _cancelled(load, http, rng.choice(load.asks), number)
            else:
                await _right(load, http, owner, rng.randrange(len(load.asks)))

    began = time.perf_counter()
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for place, owner in enumerate(owners):
            http = await stack.enter_async_context(load.client(owner))
            mine = iter(range(place, n, len(owners)))
            streams += [stream(owner, http, mine) for _ in range(_AT_ONCE)]
        await asyncio.gather(*streams)
        seconds = time.perf_counter() - began
        if hang is not None:
            await hang
        counted = (await http.get("/metrics")).text
    deaths = counted.partition("\nfluxfire_worker_restarts_total ")[2].split("\n")[0]
    return {
        "requests": n,
        "clients": len(owners),
        "keys": CLIENTS,
        "at_once": _AT_ONCE * len(owners),
        "seconds": seconds,
        "answers": dict(load.told),
        "wrong": load.wrong[:20],
        "tolerance": TOLERANCE,
        "beside_the_worker": spread(load.beside),
        "shares": _shares(load.served),
        "worker_deaths": float(deaths),
        "seconds_until_not_ready": load.until_not_ready,
        "seconds_until_ready_again": load.until_ready,
    }


async def large(load: Load, n: int, at_start: int) -> dict[str, Any]:
    """Send large pictures, some at once, and look at the server's memory."""
    files = [_large_file(mode, kind) for mode, kind in _KINDS]
    before, most = resident(load.pid), {"server": 0, "decoding": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            decoding = sum(map(resident, children(load.pid, "decoding_process")))
            most["server"] = max(most["server"], resident(load.pid))
            most["decoding"] = max(most["decoding"], decoding)

    watching = threading.Thread(target=watch)
    watching.start()
    left = iter(range(n))

    async def send(http: httpx.AsyncClient) -> None:
        for number in left:
            file = {"image": files[number % len(files)]}
            fields = {"prompt": "make it night", "steps": "1"}
            answer = await http.post("/inference", data=fields, files=file)
            answer.raise_for_status()

    try:
        async with load.client("ann") as http:
            await asyncio.gather(*(send(http) for _ in range(_LARGE_AT_ONCE)))
    finally:
        done.set()
        watching.join()
    after = resident(load.pid) + sum(map(resident, children(load.pid, "decoding_process")))
    return {
        "pictures": n,
        "megapixels": _LARGE[0] * _LARGE[1] / 1e6,
        "at_once": _LARGE_AT_ONCE,
        "server_at_start": at_start,
        "server_before": before,
        "after": after,
        "most_of_server": most["server"],
        "most_of_decoding": most["decoding"],
    }


_KINDS = (("RGB", "JPEG"), ("RGBA", "WEBP"), ("RGB", "PNG"), ("RGB", "WEBP"), ("RGBA", "PNG"))


def _large_file(mode: str, kind: str) -> bytes:
    file = io.BytesIO()
    picture = Image.new(mode, _LARGE, (1, 2, 3, 100)[: len(mode)])
    picture.save(file, kind, quality=10, method=0)
    return file.getvalue()


async def _right(load: Load, http: httpx.AsyncClient, owner: str, which: int) -> None:
    """Ask for an edit, and compare it with the same made alone."""
    ask = load.asks[which]
    response = await _send(http, ask)
    ended = time.perf_counter()
    if response.status_code != httpx.codes.OK:
        load.wrong.append(f"{response.status_code}: {response.text[:200]}")
        load.told["lost"] += 1
        return
    answer, phases = response.json(), response.json()["timings"]
    began = ended - phases["inference"] - phases["encoding"] - phases["storing"]
    waits_from = ended - answer["total_time"] + phases["decoding"]
    work = ask["body"]["steps"] * ask["body"].get("num_images", 1)
    load.served.append((owner, work, waits_from, began))
    load.beside.append(answer["processing_time"])
    made = await asyncio.to_thread(pixels, answer)
    known = load.expected[which]
    if [one.shape for one in made] != [one.shape for one in known] or any(
        np.abs(one - other).max() > TOLERANCE for one, other in zip(made, known, strict=True)
    ):
        load.wrong.append(f"another picture than alone: {ask['body']['prompt']}")
        load.told["mixed up"] += 1
        return
    load.told["right"] += 1


async def _send(http: httpx.AsyncClient, ask: dict[str, Any]) -> httpx.Response:
    """Send a request in its way; a job's answer comes as if it were that of `/inference`."""
    if ask["way"] == "json":
        return await http.post("/inference", json=ask["body"])
    fields = {name: str(value) for name, value in ask["body"].items() if name != "image"}
    file = {"image": ("a.png", base64.b64decode(ask["body"]["image"]), "image/png")}
    if ask["way"] == "form":
        return await http.post("/inference", data=fields, files=file)
    begun = await http.post("/jobs", data=fields, files=file)
    if begun.status_code != httpx.codes.ACCEPTED:
        return begun
    name = begun.json()["id"]
    async with http.stream("GET", f"/jobs/{name}/events") as events:
        async for _ in events.aiter_lines():
            pass
    job = (await http.get(f"/jobs/{name}")).json()
    if job["status"] != "done":
        return httpx.Response(500, json=job)
    return httpx.Response(httpx.codes.OK, json=job["result"])


async def _malformed(load: Load, http: httpx.AsyncClient, rng: random.Random) -> None:
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
    load.told["refused" if fine else f"refused wrongly: {response.status_code}"] += 1


async def _cancelled(load: Load, http: httpx.AsyncClient, ask: dict[str, Any], number: int) -> None:
    """Cancel a job, or ask and hang up before the answer can be there."""
    if number % 2:
        with contextlib.suppress(httpx.TimeoutException):
            await http.post("/inference", json=ask["body"], timeout=httpx.Timeout(5, read=0.02))
            load.told["too quick to hang up"] += 1
            return
        load.told["hung up"] += 1
        return
    job = (await http.post("/jobs", json=ask["body"])).raise_for_status().json()
    job = (await http.delete(f"/jobs/{job['id']}")).raise_for_status().json()
    load.told[job["status"]] += 1


async def _hang(load: Load) -> None:
    """Stop the worker, as a hang would, and time what the service says of itself."""
    [worker] = children(load.pid, "spawn_main")
    began = time.perf_counter()
    os.kill(worker, signal.SIGSTOP)
    async with load.client("ann") as http:

        async def until(*, ready: bool) -> float:
            while True:
                status = (await http.get("/ready")).status_code
                if (status == httpx.codes.OK) == ready:
                    return time.perf_counter() - began
                await asyncio.sleep(_LOOK_SECONDS)

        load.until_not_ready = await until(ready=False)
        load.until_ready = await until(ready=True)


def _shares(served: list[tuple[str, int, float, float]]) -> dict[str, float]:
    """Return each key's share of the work that began while all keys had requests that waited."""
    counted: Counter[str] = Counter()
    for owner, work, _, began in served:
        moment = began - _JUST_BEFORE
        waiting = {other for other, _, since, until in served if since <= moment < until}
        if waiting == CLIENTS.keys():
            counted[owner] += work
    every = sum(counted.values())
    shares = {f"share of {owner}": counted[owner] / every for owner in CLIENTS} if every else {}
    return {**shares, "steps": every}


def _asks(model: str) -> list[dict[str, Any]]:
    """Return requests of many kinds, of which some can be made at once."""
    found = []
    for number, example in enumerate(held_out(40)):
        picture = None if number % 7 == 0 and model == "spark" else example.picture
        level = ("faithful", "balanced", "fast")[number % 3]
        steps = 2 + (number // 3) % 3
        asked = body(example.instruction, picture, steps, level, number)
        if number % 8 == 1:
            asked["num_images"] = 2
        way = "json" if picture is None else ("json", "form", "job")[number % 3]
        found.append({"body": asked, "way": way})
    return found


def _checks(result: dict[str, Any]) -> dict[str, Any]:
    """Compare what was measured with what is promised."""
    answers, shares = result["mixed"]["answers"], result["mixed"]["shares"]
    least = min((shares.get(f"share of {owner}", 0.0) for owner in CLIENTS), default=0.0)
    strange = answers.keys() - {"right", "refused", "hung up", "cancelled", "done", "mixed up"}
    found = {
        "lost": sum(answers[name] for name in strange if name != "too quick to hang up"),
        "mixed_up": answers.get("mixed up", 0),
        "below_fair_share": 1 - least * len(CLIENTS),
        "seconds_until_not_ready": result["mixed"]["seconds_until_not_ready"],
        "mib_after_large_pictures": (
            (result["large"]["after"] - result["large"]["server_at_start"]) / _MIB
        ),
        "overhead_ms_p50": result["alone"]["beside_it"]["median"] * 1e3,
    }
    return {
        name: {"value": value, "most": _LIMITS[name], "holds": value <= _LIMITS[name]}
        for name, value in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
