"""Train Spark: one command, one GPU, half an hour.

    export PYTHONPATH=benchmarks
    python -m spark_training --out runs/spark
    python -m spark_training --out /tmp/try --steps 20 20 --pool 200   # on a CPU

Run again with the same `--out`, it goes on from the last minute that was saved: the VAE as it
is, if it was done; the flow's weights and averages, while the optimizer's moments start anew.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from fluxfire.spark import weights
from fluxfire.spark.model import parts as build
from fluxfire.spark.pipeline import SparkPipeline
from fluxfire.spark.scenes import Dice
from fluxfire.spark.scoring import Score, as_table, score, summarise
from fluxfire.spark.tasks import SIZES, examples
from spark_training.average import Average, Masters, parameters
from spark_training.clock import Budget, Clock, Log
from spark_training.data import Encoder, Pool
from spark_training.flow import TRAINED, Flow, train_flow
from spark_training.vae import train_vae


def main() -> None:
    """Train the VAE, encode a pool of edits, train the flow, score it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder, made if needed")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument(
        "--minutes", type=float, nargs=2, default=(4.0, 23.0), metavar=("VAE", "FLOW"),
        help="budgets of the two trainings (default: %(default)s)",
    )  # fmt: skip
    budgets.add_argument(
        "--steps", type=int, nargs=2, metavar=("VAE", "FLOW"),
        help="the same in steps, which are as much training on a slow machine as on a fast one",
    )  # fmt: skip
    parser.add_argument("--pool", type=int, default=320_000, help="edits of the usual size")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--score", type=int, default=600, help="held-out edits to score")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.jsonl")
    parts = build()
    unit: Literal["minutes", "steps"] = "steps" if arguments.steps else "minutes"
    vae, flow = (Budget(amount, unit) for amount in arguments.steps or arguments.minutes)
    _vae(parts, out / "vae.safetensors", vae, log, device)
    _flow(parts, out, flow, log, device, pool=arguments.pool, batch=arguments.batch)
    _score(parts, out, arguments.score, log, device)


def _vae(parts: dict[str, Any], path: Path, budget: Budget, log: Log, device: str) -> None:
    vae = {"vae": parts["vae"]}
    if path.exists():
        weights.restore(vae, path)
    else:
        train_vae(parts["vae"], budget, log, device)
        weights.save(vae, path)
    parts["vae"].to(device)


def _flow(
    parts: dict[str, Any],
    out: Path,
    budget: Budget,
    log: Log,
    device: str,
    *,
    pool: int,
    batch: int,
) -> None:
    """Train from the last minute saved; the averages go to spark.safetensors."""
    raw, averaged, state = out / "raw.safetensors", out / "spark.safetensors", out / "state.json"
    trained = {name: parts[name].to(device) for name in TRAINED}
    weights_ = parameters(trained.values())
    before: dict[str, Any] = {"seconds": 0.0, "steps": 0}
    start = None
    if state.exists():
        before |= json.loads(state.read_text())
        if Clock(budget, **before).over:
            weights.restore(parts, averaged)
            return
        torch.manual_seed(before["steps"])
        weights.restore(trained, averaged)
        start = [p.detach().float().clone() for p in weights_]
        weights.restore(trained, raw)
    masters = Masters(weights_)
    average = Average(masters.values, start=start)
    encoder = Encoder(parts, device)
    pools = _pools(encoder, pool, log)
    clock = Clock(budget, **before)

    def save() -> None:
        if not all(bool(value.isfinite().all()) for value in masters.values):
            raise FloatingPointError(f"training diverged; {raw} holds the last good weights")
        for path, values in ((raw, masters.values), (averaged, average.values)):
            weights.save(parts, path, values=dict(zip(weights_, values, strict=True)))
        partial = state.with_suffix(".part")
        partial.write_text(json.dumps({"seconds": clock.seconds, "steps": clock.steps}))
        partial.replace(state)

    flow = Flow(parts, encoder, device)
    if device == "cuda":
        flow.compile()
    train_flow(
        flow, pools, clock, log, device,
        masters=masters, average=average, batch=batch, on_minute=save,
    )  # fmt: skip
    for module in trained.values():
        module.float()
    weights.restore(parts, averaged)


def _pools(encoder: Encoder, n: int, log: Log) -> list[tuple[Pool, int]]:
    """Most batches are square edits; one in four another shape, one in ten words alone."""
    began = time.perf_counter()
    chunk = 20_000
    usual = [encoder.edits(min(chunk, n), SIZES[0], Dice("pool", i)) for i in range(-(-n // chunk))]
    pools = [(_join(usual), 26)]
    pools += [(encoder.edits(n // 10, size, Dice("pool", *size)), 2) for size in SIZES[1:]]
    pools += [(encoder.captioned(n // 10, SIZES[0], Dice("captions")), 4)]
    seconds = time.perf_counter() - began
    log.write(part="pool", edits=float(sum(len(p) for p, _ in pools)), seconds=seconds)
    return pools


def _join(pools: list[Pool]) -> Pool:
    first = pools[0]
    columns = ("source", "target", "t5", "clip")
    return Pool(first.grid, *(torch.cat([getattr(p, c) for p in pools]) for c in columns))


def _score(parts: dict[str, Any], out: Path, n: int, log: Log, device: str) -> None:
    pipe = SparkPipeline(**parts).to(device)
    pipe.set_progress_bar_config(disable=True)
    for split in ("test", "train"):
        scores = score(pipe, examples(split=split, n=n), batch=min(100, n))
        rows = summarise(scores)
        print(split, as_table(rows), sep="\n", flush=True)
        for row in rows:
            log.write(
                part=f"score {split}", kind=row.kind, edits=float(row.n), success=row.success,
                psnr=row.psnr, gain=row.gain,
            )  # fmt: skip
        _grid(scores, n, split, out / f"{split}.png")


def _grid(scores: list[Score], n: int, split: Any, path: Path) -> None:
    """Draw sources, results and targets of the first edits."""
    shown = list(zip(examples(split=split, n=n), scores, strict=True))[:48]
    sheet = Image.new("RGB", (3 * 132 * 4, 132 * 12))
    for i, (example, scored) in enumerate(shown):
        left, top = (i // 12) * 3 * 132, (i % 12) * 132
        for j, image in enumerate((example.source, scored.image, example.target)):
            sheet.paste(image, (left + j * 130, top))
    sheet.save(path)


if __name__ == "__main__":
    main()
