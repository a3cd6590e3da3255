"""The service, and deployments of it."""

from __future__ import annotations

from typing import Any

import capacity
from regions.results import load, markdown, name_of, where

_FAITHFUL = ("faithful", "faithful, FlashAttention-3")


def serving() -> str:
    """What the service adds to the pipeline, and its throughput on a GPU."""
    result, gpu = load("serving.json"), load("serving_h100.json")
    added, busy = result["overhead"], gpu["throughput"]

    def milliseconds(name: str) -> str:
        return f"{added[name]['median'] * 1e3:.0f} ms"

    full = f"full size on an H100: edits {busy['side']}, {busy['steps']} steps, kept busy"
    made = f"{busy['served'] * 60:.2f} a minute ({busy['share']:.1%})"
    alone = "{:.2f} before that and {:.2f} after".format(*(rate * 60 for rate in busy["bare"]))
    table = [
        (f"one edit of {added['steps']} steps, by the pipeline alone", milliseconds("bare")),
        ("the same by the service, from the request to the answer read", milliseconds("served")),
        ("of that outside the pipeline", milliseconds("beside_it")),
        (full, f"{made}, by the pipeline alone {alone}"),
    ]
    where_made = f"{where(result)}, {result['cores']} cores; {where(gpu)}"
    return f"{markdown(('', 'median'), table)}\n\nSpark, on loopback. {where_made}."


def load_test() -> str:
    """How the service did with a thousand mixed requests, and with large pictures."""
    result = load("serve_load.json")
    mixed, large, checks = result["mixed"], result["large"], result["checks"]
    answers = ", ".join(f"{n} {what}" for what, n in sorted(mixed["answers"].items()))
    clients = f"{mixed['clients']} clients with {len(mixed['keys'])} keys"
    shares = ", ".join(f"{mixed['shares'][f'share of {name}']:.1%}" for name in mixed["keys"])
    unlike = ", ".join(f"{n}" for n in mixed["keys"].values())
    mib = {name: large[name] / 2**20 for name in ("server_at_start", "after", "most_of_decoding")}
    wrong = f"{checks['lost']['value']}, and {checks['mixed_up']['value']}"
    near = f"a picture differs by at most {mixed['tolerance']} of 255 from the same made alone"
    hung, again = mixed["seconds_until_not_ready"], mixed["seconds_until_ready_again"]
    many = f"{large['pictures']} pictures of {large['megapixels']:.0f} MP"
    grown = f"{mib['server_at_start']:.0f} → {mib['after']:.0f} MiB"
    apart = f"the process that decodes needs {mib['most_of_decoding']:.0f} MiB meanwhile"
    added = result["alone"]["beside_it"]["median"] * 1e3
    table = [
        (f"{mixed['requests']} mixed requests of {clients}", answers),
        ("lost, and mixed up", f"{wrong}; {near}"),
        (f"work of each key while all waited ({unlike} clients)", shares),
        ("from a hang until `/ready` says so, and until the next worker is ready",
         f"{hung:.1f} s, {again:.0f} s"),
        (f"memory of the server at its start, and after {many}", f"{grown}; {apart}"),
        ("time of an edit outside the worker, with nothing else to do (median)", f"{added:.0f} ms"),
    ]  # fmt: skip
    return f"{markdown(('', 'measured'), table)}\n\n{_loopback(result)}"


def _loopback(result: dict[str, Any]) -> str:
    model, load_before = result["model"].capitalize(), result["load_before"]
    machine = f"{result['cores']} cores with other work, too (load {load_before:.1f} before)"
    return f"{model}, on loopback. {where(result)}, {machine}."


def deployment(*, goal: float = 15, window: float = 60) -> str:
    """What loads need and what their images take, from measured edits and a measured start.

    Only stacks that compute every step: random weights cannot tell how many a cache would skip.
    """
    result, starts = load("reference.json"), load("cold.json")
    start = next(row for row in starts["rows"] if row["start"] == "with artifacts")
    first, *_ = start["sizes"]
    spent = (start["phases"][name] for name in ("imports", "weights", "optimize"))
    cold_start = sum(spent) + first["seconds"]
    table = []
    for row in result["rows"]:
        if row["workload"]["name"] != "edit 1024, 28 steps" or name_of(row) not in _FAITHFUL:
            continue
        service = capacity.ServiceTimes(tuple(row["edit"]["seconds"]))
        for found in capacity.sizes(service, goal):
            zero = ("", "")
            if found.gpus == 1:
                alone = capacity.scaled_to_zero(
                    found.rate, service, window=window, cold_start=cold_start
                )
                zero = (f"{alone.paid_seconds:.2f}", f"{alone.cold:.1%}")
            table.append(
                (
                    name_of(row),
                    f"{found.rate:g}",
                    f"{found.gpus}",
                    f"{found.utilisation:.0%}",
                    f"{found.mean_wait:.2f}",
                    f"{found.p95_latency:.2f}",
                    f"{found.paid_seconds:.2f}",
                    *zero,
                )
            )
    head = (
        "passes", "requests a minute", "GPUs", "busy", "mean wait, s", "p95 latency, s",
        "GPU seconds an image, always on", "scaled to zero", "requests that meet a cold start",
    )  # fmt: skip
    return (
        f"{markdown(head, table)}\n\nThe goal is a p95 latency of {goal:g} s. A container goes "
        f"after {window:g} s without a request, and takes {cold_start:.0f} s to start with its "
        f"artifacts, to the first edit ({starts['environment']['gpu']}, weights on a local disk); "
        f"the two columns of waiting are for GPUs that are on. Service times: {where(result)}."
    )
