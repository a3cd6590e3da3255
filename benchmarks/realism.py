"""How a model behaves when steps are skipped, rounded or left out: curves A to K of the docs.

    python benchmarks/realism.py --out benchmarks/results/realism.json -n 48 --batch 16
    python benchmarks/realism.py --out /tmp/realism.json -n 4             # a try on a CPU

A stand-in is worth something only where it behaves as the real model does. The docs' page "Spark"
compares these curves with what others published about FLUX.1 Kontext and FLUX.1-dev.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import fluxfire
from fluxfire import spark
from fluxfire.bench import save_result, stamp
from fluxfire.passes import FirstBlockCache
from predictors import hold, line, parabola, predicting

STEPS = 28
OPEN = ("add", "replace", "move", "ground", "several")
"""Kinds of edit that leave much open: where, how big, and which ground of the kind."""
FEWER = (20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 1)
THRESHOLDS = (0.06, 0.08, 0.10, 0.12, 0.15, 0.20)
PREDICTIONS = {"hold": hold, "linear": line(), "quadratic": parabola()}
FREE: dict[str, Any] = {"warmup_steps": 0, "tail_steps": 0, "max_consecutive_hits": None}
MAGCACHE = "XXXXXX-X--XX----X----X--X-XX"
"""The mask of MagCache's settings for Kontext: X computes, - skips."""
EVENLY = "X--X-X-X-X-X-X-X-X-X-X-X-X-X"
WARMED = "XXXXXXX--X--X--X--X--X--X--X"
"""As many computed steps, without and with a warm-up."""


@dataclass
class Watched:
    """What hooks saw during one plain generation, one entry for each step.

    Attributes:
        residual: (batch, tokens) norms of what all blocks add to the image tokens.
        change: relative L1 change of the last block's image tokens since the step before.
        velocity: the norm of the predicted velocity, over the batch.
        keys, values: for the first, a middle and the last block, those of the reference.
    """

    residual: list[Tensor] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    velocity: list[float] = field(default_factory=list)
    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)


