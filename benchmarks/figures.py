"""Writes the published figures into README and docs, from the committed results.

    python benchmarks/figures.py           # rewrite the regions
    python benchmarks/figures.py --check   # status 1 if a page is not up to date

A region begins with `<!-- figures: name -->` and ends with `<!-- /figures -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import claims
from fluxfire.bench import load_result as load
from fluxfire.bench.search import names
from fluxfire.serve import capacity

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*/*.md")))
Row = dict[str, Any]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(result: Row) -> str:
    """Say on what a result was measured."""
    facts = result["environment"]
    packages = facts["packages"]
    commit, *dirty = result["commit"].split("-")
    return (
        f"{facts['gpu'] or 'CPU'}, torch {packages['torch']}, diffusers {packages['diffusers']}, "
        f"{result['when'][:10]}, commit {'-'.join([commit[:12], *dirty])}"
    )


def name_of(row: Row) -> str:
    """Return what a row calls who ran; older results say stack."""
    name: str = row.get("contender") or row["stack"]
    return name


def find(rows: Sequence[Row], stack: str, workload: str) -> Row:
    """Return the row of a stack on a workload."""
    return next(r for r in rows if name_of(r) == stack and r["workload"]["name"] == workload)


def stacks(rows: Sequence[Row]) -> list[str]:
    """List the stacks in the order measured."""
    return list(dict.fromkeys(map(name_of, rows)))


def ratio(rows: Sequence[Row], row: Row, what: str) -> str:
    """Say how many times faster than eager a row is."""
    eager = find(rows, "eager", row["workload"]["name"])
    return f"{eager[what]['median'] / row[what]['median']:.2f}×"


def plain(rows: Sequence[Row]) -> list[Row]:
    """Leave out the stacks whose cache left steps out: with random weights, only timings."""
    return [row for row in rows if "cache" not in name_of(row)]


def summary() -> str:
    """Steps and whole edits, in brief."""
    first, second = "edit 1024, 28 steps", "edit 512, 20 steps"
    result, again = (load(RESULTS / name) for name in ("reference.json", "reference_again.json"))
    rows = [row for row in result["rows"] if row["workload"]["name"] == first]
    rows += [row for row in again["rows"] if row["workload"]["name"] == second]
    table = []
    for stack in ("eager", "faithful", "faithful, FlashAttention-3", "balanced", "fast"):
        row, other = (find(rows, stack, workload) for workload in (first, second))
        whole = [f"{r['edit']['median']:.2f} s ({ratio(rows, r, 'edit')})" for r in (row, other)]
        cells = [stack, f"{row['step']['median'] * 1e3:.0f} ms ({ratio(rows, row, 'step')})"]
        cells += [f"{row['hits']:.0f}", *whole]
        table.append([*cells, f"{row['first_seconds'][0]:.0f} s"])
    head = ("", "a step computed", "steps left out", first, second, "first run")
    return f"{markdown(head, table)}\n\n{where(result)}; edit 512: {where(again)}."


def edits_detail(name: str) -> str:
    """Every row of a result with its spread."""
    result = load(RESULTS / name)
    rows = plain(result["rows"])
    table = []
    for row in rows:
        step, edit = row["step"], row["edit"]
        table.append(
            (
                name_of(row),
                row["workload"]["name"],
                _spread(step),
                ratio(rows, row, "step"),
                f"{edit['median']:.2f}",
                ratio(rows, row, "edit"),
                f"{row['first_seconds'][0]:.1f}",
                f"{row['apply_gib']:+.2f}",
                f"{row['apply_peak_gib']:.2f}",
                f"{row['peak_gib']:.1f}",
            )
        )
    head = (
        "stack", "workload", "step, ms: median (spread)", "× eager", "edit, s", "× eager",
        "first run, s", "GiB added", "GiB peak of optimize", "GiB peak of the edit",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def _spread(sample: Row) -> str:
    """Milliseconds: the median, and from the least to the most."""
    least, middle, most = (sample[k] * 1e3 for k in ("min", "median", "max"))
    return f"{middle:.1f} ({least:.1f} to {most:.1f})"


def hits(name: str) -> str:
    """What a cache's hits and misses cost, beside the same stack without it."""
    result = load(RESULTS / name)
    rows = result["rows"]
    table = []
    for row in rows:
        stack, _, cache = name_of(row).partition(" and cache, ")
        if not cache:
            continue
        stack = stack.removesuffix(",")
        without = find(rows, stack, row["workload"]["name"])["step"]["median"]
        hit = row["hit_step"]
        table.append(
            (
                stack,
                row["workload"]["name"],
                f"{row['hits']:.0f}",
                f"{without * 1e3:.0f}",
                f"{row['step']['median'] * 1e3:.0f}",
                f"{hit['median'] * 1e3:.1f} ({hit['median'] / without:.1%})" if hit else "",
                f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})",
            )
        )
    head = (
        "stack", "workload", "hits", "step without a cache, ms", "computed step, ms",
        "hit, ms (of a step)", "edit, s (× eager)",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def ladder() -> str:
    """Each pass alone and the stack, with memory and energy, beside a rival."""
    result = load(RESULTS / "bench.json")
    rows = [row for row in result["rows"] if not row["error"]]
    table = [
        (
            row["contender"],
            f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})",
            f"{row['step']['median'] * 1e3:.0f} ({ratio(rows, row, 'step')})",
            f"{row['hits']:.0f}",
            f"{row['peak_gib']:.1f}",
            f"{row['joules']:.0f}",
            f"{row['utilisation']:.0%}",
        )
        for row in rows
    ]
    head = (
        "", "edit, s (× eager)", "computed step, ms (× eager)", "steps left out", "GiB peak",
        "joules an edit", "GPU busy",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def phases() -> str:
    """Where the time of a whole edit goes."""
    result = load(RESULTS / "bench.json")
    names = list(result["rows"][0]["phases"])
    table = [
        (row["contender"], *(f"{row['phases'][n]['median'] * 1e3:.0f}" for n in names))
        for row in result["rows"]
        if not row["error"]
    ]
    return f"{markdown(('milliseconds', *names), table)}\n\n{where(result)}."


def flags() -> str:
    """What each of the article's compiler flags does to a step."""
    result = load(RESULTS / "flags.json")
    table = [
        (
            row["contender"],
            f"{row['step']['median'] * 1e3:.1f}",
            ratio(result["rows"], row, "step"),
            f"{row['phases']['decoding']['median'] * 1e3:.0f}",
        )
        for row in result["rows"]
        if not row["error"]
    ]
    head = ("compiled with", "a step, ms", "× eager", "decoding, ms")
    return f"{markdown(head, table)}\n\n{where(result)}."


def cold() -> str:
    """From a fresh process to a picture, phase by phase."""
    result = load(RESULTS / "cold.json")
    table = []
    for row in result["rows"]:
        spent, sizes = row["phases"], row["sizes"]
        table.append(
            (
                row["start"],
                *(f"{spent[name]:.1f}" for name in ("imports", "weights", "optimize")),
                f"{row['mega_cache']['load_seconds']:.1f}",
                *(
                    f"{size['seconds']:.1f} ({size['trace_seconds']:.1f} + "
                    f"{size['compile_seconds']:.1f}; {size['hits']} of "
                    f"{size['hits'] + size['misses']})"
                    for size in sizes
                ),
                f"{spent['an edit of two steps, warm']:.1f}",
            )
        )
    head = (
        "seconds", "imports", "weights", "optimize", "artifacts",
        *(f"first {size['size']} (tracing + compiling; graphs found)" for size in sizes), "again",
    )  # fmt: skip
    file = result["rows"][-1]["mega_cache"]["loaded_bytes"] / 2**20
    return (
        f"{markdown(head, table)}\n\nThe file has {file:.0f} MiB, the weights "
        f"{result['weights']['gib']:.1f} GiB. {where(result)}."
    )


def literal() -> str:
    """How long the article's own settings compiled."""
    result = load(RESULTS / "literal.json")
    limit, seconds = result["limit_seconds"], result["seconds"]
    if not result["finished"]:
        said = f"had not finished its first two steps after {limit:.0f} s, and was stopped"
    else:
        said = f"took {seconds:.0f} s for two generations of two steps"
    return f"The article's literal preset (whole-model autotuning) {said}.\n\n{where(result)}."


def symfloat() -> str:
    """The crash of inductor, without and with the pass."""
    result = load(RESULTS / "symfloat.json")
    rows = [("without", f"`{result['without']}`"), ("with InductorPatch", result["with"])]
    return f"{markdown(('', 'outcome'), rows)}\n\n{where(result)}."


def main_job() -> str:
    """The report of one whole edit by the command line."""
    report = load(RESULTS / "main_job.json")
    rows = [
        (
            f"`{p['configuration']}`",
            p["exactness"],
            f"{p['change']['count']} {p['change']['what']}",
            f"{p['change']['bytes']:+d}",
            f"{p['seconds']:.2f}",
        )
        for p in report["passes"]
    ]
    run = report["generations"][-1]
    table = markdown(("pass", "exactness", "changed", "bytes", "applied in, s"), rows)
    return (
        f"{table}\n\n{run['steps']} steps in {run['seconds']:.1f} s, the compilation of "
        f"{run['compiles']} graphs included; {run['seconds_a_step'] * 1e3:.0f} ms a step "
        f"(median), {run['graph_breaks']} graph breaks.\n\n{where(report)}."
    )


def steps() -> str:
    """A step with each pass, beside eager, compilation alone and a rival."""
    result = load(RESULTS / "steps.json")
    rows = [row for row in result["rows"] if not row["error"]]
    table = [
        (
            row["contender"],
            _spread(row["step"]),
            ratio(rows, row, "step"),
            f"{row['first_seconds'][0]:.1f}",
            f"{row['apply_gib']:+.1f}",
            f"{row['peak_gib']:.1f}",
        )
        for row in rows
    ]
    head = (
        "", "step, ms: median (spread)", "× eager", "first run, s", "GiB on the GPU, by applying",
        "GiB peak of the edit",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{rows[0]['workload']['name']}. {where(result)}."


def operators() -> str:
    """Each operator beside what it stands for."""
    result = load(RESULTS / "operators.json")
    table = [
        (
            row["name"],
            f"{row['ms']:.3f}",
            f"{row['moved'] / row['ms'] / 1e9:.2f}" if row["moved"] else "",
            f"{row['flop'] / row['ms'] / 1e9:.0f}" if row["flop"] else "",
            f"{row['error']:.1e}" if "error" in row else "",
        )
        for row in result["rows"]
        if "ms" in row
    ]
    head = ("", "ms", "TB/s of what it must move", "TFLOP/s", "error from float64")
    return f"{markdown(head, table)}\n\n8704 tokens, width 3072, bfloat16. {where(result)}."


def around() -> str:
    """What surrounds the loop, from the second prompt on."""
    result = load(RESULTS / "around.json")
    names = ("text encoding", "reference encoding", "decoding", "the rest")
    table = []
    for row in result["rows"]:
        if row["error"]:
            continue
        phases = {name: told["seconds"][1:] for name, told in row["phases"].items()}
        outside = map(sum, zip(*(phases[name] for name in names if name in phases), strict=True))
        spent = [f"{median(phases[n]) * 1e3:.0f}" if n in phases else "" for n in names]
        table.append((row["contender"], f"{median(outside) * 1e3:.0f}", *spent))
    head = ("", "outside the loop, ms", *names)
    return f"{markdown(head, table)}\n\n{where(result)}."


def passes_on_spark(name: str = "passes_on_spark.json") -> str:
    """What the passes do to Spark's edits."""
    result = load(RESULTS / name)
    table = [
        (
            row["stack"],
            f"{row['success']:.1%}",
            *(
                "same" if row["stack"] == "plain" else cell
                for cell in (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['ssim']['mean']:.4f} ({row['ssim']['worst']:.4f})",
                    f"{row['flip']['mean']:.4f} ({row['flip']['worst']:.4f})",
                )
            ),
        )
        for row in result["rows"]
        if not row["error"]
    ]
    head = ("", "edits done", "PSNR to plain, dB: mean (worst)", "SSIM", "FLIP")
    return (
        f"{markdown(head, table)}\n\n{result['examples']} held-out edits, {result['steps']} steps, "
        f"{result['dtype']}. {where(result)}."
    )


def reference(name: str, *workloads: str) -> str:
    """Steps that compute, reuse and hit, and whole edits, with Spark's schedules."""
    result = load(RESULTS / name)
    rows = [row for row in result["rows"] if row["workload"]["name"] in workloads]
    table = []
    for row in rows:
        whole = find(rows, "eager", row["workload"]["name"])["step"]["median"]
        cells = [
            f"{row[kind]['median'] * 1e3:.0f} ({whole / row[kind]['median']:.2f}×)"
            if row[kind]
            else ""
            for kind in ("step", "reuse_step", "hit_step")
        ]
        left = f"{row['reuses']:.0f} + {row['hits']:.0f}" if row["scheduled"] else ""
        edit = f"{row['edit']['median']:.2f} ({ratio(rows, row, 'edit')})"
        if row["compiles"]:
            edit = "compiled meanwhile"
        name = row["workload"]["name"]
        table.append((row["contender"], name, *cells, left, edit, f"{row['peak_gib']:.1f}"))
    head = (
        "", "workload", "computed step, ms (× eager's)", "reuse step", "hit",
        "reuses + hits", "edit, s", "GiB peak",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{where(result)}."


def reference_on_spark() -> str:
    """What ways to reuse the reference do to Spark's edits."""
    result = load(RESULTS / "reference_on_spark.json")
    table = [
        (
            row["way"],
            f"{row['refreshes']:.1f}" if "spacing=" in "".join(row["passes"]) else "",
            f"{row['success']:.1%}",
            *(
                ("same",) * 2
                if row["way"] == "plain"
                else (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['psnr']['fifth']:.1f}",
                )
            ),
            f"{row['psnr_to_target']:.2f}",
        )
        for row in result["rows"]
    ]
    head = (
        "", f"refreshes, of {result['steps']} steps", "edits done",
        "PSNR to plain, dB: mean (worst)", "reached by 95 of 100", "PSNR to the exact target",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."


def frontier() -> str:
    """Quality against speed: ours, and others'."""
    result = load(RESULTS / "frontier.json")
    table = [
        (
            row["contender"],
            f"{row['speed']:.2f}×",
            " + ".join(f"{row['steps'].get(k, 0):.1f}" for k in ("computed", "reused", "hit")),
            *(
                ("same",) * 2
                if row["family"] == "plain"
                else (
                    f"{row['psnr']['mean']:.1f} ({row['psnr']['worst']:.1f})",
                    f"{row['ssim']['mean']:.4f} ({row['ssim']['worst']:.4f})",
                )
            ),
            f"{row['success']:.1%}",
        )
        for row in result["rows"]
    ]
    head = (
        "", "× compiled", "steps computed + reusing + hit", "PSNR to plain, dB: mean (worst)",
        "SSIM", "edits done",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} held-out edits. {where(result)}."


def profile(name: str = "profile.json") -> str:
    """Where a compiled step goes, by kind of kernel."""
    result = load(RESULTS / name)
    kinds = {
        "matrix products": ("nvjet", "gemm", "cublas"),
        "attention": (
            "cudnn_generated_fort_native_sdpa",
            "flash",
            "fmha",
            "void cutlass::device_kernel<flash",
        ),
        "norms, modulation": ("norm_rows",),
        "norms and rotation of heads": ("rotate_heads",),
        "gated residuals": ("add_gated",),
        "GELU and rounding to float8": ("rows_float8",),
        "inductor's elementwise kernels": ("triton",),
    }
    spent: dict[str, float] = {}
    for kernel in result["kernels"]:
        name = kernel["name"].lower()
        kind = next((k for k, marks in kinds.items() if name.startswith(marks)), "the rest")
        spent[kind] = spent.get(kind, 0.0) + kernel["ms"]
    rows = [(kind, f"{ms:.0f} ms") for kind, ms in sorted(spent.items(), key=lambda i: -i[1])]
    passes = ", ".join(f"`{p}`" for p in result["passes"])
    return f"{markdown(('kernels', 'of one step'), rows)}\n\nWith {passes}. {where(result)}."


def caches(*, steps: int | None = None, distance: str | None = None) -> str:
    """What FirstBlockCache hits on Spark's held-out edits, and what that costs."""
    result = load(RESULTS / "caches.json")
    names = ("steps", "threshold", "distance", "predict")
    rows = [row for row in result["rows"] if row["kind"] == "edit"]
    rows = [row for row in rows if steps in (None, row["steps"])]
    rows = [row for row in rows if row["distance"] is None or distance in (None, row["distance"])]
    measures = [name for name in ("ssim_to_plain", "flip_to_plain") if name in rows[0]]
    table = [
        (
            *("none" if row[name] is None else f"{row[name]}" for name in names),
            f"{row['hits']:.0%}",
            "same"
            if row["threshold"] is None
            else f"{row['psnr_to_plain']['mean']:.1f} ({row['psnr_to_plain']['min']:.1f})",
            *(_worse(row.get(name)) for name in measures),
            f"{row['success']:.1%}",
        )
        for row in rows
    ]
    head = (
        *names, "hits", "PSNR to the plain result, dB: mean (minimum)",
        *(f"{name[:4].upper()}: mean (worst)" for name in measures), "edits done",
    )  # fmt: skip
    return f"{markdown(head, table)}\n\n{result['examples']} edits. {where(result)}."


def _worse(told: Row | None) -> str:
    return f"{told['mean']:.4f} ({told['worst']:.4f})" if told else "-"


def caches_brief() -> str:
    """The default distance, at the default number of steps."""
    return caches(steps=28, distance="all")


def spark() -> str:
    """How well Spark edits, kind by kind, and what else its model card tells."""
    result = load(RESULTS / "spark.json")
    splits = result["splits"]
    table = [
        (
            test["kind"],
            f"{test['n']}",
            f"{test['success']:.0%}",
            f"{train['success']:.0%}",
            f"{test['psnr']:.1f}",
            f"{test['gain']:+.1f}",
        )
        for test, train in zip(splits["test"], splits["train"], strict=True)
    ]
    head = (
        "kind", "edits", "done, held out", "done, as in training", "PSNR to the target, dB",
        "above the source, dB",
    )  # fmt: skip
    words = splits["from words"][-1]
    return (
        f"{markdown(head, table)}\n\n"
        f"From words alone, {words['success']:.0%} of {words['n']} pictures were right. The VAE "
        f"keeps {result['vae']['passed']:.1%} of the exact targets right, at "
        f"{result['vae']['psnr']:.1f} dB. Loading took {result['load_seconds']:.2f} s, an edit of "
        f"28 steps {result['edit_seconds']:.2f} s on {result['threads']} CPU cores; the file has "
        f"{result['bytes'] / 2**20:.1f} MiB.\n\n{where(result)}."
    )


def tuned() -> str:
    """The budgets of the presets that `tune` set, and what it saw."""
    table = []
    for name in ("balanced", "fast"):
        result = load(RESULTS / f"tuned_{name}.json")
        found, budget = result["tuned"], result["tuned"]["budget"]
        checked, plainly = found["confirmed"], found["plain"]
        caches = [p for p in checked["passes"] if "Cache" in p]
        table.append(
            (
                name,
                _budget(budget),
                f"`{_own(caches)}`",
                f"{checked['psnr']['mean']:.1f} ({checked['psnr']['worst']:.1f})",
                f"{checked['ssim']['mean']:.4f} ({checked['ssim']['worst']:.4f})",
                f"{checked['flip']['mean']:.3f} ({checked['flip']['worst']:.3f})",
                f"{checked['success']:.1%} ({plainly['success']:.1%})",
                f"{checked['n']}",
                f"{found['attempts']}",
            )
        )
    head = (
        "preset", "budget", "its cache", "PSNR, dB: mean (worst)", "SSIM", "FLIP",
        "right (plain)", "edits held out", "lists tried on these",
    )  # fmt: skip
    prices = {kind: f"{seconds * 1e3:.0f} ms" for kind, seconds in found["prices"].items()}
    return (
        f"{markdown(head, table)}\n\nSpark, 28 steps. Speed over `faithful`, at what FLUX's "
        f"steps take on an H100: {prices['computed']} computed, {prices['reused']} reusing the "
        f"reference, {prices['hit']} for a hit, and {prices['around']} around. {where(result)}."
    )


def _budget(asked: dict[str, float | None]) -> str:
    """Say a preset's budget."""
    said = {"min_psnr": "worst PSNR {:g} dB", "mean_psnr": "mean PSNR {:g} dB"}
    parts = [text.format(asked[name]) for name, text in said.items() if asked.get(name)]
    return ", ".join([*parts, f"{asked['max_lost']:.0%} fewer right"])


def _own(reprs: Sequence[str]) -> str:
    """Leave the settings out that are the defaults."""
    from fluxfire import passes

    made = [eval(one, vars(passes)) for one in reprs]  # noqa: S307 - our own, from our own file
    return names(made)


def serving() -> str:
    """What the service adds, how a thousand mixed requests end, and its throughput on a GPU."""
    result, gpu = load(RESULTS / "serving.json"), load(RESULTS / "serving_h100.json")
    added, mixed, busy = result["overhead"], result["mixed"], gpu["throughput"]

    def milliseconds(name: str) -> str:
        return f"{added[name]['median'] * 1e3:.0f} ms"

    answers = ", ".join(f"{n} {what}" for what, n in sorted(mixed["answers"].items()))
    many = (
        f"{mixed['requests']} mixed requests of {mixed['clients']} clients, the worker killed once"
    )
    before, after = mixed["memory"][0], mixed["memory"][-1]
    grown = [f"{n} {before[n] / 2**20:.0f} → {after[n] / 2**20:.0f} MiB" for n in before]
    full = f"full size on an H100: edits {busy['side']}, {busy['steps']} steps, kept busy"
    made = f"{busy['served'] * 60:.2f} a minute ({busy['share']:.1%})"
    alone = "{:.2f} before that and {:.2f} after".format(*(rate * 60 for rate in busy["bare"]))
    table = [
        (f"one edit of {added['steps']} steps, by the pipeline alone", milliseconds("bare")),
        ("the same by the service, from the request to the answer read", milliseconds("served")),
        ("of that outside the pipeline", milliseconds("beside_it")),
        (many, f"{answers}; {len(mixed['wrong'])} lost or mixed up"),
        ("memory after a tenth of them, and at the end", ", ".join(grown)),
        (full, f"{made}, by the pipeline alone {alone}"),
    ]
    where_made = f"{where(result)}, {result['cores']} cores; {where(gpu)}"
    return f"{markdown(('', 'median'), table)}\n\nSpark, on loopback. {where_made}."


def deployment(*, goal: float = 5, window: float = 60) -> str:
    """What loads need and what their images take, from measured edits and a measured start."""
    result, starts = load(RESULTS / "reference.json"), load(RESULTS / "cold.json")
    start = next(row for row in starts["rows"] if row["start"] == "with artifacts")
    first, *_ = start["sizes"]
    spent = (start["phases"][name] for name in ("imports", "weights", "optimize"))
    cold_start = sum(spent) + first["seconds"]
    table = []
    for preset in ("balanced", "fast"):
        row = find(result["rows"], preset, "edit 1024, 28 steps")
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
                    preset,
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
        "preset", "requests a minute", "GPUs", "busy", "mean wait, s", "p95 latency, s",
        "GPU seconds an image, always on", "scaled to zero", "of requests, meet a cold start",
    )  # fmt: skip
    return (
        f"{markdown(head, table)}\n\nA p95 latency of {goal:g} s is asked for. A container goes "
        f"after {window:g} s without a request, and takes {cold_start:.0f} s to start with its "
        f"artifacts, to the first edit ({starts['environment']['gpu']}, weights on a local disk); "
        f"the two columns of waiting are for GPUs that are on. Service times: {where(result)}."
    )


def vocabulary() -> str:
    """What Spark's instructions are made of."""
    from fluxfire.spark.edits import KINDS, PLACES, WAYS
    from fluxfire.spark.scenes import COLOURS, GROUNDS, SHAPES

    lists = {
        "shapes": SHAPES, "colours": COLOURS, "grounds": GROUNDS, "places": PLACES, "ways": WAYS,
    }  # fmt: skip
    words = "\n".join(f"- **{name}**: {', '.join(of)}" for name, of in lists.items())
    rows = [
        (kind, *(f"“{_filled(wordings[0])}”" for wordings in (edit.known, edit.novel)))
        for kind, edit in KINDS.items()
    ]
    return f"{words}\n\n{markdown(('kind', 'a wording shown', 'one held out'), rows)}"


def _filled(wording: str) -> str:
    """Put examples for what a wording leaves open."""
    return wording.format(
        it="red circle", colour="blue", new="a green star", place="at the top", to="to the top",
        way="left", other="blue square", ground="navy",
    )  # fmt: skip


REGIONS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "edits": lambda: edits_detail("edits.json"),
    "hits": lambda: hits("edits.json"),
    "article": lambda: edits_detail("article.json"),
    "article hits": lambda: hits("article.json"),
    "ladder": ladder,
    "phases": phases,
    "flags": flags,
    "cold": cold,
    "steps": steps,
    "operators": operators,
    "passes on spark": passes_on_spark,
    "passes on spark, emulated": lambda: passes_on_spark("passes_on_spark_cpu.json"),
    "around": around,
    "reference": lambda: reference("reference.json", "edit 1024, 28 steps"),
    "reference again": lambda: reference(
        "reference_again.json", "edit 1024, 28 steps", "edit 512, 20 steps"
    ),
    "reference on spark": reference_on_spark,
    "frontier": frontier,
    "profile": profile,
    "profile fused": lambda: profile("profile_fused.json"),
    "profile float8": lambda: profile("profile_float8.json"),
    "passes": lambda: edits_detail("passes.json"),
    "literal": literal,
    "symfloat": symfloat,
    "main job": main_job,
    "spark": spark,
    "vocabulary": vocabulary,
    "deployment": deployment,
    "serving": serving,
    "presets": tuned,
    "caches": caches,
    "caches in brief": caches_brief,
    "claims": claims.table,
}


def render(text: str) -> str:
    """Fill every region of a page."""

    def fill(match: re.Match[str]) -> str:
        try:
            body = REGIONS[match[1]]()
        except FileNotFoundError:
            body = "Not yet measured."
        return f"<!-- figures: {match[1]} -->\n{body}\n<!-- /figures -->"

    return re.sub(r"<!-- figures: (.+?) -->.*?<!-- /figures -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = [page for page in PAGES if render(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{'stale' if arguments.check else 'written'}: {page.relative_to(ROOT)}")
        if not arguments.check:
            page.write_text(render(page.read_text()))
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
