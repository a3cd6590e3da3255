"""Cold starts, phase by phase, in fresh processes: without artifacts, and with what MegaCache kept.

python benchmarks/cold_start.py --full --folder /tmp/kontext --out benchmarks/results/cold.json
python benchmarks/cold_start.py --tiny --folder /tmp/tiny --out /tmp/cold.json    # a try on a CPU

The pipeline is saved to the folder first, as safetensors of random weights, and loaded from
there; the compiler's own cache on disk is empty in every process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# fluxfire is imported late: what imports cost is one of the phases.
SIZES = {"full": [(1024, 1024), (1360, 768), (768, 1360)], "tiny": [(32, 32), (48, 32), (32, 48)]}
STARTS = ("without artifacts", "with artifacts", "with artifacts, again")


def main() -> None:
    """Save a pipeline, and start it in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--full", action="store_const", const="full", dest="size")
    size.add_argument("--tiny", action="store_const", const="tiny", dest="size")
    parser.add_argument("--folder", type=Path, required=True, help="for the weights; kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # in the fresh process
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(_start(arguments.folder, arguments.start, SIZES[arguments.size])))
        return
    from fluxfire.bench import save_result, stamp

    result: dict[str, Any] = {"benchmark": "cold_start", **stamp(), "rows": []}
    result["weights"] = _saved(arguments.folder, f"random-{arguments.size}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in STARTS:
            caches = {
                "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=scratch),
                "TRITON_CACHE_DIR": tempfile.mkdtemp(dir=scratch),
            }
            command = [sys.executable, __file__, f"--{arguments.size}"]
            command += ["--folder", str(arguments.folder), "--start", f"{scratch}/m"]
            began = time.perf_counter()
            done = subprocess.run(  # noqa: S603 - this very file
                command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            row |= {"start": name, "process_seconds": time.perf_counter() - began}
            result["rows"].append(row)
            save_result(result, arguments.out)
    print(_table(result["rows"]))


def _saved(folder: Path, model: str) -> dict[str, float]:
    """Save the pipeline, unless it is there; say what the disk gave."""
    began = time.perf_counter()
    if not (folder / "model_index.json").exists():
        from fluxfire.loading import load

        load(model).save_pretrained(folder)
    files = list(folder.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 2**30
    return {"gib": size, "saving_seconds": time.perf_counter() - began}


def _start(folder: Path, artifacts: Path, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Go from nothing to a picture, and time every phase."""
    phases: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        phases[name], clock = now - clock, now

    import torch

    import fluxfire
    from fluxfire import presets
    from fluxfire.loading import load
    from fluxfire.passes import MegaCache
    from fluxfire.supported import model_of

    lap("imports")
    pipe = load(str(folder))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    lap("weights")
    passes = [*presets.faithful[:-1], MegaCache(artifacts), presets.faithful[-1]]
    fluxfire.optimize(pipe, passes)
    lap("optimize")
    call: dict[str, Any] = {}
    if model_of(pipe).is_tiny(pipe):
        call = {"_auto_resize": False, "max_sequence_length": 24}
    pipe.set_progress_bar_config(disable=True)
    fluxfire.warmup(pipe, sizes, **call)
    runs = fluxfire.report(pipe).to_dict()["generations"]
    facts = next(p.facts for p in fluxfire.report(pipe).passes if p.name == "mega-cache")
    clock = time.perf_counter()
    fluxfire.warmup(pipe, sizes[:1], **call)
    lap("an edit of two steps, warm")
    return {
        "phases": phases,
        "sizes": [
            {"size": f"{w}x{h}", **{k: run[k] for k in _OF_A_RUN}}
            for (w, h), run in zip(sizes, runs, strict=True)
        ],
        "mega_cache": facts,
    }


_OF_A_RUN = ("seconds", "compiles", "hits", "misses", "trace_seconds", "compile_seconds")


def _table(rows: list[dict[str, Any]]) -> str:
    from fluxfire.text import human_seconds, table

    lines = []
    for row in rows:
        phases = {**row["phases"], "loading artifacts": row["mega_cache"]["load_seconds"]}
        lines += [(row["start"], name, human_seconds(s), "", "", "") for name, s in phases.items()]
        for size in row["sizes"]:
            lines.append(
                (
                    row["start"],
                    f"first run of {size['size']}",
                    human_seconds(size["seconds"]),
                    human_seconds(size["trace_seconds"]),
                    human_seconds(size["compile_seconds"]),
                    f"{size['hits']}/{size['hits'] + size['misses']}",
                )
            )
    head = ("start", "phase", "seconds", "of which tracing", "and compiling", "graphs found")
    return table(head, lines)


if __name__ == "__main__":
    main()