def main() -> None:
    """Measure every curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=48, help="edits, and pictures from words")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=OPEN, help="of edit (default: %(default)s)")
    arguments = parser.parse_args()

    pipe = spark.load(dtype=torch.float32)
    sets: dict[str, Sequence[Any]] = {
        "edits": spark.examples(split="test", n=arguments.n, kinds=tuple(arguments.kinds)),
        "words": spark.drawings(n=arguments.n),
    }
    result: dict[str, Any] = {
        "benchmark": "realism",
        **stamp(),
        "examples": arguments.n,
        "curves": {},
    }
    for name, tasks in sets.items():
        curves = result["curves"][name] = {}
        for curve in _curves(pipe, tasks, arguments.batch, edits=name == "edits"):
            curves.update(curve)
            save_result(result, arguments.out)
            print(name, curve, flush=True)


def _curves(
    pipe: Any, tasks: Sequence[Any], batch: int, *, edits: bool
) -> Iterator[dict[str, Any]]:
    def made(steps: int = STEPS, **call: Any) -> Tensor:
        return generate(pipe, tasks, batch, steps, **call)

    def near(pictures: Tensor) -> dict[str, float]:
        return distance(pictures, plain)

    plain = made()
    if edits:
        yield {"source": near(_as_batch([t.source for t in tasks]))}
    yield watched(pipe, tasks[: min(8, len(tasks))], edits=edits)
    yield {"plain": {str(n): near(made(n)) for n in FEWER}}
    with rounded_blocks(pipe.transformer):
        yield {"rounding": near(made())}
    with eight_bits(pipe.transformer):
        yield {"eight bits": near(made())}
    yield {
        "hits": {
            str(t): _cached(pipe, made, near, FirstBlockCache(t, **FREE), "hold")
            for t in THRESHOLDS
        }
    }
    short: dict[str, Any] = {"warmup_steps": 8, "tail_steps": 2, "max_consecutive_hits": 2}
    long: dict[str, Any] = {"warmup_steps": 4, "tail_steps": 0, "max_consecutive_hits": 6}
    for name, threshold, limits in (("short skips", 0.12, short), ("long skips", 0.5, long)):
        yield {
            name: {
                p: _cached(pipe, made, near, FirstBlockCache(threshold, **limits), p)
                for p in PREDICTIONS
            }
        }
    for name, mask in (
        ("MagCache's mask", MAGCACHE),
        ("without warm-up", EVENLY),
        ("with warm-up", WARMED),
    ):
        skipped = [i for i, sign in enumerate(mask) if sign == "-"]
        yield {
            name: {
                p: _cached(pipe, made, near, FirstBlockCache(schedule=skipped, **FREE), p)
                for p in ("hold", "linear")
            }
        }


def _cached(
    pipe: Any, made: Any, near: Any, cache: FirstBlockCache, prediction: str
) -> dict[str, float]:
    with fluxfire.optimized(pipe, [cache]), predicting(PREDICTIONS[prediction]):
        hits: list[bool] = []
        pictures = made(on_run=lambda run: hits.extend(h for d in run.decisions for h in d.hits))
    return {**near(pictures), "hits": STEPS * mean(hits)}


def generate(
    pipe: Any, tasks: Sequence[Any], batch: int, steps: int, *, on_run: Any = None
) -> Tensor:
    """Make every picture, each with its own noise: (n, 3, height, width) float32 in [0, 1]."""
    pictures = []
    for first in range(0, len(tasks), batch):
        some = tasks[first : first + batch]
        sources = [t.source for t in some if hasattr(t, "source")]
        pictures.append(
            pipe(
                image=sources or None,
                prompt=[t.instruction for t in some],
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(first + i) for i in range(len(some))],
                output_type="pt",
            ).images.float().cpu()
        )  # fmt: skip
        if on_run is not None:
            on_run(fluxfire.report(pipe).runs[-1])
    return torch.cat(pictures)


def distance(pictures: Tensor, plain: Tensor) -> dict[str, float]:
    """Return mean and worst PSNR in dB."""
    error = (pictures - plain).double().square().mean((1, 2, 3)).clamp_min(1e-10)
    psnr = -10 * error.log10()
    return {"mean": float(psnr.mean()), "worst": float(psnr.min())}


def _as_batch(pictures: Sequence[Any]) -> Tensor:
    from fluxfire.spark.checking import as_tensor

    return torch.stack([as_tensor(p) for p in pictures])


def watched(pipe: Any, tasks: Sequence[Any], *, edits: bool) -> dict[str, Any]:
    """Curves A, B, C and H."""
    with watching(pipe.transformer) as seen:
        generate(pipe, tasks, len(tasks), STEPS)
    ratios = [float((b / a).mean()) for a, b in zip(seen.residual, seen.residual[1:], strict=False)]
    speeds = [b / a for a, b in zip(seen.velocity, seen.velocity[1:], strict=False)]
    curves: dict[str, Any] = {"magnitudes": ratios, "speeds": speeds, "changes": seen.change}
    if edits:
        drift = {
            f"from step {start}": [
                [
                    _relative(series[start][block], series[-1][block])
                    for series in (seen.keys, seen.values)
                ]
                for block in range(3)
            ]
            for start in (0, 4)
        }
        curves["drift of reference keys and values"] = drift
    return curves


def _relative(old: Tensor, new: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@contextmanager
def watching(transformer: Any) -> Iterator[Watched]:
    """Let hooks watch a transformer's calls."""
    seen = Watched()
    kept: dict[str, Any] = {"last": None}
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    chosen = [double[0], single[0], single[-1]]

    def embedded(_: nn.Module, __: Any, output: Tensor) -> None:
        kept["embedded"] = output
        seen.keys.append([])
        seen.values.append([])

    def finished(_: nn.Module, inputs: Any) -> None:
        image = inputs[0][:, -kept["embedded"].shape[1] :]
        seen.residual.append((image - kept["embedded"]).norm(dim=-1).cpu())
        if kept["last"] is not None:
            last = kept["last"]
            seen.change.append(float((image - last).abs().mean() / last.abs().mean()))
        kept["last"] = image

    def predicted(_: nn.Module, __: Any, output: Any) -> None:
        half = output[0].shape[1] // 2
        seen.velocity.append(float(output[0][:, :half].norm()))

    def keeper(series: list[list[Tensor]]) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            tokens = kept["embedded"].shape[1] // 2
            flat = output.flatten(2) if output.ndim == 4 else output  # noqa: PLR2004
            series[-1].append(flat[:, -tokens:].float().cpu())

        return keep

    with ExitStack() as hooks:
        handles = [
            transformer.x_embedder.register_forward_hook(embedded),
            transformer.norm_out.register_forward_pre_hook(finished),
            transformer.register_forward_hook(predicted),
            *(block.attn.norm_k.register_forward_hook(keeper(seen.keys)) for block in chosen),
            *(block.attn.to_v.register_forward_hook(keeper(seen.values)) for block in chosen),
        ]
        for handle in handles:
            hooks.callback(handle.remove)
        yield seen


@contextmanager
def rounded_blocks(transformer: Any) -> Iterator[None]:
    """Move every block's outputs by one unit in bfloat16's last place, up or down (curve G)."""
    dice = torch.Generator().manual_seed(0)

    def nudge(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            sign = torch.randint(2, output.shape, generator=dice).to(output.device) * 2 - 1
            return output * (1 + sign * 2.0**-8)
        return tuple(nudge(_, __, one) for one in output)

    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    handles = [block.register_forward_hook(nudge) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eight_bits(transformer: Any) -> Iterator[None]:
    """Round inputs and weights of the blocks' linear layers to float8, by row (curve I)."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    layers = [
        m for b in blocks for name, m in b.named_modules()
        if isinstance(m, nn.Linear) and "norm" not in name
    ]  # fmt: skip
    own = [layer.weight.data for layer in layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)) for layer in layers
    ]
    try:
        for layer in layers:
            layer.weight.data = rounded(layer.weight.data)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.data = weight


if __name__ == "__main__":
    main()
