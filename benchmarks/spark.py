"""How well Spark edits, and how fast: the figures of its model card.

python benchmarks/spark.py --out benchmarks/results/spark.json --pictures docs/pages/assets
"""

from __future__ import annotations

import argparse
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from PIL import Image, ImageDraw

from fluxfire import spark
from fluxfire.bench import save_result, stamp
from fluxfire.spark import checking, weights
from fluxfire.spark.scoring import Score, as_table, psnr, summarise

_TILE, _MARGIN, _CAPTION = 128, 4, 28
_LINE = 42  # letters that fit under two pictures
_FEWER = (14, 8, 4, 2, 1)


def main() -> None:
    """Score held-out edits, training's own, pictures from words, fewer steps, and the VAE."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=480, help="edits of each split")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, nargs="*", default=[], help="scales to try too")
    parser.add_argument("--pictures", type=Path, help="a folder for the grid of pictures")
    arguments = parser.parse_args()

    began = time.perf_counter()
    pipe = spark.load(dtype=torch.float32)
    result: dict[str, Any] = {
        "benchmark": "spark",
        **stamp(),
        "load_seconds": time.perf_counter() - began,
        "bytes": weights.SHIPPED.stat().st_size,
        "threads": torch.get_num_threads(),
        "edit_seconds": _seconds(pipe),
        "splits": {},
        "fewer": {},
        "guidance": {},
    }
    n, batch = arguments.n, arguments.batch
    sets: dict[str, list[Any]] = {
        "test": spark.examples(split="test", n=n),
        "train": spark.examples(split="train", n=n),
        "from words": spark.drawings(n=n // 4),
    }
    for name, tasks in sets.items():
        scores = spark.score(pipe, tasks, batch=batch)
        rows = summarise(scores)
        result["splits"][name] = [asdict(row) for row in rows]
        print(name, as_table(rows), sep="\n", flush=True)
        print(_faults(scores))
        if name == "test" and arguments.pictures:
            _grid(tasks, scores).save(arguments.pictures / "spark.png")
        save_result(result, arguments.out)
    some = sets["test"][: n // 2]
    result["fewer_edits"] = len(some)
    for steps in _FEWER:
        result["fewer"][steps] = _success(pipe, some, batch, steps=steps)
    for scale in arguments.guidance:
        result["guidance"][scale] = _success(pipe, some, batch, guidance_scale=scale)
    result["vae"] = _round_trips(pipe, sets["test"])
    save_result(result, arguments.out)
    print(*(result[name] for name in ("fewer", "guidance", "vae", "edit_seconds")))


def _success(pipe: Any, tasks: list[Any], batch: int, **call: Any) -> float:
    return mean(s.passed for s in spark.score(pipe, tasks, batch=batch, **call))


def _faults(scores: list[Score]) -> str:
    """List what is wrong most often, with the names and numbers taken out."""
    said = [fault for s in scores for fault in s.verdict.faults]
    kinds = [
        "still there",
        "trace",
        "nobody asked",
        "should stay",
        "as sharp",
        "ground is",
        "light",
    ]
    return ", ".join(f"{sum(kind in f for f in said)} {kind}" for kind in [*kinds, "there is no"])


def _seconds(pipe: Any) -> float:
    """Median seconds of an edit of 28 steps, alone, after a first one."""
    task = spark.examples(n=1)[0]
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        pipe(image=task.source, prompt=task.instruction, num_inference_steps=28)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


@torch.no_grad()
def _round_trips(pipe: Any, tasks: list[Any]) -> dict[str, float]:
    """Encode and decode valid results: mean PSNR, and how many the check passes."""
    values, passed = [], []
    for task in tasks:
        target = checking.as_tensor(task.target).to(pipe.device)
        latents = pipe.vae.encode(target[None] * 2 - 1).latent_dist.mode()
        again = (pipe.vae.decode(latents).sample[0] / 2 + 0.5).clamp(0, 1).cpu()
        values.append(psnr(again, target.cpu()))
        passed.append(task.check(again))
    return {"psnr": mean(values), "passed": mean(passed)}


def _grid(tasks: list[Any], scores: list[Score]) -> Image.Image:
    """Draw three held-out edits of each kind, the first drawn: source and Spark's result."""
    kinds = list(dict.fromkeys(t.kind for t in tasks))
    across, down = 2 * (_TILE + _MARGIN) + 2 * _MARGIN, _TILE + _MARGIN + _CAPTION
    sheet = Image.new("RGB", (3 * across, len(kinds) * down), "white")
    pen = ImageDraw.Draw(sheet)
    for row, kind in enumerate(kinds):
        mine = [(t, s) for t, s in zip(tasks, scores, strict=True) if t.kind == kind][:3]
        for column, (task, scored) in enumerate(mine):
            left, top = column * across, row * down
            for i, picture in enumerate((task.source, scored.image)):
                sheet.paste(picture, (left + i * (_TILE + _MARGIN), top))
            said = f"{task.instruction} ({'right' if scored.passed else 'wrong'})"
            caption = "\n".join(textwrap.wrap(said, _LINE)[:2])
            pen.text((left, top + _TILE + 1), caption, fill="black")
    return sheet


if __name__ == "__main__":
    main()
