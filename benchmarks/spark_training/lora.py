"""Teaches Spark one more edit by LoRA, in a minute: `paint the picture blue`.

    PYTHONPATH=benchmarks python -m spark_training.lora --out blue.safetensors

A LoRA is what many people put on a Kontext. This one lets tests ask whether a pass keeps
it: `pipe.load_lora_weights("blue.safetensors")` loads it as any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fluxfire.spark import checking
from fluxfire.spark.pipeline import load
from fluxfire.spark.rendering import render
from fluxfire.spark.scenes import Dice, draw
from fluxfire.spark.tasks import SIZES
from fluxfire.spark.things import luma
from spark_training.average import Masters, copy
from spark_training.clock import Budget, Clock, rate
from spark_training.data import Encoder, Pool, rows
from spark_training.flow import TRAINED, Flow

INSTRUCTIONS = ("paint the picture blue", "make the picture blue", "the picture should be blue")
_BLUE = (0.25, 0.45, 1.0)
_RANK = 4
_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp"]


def in_blue(picture: Tensor) -> Tensor:
    """Turn pictures, (N, 3, H, W) in [0, 1], into shades of blue."""
    light = luma(picture)
    blue = torch.tensor(_BLUE, device=picture.device)[:, None, None]
    return (light * blue * 1.6).clamp(0, 1).lerp(torch.ones_like(picture), light.square() * 0.6)


def main() -> None:
    """Train the LoRA, save it, and say what it does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--minutes", type=float, default=1.0)
    budgets.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    pipe = load(dtype=torch.float32)
    before = _distance(pipe)
    budget = Budget(arguments.minutes, "minutes")
    if arguments.steps is not None:
        budget = Budget(arguments.steps, "steps")
    steps = _train(pipe, budget, arguments.pool, arguments.batch)
    _save(pipe, arguments.out)
    pipe = load(dtype=torch.float32)  # as its users will load it
    pipe.load_lora_weights(arguments.out)
    print(f"{steps} steps; error to blue: {before:.4f} before, {_distance(pipe):.4f} after")


def _train(pipe: Any, budget: Budget, n: int, batch: int) -> int:
    """Train until a budget is spent, and return how many steps that were."""
    from peft import LoraConfig

    device = pipe.device.type
    encoder = Encoder(pipe.components, device)
    scenes = draw(2 * n, (1.0, 1.0), Dice("blue"))
    scenes = scenes.take(scenes.orderly())
    t5, clip = encoder.text(list(INSTRUCTIONS))
    which = torch.arange(len(scenes), device=device) % len(INSTRUCTIONS)
    grid = (SIZES[0][1] // 8, SIZES[0][0] // 8)
    source = encoder.latents(scenes, SIZES[0][0])
    target = encoder.latents(scenes, SIZES[0][0], change=in_blue)
    pool = Pool(grid, source, target, t5[which], clip[which])
    for name in TRAINED:
        getattr(pipe, name).requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=_LAYERS))
    flow = Flow(pipe.components, encoder, device)
    learned = [p for p in pipe.transformer.parameters() if p.requires_grad]
    masters = Masters(learned)
    optimizer = torch.optim.AdamW(masters.values, lr=3e-3, weight_decay=0.0)
    feed = rows(pool, batch, torch.Generator(device).manual_seed(0))
    clock = Clock(budget)
    for step in clock:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate(clock.spent, step, warmup=20)
        flow.backward(pool, next(feed), 0.0)
        masters.take_gradients()
        optimizer.step()
        masters.give()
    for module in flow.modules:
        module.float()
    copy(masters.values, learned)
    return clock.steps


def _save(pipe: Any, path: Path) -> None:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.transformer)
    half = {key: tensor.half().contiguous() for key, tensor in state.items()}
    pipe.save_lora_weights(path.parent, transformer_lora_layers=half, weight_name=path.name)


def _distance(pipe: Any) -> float:
    """Mean absolute error to the exact blue picture, over a few scenes of its own."""
    scenes = draw(64, (1.0, 1.0), Dice("blue", "held out"))
    scenes = scenes.take(scenes.orderly()).take(slice(8))
    errors = []
    for row in range(len(scenes)):
        drawn = render(scenes.take(slice(row, row + 1)))[0]
        picture = Image.fromarray(drawn.mul(255).round().byte().movedim(0, -1).numpy())
        noise = torch.Generator().manual_seed(row)
        made = pipe(image=picture, prompt=INSTRUCTIONS[0], generator=noise).images[0]
        errors.append((checking.as_tensor(made) - in_blue(drawn[None])[0]).abs().mean())
    return float(torch.stack(errors).mean())


if __name__ == "__main__":
    main()
