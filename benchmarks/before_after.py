"""Draws edits before and after: Spark's first held-out edit of some kinds, plain and by presets.

python benchmarks/before_after.py --out benchmarks/results --pictures docs/pages/assets
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

import fluxfire
from fluxfire import presets, spark
from fluxfire.bench import compare, save_result, stamp
from fluxfire.protocol import Pass

KINDS = ("recolour", "remove", "add", "move", "ground", "night")
STEPS = 28
_TILE, _MARGIN, _LABEL, _CAPTION = 128, 6, 70, 50


def main() -> None:
    """Edit, save the figures, and draw the strip."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--pictures", type=Path, required=True, help="folder for the strip")
    arguments = parser.parse_args()

    pipe = spark.load(dtype=torch.float32)
    drawn = spark.examples(split="test", n=6 * len(KINDS))
    tasks = [next(t for t in drawn if t.kind == kind) for kind in KINDS]
    stacks: dict[str, tuple[Pass, ...]] = {
        "plain": (),
        "balanced": tuple(p for p in presets.balanced if p.stage == "caching"),
        "fast": tuple(p for p in presets.fast if p.stage == "caching"),
    }
    rows: list[dict[str, Any]] = []
    pictures: dict[str, list[Image.Image]] = {}
    for name, passes in stacks.items():
        with fluxfire.optimized(pipe, passes):
            scores = spark.score(pipe, tasks, steps=STEPS)
            left_out = [run.hit_rate for run in fluxfire.report(pipe).runs]
        pictures[name] = [score.image for score in scores]
        near = compare(pictures[name], pictures["plain"])
        rows += [
            {
                "stack": name,
                "passes": [repr(p) for p in passes],
                "kind": task.kind,
                "instruction": task.instruction,
                "left_out": None if share is None else round(share * STEPS),
                "psnr": likeness.psnr,
                "right": score.passed,
            }
            for task, share, likeness, score in zip(
                tasks, left_out, near.likenesses, scores, strict=True
            )
        ]
    told = {"benchmark": "before_after", **stamp(), "steps": STEPS, "rows": rows}
    save_result(told, arguments.out / "before_after.json")
    strip = _draw([t.source for t in tasks], [t.instruction for t in tasks], pictures, rows)
    strip.save(arguments.pictures / "before_after.png", optimize=True)


def _draw(
    sources: list[Image.Image],
    instructions: list[str],
    pictures: dict[str, list[Image.Image]],
    rows: list[dict[str, Any]],
) -> Image.Image:
    """Lay a column out for each edit: the instruction, the source, and what each stack made."""
    down = _TILE + _MARGIN
    size = (_LABEL + len(sources) * down, _CAPTION + (1 + len(pictures)) * (down + _MARGIN * 2))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, (source, words) in enumerate(zip(sources, instructions, strict=True)):
        left = _LABEL + column * down
        pen.multiline_text((left, 2), _folded(words, font), "black", font, spacing=1)
        for row, (name, made) in enumerate({"before": sources, **pictures}.items()):
            top = _CAPTION + row * (down + _MARGIN * 2)
            sheet.paste(source if name == "before" else made[column], (left, top))
            if column == 0:
                pen.text((_MARGIN, top + _TILE / 2 - 8), name, "black", font)
            told = next((r for r in rows if r["stack"] == name and r["instruction"] == words), None)
            if told is not None and told["left_out"] is not None:
                said = f"{told['psnr']:.0f} dB, {told['left_out']} steps left out"
                pen.text((left, top + _TILE + 1), said, "black", ImageFont.load_default(11))
    return sheet


def _folded(words: str, font: Any) -> str:
    """Break words into lines as wide as a picture."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > _TILE:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


if __name__ == "__main__":
    main()
