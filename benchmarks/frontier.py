"""Quality against speed, ours and others': the same held-out edits of Spark, an H100's steps.

python benchmarks/frontier.py -n 48 --out benchmarks/results/frontier.json

Quality is what each cache does to Spark's pictures. Speed is what it leaves out there, at the
prices that FLUX's compiled steps were measured to have on an H100 (`reference.json`): so it is what
a cache would gain if it cost nothing itself.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any, Self

import torch

import fluxfire
from fluxfire import presets
from fluxfire.bench import (
    Contender,
    Prices,
    Workload,
    compare,
    held_out,
    load_result,
    save_result,
    stamp,
)
from fluxfire.bench.rivals import CacheDit, MagCache
from fluxfire.loading import load as load_pipeline
from fluxfire.passes import FirstBlockCache, ParaAttention, ReferenceCache
from fluxfire.protocol import Pass
from fluxfire.reporting.statistics import StepKind
from fluxfire.text import table

REFERENCE = Path(__file__).parent / "results" / "reference.json"
STEPS = 28


def contenders() -> list[tuple[str, Contender]]:
    """List who is compared, by family."""
    found: list[tuple[str, Contender]] = [("plain", Contender("plain"))]

    def ours(family: str, *passes: Pass) -> None:
        told = ", ".join(f"{getattr(p, 'threshold', None) or p.spacing}" for p in passes)  # type: ignore[attr-defined]
        found.append((family, Contender(f"{family} {told}", passes)))

    for threshold in (0.05, 0.1, 0.2, 0.3, 0.5):
        ours("FirstBlockCache", FirstBlockCache(threshold, predict="quadratic"))
    for spacing in (0.1, 0.2, 0.33, 0.5):
        ours("ReferenceCache", ReferenceCache(spacing))
    for threshold, spacing in ((0.1, 0.1), (0.2, 0.2), (0.3, 0.33), (0.5, 0.33), (0.5, 0.5)):
        cache = FirstBlockCache(threshold, predict="quadratic")
        ours("both", cache, ReferenceCache(spacing))
    for name in ("balanced", "fast"):
        caches = tuple(p for p in presets.named(name) if p.stage == "caching")
        found.append((name, Contender(name, caches)))
    for threshold in (0.08, 0.12):
        found.append(
            ("para-attn", Contender(f"para-attn {threshold}", (ParaAttention(threshold),)))
        )
        for taylor in (False, True):
            family = "cache-dit F1B0, TaylorSeer" if taylor else "cache-dit F1B0"
            rival = CacheDit(threshold, taylor)
            found.append((family, Contender(f"{family} {threshold}", role="rival", rival=rival)))
    found.append(("MagCache", Contender("MagCache 0.06", role="rival", rival=MagCache())))
    return found


def prices() -> Prices:
    """Return what the steps of an edit to 1024 × 1024 took, of the exact passes compiled."""
    rows = {
        r["contender"]: r
        for r in load_result(REFERENCE)["rows"]
        if not r["error"] and r["workload"]["size"][0] == 1024  # noqa: PLR2004
    }
    exact, fast = rows["reuse"], rows["fast"]
    return Prices(
        computed=exact["step"]["median"],
        reused=exact["reuse_step"]["median"],
        hit=fast["hit_step"]["median"],
        around=exact["edit"]["median"] - sum(exact["phases"]["denoising"]["seconds"][:1]),
    )


def main() -> None:
    """Edit with every contender, and price what it left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=48, help="held-out edits")
    arguments = parser.parse_args()

    pipe = load_pipeline("spark")
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=torch.float32)
    work, examples, priced = Workload.usual(pipe, steps=STEPS), held_out(arguments.n), prices()
    rows: list[dict[str, Any]] = []
    plain: list[Any] = []
    for family, contender in contenders():
        with contender.applied(pipe) as own:
            calibrate = lambda own=own: work.run(own, examples[0])  # noqa: E731
            pictures, spent = [], []
            with contender.beginning(own, work, calibrate):
                for number, example in enumerate(examples):
                    with _Counting(own.transformer) as counted:
                        pictures.append(work.run(own, example, seed=number))
                    spent.append(counted.kinds(own, contender))
        plain = plain or pictures
        near = compare(pictures, plain).to_dict()
        edits = [priced.of(kinds) for kinds in spent]
        counts = Counter(kind for kinds in spent for kind in kinds)
        rows.append(
            {
                "family": family,
                "contender": contender.name,
                "seconds": mean(edits),
                "speed": priced.of(["computed"] * STEPS) / mean(edits),
                "steps": {kind: n / len(examples) for kind, n in counts.items()},
                "success": mean(bool(e.right(p)) for e, p in zip(examples, pictures, strict=True)),
                "psnr": near["psnr"],
                "ssim": near["ssim"],
                "flip": near["flip"],
            }
        )
        told = {"examples": arguments.n, "steps_each": STEPS, "prices": vars(priced)}
        save_result({"benchmark": "frontier", **stamp(), **told, "rows": rows}, arguments.out)
        print(rows[-1]["contender"], rows[-1]["speed"], rows[-1]["psnr"], flush=True)
    print(
        table(
            ("", "× compiled", "PSNR", "worst", "right"),
            [
                (
                    r["contender"],
                    f"{r['speed']:.2f}x",
                    f"{r['psnr']['mean']:.1f}",
                    f"{r['psnr']['worst']:.1f}",
                    f"{r['success']:.0%}",
                )
                for r in rows
            ],
        )
    )


class _Counting:
    """Counts the steps in which the second block is computed, whoever decides that.

    Of a cache that computes more than one block ahead, as cache-dit does as it comes, that tells
    nothing.
    """

    def __init__(self, transformer: Any) -> None:
        self._norm = transformer.transformer_blocks[1].norm1
        self._count = 0

    def __enter__(self) -> Self:
        self._hook = self._norm.register_forward_hook(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _seen(self, *_: object) -> None:
        self._count += 1

    def kinds(self, pipe: Any, contender: Contender) -> list[StepKind]:
        """Return the kind of each step; of a rival, hits in any order."""
        if contender.rival is None:
            return fluxfire.report(pipe).runs[-1].step_kinds
        kinds: list[StepKind] = ["computed"] * self._count
        hits: list[StepKind] = ["hit"] * (STEPS - self._count)
        return kinds + hits


if __name__ == "__main__":
    main()
