"""Train Spark: one command, some sittings of an hour of an H100 in all.

    export PYTHONPATH=benchmarks
    python -m spark_training --out runs/spark
    torchrun --nproc-per-node 2 -m spark_training --out runs/spark --stop-after 25   # two GPUs
    python -m spark_training --out /tmp/try --steps 4 4 4 4 --pool 200 --batch 8        # on a CPU

It trains four parts, one after the other: a VAE, a recogniser that checks edits, the flow, and the
flow again under guidance. Run again with the same `--out`, it goes on from the last minute that it
saved. Each part's file stays, so a part that is done is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxfire.spark import weights as weights_file
from fluxfire.spark.model import parts as build
from fluxfire.spark.recogniser import Recogniser
from fluxfire.spark.scenes import Dice
from fluxfire.spark.tasks import SIZES
from spark_training import average as copies
from spark_training.average import Average, Masters, parameters
from spark_training.clock import Budget, Clock, Log
from spark_training.data import Encoder, Pool, compile_drawing
from spark_training.flow import TRAINED, Flow, train_flow
from spark_training.recogniser import train_recogniser
from spark_training.vae import train_vae
from spark_training.workers import Workers, join

PARTS = ("vae", "recogniser", "flow", "guided")
_MINUTES = (5.0, 6.0, 60.0, 15.0)
Pools = list[tuple[Pool, int]]
"""Data, each with how many of a round's batches it gives."""


def main() -> None:
    """Train what is left."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder, made if needed")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument(
        "--minutes", type=float, nargs=4, default=_MINUTES, metavar=tuple(p.upper() for p in PARTS),
        help="budgets of the parts (default: %(default)s)",
    )  # fmt: skip
    budgets.add_argument(
        "--steps", type=int, nargs=4, metavar=tuple(p.upper() for p in PARTS),
        help="the same in steps, which are as much training on a slow machine as on a fast one",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--stop-after", type=float, help="minutes after which to save and stop")
    parser.add_argument("--pool", type=int, default=240_000, help="edits of the usual size")
    parser.add_argument("--batch", type=int, default=256, help="edits a step and GPU")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many picture sizes")
    arguments = parser.parse_args()

    workers = join()
    torch.manual_seed(time.time_ns() % 2**31 + workers.rank)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if workers.device == "cuda":
        compile_drawing()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    unit: Literal["minutes", "steps"] = "steps" if arguments.steps else "minutes"
    amounts = arguments.steps or arguments.minutes
    budget = {p: Budget(a, unit) for p, a in zip(PARTS, amounts, strict=True)}
    stop = began + 60 * (arguments.stop_after or float("inf"))
    models = build()
    # Both parts of the flow see the same edits: drawing them takes two minutes.
    draw = functools.cache(lambda: _draw(models, out, arguments, workers))
    for part in arguments.parts:
        log = Log(out / f"{part}.jsonl", silent=not workers.first)
        if part in ("vae", "recogniser"):
            if workers.first and not (out / f"{part}.safetensors").exists():
                _convolutions(part, models, out, budget[part], log, workers.device, arguments.batch)
            workers.agree(0.0)  # the others wait
            continue
        if not _flow(
            models, out, budget[part], log, workers,
            part=part, stop=stop, draw=draw, batch=arguments.batch,
        ):  # fmt: skip
            break
    if workers.first:
        assemble(models, out)


def _convolutions(
    part: str, models: dict[str, Any], out: Path, budget: Budget, log: Log, device: str, batch: int
) -> None:
    """Train the VAE or the recogniser, and write its file."""
    module: Any = models["vae"] if part == "vae" else Recogniser()
    train, most = (train_vae, 96) if part == "vae" else (train_recogniser, 256)
    train(module, budget, log, device, SIZES, batch=min(batch, most))
    facts = {}
    if part == "vae":
        config = module.config
        facts = {"scale": str(config.scaling_factor), "shift": str(config.shift_factor)}
    _write(out / f"{part}.safetensors", module.state_dict(), **facts)


def _write(path: Path, state: dict[str, torch.Tensor], **facts: str) -> None:
    partial = path.with_suffix(".part")  # so that a crash does not damage the old file
    held = {key: value.detach().half().cpu().contiguous() for key, value in state.items()}
    save_file(held, partial, metadata=facts)
    partial.replace(path)


def _load_vae(vae: Any, path: Path, device: str) -> None:
    vae.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    vae.register_to_config(scaling_factor=float(facts["scale"]), shift_factor=float(facts["shift"]))
    vae.to(device)


def _flow(
    models: dict[str, Any],
    out: Path,
    budget: Budget,
    log: Log,
    workers: Workers,
    *,
    part: str,
    stop: float,
    draw: Callable[[], tuple[Encoder, Pools]],
    batch: int,
) -> bool:
    """Train from the last minute saved; the file holds the averages.

    Args:
        models: every component, by name.
        out: the folder.
        budget: of this part.
        log: where the loss goes.
        workers: the processes that train together.
        part: `"flow"`, or `"guided"`, which starts from the flow's weights.
        stop: when to stop although something is left, by `time.perf_counter`.
        draw: returns the data.
        batch: edits a step and process.

    Returns:
        Whether the budget is spent.
    """
    path = out / f"{part}.safetensors"
    before = _spent(path)
    start = path if path.exists() else out / "flow.safetensors"
    if path.exists() and Clock(budget, **before).over:
        return True
    device = workers.device
    modules = [models[name].float().to(device) for name in TRAINED]
    weights = parameters(modules)
    names = [f"{n}.{key}" for n in TRAINED for key, _ in models[n].named_parameters()]
    if start.exists():
        state = load_file(start)
        copies.copy([state[name].to(device).float() for name in names], weights)
    masters = Masters(weights)  # before Flow rounds the weights to bfloat16
    average = Average(masters.values, start=masters.values if start.exists() else None)
    encoder, pools = draw()
    flow = Flow(models, encoder, device)
    if part == "guided":
        source = load_file(out / "flow.safetensors")
        teacher = [copy.deepcopy(module) for module in flow.modules]
        copies.copy([source[name].to(device) for name in names], parameters(teacher))
        flow.learn_from([module.eval().requires_grad_(False) for module in teacher])
    if device == "cuda":
        flow.compile()
    clock = Clock(budget, **before, stop=stop, agree=workers.agree)

    def save() -> None:
        if not workers.first:
            return
        if not all(bool(value.isfinite().all()) for value in masters.values):
            raise FloatingPointError(f"training diverged; {path} holds the last good weights")
        spent = json.dumps({"seconds": clock.seconds, "steps": clock.steps})
        _write(path, dict(zip(names, average.values, strict=True)), clock=spent)

    train_flow(
        flow, pools, clock, log, workers,
        masters=masters, average=average, batch=batch, on_minute=save,
        peak=_PEAKS[part],
    )  # fmt: skip
    for module in modules:
        module.float()
    copies.copy(average.values, weights)
    return workers.agree(clock.spent) >= 1


def _spent(path: Path) -> dict[str, Any]:
    """Return the seconds and steps that a part's file has had so far."""
    if not path.exists():
        return {"seconds": 0.0, "steps": 0}
    with safe_open(path, "pt") as file:
        spent: dict[str, Any] = json.loads(file.metadata()["clock"])
    return spent


def assemble(models: dict[str, Any], out: Path) -> None:
    """Put what is trained so far into one file, as the package has it."""
    trained = [part for part in PARTS if (out / f"{part}.safetensors").exists()]
    if not {"vae", "recogniser", "flow"}.issubset(trained):
        return
    _load_vae(models["vae"], out / "vae.safetensors", "cpu")
    recogniser = Recogniser()
    seen = load_file(out / "recogniser.safetensors")
    recogniser.load_state_dict({key: value.float() for key, value in seen.items()})
    state = load_file(out / f"{trained[-1]}.safetensors")
    for name in TRAINED:
        named = list(models[name].named_parameters())
        copies.copy([state[f"{name}.{key}"] for key, _ in named], [p for _, p in named])
    weights_file.save({**models, "recogniser": recogniser}, out / "spark.safetensors")


_PEAKS = {"flow": 1.2e-3, "guided": 4e-4}


def _draw(
    models: dict[str, Any], out: Path, arguments: argparse.Namespace, workers: Workers
) -> tuple[Encoder, Pools]:
    """Draw edits: most are square; one in six has another shape, one in eight is words alone."""
    began, n, chunk = time.perf_counter(), arguments.pool, 40_000
    seed = _spent(out / "flow.safetensors")["steps"], workers.rank  # each sitting draws new ones
    _load_vae(models["vae"], out / "vae.safetensors", workers.device)
    encoder = Encoder(models, workers.device)
    usual = [
        encoder.edits(min(chunk, n), SIZES[0], Dice("pool", *seed, i))
        for i in range(-(-n // chunk))
    ]
    pools = [(_join(usual), 30)]
    others = SIZES[1 : arguments.sizes]
    pools += [(encoder.edits(n // 10, size, Dice("pool", *seed, *size)), 2) for size in others]
    pools += [(encoder.captioned(n // 6, SIZES[0], Dice("captions", *seed)), 6)]
    seconds = time.perf_counter() - began
    log = Log(out / "flow.jsonl", silent=not workers.first)
    log.write(part="pool", edits=float(sum(len(p) for p, _ in pools)), seconds=seconds)
    return encoder, pools


def _join(pools: list[Pool]) -> Pool:
    first = pools[0]
    columns = ("source", "target", "t5", "clip")
    return Pool(first.grid, *(torch.cat([getattr(p, c) for p in pools]) for c in columns))


if __name__ == "__main__":
    main()
